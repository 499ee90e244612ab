"""What only the MLX backend has: compilation, memory of the lazy graph, its errors and its choice of precision."""

from __future__ import annotations

import builtins
from collections import deque

import numpy as np
import pytest

import backends
from backends import bench
from backends.interface import BackendError
from tests.backends import support, tiny
from tests.backends.reference import Reference, uniform

mx = pytest.importorskip("mlx.core")

from backends.mlx import attention, cross_entropy, random  # noqa: E402
from backends.mlx import nn  # noqa: E402
from backends.mlx import bench as mlx_bench  # noqa: E402
from backends.mlx.bench import Bench  # noqa: E402


@pytest.fixture
def mlx():
    return support.opened("mlx", "float32")


def test_compiled_functions_are_traced_once_per_shape():
    support.needs_compiler()
    mlx, traced = support.opened("mlx", "float32", compiled=True), deque()  # a list would be a value that changes

    def update(param, grad, state, hyper):
        traced.append(tuple(param.shape))
        return param - hyper["lr"] * grad, {"last": grad}

    group = {
        **tiny.descent(["a", "b", "c"], stack=True),
        "update": update,
        "init": lambda param: {"last": mlx.ops.zeros_like(param)},
    }
    model = support.holder(mlx, a=np.ones((2, 3)), b=np.ones((2, 3)), c=np.ones(4))
    losses = deque()

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
        head = lambda x: x[:, :, None]  # noqa: E731

        def loss(m, x, y):
            x = m.wte(x)
            q, k = (head(ops.rope(head(t), 100.0)[:, :, 0]) for t in (x, m.blocks[0].attn.c_q(x)))
            mixed = ops.attention(q, k, head(x), 3) + ops.attention(q, k, head(x), None)
            return ops.mean_loss(m.logits, tiny.nats(ops), mixed[:, :, 0], y)

        trainer = mlx.Trainer(tiny.build(mlx), loss, [tiny.descent(tiny.NAMES, stack=True)])
        trainer.backward(*tiny.batch())
        return trainer.gradients()

    compiled = gradients(True)
    for name, gradient in gradients(False).items():
        np.testing.assert_allclose(compiled[name], gradient, rtol=1e-4, atol=1e-7)


def test_random_numbers_of_a_new_pass_compile_nothing(mlx):
    support.needs_compiler()
    traced = []

    @mx.compile
    def drawn(passes):
        traced.append(1)
        with random.drawing(passes):
            return random.uniform((3,), (4, 2))

    for number in range(3):
        assert drawn(mx.array(number, dtype=mx.uint64)).tolist() == uniform((3,), (4, 2), number).tolist()
    assert traced == [1]


@pytest.mark.parametrize("edited", [False, True])
def test_cross_entropy_holds_few_chunks_of_logits(mlx, monkeypatch, edited):
    if mlx.device.kind == "cuda":
        pytest.skip("CUDA's allocator also counts what is queued behind the chunk at work")
    ops = mlx.ops

    class Model(mlx.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = mlx.nn.Linear(8, 1024)

        @ops.fusable
        def logits(self, hidden):
            return ops.float32(self.lm_head(hidden))

        def edited(self, hidden):
            return 2.0 * ops.float32(self.lm_head(hidden))

    model = Model()
    hidden, targets = mx.random.normal((4, 1024, 8)), mx.zeros((4, 1024), dtype=mx.int32)
    mx.eval(hidden, targets)
    nats, parameters = tiny.nats(ops), nn.named_parameters(model)

    def peak(chunk):
        monkeypatch.setattr("backends.mlx.cross_entropy.SMALLEST_CHUNK", chunk)
        mean_loss, before = cross_entropy.by_memory(0), mx.get_active_memory()
        mx.reset_peak_memory()

        def loss(hidden, weight):
            with nn.substituted(parameters, {"lm_head.weight": weight}):
                return mean_loss(model.edited if edited else model.logits, nats, hidden, targets)

        mx.eval(mx.grad(loss, argnums=(0, 1))(hidden, parameters["lm_head.weight"].value))
        return mx.get_peak_memory() - before

    assert peak(2**18) < peak(2**22) / 4  # 16 chunks of logits instead of one


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


def test_a_precision_with_wrong_products_is_refused(mlx, isolated_home, monkeypatch):
    monkeypatch.setattr(bench.Bench, "attention_shape", (256, 1, 64))  # which one wins is no matter here
    right = Bench.product_error
    monkeypatch.setattr(
        Bench, "product_error", lambda self, precision: 0.5 if precision == "bfloat16" else right(self, precision)
    )
    found = backends.load("mlx").device
    assert found.precision != "bfloat16"  # which of the others is faster is the machine's to say
    assert any("bfloat16 wrong: relative error 5.0e-01" in note for note in found.notes)
    with pytest.raises(BackendError, match="can't compute in bfloat16"):
        backends.load("mlx", "bfloat16")


def test_a_precision_whose_kernels_fail_is_left_out(mlx, isolated_home, monkeypatch):
    def no_kernel(self, precision, *_):
        raise RuntimeError("[metal::Device] Unable to load kernel steel_gemm_float16")

    real = Bench.mlp
    monkeypatch.setattr(
        Bench, "mlp", lambda self, precision, n: (no_kernel if precision == "float16" else real)(self, precision, n)
    )
    tried = bench.try_precisions(Bench(2**33), repeats=2)
    assert tried["float16"] == "RuntimeError: [metal::Device] Unable to load kernel steel_gemm_float16"
    assert tried["float32"]["mlp"] > 0


def test_missing_mlx_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_mlx(name, *args, **kwargs):
        if name.split(".")[0] == "mlx":
            raise ImportError("No module named 'mlx'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mlx)
    with pytest.raises(BackendError, match=r"pip install mlx\..*mlx\[cpu\].*mlx\[cuda13\]"):
        backends.load("mlx")


def test_unknown_device(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "abacus")
    with pytest.raises(BackendError, match="AUTORESEARCH_DEVICE=abacus"):
        backends.load("mlx", "float32")


def test_unknown_precision(mlx):
    with pytest.raises(BackendError, match="float8"):
        backends.load("mlx", "float8")


def test_a_trial_that_lacks_memory_is_not_remembered(mlx, isolated_home, monkeypatch):
    monkeypatch.setattr(bench.Bench, "attention_shape", (256, 1, 64))  # which one wins is no matter here

    def full(*_):
        raise RuntimeError("[malloc] Unable to allocate 36864 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "product_error", full)
        with pytest.raises(BackendError, match="out of memory"):
            backends.load("mlx")
    assert backends.load("mlx").device.precision in bench.PRECISIONS


# --- a Mac's memory


class Metal:
    """What MLX is asked and told on a Mac with 8 GB, in place of `mlx.core`."""

    recommended = 5_726_631_936

    def __init__(self, monkeypatch):
        self.set = {}
        for name in ("memory", "cache", "wired"):
            monkeypatch.setattr(mx, f"set_{name}_limit", lambda limit, name=name: self.set.update({name: limit}))


def test_memory_is_limited_to_what_metal_recommends(monkeypatch):
    from backends.mlx import device

    metal = Metal(monkeypatch)
    device._limit_memory(metal.recommended)
    assert metal.set == {"memory": metal.recommended, "cache": metal.recommended // 2, "wired": metal.recommended}


def test_a_batch_beyond_the_working_set_is_halved(mlx, monkeypatch, capsys):
    """Metal does not fail there, but swaps: so the peak is looked at."""
    trainer, peaks = tiny.trainer(mlx, tiny.build(mlx)), iter([9e9, 6e9, 4e9])
    trainer.working_set = 5_000_000_000
    monkeypatch.setattr(mx, "get_peak_memory", lambda: next(peaks))
    trainer.warm_up(*tiny.batch(rows=8))
    assert "8 rows at once do not fit" in (out := capsys.readouterr().out) and "continuing with 2 at a time" in out
    assert list(trainer.rows_at_once.values()) == [2]
    assert mlx.warmed_up == {"compiled": trainer.compiled, "captured": None, "rows_at_once": 2}
    trainer.working_set = 10_000_000_000
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 1e9)
    trainer.warm_up(*tiny.batch(rows=8))
    assert mlx.warmed_up["rows_at_once"] is None, "the last warm-up counts"


def test_one_row_beyond_the_working_set_is_said(mlx, monkeypatch, capsys):
    trainer = tiny.trainer(mlx, tiny.build(mlx))
    trainer.working_set = 5_000_000_000
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 6e9)
    trainer.warm_up(*tiny.batch(rows=1))
    assert "6.0 GB of the 5.0 GB" in (out := capsys.readouterr().out) and "smaller DEPTH" in out


def test_a_cpu_that_nobody_asked_for_is_warned_of(monkeypatch):
    from backends.mlx import device

    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(device, "_has_cuda", lambda: False)
    monkeypatch.delenv("AUTORESEARCH_DEVICE", raising=False)
    before = mx.default_device()
    try:
        kind = device.identify().kind
        said = device.warnings(kind)
        assert kind == "cpu" and "neither Metal nor CUDA" in said[0] and "mlx[cuda13]" in said[0]
        monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
        assert device.warnings(device.identify().kind) == []
    finally:
        mx.set_default_device(before)


# --- attention


@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 3, 8, 13])
@pytest.mark.parametrize("length, kv_heads", [(29, 2), (16, 4), (5, 1)])
def test_each_attention_over_blocks(mlx, monkeypatch, name, window, length, kv_heads):
    """Blocks of 8 queries, the last one shorter, windows shorter, as long and longer than a block."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    rng = np.random.default_rng(0)
    q, k, v, w = (
        rng.standard_normal((2, length, heads, 4), dtype=np.float32).swapaxes(1, 2)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    if window is not None and window >= length:
        pytest.skip("a window this long is none")
    found = mlx_bench._with_gradients(attention.IMPLEMENTATIONS[name], [mx.array(x) for x in (q, k, v, w)], window)
    out = Reference().attention(*(x.swapaxes(1, 2).astype(np.float64) for x in (q, k, v)), window)
    np.testing.assert_allclose(np.array(found[0]).swapaxes(1, 2), out, rtol=1e-5, atol=1e-6)
    wanted = mlx_bench._with_gradients(attention.reference, [mx.array(x) for x in (q, k, v, w)], window)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-6)


def test_recomputed_attention_keeps_less(mlx):
    small = Bench(2**33, mx.float32, compiled=False)
    small.attention_shape = 1024, 2, 16
    assert 0 < small.attention_bytes("recomputed", None) < 0.7 * small.attention_bytes("blocks", None)


def test_a_head_without_a_fused_kernel_is_computed_in_blocks(mlx, monkeypatch):
    """An edit may change HEAD_DIM after `fused` was chosen for another."""

    def refuses(*args, **kwargs):
        raise ValueError("force_fused=True but no fused kernel is available")

    inputs = [mx.random.normal((1, 2, 16, 8)) for _ in range(3)]
    wanted = attention.recomputed(*inputs, 3)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", refuses)
    np.testing.assert_array_equal(np.array(attention.fused(*inputs, 3)), np.array(wanted))


def test_a_wrong_attention_is_not_chosen(mlx, monkeypatch):
    def careless(q, k, v, window):  # forgets the window
        return attention.recomputed(q, k, v, None)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "careless", careless)
    small = Bench(2**33, mx.float32, compiled=False)
    small.attention_shape, small.attentions = (64, 1, 8), tuple(attention.IMPLEMENTATIONS)
    tried = bench.try_attention(small, "float32")
    assert tried["full"]["careless"]["both"] and "wrong" in tried["window"]["careless"]
    assert bench.choose_attention(tried, 2**33)["window"] != "careless"
