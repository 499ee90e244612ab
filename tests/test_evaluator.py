"""The evaluator: what it measures, and every kind of model it refuses."""

import math

import numpy as np
import pytest
from fakes import Backend, Bigram, OutOfMemory, nats

import evaluator
import prepare

from prepare import Invalid, evaluate_bpb
from storage import DataError


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
    return evaluator.examine(prepare.Answers(Backend(), model, batch_size), rows, data.token_bytes, batch_size)


def test_nats_and_bytes_of_each_row(tiny_data, model):
    """Their sums are the score; a row's do not depend on the batch it is in."""
    rows = tiny_data.validation_rows[: tiny_data.eval_rows]
    nats, sizes = score_rows(model, tiny_data, rows, 2)
    assert nats.dtype == sizes.dtype == np.float64 and nats.shape == sizes.shape == (len(rows),)
    assert evaluator.bits_per_byte(nats, sizes) == evaluate_bpb(Backend(), model, tiny_data, batch_size=3)
    alone = [score_rows(model, tiny_data, rows[i : i + 1], 1) for i in range(len(rows))]
    assert nats == pytest.approx(np.concatenate([one for one, _ in alone]))
    text = [tiny_data.tokenizer.decode_bytes([t for t in row[1:].tolist() if t < tiny_data.bos]) for row in rows]
    assert sizes.tolist() == [len(one) for one in text]
    with pytest.raises(DataError, match="no text"):
        evaluator.bits_per_byte(np.ones(2), np.zeros(2))


def test_a_row_that_is_cut_at_its_first_place(tiny_data, model):
    rows = tiny_data.validation_rows[:1, :3]  # there is no other place to cut it at
    answers = prepare.Answers(Backend(), model, 1)
    assert len(evaluator.examine(answers, rows, tiny_data.token_bytes, 1, share=20)[0]) == 1


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
    evaluator.examine(prepare.Answers(backend, model, 8), rows, tiny_data.token_bytes, 8)
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
