"""What a backend recognises of train.py, and that a loss over chunks is the loss of the whole."""

from __future__ import annotations

import ast
import linecache
import re
import sys
from types import ModuleType

import numpy as np
import pytest

import backends
from backends import fusable, fusion
from tests.backends import support, tiny
from tests.backends.reference import Reference, token_losses

# Of each definition, under every Python version that the tests run under.
DIGESTS = {
    "projection": "8cd1dde829c37f7d",
    "mlp": "1d241c0395095c27",
    "head": "b495b9f6ca0cf5da",
    "unbounded_head": "c0a6c1a346bd830e",
    "cross_entropy": "d885925bcfb200a8",
}

FILE = '''
import math
from math import sqrt

POWER, SCALE = 2, 0.5


def helper(x, factor=3):
    return ops.relu(x) * factor * SCALE


class MLP:
    def forward(self, x, bias=1.0):
        """Of x."""
        y = helper(self.inner(x))  # a comment
        return self.outer(y ** POWER + bias) / sqrt(math.pi)
'''


def loaded(source: str, **variables) -> ModuleType:
    """A module of this source, which can be read back."""
    module, filename = ModuleType("edited"), f"<edited {hash(source)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    vars(module).update(variables)
    exec(compile(source, filename, "exec", dont_inherit=True), vars(module))
    return module


def digest(source: str) -> str:
    ops = object()
    return fusion.read(loaded(source, ops=ops).MLP.forward, ops).digest


def swapped(old: str, new: str) -> str:
    assert old in FILE
    return FILE.replace(old, new)


def test_digests_are_the_same_under_every_python():
    assert {name: digest for digest, name in fusable.names().items()} == DIGESTS


@pytest.mark.parametrize(
    "old, new",
    [
        ("  # a comment", ""),
        ('"""Of x."""', '"""Of all that came before."""'),
        ("def forward(self, x, bias=1.0)", "def forward(self, x, bias: float = 1.0) -> float"),
        ("self.outer(y ** POWER + bias)", "self.outer(\n            y**POWER + (bias)\n        )"),
        ("POWER, SCALE = 2, 0.5", "POWER, SCALE = 3, 0.25"),  # slots: a kernel gets their values
        ("self.inner", "self.first"),
    ],
)
def test_what_does_not_count(old, new):
    assert digest(swapped(old, new)) == digest(FILE)


def test_names_do_not_count():
    renamed = FILE
    for old, new in dict(helper="activated", factor="by", POWER="EXPONENT", x="value", y="z", self="mlp").items():
        renamed = re.sub(rf"\b{old}\b", new, renamed)
    assert "mlp.outer(z ** EXPONENT" in renamed and digest(renamed) == digest(FILE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("ops.relu(x)", "ops.gelu(x)"),  # in a helper
        ("return ops.relu(x)", "x = x + 1\n    return ops.relu(x)"),
        ("factor=3", "factor=4"),  # a helper's default argument
        ("bias=1.0", "bias=2.0"),
        ("bias=1.0", "bias=1"),
        ("* SCALE", "* POWER"),  # another constant
        ("* SCALE", "* 0.5"),
        ("y ** POWER", "y ** 2"),
        ("y ** POWER", "y * POWER"),
        ("self.outer(y", "self.inner(y"),  # the same layer twice
        ("math.pi", "math.e"),
        ("import sqrt", "import log as sqrt"),
        ("+ bias", "- bias"),
    ],
)
def test_what_computes_something_else_is_something_else(old, new):
    assert digest(swapped(old, new)) != digest(FILE)


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("y = helper(self.inner(x))", "import random; y = helper(self.inner(x))", "contains Import"),
        ("y = helper(self.inner(x))", "self.kept = x; y = helper(self.inner(x))", r"uses self\.kept"),
        ("y = helper(self.inner(x))", "y = sum(helper for helper in [x])", "'helper' has two meanings"),
        ("return ops.relu(x) * factor * SCALE", "return helper(x)", "helper calls itself"),
        ("POWER, SCALE = 2, 0.5", "POWER, SCALE = [2], 0.5", "what 'POWER' is can't be told"),
        ("* SCALE", "* MISSING", "'MISSING' is not there yet"),
        ("bias=1.0)", "*rest, bias=1.0)", "more than plain arguments"),
        ("y = helper(self.inner(x))", "self = self.inner; y = helper(self(x))", "assigns to 'self'"),
        ("y = helper(self.inner(x))", "y = (lambda self: self.inner)(x)", "assigns to 'self'"),
    ],
)
def test_what_can_not_be_read_says_why(old, new, why):
    with pytest.raises(fusion.Unreadable, match=why):
        digest(swapped(old, new))


def test_a_file_that_changed_since_is_not_taken_for_what_runs():
    module = loaded(FILE, ops=ast)
    filename = module.MLP.forward.__code__.co_filename
    edited = swapped("y ** POWER", "y * POWER")
    linecache.cache[filename] = len(edited), None, edited.splitlines(keepends=True), filename
    with pytest.raises(fusion.Unreadable, match="source of forward is not at hand"):
        fusion.read(module.MLP.forward, ast)


# ---- What runs ----

MODEL = """
HEAD_DIM, ROPE_BASE, POWER = 4, 10.0, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head, self.n_kv_head = 4, 2
        self.c_q, self.c_k, self.c_v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    @ops.fusable
    def qkv(self, x):
        B, T, _ = x.shape
        q = self.c_q(x).reshape(B, T, self.n_head, HEAD_DIM)
        k = self.c_k(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        v = self.c_v(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        return ops.rms_norm(ops.rope(q, ROPE_BASE)), ops.rms_norm(ops.rope(k, ROPE_BASE)), v


def activation(x):
    return ops.square(ops.relu(x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(8, 16), nn.Linear(16, 8)

    @ops.fusable
    def forward(self, x):
        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))

    @ops.fusable
    def through_a_helper(self, x):
        return self.c_proj(activation(self.c_fc(x)))
"""


def with_weights(backend, model):
    """`model`, its weights drawn, and these."""
    draw = np.random.default_rng(0).standard_normal
    weights = {name: draw(shape, np.float32) for name, shape in backend.shapes(model).items()}
    backend.set_weights(model, weights)
    return model, weights


def test_the_definitions_are_what_they_are_named(backend):
    """Marked functions that read as they do, against numpy in float64."""
    module, exact = loaded(MODEL, nn=backend.nn, ops=backend.ops), Reference()
    draw = np.random.default_rng(1).standard_normal
    model, weights = with_weights(backend, module.MLP())
    x = draw((2, 3, 8), np.float32)
    found = support.numpy(backend, model(support.array(backend, x)))
    wanted = np.maximum(x.astype(np.float64) @ weights["c_fc.weight"].T, 0) ** 2 @ weights["c_proj.weight"].T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert fusion.of(model.forward).name == "mlp"

    model, weights = with_weights(backend, module.Attention())
    x = draw((2, 5, 16), np.float32)
    found = [support.numpy(backend, part) for part in model.qkv(support.array(backend, x))]
    q, k, v = (
        (x.astype(np.float64) @ weights[f"{name}.weight"].T).reshape(2, 5, -1, 4) for name in ("c_q", "c_k", "c_v")
    )
    for here, right in zip(found, (exact.rms_norm(exact.rope(q, 10.0)), exact.rms_norm(exact.rope(k, 10.0)), v)):
        np.testing.assert_allclose(here, right, rtol=1e-4, atol=1e-4)
    assert fusion.of(model.qkv).name == "projection"


def test_a_builtin_that_is_hidden_is_read_again():
    ops, source = object(), swapped("y = helper(self.inner(x))", "y = max(x, self.inner(x))")
    module = loaded(source, ops=ops)
    reading = fusion.read(module.MLP.forward, ops)
    assert reading.stands
    module.max = module.helper
    assert not reading.stands and fusion.read(module.MLP.forward, ops).digest != reading.digest


def test_a_helper_that_is_replaced_is_read_again(backend):
    module = loaded(MODEL, nn=backend.nn, ops=backend.ops)
    model, x = module.MLP(), support.array(backend, np.ones((1, 8), np.float32))
    marked = fusion.of(module.MLP.through_a_helper)
    model.through_a_helper(x)
    first = marked._reading.digest
    model.through_a_helper(x)
    assert marked._reading.digest == first
    module.activation = backend.ops.silu
    model.through_a_helper(x)
    assert marked._reading is None or marked._reading.digest != first


@pytest.fixture
def kernels(monkeypatch):
    """Kernels "in use" on a CPU: what runs in the place of a function is noted with what it was given."""
    pytest.importorskip("torch")
    from backends.pytorch import fused, runtime

    backend, calls = support.opened("sdpa", "float32"), []
    monkeypatch.setattr(runtime, "kernels", frozenset({"mlp", "projection"}))
    for name in ("squared_relu_mlp", "rotary_qkv"):
        function = getattr(fused, name)

        def noted(*arguments, function=function, name=name):
            calls.append((name, [value if isinstance(value, (int, float)) else None for value in arguments]))
            return function(*arguments)

        monkeypatch.setattr(fused, name, noted)
    return backend, calls


def run(backend, source: str, what: str):
    """A marked method's outputs, as one array, from weights and inputs that are always the same."""
    module = loaded(source, nn=backend.nn, ops=backend.ops)
    cls, _, method = what.partition(".")
    model, _ = with_weights(backend, getattr(module, cls)())
    width = 8 if cls == "MLP" else 16
    out = getattr(model, method)(support.array(backend, np.random.default_rng(1).standard_normal((1, 3, width))))
    parts = out if isinstance(out, tuple) else (out,)
    return np.concatenate([support.numpy(backend, part).ravel() for part in parts])


def test_the_unedited_functions_run_by_kernel_with_their_values(kernels, capsys):
    backend, calls = kernels
    run(backend, MODEL, "MLP.forward")
    run(backend, MODEL, "Attention.qkv")
    run(backend, MODEL.replace("10.0, 2", "50.0, 2"), "Attention.qkv")
    assert calls == [
        ("squared_relu_mlp", [None] * 3),
        ("rotary_qkv", [None] * 4 + [4, 10.0]),
        ("rotary_qkv", [None] * 4 + [4, 50.0]),
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "what, old, new",
    [
        ("MLP.forward", "ops.square(ops.relu(self.c_fc(x)))", "ops.gelu(self.c_fc(x))"),
        ("MLP.forward", "self.c_proj(ops", "self.c_proj(0.5 * ops"),
        ("MLP.through_a_helper", "return ops.square(ops.relu(x))", "return ops.relu(x)"),
        ("Attention.qkv", "ops.rms_norm(ops.rope(q, ROPE_BASE))", "ops.rope(q, ROPE_BASE)"),
        ("Attention.qkv", "v = self.c_v(x)", "v = self.c_k(x)"),
        ("Attention.qkv", "def qkv(self, x)", "def qkv(self, x, scale=2.0)"),
    ],
)
def test_an_edited_function_runs_as_it_is_written_and_says_so_once(kernels, capsys, what, old, new):
    backend, calls = kernels
    assert old in MODEL
    edited, plain = MODEL.replace(old, new), MODEL.replace(old, new).replace("@ops.fusable", "")
    found = run(backend, edited, what)
    np.testing.assert_array_equal(found, run(backend, plain, what))
    assert calls == [] and capsys.readouterr().out.count("runs as it is written") == 1


@pytest.mark.parametrize(
    "old, new",
    [  # the function's syntax stays; what it reads from its object does not
        ("nn.Linear(8, 16), nn", "Doubled(8, 16), nn"),
        ("self.n_head, self.n_kv_head = 4, 2", "self.n_head, self.n_kv_head = 4, -1"),
    ],
)
def test_a_slot_that_no_kernel_knows_runs_plain(kernels, old, new):
    backend, calls = kernels
    doubled = "class Doubled(nn.Linear):\n    def forward(self, x):\n        return 2 * super().forward(x)\n\n\n"
    assert old in MODEL
    source = doubled + MODEL.replace(old, new)
    what = "MLP.forward" if "Doubled" in new else "Attention.qkv"
    found = run(backend, source, what)
    np.testing.assert_array_equal(found, run(backend, source.replace("@ops.fusable", ""), what))
    assert calls == []


# ---- The loss over chunks ----

VOCABULARY, WIDTH, SHAPE = 13, 6, (3, 11)

HEADS = """
SOFTCAP = 3.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head, self.bias = nn.Linear(6, 13), nn.Parameter((13,))

    @ops.fusable
    def logits(self, hidden):
        return SOFTCAP * ops.tanh(ops.float32(self.lm_head(hidden)) / SOFTCAP)

    @ops.fusable
    def unbounded(self, hidden):
        return ops.float32(self.lm_head(hidden))

    @ops.fusable
    def biased(self, hidden):
        return SOFTCAP * ops.tanh(ops.float32(self.lm_head(hidden) + self.bias) / SOFTCAP)


@ops.fusable
def token_losses(logits, targets):
    right = ops.take_along_axis(logits, ops.expand_dims(targets, axis=-1), axis=-1)
    return ops.logsumexp(logits, axis=-1) - ops.squeeze(right, axis=-1)


def with_z_loss(logits, targets):
    return token_losses(logits, targets) + 0.1 * ops.square(ops.logsumexp(logits, axis=-1))


def smoothed(logits, targets):
    return 0.9 * token_losses(logits, targets) + 0.1 * (ops.logsumexp(logits, axis=-1) - ops.mean(logits, axis=-1))
"""
CASES = [
    ("logits", "token_losses"),
    ("unbounded", "token_losses"),
    ("biased", "token_losses"),
    ("logits", "with_z_loss"),
    ("unbounded", "smoothed"),
]


def exact_loss(head, loss, hidden, weight, bias, targets):
    """Mean over tokens, in float64."""
    logits = hidden @ weight.T + (bias if head == "biased" else 0)
    logits = logits if head == "unbounded" else 3 * np.tanh(logits / 3)
    losses, normaliser = token_losses(logits, targets), np.log(np.exp(logits).sum(-1))
    if loss == "with_z_loss":
        losses = losses + 0.1 * normaliser**2
    if loss == "smoothed":
        losses = 0.9 * losses + 0.1 * (normaliser - logits.mean(-1))
    return losses.mean()


def small_chunks(backend, monkeypatch):
    """Several chunks, the last one smaller: 7 tokens at a time."""
    if backend.name == "mlx":
        from backends.mlx import cross_entropy

        monkeypatch.setattr(cross_entropy, "SMALLEST_CHUNK", 7 * VOCABULARY)
        return cross_entropy.by_memory(0)
    from backends.pytorch import runtime

    monkeypatch.setattr(runtime, "logits_at_once", 7 * VOCABULARY)
    return backend.ops.mean_loss


@pytest.mark.parametrize("head, loss", CASES)
def test_mean_loss_and_its_gradients(backend, monkeypatch, head, loss):
    mean_loss, module = small_chunks(backend, monkeypatch), loaded(HEADS, nn=backend.nn, ops=backend.ops)
    draw = np.random.default_rng(0)
    targets = draw.integers(0, VOCABULARY, SHAPE)

    class Model(module.Model):
        def __init__(self):
            super().__init__()
            self.hidden = backend.nn.Parameter((*SHAPE, WIDTH))

    model, weights = with_weights(backend, Model())
    wanted, group = support.array(backend, targets), tiny.descent(weights)
    trainer = backend.Trainer(
        model, lambda m, x, y: mean_loss(getattr(m, head), getattr(module, loss), m.hidden, wanted), [group]
    )
    value = float(trainer.backward(support.TOKENS, support.TOKENS))
    found = trainer.gradients()
    exact = {name: weight.astype(np.float64) for name, weight in weights.items()}

    def at(**changed):
        values = {**exact, **changed}
        return exact_loss(head, loss, values["hidden"], values["lm_head.weight"], values["bias"], targets)

    assert value == pytest.approx(at(), rel=1e-5)
    for name in exact if head == "biased" else exact.keys() - {"bias"}:
        direction = draw.standard_normal(exact[name].shape)
        slope = (at(**{name: exact[name] + 1e-5 * direction}) - at(**{name: exact[name] - 1e-5 * direction})) / 2e-5
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", backends.NAMES)
def test_only_an_edited_head_or_loss_is_computed_as_written(monkeypatch, name):
    backend = support.opened(name, "float32")
    module, calls = loaded(HEADS, nn=backend.nn, ops=backend.ops), []
    model, _ = with_weights(backend, module.Model())
    hidden = support.array(backend, np.ones((1, 2, WIDTH), np.float32))
    targets = support.array(backend, np.ones((1, 2), np.int64))
    for head, loss in CASES:
        method, calls[:] = getattr(module.Model, head), []
        marked = fusion.of(method)
        noted = lambda *arguments, run=marked.run: calls.append(1) or run(*arguments)  # noqa: E731
        backend.ops.mean_loss(getattr(model, head), getattr(module, loss), hidden, targets)  # which reads them
        monkeypatch.setattr(marked, "run", noted)
        backend.ops.mean_loss(getattr(model, head), getattr(module, loss), hidden, targets)
        assert bool(calls) == ((head, loss) not in CASES[:2])


def test_a_constant_that_changes_reaches_a_compiled_kernel(monkeypatch):
    torch = pytest.importorskip("torch")
    backend = support.opened("sdpa", "float32")
    module = loaded(HEADS, nn=backend.nn, ops=backend.ops)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where a compiler looks for its constants
    model, _ = with_weights(backend, module.Model())
    hidden = support.array(backend, np.random.default_rng(0).standard_normal((1, 5, WIDTH)))
    targets = support.array(backend, np.ones((1, 5), np.int64))

    @torch.no_grad()
    def loss():
        return backend.ops.mean_loss(model.logits, module.token_losses, hidden, targets)

    compiled, bounded = torch.compile(loss, backend="eager", fullgraph=True), loss()
    assert compiled() == bounded and fusion.of(model.logits).name == "head"
    module.SOFTCAP = 1.0
    assert compiled() == loss() != bounded
    torch.compiler.reset()


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_loss_that_is_no_number_for_each_token_is_refused(name):
    backend = support.opened(name, "float32")
    module = loaded(HEADS, nn=backend.nn, ops=backend.ops)
    model, _ = with_weights(backend, module.Model())
    hidden = support.array(backend, np.ones((1, 2, WIDTH), np.float32))
    targets = support.array(backend, np.ones((1, 2), np.int64))
    total = lambda logits, targets: backend.ops.sum(logits)  # noqa: E731
    with pytest.raises(ValueError, match=r"has shape \(\): give one number for each token"):
        backend.ops.mean_loss(model.logits, total, hidden, targets)


def test_an_array_that_a_head_takes_from_elsewhere_is_refused():
    """MLX would make no gradient for it, and say nothing."""
    backend = support.opened("mlx", "float32")
    module = loaded(HEADS, nn=backend.nn, ops=backend.ops)
    model, _ = with_weights(backend, module.Model())
    hidden = support.array(backend, np.ones((1, 2, WIDTH), np.float32))
    targets = support.array(backend, np.ones((1, 2), np.int64))
    model.kept = hidden
    with pytest.raises(ValueError, match="kept is an array from outside the head and its loss"):
        backend.ops.mean_loss(model.biased, module.token_losses, hidden, targets)
    del model.kept
    scaled = lambda logits, targets: module.token_losses(logits, targets) * hidden[0, :, 0]  # noqa: E731
    with pytest.raises(ValueError, match="hidden is an array"):
        backend.ops.mean_loss(model.logits, scaled, hidden, targets)


def test_the_gradient_of_a_mean_does_not_underflow_in_float16(low):
    """The mean over 4096 tokens: each logit's gradient is about 1e-6, below what float16 holds, unless scaled."""
    backend = low("float16")
    module = loaded(HEADS.replace("6, 13", "16, 97").replace("(13,)", "(97,)"), nn=backend.nn, ops=backend.ops)
    draw = np.random.default_rng(4)
    hidden, weight = (
        draw.standard_normal(shape, np.float32).astype(np.float16).astype(np.float32)
        for shape in ((4, 1024, 16), (97, 16))
    )
    targets = draw.integers(0, 97, (4, 1024))

    class Model(module.Model):
        def __init__(self):
            super().__init__()
            self.hidden = backend.nn.Parameter(hidden.shape)

    model, wanted = Model(), support.array(backend, targets)
    backend.set_weights(model, {"lm_head.weight": weight, "bias": np.zeros(97, np.float32), "hidden": hidden})
    for head in ("logits", "biased"):
        trainer = backend.Trainer(
            model,
            lambda m, x, y: backend.ops.mean_loss(getattr(m, head), module.token_losses, m.hidden, wanted),
            [tiny.descent(backend.shapes(model))],
        )
        trainer.backward(support.TOKENS, support.TOKENS)
        found = trainer.gradients()
        rows = hidden.reshape(-1, 16).astype(np.float64)
        capped = 3 * np.tanh(rows @ weight.T / 3)
        errors = Reference().softmax(capped, axis=-1)
        errors[np.arange(len(errors)), targets.reshape(-1)] -= 1
        errors *= (1 - (capped / 3) ** 2) / len(errors)
        exact = {"hidden": (errors @ weight).reshape(hidden.shape), "lm_head.weight": errors.T @ rows}
        for name, gradient in exact.items():
            error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
            assert error < 5e-3, f"{head} {name}: {error:.1e}"
