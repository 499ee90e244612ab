"""Kernels of our own, in Triton, for what PyTorch's compiler leaves in memory. Each is tried before it is used
(`trial.py`): it has to give the right numbers on this device, and to be faster there than plain operations."""

from __future__ import annotations

import torch


def processors(x: torch.Tensor) -> int:
    """Programs of a kernel that stays on its processor; two in the interpreter that tests run in."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
