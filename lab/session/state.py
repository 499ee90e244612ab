"""What a journal's events add up to: experiments, their runs, the best so far."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

BASELINE, CONFIRM = 0, "confirm"
REPLAY = "replay"  # a change from elsewhere on the baseline: it is judged, and the branch stays where it is
REPEAT = "repeat"  # further runs of a replay, which leave its verdict as it is
BESIDE = ("baseline", CONFIRM, REPLAY, REPEAT)  # kinds that never move the branch


@dataclass
class Run:
    """One training of one train.py.

    Attributes:
        blob: of the train.py. seed: of its initial weights. budget: seconds.
        status: "ok", "crash", "invalid", "disturbed" (the device was not itself: never judged) or "lost" (the harness
            was killed, or it was ended because the session was held); None while it lasts.
        result: what prepare.report measured. scores: {"val_bpb", "held_out_bpb"} of its weights, scored again.
    """

    number: int
    experiment: int
    blob: str
    seed: int
    budget: float
    begun: float
    status: str | None = None
    reason: str = ""
    result: dict | None = None
    seconds: float = 0.0
    traceback: str = ""
    scores: dict | None = None

    @property
    def bpb(self) -> float:
        return self.result["val_bpb"]


@dataclass
class Experiment:
    """One change of train.py, or the baseline (number 0), or a confirmation.

    Attributes:
        blob, parent: of its train.py and of the best one it is judged against, which experiment `onto` was kept for.
            commit: where it is stored.
        digest, nodes, portable: see source.py. patch: stable id of the change.
        kind: "change", "near misses" (of `members`, by number), or one of BESIDE.
        origin: "DEVICE/TAG/PATCH" of the change that this one repeats. fewest: seeds that it and its parent are run on
            at least. judged: the verdict, while further runs are made that don't change it.
        verdict: the event that ended it: "status", "reason", the gate's numbers; "unjudged" if nothing was learnt.
        applied: all of it is done. failures: of the harness at it.
    """

    number: int
    kind: str
    blob: str
    parent: str | None
    commit: str
    description: str
    digest: str = ""
    nodes: int = 0
    portable: bool = True
    patch: str = ""
    origin: str = ""
    members: tuple[int, ...] = ()
    pairs: int = 0
    budget: float | None = None
    fewest: int = 1
    judged: dict | None = None
    onto: int | None = None
    begun: float = 0.0
    failures: int = 0
    runs: list[Run] = field(default_factory=list)
    verdict: dict | None = None
    applied: dict | None = None

    @property
    def status(self) -> str:
        return self.verdict["status"] if self.verdict else "running"

    @property
    def own_runs(self) -> list[Run]:
        """Of its own train.py, not of its parent's."""
        return [run for run in self.runs if run.blob == self.blob]


class State:
    """The session so far.

    Attributes:
        experiments: by number, in order. runs: by number.
        best: the experiment that is kept as the best; None before the baseline is.
    """

    def __init__(self, events: list[dict] = ()):
        self.experiments: dict[int, Experiment] = {}
        self.runs: dict[int, Run] = {}
        self.kept: list[Experiment] = []
        self.decided: list[Experiment] = []  # those with a verdict, in order
        self._of: dict[str, list[Run]] = {}  # runs by blob
        for event in events:
            self.take(event)

    def take(self, event: dict) -> None:
        facts = {name: value for name, value in event.items() if name != "event"}
        kind = event["event"]
        if kind == "experiment":
            facts["members"] = tuple(facts.get("members", ()))
            experiment = Experiment(**facts)
            self.experiments[experiment.number] = experiment
        elif kind == "run":
            run = Run(**facts)
            self.runs[run.number] = run
            self.experiments[run.experiment].runs.append(run)
            self._of.setdefault(run.blob, []).append(run)
        elif kind == "judged":
            self.experiments[facts.pop("experiment")].judged = facts
        elif kind == "failed":
            self.experiments[facts["experiment"]].failures += 1
        elif kind in ("ran", "scored"):
            run = self.runs[facts.pop("run")]
            for name, value in facts.items():
                setattr(run, name, value)
        elif kind == "verdict":
            experiment = self.experiments[facts["experiment"]]
            experiment.verdict = facts
            self.decided.append(experiment)
            if facts["status"] == "keep" and (experiment.kind not in BESIDE or experiment.kind == "baseline"):
                self.kept.append(experiment)
        elif kind == "applied":
            self.experiments[facts["experiment"]].applied = facts

    @property
    def pending(self) -> Experiment | None:
        """The experiment under way; there is always a last one, as a session begins with its baseline."""
        return None if self.last.applied else self.last

    @property
    def last(self) -> Experiment:
        return next(reversed(self.experiments.values()))

    @property
    def best(self) -> Experiment | None:
        return self.kept[-1] if self.kept else None

    @property
    def baseline(self) -> Experiment:
        return self.experiments[BASELINE]

    def results(self, blob: str) -> dict[int, float]:
        """val_bpb by seed, of undisturbed runs that ended well, confirmations left out."""
        return {
            run.seed: run.bpb
            for run in self._of.get(blob, ())
            if run.status == "ok" and self.experiments[run.experiment].kind != CONFIRM
        }

    def repeats(self, budget: float) -> list[list[float]]:
        """The results of each train.py, one for a seed, at one budget: what the noise is estimated from. What was found
        invalid tells nothing of it."""
        groups = [
            {
                run.seed: run.bpb
                for run in runs
                if run.status == "ok"
                and run.budget == budget
                and not (
                    self.experiments[run.experiment].status == "invalid"
                    and self.experiments[run.experiment].blob == run.blob
                )
            }
            for runs in self._of.values()
        ]
        return [list(group.values()) for group in groups if len(group) > 1]

    def mean(self, experiment: Experiment) -> float | None:
        values = self.results(experiment.blob)
        return statistics.fmean(values.values()) if values else None

    def same(self, digest: str) -> Experiment | None:
        """An experiment that was decided on an equal train.py. A replay that was better than the baseline says nothing
        of the best."""
        return next(
            (
                e
                for e in reversed(self.decided)
                if e.digest == digest
                and e.kind not in (CONFIRM, REPEAT)
                and not e.verdict.get("unjudged")
                and not (e.kind == REPLAY and e.status == "keep")
            ),
            None,
        )

    def next_run(self) -> int:
        return max(self.runs, default=0) + 1

    def parent_of(self, experiment: Experiment) -> Experiment | None:
        """The experiment that it is judged against."""
        return None if experiment.onto is None else self.experiments[experiment.onto]
