"""Nights with several devices, of processes: the tests' fast trainer, on workers of this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lab.session.session import Session

LOOP = """import sys
sys.path.insert(0, sys.argv.pop(1))
from lab.night import limits
limits.troubles = lambda session: []
from lab.__main__ import main
sys.exit(main())
"""


def begin(session, home, experiments: int, devices: str, **environment) -> subprocess.Popen:
    """A night, as its command would be begun by the judge: but busy machines don't matter to it."""
    command = [sys.executable, "-c", LOOP, str(session.judge), "--session", str(session.folder), "night", "--planned=0"]
    command += ["--max-experiments", str(experiments), "--devices", devices]
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
