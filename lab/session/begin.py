"""Beginning an experiment, and waiting for its verdict: what the commands, a night and a replay have in common."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from contextlib import contextmanager

import filelock

from lab.cli import render as show
from lab.genome import syntax as source
from lab.verdict import near_misses as near
from lab.errors import LabError
from lab.session.session import Session
from lab.session.state import Experiment
from lab.session.repository import TRAIN

POLL = 0.1  # seconds


@contextmanager
def exclusive(session: Session):
    """The session to oneself, resumed. LabError while something runs."""
    try:
        lock = session.lock.acquire(blocking=False)
    except filelock.Timeout:
        raise LabError("an experiment is running; wait for it: python -m lab wait") from None
    with lock:
        for text in session.recover():
            print(text, file=sys.stderr)
        yield


def refuse_if_not_ours(session: Session) -> None:
    """LabError while a night runs the experiments, or nothing is to be run."""
    if session.owned_by_night:
        raise LabError(
            f"a night owns this session and runs the experiments: edit {TRAIN} and end your turn, and it is "
            "run then. To run one by hand, end the night first: Ctrl-C where it runs"
        )
    refuse_if_held(session)


def refuse_if_held(session: Session) -> None:
    """LabError while nothing is to be run."""
    if held := session.held:
        raise LabError(show.held(held))


def sound_baseline(session: Session) -> None:
    baseline = session.state.baseline
    if baseline.status != "keep":
        raise LabError(
            f"the baseline failed ({baseline.verdict['reason']}): mend that, commit {TRAIN} if it changed, "
            "and start another session"
        )


def head_of_best(session: Session) -> str:
    """The branch's last commit. LabError if its train.py is not the best."""
    tree, best, head = session.tree, session.state.best, session.tree.commit_of(session.branch)
    if head is None or tree.blob_of(head) != best.blob:
        if head and tree.blob_of(f"{head}^") == best.blob:
            raise LabError(
                f"{TRAIN} was committed, which is for the lab to do. Take the commit back, leaving the file "
                "as it is, and run again: git reset --soft HEAD^"
            )
        raise LabError(
            f"{TRAIN} on the branch {session.branch} is not the best that this session kept. Put it back: "
            f"git checkout {best.applied['commit'][:7]} -- {TRAIN} && git commit -m restore; or start "
            "another session from what is there"
        )
    return head


def begin_change(session: Session, options) -> Experiment | None:
    """Journals what is in train.py, or the near misses together, as an experiment; or gives the one that was decided on
    an equal train.py."""
    sound_baseline(session)
    tree, state = session.tree, session.state
    best, head = state.best, head_of_best(session)
    content = tree.train()
    described = source.describe(content)
    edited = described.digest != best.digest
    if options.near_misses:
        if edited:
            raise LabError(f"{TRAIN} has an edit of yours; run that first, or put it back: git checkout -- {TRAIN}")
        content, members = near.together(session)
        described = source.describe(content)
        message = options.message or "near misses together: " + "; ".join(
            f"{number} {state.experiments[number].description}" for number in members
        )
        kind = "near misses"
    else:
        if not edited:
            raise LabError(f"{TRAIN} is not edited (comments and docstrings aside): there is nothing to run yet")
        if not (options.message or "").strip():
            raise LabError('say what was changed, and why: python -m lab run -m "..."')
        members, message, kind = (), options.message, "change"
    blob = tree.store(content)
    if (same := state.same(described.digest)) and not options.again:
        tree.settle(session.branch, blob, best.blob)
        return same
    session.begin(
        kind=kind,
        blob=blob,
        parent=best.blob,
        onto=best.number,
        commit=tree.commit(head, blob, message),
        description=message,
        digest=described.digest,
        nodes=described.nodes,
        portable=described.portable,
        patch=tree.patch(best.blob, blob)[1],
        members=members,
    )
    return None


def await_verdict(
    session: Session, experiment: Experiment, process: subprocess.Popen | None = None, seconds: float = math.inf
) -> bool:
    """Waits, at most so long, for what carries an experiment out; whether it is done. LabError if that ended before."""
    deadline = time.monotonic() + seconds
    while not experiment.applied:
        if time.monotonic() > deadline:
            return False
        ended = (process is None or process.poll() is not None) and not session.supervised
        session.refresh()
        if ended and not experiment.applied:
            refuse_if_held(session)
            raise LabError(
                f"what was to carry out experiment {experiment.number} has ended: {last_words(session)}; "
                "python -m lab wait tries again"
            )
        time.sleep(POLL)
    return True


def last_words(session: Session) -> str:
    try:
        lines = (session.folder / "supervisor.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it was killed"
