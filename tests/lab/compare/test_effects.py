"""Which runs an effect rests on, and how sure it is."""

import math
import random

import pytest
from records import change, record, replay, trials

from lab.verdict import gate
from lab.compare import effects


def of(session, number=1):
    return effects.effect(session, session.changes[number])


def test_a_discarded_change_is_measured_by_all_of_its_runs():
    found = of(record("d", "t", change(1, [1.01, 1.03]), base=[1.0, 1.02, 1.04]))
    assert found.value == pytest.approx(0.0) and not found.flattered and not found.known
    assert found.error == pytest.approx(0.001 * math.sqrt(1 / 2 + 1 / 3))
    assert found.high - found.value == pytest.approx(gate.t_quantile(0.05, 10) * found.error)
    assert found.low + found.high == pytest.approx(2 * found.value)


@pytest.mark.parametrize("status, near_miss", [("keep", False), ("discard", True)])
def test_what_was_chosen_for_its_scores_is_flattered_until_it_and_its_parent_are_run_again(status, near_miss):
    chosen = change(1, [0.9, 0.9], status, near_miss=near_miss)
    assert of(record("d", "t", chosen)).flattered
    again = trials([0.99, 0.97], beside=2)
    only = of(record("d", "t", change(1, [0.9, 0.9], status, near_miss=near_miss, after=again)))
    assert only.flattered and only.runs == 4  # its parent was not
    both = of(
        record(
            "d", "t", change(1, [0.9, 0.9], status, near_miss=near_miss, after=again), after=trials([1.01], beside=2)
        )
    )
    assert not both.flattered and both.known and (both.runs, both.parent_runs) == (2, 1)
    assert both.value == pytest.approx(0.98 - 1.01)


def test_runs_of_the_parent_beside_a_kept_change_had_a_part_in_its_choice():
    again = trials([0.95], beside=2)
    beside = record("d", "t", change(1, [0.9], "keep", after=again), after=trials([1.2], beside=1))
    assert of(beside).flattered


def test_a_parent_that_was_kept_counts_by_its_later_runs():
    parent = change(1, [0.90], "keep", after=trials([0.95], beside=2))
    found = of(record("d", "t", parent, change(2, [0.99], parent=1)), 2)
    assert found.value == pytest.approx(0.04) and not found.flattered
    lucky = of(record("d", "t", change(1, [0.90], "keep"), change(2, [0.99], parent=1)), 2)
    assert lucky.flattered and lucky.value == pytest.approx(0.09)


def test_a_replay_was_chosen_elsewhere():
    found = of(record("d", "t", replay(1, [0.9], "a/b/" + "1" * 16, "keep")))
    assert not found.flattered and found.known and found.value == pytest.approx(-0.1)


def test_runs_of_another_budget_or_evaluator_are_left_out():
    longer, other = trials([0.5], budget=1200.0), trials([0.5], eval="other")
    found = of(record("d", "t", change(1, [1.1], after=longer + other), after=longer))
    assert found.value == pytest.approx(0.1) and (found.runs, found.parent_runs) == (1, 3)


def test_without_repeats_nothing_is_sure():
    found = of(record("d", "t", change(1, [0.9], "keep"), base=[1.0], noise=None))
    assert found.value == pytest.approx(-0.1) and found.error is found.low is None
    assert not found.sure and not found.flattered


@pytest.mark.parametrize("status", ["crash", "invalid"])
def test_what_failed_has_no_effect(status):
    assert of(record("d", "t", change(1, [0.1], status))) is None


def test_sessions_of_one_place_are_weighted_by_what_they_know():
    one = of(record("d", "a", change(1, [1.1] * 3)))
    other = of(record("d", "b", change(1, [1.4] * 3), noise=0.002, df=4))
    found = effects.together([one, other])
    assert found.value == pytest.approx((4 * 0.1 + 1 * 0.4) / 5)
    assert 1 / found.error**2 == pytest.approx(1 / one.error**2 + 1 / other.error**2)
    # Satterthwaite: shares 0.8 and 0.2 of the variance
    assert found.df == math.floor(1 / (0.8**2 / 10 + 0.2**2 / 4)) and found.runs == 6


def test_a_flattered_effect_is_taken_only_where_there_is_no_other():
    flattered = of(record("d", "a", change(1, [0.5], "keep")))
    measured = of(record("d", "b", replay(1, [0.99], "d/a/" + "1" * 16)))
    assert effects.together([flattered, measured]) == measured
    assert effects.together([flattered]) == flattered and effects.together([]) is None


def test_satterthwaite_of_equal_parts_adds_their_degrees():
    assert effects.satterthwaite([(2.0, 5), (2.0, 5)]) == 10
    assert effects.satterthwaite([(2.0, 5), (1e-9, 1)]) == 5


@pytest.mark.parametrize(
    "score, tokens, words",
    [
        (0.9, 120.0, "more tokens"),
        (0.9, 80.0, "fewer tokens, better per token"),
        (0.9, 101.0, "as many tokens, better per token"),
        (1.1, 80.0, "fewer tokens"),
        (1.1, 120.0, "more tokens, worse per token"),
        (1.0, 120.0, ""),
    ],
)
def test_what_an_effect_was_due_to(score, tokens, words):
    found = of(record("d", "t", change(1, [score] * 3, tokens=tokens), tokens=100.0))
    assert effects.due(found) == words and found.tokens == pytest.approx(tokens / 100)
    assert found.flops == pytest.approx(tokens / 100)


def test_nothing_is_said_of_tokens_that_are_unknown():
    assert effects.due(of(record("d", "t", change(1, [0.9] * 3)))) == ""


def test_intervals_hold_what_they_should():
    rng, inside = random.Random(1), 0
    for _ in range(400):
        base, new = ([rng.gauss(mean, 0.001) for _ in range(3)] for mean in (1.0, 1.002))
        noise = gate.pooled([base, new], 0.001)
        found = of(record("d", "t", change(1, new), base=base, noise=noise.sd, df=noise.df))
        inside += found.low <= 0.002 <= found.high
    assert 0.85 < inside / 400 < 0.96
