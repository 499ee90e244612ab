"""The contract's `ops` on MLX: its own functions where names and meaning agree, small ones here where they don't."""

from __future__ import annotations

import math
from functools import lru_cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from backends import fusion
from backends.interface import OPS, BackendError, check_heads
from backends.mlx import cross_entropy
from backends.mlx.attention import IMPLEMENTATIONS

RMS_EPSILON = 2.0**-23


def namespace(precision: mx.Dtype, attention: dict[str, str], memory: int) -> SimpleNamespace:
    """Every name of `interface.OPS`.

    Args:
        precision: what `compute` casts to.
        attention: names of `attention.IMPLEMENTATIONS` by kind of window, "full" and "window".
        memory: bytes of the device, by which the cross-entropy is cut in chunks.

    Raises:
        BackendError: this MLX lacks some of them.
    """
    own = (
        clip,
        float32,
        full,
        gelu,
        logsumexp,
        relu,
        rms_norm,
        rope,
        silu,
        softmax,
        std,
        var,
    )
    functions = {function.__name__: function for function in own} | {"sum": mx_sum, "mean": mean}
    if mx.default_device() == mx.Device(mx.cpu):
        functions["multiply"] = multiply
        sum_scalar_gradients_exactly()
    functions["compute"] = lambda x: x.astype(precision)
    functions["attention"] = attention_by(attention)
    functions["mean_loss"] = cross_entropy.by_memory(memory)
    functions["fusable"] = lambda function: fusion.mark(function, found, {}, missed=lambda _: None)
    if missing := [name for name in OPS if name not in functions and not hasattr(mx, name)]:
        raise BackendError(f"this MLX is too old ({mx.__version__} lacks {', '.join(missing)}): pip install -U mlx")
    found = SimpleNamespace(**{name: functions.get(name) or getattr(mx, name) for name in OPS})
    return found


def float32(x):
    return x.astype(mx.float32)


def clip(x, min=None, max=None):
    return mx.clip(x, min, max)


def full(shape, fill_value, dtype=mx.float32):
    return mx.full(shape, fill_value, dtype=dtype)


def _axis_by_axis(reduce):
    """`reduce` over one axis after another, the last one first: over several at once MLX's CPU adds up one element
    after another, and half a million float32 terms lose four digits."""

    def reduced(x, axis=None, keepdims=False):
        axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        for one in sorted((a % x.ndim for a in axes), reverse=True):
            x = reduce(x, axis=one, keepdims=keepdims)
        return x

    return reduced


mx_sum, mean = _axis_by_axis(mx.sum), _axis_by_axis(mx.mean)


def var(x, axis=None, correction=0, keepdims=False):
    squares = mx.square(x - mean(x, axis=axis, keepdims=True))
    variance = mean(squares, axis=axis, keepdims=keepdims)
    return variance * (x.size / (x.size - correction * variance.size)) if correction else variance


def std(x, axis=None, correction=0, keepdims=False):
    return mx.sqrt(var(x, axis=axis, correction=correction, keepdims=keepdims))


def multiply(a, b):
    """The gradient of a scalar factor, a sum over all that it multiplies, also goes axis by axis."""
    if isinstance(a, mx.array) and isinstance(b, mx.array) and 0 in (a.ndim, b.ndim) and max(a.ndim, b.ndim) > 1:
        return _scaled(a, b) if a.ndim == 0 else _scaled(b, a)
    return _multiply(a, b)


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
    return mx_sum(_multiply(cotangent, x)).astype(factor.dtype), _multiply(cotangent, factor).astype(x.dtype)


def logsumexp(x, axis=None, keepdims=False):
    return mx.logsumexp(x, axis=axis, keepdims=keepdims)


def relu(x):
    return mx.maximum(x, 0)


def gelu(x):
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x * mx.sigmoid(x)


def softmax(x, axis=-1):
    return mx.softmax(x, axis=axis, precise=True)


def rms_norm(x):
    return mx.fast.rms_norm(x, None, RMS_EPSILON)


def rope(x, base=10000.0):
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
    """The contract's `attention`, by these implementations: names in `attention.IMPLEMENTATIONS` by kind of window."""

    def attention(q, k, v, window=None):
        """q (B, T, H, D), k and v (B, T, H_kv, D) to (B, T, H, D); query i sees keys i - window to i, None: up to i."""
        check_heads(q.shape[2], k.shape[2])
        window = None if window is None or window >= q.shape[1] - 1 else window
        by = IMPLEMENTATIONS[chosen["full" if window is None else "window"]]
        return by(*(x.swapaxes(1, 2) for x in (q, k, v)), window).swapaxes(1, 2)

    return attention
