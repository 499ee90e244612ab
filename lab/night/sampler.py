"""What to try next, from few trials of many parameters around something good: a Gaussian process ranks random steps.

Many steps from the best point are drawn, each in one to three parameters, near and far. A Gaussian process through all
trials says how much each is expected to improve. It learns which parameters matter, and what many trials say together
(benchmarks/proposer.py compares it with random search).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

AT_ONCE = 3  # parameters that change, at most
STEPS = 300  # that are drawn
NEARBY = 0.15  # of the distance between bounds: standard deviation of a small step
LENGTH = 0.35  # of it, over which scores are alike
MOST = 200  # trials that are looked at: the best half, and the latest
WORST = 3.0  # times the median loss: what is worse counts as that, and what failed
ROUNDS = 15  # of fitting
Point = dict[str, Any]  # parameter -> 0 to 1 between its bounds, or the index of its choice


class Trial(NamedTuple):
    """What was tried: where, its mean score (lower is better, None if it failed), and how many runs that rests on."""

    at: Point
    score: float | None
    runs: int


def ranked(
    best: Point,
    trials: list[Trial],
    choices: dict[str, int],
    noise: float,
    written: Callable[[Point], Point],
    rng: np.random.Generator,
) -> list[Point]:
    """Steps from the best point that were not tried, the most promising first.

    Args:
        best: the point to start from; one of the trials. choices: how many each parameter has, 0 for a number.
        noise: standard deviation of the score of one run.
        written: rounds a point to one that can be written down: whole numbers, few digits.
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
    steps = {_key(step): step for _ in range(STEPS) if (step := written(_step(best, good, choices, rng)))}
    for trial in trials:
        steps.pop(_key(trial.at), None)
    if not steps:
        return []
    points = list(steps.values())
    gain, error = model.gain(coordinates(choices, [best]), coordinates(choices, points))
    return [points[i] for i in np.argsort(-expected_improvement(gain, error))]


def _step(best: Point, good: list[Point], choices: dict[str, int], rng: np.random.Generator) -> Point:
    """The best point with one to three parameters drawn anew: anywhere, nearby, or from another good trial."""
    step = dict(best)
    for name in map(str, rng.choice(list(choices), min(len(choices), rng.integers(1, AT_ONCE + 1)), replace=False)):
        where = rng.random()
        if where < 0.25:
            step[name] = good[rng.integers(len(good))][name]
        elif choices[name]:
            step[name] = int(rng.integers(choices[name]))
        else:
            x = rng.random() if where < 0.6 else best[name] + NEARBY * rng.standard_normal()
            step[name] = min(max(x, 0.0), 1.0)
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
