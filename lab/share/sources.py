"""Reads a session as a Record, wherever it is kept: the one way that comparison, report and replay get one.

Everything is only read, and no lock is taken, also while a night is at work on it. What comes from elsewhere is checked
(verify.py), and nothing of it is executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec

import storage
from lab.errors import LabError
from lab.session import ledger
from lab.session.journal import read_events
from lab.session.record import Record
from lab.session.repository import here
from lab.session.session import PREFIX, Session, folder_of
from lab.session.state import State
from lab.share import archive, ledgers
from lab.share.archive import Files, Wrong
from lab.share.summary import summary
from lab.share.verify import verified


def read(source: str | Path, device: str | None = None) -> Record:
    """A session.

    Args:
        source: DEVICE/TAG of a session on this machine, its own or imported; a session's folder or branch; an export,
            as a folder or an archive; a published branch, exp/DEVICE/TAG, of this repository or of a remote of it; a
            results.tsv.
        device: of the rows of a results.tsv that don't say it: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError: there is no such session, or it was refused; the reason says why.
    """
    session = own(str(source))
    return of_session(session) if session else find(str(source), device)[1]


def read_all(names: list[str], devices: list[str]) -> list[Record]:
    """As `read`, of several; `devices` are of the ledgers that don't say theirs, in order."""
    left = list(devices)
    records = [read(name, left.pop(0) if left and _is_untagged(name) else None) for name in names]
    if left:
        raise LabError(
            f"--device {left[0]} is of none of these sessions: it takes one for each ledger that does not "
            "say its device, in order"
        )
    return records


def _is_untagged(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_file() and not archive.is_archive(path) and not all(row["device"] for row in ledger.read(path).rows)


# --- This machine's own ---


def own(source: str) -> Session | None:
    """A session of this machine by its folder, its branch or DEVICE/TAG; None if there is none.

    Raises:
        LabError: it is somebody else's folder. What it says would be believed, and where: git runs in the repository
            that its session.json names, with the settings that are there.
    """
    for folder in (Path(source).expanduser(), folder_of(source.removeprefix(PREFIX))):
        if (folder / "session.json").exists():
            sessions = storage.home() / "sessions"
            if sessions.resolve() not in folder.resolve().parents:
                raise LabError(
                    f"{folder} is a session's working folder, and not under {sessions}: get it exported where it was "
                    "run (python -m lab export X.tar.gz); or, if that was here, set AUTORESEARCH_HOME to where it belongs"
                )
            return Session(folder)
    return None


def of_session(session: Session) -> Record:
    """A session of this machine, as far as it has come. LabError if its first train.py or its profile is gone."""
    session.refresh()
    try:
        base = (session.judge / "train.py").read_bytes()
        profile = json.loads((session.folder / "profile.json").read_bytes())
    except (OSError, ValueError) as error:
        raise LabError(f"session {session.folder} is damaged: {error}") from error
    return Record(session.state, base, profile, list(session.started.notes))


# --- From elsewhere ---


def find(source: str, device: str | None = None) -> tuple[Files, Record]:
    """The files and the record of a session from elsewhere, checked: an export, an imported session, a published branch
    or a ledger. LabError if there is none, or it was refused."""
    try:
        for path in (Path(source).expanduser(), storage.home() / "imported" / source.removeprefix(PREFIX)):
            if path.is_file() and not archive.is_archive(path):
                files, device = assembled(encoded(ledgers.events_of(path, device))), None
                break
            if path.exists():
                files = archive.read(path)
                break
        else:
            repository = here()
            files = archive.read_branch(repository, source) if repository else None
        if files:
            record = verified(files)
            if device and device != record.started.device:
                raise Wrong(f"it names {record.started.device} itself (leave --device out)")
            return files, record
    except (Wrong, OSError) as error:
        advice = "get the session exported and sent again, or fix what this names"
        raise LabError(f"{source} was refused: {error}; {advice}") from None
    raise LabError(
        f"there is no session {source}: neither a folder, an archive or a ledger of that name, nor "
        f"DEVICE/TAG in {storage.home()}, nor a branch that lab export --publish made; check the name"
    )


def encoded(events: list) -> bytes:
    """A journal's content."""
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


def assembled(journal: bytes, others: Files | None = None) -> Files:
    """The files of an export, from its journal and what can't be derived of that: train.py, profile.json, rows/. Equal
    sessions give equal files. ValueError if the journal is damaged."""
    others = others or {}
    try:
        state = State(read_events(journal))
    except ValueError as error:
        raise Wrong(f"journal.jsonl: {error}") from None
    files = {"journal.jsonl": journal, "results.tsv": ledger.dumps(ledger.rows_of(state)), **others}
    return archive.sealed(files | {"SUMMARY.md": summary(Record(state, others.get("train.py"))).encode()})
