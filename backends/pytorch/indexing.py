"""Elements by their position, on PyTorch: an index out of range gives NaN, as `backends/operations.py` has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def take(x, indices, axis):
    axis = axis % x.ndim
    places, inside = _places(indices, x.shape[axis])
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    taken = torch.index_select(x, axis, places.reshape(-1)).reshape(shape)
    return _or_nan(taken, inside.reshape(*indices.shape, *[1] * (x.ndim - axis - 1)))


def take_along_axis(x, indices, axis):
    places, inside = _places(indices, x.shape[axis])
    return _or_nan(torch.take_along_dim(x, places, axis), inside)


def _places(indices, size: int):
    """Indices from 0 to below `size`, and whether those given were indices at all: -size is the first that is."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices).clamp(0, size - 1), (indices >= -size) & (indices < size)


def _or_nan(x, inside):
    return torch.where(inside, x, float("nan")) if x.is_floating_point() else x


def rows(table, indices):
    """`take` of rows, for `nn.Embedding`."""
    places, inside = _places(indices, table.shape[0])
    return _or_nan(F.embedding(places, table), inside[..., None])
