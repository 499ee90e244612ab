"""What the agent and the user read: numbers, verdicts, and cleaned words; the same as facts for machines."""

from __future__ import annotations

import time
from dataclasses import asdict

from lab import untrusted
from lab.verdict import gate, near_misses as near
from lab.session.session import Session
from lab.session.state import BESIDE, CONFIRM, REPEAT, REPLAY, Experiment, Run

RECENT = 10  # experiments that status shows
NUMBERS = {  # of a run's result: (name in the block, factor)
    "peak_vram_mb": ("memory_gb", 1 / 1024), "tokens_per_second": ("tok_per_s", 1), "num_steps": ("steps", 1),
    "total_tokens_M": ("tokens_M", 1), "num_params_M": ("params_M", 1), "mfu_percent": ("mfu_percent", 1),
    "training_seconds": ("training_seconds", 1), "total_seconds": ("total_seconds", 1), "speed": ("speed", 1),
}  # fmt: skip


def facts(session: Session, experiment: Experiment) -> dict:
    """An experiment for machines."""
    verdict = experiment.verdict or {}
    commit = (experiment.applied or {}).get("commit", experiment.commit)
    found = {
        "experiment": experiment.number, "kind": experiment.kind, "status": experiment.status,
        "description": untrusted.one_line(experiment.description), "commit": commit[:7],
        "val_bpb": verdict.get("mean"), "parent_val_bpb": verdict.get("parent_mean"), "reason": verdict.get("reason"),
        "runs": [run_facts(run, experiment) for run in experiment.runs if run.status != "lost"],
        "portable": experiment.portable, "nodes": experiment.nodes, "patch": experiment.patch,
        "near_miss": bool(verdict.get("gate", {}).get("near_miss")),
    }  # fmt: skip
    if experiment.origin:
        found["origin"] = experiment.origin
    if experiment.members:
        found["members"] = list(experiment.members)
    if left_alone := (experiment.applied or {}).get("left_alone"):
        found["left_alone"] = left_alone
    if "gains" in verdict:
        found |= {"confirmed": verdict["confirmed"], "gains": verdict["gains"]}
    if trace := next((run.traceback for run in reversed(experiment.runs) if run.traceback), ""):
        found["traceback"] = untrusted.fenced(untrusted.clean(trace))
    return found


def run_facts(run: Run, experiment: Experiment) -> dict:
    result = run.result or {}
    measured = {
        name: round(result[key] * factor, 4)
        for key, (name, factor) in NUMBERS.items()
        if isinstance(result.get(key), (int, float))
    }
    return {
        "run": run.number,
        "of": "change" if run.blob == experiment.blob else "parent",
        "seed": run.seed,
        "status": run.status,
        "val_bpb": result.get("val_bpb"),
        **measured,
        **({"reason": run.reason} if run.reason else {}),
    }


def block(session: Session, experiment: Experiment) -> str:
    """An experiment as numbers, verdict, and, after a crash, the end of its traceback."""
    found = facts(session, experiment)
    said = found["status"].upper()
    if "confirmed" in found:
        said = "CONFIRMED" if found["confirmed"] else "NOT CONFIRMED"
    lines = [f"experiment {found['experiment']}: {said}", f"  what              {found['description']}"]
    if experiment.kind in (REPLAY, REPEAT):
        lines.append(f"  of                {found['origin']}, on the baseline: the branch stays where it is")
    if found["reason"]:
        lines.append(f"  why               {found['reason']}")
    if found["val_bpb"] is not None:
        beside = f", its parent {found['parent_val_bpb']:.6f}" if found["parent_val_bpb"] is not None else ""
        runs = sum(run["of"] == "change" and run["status"] == "ok" for run in found["runs"])
        lines.append(f"  val_bpb           {found['val_bpb']:.6f} (mean of {runs}){beside}")
    own = [run for run in found["runs"] if run["of"] == "change" and run["status"] in ("ok", "invalid", "disturbed")]
    if own:
        lines += [f"  {name:<17} {own[-1][name]:,.6g}" for name, _ in NUMBERS.values() if name in own[-1]]
    if experiment is session.state.best and experiment.kind == "baseline":
        smallest = gate.smallest_detectable(session.noise, session.account)
        lines.append(f"  noise             {told_noise(asdict(session.noise), smallest)}")
    if best := session.state.best:
        lines.append(
            f"  best              {session.state.mean(best):.6f}, experiment {best.number}, commit "
            f"{(best.applied or {}).get('commit', best.commit)[:7]}"
        )
    if found["near_miss"]:
        lines.append("  a near miss: remembered, to be tried together with others (run --near-misses)")
    if "left_alone" in found:
        lines.append(f"  {found['left_alone']}")
    if "traceback" in found:
        lines += ["", found["traceback"]]
    return "\n".join(lines)


def of_night(state, first: int) -> tuple[int, int]:
    """(experiments that were decided on since the night's `first`, how many of them were kept)."""
    tried = [e for e in state.decided if e.number >= max(1, first)]
    return len(tried), sum(e.status == "keep" and e.kind not in BESIDE for e in tried)


def listed(files: list[str], most: int = 5) -> str:
    return ", ".join(files[:most]) + (f" and {len(files) - most} more" if len(files) > most else "")


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def told_noise(noise: dict, smallest: float) -> str:
    """How far chance moves val_bpb, and what can be seen all the same."""
    return (
        f"{noise['sd']:.6f} between seeds ({noise['df']} degrees of freedom); a gain has to be about "
        f"{smallest:.6f} to be kept four times in five"
    )


def held(held: dict) -> str:
    """Why nothing is run, and what to do."""
    why = "this session is paused" if held["why"] == "paused" else "this session was stopped, at the end of a night"
    return f"{why}: nothing is run until somebody says: python -m lab resume"


def paused(session: Session) -> str:
    """What a pause did, once it took effect."""
    pending, then = session.state.pending, "Go on with: python -m lab resume"
    run = pending.runs[-1] if pending and pending.runs else None
    if session.supervised:
        doing = (
            f"run {run.number}"
            if run and run.status is None
            else f"experiment {pending.number}"
            if pending
            else ("a command")
        )
        return f"paused: {doing} is coming to its end, and nothing is begun after it. {then}"
    if run and (run.status, run.reason) == ("lost", "paused"):
        return (
            f"paused: run {run.number} of experiment {pending.number} was ended, and is done again later. "
            f"The device is free. {then}"
        )
    if pending:
        return f"paused: nothing runs; experiment {pending.number} is left as it is. The device is free. {then}"
    return f"paused: nothing was running, and nothing will be begun. {then}"


def progress_facts(session: Session, experiment: Experiment) -> dict:
    """How an experiment under way stands; seconds_left is of the run that is on now."""
    now = next((run for run in reversed(experiment.runs) if run.status is None), None)
    found = {
        "experiment": experiment.number,
        "status": "running",
        "runs_done": sum(run.status not in (None, "lost") for run in experiment.runs),
    }
    if now:
        expected = now.budget + (session.overhead() or 30)
        found |= {
            "run": now.number,
            "seed": now.seed,
            "of": "change" if now.blob == experiment.blob else "parent",
            "seconds_left": round(max(1.0, now.begun + expected - time.time())),
        }
    return found


def progress(session: Session, experiment: Experiment) -> str:
    found = progress_facts(session, experiment)
    doing = (
        f"run {found['runs_done'] + 1} (of the {found['of']}, seed {found['seed']}) ends in about "
        f"{found['seconds_left']} s"
        if "run" in found
        else "weighing what was found"
    )
    return (
        f"experiment {experiment.number} is running: {doing}; it may need several runs. Go on waiting with: "
        "python -m lab wait"
    )


def status_facts(session: Session) -> dict:
    """Where the session stands, for machines."""
    state = session.state
    found = {
        "session": session.name,
        "branch": session.branch,
        "folder": str(session.folder),
        "ledger": str(session.ledger),
        "budget_seconds": session.budget,
        "sandbox": session.facts["sandbox"],
        "dataset": session.facts["dataset"],
        "eval": session.facts["eval"],
        "experiments": max(0, len(state.experiments) - 1),
        "held": session.held,
        "night": session.owned_by_night,
    }
    for status in ("keep", "discard", "crash", "invalid"):
        found[status] = sum(e.status == status and e.kind in ("change", "near misses") for e in state.decided)
    found["crashes_in_a_row"] = next(
        (i for i, e in enumerate(reversed(state.decided)) if e.status != "crash"), len(state.decided)
    )
    if pending := state.pending:
        found["running"] = progress_facts(session, pending) | {"supervised": session.supervised}
    if state.best:
        noise, account = session.noise, session.account
        found |= {
            "best": {"experiment": state.best.number, "val_bpb": state.mean(state.best),
                     "commit": (state.best.applied or {}).get("commit", state.best.commit)[:7],
                     "runs": len(state.results(state.best.blob))},
            "baseline": state.mean(state.baseline),
            "noise": {"sd": noise.sd, "df": noise.df},
            "smallest_detectable": gate.smallest_detectable(noise, account),
            "near_misses": near.ready(session),
        }  # fmt: skip
    if replayed := sum(e.kind == REPLAY for e in state.decided):
        found["replayed"] = replayed
    confirmed = [e for e in state.decided if e.kind == CONFIRM]
    if confirmed:
        found["confirmation"] = confirmed[-1].verdict["reason"]
    found["recent"] = [
        {
            "experiment": e.number,
            "status": e.status,
            "val_bpb": (e.verdict or {}).get("mean"),
            "description": untrusted.one_line(e.description),
            "reason": (e.verdict or {}).get("reason"),
        }
        for e in list(state.experiments.values())[-RECENT:]
    ]
    return found


def status(session: Session) -> str:
    found = status_facts(session)
    lines = [
        f"session {found['session']}: {counted(found['experiments'], 'experiment')}, {found['keep']} kept, "
        f"{found['discard']} discarded, {found['crash']} crashed, {found['invalid']} invalid"
        + (f"; {found['replayed']} replayed beside the branch" if "replayed" in found else "")
    ]
    if "best" in found:
        best = found["best"]
        lines += [
            f"best {best['val_bpb']:.6f} (experiment {best['experiment']}, commit {best['commit']}, mean of "
            f"{best['runs']}); baseline {found['baseline']:.6f}",
            f"noise {told_noise(found['noise'], found['smallest_detectable'])}",
        ]
    if found["crashes_in_a_row"] > 1:
        lines.append(f"the last {found['crashes_in_a_row']} experiments crashed")
    if "confirmation" in found:
        lines.append(f"confirmation: {found['confirmation']}")
    if found.get("near_misses"):
        lines.append(
            f"near misses worth trying together: {', '.join(map(str, found['near_misses']))} (python -m lab "
            "run --near-misses)"
        )
    running = found.get("running")
    if running and running["supervised"]:
        lines.append(progress(session, session.state.pending))
    elif running and not found["held"]:
        lines.append(f"experiment {running['experiment']} was interrupted: python -m lab wait goes on with it")
    if found["night"]:
        lines.append("a night owns this session, and runs the experiments")
    if found["held"]:
        lines.append(held(found["held"]))
    lines += ["", table(session, list(session.state.experiments.values())[-RECENT:]), "", f"ledger: {found['ledger']}"]
    return "\n".join(lines)


def table(session: Session, experiments: list[Experiment]) -> str:
    """One line for each: number, commit, verdict, score, what."""
    lines = ["   #  commit   status    val_bpb   what"]
    for e in experiments:
        mean = (e.verdict or {}).get("mean")
        score = f"{mean:.6f}" if mean is not None else "-"
        commit = (e.applied or {}).get("commit", e.commit)[:7]
        lines.append(f"{e.number:4d}  {commit}  {e.status:<8} {score:>9}   {untrusted.one_line(e.description, 80)}")
    return "\n".join(lines)
