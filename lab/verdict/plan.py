"""What an experiment still wants: runs, a second scoring of weights, or its verdict. A function of the journal alone.

`plan` does nothing and remembers nothing. An executor carries out what it wants, on one device or many, journals what
came of it, and asks again. Runs that are under way count as asked for.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from weakref import WeakKeyDictionary

from lab.genome import edits
from lab.reasons import Reason, because
from lab.session.events import Evidence, Gains, Interval, Verdict
from lab.session.session import HELD
from lab.session.state import SHORT, USUAL, Conditions, Experiment, Run, State, conditions
from lab.verdict import gate
from results import apart

FAILED = ("crash", "invalid")
TRIES = 3  # of a parent that fails, of a harness that does
AGREES = 1e-4  # bits per byte between a run's own score and that of its weights in another process
MOST_LOST = 5  # runs of one experiment that the harness did not survive
BLAMELESS = (*HELD, "disk_full", "not_begun")  # reasons of lost runs that are none of those
SUSPECT = 2  # devices that are lost while they run an experiment
# Kinds with many runs, of files that are proven or differ: what was lost since the last sound one counts.
PROVEN = ("baseline", "confirm", "scale", "shared")
ALIKE = 0.2  # initial weights of two seeds that are no two draws; for those it is 1, give or take 0.3
WORTH_TELLING = 0.05  # disturbance of a run, as a share of its training
SHARED_SEED = 50_000  # from here on: of blocks, and of their tests
CONFIRM_SEEDS = 10_000_000  # from here on: never used to select anything
SCALES = 0.25, 0.5, 2.0  # of the budget, that the baseline is run for beside it


class Urgency(IntEnum):
    """Whose run comes first where there is a choice."""

    PARENT = 0  # a seed that the parent lacks: a comparison waits for it
    REPEAT = 1  # of what looks promising
    FIRST = 2
    FURTHER = 3  # the verdict is known


@dataclass(frozen=True)
class Job:
    """A run that is wanted: one train.py, one seed, seconds of training.

    Attributes:
        patches: of its experiment's, which it is to hold beside. others: seeds that would do as well.
    """

    blob: str
    seed: int
    budget: float
    urgency: Urgency
    patches: tuple[int, ...] = ()
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What an experiment wants."""

    jobs: tuple[Job, ...] = ()
    score: tuple[int, ...] = ()  # numbers of runs whose weights are to be scored again
    verdict: Verdict | None = None  # what is decided: nothing is wanted any more
    stake: float | None = None  # to be reserved before the jobs are begun


@dataclass(frozen=True)
class Order:
    """One thing for a device to do: a job, or weights of a run (its number) to score again.

    `stakes`: the experiment reserves a stake before it: the account's then, as another order may have come first."""

    experiment: Experiment
    job: Job | None = None
    score: int | None = None
    stakes: bool = False


def orders(state: State) -> list[Order]:
    """The jobs of all open experiments, the most urgent first."""
    found = []
    for experiment in state.open:
        if experiment.decided is None:
            wanted = plan(experiment, state)
            found += [(-1, Order(experiment, score=number)) for number in wanted.score]
            found += [(job.urgency, Order(experiment, job, stakes=wanted.stake is not None)) for job in wanted.jobs]
    return [order for _, order in sorted(found, key=lambda each: (each[0], each[1].experiment.number))]


def plan(experiment: Experiment, state: State) -> Plan:
    """What an experiment wants now. Nothing, if all that it wants is under way."""
    if experiment.judged is not None or experiment.kind == "repeat":
        return _further(experiment, state)
    kinds = {"baseline": _baseline, "confirm": _confirmation, "scale": _scale, "transfer": _confirmation}
    kinds |= {"shared": _shared, "joint": _joint}
    of_kind = kinds.get(experiment.kind, _change)
    # A parent that fails is a change's own matter, and a block goes on without what fails.
    runs = experiment.own_runs if of_kind in (_change, _joint) else [] if of_kind is _shared else experiment.runs
    failed = _failure(experiment, runs)
    made = Plan(verdict=failed) if failed else of_kind(experiment, state)
    # A verdict waits for the runs of this experiment that other devices are making.
    return Plan() if made.verdict and experiment.run_under_way else made


# --- What every session's verdicts rest on ---


def noise_of(state: State) -> gate.Noise:
    """Standard deviation of val_bpb between seeds: pooled over the session's repeats, calibration's as a prior."""
    rests_on = state.ended, len(state.decided), len(state.experiments)
    if (known := _noise.get(state)) is None or known[0] != rests_on:
        known = _noise[state] = rests_on, _noise_of(state)
    return known[1]


_noise: WeakKeyDictionary[State, tuple[tuple, gate.Noise]] = WeakKeyDictionary()  # each open experiment asks for it


def _noise_of(state: State) -> gate.Noise:
    from calibration.noise import expected  # here, because what only reads a session shall start fast

    first = next(run for run in state.baseline.runs if run.ok)
    prior = first.bpb * expected(first.result.get("total_tokens_M", 0.0) * 1e6)
    return pooled(state, prior, gate.CURVE * first.bpb)


def pooled(state: State, prior_sd: float, curve: float = 0.0) -> gate.Noise:
    """The noise by the session's repeats, with a prior: its standard deviation, and that of the slope of val_bpb over
    the tokens' logarithm. What devices differ by is estimated with it."""
    repeats = state.repeats(state.started.budget)
    groups = [[run.bpb for run in runs.values()] for runs in repeats.values()]
    of_groups = [conditions(runs.values()) for runs in repeats.values()]
    noise = gate.pooled(groups, prior_sd, conditions=of_groups, curve=curve)
    scores = {
        blob: {seed: run.bpb - noise.explains([(1.0, one)]).value for (seed, run), one in zip(runs.items(), of)}
        for (blob, runs), of in zip(repeats.items(), of_groups)
    }
    families: dict[str, list[dict[int, float]]] = {}
    for experiment in state.experiments.values():
        if (
            experiment.kind in ("change", "near misses", "joint", "replay")
            and {experiment.blob, experiment.parent} <= scores.keys()
        ):
            families.setdefault(experiment.parent or "", []).append(scores[experiment.blob])
    return replace(noise, shared=gate.shared((scores[parent], changes) for parent, changes in families.items()))


def said_of_noise(state: State) -> str:
    """How far chance moves val_bpb, and what can be seen all the same."""
    noise = noise_of(state)
    disturbances = [run.disturbance for run in state.runs.values() if run.ok]
    said = (
        f"{noise.sd:.6f} between seeds{' on one device' if noise.devices else ''} "
        f"({noise.df} degrees of freedom); a gain of about "
        f"{gate.smallest_detectable(noise, account_of(state)):.6f} is kept four times in five"
    )
    told = []
    if max(disturbances, default=0.0) >= WORTH_TELLING:
        longer = statistics.median(disturbances)
        told.append(f"the machine was busy or hot, so a run took {longer:.0%} longer (median)")
    repeats = [conditions(runs.values()) for runs in state.repeats(state.started.budget).values()]
    if unusual := sum(one.short != 0 for of in repeats for one in of):
        runs = "one run" if unusual == 1 else f"{unusual} runs"
        told.append(f"{runs} got over {SHORT:.0%} fewer or more tokens than others of the same train.py")
    explained = f". This explains {noise.explained:.0%} of the difference between equal runs, and is taken out"
    return "; ".join([said, *told]) + (explained if told else "")


def account_of(state: State) -> gate.Account:
    """What the session has staked, on decided tests and on those that are open. A block's test is looked at once, at
    its end: one that did not get there has told nothing, and costs nothing."""
    account = gate.Account()
    for experiment in state.decided:
        if evidence := experiment.verdict.evidence:
            beside = experiment.kind == "replay"  # it costs the branch nothing
            account = account.after(gate.replace_evidence(evidence, loss=0.0) if beside else evidence)
        elif experiment.stake is not None and experiment.kind != "joint":  # looked at, and then it crashed
            account = account.reserving(experiment.stake)
    for experiment in state.open:
        if experiment.stake is not None and experiment.decided is None:
            account = account.reserving(experiment.stake)
    return account


def stake_of(experiment: Experiment, state: State) -> float:
    """What an experiment that is to be tested now reserves."""
    account = account_of(state)
    return account.joint_stake if experiment.kind == "joint" else account.stake


# --- Kinds of experiments ---


def _baseline(baseline: Experiment, state: State) -> Plan:
    sound, wanted = [run for run in baseline.runs if run.ok], state.started.baseline_runs
    usual = [run for run, of in zip(sound, conditions(sound)) if not of.short]
    if wanted <= len(sound) < gate.MOST_BASELINE:  # an unusual one tells little, and another is made
        wanted = min(gate.MOST_BASELINE, wanted + len(sound) - len(usual))
    if len(sound) >= wanted and gate.doubted([run.bpb for run in usual], noise_of(state)):
        wanted = gate.MOST_BASELINE
    if jobs := _missing(state, baseline.blob, [gate.seed(i) for i in range(wanted)]):
        return Plan(jobs)
    if baseline.run_under_way:
        return Plan()
    last = next(iter(_with_weights(sound)[::-1]), None)
    if last is None:
        return Plan((Job(baseline.blob, gate.seed(len(sound)), state.budget, Urgency.FIRST),))
    if last.scored is None:
        return Plan(score=(last.number,))
    if problem := disagreement(last) or _same_start(sound):
        return Plan(verdict=Verdict("invalid", problem))
    return Plan(verdict=Verdict("keep", because("baseline"), statistics.fmean(run.bpb for run in sound)))


def _parent(experiment: Experiment, state: State) -> Experiment:
    """What an experiment is judged against. ValueError if that is nothing."""
    parent = state.parent_of(experiment)
    if parent is None:
        raise ValueError(f"experiment {experiment.number} has nothing to be judged against")
    return parent


def _parent_fails(experiment: Experiment) -> Verdict | None:
    """The verdict on an experiment whose parent failed too often beside it."""
    failing = [run for run in experiment.runs if run.blob == experiment.parent and run.status in FAILED]
    return _unjudged("invalid", because("parent_fails", why=failing[-1].reason)) if len(failing) >= TRIES else None


def _change(change: Experiment, state: State) -> Plan:
    parent = _parent(change, state)
    if failed := _parent_fails(change):
        return Plan(verdict=failed)
    sound = [run for run in change.own_runs if run.ok]
    if problem := _same_start(sound):
        return Plan(verdict=Verdict("invalid", problem))
    own, others = {run.seed: run for run in sound if run.seed is not None}, state.believed(parent.blob)
    (scores, of), (parents, of_parents) = map(_by_seed, (own, others))
    step = gate.next_step(
        scores,
        parents,
        noise_of(state),
        account_of(state),
        simpler=change.complexity < parent.complexity,
        stake=change.stake,
        conditions=(of, of_parents),
        fewest=USUAL if _got_more(sound, others.values()) else 1,
    )
    moved = change.kind != "replay" and _moved(change, state)
    if step.seed is not None and not (moved and sound):
        blob, urgency = parent.blob, Urgency.PARENT
        if step.action == "run candidate":
            blob, urgency = change.blob, Urgency.REPEAT if sound else Urgency.FIRST
        if step.seed in _begun(state, blob):
            return Plan()
        reserve = stake_of(change, state) if sound and change.stake is None else None
        paired = tuple(seed for seed in others if seed not in own) if urgency is Urgency.REPEAT else ()
        job = Job(blob, step.seed, state.budget, urgency, others=paired)
        return Plan((job,), stake=reserve)
    means = statistics.fmean(run.bpb for run in sound), statistics.fmean(state.results(parent.blob).values())
    return _tested(change, state, step, means, moved)


def _got_more(runs: Collection[Run], others: Collection[Run]) -> bool:
    """Whether a change's runs got so many more tokens than its parent's that they may be unusual ones, of which a
    change's first runs don't tell: it may be faster, or the machine was."""
    own, parents = ([trained for run in some if (trained := run.measured("total_tokens_M"))] for some in (runs, others))
    return bool(own and parents) and math.log(max(own) / statistics.median(parents)) > SHORT


def _moved(change: Experiment, state: State) -> bool:
    """Whether another change was kept since it was made."""
    return state.best is not None and state.best.blob != change.parent


def _superseded(state: State, *tested) -> Plan:
    """The verdict on a change that was not made on what is now the best. tested: means and evidence, if any."""
    assert state.best
    reason = because("moved", best=state.best.number)
    return Plan(verdict=Verdict("superseded", reason, *tested, judged=False))


def _unkept(evidence: Evidence, **more) -> Evidence:
    """The evidence of what is not kept all the same."""
    return gate.replace_evidence(evidence, better=False, simpler=False, loss=0.0, **more)


def _tested(change: Experiment, state: State, step: gate.Step, means: tuple[float, float], moved: bool) -> Plan:
    """The verdict that a test came to; on what is better, once its weights were scored again. moved: another change was
    kept meanwhile."""
    if step.action == "discard":
        return Plan(verdict=Verdict("discard", step.reason, *means, step.evidence))
    if moved:
        return _superseded(state, *means, _unkept(step.evidence, stake=change.stake or 0.0))
    sound = [run for run in change.own_runs if run.ok]
    best = min(_with_weights(sound), key=lambda run: run.bpb, default=None)  # that a leak would have helped most
    if best is None:
        own = {run.seed for run in change.own_runs}
        seed = next(seed for seed in map(gate.seed, itertools.count()) if seed not in own)
        return Plan((Job(change.blob, seed, state.budget, Urgency.REPEAT),))
    if best.scored is None:
        return Plan(score=(best.number,))
    if problem := disagreement(best) or _not_held_out(best, state):
        return Plan(verdict=Verdict("invalid", problem, *means, _unkept(step.evidence)))
    return Plan(verdict=Verdict("keep", step.reason, *means, step.evidence))


def _shared(block: Experiment, state: State) -> Plan:
    """Screening runs, all on one seed, that hold some patches each; then what they say of each patch."""
    from lab.verdict import shared  # here, because what only reads a session shall start fast

    parent = _parent(block, state)
    known, edit = noise_of(state), [edits.read(patch.edit) for patch in block.patches]
    noise = known.sd
    # Its own runs of the parent alone are among those that the estimates rest on, and are not to count twice.
    plain_runs = [run for run in state.believed(parent.blob).values() if run.experiment != block.number]
    of_plain = conditions(plain_runs)
    begun = [run for run in block.runs if run.status != "lost"]
    ended, unsure = [], []
    for run in begun:
        if run.ended:
            weighted = [*zip([1.0], conditions([run])), *((-1 / len(plain_runs), one) for one in of_plain)]
            moved, *variances = known.explains(weighted)
            ended.append((tuple(run.patches), run.bpb - moved if run.ok else None))
            unsure.append(sum(variances))
    screening = shared.Screening(
        len(edit),
        ended,
        noise * math.sqrt(1 + statistics.fmean(unsure or [0.0])),
        statistics.fmean(run.bpb for run in plain_runs),
        clash=lambda one, other: edit[one].meets(edit[other]),
    )
    # Looked at before each run of the parent alone; runs of other devices that end meanwhile change nothing.
    looked = ended[: max(0, len(ended) - (len(ended) + 1) % shared.BARE)]
    plain = _plainly_good(replace(screening, runs=tuple(looked), clash=shared.Screening.clash)) if looked else ()
    if len(begun) < block.pairs - 2 * shared.tested(noise) and not plain and not screening.hopeless:
        if screening.searching and block.run_under_way:
            return Plan()
        members = screening.next(len(begun))
        job = Job(parent.blob, SHARED_SEED + block.number, state.budget, Urgency.FIRST, patches=members)
        return Plan((job,))
    if block.run_under_way:
        return Plan()
    estimates = screening.estimates()
    chosen = screening.chosen(estimates)
    facts = {"runs": len(ended), "patches": len(edit)}
    if screening.hopeless:
        return Plan(verdict=Verdict("discard", because("mostly_bad", **facts)))
    reason = because("screened_in_vain", **facts)
    if plain:
        best = block.patches[plain[0]]
        reason = because("plainly_good", **facts, what=best.description.partition(":")[0], origin=best.origin)
    elif chosen:
        origins = " ".join(block.patches[place].origin for place in chosen)
        reason = because("screened", **facts, chosen=len(chosen), origins=origins)
    effects: dict[str, Interval | None] = {patch.origin: told for patch, told in zip(block.patches, estimates)}
    effects |= {block.patches[place].origin: None for place in screening.dropped}
    return Plan(verdict=Verdict("discard", reason, effects=effects))


@functools.lru_cache(maxsize=8)  # a pool of devices plans several times a second
def _plainly_good(screening) -> tuple[int, ...]:
    return tuple(screening.plainly_good())


def _joint(joint: Experiment, state: State) -> Plan:
    """The best patches of a block as one, and the parent, on fresh seeds; one look at the end."""
    parent = _parent(joint, state)
    if failed := _parent_fails(joint):
        return Plan(verdict=failed)
    seeds = [SHARED_SEED + 1000 * joint.number + place for place in range(joint.pairs)]
    asked = {(run.blob, run.seed) for run in joint.runs if run.ok or run.ended is None}
    wanted = [(blob, seed) for seed in seeds for blob in (joint.blob, parent.blob) if (blob, seed) not in asked]
    moved = _moved(joint, state)
    if wanted and moved:
        return Plan() if joint.run_under_way else _superseded(state)
    if wanted or joint.run_under_way:
        stake = stake_of(joint, state) if joint.stake is None else None
        return Plan(tuple(Job(blob, seed, state.budget, Urgency.REPEAT) for blob, seed in wanted), stake=stake)
    sound = [run for run in joint.runs if run.ok]
    own, others = ({run.seed or 0: run for run in sound if run.blob == blob} for blob in (joint.blob, parent.blob))
    (scores, of), (parents, of_parents) = map(_by_seed, (own, others))
    noise, account = noise_of(state), account_of(state)
    step = gate.joint_step(scores, parents, noise, account, joint.stake, conditions=(of, of_parents))
    means = statistics.fmean(scores.values()), statistics.fmean(parents.values())
    return _tested(joint, state, step, means, moved)


def _further(change: Experiment, state: State) -> Plan:
    """Runs that make a judged change's effect better known: of it and of its parent, on the same seeds."""
    judged, parent = change.judged, state.parent_of(change)
    if change.kind == "repeat":
        of = state.experiments[change.members[0]]
        judged = Verdict(of.verdict.status, because("further_runs", of=of.number))
    if judged is None or parent is None:
        raise ValueError(f"experiment {change.number} has no verdict that further runs could leave as it is")
    if not _failure(change, change.runs):
        seeds = [gate.seed(i) for i in range(change.min_runs)]
        jobs = [job for blob in (parent.blob, change.blob) for job in _missing(state, blob, seeds, Urgency.FURTHER)]
        if jobs or change.run_under_way:
            return Plan(tuple(sorted(jobs, key=lambda job: job.seed)))
    means = [state.results(blob).values() for blob in (change.blob, parent.blob)]
    mean, parent_mean = (statistics.fmean(scores) if scores else None for scores in means)
    return Plan(verdict=Verdict(judged.status, judged.reason, mean, parent_mean, judged.evidence))


def _confirmation(confirmation: Experiment, state: State) -> Plan:
    """A train.py and its parent in turn, the best and the baseline mostly, on seeds that selected nothing; each run's
    weights are scored on held-out rows. Another pair is made in place of one with an unusual run, up to twice as many
    in all."""
    of = state.parent_of(confirmation) or state.baseline
    sound = _with_weights([run for run in confirmation.runs if run.ok])
    if unscored := tuple(run.number for run in sound if run.scored is None):
        return Plan(score=unscored)
    if problem := next(filter(None, map(disagreement, sound)), None):
        return Plan(verdict=Verdict("invalid", problem))
    budget, best, parent = confirmation.budget or state.budget, confirmation.blob, of.blob
    known = [[run for run in state.runs_of(blob) if run.ok] for blob in (best, parent)]
    unusual = {run.seed for runs in known for run, one in zip(runs, conditions(runs)) if one.short}
    first = CONFIRM_SEEDS + 100 * confirmation.number
    spare = range(first, first + max(confirmation.pairs, min(2 * confirmation.pairs, 100)))
    seeds = sorted(spare, key=lambda seed: seed in unusual)[: confirmation.pairs]
    order = [
        (blob, seed) for i, seed in enumerate(seeds) for blob in ((best, parent) if i % 2 == 0 else (parent, best))
    ]
    asked = {(run.blob, run.seed) for run in confirmation.runs if run in sound or run.ended is None}
    jobs = [Job(blob, seed, budget, Urgency.REPEAT) for blob, seed in order if (blob, seed) not in asked]
    if jobs or confirmation.run_under_way:
        return Plan(tuple(jobs))
    runs = {(run.blob, run.seed): run.scored for run in sound}

    def interval(rows: str) -> Interval:
        return gate.interval([getattr(runs[parent, s], rows) - getattr(runs[best, s], rows) for s in seeds])

    gains = Gains(val_bpb=interval("val_bpb"), held_out_bpb=interval("held_out_bpb"))
    gain, low, high = gains["held_out_bpb"]
    facts = {"pairs": confirmation.pairs, "gain": gain, "low": low, "high": high}
    reason = because("confirmed", **facts)
    if confirmation.kind == "transfer" or best not in {kept.blob for kept in state.kept}:
        reason = because("compared", what=confirmation.description[:200], **facts)
    if replaced := len({run.seed for run in sound} - set(seeds)):
        reason = because("pairs_replaced", said=reason, replaced=replaced)
    mean = statistics.fmean(run.bpb for run in sound if run.blob == best and run.seed in seeds)
    return Plan(verdict=Verdict("keep", reason, mean, gains=gains))


def _scale(scale: Experiment, state: State) -> Plan:
    """The baseline for other times, on new seeds, the times in turn: what a score is worth in time."""
    asked = {(run.budget, run.seed) for run in scale.runs if run.ok or run.ended is None}
    seeds = [CONFIRM_SEEDS + 100 * scale.number + round for round in range(scale.pairs)]
    times = [share * state.budget for share in SCALES]
    wanted = [(time, seed) for seed in seeds for time in times if (time, seed) not in asked]
    if wanted or scale.run_under_way:
        return Plan(tuple(Job(scale.blob, seed, time, Urgency.REPEAT) for time, seed in wanted))
    means = [statistics.fmean(run.bpb for run in scale.runs if run.ok and run.budget == time) for time in times]
    points = ", ".join(f"{mean:.6f} after {time:g} s" for time, mean in zip(times, means))
    return Plan(verdict=Verdict("keep", because("scaled", points=points)))


def _by_seed(runs: Mapping[int, Run]) -> tuple[dict[int, float], dict[int, Conditions]]:
    """(val_bpb, conditions) of runs."""
    return {seed: run.bpb for seed, run in runs.items()}, dict(zip(runs, conditions(runs.values())))


def _missing(state: State, blob: str, seeds: list[int], urgency: Urgency = Urgency.FIRST) -> tuple[Job, ...]:
    """Jobs for the seeds that a train.py was not run on, and is not being run on."""
    known = _begun(state, blob) | state.results(blob).keys()
    return tuple(Job(blob, seed, state.budget, urgency) for seed in seeds if seed not in known)


def _begun(state: State, blob: str) -> set[int | None]:
    """Seeds that a train.py is being run on."""
    return {run.seed for run in state.runs_of(blob) if run.ended is None}


def _with_weights(runs: list[Run]) -> list[Run]:
    """The runs whose weights were not lost with their device."""

    def lost(run: Run) -> bool:
        return bool(run.scored and run.scored.problem and run.scored.problem.code == "weights_lost")

    return [run for run in runs if not lost(run)]


# --- Why runs are not believed ---


def _failure(experiment: Experiment, runs: list[Run]) -> Verdict | None:
    """The verdict on runs that failed or were interrupted too often, or on a lab that fails at it."""
    for run in experiment.runs:
        if run.reason and run.reason.code in ("other_attention", "other_conditions"):
            return _unjudged("invalid", run.reason)
    for run in runs:
        if run.status in ("crash", "invalid") and run.reason:
            return Verdict(run.status, run.reason)  # pyright: ignore[reportArgumentType]
    since = experiment.runs
    if experiment.kind in PROVEN:
        since = list(itertools.takewhile(lambda run: not run.ok, reversed(since)))
    gone = [run for run in since if run.reason and run.reason.code == "device_lost"]
    workers = {run.worker for run in gone}
    if min(len(workers), _incidents(gone)) >= SUSPECT:
        return _unjudged("crash", because("suspect", workers=", ".join(sorted(workers))))
    lost = [run for run in since if run.status == "lost" and (run.reason is None or run.reason.code not in BLAMELESS)]
    if (times := _incidents(lost)) >= MOST_LOST:
        return _unjudged("crash", because("interrupted", times=times))
    if experiment.failures >= TRIES:
        return _unjudged("invalid", because("harness_failed", times=experiment.failures))
    return None


def _incidents(lost: list[Run]) -> int:
    """How many times something happened that runs were lost by: what ends one may end all that are under way, as a
    power failure does."""
    times, until = 0, 0.0
    for run in sorted(lost, key=lambda run: run.time):
        if run.ended and run.time >= until:
            times, until = times + 1, run.ended.time
    return times


def _unjudged(status, reason: Reason) -> Verdict:
    """A verdict that says nothing of the change."""
    return Verdict(status, reason, judged=False)


def _same_start(runs: list[Run]) -> Reason | None:
    """Why runs with different seeds are no repeats: noise can't be told from a seed that is always the same."""
    starts = {run.seed: run.result["initial_weights"] for run in runs if run.ok and run.result.get("initial_weights")}
    alike = any(apart(*pair) < ALIKE for pair in itertools.combinations(starts.values(), 2))
    return because("same_start") if alike else None


def disagreement(run: Run) -> Reason | None:
    """Why a run's own score is not believed, after its weights were scored again."""
    scored = run.scored
    if scored is None or scored.val_bpb is None:
        return because("not_scored_again", problem=scored and scored.problem)
    if not abs(scored.val_bpb - run.bpb) <= AGREES:
        return because("other_score", reported=run.bpb, again=scored.val_bpb)
    return None


def _not_held_out(run: Run, state: State) -> Reason | None:
    """Why a gain on validation rows is not believed: held-out rows don't show at least half of it, allowing for half
    the noise and two standard errors of which rows they are."""
    scored, known = run.scored, state.runs.get(run.scored.against or 0) if run.scored else None
    before = known.scored if known else None
    if scored is None or before is None or None in (before.val_bpb, before.held_out_bpb, scored.held_out_bpb):
        return None
    gain, held = before.val_bpb - scored.val_bpb, before.held_out_bpb - scored.held_out_bpb  # pyright: ignore
    sd = noise_of(state).sd
    error = sd if scored.error is None else scored.error  # somebody has tidied up
    if gain - held <= max(0.5 * abs(gain), 0.5 * sd) + 2 * error:
        return None
    return because("not_held_out", gain=gain, held=held)


def scored_parent(experiment: Experiment, state: State) -> Run | None:
    """The run of an experiment's parent that its weights' scores are compared with."""
    parent = state.parent_of(experiment)
    runs = [run for run in parent.own_runs if run.scored and run.scored.val_bpb is not None] if parent else []
    return next(iter(runs), None)
