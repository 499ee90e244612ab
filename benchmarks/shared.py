"""What do shared runs find on a noisy device, and how often do they keep something false? Whole nights, simulated.

    python benchmarks/shared.py [--nights 100] [--only NAME]

No model is trained: patches have effects, drawn as in benchmarks/gate.py, whose nights of one change per run are the
opponent; runs have normal noise; lab/verdict/shared.py chooses what each run holds and what is tested, and the gate's
account gives the level. A night has 125 runs, those of the test and three of the baseline included. The yardstick is
what the rule "one run each, keep what is lower" gains in 125 runs at noise 0.0005, on the same effects. A keep is false
if the members' effects together are not below zero.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of small matrices, a process for each night is faster
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gate as nights
from lab.verdict import gate, shared

RUNS = 125


@dataclass(frozen=True)
class Setting:
    """noise: of a run. pairs: interacting pairs of patches, and what each adds, in effects' standard deviation.
    prior: what effects are taken for, relative to what they are."""

    noise: float
    pairs: float = 0.0
    prior: float = 1.0


def night(effects: np.ndarray, seed: int, setting: Setting) -> dict:
    """A night of shared runs: one block, and its test."""
    rng = np.random.default_rng([seed, 5])
    true = np.array(nights.drawn(effects, seed, RUNS - 1))
    between = np.zeros((len(true), len(true)))
    if setting.pairs:
        one, other = rng.permutation(len(true)).reshape(2, -1)
        between[one, other] = setting.pairs * np.abs(true[one]) * rng.standard_normal(len(one))

    def score(members) -> float:
        held = np.zeros(len(true))
        held[list(members)] = 1
        return float(true @ held + held @ between @ held + setting.noise * rng.standard_normal())

    baseline = [score(()) for _ in range(nights.BASELINE_RUNS)]
    noise = gate.pooled([baseline], setting.noise)
    count = shared.tested(noise.sd)
    runs: list[tuple[tuple[int, ...], float | None]] = []
    parent = float(np.mean(baseline))
    mixture = shared.MIXTURE
    try:
        shared.MIXTURE = mixture * (1.0, setting.prior, setting.prior)
        while len(runs) < RUNS - len(baseline) - 2 * count:
            screening = shared.Screening(len(true), runs, noise.sd, parent)
            if screening.hopeless:  # the rest of the night has one change per run
                alone = nights.night(effects, seed, nights.Setting(RUNS - len(runs), setting.noise))
                return dict(
                    gain=alone["gain"], keeps=alone["keeps"], false=float(alone["false"] > 0), members=0.0, good=0.0
                )
            members = screening.next(len(runs))
            runs.append((members, score(members)))
        screening = shared.Screening(len(true), runs, noise.sd, parent)
        members = screening.chosen(screening.estimates())
    finally:
        shared.MIXTURE = mixture
    if not members:
        return dict(gain=0.0, keeps=0.0, false=0.0, members=0.0, good=0.0)
    own, others = [score(members) for _ in range(count)], [score(()) for _ in range(count)]
    noise = gate.pooled([baseline, own[1:], others], setting.noise)
    step = gate.joint_step(dict(enumerate(own)), dict(enumerate(others)), noise, gate.Account())
    held = np.zeros(len(true))
    held[members] = 1
    gain = -float(true @ held + held @ between @ held)
    kept = step.action == "keep"
    return dict(
        gain=gain * kept,
        keeps=float(kept),
        false=float(kept and gain <= 0),
        members=float(len(members) * kept),
        good=float((true[members] < 0).sum() * kept),
    )


def mostly_bad(effects: np.ndarray) -> np.ndarray:
    """Effects in which seven of eight losses are thirty times as large: far worse, most of them."""
    rng = np.random.default_rng(1)
    return np.where((effects > 0) & (rng.random(len(effects)) < 7 / 8), 30 * effects, effects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=100)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--processes", type=int, help="all cores by default")
    options = parser.parse_args()
    usual = nights.fitted()
    zero = np.zeros(1)
    kinds = {f"noise {noise}": (usual, Setting(noise)) for noise in (0.003, 0.005, 0.01)}
    kinds |= {f"noise {noise}, all zero": (zero, Setting(noise)) for noise in (0.003, 0.01)}
    kinds["noise 0.005, pairs interact"] = (usual, Setting(0.005, pairs=1.0))
    kinds |= {f"noise 0.005, prior {p:g} times": (usual, Setting(0.005, prior=p)) for p in (1 / 3, 3)}
    kinds["noise 0.005, most far worse"] = (mostly_bad(usual), Setting(0.005))
    print(f"{RUNS} runs a night, {options.nights} nights each")
    print(
        "setting | true gain, % of the other rule's at noise 0.0005 | nights false, % | nights with a keep, % | "
        "members kept, of them gains | one change per run, %"
    )
    with ProcessPoolExecutor(options.processes) as pool:
        mapped = map if options.processes == 1 else partial(pool.map, chunksize=5)
        simulated = nights.Nights(mapped, options.nights)
        for name, (effects, setting) in kinds.items():
            if options.only and name not in options.only:
                continue
            began = time.monotonic()
            found = simulated(effects, setting, night)
            yardstick = simulated(effects, nights.Setting(runs=RUNS), nights.one_run_each)["gain"]
            gained = single = (0.0, 0.0)
            if effects.any():
                alone = simulated(effects, nights.Setting(runs=RUNS, noise=setting.noise))
                gained, single = nights.ratio(found["gain"], yardstick), nights.ratio(alone["gain"], yardstick)
            print(
                f"{name} | {100 * gained[0]:.1f} ± {100 * gained[1]:.1f} | {nights.share(found['false'])} | "
                f"{100 * found['keeps'].mean():.0f} | {found['members'].sum() / max(1, found['keeps'].sum()):.1f}, "
                f"{found['good'].sum() / max(1, found['members'].sum()):.0%} | "
                f"{100 * single[0]:.1f} ± {100 * single[1]:.1f} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
