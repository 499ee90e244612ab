"""Random numbers of a training pass, as `backends/operations.py` specifies them, in integer arithmetic.

MLX's own generator is Threefry, too, but hands out no bits.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import mlx.core as mx

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
    first, second = (mx.array(word, dtype=mx.uint32) for word in operations.generator_key(key))
    count = math.prod(shape)
    half = (count + 1) // 2
    places = mx.arange(half, dtype=mx.uint32)
    words = operations.threefry(
        (_pass + first, second),
        (places, places + half),
        word=lambda x: x,  # sums of 32 bits wrap
        rotated=lambda x, by: x << by | x >> (32 - by),
    )
    return (mx.concatenate(words)[:count] >> 8).reshape(shape)
