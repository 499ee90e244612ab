"""Records of sessions that never were, made of events."""

from lab.compare.analysis import Analysis
from lab.reasons import because
from lab.session.events import (
    Evidence,
    ExperimentDecided,
    ExperimentOpened,
    RunEnded,
    RunStarted,
    SessionStarted,
    Verdict,
)
from lab.session.record import Record
from lab.session.state import State
from lab.verdict.gate import Noise

BUDGET, EVAL = 300.0, "e" * 12


class Builder:
    """A record that is being made, event by event.

    Attributes:
        facts: of a run by default, by names of results.py.
    """

    def __init__(self, device="d", tag="t", facts=None, seconds=340.0, time=0.0, **started):
        self.facts, self.seconds, self.time = {"total_tokens_M": 1.0, "eval": EVAL} | (facts or {}), seconds, time
        self.state = State()
        defaults = {"backend": "sdpa", "budget": BUDGET, "eval": EVAL}
        self.take(SessionStarted(tag=tag, device=device, **(defaults | started)))

    def take(self, event):
        self.state.take(event)
        return event

    def open(self, number, kind="change", onto=0, blob=None, **facts):
        parent = None if kind == "baseline" else self.state.experiments[onto].blob
        facts = {"description": f"change {number}", "blob": blob or f"{number + 1:040x}"} | facts
        onto = None if kind == "baseline" else onto
        self.take(ExperimentOpened(number=number, kind=kind, onto=onto, parent=parent, time=self.time, **facts))

    def run(self, experiment, score, of=None, seed=None, budget=BUDGET, status="ok", seconds=None, worker="", **facts):
        """A run for an experiment, of its train.py or of that of experiment `of`. score: None if it has none."""
        blob = self.state.experiments[experiment if of is None else of].blob
        number, seconds = self.state.next_run(), self.seconds if seconds is None else seconds
        started = {"blob": blob, "seed": seed, "budget": budget, "worker": worker, "time": self.time}
        self.take(RunStarted(number=number, experiment=experiment, **started))
        result = None if score is None else {"val_bpb": score} | self.facts | facts
        self.take(RunEnded(run=number, status=status, result=result, seconds=seconds))
        self.time += seconds if self.time else 0.0

    def decide(self, number, status="keep", reason="baseline", near_miss=False, **facts):
        reason = because(reason) if isinstance(reason, str) else reason
        evidence = Evidence(near_miss=True) if near_miss else None
        verdict = Verdict(status, reason, evidence=evidence, **facts)
        self.take(ExperimentDecided(experiment=number, verdict=verdict, time=self.time))

    def baseline(self, scores=(1.0, 1.0, 1.0), status="keep", **facts):
        """Experiment 0."""
        self.open(0, "baseline", description="baseline")
        for seed, score in enumerate(scores, 42):
            self.run(0, score, seed=seed, **facts)
        self.decide(0, status)
        return self

    def change(self, number, scores, status="discard", onto=0, kind="change", runs=None, **facts):
        """An experiment with its own runs. runs: facts of these."""
        verdict = {name: facts.pop(name) for name in ("near_miss", "reason") if name in facts}
        self.open(number, kind, onto, **({"change": f"{number:016x}"} | facts))
        for seed, score in enumerate(scores, 42):
            self.run(number, score, seed=seed, **(runs or {}))
        self.decide(number, status, **verdict)
        return self

    def replay(self, number, scores, origin, status="discard", **facts):
        """A change that another session found: `origin` is DEVICE/TAG/ID."""
        return self.change(number, scores, status, kind="replay", change="f" * 16, origin=origin, **facts)

    def again(self, number, of, scores, seed=50, **facts):
        """Further runs of experiments, for experiment `number`, a "repeat": one of each score, by experiment `of`."""
        if number not in self.state.experiments:
            self.open(number, "repeat", blob=self.state.experiments[of].blob)
            self.decide(number, "discard")
        for i, score in enumerate(scores):
            self.run(number, score, of=of, seed=seed + i, **facts)
        return self

    def confirm(self, number, best, of_best, of_baseline, gains=None, **facts):
        """A confirmation of experiment `best`. gains: (gain, low, high) on held-out rows, or None."""
        self.open(number, "confirm", blob=self.state.experiments[best].blob, pairs=len(of_best))
        for seed, pair in enumerate(zip(of_best, of_baseline), 100):
            for experiment, score in zip((best, 0), pair):
                self.run(number, score, of=experiment, seed=seed, **facts)
        held = gains and {"val_bpb": gains, "held_out_bpb": gains}
        words = {"pairs": len(of_best), **dict(zip(("gain", "low", "high"), gains or ()))}
        self.decide(number, "keep", because("confirmed", **words), gains=held)
        return self

    def record(self, **facts):
        return Record(self.state, **facts)


def session(device="d", tag="t", base=(1.0, 1.0, 1.0), facts=None, **started):
    """A session with a baseline of these scores, to be continued."""
    return Builder(device, tag, facts, **started).baseline(base)


def analysed(builder, noise=0.001, df=10):
    """Its analysis. noise: of its runs, as if it had been measured; None where nothing was repeated."""
    analysis = Analysis(builder.record())
    analysis.noise = noise and Noise(noise, df)
    return analysis
