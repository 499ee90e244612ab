"""How the PyTorch backends find out what this machine can do."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from backends import bench, machine, trials  # noqa: E402
from backends.interface import BackendError  # noqa: E402
from backends.pytorch import attention, device, random, rotary, runtime, trainer  # noqa: E402
from backends.pytorch.bench import Bench  # noqa: E402
from tests.backends import tiny  # noqa: E402
from tests.backends.reference import uniform  # noqa: E402
from tests.backends.support import opened  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend():
    return opened("sdpa", "float32")


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "GPUS_OF_THE_DRIVER", Path("/none"))
    monkeypatch.delenv("AUTORESEARCH_DEVICE", raising=False)


def put_nvidia_smi(folder, monkeypatch, script):
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_gpu_that_pytorch_cannot_use_is_an_error(tmp_path, monkeypatch, without_cuda):
    put_nvidia_smi(tmp_path, monkeypatch, "echo NVIDIA GeForce RTX 3090")
    with pytest.raises(
        BackendError, match=r"\(NVIDIA GeForce RTX 3090\), but PyTorch .* cannot use it.*AUTORESEARCH_DEVICE=cpu"
    ):
        device.pick()
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
    assert device.pick() == torch.device("cpu")


def test_a_gpu_that_was_hidden_is_an_error_that_says_so(tmp_path, monkeypatch, without_cuda):
    put_nvidia_smi(tmp_path, monkeypatch, "echo NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for shown in ("", "-1", "GPU-typo"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(BackendError, match=f"^CUDA_VISIBLE_DEVICES={shown} shows .*RTX 3090.*: unset it"):
            device.pick()


def test_an_amd_gpu_that_pytorch_cannot_use_is_told(tmp_path, monkeypatch, without_cuda):
    monkeypatch.setattr(machine, "AMD_NODES", tmp_path)
    processor = torch.device("cpu")
    assert device.notes(processor) == []
    for node, gpu in enumerate((0, 50432)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "gpu_id").write_text(f"{gpu}\n")
        assert bool(device.notes(processor)) == bool(gpu)
    assert "ROCm" in device.notes(processor)[0]
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
    assert device.notes(processor) == []


def test_a_driver_without_a_gpu_is_no_error(tmp_path, monkeypatch, without_cuda):
    put_nvidia_smi(tmp_path, monkeypatch, "echo No devices were found; exit 6")
    assert device.pick() == torch.device("cpu")


def test_tools_of_another_version_than_the_driver_hide_no_gpu(tmp_path, monkeypatch, without_cuda):
    put_nvidia_smi(tmp_path, monkeypatch, "echo Driver/library version mismatch; exit 18")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(device, "GPUS_OF_THE_DRIVER", tmp_path / "gpus")
    with pytest.raises(BackendError, match=r"this machine has a GPU \(NVIDIA\)"):
        device.pick()


@pytest.mark.parametrize("wanted", ["cuda", "tpu", "cuda:7", "cpu:x", "cpu:1", "cpu:"])
def test_a_device_that_is_not_there(monkeypatch, without_cuda, wanted):
    monkeypatch.setenv("AUTORESEARCH_DEVICE", wanted)
    with pytest.raises(BackendError, match=f"AUTORESEARCH_DEVICE={wanted}: PyTorch .* has here only cpu"):
        device.pick()


def test_wrong_products_are_not_usable(backend, monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a, b) * (1 if a.dtype == torch.float32 else 1.1)
    )
    tried = bench.try_precisions(backend.bench, repeats=2)
    assert tried["float32"]["product"] > 0 and tried["bfloat16"].startswith("wrong: relative error 1.0e-01")


def test_wrong_and_failing_attention_is_not_chosen(backend, monkeypatch):
    def off_by_one(q, k, v, window):
        return attention.sdpa_mask(q, k, v, None if window is None else window + 1)

    def broken(q, k, v, window):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(
        attention, "IMPLEMENTATIONS", {"off_by_one": off_by_one, "broken": broken, "sdpa_mask": attention.sdpa_mask}
    )
    small = Bench(runtime.device, 2**30)
    small.attention_shape, small.attentions = (64, 2, 32), tuple(attention.IMPLEMENTATIONS)
    results = bench.try_attention(small, "float32", repeats=1)
    assert results["window"]["off_by_one"].startswith("wrong: relative error")
    assert results["full"]["broken"] == "RuntimeError: no kernel image is available"
    assert bench.choose_attention(results, 2**30)["window"] == "sdpa_mask"


@pytest.mark.parametrize("name", ["sdpa_causal", "sdpa_blocks", "sdpa_mask"])
@pytest.mark.parametrize("window", [None, 0, 5, 300])
def test_every_implementation_agrees_with_the_definition(backend, monkeypatch, name, window):
    if name == "sdpa_causal" and window is not None:
        pytest.skip("is_causal supports no window")
    q, k, v = (torch.randn(2, 600, heads, 16) for heads in (4, 2, 2))
    found = attention.IMPLEMENTATIONS[name](q, k, v, window)
    assert torch.allclose(found, attention.reference(q, k, v, window), atol=1e-5)


def test_losses_come_from_as_many_logits_at_once_as_suit_the_device(backend, monkeypatch):
    model, (x, y) = tiny.build(backend), tiny.batch()
    whole, asked, logits = backend.losses(model, x, y), [], model.logits
    monkeypatch.setattr(runtime, "logits_at_once", 7 * tiny.VOCABULARY)
    monkeypatch.setattr(model, "logits", lambda hidden: asked.append(len(hidden)) or logits(hidden))
    torch.testing.assert_close(backend.losses(model, x, y), whole, rtol=1e-6, atol=1e-6)
    assert max(asked) == 7 < x.shape[1]


def test_random_numbers_of_a_new_pass_compile_nothing(backend):
    counter, passes = CompileCounter(), random.counter()
    drawn = torch.compile(lambda: random.uniform((3,), (4, 2)), backend=counter, fullgraph=True)
    with random.drawing(passes):
        for number in range(3):
            assert drawn().tolist() == uniform((3,), (4, 2), number).tolist()
            passes += 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_norm_has_the_gradient_of_the_plain_one(backend, dtype):
    x, upstream = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True), torch.randn(2, 3, 16, dtype=dtype)
    compiled = torch.compile(backend.ops.rms_norm, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(norm(x), x, upstream)[0] for norm in (compiled, backend.ops.rms_norm))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


def test_two_trainers_of_one_model_train_it_in_turn(backend):
    """Parameters are views of what their trainer updates: the second one takes them, and the first has them back."""

    def trained(trainers):
        model = tiny.build(backend)
        optimizer = [tiny.descent(list(backend.weights(model)), stack=True)]
        made = [backend.Trainer(model, tiny.loss(backend), optimizer) for _ in range(trainers)]
        for step in range(4):
            one = made[step % trainers]
            one.backward(*tiny.batch(seed=step), 1.0)
            one.step(tiny.schedule(optimizer, 1.0))
        return backend.weights(model)

    alone, in_turn = trained(1), trained(2)
    assert all((alone[name] == in_turn[name]).all() for name in alone)


def test_what_a_graph_makes_is_not_kept(backend, monkeypatch):
    """A recorded step would overwrite it: of a window, a length or a base that comes up in the middle of a training."""
    monkeypatch.setattr(attention, "_masks", {})
    monkeypatch.setattr(attention, "_distances_made", {})
    monkeypatch.setattr(rotary, "_tables", {})
    x, bias = (torch.randn(shape, device=runtime.device) for shape in ((2, 80, 4, 32), (4, 20)))

    def call(x):
        q = backend.ops.rope(x, 1234)
        return attention.sdpa_blocks(q, x, x, 30) + attention.modified(q, x, x, 30, None, bias, None)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    found = compiled(x)
    assert not (attention._masks or attention._distances_made or rotary._tables)
    torch.testing.assert_close(found, call(x))
    assert attention._masks and attention._distances_made and rotary._tables
    torch.testing.assert_close(compiled(x), found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "window, head, trained, flex",
    [(None, 64, False, True), (100, 128, False, True), (None, 48, False, False), (None, 64, True, False)],
)
def test_modified_attention_compiled_for_a_gpu(monkeypatch, window, head, trained, flex):
    opened("sdpa", "float32", compiled=True)
    calls = []
    monkeypatch.setattr(attention, "_flex", lambda *a, f=attention._flex: (calls.append(1), f(*a))[1])
    documents = (torch.rand(2, 600, device="cuda") < 0.02).cumsum(1)
    inputs = [torch.randn(2, 600, heads, head, device="cuda") for heads in (4, 2, 2)] + [
        torch.randn(4, 50, device="cuda")
    ]
    upstream = torch.randn(2, 600, 4, head, device="cuda")

    def results(function):
        leaves = [x.clone().requires_grad_() for x in inputs[: 3 + trained]]
        out = function(*leaves, *inputs[3 + trained :])
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    def call(q, k, v, bias):
        return attention.modified(q, k, v, window, 5.0, bias, documents)

    wanted = results(call)  # by blocks, which test_ops compares with the definition; makes the masks
    assert not calls
    found = results(torch.compile(call, fullgraph=True, dynamic=False))
    assert bool(calls) == flex
    for one, right in zip(found, wanted):
        assert (one - right).norm() < 2e-3 * right.norm()  # products in TF32


def test_a_trial_is_remembered_and_survives_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "owner", "")  # a test before this one may have opened a GPU
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    assert trials.remember("a", lambda: 1) == 1 and trials.remember("a", lambda: 2) == 1
    assert trials.remember("b", lambda: 3) == 3
    assert json.loads((tmp_path / "trials.json").read_text()) == {"a": 1, "b": 3}
    for number, damaged in enumerate(["{", "null", "[]", "5"]):
        (tmp_path / "trials.json").write_text(damaged)
        assert trials.remember("a", lambda: number) == number


def test_a_passing_failure_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    assert trials.remember("a", lambda: "no compiler", lambda result: result is True) == "no compiler"
    assert trials.remember("a", lambda: True, lambda result: result is True) is True


def test_a_home_that_cannot_be_written_only_repeats_the_trial(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "file" / "home"))
    assert trials.remember("a", lambda: 1) == 1 and trials.remember("a", lambda: 2) == 2


def test_without_a_compiler_it_says_why(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("Cannot find a working triton installation\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    assert device.compiler_works(torch.device("cpu")) == "RuntimeError: Cannot find a working triton installation"


def test_a_graph_that_does_not_compile_trains_uncompiled(backend, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "compiled", True)
    monkeypatch.setattr(runtime, "attention", runtime.attention)  # what the fallback changes is put back

    def loss(model, x, y):
        torch._dynamo.graph_break()  # what a .item() in train.py does
        return tiny.loss(backend)(model, x, y)

    model = tiny.build(backend)
    trained = trainer.Trainer(model, loss, [tiny.descent(backend.weights(model))])
    x, y = tiny.batch()
    trained.warm_up(x, y)
    assert "does not compile" in capsys.readouterr().out and not runtime.compiled
    assert backend.warmed_up["compiled"] is False and not backend.warmed_up["captured"]
    assert float(trained.backward(x, y)) > 0


@pytest.mark.parametrize("stack", [False, True])
def test_a_rule_may_keep_what_the_parameter_was(backend, stack):
    """And exchange its states."""

    def update(param, grad, state, hyper):
        new = param - hyper["lr"] * grad + 0.5 * (param - state["before"])
        return new, {"before": param, "this": state["that"], "that": state["this"]}

    model = tiny.build(backend)
    names = list(backend.weights(model))
    rule = dict(init=lambda p: {"before": p, "this": p, "that": p + 1}, update=update, stack=stack, hyper={"lr": 0.1})
    optimizer = [dict(rule, names=names)]
    made, wanted, before = trainer.Trainer(model, tiny.loss(backend), optimizer), {}, backend.weights(model)
    start = before
    for step in range(3):
        made.backward(*tiny.batch(seed=step), 1.0)
        now, gradients = backend.weights(model), made.gradients()
        wanted = {name: now[name] - 0.1 * gradients[name] + 0.5 * (now[name] - before[name]) for name in names}
        made.step(tiny.schedule(optimizer, 1.0))
        before = now
        for name, weight in backend.weights(model).items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-5)
    made.adopt("this")  # exchanged three times
    assert all(abs(weight - start[name] - 1).max() < 1e-5 for name, weight in backend.weights(model).items())


def test_layers_that_do_not_compile_apart_are_compiled_together(backend, monkeypatch, capsys):
    def fails(module, inputs, options=None):
        raise RuntimeError("not this graph")

    compile_whole, backends_used = torch.compile, []

    def compile_by_tracing(function, backend, options, **how):
        backends_used.append(backend)
        return compile_whole(function, backend="aot_eager" if backend == "inductor" else backend, **how)

    monkeypatch.setattr(torch, "compile", compile_by_tracing)
    monkeypatch.setattr(trainer, "compile_layers", fails)
    for name in ("compiled", "by_layer"):
        monkeypatch.setattr(runtime, name, True)
    model = tiny.build(backend)
    trained = trainer.Trainer(model, tiny.loss(backend), [tiny.descent(backend.weights(model))])
    trained.warm_up(*tiny.batch())
    assert "all its layers at once" in capsys.readouterr().out and runtime.compiled and not runtime.by_layer
    assert backends_used[0] is fails
    assert float(trained.backward(*tiny.batch())) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_scalar_is_read_while_the_device_goes_on():
    x, done = torch.randn(8192, 8192, device="cuda"), torch.cuda.Event()
    scalar = device.Copy(x.square().mean())
    for _ in range(50):
        x = x @ x / 100
    done.record()
    assert abs(float(scalar) - 1) < 0.01 and not done.query()


HELD = """
import psutil, sys, torch
from backends.pytorch import device
from backends.pytorch.bench import Bench
if sys.argv[1:]:
    device.keep_freed_memory()
def held():
    return psutil.Process().memory_info().rss >> 20
torch.ones(1)
before = held()
arrays = [torch.ones(2**22) for _ in range(8)]
del arrays
freed = held()
Bench(torch.device("cpu"), 0).forget()
print(freed - before, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
@pytest.mark.parametrize("keep", [[], ["keep"]])
def test_what_a_step_frees_stays_for_the_next_one(keep):
    freed, forgotten = map(int, subprocess.check_output([sys.executable, "-c", HELD, *keep], cwd=ROOT).split())
    assert (freed > 100) == bool(keep)  # MiB, of 128
    assert forgotten < 64  # another process may need what a benchmark held


def test_versions_are_plain_text():
    """PyTorch's own is a class of its own, which journals can't hold."""
    versions = device.versions(torch.device("cpu"))
    assert versions["torch"] == torch.__version__ and {type(text) for text in versions.values()} == {str}


def test_processors_of_one_name_differ_by_their_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        found = device.versions(torch.device("cpu"))
        assert found["instructions"] == ("AVX512 avx512_bf16" if supported else "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert device.versions(torch.device("cpu"))["instructions"] == "AVX512"
