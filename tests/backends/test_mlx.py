"""What only the MLX backend has: compilation, memory of the lazy graph, its errors and its choice of precision."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

import backends
from backends.interface import BackendError
from tests.backends import support, tiny

mx = pytest.importorskip("mlx.core")


@pytest.fixture
def mlx():
    return support.opened("mlx", "float32")


def test_compiled_functions_are_traced_once_per_shape():
    support.needs_compiler()
    mlx, traced = support.opened("mlx", "float32", compiled=True), []

    def update(param, grad, state, hyper):
        traced.append(tuple(param.shape))
        return param - hyper["lr"] * grad, {"last": grad}

    group = {**tiny.descent(["a", "b", "c"], stack=True), "update": update,
             "init": lambda param: {"last": mlx.ops.zeros_like(param)}}
    model = support.holder(mlx, a=np.ones((2, 3)), b=np.ones((2, 3)), c=np.ones(4))
    losses = []

    def loss(model, x, y):
        losses.append(1)
        return mlx.ops.sum(model.a * model.b) + mlx.ops.sum(model.c)

    trainer = mlx.Trainer(model, loss, [group])
    for rate in (0.1, 0.2, 0.0, 1):
        trainer.backward(support.TOKENS, support.TOKENS, scale=0.5)
        trainer.backward(support.TOKENS, support.TOKENS, scale=rate)
        trainer.step([{"lr": rate}])
    assert (sorted(traced), len(losses)) == ([(1, 4), (2, 2, 3)], 1)


def test_compiled_gradients_equal_eager_ones():
    support.needs_compiler()

    def gradients(compiled):
        mlx = support.opened("mlx", "float32", compiled)
        ops = mlx.ops
        trainer = mlx.Trainer(tiny.build(mlx), lambda m, x, y: ops.softcapped_cross_entropy(
            ops.rope(m.wte(x)[:, :, None], 100.0)[:, :, 0], m.lm_head.weight, y, 15.0, "mean"),
            [tiny.descent(tiny.NAMES, stack=True)])
        trainer.backward(*tiny.batch())
        return trainer.gradients()

    compiled = gradients(True)
    for name, gradient in gradients(False).items():
        np.testing.assert_allclose(compiled[name], gradient, rtol=1e-4, atol=1e-7)


def test_cross_entropy_holds_few_chunks_of_logits(mlx, monkeypatch):
    monkeypatch.setattr("backends.mlx.ops.LOGITS_AT_ONCE", 2**16)
    hidden, weight = mx.random.normal((4, 256, 8)), mx.random.normal((1024, 8))
    targets = mx.zeros((4, 256), dtype=mx.int32)
    mx.eval(hidden, weight, targets)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda h, w: mlx.ops.softcapped_cross_entropy(h, w, targets, 15.0, "mean"), argnums=(0, 1))(
        hidden, weight))
    assert mx.get_peak_memory() - before < 4 * 256 * 1024 * 4  # one float32 array of all logits; the graph has ten


def test_accumulation_does_not_grow_memory(mlx):
    trainer, (x, y) = tiny.trainer(mlx, tiny.build(mlx)), tiny.batch()

    def active():
        trainer.backward(x, y, scale=0.1)
        mlx.synchronize()
        return mx.get_active_memory()

    active()
    second = active()
    assert max(active() for _ in range(6)) <= second + 100_000


def test_parameters_cannot_be_overwritten_by_values(mlx):
    model = tiny.build(mlx)
    with pytest.raises(TypeError, match="scale"):
        model.scale = mx.ones((2,))
    assert mlx.weights(model)["scale"].shape == (2,)


def test_a_failed_loss_leaves_the_masters(mlx):
    model = tiny.build(mlx)
    before = mlx.weights(model)

    def broken(model, x, y):
        raise KeyError("the genome's own mistake")

    with pytest.raises(KeyError):
        mlx.Trainer(model, broken, [tiny.descent(tiny.NAMES)]).backward(*tiny.batch())
    for name, weight in mlx.weights(model).items():
        np.testing.assert_array_equal(weight, before[name])


def test_loss_scale_grows_after_enough_good_steps(mlx):
    from backends.mlx.trainer import LossScale

    scale, good, bad = LossScale(), mx.array(True), mx.array(False)
    for _ in range(199):
        scale.adjust(good)
    assert float(scale.value) == 2**16
    scale.adjust(good)
    assert float(scale.value) == 2**17
    for _ in range(199):
        scale.adjust(good)
    scale.adjust(bad)  # the count begins again, from half
    for _ in range(199):
        scale.adjust(good)
    assert float(scale.value) == 2**16
    for _ in range(40):
        scale.adjust(bad)
    assert float(scale.value) == 1  # and never less


@pytest.mark.parametrize("rates, wanted", [
    ({"float32": 1.0, "bfloat16": 1.05, "float16": 1.05}, "float32"),  # nothing gained
    ({"float32": 1.0, "bfloat16": 1.9, "float16": 2.0}, "bfloat16"),
    ({"float32": 1.0, "bfloat16": 0.2, "float16": 1.8}, "float16"),  # no bfloat16 in hardware
    ({"bfloat16": 1.0}, "bfloat16"),
])
def test_prefers_digits_and_range_unless_clearly_slower(mlx, rates, wanted):
    from backends.mlx.device import _prefer

    assert _prefer({name: (1.0, rate) for name, rate in rates.items()}) == wanted


def test_a_precision_with_wrong_products_is_refused(mlx, monkeypatch):
    from backends.mlx import device

    right = device._product_error
    monkeypatch.setattr(device, "_product_error", lambda dtype: 0.5 if dtype == mx.bfloat16 else right(dtype))
    monkeypatch.setattr(device, "_rates", lambda dtype: (1e9, 9e9 if dtype == mx.bfloat16 else 1e9))
    found = device.open_device()
    assert found.precision == "float32"
    assert any("bfloat16: wrong" in note for note in found.notes)
    with pytest.raises(BackendError, match="bfloat16"):
        device.open_device("bfloat16")


def test_missing_mlx_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_mlx(name, *args, **kwargs):
        if name.split(".")[0] == "mlx":
            raise ImportError("No module named 'mlx'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mlx)
    with pytest.raises(BackendError, match=r'pip install mlx\..*mlx\[cpu\].*mlx\[cuda13\]'):
        backends.load("mlx")


@pytest.mark.parametrize("variable, message", [("abacus", "AUTORESEARCH_DEVICE=abacus")])
def test_unknown_device(monkeypatch, variable, message):
    monkeypatch.setenv("AUTORESEARCH_DEVICE", variable)
    with pytest.raises(BackendError, match=message):
        backends.load("mlx", "float32")


def test_unknown_precision(mlx):
    with pytest.raises(BackendError, match="float8"):
        backends.load("mlx", "float8")
