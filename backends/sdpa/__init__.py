"""Everything PyTorch runs on, with its own kernels: NVIDIA and AMD GPUs, Jetson, Apple's MPS and plain CPUs."""

from __future__ import annotations

from backends.interface import BackendError, Calibrated, Hardware


def open_backend(precision: str | None, compiled: bool | None, calibrated: Calibrated | None, fetch: bool):
    """The backend on this machine's best PyTorch device. Raises BackendError where PyTorch is missing or unusable."""
    return pytorch().open_backend("sdpa", precision, compiled, calibrated)


def identify() -> Hardware:
    """The device that `open_backend` would take; it raises as that does."""
    return pytorch().identify("sdpa")


def pytorch():
    """The module `backends/pytorch/backend.py`. Raises BackendError where PyTorch is missing."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"PyTorch can't be imported ({error}): pip install uv, then uv pip install --torch-backend=auto torch, "
            "which installs the build for your GPU"
        ) from error
    from backends.pytorch import backend

    return backend
