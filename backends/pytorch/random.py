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
    """The counter in which a Trainer counts its passes, at 0."""
    return torch.zeros((), dtype=torch.int64, device=runtime.device)


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
    word = operations.generator_key(key)
    counters = torch.arange(math.prod(shape), device=_pass.device) + (_pass << 32)
    signed = word - 2**64 if word >= 2**63 else word
    return (operations.squares(counters, signed, upper=lambda x: x >> 32 & 0xFFFFFFFF) >> 8).reshape(shape)
