"""The gate: exact quantiles, every branch of a verdict, an account that runs short, its errors in simulated nights."""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from lab.verdict import gate
from lab.verdict.gate import Account, Noise, next_step

SD = 0.001
SURE = Noise(SD, 40)  # as known as it gets in a session
PARENT = {42: 1.0, 43: 1.0, 44: 1.0}


def runs(*gains: float) -> dict[int, float]:
    """Results of a candidate whose runs are so much better than PARENT, in noise's standard deviations."""
    return {gate.seed(i): 1.0 - gain * SD for i, gain in enumerate(gains)}


def step(*gains: float, parent=PARENT, noise=SURE, account=Account(), simpler=False) -> gate.Step:
    return next_step(runs(*gains), parent, noise, account, simpler)


# --- Student's t ---

# Abramowitz & Stegun, table 26.10, and every other printed table: t that is exceeded with this probability.
TABLE = [
    (0.25, 1, 1.000),
    (0.05, 1, 6.314),
    (0.025, 2, 4.303),
    (0.05, 3, 2.353),
    (0.025, 4, 2.776),
    (0.005, 5, 4.032),
    (0.0005, 6, 5.959),
    (0.1, 7, 1.415),
    (0.025, 10, 2.228),
    (0.0005, 10, 4.587),
    (0.005, 15, 2.947),
    (0.01, 30, 2.457),
    (0.025, 120, 1.980),
    (0.0005, 120, 3.373),
]


@pytest.mark.parametrize("tail, df, t", TABLE)
def test_quantiles_are_those_of_the_tables(tail, df, t):
    assert gate.t_quantile(tail, df) == pytest.approx(t, abs=6e-4)
    assert gate.t_tail(gate.t_quantile(tail, df), df) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize("t", [-3.0, -0.7, 0.0, 0.5, 2.0, 40.0])
def test_tails_in_closed_form(t):
    """1, 2 and 4 degrees of freedom have elementary distribution functions."""
    assert gate.t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)
    assert gate.t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-9)
    x = t / math.sqrt(1 + t * t / 4)
    assert gate.t_tail(t, 4) == pytest.approx(0.5 - 3 / 8 * x * (1 - x * x / 12), rel=1e-9)


@pytest.mark.parametrize("df", [3, 5, 7, 8, 13])
def test_tails_are_the_integral_of_the_density(df):
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    width = 1e-3
    within = sum(scale * (1 + ((i + 0.5) * width) ** 2 / df) ** (-(df + 1) / 2) * width for i in range(2500))
    assert gate.t_tail(2.5, df) == pytest.approx(0.5 - within, rel=1e-5)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert gate.t_tail(2.0, 4000) == pytest.approx(gate.normal_tail(2.0), rel=2e-3)
    assert gate.normal_tail(1.959964) == pytest.approx(0.025, rel=1e-6)


def test_interval_of_paired_differences():
    mean, low, high = gate.interval([0.001, 0.002, 0.003])
    assert (mean, low, high) == pytest.approx(
        (0.002, 0.002 - 2.91999 * 0.001 / math.sqrt(3), 0.002 + 2.91999 * 0.001 / math.sqrt(3)), rel=1e-4
    )


# --- Noise ---


def test_noise_pools_configurations_and_the_prior():
    """Three runs 1 apart have variance 1 with 2 degrees of freedom; the prior has lost one of its four."""
    noise = gate.pooled([[1.0, 2.0, 3.0], [7.0]], prior_sd=2.0)
    assert noise.df == 3 + 2
    assert noise.sd == pytest.approx(math.sqrt((3 * 4.0 + 2 * 1.0) / 5))


def test_differences_between_configurations_are_no_noise():
    assert gate.pooled([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]], 1e-6).sd < 1e-6


def test_without_repeats_there_is_the_prior():
    assert gate.pooled([[1.0]], 0.02) == Noise(0.02, 4)


def test_repeats_outvote_a_wrong_prior():
    rng = random.Random(1)
    groups = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(20)]
    right, large, small = (gate.pooled(groups, prior) for prior in (1.0, 3.0, 1 / 3))
    assert right.df == large.df == small.df == 41
    assert large.sd < 1.12 * right.sd and small.sd > 0.97 * right.sd


def test_identical_repeats_are_not_taken_for_a_noise_of_zero():
    noise = gate.pooled([[1.0] * 3] * 10, SD)
    assert 0 < noise.sd < SD
    assert next_step({42: 0.5}, PARENT, noise, Account()).action == "keep"


def test_a_prior_has_to_be_above_zero():
    with pytest.raises(ValueError, match="above 0"):
        gate.pooled([], 0.0)


# --- Steps ---


def test_every_seed_is_the_harness_s_and_round_zero_comes_first():
    assert len({gate.seed(i) for i in range(10)}) == 10
    assert (step().action, step().seed) == ("run candidate", gate.seed(0))


def test_one_run_decides_a_loss():
    found = step(-1.0)
    assert (found.action, found.evidence.better, found.evidence.near_miss, found.evidence.stake) == (
        "discard",
        False,
        False,
        0.0,
    )
    assert "0.001000 bits per byte worse" in str(found.reason) and "0.9 standard errors" in str(found.reason)


def test_better_by_less_than_the_screen_is_discarded_even_if_the_level_is_generous():
    rich = Account(keeps=100)
    assert rich.level > 0.3
    assert step(0.6 * math.sqrt(4 / 3), account=rich).action == "discard"
    assert step(0.8 * math.sqrt(4 / 3), account=rich).action == "run candidate"


def test_a_first_run_without_a_chance_at_the_level_is_discarded_as_a_near_miss():
    found = step(1.3)  # 1.1 standard errors
    assert (found.action, found.evidence.near_miss, found.evidence.stake) == ("discard", True, 0.0)
    assert "chance" in str(found.reason) and "20%" in str(found.reason)


def test_a_near_miss_is_at_least_one_standard_error_better():
    assert not step(0.95 * math.sqrt(4 / 3)).evidence.near_miss
    assert step(1.05 * math.sqrt(4 / 3)).evidence.near_miss


def test_a_promising_run_is_repeated_with_the_next_seed():
    found = step(3.0)
    assert (found.action, found.seed) == ("run candidate", gate.seed(1))
    assert not found.evidence.near_miss and found.evidence.stake == 0.0  # not a verdict


def test_the_parent_is_run_on_the_same_seeds():
    alone = {gate.seed(0): 1.0}
    assert step(3.5, parent=alone).seed == gate.seed(1)
    found = step(3.5, 3.5, parent=alone)
    assert (found.action, found.seed) == ("run parent", gate.seed(1))
    assert step(3.5, parent={}).action == "run parent"


def test_nothing_is_kept_before_the_parent_has_run_on_the_same_seeds():
    alone = {gate.seed(0): 1.0}
    assert step(9.0, 9.0, parent=alone).action == "run parent"
    assert step(9.0, 9.0, parent=alone | {gate.seed(1): 1.0}).action == "keep"


def test_the_overwhelming_is_kept_after_one_run():
    found = step(10.0)
    assert (found.action, found.evidence.better, found.evidence.near_miss) == ("keep", True, False)
    assert found.evidence.stake == Account().stake and found.evidence.p < found.evidence.level * gate.SPLIT[0]


def test_early_looks_ask_for_more_than_the_last():
    """The same p-value, between the shares of the rounds."""
    p = Account().level * 0.5
    t = gate.t_quantile(p, SURE.df)
    for rounds, action in ((1, "run candidate"), (2, "run candidate"), (3, "keep")):
        gain = t * math.sqrt(1 / rounds + 1 / 3)
        assert step(*[gain] * rounds).action == action, rounds


def test_what_fades_is_discarded_before_the_third_run():
    found = step(3.0, 0.0)
    assert (found.action, found.evidence.runs, found.evidence.stake) == ("discard", 2, Account().stake)


def test_three_runs_are_the_last():
    found = step(2.9, 2.2, 2.2)
    assert (found.action, found.evidence.near_miss, found.evidence.runs) == ("discard", True, 3)
    assert found.evidence.p > found.evidence.level * gate.SPLIT[2]


def test_few_degrees_of_freedom_ask_for_more():
    gains = (3.2, 3.2, 3.2)
    assert step(*gains).action == "keep"
    assert step(*gains, noise=Noise(SD, 5)).action == "discard"


def test_the_reported_interval_and_p():
    found = step(3.0, 3.0, 3.0)
    assert found.evidence.gain == pytest.approx(3 * SD) and found.evidence.error == pytest.approx(SD * math.sqrt(2 / 3))
    assert found.evidence.high - found.evidence.gain == pytest.approx(gate.t_quantile(0.05, 40) * found.evidence.error)
    assert found.evidence.low + found.evidence.high == pytest.approx(2 * found.evidence.gain)
    assert found.evidence.p == pytest.approx(gate.t_tail(3 / math.sqrt(2 / 3), 40))


def test_a_score_that_is_no_number_is_never_kept():
    for score in (math.nan, math.inf, -math.inf):
        found = step(3.0, score)
        assert (found.action, found.evidence.near_miss) == ("discard", False)
        assert Account().after(found.evidence) == Account()


def test_more_baseline_runs_than_rounds_count():
    parent = {gate.seed(i): 1.0 for i in range(8)}
    found = step(2.5, 2.5, parent=parent)
    assert found.action == "run candidate" and found.evidence.error == pytest.approx(SD * math.sqrt(1 / 2 + 1 / 8))
    assert step(2.5, 2.5, 2.5, parent=parent).action == "keep"
    assert step(1.9, 1.9, parent=parent | {gate.seed(i): 1.0 for i in (8, 9)}).action == "run candidate"


def test_a_round_that_is_missing_is_made_up():
    candidate = {gate.seed(0): 0.997, gate.seed(2): 0.997}
    assert next_step(candidate, PARENT, SURE, Account()).seed == gate.seed(1)


# --- Simplifications ---


def test_simpler_and_no_worse_is_kept():
    gains = (1.0, 1.0, 1.0)
    assert step(*gains).action == "discard"
    found = step(*gains, simpler=True)
    assert (found.action, found.evidence.simpler, found.evidence.better) == ("keep", True, False)
    assert 0 < found.evidence.loss <= gate.MARGIN * SD


def test_simpler_with_a_loss_that_is_not_excluded_is_discarded():
    """It takes more than 'no worse in the mean': the interval has to end above half the noise."""
    assert step(0.8, 0.8, 0.8, simpler=True).action == "discard"
    assert step(-3.0, simpler=True).action == "discard"


def test_simpler_is_run_again_where_a_mere_gain_would_not():
    assert step(0.5).action == "discard"
    assert step(0.5, simpler=True).action == "run candidate"


def test_simpler_and_clearly_better_is_a_gain():
    found = step(9.0, simpler=True)
    assert found.evidence.better and not found.evidence.simpler and found.evidence.loss == 0.0


def test_losses_of_simplifications_are_added_up_to_one_noise():
    account = Account()
    for _ in range(10):
        found = step(1.0, 1.0, 1.0, simpler=True, account=account)
        account = account.after(found.evidence)
    assert 0 < account.loss <= SD
    assert found.action == "discard"
    assert step(0.5, simpler=True, account=Account(loss=SD)).action == "discard"  # no room: not even run again
    assert step(2.0, 2.0, 2.0, simpler=True, account=Account(loss=2 * SD)).evidence.simpler  # no loss left: kept


def test_simpler_and_equal_to_the_last_bit_is_kept_after_one_run():
    """In one night of a thousand cases none were, although program.md promises it."""
    rng = random.Random(3)
    for _ in range(300):
        score = rng.gauss(1, SD)
        parent = {gate.seed(0): score, gate.seed(1): rng.gauss(1, SD)}
        found = next_step({gate.seed(0): score}, parent, SURE, Account(), simpler=True)
        assert (found.action, found.evidence.simpler, found.evidence.stake) == ("keep", True, 0.0)
        assert next_step({gate.seed(0): score}, parent, SURE, Account()).action != "keep"
        other = next_step({gate.seed(0): math.nextafter(score, 2)}, parent, SURE, Account(), simpler=True)
        assert str(other.reason) != str(found.reason)


# --- The account ---


def test_evidence_survives_json_and_makes_the_account():
    evidence = step(3.0, 0.0).evidence
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=type(evidence)) == evidence
    assert Account().after(evidence) == Account(staked=Account().stake, tests=1)


def test_what_ends_after_one_run_costs_nothing():
    assert Account().after(step(-1.0).evidence) == Account()


def test_stakes_never_exceed_what_there_is():
    account = Account()
    for _ in range(5000):
        account = account.after(step(3.0, 0.0, account=account).evidence)
    assert 0 < account.staked < gate.ALPHA
    assert account.level > 0


def test_open_tests_reserve_what_they_stake():
    account, stakes = Account(), []
    for _ in range(200):
        stakes.append(account.stake)
        account = account.reserving(account.stake)
    assert sum(stakes) < gate.ALPHA and all(stake > 0 for stake in stakes)
    assert account.stake > 0 and step(20.0, account=account).action == "keep"


def test_an_account_without_anything_left_keeps_nothing_and_ends():
    empty = Account(staked=1.0)
    assert empty.stake == 0 and gate.t_quantile(0.0, 5) == math.inf
    assert step(50.0, account=empty).action == "discard"
    assert gate.smallest_detectable(SURE, empty) == math.inf


def test_a_keep_earns_and_frees_the_next_levels():
    poor = Account(staked=0.04, keeps=1, tests=12)
    rich = poor.after(step(20.0, account=poor).evidence)
    assert rich.keeps == 2 and rich.tests == 0
    assert rich.level > 5 * poor.level
    assert rich.staked < 2 * gate.ALPHA


def test_the_first_keep_earns_nothing():
    """What makes the bound one on nights with a false keep, where nothing is to be found."""
    assert Account(keeps=1).stake == Account().stake
    assert Account(keeps=2).stake == pytest.approx(2 * Account().stake)


def test_simplifications_earn_nothing():
    kept = step(1.0, 1.0, 1.0, simpler=True)
    assert Account().after(kept.evidence).keeps == 0


# --- Near misses, and what can be seen ---


def test_near_misses_wait_until_there_are_enough():
    misses = [(i, 0.001 * i, 0.001) for i in range(1, 5)]
    assert gate.together(misses) == []
    assert gate.together([*misses, (5, 0.0001, 0.001)]) == [4, 3, 2, 1, 5]


def test_near_misses_are_ranked_by_evidence_not_by_size():
    misses = [(1, 0.004, 0.004), (2, 0.003, 0.001), (3, 0.002, 0.001), (4, 0.002, 0.0015), (5, 0.01, 0.009)]
    assert gate.together(misses) == [2, 3, 4, 5, 1]


def test_smallest_detectable_grows_with_noise_ignorance_and_poverty():
    least = gate.smallest_detectable(SURE, Account())
    assert 3 * SD < least < 4 * SD
    assert gate.smallest_detectable(Noise(2 * SD, 40), Account()) == pytest.approx(2 * least)
    assert gate.smallest_detectable(Noise(SD, 5), Account()) > 1.2 * least
    assert gate.smallest_detectable(SURE, Account(staked=0.04, tests=20)) > least
    assert gate.smallest_detectable(SURE, Account(), power=0.5) < least


# --- Calibration, by simulation ---


def test_p_is_uniform_when_a_change_is_worth_nothing():
    """With the noise estimated from 5 degrees of freedom: a normal distribution's tail would be wrong by a factor."""
    rng, count = random.Random(5), 8_000
    below = {0.01: 0, 0.05: 0, 0.25: 0}
    for _ in range(count):
        groups = [[rng.gauss(0, SD) for _ in range(3)], [rng.gauss(0, SD) for _ in range(4)]]
        noise = gate.pooled(groups, SD, prior_df=0)
        p = next_step({42: rng.gauss(1, SD)}, {42: rng.gauss(1, SD)}, noise, Account()).evidence.p
        for limit in below:
            below[limit] += p < limit
    for limit, found in below.items():
        assert found / count == pytest.approx(limit, abs=4 * math.sqrt(limit / count))


def test_the_smallest_detectable_gain_is_kept_about_as_often_as_told():
    """As a session's first change, the noise known from its prior and its repeats."""
    rng, count, kept = random.Random(8), 800, 0
    for _ in range(count):
        parent, candidate = {seed: rng.gauss(1, SD) for seed in PARENT}, {}

        def noise(groups=(parent, candidate)):
            return gate.pooled([list(group.values()) for group in groups], SD)

        least = gate.smallest_detectable(noise(), Account())
        while (found := next_step(candidate, parent, noise(), Account())).action == "run candidate":
            candidate[found.seed] = rng.gauss(1 - least, SD)
        kept += found.action == "keep"
    assert kept / count == pytest.approx(0.8, abs=0.05)


def night(rng: random.Random, effects, experiments: int, noise_df: int = 40) -> tuple[int, int]:
    """(keeps, false keeps) of a session with known noise."""
    true, parent, account, keeps, false = 1.0, dict(PARENT), Account(), 0, 0
    parent = {seed: rng.gauss(true, SD) for seed in parent}
    for _ in range(experiments):
        effect, candidate = effects(rng), {}
        while (found := next_step(candidate, parent, Noise(SD, noise_df), account)).action.startswith("run"):
            own = found.action == "run candidate"
            (candidate if own else parent)[found.seed] = rng.gauss(true + effect * own, SD)
        account = account.after(found.evidence)
        if found.action == "keep":
            true, parent, keeps, false = true + effect, candidate, keeps + 1, false + (effect >= 0)
    return keeps, false


def test_nights_of_worthless_changes_hardly_ever_hold_a_false_keep():
    rng = random.Random(11)
    nights = [night(rng, lambda _: 0.0, 60) for _ in range(250)]
    assert sum(false > 0 for _, false in nights) / 250 <= gate.ALPHA
    assert sum(keeps for keeps, _ in nights) > 0  # a gate that keeps nothing would pass, too


def test_nights_with_gains_find_them_and_few_keeps_are_false():
    rng = random.Random(12)
    nights = [night(rng, lambda rng: -4 * SD if rng.random() < 0.15 else 0.0, 60) for _ in range(60)]
    keeps, false = (sum(column) for column in zip(*nights))
    assert false / keeps <= gate.ALPHA
    assert (keeps - false) / (60 * 60 * 0.15) > 0.7
