"""Modules, names, weights and the evaluator's functions: what every backend has to do alike."""

from __future__ import annotations

import errno
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import backends
from backends.interface import BackendError
from storage import DataError
from tests.backends import support, tiny
from tests.backends.reference import token_losses

# --- modules and weights


def test_parameter_names_and_their_order(backend):
    assert list(backend.weights(tiny.build(backend))) == tiny.NAMES


def test_shapes(backend):
    shapes = backend.shapes(tiny.build(backend))
    assert shapes["blocks.1.c_fc.weight"] == (2 * tiny.WIDTH, tiny.WIDTH)  # (n_out, n_in)
    assert shapes["blocks.0.attn.c_k.weight"] == (tiny.WIDTH // 2, tiny.WIDTH)
    assert shapes["wte.weight"] == (tiny.VOCABULARY, tiny.WIDTH)
    assert shapes["scale"] == (tiny.LAYERS,)


def test_parameters_start_at_zero(backend):
    assert not support.numpy(backend, backend.nn.Linear(3, 2).weight).any()
    assert not support.numpy(backend, backend.nn.Embedding(3, 2).weight).any()


def test_initial_bytes(backend):
    model = tiny.build(backend, seed=5)
    rng = np.random.default_rng(5)
    found = backend.weights(model)
    for name in sorted(found):
        assert found[name].dtype == np.float32
        assert backend.shapes(model)[name] == found[name].shape
        assert found[name].tobytes() == (0.1 * rng.standard_normal(found[name].shape, dtype=np.float32)).tobytes()


def test_weights_are_copies(backend):
    model = tiny.build(backend)
    backend.weights(model)["scale"][:] = 7
    given = backend.weights(model)
    backend.set_weights(model, given)
    kept = given["scale"].copy()
    given["scale"][:] = 7
    np.testing.assert_array_equal(backend.weights(model)["scale"], kept)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("blocks.0.c_fc.weight"), r"missing blocks\.0\.c_fc\.weight"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "unknown extra"),
        (lambda w: w.update(scale=np.zeros((1, 2), np.float32)), r"scale has shape \(1, 2\)"),
    ],
)
def test_set_weights_names_what_does_not_fit(backend, change, message):
    model = tiny.build(backend)
    before, changed = backend.weights(model), backend.weights(model)
    changed["lm_head.weight"] = changed["lm_head.weight"] + 1
    change(changed)
    with pytest.raises(ValueError, match=message):
        backend.set_weights(model, changed)
    for name, weight in backend.weights(model).items():
        np.testing.assert_array_equal(weight, before[name])


def test_a_parameter_may_be_a_scalar(backend):
    model = support.holder(backend, temperature=2.5)
    assert backend.weights(model)["temperature"].shape == ()
    assert float(backend.ops.stop_gradient(backend.ops.square(model.temperature))) == 6.25


@pytest.mark.parametrize("key", ["0", "12"])
def test_module_dict_refuses_numeric_keys(backend, key):
    with pytest.raises(ValueError, match=key):
        backend.nn.ModuleDict({key: backend.nn.Linear(1, 1)})


def test_module_containers(backend):
    nn = backend.nn
    first, second = nn.Linear(1, 1), nn.Linear(1, 2)
    listed, named = nn.ModuleList([first, second]), nn.ModuleDict({"a": first, "b": second})
    assert (len(listed), listed[0], listed[-1], list(listed)) == (2, first, second, [first, second])
    assert ("a" in named, "c" in named, named["b"]) == (True, False, second)
    assert dict(named.items()) == {"a": first, "b": second}


def test_module_needs_its_init(backend):
    class Forgetful(backend.nn.Module):
        def __init__(self):
            self.inner = backend.nn.Linear(1, 1)

    with pytest.raises(AttributeError):
        Forgetful()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_parameters_are_read_in_the_compute_precision(low, precision):
    backend = low(precision)
    nn, read = backend.nn, {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.wte, self.head = nn.Parameter((2,)), nn.Embedding(5, 4), nn.Linear(4, 5)

        def hidden(self, tokens):
            return self.wte(tokens)

        def logits(self, x):
            out = self.head(x * self.scale[0])
            cast = backend.ops.compute(backend.ops.float32(x))
            read.update(scale=self.scale, tied=self.wte.weight, row=x, out=out, number=2.5 * x, cast=cast)
            return out

    model = Model()
    logits = backend.logits(model, np.zeros((1, 3), np.int32))
    assert {name: support.kind(x) for name, x in read.items()} == dict.fromkeys(read, precision)
    assert logits.dtype == np.float32
    assert {weight.dtype for weight in backend.weights(model).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_masters_keep_what_half_precision_would_lose(low, precision):
    backend = low(precision)
    model = support.holder(backend, value=np.float32([1 + 2.0**-20]))
    ops = backend.ops
    trainer = backend.Trainer(model, lambda m, x, y: ops.sum(ops.float32(m.value)) * 0.25, [tiny.descent(["value"])])
    trainer.backward(support.TOKENS, support.TOKENS)
    trainer.step([{"lr": 2.0**-20}])
    np.testing.assert_array_equal(backend.weights(model)["value"], np.float32([1 + 2.0**-20 - 2.0**-22]))


def test_save_and_load(backend, tmp_path):
    model, other = tiny.build(backend, seed=3), tiny.build(backend, seed=4)
    backend.save(model, tmp_path / "folder" / "weights.safetensors")
    backend.load(other, tmp_path / "folder" / "weights.safetensors")
    for name, weight in backend.weights(model).items():
        assert backend.weights(other)[name].tobytes() == weight.tobytes()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.ENOSPC, "full"), "free some space"),
    (RuntimeError("No space left (os error 28)"), "free some space"),
    (RuntimeError("Permission denied (os error 13)"), "set AUTORESEARCH_HOME"),
])  # fmt: skip
def test_weights_that_can_not_be_written(backend, isolated_home, error, advice):
    with mock.patch("safetensors.numpy.save_file", side_effect=error):
        with pytest.raises(DataError, match=f"could not write .*weights.safetensors.*{advice}"):
            backend.save(tiny.build(backend), isolated_home / "last" / "weights.safetensors")


@pytest.mark.parametrize("source", backends.NAMES)
@pytest.mark.parametrize("target", backends.NAMES)
def test_weights_and_losses_cross_backends(source, target, tmp_path):
    if source == target:
        pytest.skip("needs two backends")
    one, two = support.opened(source, "float32"), support.opened(target, "float32")
    model, other = tiny.build(one, seed=3), tiny.build(two, seed=4)
    one.save(model, tmp_path / "weights.safetensors")
    two.load(other, tmp_path / "weights.safetensors")
    for name, weight in one.weights(model).items():
        assert two.weights(other)[name].tobytes() == weight.tobytes()
    x, y = tiny.batch()
    np.testing.assert_allclose(two.losses(other, x, y), one.losses(model, x, y), rtol=2e-5, atol=2e-6)


# --- what the evaluator asks


def test_losses_are_log_softmax_of_logits(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    logits, losses = backend.logits(model, x), backend.losses(model, x, y)
    assert (logits.shape, logits.dtype) == ((*x.shape, tiny.VOCABULARY), np.float32)
    assert (losses.shape, losses.dtype) == (x.shape, np.float32)
    np.testing.assert_allclose(losses, token_losses(logits, y), rtol=1e-5, atol=1e-6)


def test_losses_of_large_logits_are_finite(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    weights = backend.weights(model)
    weights["lm_head.weight"] *= 1e4
    backend.set_weights(model, weights)
    assert np.isfinite(backend.losses(model, x, y)).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_losses_of_half_precision_are_taken_in_float32(low, precision):
    backend = low(precision)
    model, (x, y) = tiny.build(backend), tiny.batch()
    np.testing.assert_allclose(
        backend.losses(model, x, y), token_losses(backend.logits(model, x), y), rtol=1e-5, atol=1e-5
    )


def test_training_loss_is_the_mean_of_losses(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    trainer = tiny.trainer(backend, model)
    assert float(trainer.backward(x, y, scale=0.25)) == pytest.approx(backend.losses(model, x, y).mean(), rel=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    np.testing.assert_allclose(backend.losses(model, x[:1], y[:1]), backend.losses(model, x, y)[:1], rtol=1e-5)


def test_device(backend):
    device = backend.device
    assert device.name and device.slug == device.slug.lower() and " " not in device.slug
    assert device.precision == "float32" and device.memory > 2**28 and device.peak_flops > 1e8
    assert device.versions and any("float32" in note for note in device.notes)


def test_peak_memory_and_synchronize(backend):
    tiny.trainer(backend, tiny.build(backend)).backward(*tiny.batch())
    backend.synchronize()
    assert backend.peak_memory() > 100_000  # the masters alone are more


@pytest.mark.parametrize(
    "methods, message",
    [
        (["hidden", "logits", "forward"], "has two heads.*remove forward"),
        (["hidden", "forward"], r"has no logits: .* logits\(hidden\) is the head"),
        (["forward"], "has no hidden and no logits"),
    ],
)
def test_a_model_has_one_head(backend, methods, message):
    model = type("Model", (backend.nn.Module,), dict.fromkeys(methods, lambda self, x: x))()
    for ask in (lambda: backend.logits(model, support.TOKENS), lambda: backend.losses(model, *2 * [support.TOKENS])):
        with pytest.raises(TypeError, match=message):
            ask()


@pytest.mark.parametrize(
    "error, answer",
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"), True),
        (RuntimeError("Invalid buffer size: 8.21 GiB"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("memory"), False),
    ],
)
def test_out_of_memory_is_told_apart(backend, error, answer):
    assert backend.is_out_of_memory(error) is answer


def test_unknown_backend():
    with pytest.raises(BackendError, match="choose one of"):
        backends.load("abacus")
    ended = subprocess.run(
        [sys.executable, "-c", "import backends; backends.load('abacus')"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "choose one of" in ended.stderr and "Traceback" not in ended.stderr
