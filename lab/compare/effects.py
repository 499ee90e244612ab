"""How much a change moved val_bpb, from the runs that may be believed.

What was kept was kept because its runs looked good, so those runs flatter it, most of all where gains are as small as
the noise ("winner's curse": Zöllner & Pritchard, American Journal of Human Genetics 2007; Gelman & Carlin,
Perspectives on Psychological Science 2014). The cure is to look again. So

- of a change that a session chose for its scores (kept it, or remembers it as a near miss) count only runs that were
  made after its verdict; and of its parent too, for what the parent scored until then had the same part in the choice;
- of a parent that was chosen itself count only runs made after its own verdict; a baseline nobody chose;
- a change that came from elsewhere (a replay) was not chosen here: all of its runs count.

Where that leaves nothing, the effect is what the session saw, and marked as flattered. In an ordinary session that is
the rule: what it kept is hardly run again. A replay of it on the same kind of device, on the baseline and with several
runs each, is what measures it; confirmations count, too.

Errors come from the session's own noise, pooled over all that it repeated (gate.pooled). Changes that are measured
beside one baseline share its error; each of their intervals is right, but they miss together.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache

from lab.verdict import gate
from lab.compare.record import Change, Record, Trial

quantile = lru_cache(maxsize=None)(gate.t_quantile)  # of few levels and degrees of freedom, thousands of times
TAIL = 0.05  # on each side of an interval
FASTER = 0.05  # more or fewer tokens than this share are more or fewer
# Of an effect that is flattered, by `picked`: if its parent alone flatters itself, a change looks the worse for it.
FLATTERED = {True: "as selected: flatters itself", False: "against a parent that flatters itself"}


@dataclass(frozen=True)
class Effect:
    """How much a change moved val_bpb in one place.

    Attributes:
        value: bits per byte; below 0 is better. relative: to its parent's val_bpb.
        error, df: its standard error, and the degrees of freedom of that; None in a ledger without repeats.
        low, high: Student's 90 % interval; None likewise.
        noise: standard deviation of a run; None likewise.
        runs, parent_runs: how many it rests on.
        flattered: it rests on runs that the change, or its parent, was chosen for; nothing was measured since.
        known: which way it goes was known before these runs, better that is, so that one side is enough to test.
        picked: the change itself was chosen for its scores here; else, if flattered, only its parent was.
        tokens, flops: of the change relative to its parent's; None if unknown.
    """

    value: float
    relative: float
    error: float | None = None
    df: int | None = None
    low: float | None = None
    high: float | None = None
    noise: float | None = None
    runs: int = 1
    parent_runs: int = 1
    flattered: bool = False
    known: bool = False
    picked: bool = False
    tokens: float | None = None
    flops: float | None = None

    @property
    def sure(self) -> bool:
        """Whether its interval means what it says: chance was measured, and it was not chosen for its size."""
        return self.error is not None and not self.flattered


def chosen(change: Change) -> bool:
    """Whether a session picked it for its scores."""
    return change.number > 0 and not change.origin and (change.status == "keep" or change.near_miss)


def counted(record: Record, change: Change) -> list[Trial]:
    """The runs of a change under its session's conditions; none of one whose scores are not believed."""
    if change.status not in ("keep", "discard"):
        return []
    return [t for t in change.trials if record.usual(t) and t.eval == record.eval]


def mean(record: Record, change: Change) -> float | None:
    """val_bpb as the session saw it: confirmations left out."""
    scores = [t.bpb for t in counted(record, change) if not t.confirms]
    return statistics.fmean(scores) if scores else None


def effect(record: Record, change: Change) -> Effect | None:
    """Of a change on top of its parent, in its own session; None where one of them has no score."""
    if change.parent is None or (parent := record.changes.get(change.parent)) is None:
        return None
    own, others = counted(record, change), counted(record, parent)
    if not own or not others:
        return None
    picked = chosen(change)
    # A parent was picked for its scores wherever it came from: it is the parent because it was kept.
    after = change.number if picked else parent.number if parent.number > 0 else -1
    later = [t for t in own if t.beside > change.number] if picked else own
    since = [t for t in others if t.beside > after]
    sure = record.noise is not None and bool(later and since)
    own, others = (later, since) if sure else (own, others)
    found = between(own, others, record.noise)
    return replace(
        found, flattered=record.noise is not None and not sure, known=bool(change.origin) or picked, picked=picked
    )


def between(own: list[Trial], others: list[Trial], noise: gate.Noise | None) -> Effect:
    """Of runs, on top of others."""
    base = statistics.fmean(t.bpb for t in others)
    value = statistics.fmean(t.bpb for t in own) - base
    error = noise.sd * math.sqrt(1 / len(own) + 1 / len(others)) if noise else None
    return interval(
        Effect(
            value,
            value / base,
            error,
            noise and noise.df,
            noise=noise and noise.sd,
            runs=len(own),
            parent_runs=len(others),
            tokens=ratio(own, others, "tokens"),
            flops=ratio(own, others, "flops"),
        )
    )


def interval(one: Effect) -> Effect:
    """With its interval."""
    if one.error is None:
        return one
    half = quantile(TAIL, one.df) * one.error
    return replace(one, low=one.value - half, high=one.value + half)


def ratio(own: list[Trial], others: list[Trial], name: str) -> float | None:
    """Of the means of something that runs have."""
    means = [
        known and statistics.fmean(known)
        for known in ([getattr(t, name) for t in some if getattr(t, name)] for some in (own, others))
    ]
    return means[0] / means[1] if all(means) else None


def together(effects: list[Effect]) -> Effect | None:
    """Of several sessions of one place: the sure ones weighted by their inverse variances; else the first there is."""
    sure = [one for one in effects if one.sure]
    if not sure:
        return effects[0] if effects else None
    if len(sure) == 1:
        return sure[0]
    weights = [1 / one.error**2 for one in sure]
    shares = [weight / math.fsum(weights) for weight in weights]

    def average(name):
        known = [getattr(one, name) for one in sure]
        return None if None in known else math.fsum(share * value for share, value in zip(shares, known))

    error = 1 / math.sqrt(math.fsum(weights))
    return interval(
        Effect(
            average("value"),
            average("relative"),
            error,
            satterthwaite([(s * s * one.error**2, one.df) for s, one in zip(shares, sure)]),
            noise=average("noise"),
            runs=sum(one.runs for one in sure),
            parent_runs=sum(one.parent_runs for one in sure),
            known=all(one.known for one in sure),
            tokens=average("tokens"),
            flops=average("flops"),
        )
    )


def satterthwaite(parts: list[tuple[float, int]]) -> int:
    """Degrees of freedom of a sum of estimated variances, (variance, its degrees of freedom) each, rounded down
    (Satterthwaite, Biometrics Bulletin 1946)."""
    return max(1, math.floor(math.fsum(v for v, _ in parts) ** 2 / math.fsum(v * v / df for v, df in parts) + 1e-9))


def due(one: Effect) -> str:
    """What an effect was due to: a run ends by the clock, so that a faster train.py reads more tokens."""
    if one.tokens is None or one.low is None or one.low <= 0 <= one.high:
        return ""
    amount = ("more" if one.tokens >= 1 + FASTER else "fewer" if one.tokens <= 1 - FASTER else "as many") + " tokens"
    if one.value < 0:
        return amount if amount == "more tokens" else f"{amount}, better per token"
    return amount if amount == "fewer tokens" else f"{amount}, worse per token"
