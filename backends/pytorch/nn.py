"""The building blocks of `train.py` on PyTorch: float32 masters that are read in the compute precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backends.pytorch import runtime
from backends.pytorch.indexing import rows

ModuleList = torch.nn.ModuleList


class Module(torch.nn.Module):
    """A `torch.nn.Module` whose parameters arrive in the compute precision when `forward` reads them.

    The cast is part of the graph, so gradients reach the float32 masters (which `named_parameters` still gives).
    """

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value.to(runtime.dtype) if isinstance(value, torch.nn.Parameter) else value


def Parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
    """A float32 array of zeros to be trained."""
    return torch.nn.Parameter(torch.zeros(shape, device=runtime.device))


class Linear(Module):
    """y = x @ weight.T for `weight` of shape (n_out, n_in); no bias."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = Parameter((n_out, n_in))

    def forward(self, x):
        return F.linear(x, self.weight)


class Embedding(Module):
    """Rows of `weight` (n, dim) for integer tokens of any shape; output in the compute precision."""

    def __init__(self, n: int, dim: int):
        super().__init__()
        self.weight = Parameter((n, dim))

    def forward(self, tokens):
        # The rows are cast, not the table: the gradient is summed over repeated tokens in float32.
        return rows(self._parameters["weight"], tokens).to(runtime.dtype)


class ModuleDict(torch.nn.ModuleDict):
    """Modules by name."""

    def __init__(self, modules: dict):
        if numeric := [key for key in modules if key.isdigit()]:
            raise ValueError(
                f"ModuleDict key {numeric[0]!r} is purely numeric, which MLX takes for a list index: "
                f"use a name such as 'layer{numeric[0]}'"
            )
        super().__init__(modules)
