"""The functions `train.py` computes with, on PyTorch, under their Python Array API names.

What each takes and gives: `backends/interface.py`. PyTorch takes `axis=` and `keepdims=` for its own `dim=` and
`keepdim=`, so most of them are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import (  # noqa: F401
    abs,
    add,
    broadcast_to,
    clip,
    concat,
    cos,
    cumsum as cumulative_sum,
    divide,
    eq as equal,
    exp,
    greater,
    greater_equal,
    less,
    less_equal,
    log,
    logical_and,
    logical_not,
    logical_or,
    matmul,
    mean,
    multiply,
    negative,
    ones_like,
    permute as permute_dims,
    pow,
    relu,
    reshape,
    rsqrt,
    sigmoid,
    sign,
    sin,
    softmax,
    sqrt,
    square,
    squeeze,
    stack,
    subtract,
    sum,
    tan,
    tanh,
    unsqueeze as expand_dims,
    where,
    zeros_like,
)
from torch.nn.functional import gelu, silu  # noqa: F401

from backends.pytorch import runtime
from backends.pytorch.attention import attention  # noqa: F401
from backends.pytorch.cross_entropy import softcapped_cross_entropy  # noqa: F401
from backends.pytorch.mlp import squared_relu_mlp  # noqa: F401
from backends.pytorch.rotary import rms_norm, rope, rotary_qkv  # noqa: F401


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
    return torch.zeros(shape, device=runtime.device)


def ones(shape):
    return torch.ones(shape, device=runtime.device)


def full(shape, value):
    return torch.full(shape, value, dtype=torch.float32, device=runtime.device)


def arange(start, stop=None, step=1):
    start, stop = (0, start) if stop is None else (start, stop)
    return torch.arange(start, stop, step, device=runtime.device)


def matrix_transpose(x):
    return x.transpose(-1, -2)


def tril(x, k=0):
    return torch.tril(x, diagonal=k)


def triu(x, k=0):
    return torch.triu(x, diagonal=k)


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
