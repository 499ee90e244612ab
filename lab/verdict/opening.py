"""Opening an experiment, and waiting for its verdict: what the commands, a night and a replay have in common."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import filelock

from lab import untrusted
from lab.errors import LabError
from lab.genome.change import diff, identify
from lab.genome.kinds import of_change
from lab.genome.syntax import TRAIN, describe
from lab.reasons import because, sentence
from lab.run import runner
from lab.session.events import ExperimentApplied, ExperimentDecided, Verdict
from lab.session.locks import refuse_if_busy
from lab.session.session import Session
from lab.session.state import Experiment
from lab.verdict import near_misses

RUNNING = "an experiment is running; wait for it: python -m lab wait"
POLL = 0.1  # seconds
PATIENCE = 0.5  # seconds for somebody who only looks whether the lock is free, or is about to let go of it
LONGEST_DESCRIPTION = 500  # characters
SAID_OF_HELD = {"paused": "this session is paused", "stopped": "this session was stopped, at the end of a night"}


@contextmanager
def exclusive(
    session: Session,
    patience: float = PATIENCE,
    say=lambda line: print(line, file=sys.stderr),
    device: bool = False,
):
    """The session to oneself, resumed. LabError while something runs; `device`: also on its device, of another one."""
    try:
        lock = session.lock.acquire(timeout=patience, poll_interval=0.01)
    except filelock.Timeout:
        raise LabError(RUNNING) from None
    with lock:
        if session.starting:
            raise LabError(RUNNING)
        for line in session.recover(runner.end):
            say(line)
        if device:
            refuse_if_busy(session.device_lock)
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
        raise LabError(said_of_held(held["why"]))


def said_of_held(why: str) -> str:
    """Why nothing is run, and what to do."""
    return f"{SAID_OF_HELD[why]}: nothing is run until somebody says: python -m lab resume"


def sound_baseline(session: Session) -> None:
    """LabError if the session's baseline failed."""
    baseline = session.state.baseline
    if baseline.decided is None or baseline.status != "keep":
        reason = sentence(baseline.decided.reason) if baseline.decided else "it is not done yet"
        raise LabError(
            f"the baseline failed ({reason}): fix that, commit {TRAIN} if it changed, and start another session"
        )


def best_of(session: Session) -> Experiment:
    """The best so far. LabError before there is one."""
    if session.state.best is None:
        raise LabError("the baseline is not done yet: python -m lab wait")
    return session.state.best


def head_of_best(session: Session) -> str:
    """The branch's last commit. LabError if its train.py is not the best."""
    repository, best, head = session.repository, best_of(session), session.repository.commit_of(session.branch)
    if head is None or repository.blob_of(head) != best.blob:
        if head and repository.blob_of(f"{head}^") == best.blob:
            raise LabError(
                f"{TRAIN} was committed, which is for the lab to do. Take the commit back, leaving the file "
                "as it is, and run again: git reset --soft HEAD^"
            )
        raise LabError(
            f"{TRAIN} on the branch {session.branch} is not the best that this session kept. Put it back: "
            f"git checkout {best.here[:7]} -- {TRAIN} && git commit -m restore; or start "
            "another session from what is there"
        )
    return head


def facts_of_change(session: Session, parent: Experiment, content: bytes) -> dict:
    """What an ExperimentOpened says of a train.py that is made on an experiment's, which is stored. LabError if it is
    no Python."""
    source, before = describe(content), session.repository.content(parent.blob)
    change = identify(before, content)
    return {
        "blob": session.repository.store(content),
        "parent": parent.blob,
        "onto": parent.number,
        "digest": source.digest,
        "complexity": source.complexity,
        "portable": source.portable,
        "change": change.exact,
        "family": change.family,
        "kinds": list(of_change(before, content)),
        "diff": diff(before, content),
    }


def open_change(
    session: Session,
    message: str | None,
    near_misses_together: bool = False,
    again: bool = False,
    content: bytes | None = None,
    more: dict | None = None,
) -> Experiment | None:
    """Journals what is in train.py, or the near misses together, as an experiment.

    Args:
        message: what was changed, and why. again: also if an equal train.py was decided on before.
        content: the train.py to take in place of the user's, which then stays as it is. more: facts of it, as of
            ExperimentOpened, in place of what is said of others.

    Returns:
        An experiment that was decided on an equal train.py, in which case none is opened; else None.

    Raises:
        LabError: there is nothing to run; the reason says what to do.
    """
    sound_baseline(session)
    repository, state = session.repository, session.state
    best, head = best_of(session), head_of_best(session)
    content, members = repository.train() if content is None else content, []
    edited = describe(content).digest != best.digest
    if near_misses_together:
        if edited:
            raise LabError(f"{TRAIN} has an edit of yours; run that first, or put it back: git checkout -- {TRAIN}")
        content, members = near_misses.together(session)
        message = message or "near misses together: " + "; ".join(
            f"{number} {state.experiments[number].description}" for number in members
        )
    else:
        if not edited:
            raise LabError(f"{TRAIN} is not edited (comments and docstrings aside): there is nothing to run yet")
        if not (message or "").strip():
            raise LabError('say what was changed, and why: python -m lab run -m "..."')
    description = untrusted.plain(message or "")[:LONGEST_DESCRIPTION]
    facts = facts_of_change(session, best, content)
    if (equal := state.equal(facts["digest"])) and not again:
        repository.settle(session.branch, facts["blob"], best.blob)
        return equal
    facts |= {"kind": "near misses" if near_misses_together else "change", "members": members, **(more or {})}
    commit = repository.commit(head, facts["blob"], description)
    session.open_experiment(commit=commit, description=description, **facts)
    return None


def open_replay(session: Session, content: bytes, description: str, more: dict) -> None:
    """Journals a train.py that has a change of elsewhere as an experiment against the baseline, beside the branch.

    Args:
        more: facts of ExperimentOpened: kind, origin, min_runs.
    """
    repository, baseline = session.repository, session.state.baseline
    if b"\r\n" in repository.content(baseline.blob):
        content = content.replace(b"\n", b"\r\n")
    facts = facts_of_change(session, baseline, content) | {"description": description, **more}
    session.open_experiment(commit=repository.commit(baseline.commit, facts["blob"], description), **facts)


def open_scale(session: Session, pairs: int) -> None:
    """Journals further runs of the baseline, `pairs` for each of other times than the session's."""
    baseline = session.state.baseline
    facts = {"blob": baseline.blob, "parent": baseline.blob, "onto": 0, "portable": baseline.portable}
    said = "the baseline for other times"
    session.open_experiment(kind="scale", pairs=pairs, commit=baseline.here, description=said, **facts)


def open_transfer(
    session: Session, of: Experiment, depth: float, times: float, pairs: int, alone: bool = False
) -> None:
    """Journals the best and the baseline in another size, see genome/resize.py; `alone`: a kept change and
    what it was made on instead. LabError if they can't be resized."""
    from lab.genome.resize import resized  # here, as calibration's rules import much

    state, repository = session.state, session.repository
    tokens = [run.result["total_tokens_M"] * 1e6 for run in state.baseline.runs if run.ok]
    size = [f"{depth:g} times the depth"] * (depth != 1) + [f"{times:g} times the budget"] * (times != 1)
    base = (alone and state.parent_of(of)) or state.baseline
    name, parent = (f"change {of.number} alone", f"experiment {base.number}") if alone else ("the best", "the baseline")
    said, onto, commit = f"{name} at {' and '.join(size) or 'the same size'}", base, base.here
    for one in (base, of):
        content = resized(repository.content(one.blob), depth, statistics.fmean(tokens), times)
        facts = facts_of_change(session, onto, content)
        if one is base and facts["blob"] == one.blob:  # only the budget is another
            continue
        commit, what = repository.commit(commit, facts["blob"], said), said if one is of else f"{parent}, resized"
        more = {"pairs": pairs, "budget": session.budget * times} if one is of else {}
        onto = session.open_experiment(kind="transfer", commit=commit, description=what, **more, **facts)
        if one is base:
            session.log(ExperimentDecided(experiment=onto.number, verdict=Verdict("keep", because("resized"))))
            session.log(ExperimentApplied(experiment=onto.number, commit=commit))


def await_verdict(
    session: Session,
    experiment: Experiment,
    process: subprocess.Popen | None = None,
    seconds: float = math.inf,
    show: Callable[[], None] = lambda: None,
) -> bool:
    """Waits for the process that carries out an experiment, at most so many seconds; calls `show` meanwhile. Returns
    whether there is a verdict. LabError if the process ended before."""
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
        show()
        time.sleep(POLL)
    return True


def last_words(session: Session) -> str:
    """The last line that the process which carries out experiments has left."""
    log = session.folder / "supervisor.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it was killed"
