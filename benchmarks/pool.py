"""What does a night gain on many devices, and how often does it keep a change that is no better? Simulated.

    python benchmarks/pool.py [--nights 300] [--devices 1,2,4,8,16]

No model is trained. As in benchmarks/gate.py, changes have effects, runs have normal noise, and `verdict/gate.py`
decides. Here N devices work on one session for 100 runs each. Devices differ: each adds a constant of its own, normal
with as large a standard deviation as seeds have (--differ). The gate estimates these, as the lab does. Changes are
proposed without delay, whenever a device would wait. Rules:

- pool: what the lab does. A repeat is run with its parent's seed on its parent's device, a train.py is spread over
  devices, a promising change whose parent is no longer the best is made again on the best (a share CONFLICTS can't be).
- sticky: all runs of a change are made on the device of its first run.
- whoever beats the best: one run each; what scores lower than the best score so far is the best.

A keep is false if its true effect is not below zero.
"""

import argparse
import heapq
import math
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gate as single

from lab.session.state import Conditions
from lab.verdict import gate

ROUNDS = 100  # runs of a device in a night
NOISE = single.LOW
CONFLICTS = 0.1  # share of changes that can't be made again on another best
JITTER = 0.05  # of the time of a run


@dataclass(frozen=True)
class Setting:
    """Attributes: devices: how many. differ: sd of what each adds, in seeds'. rule: "pool" or "sticky". shared: part of
    the variance that equal seeds share between configurations."""

    devices: int
    differ: float = 1.0
    rule: str = "pool"
    shared: float = 0.0


@dataclass(eq=False)
class Configuration:
    """A train.py: its true val_bpb, its scores and devices by seed, and the seeds that are being run."""

    true: float
    parent: "Configuration | None" = None
    results: dict[int, float] = field(default_factory=dict)
    on: dict[int, int] = field(default_factory=dict)  # seed -> device, once it is begun

    @property
    def under_way(self) -> set[int]:
        return self.on.keys() - self.results.keys()

    @property
    def conditions(self) -> dict[int, Conditions]:
        return {with_seed: Conditions(device=str(device)) for with_seed, device in self.on.items()}

    def repeats(self) -> dict[int, float]:
        return dict(list(self.results.items())[self.parent is not None :])


@dataclass(eq=False)
class Test:
    """A change that is open. `wants`: what it wanted when `seen` was all there was of it: it is judged again once it or
    its parent has another run, or the best has moved."""

    change: Configuration
    effect: float
    stake: float | None = None
    wants: tuple | None = None  # (Configuration, seed, whether it is urgent)
    seen: tuple = ()


class Night:
    """One night; `found` is what came of it."""

    def __init__(self, effects: np.ndarray, seed: int, setting: Setting):
        self.setting, self.rng = setting, np.random.default_rng([seed, setting.devices, 3])
        self.effects = iter(self.rng.choice(effects, setting.devices * ROUNDS + 100).tolist())
        self.offsets = (setting.differ * NOISE * self.rng.standard_normal(setting.devices)).tolist()
        self.by_seed = math.sqrt(setting.shared) * NOISE * self.rng.standard_normal(400)
        self.best = Configuration(0.0)
        self.configurations, self.open, self.account = [self.best], [], gate.Account()
        self.known = None
        self.found = dict.fromkeys("keeps false runs experiments rebased superseded".split(), 0)
        self.running: list[tuple[float, int, Configuration, int]] = []  # until, device, what, with which seed
        self.free = list(range(setting.devices))
        now, baseline = 0.0, [gate.seed(i) for i in range(single.BASELINE_RUNS)]
        while True:
            while self.free and baseline:
                self.begin(self.free.pop(0), self.best, baseline.pop(0), now)
            if not baseline and len(self.best.results) >= single.BASELINE_RUNS or self.found["keeps"]:
                self.give(now)
            now, device, configuration, with_seed = heapq.heappop(self.running)
            if now > ROUNDS:
                break
            self.free.append(device)
            score = configuration.true + self.offsets[device] + float(self.by_seed[with_seed - gate.seed(0)])
            own = math.sqrt(1 - setting.shared) * NOISE * self.rng.standard_normal()
            configuration.results[with_seed] = score + own
            if configuration.parent is None or len(configuration.results) > 2:  # the first of a change tells nothing
                self.known = None
        self.found["gain"] = -self.best.true

    # --- What runs ---

    def begin(self, device: int, configuration: Configuration, with_seed: int, now: float) -> None:
        configuration.on[with_seed] = device
        until = now + 1 + JITTER * self.rng.random()
        heapq.heappush(self.running, (until, device, configuration, with_seed))  # devices differ, so nothing ties
        self.found["runs"] += 1

    def give(self, now: float) -> None:
        """Has free devices begin what is wanted, and proposes until none is free."""
        while self.free:
            wanted = self.settle()
            for test, configuration, with_seed, urgent in wanted:
                if not self.free:
                    break
                if urgent and configuration is test.change and self.setting.rule == "pool":
                    with_seed = self.seed_for(configuration, with_seed)
                if with_seed is None or with_seed in configuration.on:
                    continue
                if (device := self.device_for(test, configuration, with_seed, urgent)) is not None:
                    if test.change.results and test.stake is None:
                        test.stake = self.reserved().stake
                    self.free.remove(device)
                    self.begin(device, configuration, with_seed, now)
            if self.free and sum(not test.change.on for test in self.open) <= len(self.free):
                effect = next(self.effects)
                self.open.append(Test(Configuration(self.best.true + effect, self.best), effect))
                self.found["experiments"] += 1

    def seed_for(self, change: Configuration, first: int) -> int | None:
        """The seed of a repeat: one whose run of the parent was made on a device that was used least, and is free."""
        used, known = Counter(change.on.values()), change.parent.on
        seeds = [s for s in change.parent.results if s not in change.on]
        least = min((used[known[s]] for s in seeds), default=0)
        return min(
            (s for s in seeds if used[known[s]] == least and known[s] in self.free), default=None if seeds else first
        )

    def device_for(self, test: Test, configuration: Configuration, with_seed: int, urgent: bool) -> int | None:
        if not urgent:
            return self.free[0]
        change = test.change
        other = change.parent if configuration is change else change
        if self.setting.rule == "sticky":
            device = next(iter(change.on.values()))
            if configuration is not change:
                return self.free[0]
            return device if device in self.free else None
        if with_seed in other.on:
            return other.on[with_seed] if other.on[with_seed] in self.free else None
        used = Counter(configuration.on.values())
        least = min(used[device] for device in range(self.setting.devices))
        return next((device for device in self.free if used[device] == least), None)

    # --- What is decided ---

    def settle(self) -> list[tuple[Test, Configuration, int, bool]]:
        """Decides what can be decided; (test, what to run, seed, whether it is a repeat) of what is wanted, the most
        urgent first."""
        while True:
            wanted, before = [], len(self.open)
            for test in list(self.open):
                if (order := self.look(test)) is not None:
                    wanted.append(order)
            if len(self.open) == before:
                return sorted(wanted, key=lambda order: (not order[3], order[1] is order[0].change))

    def look(self, test: Test) -> tuple[Test, Configuration, int, bool] | None:
        change, parent = test.change, test.change.parent
        if change.under_way:
            return None
        seen = len(change.results), len(parent.results), parent is self.best
        if seen == test.seen:
            configuration, with_seed, urgent = test.wants
            return None if with_seed in configuration.on else (test, configuration, with_seed, urgent)
        account = self.reserved()
        step = gate.next_step(
            change.results,
            parent.results,
            self.noise(),
            account,
            stake=test.stake,
            conditions=(change.conditions, parent.conditions),
        )
        moved = parent is not self.best and change.results and step.action != "discard"
        if step.action.startswith("run") and not moved:
            configuration = change if step.action == "run candidate" else parent
            test.seen, test.wants = seen, (configuration, step.seed, bool(change.results))
            return None if step.seed in configuration.on else (test, *test.wants)
        self.open.remove(test)
        evidence = step.evidence
        if moved:
            evidence = gate.replace_evidence(evidence, better=False, near_miss=False, stake=test.stake or 0.0)
            self.found["superseded"] += 1
            if self.rng.random() >= CONFLICTS:
                again = Configuration(self.best.true + test.effect, self.best)
                self.open.insert(0, Test(again, test.effect))
                self.found["rebased"] += 1
        elif step.action == "keep":
            self.best = change
            self.found["keeps"] += 1
            self.found["false"] += test.effect >= 0
        self.account = self.account.after(evidence)
        if len(change.results) > 1 or step.action == "keep":
            self.configurations.append(change)
        return None

    def reserved(self) -> gate.Account:
        account = self.account
        for test in self.open:
            if test.stake is not None:
                account = account.reserving(test.stake)
        return account

    def noise(self) -> gate.Noise:
        if self.known is None:
            tests = [test.change for test in self.open if len(test.change.results) > 2]
            repeated = [one for one in self.configurations + tests if len(one.repeats()) > 1]
            scores, families, conditions = {}, {}, [one.conditions for one in repeated]
            known = gate.pooled(
                [list(one.repeats().values()) for one in repeated],
                NOISE,
                conditions=[[of[s] for s in one.repeats()] for one, of in zip(repeated, conditions)],
            )
            offsets = [known.explains([(1.0, Conditions(device=str(i)))]).value for i in range(self.setting.devices)]
            for one in repeated:
                scores[id(one)] = {s: score - offsets[one.on[s]] for s, score in one.repeats().items()}
            for one in repeated:
                if id(one.parent) in scores:
                    families.setdefault(id(one.parent), []).append(scores[id(one)])
            pairs = ((scores[parent], changes) for parent, changes in families.items())
            self.known = replace(known, shared=gate.shared(pairs))
        return self.known


def night(effects: np.ndarray, seed: int, setting: Setting) -> dict:
    return Night(effects, seed, setting).found


def whoever_beats_the_best(effects: np.ndarray, seed: int, setting: Setting) -> dict:
    """Each device proposes on the best, runs once, and replaces the best by what scores lower."""
    rng = np.random.default_rng([seed, setting.devices, 4])
    offsets = setting.differ * NOISE * rng.standard_normal(setting.devices)
    best, score, found = 0.0, NOISE * rng.standard_normal(), {"keeps": 0, "false": 0}
    for _ in range(ROUNDS):
        made = [(best + rng.choice(effects), offset) for offset in offsets]  # at once: all on the same best
        for true, offset in made:
            told = true + offset + NOISE * rng.standard_normal()
            if told < score:
                found["keeps"] += 1
                found["false"] += true >= best
                best, score = true, told
    return found | {"gain": -best}


def nights(map, effects, setting: Setting, count: int, rule=night) -> dict[str, np.ndarray]:
    each = list(map(partial(rule, effects, setting=setting), range(count)))
    return {name: np.array([one[name] for one in each], float) for name in each[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nights", type=int, default=300)
    parser.add_argument("--devices", default="1,2,4,8,16")
    parser.add_argument(
        "--differ", type=float, default=1.0, help="what devices differ by, in standard deviations of seeds"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    effects, zero = single.fitted(), np.zeros(1)
    counts = list(map(int, options.devices.split(",")))
    with ProcessPoolExecutor(options.workers) as executor:
        spread = partial(executor.map, chunksize=4)
        lines, first = [], None
        for count in counts:
            setting = Setting(count, options.differ)
            enough = options.nights * 4 // max(4, count)  # long nights of many devices take long
            gained = nights(spread, effects, setting, max(40, options.nights // 4))
            worthless = nights(spread, zero, setting, enough)
            print(count, single.share(worthless["false"] > 0), gained["gain"].mean(), file=sys.stderr, flush=True)
            first = first or float(gained["gain"].mean())
            error = gained["gain"].std() / math.sqrt(len(gained["gain"])) / first
            lines.append(
                f"{count} | {gained['gain'].mean() / first:.2f} ± {error:.2f} | {gained['keeps'].mean():.1f} | "
                f"{gained['experiments'].mean():.0f} | {gained['rebased'].mean():.1f} | "
                f"{gained['runs'].mean() / count / ROUNDS:.3f} | {single.share(worthless['false'] > 0)}"
            )
        header = (
            "devices | gain, times that of one | keeps | experiments | made again | busy | worthless changes: nights"
        )
        single.table(
            f"{ROUNDS} runs a device, which differ by {options.differ:g} of seeds:",
            f"{header} with a false keep, %",
            lines,
        )
        lines = []
        for count in [count for count in counts if 1 < count <= 8]:
            sticky = nights(spread, zero, Setting(count, options.differ, "sticky"), options.nights * 4 // max(4, count))
            setting = Setting(count, options.differ)
            beats = nights(spread, zero, setting, options.nights, whoever_beats_the_best)
            gained = nights(spread, effects, setting, options.nights // 4, whoever_beats_the_best)
            pairs = f"{single.share(sticky['false'] > 0)} | {single.share(beats['false'] > 0)}"
            lines.append(f"{count} | {pairs} | {gained['gain'].mean() / first:.2f}")
        header = "devices | sticky | whoever beats the best | gain of the latter, times the pool's of one device"
        single.table("Negative controls: worthless changes, nights with a false keep, %:", header, lines)


if __name__ == "__main__":
    main()
