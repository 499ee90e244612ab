"""An export: the journal of a session, what can't be derived of it, and views of it for people (see verify.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

import storage
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.session import ledger
from lab.session.journal import read_events
from lab.session.record import Record
from lab.session.session import Session
from lab.session.state import State
from lab.share import archive
from lab.share.archive import Files, Wrong
from lab.share.summary import summary
from lab.share.verify import CONTROL, verified

PART = r"[\w.+@$-]+"  # of a path


def export_session(session: Session, target: Path) -> Path:
    """Writes a session as a folder, or as an archive if `target` ends in .tar.gz: whole or not at all.

    Raises:
        LabError: `target` exists, or something of the session is damaged.
        DataError: it can't be written; the reason says why.
    """
    if os.path.lexists(target):
        raise LabError(f"{target} exists; remove it, or export under another name")
    return archive.write(files_of(session), Path(target), session.name.replace("/", "-"))


def files_of(session: Session) -> Files:
    """The files of a session of this machine, as it may leave it: paths are cut down to names in all but the diffs,
    which have to stay what they are. LabError if something of it is damaged."""
    session.refresh()
    clean = _cleaner(session.local.repository, session.folder, storage.home(), Path.home())
    events = []
    for event in map(msgspec.to_builtins, session.journal.events):
        diff = {"diff": event.pop("diff")} if "diff" in event else {}
        events.append(clean(event) | diff)
    try:
        profile = clean(msgspec.json.decode((session.folder / "profile.json").read_bytes()))
        others = {
            TRAIN: (session.judge / TRAIN).read_bytes(),
            "profile.json": msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n",
        }
        for run in session.state.runs.values():
            path = session.run_folder(run.number) / "rows.npz"
            if run.scored and run.scored.rows and path.is_file():
                others[f"{archive.ROWS}/{run.number:04d}.npz"] = path.read_bytes()
        files = assembled(events, others)
        verified(files)  # what this project would not import is no use to anybody
    except (Wrong, OSError, msgspec.DecodeError) as error:
        raise LabError(f"session {session.folder} can't be exported: {error}; fix that and export again") from error
    return files


def assembled(events: list, others: Files | None = None) -> Files:
    """The files of an export, from its events and what can't be derived of them. Equal sessions give equal files.

    Raises:
        Wrong: an event can't be.
    """
    journal, others = b"".join(msgspec.json.encode(event) + b"\n" for event in events), others or {}
    try:
        record = Record(State(read_events(journal)), others.get(TRAIN))
    except (ValueError, LabError) as error:
        raise Wrong(str(error)) from None
    views = {"results.tsv": ledger.dumps(ledger.rows_of(record.state)), "SUMMARY.md": summary(record).encode()}
    return archive.sealed({"journal.jsonl": journal, **others, **views})


def _cleaner(*known: Path | str) -> Callable:
    """A function that takes control characters out of the texts of any JSON, and cuts absolute paths down to their last
    part: they name people.

    Args:
        known: folders of this machine, which may have blanks in their names.
    """
    folders = {str(path) for path in known if len(str(path)) > 1}
    roots = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))
    pattern = re.compile(
        rf"(?<![\w.~/])(?:(?:{roots})(?!{PART})(?:[/\\]+{PART})*|(?:/{PART}){{2,}}"
        rf"|[A-Za-z]:(?:[/\\]+{PART})+)"
    )

    def last_part(path: re.Match) -> str:
        return "..." if path[0] in folders else ".../" + re.split(r"[/\\]", path[0])[-1]

    def clean(value):
        if isinstance(value, dict):
            return {clean(name): clean(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if not isinstance(value, str):
            return value
        text = value if value.isprintable() else CONTROL.sub("", value)
        return pattern.sub(last_part, text) if "/" in text or "\\" in text else text

    return clean
