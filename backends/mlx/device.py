"""What MLX runs on here, and how much memory that has."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import mlx.core as mx

from backends import interface, machine
from backends.interface import BackendError, Hardware


def identify() -> Hardware:
    """Chooses GPU or CPU (`AUTORESEARCH_DEVICE=cpu`) and makes it MLX's default."""
    kind = _choose_kind()
    mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
    if recommended := working_set(kind):
        _limit_memory(recommended)
    name, memory = _name(), _memory(kind)
    installed = machine.nvidia_memory() if kind == "cuda" else machine.installed_memory()
    return Hardware("mlx", name, machine.slug(name, installed or memory, cpu=kind == "cpu"), kind, memory, versions())


def free_memory(kind: str) -> int:
    """Bytes that a run can have now: on a Mac within the working set, which the GPU shares with the system."""
    if kind == "metal":
        return min(machine.available_memory(), working_set(kind))
    if kind == "cuda":
        info = _device_info()
        return int(info.get("free_memory") or info.get("total_memory") or info["memory_size"])
    return machine.available_memory()


def working_set(kind: str) -> int | None:
    """Bytes that a program should use at most on a Mac's GPU, beyond which the system swaps; None elsewhere."""
    return int(_device_info()["max_recommended_working_set_size"]) if kind == "metal" else None


def is_out_of_memory(error: BaseException) -> bool:
    """MLX has no error class of its own. Its CPU build says nothing: there an array too large ends the process."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and interface.says_no_memory(str(error)))


def _choose_kind() -> str:
    available = "metal" if mx.metal.is_available() else "cuda" if _has_cuda() else "cpu"
    wanted = os.environ.get("AUTORESEARCH_DEVICE") or available
    if wanted not in ("cpu", available):
        raise BackendError(f"AUTORESEARCH_DEVICE={wanted}, but MLX offers {available} here: set it to cpu, or unset it")
    return wanted


def _has_cuda() -> bool:
    return mx.cuda.is_available()


def warnings(kind: str) -> list[str]:
    """What to say of a CPU that nobody asked for."""
    if kind != "cpu" or os.environ.get("AUTORESEARCH_DEVICE") == "cpu":
        return []
    return [
        "WARNING: MLX has neither Metal nor CUDA here and runs on the CPU, many times slower. For an NVIDIA GPU "
        'install "mlx[cuda13]"; on a CPU PyTorch is faster: AUTORESEARCH_BACKEND=sdpa'
    ]


def _limit_memory(recommended: int) -> None:
    """Keeps a Mac from swapping, which costs more than any allocation.

    By default MLX goes up to 1.5 times the working set that Metal recommends.
    """
    mx.set_memory_limit(recommended)
    mx.set_cache_limit(recommended // 2)
    mx.set_wired_limit(recommended)  # what is resident is not paged out between steps; nothing before macOS 15


def _name() -> str:
    name = _device_info().get("device_name") or ""
    return name if name.startswith(("Apple M", "NVIDIA")) else machine.processor_name()


def _memory(kind: str) -> int:
    info = _device_info()
    if kind != "cpu" and (size := info.get("memory_size") or info.get("total_memory")):
        return int(size)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_info() -> dict:
    return dict(mx.device_info())


def versions() -> dict[str, str]:
    found = {"mlx": mx.__version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
