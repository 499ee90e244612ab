"""Effects as a share of training time, a unit that can be compared between machines: "in 0.81 of the time".

A baseline is trained for several times, and its score s is fitted against the time t, T being the session's:

    s(t) = a - b phi(ln(t / T)),    phi(x) = (1 - exp(-k x)) / k,    phi(x) = x for k = 0

It is a power law with an asymptote for k > 0 (Hestness et al., arXiv 1712.00409; Hoffmann et al., arXiv 2203.15556),
a straight line over log time for k = 0, and with that the transformation of Box & Cox (JRSS B 1964) of time.

A train.py that scores what the baseline would score after time t' is told as T / t'. If the two curves differ by a
factor of time, as curves of one shape do, it reaches the baseline's score in that share of the time; to run it for so
long confirms it. The interval inverts a test of each factor: the sum of squares over the curve's points and the effect,
least over a, b and k, against the squared quantile of Student's t (profile likelihood; for k fixed this is Fieller's
interval, JRSS B 1954). Times that do not lie on one curve with those nearer to T are left out; if three still do not,
all errors are taken to be as much larger (Birge, Phys. Rev. 1932). Beyond the times that were run nothing is
extrapolated: there a factor is only bounded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lab.compare.effects import TAIL, Effect
from lab.verdict.gate import t_quantile, t_tail

PARAMETERS = FEWEST = 3  # of a curve, and the times of training that it takes
SHAPES = [k / 10 for k in range(-5, 26)]  # of k: from learning that speeds up to learning that is all but over
REACH = 40.0  # above the least squares, up to which k is looked at: as far as an interval with one degree of freedom
FITS = 60  # steps in which it is
LEVEL, MISFIT = 0.05, 0.01  # at which a score that rises with time, or lies off the curve, is told from chance
HALVINGS = 30
TINY = 1e-9  # k below which rounding hides that it is not zero
STEP = SHAPES[1] - SHAPES[0]


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
            other, end = ("slow", f"at most {high}") if self.bounded == "fast" else ("fast", f"at least {low}")
            return told if other in self.beyond else f"{told} ({end})"
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
        return -math.expm1(-self.k * x) / self.k if abs(self.k) > TINY else x

    def at(self, score: float) -> float | None:
        """Log of the time, relative to T, at which the curve has a score; None if it never has."""
        y = (self.a - score) / self.b
        if abs(self.k) <= TINY:
            return y
        return -math.log1p(-self.k * y) / self.k if self.k * y < 1 else None


@dataclass
class Curve:
    """A baseline's score against its training time.

    Attributes:
        points: mean scores by seconds, and runs: how many each is of. budget: T.
        why_not: why it is no unit of measurement; "" if it is. Then `fits` has the curve for each k.
        noise: standard deviation of a run, by seconds. df: degrees of freedom of that.
        times: those that were fitted. What comes after a score that rises with time is left out.
        remark: what people should know of the fit; "" if there is nothing.
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

    @property
    def misfit(self) -> float:
        """By what the variances are multiplied: 1 unless the points scatter about the curve by more than chance."""
        larger = self.best.squares / max(1, len(self.times) - PARAMETERS)
        return larger if larger > t_quantile(MISFIT / 2, self.df) ** 2 else 1.0

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
        # Where the curve never comes to it: it ends above the score, or (k < 0) it began below.
        point = found - start if found is not None else ends[1] + 1 if fit.k > 0 else ends[0] - 1
        bounded = "fast" if point > ends[1] else "slow" if point < ends[0] else ""
        beyond_measured = {"fast": score <= self.points[self.times[-1]], "slow": score >= self.points[self.times[0]]}
        bounded = bounded if beyond_measured.get(bounded) else ""  # the baseline's own runs know better than the curve
        x = min(ends[1], max(ends[0], point))
        if effect.error is None:
            return Times(math.exp(-x), bounded=bounded)
        limit = fit.squares + self.misfit * t_quantile(TAIL, min(effect.df, self.df)) ** 2
        edges, beyond = [], []
        for end, name, other in ((ends[1], "fast", ends[0]), (ends[0], "slow", ends[1])):
            if squares(end) <= limit:
                beyond.append(name)
            inside = x if squares(x) <= limit else other
            # Else all of the interval is beyond one end.
            edges.append(_last(inside, end, lambda place: squares(place) <= limit) if squares(inside) <= limit else x)
        low, high = (math.exp(-edge) for edge in edges)
        return Times(
            math.exp(-x), low, high, bounded, tuple(beyond), None if bounded else self._log(effect, fit, start, x)
        )

    def _log(self, effect: Effect, fit: _Fit, start: float, x: float) -> Effect:
        """The effect in log time, with an error by the delta method (k fixed)."""
        slope = fit.b * math.exp(-fit.k * (start + x))
        along = fit.phi(start + x) - fit.phi(start)
        per = 1 / slope  # log time for a bit per byte here
        error = per * math.sqrt((effect.error or 0.0) ** 2 + self.misfit * along**2 * fit.variance)
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
    for i, later in enumerate(times):
        best = min(times[: i + 1], key=lambda t: points[t])
        if later != best and t_tail((points[later] - points[best]) / error(later, best), df) <= LEVEL:
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
    found.fits = _fits(found)
    while found.fits and found.misfit > 1 and len(found.times) > FEWEST:
        far = max(found.times, key=lambda t: abs(math.log(t / budget)))
        found.times = [t for t in found.times if t != far]
        found.fits = _fits(found)
    if left_out := [f"{t:g}" for t in times if t not in found.times]:
        said = f"{', '.join(left_out)} s are left out, as they lie on no curve with the others"
        found.remark = "; ".join(filter(None, [said, found.remark]))
    if not found.fits or t_tail(found.best.b / math.sqrt(found.best.variance * found.misfit), df) > LEVEL:
        found.fits = []
        found.why_not = "the baseline does not get better with time, by a curve through all of its times"
    elif found.misfit > 1:
        most = max(map(abs, found.residuals.values()))
        found.remark = f"its scores lie up to {most:.4f} off any such curve, which widens the intervals"
    return found


def _fits(found: Curve) -> list[_Fit]:
    """The curves for all k that an interval may reach, so close together that what is between them does not matter."""
    coarse = [fit for k in SHAPES if (fit := _fitted(k, found)).b > 0]
    if not coarse:
        return []
    near = min(coarse, key=lambda fit: fit.squares)
    low, high = max(SHAPES[0], near.k - STEP), min(SHAPES[-1], near.k + STEP)
    for _ in range(HALVINGS):  # towards the least squares
        one, other = (low + (high - low) * part for part in (0.4, 0.6))
        lower = _fitted(one, found).squares <= _fitted(other, found).squares
        low, high = (low, other) if lower else (one, high)
    best = _fitted((low + high) / 2, found)
    limit = best.squares + REACH * max(1.0, best.squares)
    low, high = (_last(best.k, end, lambda k: _fitted(k, found).squares <= limit) for end in (SHAPES[0], SHAPES[-1]))
    shapes = [best.k, *(low + (high - low) * i / FITS for i in range(FITS + 1))]
    return [fit for k in shapes if (fit := _fitted(k, found)).b > 0]


def _last(inside: float, outside: float, holds: Callable[[float], bool]) -> float:
    """How far one can go towards `outside` from where something holds."""
    if holds(outside):
        return outside
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


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
