"""Does `lab compare` tell what holds on another device, and how often is it wrong? Four devices, simulated.

    python benchmarks/compare.py [--quads 200] [--runs 1 3 5 8]

No model is trained: changes have effects (val_bpb of the child minus its parent's) that add up, runs have normal noise,
and `verdict/gate.py` decides. Device A tries 60 changes: 12 gains and 18 losses (of 1 to 12 times its noise,
log-uniform), 30 that do nothing. What it kept, and its near misses (`replay --all`), are replayed on the baselines of
B, C and D and, since what was kept is biased by selection, of A again: sessions of their own, each change judged by
the gate, and run at least so often as --runs says, beside the baseline on the same seeds. The noise of B is A's, C's
twice, D's four times; no session knows its own but by its repeats and a prior that is wrong by up to a factor of two.
The sessions are what `lab compare` works with, and the classes those that it says.

Worlds: "mixed", where on each device a gain of A's holds (0.8 to 1.25 of it), fades (0 to 0.2) or reverses (-0.5 to -1)
by chance (1/2, 1/4, 1/4); "nothing", where all 60 changes do nothing anywhere; "same", where all effects are A's.
The naive rule: one run of each, what is lower is kept; elsewhere one run against one of the baseline, and whichever of
the classes the ratio falls into.
"""

import argparse
import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.compare import comparison
from lab.compare.analysis import Analysis
from lab.compare.classify import CLASSES, FADES, HALF, HOLDS, OPEN, REVERSES
from lab.session.events import ExperimentDecided, ExperimentOpened, RunEnded, RunStarted, SessionStarted, Verdict
from lab.session.record import Record
from lab.session.state import Experiment, State
from lab.verdict import gate
from lab.verdict.plan import pooled

NOISE = {"A": 0.0005, "B": 0.0005, "C": 0.001, "D": 0.002}  # standard deviation of a run
BASE = 1.0  # val_bpb of the baseline


class Device:
    """A session on a device where a change has the effect that `truth` says."""

    def __init__(self, name: str, tag: str, truth: dict[str, float], rng: random.Random):
        self.name, self.truth, self.rng = name, truth, rng
        self.prior = NOISE[name] * 2 ** rng.uniform(-1, 1)
        self.state, self.account, self.means = State(), gate.Account(), {}
        self.state.take(SessionStarted(tag=tag, device=name, budget=300.0))
        self.open("baseline", None)
        for round in range(3):
            self.run(0, gate.seed(round), 0)
        self.state.take(ExperimentDecided(experiment=0, verdict=Verdict("keep", gate.because("baseline"))))

    def open(self, key: str, parent: int | None, origin: str = "") -> int:
        """A new experiment's number."""
        number = len(self.state.experiments)
        facts = {"kind": "replay" if origin else "change" if number else "baseline", "onto": parent, "origin": origin}
        change = key if number else ""
        self.state.take(ExperimentOpened(number=number, blob=f"{number:x}", description=key, change=change, **facts))
        self.means[number] = self.means.get(parent, BASE) + self.truth.get(key, 0.0)
        return number

    def run(self, number: int, seed: int, experiment: int) -> None:
        """A run of a train.py, for an experiment."""
        run, score = self.state.next_run(), self.rng.gauss(self.means[number], NOISE[self.name])
        facts = {"blob": f"{number:x}", "seed": seed, "budget": 300.0}
        self.state.take(RunStarted(number=run, experiment=experiment, **facts))
        self.state.take(RunEnded(run=run, status="ok", result={"val_bpb": score, "eval": "e"}))

    def scores(self, number: int) -> dict[int, float]:
        return self.state.results(f"{number:x}")

    @property
    def noise(self) -> gate.Noise:
        return pooled(self.state, self.prior)

    def judge(self, number: int, parent: int, fewest: int = 1) -> Experiment:
        """As the lab does: runs until the gate has decided, and then until there are as many as were asked for."""
        while (step := gate.next_step(self.scores(number), self.scores(parent), self.noise, self.account)).action in (
            "run candidate",
            "run parent",
        ):
            self.run(number if step.action == "run candidate" else parent, step.seed, number)
        self.account = self.account.after(step.evidence)
        verdict = Verdict(step.action, step.reason, evidence=step.evidence)
        self.state.take(ExperimentDecided(experiment=number, verdict=verdict))
        for seed in map(gate.seed, range(fewest)):
            for train in (number, parent):
                if seed not in self.scores(train):
                    self.run(train, seed, number)
        return self.state.experiments[number]

    def analysis(self) -> Analysis:
        """With the noise that the session knows, whose prior is wrong."""
        analysis = Analysis(Record(self.state))
        analysis.noise = self.noise
        return analysis


def effects(world: str, rng: random.Random) -> dict[str, dict[str, float]]:
    """device -> change -> true effect."""
    if world == "nothing":
        return {name: {f"{i:03x}": 0.0 for i in range(60)} for name in NOISE}
    sizes = [NOISE["A"] * math.exp(rng.uniform(0, math.log(12))) for _ in range(30)]
    source = [-size for size in sizes[:12]] + sizes[12:] + [0.0] * 30
    rng.shuffle(source)
    found = {name: {} for name in NOISE}
    for i, effect in enumerate(source):
        for name in NOISE:
            share = 1.0
            if world == "mixed" and name != "A" and effect < 0:
                share = rng.choice([rng.uniform(0.8, 1.25)] * 2 + [rng.uniform(0, 0.2), -rng.uniform(0.5, 1)])
            found[name][f"{i:03x}"] = effect * share
    return found


def truth(source: float, target: float) -> str:
    share = target / source
    return HOLDS if share >= HALF else REVERSES if share < 0 else FADES


def searched(source: Device) -> list[str]:
    """Has a session try all changes of its device; those that others take from it: its keeps and its near misses."""
    best, taken = 0, []
    for key in source.truth:
        experiment = source.judge(source.open(key, best), best)
        if experiment.status == "keep":
            best = experiment.number
        if experiment.status == "keep" or experiment.near_miss:
            taken.append(key)
    return taken


def quadruple(world: str, runs: int, rng: random.Random) -> tuple[list[Analysis], dict]:
    """(A's session and its replays, the true effects)."""
    true = effects(world, rng)
    source = Device("A", "night", true["A"], rng)
    taken = searched(source)
    sessions = [source.analysis()]
    for name in NOISE:
        replay = Device(name, "replay", true[name], rng)
        for key in taken:
            replay.judge(replay.open(key, 0, f"A/night/{key}"), 0, runs)
        sessions.append(replay.analysis())
    return sessions, true


def outcomes(world: str, runs: int, quads: int, seed: int = 0) -> tuple[Counter, int, int]:
    """((device, truth, class) -> changes, changes with a wrong class on any device, changes)."""
    counts, wrong, changes = Counter(), 0, 0
    for quad in range(quads):
        sessions, true = quadruple(world, runs, random.Random(f"{seed} {world} {quad}"))
        for change in comparison.compare(sessions).shared:
            source, false = true["A"][change.key], False
            for name in "BCD":
                right = truth(source, true[name][change.key]) if source else "nothing"
                said = change.cells[name].verdict
                counts[name, right, said] += 1
                false |= said not in (right, OPEN)
            wrong, changes = wrong + false, changes + 1
    return counts, wrong, changes


def naive(world: str, quads: int, seed: int = 0) -> Counter:
    """(device, truth, class) -> changes, by one run each."""
    counts = Counter()
    for quad in range(quads):
        rng = random.Random(f"{seed} {world} {quad}")
        true = effects(world, rng)
        best, score = BASE, rng.gauss(BASE, NOISE["A"])
        for key, effect in true["A"].items():
            new = rng.gauss(best + effect, NOISE["A"])
            if new < score:
                seen, best, score = new - score, best + effect, new
                for name in "BCD":
                    there = rng.gauss(true[name][key], math.sqrt(2) * NOISE[name])
                    counts[name, truth(effect, true[name][key]) if effect else "nothing", truth(seen, there)] += 1
    return counts


def table(title: str, counts: Counter) -> str:
    lines = [f"{title:<26}" + "".join(f"{said:>15}" for said in CLASSES) + f"{'right':>8}{'wrong':>8}"]
    for right in (HOLDS, FADES, REVERSES, "nothing"):
        its = [sum(counts[name, right, said] for name in "BCD") for said in CLASSES]
        if n := sum(its):
            told = its[CLASSES.index(right)] if right in CLASSES else 0
            share = f"{told / n:>8.1%}" if right in CLASSES else f"{'-':>8}"
            lines.append(
                f"  truth: {right:<18}"
                + "".join(f"{one:>15}" for one in its)
                + share
                + f"{(n - told - its[-1]) / n:>8.1%}"
            )
    return "\n".join(lines)


def share(counts: Counter, device: str, truths, said) -> float:
    """The share of changes with one of these truths on a device that got one of these classes."""
    its = {key: n for key, n in counts.items() if key[0] == device and key[1] in truths}
    return sum(n for key, n in its.items() if key[2] in said(key[1])) / max(1, sum(its.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quads", type=int, default=200, help="of sessions and their replays")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 3, 5, 8], help="of a change in a replay, at least")
    parser.add_argument("--worlds", nargs="+", default=["mixed", "nothing", "same"])
    options = parser.parse_args()
    for world in options.worlds:
        plain = naive(world, options.quads)
        print(table(f"{world}: the naive rule", plain))
        seem = share(plain, "B", CLASSES + ("nothing",), lambda _: (REVERSES,))
        print(f"  of what is kept {seem:.0%} seem to reverse on B")
        for runs in options.runs:
            counts, wrong, changes = outcomes(world, runs, options.quads)
            print(table(f"{world}: runs {runs}", counts))
            print(f"  of {changes} changes {wrong / max(1, changes):.1%} have a wrong class on any of three devices")
            if world != "nothing":
                print(
                    "  told right: "
                    + ", ".join(
                        f"{share(counts, name, CLASSES, lambda right: (right,)):.0%} on {name}" for name in "BCD"
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
