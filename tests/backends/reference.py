"""What each op must give, in numpy and float64, written for plainness."""

from __future__ import annotations

import math

import numpy as np


class Reference:
    """The Array API is numpy's own; here is what a transformer needs besides."""

    def __getattr__(self, name):
        return getattr(np, name)

    def full(self, shape, fill_value):
        return np.full(shape, float(fill_value))

    def float32(self, x):
        return np.asarray(x, np.float64)

    compute = stop_gradient = float32

    def relu(self, x):
        return np.maximum(x, 0)

    def rsqrt(self, x):
        return 1 / np.sqrt(x)

    def sigmoid(self, x):
        return 1 / (1 + np.exp(-x))

    def silu(self, x):
        return x / (1 + np.exp(-x))

    def gelu(self, x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def softmax(self, x, axis):
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        return powers / powers.sum(axis=axis, keepdims=True)

    def rms_norm(self, x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 2.0**-23)

    def rope(self, x, base):
        _, length, _, size = x.shape
        angles = np.outer(np.arange(length), base ** (-2 * np.arange(size // 2) / size))[None, :, None]
        x1, x2 = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate(
            [x1 * np.cos(angles) + x2 * np.sin(angles), x2 * np.cos(angles) - x1 * np.sin(angles)], axis=-1
        )

    def attention(self, q, k, v, window):
        rows, length, heads, size = q.shape
        out = np.zeros_like(q)
        for b, h, i in np.ndindex(rows, heads, length):
            first = 0 if window is None else max(0, i - window)
            shared = h // (heads // k.shape[2])
            scores = k[b, first : i + 1, shared] @ q[b, i, h] / math.sqrt(size)
            out[b, i, h] = self.softmax(scores, axis=0) @ v[b, first : i + 1, shared]
        return out


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
