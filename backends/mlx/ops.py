"""The operations of `backends/operations.py` on MLX: its own functions where names and meaning agree, small ones here
where they don't."""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from backends import fusion, operations
from backends.interface import BackendError
from backends.mlx import cross_entropy, random
from backends.mlx.attention import IMPLEMENTATIONS, modified
from backends.mlx.indexing import take, take_along_axis

RMS_EPSILON = 2.0**-23


HALVES = mx.bfloat16, mx.float16
DTYPES = {"bool": mx.bool_, "int32": mx.int32, "float32": mx.float32}

# numpy's constants then leave a product such as `np.float32(2) * x` to MLX; else its result would be numpy's, without a
# gradient.
mx.array.__array_ufunc__ = None


def namespace(precision: mx.Dtype, attention: dict[str, str], memory: int) -> operations.Operations:
    """The operations of the table.

    Args:
        precision: what `compute` casts to.
        attention: names of `attention.IMPLEMENTATIONS` by kind of window, "full" and "window".
        memory: bytes of the device, by which the loss is cut in chunks.

    Raises:
        BackendError: this MLX lacks some of them.
    """
    chosen = dict(
        attention=attention_by(attention),
        compute=lambda x: x.astype(precision),
        fusable=lambda function: fusion.mark(function, found, {}, missed=lambda _: None),
        mean_loss=cross_entropy.by_memory(memory),
    )
    if mx.default_device() == mx.Device(mx.cpu):
        chosen["multiply"] = multiply
        sum_scalar_gradients_exactly()
    native = {name: getattr(mx, name) for name in operations.OPS if hasattr(mx, name)}
    try:
        found = operations.Operations(native | operations.OPERATORS | _own | chosen)
    except LookupError as error:
        raise BackendError(f"this MLX is too old ({mx.__version__} lacks {error}): pip install -U mlx") from None
    return found


def float32(x):
    return x.astype(mx.float32)


def astype(x, dtype):
    if isinstance(dtype, str):
        operations.check_dtype(dtype)
        dtype = DTYPES[dtype]
    return x.astype(dtype)


def asarray(obj):
    if isinstance(obj, mx.array):
        return obj
    value = np.asarray(obj)
    return mx.array(value.astype({"f": np.float32, "i": np.int32, "u": np.int32, "b": bool}[value.dtype.kind]))


def arange(start, stop, step):
    return mx.arange(start) if stop is None else mx.arange(start, stop, step)


# --- At a tie the gradient is that of x beside a number, and half of each of two arrays, as the table says ---


def clip(x, min, max):
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


def maximum(x1, x2):
    return _chosen(x1, x2, mx.maximum, mx.less)


def minimum(x1, x2):
    return _chosen(x1, x2, mx.minimum, mx.greater)


def _chosen(x1, x2, choose, beyond):
    if isinstance(x1, mx.array) and isinstance(x2, mx.array):
        chosen = choose(x1, x2)
        halves = 0.5 * x1 + 0.5 * x2 if mx.issubdtype(chosen.dtype, mx.floating) else chosen
        return mx.where(x1 == x2, halves, chosen)
    x, number = (x1, x2) if isinstance(x1, mx.array) else (x2, x1)
    return mx.where(beyond(x, number), number, x)


def full(shape, fill_value):
    return mx.full(shape, fill_value, dtype=mx.float32)


def where(condition, x1, x2):
    return mx.where(condition, x1, x2)


def _axis_by_axis(reduce):
    """`reduce` over one axis after another, the last one first: over several at once MLX's CPU adds up one element
    after another, and half a million float32 terms lose four digits."""

    def reduced(x, axis=None, keepdims=False):
        axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        for last in sorted((a % x.ndim for a in axes), reverse=True):
            x = reduce(x, axis=last, keepdims=keepdims)
        return x

    return reduced


sum, mean = _axis_by_axis(mx.sum), _axis_by_axis(mx.mean)


def var(x, axis, correction, keepdims):
    squares = mx.square(x - mean(x, axis=axis, keepdims=True))
    variance = mean(squares, axis=axis, keepdims=keepdims)
    return variance * (x.size / (x.size - correction * variance.size)) if correction else variance


def std(x, axis, correction, keepdims):
    variance = var(x, axis, correction, keepdims)
    some = variance > 0  # where there is none the gradient is 0, as the table says, and not that of a root at 0
    return mx.where(some, mx.sqrt(mx.where(some, variance, 1)), 0)


def multiply(x1, x2):
    """The gradient of a scalar factor, a sum over all that it multiplies, also goes axis by axis."""
    if isinstance(x1, mx.array) and isinstance(x2, mx.array) and 0 in (x1.ndim, x2.ndim) and max(x1.ndim, x2.ndim) > 1:
        return _scaled(x1, x2) if x1.ndim == 0 else _scaled(x2, x1)
    return _multiply(x1, x2)


_multiply, _times = mx.multiply, mx.array.__mul__


def sum_scalar_gradients_exactly() -> None:
    """Makes `a * b` of arrays what `multiply` is, in this process. MLX has no place of its own to say how an operator
    is differentiated."""

    def times(a, b):
        return multiply(a, b) if isinstance(b, mx.array) else _times(a, b)

    mx.array.__mul__ = times


@mx.custom_function
def _scaled(factor, x):
    return _multiply(factor, x)


@_scaled.vjp
def _scaled_gradients(inputs, cotangent, _):
    factor, x = inputs
    return sum(_multiply(cotangent, x)).astype(factor.dtype), _multiply(cotangent, factor).astype(x.dtype)


def relu(x):
    return mx.maximum(x, 0)


def gelu(x):
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x * mx.sigmoid(x)


def softmax(x, axis):
    return mx.softmax(x, axis=axis, precise=True)


def vector(operation):
    """A cumulative operation of the table from MLX's."""
    return lambda x, axis: operation(x, axis=operations.vector_axis(axis, x.ndim))


def _cumulative_prod(x, axis):
    """MLX's own gradient divides by x. Here each of log2(n) rounds multiplies by what stands twice as far back."""
    axis, length, back = axis % x.ndim, x.shape[axis], 1
    x = x.swapaxes(axis, 0)
    while back < length:
        x = mx.concatenate([x[:back], x[back:] * x[:-back]], axis=0)
        back *= 2
    return x.swapaxes(axis, 0)


def _cumulative_sum(x, axis):
    """In float32: MLX's CPU adds up in the precision of x, where bfloat16 stands still at 256 terms."""
    return mx.cumsum(x.astype(mx.float32), axis=axis).astype(x.dtype) if x.dtype in HALVES else mx.cumsum(x, axis=axis)


def argmax(x, axis, keepdims):
    return mx.argmax(x, axis=axis, keepdims=keepdims).astype(mx.int32)


def flip(x, axis):
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    for last in axes:
        x = mx.take(x, mx.arange(x.shape[last] - 1, -1, -1), axis=last)
    return x


def sort(x, axis, descending):
    values = mx.sort(x, axis=axis)
    return flip(values, axis) if descending else values


def topk(x, k, axis):
    length = x.shape[axis]
    # Of equals the first comes first: their order is turned before a stable sort, and turned back with it.
    indices = length - 1 - flip(mx.argsort(flip(x, axis), axis=axis), axis)
    indices = mx.take(mx.stop_gradient(indices), mx.arange(k), axis=axis)
    return mx.take_along_axis(x, indices, axis=axis), indices.astype(mx.int32)


def rms_norm(x):
    return mx.fast.rms_norm(x, None, RMS_EPSILON)


def rope(x, base):
    """Rotary embedding of x (B, T, H, D). `mx.fast.rope` is 3e-4 off at position 2000: its angles are float32."""
    cos, sin = _rotations(x.shape[1], x.shape[3], base)
    x1, x2 = mx.split(x, 2, axis=-1)
    return mx.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


@lru_cache(maxsize=16)
def _rotations(length: int, size: int, base: float) -> tuple[mx.array, mx.array]:
    """Cosine and sine for each position and frequency, float32 (T, 1, D / 2), from angles in float64."""
    frequencies = base ** (-np.arange(0, size, 2) / size)
    angles = (np.arange(length)[:, None] * frequencies)[:, None, :]
    # Made from numpy, they are constants: a cache must not keep arrays that belong to a trace.
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def attention_by(chosen: dict[str, str]):
    """The table's `attention`, by these implementations: names in `attention.IMPLEMENTATIONS` by kind of window."""

    def attention(q, k, v, window, scale, softcap, bias, documents):
        operations.check_attention(q.shape[2], k.shape[2], window, None if bias is None else bias.shape[0])
        window = None if window is None or window >= q.shape[1] - 1 else window
        if scale is not None:  # the implementations have their own
            q = q * (scale * q.shape[3] ** 0.5)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        if softcap is None and bias is None and documents is None:
            by = IMPLEMENTATIONS[chosen["full" if window is None else "window"]]
            return by(q, k, v, window).swapaxes(1, 2)
        return modified(q, k, v, window, softcap, bias, documents).swapaxes(1, 2)

    return attention


_renamed = dict(
    cumulative_prod=vector(_cumulative_prod),
    cumulative_sum=vector(_cumulative_sum),
    dropout=random.dropout,
    matrix_transpose=lambda x: x.swapaxes(-1, -2),
    take=take,
    take_along_axis=take_along_axis,
    training=random.training,
    uniform=random.uniform,
)
_own = {
    name: function for name, function in globals().items() if name in operations.OPS and callable(function)
} | _renamed
