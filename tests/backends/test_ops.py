"""Every op's shape, dtype and values, against numpy in float64 under the same name; gradients by finite differences."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from backends.operations import OPERATIONS, OPS
from tests.backends import support, tiny
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
        several=np.array([[1, -1], [9, -3]]),
        each=np.random.default_rng(1).integers(-5, 5, (3, 4, 2)),
        q=normal(2, 5, 2, 4),
        k=normal(2, 5, 1, 4),
        v=normal(2, 5, 1, 4),
        bias=normal(2, 3),
        documents=np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 3]]),
        hidden=normal(2, 7, 8),
        weight=3 * normal(11, 8),
        targets=np.random.default_rng(0).integers(0, 11, (2, 7)),
    )


INPUTS = inputs(normals(0))


def doubled(ops):
    """A head without parameters: logits (N, 16)."""
    return lambda hidden: ops.concat([hidden, 2 * hidden], axis=-1)


def token_loss(ops):
    """Cross-entropy."""

    def loss(logits, targets):
        right = ops.take_along_axis(logits, ops.expand_dims(targets, axis=-1))
        return ops.logsumexp(logits, axis=-1) - ops.squeeze(right, axis=-1)

    return loss


def marked(x):
    """What `fusable` leaves as it is written."""
    return 2 * x + 1


# One row for each way of calling an operation: the same expression is evaluated with the backend's ops and with numpy.
ROWS = [
    ("abs", lambda o, a: o.abs(a.x)),
    ("add", lambda o, a: o.add(a.x, a.row)),
    ("add", lambda o, a: o.add(2.0, a.x)),
    ("arange", lambda o, a: o.arange(7)),
    ("arange", lambda o, a: o.arange(2, stop=11, step=3)),
    ("argmax", lambda o, a: o.argmax(a.rounded, axis=1)),  # which holds equals
    ("argmax", lambda o, a: o.argmax(a.x)),
    ("argmax", lambda o, a: o.argmax(a.x, axis=-1, keepdims=True)),
    ("asarray", lambda o, a: o.asarray(np.array([1.5, 2.5]))),
    ("asarray", lambda o, a: o.asarray([[1, 2], [3, 4]])),
    ("asarray", lambda o, a: o.asarray(np.array([True, False]))),
    ("asarray", lambda o, a: o.asarray(a.x)),
    ("astype", lambda o, a: o.astype(a.index, a.x.dtype)),
    ("astype", lambda o, a: o.astype(a.yes, a.x.dtype)),
    ("astype", lambda o, a: o.astype(a.rounded, "int32")),
    ("astype", lambda o, a: o.astype(a.rounded, "bool")),
    ("astype", lambda o, a: o.astype(a.x, "float32")),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, 2)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, window=2, scale=0.7)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, softcap=0.8)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, bias=a.bias)),
    ("attention", lambda o, a: o.attention(a.q, a.k, a.v, documents=a.documents)),
    (
        "attention",
        lambda o, a: o.attention(a.q, a.k, a.v, window=3, scale=0.5, softcap=2.0, bias=a.bias, documents=a.documents),
    ),
    ("broadcast_to", lambda o, a: o.broadcast_to(a.one, (3, 4, 5))),
    ("clip", lambda o, a: o.clip(a.x, -0.5, 0.25)),
    ("clip", lambda o, a: o.clip(a.x, min=0.0)),
    ("clip", lambda o, a: o.clip(a.x, max=0.0)),
    ("compute", lambda o, a: o.compute(a.x)),
    ("concat", lambda o, a: o.concat([a.x, a.one], axis=1)),
    ("concat", lambda o, a: o.concat((a.x, a.y))),
    ("concat", lambda o, a: o.concat([a.x, a.row], axis=None)),
    ("cos", lambda o, a: o.cos(a.x)),
    ("cumulative_prod", lambda o, a: o.cumulative_prod(a.x, axis=1)),
    ("cumulative_prod", lambda o, a: o.cumulative_prod(a.rounded, axis=-1)),  # with zeros, where x divides nothing
    ("cumulative_prod", lambda o, a: o.cumulative_prod(a.row)),
    ("cumulative_sum", lambda o, a: o.cumulative_sum(a.x, axis=1)),
    ("cumulative_sum", lambda o, a: o.cumulative_sum(a.row)),
    ("cumulative_sum", lambda o, a: o.cumulative_sum(a.yes, axis=1)),
    ("divide", lambda o, a: o.divide(a.x, a.positive)),
    ("divide", lambda o, a: o.divide(1, a.positive)),
    ("dropout", lambda o, a: o.dropout(a.x, 0.4, key=(3, 1))),
    ("einsum", lambda o, a: o.einsum("bij,bjk->bik", a.square, a.square)),
    ("einsum", lambda o, a: o.einsum("bth,hk,k->bt", a.x, a.square[0], a.row)),
    ("equal", lambda o, a: o.equal(a.rounded, a.other)),
    ("exp", lambda o, a: o.exp(a.x)),
    ("exp", lambda o, a: o.exp(a.index)),
    ("expand_dims", lambda o, a: o.expand_dims(a.x, axis=1)),
    ("expand_dims", lambda o, a: o.expand_dims(a.x, axis=-1)),
    ("expand_dims", lambda o, a: o.expand_dims(a.x, axis=(0, -1))),
    ("flip", lambda o, a: o.flip(a.x)),
    ("flip", lambda o, a: o.flip(a.x, axis=1)),
    ("flip", lambda o, a: o.flip(a.x, axis=(0, -1))),
    ("float32", lambda o, a: o.float32(a.x)),
    ("fusable", lambda o, a: o.fusable(marked)(a.x)),
    ("full", lambda o, a: o.full((2, 3), 1.5)),
    ("full", lambda o, a: o.full(shape=(2, 3), fill_value=2)),
    ("gelu", lambda o, a: o.gelu(a.x)),
    ("greater", lambda o, a: o.greater(a.rounded, a.other)),
    ("greater", lambda o, a: o.greater(0.0, a.rounded)),
    ("greater_equal", lambda o, a: o.greater_equal(a.rounded, a.other)),
    ("less", lambda o, a: o.less(a.rounded, a.other)),
    ("less_equal", lambda o, a: o.less_equal(a.rounded, a.other)),
    ("log", lambda o, a: o.log(a.positive)),
    ("logical_and", lambda o, a: o.logical_and(a.yes, a.no)),
    ("logical_not", lambda o, a: o.logical_not(a.yes)),
    ("logical_or", lambda o, a: o.logical_or(a.yes, a.no)),
    ("logsumexp", lambda o, a: o.logsumexp(a.x)),
    ("logsumexp", lambda o, a: o.logsumexp(a.x, axis=(1, 2), keepdims=True)),
    ("logsumexp", lambda o, a: o.logsumexp(a.x, axis=-1)),
    ("matmul", lambda o, a: o.matmul(a.x, a.square[0])),
    ("matmul", lambda o, a: o.matmul(a.square, a.square)),
    ("matrix_transpose", lambda o, a: o.matrix_transpose(a.x)),
    ("max", lambda o, a: o.max(a.x)),
    ("max", lambda o, a: o.max(a.x, axis=1)),
    ("max", lambda o, a: o.max(a.x, axis=(0, 2), keepdims=True)),
    ("maximum", lambda o, a: o.maximum(a.x, a.y)),
    ("maximum", lambda o, a: o.maximum(a.x, a.row)),
    ("maximum", lambda o, a: o.maximum(a.x, 0.5)),
    ("maximum", lambda o, a: o.maximum(0.0, a.x)),
    ("mean", lambda o, a: o.mean(a.x)),
    ("mean", lambda o, a: o.mean(a.x, keepdims=True)),
    ("mean", lambda o, a: o.mean(a.x, axis=-1, keepdims=True)),
    ("mean", lambda o, a: o.mean(a.x, axis=(1, 2))),
    ("mean", lambda o, a: o.mean(a.index)),
    ("mean_loss", lambda o, a: o.mean_loss(doubled(o), token_loss(o), a.hidden, a.targets)),
    ("min", lambda o, a: o.min(a.x)),
    ("min", lambda o, a: o.min(a.x, axis=-1, keepdims=True)),
    ("minimum", lambda o, a: o.minimum(a.x, a.y)),
    ("minimum", lambda o, a: o.minimum(0.5, a.x)),
    ("multiply", lambda o, a: o.multiply(a.x, a.one)),
    ("multiply", lambda o, a: o.multiply(a.row[0], a.x)),
    ("negative", lambda o, a: o.negative(a.x)),
    ("ones", lambda o, a: o.ones((2, 3))),
    ("ones_like", lambda o, a: o.ones_like(a.x)),
    ("permute_dims", lambda o, a: o.permute_dims(a.x, (2, 0, 1))),
    ("permute_dims", lambda o, a: o.permute_dims(a.x, axes=(0, -1, 1))),
    ("pow", lambda o, a: o.pow(a.positive, a.y)),
    ("pow", lambda o, a: o.pow(a.x, 3)),
    ("pow", lambda o, a: o.pow(2.0, a.x)),
    ("relu", lambda o, a: o.relu(a.x)),
    ("reshape", lambda o, a: o.reshape(a.x, (4, -1))),
    ("reshape", lambda o, a: o.reshape(a.x, shape=(60,))),
    ("rms_norm", lambda o, a: o.rms_norm(a.x)),
    ("rms_norm", lambda o, a: o.rms_norm(a.x * 1e-4)),  # here the epsilon counts
    ("roll", lambda o, a: o.roll(a.x, 2)),
    ("roll", lambda o, a: o.roll(a.x, shift=-1, axis=1)),
    ("roll", lambda o, a: o.roll(a.x, (1, 2), axis=(0, -1))),
    ("rope", lambda o, a: o.rope(a.q, 10000.0)),
    ("rope", lambda o, a: o.rope(a.q, base=50.0)),
    ("rsqrt", lambda o, a: o.rsqrt(a.positive)),
    ("sigmoid", lambda o, a: o.sigmoid(a.x)),
    ("sign", lambda o, a: o.sign(a.rounded)),
    ("silu", lambda o, a: o.silu(a.x)),
    ("sin", lambda o, a: o.sin(a.x)),
    ("softmax", lambda o, a: o.softmax(a.x)),
    ("softmax", lambda o, a: o.softmax(a.x, axis=1)),
    ("sort", lambda o, a: o.sort(a.x)),
    ("sort", lambda o, a: o.sort(a.x, axis=1, descending=True)),
    ("sqrt", lambda o, a: o.sqrt(a.positive)),
    ("square", lambda o, a: o.square(a.x)),
    ("squeeze", lambda o, a: o.squeeze(a.one, 1)),
    ("squeeze", lambda o, a: o.squeeze(a.one[:1], axis=(0, 1))),
    ("stack", lambda o, a: o.stack([a.x, a.y], axis=1)),
    ("stack", lambda o, a: o.stack((a.x, a.y))),
    ("std", lambda o, a: o.std(a.x, axis=-1)),
    ("std", lambda o, a: o.std(a.x)),
    ("std", lambda o, a: o.std(a.x, axis=(0, 2), correction=1, keepdims=True)),
    ("std", lambda o, a: o.std(a.index)),
    ("stop_gradient", lambda o, a: o.stop_gradient(a.x)),
    ("subtract", lambda o, a: o.subtract(a.x, a.row)),
    ("subtract", lambda o, a: o.subtract(1.0, a.x)),
    ("sum", lambda o, a: o.sum(a.x)),
    ("sum", lambda o, a: o.sum(a.x, axis=1, keepdims=True)),
    ("sum", lambda o, a: o.sum(a.x, axis=(-1, -2))),
    ("sum", lambda o, a: o.sum(a.yes, axis=0)),
    ("take", lambda o, a: o.take(a.x, a.index, axis=1)),
    ("take", lambda o, a: o.take(a.x, a.several, axis=1)),  # two axes, negative ones, and 9, which is out of range
    ("take", lambda o, a: o.take(a.index, a.several, axis=0)),
    ("take_along_axis", lambda o, a: o.take_along_axis(a.x, a.each)),
    ("take_along_axis", lambda o, a: o.take_along_axis(a.x, a.each - 1, axis=2)),
    ("tan", lambda o, a: o.tan(a.x)),
    ("tanh", lambda o, a: o.tanh(a.x)),
    *(("topk", lambda o, a, i=i: o.topk(a.x, 2)[i]) for i in range(2)),
    ("topk", lambda o, a: o.topk(a.rounded, 3, axis=1)[1]),  # which holds equals
    ("training", lambda o, a: o.full((), o.training())),
    ("tril", lambda o, a: o.tril(a.square)),
    ("tril", lambda o, a: o.tril(a.square, k=-1)),
    ("triu", lambda o, a: o.triu(a.square)),
    ("triu", lambda o, a: o.triu(a.square, k=1)),
    ("uniform", lambda o, a: o.uniform((3, 5), key=(7, -2))),
    ("var", lambda o, a: o.var(a.x, axis=1, keepdims=True)),
    ("var", lambda o, a: o.var(a.x, axis=(0, 1), correction=1)),
    ("where", lambda o, a: o.where(a.yes, a.x, a.y)),
    ("where", lambda o, a: o.where(a.yes, a.x, 0.0)),
    ("where", lambda o, a: o.where(a.yes, 1.0, 0.0)),
    ("zeros", lambda o, a: o.zeros((2, 3))),
    ("zeros", lambda o, a: o.zeros(())),
    ("zeros_like", lambda o, a: o.zeros_like(a.x)),
    # What arrays themselves offer.
    ("operators", lambda o, a: (-a.x + 2 * a.y - 1) / a.positive**2),
    ("operators", lambda o, a: a.x @ a.square[0] + a.row),
    ("operators", lambda o, a: (a.rounded > a.other) & (a.rounded != 0) | ~(a.other >= 1)),
    ("operators", lambda o, a: np.float64(2) * a.x + a.y / np.float32(3) - np.int64(1) * a.x),
    ("slicing", lambda o, a: a.x[1, :, 2:4]),
    ("slicing", lambda o, a: a.x[..., None, -1]),
    ("slicing", lambda o, a: a.x[:, ::2, :-1]),
    ("reshape", lambda o, a: a.x.reshape(3, -1)),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(ROWS)]


class Arrays:
    """The inputs, and which of them an expression has used."""

    def __init__(self, values: dict):
        self.values, self.used = values, []

    def __getattr__(self, name):
        self.used.append(name)
        return self.values[name]


EXACT = {key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in vars(INPUTS).items()}
REFERENCE = Reference()


@cache
def expected(index: int) -> tuple[np.ndarray, list[str]]:
    """What row `index` has to give, and the names of the floating inputs that it uses."""
    arrays = Arrays(EXACT)
    value = np.asarray(ROWS[index][1](REFERENCE, arrays))
    return value, [name for name in dict.fromkeys(arrays.used) if EXACT[name].dtype.kind == "f"]


@cache
def expected_gradients(index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weights of a sum over row `index`'s result, and the gradients of that sum by finite differences."""
    value, names = expected(index)
    weights = np.random.default_rng(2).standard_normal(value.shape)
    weights = np.where(np.isnan(value), 0, weights)

    def weighted(**values):
        result = ROWS[index][1](REFERENCE, SimpleNamespace(**EXACT | values))
        return np.sum(np.where(weights == 0, 0, result * weights))

    return weights, numerical_gradients(weighted, **{name: EXACT[name] for name in names})


def test_every_argument_of_every_operation_is_tried():
    tried = {name: set() for name in OPS}

    class Recording:
        def __getattr__(self, name):
            def record(*arguments, **keywords):
                tried[name].update(OPERATIONS[name].signature.bind(*arguments, **keywords).arguments)
                return getattr(REFERENCE, name)(*arguments, **keywords)

            return record

    for _, expression in ROWS:
        expression(Recording(), SimpleNamespace(**EXACT))
    assert {name: set(OPERATIONS[name].signature.parameters) - found for name, found in tried.items()} == {
        name: set() for name in OPS
    }


def test_the_table_says_which_operations_have_a_gradient():
    differentiated = {name for i, (name, _) in enumerate(ROWS) if expected(i)[1]} - {"operators", "slicing"}
    assert {name for name, operation in OPERATIONS.items() if operation.gradient != "-"} <= differentiated


def training(backend, function):
    """What `function` gives within a pass of a Trainer, as numpy: the first one, which has made no pass before."""
    found = []

    def loss(model, x, y):
        found.append(function())
        return backend.ops.sum(model.value)

    trainer = backend.Trainer(support.holder(backend, value=np.ones(1)), loss, [tiny.descent(["value"])])
    trainer.backward(support.TOKENS, support.TOKENS)
    return found[-1]


@pytest.fixture
def arrays(backend):
    """The inputs on each backend present."""
    return {key: support.array(backend, value) for key, value in vars(INPUTS).items()}


DRAWS = [i for i, (name, _) in enumerate(ROWS) if name in ("dropout", "training", "uniform")]


@pytest.mark.parametrize("index", range(len(ROWS)), ids=IDS)
def test_op(backend, arrays, index):
    evaluated = ROWS[index][1]
    wanted, _ = expected(index)
    if index in DRAWS:
        found = training(backend, lambda: evaluated(backend.ops, SimpleNamespace(**arrays)))
    else:
        found = evaluated(backend.ops, SimpleNamespace(**arrays))
    assert tuple(found.shape) == wanted.shape
    assert support.kind(found).startswith({"f": "float32", "b": "bool", "i": "int"}[wanted.dtype.kind])
    stated = OPERATIONS[ROWS[index][0]].dtype if ROWS[index][0] in OPERATIONS else "x"
    assert stated not in ("bool", "int", "float", "float32") or support.kind(found).startswith(stated)
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=2e-5, atol=2e-6)


def has_gradient(index: int) -> bool:
    value, names = expected(index)
    operation = OPERATIONS.get(ROWS[index][0])
    return bool(names) and value.dtype.kind == "f" and (operation is None or operation.gradient != "-")


WITH_GRADIENT = list(filter(has_gradient, range(len(ROWS))))


@pytest.mark.parametrize("index", WITH_GRADIENT, ids=[IDS[i] for i in WITH_GRADIENT])
def test_op_gradient(backend, arrays, index):
    name, expression = ROWS[index]
    names = expected(index)[1]
    weights, wanted = expected_gradients(index)
    if name in OPERATIONS and OPERATIONS[name].gradient == "zero":
        wanted = {name: np.zeros_like(gradient) for name, gradient in wanted.items()}
    on_backend = support.array(backend, weights)

    def loss(**values):
        ops, result = backend.ops, expression(backend.ops, SimpleNamespace(**arrays | values))
        # The plain sum keeps the loss dependent on each input. NaN, of an index out of range, has the weight zero.
        plain = [ops.sum(value) for value in values.values()]
        return ops.sum(ops.where(on_backend == 0, 0.0, result * on_backend)) + sum(plain)

    _, found = support.gradients(backend, loss, **{name: vars(INPUTS)[name] for name in names})
    for name in names:
        scale = np.abs(wanted[name]).max() + 1
        np.testing.assert_allclose(found[name] - 1, wanted[name], rtol=1e-4, atol=1e-5 * scale)


def half(low, precision):
    """A backend in half precision, its arrays' inputs as they are once rounded, and a tolerance."""
    backend = low(precision)
    return backend, {"bfloat16": 2e-2, "float16": 3e-3}[precision]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "softmax", "gelu", "silu", "sigmoid", "tanh"])
def test_half_precision_is_kept_and_right(low, precision, name):
    backend, tolerance = half(low, precision)
    q, k, v = (support.array(backend, value) for value in (INPUTS.q, INPUTS.k, INPUTS.v))
    arguments = {"attention": (q, k, v, 3), "rope": (q, 10000.0)}.get(name, (q,))
    found = getattr(backend.ops, name)(*arguments)
    assert support.kind(found) == precision
    exact = [a if isinstance(a, (int, float)) else support.numpy(backend, a).astype(np.float64) for a in arguments]
    np.testing.assert_allclose(
        support.numpy(backend, found), getattr(REFERENCE, name)(*exact), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rms_norm_accumulates_in_float32(low, normal, precision):
    backend, tolerance = half(low, precision)
    x = support.array(backend, 300 * normal(2, 512))  # squares overflow float16, and their sum drowns in bfloat16
    found = support.numpy(backend, backend.ops.rms_norm(x))
    np.testing.assert_allclose(
        found, REFERENCE.rms_norm(support.numpy(backend, x).astype(np.float64)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rope_keeps_far_positions(low, normal, precision):
    backend, tolerance = half(low, precision)
    x = support.array(backend, normal(1, 1500, 1, 4))
    np.testing.assert_allclose(
        support.numpy(backend, backend.ops.rope(x, 10000.0)),
        REFERENCE.rope(support.numpy(backend, x).astype(np.float64), 10000.0),
        rtol=tolerance,
        atol=2 * tolerance,
    )


def test_rope_of_float32_is_float32_whatever_the_precision(low, normal):
    backend = low("bfloat16")
    x = backend.ops.float32(support.array(backend, normal(1, 40, 2, 8)))
    wanted = REFERENCE.rope(support.numpy(backend, x).astype(np.float64), 10000.0)
    np.testing.assert_allclose(support.numpy(backend, backend.ops.rope(x, 10000.0)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 37, 130])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 0, 1, "half", "long"])
def test_attention(backend, length, kv_heads, window):
    window = {"half": length // 2, "long": 3 * length}.get(window, window)
    draw = np.random.default_rng(length).standard_normal
    q, k, v = (draw((2, length, heads, 8), dtype=np.float32) for heads in (4, kv_heads, kv_heads))
    found = backend.ops.attention(*(support.array(backend, x) for x in (q, k, v)), window)
    wanted = REFERENCE.attention(*(x.astype(np.float64) for x in (q, k, v)), window)
    assert tuple(found.shape) == (2, length, 4, 8)
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=2e-5, atol=5e-6)


def test_rope_sign(backend):
    x = np.zeros((1, 2, 1, 2), np.float32)
    x[..., 0] = 1  # at position 1 and frequency 1 the first half keeps cos(1), the second gets -sin(1)
    found = support.numpy(backend, backend.ops.rope(support.array(backend, x), 10000.0))
    np.testing.assert_allclose(found[0, :, 0], [[1, 0], [np.cos(1), -np.sin(1)]], atol=1e-6)


@pytest.mark.parametrize(
    "function, wanted",
    [
        (lambda o, x, y: o.maximum(x, 0.0), {"x": [0, 1, 1]}),
        (lambda o, x, y: o.minimum(0.0, x), {"x": [1, 1, 0]}),
        (lambda o, x, y: o.clip(x, min=0.0, max=1.0), {"x": [0, 1, 1]}),
        (lambda o, x, y: o.maximum(x, y), {"x": [0, 0.5, 1], "y": [1, 0.5, 0]}),
        (lambda o, x, y: o.minimum(x, y), {"x": [1, 0.5, 0], "y": [0, 0.5, 1]}),
        (lambda o, x, y: o.std(0.0 * x) + o.std(y), {"x": [0, 0, 0], "y": [0, 0, 0]}),
    ],
)
def test_gradients_at_ties(backend, function, wanted):
    """Where differences say nothing. A gate begins at 0, and would never leave it on one backend alone."""
    values = {"x": np.array([-1, 0, 1], np.float32), "y": np.zeros(3, np.float32)}
    _, found = support.gradients(backend, lambda **arrays: backend.ops.sum(function(backend.ops, **arrays)), **values)
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(found[name], gradient)


def test_a_sum_over_many_is_exact_in_half_precision(backend):
    ops = backend.ops
    summed = ops.cumulative_sum(ops.compute(ops.full((4096,), 0.5)), axis=0)
    assert support.numpy(backend, ops.float32(summed))[-1] == pytest.approx(2048, rel=0.01)


def check_gradients(backend, function, rtol=2e-4, **values):
    """A backend's gradients of function(ops, **arrays), against finite differences of the float64 reference."""
    loss, found = support.gradients(backend, lambda **arrays: function(backend.ops, **arrays), **values)
    wanted = numerical_gradients(lambda **arrays: function(REFERENCE, **arrays), **values)
    exact = function(REFERENCE, **{name: value.astype(np.float64) for name, value in values.items()})
    assert loss == pytest.approx(exact, rel=1e-5, abs=1e-5)
    for name in values:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=rtol * np.abs(wanted[name]).max() + 1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda o, x: o.softmaxx(x), AttributeError, r"there is no ops\.softmaxx: did you mean ops\.softmax\?"),
        (lambda o, x: o.cat([x]), AttributeError, r"there is no ops\.cat: did you mean ops\.concat\?"),
        (lambda o, x: o.xyz(x), AttributeError, r"there is no ops\.xyz\. `python -m backends\.surface` lists"),
        (lambda o, x: o.sum(x, dim=1), TypeError, r"ops\.sum has no argument dim=: write axis=\. .*ops\.sum\(x, /, \*"),
        (lambda o, x: o.sort(x, descend=True), TypeError, r"has no argument descend=: write descending="),
        (lambda o, x: o.exp(x, out=x), TypeError, r"ops\.exp has no argument out=\. Its signature: ops\.exp\(x, /\)"),
        (lambda o, x: o.std(x, 1, 0), TypeError, r"takes 1 argument by position and got 3: write axis=\.\.\., correct"),
        (lambda o, x: o.expand_dims(x, 0), TypeError, r"takes 1 argument by position and got 2: write axis="),
        (lambda o, x: o.abs(x, x), TypeError, r"ops\.abs takes 1 argument by position and got 2\. Its signature"),
        (lambda o, x: o.take(x, x), TypeError, "take.*'axis'"),
        (lambda o, x: o.reshape(x), TypeError, "reshape.*'shape'"),
        (
            lambda o, x: o.astype(x, "int8"),
            ValueError,
            r"another array's \.dtype, or one of 'bool', 'int32', 'float32'",
        ),
        (lambda o, x: o.cumulative_sum(x), ValueError, "over an array of 4 axes: name one"),
        (lambda o, x: o.cumulative_prod(x), ValueError, "over an array of 4 axes: name one"),
        (lambda o, x: o.squeeze(x, 3), ValueError, "squeeze"),
        (lambda o, x: o.attention(x, x, x, -1), ValueError, r"window=-1: how many tokens it reaches back, 0 or more"),
        (lambda o, x: o.attention(x, x, x, 0.5), ValueError, r"window=0\.5: how many tokens"),
        (lambda o, x: o.attention(x, x, x, bias=o.ones((3, 5))), ValueError, r"a bias for 3 heads and 2 query heads"),
    ],
)
def test_refused_on_every_backend(backend, call, error, message):
    x = support.array(backend, np.ones((1, 4, 2, 8), np.float32))
    with pytest.raises(error, match=message):
        call(backend.ops, x)


def test_an_embedding_out_of_range_is_nan_and_has_no_gradient(backend):
    """As `take`: the last row is -1, and an error would have to wait for the device."""
    embedding = backend.nn.Embedding(3, 2)
    backend.set_weights(embedding, {"weight": np.arange(6, dtype=np.float32).reshape(3, 2)})
    tokens = support.array(backend, np.array([[0, 2, 3], [-1, -3, -4]]))
    found = support.numpy(backend, embedding(tokens))
    np.testing.assert_array_equal(found[..., 0], [[0, 4, np.nan], [4, 0, np.nan]])

    def loss(model, x, y):
        rows = model(tokens)
        return backend.ops.sum(backend.ops.where(rows == rows, rows, 0.0))

    trainer = backend.Trainer(embedding, loss, [tiny.descent(["weight"])])
    trainer.backward(support.TOKENS, support.TOKENS)
    np.testing.assert_array_equal(trainer.gradients()["weight"], [[2, 2], [0, 0], [2, 2]])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_modified_attention_over_blocks(backend, window, kv_heads):
    """Longer than a block of queries on PyTorch (256) and on MLX (512)."""
    rng, length = np.random.default_rng(6), 600
    q, k, v = (rng.standard_normal((1, length, heads, 4), dtype=np.float32) for heads in (4, kv_heads, kv_heads))
    bias = rng.standard_normal((4, 300), dtype=np.float32)
    documents = np.cumsum(rng.random((1, length)) < 0.05, axis=1)
    arguments = dict(window=window, scale=0.3, softcap=4.0)
    wanted = REFERENCE.attention(
        *(x.astype(np.float64) for x in (q, k, v)), bias=bias, documents=documents, **arguments
    )
    q, k, v, bias, documents = (support.array(backend, x) for x in (q, k, v, bias, documents))
    found = backend.ops.attention(q, k, v, bias=bias, documents=documents, **arguments)
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_modified_attention_keeps_half_precision(low, precision):
    backend, tolerance = half(low, precision)
    q, k, v, bias = (support.array(backend, getattr(INPUTS, name)) for name in ("q", "k", "v", "bias"))
    found = backend.ops.attention(q, k, v, softcap=2.0, bias=bias, scale=0.5)
    assert support.kind(found) == precision
    exact = [support.numpy(backend, x).astype(np.float64) for x in (q, k, v)]
    wanted = REFERENCE.attention(*exact, softcap=2.0, bias=support.numpy(backend, bias).astype(np.float64), scale=0.5)
    np.testing.assert_allclose(support.numpy(backend, found), wanted, rtol=tolerance, atol=tolerance)


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
        return float((REFERENCE.attention(arrays["q"], arrays["k"], arrays["v"], window) * w).sum())

    _, found = support.gradients(
        backend, lambda q, k, v, w: backend.ops.sum(backend.ops.attention(q, k, v, window) * w), **values, w=w
    )
    for name, shape in shapes.items():
        direction, step = draw(shape), 1e-5
        above, below = ({**values, name: values[name] + sign * step * direction} for sign in (1, -1))
        slope = (exact(**above) - exact(**below)) / (2 * step)
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-2)
