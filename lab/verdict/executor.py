"""Carries an experiment to its verdict: runs it as often as the gate asks, and keeps or reverts.

Each step is journalled before what follows from it is done, and doing that twice changes nothing. So a process killed
at any moment is continued by the next one.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from pathlib import Path

import filelock
import numpy as np

import prepare
import storage
from lab.run import runner
from lab.session import ledger
from lab.verdict import gate
from lab.errors import LabError
from lab.session.journal import flush_files
from lab.run.outcome import Outcome
from lab.session.session import HELD, Session
from lab.session.state import BESIDE, CONFIRM, REPEAT, REPLAY, Experiment, Run

BASELINE_RUNS = 3  # seeds: two alone understate the noise threefold in a quarter of all nights
FAILED = ("crash", "invalid", "disturbed")
TRIES = 3  # of a run on a device that is not itself, or of a parent that fails
AGREES = 1e-4  # bits per byte between a run's own score and that of its weights in another process
CONDITIONS = ("device", "backend", "eval", "data", "profile")  # of a run, that have to be the session's
MOST_LOST = 5  # runs of one experiment that the harness did not survive; those ended by a hold are none
ALIKE = 0.05  # of tokens/s: last quarters of one train.py that slows down by itself
BAND = 0.9  # below this share of the lowest repeat that calibration saw, a device is not itself
CONFIRM_SEEDS = 100_000  # from here on: never used to select anything


def supervise(session: Session) -> None:
    """Goes on until nothing is pending, or what is needs the device and the session is held: then it is left for later.
    Has the session and the device to itself meanwhile."""
    try:
        lock = session.lock.acquire(timeout=10)
    except filelock.Timeout:  # another process is at it already
        return
    with lock:
        try:
            device = session.device_lock.acquire(timeout=60)
        except filelock.Timeout:
            raise LabError("another session is training on this device; once it is done: python -m lab wait") from None
        with device:
            session.recover()
            while experiment := session.state.pending:
                if experiment.verdict:
                    apply(session, experiment)
                    continue
                try:
                    if not advance(session, experiment):
                        return
                except Exception:  # not a Stop, which says what to do: a mistake of the lab's own, which must end, too
                    session.log("failed", experiment=experiment.number)
                    traceback.print_exc()
                    if experiment.failures < TRIES:
                        raise


def advance(session: Session, experiment: Experiment) -> bool:
    """One step towards the verdict: a run, a score of saved weights, or the verdict itself. False if it was not done,
    as the session is held."""
    plan = {"baseline": plan_baseline, CONFIRM: plan_confirmation}.get(experiment.kind, plan_change)
    kind, step = (plan_further if experiment.judged else plan)(session, experiment)
    if kind == "verdict" and experiment.fewest > 1 and not experiment.judged and step["status"] in ("keep", "discard"):
        session.log("judged", experiment=experiment.number, **step)
        return True
    if kind != "verdict" and session.held:
        return False
    if kind == "run":
        perform(session, experiment, *step)
    elif kind == "score":
        rescore(session, step)
    else:
        session.log("verdict", experiment=experiment.number, **step)
    return True


# --- What to do next: ("run", (blob, seed, budget)), ("score", run) or ("verdict", its facts) ---


def failure(session: Session, experiment: Experiment, runs: list[Run]) -> tuple | None:
    """The verdict on runs that failed, were disturbed or interrupted too often, or on a lab that fails at it."""
    for run in experiment.runs:
        if run.status == "disturbed" and (what := other_attention(session, run.result)):
            return "verdict", unjudged(
                "invalid", f"{what}. Bring that back, and run this again; or start another session"
            )
    for run in runs:
        if run.status in ("crash", "invalid"):
            return "verdict", {"status": run.status, "reason": run.reason}
        again = [one for one in runs if (one.status, one.blob, one.seed) == ("disturbed", run.blob, run.seed)]
        if len(again) >= TRIES:
            return "verdict", unjudged(
                "invalid",
                f"{again[-1].reason}, in {len(again)} runs. Free the device, or calibrate it again, and run this again",
            )
    if sum(run.status == "lost" and run.reason not in HELD for run in experiment.runs) >= MOST_LOST:
        return "verdict", unjudged("crash", f"it was interrupted {MOST_LOST} times: does it bring the machine down?")
    if experiment.failures >= TRIES:
        return "verdict", unjudged(
            "invalid",
            f"the lab failed at it {experiment.failures} times; see supervisor.log "
            "in the session's folder, and please report it",
        )
    return None


def unjudged(status: str, reason: str) -> dict:
    """A verdict that says nothing of the change."""
    return {"status": status, "reason": f"not judged: {reason}", "unjudged": True}


def same_start(runs: list[Run]) -> str | None:
    """Why runs with different seeds are no repeats: noise can't be told from a seed that is always the same."""
    starts = {run.seed: run.result.get("initial_weights") for run in runs if run.status == "ok"}
    known = [start for start in starts.values() if start]
    if len(set(known)) < len(known):
        return "it starts from the same weights whatever AUTORESEARCH_SEED says: chance could not be told from gain"
    return None


def plan_baseline(session: Session, baseline: Experiment) -> tuple:
    if failed := failure(session, baseline, baseline.runs):
        return failed
    sound = [run for run in baseline.runs if run.status == "ok"]
    if len(sound) < session.facts["baseline_runs"]:
        return "run", (baseline.blob, gate.seed(len(sound)), session.budget)
    last = sound[-1]
    if last.scores is None:
        return "score", last
    if problem := disagreement(last):
        return "verdict", {"status": "invalid", "reason": problem}
    if problem := same_start(sound):
        return "verdict", {"status": "invalid", "reason": problem}
    mean = statistics.fmean(run.bpb for run in sound)
    return "verdict", {"status": "keep", "reason": "the baseline", "mean": mean}


def plan_change(session: Session, change: Experiment) -> tuple:
    if failed := failure(session, change, change.own_runs):
        return failed
    failed = [run for run in change.runs if run.blob == change.parent and run.status in FAILED]
    if len(failed) >= TRIES:
        return "verdict", unjudged("invalid", f"its parent does not run any more: {failed[-1].reason}")
    sound = [run for run in change.own_runs if run.status == "ok"]
    if problem := same_start(sound):
        return "verdict", {"status": "invalid", "reason": problem}
    parent = session.state.parent_of(change)
    step = gate.next_step(
        {run.seed: run.bpb for run in sound},
        session.state.results(change.parent),
        session.noise,
        session.account,
        simpler=change.nodes < parent.nodes,
    )
    if step.action in ("run candidate", "run parent"):
        blob = change.blob if step.action == "run candidate" else change.parent
        return "run", (blob, step.seed, session.budget)
    judged = {
        "status": step.action,
        "reason": step.reason,
        "gate": step.facts(),
        "mean": statistics.fmean(run.bpb for run in sound),
        "parent_mean": statistics.fmean(session.state.results(change.parent).values()),
    }
    if step.action == "keep":
        best = min(sound, key=lambda run: run.bpb)  # the one that a leak would have helped most
        if best.scores is None:
            return "score", best
        if problem := disagreement(best) or not_held_out(session, best, parent):
            judged |= {
                "status": "invalid",
                "reason": problem,
                "gate": judged["gate"] | {"better": False, "simpler": False, "loss": 0.0},
            }
    return "verdict", judged


def plan_further(session: Session, change: Experiment) -> tuple:
    """Runs that make a judged change's effect better known: of it and of its parent, on the same seeds."""
    results = {blob: session.state.results(blob) for blob in (change.parent, change.blob)}
    for seed in map(gate.seed, range(change.fewest)):
        for blob in results:
            if seed not in results[blob] and not failure(session, change, change.runs):
                return "run", (blob, seed, session.budget)
    return "verdict", change.judged | {
        "mean": statistics.fmean(results[change.blob].values()),
        "parent_mean": statistics.fmean(results[change.parent].values()),
    }


def plan_confirmation(session: Session, confirmation: Experiment) -> tuple:
    """Best and baseline in turn, on seeds that selected nothing; each run's weights are scored on held-out rows."""
    if failed := failure(session, confirmation, confirmation.runs):
        return failed
    sound = [run for run in confirmation.runs if run.status == "ok"]
    if unscored := [run for run in sound if run.scores is None]:
        return "score", unscored[0]
    if problem := next(filter(None, map(disagreement, sound)), None):
        return "verdict", {"status": "invalid", "reason": problem}
    for pair in range(confirmation.pairs):
        seed = CONFIRM_SEEDS + 100 * confirmation.number + pair
        order = (confirmation.blob, confirmation.parent)
        for blob in order if pair % 2 == 0 else reversed(order):
            if not any((run.blob, run.seed) == (blob, seed) for run in sound):
                return "run", (blob, seed, confirmation.budget)
    gains = {}
    for rows in ("val_bpb", "held_out_bpb"):
        by_seed = {
            blob: {run.seed: run.scores[rows] for run in sound if run.blob == blob}
            for blob in (confirmation.blob, confirmation.parent)
        }
        gains[rows] = gate.interval(
            [by_seed[confirmation.parent][seed] - value for seed, value in sorted(by_seed[confirmation.blob].items())]
        )
    gain, low, high = gains["held_out_bpb"]
    return "verdict", {
        "status": "keep",
        "confirmed": low > 0,
        "gains": gains,
        "mean": statistics.fmean(run.bpb for run in sound if run.blob == confirmation.blob),
        "reason": f"on held-out rows and {confirmation.pairs} new seeds the best is {gain:+.6f} bits per byte better "
        f"than the baseline (90 % interval {low:+.6f} to {high:+.6f})",
    }


# --- Doing it ---


def perform(session: Session, experiment: Experiment, blob: str, seed: int, budget: float) -> None:
    """A guarded run, journalled before and after."""
    session.mend_judge()
    ledger_before = ledger_bytes(session)
    run = session.begin_run(experiment, blob, seed, budget)
    try:
        outcome = runner.run(session.request(run.number, blob, seed, budget))
    except runner.Halted as halted:
        outcome = Outcome("lost", f"{halted}")
    status, reason = outcome.status, outcome.reason
    if changed := session.mend_judge():
        status, reason = "invalid", f"it changed the judge's files, which were put back: {', '.join(changed[:3])}"
    if not ledger_bytes(session).startswith(ledger_before):
        with storage.atomic(session.ledger) as file:
            file.write(ledger_before)
        status, reason = "invalid", "it changed the ledger, which was put back"
    other = elsewhere(session, outcome.result) if status == "ok" else None
    if status == "ok" and (
        what := other or other_attention(session, outcome.result) or disturbance(session, blob, outcome.result)
    ):
        status, reason = "disturbed", what
    flush_files(session.run_folder(run.number))
    session.log(
        "ran",
        run=run.number,
        status=status,
        reason=reason,
        result=outcome.result,
        seconds=outcome.seconds,
        traceback=outcome.traceback,
    )
    if other:
        raise LabError(
            f"{other}. Rows that can't be compared are not compared: put back what was there when the "
            "session began, then: python -m lab wait; or start another session"
        )


def elsewhere(session: Session, result: dict) -> str | None:
    """What a run was made under that is not what the session began with."""
    names = {name: (session.facts[name], result[name]) for name in CONDITIONS}
    wrong = [f"{name} {now} instead of {pinned}" for name, (pinned, now) in names.items() if now != pinned]
    return f"the run was made under other conditions: {', '.join(wrong)}" if wrong else None


def other_attention(session: Session, result: dict) -> str | None:
    """That a run took its attention from somewhere else than the session's profile says, and so its parent: it has
    other numbers, and another speed."""
    before, now = (one.get("attention_provider") or "the framework" for one in (session.profile, result))
    return f"it ran with attention from {now}, its parent with that from {before}" if now != before else None


def ledger_bytes(session: Session) -> bytes:
    return session.ledger.read_bytes() if session.ledger.exists() else b""


def disturbance(session: Session, blob: str, result: dict) -> str | None:
    """How the device fell short of what it was when it was calibrated."""
    profile = session.profile
    rates = profile["products"]["rates"][profile["settings"]["precision"]]
    speed, lowest = result.get("speed"), BAND * rates["low"] / rates["median"]
    if speed is not None and speed < lowest:
        return f"the device was slower than calibrated: speed {speed:.2f}, below {lowest:.2f}"
    ends = last_quarter(result)
    if ends >= lowest:
        return None
    before = [last_quarter(run.result) for run in session.state.runs.values() if run.blob == blob and run.result]
    if before and all(abs(other - ends) <= ALIKE for other in before):  # that is how this train.py works
        return None
    return f"its last quarter ran at {ends:.2f} of its tokens/s, below {lowest:.2f}"


def last_quarter(result: dict) -> float:
    """Tokens/s of the last quarter of the training time, relative to all of it."""
    rate = result.get("tokens_per_second_last_quarter")
    return rate / result["tokens_per_second"] if rate and result["tokens_per_second"] else 1.0


def rescore(session: Session, run: Run) -> None:
    """Scores a run's saved weights in a fresh process, on validation and held-out rows."""
    request = session.again(run.number, run.seed, run.budget)
    try:
        scores = runner.score(request, request.folder / "result.safetensors")
    except runner.Halted:  # the weights are there still: nothing was lost
        return
    except LabError as error:
        scores = {"problem": str(error)}
    else:
        scores = {"val_bpb": scores.val_bpb, "held_out_bpb": scores.held_out_bpb}
    flush_files(request.folder)
    session.log("scored", run=run.number, scores=scores)


def disagreement(run: Run) -> str | None:
    """Why a run's own score is not believed."""
    if problem := run.scores.get("problem"):
        return f"its saved weights could not be scored again: {problem}"
    again = run.scores["val_bpb"]
    if not abs(again - run.bpb) <= AGREES:
        return f"it reported {run.bpb:.6f}; its saved weights, scored again, have {again:.6f}"
    return None


def not_held_out(session: Session, run: Run, parent: Experiment) -> str | None:
    """Why a gain on validation rows is not believed: held-out rows don't show at least half of it, allowing for half
    the noise and two standard errors of which rows they are."""
    known = next(
        (other for other in parent.runs if other.blob == parent.blob and other.scores and "val_bpb" in other.scores),
        None,
    )
    if known is None:
        return None
    gain, held = (known.scores[rows] - run.scores[rows] for rows in ("val_bpb", "held_out_bpb"))
    try:
        error = sampling_error(*(session.run_folder(one.number) / "rows.npz" for one in (run, known)))
    except (OSError, ValueError, KeyError):  # somebody has tidied up
        error = session.noise.sd
    if gain - held <= max(0.5 * abs(gain), 0.5 * session.noise.sd) + 2 * error:
        return None
    return (
        f"its gain is not on held-out rows: {gain:+.6f} bits per byte on validation rows, {held:+.6f} on those it "
        "can't have seen"
    )


def sampling_error(one: Path, other: Path) -> float:
    """Standard error, in bits per byte, of the difference of gains between validation and held-out rows."""
    variance = 0.0
    with np.load(one, allow_pickle=False) as a, np.load(other, allow_pickle=False) as b:
        for rows in ("val", "held"):
            size = a[f"{rows}_bytes"].mean() * math.log(2)
            difference = (a[f"{rows}_nats"] - b[f"{rows}_nats"]) / size
            variance += difference.var(ddof=1) / len(difference)
    return math.sqrt(variance)


# --- After the verdict ---


def apply(session: Session, experiment: Experiment) -> None:
    """Moves the branch or not, records, restores train.py, tidies up. Doing it again changes nothing."""
    tree, commit, left_alone = session.tree, experiment.commit, None
    kept = experiment.verdict["status"] == "keep" and experiment.kind not in BESIDE
    head = tree.commit_of(session.branch)
    if head is None:
        best = next(e for e in reversed(session.state.kept) if e.applied) if session.state.best else experiment
        raise LabError(
            f"the session's branch is gone; get it back with: git branch {session.branch} "
            f"{(best.applied or {}).get('commit', best.commit)}; then: python -m lab wait"
        )
    if kept:
        if tree.blob_of(head) != experiment.blob:
            if tree.commit_of(f"{commit}^") != head:  # somebody has committed to the branch meanwhile, program.md say
                commit = tree.commit(head, experiment.blob, experiment.description)
            tree.move(f"refs/heads/{session.branch}", commit, head)
        else:
            commit = head
    ledger.append(
        session.ledger, [row(session, experiment, run, commit) for run in experiment.runs if run.status != "lost"]
    )
    if experiment.kind not in BESIDE:
        left_alone = tree.settle(session.branch, experiment.blob, experiment.parent)
    tidy(session, experiment, keep=kept or experiment.kind == "baseline")
    session.log("applied", experiment=experiment.number, commit=commit, left_alone=left_alone)


def row(session: Session, experiment: Experiment, run: Run, commit: str) -> dict:
    """A run as a row of the ledger."""
    own, parent = run.blob == experiment.blob, session.state.parent_of(experiment)
    verdict = experiment.verdict
    status = verdict["status"] if own else "keep"
    reason = verdict["reason"] if own else f"the parent again, beside experiment {experiment.number}"
    if experiment.kind == CONFIRM:
        scored = f", held out {run.scores['held_out_bpb']:.6f}" if run.scores and "held_out_bpb" in run.scores else ""
        reason = f"confirmation {experiment.number}{scored}"
    if own and experiment.kind in (REPLAY, REPEAT):
        reason = f"replayed on the baseline: {reason}"
    if run.status != "ok":
        status, reason = ("crash" if run.status == "crash" else "invalid"), run.reason
    if run.budget != prepare.TIME_BUDGET:
        reason = f"trial of {run.budget:g} s; {reason}"
    of, kept = experiment if own else parent, parent.applied["commit"][:7] if parent else ""
    result = {name: session.facts[name] for name in CONDITIONS} | (run.result or {})
    return ledger.row_of(
        result,
        commit=commit[:7] if own else kept,
        parent=kept if own else "",
        status=status,
        reason=reason,
        description=of.description,
        patch=of.patch,
        origin=of.origin,
        portable="yes" if of.portable else "no",
        run=run.number,
        seed=run.seed,
        total_seconds=run.seconds,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.begun)),
    )


def tidy(session: Session, experiment: Experiment, keep: bool) -> None:
    """Keeps the weights of the best, the logs and the losses by row; the rest of what runs left is deleted."""
    for run in experiment.runs:
        folder = session.run_folder(run.number)
        weights = folder / "result.safetensors"
        if keep and run.scores and weights.exists():
            weights.replace(session.folder / "best.safetensors")
        weights.unlink(missing_ok=True)
        for name in ("home", "tmp", "work"):
            runner.remove(folder / name)
