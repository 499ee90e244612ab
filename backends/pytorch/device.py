"""Which device PyTorch runs on here, and what it can do: found by trial, not by name."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from backends import bench, machine, trials
from backends.interface import BackendError

GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OTHER_BUILD = (
    "Install the build for your driver: pip install uv, then uv pip install --torch-backend=auto --reinstall-package "
    "torch torch; or update the driver. To run on the CPU instead, set AUTORESEARCH_DEVICE=cpu"
)


def pick() -> torch.device:
    """The device `AUTORESEARCH_DEVICE` names, else a GPU that PyTorch can use, else the CPU.

    Raises:
        BackendError: the named device isn't there; or there is an NVIDIA GPU that this PyTorch can't use.
    """
    wanted = os.environ.get("AUTORESEARCH_DEVICE")
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if wanted:
        kind, numbered, index = wanted.partition(":")
        known = map(str, range(torch.cuda.device_count() if kind == "cuda" else 1))
        if kind not in available or (numbered and index not in known):
            why = f" ({without_cuda()})" if kind == "cuda" and kind not in available else ""
            raise BackendError(
                f"AUTORESEARCH_DEVICE={wanted}: PyTorch {torch.__version__} has here only {', '.join(available)}{why}"
            )
        return torch.device(wanted)
    if available == ["cpu"] and (gpu := nvidia_gpu()):
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is not None and torch.version.cuda:
            raise BackendError(
                f"CUDA_VISIBLE_DEVICES={shown} shows PyTorch no GPU of this machine ({gpu}): unset it, or set it to a "
                "GPU's number or UUID (nvidia-smi -L). To run on the CPU, set AUTORESEARCH_DEVICE=cpu"
            )
        raise BackendError(
            f"this machine has a GPU ({gpu}), but PyTorch {torch.__version__} cannot use it ({without_cuda()}). "
            f"{OTHER_BUILD}"
        )
    return torch.device(available[-1])


def without_cuda() -> str:
    """Why PyTorch finds no CUDA device: of an old driver it tells the version."""
    if torch.version.cuda is None:
        return "it was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"built for CUDA {torch.version.cuda}, it says: {str(error).strip().split('. ')[0]}"
    return "its CUDA finds no device"


def nvidia_gpu() -> str | None:
    """The name of an NVIDIA GPU in this machine, whether or not PyTorch can use it."""
    if shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run(
                ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            if listed.returncode == 0 and listed.stdout.strip():
                return listed.stdout.splitlines()[0].strip()
        except (OSError, subprocess.TimeoutExpired):
            pass
    if any(GPUS_OF_THE_DRIVER.glob("*")):  # a container without the driver's tools, or tools of another version
        return "NVIDIA"
    return "NVIDIA Jetson" if Path("/etc/nv_tegra_release").exists() else None


def notes(device: torch.device) -> list[str]:
    """What to say of a CPU beside a GPU of AMD's. That is no error: the processor itself may hold one, too small."""
    if device.type != "cpu" or os.environ.get("AUTORESEARCH_DEVICE") or torch.version.hip:
        return []
    with suppress(OSError):
        if any(int(path.read_text() or 0) for path in machine.AMD_NODES.glob("*/gpu_id")):  # 0 for a CPU
            return [
                f"WARNING: this runs on the CPU. There is an AMD GPU, too, but PyTorch {torch.__version__} was built "
                "without ROCm: to use it, install PyTorch's build for ROCm, or set AUTORESEARCH_DEVICE=cpu"
            ]
    return []


def identify(device: torch.device) -> tuple[str, str, int]:
    """(name, slug, bytes of memory), e.g. ("NVIDIA H200", "nvidia-h200-141gb", 150_000_000_000)."""
    if device.type != "cuda":
        name, memory = machine.processor_name(), machine.installed_memory()
        return name, machine.slug(name, memory, cpu=device.type == "cpu"), psutil.virtual_memory().total
    if board := machine.jetson():  # whose GPU has no memory of its own
        return board, machine.slug(board, machine.installed_memory()), psutil.virtual_memory().total
    properties = torch.cuda.get_device_properties(device)
    memory = machine.nvidia_memory(uuid(device), device.index or 0) if torch.version.cuda else None
    return properties.name, machine.slug(properties.name, memory or properties.total_memory), properties.total_memory


def uuid(device: torch.device) -> str | None:
    """A GPU's own identifier, where this PyTorch tells it."""
    found = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(found) if found else None


def keep_to_itself(device: torch.device) -> None:
    """What is tried and compiled for a device is kept under AUTORESEARCH_HOME, where a restart finds it; for each GPU
    apart, so that experiments on two of them share no file. Compilers' folders that the user has named stay."""
    own = uuid(device) if device.type == "cuda" else None
    trials.owner = f"-{own}" if own else ""
    for name in ("torchinductor", "triton"):
        os.environ.setdefault(f"{name.upper()}_CACHE_DIR", str(trials.cache() / f"{name}{trials.owner}"))


def versions(device: torch.device) -> dict[str, str]:
    found = {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    if device.type == "cpu":
        found["instructions"] = _instructions()
    return found


def _instructions() -> str:
    """What a CPU computes with. Processors of several generations have one name in a virtual machine, where only some
    have bfloat16."""
    known = [torch.backends.cpu.get_cpu_capability()]
    for name in ("avx512_bf16", "amx_tile"):
        with suppress(AttributeError):  # a function of PyTorch's own, by name
            known += [name] * getattr(torch.cpu, f"_is_{name}_supported")()
    return " ".join(known)


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one. It would give it back to the system and fetch it again page by
    page, more or less of it by chance of where arrays lie, which costs some runs a third of their steps. Other systems
    have allocators of their own."""
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL("libc.so.6").mallopt
        set_option(M_TRIM_THRESHOLD, -1)
        set_option(M_MMAP_MAX, 0)  # large arrays come from what is kept, too


def give_back_freed_memory() -> None:
    """For other processes, what `keep_freed_memory` kept."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that a run can have now. Of memory that a GPU shares with the system, what is free includes caches."""
    if device.type == "cuda" and not getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return min(machine.available_memory(), torch.mps.recommended_max_memory())
    return machine.available_memory()


def clock_rate(device: torch.device) -> float | None:
    """Hz of a GPU's processors now; None without the vendor's library, and on a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.cuda:  # PyTorch takes CUDA's index for NVML's, which numbers cards by the bus
        return machine.nvidia_clock_rate(uuid(device), device.index or 0)
    with suppress(Exception):  # AMD's library raises by card, driver and permission
        return 1e6 * torch.cuda.clock_rate(device)
    return None


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at once since `forget_peak_memory`, or the start where a peak can't be forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # Metal keeps no peak; the allocator gives little back
    return machine.peak_resident()


def forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        # Not by `torch.mps.synchronize`: it waits with Python's lock held, which looks like a pause (disturbance.py).
        torch.zeros((), device=device).item()


def configure_compiler() -> None:
    torch._dynamo.config.cache_size_limit = 64  # a step of other shapes is compiled for each of them
    torch._dynamo.config.automatic_dynamic_shapes = False  # only what is marked
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):
        torch._dynamo.config.run_gc_after_compile = False  # `prepare.Clock` has the garbage collected, once
    import torch._functorch.config as autograd

    # Without this a graph with an autograd.Function of ours is differentiated anew at each start, which takes longer
    # than all else that a compiled step needs when its kernels are there already.
    if hasattr(autograd, "autograd_cache_allow_custom_autograd_functions"):
        autograd.autograd_cache_allow_custom_autograd_functions = True


# What the compiler does at its first graph, and keeps, as (module, function).
ASIDE = {
    "cuda": [("torch._inductor.async_compile", "maybe_warm_pool")],  # starts helpers, which takes seconds
    "cpu": [("torch._inductor.cpu_vec_isa", "pick_vec_isa")],  # tries the processor's instructions in another Python
}
DIGESTS = [("triton.runtime.cache", "triton_key"), ("torch._inductor.codecache", "torch_key")]  # of half a gigabyte


def load_compiler(device: torch.device) -> threading.Thread:
    """Imports the compiler, whose modules take a second, and has it do what it does once: beside what waits for a
    GPU, the disk or numpy. To be joined before anything is compiled."""

    def load():
        with suppress(Exception):  # whoever compiles is told
            importlib.import_module("torch._inductor.compile_fx")
        for module, function in [*ASIDE.get(device.type, ()), *DIGESTS]:
            with suppress(Exception):
                getattr(importlib.import_module(module), function)()

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    return thread


class Copy:
    """A scalar on its way from a GPU to the host. `float(tensor)` would also wait for all that was queued after it."""

    def __init__(self, scalar):
        self._value = torch.empty((), dtype=torch.float32, pin_memory=True)
        self._value.copy_(scalar.detach(), non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)  # asleep: what spins is made to wait where cores are busy
        self._event.record()

    def __float__(self):
        self._event.synchronize()
        return float(self._value)


def compiler_works(device: torch.device) -> str | bool:
    """True, or why torch.compile does not work here (no Triton, no C++ compiler, an old driver)."""
    if device.type == "mps":
        return "is a prototype on MPS"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda t: (t * 2).relu().sum(), fullgraph=True)(x).backward()
        return bool(torch.equal(x.grad, torch.full_like(x, 2))) or "wrong result"
    except Exception as error:
        return bench.first_line(error)
