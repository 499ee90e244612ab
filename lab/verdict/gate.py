"""The statistics of the verdict: is a change better than its parent, or only luckier? docs/verdict.md has the rules,
and the reasons for them. What they rest on:

- **Looks** share a test's level equally (Bonferroni), so it is valid whenever it stops and however its looks depend on
  each other. Those at few and at many runs lie as far apart as matters: more of them ask for more at each.
- **The parent's mean** holds the runs that it was kept for, and is biased in its favour; that costs power alone.
- **The noise** and what conditions explain are estimated with priors that fade as repeats come (`pooled`).
- **The account** is alpha-investing (Foster & Stine, JRSS B 2008; in the form of LORD++: Ramdas et al., NeurIPS 2017).
  Where nothing can be told from noise at most ALPHA of nights hold a false keep; where much is found the levels grow,
  but at most ALPHA of keeps are false. The hopeless changes, which are most, cost nothing (after ADDIS: Tian & Ramdas,
  NeurIPS 2019).
- **Near misses** are tried together, as gains add up and noise doesn't.
- **Simpler and no worse** is a sequential test of "equal" against "worse by MARGIN" (Wald, Sequential Analysis 1947,
  with Student's t in place of the normal).

The theorems behind the account ask for independent tests, exact p-values and a charge for every change. Here tests
share parents and an estimated noise, a look is repeated when the parent gets another run, and a change that ends after
one run is not charged. That the bounds hold all the same, wrong priors and nights of nothing but worthless changes
included, is simulated in benchmarks/gate.py.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace as replace_evidence

from lab.reasons import Reason, because
from lab.session.events import Evidence
from lab.session.state import Conditions

LOOKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # runs of a change at which it may be kept; the last one ends its test
MOST_PARENT = 12  # runs of a parent because many tests share them
ALPHA = 0.05  # share of nights with a false keep, or of keeps that are false
STAKE = 12  # the first test stakes 1/12 of the account, the next without a keep 1/13 of the rest, and so on
LEVEL = 0.7  # of its stake: the level of a test
JOINT = 0.9  # of what is left, that the test of several changes together stakes
NEAR = 1.0  # standard errors
FEWEST_TOGETHER, MOST_TOGETHER = 3, 5
MARGIN, LOSSES = 0.0005, 0.001  # bits per byte: losses that a simplification must not have, and all of a session's
WORSE, EQUAL = 0.05, 0.2  # chances that a simplification is kept that loses MARGIN, and that an equal one is not
CHEAP = 8  # runs of a simplification that may be needed
PRIOR_DF = 4  # repeats that the prior counts for at first
FARTHEST = 0.01  # of the prior standard deviation: the least that it may be lowered to
DOUBTED, MOST_BASELINE = 2.0, 6  # times what the baseline's runs show: a noise that asks for more of them, up to 6
CURVE = 0.29  # of val_bpb, by a factor e in tokens: 20 to 25 M of them on an H200; longer runs have less
# Of a disturbance, standard deviations of the share that the clock may not have corrected for, and their chances: of
# ten kinds of other programs, on GPUs and a CPU, nine cost up to 0.04, and one 0.2. A session's repeats tell which.
WRONG = {0.03: 0.9, 0.5: 0.1}
# What devices add has one of these standard deviations, in that of seeds, each with the same chance; a session's
# repeats tell which. Two H200s of one host differed by 2.7, as two draws do whose standard deviation is 1.9.
DIFFER = (0.0, 1.0, 3.0)
MOST_DEVICES = 200  # of a session, that get a constant; a record from elsewhere may name thousands
# What changes are taken for when it is asked whether more runs pay; no verdict rests on it:
REAL, SPREAD = 0.2, 2.0  # share of changes that do anything, and the standard deviation of their effects, in noise's
LONG = 0.2  # what a further run costs before it is made, as most changes are given up on the way
ASKED = 0.75  # of what a run of the session has gained so far, that a further run of a change has to earn
EARNS, START = 10.0, 10  # and EARNS / (runs + START)^2 of the noise, which is for a session that has kept nothing yet


Scores = Mapping[int, float]  # val_bpb by seed
Pair = tuple[Mapping[int, Conditions], Mapping[int, Conditions]]  # of the candidate's runs and the parent's, by seed


def seed(round: int) -> int:
    """The seed of initial weights in a round: the same for every train.py, the first one for all."""
    return 42 + round


class Explained(NamedTuple):
    """What conditions explain of a weighted sum of scores.

    Attributes:
        value: bits per byte. variance: how well that is known, in units of the noise's variance.
    """

    value: float
    variance: float


@dataclass(frozen=True)
class Noise:
    """How val_bpb moves without a change.

    Attributes:
        sd: its standard deviation between seeds on one device, in bits per byte. df: degrees of freedom of that.
        slopes: bits per byte for a disturbance of 1, and for a factor e in tokens; then what each of `devices` adds.
            Empty if nothing is known.
        covariance: how well they are known: a row for each, in units of sd squared.
        differ: variance of what a device adds that was not compared yet, in units of sd squared.
        explained: share of what repeats differ by that disturbance and tokens explained, and that is no part of sd.
        shared: correlation between two train.py on one seed, at least.
    """

    sd: float
    df: int
    slopes: tuple[float, ...] = ()
    covariance: tuple[tuple[float, ...], ...] = ()
    devices: tuple[str, ...] = ()
    differ: float = statistics.fmean(each**2 for each in DIFFER)
    explained: float = 0.0
    shared: float = 0.0

    def explains(self, weighted: Iterable[tuple[float, Conditions]]) -> Explained:
        """What the conditions of runs explain of a sum of their scores, each with a weight."""
        disturbed, lacked, by_device = 0.0, 0.0, dict.fromkeys(self.devices, 0.0)
        for weight, (disturbance, device, short) in weighted:
            disturbed += weight * disturbance
            lacked += weight * short
            by_device[device] = by_device.get(device, 0.0) + weight
        sums = [disturbed, lacked, *by_device.values()]  # devices that were not compared yet come last
        moved = [i for i, total in enumerate(sums[: len(self.slopes)]) if total]
        variance = sum(sums[i] * sums[j] * self.covariance[i][j] for i in moved for j in moved)
        variance += self.differ * sum(total**2 for total in sums[len(self.devices) + 2 :])
        return Explained(sum(sums[i] * self.slopes[i] for i in moved), variance)


def pooled(
    groups: Iterable[Sequence[float]],
    prior_sd: float,
    prior_df: int = PRIOR_DF,
    conditions: Iterable[Sequence[Conditions]] | None = None,
    curve: float = 0.0,
) -> Noise:
    """The noise: within-configuration variance over all repeats, and a prior worth `prior_df` degrees of freedom.

    The prior loses one of them for every two that are measured: it comes from other machines, may be wrong by a factor,
    and is to be outvoted. One is left, so that the noise is never 0. A prior far too large would still drown nine runs
    that are alike, so it is lowered to what the repeats allow: the upper 99 % bound of their standard deviation. At
    the levels of this gate more is still asked of a change than by Student's test on the repeats alone.

    Scores are regressed on disturbance, on tokens that a run lacks, and on which device made it, within configurations.
    The coefficients have normal priors with mean 0 (the conjugate normal-inverse-gamma model: Gelman et al., Bayesian
    Data Analysis, 3rd ed., 14.2). How much devices differ is not known, nor how well the clock corrects: the posteriors
    for each of DIFFER and of WRONG are mixed by their likelihoods, and have the mixture's mean and covariance. What
    conditions explain is no noise. Where nothing was disturbed, on one device, all is as without them.

    Args:
        groups: val_bpb over seeds, for each train.py. prior_sd: above 0.
        conditions: of the same runs; without them nothing is explained.
        curve: the prior standard deviation of the slope over lacking tokens, in bits per byte for a factor e; one of
            WRONG, as a share of it, is that of disturbance, for which the clock has corrected.
    """
    if not prior_sd > 0:
        raise ValueError(f"the prior standard deviation of val_bpb has to be above 0, not {prior_sd}")
    groups = [list(group) for group in groups]
    known = [[Conditions()] * len(group) for group in groups] if conditions is None else conditions
    repeated = [(scores, of) for scores, of in zip(groups, known, strict=True) if len(scores) > 1]
    residuals = _centred(scores for scores, _ in repeated)
    df, squares = len(residuals) - len(repeated), sum(residual**2 for residual in residuals)
    prior_df = max(min(1, prior_df), prior_df - df // 2)
    usual = [[score for score, one in zip(scores, of) if not one.short] for scores, of in repeated]
    if (alike := sum(len(scores) - 1 for scores in usual if scores)) > 0:
        allowed = math.sqrt(sum(residual**2 for residual in _centred(usual)) / _least_chi_squared(alike))
        prior_sd = min(prior_sd, max(FARTHEST * prior_sd, allowed))
    if conditions is None:
        return Noise(math.sqrt((prior_df * prior_sd**2 + squares) / (prior_df + df)), prior_df + df)
    used = Counter(one.device for _, of in repeated for one in of)
    devices = tuple(sorted(device for device, _ in used.most_common(MOST_DEVICES))) if len(used) > 1 else ()
    centred = [np.zeros((0, 2 + len(devices)))]
    for _, of in repeated:
        rows = np.array([[one.disturbance, one.short, *(one.device == each for each in devices)] for one in of], float)
        centred.append(rows - rows.mean(0))
    x = np.concatenate(centred)
    inner, products, total = x.T @ x, x.T @ np.array(residuals), prior_df + df
    likelihoods, found = [], []
    for differ, (wrong, chance) in itertools.product(DIFFER if devices else DIFFER[:1], WRONG.items()):
        # With coefficients in units of their priors, a prior of 0 is no special case.
        scale = np.array([wrong * curve / prior_sd, curve / prior_sd, *[differ] * len(devices)])
        precision = np.eye(len(scale)) + scale[:, None] * inner * scale
        covariance = scale[:, None] * np.linalg.inv(precision) * scale
        slopes = covariance @ products
        variance = (prior_df * prior_sd**2 + squares - float(products @ slopes)) / total
        likelihood = -np.linalg.slogdet(precision)[1] / 2 - total / 2 * math.log(variance)
        likelihoods.append(math.log(chance) + likelihood)
        found.append((slopes, variance, variance * covariance, variance * differ**2))
    weights = np.exp(np.array(likelihoods) - max(likelihoods))
    weights /= weights.sum()
    slopes, variance, covariance, apart = (np.average(np.array(each), 0, weights) for each in zip(*found))
    spread = np.array([each for each, *_ in found]) - slopes
    covariance = covariance + (spread.T * weights) @ spread
    explained = float(products[:2] @ slopes[:2]) / squares if squares else 0.0
    rows = tuple(map(tuple, (covariance / variance).tolist()))
    differ = apart / variance if devices else Noise.differ
    return Noise(math.sqrt(variance), total, tuple(slopes.tolist()), rows, devices, float(differ), explained)


def _centred(groups: Iterable[Sequence[float]]) -> list[float]:
    """Scores less the mean of their group."""
    return [score - mean for scores in groups if scores for mean in [statistics.fmean(scores)] for score in scores]


def doubted(scores: Sequence[float], noise: Noise) -> bool:
    """Whether a few more runs of the baseline pay, as it repeats so well that the noise is mostly the prior's.

    Args:
        scores: val_bpb of the baseline's runs. noise: pooled from them.
    """
    return 3 <= len(scores) < MOST_BASELINE and noise.sd > DOUBTED * statistics.stdev(scores)


def shared(families: Iterable[tuple[Scores, Sequence[Scores]]]) -> float:
    """The correlation of two train.py's scores on one seed: what it is at least, about one-sided at 95 %; 0 where few
    seeds tell, or none. It is the slope of changes over their parent, of scores centred within each pair; a seed counts
    once however many changes were run on it, as they may share what the parent doesn't.

    Args:
        families: val_bpb by seed of a parent, and of each of its changes; what conditions explain taken out.
    """
    products, squares, df = 0.0, 0.0, 0
    for parent, changes in families:
        seeds: set[int] = set()
        for change in changes:
            common = change.keys() & parent.keys()
            if len(common) > 1:
                mean, others = (statistics.fmean(scores[one] for one in common) for scores in (change, parent))
                products += sum((change[one] - mean) * (parent[one] - others) for one in common)
                squares += sum((parent[one] - others) ** 2 for one in common)
                seeds |= common
        df += max(0, len(seeds) - 1)
    if df < 5 or not squares > 0:
        return 0.0
    return min(0.95, max(0.0, products / squares - 1.65 / math.sqrt(df)))


def _least_chi_squared(df: int) -> float:
    """A bound from below of the 1 % quantile of chi-squared: of the incomplete gamma function's series the first term
    without its exponential, which is too large a probability."""
    return 2 * math.exp(2 / df * (math.log(0.01) + math.lgamma(df / 2 + 1)))


@dataclass(frozen=True)
class Account:
    """What a session has staked and earned."""

    staked: float = 0.0  # on all tests so far, open ones too, in false keeps to be expected
    keeps: int = 0  # because they were better
    tests: int = 0  # since the last of these, open ones too
    loss: float = 0.0  # bits per byte that simplifications may have cost, in all
    gained: float = 0.0  # bits per byte of the keeps, as they were estimated
    runs: int = 0  # of changes that are decided

    @property
    def left(self) -> float:
        """False keeps to be expected that may still be staked."""
        return max(0.0, ALPHA * max(1, self.keeps) - self.staked)

    @property
    def stake(self) -> float:
        """What the next test that is run again may stake. However many are open, something is left."""
        return self.left / (self.tests + STAKE)

    @property
    def level(self) -> float:
        """The chance of a false keep that the next test may have."""
        return LEVEL * self.stake

    @property
    def joint_stake(self) -> float:
        """The stake of the test of a block, in which many changes were screened: it replaces many tests."""
        return JOINT * self.left

    def after(self, evidence: Evidence) -> Account:
        """The account after a verdict."""
        account = replace(self, staked=self.staked + evidence.stake, runs=self.runs + evidence.runs)
        if evidence.better:
            return replace(account, keeps=self.keeps + 1, tests=0, gained=self.gained + evidence.gain)
        return replace(account, tests=self.tests + (evidence.stake > 0), loss=self.loss + evidence.loss)

    def reserving(self, stake: float) -> Account:
        """The account while a test is open that has this stake: as if it were lost."""
        return replace(self, staked=self.staked + stake, tests=self.tests + 1)

    def asks(self, noise: Noise, runs: int) -> float:
        """Bits per byte that a further run has to be expected to earn, after `runs` of a test."""
        runs += self.runs + START
        return (ASKED * self.gained + EARNS * noise.sd / runs) / runs


@dataclass(frozen=True)
class Step:
    """What to do next, or the verdict."""

    action: str  # "run candidate" or "run parent" (with `seed`), "keep" or "discard"
    reason: Reason
    seed: int | None = None
    evidence: Evidence = Evidence()


def next_step(
    candidate: Scores,
    parent: Scores,
    noise: Noise,
    account: Account,
    simpler: bool = False,
    stake: float | None = None,
    conditions: Pair = ({}, {}),
    fewest: int = 1,
) -> Step:
    """What the runs so far ask for. Bits per byte everywhere.

    Args:
        candidate, parent: val_bpb by seed.
        noise, account: of the session so far.
        simpler: the candidate's syntax tree is smaller than its parent's.
        stake: what this test has reserved, once it has; the account's next one by default.
        conditions: of the candidate's runs and of the parent's, by seed; Conditions() where there are none.
        fewest: runs of the candidate before it can be kept, unless it is equal bit for bit.
    """
    if not candidate:
        return Step("run candidate", because("not_run"), seed=seed(0))
    if not parent:
        return Step("run parent", because("parent_not_run"), seed=min(candidate))
    if not all(map(math.isfinite, [*candidate.values(), *parent.values()])):
        return Step("discard", because("not_a_number"), evidence=Evidence(runs=len(candidate)))
    stake = account.stake if stake is None else stake
    runs, parents, level = len(candidate), len(parent), LEVEL * stake
    correlation = noise.shared if candidate.keys() <= parent.keys() else 0.0
    evidence, facts, apart = _compared(candidate, parent, noise, level, conditions, correlation)
    evidence = replace_evidence(evidence, stake=stake if runs > 1 else 0.0)
    gain, error, common = evidence.gain, evidence.error, candidate.keys() & parent.keys()
    if simpler and common and all(candidate[one] == parent[one] for one in common):
        equal = replace_evidence(evidence, simpler=True, stake=0.0)
        return Step("keep", because("simpler_and_equal", seeds=len(common)), evidence=equal)
    share = level / len(LOOKS) if runs in LOOKS and runs >= fewest and common == candidate.keys() else 0.0
    tested = because("tested", **facts, p=evidence.p, share=share)
    if share > 0 and evidence.p <= share:
        return Step("keep", tested, evidence=replace_evidence(evidence, better=True, stake=stake))

    outlook = Outlook(runs, parents, max(runs + 1, min(MOST_PARENT, account.tests)), correlation, apart)
    reason, going_on = tested, False
    if runs < LOOKS[-1]:
        pays, asked = _worth(gain, error, noise, level, outlook), account.asks(noise, runs)
        going_on, reason = pays >= asked, because("not_worth_it", **facts, pays=max(pays, 0.0), asked=asked)
    if simpler:
        allowed = min(MARGIN, LOSSES - account.loss)
        odds = _equal(gain, error, noise.df, allowed)
        if odds >= math.log(1 / WORSE) and runs >= fewest:
            loss = max(0.0, t_quantile(WORSE, noise.df) * error - gain)
            reason = because("simpler", **facts, loss=loss, allowed=allowed)
            return Step("keep", reason, evidence=replace_evidence(evidence, simpler=True, loss=loss))
        if odds > math.log(EQUAL) and _cheap(noise, outlook, allowed):
            going_on = going_on or runs < CHEAP
    missing = [one for one in candidate if one not in parent]
    # The last look is not to be lost because the parent has other seeds than the candidate.
    late = bool(missing) and runs == LOOKS[-1] and level > 0
    # The parent's runs met other conditions: one more tells what those of today do, for later tests, too.
    by_chance = _variance(runs, parents, correlation)
    outdated = parents < MOST_PARENT and apart > by_chance and gain > NEAR * noise.sd * math.sqrt(by_chance)
    if not (going_on or late or outdated):
        return Step("discard", reason, evidence=replace_evidence(evidence, near_miss=gain / error >= NEAR))
    reason, evidence = because("worth_another_run", **facts), replace_evidence(evidence, stake=0.0)
    if missing or parents < outlook.wanted or not going_on:
        return Step("run parent", reason, missing[0] if missing else _next(parent), evidence)
    return Step("run candidate", reason, _next(candidate), evidence)


def joint_step(
    candidate: Scores,
    parent: Scores,
    noise: Noise,
    account: Account,
    stake: float | None = None,
    conditions: Pair = ({}, {}),
) -> Step:
    """The verdict on several changes as one, from as many fresh runs of them and of their parent as were planned: one
    look, at the level that the account gives. Arguments as of `next_step`."""
    stake = account.joint_stake if stake is None else stake
    level = stake  # all of it: there is one look, and its runs are fresh
    evidence, facts, _ = _compared(candidate, parent, noise, level, conditions)
    better = evidence.p <= level
    reason = because("tested", **facts, p=evidence.p, share=level)
    return Step("keep" if better else "discard", reason, None, replace_evidence(evidence, stake=stake, better=better))


def _compared(
    candidate: Scores, parent: Scores, noise: Noise, level: float, conditions: Pair, correlation: float = 0.0
) -> tuple[Evidence, dict, float]:
    """(what a comparison shows, which costs nothing yet; the facts that its reasons name; the variance of what its
    conditions explain). With correlated seeds the candidate's mean is corrected by how the parent did
    on the same seeds (a control variate)."""
    runs, parents, df = len(candidate), len(parent), noise.df
    own, others = dict.fromkeys(candidate, -1 / runs), dict.fromkeys(parent, (1 - correlation) / parents)
    if correlation:
        for one in candidate:
            others[one] += correlation / runs
    weighted = [(own, candidate, conditions[0]), (others, parent, conditions[1])]
    difference = math.fsum(weights[one] * scores[one] for weights, scores, _ in weighted for one in weights)
    plain = Conditions()
    corrected, apart = noise.explains(
        (weight, of.get(one, plain)) for weights, _, of in weighted for one, weight in weights.items()
    )
    gain = difference - corrected
    error = noise.sd * math.sqrt(_variance(runs, parents, correlation) + apart)
    t, half = gain / error, t_quantile(0.05, df) * error
    evidence = Evidence(gain, error, gain - half, gain + half, t_tail(t, df), level, runs, parents, corrected)
    direction = "better" if gain > 0 else "worse"
    facts = {"amount": abs(gain), "direction": direction, "t": abs(t), "runs": runs, "parent_runs": parents}
    return evidence, facts, apart


def _next(scores: Mapping[int, float]) -> int:
    """The first seed that a train.py was not run on."""
    return next(one for one in map(seed, range(len(scores) + 1)) if one not in scores)


def _variance(runs: int, parents: int, correlation: float) -> float:
    """The variance of a gain, in units of the noise's variance."""
    return (1 - correlation**2) / runs + (1 - correlation) ** 2 / parents


@dataclass(frozen=True)
class Outlook:
    """What a test has, and what more runs would bring.

    Attributes:
        runs, parents: made so far. wanted: of the parent, before the candidate's next run.
        correlation: of equal seeds. apart: variance because both were run under different conditions (a busy machine,
            another device). Further runs are taken to be pairs of both under the same, and what conditions do to become
            no better known: so the difference that there is now gets less weight, and nothing is added to it.
    """

    runs: int
    parents: int
    wanted: int
    correlation: float = 0.0
    apart: float = 0.0

    def variance(self, runs: int, parents: int) -> float:
        """Of the gain, once there are so many runs."""
        return _variance(runs, parents, self.correlation) + self.apart * min(1.0, self.runs / runs) ** 2

    def further(self) -> Iterable[tuple[int, int, float]]:
        """(runs, runs of the parent, variance of the gain then) for each look that is still to come."""
        for runs in LOOKS:
            if runs > self.runs:
                parents = max(self.parents, self.wanted, runs)
                yield runs, parents, self.variance(runs, parents)


def _worth(gain: float, error: float, noise: Noise, level: float, outlook: Outlook) -> float:
    """Bits per byte that more runs of a change are expected to earn, for each of them, up to the best of its looks.

    A change does something with probability REAL, by a normal distribution around 0 with SPREAD times the noise: that
    gives the chance that it is kept at a look, and the effect to be expected. Its quantiles of t are an approximation
    (Wallace, Annals of Mathematical Statistics 1959, turned round).
    """
    if not level / len(LOOKS) > 1e-12 or gain <= 0:
        return 0.0
    now, prior = (error / noise.sd) ** 2, SPREAD**2  # everything in units of the noise
    t, total = gain / error, now + prior
    odds = REAL / (1 - REAL) * math.sqrt(now / total) * math.exp(min(500.0, t * t / 2 * prior / total))
    z, g = -statistics.NormalDist().inv_cdf(level / len(LOOKS)), gain / noise.sd
    mean, variance = g * prior / total, now * prior / total  # of its effect, if it has one
    best = 0.0
    for runs, parents, then in outlook.further():
        then = min(then, now)  # where pairs share noise, today's error may be the smaller one
        old = then / now  # weight that today's gain has then
        df = noise.df + runs - outlook.runs + parents - outlook.parents
        needed = math.sqrt(then * df * math.expm1((z * (8 * df + 3) / (8 * df + 1)) ** 2 / df))
        expected, spread = old * g + (1 - old) * mean, math.sqrt((1 - old) ** 2 * variance + old * (now - then))
        chance = normal_tail((needed - expected) / max(spread, 1e-9))
        cost = 1 + LONG * (runs - outlook.runs + parents - outlook.parents - 1)
        best = max(best, chance * mean / cost)
    return odds / (1 + odds) * best * noise.sd


def _equal(gain: float, error: float, df: int, margin: float) -> float:
    """Logarithm of how much likelier the gain is if a change is equal than if it is worse by the margin."""
    if not margin > 0:
        return -math.inf
    t, shift = gain / error, margin / error
    return (df + 1) / 2 * (math.log1p((t + shift) ** 2 / df) - math.log1p(t * t / df))


def _cheap(noise: Noise, outlook: Outlook, margin: float) -> bool:
    """Whether CHEAP runs would show that a change is equal, if it had just its parent's mean."""
    parents = max(outlook.parents, outlook.wanted, CHEAP)
    error = noise.sd * math.sqrt(outlook.variance(CHEAP, parents))
    return _equal(0.0, error, noise.df, margin) >= math.log(1 / WORSE)


def smallest_detectable(noise: Noise, account: Account, power: float = 0.8) -> float:
    """About the gain, in bits per byte, that a change must have to be kept with this chance, as the session stands: so
    much that it is not given up before some look, and kept at it, each with half of what may be missed. A parent that
    was kept a moment ago has few runs, and lucky ones: that costs up to a tenth of the chance more."""
    missed, level = t_quantile((1 - power) / 2, noise.df), account.level
    if not level > 0:
        return math.inf
    smallest, needed = math.inf, 0.0
    for runs in LOOKS:
        parents = max(runs, min(MOST_PARENT, account.tests), 2)
        error = noise.sd * math.sqrt(_variance(runs, parents, noise.shared))
        kept = (t_quantile(level / len(LOOKS), noise.df + 2 * runs - 2) + missed) * error
        smallest = min(smallest, max(needed, kept))
        outlook, asked = Outlook(runs, parents, runs + 1, noise.shared), account.asks(noise, runs)
        low, high = 0.0, 20 * error
        for _ in range(20):
            middle = (low + high) / 2
            pays = _worth(middle, error, noise, level, outlook) >= asked
            low, high = (low, middle) if pays else (middle, high)
        needed = max(needed, high + missed * error)
    return smallest


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
