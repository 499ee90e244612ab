"""What each operation must give, in numpy and float64, written for plainness."""

from __future__ import annotations

import math
import operator

import numpy as np

from backends.operations import OPS, Operations


class Reference(Operations):
    """The Array API is numpy's own; here is what it lacks, or has under another name."""

    def __init__(self):
        numpys = {name: getattr(np, name) for name in OPS if hasattr(np, name)}
        super().__init__(numpys | _further)


def _or_nan(x, inside):
    return np.where(inside, x, np.nan) if x.dtype.kind == "f" else x


def take(x, indices, axis):
    size, axis = x.shape[axis], axis % x.ndim
    taken = np.take(x, np.clip(np.where(indices < 0, indices + size, indices), 0, size - 1), axis=axis)
    inside = (indices >= -size) & (indices < size)
    return _or_nan(taken, inside.reshape(*indices.shape, *[1] * (x.ndim - axis - 1)))


def take_along_axis(x, indices, axis):
    size = x.shape[axis]
    wrapped = np.clip(np.where(indices < 0, indices + size, indices), 0, size - 1)
    return _or_nan(np.take_along_axis(x, wrapped, axis=axis), (indices >= -size) & (indices < size))


def sort(x, axis, descending):
    return np.flip(np.sort(x, axis=axis), axis=axis) if descending else np.sort(x, axis=axis)


def topk(x, k, axis):
    indices = np.take(np.argsort(-x, axis=axis, stable=True), np.arange(k), axis=axis)
    return np.take_along_axis(x, indices, axis=axis), indices


def logsumexp(x, axis, keepdims):
    return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))


def softmax(x, axis):
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def rms_norm(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 2.0**-23)


def rope(x, base):
    _, length, _, size = x.shape
    angles = np.outer(np.arange(length), base ** (-2 * np.arange(size // 2) / size))[None, :, None]
    x1, x2 = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate(
        [x1 * np.cos(angles) + x2 * np.sin(angles), x2 * np.cos(angles) - x1 * np.sin(angles)], axis=-1
    )


def attention(q, k, v, window, scale, softcap, bias, documents):
    length, heads, size = q.shape[1:]
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) * (size**-0.5 if scale is None else scale)
    back = np.arange(length)[:, None] - np.arange(length)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias[:, np.clip(back, 0, bias.shape[1] - 1)]
    visible = (back >= 0) & (back <= (length if window is None else window))
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return np.einsum("bhij,bjhd->bihd", softmax(np.where(visible, scores, -np.inf), -1), v)


def mix(state):
    """SplitMix64, from its authors' description."""
    with np.errstate(over="ignore"):
        state = np.uint64(state % 2**64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(state ^ (state >> np.uint64(31)))


def squares32(counter, key):
    """Squares, round by round from its author's description, in uint64, which wraps."""
    half = np.uint64(32)
    x = counter * key
    y, z = x, x + key
    x = x * x + y
    x = (x >> half) | (x << half)
    x = x * x + z
    x = (x >> half) | (x << half)
    x = x * x + y
    x = (x >> half) | (x << half)
    return (x * x + z) >> half


def uniform(shape, key, passes=0):
    """The draw of a pass with so many before it."""
    word = np.uint64(mix(mix(key[0]) + key[1]) | 1)
    words = squares32(np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(passes * 2**32), word)
    return (words >> np.uint64(8)).astype(np.float64).reshape(shape) / 2**24


def dropout(x, rate, key):
    return np.where(uniform(x.shape, key) >= rate, x / (1 - rate), 0)


_further = dict(
    argmax=np.argmax,
    asarray=np.asarray,
    astype=lambda x, dtype: x.astype({"float32": np.float64}.get(dtype, dtype)),
    attention=attention,
    compute=np.asarray,
    cumulative_prod=np.cumulative_prod,
    dropout=dropout,
    einsum=np.einsum,
    float32=lambda x: np.asarray(x, np.float64),
    fusable=lambda function: function,
    full=lambda shape, fill_value: np.full(shape, float(fill_value)),
    gelu=gelu,
    logsumexp=logsumexp,
    mean_loss=lambda head, loss, hidden, targets: loss(head(hidden), targets).mean(),
    matmul=operator.matmul,
    relu=relu,
    rms_norm=rms_norm,
    rope=rope,
    rsqrt=lambda x: 1 / np.sqrt(x),
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    silu=lambda x: x / (1 + np.exp(-x)),
    softmax=softmax,
    sort=sort,
    stop_gradient=np.asarray,
    take=take,
    take_along_axis=take_along_axis,
    topk=topk,
    training=lambda: True,
    uniform=uniform,
    where=np.where,
)


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats of each target under logits (..., V), by log-softmax in float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    right = np.take_along_axis(logits, targets[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - right


def numerical_gradients(function, step: float = 1e-5, **values) -> dict[str, np.ndarray]:
    """The gradients of a scalar function of float64 arrays by central differences, one element at a time."""
    values = {name: np.array(value, np.float64) for name, value in values.items()}
    found = {name: np.zeros_like(value) for name, value in values.items()}
    for name, value in values.items():
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + step
            above = function(**values)
            value[index] = kept - step
            found[name][index] = (above - function(**values)) / (2 * step)
            value[index] = kept
    return found
