"""Reads a session as a Record, wherever it is kept: the one way that comparison, report and replay get one.

Everything is only read, and no lock is taken, also while a night is at work on it. What comes from elsewhere is checked
(verify.py), and nothing of it is executed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import storage
from lab.errors import LabError
from lab.session.record import Record
from lab.session.repository import here
from lab.session.session import PREFIX, Session, folder_of
from lab.share import archive, ledgers
from lab.share.archive import Files, Wrong
from lab.share.export import ENCODER, views
from lab.share.verify import verified


def read(source: str | Path, device: str | None = None) -> Record:
    """A session.

    Args:
        source: DEVICE/TAG of a session on this machine, its own or imported; a session's folder or branch; an export,
            as a folder or an archive; a published branch, exp/DEVICE/TAG, of this repository or of a remote of it; a
            results.tsv.
        device: of a results.tsv: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError: there is no such session, or it was refused; the reason says why.
    """
    session = own(str(source))
    return of_session(session) if session else find(str(source), device)[1]


def read_all(names: list[str], devices: list[str]) -> list[Record]:
    """Reads several sessions, as `read`; `devices` are those of the ledgers among them, in order."""
    left = list(devices)
    records = [
        read(name, left.pop(0) if left and _is_ledger(Path(os.path.expanduser(name))) else None) for name in names
    ]
    if left:
        raise LabError(f"--device {left[0]} belongs to none of these sessions: give one for each ledger, in order")
    return records


def _is_ledger(path: Path) -> bool:
    return path.is_file() and not archive.is_archive(path)


# --- This machine's own ---


def own(source: str) -> Session | None:
    """A session of this machine by its folder, its branch or DEVICE/TAG; None if there is none.

    Raises:
        LabError: it is somebody else's folder. What it says would be believed, and where: git runs in the repository
            that its session.json names, with the settings that are there.
    """
    for folder in (Path(os.path.expanduser(source)), folder_of(source.removeprefix(PREFIX))):
        if (folder / "session.json").exists():
            sessions = storage.home() / "sessions"
            if sessions.resolve() not in folder.resolve().parents:
                raise LabError(
                    f"{folder} is a session's working folder, and not under {sessions}. Have it exported where it "
                    "was run (python -m lab export X.tar.gz); or, if that was here, set AUTORESEARCH_HOME to its "
                    "home"
                )
            return Session(folder)
    return None


def of_session(session: Session) -> Record:
    """A session of this machine, as far as it has come. LabError if its first train.py is gone."""
    session.refresh()
    try:
        return Record(session.state, (session.judge / "train.py").read_bytes())
    except OSError as error:
        raise LabError(f"session {session.folder} is damaged: {error}") from error


# --- From elsewhere ---


def find(source: str, device: str | None = None) -> tuple[Files, Record]:
    """The files and the record of a session from elsewhere, checked: an export, an imported session, a published branch
    or a ledger. LabError if there is none, or it was refused."""
    try:
        for path in (Path(os.path.expanduser(source)), storage.home() / "imported" / source.removeprefix(PREFIX)):
            if path.exists():
                if not (path.is_file() or path.is_dir()):
                    raise Wrong("it is neither a file nor a folder, and so can't be read as a ledger or an export")
                is_ledger = _is_ledger(path)
                if device and not is_ledger:
                    raise Wrong("it names its device itself (leave --device out)")
                journal = ENCODER.encode_lines(list(ledgers.events_of(path, device))) if is_ledger else b""
                files = {"journal.jsonl": journal} if is_ledger else archive.read(path)
                return files, verified(files)
        repository = here()
        if repository and (files := archive.read_branch(repository, source)):
            return files, verified(files)
    except (Wrong, OSError) as error:
        advice = "have the session exported and sent again, or fix what the message names"
        raise LabError(f"{source} was refused: {error}; {advice}") from None
    raise LabError(
        f"there is no session {source}: it is not a folder, an archive, a ledger, a DEVICE/TAG in {storage.home()}, "
        "or a branch that lab export --publish made. Check the name"
    )


def _grown(journal: bytes, known: bytes) -> bool:
    """Whether a journal goes on where another ends; what was noted of their ledgers may differ."""
    if journal.startswith(known):
        return journal != known
    (first, _, rest), (first_before, _, rest_before) = journal.partition(b"\n"), known.partition(b"\n")
    try:
        begun, before = ({**json.loads(line), "notes": None} for line in (first, first_before))
    except ValueError:
        return False
    return begun == before and begun.get("source") == "ledger" and rest.startswith(rest_before)


def import_session(source: str, device: str | None = None) -> Path:
    """Copies a session from elsewhere, checked, to AUTORESEARCH_HOME/imported/DEVICE/TAG, also in place of an earlier
    state of it. What was set aside or replaced is told on standard error.

    Args:
        source, device: as of `read`.

    Raises:
        LabError: it is none, is damaged, holds what it must not, or another one is there; nothing was changed.
    """
    files, record = find(source, device)
    files |= views(record)
    for note in record.started.notes:
        print(note, file=sys.stderr)
    target = storage.home() / "imported" / record.name
    if not target.exists():
        try:
            return archive.write(files, target, record.name)
        except storage.DataError:
            if not target.exists():  # else another import was faster
                raise
    try:
        before = archive.read(target)
    except (Wrong, OSError):
        before = {}
    journal, known = files["journal.jsonl"], before.get("journal.jsonl", b"")
    if before == files:
        print(f"{record.name} is imported already", file=sys.stderr)
    elif known and _grown(journal, known):
        archive.write(files, target, record.name, replace=True)
        print(f"{record.name} was imported when it was shorter; now it is as in {source}", file=sys.stderr)
    else:
        raise LabError(
            f"{target} holds another session of that name. Remove it to import {source}; if {source} is a ledger, "
            "you can rename its file instead"
        )
    return target
