"""What to try next, from few trials of many parameters around something good: small steps, which a model ranks.

Steps from the best point are drawn in one to three parameters, as large as those that helped in published ledgers
(findings/steps.tsv, fitted by benchmarks/steps.py). How far they reach is a trust region, which the caller widens and
narrows. More and more of them, in the end almost half, are drawn from anywhere: these tell the model of the whole. A
Gaussian process through all trials says how much each is expected to improve. benchmarks/proposer.py compares it with
random search.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FITTED = Path(__file__).resolve().parents[2] / "findings" / "steps.tsv"
# Kinds of variables by name, and the scale that their steps are measured on: that of the logarithm of x or of 1 - x.
KINDS = {"rate": "log", "penalty": "log", "moment": "decay", "part": "linear", "batch": "log", "size": "log"}
NAMED = (
    (r"_LR$", "rate"),
    (r"(AVERAGE|EMA)_DECAY", "moment"),
    (r"DECAY", "penalty"),
    (r"BETAS?\d?\b|MOMENTUM(\[|$)", "moment"),
    (r"WARM|RATIO$|FRACTION|SHARE", "part"),
    (r"BATCH", "batch"),
)
SHAPES = re.compile(r"ASPECT_RATIO|MLP_RATIO|KV_RATIO")
AT_ONCE = 3  # parameters that change, at most. What one of them does by itself, noise would hide
FURTHEST = 1.5  # median steps: how far one goes where the trust region is as it begins
ANYWHERE, AFTER = 0.45, 20  # share of steps to anywhere, at most, and after how many trials
DRAWN = 300  # steps
LENGTH = 0.35  # of the distance between bounds, over which scores are alike
MOST = 200  # trials that are looked at: the best half, and the latest
WORST = 3.0  # times the median loss: what is worse counts as that, and what failed
ROUNDS = 15  # of fitting
Point = dict[str, Any]  # parameter -> 0 to 1 between its bounds, or the index of its choice


class Trial(NamedTuple):
    """What was tried: where, its mean score (lower is better, None if it failed), and how many runs that rests on."""

    at: Point
    score: float | None
    runs: int


class Step(NamedTuple):
    """How a parameter is changed: the median size of a step, between 0 and 1, the standard deviation of its logarithm,
    and how likely one is to help."""

    size: float
    spread: float
    helped: float


def kind_of(name: str) -> str:
    """The kind of a variable, one of KINDS."""
    if SHAPES.search(name):
        return "size"
    return next((kind for words, kind in NAMED if re.search(words, name)), "size")


@functools.lru_cache(maxsize=1)
def prior() -> dict[str, Step]:
    """The steps by kind that helped in published ledgers, on the kind's scale."""
    with open(FITTED, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row["kind"]: Step(float(row["step"]), float(row["spread"]), float(row["helped"])) for row in rows}


def ranked(
    best: Point,
    trials: list[Trial],
    choices: dict[str, int],
    noise: float,
    written: Callable[[Point], Point],
    rng: np.random.Generator,
    steps: dict[str, Step],
    reach: float = 1.0,
) -> list[Point]:
    """Steps from the best point that were not tried, the most promising first.

    Args:
        best: the point to start from; one of the trials. choices: how many each parameter has, 0 for a number.
        noise: standard deviation of the score of one run.
        written: rounds a point to one that can be written down: whole numbers, few digits.
        steps: of each parameter. reach: what their sizes are multiplied with.
    """
    start = next(i for i, trial in enumerate(trials) if trial.at == best)
    losses = np.array([np.inf if t.score is None else t.score - (trials[start].score or 0.0) for t in trials])
    if len(trials) > MOST:
        chosen = sorted({start, *np.argsort(losses)[: MOST // 2], *range(len(trials) - MOST // 2, len(trials))})
        trials, losses = [trials[i] for i in chosen], losses[chosen]
    worse = losses[(losses > 0) & np.isfinite(losses)]
    losses = np.minimum(losses, max(WORST * np.median(worse) if len(worse) else 0.0, 4 * noise))
    variances = np.array([noise**2 / max(trial.runs, 1) for trial in trials])
    model = Model(coordinates(choices, [trial.at for trial in trials]), losses, variances)
    good = [trials[i].at for i in np.argsort(losses)[: max(3, len(trials) // 5)]]
    drawn = {}
    for _ in range(DRAWN):
        point = written(_step(best, good, choices, steps, reach, len(trials), rng))
        drawn[_key(point)] = point
    for trial in trials:
        drawn.pop(_key(trial.at), None)
    if not drawn:
        return []
    points = list(drawn.values())
    gain, error = model.gain(coordinates(choices, [best]), coordinates(choices, points))
    return [points[i] for i in np.argsort(-expected_improvement(gain, error))]


def _step(best: Point, good: list[Point], choices: dict, steps: dict, reach: float, trials: int, rng) -> Point:
    """The best point with one to three parameters changed: by a step, or to what another good trial has."""
    step, names = dict(best), list(choices)
    chances = np.array([steps[name].helped for name in names])
    count = min(len(names), rng.integers(1, AT_ONCE + 1))
    anywhere = ANYWHERE * min(1.0, trials / AFTER)
    for name in map(str, rng.choice(names, count, replace=False, p=chances / chances.sum())):
        if rng.random() < 0.25:
            step[name] = good[rng.integers(len(good))][name]
        elif choices[name]:
            step[name] = int(rng.integers(choices[name]))
        elif rng.random() < anywhere:
            step[name] = rng.random()
        else:
            size = min(math.exp(steps[name].spread * rng.standard_normal()), FURTHEST) * reach * steps[name].size
            step[name] = min(max(best[name] + size * rng.choice((-1, 1)), 0.0), 1.0)
    return step


def _key(point: Point) -> tuple:
    return tuple(sorted((name, round(x, 9)) for name, x in point.items()))


def coordinates(choices: dict[str, int], points: list[Point]) -> np.ndarray:
    """Points as an array (points, n): a column for each number, and one for each choice of the others."""
    columns = []
    for name, count in choices.items():
        places = np.array([point[name] for point in points], float)[:, None]
        columns.append(0.5 * (places == np.arange(count)) if count else places)
    return np.hstack(columns)


def expected_improvement(gain: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Where gains are normal with these means and standard deviations (Jones et al., J. Global Optimization 1998)."""
    z = gain / error
    below = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in z])
    return gain * below + error * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


class Model:
    """A Gaussian process: a sum of one smooth function of each coordinate, and one of all. How much each of them varies
    is what makes the data likeliest (variance components, by the MM algorithm of Zhou et al., JCGS 2019).

    Args:
        x: coordinates (trials, n). y: (trials,) losses. variances: (trials,) of their noise.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, variances: np.ndarray):
        self.x, parts, noise = x, self._parts(x, x), np.diag(variances)
        first = max(y.var(), variances.max()) / len(parts)
        self.scales = np.full(len(parts), first)
        for _ in range(ROUNDS):
            inverse = np.linalg.inv(np.tensordot(self.scales, parts, 1) + noise)
            solved = inverse @ y
            ratio = ((parts @ solved) @ solved) / np.tensordot(parts, inverse, 2)
            self.scales = np.maximum(self.scales * np.sqrt(ratio), 0.01 * first)  # nothing is ruled out
        self.inverse = np.linalg.inv(np.tensordot(self.scales, parts, 1) + noise)
        self.solved = self.inverse @ y

    def gain(self, here: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much lower losses are there (m, n) than here (1, n), and the standard deviation of that: both (m,)."""
        known = self._covariance(there, self.x) - self._covariance(here, self.x)
        prior = 2 * self.scales.sum() - 2 * self._covariance(there, here)[:, 0]
        variance = prior - np.einsum("ij,jk,ik->i", known, self.inverse, known, optimize=True)
        return -known @ self.solved, np.sqrt(np.maximum(variance, 1e-18))

    def _covariance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.tensordot(self.scales, self._parts(a, b), 1)

    @staticmethod
    def _parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The kernels (n + 1, m, k) between coordinates (m, n) and (k, n)."""
        squares = np.moveaxis(((a[:, None] - b) / LENGTH) ** 2, -1, 0)
        return np.exp(-0.5 * np.concatenate([squares, squares.sum(0, keepdims=True) / 4]))
