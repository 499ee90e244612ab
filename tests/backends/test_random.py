"""Random numbers of training: the same bits on every backend, by (seed, place, pass)."""

from __future__ import annotations

import numpy as np
import pytest

from backends import operations
from tests.backends import reference, support, tiny


@pytest.mark.parametrize("mix", [operations.mix, reference.mix])
def test_known_answers_of_splitmix(mix):
    assert [mix(0), mix(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


class Drawing:
    """A Trainer whose loss draws: `draw(ops)`, once in each pass."""

    def __init__(self, backend, draw):
        self.backend, self.drawn = backend, []

        def loss(model, x, y):
            self.drawn.append(support.numpy(backend, draw(backend.ops)))
            return backend.ops.sum(model.value)

        model = support.holder(backend, value=np.ones(2))
        self.trainer = backend.Trainer(model, loss, [tiny.descent(["value"])])

    def passes(self, count: int, rows: int = 1) -> list[np.ndarray]:
        """What so many further passes draw."""
        self.drawn.clear()
        for _ in range(count):
            self.trainer.backward(np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.int32))
        return list(self.drawn)


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 1, 6), (), (0, 3)])
@pytest.mark.parametrize("key", [(0, 0), (42, 3), (-1, 2**40 + 5)])
def test_every_pass_draws_what_the_definition_says(backend, shape, key):
    draws = Drawing(backend, lambda ops: ops.uniform(shape, key=key)).passes(3)
    assert draws[0].dtype == np.float32
    for passes, found in enumerate(draws):
        np.testing.assert_array_equal(found, reference.uniform(shape, key, passes).astype(np.float32))


def test_a_step_and_a_warm_up_leave_the_count_of_passes(backend):
    drawing = Drawing(backend, lambda ops: ops.uniform((3,), key=(1, 2)))
    drawing.passes(1)
    drawing.trainer.step([{"lr": 0.1}])
    drawing.trainer.warm_up(support.TOKENS, support.TOKENS)
    np.testing.assert_array_equal(drawing.passes(1)[0], reference.uniform((3,), (1, 2), 1).astype(np.float32))


def test_each_part_of_a_batch_draws_anew(backend):
    drawing = Drawing(backend, lambda ops: ops.uniform((3,), key=(1, 2)))
    drawing.trainer.rows_at_once[4, 1] = 2
    draws = drawing.passes(1, rows=4)
    assert len(draws) == 2 and not np.array_equal(*draws)


def test_draws_are_uniform_and_independent(backend):
    (first,), (second,) = (
        Drawing(backend, lambda ops, place=place: ops.uniform((20000,), key=(9, place))).passes(1) for place in (0, 1)
    )
    assert 0 <= first.min() and first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.var() - 1 / 12) < 0.003
    for other in (second, np.roll(first, 1), np.roll(first, 10000)):  # of one key, and of two
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03


def test_dropout_keeps_its_share_and_the_mean(backend):
    ones = support.array(backend, np.ones(20000))
    (kept,) = Drawing(backend, lambda ops: ops.dropout(ones, 0.25, key=(9, 1))).passes(1)
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)} and abs(kept.mean() - 1) < 0.02


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_dropout_keeps_half_precision(low, precision):
    backend = low(precision)
    x, kinds = support.array(backend, np.ones(5)), []

    def draw(ops):
        kinds.append(support.kind(y := ops.dropout(x, 0.5, key=(1, 1))))
        return y

    Drawing(backend, draw).passes(1)
    assert kinds == [precision]


def test_outside_of_training(backend):
    ops, x = backend.ops, support.array(backend, np.ones(50))
    assert ops.training() is False
    assert support.numpy(backend, ops.dropout(x, 0.5, key=(1, 2))).sum() == 50
    with pytest.raises(RuntimeError, match=r"only in training.*ops\.training\(\).*ops\.dropout"):
        ops.uniform((3,), key=(1, 2))

    class Noisy(backend.nn.Module):
        def hidden(self, tokens):
            return ops.uniform((*tokens.shape, 5), key=(1, 2))

        def logits(self, hidden):
            return hidden

    with pytest.raises(RuntimeError, match="must not be random"):
        backend.logits(Noisy(), np.zeros((2, 3), np.int32))


def test_a_failed_pass_ends_the_training(backend):
    def fails(ops):
        raise OSError

    with pytest.raises(OSError):
        Drawing(backend, fails).passes(1)
    assert backend.ops.training() is False


@pytest.mark.parametrize("key", [3, (1,), (1, 2, 3), (1, 0.5), ("a", 1), None])
def test_a_key_is_two_integers(backend, key):
    with pytest.raises(TypeError, match=r"wants key=\(seed, place\), two integers"):
        Drawing(backend, lambda ops: ops.uniform((3,), key=key)).passes(1)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, "half"])
def test_a_rate_is_a_share(backend, rate):
    with pytest.raises(ValueError, match="a number from 0 to below 1"):
        backend.ops.dropout(support.array(backend, np.ones(3)), rate, key=(1, 2))
