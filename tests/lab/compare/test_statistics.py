"""Shares and ranks, with their intervals."""

import math
import random

import pytest

from lab.compare.effects import odds_ratio, ranks, shrunken, spearman, wilson


def test_wilson():
    low, high = wilson(0, 10)
    assert low == 0 and 0.15 < high < 0.25
    assert wilson(10, 10) == pytest.approx((1 - high, 1.0))
    low, high = wilson(50, 100)
    assert low + high == pytest.approx(1) and high - low == pytest.approx(2 * 1.6449 * 0.05, rel=0.03)


def test_ranks_share_ties():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_spearman_follows_order_and_not_size():
    rho, low, high = spearman([1, 2, 3, 4, 5, 6], [1, 10, 100, 1000, 900, 1e6])
    assert rho == pytest.approx(1 - 6 * 2 / (6 * 35)) and low < rho < high < 1
    assert spearman([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])[0] == pytest.approx(-1)


def test_spearman_with_ties_is_pearson_of_the_ranks():
    xs, ys = [1.0, 1.0, 2.0, 3.0, 3.0, 4.0], [2.0, 1.0, 1.0, 4.0, 3.0, 3.0]
    a, b = ranks(xs), ranks(ys)
    mean = 3.5
    expected = sum((x - mean) * (y - mean) for x, y in zip(a, b)) / math.sqrt(
        sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    )
    assert spearman(xs, ys)[0] == pytest.approx(expected)


def test_spearman_needs_pairs_that_differ():
    assert spearman([1, 2, 3], [1, 2, 3]) is None
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_spearman_of_equal_orders_has_an_interval_that_ends_at_one():
    rho, low, high = spearman([1, 2, 3, 4, 5], [2, 4, 6, 8, 9])
    assert rho == high == pytest.approx(1) and -1 < low < 0.8


def test_spearmans_interval_covers():
    rng, inside = random.Random(0), 0
    for _ in range(400):
        xs = [rng.gauss(0, 1) for _ in range(20)]
        ys = [0.6 * x + 0.8 * rng.gauss(0, 1) for x in xs]
        _, low, high = spearman(xs, ys)
        inside += low <= 6 / math.pi * math.asin(0.6 / 2) <= high  # what Spearman's rho is for normal pairs
    assert 0.85 < inside / 400 < 0.95


def test_rates_are_drawn_together_the_more_the_fewer_trials_they_have():
    few, many, other = shrunken([(2, 2), (40, 100), (10, 100)])
    assert 0.10 < other[0] < 0.13 and 0.37 < many[0] < 0.41 and many[0] < few[0] < 0.8
    assert few[2] - few[1] > many[2] - many[1] and all(low < rate < high for rate, low, high in (few, many, other))
    (single,) = shrunken([(0, 3)])
    assert 0 < single[1] < single[0] < single[2] < 0.6


def test_drawn_rates_are_nearer_to_the_truth_than_raw_shares_and_their_intervals_hold_it():
    rng, raw, drawn, held, n = random.Random(3), 0.0, 0.0, 0, 0
    for _ in range(100):
        truth = [1 / (1 + math.exp(-rng.gauss(-1.5, 0.6))) for _ in range(10)]
        counts = [
            (sum(rng.random() < p for _ in range(trials)), trials) for p in truth if (trials := rng.randint(3, 40))
        ]
        for p, (k, trials), (rate, low, high) in zip(truth, counts, shrunken(counts)):
            raw, drawn, held, n = raw + (k / trials - p) ** 2, drawn + (rate - p) ** 2, held + (low <= p <= high), n + 1
    assert drawn < 0.6 * raw and 0.85 < held / n < 0.95


def test_the_odds_of_one_group_have_woolfs_interval():
    ratio, low, high = odds_ratio([(10, 15, 5, 20)])
    half = 1.6449 * math.sqrt(1 / 10 + 1 / 5 + 1 / 5 + 1 / 15)
    assert ratio == pytest.approx(10 * 15 / (5 * 5))
    assert (math.log(low), math.log(high)) == pytest.approx((math.log(ratio) - half, math.log(ratio) + half))


def test_odds_are_compared_within_groups_and_not_across_them():
    """Each group alone says 1; their sums do not."""
    groups = [(8, 10, 80, 100), (10, 100, 1, 10)]
    assert odds_ratio(groups)[0] == pytest.approx(1.0)
    assert odds_ratio([tuple(map(sum, zip(*groups)))])[0] < 0.1
    assert odds_ratio([(3, 3, 4, 4)]) is None and odds_ratio([(0, 5, 2, 9)]) is None and odds_ratio([]) is None


def test_the_interval_of_odds_holds_the_truth():
    rng, held, n = random.Random(5), 0, 400
    for _ in range(n):
        groups = []
        for _ in range(6):
            odds = math.exp(rng.gauss(-1.5, 0.7))
            rates, trials = (
                (1.7 * odds / (1 + 1.7 * odds), odds / (1 + odds)),
                (rng.randint(5, 40), rng.randint(20, 80)),
            )
            groups.append(
                [part for p, t in zip(rates, trials) for part in (sum(rng.random() < p for _ in range(t)), t)]
            )
        _, low, high = odds_ratio(groups)
        held += low <= 1.7 <= high
    assert 0.87 <= held / n <= 0.93
