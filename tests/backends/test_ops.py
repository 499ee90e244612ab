"""Every op's shape, dtype and values, against numpy in float64 under the same name; gradients by finite differences."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from backends.interface import OPS
from tests.backends import support
from tests.backends.reference import Reference, numerical_gradients


def normals(seed: int):
    """normal(*shape): float32 draws from one generator."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


@pytest.fixture
def normal():
    """The same draws in every test, whichever others run."""
    return normals(1)


def inputs(normal) -> SimpleNamespace:
    return SimpleNamespace(
        x=normal(3, 4, 5),
        y=normal(3, 4, 5),
        row=normal(5),
        one=normal(3, 1, 5),
        square=normal(2, 5, 5),
        positive=np.abs(normal(3, 4, 5)) + 0.1,
        rounded=np.round(normal(3, 4, 5)),
        other=np.round(normal(3, 4, 5)),
        yes=normal(3, 4, 5) > 0,
        no=normal(3, 4, 5) > 0,
        index=np.array([2, 0, 2]),
        q=normal(2, 7, 4, 8),
        k=normal(2, 7, 2, 8),
        v=normal(2, 7, 2, 8),
        hidden=normal(2, 7, 8),
        weight=3 * normal(11, 8),
        targets=np.random.default_rng(0).integers(0, 11, (2, 7)),
    )


INPUTS = inputs(normals(0))

# One row for each way of calling an op: the same expression is evaluated with the backend's ops and with numpy.
ROWS = [
    ("abs", lambda o, a: o.abs(a.x)),
    ("add", lambda o, a: o.add(a.x, a.row)),
    ("arange", lambda o, a: o.arange(7)),
    ("arange", lambda o, a: o.arange(2, 11, 3)),
    ("astype", lambda o, a: o.astype(a.index, a.x.dtype)),
    ("astype", lambda o, a: o.astype(a.yes, a.x.dtype)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, None)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, window=3)),
    ("broadcast_to", lambda o, a: o.broadcast_to(a.one, (3, 4, 5))),
    ("clip", lambda o, a: o.clip(a.x, -0.5, 0.25)),
    ("clip", lambda o, a: o.clip(a.x, min=0.0)),
    ("compute", lambda o, a: o.compute(a.x)),
    ("concat", lambda o, a: o.concat([a.x, a.one], axis=1)),
    ("concat", lambda o, a: o.concat([a.x, a.y])),
    ("cos", lambda o, a: o.cos(a.x)),
    ("cumulative_sum", lambda o, a: o.cumulative_sum(a.x, axis=1)),
    ("divide", lambda o, a: o.divide(a.x, a.positive)),
    ("equal", lambda o, a: o.equal(a.rounded, a.other)),
    ("exp", lambda o, a: o.exp(a.x)),
    ("expand_dims", lambda o, a: o.expand_dims(a.x, axis=1)),
    ("expand_dims", lambda o, a: o.expand_dims(a.x, -1)),
    ("float32", lambda o, a: o.float32(a.x)),
    ("full", lambda o, a: o.full((2, 3), 1.5)),
    ("full", lambda o, a: o.full((2, 3), 2)),
    ("gelu", lambda o, a: o.gelu(a.x)),
    ("greater", lambda o, a: o.greater(a.rounded, a.other)),
    ("greater", lambda o, a: o.greater(a.rounded, 0.0)),
    ("greater_equal", lambda o, a: o.greater_equal(a.rounded, a.other)),
    ("less", lambda o, a: o.less(a.rounded, a.other)),
    ("less_equal", lambda o, a: o.less_equal(a.rounded, a.other)),
    ("log", lambda o, a: o.log(a.positive)),
    ("logical_and", lambda o, a: o.logical_and(a.yes, a.no)),
    ("logical_not", lambda o, a: o.logical_not(a.yes)),
    ("logical_or", lambda o, a: o.logical_or(a.yes, a.no)),
    ("matmul", lambda o, a: o.matmul(a.x, a.square[0])),
    ("matmul", lambda o, a: o.matmul(a.square, a.square)),
    ("matrix_transpose", lambda o, a: o.matrix_transpose(a.x)),
    ("max", lambda o, a: o.max(a.x)),
    ("max", lambda o, a: o.max(a.x, axis=1)),
    ("max", lambda o, a: o.max(a.x, axis=(0, 2), keepdims=True)),
    ("maximum", lambda o, a: o.maximum(a.x, a.y)),
    ("maximum", lambda o, a: o.maximum(a.x, a.row)),
    ("maximum", lambda o, a: o.maximum(a.x, 0.5)),
    ("mean", lambda o, a: o.mean(a.x)),
    ("mean", lambda o, a: o.mean(a.x, axis=-1, keepdims=True)),
    ("mean", lambda o, a: o.mean(a.x, axis=(1, 2))),
    ("min", lambda o, a: o.min(a.x)),
    ("min", lambda o, a: o.min(a.x, axis=-1, keepdims=True)),
    ("minimum", lambda o, a: o.minimum(a.x, a.y)),
    ("minimum", lambda o, a: o.minimum(a.x, 0.5)),
    ("multiply", lambda o, a: o.multiply(a.x, a.one)),
    ("negative", lambda o, a: o.negative(a.x)),
    ("ones", lambda o, a: o.ones((2, 3))),
    ("ones_like", lambda o, a: o.ones_like(a.x)),
    ("permute_dims", lambda o, a: o.permute_dims(a.x, (2, 0, 1))),
    ("pow", lambda o, a: o.pow(a.positive, a.y)),
    ("pow", lambda o, a: o.pow(a.x, 3)),
    ("relu", lambda o, a: o.relu(a.x)),
    ("reshape", lambda o, a: o.reshape(a.x, (4, -1))),
    ("rms_norm", lambda o, a: o.rms_norm(a.x)),
    ("rms_norm", lambda o, a: o.rms_norm(a.x * 1e-4)),  # here the epsilon counts
    ("rope", lambda o, a: o.rope(a.q, 10000.0)),
    ("rope", lambda o, a: o.rope(a.q, base=50.0)),
    ("rsqrt", lambda o, a: o.rsqrt(a.positive)),
    ("sigmoid", lambda o, a: o.sigmoid(a.x)),
    ("sign", lambda o, a: o.sign(a.rounded)),
    ("silu", lambda o, a: o.silu(a.x)),
    ("sin", lambda o, a: o.sin(a.x)),
    ("softmax", lambda o, a: o.softmax(a.x, axis=-1)),
    ("softmax", lambda o, a: o.softmax(a.x, axis=1)),
    ("sqrt", lambda o, a: o.sqrt(a.positive)),
    ("square", lambda o, a: o.square(a.x)),
    ("squeeze", lambda o, a: o.squeeze(a.one, axis=1)),
    ("stack", lambda o, a: o.stack([a.x, a.y], axis=1)),
    ("stack", lambda o, a: o.stack([a.x, a.y])),
    ("std", lambda o, a: o.std(a.x, axis=-1)),
    ("std", lambda o, a: o.std(a.x)),
    ("stop_gradient", lambda o, a: o.stop_gradient(a.x)),
    ("subtract", lambda o, a: o.subtract(a.x, a.row)),
    ("sum", lambda o, a: o.sum(a.x)),
    ("sum", lambda o, a: o.sum(a.x, axis=1, keepdims=True)),
    ("sum", lambda o, a: o.sum(a.x, axis=(-1, -2))),
    ("take", lambda o, a: o.take(a.x, a.index, axis=1)),
    ("tan", lambda o, a: o.tan(a.x)),
    ("tanh", lambda o, a: o.tanh(a.x)),
    ("tril", lambda o, a: o.tril(a.square)),
    ("tril", lambda o, a: o.tril(a.square, k=-1)),
    ("triu", lambda o, a: o.triu(a.square)),
    ("triu", lambda o, a: o.triu(a.square, k=1)),
    ("var", lambda o, a: o.var(a.x, axis=1, keepdims=True)),
    ("var", lambda o, a: o.var(a.x, axis=(0, 1))),
    ("where", lambda o, a: o.where(a.yes, a.x, a.y)),
    ("where", lambda o, a: o.where(a.yes, a.x, 0.0)),
    ("zeros", lambda o, a: o.zeros((2, 3))),
    ("zeros", lambda o, a: o.zeros(())),
    ("zeros_like", lambda o, a: o.zeros_like(a.x)),
    # What arrays themselves offer.
    ("operators", lambda o, a: (-a.x + 2 * a.y - 1) / a.positive**2),
    ("operators", lambda o, a: a.x @ a.square[0] + a.row),
    ("operators", lambda o, a: (a.rounded > a.other) & (a.rounded != 0) | ~(a.other >= 1)),
    ("slicing", lambda o, a: a.x[1, :, 2:4]),
    ("slicing", lambda o, a: a.x[..., None, -1]),
    ("slicing", lambda o, a: a.x[:, ::2, :-1]),
    ("reshape", lambda o, a: a.x.reshape(3, -1)),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(ROWS)]


def test_every_op_has_a_row():
    assert {name for name, _ in ROWS} - {"operators", "slicing"} == set(OPS)


def test_offers_every_op(backend):
    assert [name for name in OPS if not callable(getattr(backend.ops, name, None))] == []


@pytest.mark.parametrize("name, expression", ROWS, ids=IDS)
def test_op(backend, name, expression):
    arrays = SimpleNamespace(**{key: support.array(backend, value) for key, value in vars(INPUTS).items()})
    exact = SimpleNamespace(
        **{key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in vars(INPUTS).items()}
    )
    found, wanted = expression(backend.ops, arrays), np.asarray(expression(Reference(), exact))
    assert tuple(found.shape) == wanted.shape
    assert support.kind(found).startswith({"f": "float32", "b": "bool", "i": "int"}[wanted.dtype.kind])
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=2e-5, atol=2e-6)


def half(low, precision):
    """A backend in half precision, its arrays' inputs as they are once rounded, and a tolerance."""
    backend = low(precision)
    return backend, {"bfloat16": 2e-2, "float16": 3e-3}[precision]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "softmax", "gelu", "silu", "sigmoid", "tanh"])
def test_half_precision_is_kept_and_right(low, precision, name):
    backend, tolerance = half(low, precision)
    q, k, v = (support.array(backend, value) for value in (INPUTS.q, INPUTS.k, INPUTS.v))
    arguments = {"attention": (q, k, v, 3), "rope": (q, 10000.0), "softmax": (q, -1)}.get(name, (q,))
    found = getattr(backend.ops, name)(*arguments)
    assert support.kind(found) == precision
    exact = [a if isinstance(a, (int, float)) else support.numpy(backend, a).astype(np.float64) for a in arguments]
    np.testing.assert_allclose(
        support.numpy(backend, found), getattr(Reference(), name)(*exact), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rms_norm_accumulates_in_float32(low, normal, precision):
    backend, tolerance = half(low, precision)
    x = support.array(backend, 300 * normal(2, 512))  # squares overflow float16, and their sum drowns in bfloat16
    found = support.numpy(backend, backend.ops.rms_norm(x))
    np.testing.assert_allclose(
        found, Reference().rms_norm(support.numpy(backend, x).astype(np.float64)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rope_keeps_far_positions(low, normal, precision):
    backend, tolerance = half(low, precision)
    x = support.array(backend, normal(1, 1500, 1, 4))
    np.testing.assert_allclose(
        support.numpy(backend, backend.ops.rope(x, 10000.0)),
        Reference().rope(support.numpy(backend, x).astype(np.float64), 10000.0),
        rtol=tolerance,
        atol=2 * tolerance,
    )


@pytest.mark.parametrize("length", [1, 37, 130])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 0, 1, "half", "long"])
def test_attention(backend, length, kv_heads, window):
    window = {"half": length // 2, "long": 3 * length}.get(window, window)
    draw = np.random.default_rng(length).standard_normal
    q, k, v = (draw((2, length, heads, 8), dtype=np.float32) for heads in (4, kv_heads, kv_heads))
    found = backend.ops.attention(*(support.array(backend, x) for x in (q, k, v)), window)
    wanted = Reference().attention(*(x.astype(np.float64) for x in (q, k, v)), window)
    assert tuple(found.shape) == (2, length, 4, 8)
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=2e-5, atol=5e-6)


def test_rope_sign(backend):
    x = np.zeros((1, 2, 1, 2), np.float32)
    x[..., 0] = 1  # at position 1 and frequency 1 the first half keeps cos(1), the second gets -sin(1)
    found = support.numpy(backend, backend.ops.rope(support.array(backend, x), 10000.0))
    np.testing.assert_allclose(found[0, :, 0], [[1, 0], [np.cos(1), -np.sin(1)]], atol=1e-6)


def check_gradients(backend, function, rtol=2e-4, **values):
    """A backend's gradients of function(ops, **arrays), against finite differences of the float64 reference."""
    loss, found = support.gradients(backend, lambda **arrays: function(backend.ops, **arrays), **values)
    wanted = numerical_gradients(lambda **arrays: function(Reference(), **arrays), **values)
    exact = function(Reference(), **{name: value.astype(np.float64) for name, value in values.items()})
    assert loss == pytest.approx(exact, rel=1e-5, abs=1e-5)
    for name in values:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=rtol * np.abs(wanted[name]).max() + 1e-6)


@pytest.mark.parametrize("heads, kv_heads", [(3, 2), (2, 0), (1, 2)])
def test_attention_refuses_heads_that_do_not_divide(backend, normal, heads, kv_heads):
    q, k = support.array(backend, normal(1, 4, heads, 8)), support.array(backend, normal(1, 4, 2, 8))
    k = k[:, :, :kv_heads]
    with pytest.raises(ValueError, match=f"{heads} query heads and {kv_heads} key and value heads"):
        backend.ops.attention(q, k, k, None)


@pytest.mark.parametrize("window", [None, 0, 2, 9])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention_gradient(backend, normal, window, kv_heads):
    q, k, v, w = (normal(1, 6, heads, 4) for heads in (2, kv_heads, kv_heads, 2))
    check_gradients(backend, lambda o, q, k, v, w: o.sum(o.attention(q, k, v, window) * w), q=q, k=k, v=v, w=w)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 0, 31, 65])
def test_attention_gradient_over_blocks(backend, window, kv_heads):
    """130 positions are more than one block, and no multiple of any; here along a few random directions."""
    draw = np.random.default_rng(5).standard_normal
    shapes = dict(q=(1, 130, 4, 8), k=(1, 130, kv_heads, 8), v=(1, 130, kv_heads, 8))
    values = {name: draw(shape) for name, shape in shapes.items()}
    w = draw(shapes["q"])

    def exact(**arrays):
        return float((Reference().attention(**arrays, window=window) * w).sum())

    _, found = support.gradients(
        backend, lambda q, k, v, w: backend.ops.sum(backend.ops.attention(q, k, v, window) * w), **values, w=w
    )
    for name, shape in shapes.items():
        direction, step = draw(shape), 1e-5
        above, below = ({**values, name: values[name] + sign * step * direction} for sign in (1, -1))
        slope = (exact(**above) - exact(**below)) / (2 * step)
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-2)


def test_rms_norm_gradient(backend, normal):
    check_gradients(backend, lambda o, x, w: o.sum(o.rms_norm(x) * w), x=normal(3, 5), w=normal(3, 5))


def test_rope_gradient(backend, normal):
    check_gradients(backend, lambda o, x, w: o.sum(o.rope(x, 10000.0) * w), x=normal(1, 4, 2, 6), w=normal(1, 4, 2, 6))
