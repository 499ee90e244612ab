"""The operations of `backends/operations.py` on PyTorch: its own functions where names and meaning agree, small ones
here where they don't."""

from __future__ import annotations


import numpy as np
import torch
import torch.nn.functional as F

from backends import operations
from backends.pytorch import fused, runtime
from backends.pytorch.attention import attention
from backends.pytorch.fused import mean_loss
from backends.pytorch.indexing import take, take_along_axis
from backends.pytorch.random import dropout, training, uniform
from backends.pytorch.rotary import rms_norm, rope

DTYPES = {"bool": torch.bool, "int32": torch.int32, "float32": torch.float32}


def compute(x):
    return x.to(runtime.dtype)


def float32(x):
    return x.to(torch.float32)


def astype(x, dtype):
    if isinstance(dtype, str):
        operations.check_dtype(dtype)
        dtype = DTYPES[dtype]
    return x.to(dtype)


def asarray(obj):
    if torch.is_tensor(obj):
        return obj
    value = np.asarray(obj)
    kinds = {"f": torch.float32, "i": torch.int64, "u": torch.int64, "b": torch.bool}
    return torch.as_tensor(value, dtype=kinds[value.dtype.kind], device=runtime.device)


def zeros(shape):
    return torch.zeros(shape, device=runtime.device)


def ones(shape):
    return torch.ones(shape, device=runtime.device)


def full(shape, fill_value):
    return torch.full(shape, fill_value, dtype=torch.float32, device=runtime.device)


def arange(start, stop, step):
    start, stop = (0, start) if stop is None else (start, stop)
    return torch.arange(start, stop, step, device=runtime.device)


# --- Numbers on either side, where PyTorch wants a tensor ---


def maximum(x1, x2):
    if torch.is_tensor(x1) and torch.is_tensor(x2):
        return torch.maximum(x1, x2)
    return torch.clamp(x1, min=x2) if torch.is_tensor(x1) else torch.clamp(x2, min=x1)


def minimum(x1, x2):
    if torch.is_tensor(x1) and torch.is_tensor(x2):
        return torch.minimum(x1, x2)
    return torch.clamp(x1, max=x2) if torch.is_tensor(x1) else torch.clamp(x2, max=x1)


# --- Over axes ---


def _all_axes(x, axis):
    return tuple(range(x.ndim)) if axis is None else axis


def _floating(x):
    return x if x.is_floating_point() else x.float()


def max(x, axis, keepdims):  # PyTorch's own gives indices too
    return torch.amax(x, _all_axes(x, axis), keepdims)


def min(x, axis, keepdims):
    return torch.amin(x, _all_axes(x, axis), keepdims)


def argmax(x, axis, keepdims):
    # PyTorch leaves open which of equals it is. (x == max) is 0 or 1, of which the first 1 is found.
    flat = x.reshape(-1) if axis is None else x
    along = 0 if axis is None else axis
    places = torch.arange(flat.shape[along], device=x.device)
    places = places.reshape([-1 if i == along % flat.ndim else 1 for i in range(flat.ndim)])
    is_largest = flat == torch.amax(flat, along, True)
    found = torch.amin(torch.where(is_largest, places, flat.shape[along]), along, keepdims)
    return found.reshape([1] * x.ndim) if axis is None and keepdims else found


def sum(x, axis, keepdims):
    return torch.sum(x, _all_axes(x, axis), keepdims)


def mean(x, axis, keepdims):
    return torch.mean(_floating(x), _all_axes(x, axis), keepdims)


def std(x, axis, correction, keepdims):
    return torch.std(_floating(x), axis, correction=correction, keepdim=keepdims)


def var(x, axis, correction, keepdims):
    return torch.var(_floating(x), axis, correction=correction, keepdim=keepdims)


def logsumexp(x, axis, keepdims):
    return torch.logsumexp(_floating(x), _all_axes(x, axis), keepdims)


# --- Along an axis ---


def softmax(x, axis):
    return torch.softmax(_floating(x), axis)


def cumulative_sum(x, axis):
    return torch.cumsum(x, operations.vector_axis(axis, x.ndim))


def cumulative_prod(x, axis):
    return torch.cumprod(x, operations.vector_axis(axis, x.ndim))


def flip(x, axis):
    axes = _all_axes(x, axis)
    return torch.flip(x, (axes,) if isinstance(axes, int) else axes)


def roll(x, shift, axis):
    return torch.roll(x, shift, axis)


def sort(x, axis, descending):
    return torch.sort(x, dim=axis, descending=descending, stable=True).values


def topk(x, k, axis):
    values, indices = torch.sort(x, dim=axis, descending=True, stable=True)  # torch.topk leaves equals in any order
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


# --- Shapes ---


def concat(arrays, axis):
    return torch.cat([x.reshape(-1) for x in arrays] if axis is None else list(arrays), axis or 0)


def stack(arrays, axis):
    return torch.stack(list(arrays), axis)


def broadcast_to(x, shape):
    return torch.broadcast_to(x, shape)


def expand_dims(x, axis):
    axes = (axis,) if isinstance(axis, int) else axis
    ndim = x.ndim + len(axes)
    for place in sorted(a % ndim for a in axes):
        x = x.unsqueeze(place)
    return x


def permute_dims(x, axes):
    return torch.permute(x, axes)


def squeeze(x, axis):
    for i in (axis,) if isinstance(axis, int) else axis:
        if x.shape[i] != 1:
            raise ValueError(f"ops.squeeze: axis {i} of an array of shape {tuple(x.shape)} does not have length 1")
    return torch.squeeze(x, axis)


def matrix_transpose(x):
    return x.transpose(-1, -2)


def tril(x, k):
    return torch.tril(x, k)


def triu(x, k):
    return torch.triu(x, k)


_torchs_own = """
abs cos exp log negative rsqrt sigmoid sign sin sqrt square tan tanh relu clip where logical_and logical_not logical_or
reshape einsum ones_like zeros_like
""".split()
_elsewhere = dict(
    attention=attention,
    dropout=dropout,
    fusable=lambda function: fused.mark(function, ops),
    gelu=F.gelu,
    mean_loss=mean_loss,
    rms_norm=rms_norm,
    rope=rope,
    silu=F.silu,
    stop_gradient=torch.Tensor.detach,
    take=take,
    take_along_axis=take_along_axis,
    training=training,
    uniform=uniform,
)
_here = {name: function for name, function in globals().items() if name in operations.OPS and callable(function)}
ops = operations.Operations(
    {name: getattr(torch, name) for name in _torchs_own} | operations.OPERATORS | _elsewhere | _here
)
