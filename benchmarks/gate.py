"""How often would the gate keep a change that is no better, and what does its care cost? Whole nights, simulated.

    python benchmarks/gate.py [RESULTS_TSV] [--nights 1000]

No model is trained: changes have effects (val_bpb of the child minus its parent's), runs have normal noise, and
`verdict/gate.py` decides. Effects are drawn independently from those of a published session, RESULTS_TSV: each change
minus the best before it. They hold that session's own noise, which spreads them more than true effects are;
`less_noise` takes it out (a nonparametric maximum-likelihood mixture: Laird, JASA 1978). Without a file they are drawn
from what was fitted to it, `fitted` below.

A night is a number of runs, baseline's and parents' included. The yardstick is the rule "one run each, keep what is
lower", on the same effects in the same order. A keep is false if its true effect is not below zero. Gain is the true
val_bpb of the first parent minus the last one's; every figure is a ratio of sums, with its standard error over nights.
"""

import argparse
import csv
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.session.state import SHORT, USUAL, Conditions
from lab.verdict import gate

BASELINE_RUNS = 3
LOW, HIGH = 0.0005, 0.01  # noise: an H100, and a slower machine
# Neighbours on one host: 13 runs of 15 s lay 0.24 bits per byte apart for a factor e in tokens, which were 20 to 25 M.
CURVE, MOST_DISTURBED, SEEDS_ALONE = 0.24, 0.25, 0.0026
CHANGES = 0.3  # chance that the disturbance is another one in the next run


# --- Effects ---


def published(path: Path) -> np.ndarray:
    """Each change's val_bpb minus the best before it; crashes are left out."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["status"] != "crash"]
    best, effects = float(rows[0]["val_bpb"]), []
    for row in rows[1:]:
        score = float(row["val_bpb"])
        effects.append(score - best)
        if row["status"] == "keep":
            best = score
    return np.array(effects)


def fitted(count: int = 20_000) -> np.ndarray:
    """What was fitted to the published session: 18.5 % are gains, lognormal with median 0.00041 and shape 1.5, none
    above 0.012; the others losses, lognormal with median 0.00077 and shape 1.15."""
    rng = np.random.default_rng(0)
    gains = np.minimum(0.00041 * np.exp(1.5 * rng.standard_normal(count)), 0.012)
    losses = 0.00077 * np.exp(1.15 * rng.standard_normal(count))
    return np.where(rng.random(count) < 0.185, -gains, losses)


def less_noise(effects: np.ndarray, sd: float) -> np.ndarray:
    """A sample of true effects, if the observed ones hold noise of `sd` in the child, and half of that variance in a
    parent that was half a `sd` lucky."""
    inside = effects[np.abs(effects) < 0.014]
    grid = np.linspace(-0.014, 0.014, 561)
    density = np.exp(-0.5 * ((inside[:, None] - grid - 0.5 * sd) / (sd * math.sqrt(1.5))) ** 2)
    weights = np.full(len(grid), 1 / len(grid))
    for _ in range(300):
        weights *= (density / (density @ weights)[:, None]).mean(0)
    return np.random.default_rng(0).choice(grid, 20_000, p=weights / weights.sum())


# --- Nights ---


@dataclass(frozen=True)
class Setting:
    """A kind of night.

    Attributes:
        runs: its length. noise: sd between seeds. prior: what calibration takes it for, relative to that.
        prior_df: what that counts for. shared: part of the variance that equal seeds share between configurations.
        pool: try near misses together. plant: the experiment that is as good as the smallest detectable one.
        simple: share of changes that are simplifications. simple_effect: theirs, if not drawn like the others'.
        disturbed: by how much at most other programs slow the device, as a share of a step. corrected: share of that
            which the clock corrects.
        odd: share of runs that lack tokens which their clock does not miss. lacks: how many, in factors of e; below 0
            they have more. measured: whether it is known how much there is, of an odd run by others of its train.py.
    """

    runs: int = 125
    noise: float = LOW
    prior: float = 1.0
    prior_df: int = gate.PRIOR_DF
    shared: float = 0.0
    pool: bool = True
    plant: int | None = None
    simple: float = 0.0
    simple_effect: float | None = None
    disturbed: float = 0.0
    corrected: float = 1.0
    odd: float = 0.0
    lacks: float = 0.5  # 13 steps where others make 21
    measured: bool = True


@dataclass
class Configuration:
    """A train.py: its true val_bpb, and what its runs gave and their conditions, by seed."""

    true: float
    parent: "Configuration | None" = None
    results: dict = field(default_factory=dict)
    conditions: dict = field(default_factory=dict)
    lacks: dict = field(default_factory=dict)

    def repeats(self) -> dict[int, float]:
        """As State.repeats has them: without the first run of a change."""
        return dict(list(self.results.items())[self.parent is not None :])


COUNTED = "keeps false experiments runs pooled pooled_keeps simple_keeps simple_loss planted planted_kept".split()


def night(effects: np.ndarray, seed: int, setting: Setting) -> dict:
    """One night of the gate."""
    rng = np.random.default_rng([seed, 1])
    draws = iter(drawn(effects, seed, setting.runs + 60))
    by_seed = (math.sqrt(setting.shared) * setting.noise * rng.standard_normal(setting.runs + 60)).tolist()
    own = math.sqrt(1 - setting.shared) * setting.noise
    parent = Configuration(0.0)
    configurations, account, misses = [parent], gate.Account(), {}
    found = dict.fromkeys(COUNTED, 0)
    slowness, known = 0.0, None

    def run(one: Configuration, with_seed: int) -> None:
        nonlocal slowness, known
        if setting.disturbed and rng.random() < CHANGES:
            slowness = setting.disturbed * rng.random()
        left = (1 - setting.corrected) * CURVE * slowness
        one.lacks[with_seed] = setting.lacks if setting.odd and rng.random() < setting.odd else 0.0
        left += CURVE * one.lacks[with_seed]
        one.results[with_seed] = one.true + left + by_seed[with_seed - gate.seed(0)] + own * rng.standard_normal()
        one.conditions[with_seed] = Conditions(slowness if setting.measured else 0.0)
        if setting.measured and len(one.lacks) >= USUAL:
            for other, lacking in one.lacks.items():
                one.conditions[other] = one.conditions[other]._replace(short=lacking)
        found["runs"] += 1
        if one.parent is None or len(one.results) > 2:
            known = None

    def noise() -> gate.Noise:
        nonlocal known
        if known is None:
            repeated = [one for one in configurations if len(one.repeats()) > 1]
            scores = [list(one.repeats().values()) for one in repeated]
            conditions = [[one.conditions[s] for s in one.repeats()] for one in repeated]
            curve = gate.CURVE if setting.disturbed or setting.odd else 0.0
            known = gate.pooled(scores, setting.prior * setting.noise, setting.prior_df, conditions, curve)
            left = {
                id(one): {
                    s: score - known.explains([(1.0, one.conditions[s])]).value for s, score in one.repeats().items()
                }
                for one in repeated
            }
            families: dict = {}
            for one in repeated:
                if id(one.parent) in left:
                    families.setdefault(id(one.parent), []).append(left[id(one)])
            pairs = ((left[parent], changes) for parent, changes in families.items())
            known = replace(known, shared=gate.shared(pairs))
        return known

    for round in range(BASELINE_RUNS):
        run(parent, gate.seed(round))
    while gate.doubted(list(parent.results.values()), noise()):
        run(parent, gate.seed(len(parent.results)))
    while found["runs"] < setting.runs:
        found["experiments"] += 1
        number, simpler, planted = found["experiments"], False, False
        members = gate.together([(n, *miss[1:]) for n, miss in misses.items()])[: gate.MOST_TOGETHER]
        if members:
            effect = sum(misses.pop(member)[0] for member in members)
            found["pooled"] += 1
        else:
            effect = next(draws)
            if setting.simple and rng.random() < setting.simple:
                simpler, effect = True, effect if setting.simple_effect is None else setting.simple_effect
            if setting.plant and not found["planted"] and number >= setting.plant:
                planted, effect = True, -gate.smallest_detectable(noise(), account)
                found["planted"] = 1
        change = Configuration(parent.true + effect, parent)
        configurations.append(change)
        while True:
            conditions = (change.conditions, parent.conditions)
            got_more = setting.measured and min(change.lacks.values(), default=0.0) < -SHORT
            fewest = USUAL if got_more else 1
            step = gate.next_step(
                change.results, parent.results, noise(), account, simpler, conditions=conditions, fewest=fewest
            )
            if step.action == "run candidate":
                run(change, step.seed)
            elif step.action == "run parent":
                run(parent, step.seed)
            else:
                break
        evidence = step.evidence
        account = account.after(evidence)
        if len(change.results) < 2 and step.action == "discard":
            configurations.pop()  # no repeats: nothing for the noise
        if evidence.near_miss and setting.pool:
            misses[number] = (effect, evidence.gain, evidence.error)
        if step.action == "keep":
            parent = change
            if evidence.simpler:
                found["simple_keeps"] += 1
                found["simple_loss"] += max(0.0, effect)
            else:
                found["keeps"] += 1
                found["false"] += effect >= 0
                found["pooled_keeps"] += bool(members)
                found["planted_kept"] += planted
    estimate = noise()
    return found | {
        "gain": -parent.true * setting.runs / found["runs"],
        "sd": estimate.sd / setting.noise,
        "df": estimate.df,
        "shared": estimate.shared,
    }


def one_run_each(effects: np.ndarray, seed: int, setting: Setting) -> dict:
    """A night of the rule that keeps whatever scores lower than the best so far."""
    rng = np.random.default_rng([seed, 2])
    true, best, keeps, false = 0.0, setting.noise * rng.standard_normal(), 0, 0
    for effect in drawn(effects, seed, setting.runs + 60)[: setting.runs - 1]:
        score = true + effect + setting.noise * rng.standard_normal()
        if score < best:
            true, best, keeps, false = true + effect, score, keeps + 1, false + (effect >= 0)
    return {"gain": -true, "keeps": keeps, "false": false}


def drawn(effects: np.ndarray, seed: int, count: int) -> list[float]:
    """The effects of a night: the same for both rules."""
    return np.random.default_rng([seed, 0]).choice(effects, count).tolist()


class Nights:
    """Many nights, and what they add up to."""

    def __init__(self, map, count: int):
        self.map, self.count = map, count

    def __call__(self, effects, setting, rule=night, count=None) -> dict[str, np.ndarray]:
        work = partial(rule, effects, setting=setting)
        nights = list(self.map(work, range(count or self.count)))
        return {name: np.array([one[name] for one in nights], float) for name in nights[0]}


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Ratio of sums and its standard error."""
    value = above.sum() / below.sum()
    return value, float(np.std(above - value * below) / below.mean() / math.sqrt(len(above)))


def each(found: dict) -> str:
    """Runs per experiment."""
    return f"{(found['runs'].sum() - BASELINE_RUNS * len(found['runs'])) / found['experiments'].sum():.2f}"


def share(values: np.ndarray) -> str:
    """Share of nights, in percent, with its standard error."""
    p, n = float(np.mean(values)), len(values)
    return f"{100 * p:.1f} ± {100 * math.sqrt(max(p * (1 - p), 1 / n) / n):.1f}"


def table(title: str, header: str, lines: list[str]) -> None:
    columns = header.count("|") + 1
    print(f"\n{title}\n\n| {header} |\n|{'---|' * columns}")
    print("\n".join(f"| {line} |" for line in lines), flush=True)


# --- Tables ---


def noisy(nights: Nights, effects: np.ndarray) -> None:
    yardstick, lines = nights(effects, Setting(runs=300), one_run_each)["gain"], []
    for noise in (LOW, 0.003, 0.005, HIGH):
        found = nights(effects, Setting(runs=300, noise=noise))
        gained, error = ratio(found["gain"], yardstick)
        lines.append(
            f"{noise} | {100 * gained:.1f} ± {100 * error:.1f} | {share(found['false'] > 0)} | "
            f"{found['keeps'].mean():.2f} | {found['experiments'].mean():.0f} | {each(found)} | "
            f"{found['sd'].mean():.2f}"
        )
    table(
        f"300 runs; true gain as a share of what the other rule gains at noise {LOW}:",
        "noise | true gain, % | nights with a false keep, % | keeps | experiments | runs each | "
        "noise, estimated / true",
        lines,
    )


def disturbed(nights: Nights, effects: np.ndarray) -> None:
    lines = []
    kinds = {
        "none": dict(disturbed=0.0),
        "known and corrected": dict(corrected=1.0),
        "known, half of it corrected": dict(corrected=0.5),
        "known, none of it corrected": dict(corrected=0.0),
        "up to 1.2, 0.98 of it corrected": dict(disturbed=1.2, corrected=0.98),
        "up to 1.2, 0.95 of it corrected": dict(disturbed=1.2, corrected=0.95),
        "up to 1.2, 0.8 of it corrected": dict(disturbed=1.2, corrected=0.8),
        "half of it corrected, not known": dict(corrected=0.5, measured=False),
        "not known": dict(corrected=0.0, measured=False),
        "one run in 20 lacks two fifths, known": dict(disturbed=0.0, odd=0.05),
        "one run in 20 lacks two fifths, not known": dict(disturbed=0.0, odd=0.05, measured=False),
        "one run in 20 has a fifth more, known": dict(disturbed=0.0, odd=0.05, lacks=-0.2),
        "one run in 20 has a fifth more, not known": dict(disturbed=0.0, odd=0.05, lacks=-0.2, measured=False),
    }
    yardstick = nights(effects, Setting(runs=300), one_run_each)["gain"]
    for name, facts in kinds.items():
        setting = Setting(**{"runs": 300, "noise": SEEDS_ALONE, "disturbed": MOST_DISTURBED, **facts})
        found, zero = nights(effects, setting), nights(np.zeros(1), setting)
        gained, error = ratio(found["gain"], yardstick)
        lines.append(
            f"{name} | {100 * gained:.1f} ± {100 * error:.1f} | {share(found['false'] > 0)} | "
            f"{share(zero['false'] > 0)} | {found['keeps'].mean():.2f} | {found['experiments'].mean():.0f} | "
            f"{found['sd'].mean():.2f}"
        )
    table(
        f"Disturbed devices: noise {SEEDS_ALONE} between seeds, steps up to {MOST_DISTURBED:.0%} slower where no other "
        "number is given, 300 runs:",
        "disturbance | true gain, % | nights with a false keep, % | all effects zero | keeps | experiments | "
        "noise, estimated / between seeds",
        lines,
    )


def gains(nights: Nights, effects: np.ndarray) -> None:
    lines = []
    kinds = [(f"{runs} runs", effects, Setting(runs=runs)) for runs in (60, 125, 300)]
    kinds += [
        (f"125, prior {prior:.2g} times the noise", effects, Setting(prior=prior)) for prior in (1 / 3, 1 / 2, 2, 3)
    ]
    kinds += [
        ("125, half of the variance shared by seed", effects, Setting(shared=0.5)),
        ("125, near misses not tried together", effects, Setting(pool=False)),
        ("125, effects less noise of 0.0003", less_noise(effects, 0.0003), Setting()),
        ("125, effects less noise of 0.0005", less_noise(effects, 0.0005), Setting()),
    ]
    for name, those, setting in kinds:
        ours, theirs = nights(those, setting), nights(those, setting, one_run_each)
        (gained, error), (false, false_error) = ratio(ours["gain"], theirs["gain"]), ratio(ours["false"], ours["keeps"])
        lines.append(
            " | ".join(
                (
                    name,
                    f"{100 * gained:.1f} ± {100 * error:.1f}",
                    f"{100 * false:.2f} ± {100 * false_error:.2f}",
                    f"{100 * theirs['false'].sum() / theirs['keeps'].sum():.0f}",
                    f"{ours['keeps'].mean():.1f} / {theirs['keeps'].mean():.1f}",
                    f"{ours['experiments'].mean():.0f}",
                    each(ours),
                    f"{ours['pooled'].mean():.1f} / {ours['pooled_keeps'].mean():.1f}",
                    f"{ours['sd'].mean():.2f}",
                )
            )
        )
    table(
        f"Noise {LOW}:",
        "night | true gain, % of the other rule's | false keeps, % | the other rule's, % | keeps, "
        "ours / other | experiments | runs each | tried together / kept | noise, estimated / true",
        lines,
    )


def false_nights(nights: Nights, effects: np.ndarray) -> None:
    lines = []
    for name, those in (("as above", effects), ("all zero", np.zeros(1))):
        cells = [name]
        for prior, df in ((1, gate.PRIOR_DF), (1 / 3, gate.PRIOR_DF), (10, gate.PRIOR_DF), (1, 200)):
            found = nights(those, Setting(runs=300, noise=HIGH, prior=prior, prior_df=df))
            cells.append(share(found["false"] > 0))
            if (prior, df) == (1, gate.PRIOR_DF):
                shown = f"{found['experiments'].mean():.0f}"
        lines.append(" | ".join((*cells, shown)))
    table(
        f"Nights of 300 runs with a false keep, %, at noise {HIGH}:",
        "effects | prior right | a third of the noise | ten times the noise | noise known | experiments",
        lines,
    )


def detectable(nights: Nights, effects: np.ndarray) -> None:
    lines = []
    for noise in (LOW, HIGH):
        for at in (10, 60):
            found = nights(effects, Setting(noise=noise, plant=at))
            lines.append(f"{noise} | {at} | {share(found['planted_kept'])}")
    table(
        "A change as good as the smallest that the session says it would see in 80 % of cases:",
        "noise | put in as experiment | kept, %",
        lines,
    )


def simplifications(nights: Nights, effects: np.ndarray) -> None:
    lines = []
    for noise, common in ((LOW / 2, 0.0), (LOW, 0.0), (LOW, 0.6)):
        for loss in (0.0, 0.5, 1.0, 2.0, None):
            name = "as above" if loss is None else f"{loss} of the margin"
            effect = None if loss is None else loss * gate.MARGIN
            setting = Setting(noise=noise, shared=common, simple=0.1, simple_effect=effect)
            found = nights(effects, setting)
            lost = found["simple_loss"] / gate.MARGIN
            lines.append(
                f"{noise} | {common} | {name} | {found['simple_keeps'].mean():.2f} | {lost.mean():.2f} | "
                f"{share(lost > 2 + 1e-9)} | {each(found)}"
            )
    table(
        f"Simplifications, a tenth of the changes (125 runs, margin {gate.MARGIN}):",
        "noise | variance shared by equal seeds | true loss of each | kept per night for it | true losses together, "
        "margins | nights in which they exceed two margins, % | runs each",
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="a session's results.tsv, with the original's columns")
    parser.add_argument("--nights", type=int, default=1000)
    tables = {
        "noisy": noisy,
        "gains": gains,
        "false": false_nights,
        "disturbed": disturbed,
        "detectable": detectable,
        "simple": simplifications,
    }
    parser.add_argument("--only", choices=tables)
    parser.add_argument("--processes", type=int, help="all cores by default")
    options = parser.parse_args()
    effects = published(options.results) if options.results else fitted()
    began = time.monotonic()
    print(f"{len(effects)} effects, {np.mean(effects < 0):.1%} of them gains; {options.nights} nights each")
    with ProcessPoolExecutor(options.processes) as pool:
        nights = Nights(map if options.processes == 1 else partial(pool.map, chunksize=25), options.nights)
        for name, show in tables.items():
            if options.only in (None, name):
                show(nights, effects)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
