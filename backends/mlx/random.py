"""Random numbers of a training pass, as `backends/operations.py` specifies them, in integer arithmetic."""

from __future__ import annotations

import math
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from backends import operations

_pass: mx.array | None = None  # how many passes came before this one; None outside of training


@contextmanager
def drawing(passes: mx.array):
    """Within it `passes`, a scalar, is the number of this pass: for its forward and its backward half."""
    global _pass
    outer, _pass = _pass, passes
    try:
        yield
    finally:
        _pass = outer


def training():
    return _pass is not None


def uniform(shape, key):
    if _pass is None:
        raise RuntimeError(operations.OUTSIDE)
    return _bits(shape, key).astype(mx.float32) * 2.0**-24


def dropout(x, rate, key):
    operations.check_rate(rate)
    if _pass is None or rate == 0:
        return x
    return mx.where(_bits(x.shape, key) >= round(rate * 2**24), x / (1 - rate), 0)


def _bits(shape, key):
    """The upper 24 bits of each number drawn."""
    word = mx.array(np.uint64(operations.generator_key(key)))
    counters = mx.arange(math.prod(shape), dtype=mx.uint64) + (_pass << 32)
    return (operations.squares(counters, word) >> 8).reshape(shape)
