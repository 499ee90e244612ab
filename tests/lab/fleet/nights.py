"""Nights with several devices, of processes: the tests' fast trainer, on workers of this machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

import storage
from lab.session.journal import Journal
from lab.session.session import Session, fingerprints
from lab.session.state import State
from lab.verdict import gate
from lab.verdict.plan import account_of

LOOP = """import sys
sys.path.insert(0, sys.argv.pop(1))
from lab.night import limits
limits.troubles = lambda session: []
from lab.__main__ import main
sys.exit(main())
"""


def begin(session, home, experiments: int, devices: str | None, **environment) -> subprocess.Popen:
    """A night, as its command would be begun by the judge: but busy machines don't matter to it."""
    command = [sys.executable, "-c", LOOP, str(session.judge), "--session", str(session.folder), "night", "--planned=0"]
    command += ["--max-experiments", str(experiments), *(["--devices", devices] if devices else [])]
    return subprocess.Popen(
        command,
        cwd=session.repository.path,
        env={**os.environ, "AUTORESEARCH_HOME": str(home), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def processes(session, what: str) -> list[psutil.Process]:
    """Processes of a session: "join" (workers), "supervise" (the head), "night", "child.py" (runs)."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        ours = any(str(session.folder) in part or str(session.folder.parents[3]) in part for part in line)
        if ours and any(part == what or part.endswith(f"/{what}") for part in line):
            found.append(process)
    return found


def until(condition, seconds: float = 60.0):
    """Waits until something is true; what it is."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)
    return value


def state_of(session):
    return Session(Path(session.folder)).state


def sound(session):
    """What has to hold of every session, whatever happened."""
    state, best = State(), None
    for event in Journal(session.journal.path).events:
        before = state.best
        state.take(event)
        assert account_of(state).staked <= gate.ALPHA * max(1, account_of(state).keeps) + 1e-12
        if state.best is not before and before is not None:
            assert state.best.parent == before.blob, "a keep's parent was the best when it landed"
        best = state.best
    again, known = State(Journal(session.journal.path).events), Session(session.folder).state
    assert again.runs == known.runs and again.experiments == known.experiments and best is not None


def impatient(session, **constants) -> None:
    """Has the judge wait less: lab/fleet's constants by name, as of wire.SILENCE."""
    for name, value in {"wire_ALIVE_EVERY": 0.3, "wire_SILENCE": 2.0, "pool_GRACE": 1.5, **constants}.items():
        module, _, constant = name.partition("_")
        source = next(session.judge.glob(f"lab/*/{module}.py"))
        text, found = re.subn(rf"(?m)^{constant} = [^#\n]*", f"{constant} = {value!r}  ", source.read_text())
        assert found == 1, name
        source.write_text(text)
    facts = session.folder / "session.json"
    storage.write_json(facts, {**json.loads(facts.read_text()), "judge": fingerprints(session.judge)})
