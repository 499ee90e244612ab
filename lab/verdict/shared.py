"""Several published findings in one run: on a noisy device their effects are estimated together.

Where noise hides what one change does, a block of runs screens many. Each run holds the parent with some of the
patches; its score is taken for the parent's mean, plus the sum of their effects, plus noise. The prior of an effect is
a mixture that fits the changes of a published session; its posterior is sampled (Gibbs: components given effects,
effects given components, which are jointly normal). A run holds at most AT_ONCE of the patches that are gains in one
sample (Thompson sampling), never two that can't be made in one file; every BARE-th run holds none. What makes a run far
worse is searched by halves: one patch is dropped, and two that do so only together are held apart. In the end the
patches that are gains by their posterior mean become one patch, which is tested against the parent on fresh seeds, at a
level from the account (plan.py). So no verdict rests on the model.

All of it is a function of the runs. benchmarks/shared.py simulates whole nights of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lab.session.events import Interval

QUIET = 0.002  # noise, from which on findings share runs
BLOCK = 150  # runs of a block, those of its test included
AT_ONCE, BARE = 8, 12
CULPRITS, MOST_BAD = 2, 0.25  # patches that were dropped, and their share of what is known, that end a block
FAR = 5.0  # standard deviations: a run that is so much worse has a culprit, a patch so good goes the ordinary way
CHOSEN, MOST_CHOSEN = 0.05, 16  # standard deviations of noise that a posterior mean has to gain; members of the test
NOISES, TESTED = (0.003, 0.005, 0.01, 0.03), (6, 8, 14, 22)  # runs of the patch and of the parent, by noise
SWEEPS, LAST_SWEEPS, BURN, ROUNDS = 8, 300, 50, 4
# Effects of the changes of the original's H100 session, less their noise: (share, mean, standard deviation); below 0 is
# better. 18 % are gains. On a noisier device all is taken for larger, in proportion from SCALE on.
MIXTURE = np.array(
    [
        (0.100, -0.0003, 0.0003),
        (0.055, -0.0010, 0.0008),
        (0.025, -0.0040, 0.0035),
        (0.440, 0.0005, 0.0004),
        (0.280, 0.0016, 0.0012),
        (0.100, 0.0060, 0.0060),
    ]
)
SCALE = 0.01


@dataclass(frozen=True)
class Screening:
    """A block so far.

    Attributes:
        count: patches. runs: (patches that it held, score or None where it failed), in order.
        sd: noise of a run. parent: the parent's mean before the block.
        clash: whether two patches can't be in one run.
    """

    count: int
    runs: Sequence[tuple[tuple[int, ...], float | None]]
    sd: float
    parent: float
    clash: Callable[[int, int], bool] = lambda one, other: False

    def next(self, begun: int) -> tuple[int, ...]:
        """The patches of the next run, after so many runs were begun; () is the parent alone."""
        culprits, asked, sound = self._searched()
        if asked:
            return asked
        if begun % BARE == 0:
            return ()
        rng = np.random.default_rng([begun, self.count])
        effects = self._sampled(sound, rng, SWEEPS, self.sd)[-1, :-1]
        members: list[int] = []
        for patch in map(int, rng.permutation(np.flatnonzero(effects < 0))):
            if self._fits(patch, members, culprits):
                members.append(patch)
                if len(members) == AT_ONCE:
                    break
        return tuple(sorted(members))

    @property
    def searching(self) -> bool:
        """Whether a culprit is searched for, one run after the other."""
        return bool(self._searched()[1])

    @property
    def dropped(self) -> set[int]:
        """Patches that make runs fail or far worse by themselves."""
        return {patch for culprit in self._searched()[0] if len(culprit) == 1 for patch in culprit}

    @property
    def hopeless(self) -> bool:
        """Whether many patches make runs far worse, so that it is better to try one change per run."""
        dropped, cleared = self.dropped, {patch for place in self._searched()[2] for patch in self.runs[place][0]}
        return len(dropped) >= CULPRITS and len(dropped) > MOST_BAD * len(dropped | cleared)

    def estimates(self) -> list[Interval]:
        """Each patch's effect: posterior mean and 90 % interval. Noise is what the runs leave unexplained, if that is
        more than was known: other programs may have come and gone meanwhile, and patches may depend on one another."""
        sound, sd = self._searched()[2], self.sd
        held, scores = self._held(sound)
        for _ in range(ROUNDS):
            samples = self._sampled(sound, np.random.default_rng(len(self.runs)), LAST_SWEEPS, sd)[BURN:]
            left = scores - samples @ held.T
            sd = max(self.sd, float(np.sqrt(np.mean(left**2)))) if len(sound) else sd
        lows, highs = np.quantile(samples, (0.05, 0.95), axis=0)
        return list(zip(*(column[:-1].tolist() for column in (samples.mean(0), lows, highs))))

    def chosen(self, estimates: Sequence[Interval]) -> list[int]:
        """The patches for the test, the best first: those that go together."""
        culprits, members = self._searched()[0], []
        for patch in sorted(range(self.count), key=lambda patch: estimates[patch][0]):
            gains = estimates[patch][0] < -CHOSEN * self.sd
            if gains and len(members) < MOST_CHOSEN and self._fits(patch, members, culprits):
                members.append(patch)
        return members

    def plainly_good(self) -> list[int]:
        """Patches that need no company, the best first: what they gain is far above the noise, by all runs so far."""
        sound = self._searched()[2]
        samples = self._sampled(sound, np.random.default_rng([len(sound), 1]), 4 * SWEEPS, self.sd)[SWEEPS:, :-1]
        plain = np.flatnonzero(np.quantile(samples, 0.95, axis=0) < -FAR * self.sd)
        return sorted(map(int, plain), key=lambda patch: samples[:, patch].mean())

    def _fits(self, patch: int, members: Sequence[int], culprits: Sequence[set[int]]) -> bool:
        """Whether a run may hold a patch beside these."""
        far_worse = any(culprit <= {patch, *members} for culprit in culprits)
        return not far_worse and not any(self.clash(patch, other) for other in members)

    def _searched(self) -> tuple[list[set[int]], tuple[int, ...], list[int]]:
        """(what makes runs far worse: one patch, or some that do so only together; what the next run of a search holds;
        places of the runs that are not far worse).

        In a search `needed` and `others` are far worse together, and `needed` with the first `fine` of the others is
        not. Of the shortest beginning of the others that is, the last one is needed. What needs more than two is not
        searched further: chance may have made the run far worse."""
        culprits: list[set[int]] = []
        needed, others, asked = (), (), ()
        fine, middle, sound = 0, 0, []
        for place, (members, score) in enumerate(self.runs):
            bad = bool(members) and (score is None or score > self.parent + FAR * self.sd)
            if not bad and score is not None:
                sound.append(place)
            if asked and members == asked:
                others, fine = (others[:middle], fine) if bad else (others, middle)
            elif bad and not asked and not any(culprit <= {*members} for culprit in culprits):
                needed, others, fine = (), members, 0
            else:
                continue
            if others and len(others) == fine + 1:
                needed, others, fine = (*needed, others[-1]), others[:-1], -1  # nothing is known of `needed` alone
            if not others or len(needed) == 2 and fine == 0:
                culprits.append({*needed, *others})
                asked = ()
            else:
                middle = 0 if fine < 0 else (fine + len(others) + 1) // 2
                asked = tuple(sorted((*needed, *others[:middle])))
        return culprits, asked, sound

    def _held(self, sound: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(what each run held, (runs, count + 1), its score less the parent's). The last column is the parent's mean,
        as it differs from what was known of it."""
        held = np.zeros((len(sound), self.count + 1))
        held[:, -1] = 1
        for row, place in enumerate(sound):
            held[row, list(self.runs[place][0])] = 1
        return held, np.array([self.runs[place][1] for place in sound], float) - self.parent

    def _sampled(self, sound: list[int], rng: np.random.Generator, sweeps: int, sd: float) -> np.ndarray:
        """Samples of the patches' effects and of the parent's (sweeps, count + 1), at a noise of `sd`."""
        held, scores = self._held(sound)
        squares, products = held.T @ held / sd**2, held.T @ scores / sd**2
        scale = max(1.0, self.sd / SCALE)
        shares = np.tile(np.log(MIXTURE[:, 0]), (self.count, 1))
        means, sds = MIXTURE[:, 1] * scale, MIXTURE[:, 2] * scale
        effects, samples = np.zeros(self.count + 1), np.zeros((sweeps, self.count + 1))
        prior_mean, precision = np.zeros(self.count + 1), np.full(self.count + 1, 1 / self.sd**2)
        for sweep in range(sweeps):
            odds = shares - np.log(sds) - 0.5 * ((effects[:-1, None] - means) / sds) ** 2
            if sweep == 0:
                odds = shares  # nothing is known yet
            component = (odds + rng.gumbel(size=odds.shape)).argmax(1)
            prior_mean[:-1], precision[:-1] = means[component], 1 / sds[component] ** 2
            factor = np.linalg.cholesky(squares + np.diag(precision))
            mean = np.linalg.solve(factor, products + precision * prior_mean)
            effects = np.linalg.solve(factor.T, mean + rng.standard_normal(len(mean)))
            samples[sweep] = effects
        return samples


def tested(noise: float) -> int:
    """Runs of the joint patch, and of the parent, in the test of a block."""
    return round(float(np.interp(math.log(noise), np.log(NOISES), TESTED)))
