"""Fixtures: a session whose experiments are written down, not run."""

import pytest
import sessions

from lab.night import limits, loop
from lab.reasons import because
from lab.session.events import Evidence, ExperimentApplied, ExperimentDecided, RunEnded, Verdict
from lab.verdict import executor
from lab.verdict.executor import supervise
from lab.verdict.opening import facts_of_change

TRAIN = b"""# Model
LOSS = 1.0
NOISE = 0.001
FAILS = None
LEAK = 0.0
DEPTH = 4

# Optimizer
MATRIX_LR = 0.04
WEIGHT_DECAY = 0.1

# Schedule
WARMUP_RATIO = 0.0

# Batches
BATCH_SIZE = 8
"""


@pytest.fixture
def at_once(monkeypatch):
    """A night's experiments are carried out at once, in this process, and nothing is waited for."""
    monkeypatch.setattr(executor, "launch", lambda session: sessions.Alive(session))
    monkeypatch.setattr(limits, "troubles", lambda session: [])
    monkeypatch.setattr(loop, "POLL", 0.001)
    monkeypatch.setattr(loop, "AGAIN_AFTER", (0.0, 0.0))


@pytest.fixture
def searched(tmp_path, runner):
    """A session whose train.py has a little of everything."""
    session = sessions.make(tmp_path / "repo", train=TRAIN)
    supervise(session)
    return session


@pytest.fixture
def tried(searched):
    """tried(old, new, status, t=0, near_miss=False): an experiment on the best, with its verdict; its number."""

    def decided(old, new, status="discard", t=-1.0, near_miss=False, **result):
        session, repository, best = searched, searched.repository, searched.state.best
        content = repository.content(best.blob)
        assert content.count(old.encode()) == 1, old
        facts = facts_of_change(session, best, content.replace(old.encode(), new.encode()))
        commit = repository.commit_of(session.branch)
        if status == "keep":  # nobody looks at the other commits
            commit = repository.commit(commit, facts["blob"], new)
        change = session.open_experiment(kind="change", commit=commit, description=new, **facts)
        if status == "keep" or result:
            run = session.start_run(change, change.blob, 42, session.budget)
            result = {"val_bpb": 1 - t * 0.001, "training_seconds": 300.0, **result}
            session.log(RunEnded(run=run.number, status="ok", seconds=310.0, result=result))
        evidence = Evidence(gain=t * 0.001, error=0.001, near_miss=near_miss, better=status == "keep")
        verdict = Verdict(status, because("not_run"), mean=1.0, parent_mean=1.0, evidence=evidence)
        session.log(ExperimentDecided(experiment=change.number, verdict=verdict))
        session.log(ExperimentApplied(experiment=change.number, commit=commit))
        if status == "keep":
            repository.move(f"refs/heads/{session.branch}", commit)
        return change.number

    return decided
