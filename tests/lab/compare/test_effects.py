"""Which runs an effect rests on, and how sure it is."""

import math
import random

import pytest
from records import analysed, session

from lab.compare import effects
from lab.compare.analysis import Analysis
from lab.verdict import gate

SD, DF = 0.001, 10


def of(builder, number=1, noise=SD, df=DF):
    analysis = analysed(builder, noise, df)
    return analysis.effect(analysis.experiments[number])


def test_a_run_of_its_parent_before_its_verdict_is_biased_whatever_it_was_made_for():
    """On several devices the parent is run for a later experiment while an earlier one is being judged."""

    def effect(early: bool):
        builder = session(time=1000.0)
        builder.open(1)
        builder.open(2)
        builder.run(1, 0.99, seed=42)
        if early:
            builder.run(2, 1.02, of=0, seed=45)
        builder.run(1, 0.99, seed=43)
        builder.decide(1, "keep")
        builder.open(3, onto=1)
        builder.run(3, 0.98, of=1, seed=44)
        if not early:
            builder.run(3, 1.02, of=0, seed=45)
        return analysed(builder).effect(builder.state.experiments[1])

    assert effect(early=True).biased and not effect(early=False).biased


def test_a_discarded_change_is_measured_by_all_of_its_runs():
    effect = of(session(base=[1.0, 1.02, 1.04]).change(1, [1.01, 1.03]))
    assert effect.value == pytest.approx(0.0) and not effect.biased and not effect.known
    assert effect.error == pytest.approx(SD * math.sqrt(1 / 2 + 1 / 3))
    assert effect.high - effect.value == pytest.approx(gate.t_quantile(0.05, DF) * effect.error)
    assert effect.low + effect.high == pytest.approx(2 * effect.value)


@pytest.mark.parametrize("status, near_miss", [("keep", False), ("discard", True)])
def test_what_was_chosen_for_its_scores_is_biased_until_it_and_its_parent_are_run_again(status, near_miss):
    def chosen():
        return session().change(1, [0.9, 0.9], status, near_miss=near_miss)

    assert of(chosen()).biased
    only = of(chosen().again(2, 1, [0.99, 0.97]))
    assert only.biased and only.runs == 4  # its parent was not
    both = of(chosen().again(2, 1, [0.99, 0.97]).again(2, 0, [1.01]))
    assert not both.biased and both.known and (both.runs, both.parent_runs) == (2, 1)
    assert both.value == pytest.approx(0.98 - 1.01)


def test_runs_of_the_parent_beside_a_kept_change_had_a_part_in_its_choice():
    beside = session().change(1, [0.9], "keep").again(1, 0, [1.2]).again(2, 1, [0.95])
    assert of(beside).biased and of(beside).parent_runs == 4


def test_a_parent_that_was_kept_counts_by_its_later_runs():
    def parent():
        return session().change(1, [0.90], "keep")

    effect = of(parent().change(2, [0.99], onto=1).again(2, 1, [0.95]), 2)
    assert effect.value == pytest.approx(0.04) and not effect.biased
    lucky = of(parent().change(2, [0.99], onto=1), 2)
    assert lucky.biased and lucky.value == pytest.approx(0.09)


def test_a_replay_was_chosen_elsewhere():
    effect = of(session().replay(1, [0.9], "a/b/" + "1" * 16, "keep"))
    assert not effect.biased and effect.known and effect.value == pytest.approx(-0.1)


def test_runs_of_another_budget_or_evaluator_are_left_out():
    builder = session().change(1, [1.1]).again(2, 1, [0.5], budget=1200.0).again(2, 1, [0.5], eval="other")
    effect = of(builder.again(2, 0, [0.5], budget=1200.0))
    assert effect.value == pytest.approx(0.1) and (effect.runs, effect.parent_runs) == (1, 3)
    assert Analysis(builder.record()).notes == ["left out: 2 runs of 1200 s, not 300 s"]


def test_without_repeats_nothing_is_sure():
    builder = session(base=[1.0]).change(1, [0.9], "keep")
    assert Analysis(builder.record()).noise is None
    effect = of(builder, noise=None)
    assert effect.value == pytest.approx(-0.1) and effect.error is effect.low is None
    assert not effect.sure and not effect.biased


@pytest.mark.parametrize("status", ["crash", "invalid"])
def test_what_failed_has_no_effect(status):
    assert of(session().change(1, [0.1], status)) is None


def test_sessions_of_one_place_are_weighted_by_what_they_know():
    one, other = of(session().change(1, [1.1] * 3)), of(session().change(1, [1.4] * 3), noise=0.002, df=4)
    effect = effects.together([one, other])
    assert effect.value == pytest.approx((4 * 0.1 + 1 * 0.4) / 5)
    assert 1 / effect.error**2 == pytest.approx(1 / one.error**2 + 1 / other.error**2)
    # Satterthwaite: shares 0.8 and 0.2 of the variance
    assert effect.df == math.floor(1 / (0.8**2 / 10 + 0.2**2 / 4)) and effect.runs == 6


def test_a_biased_effect_is_taken_only_where_there_is_no_other():
    biased = of(session().change(1, [0.5], "keep"))
    measured = of(session().replay(1, [0.99], "d/a/" + "1" * 16))
    assert effects.together([biased, measured]) == measured
    assert effects.together([biased]) == biased and effects.together([]) is None


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
    facts = {"total_tokens_M": 100.0, "flops_per_token": 2.0}
    effect = of(session(facts=facts).change(1, [score] * 3, runs={"total_tokens_M": tokens}))
    assert effects.due(effect) == words and effect.tokens == pytest.approx(tokens / 100)
    assert effect.flops == pytest.approx(tokens / 100)


def test_nothing_is_said_of_tokens_that_are_unknown():
    assert effects.due(of(session(facts={"total_tokens_M": None}).change(1, [0.9] * 3))) == ""


def test_flops_come_from_the_model_or_from_a_ledgers_columns():
    def flops(**facts):
        builder = session(facts={"total_tokens_M": 2.0} | facts)
        return effects.quantity(builder.state.runs[1], "flops")

    assert flops(flops_per_token=3e6) == flops(model_tflops=1.5, tokens_per_second=5e5) == 6e12
    assert flops() is flops(tokens_per_second=1.0) is flops(flops_per_token=3.0, total_tokens_M=None) is None


@pytest.mark.parametrize("value", ["words", True, None, -1, 0, 1e308, float("inf"), float("nan"), 10**400])
def test_what_nothing_can_have_measured_is_unknown(value):
    builder = session(facts={"peak_vram_mb": value})
    assert effects.quantity(builder.state.runs[1], "memory") is None


def test_intervals_hold_what_they_should():
    rng, inside = random.Random(1), 0
    for _ in range(400):
        base, new = ([rng.gauss(mean, 0.001) for _ in range(3)] for mean in (1.0, 1.002))
        noise = gate.pooled([base, new], 0.001)
        effect = of(session(base=base).change(1, new), noise=noise.sd, df=noise.df)
        inside += effect.low <= 0.002 <= effect.high
    assert 0.85 < inside / 400 < 0.96


def test_what_disturbance_explains_is_no_effect():
    """A busy machine costs 0.1 for a disturbance of 1: the change's runs had one of 0.5, the baseline's none."""
    builder = session(base=[1.0, 1.0])
    builder.open(1)
    for _ in range(2):
        builder.run(1, 1.05 - 0.02, disturbance=0.5)
    builder.decide(1, "discard", "not_worth_it")
    analysis = analysed(builder, SD, DF)
    analysis.noise = gate.Noise(SD, DF, slopes=(0.1,), covariance=((4.0,),))
    effect = analysis.effect(analysis.experiments[1])
    assert effect.value == pytest.approx(-0.02)
    assert effect.error == pytest.approx(SD * math.sqrt(1 / 2 + 1 / 2 + 0.5**2 * 4.0))


def test_what_devices_differ_by_is_no_effect():
    """A device costs 0.1. The baseline was run on it and on another one, the change on it alone."""
    builder, rng = session(base=[]), random.Random(2)
    for i in range(8):
        builder.run(0, 1.0 + 0.1 * (i % 2) + rng.gauss(0, SD), seed=i, worker="ab"[i % 2])
    builder.open(1)
    for i in range(2):
        builder.run(1, 1.1 - 0.02, seed=i, worker="b")
    builder.decide(1, "discard", "not_worth_it")
    analysis = Analysis(builder.record())
    effect = analysis.effect(analysis.experiments[1])
    assert analysis.noise.devices == ("a", "b")
    assert effect.value == pytest.approx(-0.02, abs=0.03) and effect.low <= -0.02 <= effect.high
    assert effect.value < 0.03 - 0.02 < 0.05 - 0.02  # as it would be without the device


def test_watts_and_joules_by_tokens_are_of_runs_whose_energy_was_measured():
    facts = {"training_seconds": 300.0, "disturbance": 0.25, "paused_seconds": 5.0, "joules": 38_000.0}
    builder = session(facts=facts).change(1, [0.9], runs={"joules": None})
    found = analysed(builder)
    assert found.mean(found.baseline, "watts") == pytest.approx(100.0)
    assert found.mean(found.baseline, "joules_per_M") == pytest.approx(38_000.0)
    assert found.mean(found.state.experiments[1], "watts") is None
    said = found.said_of_energy(0.3)
    assert said.startswith("training 3 of 4 runs took 0.0317 kWh, 100 W") and said.endswith("cost 0.01 at 0.3 a kWh")
    assert analysed(session()).said_of_energy(0.3) == ""


def test_a_ledgers_own_figures_of_energy_are_taken():
    found = analysed(session(facts={"watts": 410.0, "joules_per_token": 0.0014}))
    assert found.mean(found.baseline, "watts") == 410.0
    assert found.mean(found.baseline, "joules_per_M") == pytest.approx(1400.0)
