"""Carries experiments to their verdicts: makes the runs that they want, one at a time on this device, keeps or reverts.

Each step is journalled before what follows from it is done, and doing that twice changes nothing. So a process killed
at any moment is continued by the next one. What is wanted is plan.py's to say, and who does it that of the devices:
this one alone (`Here`), or several (fleet/pool.py).
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import filelock
import numpy as np

import disturbance
import storage
from lab.errors import LabError
from lab.reasons import Reason, because
from lab.run import processes, runner
from lab.run.guard import OWN
from lab.run.outcome import Outcome
from lab.session import events
from lab.session.events import Verdict
from lab.session.journal import sync_files
from lab.session.repository import TRAIN
from lab.session.session import SUPERVISOR, Session
from lab.session.state import BESIDE, Experiment, Run
from lab.verdict import blocks
from lab.verdict.plan import Order, TRIES, orders, plan, scored_parent, stake_of

CONDITIONS = ("device", "backend", "eval", "data", "profile")  # of a run, that have to be the session's
FIRST_TIMEOUT = 1200  # seconds beyond the longest training, before anything was measured
SLACK = 120  # seconds beyond that and twice what start and evaluation took: another shape has to be compiled


def launch(session: Session) -> subprocess.Popen:
    """Starts the process that brings what is open to its verdict. It outlives whoever started it. To be called with the
    lock held, so that nobody takes what it is to carry out for interrupted before it has the lock."""
    program = session.judge / "lab" / "__main__.py"
    command = [session.local.executable, str(program), "--session", str(session.folder), "supervise"]
    with open(session.folder / "supervisor.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=session.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=os.name == "posix",
            creationflags=(subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS) if os.name == "nt" else 0,  # pyright: ignore
        )
    processes.note(session.folder / SUPERVISOR, process.pid)
    return process


def supervise(session: Session, devices: Devices | None = None) -> None:
    """Goes on until nothing is open, or what is needs a device and the session is held: then it is left for later.
    Has the session and its devices to itself meanwhile."""
    try:
        lock = session.lock.acquire(timeout=10)
    except filelock.Timeout:  # another process is at it already
        return
    with lock, devices or Here(session) as devices:
        for line in session.recover(runner.end, devices.makes):
            print(line)
        while step(session, devices):
            pass


class Devices(Protocol):
    """The devices that carry out orders; to be used as a context."""

    def makes(self, run: Run) -> bool:
        """Whether a run that was not seen to end is still being made."""
        ...

    def begin(self, orders: list[Order]) -> bool:
        """Begins what can be begun now, the most urgent first; whether anything was."""
        ...

    def wait(self) -> bool:
        """Waits a moment for something to end, and journals it. False if nothing is under way and nobody is waited
        for."""
        ...

    def __enter__(self) -> Devices: ...

    def __exit__(self, *_) -> None: ...


def step(session: Session, devices: Devices) -> bool:
    """Decides what can be decided and has devices do what is wanted. False if nothing is left to do, or nothing may be
    done, as the session is held."""
    while any([settle(session, experiment) for experiment in session.state.open]):
        pass
    wanted = [] if session.held else orders(session.state)
    begun = devices.begin(wanted)
    if devices.wait() or begun:
        return True
    if session.state.open and not wanted and not session.held:
        number = session.state.open[0].number
        raise LabError(f"experiment {number} wants nothing and has no verdict; please report it")
    return False


def settle(session: Session, experiment: Experiment) -> bool:
    """Decides an experiment, and carries the verdict out, where it wants nothing more. False if it does, or waits."""
    with blamed(session, experiment):
        while experiment.applied is None:
            if experiment.decided:
                apply(session, experiment)
            elif verdict := plan(experiment, session.state).verdict:
                decide(session, experiment, verdict)
            else:
                return False
    return True


@contextmanager
def blamed(session: Session, experiment: Experiment):
    """A mistake of the lab's own counts against the experiment, which must end, too; a Stop, which says what to do,
    and a full disk do not. One in carrying out a verdict ends this process: there is nothing left to give up."""
    try:
        yield
    except Exception as error:
        if storage.disk_full(error):
            raise LabError(no_space(session)) from error
        session.log(events.HarnessFailed(experiment=experiment.number))
        traceback.print_exc()
        if experiment.failures < TRIES or experiment.decided:
            raise


def no_space(session: Session) -> str:
    return f"the disk of {session.folder} is full: free some space on it, then: python -m lab wait"


def decide(session: Session, experiment: Experiment, verdict: Verdict) -> None:
    """Journals a verdict. Where more runs were asked for than it needs, they come first and change nothing of it."""
    if experiment.min_runs > 1 and experiment.judged is None and verdict.status in ("keep", "discard"):
        session.log(events.ExperimentJudged(experiment=experiment.number, verdict=verdict))
    else:
        session.log(events.ExperimentDecided(experiment=experiment.number, verdict=verdict))


class Here:
    """The session's own device, which does one thing at a time, in this process."""

    def __init__(self, session: Session):
        self.session, self.lock = session, session.device_lock

    def __enter__(self) -> Here:
        try:
            self.lock.acquire(timeout=60)
        except filelock.Timeout:
            raise LabError("another session is training on this device; once it is done: python -m lab wait") from None
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()

    def makes(self, run: Run) -> bool:
        return False

    def begin(self, orders: list[Order]) -> bool:
        for order in orders[:1]:
            with blamed(self.session, order.experiment):
                if order.job:
                    carry_out(self.session, order)
                elif order.score is not None:
                    score_again(self.session, order.experiment, self.session.state.runs[order.score])
        return bool(orders)

    def wait(self) -> bool:
        return False


# --- Runs ---


def carry_out(session: Session, order: Order) -> None:
    """A guarded run, journalled before and after."""
    run = begin(session, order)
    before = _ledger(session)
    try:
        made = runner.run(request(session, run))
    except (Exception, storage.Stop) as error:  # the next attempt makes another run
        why = "not_begun" if isinstance(error, storage.Stop) else "killed"
        ended(session, run, Outcome("lost", because("disk_full" if storage.disk_full(error) else why)))
        raise
    if changed := session.restore_judge():
        made.status, made.reason = "invalid", because("changed_judge", files=", ".join(changed[:3]))
    if _ledger(session) != before:
        print(session.write_ledger())
        if session.started.sandbox is None:  # in a sandbox a run can't have done it
            made.status, made.reason = "invalid", because("changed_ledger")
    result = made.result or {}
    elsewhere = other_conditions(session, result) if made.status == "ok" else None
    if made.status == "ok" and (why := elsewhere or other_attention(session, result)):
        made.status, made.reason = "invalid", why
    ended(session, run, made)
    if order.experiment.kind == "shared":  # nobody asks for the weights of one of its runs
        tidy(session, order.experiment, keep=False)
    if made.reason == because("disk_full"):
        for name in OWN:
            runner.remove(session.run_folder(run.number) / name)
        raise LabError(no_space(session))
    if elsewhere:
        raise LabError(
            f"{elsewhere}. Runs under different conditions can't be compared. Restore what was there when the "
            "session began, then: python -m lab wait; or start another session"
        )


def begin(session: Session, order: Order, worker: str = "") -> Run:
    """Journals that the run of an order begins, and makes its folder with its train.py. What its test may stake is
    reserved first, once that goes beyond one run; judge and ledger are as they should be."""
    experiment, job = order.experiment, order.job
    assert job is not None
    if order.stakes and experiment.stake is None:
        session.log(events.StakeReserved(experiment=experiment.number, stake=stake_of(experiment, session.state)))
    session.restore_judge()
    session.write_ledger()
    blob, content, patches = job.blob, session.repository.content(job.blob), list(job.patches)
    if patches:
        content, patches = blocks.made(content, experiment.patches, patches)
        blob = session.repository.store(content)
    run = session.start_run(experiment, blob, job.seed, job.budget, worker=worker, patches=patches)
    folder = session.run_folder(run.number)
    runner.remove(folder)
    folder.mkdir(parents=True)
    (folder / TRAIN).write_bytes(content)
    return run


def ended(session: Session, run: Run, made: Outcome) -> None:
    """Journals how a run ended, whose files are in its folder: which is not there yet if the process that began it was
    killed just then."""
    session.run_folder(run.number).mkdir(parents=True, exist_ok=True)
    sync_files(session.run_folder(run.number))
    session.log(events.RunEnded(run=run.number, **vars(made)))  # pyright: ignore[reportArgumentType]


def request(session: Session, run: Run) -> runner.Request:
    """What the runner needs for a run whose folder is there."""
    local, budget = session.local, run.budget or session.budget
    overhead = session.state.overhead()
    return runner.Request(
        judge=session.judge,
        folder=session.run_folder(run.number),
        seed=run.seed or 0,
        budget=budget,
        timeout=disturbance.MOST * budget + (FIRST_TIMEOUT if overhead is None else 2 * overhead + SLACK),
        run_id=session.run_id(run.number),
        settings=local.settings,
        reference=reference(session, run.blob),
        gpu=local.gpu,
        memory_ceiling=local.memory_ceiling,
        unified=local.unified,
        keeps_caches=run.blob == session.state.baseline.blob,
        lineage=list(filter(None, (run.blob, session.state.experiments[run.experiment].parent))),
        sandbox=session.started.sandbox,
        protected=[session.repository.path, session.folder],
        ending=session.ending,
    )


def _ledger(session: Session) -> bytes:
    return session.ledger.read_bytes() if session.ledger.exists() else b""


def other_conditions(session: Session, result: dict) -> Reason | None:
    """What a run was made under that is not what the session began with."""
    pinned = {name: getattr(session.started, name) for name in CONDITIONS}
    wrong = [f"{name} {result.get(name)} instead of {at}" for name, at in pinned.items() if result.get(name) != at]
    return because("other_conditions", what=", ".join(wrong)) if wrong else None


def other_attention(session: Session, result: dict) -> Reason | None:
    """That attention came from somewhere else than the session's profile says, which has other numbers and another
    speed."""
    before, now = session.started.attention_provider, result.get("attention_provider")
    if now != before:
        return because("other_attention", now=now or "the framework", before=before or "the framework")
    return None


def reference(session: Session, blob: str) -> dict:
    """What the clock of a run of this train.py compares with; see disturbance.py."""
    state = session.state
    baseline, own = ([run.result for run in state.runs_of(one) if run.ok] for one in (state.baseline.blob, blob))
    return disturbance.reference(baseline, own, session.profile.get("probe"))


# --- Scoring again ---


def score_again(session: Session, experiment: Experiment, run: Run) -> None:
    """Scores a run's saved weights in a fresh process, on validation and held-out rows."""
    asked = request(session, run)
    weights = asked.folder / "result.safetensors"
    if run.worker and not weights.exists():  # an earlier night's, whose devices are not this one's
        return scored(session, experiment, run, because("weights_lost"))
    try:
        scores = runner.score(asked, weights)
    except runner.Halted:  # the weights are there still: nothing was lost
        return
    scored(session, experiment, run, scores)


def scored(session: Session, experiment: Experiment, run: Run, scores: runner.Scores | Reason) -> None:
    """Journals the scores of a run's weights; the losses by row are in its folder."""
    folder = session.run_folder(run.number)
    sync_files(folder)
    if isinstance(scores, Reason):
        session.log(events.RunScored(run=run.number, problem=scores))
        return
    event = events.RunScored(run=run.number, val_bpb=scores.val_bpb, held_out_bpb=scores.held_out_bpb)
    rows = folder / "rows.npz"
    if rows.exists():
        event.rows = storage.sha256(rows)
    if experiment.kind != "confirm" and (parent := scored_parent(experiment, session.state)):
        event.against = parent.number
        event.error = sampling_error(rows, session.run_folder(parent.number) / "rows.npz")
    session.log(event)


def sampling_error(rows: Path, others: Path) -> float | None:
    """Standard error, in bits per byte, of the difference between two runs' gains on validation and on held-out rows;
    None if the files of row losses are not there."""
    variance = 0.0
    try:
        with np.load(rows, allow_pickle=False) as a, np.load(others, allow_pickle=False) as b:
            for part in ("val", "held"):
                size = a[f"{part}_bytes"].mean() * math.log(2)
                difference = (a[f"{part}_nats"] - b[f"{part}_nats"]) / size
                variance += difference.var(ddof=1) / len(difference)
    except (OSError, ValueError, KeyError):
        return None
    return math.sqrt(variance)


# --- After the verdict ---


def apply(session: Session, experiment: Experiment) -> None:
    """Moves the branch or not, restores train.py, tidies up, records. Doing it again changes nothing."""
    repository, commit, left_alone = session.repository, experiment.commit, None
    kept = experiment.status == "keep" and experiment.kind not in BESIDE
    head = repository.commit_of(session.ref)
    if head is None:
        done = [one for one in session.state.kept if one.applied]
        raise LabError(
            f"the session's branch is gone; get it back with: git branch {session.branch} "
            f"{(done[-1] if done else experiment).here}; then: python -m lab wait"
        )
    if kept and repository.blob_of(head) == experiment.blob:
        commit = head
    elif kept:
        if repository.commit_of(f"{commit}^") != head:  # somebody has committed to the branch meanwhile
            commit = repository.commit(head, experiment.blob, experiment.description)
        repository.move(f"refs/heads/{session.branch}", commit, head)
    if experiment.kind not in BESIDE:
        left_alone = repository.settle(session.branch, experiment.blob, experiment.parent or experiment.blob)
    tidy(session, experiment, keep=kept or experiment.kind == "baseline")
    session.log(events.ExperimentApplied(experiment=experiment.number, commit=commit, left_alone=left_alone))
    if said := session.write_ledger():
        print(said, file=sys.stderr)


def tidy(session: Session, experiment: Experiment, keep: bool) -> None:
    """Keeps the weights of best and baseline, the logs and the losses by row; the rest of what runs left is deleted."""
    for run in experiment.runs:
        folder = session.run_folder(run.number)
        weights = folder / "result.safetensors"
        if keep and run.scored and weights.exists():
            if experiment.kind == "baseline":
                shutil.copyfile(weights, session.folder / "baseline.safetensors")
            weights.replace(session.folder / "best.safetensors")
        weights.unlink(missing_ok=True)
        runner.told_of(folder).unlink(missing_ok=True)
        for name in OWN:
            runner.remove(folder / name)
