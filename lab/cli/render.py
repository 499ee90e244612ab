"""What the agent and the user read: numbers, verdicts, and cleaned words; the same as facts for machines."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import msgspec

from lab import untrusted
from lab.session.events import Sampled
from lab.session.record import Record
from lab.session.session import Session
from lab.session.state import APART, BESIDE, MEASURING, Experiment, Run
from lab.untrusted import counted
from lab.verdict import gate, near_misses
from lab.verdict.opening import said_of_held
from lab.verdict.plan import account_of, noise_of, said_of_noise
from results import MEASURES

if TYPE_CHECKING:
    from lab.run.check import Tried

RECENT = 10  # experiments that status shows
SAME = ("val_bpb", "val_rows", "budget_seconds", "depth")  # the score, and what is the same in every run
# Of a run, beside them: what has a column of numbers.
SHOWN = [m for m in MEASURES if m.column and m.type in (int, float, bool) and m.name not in SAME]


# --- A train.py that was tried ---


def tried(tried: Tried, remarks: list[str]) -> str:
    """What `check` found."""
    where = " (on the CPU, as the device can't be used from this shell)" if tried.elsewhere else ""
    lines = [f"remark: {untrusted.one_line(remark)}" for remark in remarks]
    if tried.problem:
        lines.append(f"a run of this train.py would fail{where}: {untrusted.one_line(tried.problem)}")
        if "Traceback" in tried.printed:
            lines.append(untrusted.fenced(untrusted.clean(tried.printed)))
    else:
        lines.append(
            f"nothing wrong was found in {tried.seconds:.0f} s{where}: {(tried.num_params or 0) / 1e6:.1f} M "
            "parameters, a few steps on random tokens, and the evaluator's checks passed. Only a run gives a score"
        )
    return "\n".join(lines)


def sampled(sampled: Sampled) -> str:
    """What `sample` got."""
    lines = []
    for name in ("prompt", "baseline", "best") if sampled.experiment else ("prompt", "baseline"):
        lines.append(f"{name}:{f' (experiment {sampled.experiment})' if name == 'best' else ''}")
        lines += [f"    {line}" for line in untrusted.plain(getattr(sampled, name)).split("\n")]
    return "\n".join(lines)


# --- An experiment ---


def facts(experiment: Experiment) -> dict:
    """An experiment for machines."""
    verdict = experiment.decided
    known = {
        "experiment": experiment.number,
        "kind": experiment.kind,
        "status": experiment.status,
        "description": untrusted.one_line(experiment.description),
        "commit": experiment.here[:7],
        "val_bpb": verdict.mean if verdict else None,
        "parent_val_bpb": verdict.parent_mean if verdict else None,
        "reason": verdict.said if verdict else None,
        "code": verdict.reason.code if verdict else None,
        "runs": [run_facts(run, experiment) for run in experiment.runs if run.status != "lost"],
        "portable": experiment.portable,
        "complexity": experiment.complexity,
        "change": experiment.change,
        "family": experiment.family,
        "near_miss": experiment.near_miss,
    }
    known |= {name: value for name in ("origin", "members") if (value := getattr(experiment, name))}
    if experiment.applied and experiment.applied.left_alone:
        known["left_alone"] = str(experiment.applied.left_alone)
    if verdict and verdict.gains:
        known |= {"confirmed": verdict.confirmed, "gains": verdict.gains}
    if traces := [run.ended.traceback for run in experiment.runs if run.ended and run.ended.traceback]:
        known["traceback"] = untrusted.fenced(untrusted.clean(traces[-1]))
    return known


def run_facts(run: Run, experiment: Experiment) -> dict:
    """A run for machines, by the names of the ledger's columns."""
    measured = {
        measure.column: round(value * measure.scale, 4) if measure.type is float else value
        for measure in SHOWN
        if (value := run.result.get(measure.name)) is not None
    }
    return {
        "run": run.number,
        "of": "change" if run.blob == experiment.blob else "parent",
        "seed": run.seed,
        **({"worker": run.worker} if run.worker else {}),
        "status": run.status,
        "val_bpb": run.result.get("val_bpb"),
        **measured,
        **({"reason": str(run.reason)} if run.reason else {}),
    }


def block(session: Session, experiment: Experiment) -> str:
    """An experiment as numbers, verdict, and, after a crash, the end of its traceback."""
    known, best = facts(experiment), session.state.best
    said = experiment.status.upper()
    if "confirmed" in known:
        said = "CONFIRMED" if known["confirmed"] else "NOT CONFIRMED"
        if experiment.kind == "transfer":
            said = "HOLDS" if known["confirmed"] else "NOT SHOWN TO HOLD"
    if experiment.kind == "scale" and experiment.status == "keep":
        said = "MEASURED"
    lines = [f"experiment {experiment.number}: {said}", f"  what              {known['description']}"]
    if experiment.kind in ("replay", "repeat"):
        lines.append(f"  origin            {experiment.origin}, on the baseline: the branch stays where it is")
    if known["reason"]:
        lines.append(f"  why               {known['reason']}")
    if known["val_bpb"] is not None:
        beside = f", its parent {known['parent_val_bpb']:.6f}" if known["parent_val_bpb"] is not None else ""
        runs = sum(run["of"] == "change" and run["status"] == "ok" for run in known["runs"])
        if experiment.kind == "repeat":  # its mean is over what was run for earlier experiments, too
            believed = session.state.believed(experiment.blob).values()
            runs = sum(run.experiment <= experiment.number for run in believed)
        lines.append(f"  val_bpb           {known['val_bpb']:.6f} (mean of {runs}){beside}")
        evidence = experiment.decided and experiment.decided.evidence
        if evidence and abs(evidence.corrected) >= 5e-7:
            lines.append(f"  corrected by      {-evidence.corrected:+.6f}, as their runs met different conditions")
    if workers := sorted({run["worker"] for run in known["runs"] if run.get("worker")}):
        lines.append(f"  made on           {', '.join(workers)}")
    own = [run for run in known["runs"] if run["of"] == "change" and run["status"] in ("ok", "invalid")]
    for measure in SHOWN if own else ():
        value = own[-1].get(measure.column)
        if isinstance(value, bool):
            lines += [f"  {measure.column:<17} no"] * (not value)
        elif value is not None:
            lines.append(f"  {measure.column:<17} {value:,.6g}")
    if experiment is best and experiment.kind == "baseline":
        lines.append(f"  noise             {said_of_noise(session.state)}")
    if best:
        score = session.state.mean(best) or 0.0
        lines.append(f"  best              {score:.6f}, experiment {best.number}, commit {best.here[:7]}")
    if known["near_miss"]:
        lines.append(f"  a near miss: to be tried together with others once there are {gate.MOST_TOGETHER}")
    lines += [f"  {known['left_alone']}"] if "left_alone" in known else []
    lines += ["", known["traceback"]] if "traceback" in known else []
    return "\n".join(lines)


# --- What is under way ---


def paused(session: Session) -> str:
    """What a pause did, once it took effect."""
    experiment = session.state.oldest_open
    run = experiment.runs[-1] if experiment and experiment.runs else None
    if session.supervised:
        doing = f"experiment {experiment.number}" if experiment else "a command"
        doing = f"run {run.number}" if run and run.ended is None else doing
        said = f"{doing} is ending, and nothing is started after it"
    elif experiment is None:
        said = "nothing was running, and nothing will be started"
    elif run and run.reason and run.reason.code == "paused":
        said = f"run {run.number} of experiment {experiment.number} was ended, and is repeated later. "
        said += "The device is free"
    else:
        said = f"nothing is running; experiment {experiment.number} is left as it is. The device is free"
    return f"paused: {said}. To continue: python -m lab resume"


def progress_facts(session: Session, experiment: Experiment) -> dict:
    """How an experiment under way stands; seconds_left is of the run that is on now."""
    now = experiment.run_under_way
    done = sum(run.status not in (None, "lost") for run in experiment.runs)
    known = {"experiment": experiment.number, "status": "running", "runs_done": done}
    if now:
        known |= {
            "run": now.number,
            "seed": now.seed,
            "of": "change" if now.blob == experiment.blob else "parent",
            "seconds_left": round(max(1.0, session.state.end_of(now) - time.time())),
        }
    return known


def progress(session: Session, experiment: Experiment) -> str:
    known = progress_facts(session, experiment)
    doing = "the results are being judged"
    if "run" in known:
        run = f"run {known['runs_done'] + 1} (of the {known['of']}, seed {known['seed']})"
        doing = f"{run} ends in about {known['seconds_left']} s"
    return (
        f"experiment {experiment.number} is running: {doing}; it may need several runs. To wait on: python -m lab wait"
    )


# --- The session ---


def status_facts(session: Session) -> dict:
    """The state of the session, for JSON."""
    state, started = session.state, session.started
    known = {
        "session": session.name,
        "branch": session.branch,
        "folder": str(session.folder),
        "ledger": str(session.ledger),
        "budget_seconds": session.budget,
        "sandbox": started.sandbox,
        "dataset": started.dataset,
        "eval": started.eval,
        "experiments": sum(bool(e.number) and e.kind not in MEASURING for e in state.experiments.values()),
        "held": session.held,
        "night": session.owned_by_night,
    }
    tried = [e.status for e in state.decided if e.kind not in BESIDE]
    known |= {status: tried.count(status) for status in ("keep", "discard", "crash", "invalid", "superseded")}
    judged = (e for e in reversed(state.decided) if e.kind not in APART)
    crashed = itertools.takewhile(lambda e: e.status == "crash", judged)
    known["crashes_in_a_row"] = sum(1 for _ in crashed)
    if experiment := state.oldest_open:
        known["running"] = progress_facts(session, experiment) | {"supervised": session.supervised}
        known["open"] = [e.number for e in state.open]
    if best := state.best:
        noise = noise_of(state)
        known |= {
            "best": {
                "experiment": best.number,
                "val_bpb": state.mean(best),
                "commit": best.here[:7],
                "runs": len(state.results(best.blob)),
            },
            "baseline": state.mean(state.baseline),
            "noise": {"sd": noise.sd, "df": noise.df},
            "smallest_detectable": gate.smallest_detectable(noise, account_of(state)),
            "near_misses": near_misses.ready(session),
        }
    if replayed := sum(e.kind == "replay" for e in state.decided):
        known["replayed"] = replayed
    if confirmation := state.confirmation_of():
        known["confirmation"] = state.said_of(confirmation)
    if carried := [e for e in state.decided if e.kind == "transfer" and e.pairs]:
        known["transfers"] = [e.came_to for e in carried]
    if any(e.kind == "scale" for e in state.decided):
        from lab.compare.analysis import Analysis  # here, as few sessions have one

        analysis = Analysis(Record(state))
        known["time"] = {"gained": msgspec.to_builtins(analysis.gained), "said": analysis.said_of_time}
    known["recent"] = [
        {
            "experiment": e.number,
            "status": e.status,
            "val_bpb": e.decided.mean if e.decided else None,
            "description": untrusted.one_line(e.description),
            "reason": e.decided.said if e.decided else None,
        }
        for e in list(state.experiments.values())[-RECENT:]
    ]
    return msgspec.to_builtins(known)


def status(session: Session) -> str:
    known, state = status_facts(session), session.state
    lines = [
        f"session {known['session']}: {counted(known['experiments'], 'experiment')}, {known['keep']} kept, "
        f"{known['discard']} discarded, {known['crash']} crashed, {known['invalid']} invalid"
        + (f", {known['superseded']} superseded" if known["superseded"] else "")
        + (f"; {known['replayed']} replayed beside the branch" if "replayed" in known else "")
    ]
    if best := known.get("best"):
        lines += [
            f"best {best['val_bpb']:.6f} (experiment {best['experiment']}, commit {best['commit']}, mean of "
            f"{best['runs']}); baseline {known['baseline']:.6f}",
            f"noise {said_of_noise(state)}",
        ]
    if known["crashes_in_a_row"] > 1:
        lines.append(f"the last {known['crashes_in_a_row']} experiments crashed")
    if "confirmation" in known:
        lines.append(f"confirmation: {known['confirmation']}")
    lines += [f"transfer: {said}" for said in known.get("transfers", ())]
    if "time" in known:
        lines.append(known["time"]["said"])
    if known.get("near_misses"):
        numbers = ", ".join(map(str, known["near_misses"]))
        lines.append(f"near misses worth trying together: {numbers} (python -m lab run --near-misses)")
    running, experiment = known.get("running"), state.oldest_open
    if running and experiment and running["supervised"]:
        lines.append(progress(session, experiment))
    elif running and not known["held"]:
        lines.append(f"experiment {running['experiment']} was interrupted; to continue it: python -m lab wait")
    if known["night"]:
        lines.append("a night is running this session, and runs the experiments")
    if known["held"]:
        lines.append(said_of_held(known["held"]["why"]))
    lines += ["", table(list(state.experiments.values())[-RECENT:]), "", f"ledger: {known['ledger']}"]
    return "\n".join(lines)


def fleet(session: Session, devices: list[dict]) -> str:
    """One line for each device: its name, tokens per second, heat, what it does."""
    if not devices:
        known = session.fleet
        if known is None or not session.owned_by_night:
            return "no night with several devices is running"
        where = f"; workers can join at {known['listen']}" if "listen" in known else ""
        return f"a night is running, and no device works for it now{where}"
    lines = ["device            tokens/s  what"]
    for device in devices:
        tokens, heat = device["tokens_per_second"], device["heat"]
        hot = "too hot, " if heat.get("hot") else f"throttled by {heat['throttled']}, " if heat.get("throttled") else ""
        rate = f"{tokens:,.0f}" if tokens else "-"
        lines.append(f"{device['name']:<16} {rate:>9}  {untrusted.one_line(hot + device['doing'], 100)}")
    return "\n".join(lines)


def table(experiments: list[Experiment]) -> str:
    """One line for each: number, commit, verdict or what was measured, score, what."""
    lines = ["   #  commit   status    val_bpb   what"]
    for e in experiments:
        score = f"{e.decided.mean:.6f}" if e.decided and e.decided.mean is not None else "-"
        what = untrusted.one_line(e.description, 80)
        said = e.kind if e.measured else e.status
        lines.append(f"{e.number:4d}  {e.here[:7]:<7}  {said:<8} {score:>9}   {what}")
    return "\n".join(lines)


def findings(rows) -> str:
    """The published findings: what each does, the evidence elsewhere, and what became of it here."""
    lines = ["Effects in bits per byte: below 0 is better. The first figure only ranks them for this device.", ""]
    for row in rows:
        expected = "" if row.expected is None else f"  ({-row.expected:+.4f})"
        told = untrusted.one_line(", ".join(row.evidence), 160)
        lines += [f"{row.name}{expected}", f"    {row.why}", f"    elsewhere: {told}"]
        if row.effect:
            value, low, high = row.effect
            interval = "" if low is None else f" ({low:+.6f} to {high:+.6f})"
            lines.append(f"    here: {value:+.6f}{interval}")
        lines += [f"    {untrusted.one_line(row.here, 160)}"] if row.here else []
    return "\n".join(lines)
