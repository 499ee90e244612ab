"""Effects as a share of training time, a unit that can be compared between machines: "in 0.81 of the time".

A baseline is trained for several times, and its score s is fitted against the time t, T being the session's:

    s(t) = a - b phi(ln(t / T)),    phi(x) = (1 - exp(-k x)) / k,    phi(x) = x for k = 0

It is a power law with an asymptote for k > 0 (Hestness et al., arXiv 1712.00409; Hoffmann et al., arXiv 2203.15556),
a straight line over log time for k = 0, and with that the transformation of Box & Cox (JRSS B 1964) of time.

A train.py that scores what the baseline would score after time t' is told as T / t'. If the two curves differ by a
factor of time, as curves of one shape do, it reaches the baseline's score in that share of the time; to run it for so
long confirms it. The interval inverts a test of each factor: the sum of squares over the curve's points and the effect,
least over a, b and k, against the squared quantile of Student's t (profile likelihood; for k fixed this is Fieller's
interval, JRSS B 1954). Beyond the times that were run nothing is extrapolated: there a factor is only bounded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lab.compare.effects import TAIL, Effect
from lab.verdict.gate import t_quantile, t_tail

FEWEST = 3  # times of training that a curve takes: it has three parameters
SHAPES = [k / 10 for k in range(-5, 26)]  # of k: from learning that speeds up to learning that is all but over
LEVEL = 0.05  # at which a score that rises with time is told from chance
HALVINGS = 30


@dataclass(frozen=True)
class Times:
    """An effect as a factor of time: below 1 is better. A bound is the end of what was run, and is said to be one.

    Attributes:
        value, low, high: the factor and its 90 % interval; None where nothing was repeated.
        bounded: "fast" or "slow" if the factor itself is beyond the times that were run.
        beyond: which ends of the interval are, of "fast" and "slow".
        effect: in units of log time, for classes; None without an error, or where it is bounded.
    """

    value: float
    low: float | None = None
    high: float | None = None
    bounded: str = ""
    beyond: tuple[str, ...] = ()
    effect: Effect | None = None

    def __str__(self) -> str:
        told = {"fast": "less than ", "slow": "more than ", "": ""}[self.bounded] + f"{self.value:.2f} of the time"
        if self.low is None or self.high is None or self.low == self.high:
            return told
        low = "below " * ("fast" in self.beyond) + f"{self.low:.2f}"
        high = "above " * ("slow" in self.beyond) + f"{self.high:.2f}"
        if self.bounded:
            return f"{told} ({f'at most {high}' if self.bounded == 'fast' else f'at least {low}'})"
        return f"{told} ({low} to {high})"


@dataclass(frozen=True)
class _Fit:
    """The curve for one k: a, b, the variance of b, and the sum of squares."""

    k: float
    a: float
    b: float
    variance: float
    squares: float

    def phi(self, x: float) -> float:
        return -math.expm1(-self.k * x) / self.k if self.k else x

    def at(self, score: float) -> float | None:
        """Log of the time, relative to T, at which the curve has a score; None if it never has."""
        y = (self.a - score) / self.b
        if not self.k:
            return y
        return -math.log1p(-self.k * y) / self.k if self.k * y < 1 else None


@dataclass
class Curve:
    """A baseline's score against its training time.

    Attributes:
        points: mean scores by seconds, and runs: how many each is of. budget: T.
        why_not: why it is no unit of measurement; "" if it is. Then `fits` has the curve for each k.
        noise: standard deviation of a run, by seconds. df: degrees of freedom of that.
        times: those that were fitted. Scores that rise with time are left out, and said in `remark`.
    """

    points: dict[float, float]
    runs: dict[float, int]
    budget: float
    noise: Mapping[float, float]
    df: int
    why_not: str = ""
    remark: str = ""
    times: list[float] = field(default_factory=list)
    fits: list[_Fit] = field(default_factory=list)

    @property
    def best(self) -> _Fit:
        return min(self.fits, key=lambda fit: fit.squares)

    @property
    def residuals(self) -> dict[float, float]:
        """Scores minus the curve's, in bits per byte, by seconds."""
        fit = self.best
        return {t: self.points[t] - fit.a + fit.b * fit.phi(math.log(t / self.budget)) for t in self.times}

    def told(self, effect: Effect) -> Times | None:
        """An effect as a factor of time; None if its parent is beyond the times that were run."""
        fit, (first, last) = self.best, (math.log(t / self.budget) for t in (self.times[0], self.times[-1]))
        starts = {one.k: 0.0 if effect.parent_bpb is None else one.at(effect.parent_bpb) for one in self.fits}
        start = starts[fit.k]
        if start is None or not first <= start <= last:
            return None
        ends = first - start, last - start  # of the log of how much longer the baseline would have trained

        def squares(x: float) -> float:
            least = math.inf
            for one in self.fits:
                if (place := starts[one.k]) is not None:
                    along = one.phi(place + x) - one.phi(place)
                    spread = (effect.error or 0.0) ** 2 + along**2 * one.variance
                    miss = (effect.value + one.b * along) ** 2
                    least = min(least, one.squares + (miss / spread if spread else math.inf * bool(miss)))
            return least

        score = fit.a - fit.b * fit.phi(start) + effect.value
        found = fit.at(score)
        point = ends[1] + 1 if found is None else found - start
        bounded = "fast" if point > ends[1] else "slow" if point < ends[0] else ""
        x = min(ends[1], max(ends[0], point))
        if effect.error is None:
            return Times(math.exp(-x), bounded=bounded)
        limit = fit.squares + t_quantile(TAIL, min(effect.df, self.df)) ** 2
        edges, beyond = [], []
        for end, name, other in ((ends[1], "fast", ends[0]), (ends[0], "slow", ends[1])):
            if squares(end) <= limit:
                edges.append(end)
                beyond.append(name)
            else:
                inside, outside = (x, end) if squares(x) <= limit else (other, end)
                if squares(inside) > limit:  # all of the interval is beyond one end
                    inside = outside = x
                for _ in range(HALVINGS):
                    middle = (inside + outside) / 2
                    inside, outside = (middle, outside) if squares(middle) <= limit else (inside, middle)
                edges.append(inside)
        low, high = (math.exp(-edge) for edge in edges)
        return Times(
            math.exp(-x), low, high, bounded, tuple(beyond), None if bounded else self._log(effect, fit, start, x)
        )

    def _log(self, effect: Effect, fit: _Fit, start: float, x: float) -> Effect:
        """The effect in log time, with an error by the delta method (k fixed)."""
        slope = fit.b * math.exp(-fit.k * (start + x))
        along = fit.phi(start + x) - fit.phi(start)
        per = 1 / slope  # log time for a bit per byte here
        error = per * math.sqrt((effect.error or 0.0) ** 2 + along**2 * fit.variance)
        facts = {name: getattr(effect, name) for name in ("runs", "parent_runs", "biased", "known", "picked")}
        return Effect(-x, 0.0, error, min(effect.df, self.df), noise=per * effect.noise, **facts)


def curve(
    scores: Mapping[float, Sequence[float]], budget: float, noise: Mapping[float, float], df: int
) -> Curve | None:
    """The curve of a baseline.

    Args:
        scores: val_bpb of its runs by their seconds of training. budget: T, in seconds.
        noise: standard deviation of a run's score, by seconds. df: degrees of freedom of that.

    Returns:
        None if it was run for no other time than T.
    """
    points = {t: statistics.fmean(each) for t, each in sorted(scores.items()) if each}
    runs = {t: len(scores[t]) for t in points}
    found = Curve(points, runs, budget, noise, df)
    if budget not in points or len(points) < 2:
        return None

    def error(one: float, other: float) -> float:
        return math.sqrt(noise[one] ** 2 / runs[one] + noise[other] ** 2 / runs[other])

    times = list(points)
    best = min(times, key=lambda t: points[t])
    for later in times[times.index(best) + 1 :]:
        if t_tail((points[later] - points[best]) / error(later, best), df) <= LEVEL:
            found.remark = f"the baseline gets worse from {best:g} to {later:g} s of training"
            times = times[: times.index(best) + 1]
            break
    gain = points[times[0]] - points[times[-1]]
    if budget not in times or len(times) < 2 or t_tail(gain / error(times[0], times[-1]), df) > LEVEL:
        found.why_not = found.remark or (
            f"the baseline does not get better with time, from {times[0]:g} to {times[-1]:g} s, as far as can be told"
        )
    elif len(times) < FEWEST:
        found.why_not = f"the baseline has {len(times)} training times, and a curve needs {FEWEST}"
    if found.why_not:
        return found
    found.times = times
    found.fits = [fit for k in SHAPES if (fit := _fitted(k, found)).b > 0]
    return found


def _fitted(k: float, found: Curve) -> _Fit:
    """Weighted least squares of a and b."""
    empty = _Fit(k, 0.0, 0.0, 0.0, 0.0)
    xs = [-empty.phi(math.log(t / found.budget)) for t in found.times]
    ys, weights = [found.points[t] for t in found.times], [found.runs[t] / found.noise[t] ** 2 for t in found.times]
    total = math.fsum(weights)
    x_mean, y_mean = (math.fsum(w * v for w, v in zip(weights, values)) / total for values in (xs, ys))
    spread = math.fsum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs))
    b = math.fsum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys)) / spread
    a = y_mean - b * x_mean
    squares = math.fsum(w * (y - a - b * x) ** 2 for w, x, y in zip(weights, xs, ys))
    return _Fit(k, a, b, 1 / spread, squares)
