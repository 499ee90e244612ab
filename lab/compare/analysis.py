"""A session in numbers, worked out once from its record: comparison and report say the same of it."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from lab.compare import effects
from lab.compare.effects import Effect, quantity
from lab.genome.kinds import KINDS
from lab.session.events import Verdict
from lab.session.record import Record
from lab.session.state import BASELINE, MEASURING, Experiment, Run
from lab.verdict import gate

DATACENTRE = r"g[bh]\d{3}|[ahbvlptkm]\d{1,3}[gs]?"  # A100, A10G, H200, GB200, GH200, L40S, V100, T4, M60


@dataclass
class Facts:
    """A session in numbers, for machines.

    Attributes:
        place: as in Comparison. sort: of the device, see `sort_of`. source: as of SessionStarted.
        baseline, best: mean val_bpb, as the session saw it: the best flatters itself. gain: baseline's minus best's;
            relative: to the baseline's. None without scores. best_number: of the experiment.
        confirmed: the best against the baseline, on runs of confirmations alone; None without any.
        confirmation: what the last one said.
        experiments: without the baseline and confirmations; and of them so many kept, discarded, crashed, invalid.
        keep_rate, crash_rate: of the experiments. per_hour: experiments. rows: of the ledger.
        hours: from its first run to the end of its last.
        tokens, flops, mfu: of a run of the baseline, and of the best: means; the model's, mfu in percent; or None.
        noise, df: of val_bpb between seeds; None where nothing was repeated.
    """

    name: str
    place: str
    device: str
    sort: str
    backend: str
    budget: float | None
    eval: str
    source: str
    baseline: float | None
    best: float | None
    best_number: int | None
    gain: float | None
    relative: float | None
    confirmed: Effect | None
    confirmation: str
    experiments: int
    kept: int
    discarded: int
    crashed: int
    invalid: int
    keep_rate: float | None
    crash_rate: float | None
    per_hour: float | None
    hours: float | None
    tokens: tuple[float | None, float | None]
    flops: tuple[float | None, float | None]
    mfu: tuple[float | None, float | None]
    noise: float | None
    df: int | None
    rows: int
    notes: list[str] = field(default_factory=list)


@dataclass
class Spent:
    """Seconds of an experiment's runs: training of its own train.py and of others' beside it, and what runs took apart
    from training (start, compilation, evaluation)."""

    own: float = 0.0
    beside: float = 0.0
    around: float = 0.0

    @property
    def total(self) -> float:
        return self.own + self.beside + self.around


class Step(NamedTuple):
    """A difference of val_bpb, below 0 is better, from the one before."""

    difference: float
    before: float

    @property
    def relative(self) -> float:
        return self.difference / self.before


class Analysis:
    """A session in numbers.

    Attributes:
        budget: seconds of training of its usual runs; None if unknown.
        experiments: those that are decided, by number, the baseline first; confirmations and further runs are not.
        runs: by experiment, all runs of its train.py that have a score, for whatever experiment they were made.
        eval: the tag of what most of its usual runs were measured by; "" if that is unknown.
        counted: of `runs` those under the session's conditions; none of what failed.
        judged: of `counted` those that the score is the mean of: confirmations are left out.
        scores: mean val_bpb by experiment, of those that have one.
        steps: the baseline, and what was kept on top of it, in order. A replay that helped is not among them: it was
            judged against the baseline, and the best stays where it is.
    """

    def __init__(self, record: Record):
        self.record, self.state, self.started = record, record.state, record.started
        self.budget, self.name = self.started.budget, record.name
        decided = sorted(self.state.decided, key=lambda experiment: experiment.number)
        self.experiments = {e.number: e for e in decided if e.kind not in MEASURING}
        self.runs: dict[int, list[Run]] = {number: [] for number in self.experiments}
        for run in self.state.runs.values():
            if run.ok and quantity(run, "val_bpb") is not None:
                owner = self._owner(run)
                if owner in self.runs:
                    self.runs[owner].append(run)
        usual = {number: [run for run in runs if self._usual(run)] for number, runs in self.runs.items()}
        tags = Counter(_eval(run) for runs in usual.values() for run in runs)
        self.eval = tags.most_common(1)[0][0] if tags else self.started.eval
        self.counted = {
            number: [run for run in runs if _eval(run) == self.eval]
            if self.experiments[number].status in ("keep", "discard")
            else []
            for number, runs in usual.items()
        }
        self.judged = {n: [run for run in runs if not self.confirms(run)] for n, runs in self.counted.items()}
        self.scores = {n: statistics.fmean(run.bpb for run in runs) for n, runs in self.judged.items() if runs}
        self.steps = [
            e for n, e in self.experiments.items() if e.status == "keep" and e.kind != "replay" and n in self.scores
        ]

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
        return self.state.experiments[run.experiment].kind == "confirm"

    # --- Scores ---

    @cached_property
    def noise(self) -> gate.Noise | None:
        """Of val_bpb between seeds, as the session estimates it; None where nothing was repeated."""
        from calibration.noise import expected  # here, as the rest of calibration is large

        groups = [
            [run.bpb for run in runs if run.budget == self.budget]
            for number, runs in self.runs.items()
            if self.experiments[number].status != "invalid"
        ]
        first = next(iter(self.runs.get(BASELINE, ())), None)
        tokens = first and quantity(first, "tokens")
        if first is None or not tokens or not any(len(group) > 1 for group in groups):
            return None
        return gate.pooled(groups, first.bpb * expected(tokens))

    @property
    def baseline(self) -> Experiment | None:
        return self.steps[0] if self.steps and self.steps[0].number == BASELINE else None

    @property
    def best(self) -> Experiment | None:
        return self.steps[-1] if self.steps else None

    def mean(self, experiment: Experiment | None, name: str) -> float | None:
        """Of a figure of its runs, see effects.quantity."""
        return effects.mean(self.counted[experiment.number], name) if experiment else None

    def step(self, experiment: Experiment) -> Step | None:
        """From the parent's val_bpb to its own, as the session saw them."""
        if experiment.onto is None or experiment.number not in self.scores or experiment.onto not in self.scores:
            return None
        before = self.scores[experiment.onto]
        return Step(self.scores[experiment.number] - before, before)

    def effect(self, experiment: Experiment) -> Effect | None:
        """Of a change on top of its parent, in its own session; None where one of them has no score."""
        parent = None if experiment.onto is None else self.experiments.get(experiment.onto)
        if parent is None:
            return None
        own, others = self.counted[experiment.number], self.counted[parent.number]
        if not own or not others:
            return None
        picked = chosen(experiment)
        # A parent was picked for its scores wherever it came from: it is the parent because it was kept.
        after = experiment.number if picked else parent.number if parent.number > BASELINE else -1
        later = [run for run in own if run.experiment > experiment.number] if picked else own
        since = [run for run in others if run.experiment > after]
        sure = self.noise is not None and bool(later and since)
        effect = effects.between(*((later, since) if sure else (own, others)), self.noise)
        flattered = self.noise is not None and not sure
        return replace(effect, flattered=flattered, known=bool(experiment.origin) or picked, picked=picked)

    @cached_property
    def confirmed(self) -> Effect | None:
        """The best against the baseline, on runs of confirmations alone."""
        if self.best is None or self.baseline is None or self.best is self.baseline:
            return None
        own, others = (
            [run for run in self.counted[e.number] if self.confirms(run)] for e in (self.best, self.baseline)
        )
        return effects.between(own, others, self.noise) if own and others else None

    # --- The session as a whole ---

    @cached_property
    def tried(self) -> list[Experiment]:
        """All but the baseline."""
        return [experiment for experiment in self.experiments.values() if experiment.number != BASELINE]

    @cached_property
    def only_replays(self) -> bool:
        """Whether all that it tried were others' changes, on its baseline."""
        return bool(self.tried) and all(experiment.kind == "replay" for experiment in self.tried)

    @cached_property
    def confirmation(self) -> Verdict | None:
        """The verdict of the last one."""
        last = self._last_confirmation
        return last.verdict if last else None

    @cached_property
    def kept_since(self) -> bool:
        """Whether something was kept after the last confirmation."""
        last = self._last_confirmation
        return last is not None and self.best is not None and last.blob != self.best.blob

    @cached_property
    def _last_confirmation(self) -> Experiment | None:
        return next((e for e in reversed(self.state.decided) if e.kind == "confirm"), None)

    @cached_property
    def hours(self) -> float | None:
        """From its first run to the end of its last; None if no time is known."""
        ended = [run for run in self.state.runs.values() if run.status and run.time > 0]
        if not ended:
            return None
        return (max(run.time + run.seconds for run in ended) - min(run.time for run in ended)) / 3600

    @cached_property
    def rows(self) -> int:
        """Runs that its ledger has."""
        return sum(run.status not in (None, "lost") for run in self.state.runs.values())

    @cached_property
    def notes(self) -> list[str]:
        """What a reader should know."""
        lengths = Counter(run.budget for runs in self.runs.values() for run in runs if not self._usual(run))
        notes = [
            f"{n} runs of {seconds:g} s instead of {self.budget:g} s are left out"
            for seconds, n in sorted(lengths.items())
        ]
        return list(dict.fromkeys([*self.record.notes, *self.started.notes, *notes]))

    @cached_property
    def facts(self) -> Facts:
        count = Counter(experiment.status for experiment in self.tried)
        tried, started, best = len(self.tried), self.started, self.best
        baseline_score = self.scores.get(BASELINE) if self.baseline else None
        best_score = self.scores[best.number] if best else None
        gain = baseline_score - best_score if baseline_score is not None and best_score is not None else None
        pairs = {name: (self.mean(self.baseline, name), self.mean(best, name)) for name in ("tokens", "flops")}
        return Facts(
            name=self.name,
            place="",
            device=started.device,
            sort=sort_of(started.device),
            backend=started.backend,
            budget=self.budget,
            eval=self.eval,
            source=started.source,
            baseline=baseline_score,
            best=best_score,
            best_number=best.number if best else None,
            gain=gain,
            relative=gain / baseline_score if gain is not None and baseline_score else None,
            confirmed=self.confirmed,
            confirmation=self.confirmation.said if self.confirmation else "",
            experiments=tried,
            kept=count["keep"],
            discarded=count["discard"],
            crashed=count["crash"],
            invalid=count["invalid"],
            keep_rate=count["keep"] / tried if tried else None,
            crash_rate=count["crash"] / tried if tried else None,
            per_hour=tried / self.hours if self.hours else None,
            hours=self.hours,
            **pairs,
            mfu=(self.mean(self.baseline, "mfu_percent"), self.mean(best, "mfu_percent")),
            noise=self.noise.sd if self.noise else None,
            df=self.noise.df if self.noise else None,
            rows=self.rows,
            notes=self.notes,
        )

    # --- Time ---

    @cached_property
    def spent(self) -> dict[int, Spent]:
        """By the experiment that scored runs were made for, confirmations too."""
        spent: dict[int, Spent] = {}
        for number, runs in self.runs.items():
            for run in runs:
                if run.budget is None or not run.seconds:
                    continue
                part = spent.setdefault(run.experiment, Spent())
                trained = min(run.budget, run.seconds)
                part.around += run.seconds - trained
                if run.experiment == number:
                    part.own += trained
                else:
                    part.beside += trained
        return dict(sorted(spent.items()))

    @property
    def shares(self) -> list[tuple[str, float]]:
        """(what, hours): where the session's time went."""
        judging = [s for number, s in self.spent.items() if self.state.experiments[number].kind != "confirm"]
        used = sum(spent.total for spent in self.spent.values())
        seconds = {
            "training the changes": sum(spent.own for spent in judging),
            "training again: parents beside them, further runs": sum(spent.beside for spent in judging),
            "start, compilation and evaluation of runs": sum(spent.around for spent in judging),
            "confirmations": used - sum(spent.total for spent in judging),
            "between runs, crashed runs, thinking": (self.hours or 0.0) * 3600 - used,
        }
        return [(what, amount / 3600) for what, amount in seconds.items() if amount > 1e-6]


def chosen(experiment: Experiment) -> bool:
    """Whether a session picked it for its scores."""
    return (
        experiment.number != BASELINE
        and not experiment.origin
        and (experiment.status == "keep" or experiment.near_miss)
    )


def kind_of(experiment: Experiment) -> str:
    """What most of a change is about, one of KINDS; "" if that is unknown."""
    return next((kind for kind in experiment.kinds if kind in KINDS), "")


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
    desktop = {"rtx", "gtx", "titan", "quadro"} & set(parts)
    return (
        "nvidia datacentre"
        if not desktop and any(re.fullmatch(DATACENTRE, part) for part in parts)
        else "nvidia desktop"
    )
