"""A file of events, each one a line of JSON, appended and flushed to disk before what it announces is done."""

from __future__ import annotations

import json
from pathlib import Path

from storage import sync, sync_folder


class Journal:
    """The events of one session. It has one writer at a time (whoever holds the session's lock).

    Attributes:
        events: those read so far, as dicts with at least "event".
    """

    def __init__(self, path: Path):
        self.path, self.events, self._read = path, [], 0
        self.refresh()

    def refresh(self) -> list[dict]:
        """The events that others appended since; a last line that a power failure cut short is none: nothing was done
        on the strength of it."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        new = [event for line in whole.split(b"\n") if (event := _parsed(line))]
        self.events += new
        return new

    def append(self, event: str, **facts) -> dict:
        """Returns once the event is on disk."""
        self.refresh()
        line = {"event": event, **facts}
        created = not self.path.exists()
        with open(self.path, "ab") as file:
            file.truncate(self._read)  # what was cut short
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            sync(file.fileno())
        if created:
            sync_folder(self.path.parent)
        self._read = self.path.stat().st_size
        self.events.append(line)
        return line


def _parsed(line: bytes) -> dict | None:
    """The event on a line; None where blocks of a file were lost, which can only be its last ones."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def flush_files(folder: Path) -> None:
    """Makes the files of a folder, which others wrote, durable before the journal speaks of them."""
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            with open(path, "rb+") as file:
                sync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)
