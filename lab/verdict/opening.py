"""Opening an experiment, and waiting for its verdict: what the commands, a night and a replay have in common."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import filelock

from lab import untrusted
from lab.errors import LabError
from lab.genome.change import diff, identify
from lab.genome.kinds import of_change
from lab.genome.merge import merged
from lab.genome.syntax import TRAIN, describe, is_python
from lab.reasons import because, sentence
from lab.run import log, runner
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
    """The session to oneself, recovered. LabError while something runs; `device`: also of another one on its device."""
    deadline = time.monotonic() + patience
    while True:
        try:
            lock = session.lock.acquire(timeout=max(0.0, deadline - time.monotonic()), poll_interval=0.01)
        except filelock.Timeout:
            raise LabError(RUNNING) from None
        if not session.starting:
            break
        session.lock.release()  # to a process that is about to take it; one that has just let go of it is about to end
        if time.monotonic() > deadline:
            raise LabError(RUNNING)
        time.sleep(POLL)
    with lock:
        for line in session.recover(runner.end, lambda run: bool(run.worker)):  # of a worker's the next head decides
            say(line)
        if device:
            refuse_if_busy(session.device_lock)
        yield


def refuse_if_not_ours(session: Session) -> None:
    """LabError while a night runs the experiments, or nothing is to be run."""
    if session.owned_by_night:
        raise LabError(
            f"a night is running this session, and runs the experiments. An agent edits {TRAIN} and ends its turn; "
            "then the edit is run. To run one by hand, first end the night with Ctrl-C in its terminal"
        )
    refuse_if_held(session)


def refuse_if_held(session: Session) -> None:
    """LabError while nothing is to be run."""
    if held := session.held:
        raise LabError(said_of_held(held["why"]))


def said_of_held(why: str) -> str:
    """Why nothing is run, and what to do."""
    return f"{SAID_OF_HELD[why]}: nothing is run until you type: python -m lab resume"


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


def on_best(session: Session, blob: str, parent: str) -> bytes | None:
    """A train.py that was made on another one, made on the best; None if both changed the same lines, the result is no
    Python or the best itself, or git has let go of one."""
    best = best_of(session)
    known = session.repository.contents([blob, parent or best.blob, best.blob])
    if len(known) < len({blob, parent or best.blob, best.blob}):
        return None
    if parent in ("", best.blob):
        return known[blob]
    made, conflicts = merged(known[best.blob], known[parent], known[blob])
    return made if not conflicts and is_python(made) and describe(made).digest != best.digest else None


def head_of_best(session: Session) -> str:
    """The branch's last commit. LabError if its train.py is not the best."""
    repository, best, head = session.repository, best_of(session), session.repository.commit_of(session.ref)
    if head is None or repository.blob_of(head) != best.blob:
        if head and repository.blob_of(f"{head}^") == best.blob:
            raise LabError(
                f"{TRAIN} was committed, which is for the lab to do. Undo the commit, which leaves the file as it "
                "is, and run again: git reset --soft HEAD^"
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
    facts = {"blob": session.repository.store(content), "parent": parent.blob, "onto": parent.number, **vars(source)}
    facts |= {"change": change.exact, "family": change.family, "kinds": list(of_change(before, content))}
    return facts | {"diff": diff(before, content)}


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
            raise LabError(f"{TRAIN} has an edit of yours. Run it first, or discard it: git checkout -- {TRAIN}")
        content, members = near_misses.together(session)
        message = message or "near misses together: " + "; ".join(
            f"{number} {state.experiments[number].description}" for number in members
        )
    else:
        if not edited:
            raise LabError(f"{TRAIN} has no edit except in comments and docstrings: there is nothing to run yet")
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


def open_confirmation(session: Session, pairs: int, times: float, file: Path | None) -> None:
    """Journals the best, or the train.py in a file, to be run against the baseline for `times` the budget. LabError if
    the baseline is the best, or the file can't be read."""
    repository, baseline, best = session.repository, session.state.baseline, best_of(session)
    facts, said = _again(session, best), best.description
    if file:
        try:
            facts = facts_of_change(session, baseline, file.read_bytes())
        except OSError as error:
            raise LabError(f"{file} can't be read: {error}") from error
        if facts["digest"] == baseline.digest:
            raise LabError(f"{file} is the baseline's {TRAIN}, comments left aside: there is nothing to compare")
        said = f"the train.py of {file.name}"
        facts["commit"] = repository.commit(baseline.here, facts["blob"], said)
    elif best is baseline:
        raise LabError("the baseline is still the best: there is nothing to confirm yet")
    facts |= {"description": said, "pairs": pairs, "budget": session.budget * times}
    session.open_experiment(kind="confirm", **facts)


def open_scale(session: Session, pairs: int) -> None:
    """Journals the baseline, to be run for other times."""
    facts = _again(session, session.state.baseline)
    session.open_experiment(kind="scale", description="the baseline with other training times", pairs=pairs, **facts)


def _again(session: Session, of: Experiment) -> dict:
    """What an ExperimentOpened says of the train.py of another, which is run beside the baseline's."""
    baseline = session.state.baseline
    facts = {"blob": of.blob, "parent": baseline.blob, "onto": baseline.number}
    return facts | {"portable": of.portable, "commit": of.here}


def open_transfer(session: Session, depth: float, times: float, pairs: int, each: bool = False) -> None:
    """Journals the baseline and the best in another size, see genome/resize.py; `each`: what each kept change was made
    on, and the change, instead. LabError, with nothing journaled, if the baseline is the best or can't be resized."""
    from lab.genome.resize import resized  # here, as calibration's rules import much

    state = session.state
    if (best := best_of(session)) is state.baseline:
        raise LabError("the baseline is still the best: there is no change to test in a larger model yet")
    tokens = statistics.fmean(run.result["total_tokens_M"] * 1e6 for run in state.baseline.runs if run.ok)
    kept = [e for e in state.kept if e is not state.baseline] if each else [best]
    pairings = [((each and state.parent_of(one)) or state.baseline, one) for one in kept]
    contents = {}
    for one in itertools.chain(*pairings):
        try:
            contents[one.number] = resized(session.repository.content(one.blob), depth, tokens, times)
        except LabError as error:
            raise LabError(f"experiment {one.number} can't be run in another size: {error}") from error
    size = [f"{depth:g} times the depth"] * (depth != 1) + [f"{times:g} times the budget"] * (times != 1)
    for base, one in pairings:
        name, parent = (
            (f"change {one.number} alone", f"experiment {base.number}") if each else ("the best", "the baseline")
        )
        said, onto, commit = f"{name} at {' and '.join(size)}", base, base.here
        facts = facts_of_change(session, base, contents[base.number])
        if facts["blob"] != base.blob:  # else only the budget is another
            commit = session.repository.commit(commit, facts["blob"], said)
            onto = session.open_experiment(kind="transfer", commit=commit, description=f"{parent}, resized", **facts)
            session.log(ExperimentDecided(experiment=onto.number, verdict=Verdict("keep", because("resized"))))
            session.log(ExperimentApplied(experiment=onto.number, commit=commit))
        facts = facts_of_change(session, onto, contents[one.number]) | {
            "budget": session.budget * times,
            "pairs": pairs,
        }
        commit = session.repository.commit(commit, facts["blob"], said)
        session.open_experiment(kind="transfer", commit=commit, description=said, **facts)


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
                f"the process that ran experiment {experiment.number} has ended: {last_words(session)}. To try "
                "again: python -m lab wait"
            )
        show()
        time.sleep(POLL)
    return True


def last_words(session: Session) -> str:
    """The last line that the process which carries out experiments has left."""
    return log.last_line(session.folder / "supervisor.log") or "it was killed"
