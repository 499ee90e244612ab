"""A session in numbers, worked out once from its record: comparison and report say the same of it."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict
from functools import cached_property

from lab.compare import effects, multiplier
from lab.compare.effects import Effect, quantity
from lab.compare.multiplier import Curve, Times
from lab.genome.kinds import KINDS
from lab.session.record import Record
from lab.session.state import APART, BASELINE, MEASURING, Experiment, Run, by_seed
from lab.untrusted import counted
from lab.verdict import gate
from lab.verdict.plan import noise_of

FACTS = "name place budget eval gain relative per_hour hours rows notes".split()
STARTED = "device backend source".split()
TOLD_APART = {  # what the runs of APART are called where the time is told
    "confirm": "confirmations",
    "scale": "the baseline with other training times",
    "transfer": "transfers to another size",
}
DATACENTRE = r"g[bh]\d{3}|[ahbvlptkm]\d{1,3}[gs]?"  # A100, A10G, H200, GB200, GH200, L40S, V100, T4, M60


class Analysis:
    """A session in numbers. `place` is where it was measured, as in Comparison: the device, unless a comparison says
    more; `budget` the seconds of training of its usual runs, None if unknown."""

    def __init__(self, record: Record):
        self.record, self.state, self.started = record, record.state, record.started
        self.budget, self.name, self.place = self.started.budget, record.name, self.started.device
        # What is decided, by number, the baseline first; confirmations and further runs are left out.
        decided = sorted(self.state.decided, key=lambda experiment: experiment.number)
        self.experiments = {e.number: e for e in decided if e.kind not in MEASURING}
        self.tried = self.state.tried
        self.counts = Counter(experiment.status for experiment in self.tried)
        # By experiment, all runs of its train.py that have a score, for whatever experiment they were made.
        self.runs: dict[int, list[Run]] = {number: [] for number in self.experiments}
        for run in self.state.runs.values():
            if run.ok and quantity(run, "val_bpb") is not None:
                owner = self._owner(run)
                if owner in self.runs:
                    self.runs[owner].append(run)
        usual = {number: list(by_seed(filter(self._usual, runs)).values()) for number, runs in self.runs.items()}
        # The tag of what most of these were measured by; "" if that is unknown.
        tags = Counter(_eval(run) for runs in usual.values() for run in runs)
        self.eval = tags.most_common(1)[0][0] if tags else self.started.eval
        # Of the runs those under the session's conditions, none of what failed; and without confirmations, which the
        # score is not the mean of.
        sound = [number for number, e in self.experiments.items() if e.status in ("keep", "discard")]
        self.counted: dict[int, list[Run]] = dict.fromkeys(self.experiments, [])
        self.counted |= {number: [run for run in usual[number] if _eval(run) == self.eval] for number in sound}
        self.judged = {n: [run for run in runs if not self.confirms(run)] for n, runs in self.counted.items()}
        self.scores = {n: statistics.fmean(run.bpb for run in runs) for n, runs in self.judged.items() if runs}
        # The baseline, and what was kept on top of it. Not a replay that helped: it was judged against the baseline.
        kept = [e for e in self.experiments.values() if e.status == "keep" and e.kind != "replay"]
        self.steps = [experiment for experiment in kept if experiment.number in self.scores]
        self.best = self.steps[-1] if self.steps else None
        self.baseline = self.steps[0] if self.steps and self.steps[0].number == BASELINE else None
        self.gain = self.relative = None  # of the best, biased by selection: bits per byte, and of the baseline's
        if self.best and self.baseline:
            self.gain = self.scores[BASELINE] - self.scores[self.best.number]
            self.relative = self.gain / self.scores[BASELINE]

    def _owner(self, run: Run) -> int | None:
        """The number of the experiment whose train.py a run is of."""
        experiment = self.state.experiments[run.experiment]
        if experiment.kind not in MEASURING and run.blob == experiment.blob:
            return experiment.number
        parent = self.state.parent_of(experiment)
        if parent is not None and run.blob == parent.blob:
            return parent.number
        earlier = self.state.kept if experiment.kind == "confirm" else self.experiments.values()
        same = [e.number for e in earlier if e.blob == run.blob and e.number < experiment.number]
        return max(same, default=None)

    def _usual(self, run: Run) -> bool:
        """Whether a run was as long as the session's are."""
        return None in (run.budget, self.budget) or run.budget == self.budget

    def confirms(self, run: Run) -> bool:
        """Whether a run is part of a confirmation."""
        return self.state.experiments[run.experiment].kind in APART

    # --- Scores ---

    @cached_property
    def noise(self) -> gate.Noise | None:
        """The noise of val_bpb between seeds, as the session estimates it; None where nothing was repeated, or nothing
        is known of tokens."""
        first = next((run for run in self.state.baseline.runs if run.ok), None)
        if first is None or not quantity(first, "tokens") or not self.state.repeats(self.budget):
            return None
        return noise_of(self.state)

    @cached_property
    def curve(self) -> Curve | None:
        """The baseline's score against its training time; None where that is not known."""
        from calibration.noise import expected  # here, as the rest of calibration is large

        by_time: defaultdict[float, list[Run]] = defaultdict(list)
        for run in self.runs.get(BASELINE, ()):
            if run.budget and _eval(run) == self.eval:
                by_time[run.budget].append(run)
        if self.noise is None or self.budget not in by_time or self.baseline is None:
            return None

        def spread(runs: list[Run]) -> float:  # of equal runs, as far as it is known before they are made
            tokens = effects.mean(runs, "tokens")
            return statistics.fmean(run.bpb for run in runs) * (expected(tokens) if tokens else 1.0)

        noise = {t: self.noise.sd * spread(runs) / spread(by_time[self.budget]) for t, runs in by_time.items()}
        scores = {t: [run.bpb for run in runs] for t, runs in by_time.items()}
        return multiplier.curve(scores, self.budget, noise, self.noise.df)

    def times(self, experiment: Experiment) -> Times | None:
        """The effect of a change on its parent as a factor of time; None where that is not known."""
        effect, curve = self.effect(experiment), self.curve
        return curve.told(effect) if effect and curve and not curve.why_not else None

    @property
    def gained(self) -> Times | None:
        """The best against the baseline as a factor of time: by confirmations, else by the session's scores, which are
        biased in its favour."""
        if self.curve is None or self.curve.why_not or not self.best or not self.baseline or self.best is self.baseline:
            return None
        pair = self.judged[self.best.number], self.judged[BASELINE]
        return self.curve.told(self.confirmed or effects.between(*pair, self.noise, biased=True, picked=True))

    @property
    def said_of_time(self) -> str:
        """What the best is worth in time, or why that is not known; "" where the baseline was run for one time."""
        curve, gained = self.curve, self.gained
        if curve is None:
            return ""
        if curve.why_not:
            return f"effects can't be told as factors of time: {curve.why_not}"
        biased = "" if self.confirmed else ", not confirmed and so biased in its favour"
        best = f"the best reaches the baseline's score in {gained}{biased}" if gained else ""
        points = ", ".join(f"{curve.points[t]:.6f} after {t:g} s" for t in curve.points)
        return "; ".join(filter(None, [best, self._said_of_file(curve), f"the baseline has {points}", curve.remark]))

    def _said_of_file(self, curve: Curve) -> str:
        """What a confirmation tells in time of a train.py that was not kept, but given by hand."""
        confirmation = self.state.confirmation_of(kept=False)
        if not confirmation or confirmation.verdict.confirmed is None or confirmation.budget != self.budget:
            return ""
        runs = [run for run in confirmation.runs if run.ok and _eval(run) == self.eval]
        own, others = ([run for run in runs if (run.blob == confirmation.blob) == its] for its in (True, False))
        times = curve.told(effects.between(own, others, self.noise)) if own and others else None
        return f"{confirmation.description} reaches the baseline's score in {times}" if times else ""

    def mean(self, experiment: Experiment | None, name: str) -> float | None:
        """The mean of a figure of its runs, see effects.quantity."""
        return effects.mean(self.counted[experiment.number], name) if experiment else None

    def difference(self, experiment: Experiment) -> float | None:
        """val_bpb minus the parent's, as the session saw them: below 0 is better."""
        if experiment.onto not in self.scores or experiment.number not in self.scores:
            return None
        return self.scores[experiment.number] - self.scores[experiment.onto]

    def step(self, experiment: Experiment) -> float | None:
        """The difference as a share of the parent's val_bpb."""
        difference = self.difference(experiment)
        return None if difference is None or experiment.onto is None else difference / self.scores[experiment.onto]

    def effect(self, experiment: Experiment) -> Effect | None:
        """The effect of a change on its parent, in its own session; None where one of them has no score."""
        parent = None if experiment.onto is None else self.experiments.get(experiment.onto)
        if parent is None:
            return None
        own, others = self.counted[experiment.number], self.counted[parent.number]
        if not own or not others:
            return None
        picked = chosen(experiment)
        # A parent was picked for its scores wherever it came from: it is the parent because it was kept.
        last = experiment if picked else parent if parent.number > BASELINE else None
        later = [run for run in own if _made_after(run, experiment)] if picked else own
        since = [run for run in others if last is None or _made_after(run, last)]
        sure = self.noise is not None and bool(later and since)
        own, others = (later, since) if sure else (own, others)
        biased, known = self.noise is not None and not sure, bool(experiment.origin) or picked
        facts = {"parent_bpb": self.scores.get(parent.number) if parent.number > BASELINE else None}
        return effects.between(own, others, self.noise, biased=biased, known=known, picked=picked, **facts)

    @cached_property
    def screened(self) -> list[tuple[int, str, Effect]]:
        """(experiment, origin, effect) of each patch of its blocks of shared runs: posterior means and intervals."""
        found, mean = [], self.scores.get(BASELINE, 1.0)
        for block in self.state.decided:
            for origin, told in (block.verdict.effects or {}).items():
                value, low, high = told or (0.0, 0.0, 0.0)
                if block.runs and low < high:  # a record from elsewhere may say anything
                    error = (high - low) / (2 * effects.Z)
                    relative = value / self.scores.get(block.onto or BASELINE, mean)
                    effect = Effect(value, relative, error, len(block.runs), low, high, known=True, shrunk=True)
                    found.append((block.number, origin, effect))
        return found

    # --- The session as a whole ---

    @property
    def gain_by_kind(self) -> dict[str, float]:
        """What the kept changes of each kind gained, as a share of the baseline's val_bpb: together `relative`."""
        gained: defaultdict[str, float] = defaultdict(float)
        for before, after in zip(self.steps, self.steps[1:]):
            by = (self.scores[before.number] - self.scores[after.number]) / self.scores[self.steps[0].number]
            gained[kind_of(after)] += by
        return dict(gained)

    @property
    def only_replays(self) -> bool:
        """Whether all that it tried were others' changes, on its baseline."""
        return bool(self.tried) and all(experiment.kind == "replay" for experiment in self.tried)

    @property
    def confirmation(self) -> Experiment | None:
        return self.state.confirmation

    @property
    def kept_since(self) -> bool:
        """Whether something was kept after the last confirmation."""
        return bool(self.confirmation and self.best and self.confirmation.blob != self.best.blob)

    @property
    def confirmed(self) -> Effect | None:
        """The best against the baseline, on runs of confirmations alone."""
        if not self.best or not self.baseline or self.best is self.baseline:
            return None
        pair = [[run for run in self.counted[e.number] if self.confirms(run)] for e in (self.best, self.baseline)]
        return effects.between(pair[0], pair[1], self.noise) if all(pair) else None

    @cached_property
    def hours(self) -> float | None:
        """The hours from its first run to the end of its last; None if no time is known."""
        ended = [run for run in self.state.runs.values() if run.status and run.time > 0]
        if not ended:
            return None
        return (max(run.time + run.seconds for run in ended) - min(run.time for run in ended)) / 3600

    @property
    def per_hour(self) -> float | None:
        """Experiments."""
        return len(self.tried) / self.hours if self.hours else None

    @property
    def rows(self) -> int:
        """Runs that its ledger has."""
        return sum(run.status not in (None, "lost") for run in self.state.runs.values())

    def said_of_energy(self, price: float | None = None) -> str:
        """What its training took, and cost at a price for a kWh; "" where nothing was measured."""
        runs = [run for run in self.state.runs.values() if run.ok]
        known = [joules for run in runs if (joules := quantity(run, "joules")) is not None]
        if not known:
            return ""
        watts, hours = effects.mean(runs, "watts"), math.fsum(known) / 3.6e6
        of = f"{len(known)} of {len(runs)} runs" if len(known) < len(runs) else f"{len(runs)} runs"
        said = f"training {of} took {hours:.3g} kWh" + (f", {watts:.0f} W" if watts else "")
        return said + (f", which cost {hours * price:.2f} at {price:g} a kWh" if price is not None else "")

    @property
    def notes(self) -> list[str]:
        """What a reader should know."""
        every = [run for runs in self.runs.values() for run in runs]
        lengths = Counter(run.budget for run in every if not self._usual(run) and not self.confirms(run))
        of = {length: counted(number, "run") for length, number in lengths.items()}
        notes = [f"left out: {runs} of {length:g} s, not {self.budget:g} s" for length, runs in of.items()]
        return list(dict.fromkeys([*self.started.notes, *notes]))

    def facts(self) -> dict:
        """val_bpb and the means of the runs' figures, for the baseline and for the best, as JSON."""
        facts = {name: getattr(self, name) for name in FACTS} | {n: getattr(self.started, n) for n in STARTED}
        facts |= {"sort": sort_of(self.started.device), "experiments": len(self.tried), "counts": dict(self.counts)}
        for name, experiment in (("baseline", self.baseline), ("best", self.best)):
            figures = {
                figure: self.mean(experiment, figure)
                for figure in ("tokens", "flops", "mfu_percent", "watts", "joules_per_M")
            }
            known = {"number": experiment.number, "val_bpb": self.scores[experiment.number]} if experiment else {}
            facts[name] = known | figures if known else None
        said = self.state.said_of(self.confirmation) if self.confirmation else ""
        confirmed, noise = (value and asdict(value) for value in (self.confirmed, self.noise))
        curve, gained = (value and asdict(value) for value in (self.curve, self.gained))
        facts |= {"confirmed": confirmed, "confirmation": said, "noise": noise}
        return facts | {"curve": curve, "gained_time": gained}

    @property
    def shares(self) -> dict[str, float]:
        """Hours by what the session's time went to; of several devices, each one's."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for run in self.state.runs.values():  # also of those that are no change's, as shared runs are
            if not run.ok or run.budget is None or not run.seconds:
                continue
            experiment, trained = self.state.experiments[run.experiment], min(run.budget, run.seconds)
            if apart := TOLD_APART.get(experiment.kind):
                seconds[apart] += run.seconds
                continue
            own = bool(run.patches) or experiment.kind not in MEASURING and run.blob == experiment.blob
            again = "training again: parents and further runs"
            seconds["training the changes" if own else again] += trained
            seconds["starting, compiling and evaluating runs"] += run.seconds - trained
        if self.hours:
            devices = len({run.worker for run in self.state.runs.values()} - {""}) or 1
            rest = self.hours * 3600 * devices - sum(seconds.values())
            seconds["time between runs, crashed runs, proposing changes"] = rest
        return {what: amount / 3600 for what, amount in seconds.items() if amount > 1e-6}


def _made_after(run: Run, judged: Experiment) -> bool:
    """Whether a run was begun after a verdict, so that it was no part of it. For a later experiment is not enough: with
    several devices that may be before."""
    return run.experiment > judged.number and run.time >= judged.decided_at


def chosen(experiment: Experiment) -> bool:
    """Whether a session picked it for its scores."""
    own = experiment.number != BASELINE and not experiment.origin
    return own and (experiment.status == "keep" or experiment.near_miss)


def kind_of(experiment: Experiment) -> str:
    """What most of a change is about, one of KINDS; "other" where that is unknown."""
    return next((kind for kind in experiment.kinds if kind in KINDS), "other")


def _eval(run: Run) -> str:
    return str(run.result.get("eval") or "")


def sort_of(device: str) -> str:
    """What sort of device a tag names: "cpu", "apple", "jetson", "nvidia datacentre", "nvidia desktop", "amd", "intel"
    or "other"."""
    parts = device.lower().split("-")
    if parts[0] in ("cpu", "apple", "amd", "intel"):
        return parts[0]
    if {"jetson", "orin", "xavier", "thor"} & set(parts):
        return "jetson"
    if parts[0] != "nvidia":
        return "other"
    desktop = {"rtx", "gtx", "titan", "quadro"} & set(parts) or not any(
        re.fullmatch(DATACENTRE, part) for part in parts
    )
    return "nvidia desktop" if desktop else "nvidia datacentre"
