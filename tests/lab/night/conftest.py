"""Fixtures: a session whose experiments are written down, not run."""

import pytest
import sessions

from lab.genome import syntax as source
from lab.verdict.executor import supervise

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
def searched(tmp_path, runner):
    """A session whose train.py has a little of everything."""
    session = sessions.make(tmp_path / "repo", train=TRAIN)
    supervise(session)
    return session


@pytest.fixture
def tried(searched):
    """tried(old, new, status, t=0, near_miss=False): an experiment on the best, with its verdict; its number."""

    def one(old, new, status="discard", t=-1.0, near_miss=False):
        session = searched
        tree, best = session.tree, session.state.best
        content = tree.content(best.blob)
        assert content.count(old.encode()) == 1, old
        content = content.replace(old.encode(), new.encode())
        blob, head = tree.store(content), tree.commit_of(session.branch)
        commit = tree.commit(head, blob, new)
        change = session.begin(
            kind="change",
            blob=blob,
            parent=best.blob,
            onto=best.number,
            commit=commit,
            description=new,
            **vars(source.describe(content)),
        )
        if status == "keep":
            run = session.begin_run(change, blob, 42, session.budget)
            session.log(
                "ran",
                run=run.number,
                status="ok",
                seconds=310.0,
                result={"val_bpb": 1 - t * 0.001, "training_seconds": 300.0},
            )
        session.log(
            "verdict",
            experiment=change.number,
            status=status,
            reason="",
            mean=1.0,
            parent_mean=1.0,
            gate={
                "gain": t * 0.001,
                "error": 0.001,
                "near_miss": near_miss,
                "better": status == "keep",
                "stake": 0.0,
                "loss": 0.0,
            },
        )
        session.log("applied", experiment=change.number, commit=commit)
        if status == "keep":
            tree.move(f"refs/heads/{session.branch}", commit)
        return change.number

    return one
