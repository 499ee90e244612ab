"""What holds, fades, reverses, or can't be told."""

import math
import random

import pytest

from lab.compare import classify
from lab.compare.classify import FADES, HOLDS, OPEN, REVERSES
from lab.compare.effects import Effect


def effect(value, error=0.001, df=20, **facts):
    return Effect(value, value, error, df, noise=facts.pop("noise", error), **facts)


SOURCE = effect(-0.010, known=True)


@pytest.mark.parametrize(
    "value, said",
    [
        (-0.010, HOLDS),
        (-0.020, HOLDS),
        (-0.0051, HOLDS),
        (0.0, FADES),
        (-0.002, FADES),
        (0.001, FADES),
        (0.004, REVERSES),
        (0.010, REVERSES),
    ],
)
def test_a_precise_effect_elsewhere_is_classed_by_its_share(value, said):
    found, why, more = classify.classify(SOURCE, effect(value))
    assert found == said and more is None and f"{-value / 0.010:+.0%}" in why


@pytest.mark.parametrize("value", [-0.004, -0.001, 0.0005])
def test_an_imprecise_one_is_left_open_with_the_runs_that_would_tell(value):
    found, why, more = classify.classify(SOURCE, effect(value, 0.004, df=20))
    assert found == OPEN and more["here"] > 0 and more["source"] == 0


def test_a_loss_that_is_found_everywhere_holds():
    assert classify.classify(effect(0.010), effect(0.012))[0] == HOLDS
    assert classify.classify(effect(0.010), effect(-0.012))[0] == REVERSES


def test_without_a_real_source_nothing_is_said():
    source = effect(-0.001, known=True)
    found, why, more = classify.classify(source, effect(0.05))
    assert found == OPEN and "where it was found" in why
    assert more["source"] > 3 and more["here"] == 0
    # What was chosen for being better and is worse has nothing to hold.
    assert classify.classify(effect(0.05, known=True), effect(-0.05)) == (OPEN, why, None)


def test_one_side_is_tested_where_the_way_was_known():
    at = 1.8 * 0.001  # beyond Student's t of 5 % on one side, within that of 2.5 %
    assert classify.real(effect(-at, known=True)) and not classify.real(effect(at, known=True))
    assert not classify.real(effect(-at)) and not classify.real(effect(at))
    assert classify.real(effect(-2.5 * 0.001)) and classify.real(effect(2.5 * 0.001))


def test_a_source_that_was_not_measured_again_says_nothing_and_asks_for_runs_there():
    found, why, more = classify.classify(effect(-0.010, biased=True, known=True, picked=True), effect(-0.010))
    assert found == OPEN and why.startswith("not measured since it was selected") and more["source"] >= 1
    for known in (False, True):  # discarded on top of what was kept, or replayed there
        _, why, more = classify.classify(effect(-0.010, biased=True, known=known), effect(-0.010))
        assert (why, more) == ("its parent there is biased by selection", None)


def test_without_noise_nothing_is_told():
    bare = Effect(-0.01, -0.01)
    for pair in ((bare, SOURCE), (SOURCE, bare)):
        found, why, more = classify.classify(*pair)
        assert found == OPEN and "unconfirmed" in why and more is None


def test_the_same_way_and_too_little_is_neither():
    found, why, _ = classify.classify(effect(-0.010, 0.004, known=True), effect(-0.004, 0.001))
    assert found == OPEN and why.startswith("the same direction")


def test_less_than_half_that_may_be_the_other_way_is_said():
    found, why, _ = classify.classify(effect(-0.010, 0.001, known=True), effect(0.006, 0.004))
    assert found == OPEN and "fades or reverses" in why


def test_a_parent_that_is_biased_is_not_compared_with():
    found, why, _ = classify.classify(SOURCE, effect(-0.010, biased=True))
    assert found == OPEN and "--each" in why


@pytest.mark.parametrize("truth", [-0.010, 0.0])
def test_the_runs_asked_for_give_the_power_promised(truth):
    rng, sd, told, before = random.Random(3), 0.006, 0, effect(-0.009, 0.006 * math.sqrt(2 / 2), df=40, noise=0.006)
    source = effect(-0.010, 0.0005, df=40, known=True)
    n = classify.classify(source, before)[2]["here"]
    error = 1 / math.sqrt(1 / before.error**2 + n / (2 * sd**2))
    for _ in range(300):
        said = classify.classify(source, effect(rng.gauss(truth, error), error, df=40))[0]
        told += said == (HOLDS if truth else FADES)
    assert 0.7 < told / 300 <= 1.0


@pytest.mark.parametrize("value, error, few", [(-0.0049, 0.0005, False), (-0.002, 0.002, True), (0.006, 0.003, True)])
def test_more_runs_are_asked_for_only_where_they_would_tell(value, error, few):
    """Half of the source's is the boundary: what lies on it is told by no number of runs."""
    found, _, more = classify.classify(effect(-0.010, 0.0005, df=40, known=True), effect(value, error, df=40))
    assert found == OPEN and (more is not None) == few
    assert not few or 1 <= more["here"] < 10 and more["source"] == 0
