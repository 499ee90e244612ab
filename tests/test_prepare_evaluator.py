"""The clock and the evaluator: what they measure, and every kind of model they refuse."""

import itertools
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import Backend, Bigram, OutOfMemory, nats

import dataset
import prepare
import results
import storage

from prepare import Clock, Diverged, Invalid, Loader, evaluate_bpb, report
from results import BY_NAME
from results import MEASURES
from storage import DataError


@pytest.fixture
def model(tiny_data):
    rows = np.stack(list(dataset.pack(tiny_data.batches()))[:40])
    return Bigram(tiny_data).train(rows)


@pytest.fixture
def run(tiny_data):
    """A run that has just begun: backend, model, loader, clock."""
    backend, model = Backend(), Bigram(tiny_data)
    with Loader(tiny_data, 2) as loader:
        yield backend, model, loader, Clock(backend, model, loader, seconds=100)


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_RESULT", str(tmp_path / "out" / "result.json"))
    return lambda: json.loads((tmp_path / "out" / "result.json").read_text())


# ---- the score ----


def test_bits_per_byte_by_hand(tiny_data, model):
    x, y = prepare.inputs_and_targets(tiny_data.validation_rows[:3])
    total = size = 0
    for inputs, targets in zip(x, y, strict=True):
        for token, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            if target < tiny_data.bos:
                logits = model.table[token].astype(np.float64)
                total += math.log(np.exp(logits).sum()) - logits[target]
                size += len(tiny_data.tokenizer.decode_single_token_bytes(target))
    bpb = evaluate_bpb(Backend(), model, tiny_data, count=3)
    assert bpb == pytest.approx(total / size / math.log(2), rel=1e-6)
    assert bpb < 0.7 * evaluate_bpb(Backend(), Bigram(tiny_data), tiny_data, count=3)


def test_score_does_not_depend_on_the_batch_size(tiny_data, model):
    scores = [evaluate_bpb(Backend(), model, tiny_data, batch_size=size) for size in (1, 3, 8)]
    assert max(scores) - min(scores) < 1e-9


def score_rows(model, data, rows, batch_size):
    return prepare.examine(prepare.Answers(Backend(), model, batch_size), rows, data.token_bytes, batch_size)


def test_nats_and_bytes_of_each_row(tiny_data, model):
    """Their sums are the score; a row's do not depend on the batch it is in."""
    rows = tiny_data.validation_rows[: tiny_data.eval_rows]
    nats, sizes = score_rows(model, tiny_data, rows, 2)
    assert nats.dtype == sizes.dtype == np.float64 and nats.shape == sizes.shape == (len(rows),)
    assert prepare.bits_per_byte(nats, sizes) == evaluate_bpb(Backend(), model, tiny_data, batch_size=3)
    alone = [score_rows(model, tiny_data, rows[i : i + 1], 1) for i in range(len(rows))]
    assert nats == pytest.approx(np.concatenate([one for one, _ in alone]))
    text = [tiny_data.tokenizer.decode_bytes([t for t in row[1:].tolist() if t < tiny_data.bos]) for row in rows]
    assert sizes.tolist() == [len(one) for one in text]
    with pytest.raises(DataError, match="no text"):
        prepare.bits_per_byte(np.ones(2), np.zeros(2))


def test_a_row_that_is_cut_at_its_first_place(tiny_data, model):
    rows = tiny_data.validation_rows[:1, :3]  # there is no other place to cut it at
    answers = prepare.Answers(Backend(), model, 1)
    assert len(prepare.examine(answers, rows, tiny_data.token_bytes, 1, share=20)[0]) == 1


def test_held_out_rows_and_count(tiny_data, model):
    assert evaluate_bpb(Backend(), model, tiny_data, "held_out") != evaluate_bpb(Backend(), model, tiny_data)
    assert evaluate_bpb(Backend(), model, tiny_data, count=1) != evaluate_bpb(Backend(), model, tiny_data, count=2)
    with pytest.raises(DataError, match="rows were asked for"):
        evaluate_bpb(Backend(), model, tiny_data, count=10**6)


def test_a_batch_that_does_not_fit_is_halved(tiny_data, model):
    backend = Backend(fits=1)
    assert evaluate_bpb(backend, model, tiny_data) == pytest.approx(evaluate_bpb(Backend(), model, tiny_data))
    with pytest.raises(OutOfMemory):
        evaluate_bpb(Backend(fits=0), model, tiny_data)


def test_what_is_asked_costs_at_most_a_tenth(tiny_data, model):
    """At the scored shape, but for a few rows whose whole distributions are looked at."""
    backend, rows = Backend(), np.resize(tiny_data.validation_rows, (768, 2049))
    model.table = model.table[:, : tiny_data.vocab_size]

    class Quick(Backend):
        def losses(self, model, tokens, targets):
            self.calls.append(len(tokens))
            return np.broadcast_to(np.float32(math.log(tiny_data.vocab_size)), targets.shape)

        def logits(self, model, tokens):
            return np.broadcast_to(np.float32(0), (*tokens.shape, tiny_data.vocab_size))

    backend = Quick()
    prepare.examine(prepare.Answers(backend, model, 8), rows, tiny_data.token_bytes, 8)
    assert 96 < backend.calls.count(8) <= 1.1 * 96 and len(backend.calls) == backend.calls.count(8) + 1


def test_other_errors_are_not_taken_for_memory(tiny_data):
    class Broken:
        def losses(self, tokens, targets):
            raise KeyError("bug")

        def __call__(self, tokens):  # its logits, which may be asked for first
            raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        evaluate_bpb(Backend(), Broken(), tiny_data)


# ---- models that are refused ----


class Altered(Bigram):
    """A trained bigram whose logits or losses a test changes."""

    def __init__(self, model, logits=None, losses=None):
        self.table, self.calls = model.table, 0
        if logits:
            self.change = logits
        if losses:
            self.losses = lambda tokens, targets: losses(self, tokens, targets)

    def __call__(self, tokens):
        self.calls += 1
        out = self.table[tokens].astype(np.float32)
        return self.change(self, out, tokens) if hasattr(self, "change") else out


def sees_target(model, logits, tokens):
    """Off by one: position t sees token t + 1."""
    ahead = np.roll(tokens, -1, axis=1)
    logits[np.arange(len(tokens))[:, None], np.arange(tokens.shape[1]), ahead] += 1.0
    return logits


def sees_target_faintly(model, logits, tokens):
    """Worth some 0.02 nats a token, and to be seen only at the cut."""
    return logits + 0.02 * (sees_target(model, logits.copy(), tokens) - logits)


def sees_the_mean(model, logits, tokens):
    """Pools over the whole row, a little."""
    return logits + 0.2 * model.table[tokens].mean(axis=1, keepdims=True)


def sees_far_ahead(model, logits, tokens):
    return logits + 0.1 * model.table[np.roll(tokens, -300, axis=1)]


def sees_neighbours(model, logits, tokens):
    """As a normalisation over the batch does."""
    return logits * (1 + 0.1 * (tokens.mean() / 100 - 1))


def forgets(model, logits, tokens):
    """Dropout left on."""
    return logits * np.random.default_rng(model.calls).choice([0.9, 1.1], logits.shape)


def sees_one_neighbour(model, logits, tokens):
    return logits + 0.05 * model.table[np.roll(tokens, 1, axis=0)]


@pytest.mark.parametrize("change, reason", [
    (sees_target, "looks ahead"), (sees_target_faintly, "looks ahead"), (sees_the_mean, "looks ahead"),
    (sees_far_ahead, "looks ahead"),
    (sees_neighbours, "neighbours|looks ahead"), (sees_one_neighbour, "neighbours|looks ahead"), (forgets, "two calls"),
    (lambda m, logits, t: np.append(logits, logits[..., :1], axis=-1), "logits have shape"),
    (lambda m, logits, t: np.where(t[..., None] == t[0, 5], np.nan, logits), "not finite"),
])  # fmt: skip
def test_refused_logits(tiny_data, model, change, reason):
    with pytest.raises(Invalid, match=reason):
        evaluate_bpb(Backend(), Altered(model, logits=change), tiny_data)


def test_row_mixing_in_the_batch_is_named(tiny_data, model):
    """A neighbour that the look-ahead probe does not change is found by the probe for neighbours."""
    first = lambda m, logits, tokens: logits + 0.3 * m.table[np.roll(tokens, 1, axis=0)[:, :1]]  # noqa: E731
    rows = lambda m, logits, tokens: logits * (1 + 0.1 * np.arange(len(tokens)))[:, None, None]  # noqa: E731
    for change in (rows, first):
        with pytest.raises(Invalid, match="neighbours.*nats"):
            evaluate_bpb(Backend(), Altered(model, logits=change), tiny_data)


@pytest.mark.parametrize("factor", [0.9, 0.999, 1.01])
def test_losses_that_do_not_come_from_probabilities(tiny_data, model, factor):
    scaled = lambda m, x, y: nats(m.table[x], y) * np.float32(factor)  # noqa: E731
    with pytest.raises(Invalid, match="not normalised.*average"):
        evaluate_bpb(Backend(), Altered(model, losses=scaled), tiny_data)


def test_losses_of_another_shape(tiny_data, model):
    with pytest.raises(Invalid, match="losses have shape"):
        evaluate_bpb(Backend(), Altered(model, losses=lambda m, x, y: np.zeros(len(x), np.float32)), tiny_data)


def test_nan_beyond_the_probed_rows(tiny_data, model):
    last = tiny_data.validation_rows[tiny_data.eval_rows - 1, :-1]

    def losses(m, x, y):
        return np.where((x == last).all(axis=1, keepdims=True), np.float32(np.inf), nats(m.table[x], y))

    with pytest.raises(Invalid, match="not finite: 2048 of"):
        evaluate_bpb(Backend(), Altered(model, losses=losses), tiny_data)


@pytest.mark.parametrize("size", [1e-3, 5e-4])
def test_rounding_passes(tiny_data, model, size):
    """Kernels that don't repeat their bits move losses by about 1e-3: no reason to refuse."""

    def losses(m, x, y):
        m.calls += 1
        return nats(m.table[x], y) + np.random.default_rng(m.calls).normal(0, size, y.shape).astype(np.float32)

    assert evaluate_bpb(Backend(), Altered(model, losses=losses), tiny_data) > 0


def test_bf16_rounding_of_losses_passes(tiny_data, model, monkeypatch):
    """Losses rounded to 8 bits: single tokens are off by percents, their mean is not. Of so few as here it may be."""
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=1: draw(seed))

    def losses(m, x, y):
        return (nats(m.table[x], y).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)

    assert evaluate_bpb(Backend(), Altered(model, losses=losses), tiny_data) > 0


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


# ---- weights and report ----


def test_weights_are_saved_before_anything_else(run, tiny_data, isolated_home):
    backend, model, loader, clock = run
    next(loader)
    backend.calls.clear()
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    assert backend.calls[0] == "save" and (isolated_home / "last" / "weights.safetensors").exists()


def test_weights_lie_beside_the_result_also_of_a_refused_model(run, tiny_data, result, tmp_path):
    backend, model, loader, clock = run
    next(loader)
    model.table[:] = np.nan
    with pytest.raises(Invalid, match="not finite"):
        evaluate_bpb(backend, model, tiny_data, clock=clock)
    assert (tmp_path / "out" / "result.safetensors").exists()
    assert result()["status"] == "invalid" and result()["reason"]["code"] == "not_finite"
    assert result()["total_tokens_M"] == 2 * 2048 / 1e6
    with pytest.raises(RuntimeError, match="nothing to report"):
        report(clock, num_params=1, flops_per_token=1, depth=1)


def test_report(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    clock.tick(5.0)
    bpb = evaluate_bpb(backend, model, tiny_data, clock=clock)
    facts = report(clock, num_params=11_500_000, flops_per_token=1000, depth=4, seed=3)
    lines = capsys.readouterr().out.splitlines()
    keys = [*(measure.name for measure in MEASURES if measure.summary), "budget_seconds", "seed"]
    original = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M
    depth""".split()
    assert keys[: len(original)] == original
    block = [line for line in lines if not line.startswith("note: ")]
    assert block[0] == "---" and [line.split(":")[0] for line in block[1:]] == keys
    assert lines[: len(block)] == block, "notes come last"
    assert lines[1] == f"val_bpb:          {bpb:.6f}" and lines[8] == "num_params_M:     11.5"
    assert lines[9] == "depth:            4" and lines[10] == "device:           fake-1gb"
    assert "trial" in lines[-1]
    written = result()
    assert (written["profile"], written["speed"]) == ("abc", 0.9)
    assert written["attention_provider"] == "library sha256:0123456789ab"
    assert written["status"] == "ok" and written["val_bpb"] == bpb and written["seed"] == 3
    assert written["val_rows"] == tiny_data.eval_rows and written["eval"] == tiny_data.eval_tag
    assert written["tokens_per_second"] == pytest.approx(2 * 2048 / written["training_seconds"])
    assert written["model_tflops"] == pytest.approx(1000 * written["tokens_per_second"] / 1e12)
    assert (written["compiled"], written["rows_at_once"]) == (True, None)
    assert written["mfu_percent"] == pytest.approx(100 * 1000 * written["tokens_per_second"] / 1e9)
    assert written["total_seconds"] >= written["training_seconds"]
    assert facts["val_bpb"] == bpb and set(written) == {"status", *facts} == {"status", "seed", *BY_NAME} - {"joules"}


def test_steps_are_timed(run):
    _, _, loader, clock = run
    for _ in range(2):
        next(loader)
        clock.tick(5.0)
    assert len(clock.took) == 2 and min(clock.took) > 0
    assert sum(clock.took) == pytest.approx(clock.meter.seconds) and clock.meter.seconds <= clock.elapsed


def test_what_is_announced(run, tiny_data, monkeypatch):
    """By `sys.audit`, for the guard of a run: each step of it, and every reading of rows."""
    backend, model, loader, clock = run
    told = []
    monkeypatch.setattr(prepare.sys, "audit", lambda event, *_: told.append(event.partition(".")[2]))
    next(loader)
    clock.tick(5.0)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    report(clock, num_params=1, flops_per_token=1, depth=1)
    assert [event for event in told if event != "rows"] == ["batch", "tick", "evaluate", "scored", "report"]
    told.clear()
    with pytest.raises(Invalid):
        evaluate_bpb(backend, model, tiny_data, clock=clock)
    tiny_data.validation_rows, tiny_data.held_out_rows, tiny_data.train
    assert told == ["evaluate", "refused", "rows", "rows", "rows"]


def test_values_begin_in_the_originals_column(run, tiny_data, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    report(clock, num_params=1, flops_per_token=1, depth=1)
    for line in capsys.readouterr().out.splitlines()[1:]:
        if not line.startswith("note: "):
            name, value = line.split()
            assert line.index(value, len(name)) == max(18, len(name) + 1), line


def test_report_says_that_data_were_repeated(run, tiny_data, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    for epoch in (1, 3):
        loader.epoch = epoch
        facts = report(clock, num_params=1, flops_per_token=1, depth=1)
        assert facts["epochs"] == epoch
        assert ("note: pass 3 of the training data was begun" in capsys.readouterr().out) == (epoch == 3)


def test_report_takes_numbers_of_any_framework(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    extra = {"rate": np.float32(0.5), "layers": np.array(3), "worst": math.nan, "kind": "none"}
    report(clock, num_params=np.int64(2), flops_per_token=np.float32(1), depth=np.int64(2), **extra)
    report(clock, num_params=1, flops_per_token=1, depth=2.0)
    assert "depth:            2.0" in capsys.readouterr().out
    report(clock, num_params=np.int64(2), flops_per_token=np.float32(1), depth=np.int64(2), **extra)
    told = result()
    assert (told["rate"], told["layers"], told["worst"], told["kind"], told["depth"]) == (0.5, 3, None, "none", 2)


def test_report_replaces_nothing_measured(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    bpb = evaluate_bpb(backend, model, tiny_data, clock=clock)
    claims = {"val_bpb": 0.1, "status": "keep", "training_seconds": 1.0, "eval": "x", "profile": "x", "speed": 2.0}
    report(clock, num_params=1, flops_per_token=1, depth=1, **claims)
    assert result()["val_bpb"] == bpb and result()["status"] == "ok" and result()["speed"] == 0.9
    assert result()["profile"] == "abc"
    assert result()["eval"] == tiny_data.eval_tag and f"val_bpb:          {bpb:.6f}" in capsys.readouterr().out


def test_report_of_a_full_budget_without_a_known_peak(tiny_data, result, capsys):
    backend, model = Backend(peak_flops=None), Bigram(tiny_data)
    backend.device.profile = backend.device.speed = None
    with Loader(tiny_data, 2) as loader:
        clock = Clock(backend, model, loader)
        next(loader)
        evaluate_bpb(backend, model, tiny_data, clock=clock)
        report(clock, num_params=1, flops_per_token=1, depth=1)
    text = capsys.readouterr().out
    assert "budget_seconds" not in text and "trial" not in text and "mfu_percent:      nan" in text
    assert result()["mfu_percent"] is None and result()["budget_seconds"] == 300
    assert "speed:            nan" in text and result()["speed"] is None and result()["profile"] == "none"


def test_what_is_written_whole_is_durable_by_name_too(tmp_path, monkeypatch):
    """The file is flushed before it gets its name, and then the folder."""
    done, real = [], (prepare.os.fsync, prepare.os.replace)
    monkeypatch.setattr(
        prepare.os,
        "fsync",
        lambda file: done.append("folder" if prepare.Path(f"/dev/fd/{file}").is_dir() else "file") or real[0](file),
    )
    monkeypatch.setattr(prepare.os, "replace", lambda *names: done.append("name") or real[1](*names))
    storage.write_json(tmp_path / "a" / "result.json", {})
    assert done == ["file", "name", "folder"]
    storage.sync_folder(tmp_path / "none")


@pytest.mark.parametrize("refuses", [False, True])
def test_where_it_takes_more_the_drive_is_flushed(tmp_path, monkeypatch, refuses):
    """As macOS asks for it; file systems that can't are flushed as elsewhere."""
    asked, flushed = [], []

    def control(descriptor, what):
        asked.append(what)
        if refuses:
            raise OSError(45, "not supported")

    monkeypatch.setattr(storage, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    monkeypatch.setattr(prepare.os, "fsync", flushed.append)
    storage.write_json(tmp_path / "result.json", {})
    assert asked == [51, 51] and len(flushed) == (2 if refuses else 0), "the file and its folder"


def test_result_on_a_full_disk(tmp_path):
    code = """
import resource, storage
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    storage.write_json(Path("result.json"), {"status": "ok", "val_bpb": 1.0})
except storage.DataError as error:
    print(error)
"""
    root = str(prepare.__file__).rpartition("/")[0]
    ended = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"], cwd=tmp_path,
                           capture_output=True, text=True)  # fmt: skip
    assert "could not write result.json" in ended.stdout and not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


# ---- initial weights ----


def start(seed, share=1.0, nudge=0.0):
    """Ten parameters; of `share` of them the values are drawn with this seed, of the others always the same ones."""
    draw = np.random.default_rng
    return {
        f"p{i}": draw(i + 100 * seed * (i < 10 * share)).normal(size=(64, 100)).astype(np.float32)
        * np.float32(1 + nudge * seed)
        for i in range(10)
    } | {"gain": np.ones(64, np.float32), "zero": np.zeros((4, 4), np.float32), "none": np.zeros(0, np.float32)}


def test_two_draws_are_apart_and_one_that_is_nudged_is_not():
    def between(**how):
        sketches = [prepare.sketch(start(seed, **how)) for seed in range(1, 9)]
        assert sketches == [prepare.sketch(start(seed, **how)) for seed in range(1, 9)] and len(sketches[0]) == 48
        return [results.apart(a, b) for a, b in itertools.combinations(sketches, 2)]

    assert 0.35 < min(between()) and max(between()) < 2 and np.mean(between()) == pytest.approx(1, abs=0.15)
    assert min(between(share=0.7)) > 0.2, "a fixed start of some parameters is fine"
    assert max(between(share=0.0)) == 0 and max(between(share=0.0, nudge=1e-7)) < 1e-3
    assert results.apart("", "00") == 0 and results.apart("none", "other") == 1


def test_a_runs_losses_are_told_as_means_of_few_parts():
    told = prepare.curve_of([float(step) for step in range(1, 65)])
    assert len(told) == 32 and told["0.03125"] == 1.5 and told["1"] == 63.5
    assert prepare.curve_of([3.0, 2.0]) == {"0.5": 3.0, "1": 2.0} and prepare.curve_of([]) == {}
