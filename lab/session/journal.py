"""A file of events, each a line of JSON, appended and on the disk before what it announces is done."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from lab.errors import LabError
from lab.session.events import EVENTS, Event
from lab.session.locks import Lock
from storage import sync, sync_folder

PATIENCE = 60.0  # seconds that another writer may take


class Journal:
    """The events of a session.

    Args:
        decoder: of its events.

    Attributes:
        events: those read so far.

    Raises:
        LabError: a line is damaged, or of a kind that this version does not know. Only the last one may be: what a
            power failure cut short is no event, as nothing was done on the strength of it.
    """

    def __init__(self, path: Path, decoder: msgspec.json.Decoder = EVENTS):
        self.path, self.decoder = path, decoder
        self.events: list = []
        self._read = 0  # bytes
        self.refresh()

    def refresh(self) -> list:
        """The events that others appended since."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        events = []
        for place, line in enumerate(lines):
            try:
                event = self.decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not any(map(kind_of, lines[place:])):  # cut short
                    break
                raise LabError(f"{self.path}, line {len(self.events) + 1}{_damage(line, error)}") from error
            self._read += len(line)
            self.events.append(event)
            events.append(event)
        return events

    def append(self, event: Event) -> list:
        """Returns once the event is on disk: the events since the last look, this one last. LabError, with nothing
        written, if it could not be read again, or the journal is shorter than it was."""
        with Lock(f"{self.path}.lock", timeout=PATIENCE, poll_interval=0.005):
            new = self.refresh()
            event.time = event.time or time.time()
            line = msgspec.json.encode(event) + b"\n"
            try:
                self.decoder.decode(line)
            except msgspec.DecodeError as error:
                raise LabError(f"an event does not fit the journal and is not written: {error}") from error
            created = not self.path.exists()
            with open(self.path, "ab") as file:
                if file.tell() < self._read:
                    raise LabError(f"{self.path} is shorter than it was: another copy was put in its place. Try again")
                file.truncate(self._read)  # what was cut short
                file.write(line)
                file.flush()
                sync(file.fileno())
            if created:
                sync_folder(self.path.parent)
            self._read = self.path.stat().st_size
        self.events.append(event)
        return [*new, event]


def kind_of(line: bytes) -> str | None:
    """The kind of event that a line names; None if it is not a JSON object."""
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return str(content.get("event", "")) if isinstance(content, dict) else None


def _damage(line: bytes, error: Exception) -> str:
    if (kind := kind_of(line)) and "$.event" in str(error):
        return (
            f": an event of the unknown kind {kind[:40]!r}; another version of this project wrote it: use that "
            "version, or update this one"
        )
    return f" is damaged ({error}); put back a copy of it, or import the session's export"


def read_events(content: bytes) -> list:
    """The events of a whole journal. LabError, with the line, if one is not an event."""
    events = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            events.append(EVENTS.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LabError(f"line {number}{_damage(line, error)}") from None
    return events


def sync_files(folder: Path) -> None:
    """Makes the files of a folder, which others wrote, durable before the journal speaks of them."""
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            with open(path, "rb+") as file:
                sync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)
