"""The gate: exact quantiles, every branch of a verdict, an account that runs short, its errors in simulated nights.

Its noise is in test_gate_noise.py."""

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


PATIENT = Account(runs=1000)  # of a session that has kept nothing for long


def parents(count: int) -> dict[int, float]:
    return {gate.seed(i): 1.0 for i in range(count)}


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


def test_what_is_not_better_is_never_run_again_however_patient_the_session():
    assert step(-0.01, account=PATIENT).action == "discard"
    assert step(0.3, account=PATIENT).action == "run candidate"


def test_patience_grows_while_nothing_is_kept_and_ends_with_what_runs_earn():
    def least(account):
        return next(gain for gain in range(100) if step(gain / 10, account=account).action != "discard") / 10

    new, later, late = (least(Account(runs=runs)) for runs in (0, 30, 300))
    assert new > 1.5 * later > 3 * late > 0
    assert least(Account(runs=300, gained=30 * SD)) > 2 * late


def test_a_first_run_that_promises_too_little_is_discarded_as_a_near_miss():
    found = step(1.3)  # 1.1 standard errors
    assert (found.action, found.evidence.near_miss, found.evidence.stake) == ("discard", True, 0.0)
    assert "Another run is not worth it" in str(found.reason)


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
    assert found.evidence.stake == Account().stake and found.evidence.p < found.evidence.level / len(gate.LOOKS)


def test_each_look_asks_for_the_same_and_between_them_nothing_is_kept():
    """A p-value just below a look's share, and one just above."""
    share = Account().level / len(gate.LOOKS)
    for count in range(1, gate.LOOKS[-1] + 1):
        for p, kept in ((0.9 * share, count in gate.LOOKS), (1.1 * share, False)):
            beside = max(3, count)
            gain = gate.t_quantile(p, SURE.df) * math.sqrt(1 / count + 1 / beside)
            assert (step(*[gain] * count, parent=parents(beside)).action == "keep") == kept, count


def test_what_fades_is_discarded_before_the_third_run():
    found = step(3.0, 0.0)
    assert (found.action, found.evidence.runs, found.evidence.stake) == ("discard", 2, Account().stake)


def test_the_last_look_ends_a_test():
    most = gate.LOOKS[-1]
    assert step(*[0.8] * (most - 1), parent=parents(most), account=PATIENT).action.startswith("run")
    found = step(*[0.8] * most, parent=parents(most), account=PATIENT)
    assert (found.action, found.evidence.near_miss, found.evidence.runs) == ("discard", True, most)
    assert found.evidence.p > found.evidence.level / len(gate.LOOKS) and found.reason.code == "tested"


def test_few_degrees_of_freedom_ask_for_more():
    gains = (3.2, 3.2, 3.2)
    assert step(*gains).action == "keep"
    assert step(*gains, noise=Noise(SD, 5)).action != "keep"


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
        assert Account().after(found.evidence) == Account(runs=2)


def test_all_runs_of_a_parent_count():
    found = step(2.5, 2.5, parent=parents(8))
    assert found.evidence.error == pytest.approx(SD * math.sqrt(1 / 2 + 1 / 8))
    assert step(3.4, 3.4).action == "run candidate" and step(3.4, 3.4, parent=parents(8)).action == "keep"


def test_a_parent_is_run_before_its_child_and_more_often_where_many_tests_share_it():
    found = step(3.0, parent=parents(1))
    assert (found.action, found.seed) == ("run parent", gate.seed(1))
    assert step(3.0, parent=parents(2)).action == "run candidate"
    many = Account(tests=5, runs=40)
    assert step(3.0, parent=parents(4), account=many).action == "run parent"
    assert step(3.0, parent=parents(5), account=many).action == "run candidate"
    assert step(3.0, parent=parents(gate.MOST_PARENT), account=Account(tests=99, runs=40)).action == "run candidate"


def test_a_round_that_is_missing_is_made_up():
    candidate = {gate.seed(0): 0.997, gate.seed(2): 0.997}
    assert next_step(candidate, PARENT, SURE, Account()).seed == gate.seed(1)


# --- Simplifications ---

QUIET = Noise(0.4 * gate.MARGIN, 40)


def simplified(*losses: float, noise=QUIET, account=Account()) -> gate.Step:
    """The step after runs that lose so many margins against a parent with as many runs."""
    scores = {gate.seed(i): 1.0 + loss * gate.MARGIN for i, loss in enumerate(losses)}
    return next_step(scores, parents(max(3, len(losses) + 1)), noise, account, simpler=True)


def test_simpler_and_no_worse_is_kept():
    found = simplified(0.001, -0.001, 0.001)
    assert (found.action, found.evidence.simpler, found.evidence.better) == ("keep", True, False)
    assert 0 < found.evidence.loss < gate.MARGIN
    assert step(0.001, -0.001, 0.001, noise=QUIET).action == "discard"  # not simpler


def test_simpler_and_worse_by_the_margin_is_discarded():
    assert simplified(0.5).action == "run candidate"
    assert simplified(1.0, 1.0).action == "discard"
    assert simplified(2.0).action == "discard"


def test_simpler_is_run_again_only_where_that_is_cheap():
    assert simplified(0.01).action == "run candidate"
    noisy = Noise(2 * gate.MARGIN, 40)
    assert simplified(0.01, noise=noisy).action == "discard"
    assert simplified(*[0.5] * gate.CHEAP, noise=Noise(0.6 * gate.MARGIN, 40)).action == "discard"


def test_equal_and_worse_simplifications_are_told_apart_as_often_as_said():
    """Over 600 of each: at most WORSE of those that lose the margin are kept, and most of the equal ones."""
    rng, kept = random.Random(4), {}
    for loss in (0.0, 1.0):
        kept[loss] = 0
        for _ in range(600):
            parent, candidate = {s: rng.gauss(1, QUIET.sd) for s in PARENT}, {}
            while (found := next_step(candidate, parent, QUIET, Account(), simpler=True)).action.startswith("run"):
                own = found.action == "run candidate"
                (candidate if own else parent)[found.seed] = rng.gauss(1 + loss * gate.MARGIN * own, QUIET.sd)
            kept[loss] += found.action == "keep"
    assert kept[1.0] / 600 <= gate.WORSE + 0.02 and kept[0.0] / 600 > 0.7


def test_simpler_and_clearly_better_is_a_gain():
    found = step(9.0, simpler=True)
    assert found.evidence.better and not found.evidence.simpler and found.evidence.loss == 0.0


def test_losses_of_simplifications_are_added_up():
    account = Account()
    for _ in range(10):
        found = simplified(0.1, 0.1, 0.1, 0.1, account=account)
        account = account.after(found.evidence)
    assert 0 < account.loss <= gate.LOSSES and found.action == "discard"
    assert simplified(0.0001, account=Account(loss=gate.LOSSES)).action == "discard"  # no room: not even run again


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
    assert Account().after(evidence) == Account(staked=Account().stake, tests=1, runs=2)


def test_what_ends_after_one_run_costs_nothing():
    assert Account().after(step(-1.0).evidence) == Account(runs=1)


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
    kept = simplified(0.001, -0.001, 0.001)
    assert kept.evidence.simpler and Account().after(kept.evidence).keeps == 0


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
    assert 2.5 * SD < least < 5 * SD
    assert gate.smallest_detectable(Noise(2 * SD, 40), Account()) == pytest.approx(2 * least)
    assert gate.smallest_detectable(Noise(SD, 5), Account()) > 1.05 * least
    assert gate.smallest_detectable(SURE, Account(staked=0.0499)) > least
    assert gate.smallest_detectable(SURE, Account(), power=0.5) < least


# --- Calibration, by simulation ---


def test_further_runs_are_weighed_where_today_s_error_is_smaller_than_theirs_would_be():
    outlook = gate.Outlook(runs=3, parents=3, wanted=3)
    worth = gate._worth(0.01, 0.001, gate.Noise(0.005, 8), 0.01, outlook)  # 3 runs each usually have 0.0041
    assert 0 < worth <= 0.01


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
        while (found := next_step(candidate, parent, noise(), Account())).action.startswith("run"):
            own = found.action == "run candidate"
            (candidate if own else parent)[found.seed] = rng.gauss(1 - least * own, SD)
        kept += found.action == "keep"
    assert 0.8 < kept / count < 0.97  # the parent has three runs, one more than is allowed for


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
    assert (keeps - false) / (60 * 60 * 0.15) > 0.55
