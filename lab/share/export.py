"""An export: the journal of a session, what can't be derived of it, and views of it for people (see verify.py).

Published it is a branch that others can build on, exp/DEVICE/TAG: it begins at the session's first commit, has a commit
for each kept change of train.py, so that what it changes of train.py is the best configuration, and ends with one that
adds the export as the folder session/.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import storage
from lab.compare.analysis import Analysis
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.session import ledger
from lab.session.record import Record
from lab.session.session import Session
from lab.share import archive
from lab.share.archive import Files, Wrong
from lab.share.summary import summary
from lab.share.verify import CONTROL, verified

PART = r"[\w.+@$-]+"  # of a path
ENCODER = msgspec.json.Encoder()


def export_session(session: Session, target: Path) -> Path:
    """Writes a session as a folder, or as an archive if `target` ends in .tar.gz: whole or not at all.

    Raises:
        LabError: `target` exists, or something of the session is damaged.
        DataError: it can't be written; the reason says why.
    """
    if os.path.lexists(target):
        raise LabError(f"{target} exists; remove it, or export under another name")
    return archive.write(files_of(session), Path(target), session.name.replace("/", "-"))


def publish(session: Session, replace: bool = False) -> tuple[str, str]:
    """Makes the branch of a session; nothing that is checked out is touched, nothing is sent.

    Args:
        replace: an older one of that name.

    Returns:
        (the branch, its last commit).

    Raises:
        LabError: there is another branch of that name, or the session is damaged; nothing was changed.
    """
    repository, branch, files = session.repository, f"exp/{session.name}", files_of(session)
    commit = session.started.commit
    for experiment in verified(files).state.kept:  # as it may leave this machine
        if experiment.number and experiment.applied:
            commit = repository.commit(commit, experiment.blob, experiment.description, like=experiment.here)
    files = archive.sealed(files) | {archive.ATTRIBUTES: archive.UNCHANGED}
    files = {archive.PUBLISHED + name: data for name, data in files.items()}
    commit = repository.commit_files(commit, archive.PUBLISHED, files, f"session {session.name}: its export")
    there = repository.commit_of(f"refs/heads/{branch}")
    if there and repository.git("diff", "--name-only", there, commit) == "":
        return branch, there
    if there and not replace:
        raise LabError(
            f"the branch {branch} exists, at {there[:7]}, and differs from this session now. To replace it, add "
            "--replace"
        )
    repository.git("branch", "--no-track", *["--force"] * bool(there), branch, commit)
    return branch, commit


def files_of(session: Session) -> Files:
    """The files of a session of this machine, as it may leave it: paths are cut down to names in all but the diffs,
    which have to stay what they are. Equal sessions give equal files. Losses by row that are gone are told on standard
    error. LabError if something of it is damaged."""
    session.refresh()
    clean = _cleaner(session.local.repository, session.folder, storage.home(), Path.home())
    events = []
    for event in map(msgspec.to_builtins, session.journal.events):
        diff = {"diff": event.pop("diff")} if "diff" in event else {}
        events.append(clean(event) | diff)
    try:
        profile = clean(msgspec.json.decode((session.folder / "profile.json").read_bytes()))
        files = {
            "journal.jsonl": ENCODER.encode_lines(events),
            TRAIN: (session.judge / TRAIN).read_bytes(),
            "profile.json": msgspec.json.format(ENCODER.encode(profile), indent=1) + b"\n",
        }
        missing = []
        for run in session.state.runs.values():
            path = session.run_folder(run.number) / "rows.npz"
            if run.scored and run.scored.rows and path.is_file():
                files[f"{archive.ROWS}/{run.number:04d}.npz"] = path.read_bytes()
            elif run.scored and run.scored.rows:
                missing.append(f"{run.number}")
        files |= views(verified(files))  # what this project would not import is no use to anybody
    except (Wrong, OSError, msgspec.DecodeError) as error:
        raise LabError(f"session {session.folder} can't be exported: {error}; fix that and export again") from error
    if missing:
        print(
            f"the export lacks the losses by row of run{'s' * (len(missing) > 1)} {', '.join(missing)}: rows.npz is "
            f"missing in their folders under {session.folder / 'runs'}. Whoever gets the export has the scores, and "
            "can't compute them again from the losses; all else is in it",
            file=sys.stderr,
        )
    return files


def views(record: Record) -> Files:
    """The files of an export that are made of its journal. Where the baseline was run for other times, the ledger has a
    column more: the effect of a change as a factor of time, on all runs of the session."""
    rows, columns = ledger.rows_of(record.state), ledger.COLUMNS
    if any(experiment.kind == "scale" for experiment in record.state.decided):
        analysis, columns = Analysis(record), (*columns, "in_time")
        for row in rows:
            if row["kind"] != "parent" and (experiment := analysis.experiments.get(row["experiment"])):
                row["in_time"] = str(analysis.times(experiment) or "")
    return {"results.tsv": ledger.dumps(rows, columns), "SUMMARY.md": summary(record).encode()}


def _cleaner(*known: Path | str) -> Callable:
    """A function that takes control characters out of the texts of any JSON, and cuts absolute paths down to their last
    part: they name people.

    Args:
        known: folders of this machine, which may have blanks in their names.
    """
    folders = sorted((str(path) for path in known if len(str(path)) > 1), key=len, reverse=True)
    roots = "|".join(r"[/\\]+".join(map(re.escape, re.split(r"[/\\]+", folder))) for folder in folders)
    pattern = re.compile(
        rf"(?<![\w.~/])(?:file:/+(?=/))?(?:(?P<root>{roots})(?!{PART})(?P<rest>(?:[/\\]+{PART})*)"
        rf"|(?:[A-Z]:)?[/\\]+(?:users|home)[/\\]+{PART}(?: {PART})*(?:[/\\]+{PART})+"  # a name may have blanks
        rf"|(?:/{PART}){{2,}}|(?:[A-Z]:|[\\]{{2}}{PART})(?:[/\\]+{PART})+)",
        re.IGNORECASE,
    )

    def last_part(path: re.Match) -> str:
        return "..." if path["root"] and not path["rest"] else ".../" + re.split(r"[/\\]", path[0])[-1]

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
