"""How much a change moved val_bpb, from the runs that may be believed.

A change is kept because its runs looked good, so those runs are biased in its favour, most of all where gains are as
small as the noise ("winner's curse": Zöllner & Pritchard, American Journal of Human Genetics 2007; Gelman & Carlin,
Perspectives on Psychological Science 2014). Runs made later are unbiased. So

- of a change that a session chose for its scores (kept it, or remembers it as a near miss) count only runs that were
  made after its verdict; and of its parent too, for what the parent scored until then had the same part in the choice;
- of a parent that was chosen itself count only runs made after its own verdict; a baseline nobody chose;
- a change that came from elsewhere (a replay) was not chosen here: all of its runs count.

Where that leaves nothing, the effect is what the session saw, and marked as biased. In an ordinary session that is
the rule: what it kept is hardly run again. A replay of it on the same kind of device, on the baseline and with several
runs each, is what measures it; confirmations count, too.

Errors come from the session's own noise, pooled over all that it repeated (gate.pooled). Changes that are measured
beside one baseline share its error; each of their intervals is right, but they miss together.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.session.state import Run, conditions
from lab.verdict import gate

Z = 1.6449  # of a 90 % interval
FEWEST_PAIRS = 4  # Fisher's interval needs n - 3 of them
TAIL = 0.05  # on each side of an interval
FASTER = 0.05  # more or fewer tokens than this share are more or fewer
# What is said of a biased effect, by `picked`. If only its parent is biased, a change looks worse than it is.
FLATTERED = {True: "biased by selection", False: "its parent is biased by selection"}


# --- What a run measured ---


def quantity(run: Run, name: str) -> float | None:
    """A figure of a run: "tokens" that it was trained on, the model's "flops" for all of them, "memory" at the peak
    (GiB), "watts" while it trained, "joules_per_M" tokens, or a measure by its name in results.py. None if it is
    unknown."""
    if name == "tokens":
        return _scaled(quantity(run, "total_tokens_M"), 1e6)
    if name == "memory":
        return _scaled(quantity(run, "peak_vram_mb"), 1 / 1024)
    if name == "watts" and "watts" not in run.result:  # some ledgers have them
        joules, seconds = quantity(run, "joules"), quantity(run, "training_seconds")
        longer = (
            (1 + max(0.0, run.disturbance)) * seconds + (quantity(run, "paused_seconds") or 0.0) if seconds else None
        )
        return _scaled(joules, 1 / longer if longer else None)
    if name == "joules_per_M":
        joules, tokens = quantity(run, "joules"), quantity(run, "total_tokens_M")
        return _scaled(joules, 1 / tokens if tokens else None) or _scaled(quantity(run, "joules_per_token"), 1e6)
    if name == "flops":
        per_token, rate = quantity(run, "flops_per_token"), quantity(run, "tokens_per_second")
        if per_token is None and rate is not None:  # of a ledger
            per_token = _scaled(quantity(run, "model_tflops"), 1e12 / rate)
        return _scaled(quantity(run, "tokens"), per_token)
    return run.measured(name)


def _scaled(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def mean(runs: Sequence[Run], name: str = "val_bpb") -> float | None:
    """The mean of a figure, over the runs that have it."""
    known = [value for run in runs if (value := quantity(run, name)) is not None]
    return statistics.fmean(known) if known else None


# --- Effects ---


@dataclass(frozen=True)
class Effect:
    """How much a change moved val_bpb in one place."""

    value: float  # bits per byte; below 0 is better
    relative: float  # to its parent's val_bpb
    error: float | None = None  # standard error; None in a ledger without repeats
    df: int = 0  # degrees of freedom of that
    low: float | None = None  # its 90 % interval; Student's, made of these, unless another is given
    high: float | None = None
    noise: float = 0.0  # standard deviation of a run
    runs: int = 1  # that it rests on
    parent_runs: int = 1
    biased: bool = False  # it rests on runs that it, or its parent, was chosen for: nothing was measured since
    known: bool = False  # which way it goes was known before these runs, better that is: one side is enough to test
    picked: bool = False  # the change itself was chosen for its scores here; else, if biased, only its parent was
    shrunk: bool = False  # a posterior mean: its prior has pulled it to 0
    tokens: float | None = None  # of the change relative to its parent's; None if unknown
    flops: float | None = None
    parent_bpb: float | None = None  # val_bpb of its parent; None if that is the baseline

    def __post_init__(self):
        if self.error is not None and self.low is None:
            half = gate.t_quantile(TAIL, self.df) * self.error
            object.__setattr__(self, "low", self.value - half)
            object.__setattr__(self, "high", self.value + half)

    @property
    def variance(self) -> float:
        """The variance of the value. ValueError where nothing was repeated."""
        if self.error is None:
            raise ValueError("nothing was repeated: this effect has no error")
        return self.error**2

    @property
    def sure(self) -> bool:
        """Whether its interval means what it says: chance was measured, and it was not chosen for its size."""
        return self.error is not None and not self.biased


def between(own: Sequence[Run], others: Sequence[Run], noise: gate.Noise | None, **facts) -> Effect:
    """The effect between runs and others, each with a val_bpb; what the runs' conditions explain is taken out, as the
    verdict does. facts: fields of the Effect that runs don't give."""
    base = statistics.fmean(run.bpb for run in others)
    value = statistics.fmean(run.bpb for run in own) - base
    if noise:
        weights = (1 / len(own), own), (-1 / len(others), others)
        moved, *variances = noise.explains((weight, one) for weight, runs in weights for one in conditions(runs))
        value -= moved
        error = noise.sd * math.sqrt(1 / len(own) + 1 / len(others) + sum(variances))
        facts |= {"error": error, "df": noise.df, "noise": noise.sd}
    ratios = {name: _ratio(mean(own, name), mean(others, name)) for name in ("tokens", "flops")}
    return Effect(value, value / base, runs=len(own), parent_runs=len(others), **ratios, **facts)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def together(effects: list[Effect]) -> Effect | None:
    """The effect in several sessions of one place: sure ones weighted by their inverse variances, else the first."""
    sure = [effect for effect in effects if effect.sure]
    if len(sure) < 2:
        return next(iter(sure or effects), None)
    weights = [1 / effect.variance for effect in sure]
    total = math.fsum(weights)

    def average(name):
        values = [getattr(effect, name) for effect in sure]
        return None if None in values else math.fsum(w * value for w, value in zip(weights, values)) / total

    facts: dict[str, Any] = {name: average(name) for name in ("value", "relative", "noise", "tokens", "flops")}
    facts |= {name: sum(getattr(effect, name) for effect in sure) for name in ("runs", "parent_runs")}
    facts["parent_bpb"] = average("parent_bpb")
    df = satterthwaite([(weight / total**2, effect.df) for weight, effect in zip(weights, sure)])
    return Effect(error=1 / math.sqrt(total), df=df, known=all(effect.known for effect in sure), **facts)


def due(effect: Effect) -> str:
    """What an effect was due to: a run ends by the clock, so that a faster train.py reads more tokens. "" if it is not
    known, or the effect may be chance."""
    tokens = effect.tokens
    if tokens is None or effect.low is None or effect.high is None or effect.low <= 0 <= effect.high:
        return ""
    amount = ("more" if tokens >= 1 + FASTER else "fewer" if tokens <= 1 - FASTER else "as many") + " tokens"
    if effect.value < 0:
        return amount if amount == "more tokens" else f"{amount}, better per token"
    return amount if amount == "fewer tokens" else f"{amount}, worse per token"


# --- Statistics ---


def satterthwaite(parts: list[tuple[float, int]]) -> int:
    """Degrees of freedom of a sum of estimated variances, (variance, its degrees of freedom) each, rounded down
    (Satterthwaite, Biometrics Bulletin 1946)."""
    return max(1, math.floor(math.fsum(v for v, _ in parts) ** 2 / math.fsum(v * v / df for v, df in parts) + 1e-9))


def wilson(same: int, n: int) -> tuple[float, float]:
    """90 % interval of a share, n above 0 (Wilson, JASA 1927): it stays within 0 and 1, and is not empty at either."""
    share, spread = same / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def shrunken(counts: Sequence[tuple[int, int]]) -> list[tuple[float, float, float]]:
    """(rate, low, high) of each of several shares of a kind, (successes, trials), drawn towards what all of them have
    in common, the more the fewer trials one has; the intervals hold 90 %. The hierarchical beta-binomial model of
    Gelman et al., Bayesian Data Analysis, 3rd ed., 5.3, on a grid: the common mean is uniform, what it weighs, in
    trials, log-uniform from 1 to 300."""
    import numpy as np  # here, because what only reads a session shall start fast

    middles, weights = (np.arange(40) + 0.5) / 40, np.geomspace(1, 300, 16)
    a, b = (np.outer(side, weights).ravel() for side in (middles, 1 - middles))
    log_beta = np.vectorize(lambda x, y: math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y))
    likelihood = sum(log_beta(a + k, b + n - k) - log_beta(a, b) for k, n in counts)
    share = np.exp(likelihood - np.max(likelihood))
    share /= share.sum()
    rates, found = (np.arange(400) + 0.5) / 400, []
    up, down = np.log(rates)[:, None], np.log1p(-rates)[:, None]
    for k, n in counts:
        density = np.exp((a + k - 1) * up + (b + n - k - 1) * down - log_beta(a + k, b + n - k)) @ share
        density /= density.sum()
        low, high = np.interp([TAIL, 1 - TAIL], np.cumsum(density), rates + 0.5 / 400)
        found.append((float(rates @ density), float(low), float(high)))
    return found


def odds_ratio(tables: Sequence[tuple[int, int, int, int]]) -> tuple[float, float, float] | None:
    """(ratio, low, high): the odds of success of some relative to those of others, the same in each of several groups,
    with its 90 % interval (Mantel & Haenszel, JNCI 1959; the variance of Robins, Breslow & Greenland, Biometrics 1986).

    Args:
        tables: of each group (successes, trials, successes of the others, their trials).

    Returns:
        None where one side has no success, or no failure, beside the other's.
    """
    parts = []  # of each group: what speaks for it, what against it, and the share that agrees
    for k, n, others_k, others_n in tables:
        if total := n + others_n:
            agree = (k + others_n - others_k) / total
            parts.append((k * (others_n - others_k) / total, (n - k) * others_k / total, agree))
    more, less = (math.fsum(part[i] for part in parts) for i in (0, 1))
    if not more or not less:
        return None
    mixed = math.fsum(p * s + (1 - p) * r for r, s, p in parts)
    variance = math.fsum(p * r for r, _, p in parts) / more**2 + math.fsum((1 - p) * s for _, s, p in parts) / less**2
    middle, half = math.log(more / less), Z * math.sqrt((variance + mixed / (more * less)) / 2)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float] | None:
    """(rho, low, high): correlation of ranks and its 90 % interval, by Fisher's z with the variance
    (1 + rho^2/2)/(n - 3) of Bonett & Wright, Psychometrika 2000. None with fewer than FEWEST_PAIRS, or where one side
    has but one value."""
    if len(xs) < FEWEST_PAIRS or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    rho = statistics.correlation(ranks(xs), ranks(ys))
    most = 1 - 1 / len(xs)  # Fisher's z of 1 is infinite
    z, half = math.atanh(max(-most, min(most, rho))), Z * math.sqrt((1 + rho * rho / 2) / (len(xs) - 3))
    return rho, min(rho, math.tanh(z - half)), max(rho, math.tanh(z + half))


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values have the mean of their places."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values]
