"""What a journal's events add up to: experiments, their runs, the best so far."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from msgspec.structs import asdict

from lab.errors import LabError
from lab.reasons import Reason
from lab.session.events import (
    Event,
    ExperimentApplied,
    ExperimentDecided,
    ExperimentJudged,
    ExperimentOpened,
    HarnessFailed,
    RunEnded,
    RunScored,
    RunStarted,
    Sampled,
    SessionStarted,
    StakeReserved,
    Verdict,
)

BASELINE = 0  # its number
APART = ("confirm", "scale", "transfer")  # kinds whose runs no verdict on a change rests on
BESIDE = ("baseline", "replay", "repeat", "shared", *APART)  # kinds that never move the branch
MEASURING = ("repeat", "shared", *APART)  # kinds that try nothing new
UNJUDGED = 2  # times that something from elsewhere is tried, at most, if it is not judged
# Statuses in words.
BECAME = {
    "running": "is running",
    "keep": "was kept",
    "discard": "was discarded",
    "crash": "crashed",
    "invalid": "was found invalid",
    "superseded": "was superseded",
}
FEWEST, MOST = 1e-9, 1e15  # of anything that a run can have measured
USUAL, SHORT = 3, 0.1  # runs that tell how many tokens are usual, and the factors of e that one may be off by chance


class Conditions(NamedTuple):
    """What the score of a run may depend on, beside its train.py and its seed.

    Attributes:
        disturbance: how disturbed it was, by its own clock. device: which made it; "" is the session's own.
        short: by how many factors of e it got fewer tokens than that train.py usually gets there.
    """

    disturbance: float = 0.0
    device: str = ""
    short: float = 0.0


class Run(RunStarted, tag="run", kw_only=True):
    """One training of one train.py, and how it ended.

    Attributes:
        ended: None while it lasts. scored: None if its weights were not scored again.
    """

    ended: RunEnded | None = None
    scored: RunScored | None = None

    @property
    def status(self) -> str | None:
        """The status in RunEnded; None while the run lasts."""
        return self.ended.status if self.ended else None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> Reason | None:
        return self.ended.reason if self.ended else None

    @property
    def result(self) -> dict:
        """What it measured, by the names of results.py; {} if nothing."""
        return (self.ended.result or {}) if self.ended else {}

    @property
    def bpb(self) -> float:
        return self.result["val_bpb"]

    @property
    def disturbance(self) -> float:
        """How much slower its steps were than undisturbed ones, on average; 0 is quiet. The clock corrects it."""
        return self.result.get("disturbance") or 0.0

    @property
    def seconds(self) -> float:
        return self.ended.seconds if self.ended else 0.0

    def measured(self, name: str) -> float | None:
        """A measure by its name in results.py. None if it is unknown, or nothing that can have been measured: a record
        from elsewhere may say anything."""
        value = self.result.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return float(value) if FEWEST < value < MOST else None


def conditions(runs: Collection[Run]) -> list[Conditions]:
    """Of runs of one train.py. What a device gives the same file in the same time is no consequence of a change:
    a run far from the median of at least USUAL met something that its clock did not see. A smaller difference is left
    to the noise, of which it is a part in a change's only run, too."""
    known: dict[tuple, list[float]] = {}
    for run in runs:
        if trained := run.measured("total_tokens_M"):
            known.setdefault((run.worker, run.budget), []).append(trained)
    usual = {where: statistics.median(each) for where, each in known.items() if len(each) >= USUAL}
    found = []
    for run in runs:
        median, trained = usual.get((run.worker, run.budget)), run.measured("total_tokens_M")
        short = math.log(median / trained) if median and trained else 0.0
        found.append(Conditions(run.disturbance, run.worker, short if abs(short) > SHORT else 0.0))
    return found


class Experiment(ExperimentOpened, tag="experiment", kw_only=True):
    """One change of train.py, and what became of it.

    Attributes:
        runs: those made for it, its parent's too. stake: what it may cost the account, once it goes beyond one run.
        judged: the verdict while further runs are made that don't change it. decided: the verdict. decided_at: when, as
            of time.time(). applied: all of it is done. failures: of the harness at it.
    """

    runs: list[Run] = []
    stake: float | None = None
    judged: Verdict | None = None
    decided: Verdict | None = None
    decided_at: float = 0.0
    applied: ExperimentApplied | None = None
    failures: int = 0

    @property
    def status(self) -> str:
        return self.decided.status if self.decided else "running"

    @property
    def kept_beside(self) -> bool:
        """Whether it is a replay that was better than the baseline. That says nothing of the best."""
        return self.kind == "replay" and self.status == "keep"

    @property
    def became(self) -> str:
        """What became of it, to be said after "which"."""
        return BECAME[self.status]

    @property
    def verdict(self) -> Verdict:
        """The verdict of a decided experiment. ValueError before there is one."""
        if self.decided is None:
            raise ValueError(f"experiment {self.number} is not decided yet")
        return self.decided

    @property
    def came_to(self) -> str:
        """The verdict of a confirmation or transfer in words. A failure does not say by itself of what it is."""
        return self.verdict.said if self.verdict.gains else f"{self.description}: {self.verdict.said}"

    @property
    def own_runs(self) -> list[Run]:
        """The runs of its own train.py, not those of its parent's."""
        return [run for run in self.runs if run.blob == self.blob]

    @property
    def unjudged(self) -> bool:
        """Whether it ended and nothing was learnt of it: the lab failed at it, say."""
        return self.decided is not None and not self.decided.judged and self.status != "superseded"

    @property
    def measured(self) -> bool:
        """Whether nothing was judged: it ended well and tried nothing new, so that nobody is to count it as kept."""
        return self.kind in MEASURING and self.status in ("keep", "discard")

    @property
    def here(self) -> str:
        """The commit that its train.py is at."""
        return self.applied.commit if self.applied and self.applied.commit else self.commit

    @property
    def near_miss(self) -> bool:
        return bool(self.decided and self.decided.evidence and self.decided.evidence.near_miss)

    @property
    def gain(self) -> float | None:
        """Bits per byte that it was better than its parent by; None where nothing was compared."""
        evidence = self.decided and self.decided.evidence
        return evidence.gain if evidence and evidence.error else None

    @property
    def t(self) -> float | None:
        """The same in standard errors."""
        evidence = self.decided and self.decided.evidence
        return evidence.gain / evidence.error if evidence and evidence.error else None

    @property
    def run_under_way(self) -> Run | None:
        return next((run for run in reversed(self.runs) if run.ended is None), None)

    @property
    def key(self) -> str:
        """Equal for the same change on every machine: what it repeats, or its own id; "" if only words are known."""
        return self.origin.rpartition("/")[2] or self.change


class State:
    """The session so far.

    Attributes:
        started: what it rests on. experiments: by number, in order. runs: by number.
        kept: the experiments that moved the branch, the baseline first. decided, done: those with a
            verdict, and of them those whose verdict is carried out, each in that order.
        sampled: what models wrote last, if they were asked to.

    Raises:
        LabError: the events contradict each other.
    """

    def __init__(self, events: Iterable[Event] = ()):
        self._started: SessionStarted | None = None
        self.experiments: dict[int, Experiment] = {}
        self.runs: dict[int, Run] = {}
        self.kept: list[Experiment] = []
        self.decided: list[Experiment] = []
        self.done: list[Experiment] = []
        self.sampled: Sampled | None = None
        self._by_blob: dict[str, list[Run]] = {}
        self.ended = 0  # runs
        for event in events:
            self.take(event)

    @property
    def started(self) -> SessionStarted:
        if self._started is None:
            raise LabError("the journal does not begin with the start of the session; import the session's export")
        return self._started

    @property
    def name(self) -> str:
        return f"{self.started.device}/{self.started.tag}"

    @property
    def budget(self) -> float:
        """Seconds of training of a run; 0 where a ledger does not tell."""
        return self.started.budget or 0.0

    # --- Taking events ---

    def take(self, event: Event) -> None:
        """Adds an event. One that says again what is known changes nothing; LabError for one that contradicts it."""
        match event:
            case SessionStarted():
                self._started = _once(self._started, event)
            case ExperimentOpened(number=number):
                if number in self.experiments:
                    _once(self.experiments[number], event)
                    return
                for earlier in event.members if event.onto is None else (event.onto, *event.members):
                    self._experiment(earlier)
                self.experiments[number] = Experiment(**asdict(event))
            case RunStarted(number=number):
                if number in self.runs:
                    _once(self.runs[number], event)
                    return
                self.runs[number] = run = Run(**asdict(event))
                self._experiment(event.experiment).runs.append(run)
                self._by_blob.setdefault(run.blob, []).append(run)
            case RunEnded():
                run = self._run(event.run)
                self.ended += run.ended is None
                run.ended = _once(run.ended, event)
            case RunScored():
                self._run(event.run).scored = event
            case ExperimentDecided(verdict=verdict):
                experiment = self._experiment(event.experiment)
                if experiment.decided is None:
                    self.decided.append(experiment)
                    experiment.decided_at = event.time
                    if verdict.status == "keep" and (experiment.kind not in BESIDE or experiment.kind == "baseline"):
                        self.kept.append(experiment)
                experiment.decided = _once(experiment.decided, verdict)
            case ExperimentApplied():
                experiment = self._experiment(event.experiment)
                if experiment.decided is None:
                    raise LabError(f"the journal applies experiment {event.experiment}, which it never decided")
                if experiment.applied is None:
                    self.done.append(experiment)
                experiment.applied = _once(experiment.applied, event)
            case ExperimentJudged():
                self._experiment(event.experiment).judged = event.verdict
            case StakeReserved():
                self._experiment(event.experiment).stake = event.stake
            case Sampled():
                self._experiment(event.experiment)
                self.sampled = event
            case HarnessFailed():
                self._experiment(event.experiment).failures += 1
            case _:
                raise LabError(f"a session has no events of the kind {type(event).__name__}")

    def _experiment(self, number: int) -> Experiment:
        if number not in self.experiments:
            raise LabError(f"the journal names experiment {number}, which it never opened")
        return self.experiments[number]

    def _run(self, number: int) -> Run:
        if number not in self.runs:
            raise LabError(f"the journal names run {number}, which it never started")
        return self.runs[number]

    # --- Asking ---

    @property
    def open(self) -> list[Experiment]:
        """The experiments that are not done yet, the oldest first."""
        return [experiment for experiment in self.experiments.values() if experiment.applied is None]

    @property
    def oldest_open(self) -> Experiment | None:
        return next(iter(self.open), None)

    @property
    def last(self) -> Experiment:
        """There is always one: a session begins with its baseline."""
        return next(reversed(self.experiments.values()))

    @property
    def best(self) -> Experiment | None:
        """The experiment that is kept as the best; None before the baseline is."""
        return self.kept[-1] if self.kept else None

    @property
    def baseline(self) -> Experiment:
        return self.experiments[BASELINE]

    @property
    def tried(self) -> list[Experiment]:
        """The changes that are decided, by number, without what is superseded: that was not judged, and if it is made
        again, that counts."""
        decided = sorted(self.decided, key=lambda e: e.number)
        return [e for e in decided if e.number and e.kind not in MEASURING and e.status != "superseded"]

    @property
    def attempts(self) -> list[Experiment]:
        """The experiments after which a change from elsewhere, or a block's choice, is not tried again: those that were
        not judged count only where it happened UNJUDGED times."""
        vain = Counter(e.key for e in self.experiments.values() if e.unjudged)
        return [e for e in self.experiments.values() if not e.unjudged or vain[e.key] >= UNJUDGED]

    @property
    def confirmation(self) -> Experiment | None:
        """The one that says most of what was kept."""
        return self.confirmation_of(kept=True)

    def confirmation_of(self, kept: bool | None = None) -> Experiment | None:
        """The one that says most of what was kept, of a train.py that was given by hand (False), or of either (None):
        one that came to a result rather than one that failed, of the best rather than of another train.py, in runs as
        long as the session's; the last of several."""
        best, all_kept = self.best.blob if self.best else "", {experiment.blob for experiment in self.kept}

        def worth(e: Experiment) -> tuple:
            return bool(e.verdict.gains), e.blob == best, self.is_usual(e), e.number

        found = (e for e in self.decided if e.kind == "confirm" and kept in (None, e.blob in all_kept))
        return max(found, key=worth, default=None)

    def is_usual(self, confirmation: Experiment) -> bool:
        """Whether its runs are as long as the session's."""
        return confirmation.budget in (None, self.budget)

    def said_of(self, confirmation: Experiment) -> str:
        """What a confirmation came to, with the length of its runs where that is not the session's."""
        beside = "" if self.is_usual(confirmation) else f"in runs of {confirmation.budget:g} s, "
        return beside + confirmation.came_to

    def parent_of(self, experiment: Experiment) -> Experiment | None:
        """The experiment that it is judged against."""
        return None if experiment.onto is None else self.experiments[experiment.onto]

    def runs_of(self, blob: str) -> list[Run]:
        """All runs of a train.py, for whatever experiment."""
        return self._by_blob.get(blob, [])

    def results(self, blob: str) -> dict[int, float]:
        """val_bpb by seed, of runs that ended well, those of kinds that are APART left out. Where no seed is
        known, each run counts by itself."""
        return {seed: run.bpb for seed, run in self.believed(blob).items()}

    def believed(self, blob: str) -> dict[int, Run]:
        """The runs that `results` is of."""
        return by_seed(run for run in self.runs_of(blob) if self.experiments[run.experiment].kind not in APART)

    def mean(self, experiment: Experiment) -> float | None:
        """val_bpb over the runs of its train.py; None without any."""
        scores = self.results(experiment.blob)
        return statistics.fmean(scores.values()) if scores else None

    def repeats(self, budget: float | None) -> dict[str, dict[int, Run]]:
        """The runs of each train.py by seed, at one budget: what the noise is estimated from. What was found invalid
        tells nothing of it. The first run of a change is left out: the change was run again because it was lucky, and
        that would pass for noise."""

        def counts(run: Run) -> bool:
            experiment = self.experiments[run.experiment]
            return run.budget == budget and (experiment.status != "invalid" or experiment.blob != run.blob)

        found = {}
        for blob, runs in self._by_blob.items():
            known = list(by_seed(filter(counts, runs)).items())
            found[blob] = dict(known if blob == self.baseline.blob else known[1:])
        return {blob: runs for blob, runs in found.items() if len(runs) > 1}

    @property
    def told(self) -> list[Experiment]:
        """The experiments that were decided on their train.py, or are open with one."""
        return [
            e
            for e in self.experiments.values()
            if e.kind not in MEASURING and (e.decided is None or e.decided.judged)
            if not e.kept_beside
        ]

    def equal(self, digest: str) -> Experiment | None:
        """The last of those with an equal train.py."""
        return next((e for e in reversed(self.told) if e.digest == digest), None)

    def next_run(self) -> int:
        return max(self.runs, default=0) + 1

    def overhead(self) -> float | None:
        """The most seconds that a run took beside its training, pauses and what disturbed it left out."""
        results = [(run.seconds, run.result) for run in self.runs.values() if run.ok]
        took = [
            seconds - told["training_seconds"] * (1 + told.get("disturbance", 0)) - told.get("paused_seconds", 0)
            for seconds, told in results
        ]
        return max(0.0, *took) if took else None

    def end_of(self, run: Run) -> float:
        """When a run that is under way is likely to end, in seconds since the epoch."""
        return run.time + (run.budget or self.budget) + (self.overhead() or 30.0)

    def took(self) -> list[float]:
        """Seconds that sound runs for the session's budget took, from start to end."""
        return [run.seconds for run in self.runs.values() if run.ok and run.budget == self.budget]


def by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """The runs of a file that ended well, of each seed the last: another one tells nothing of chance. A run whose seed
    is unknown counts by itself."""
    return {-run.number if run.seed is None else run.seed: run for run in runs if run.ok}


def _once(known, event):
    """The event, or the verdict, that is known then. LabError if another one was known before, their times aside."""
    fields = [name for name in event.__struct_fields__ if name != "time"]
    if known is not None and any(getattr(known, name) != getattr(event, name) for name in fields):
        what = "contradicts itself"
        if isinstance(event, ExperimentOpened):
            what = f"opens experiment {event.number} twice"
        raise LabError(f"the journal {what}: {event} comes after {known}; import the session's export")
    return event
