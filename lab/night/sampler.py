"""An Optuna sampler for few trials of many parameters that start from something good.

Many steps from the best are thought of, each in one to three parameters, near and far; a Gaussian process through all
trials says of which most is to be expected. It learns which parameters matter, and what many trials say together. On
recorded results it finds more than Optuna's tree-structured Parzen estimator (benchmarks/proposer.py).
"""

from __future__ import annotations

import math

import numpy as np
import optuna

AT_ONCE = 3  # parameters that change, at most
STEPS = 300  # that are thought of
NEARBY = 0.15  # of the distance between bounds: standard deviation of a small step
LENGTH = 0.35  # of it, over which scores are alike
MOST = 200  # trials that are looked at: the best half, and the latest
WORST = 3.0  # times the median loss: what is worse counts as that, and what failed
ROUNDS = 15  # of fitting


class StepSampler(optuna.samplers.BaseSampler):
    """Asks for steps from one point, the most promising first.

    Trials are of floats from 0 to 1 and of categories 0, 1, ...; each has a user attribute "runs", of which its value
    is the mean. Failed ones count as bad.

    Args:
        best: the parameters to start from; one of the trials. noise: standard deviation of a run.
        written: function(parameters) -> those that are really meant: whole numbers, few digits.
    """

    def __init__(self, best: dict, noise: float, written, rng: np.random.Generator):
        self.best, self.noise, self.written, self.rng, self.ranked = best, noise, written, rng, None

    def infer_relative_search_space(self, study, trial):
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.best[param_name]

    def sample_relative(self, study, trial, search_space):
        """The next best; where there is none, the best point again."""
        if self.ranked is None:
            self.ranked = iter(self._ranked(study.get_trials(deepcopy=False), search_space))
        return next(self.ranked, self.best)

    def _ranked(self, trials, space) -> list[dict]:
        trials = [trial for trial in trials if trial.state.is_finished()]
        at = next(i for i, trial in enumerate(trials) if trial.params == self.best)
        losses = np.array([np.inf if one.value is None else one.value - trials[at].value for one in trials])
        if len(trials) > MOST:
            chosen = sorted({at, *np.argsort(losses)[: MOST // 2], *range(len(trials) - MOST // 2, len(trials))})
            trials, losses = [trials[i] for i in chosen], losses[chosen]
        worse = losses[(losses > 0) & np.isfinite(losses)]
        losses = np.minimum(losses, max(WORST * np.median(worse) if len(worse) else 0.0, 4 * self.noise))
        model = Model(
            coordinates(space, [trial.params for trial in trials]),
            losses,
            np.array([self.noise**2 / max(trial.user_attrs["runs"], 1) for trial in trials]),
        )
        good = [trials[i].params for i in np.argsort(losses)[: max(3, len(trials) // 5)]]
        known = {key(trial.params) for trial in trials}
        steps = [self.written(self._step(space, good)) for _ in range(STEPS)]
        steps = list({key(step): step for step in steps if key(step) not in known}.values())
        if not steps:
            return []
        gain, error = model.gain(coordinates(space, [self.best]), coordinates(space, steps))
        return [steps[i] for i in np.argsort(-expected(gain, error))]

    def _step(self, space, good: list[dict]) -> dict:
        """The best point with one to three parameters drawn anew: anywhere, nearby, or from another good trial."""
        step, rng = dict(self.best), self.rng
        for name in rng.choice(list(space), min(len(space), rng.integers(1, AT_ONCE + 1)), replace=False):
            where = rng.random()
            if where < 0.25:
                step[name] = good[rng.integers(len(good))][name]
            elif hasattr(space[name], "choices"):
                step[name] = int(rng.integers(len(space[name].choices)))
            else:
                x = rng.random() if where < 0.6 else self.best[name] + NEARBY * rng.standard_normal()
                step[name] = min(max(x, 0.0), 1.0)
        return step


def key(parameters: dict) -> tuple:
    return tuple(sorted((name, round(x, 9)) for name, x in parameters.items()))


def coordinates(space: dict, rows: list[dict]) -> np.ndarray:
    """Parameters as an array (rows, n): of a category, a column for each."""
    return np.array(
        [
            [
                x
                for name, one in space.items()
                for x in (
                    [0.5 * (row[name] == choice) for choice in one.choices] if hasattr(one, "choices") else [row[name]]
                )
            ]
            for row in rows
        ],
        float,
    )


def expected(gain: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Expected improvement, where gains are normal with these means and standard deviations."""
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

    def _covariance(self, a, b):
        return np.tensordot(self.scales, self._parts(a, b), 1)

    @staticmethod
    def _parts(a, b):
        """Of coordinates (m, n) and (k, n): (n + 1, m, k)."""
        squares = np.moveaxis(((a[:, None] - b) / LENGTH) ** 2, -1, 0)
        return np.exp(-0.5 * np.concatenate([squares, squares.sum(0, keepdims=True) / 4]))
