"""A night's processes are killed at random moments: what it comes to is what an undisturbed night comes to."""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sessions import check
from test_kill import Night as Processes
from test_kill import project  # noqa: F401 (a fixture)

import storage
from lab.session.session import Session, fingerprints

LONGEST = 2.0  # experiments: that a night goes on before it is killed
WHO = ("command", "supervisor", "command and supervisor", "all")  # a run alone, killed, is a crash
LOOP = """import sys
sys.path.insert(0, sys.argv.pop(1))
from lab.night import limits, loop
limits.troubles = lambda session: []
from lab.__main__ import main
sys.exit(main())
"""
STUB = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('stub_agent.py')))}"


def start(session, home, experiments: int, agent: bool) -> subprocess.Popen:
    """A night, as its command would be begun by the judge: but busy machines don't matter to it."""
    processes = Processes(session, home, random.Random(0))
    command = [
        sys.executable,
        "-c",
        LOOP,
        str(session.judge),
        "--session",
        str(session.folder),
        "night",
        "--planned=0",
        "--max-experiments",
        str(experiments),
        *(["--agent", STUB] if agent else []),
    ]
    return subprocess.Popen(
        command,
        cwd=session.repository.path,
        env=processes.environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def came_to(session) -> list[tuple]:
    """What does not depend on when things happened."""
    state = Session(session.folder).state
    return [
        (
            e.digest,
            e.description,
            e.status,
            e.onto,
            [run.seed for run in e.runs if run.status not in ("lost", "disturbed")],
        )  # those are made again
        for e in state.experiments.values()
    ]


def undisturbed(session, home, experiments, agent) -> tuple[list[tuple], float]:
    """(what it came to, seconds of an experiment)."""
    begun = time.monotonic()
    said = start(session, home, experiments, agent).communicate(timeout=1800)[0]
    assert "as many as --max-experiments allows" in said, said
    return came_to(session), (time.monotonic() - begun) / (experiments + 2)  # the baseline's runs, too


def killed_often(session, home, experiments, agent, seed, longest) -> tuple[list[tuple], dict[str, int]]:
    rng, landed = random.Random(seed), dict.fromkeys(WHO, 0)
    processes = Processes(session, home, rng)
    said = ""
    while "as many as --max-experiments allows" not in said:  # it may have ended just before it was to be killed
        night = start(session, home, experiments, agent)
        try:
            said = night.communicate(timeout=rng.uniform(0, longest))[0]
            assert night.returncode == 0, said
        except subprocess.TimeoutExpired:
            who = rng.choice(WHO)
            for process in processes.processes(who, night):
                try:
                    process.send_signal(signal.SIGKILL)
                    landed[who] += 1
                except psutil.NoSuchProcess:
                    pass
            if "command" not in who and who != "all":
                time.sleep(rng.uniform(0, 1))
                night.kill()
            said = night.communicate()[0]
    deadline = time.monotonic() + 20  # what a killed night had asked for a sample ends by itself
    while left := [p for p in processes.processes("run", night) if p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    check(Session(session.folder))
    return came_to(session), landed


def both(project, home, experiments, agent, seed):  # noqa: F811
    """(what an undisturbed night came to, what one came to that was killed, whom that hit)."""
    folder, tree = project.folder, project.repository.path
    aside = folder.parent / "aside"
    shutil.copytree(folder, aside, symlinks=True)
    shutil.copytree(tree, tree.parent / "tree-aside", symlinks=True)
    wanted, seconds = undisturbed(project, home, experiments, agent)
    for path, kept in ((folder, aside), (tree, tree.parent / "tree-aside")):
        shutil.rmtree(path)
        shutil.move(kept, path)
    return wanted, *killed_often(Session(folder), home, experiments, agent, seed, LONGEST * seconds)


@pytest.mark.parametrize("agent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_now_and_then(project, isolated_home, agent):  # noqa: F811
    wanted, found, _ = both(project, isolated_home, 2, agent, seed=1)
    assert found == wanted


def never_give_up(session):
    """Has the judge make a run again however often it was interrupted: of a hundred kills five in a row hit the same
    experiment by chance, which is taken to bring the machine down."""
    source, facts = session.judge / "lab" / "verdict" / "plan.py", session.folder / "session.json"
    text = source.read_text()
    assert text.count("\nMOST_LOST = 5 ") == 1
    source.write_text(text.replace("\nMOST_LOST = 5 ", "\nMOST_LOST = 1000 "))
    storage.write_json(facts, {**json.loads(facts.read_text()), "judge": fingerprints(session.judge)})


@pytest.mark.slow
@pytest.mark.parametrize("agent", [False, True])
def test_killed_at_a_hundred_random_moments(project, isolated_home, agent):  # noqa: F811
    never_give_up(project)
    wanted, found, landed = both(project, isolated_home, 60, agent, seed=2)
    print(landed)
    assert found == wanted and sum(landed.values()) >= 100
    assert {status for _, _, status, *_ in found} >= {"keep", "discard"}
