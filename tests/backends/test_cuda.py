"""The backend for Hopper: Flash Attention 3 and where it comes from. Builds of it are played by operators on a CPU."""

import contextlib
import ctypes
import importlib.machinery
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import huggingface_hub  # noqa: E402

import backends  # noqa: E402
from backends import bench as benches  # noqa: E402
from backends import cuda  # noqa: E402
from backends.cuda import flash3, hub, local, providers  # noqa: E402
from backends.interface import BackendError, Calibrated  # noqa: E402
from backends.pytorch import attention, device, runtime  # noqa: E402
from backends.pytorch.ops import ops  # noqa: E402
from backends.pytorch.bench import Bench  # noqa: E402
from tests.backends.support import opened  # noqa: E402

REPOSITORY = "kernels-community/flash-attn3"
hopper = pytest.mark.skipif(not cuda.is_here(), reason="needs a Hopper GPU")

# As the build in xFormers has it, as newer ones do, and as one without buffers for the gradients and without defaults.
BUILDS = {
    "buffers, gradients returned": (
        "Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
        "Tensor? cu_seqlens_q=None, int? max_seqlen_q=None, float? softmax_scale=None, bool is_causal=False, "
        "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
        "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "
        "int sm_margin=0",
        "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
        "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, float? softmax_scale=None, "
        "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
        "bool deterministic=False, int sm_margin=0",
        "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor)",
    ),
    "buffers alone": (
        "Tensor q, Tensor k, Tensor v, Tensor? qv, Tensor(out!)? out, Tensor? page_table, float? softmax_scale, "
        "bool causal, int window_size_left, int window_size_right, float softcap, int num_splits, int sm_margin",
        "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq, Tensor(dk!)? dk, "
        "Tensor(dv!)? dv, float? softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
        "float softcap, bool deterministic",
        "(Tensor, Tensor)",
    ),
    "no buffers": (
        "Tensor v, Tensor k, Tensor q, bool causal, int window_size_right, int window_size_left, float softmax_scale",
        "Tensor softmax_lse, Tensor out, Tensor v, Tensor k, Tensor q, Tensor dout, float softmax_scale, bool causal, "
        "int window_size_right, int window_size_left",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
}


def scores(q, k, scale, window):
    """(B, H, T, T) in float32, and which of them count."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (j <= i) if window < 0 else (j <= i) & (i - j <= window)
    return (torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale).masked_fill(~seen, float("-inf"))


def forward(q, k, v, scale, window):
    s = scores(q, k, scale, window)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.float()).to(q.dtype), s.logsumexp(-1)


def backward(dout, q, k, v, out, lse, scale, window):
    """Dao 2023 (arXiv:2307.08691), section 2.3."""
    groups, dout = q.shape[2] // k.shape[2], dout.float()
    p = (scores(q, k, scale, window) - lse[..., None]).exp()
    dp = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(groups, 2).float())
    ds = p * (dp - (dout * out.float()).sum(-1).transpose(1, 2)[..., None]) * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k.repeat_interleave(groups, 2).float())
    dk = torch.einsum("bhij,bihd->bjhd", ds, q.float()).unflatten(2, (-1, groups)).sum(3)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout).unflatten(2, (-1, groups)).sum(3)
    return [x.to(q.dtype) for x in (dq, dk, dv)]


@contextlib.contextmanager
def registered(namespace, build="buffers, gradients returned", factor=1.0):
    """A build's operators under torch.ops, whose outputs are multiplied by a factor."""
    fwd, bwd, returns = BUILDS[build]
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(
        f"fwd({fwd}) -> (Tensor, Tensor, Tensor, Tensor)"
        if "out!" not in fwd
        else f"fwd({fwd}) -> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    library.define(f"bwd({bwd}) -> {returns}")
    ops = getattr(torch.ops, namespace)

    def arguments(op, given):
        names = [argument.name for argument in op.default._schema.arguments]
        given = {a.name: a.default_value for a in op.default._schema.arguments} | dict(zip(names, given))
        assert given.get("is_causal", given.get("causal")) is True and given["window_size_right"] == 0
        assert given.get("num_splits", 1) == 1 and all(given[name].stride(-1) == 1 for name in "qkv")
        return given

    def run_forward(*given):
        a = arguments(ops.fwd, given)
        out, lse = forward(a["q"], a["k"], a["v"], a["softmax_scale"], a["window_size_left"])
        return out * factor, lse, torch.empty(0), torch.empty(0)

    def run_backward(*given):
        a = arguments(ops.bwd, given)
        assert a["dout"].stride(-1) == 1 and not a.get("deterministic")
        found = backward(
            *(a[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse", "softmax_scale", "window_size_left"))
        )
        if "dq" in a:
            for name, gradient in zip(("dq", "dk", "dv"), found):
                a[name].copy_(gradient)
            found = [a["dq"], a["dk"], a["dv"]]
        rest = torch.empty(0)
        return (rest, torch.empty(0)) if returns == "(Tensor, Tensor)" else (*found, rest)

    library.impl("fwd", run_forward, "CPU")
    library.impl("bwd", run_backward, "CPU")
    try:
        yield ops
    finally:
        library._destroy()


@pytest.fixture
def process(monkeypatch):
    """What a provider changes in this process is put back; half precision on the CPU."""
    opened("sdpa", "float32")
    monkeypatch.setattr(runtime, "added_attention", {})
    monkeypatch.setattr(runtime, "dtype", torch.bfloat16)
    monkeypatch.delenv(local.VARIABLE, raising=False)
    yield
    flash3.use(None)


@pytest.fixture
def small(process):
    found = Bench(torch.device("cpu"), 2**30)
    found.attention_shape = 64, 2, 32
    return found


def inputs(heads=4, kv_heads=2, length=40, dim=16, dtype=torch.bfloat16, where="cpu"):
    """q, k, v: slices of one projection; and a gradient whose last axis is not contiguous."""
    torch.manual_seed(0)
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * dim).to(where, dtype).requires_grad_()
    q, k, v = (x.unflatten(2, (-1, dim)) for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 2))
    return qkv, q, k, v, torch.randn(2, length, dim, heads).to(where, dtype).transpose(2, 3)


def distance(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def check(function, window, **shape):
    """Output and gradient of `function` against the definition."""
    qkv, q, k, v, dout = inputs(**shape)
    out = function(q, k, v, window)
    (gradient,) = torch.autograd.grad(out, qkv, dout, retain_graph=True)
    wanted = attention.reference(q, k, v, window)
    (wanted_gradient,) = torch.autograd.grad(wanted, qkv, dout.float())
    assert out.dtype == q.dtype and distance(out, wanted) < 1e-2 and distance(gradient, wanted_gradient) < 2e-2


# --- The operator ---


@pytest.mark.parametrize("window", [None, 0, 7])
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_gives_what_the_definition_says(process, build, window):
    with registered("fa3_a", build) as ops:
        flash3.use(flash3.from_ops(ops))
        check(flash3.flash3, window)
        compiled = torch.compile(flash3.flash3, fullgraph=True, backend="aot_eager")
        check(compiled, window)
        torch.compiler.reset()


def test_without_a_gradient(process):
    with registered("fa3_a") as ops, torch.no_grad():
        flash3.use(flash3.from_ops(ops))
        _, q, k, v, _ = inputs()
        assert distance(flash3.flash3(q, k, v, 5), attention.reference(q, k, v, 5)) < 1e-2


def test_its_fake_has_the_shapes_of_the_real_one(process):
    with registered("fa3_a") as ops:
        flash3.use(flash3.from_ops(ops))
        _, q, k, v, dout = inputs()
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = torch.ops.autoresearch.flash3(q, k, v, 3)
        tests = "test_schema", "test_faketensor"
        torch.library.opcheck(torch.ops.autoresearch.flash3, (q, k, v, 3), test_utils=tests)
        torch.library.opcheck(torch.ops.autoresearch.flash3_backward, (dout, q, k, v, out, lse, 3), test_utils=tests)
        found = torch.ops.autoresearch.flash3_backward(dout, q, k, v, out, lse, 3)
        assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", [dict(dtype=torch.float32), dict(dim=264), dict(dim=12)])
def test_heads_that_it_has_no_kernel_for_go_another_way(process, monkeypatch, shape, window):
    """An edit may change HEAD_DIM, or take q to float32, after this was chosen for other heads."""
    monkeypatch.setattr(runtime, "added_attention", {"fa3": flash3.flash3})  # without a kernel: it would fail
    monkeypatch.setattr(runtime, "attention", {"full": "fa3", "window": "fa3"})
    check(ops.attention, window, **shape)


def test_a_schema_without_what_is_needed(process):
    library = torch.library.Library("fa3_b", "FRAGMENT")
    library.define("fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
    library.define("bwd(Tensor q) -> Tensor")
    with pytest.raises(flash3.Unavailable, match="has no softmax_scale, window_size_left"):
        flash3.from_ops(torch.ops.fa3_b)
    library._destroy()


# --- Providers ---

SHA = "0123456789abcdef0123456789abcdef01234567"
FIRST, SECOND = (f"kernels {repository}@{commit}" for repository, commit in hub.TRUSTED.items())


def found(small, fetch=False, calibrated=None):
    """(provider, notes)"""
    return providers.attention(small, "bfloat16", calibrated, fetch)


def with_profile(provider, **attention_):
    chosen = {"full": "fa3", "window": "fa3"} if provider else {"full": "sdpa_causal", "window": "sdpa_mask"}
    return Calibrated("abc", "bfloat16", attention_ or chosen, 1e9, 256, provider)


@pytest.fixture
def package(monkeypatch):
    """Installs flash_attn_interface, whose outputs are multiplied by a factor."""
    with contextlib.ExitStack() as stack:

        def install(factor=1.0):
            module = ModuleType("flash_attn_interface")
            module.torch, module.flash_attn_3_gpu = torch, stack.enter_context(registered("fa3_package", factor=factor))
            monkeypatch.setitem(sys.modules, "flash_attn_interface", module)

        yield install


@pytest.fixture
def kernels(monkeypatch):
    """The `kernels` package and a hub: `builds` by commit are the factor of the outputs; `asked` what was loaded."""
    with contextlib.ExitStack() as stack:
        here = SimpleNamespace(builds={}, asked=[], reachable=True, versions={})

        def get_kernel(repo_id, *, revision=None, version=None, trust_remote_code=False):
            offline = huggingface_hub.constants.HF_HUB_OFFLINE
            here.asked.append((repo_id, revision, offline))
            assert trust_remote_code == [repo_id] and version is None
            if revision not in here.builds:
                raise FileNotFoundError("Cannot find a build variant for this system")
            module, inner = ModuleType("flash_attn3"), ModuleType("flash_attn3.flash_attn_interface")
            module.flash_attn_interface = inner
            inner.ops = stack.enter_context(
                registered(f"fa3_hub{len(here.asked)}", "buffers alone", here.builds[revision])
            )
            return module

        def ask(*_, **__):
            if not here.reachable:
                raise ConnectionError("Name or service not known")
            branches = [SimpleNamespace(name=name, target_commit=commit) for name, commit in here.versions.items()]
            return SimpleNamespace(branches=branches)

        module = ModuleType("kernels")
        module.get_kernel, module.__spec__ = get_kernel, importlib.machinery.ModuleSpec("kernels", None)
        monkeypatch.setitem(sys.modules, "kernels", module)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", ask)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield here


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A library file that the user names; loading it is played. `fails`: what loading it raises."""
    path = tmp_path / "fa3.so"
    path.write_bytes(b"no machine code")
    monkeypatch.setenv(local.VARIABLE, str(path))
    with contextlib.ExitStack() as stack:
        here = SimpleNamespace(path=path, name="library sha256:25e8a3b7f7c5", factor=1.0, fails=None, registers=True)

        def load(asked):
            assert asked == str(path)
            if here.fails:
                raise OSError(f"Could not load this library: {asked}") from OSError(here.fails)
            if here.registers and not local.registered():
                stack.enter_context(registered("flash_attn_3", factor=here.factor))
            torch.ops.loaded_libraries.add(os.path.realpath(asked))

        monkeypatch.setattr(torch.ops, "load_library", load)
        here.name = f"library sha256:{local.sha256(path)[:12]}"
        yield here
    torch.ops.loaded_libraries.discard(os.path.realpath(path))


def test_the_order_in_which_they_are_tried(process, kernels, library):
    names = [name.split("@")[0] for name, _ in providers.providers()]
    assert names == [
        library.name,
        *(one.split("@")[0] for one in (FIRST, SECOND)),
        "flash_attn_interface",
        f"pytorch {torch.__version__}",
    ]


def test_without_any_there_is_one_line_that_says_why(small, kernels):
    provider, notes = found(small)
    assert provider is None and runtime.added_attention == {} and len(notes) == 1
    assert notes[0].startswith("without Flash Attention 3 (kernels varunneal/flash-attention-3@de87b9b5: not on disk; ")
    assert "flash_attn_interface: not installed; pytorch" in notes[0]


def test_without_the_kernels_package(small, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert "(kernels: not installed; " in found(small)[1][0]


def test_one_that_gives_wrong_numbers_is_refused_and_the_next_is_taken(small, kernels, package):
    kernels.builds[hub.TRUSTED["varunneal/flash-attention-3"]] = 1.1
    package()
    provider, notes = found(small)
    assert provider == "flash_attn_interface" and runtime.added_attention == {"fa3": flash3.flash3}
    assert "varunneal/flash-attention-3@de87b9b5: wrong: relative error 1" in notes[0]
    check(flash3.flash3, 5)


def test_when_all_are_wrong_none_is_taken(small, kernels, package, library):
    library.factor = 0.9
    kernels.builds.update(dict.fromkeys(hub.TRUSTED.values(), float("nan")))
    package(1.1)
    provider, notes = found(small)
    assert provider is None and len(notes) == 1 and notes[0].count("wrong: relative error") == 4
    assert "flash_attn_interface: wrong" in notes[0] and library.name in notes[0]


def test_one_that_can_not_run_here_is_refused(small, package, monkeypatch):
    package()
    monkeypatch.setattr(flash3, "from_ops", lambda ops: flash3.Kernels(None, None))
    assert "flash_attn_interface: TypeError" in found(small)[1][0]


def test_float32_asks_nobody(small, library):
    assert providers.attention(small, "float32", None) == (None, [])


def test_runs_load_from_disk_and_calibration_fetches(small, kernels):
    kernels.builds.update(dict.fromkeys(hub.TRUSTED.values(), 1.0))
    assert found(small)[0] == FIRST and found(small, fetch=True)[0] == FIRST
    assert [offline for *_, offline in kernels.asked] == [True, False]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_hub_out_of_reach_is_a_line_and_no_error(small, kernels, capsys):
    kernels.builds.update(dict.fromkeys(hub.TRUSTED.values(), 1.0))
    kernels.reachable = False
    assert found(small, fetch=True)[0] == FIRST and kernels.asked[0][2] is True
    assert capsys.readouterr().out.count("no kernels can be downloaded (ConnectionError") == 1


@pytest.mark.parametrize(
    "repository, commit",
    [("somebody/flash-attn3", SHA), (REPOSITORY, "main"), (REPOSITORY, SHA[:12]), (REPOSITORY, "")],
)
def test_nothing_but_commits_of_trusted_publishers_is_run(process, kernels, repository, commit):
    kernels.builds[commit] = 1.0
    with pytest.raises(flash3.Unavailable, match="not a commit of varunneal/flash-attention-3 or kernels-community"):
        hub.load(repository, commit)
    assert kernels.asked == []


def test_releases_of_kernels_that_ask_for_no_trust(small, kernels, monkeypatch):
    kernels.builds.update(dict.fromkeys(hub.TRUSTED.values(), 1.0))
    newer = sys.modules["kernels"].get_kernel
    monkeypatch.setattr(
        sys.modules["kernels"],
        "get_kernel",
        lambda repo_id, revision="main": newer(repo_id, revision=revision, trust_remote_code=[repo_id]),
    )
    assert found(small)[0] == FIRST


def test_what_pytorch_activates(small, monkeypatch):
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: (active or [None])[-1], raising=False
    )
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear, raising=False)
    aten, rest = torch.library.Library("aten", "IMPL"), [torch.empty(0)] * 3

    def run_forward(q, k, v, _, __, long, longest, dropout, causal, debug, scale, window_size_left, window_size_right):
        assert causal and not dropout and window_size_right == 0 and active == ["FA3"]
        return *forward(q, k, v, scale, window_size_left), *rest

    def run_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        _,
        __,
        long,
        longest,
        dropout,
        causal,
        state,
        unused,
        scale,
        window_size_left,
        window_size_right,
    ):
        return backward(dout, q, k, v, out, lse, scale, window_size_left)

    aten.impl("_flash_attention_forward", run_forward, "CPU")
    aten.impl("_flash_attention_backward", run_backward, "CPU")
    try:
        assert found(small)[0] == f"pytorch {torch.__version__}"
        check(flash3.flash3, 5)
        providers.drop()
        assert active == []
    finally:
        aten._destroy()


# --- The library that the user names ---


def test_the_library_named_by_the_user_goes_first(small, library, kernels, package):
    kernels.builds.update(dict.fromkeys(hub.TRUSTED.values(), 1.0))
    package()
    assert found(small) == (library.name, [f"Flash Attention 3 from {library.name}"]) and kernels.asked == []
    assert found(small)[0] == library.name  # once more in the same process


def test_a_cuda_runtime_beside_it_is_loaded_first(process, library, monkeypatch):
    loaded = []
    (library.path.parent / "libcudart.so.12").write_bytes(b"")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded.append((name, mode)))
    local.from_library(library.path)
    assert loaded == [(str(library.path.parent / "libcudart.so.12"), ctypes.RTLD_GLOBAL)]


@pytest.mark.parametrize(
    "fails, match",
    [
        (
            "libcudart.so.11.0: cannot open shared object file: No such file or directory",
            "libcudart.so.11 is not here. It was built for CUDA 11, and PyTorch .* put libcudart.so.11 beside it, or "
            "unset",
        ),
        ("libtorch_cuda.so: cannot open shared object file: No such file or directory", "libtorch_cuda.so is not here"),
        ("/x/fa3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi", "built for another PyTorch than .*undefined symbol"),
        ("/x/fa3.so: file too short", "file too short. Use another build"),
    ],
)
def test_a_library_that_can_not_be_loaded_is_an_error_that_says_why(small, library, package, fails, match):
    package()
    library.fails = fails
    with pytest.raises(BackendError, match=f"{local.VARIABLE}=.*fa3.so can't be loaded: .*{match}"):
        found(small)


def test_a_library_that_is_none(small, library, package):
    library.registers = False
    with pytest.raises(BackendError, match="does not register torch.ops.flash_attn_3.fwd and .bwd"):
        found(small)
    library.path.unlink()
    with pytest.raises(BackendError, match=f"{local.VARIABLE}=.*can't be read .No such file.*or unset it"):
        found(small)


def test_two_that_register_the_same_operators_are_not_loaded_into_one_process(small, library):
    with registered("flash_attn_3"):
        with pytest.raises(BackendError, match="another Flash Attention 3 is loaded in the same process"):
            found(small)
        with pytest.raises(flash3.Unavailable, match="another Flash Attention 3 is loaded"):
            local.from_interface()


def test_a_library_is_read_once(process, library, monkeypatch):
    assert local.of_library(library.path) == library.name
    monkeypatch.setattr(local, "sha256", None)
    assert local.of_library(library.path) == library.name


# --- With a profile ---


def test_a_profile_names_the_provider_that_is_loaded_and_nothing_is_compared(small, kernels, package, monkeypatch):
    kernels.builds[SHA] = kernels.builds[hub.TRUSTED[REPOSITORY]] = 1.0
    package()
    monkeypatch.setattr(benches, "wrong_attention", None)
    for wanted in (f"kernels {REPOSITORY}@{SHA}", "flash_attn_interface"):
        assert found(small, calibrated=with_profile(wanted)) == (wanted, [])
    assert kernels.asked == [(REPOSITORY, SHA, True)]


@pytest.mark.parametrize(
    "wanted, why",
    [
        (f"kernels {REPOSITORY}@{SHA}", "not on disk"),
        (f"kernels somebody/flash-attn3@{SHA}", "not a commit of"),
        ("library sha256:0123456789ab", "AUTORESEARCH_FA3_LIBRARY is not set"),
        ("flash_attn_interface 9.9.9", "here is flash_attn_interface"),
        ("pytorch 1.0", "here is pytorch"),
        ("magic", "it is not here"),
    ],
)
def test_where_that_provider_is_gone_one_line_says_so(small, kernels, package, wanted, why):
    package()
    provider, notes = found(small, calibrated=with_profile(wanted))
    assert provider is None and len(notes) == 1 and runtime.added_attention == {}
    assert why in notes[0] and "continuing without" in notes[0] and "python -m calibration" in notes[0]


def test_a_library_that_is_named_and_not_used_is_not_read(small, package, monkeypatch, tmp_path):
    package()
    monkeypatch.setenv(local.VARIABLE, str(tmp_path / "gone.so"))
    provider, notes = found(small, calibrated=with_profile("flash_attn_interface"))
    assert provider == "flash_attn_interface" and len(notes) == 1 and "is ignored" in notes[0]


def test_gradients_that_are_no_numbers_are_wrong(small, package, monkeypatch):
    package()
    monkeypatch.setattr(flash3, "_kernels", None)
    healthy = flash3.from_ops

    def poisoned(ops):
        kernels = healthy(ops)
        return flash3.Kernels(kernels.forward, lambda *a: [x * float("nan") for x in kernels.backward(*a)])

    monkeypatch.setattr(flash3, "from_ops", poisoned)
    assert "flash_attn_interface: wrong: relative error nan" in found(small)[1][0]


def test_another_library_than_the_profile_has(small, library):
    assert f"here is {library.name}" in found(small, calibrated=with_profile("library sha256:0123456789ab"))[1][0]


def test_a_library_that_the_profile_does_not_know_is_left_alone_and_said(small, library):
    provider, notes = found(small, calibrated=with_profile(None))
    assert provider is None and len(notes) == 1 and "is ignored" in notes[0]


# --- The backend ---


@pytest.fixture
def on_hopper(process, monkeypatch):
    """As if the CPU were one."""
    monkeypatch.setattr(cuda, "_capability", lambda backend: cuda.HOPPER)
    monkeypatch.setattr(benches.Bench, "attention_shape", (64, 2, 32))
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
    for name in ("device", "dtype", "compiled", "attention", "uncompiled_attention", "logits_at_once"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))


def test_the_backend_takes_what_the_profile_says(on_hopper, package, isolated_home):
    package()
    backend = backends.load(
        "cuda", compiled=False, calibrated=with_profile("flash_attn_interface", full="fa3", window="sdpa_mask")
    )
    assert backend.name == "cuda" and backend.device.attention_provider == "flash_attn_interface"
    assert runtime.attention == runtime.uncompiled_attention == {"full": "fa3", "window": "sdpa_mask"}
    check(ops.attention, None)
    assert backends.load("sdpa", "float32", False).bench.attentions == tuple(attention.IMPLEMENTATIONS)
    assert runtime.added_attention == {}


def test_without_the_profiles_provider_it_takes_what_sdpa_would(on_hopper, isolated_home):
    backend = backends.load("cuda", compiled=False, calibrated=with_profile("flash_attn_interface"))
    assert backend.device.attention_provider is None and backend.device.profile == "abc"
    assert sum("Flash Attention 3" in note for note in backend.device.notes) == 1
    assert set(runtime.attention.values()) <= set(attention.IMPLEMENTATIONS)
    kept = (isolated_home / "trials.json").read_text()
    backends.load("sdpa", "bfloat16", False)
    known = json.loads((isolated_home / "trials.json").read_text())
    assert [key for key in known if key.endswith("attention seconds")] == [
        key for key in json.loads(kept) if key.endswith("attention seconds")
    ]  # sdpa's own trial


def test_without_a_profile_it_is_tried_beside_the_others(on_hopper, package, isolated_home, monkeypatch):
    package()
    choose = benches.choose_attention
    monkeypatch.setattr(
        benches,
        "choose_attention",
        lambda tried, memory, compiled=True: choose(
            {kind: {"fa3": by_name["fa3"]} for kind, by_name in tried.items()}, memory, compiled
        ),
    )
    backend = backends.load("cuda", "bfloat16", compiled=False)
    assert backend.device.attention_provider == backend.bench.attention_provider == "flash_attn_interface"
    assert backend.bench.attentions[0] == "fa3" and runtime.attention == {"full": "fa3", "window": "fa3"}
    (trial,) = (key for key in json.loads((isolated_home / "trials.json").read_text()) if "attention seconds" in key)
    assert "flash_attn_interface" in trial  # another provider is tried anew


class Gpu:
    """An NVIDIA GPU of some compute capability, as far as PyTorch tells of it."""

    def __init__(self, monkeypatch, capability, version="13.0"):
        monkeypatch.setattr(device, "pick", lambda: torch.device("cuda"))
        monkeypatch.setattr(device, "identify", lambda _: ("NVIDIA Something", "nvidia-something-24gb", 24 * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr("platform.system", lambda: "Linux")


def test_hopper_is_chosen_unasked_and_nothing_else(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_DEVICE", raising=False)
    assert (Gpu(monkeypatch, (9, 0)), backends.best())[1] == "cuda"
    assert (Gpu(monkeypatch, (8, 6)), backends.best())[1] == "sdpa"
    assert (Gpu(monkeypatch, (12, 0)), backends.best())[1] == "sdpa"
    assert (Gpu(monkeypatch, (9, 0), version=None), backends.best())[1] == "sdpa"  # an MI300


@pytest.mark.parametrize("wanted", ["cpu", "mps"])
def test_a_hopper_that_is_not_to_be_used(monkeypatch, wanted):
    Gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(device, "pick", lambda: torch.device(wanted))
    assert backends.best() == "sdpa"


def test_asked_for_on_another_gpu_it_says_what_to_do(monkeypatch):
    Gpu(monkeypatch, (8, 6))
    for ask in (backends.load, backends.identify):
        with pytest.raises(
            BackendError,
            match="needs a Hopper GPU .compute capability 9.0.; this is NVIDIA Something: "
            "set AUTORESEARCH_BACKEND=sdpa, or unset it",
        ):
            ask("cuda")


@pytest.mark.parametrize("name", ["cuda", None])
def test_a_driver_too_old_is_said_with_what_to_do(monkeypatch, name):
    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
            "driver by downloading and installing a new version from the URL: ..."
        )

    monkeypatch.delenv("AUTORESEARCH_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(device, "nvidia_gpu", lambda: "NVIDIA H100")
    wanted = "built for CUDA 13.0, it says: The NVIDIA driver on your system is too old .found version 12020.*"
    with pytest.raises(
        BackendError, match=f"has a GPU .NVIDIA H100., but PyTorch .* cannot use it .{wanted}update the"
    ):
        backends.load(name)
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cuda")
    with pytest.raises(BackendError, match=f"has here only cpu .{wanted}"):
        backends.load(name)


# --- On a Hopper GPU ---


@hopper
@pytest.mark.skipif(not os.environ.get(local.VARIABLE), reason=f"needs {local.VARIABLE}")
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_real_library(window, kv_heads, compiled):
    flash3.use(local.from_library(local.Path(os.environ[local.VARIABLE])))
    function = torch.compile(flash3.flash3, fullgraph=True, dynamic=False) if compiled else flash3.flash3
    check(function, window, heads=4, kv_heads=kv_heads, length=2048, dim=128, where="cuda")


@hopper
@pytest.mark.skipif(not os.environ.get(local.VARIABLE), reason=f"needs {local.VARIABLE}")
def test_a_real_library_is_found(isolated_home):
    backend = backends.load("cuda", "bfloat16", compiled=False)
    assert backend.bench.attention_provider.startswith("library sha256:")
