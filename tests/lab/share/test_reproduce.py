"""A change again, in a clean clone: what is refused before anything runs, and what is run."""

import subprocess
from types import SimpleNamespace

import pytest
import sessions
from sessions import attempt, edited

from lab.errors import LabError
from lab.reasons import because
from lab.session.events import Evidence, ExperimentDecided, ExperimentOpened, Verdict
from lab.session.record import Record
from lab.share import reproduce, sources
from lab.verdict import executor


@pytest.fixture
def record(tmp_path, runner, monkeypatch):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    attempt(session, edited(LOSS=0.9))
    monkeypatch.chdir(tmp_path / "project")
    return Record(session.state, session.repository.content(session.state.baseline.blob))


@pytest.mark.parametrize("number, pairs, why", [
    (7, 2, "no decided change"), (0, 2, "no decided change"), (1, 1, "2 at least"),
])  # fmt: skip
def test_what_is_no_change_or_too_few_runs_is_refused(record, number, pairs, why):
    with pytest.raises(LabError, match=why):
        reproduce.reproduce(record, number, pairs, print)


def test_outside_of_a_clone_it_says_where_to_go(record, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(LabError, match="in a clone"):
        reproduce.reproduce(record, 1, 2, print)


def test_the_parent_is_committed_and_the_change_confirmed_against_it_in_a_clone(record, monkeypatch):
    for name, value in {"COUNT": "1", "KEY_0": "commit.gpgSign", "VALUE_0": "true"}.items():  # nobody is there to sign
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    commands, run = [], subprocess.run

    def step(command, **more):
        if "lab" not in command:
            return run(command, **more)
        content = (more["cwd"] / "train.py").read_bytes()
        file = [open(command[i + 1], "rb").read() for i, part in enumerate(command) if part == "--file"]
        commands.append((command[3], content, file, more["env"]["AUTORESEARCH_BUDGET"]))
        return SimpleNamespace(returncode=0)

    gains = {"val_bpb": (0.1, 0.08, 0.12), "held_out_bpb": (0.09, 0.07, 0.11)}
    done = SimpleNamespace(
        state=SimpleNamespace(last=SimpleNamespace(verdict=Verdict("keep", because("baseline"), gains=gains)))
    )
    monkeypatch.setattr(reproduce.subprocess, "run", step)
    monkeypatch.setattr(sources, "read", lambda branch: done)
    found = reproduce.reproduce(record, 1, 2, lambda line: None)
    assert commands == [
        ("start", sessions.TRAIN, [], "300"),
        ("confirm", sessions.TRAIN, [edited(LOSS=0.9)], "300"),
    ]
    assert (
        found["stands"] and found["claimed"][0] == pytest.approx(0.1, abs=0.01) and found["found"] == (0.09, 0.07, 0.11)
    )
    assert found["session"] == "reproduce" and "the claim stands" in reproduce.told(found)
    with pytest.raises(LabError, match="from an earlier call"):
        reproduce.reproduce(record, 1, 2, print)


def test_an_experiment_that_changes_nothing_is_refused(record):
    state = record.state
    best = state.best
    state.take(ExperimentOpened(number=2, kind="change", blob=best.blob, parent=best.blob, onto=1))
    state.take(ExperimentDecided(experiment=2, verdict=Verdict("discard", because("not_run"))))
    with pytest.raises(LabError, match="changes nothing"):
        reproduce.reproduce(record, 2, 2, print)


BETTER, SIMPLER = (
    Evidence(gain=0.01, error=0.001, better=True),
    Evidence(gain=-1e-4, error=1e-4, simpler=True),
)


@pytest.mark.parametrize(
    "status, evidence, found, stands",
    [
        ("keep", BETTER, (0.01, 0.008, 0.012), True),
        ("keep", BETTER, (0.0, -0.002, 0.002), None),
        ("keep", BETTER, (-0.01, -0.012, -0.008), False),
        ("keep", SIMPLER, (-1e-4, -3e-4, 1e-4), True),
        ("keep", SIMPLER, (0.01, 0.008, 0.012), True),
        ("keep", SIMPLER, (-4e-4, -8e-4, 1e-5), None),
        ("keep", SIMPLER, (-0.01, -0.012, -0.008), False),
        ("discard", Evidence(gain=-1e-4, error=0.02), (0.01, 0.008, 0.012), None),
        ("crash", None, (0.1, 0.05, 0.15), None),
    ],
)
def test_what_was_claimed_is_what_is_tested(status, evidence, found, stands):
    gains = dict.fromkeys(("val_bpb", "held_out_bpb"), found)
    claimed = Verdict(status, because("baseline"), evidence=evidence)
    compared = reproduce.compared(claimed, Verdict("keep", because("baseline"), gains=gains))
    assert compared["stands"] is stands
    told = reproduce.told({"change": "x #1", **compared})
    assert ("nothing was claimed" in told) == (status != "keep") and f"found     {found[0]:+.6f}" in told


def test_a_clone_that_fails_is_removed_and_it_is_the_sessions_repository_that_is_cloned(record, tmp_path, monkeypatch):
    """Called in another clone, which may not have the commit that the session began with."""
    own, cloned, run = sources.own(record.name), [], subprocess.run
    elsewhere = sessions.repository(tmp_path / "elsewhere")
    monkeypatch.chdir(elsewhere.path)

    def step(command, **more):
        if command[1] != "clone":
            return run(command, **more)
        cloned.append(command)
        return SimpleNamespace(returncode=128)

    monkeypatch.setattr(reproduce.subprocess, "run", step)
    for _ in range(2):  # a folder that is left would stop the second call
        with pytest.raises(LabError, match="git clone --quiet --no-checkout failed"):
            reproduce.reproduce(record, 1, 2, lambda line: None)
    assert own and cloned[0][4] == own.local.repository != str(elsewhere.path)


def test_what_could_not_be_begun_can_be_asked_for_again(record, monkeypatch):
    """As the device is busy, say."""
    run = subprocess.run
    busy = SimpleNamespace(returncode=1)
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda command, **more: busy if "lab" in command else run(command, **more)
    )
    for _ in range(2):
        with pytest.raises(LabError, match="lab start failed"):
            reproduce.reproduce(record, 1, 2, lambda line: None)
