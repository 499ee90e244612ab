"""Which device PyTorch runs on here, and what it can do: found by trial, not by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import torch

from backends import machine
from backends.interface import BackendError
from backends.pytorch import runtime

GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick() -> torch.device:
    """The device `AUTORESEARCH_DEVICE` names, else a GPU that PyTorch can use, else the CPU.

    Raises:
        BackendError: the named device isn't there; or there is an NVIDIA GPU that this PyTorch can't use.
    """
    wanted = os.environ.get("AUTORESEARCH_DEVICE")
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if wanted:
        kind, _, index = wanted.partition(":")
        if kind not in available or (kind == "cuda" and index and int(index) >= torch.cuda.device_count()):
            raise BackendError(f"AUTORESEARCH_DEVICE={wanted}: PyTorch {torch.__version__} has here only "
                               f"{', '.join(available)}")
        return torch.device(wanted)
    if available == ["cpu"] and (gpu := nvidia_gpu()):
        raise BackendError(
            f"{gpu} is here, but PyTorch {torch.__version__} cannot use it "
            f"({'it was built without CUDA' if torch.version.cuda is None else 'its CUDA finds no device'}). Install "
            "the CUDA build for your driver (https://pytorch.org/get-started/locally) or update the driver; to run on "
            "the CPU all the same, set AUTORESEARCH_DEVICE=cpu")
    return torch.device(available[-1])


def nvidia_gpu() -> str | None:
    """The name of an NVIDIA GPU in this machine, whether or not PyTorch can use it."""
    if shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                                    text=True, timeout=20)
            if listed.returncode == 0 and listed.stdout.strip():
                return listed.stdout.splitlines()[0].strip()
        except (OSError, subprocess.TimeoutExpired):
            pass
    if any(GPUS_OF_THE_DRIVER.glob("*")):  # a container without the driver's tools, or tools of another version
        return "An NVIDIA GPU"
    return "An NVIDIA Jetson" if Path("/etc/nv_tegra_release").exists() else None


def identify(device: torch.device) -> tuple[str, str, int]:
    """(name, slug, bytes of memory), e.g. ("NVIDIA H200", "nvidia-h200-141gb", 150_000_000_000)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = machine.processor_name(), psutil.virtual_memory().total
    return name, machine.slug(name, memory, cpu=device.type == "cpu"), memory


def measure_precisions(device: torch.device) -> dict[str, float | str]:
    """Matrix-product rate in FLOP/s of each precision whose product is right here, or why it isn't usable."""
    results = {}
    size = 512 if device.type == "cpu" else 4096
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    wanted = a[:64] @ b
    for name, dtype in PRECISIONS.items():
        try:
            x, y = a.to(device, dtype), b.to(device, dtype)
            error = float(((x @ y)[:64].float().cpu() - wanted).norm() / wanted.norm())
            if not error < {"float32": 1e-3}.get(name, 1e-2):
                results[name] = f"wrong: relative error {error:.1e}"
                continue
            results[name] = 6 * size**3 / _seconds_per_layer(x, y, device)
        except Exception as error:  # whatever a driver raises, this precision is not for this device
            results[name] = runtime.first_line(error)
    return results


def choose_precision(rates: dict[str, float | str]) -> str:
    """The fastest usable precision; float16, which overflows, only where it is 1.2 times bfloat16 or better."""
    usable = {name: rate for name, rate in rates.items() if not isinstance(rate, str)}
    if not usable:
        raise BackendError(f"no precision gives right matrix products on this device: {rates}")
    handicapped = {name: rate / (1.2 if name == "float16" else 1.0) for name, rate in usable.items()}
    return max(handicapped, key=handicapped.get)


def _seconds_per_layer(x, y, device, repeats=10):
    """The three products of a linear layer (forward and the two of its gradient): the shortest of some repeats, because
    what else the machine does only makes them longer."""
    inner, times = (1 if device.type == "cpu" else 10), []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(inner):
            x @ y.T, x @ y, x.T @ y
        synchronize(device)
        times.append((time.perf_counter() - start) / inner)
        if times[-1] > 0.5:  # a precision this slow is not going to be chosen
            break
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def compiler_works(device: torch.device) -> str | bool:
    """True, or why torch.compile does not work here (no Triton, no C++ compiler, an old driver)."""
    if device.type == "mps":
        return "is a prototype on MPS"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda t: (t * 2).relu().sum(), fullgraph=True)(x).backward()
        return bool(torch.equal(x.grad, torch.full_like(x, 2))) or "wrong result"
    except Exception as error:
        return runtime.first_line(error)
