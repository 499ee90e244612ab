"""NVIDIA's Hopper (H100, H200): what `sdpa` does, with Flash Attention 3 where some build of it works here."""

from __future__ import annotations

import functools

from backends import sdpa
from backends.interface import BackendError, Calibrated, Hardware

HOPPER = 9, 0  # compute capability


def open_backend(precision: str | None, compiled: bool | None, calibrated: Calibrated | None, fetch: bool):
    """The backend on a Hopper GPU. Raises BackendError on anything else, and where PyTorch is missing or unusable."""
    backend = _backend()
    from backends.cuda import providers

    return backend.open_backend(
        "cuda", precision, compiled, calibrated, functools.partial(providers.attention, fetch=fetch)
    )


def identify() -> Hardware:
    """The device that `open_backend` would take; it raises as that does."""
    return _backend().identify("cuda")


def is_here() -> bool:
    """Whether the device that PyTorch would take is a Hopper GPU. False where PyTorch can't say."""
    try:
        return _capability(sdpa.pytorch()) == HOPPER
    except BackendError:  # said by the backend that is opened instead
        return False


def _backend():
    backend = sdpa.pytorch()
    if _capability(backend) != HOPPER:
        name = backend.identify("cuda").name
        raise BackendError(
            f"backend cuda needs a Hopper GPU (compute capability 9.0); this is {name}: set "
            "AUTORESEARCH_BACKEND=sdpa, or unset it to take the best that works here"
        )
    return backend


def _capability(backend) -> tuple[int, int] | None:
    """The compute capability of the device that PyTorch would take, if it is NVIDIA's."""
    import torch

    device = backend.devices.pick()
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's MI300 has a 9 in its capability, too
        return None
    return torch.cuda.get_device_capability(device)
