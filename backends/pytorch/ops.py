"""The functions `train.py` computes with, on PyTorch, under their Python Array API names.

What each takes and gives: `backends/interface.py`. PyTorch takes `axis=` and `keepdims=` for its own `dim=` and
`keepdim=`, so most of them are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import (abs, add, arange as _arange, broadcast_to, clip, concat, cos, cumsum as cumulative_sum,  # noqa: F401
                   divide, eq as equal, exp, full as _full, greater, greater_equal, less, less_equal, log, logical_and,
                   logical_not, logical_or, matmul, mean, multiply, negative, ones as _ones, ones_like, permute as
                   permute_dims, pow, relu, reshape, rsqrt, sigmoid, sign, sin, softmax, sqrt, square, squeeze, stack,
                   subtract, sum, tan, tanh, tril as _tril, triu as _triu, unsqueeze as expand_dims, where, zeros as _zeros, zeros_like)
from torch.nn.functional import gelu, silu  # noqa: F401

from backends.pytorch import runtime
from backends.pytorch.attention import attention  # noqa: F401
from backends.pytorch.cross_entropy import softcapped_cross_entropy  # noqa: F401

EPSILON = 2.0**-23  # float32's machine epsilon, in every precision


def compute(x):
    """x in the compute precision."""
    return x.to(runtime.dtype)


def float32(x):
    return x.to(torch.float32)


def astype(x, dtype):
    """x as `dtype`, which is another array's `.dtype`."""
    return x.to(dtype)


def stop_gradient(x):
    return x.detach()


def zeros(shape):
    return _zeros(shape, device=runtime.device)


def ones(shape):
    return _ones(shape, device=runtime.device)


def full(shape, value):
    return _full(shape, value, dtype=torch.float32, device=runtime.device)


def arange(start, stop=None, step=1):
    start, stop = (0, start) if stop is None else (start, stop)
    return _arange(start, stop, step, device=runtime.device)


def matrix_transpose(x):
    return x.transpose(-1, -2)


def tril(x, k=0):
    return _tril(x, diagonal=k)


def triu(x, k=0):
    return _triu(x, diagonal=k)


def max(x, axis=None, keepdims=False):  # PyTorch's own gives indices too
    return torch.amax(x, _all_axes(x, axis), keepdims)


def min(x, axis=None, keepdims=False):
    return torch.amin(x, _all_axes(x, axis), keepdims)


def _all_axes(x, axis):
    return tuple(range(x.ndim)) if axis is None else axis


def std(x, axis=None, keepdims=False, correction=0):  # PyTorch's own default is correction=1
    return torch.std(x, axis, correction=correction, keepdim=keepdims)


def var(x, axis=None, keepdims=False, correction=0):
    return torch.var(x, axis, correction=correction, keepdim=keepdims)


def maximum(a, b):
    """The larger of two arrays, or of an array and a number."""
    return torch.maximum(a, b) if torch.is_tensor(b) else torch.clamp(a, min=b)


def minimum(a, b):
    return torch.minimum(a, b) if torch.is_tensor(b) else torch.clamp(a, max=b)


def take(x, indices, axis):
    return torch.index_select(x, axis, indices)


def rms_norm(x):
    """x / sqrt(mean(x^2, last axis) + 2^-23), accumulated in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def rope(x, base):
    """Rotary position embedding of x (B, T, H, D); position on axis 1, halves split."""
    cosines, sines = _rotation(x.shape[1], x.shape[3] // 2, base)
    first, second = x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]
    return torch.cat([first * cosines + second * sines, second * cosines - first * sines], -1)


_tables = {}


def _rotation(length: int, half: int, base: float):
    """cos and sin, each (length, 1, half), in the compute precision; made once, outside the compiled graph."""
    key = length, half, base, runtime.dtype, runtime.device
    if key not in _tables:
        frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(length, dtype=torch.float64)[:, None, None] * frequencies
        _tables[key] = tuple(t.to(runtime.dtype).to(runtime.device) for t in (angles.cos(), angles.sin()))
    return _tables[key]
