"""Random numbers of a training pass, as `backends/operations.py` specifies them, in integer arithmetic.

Which pass this is stands in a scalar on the device, which the Trainer changes in place: a compiled or captured pass
reads it anew each time.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch

from backends import operations
from backends.pytorch import runtime

_pass: torch.Tensor | None = None  # how many passes came before this one; None outside of training


def counter() -> torch.Tensor:
    """For a Trainer to count its passes in: 0."""
    return torch.zeros((), dtype=torch.int32, device=runtime.device)


@contextmanager
def drawing(passes: torch.Tensor):
    """Within it `passes` is the number of this pass: for its forward and its backward half, which may draw again."""
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
    return _bits(shape, key).float() * 2.0**-24


def dropout(x, rate, key):
    operations.check_rate(rate)
    if _pass is None or rate == 0:
        return x
    return torch.where(_bits(x.shape, key) >= round(rate * 2**24), x / (1 - rate), 0)


def _bits(shape, key):
    """The upper 24 bits of each number drawn, as integers."""
    first, second = operations.generator_key(key)
    count = math.prod(shape)
    half = (count + 1) // 2
    places = torch.arange(half, dtype=torch.int32, device=_pass.device)
    words = operations.threefry(
        (_pass + _signed(first), torch.full_like(_pass, _signed(second))),
        (places, places + half),
        word=lambda x: x,  # sums of 32 bits wrap
        rotated=lambda x, by: x << by | x >> (32 - by) & (1 << by) - 1,
    )
    return (torch.cat(words)[:count] >> 8 & 0xFFFFFF).reshape(shape)


def _signed(word: int) -> int:
    """The number that these 32 bits are with a sign."""
    return word - 2**32 if word >= 2**31 else word
