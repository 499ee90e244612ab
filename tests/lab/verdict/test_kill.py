"""The lab's processes are killed at random moments of a session that trains: a numpy model, in half a second."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import sessions
from sessions import check, git

import dataset
from lab.session.session import Session

LONGEST = 3.0  # seconds: what an experiment takes, about
WHO = ("command", "supervisor", "run", "command and supervisor", "all")


@pytest.fixture
def project(tmp_path, tiny_home, isolated_home):
    """A session in a copy of this project whose train.py is small and quick."""
    isolated_home.mkdir()
    (isolated_home / "data").symlink_to(tiny_home / "data")
    settings = {"AUTORESEARCH_HOME": str(isolated_home), "AUTORESEARCH_DATA": "tiny"}
    manifest = dataset.read_manifest(tiny_home / "data" / "tiny")
    tags = {"eval": manifest["eval_tag"], "data": manifest["data_tag"], "profile": "abc"}
    # A step outlasts the budget, so a run makes one, however busy the machine is: its tokens count in verdicts.
    train = (sessions.HERE / "fake_train.py").read_bytes().replace(b"time.sleep(0.005)", b"time.sleep(0.11)")
    return sessions.make(
        tmp_path / "project",
        train,
        project=True,
        budget=0.1,
        settings=settings,
        baseline_runs=2,
        **tags,
    )


class Night:
    """A session whose commands are processes, and the edits that it is given."""

    def __init__(self, session, home, rng):
        self.session, self.rng, self.edits = session, rng, 0
        self.train = session.repository.path / "train.py"
        self.environment = {**os.environ, "AUTORESEARCH_HOME": str(home)}

    def edit(self) -> bytes:
        """The next change of the best: better, worse, or broken."""
        self.edits += 1
        best = git(self.session.repository.path, "show", f"{self.session.branch}:train.py") + "\n"
        kind = self.rng.choice(["better", "worse", "worse", "broken"])
        if kind == "broken":
            return best.replace("def main():\n", f"def main():\n    raise RuntimeError('edit {self.edits}')\n").encode()
        learning = float(re.search(r"^LEARNING = ([\d.]+)", best, re.MULTILINE).group(1))  # 0.7 would be best
        learning += (0.5 if kind == "better" else -0.5 * self.rng.random()) * (0.7 - learning) + 1e-7 * self.edits
        return "".join(
            f"LEARNING = {learning!r}\n" if line.startswith("LEARNING") else line
            for line in best.splitlines(keepends=True)
        ).encode()

    def command(self, *arguments) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "lab", *arguments],
            cwd=self.session.repository.path,
            text=True,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def processes(self, who: str, command: subprocess.Popen) -> list[psutil.Process]:
        found = {"command": [], "supervisor": [], "run": []}
        if command.poll() is None:
            found["command"].append(psutil.Process(command.pid))
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if process.pid != command.pid and any(str(self.session.folder) in part for part in line):
                found["supervisor" if "supervise" in line else "run"].append(process)
        if who == "all":
            return sum(found.values(), [])
        return sum((found[name] for name in who.split(" and ")), [])

    def finish(self) -> str:
        """Lets the next command resume, to the end; gives what it said."""
        said = ""
        for _ in range(20):
            command = self.command("wait", "--wait", "60")
            said += command.communicate(timeout=120)[0]
            session = Session(self.session.folder)
            if not session.state.open:
                return said
        raise AssertionError(f"never done: {said}")


def kill_often(session, home, times, seed):
    rng = random.Random(seed)
    night, kills, landed = Night(session, home, rng), 0, dict.fromkeys(WHO, 0)
    night.finish()  # the baseline
    while kills < times:
        if not git(session.repository.path, "status", "--porcelain"):
            night.train.write_bytes(night.edit())
        taken = len(Session(session.folder).state.experiments)
        content = night.train.read_bytes()
        command = night.command("run", "-m", f"edit {night.edits}", "--wait", "60")
        time.sleep(rng.uniform(0, LONGEST))
        who = rng.choice(WHO)
        victims = night.processes(who, command)
        for process in victims:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        kills, landed[who] = kills + bool(victims), landed[who] + bool(victims)
        if "command" not in who and who != "all":
            command.communicate(timeout=120)
        command.kill()
        command.wait()
        night.finish()
        after = Session(session.folder)
        if len(after.state.experiments) == taken and after.state.experiments:  # killed before it was taken
            assert night.train.read_bytes() == content
            night.train.write_bytes(after.repository.content(after.state.best.blob))
        check(after)
        assert not [p for p in night.processes("run", command) if p.status() != psutil.STATUS_ZOMBIE]
    return Session(session.folder), landed


def test_killed_at_a_few_random_moments(project, isolated_home):
    session, _ = kill_often(project, isolated_home, 2, seed=1)
    assert session.state.baseline.status == "keep" and not session.state.open


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_at_fifty_random_moments(project, isolated_home, seed):
    session, landed = kill_often(project, isolated_home, 50, seed)
    print(
        f"{len(session.state.experiments)} experiments, {len(session.state.runs)} runs, "
        f"{sum(run.status == 'lost' for run in session.state.runs.values())} lost; killed: {landed}"
    )
    assert {e.status for e in session.state.experiments.values()} >= {"keep", "discard", "crash"}


@pytest.mark.slow
def test_a_replay_killed_at_random_moments_goes_on_and_repeats_nothing(project, isolated_home, tmp_path):
    base = (sessions.HERE / "fake_train.py").read_bytes()
    first = base.replace(b"LEARNING = 0.9", b"LEARNING = 0.75")
    second = first.replace(b"BATCH_SIZE = 4", b"BATCH_SIZE = 5")
    from test_replay import foreign

    source = foreign(tmp_path, (first, "keep", False), (second, "keep", False), base=base)
    rng = random.Random(1)
    night = Night(project, isolated_home, rng)
    night.finish()  # the baseline
    for who in ("all", "command and supervisor", "command"):
        command = night.command("replay", source, "--runs", "3")
        time.sleep(rng.uniform(0.5, LONGEST))
        for process in night.processes(who, command):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        command.communicate(timeout=120)
    command = night.command("replay", source, "--runs", "3")
    said, after = command.communicate(timeout=120)[0], Session(project.folder)
    assert command.returncode == 0, said
    replays = [e for e in after.state.decided if e.kind == "replay"]
    assert [e.description for e in replays] == ["step 1", "step 2"] and after.state.open == [], said
    assert all(len(after.state.results(e.blob)) >= 3 for e in replays)
    assert after.state.best.number == 0 and not git(project.repository.path, "status", "--porcelain")
    check(after)
