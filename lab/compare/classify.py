"""Does what one device found hold on another?

Let s be the effect of a change where it was found, measured since it was chosen (effects.py), and t the one elsewhere.

    holds       t goes the same way, and is half of s or more
    fades       t is less than half of s; what reverses has faded, too, and that may be all that is sure
    reverses    t goes the other way
    can't be told, and how many more runs would probably tell

In that order of asking:

1. **s has to be real.** Was the change chosen because it looked better, only that side is tested (at 5 %); else both
   (at 2.5 % each). If s is not real, t gets no class: over changes that do nothing anywhere at most 5 % get
   a class, whatever their t looks like, and with however many devices.
2. **The direction of t is tested on both sides**, at 2.5 % each: reverses, or the same way.
3. **t - s/2 is tested** below 0, at 5 %: fades, if t is also estimated to be within +-1/2 of s; else whether it fades
   or reverses is left open. The error holds that of s, with Satterthwaite's degrees of freedom: a difference instead
   of a ratio, so that there is no division by what may be near 0 (Fieller, JRSS B 1954).
4. **holds** asks for the same way, and for t to be estimated at s/2 or more. To ask that t > s/2 be shown as well would
   take four times the runs and more; what lies between is left open, and reported as going the same way.

No correction for several tests beyond that. "holds" and "fades" divide the values that t/s can have, "reverses" is a
part of what fades: to say what is false, the test of what is true has to fail (partitioning: Finner & Strassburger,
Annals of Statistics 2002). Levels are per change and device, as each is read by itself; a Bonferroni correction over
20 changes would take two thirds of what three runs each can show. Where t = s everywhere, fades and reverses need a
miss of t - s/2 that is larger than s/2. How often it is wrong, and how much it finds, is simulated in
benchmarks/compare.py.

With a source that was never measured again there is nothing to compare with: its biased effect is shown, and t's
with its interval, which stands by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lab.compare.effects import Effect, satterthwaite
from lab.verdict.gate import t_quantile, t_tail

CLASSES = HOLDS, FADES, REVERSES, OPEN = "holds", "fades", "reverses", "can't be told"
NO_RUNS = "unconfirmed", "its parent there is biased by selection"  # reasons that further runs of a replay don't remove
LEVEL = 0.05
HALF = 0.5  # of the source's effect: less has faded
POWER_Z = 0.8416  # standard errors that give a chance of 80 %
MOST = 30  # further runs that anybody is asked for
SHRUNK = 0.5  # of a biased effect: what is expected of it when it is measured


def classify(source: Effect, target: Effect) -> tuple[str, str, dict | None]:
    """(class, why, further runs of the change and its parent each that would probably tell, {"here": n, "source": n},
    or None)."""
    if target.error is None or source.error is None:
        where = "here" if target.error is None else "where it was found"
        return OPEN, f"{NO_RUNS[0]}: nothing was repeated {where}", None
    if source.biased and not source.picked:  # no replay takes it, which could measure it
        return OPEN, NO_RUNS[1], None
    if source.biased or not real(source):
        why = "not measured since it was selected" if source.biased else "may be chance where it was found"
        return OPEN, why, _asked(0, _to_be_real(source))
    if target.biased:
        return OPEN, "its parent here is biased by selection: replay --each", _asked(*_to_tell(source, target))
    sign = math.copysign(1, source.value)
    t, s = sign * target.value, abs(source.value)
    share = f"{t / s:+.0%} of the effect where it was found"
    if t_tail(-t / target.error, target.df) <= LEVEL / 2:
        return REVERSES, share, None
    gap, error, df = _gap(source, target)
    less = t_tail(-gap / error, df) <= LEVEL
    same = t_tail(t / target.error, target.df) <= LEVEL / 2
    if less and t >= -HALF * s:
        return FADES, share, None
    if same and not less and t >= HALF * s:
        return HOLDS, share, None
    why = "it fades or reverses" if less else "the same direction, size unknown" if same else "may be chance here"
    return OPEN, why, _asked(*_to_tell(source, target))


def real(effect: Effect) -> bool:
    """Whether an effect with an error is told from chance: better, if that is what it was chosen for; else any way."""
    error = math.sqrt(effect.variance)
    if effect.known:
        return t_tail(-effect.value / error, effect.df) <= LEVEL
    return t_tail(abs(effect.value) / error, effect.df) <= LEVEL / 2


def _gap(source: Effect, target: Effect) -> tuple[float, float, int]:
    """t - s/2, with s above 0; its standard error, and degrees of freedom."""
    parts = [(target.variance, target.df), _half(source)]
    gap = math.copysign(1, source.value) * target.value - HALF * abs(source.value)
    return gap, math.sqrt(math.fsum(v for v, _ in parts)), satterthwaite(parts)


# --- How many more runs ---


def _asked(here: int | None, source: int | None) -> dict | None:
    return None if here is None or source is None else {"here": here, "source": source}


def _after(effect: Effect, n: int) -> tuple[float, int]:
    """(variance, degrees of freedom) once n more runs of the change and of its parent each are there."""
    known = 0.0 if effect.biased else 1 / effect.variance
    return 1 / (known + n / (2 * effect.noise**2)), effect.df + 2 * n


def _fewest(told: Callable[[int], bool], least: int = 1) -> int | None:
    """The smallest number of further runs that would tell."""
    return next((n for n in range(least, MOST + 1) if told(n)), None)


def _shows(size: float, parts: list[tuple[float, int]], level: float) -> bool:
    """Whether an effect of a size probably stands out of chance: of (variance, degrees of freedom), which add up."""
    error = math.sqrt(math.fsum(variance for variance, _ in parts))
    return size / error >= t_quantile(level, satterthwaite(parts)) + POWER_Z


def _to_be_real(source: Effect) -> int | None:
    """Further runs that would probably show a source's effect, if it is about as large as it looks."""
    if source.known and source.value >= 0:
        return None
    size = abs(source.value) * (SHRUNK if source.biased else 1)
    level = LEVEL if source.known or source.biased else LEVEL / 2
    return _fewest(lambda n: _shows(size, [_after(source, n)], level))


def _half(source: Effect, more: int = 0) -> tuple[float, int]:
    """(variance, degrees of freedom) of half of a source's effect, after so many more runs."""
    variance, df = _after(source, more) if more else (source.variance, source.df)
    return HALF**2 * variance, df


def _to_tell(source: Effect, target: Effect) -> tuple[int | None, int | None]:
    """(here, at the source) further runs that would probably tell an effect as large as the source's from none: here
    alone if that can do, else in both. Where those that there are should have told, it may be half of the source's."""
    size = abs(source.value)
    for both in (0, 1):

        def told(n: int, both: int = both) -> bool:
            here = _after(target, n)
            return _shows(size, [here], LEVEL / 2) and _shows(HALF * size, [here, _half(source, n * both)], LEVEL)

        n = _fewest(told, int(target.biased))
        if n is not None:
            return (n, n * both) if n else (_near_half(source, target), 0)
    return None, None


def _near_half(source: Effect, target: Effect) -> int | None:
    """Further runs here that would probably tell, if the effect here is what it seems."""
    size, gap = abs(target.value), abs(_gap(source, target)[0])

    def told(n: int) -> bool:
        here, half = _after(target, n), _half(source)
        if size < HALF * abs(source.value):
            return _shows(gap, [here, half], LEVEL)
        # Which way it goes is to be shown, and the rest to be seen.
        return _shows(size, [here], LEVEL / 2) and gap / math.sqrt(here[0] + half[0]) >= POWER_Z

    return _fewest(told)
