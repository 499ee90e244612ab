"""From measurements to defaults, on devices that are not here."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tests.calibration import devices
from tests.calibration.devices import CPU, GIB, H100, JETSON, M4, RTX_3090, Simulated, spread

from calibration import rule
from calibration.rule import Completed, Failed
from prepare import MAX_SEQ_LEN, TIME_BUDGET

ALL = {"cpu": CPU, "jetson": JETSON, "m4": M4, "3090": RTX_3090, "h100": H100}


@pytest.fixture(scope="module")
def calibrated():
    return {name: device.calibrate() for name, device in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_defaults_fit_with_headroom(calibrated, name):
    settings, _, trials = calibrated[name]
    run = ALL[name].run(settings.depth, settings.device_batch_size)
    assert isinstance(run, Completed) and run.peak_memory <= rule.SHARE_OF_MEMORY * ALL[name].free
    assert all(isinstance(trial, Completed) for trial in trials)  # memory never ran out on the way


@pytest.mark.parametrize("name", ALL)
def test_the_schedule_has_steps_enough(calibrated, name):
    settings, _, _ = calibrated[name]
    rate = ALL[name].run(settings.depth, settings.device_batch_size).rate
    assert rate * TIME_BUDGET / settings.total_batch_size >= 300
    assert settings.total_batch_size % (settings.device_batch_size * MAX_SEQ_LEN) == 0


def test_defaults_are_ordered_by_compute(calibrated):
    order = [calibrated[name][0] for name in ("cpu", "m4", "jetson", "3090", "h100")]
    for less, more in zip(order, order[1:]):
        assert (less.depth, less.total_batch_size) <= (more.depth, more.total_batch_size)
        assert less.depth <= more.depth
    assert order[0].depth < order[3].depth < order[4].depth


@pytest.mark.parametrize(
    "name, depths", [("m4", (2, 3, 4)), ("3090", (4, 5, 6)), ("h100", (8, 9, 10)), ("cpu", (2,)), ("jetson", (2, 3, 4))]
)
def test_defaults_are_near_what_people_ended_at(calibrated, name, depths):
    assert calibrated[name][0].depth in depths


@pytest.mark.parametrize("name", ALL)
def test_no_other_depth_is_nearer_to_the_ratio(calibrated, name):
    settings, _, trials = calibrated[name]
    device = ALL[name]
    chosen = device.run(settings.depth, settings.device_batch_size)
    for depth in rule.LADDER:
        other = device.run(depth, 1)
        if isinstance(other, Completed) and depth in {trial.depth for trial in trials}:
            best = rule.best_rows(rule.at(trials, depth))
            assert devices.log_distance(chosen.ratio) <= devices.log_distance(best.ratio)
    assert len(trials) <= 9  # a minute each


def test_the_reasons_give_the_numbers(calibrated):
    settings, reasons, _ = calibrated["3090"]
    text = "\n".join(reasons)
    for part in (
        f"depth {settings.depth}: ",
        "M tokens in 300 s",
        f"total batch {settings.total_batch_size}",
        "steps",
        f"device batch {settings.device_batch_size}",
        "GB that were free",
        "window SSSL",
        "precision bfloat16",
    ):
        assert part in text


def test_the_simulated_model_is_train_pys(monkeypatch):
    from tests.backends.support import opened
    from tests.test_train_science import loaded

    train = loaded(opened("sdpa", "float32"), monkeypatch)
    for depth in (1, 2, 5):
        for pattern in ("SSSL", "L"):
            train.DEPTH, train.WINDOW_PATTERN = depth, pattern
            model = train.GPT(depth, 8192)
            shapes = train.backend.shapes(model)
            flops, params = train.flops_per_token(model, shapes), sum(map(math.prod, shapes.values()))
            assert flops == pytest.approx(devices.flops_per_token(depth, pattern), rel=2e-3)
            assert params == pytest.approx(devices.num_params(depth), rel=2e-3)


# --- memory


def test_a_batch_that_spills_does_not_fit():
    """Under WSL and on shared memory nothing fails: it crawls."""
    device = dataclasses.replace(RTX_3090, free=3 * GIB, spills=True)
    trials = [device.run(4, rows) for rows in (4, 8, 16, 32)]
    assert all(isinstance(trial, Completed) for trial in trials)
    fit = rule.fitting(trials)
    assert fit and fit[-1].rows < 32 and all(trial.rate > trials[-1].rate * 2 for trial in fit)


def test_a_device_too_small_for_the_first_try_gets_a_smaller_default():
    device = dataclasses.replace(M4, free=1.0 * GIB, a_row=6)
    settings, _, trials = device.calibrate()
    assert isinstance(trials[0], Failed) and trials[0].failed == "out of memory"
    assert (settings.depth, settings.device_batch_size) < (trials[0].depth, trials[0].rows)
    assert isinstance(device.run(settings.depth, settings.device_batch_size), Completed)


def test_a_device_on_which_nothing_runs_says_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"not even depth 1 with 1 rows of 2048 tokens runs on this device: out of "
        r"memory\. Close what else uses its memory",
    ):
        dataclasses.replace(M4, free=0.1 * GIB).calibrate()


def test_a_batch_over_80_per_cent_of_the_free_memory_does_not_fit():
    trial = M4.run(2, 4)
    assert rule.fitting([trial]) == [trial]
    assert not rule.fitting([dataclasses.replace(trial, free_memory=int(trial.peak_memory * 1.2))])
    with pytest.raises(ValueError, match="needs .* GB of the .* GB that are free, more than 80%"):
        rule.scale([dataclasses.replace(trial, free_memory=int(trial.peak_memory * 1.2))], {}, {})


def test_the_next_batch_is_tried_only_if_it_should_fit():
    trials = [M4.run(2, 4), M4.run(2, 8)]
    room = [
        dataclasses.replace(trial, free_memory=int(rule.predicted_peak(trials, 16) / 0.8) + slack)
        for trial, slack in zip(trials, (10, 10))
    ]
    assert rule.predicted_peak(trials, 16) == pytest.approx(M4.run(2, 16).peak_memory, rel=0.01)
    faster = [room[0], dataclasses.replace(room[1], tokens_per_second=spread(2 * room[0].rate))]
    assert rule._more_rows(faster) == (2, 16)
    assert rule._more_rows([dataclasses.replace(trial, free_memory=trial.free_memory - 20) for trial in faster]) is None


# --- single decisions


def trial(depth=4, rows=4, rate=1e5, **changes):
    return dataclasses.replace(RTX_3090.run(depth, rows), tokens_per_second=spread(rate), **changes)


def test_the_fewest_rows_that_are_nearly_as_fast_as_any():
    trials = [trial(rows=4, rate=80), trial(rows=8, rate=98), trial(rows=16, rate=100)]
    assert rule.best_rows(trials).rows == 8


@pytest.mark.parametrize("window, pattern", [(0.5, "SSSL"), (0.79, "SSSL"), (0.81, "L"), (1.3, "L")])
def test_a_window_has_to_save_time(window, pattern):
    attention = {"full": {"a": {"both": spread(1.0)}}, "window": {"b": {"both": spread(window)}}}
    assert rule.window_pattern(attention, {"full": "a", "window": "b"})[0] == pattern


@pytest.mark.parametrize("tokens", [1e5, 1e6, 7e6, 5e7, 3e8, 1e9])
def test_the_total_batch_grows_with_the_tokens_and_leaves_steps(tokens):
    batch = rule.total_batch(tokens)
    assert batch == 2 ** int(math.log2(batch)) and rule.total_batch(2 * tokens) in (batch, 2 * batch)
    assert batch == MAX_SEQ_LEN or tokens / batch >= 300


def test_a_leap_of_depth_stays_within_the_memory():
    first = Simulated(7e14, 12 * GIB, 10 * GIB, mfu=0.5).run(4, 4)
    depth, rows = rule.wanted([first], (4, 4, 2**15))
    assert depth > 4
    assert isinstance(Simulated(7e14, 12 * GIB, 10 * GIB, mfu=0.5).run(depth, rows), Completed)
