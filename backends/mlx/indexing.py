"""Elements by their position, on MLX: an index out of range gives NaN, as `backends/operations.py` has it."""

from __future__ import annotations

import mlx.core as mx


def take(x, indices, axis):
    axis = axis % x.ndim
    places, inside = _places(indices, x.shape[axis])
    return _or_nan(mx.take(x, places, axis=axis), inside.reshape(*indices.shape, *[1] * (x.ndim - axis - 1)))


def take_along_axis(x, indices, axis):
    places, inside = _places(indices, x.shape[axis])
    return _or_nan(mx.take_along_axis(x, places, axis=axis), inside)


def _places(indices, size: int):
    """Indices from 0 to below `size`, and whether those given were indices at all: -size is the first that is."""
    wrapped = mx.where(indices < 0, indices + size, indices)
    return mx.clip(wrapped, 0, size - 1), (indices >= -size) & (indices < size)


def _or_nan(x, inside):
    return mx.where(inside, x, float("nan")) if mx.issubdtype(x.dtype, mx.floating) else x
