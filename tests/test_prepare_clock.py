"""The clock of a training run: what it counts, and which training it refuses."""

import math
import time

import numpy as np
import pytest
from fakes import Backend, Bigram

import prepare

from prepare import Clock, Diverged, Invalid, Loader, evaluate_bpb


# ---- the clock ----


def test_warm_start(tiny_data, model, result):
    with Loader(tiny_data, 2) as loader:
        with pytest.raises(Invalid, match=r"warm start: .* \d\.\d+ nats, better than chance"):
            Clock(Backend(), model, loader)
        with pytest.raises(Invalid, match="before a Clock"):
            next(loader)
    assert result()["status"] == "invalid"


def test_untrained_nan(tiny_data):
    class Nan(Bigram):
        def __call__(self, tokens):
            return super().__call__(tokens) * np.float32(np.nan)

    with Loader(tiny_data, 2) as loader, pytest.raises(Invalid, match="not finite"):
        Clock(Backend(), Nan(tiny_data), loader)


def test_time_runs_from_the_first_batch(run):
    backend, model, loader, clock = run
    time.sleep(0.05)
    assert clock.elapsed == clock.progress == 0 and not clock.finished
    next(loader)
    time.sleep(0.02)
    seconds = clock.tick(5.0)
    assert 0.02 <= seconds <= clock.elapsed and clock.steps == 1 and backend.synchronized == 1
    before = clock.elapsed
    next(loader)
    assert clock.elapsed >= before and clock.tick(5.0) <= clock.elapsed - before + 0.01
    assert 0 < clock.progress < 1
    clock.stop()
    stopped = clock.elapsed
    time.sleep(0.01)
    clock.stop()
    assert clock.elapsed == stopped


@pytest.mark.parametrize("kind", ["step", "2.step"])
def test_a_pause_is_no_time_in_which_a_gpu_works_for_nothing(run, kind):
    """What it was given before goes on: a step costs what others of its kind do, or, of another kind, all that time."""
    backend, model, loader, clock = run
    backend.step_kind, clock.meter.given, charged = lambda: kind, {"step": 7.0}, []
    for clock.witness.is_cpu in (True, False):
        next(loader)
        clock.witness.paused, clock.ticked, before = clock.witness.paused + 100, clock.ticked - 100, clock.meter.seconds
        clock.tick(5.0)
        charged.append(clock.meter.seconds - before)
    assert charged == [pytest.approx(0, abs=3), pytest.approx(7 if kind == "step" else 100, abs=3)]


def test_budget_ends_the_loop(tiny_data, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "0.2")
    backend, model = Backend(), Bigram(tiny_data)
    with Loader(tiny_data, 1) as loader:
        clock = Clock(backend, model, loader)
        while not clock.finished:
            next(loader)
            time.sleep(0.01)
            clock.tick(5.0)
        assert clock.progress == 1.0 and clock.steps == loader.batches
        assert evaluate_bpb(backend, model, tiny_data, clock=clock) == clock.val_bpb


def test_tick_before_the_first_batch(run):
    with pytest.raises(RuntimeError, match="before the first batch"):
        run[3].tick(5.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 2.01])
def test_divergence(run, tiny_data, result, loss):
    chance = math.log(tiny_data.vocab_size)
    next(run[2])
    run[3].tick(1.99 * chance)
    with pytest.raises(Diverged, match=f"at step 2; at most {2 * chance:.1f}"):
        run[3].tick(loss * chance)
    recorded, exact = result(), loss * chance
    assert recorded["status"] == "crash" and recorded["num_steps"] == 2
    facts = {"loss": exact if math.isfinite(exact) else str(exact), "step": 2, "limit": 2 * chance}
    assert recorded["reason"] == {"code": "diverged", "facts": facts}


def test_a_sum_of_losses_may_be_as_high_as_it_begins(run, tiny_data):
    chance = math.log(tiny_data.vocab_size)
    next(run[2])
    run[3].tick(3.1 * chance)
    run[3].tick(6.1 * chance)
    with pytest.raises(Diverged, match=f"at step 3; at most {6.2 * chance:.1f}"):
        run[3].tick(6.3 * chance)


def test_a_loss_that_begins_beyond_all_measure(run, tiny_data):
    next(run[2])
    with pytest.raises(Diverged, match="at step 1"):
        run[3].tick(17 * math.log(tiny_data.vocab_size))


def test_no_rows_at_once_are_one(run, tiny_data):
    backend, model, loader, clock = run
    next(loader)
    clock.tick(5.0)
    assert math.isfinite(evaluate_bpb(backend, model, tiny_data, batch_size=0, clock=clock))


class Scalar:
    """A scalar of a device, which counts how often it was waited for."""

    def __init__(self, value):
        self.value, self.read = value, 0

    def __float__(self):
        self.read += 1
        return self.value


def test_waiting_for_the_device_is_training_and_probing_it_is_not(run, monkeypatch):
    backend, _, loader, clock = run
    monkeypatch.setattr(prepare.disturbance, "WINDOW", (0.0, 0.0))  # each step is probed
    monkeypatch.setattr(backend, "synchronize", lambda: time.sleep(0.03))  # a device that has a step to do
    monkeypatch.setattr(
        clock.witness, "read", lambda: time.sleep(0.2) or [prepare.disturbance.Slowdown(1, 1)] * (clock.steps + 1)
    )
    for _ in range(3):
        next(loader)
        clock.tick(Scalar(5.0))
    assert 0.09 <= clock.elapsed < 0.2 and min(clock.took) >= 0.03


def test_the_device_is_one_step_ahead(run):
    backend, _, loader, clock = run
    losses = [Scalar(value) for value in (5.0, 4.0, 3.0)]
    seconds = []
    for loss in losses:
        next(loader)
        seconds.append(clock.tick(loss))
    assert seconds[1] == seconds[0] != seconds[2]  # the second tick waits for nothing
    assert [loss.read for loss in losses] == [1, 1, 0] and clock.loss == 4.0 and backend.synchronized == 1
    clock.stop()
    assert [loss.read for loss in losses] == [1, 1, 1] and clock.loss == 3.0 and backend.synchronized == 2


def test_towards_the_end_the_device_is_waited_for(run):
    """Else a step would be begun while one is under way that ends after the budget."""
    backend, _, loader, clock = run
    next(loader)
    clock.tick(Scalar(5.0))
    clock.longest = clock.seconds / 2
    last = Scalar(4.0)
    next(loader)
    clock.tick(last)
    assert last.read == 1 and backend.synchronized == 2 and clock.loss == 4.0


def test_what_the_last_loss_takes_is_training(run):
    """It is train.py's, and could train."""

    class Late(Scalar):
        def __float__(self):
            time.sleep(0.05)
            return super().__float__()

    _, _, loader, clock = run
    next(loader)
    clock.tick(5.0)
    next(loader)
    clock.tick(Late(4.0))
    before = clock.elapsed
    clock.stop()
    assert clock.loss == 4.0 and clock.elapsed >= before + 0.05


def test_numbers_of_numpy_are_numbers(run):
    backend, _, loader, clock = run
    next(loader)
    clock.tick(np.float32(5.0))
    next(loader)
    clock.tick(np.float32(4.0))
    assert backend.synchronized == 2 and clock.loss == 4.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_divergence_on_the_device(run, result, steps):
    for step in range(1, steps):
        next(run[2])
        run[3].tick(Scalar(5.0))
    next(run[2])
    with pytest.raises(Diverged, match=f"nan at step {steps};"):
        run[3].tick(Scalar(math.nan))
        run[3].stop()
    reason = result()["reason"]
    assert (result()["status"], reason["code"], reason["facts"]["step"]) == ("crash", "diverged", steps)


def test_no_training_after_the_evaluation(run, tiny_data, result):
    backend, model, loader, clock = run
    next(loader)
    clock.tick(5.0)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    with pytest.raises(Invalid, match="after the evaluation"):
        next(loader)
    assert result()["status"] == "invalid"


def test_a_run_is_scored_once(run, tiny_data):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    with pytest.raises(Invalid, match="scored once"):
        evaluate_bpb(backend, model, tiny_data, clock=clock)


@pytest.mark.parametrize("other", [{"rows": "held_out"}, {"count": 1}])
def test_a_run_is_scored_over_the_standard_rows(run, tiny_data, result, other):
    backend, model, loader, clock = run
    next(loader)
    with pytest.raises(Invalid, match="standard rows"):
        evaluate_bpb(backend, model, tiny_data, clock=clock, **other)
    assert clock.val_bpb is None and result()["status"] == "invalid"


def test_training_on_one_batch_far_beyond_the_budget(run, tiny_data):
    backend, model, loader, clock = run
    next(loader)
    clock.started = clock.ticked = clock.started - 302
    with pytest.raises(Invalid, match="training went on for 302"):
        evaluate_bpb(backend, model, tiny_data, clock=clock)


def test_a_slow_last_step_is_allowed(run, tiny_data):
    backend, model, loader, clock = run
    next(loader)
    clock.started -= 102
    clock.longest = 3.0
    clock.in_step = False
    next(loader)
    assert evaluate_bpb(backend, model, tiny_data, clock=clock) > 0
