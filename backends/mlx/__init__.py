"""MLX: Apple Silicon first; the same code runs on MLX's CPU and CUDA builds. Contract: `backends/interface.py`."""

from __future__ import annotations

import os
import sys

from backends.interface import Backend, BackendError, Calibrated, Hardware


def open_backend(precision: str | None, compiled: bool | None, calibrated: Calibrated | None, fetch: bool) -> Backend:
    """The MLX backend on this machine's GPU, or its CPU where there is none.

    Args:
        precision: "float32", "bfloat16" or "float16"; None takes the best that calibration or a short trial finds.
        compiled: whether to compile the step; None does where that pays, on a GPU.

    Raises:
        BackendError: MLX is not installed, is too old, or cannot use the device or precision asked for.
    """
    _import_mlx()
    from backends.mlx.backend import MlxBackend

    return MlxBackend(precision, compiled, calibrated)


def identify() -> Hardware:
    """The device that `open_backend` would take; it raises as that does."""
    _import_mlx()
    from backends.mlx import device

    return device.identify()


def _import_mlx() -> None:
    # Settings that MLX reads once. Float32 products, else made of 10-bit mantissas on CUDA and on the newest Macs, stay
    # exact; and on CUDA fewer operations in flight hold less: 6.5 instead of 11.0 GB on an H200, no slower.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if sys.platform != "darwin":
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"the mlx backend needs MLX, which can't be imported ({error}). On a Mac with Apple Silicon: pip install "
            'mlx. On Linux: pip install "mlx[cpu]", or "mlx[cuda13]" for an NVIDIA GPU.'
        ) from error
