"""Our Triton kernels against plain operations: compiled on a GPU; without one, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from backends.pytorch import cross_entropy, mlp, rotary, runtime  # noqa: E402
from backends.pytorch.kernels import trial  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and torch.version.cuda is not None
kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs an NVIDIA GPU, or Triton's interpreter")
gpu = pytest.mark.skipif(not GPU or INTERPRETED, reason="needs an NVIDIA GPU")
# The interpreter's products in bfloat16 are wrong.
TOLERANCES = {torch.float16: 2e-3} if INTERPRETED else {torch.bfloat16: 1e-2, torch.float16: 2e-3}
VARIANTS = [(name, v) for name, count in dict(mlp=3, projection=4, cross_entropy=3).items() for v in range(count)]
INTERPRETABLE = [("mlp", 0), ("projection", 1), ("projection", 3), ("cross_entropy", 0)]  # others are the same there


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The sizes of trial's cases, for a test."""
    monkeypatch.setattr(runtime, "device", torch.device("cuda" if GPU and not INTERPRETED else "cpu"))
    sizes = dict(WIDTH=64, HEAD_DIM=32, VOCABULARY=80) if INTERPRETED else dict(VOCABULARY=1000)
    for name, size in sizes.items():
        monkeypatch.setattr(trial, name, size)
    monkeypatch.setattr(runtime, "logits_at_once", 31 * trial.VOCABULARY)  # several chunks, the last one smaller
    yield
    runtime.kernels = frozenset()


def with_gradients(function, inputs):
    """Outputs and gradients, for gradients of the outputs that are drawn."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = [trial._drawn(*t.shape, seed=9).to(t.dtype) for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def never(*_, **__):
    raise AssertionError("the plain operations were used")


def compare(function, inputs, tolerance, compiled=False):
    """By the kernels that are loaded, against plain operations in float32, which take none."""
    wanted = with_gradients(function, [t.float() for t in inputs])
    function(*inputs)  # makes tables that a trace can't make
    with (
        mock.patch.object(rotary.F, "linear", never),
        mock.patch.object(mlp.F, "linear", never),
        mock.patch.object(cross_entropy, "_losses_and_gradient", never),
    ):
        compile_ = torch.compile(function, dynamic=False, fullgraph=True) if compiled else function
        found = with_gradients(compile_, inputs)
    for here, right in zip(found, wanted, strict=True):
        assert here.shape == right.shape
        assert float((here.float() - right).norm() / right.norm()) < tolerance


def drawn(name, dtype, tokens=33):
    function, inputs = trial.CASES[name](trial._drawn(2, tokens, trial.WIDTH))
    return function, [t.to(dtype) for t in inputs]


@kernels
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name, variant", INTERPRETABLE if INTERPRETED else VARIANTS)
def test_each_variant(monkeypatch, name, variant, dtype):
    monkeypatch.setattr(runtime, "dtype", dtype)
    try:
        trial.load({name: variant})
        compare(*drawn(name, dtype), TOLERANCES[dtype])
    except Exception as error:
        if "out of resource" not in str(error).lower():  # a chip with less shared memory takes another variant
            raise


@kernels
def test_every_variant_is_tested():
    known = [(name, variant) for name in trial.CASES for variant in range(len(trial._module(name).VARIANTS))]
    assert sorted(known) == sorted(VARIANTS)


@kernels
@pytest.mark.parametrize("variant", [0, 3])
def test_heads_of_keys_that_serve_several_queries(monkeypatch, variant):
    dtype = next(iter(TOLERANCES))
    monkeypatch.setattr(runtime, "dtype", dtype)
    trial.load({"projection": variant})
    function, (x, w_q, w_k, w_v) = drawn("projection", dtype)
    kv = trial.HEAD_DIM
    compare(function, (x, w_q, w_k[:kv], w_v[:kv]), TOLERANCES[dtype])


@kernels
@pytest.mark.parametrize("softcap", [None, 3.0, 50.0])
@pytest.mark.parametrize("vocabulary", [64, 1000])
def test_softcaps(monkeypatch, softcap, vocabulary):
    dtype = next(iter(TOLERANCES))
    monkeypatch.setattr(trial, "VOCABULARY", vocabulary)
    monkeypatch.setattr(runtime, "logits_at_once", 31 * vocabulary)
    monkeypatch.setattr(runtime, "dtype", dtype)
    monkeypatch.setattr(trial, "SOFTCAP", softcap)
    trial.load({"cross_entropy": 0})
    function, (hidden, weight) = drawn("cross_entropy", dtype)
    compare(function, (hidden, 3 * weight), TOLERANCES[dtype])


@gpu
@pytest.mark.parametrize("name", trial.CASES)
def test_in_a_compiled_graph(monkeypatch, name):
    monkeypatch.setattr(runtime, "dtype", torch.bfloat16)
    trial.load({name: 0})
    compare(*drawn(name, torch.bfloat16, tokens=256), 1e-2, compiled=True)


@kernels
def test_what_a_kernel_does_not_take_is_computed_plainly(monkeypatch):
    dtype = next(iter(TOLERANCES))
    monkeypatch.setattr(runtime, "dtype", dtype)
    trial.load({"mlp": 0, "projection": 0, "cross_entropy": 0})
    x = trial._drawn(2, 5, 12).to(dtype)
    weights = [trial._drawn(*shape, seed=i).to(dtype) for i, shape in enumerate([(20, 12), (12, 20), (12, 12)])]
    assert mlp.squared_relu_mlp(x, *weights[:2]).shape == x.shape  # rows of 24 and 40 bytes, no multiples of 16
    assert rotary.rotary_qkv(x, *3 * weights[2:], 6, 10.0)[0].shape == (2, 5, 2, 6)  # half of 6 is no power of two


@pytest.mark.skipif(GPU or INTERPRETED or not importlib.util.find_spec("triton"), reason="needs Triton, and no GPU")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "........." in done.stdout


# ---- What is chosen ----

FAST, SLOW = {"kernel": 1.0, "variant": 1, "plain": 1.5}, {"kernel": 1.0, "variant": 0, "plain": 0.9}


def test_kernels_that_are_faster_than_the_compiler_are_chosen():
    tried = {"mlp": FAST, "projection": SLOW, "cross_entropy": "wrong: relative error 1.0e+00"}
    assert trial.choose(tried) == {"mlp": 1}
    assert trial.described(tried) == (
        "mlp 1.50 times as fast, projection 0.90 times as fast (not used), cross_entropy wrong: relative error 1.0e+00"
    )


def test_a_kernel_that_is_as_fast_as_the_compiler_is_chosen():
    assert trial.choose({"mlp": {"kernel": 1.04, "variant": 1, "plain": 1.0}}) == {"mlp": 1}


def test_a_kernel_with_wrong_numbers_is_refused(monkeypatch):
    variants = {0: "wrong: relative error 1.0e+00", 1: 2.0, 2: 1.0, 3: "OutOfResources: shared memory"}
    monkeypatch.setattr(trial, "_module", lambda _: mock.Mock(VARIANTS=variants))
    monkeypatch.setattr(trial, "_try", lambda _, variant: variants[variant])
    monkeypatch.setattr(trial, "_seconds", lambda *_: 1.0 if runtime.kernels else 1.5)
    assert trial.try_all(["mlp"]) == {"mlp": {"kernel": 1.0, "variant": 2, "plain": 1.5}}
    variants = {0: "wrong: relative error 1.0e+00", 1: "wrong: relative error 2.0e+00"}
    assert trial.try_all(["mlp"]) == {"mlp": "wrong: relative error 1.0e+00"}


def test_gradients_that_are_no_numbers_are_wrong(monkeypatch):
    monkeypatch.setattr(runtime, "dtype", torch.bfloat16)

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * float("nan")

    def case(x):
        return (lambda x: Poisoned.apply(x) if x.dtype == torch.bfloat16 else x.clone()), (x,)

    monkeypatch.setitem(trial.CASES, "mlp", case)
    monkeypatch.setattr(trial, "load", lambda _: None)
    assert trial._try("mlp", 0) == "wrong: relative error nan"


def test_a_trial_that_dies_refuses_all(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = trial.try_apart()
    assert found.keys() == trial.CASES.keys() and trial.choose(found) == {}
    assert all(reason.startswith("their trial ended with status 1") for reason in found.values())
    assert not trial.lasts(found)


def test_a_kernel_that_hangs_is_given_up_for_good(monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(trial.subprocess, "run", hangs)
    found = trial.try_apart()
    assert trial.lasts(found) and trial.choose(found) == {}
    assert set(found.values()) == {"their trial took more than 600 s"}


def test_memory_that_something_else_has_taken_is_not_remembered(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(trial, "load", full)
    assert trial._try("mlp", 0) == "out of memory" and not trial.lasts({"mlp": trial._try("mlp", 0)})


@kernels
def test_what_a_profile_may_name():
    assert trial.known({}) and trial.known({"mlp": 0, "projection": 3})
    assert not trial.known({"mlp": 9}) and not trial.known({"another": 0})


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_the_check_that_comes_before_the_timing(monkeypatch, error):
    monkeypatch.setattr(runtime, "dtype", torch.bfloat16)
    monkeypatch.setattr(trial, "load", lambda _: None)
    monkeypatch.setattr(trial, "_error", lambda _: error)
    assert trial._try("mlp", 0).startswith("wrong: relative error")


def test_no_kernel_is_tried_where_none_can_serve(monkeypatch):
    assert trial.why_none(torch.device("cpu")) == "none (for NVIDIA GPUs)"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(runtime, "dtype", torch.float32)
    assert trial.why_none(torch.device("cuda")) == "none (for half precision)"
    monkeypatch.setattr(runtime, "dtype", torch.bfloat16)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert trial.why_none(torch.device("cuda")).startswith("none (")
