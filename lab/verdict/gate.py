"""The statistics of the verdict: is a change better than its parent, or only luckier?

Runs of one train.py with different seeds don't score the same. Where that noise is as large as most gains, a quarter
of what scores lower is no better; and to run everything three times costs two thirds of the night. So:

1. **One run decides a loss.** A change goes on only if it is SCREEN standard errors better than its parent, and if the
   rest of its ROUNDS runs would give it a chance of WORTH of being kept (predictive power under a flat prior:
   Spiegelhalter, Freedman & Blackburn, Controlled Clinical Trials 1986). Giving up early can't add false keeps.
2. **The rest is run beside the parent on the same seeds**, which come from here. After each round the change is kept if
   the p-value of Student's t is below that round's share (SPLIT) of its level: three looks, so the level is split
   (Bonferroni). Means are compared, not pairs: nothing rests on equal seeds sharing noise. The parent's mean holds the
   runs that it was kept for, and flatters it: that costs power, not validity.
3. **The noise** is one standard deviation for the session, pooled over all that was repeated, with a prior that counts
   like a few repeats and fades as real ones come. Few degrees of freedom ask for a larger t.
4. **The level of a test comes from an account** of the false keeps to be expected: ALPHA in all, and ALPHA more for
   each keep after the first (alpha-investing: Foster & Stine, JRSS B 2008; in the form of LORD++: Ramdas et al.,
   NeurIPS 2017). Where nothing can be told from noise at most ALPHA of nights then hold a false keep; where much is
   found the levels grow, but at most ALPHA of keeps are false. A test stakes a part of what is left, so it never runs
   out. Only changes that are run again, or kept, stake anything, and the level is that stake times the chance that a
   worthless change gets past the screen; so the hopeless ones, which are most, cost nothing (after ADDIS: Tian &
   Ramdas, NeurIPS 2019).
5. **Near misses**, better by NEAR standard errors and not kept, are tried together: gains add up, noise doesn't.
6. **Simpler and no worse** is kept too: with bit for bit the same score on a seed that the parent has, after one run;
   else if a loss of MARGIN of the noise is excluded (non-inferiority) at CONFIDENCE. Losses that could not be excluded
   are added up, and stay below one standard deviation per session.

The theorems behind 4 ask for independent tests, exact p-values and a charge for every change. Here tests share parents
and an estimated noise, and a change that ends after one run is not charged. That the bounds hold all the same, wrong
priors and nights of nothing but worthless changes included, is simulated in benchmarks/gate.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from msgspec.structs import replace as replace_evidence

from lab.reasons import Reason, because
from lab.session.events import Evidence

ROUNDS = 3  # runs of a change at most
SCREEN = 0.7  # standard errors that the first run has to be better
WORTH = 0.2  # chance of being kept that makes further runs worth their time
ALPHA = 0.05  # share of nights with a false keep, or of keeps that are false
SPLIT = (0.1, 0.2, 0.7)  # of the level, over the rounds: an early keep is for what is overwhelming
STAKE = 4  # the first test stakes 1/4 of the account, the next without a keep 1/5 of the rest, and so on
PASSES = 0.25  # chance that a change worth nothing is SCREEN standard errors better
NEAR = 1.0  # standard errors
FEWEST_TOGETHER, MOST_TOGETHER = 3, 5
MARGIN = 0.5  # of the noise: a loss that a simplification must not have
CONFIDENCE = 0.95  # that it doesn't; one-sided
PRIOR_DF = 4  # repeats that the prior counts for at first


def seed(round: int) -> int:
    """The seed of initial weights in a round: the same for every train.py, the first one for all."""
    return 42 + round


@dataclass(frozen=True)
class Noise:
    """Standard deviation of val_bpb between seeds (bits per byte), and the degrees of freedom it is known with."""

    sd: float
    df: int


def pooled(groups: Iterable[Sequence[float]], prior_sd: float, prior_df: int = PRIOR_DF) -> Noise:
    """The noise: within-configuration variance over all repeats, and a prior worth `prior_df` degrees of freedom.

    The prior loses one of them for every two that are measured: it comes from other machines, may be wrong by a factor,
    and is to be outvoted. One is left, so that the noise is never 0. Changes are repeated after a lucky first run, so
    the estimate is rather too large (by 2 to 10 % in simulated nights).

    Args:
        groups: val_bpb over seeds, for each train.py. prior_sd: above 0.
    """
    if not prior_sd > 0:
        raise ValueError(f"the prior standard deviation of val_bpb has to be above 0, not {prior_sd}")
    groups = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in groups)
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    prior_df = max(min(1, prior_df), prior_df - df // 2)
    return Noise(math.sqrt((prior_df * prior_sd**2 + squares) / (prior_df + df)), prior_df + df)


@dataclass(frozen=True)
class Account:
    """What a session has staked and earned."""

    staked: float = 0.0  # on all tests so far, open ones too, in false keeps to be expected
    keeps: int = 0  # because they were better
    tests: int = 0  # since the last of these, open ones too
    loss: float = 0.0  # bits per byte that simplifications may have cost, in all

    @property
    def stake(self) -> float:
        """What the next test that is run again may stake. However many are open, something is left."""
        return max(0.0, ALPHA * max(1, self.keeps) - self.staked) / (self.tests + STAKE)

    @property
    def level(self) -> float:
        """The chance of a false keep that the next test may have."""
        return PASSES * self.stake

    def after(self, evidence: Evidence) -> Account:
        """The account after a verdict."""
        staked = self.staked + evidence.stake
        if evidence.better:
            return replace(self, staked=staked, keeps=self.keeps + 1, tests=0)
        return replace(self, staked=staked, tests=self.tests + (evidence.stake > 0), loss=self.loss + evidence.loss)

    def reserving(self, stake: float) -> Account:
        """The account while a test is open that has this stake: as if it were lost."""
        return replace(self, staked=self.staked + stake, tests=self.tests + 1)


@dataclass(frozen=True)
class Step:
    """What to do next, or the verdict."""

    action: str  # "run candidate" or "run parent" (with `seed`), "keep" or "discard"
    reason: Reason
    seed: int | None = None
    evidence: Evidence = Evidence()


def next_step(
    candidate: Mapping[int, float],
    parent: Mapping[int, float],
    noise: Noise,
    account: Account,
    simpler: bool = False,
    stake: float | None = None,
) -> Step:
    """What the runs so far ask for. Bits per byte everywhere.

    Args:
        candidate, parent: val_bpb by seed.
        noise, account: of the session so far.
        simpler: the candidate's syntax tree is smaller than its parent's.
        stake: what this test has reserved, once it has; the account's next one by default.
    """
    if not candidate:
        return Step("run candidate", because("not_run"), seed=seed(0))
    if not parent:
        return Step("run parent", because("parent_not_run"), seed=min(candidate))
    if not all(map(math.isfinite, [*candidate.values(), *parent.values()])):
        return Step("discard", because("not_a_number"), evidence=Evidence(runs=len(candidate)))
    stake = account.stake if stake is None else stake
    runs, parents, level = len(candidate), len(parent), PASSES * stake
    gain = statistics.fmean(parent.values()) - statistics.fmean(candidate.values())
    variance = 1 / runs + 1 / parents
    error = noise.sd * math.sqrt(variance)
    t, half = gain / error, t_quantile(0.05, noise.df) * error
    evidence = Evidence(
        gain=gain,
        error=error,
        low=gain - half,
        high=gain + half,
        p=t_tail(t, noise.df),
        level=level,
        runs=runs,
        parent_runs=parents,
        stake=stake if runs > 1 else 0.0,
    )
    direction = "better" if gain > 0 else "worse"
    facts = {"amount": abs(gain), "direction": direction, "t": abs(t), "runs": runs, "parent_runs": parents}
    common = candidate.keys() & parent.keys()
    if simpler and common and all(candidate[one] == parent[one] for one in common):
        equal = replace_evidence(evidence, simpler=True, stake=0.0)
        return Step("keep", because("simpler_and_equal", seeds=len(common)), evidence=equal)
    missing = [one for one in candidate if one not in parent]
    share = level * SPLIT[min(runs, ROUNDS) - 1]
    tested = because("tested", **facts, p=evidence.p, share=share)
    if not missing and share > 0 and evidence.p <= share:
        return Step("keep", tested, evidence=replace_evidence(evidence, better=True, stake=stake))
    evidence = replace_evidence(evidence, near_miss=t >= NEAR)
    allowed = max(0.0, min(MARGIN * noise.sd, noise.sd - account.loss))  # that a simplification may lose
    if runs >= ROUNDS and not missing:
        loss = max(0.0, t_quantile(1 - CONFIDENCE, noise.df) * error - gain)
        if simpler and loss <= allowed:
            reason = because("simpler", **facts, loss=loss, allowed=allowed)
            return Step("keep", reason, evidence=replace_evidence(evidence, simpler=True, near_miss=False, loss=loss))
        return Step("discard", tested, evidence=evidence)

    # Is it worth going on? `gain` will move by `spread` until the last look, which asks for so much of it:
    final = 1 / ROUNDS + 1 / max(ROUNDS, parents)
    df = noise.df + ROUNDS - runs + max(0, ROUNDS - parents)  # more runs tell more about the noise, too
    spread = noise.sd * math.sqrt(max(variance - final, 1e-12))

    def chance(tail: float, less: float = 0.0) -> float:
        return normal_tail((t_quantile(tail, df) * noise.sd * math.sqrt(final) - less - gain) / spread)

    if not t >= SCREEN:
        hope, reason = 0.0, because("screened", **facts, wanted=SCREEN)
    else:
        hope = chance(level * SPLIT[-1])
        reason = because("hopeless", **facts, hope=hope, rounds=ROUNDS, wanted=WORTH)
    if simpler and allowed > 0:
        hope = max(hope, chance(1 - CONFIDENCE, less=allowed))
    if not hope >= WORTH:
        return Step("discard", reason, evidence=evidence)
    reason, evidence = because("worth_another_run", **facts), replace_evidence(evidence, near_miss=False, stake=0.0)
    if missing:
        return Step("run parent", reason, missing[0], evidence)
    return Step("run candidate", reason, next(s for s in map(seed, range(runs + 1)) if s not in candidate), evidence)


def smallest_detectable(noise: Noise, account: Account, power: float = 0.8) -> float:
    """The gain, in bits per byte, that a change must have to be kept with this chance, as the session stands. Half of
    those that are missed are allowed for the early looks and for what is not known about the noise."""
    df = noise.df + ROUNDS - 1
    missed = t_quantile((1 - power) / 2, df)
    return (t_quantile(account.level * SPLIT[-1], df) + missed) * noise.sd * math.sqrt(2 / ROUNDS)


def together(misses: Sequence[tuple[int, float, float]]) -> list[int]:
    """Which near misses to try as one patch: ids, the most convincing first; none while there are too few.

    Waiting for MOST_TOGETHER pays more than trying three at once. More than that are given where more are remembered,
    because some won't go together: take the first MOST_TOGETHER that do.

    Args:
        misses: (id, estimated gain, its standard error), of those not tried together yet.
    """
    if len(misses) < MOST_TOGETHER:
        return []
    return [number for number, _, _ in sorted(misses, key=lambda miss: -miss[1] / miss[2])]


def interval(gains: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences, at least two: Student's 90 % interval."""
    mean, half = statistics.fmean(gains), t_quantile(0.05, len(gains) - 1)
    half *= statistics.stdev(gains) / math.sqrt(len(gains))
    return mean, mean - half, mean + half


def t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom: the finite series 26.7.3 and 26.7.4 of
    Abramowitz & Stegun, Handbook of Mathematical Functions (1964)."""
    if t < 0:
        return 1 - t_tail(-t, df)
    angle = math.atan(t / math.sqrt(df))
    cosine, odd = math.cos(angle), df % 2
    term = total = (cosine if odd else 1.0) if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return max(0.0, (1 - within) / 2)


@lru_cache(maxsize=4096)  # of few levels and degrees of freedom, thousands of times
def t_quantile(tail: float, df: int) -> float:
    """The t that is exceeded with probability `tail`, by bisection; `tail` at most 0.5. Infinite below 1e-12, where
    rounding hides the tail: a test without a level keeps nothing."""
    if not tail > 1e-12:
        return math.inf
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high


def normal_tail(z: float) -> float:
    """P(Z > z) of the standard normal distribution."""
    return math.erfc(z / math.sqrt(2)) / 2
