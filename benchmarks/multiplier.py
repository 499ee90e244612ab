"""Are factors of time recovered on devices of unlike scale? Intervals and classes, simulated.

    python benchmarks/multiplier.py [--quads 100] [--runs 3] [--scale 3]

No model is trained. As benchmarks/compare.py, but a change has a factor of time on each device: it scores what the
baseline would after 300 s / factor. Of 60 changes on A, 12 save time and 18 cost it (log factors of 0.02 to 0.5,
log-uniform), 30 do nothing; on B, C and D a gain holds, fades or reverses as there, by its log factor. The devices'
scores fall by power laws, from hardly at all (A) to steeply (C), and D's by the sum of two, which is none of the fitted
family; so a factor is worth up to 40 times as many bits per byte on one as on the other. Runs have noise that grows as
they get shorter, as calibration/noise.py has it, and the prior of each session is wrong by up to a factor of two. Each
session runs its baseline --scale times for a quarter, half and twice the time, too. What is judged is what `lab
compare` says.
"""

import argparse
import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare
from compare import truth

from calibration.noise import EXPONENT
from lab.compare import comparison
from lab.compare.classify import CLASSES, OPEN
from lab.session.events import ExperimentDecided, ExperimentOpened, RunEnded, RunStarted, Verdict
from lab.verdict import gate
from lab.verdict.plan import SCALES

BUDGET = 300.0
# device -> ((amplitude, exponent), ...), offset, standard deviation of a run after BUDGET seconds
DEVICES = {
    "A": (((0.08, 0.25),), 0.90, 0.0005),
    "B": (((0.30, 0.40),), 0.95, 0.0030),
    "C": (((0.80, 0.70),), 1.00, 0.0150),
    "D": (((0.30, 0.15), (0.05, 1.20)), 0.80, 0.0040),
}


def score(device: str, seconds: float) -> float:
    powers, offset, _ = DEVICES[device]
    return offset + sum(amplitude * (seconds / BUDGET) ** -exponent for amplitude, exponent in powers)


class Device(compare.Device):
    """A session on a device where a change has the log factor of time that `truth` says."""

    def open(self, key: str, parent: int | None, origin: str = "") -> int:
        number = super().open(key, parent, origin)
        self.logs = getattr(self, "logs", {})
        self.logs[number] = self.logs.get(parent, 0.0) + self.truth.get(key, 0.0)
        self.means[number] = score(self.name, BUDGET * math.exp(-self.logs[number]))
        return number

    def scale(self, runs: int) -> None:
        """The baseline for other times."""
        number = len(self.state.experiments)
        self.state.take(ExperimentOpened(number=number, kind="scale", blob="0", onto=0, pairs=runs))
        for share in SCALES:
            for seed in range(runs):
                run, noise = self.state.next_run(), DEVICES[self.name][2] * share**-EXPONENT
                facts = {"blob": "0", "seed": 10**5 + seed, "budget": BUDGET * share}
                self.state.take(RunStarted(number=run, experiment=number, **facts))
                result = {"val_bpb": self.rng.gauss(score(self.name, BUDGET * share), noise), "eval": "e"}
                self.state.take(RunEnded(run=run, status="ok", result=result | {"total_tokens_M": 100 * share}))
        verdict = Verdict("keep", gate.because("baseline"))
        self.state.take(ExperimentDecided(experiment=number, verdict=verdict))

    def run(self, number: int, seed: int, experiment: int) -> None:
        super().run(number, seed, experiment)
        self.state.runs[self.state.next_run() - 1].result["total_tokens_M"] = 100.0


def factors(rng: random.Random) -> dict[str, dict[str, float]]:
    """device -> change -> log factor of time."""
    sizes = [math.exp(rng.uniform(math.log(0.02), math.log(0.5))) for _ in range(30)]
    source = [-size for size in sizes[:12]] + sizes[12:] + [0.0] * 30
    rng.shuffle(source)
    found = {name: {} for name in DEVICES}
    for i, log in enumerate(source):
        for name in DEVICES:
            share = 1.0
            if name != "A" and log < 0:
                share = rng.choice([rng.uniform(0.8, 1.25)] * 2 + [rng.uniform(0, 0.2), -rng.uniform(0.5, 1)])
            found[name][f"{i:03x}"] = log * share
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quads", type=int, default=100, help="of sessions and their replays")
    parser.add_argument("--runs", type=int, default=3, help="of a change in a replay, at least")
    parser.add_argument("--scale", type=int, default=3, help="runs of each baseline for each other time")
    options = parser.parse_args()
    compare.NOISE = {name: noise for name, (_, _, noise) in DEVICES.items()}
    covered, bias, classes = Counter(), {name: [] for name in DEVICES}, {"time": Counter(), "bits": Counter()}
    for quad in range(options.quads):
        rng = random.Random(f"multiplier {quad}")
        true = factors(rng)
        source = Device("A", "night", true["A"], rng)
        taken = compare.searched(source)
        sessions = [source.analysis()]
        for name in DEVICES:
            replay = Device(name, "replay", true[name], rng)
            for key in taken:
                replay.judge(replay.open(key, 0, f"A/night/{key}"), 0, options.runs)
            replay.scale(options.scale)
            sessions.append(replay.analysis())
        for change in comparison.compare(sessions).shared:
            for name, cell in change.cells.items():
                log, told = true[name][change.key], cell.times
                if told is not None and told.low is not None and cell.effect.sure and SCALES[0] < math.exp(log) < 4:
                    low, high = ((side in told.beyond) for side in ("fast", "slow"))
                    inside = (low or told.low <= math.exp(log)) and (high or math.exp(log) <= told.high)
                    covered[name, "in" if inside else "out"] += 1
                    covered[name, "bounded"] += bool(told.bounded)
                    if not told.bounded:
                        bias[name].append(math.log(told.value) - log)
                if name != "A":
                    right = truth(true["A"][change.key], log) if true["A"][change.key] else "nothing"
                    classes["time"][name, right, cell.verdict_in_time or OPEN] += 1
                    classes["bits"][name, right, cell.verdict or OPEN] += 1
    print("device  bits per byte for a tenth less time  intervals  hold the truth  bounded  median miss of log factor")
    for name in DEVICES:
        n = covered[name, "in"] + covered[name, "out"]
        worth = score(name, BUDGET / 0.9) - score(name, BUDGET)
        miss = sorted(bias[name])[len(bias[name]) // 2]
        print(
            f"{name}  {worth:>10.5f}  {n:>6}  {covered[name, 'in'] / n:.1%}  {covered[name, 'bounded'] / n:.1%}  "
            f"{miss:+.4f}"
        )
    for unit, counts in classes.items():
        print(compare.table(f"classes by {unit}", counts))
        wrong = sum(n for (_, right, said), n in counts.items() if said not in (right, OPEN))
        print(f"  wrong: {wrong / sum(counts.values()):.1%}; told right: ", end="")
        print(", ".join(f"{compare.share(counts, d, CLASSES, lambda right: (right,)):.0%} on {d}" for d in "BCD"))


if __name__ == "__main__":
    main()
