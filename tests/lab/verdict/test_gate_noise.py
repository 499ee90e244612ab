"""The gate's noise: repeats and a prior, what disturbance and devices explain, and what equal seeds share."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from test_gate import PARENT, SD, runs, step

from lab.session.state import Conditions
from lab.verdict import gate
from lab.verdict.gate import Account, Noise, next_step


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


def test_nine_runs_that_are_alike_are_not_drowned_by_a_prior():
    """Of a session on two cores whose prior was 27 times too large: the first nine runs of the baseline."""
    scores = [2.254736, 2.248193, 2.245726, 2.254560, 2.252976, 2.242998, 2.243084, 2.245785, 2.241770]
    noise = gate.pooled([scores], prior_sd=0.135)
    assert statistics.stdev(scores) < noise.sd < 1.3 * statistics.stdev(scores)


@pytest.mark.parametrize("runs", [2, 3, 4, 5, 9, 30, 200])
def test_a_lowered_prior_asks_for_more_than_the_repeats_alone(runs):
    rng = random.Random(runs)
    scores = [rng.gauss(0, 1) for _ in range(runs)]
    noise, alone = gate.pooled([scores], prior_sd=1e3), statistics.stdev(scores)
    for level in (0.05, 0.01, 0.001) + (0.0003, 0.0001) * (runs > 2):
        assert gate.t_quantile(level, noise.df) * noise.sd > gate.t_quantile(level, runs - 1) * alone


def test_identical_repeats_are_not_taken_for_a_noise_of_zero():
    noise = gate.pooled([[1.0] * 3] * 10, SD)
    assert 0 < noise.sd < SD
    assert next_step({42: 0.5}, PARENT, noise, Account()).action == "keep"


def test_a_prior_has_to_be_above_zero():
    with pytest.raises(ValueError, match="above 0"):
        gate.pooled([], 0.0)


# --- Disturbance, and noise that equal seeds share ---


def test_quiet_runs_come_out_exactly_as_without_a_covariate():
    groups = [[1.0, 1.002, 0.999], [0.98, 0.985]]
    without = gate.pooled(groups, SD)
    quiet = gate.pooled(groups, SD, conditions=[[Conditions()] * 3, [Conditions()] * 2], curve=0.3)
    assert (quiet.sd, quiet.df, quiet.slopes[0]) == (without.sd, without.df, 0.0)
    for gains in ((1.0,), (3.0,), (3.0, 3.0), (9.0,)):
        zeros = (dict.fromkeys(runs(*gains), Conditions()), dict.fromkeys(PARENT, Conditions()))
        assert next_step(runs(*gains), PARENT, quiet, Account(), conditions=zeros) == next_step(
            runs(*gains), PARENT, without, Account()
        )


def test_the_slope_over_disturbance_comes_from_repeats_and_is_no_noise():
    rng = random.Random(2)
    disturbances = [[rng.random() for _ in range(6)] for _ in range(5)]
    groups = [[i + 0.1 * d + rng.gauss(0, SD) for d in group] for i, group in enumerate(disturbances)]
    noise = gate.pooled(groups, SD, conditions=[list(map(Conditions, group)) for group in disturbances], curve=0.3)
    assert noise.slopes[0] == pytest.approx(0.1, abs=0.003) and noise.sd < 1.4 * SD
    assert gate.pooled(groups, SD).sd > 10 * SD
    assert noise.covariance[0][0] == pytest.approx(
        1 / (sum(5 * statistics.pvariance(g) * 6 / 5 for g in disturbances)), rel=0.01
    )


WRONG = 0.5  # of a disturbance, where a test knows how much a clock may not have corrected for


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(gate, "WRONG", {WRONG: 1.0})


def test_the_posterior_is_that_of_the_conjugate_model(known):
    """Against sums over a grid of slopes: y = slope * d + noise, with both centred, and a normal prior of the slope."""
    d, y, tau = [-0.3, 0.1, 0.2], [-0.02, 0.015, 0.005], 0.1
    noise = gate.pooled([y], SD, prior_df=1, conditions=[list(map(Conditions, d))], curve=tau / WRONG)
    slopes = [i * 1e-4 for i in range(-3000, 3001)]
    weights = [
        math.exp(-sum((b - slope * a) ** 2 for a, b in zip(d, y)) / (2 * SD**2) - (slope / tau) ** 2 / 2)
        for slope in slopes
    ]
    mean = sum(w * slope for w, slope in zip(weights, slopes)) / sum(weights)
    variance = sum(w * (slope - mean) ** 2 for w, slope in zip(weights, slopes)) / sum(weights)
    assert noise.slopes[0] == pytest.approx(mean, rel=1e-4)
    assert noise.covariance[0][0] * SD**2 == pytest.approx(variance, rel=1e-4)


def test_how_well_the_clock_corrects_is_learnt_from_the_repeats():
    """Against the same sums for each of the priors, weighted by its chance."""
    d, y = [-0.3, 0.1, 0.2], [-0.02, 0.015, 0.005]
    noise = gate.pooled([y], SD, prior_df=1, conditions=[list(map(Conditions, d))], curve=0.3)
    slopes, total, first, second = [i * 1e-4 for i in range(-3000, 3001)], 0.0, 0.0, 0.0
    for wrong, chance in gate.WRONG.items():
        tau = 0.3 * wrong
        for slope in slopes:
            squares = sum((b - slope * a) ** 2 for a, b in zip(d, y)) + (slope / tau * SD) ** 2
            # The noise is integrated out: its prior counts for one degree of freedom beside two of the repeats.
            weight = chance / tau * (SD**2 + squares) ** -2
            total, first, second = total + weight, first + weight * slope, second + weight * slope**2
    assert noise.slopes[0] == pytest.approx(first / total, rel=0.02)

    def slope(*groups, disturbed) -> float:
        return gate.pooled(groups, SD, conditions=[list(map(Conditions, disturbed))] * len(groups), curve=0.3).slopes[0]

    uncorrected = [[0.1 * one + SD * (i % 2) for i, one in enumerate((0.0, 1.0, 0.5, 0.2))]] * 3
    assert slope(*uncorrected, disturbed=(0.0, 1.0, 0.5, 0.2)) == pytest.approx(0.1, abs=0.01)


def test_a_baseline_that_was_disturbed_alike_hides_no_change_that_was_not():
    """Three runs of a baseline and two of a change, as measured on an H200 that two sessions shared (bits per byte,
    disturbance): the change is plainly better."""
    baseline = {42: (0.661403, 1.19), 43: (0.664916, 1.16), 44: (0.667366, 1.27)}
    change = {42: (0.641520, 1.23), 43: (0.640856, 0.14)}
    (own, of), (others, of_others) = (
        ({seed: bpb for seed, (bpb, _) in runs.items()}, {seed: Conditions(d) for seed, (_, d) in runs.items()})
        for runs in (change, baseline)
    )
    noise = gate.pooled([list(others.values())], 0.0045 * 0.66, conditions=[list(of_others.values())], curve=0.19)
    after = next_step(own, others, noise, Account(), conditions=(of, of_others))
    assert after.action != "discard"
    assert after.evidence.gain == pytest.approx(0.0234, abs=0.002) and after.evidence.gain > 2 * after.evidence.error


def test_what_disturbance_explains_is_no_gain_and_what_is_not_known_of_it_widens_the_interval():
    noise = Noise(SD, 40, slopes=(0.1,), covariance=((4.0,),))
    quiet = step(5.0, noise=noise)
    disturbed = next_step(runs(5.0), PARENT, noise, Account(), conditions=({}, dict.fromkeys(PARENT, Conditions(0.05))))
    assert quiet.action == "keep" and disturbed.action == "discard"
    assert disturbed.evidence.corrected == pytest.approx(5 * SD) and disturbed.evidence.gain == pytest.approx(
        0, abs=1e-9
    )
    assert disturbed.evidence.error == pytest.approx(SD * math.sqrt(4 / 3 + 0.05**2 * 4))
    both = next_step(
        runs(5.0),
        PARENT,
        noise,
        Account(),
        conditions=({gate.seed(0): Conditions(0.05)}, dict.fromkeys(PARENT, Conditions(0.05))),
    )
    assert both.evidence.gain == pytest.approx(quiet.evidence.gain) and both.evidence.error == quiet.evidence.error


def seeded(rng: random.Random, part: float, count: int) -> list[dict[int, float]]:
    """Scores of several train.py on the same seeds, which share a part of the variance."""
    common = [rng.gauss(0, math.sqrt(part) * SD) for _ in range(count)]
    return [{s: c + rng.gauss(0, math.sqrt(1 - part) * SD) for s, c in enumerate(common)} for _ in range(9)]


def test_shared_noise_is_found_where_it_is_and_not_where_it_is_not():
    rng = random.Random(6)
    for part, low, high in ((0.0, 0.0, 0.1), (0.7, 0.2, 0.6)):
        found = []
        for _ in range(100):
            parent, *children = seeded(rng, part, 16)
            found.append(gate.shared([(parent, children)]))
        assert low <= statistics.fmean(found) <= high, part
        assert sum(value > part for value in found) <= 12
    assert gate.shared([({1: 1.0, 2: 2.0}, [{1: 1.0, 2: 2.0}])]) == 0.0  # too few


def test_pairs_are_compared_as_far_as_they_share_noise():
    """The control variate's variance is what simulated differences have, and none where nothing is shared."""
    rng, part, gains = random.Random(7), 0.6, []
    noise = Noise(SD, 40, shared=part)
    for _ in range(3000):
        parent, candidate, *_ = seeded(rng, part, 6)
        found = next_step({s: candidate[s] for s in range(3)}, parent, noise, Account())
        gains.append(found.evidence.gain)
    assert statistics.stdev(gains) == pytest.approx(found.evidence.error, rel=0.05)
    assert found.evidence.error < 0.8 * SD * math.sqrt(1 / 3 + 1 / 6)
    alone = next_step({99: 1.0}, PARENT, noise, Account())  # a seed that the parent has not
    assert alone.evidence.error == pytest.approx(SD * math.sqrt(1 + 1 / 3))


# --- Devices that differ ---

OFFSETS = {"a": 0.0, "b": 3 * SD, "c": -2 * SD}


def on_devices(rng: random.Random, devices: list[str], true: float = 1.0, offsets=OFFSETS) -> list[float]:
    return [true + offsets[device] + rng.gauss(0, SD) for device in devices]


def of_devices(devices) -> list[Conditions]:
    return [Conditions(device=device) for device in devices]


def test_what_devices_add_comes_from_repeats_and_is_no_noise():
    rng, devices = random.Random(12), [["a", "b", "c", "a", "b", "c"], ["a", "b"], ["c", "a", "a"]] * 12
    groups = [on_devices(rng, group, 1 + i) for i, group in enumerate(devices)]
    noise = gate.pooled(groups, SD, conditions=list(map(of_devices, devices)), curve=0.3)
    assert noise.devices == ("a", "b", "c") and noise.df == 1 + 12 * 8
    assert noise.sd == pytest.approx(SD, rel=0.15) and gate.pooled(groups, SD).sd > 1.8 * SD
    for device, other in (("a", "b"), ("b", "c")):
        found = noise.explains([(1.0, Conditions(device=device)), (-1.0, Conditions(device=other))])
        error = noise.sd * math.sqrt(found.variance)
        assert abs(found.value - (OFFSETS[device] - OFFSETS[other])) < 2.5 * error < 0.8 * SD
    assert noise.slopes[0] == 0 and noise.explained == 0  # nothing was disturbed


def test_devices_and_disturbance_together_are_generalised_least_squares(known, monkeypatch):
    """What conditions explain is part of the covariance of scores then, and no coefficient is estimated. The groups are
    centred by a projection."""
    monkeypatch.setattr(gate, "DIFFER", (1.5,))
    rng = random.Random(13)
    devices = [["a", "b", "c", "a"], ["b", "c"], ["a"], ["c", "c", "a"]]
    conditions = [[Conditions(rng.random(), device, rng.random()) for device in group] for group in devices]
    groups = [[rng.gauss(0, 3 * SD) + 0.1 * one.disturbance + 0.3 * one.short for one in of] for of in conditions]
    noise = gate.pooled(groups, SD, prior_df=1, conditions=conditions, curve=0.1 / WRONG)
    repeated = [(scores, of) for scores, of in zip(groups, conditions) if len(scores) > 1]
    y = np.concatenate([np.array(scores) - np.mean(scores) for scores, _ in repeated])
    every = [of for _, group in repeated for of in group]
    x = np.array([[of.disturbance, of.short, *(float(of.device == name) for name in "abc")] for of in every])
    starts = np.cumsum([0] + [len(scores) for scores, _ in repeated])
    centre = np.eye(len(y))
    for first, last in zip(starts[:-1], starts[1:]):
        centre[first:last, first:last] -= 1 / (last - first)
    x = centre @ x
    prior = np.diag([(0.1 / SD) ** 2, (0.1 / WRONG / SD) ** 2, *[1.5**2] * 3])
    weights = np.linalg.inv(np.eye(len(y)) + x @ prior @ x.T)
    assert noise.slopes == pytest.approx(prior @ x.T @ weights @ y, rel=1e-9, abs=1e-12)
    assert noise.sd == pytest.approx(math.sqrt((SD**2 + y @ weights @ y) / (1 + len(y) - 3)), rel=1e-9)
    covariance = np.linalg.inv(np.linalg.inv(prior) + x.T @ x)
    assert np.array(noise.covariance) == pytest.approx(covariance, rel=1e-9, abs=1e-12)


def test_one_device_is_as_if_nothing_was_known_of_devices():
    groups = [[1.0, 1.002, 0.999], [0.98, 0.985]]
    conditions = [[Conditions(0.1 * i, device="a") for i, _ in enumerate(group)] for group in groups]
    noise = gate.pooled(groups, SD, conditions=conditions, curve=0.3)
    assert noise == gate.pooled(
        groups, SD, conditions=[[Conditions(of.disturbance) for of in group] for group in conditions], curve=0.3
    )
    assert noise.devices == () and len(noise.slopes) == 2
    shared = replace(noise, shared=0.4)
    for gains in ((1.0,), (3.0,), (3.0, 3.0), (9.0,)):
        on = (dict.fromkeys(runs(*gains), Conditions(device="a")), dict.fromkeys(PARENT, Conditions(device="a")))
        for known in (noise, shared):
            assert next_step(runs(*gains), PARENT, known, Account(), conditions=on) == next_step(
                runs(*gains), PARENT, known, Account()
            )


def test_runs_on_the_same_devices_differ_by_no_device_and_a_new_device_widens_the_error():
    devices = [["a", "b", "c"]] * 4
    groups = [on_devices(random.Random(i), group) for i, group in enumerate(devices)]
    noise = gate.pooled(groups, SD, conditions=list(map(of_devices, devices)))
    parent = dict(zip(PARENT, of_devices("abc")))
    paired = next_step(runs(3.0, 3.0, 3.0), PARENT, noise, Account(), conditions=(parent, parent))
    assert paired.evidence.corrected == pytest.approx(0, abs=1e-12)
    assert paired.evidence.error == pytest.approx(noise.sd * math.sqrt(2 / 3))
    known, new = (
        next_step(runs(3.0), PARENT, noise, Account(), conditions=({gate.seed(0): Conditions(device=name)}, parent))
        for name in ("b", "new")
    )
    assert known.evidence.corrected == pytest.approx(statistics.fmean(noise.slopes[2:]) - noise.slopes[3], rel=1e-6)
    assert noise.sd * math.sqrt(4 / 3) < known.evidence.error < noise.sd * math.sqrt(4 / 3 + 0.3)
    assert new.evidence.error > noise.sd * math.sqrt(4 / 3 + noise.differ)
    joint = gate.joint_step(
        runs(3.0), PARENT, noise, Account(), conditions=({gate.seed(0): Conditions(device="b")}, parent)
    )
    assert (joint.evidence.gain, joint.evidence.error) == (known.evidence.gain, known.evidence.error)


def test_how_much_devices_differ_is_learnt():
    """Eight devices add constants of a tenth of the noise, 3 or 20 times it: what one is expected to add that was not
    compared yet, and the noise, in which no constant is left."""
    rng, devices = random.Random(15), [list("abcdefgh")] * 6
    found = []
    for differ in (0.1, 3.0, 20.0):
        offsets = {name: differ * rng.gauss(0, SD) for name in "abcdefgh"}
        groups = [on_devices(rng, group, 1 + i, offsets) for i, group in enumerate(devices)]
        found.append(gate.pooled(groups, SD, conditions=list(map(of_devices, devices))))
    small, larger, largest = (noise.differ for noise in found)
    assert small < 0.5 < 1.5 < larger and largest == pytest.approx(max(gate.DIFFER) ** 2, rel=0.01)
    assert found[0].sd == pytest.approx(SD, rel=0.2) and found[1].sd == pytest.approx(SD, rel=0.2)
    assert found[2].sd < 4 * SD  # further apart than was thought possible: too much is taken for noise, not too little
    only = gate.pooled([[1.0, 1.001]], SD, conditions=[of_devices("aa")])
    assert small < only.differ == Noise(SD, 4).differ


@pytest.mark.parametrize("known", [1, 8])
def test_the_interval_of_a_change_on_another_device_than_its_parent_covers(known):
    """Devices differ by one of DIFFER. A change was run once, on a device that its parent was not run on."""
    rng, held, narrower, count = random.Random(known), 0, [], 1000
    for _ in range(count):
        differ = rng.choice(gate.DIFFER)
        offsets = {name: differ * rng.gauss(0, SD) for name in "abcd"}
        devices = [["a", "b", "c"], *[["a", "d"], ["b", "c", "d"]] * known]
        groups = [on_devices(rng, group, 1.0, offsets) for group in devices]
        noise = gate.pooled(groups, SD, conditions=list(map(of_devices, devices)))
        conditions = ({gate.seed(0): Conditions(device="d")}, dict(zip(PARENT, of_devices("abc"))))
        (score,), parent = on_devices(rng, ["d"], 1 - 2 * SD, offsets), dict(zip(PARENT, groups[0]))
        evidence = next_step({gate.seed(0): score}, parent, noise, Account(), conditions=conditions).evidence
        held += evidence.low <= 2 * SD <= evidence.high
        alone = next_step({gate.seed(0): score}, parent, gate.pooled(groups, SD), Account()).evidence
        narrower.append(evidence.error / alone.error)
    # While little is known, a mixture's standard deviation is wider than it has to be.
    assert 0.9 - 3 * math.sqrt(0.09 / count) <= held / count <= (0.95 if known == 1 else 0.93)
    assert statistics.fmean(narrower) < (1.2 if known == 1 else 0.85)


def test_a_change_that_met_other_conditions_than_all_of_its_parents_runs_has_the_parent_run_again():
    """A baseline of a busy machine, and then a quiet night."""
    noise = Noise(SD, 40, slopes=(0.1,), covariance=((400.0,),))
    busy = ({}, dict.fromkeys(PARENT, Conditions(0.3)))
    corrected = {seed: score + 0.03 for seed, score in PARENT.items()}
    asked = next_step(runs(5.0), corrected, noise, Account(), conditions=busy)
    assert asked.action == "run parent" and asked.seed == gate.seed(3)
    twice = next_step(runs(5.0, 5.0), corrected, noise, Account(), conditions=busy)
    assert (twice.action, twice.seed) == (asked.action, asked.seed)
    assert next_step(runs(-5.0), corrected, noise, Account(), conditions=busy).action == "discard"
    again = busy[1] | {gate.seed(i): Conditions() for i in range(3, gate.MOST_PARENT)}
    many = corrected | {seed: 1.0 for seed in again if seed not in corrected}
    assert next_step(runs(0.0), many, noise, Account(), conditions=({}, again)).action == "discard"


def test_the_last_look_is_not_lost_by_a_seed_that_the_parent_lacks():
    last = gate.LOOKS[-1]
    candidate = {gate.seed(i): 1.0 - 2 * SD for i in range(last)}
    parent = {gate.seed(i): 1.0 for i in range(last - 1)} | {50_001: 1.0}
    asked = next_step(candidate, parent, Noise(SD, 40), Account())
    assert (asked.action, asked.seed) == ("run parent", gate.seed(last - 1))
    assert next_step(candidate, parent | {asked.seed: 1.0}, Noise(SD, 40), Account()).action == "keep"
