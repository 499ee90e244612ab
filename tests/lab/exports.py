"""A session to export, and exports to tamper with."""

import argparse
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import sessions

import storage
from lab.errors import LabError
from lab.reasons import because
from lab.session import events
from lab.session.journal import read_events
from lab.session.record import Record
from lab.session.session import Session
from lab.session.state import State
from lab.share import archive, export, replay, sources
from lab.verdict import executor, opening

ROOT = Path(__file__).resolve().parents[2]
BASE = b"A = 0.0\nB = 0.0\nC = 0.0\n\n\n" + sessions.TRAIN + b"LOSS = LOSS - (A + B + C)\n"
PROFILE = json.loads((ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json").read_text())


def with_(content, **values):
    """A train.py with other constants."""
    lines = content.decode().splitlines(keepends=True)
    return "".join(
        f"{line.split(' = ')[0]} = {values[line.split(' = ')[0]]!r}\n"
        if line.split(" = ")[0] in values and "LOSS -" not in line
        else line
        for line in lines
    ).encode()


def begun(path, train=BASE, run=True, **facts) -> Session:
    """A session with its baseline run, and a profile that can be true.

    Args:
        run: else the baseline is kept without.
    """
    session = sessions.make(path, train, **facts)
    profile = PROFILE | {"device": session.started.device, "backend": session.started.backend}
    storage.write_json(session.folder / "profile.json", profile)
    if run:
        executor.supervise(session)
        return session
    session.log(events.ExperimentDecided(experiment=0, verdict=events.Verdict("keep", because("baseline"))))
    session.log(events.ExperimentApplied(experiment=0, commit=session.started.commit))
    return session


def worked(path) -> Session:
    """One that kept two changes, discarded one, and saw one crash."""
    session = begun(path)
    sessions.attempt(session, with_(BASE, A=0.1), message=f"A is a tenth, see {path.parent}/notes.txt")
    sessions.attempt(session, with_(BASE, A=0.1, B=-0.3), message="B | less")
    sessions.attempt(session, with_(BASE, A=0.1, FAILS="crash"), message="fails")
    sessions.attempt(session, with_(BASE, A=0.1, C=0.05), message="C <b>more</b>")
    return session


def moved(template: Path, target: Path) -> None:
    """Copies a home and the repositories of its sessions, with the paths of each other that they hold."""
    shutil.copytree(template, target, dirs_exist_ok=True)
    for path in target.rglob("*"):
        if path.is_file() and "objects" not in path.parts and str(template).encode() in (data := path.read_bytes()):
            path.write_bytes(data.replace(str(template).encode(), str(target).encode()))


def confirm(session, pairs=2, **facts):
    """Runs a confirmation of the best."""
    with opening.exclusive(session):
        best = session.state.best
        session.open_experiment(
            kind="confirm",
            blob=best.blob,
            parent=session.state.baseline.blob,
            onto=0,
            pairs=pairs,
            commit=best.here,
            description=best.description,
            **{"budget": session.budget} | facts,
        )
    executor.supervise(session)


class AtOnce:
    """In place of the process that carries experiments out: carries them out when it is asked whether it has ended."""

    def __init__(self, session):
        self.folder = session.folder

    def poll(self):
        executor.supervise(Session(self.folder))
        return 0


def replayed(session, source, capsys, **values) -> str:
    """What replaying a session says."""
    capsys.readouterr()
    options = {"all": False, "stack": False, "runs": 1, "dry_run": False, "json": False, **values}
    assert replay.go(session, argparse.Namespace(source=str(source), **options)) == 0
    return capsys.readouterr().out


@contextmanager
def home(path):
    """Another machine, for a while."""
    before = os.environ["AUTORESEARCH_HOME"]
    os.environ["AUTORESEARCH_HOME"] = str(path)
    try:
        yield
    finally:
        os.environ["AUTORESEARCH_HOME"] = before


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def imported(source, elsewhere, device=None):
    with home(elsewhere):
        return sources.import_session(str(source), device)


def refused(source, elsewhere, match, device=None):
    """Nothing of it is taken, and the reason is told."""
    before = contents(elsewhere) if elsewhere.exists() else {}
    with pytest.raises(LabError, match=match):
        imported(source, elsewhere, device)
    assert (contents(elsewhere) if elsewhere.exists() else {}) == before


def tampered(sent, seal=True, **changes):
    """An export with files changed (None: removed); `seal`: its manifest knows."""
    for name, data in changes.items():
        if data is None:
            (sent / name).unlink()
        else:
            (sent / name).parent.mkdir(exist_ok=True)
            (sent / name).write_bytes(data)
    if seal:
        files = {name: data for name, data in contents(sent).items() if name != "MANIFEST.json"}
        (sent / "MANIFEST.json").write_bytes(archive.sealed(files)["MANIFEST.json"])
    return sent


def events_in(sent) -> list[dict]:
    return [json.loads(line) for line in (sent / "journal.jsonl").read_bytes().splitlines()]


def written(events) -> bytes:
    return "".join(json.dumps(event) + "\n" for event in events).encode()


def with_events(sent, change, views=True):
    """An export whose journal was changed; `views`: with results.tsv and SUMMARY.md made of it."""
    events = events_in(sent)
    change(events)
    journal = {"journal.jsonl": written(events)}
    if views:
        others = {n: d for n, d in archive.read(sent).items() if n in ("train.py", "profile.json") or "rows" in n}
        journal = assembled(events, others)
    return tampered(sent, **journal)


def assembled(events, others) -> dict[str, bytes]:
    """The files of an export, from its events and what is not made of them."""
    journal = written(events)
    record = Record(State(read_events(journal)), others.get("train.py"))
    return {"journal.jsonl": journal, **others, **export.views(record)}
