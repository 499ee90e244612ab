"""What the compiler is told: a gradient of our own is one node, which its cache knows by the text of its module."""

import importlib

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402

from backends.pytorch import device, rotary, runtime  # noqa: E402

if not hasattr(torch._inductor.config, runtime.CACHED):
    pytest.skip("this PyTorch caches no function of a project's own", allow_module_level=True)


@pytest.fixture
def norm(monkeypatch, tmp_path):
    """norm(x): the RMS norm of x compiled anew, its gradient, and how often the compiler's cache had it."""
    monkeypatch.setattr(runtime, "compiled", True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def norm(x):
        torch._dynamo.reset()
        counters.clear()
        y = runtime.maybe_compile(lambda x: rotary.rms_norm(x) * 2)(x)
        (gradient,) = torch.autograd.grad(y.square().sum() + y[..., 0].sum(), [x])
        return y, gradient, counters["aot_autograd"]["autograd_cache_hit"]

    yield norm
    torch._dynamo.reset()


def test_has_the_gradient_of_plain_operations(norm):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = torch.nn.functional.rms_norm(x, (8,), eps=rotary.EPSILON) * 2
    (gradient,) = torch.autograd.grad(wanted.square().sum() + wanted[..., 0].sum(), [x])
    torch.testing.assert_close(norm(x)[:2], (wanted, gradient))


def test_is_one_node(norm):
    graphs = []

    def backend(graph, inputs, options=None):
        graphs.append(graph)
        return graph

    runtime.maybe_compile(rotary.rms_norm, backend=backend)(torch.ones(3, 8).requires_grad_())
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [rotary._normed]


def test_is_found_again_until_its_module_is_another(norm, monkeypatch):
    x = torch.randn(3, 8).requires_grad_()
    assert [norm(x)[2], norm(x)[2]] == [0, 1]
    name = "backends.pytorch.rotary._normed"
    monkeypatch.setitem(runtime._one_node, name, (rotary._normed, runtime._one_node[name][1] + "\n# edited"))
    assert norm(x)[2] == 0


@pytest.mark.parametrize("kind, calls", [("cuda", 1), ("cpu", 0)])
def test_the_compilers_helpers_are_started_early_for_a_gpu(kind, calls, monkeypatch):
    warmed = []
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: warmed.append(kind))
    device.load_compiler(torch.device(kind)).join()
    assert len(warmed) == calls


def test_what_the_compiler_does_once_it_still_does():
    torchs = [*device.ASIDE["cuda"], *device.ASIDE["cpu"], *device.DIGESTS[1:]]
    assert all(callable(getattr(importlib.import_module(module), function)) for module, function in torchs)
