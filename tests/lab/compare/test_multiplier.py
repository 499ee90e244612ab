"""Effects as factors of training time."""

import math
import random
from dataclasses import replace

import pytest
from records import analysed, session

from lab.compare import comparison, multiplier, tables
from lab.compare.effects import Effect
from lab.session.events import ExperimentApplied
from lab.share import export

TIMES = (75.0, 150.0, 300.0, 600.0)


def power(t, offset=1.0, k=0.5):
    return offset + 0.2 * (t / 300.0) ** -k


def curve(scores, noise=0.001, df=10):
    return multiplier.curve(scores, 300.0, dict.fromkeys(scores, noise), df)


def exact(**facts):
    return curve({t: [power(t)] * 3 for t in TIMES}, **facts)


def effect_of(factor, error=0.0005, df=10, **facts):
    """The effect of a change with which a run of 300 s is like one of 300 / factor."""
    return Effect(power(300.0 / factor) - power(300.0), 0.0, error, df, noise=0.001, **facts)


@pytest.mark.parametrize("factor", [0.6, 0.81, 1.0, 1.5, 3.0])
def test_a_planted_factor_is_found_and_its_interval_holds_it(factor):
    told = exact().told(effect_of(factor))
    assert told.value == pytest.approx(factor, rel=0.01)
    assert told.low < factor < told.high and not told.bounded and not told.beyond
    assert f"{factor:.2f} of the time (" in str(told)


def test_a_child_of_a_better_parent_is_told_from_where_that_is_on_the_curve():
    parent = power(450.0)
    effect = Effect(power(600.0) - parent, 0.0, 0.0005, 10, parent_bpb=parent)
    assert exact().told(effect).value == pytest.approx(0.75, rel=0.01)
    assert exact().told(Effect(-0.01, 0.0, 0.0005, 10, parent_bpb=power(700.0))) is None


def test_beyond_the_times_that_were_run_it_is_bounded():
    fast, slow = exact().told(effect_of(0.3)), exact().told(effect_of(6.0))
    assert (fast.bounded, fast.value, str(fast)) == ("fast", 0.5, "less than 0.50 of the time")
    assert (slow.bounded, slow.value, str(slow)) == ("slow", 4.0, "more than 4.00 of the time")
    unsure = exact().told(effect_of(0.48, error=0.02))
    assert (
        unsure.bounded == "fast" and unsure.high > 0.5 and str(unsure).startswith("less than 0.50 of the time (at most")
    )
    assert "below 0.50 to" in str(exact().told(effect_of(0.55, error=0.02)))


def test_an_effect_below_what_the_baseline_ever_comes_to_is_bounded():
    assert exact().told(Effect(-0.5, 0.0, 0.0005, 10)).bounded == "fast"


def test_a_score_worse_than_a_baseline_that_speeds_up_ever_had_is_slow_and_not_fast():
    found = curve({75.0: [1.300], 150.0: [1.268], 300.0: [1.230], 600.0: [1.185]})
    assert found.best.k < 0
    for worse in (0.2, 0.5, 3.0):
        assert str(found.told(Effect(worse, 0.0, 0.001, 10))) == "more than 4.00 of the time"
    assert found.told(Effect(-0.2, 0.0, 0.001, 10)).bounded == "fast"


def test_what_the_baselines_own_runs_reached_is_no_bound():
    """The curve lies above the last point; a score between both was reached by a run of that time."""
    found = curve({75.0: [1.4], 150.0: [1.25], 300.0: [1.24], 600.0: [1.1]})
    curves_end = found.points[600.0] - found.residuals[600.0]
    effect = Effect((curves_end + found.points[600.0]) / 2 - found.best.a, 0.0, 0.001, 10)
    told = found.told(effect)
    assert found.points[600.0] < curves_end and not told.bounded and 0.5 <= told.value < 0.6


def test_points_off_the_curve_widen_the_interval_and_that_is_said():
    wavy = curve({75.0: [1.4], 150.0: [1.25], 300.0: [1.24], 600.0: [1.1]})
    assert wavy.misfit > 100 and wavy.remark.startswith("its scores lie up to 0.0") and exact().misfit == 1
    one, other = (each.told(Effect(-0.01, 0.0, 0.001, 10)) for each in (wavy, exact()))
    assert one.high / one.low > 3 * other.high / other.low


def test_without_repeats_there_is_no_interval():
    told = exact().told(Effect(power(400.0) - power(300.0), 0.0))
    assert told.low is None and told.effect is None and str(told) == "0.75 of the time"


def test_a_baseline_that_does_not_improve_with_time_is_no_unit():
    found = curve({t: [1.2, 1.2001] for t in TIMES})
    assert "does not get better with time" in found.why_not and not found.fits
    assert curve({t: [1.2 + t / 1e4] for t in TIMES}).why_not
    # Twice as long it is better by more than chance, but no curve through all of them falls.
    assert curve({75.0: [1.2] * 3, 150.0: [1.2] * 3, 300.0: [1.2003] * 30, 600.0: [1.199] * 3}, noise=0.0003).why_not


def test_a_time_worse_than_an_earlier_one_ends_the_curve_whatever_comes_after():
    assert "from 150 to 300 s" in curve({75.0: [1.3], 150.0: [1.2], 300.0: [1.25], 600.0: [1.19]}).why_not
    assert "from 75 to 150 s" in curve({75.0: [1.2], 150.0: [1.25], 300.0: [1.25], 600.0: [1.19]}).why_not


def test_overfitted_times_are_left_out_and_that_is_said():
    found = curve({75.0: [1.4], 150.0: [1.25], 300.0: [1.2], 600.0: [1.3]})
    assert not found.why_not and found.times == [75.0, 150.0, 300.0] and "gets worse from 300 to 600" in found.remark
    told = found.told(Effect(-0.01, 0.0, 0.0005, 10))
    assert told.bounded == "fast" and told.value == 1.0
    assert "gets worse" in curve({75.0: [1.3], 150.0: [1.2], 300.0: [1.25], 600.0: [1.3]}).why_not


def test_two_times_are_too_few_and_one_is_no_curve():
    assert "needs 3" in curve({75.0: [1.4], 300.0: [1.2]}).why_not
    assert multiplier.curve({300.0: [1.2]}, 300.0, {300.0: 0.001}, 5) is None


def test_residuals_are_those_of_the_curve():
    assert all(abs(miss) < 1e-4 for miss in exact().residuals.values())
    wavy = curve({75.0: [1.4], 150.0: [1.25], 300.0: [1.24], 600.0: [1.1]})
    assert max(map(abs, wavy.residuals.values())) > 0.005


def test_a_time_that_lies_on_no_curve_with_the_others_is_left_out_the_farthest_first():
    far = {18.75: 1.41, 75.0: power(75.0), 150.0: power(150.0), 300.0: power(300.0), 600.0: power(600.0)}
    found = curve({t: [score] * 3 for t, score in far.items()})
    assert found.times == [*TIMES] and found.misfit == 1 and found.remark.startswith("18.75 s are left out")
    assert found.told(effect_of(0.81)).value == pytest.approx(0.81, rel=0.01)


def scaled(builder, number, points):
    """A session whose baseline was run for other times, too."""
    builder.open(number, "scale", blob=builder.state.baseline.blob, pairs=2)
    for time, scores in points.items():
        for seed, score in enumerate(scores, 100):
            builder.run(number, score, of=0, seed=seed, budget=time)
    builder.decide(number)
    return builder


def test_a_bound_whose_other_end_is_beyond_the_curve_is_told_alone():
    times = multiplier.Times(0.5, 0.3, 2.0, "fast")
    assert f"{times}" == "less than 0.50 of the time (at most 2.00)"
    assert f"{replace(times, beyond=('fast', 'slow'))}" == "less than 0.50 of the time"


def test_a_session_tells_its_changes_in_time_and_its_score_stays_as_it_was():
    builder = session(base=(1.2, 1.2, 1.2)).change(1, [power(400.0)] * 3, "keep")
    before = analysed(builder)
    assert before.curve is None and before.said_of_time == "" and before.gained is None
    found = analysed(scaled(builder, 2, {t: [power(t)] * 2 for t in TIMES if t != 300.0}))
    assert found.scores == before.scores and found.noise.sd == before.noise.sd and not found.notes
    assert list(found.curve.points) == [*TIMES]
    assert found.gained.value == pytest.approx(0.75, rel=0.02) and "not confirmed" in found.said_of_time
    assert found.facts()["gained_time"]["value"] == found.gained.value
    builder.confirm(3, 1, [power(360.0)] * 3, [1.2] * 3, gains=(0.01, 0.005, 0.015))
    assert analysed(builder).gained.value == pytest.approx(300 / 360, rel=0.02)


def test_a_train_py_that_was_confirmed_by_hand_is_told_in_time():
    builder = scaled(session(base=(1.2, 1.2, 1.2)), 1, {t: [power(t)] * 2 for t in TIMES if t != 300.0})
    for number, budget in ((2, 600.0), (3, 300.0), (4, 600.0)):
        builder.open(number, "confirm", blob="half", pairs=2, budget=budget, description="the train.py of half.py")
        for seed in (300, 301):
            builder.run(number, power(400.0), seed=seed, budget=budget)
            builder.run(number, power(budget), of=0, seed=seed, budget=budget)
        builder.decide(number, gains=dict.fromkeys(("val_bpb", "held_out_bpb"), (0.1, 0.0, 0.2)))
        told = "the train.py of half.py reaches the baseline's score in 0.75 of the time"
        assert (told in analysed(builder).said_of_time) == (number > 2)  # of another time the curve says nothing


def test_an_export_tells_it_in_its_ledger_on_rows_of_the_change_alone():
    builder = session(base=(1.2, 1.2, 1.2), facts={"total_tokens_M": 100.0}).change(1, [power(400.0)] * 2, "keep")
    builder.run(1, 1.2, of=0, seed=44)
    first = export.views(builder.record())["results.tsv"].decode().splitlines()[0].split("\t")
    assert "in_time" not in first
    scaled(builder, 2, {t: [power(t)] * 2 for t in TIMES if t != 300.0})
    for number in (0, 1, 2):
        builder.take(ExperimentApplied(experiment=number, commit="c"))
    heads, *rows = (line.split("\t") for line in export.views(builder.record())["results.tsv"].decode().splitlines())
    told = {(row[heads.index("kind")], row[-1][:16]) for row in rows}
    assert heads[-1] == "in_time" and ("change", "0.75 of the time") in told
    assert {text for kind, text in told if kind != "change"} == {""}


def test_a_session_whose_baseline_does_not_improve_says_why_it_tells_no_factors():
    builder = session(base=(1.2, 1.2, 1.2)).change(1, [1.1] * 3, "keep")
    found = analysed(scaled(builder, 2, {t: [1.2, 1.2001] for t in TIMES if t != 300.0}))
    assert found.gained is None and found.times(found.experiments[1]) is None
    assert "can't be told as factors of time: the baseline does not get better" in found.said_of_time


def test_a_change_may_hold_in_one_unit_and_fade_in_the_other():
    """Three tenths of the effect in bits per byte, on a device where a bit per byte takes far longer to gain."""
    found = session("a", "one", base=(1.2, 1.2, 1.2)).change(1, [1.18] * 3, "keep").again(2, 1, [1.18] * 8)
    found.again(2, 0, [1.2] * 8)
    scaled(found, 3, {75.0: [1.4] * 3, 150.0: [1.3] * 3, 600.0: [1.1] * 3})
    replayed = session("b", "two", base=(1.2,) * 8)
    replayed.replay(1, [1.194] * 8, "a/one/" + f"{1:016x}", "keep")
    scaled(replayed, 2, {75.0: [1.23] * 3, 150.0: [1.215] * 3, 600.0: [1.185] * 3})
    compared = comparison.compare([analysed(found, 0.0005), analysed(replayed, 0.0005)])
    (change,) = compared.shared
    cell = change.cells["b"]
    assert cell.verdict == "fades" and cell.verdict_in_time == "holds"
    assert "of the time" in tables.text(compared) and "where it holds" in tables.text(compared)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.01, 0.0003])
def test_intervals_cover_what_they_say(noise):
    rng, hits, n = random.Random(7), 0, 600
    for _ in range(n):
        k, factor = rng.uniform(0.2, 1.0), math.exp(rng.uniform(math.log(0.6), math.log(1.6)))
        df = 12
        sd = noise * math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(df)) / df)
        scores = {t: [power(t, k=k) + rng.gauss(0, noise) for _ in range(3)] for t in TIMES}
        changed = [power(300.0 / factor, k=k) + rng.gauss(0, noise) for _ in range(3)]
        value = sum(changed) / 3 - sum(scores[300.0]) / 3
        told = curve(scores, sd, df).told(Effect(value, 0.0, sd * math.sqrt(2 / 3), df))
        hits += (told.low <= factor or "fast" in told.beyond) and (factor <= told.high or "slow" in told.beyond)
    assert 0.87 <= hits / n <= 0.93
