"""The contract's `ops` on MLX: its own functions where names and meaning agree, small ones here where they don't."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from backends.interface import OPS, BackendError

LOGITS_AT_ONCE = 2**23  # the cross-entropy's float32 logits held at a time: 32 MiB, 1024 tokens of vocabulary 8192
RMS_EPSILON = 2.0**-23


def namespace(precision: mx.Dtype) -> SimpleNamespace:
    """Every name of `interface.OPS`; `compute` casts to `precision`.

    Raises:
        BackendError: this MLX lacks some of them.
    """
    own = (attention, clip, float32, full, gelu, relu, rms_norm, rope, silu, softcapped_cross_entropy, softmax, std,
           var)
    functions = {function.__name__: function for function in own}
    functions["compute"] = lambda x: x.astype(precision)
    if missing := [name for name in OPS if name not in functions and not hasattr(mx, name)]:
        raise BackendError(f"this MLX is too old ({mx.__version__} lacks {', '.join(missing)}): pip install -U mlx")
    return SimpleNamespace(**{name: functions.get(name) or getattr(mx, name) for name in OPS})


def float32(x):
    return x.astype(mx.float32)


def clip(x, min=None, max=None):
    return mx.clip(x, min, max)


def full(shape, fill_value, dtype=mx.float32):
    return mx.full(shape, fill_value, dtype=dtype)


def std(x, axis=None, correction=0, keepdims=False):
    return mx.std(x, axis=axis, keepdims=keepdims, ddof=correction)


def var(x, axis=None, correction=0, keepdims=False):
    return mx.var(x, axis=axis, keepdims=keepdims, ddof=correction)


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


def attention(q, k, v, window=None):
    """q (B, T, H, D), k and v (B, T, H_kv, D) to (B, T, H, D); query i sees keys i - window to i, None: all up to i."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    length = q.shape[2]
    mask = "causal" if window is None or window >= length - 1 else _window_mask(length, window)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[3] ** -0.5, mask=mask).swapaxes(1, 2)


@lru_cache(maxsize=16)
def _window_mask(length: int, window: int) -> mx.array:
    """True where query (row) may see key (column): (T, T)."""
    back = np.arange(length)[:, None] - np.arange(length)
    return mx.array((back >= 0) & (back <= window))


def softcapped_cross_entropy(hidden, weight, targets, softcap=None, reduction="mean"):
    """Nats of targets (B, T), from hidden (B, T, C) and weight (V, C). See `backends/interface.py`."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction {reduction!r}: choose "mean", "sum" or "none"')
    losses = _token_losses(softcap)(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    return {"mean": mx.mean, "sum": mx.sum, "none": lambda x: x.reshape(targets.shape)}[reduction](losses)


@cache
def _token_losses(softcap: float | None):
    """Float32 losses (N,) of hidden (N, C), weight (V, C) and targets (N,); their gradient recomputes the logits."""

    @mx.custom_function
    def losses(hidden, weight, targets):
        parts = []
        for chunk in _chunks(len(targets), len(weight)):
            logits = _capped_logits(_after(hidden[chunk], parts[-1:]), weight, softcap)
            right = mx.take_along_axis(logits, targets[chunk][:, None], axis=1)[:, 0]
            parts.append(mx.logsumexp(logits, axis=1) - right)
        return mx.concatenate(parts)

    @losses.vjp
    def gradients(inputs, cotangent, _):
        hidden, weight, targets = inputs
        # Losses' gradients are about 1 / tokens, too small for float16: products see them relative to their largest.
        unit = mx.max(mx.abs(cotangent))
        relative = cotangent / mx.where(unit == 0, 1.0, unit)
        to_hidden, to_weight = [], mx.zeros(weight.shape, dtype=mx.float32)
        for chunk in _chunks(len(targets), len(weight)):
            rows = _after(hidden[chunk], [*to_hidden[-1:], to_weight])
            logits = _capped_logits(rows, weight, softcap)
            errors = mx.softmax(logits, axis=1) - (mx.arange(len(weight)) == targets[chunk][:, None])
            if softcap is not None:
                errors = errors * (1 - mx.square(logits / softcap))
            errors = (errors * relative[chunk][:, None]).astype(hidden.dtype)
            to_hidden.append((float32(errors @ weight) * unit).astype(hidden.dtype))
            to_weight = to_weight + float32(errors.T @ rows)
        return mx.concatenate(to_hidden), (to_weight * unit).astype(weight.dtype), mx.zeros_like(targets)

    return losses


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _capped_logits(hidden, weight, softcap):
    logits = float32(hidden @ weight.T)
    return logits if softcap is None else softcap * mx.tanh(logits / softcap)


def _after(x, earlier: list[mx.array]):
    """x, once `earlier` is computed. Without this order the lazy graph holds several chunks' logits: 4 times the memory
    with 16 chunks."""
    return mx.depends([x], earlier)[0] if earlier else x
