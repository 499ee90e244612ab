"""What MLX runs on here, and the precision it is fastest in, found by trial."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import mlx.core as mx
import numpy as np

from backends import machine, trials
from backends.interface import BackendError, Device

# In order of preference: one that comes later has to be clearly faster, because it keeps fewer digits or, float16,
# a smaller range.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
CLEARLY = 1.1
# n and calls in a row. The same for every precision and long enough that another program's turns on the GPU, which
# delay any call by as much, don't hide the difference.
TRIAL_SIZES = {"cpu": (256, 1), "gpu": (4096, 10)}
LONG_ENOUGH = 1.0  # seconds in all


def open_device(precision: str | None = None) -> Device:
    """Chooses GPU or CPU (`AUTORESEARCH_DEVICE=cpu`), makes it MLX's default, and measures it."""
    if precision is not None and precision not in TOLERANCE:
        raise BackendError(f"unknown precision {precision!r}: choose one of {', '.join(TOLERANCE)}")
    kind = _choose_kind()
    mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
    if recommended := working_set(kind):
        _limit_memory(recommended)
    name, memory = _name(), _memory(kind)
    slug = machine.slug(name, memory, cpu=kind == "cpu")
    rates, notes = trials.remember(f"{slug} mlx {mx.__version__} {kind}: precision", _try_precisions)
    if not rates or (precision and precision not in rates):
        raise BackendError(f"MLX gives wrong products on this device in {precision or 'every precision'}: "
                           + "; ".join(notes))
    chosen = precision or _prefer(rates)
    return Device(name=name, slug=slug, kind=kind, memory=memory,
                  precision=chosen, peak_flops=rates[chosen][0], versions=_versions(),
                  notes=(*_warnings(kind), *notes, f"precision {chosen}, {'asked for' if precision else 'by trial'}"))


def working_set(kind: str) -> int | None:
    """Bytes that a program should use at most on a Mac's GPU, beyond which the system swaps; None elsewhere."""
    return int(_device_info()["max_recommended_working_set_size"]) if kind == "metal" else None


def is_out_of_memory(error: BaseException) -> bool:
    """MLX has no error class of its own; these are what its allocators and the drivers say.

    Its CPU build says nothing: there an array too large ends the process.
    """
    signs = ("unable to allocate", "attempting to allocate", "out of memory", "outofmemory", "insufficient memory",
             "memoryallocation", "bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs))


def _choose_kind() -> str:
    available = "metal" if mx.metal.is_available() else "cuda" if _has_cuda() else "cpu"
    wanted = os.environ.get("AUTORESEARCH_DEVICE") or available
    if wanted not in ("cpu", available):
        raise BackendError(f"AUTORESEARCH_DEVICE={wanted}, but MLX offers {available} here: set cpu, or nothing")
    return wanted


def _has_cuda() -> bool:
    return mx.cuda.is_available()


def _warnings(kind: str) -> list[str]:
    """What to say of a CPU that nobody asked for."""
    if kind != "cpu" or os.environ.get("AUTORESEARCH_DEVICE") == "cpu":
        return []
    return ["WARNING: MLX has neither Metal nor CUDA here and runs on the CPU, many times slower. For an NVIDIA GPU "
            'install "mlx[cuda13]"; on a CPU PyTorch is faster: AUTORESEARCH_BACKEND=sdpa']


def _limit_memory(recommended: int) -> None:
    """Keeps a Mac from swapping, which costs more than any allocation.

    By default MLX goes up to 1.5 times the working set that Metal recommends.
    """
    mx.set_memory_limit(recommended)
    mx.set_cache_limit(recommended // 2)
    mx.set_wired_limit(recommended)  # what is resident is not paged out between steps; nothing before macOS 15


def _try_precisions() -> tuple[dict[str, tuple[float, float]], list[str]]:
    """For each precision that is right: its product rate (FLOP/s) and the rate of an MLP; and a note on each."""
    rates, notes = {}, []
    for name in TOLERANCE:
        error = _product_error(getattr(mx, name))
        if not error <= TOLERANCE[name]:  # so written that NaN is refused
            notes.append(f"{name}: wrong, relative error of a product {error:.1e}")
            continue
        rates[name] = _rates(getattr(mx, name))
        notes.append(f"{name}: product {rates[name][0] / 1e9:.0f} GFLOP/s, MLP {rates[name][1] / 1e9:.0f} GFLOP/s")
    return rates, notes


def _prefer(rates: dict[str, tuple[float, float]]) -> str:
    """By the MLP, which moves activations too: there, half precision pays even where its products are no faster."""
    best = None
    for name, (_, rate) in rates.items():
        if best is None or rate > CLEARLY * rates[best][1]:
            best = name
    return best


def _product_error(dtype: mx.Dtype, n: int = 96) -> float:
    a, b = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
    try:
        product = np.array((mx.array(a).astype(dtype) @ mx.array(b).astype(dtype)).astype(mx.float32))
    except RuntimeError as error:  # no kernel for this precision
        if is_out_of_memory(error):
            raise  # of this moment, not of the device
        return float("inf")
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.linalg.norm(product - exact) / np.linalg.norm(exact))


def _rates(dtype: mx.Dtype) -> tuple[float, float]:
    """FLOP/s of products of (n, n) matrices, and of pairs of them with a squared ReLU and a norm between."""
    n, calls = TRIAL_SIZES["cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"]
    x = (mx.random.normal((n, n)) * n**-0.5).astype(dtype)

    def product(y):
        return y @ x

    def mlp(y):
        return mx.fast.rms_norm(mx.square(mx.maximum(y @ x, 0)), None, 1e-6) @ x

    return tuple(2 * products * n**3 / _seconds(layer, x, calls) for products, layer in ((1, product), (2, mlp)))


def _seconds(layer, x: mx.array, calls: int, repeats: int = 7) -> float:
    """For one call of a layer in a chain of several: the shortest of a few, after one that may build kernels."""
    times = []
    while len(times) < 3 or (len(times) <= repeats and sum(times) < LONG_ENOUGH):
        start, y = time.perf_counter(), x
        for _ in range(calls):
            y = layer(y)
        mx.eval(y)
        times.append(time.perf_counter() - start)
    return min(times[1:]) / calls


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


def _versions() -> dict[str, str]:
    versions = {"mlx": mx.__version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions
