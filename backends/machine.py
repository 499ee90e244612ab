"""What the machine calls itself: names for tags and logs. What it can do is measured elsewhere.

Nothing here fails: where the system or a vendor's tool does not answer, less is known.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil

MEMORY_BLOCKS = Path("/sys/devices/system/memory")
DEVICE_TREE = Path("/proc/device-tree/model")
CGROUP = Path("/sys/fs/cgroup")


def asked(*command: str) -> str:
    """What a system's tool prints, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processor_name() -> str:
    """The CPU's marketing name; on a Mac, the chip's."""
    if platform.system() == "Darwin":
        return asked("sysctl", "-n", "machdep.cpu.brand_string") or "Apple"
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def jetson() -> str | None:
    """The name of a Jetson board: "NVIDIA Jetson Orin Nano Developer Kit"."""
    try:
        model = DEVICE_TREE.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return None
    return model if "jetson" in model.lower() else None


def installed_memory() -> int:
    """Bytes of memory in the machine: where Linux tells it, all of it, not what the kernel left, which varies."""
    try:
        size = int((MEMORY_BLOCKS / "block_size_bytes").read_text(), 16)
        online = [(block / "online").read_text().strip() == "1" for block in MEMORY_BLOCKS.glob("memory[0-9]*")]
    except (OSError, ValueError):
        online = []
    total = psutil.virtual_memory().total
    return size * sum(online) if online and size * sum(online) >= total else total


def available_memory() -> int:
    """Bytes that a program can have now without swapping: what is free, within the limit of a container."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # A cache of files counts as used, and is given up when asked for.
        files = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        return min(available, limit - used + (int(files.group(1)) if files else 0))
    except (OSError, ValueError):  # none, or "max"
        return available


def peak_resident() -> int:
    """The most bytes of memory this process has had. On Linux not by getrusage, which begins with the parent's."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def nvml():
    """NVIDIA's management library (pynvml), started, or None where it is not there or does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver, one of another version
        yield None
        return
    try:
        yield pynvml
    finally:
        try:
            pynvml.nvmlShutdown()
        except Exception:
            pass


def visible_gpus() -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES, indices or UUIDs, in the order that CUDA numbers them by."""
    return [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]


def nvidia_handle(library, uuid: str | None = None, index: int = 0):
    """NVML's handle of a GPU, by its UUID where that is known (NVML does not follow CUDA_VISIBLE_DEVICES); or None."""
    try:
        if uuid:
            return library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        visible = visible_gpus()
        return named_gpu(library, visible[index] if visible else str(index))
    except Exception:  # an old driver, a slice of a GPU, a Jetson
        return None


def named_gpu(library, entry: str):
    """NVML's handle of the GPU that an entry of CUDA_VISIBLE_DEVICES names. Raises what NVML raises."""
    return (
        library.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else library.nvmlDeviceGetHandleByUUID(entry)
    )


def nvidia_memory(uuid: str | None = None, index: int = 0) -> int | None:
    """Bytes of an NVIDIA GPU's memory as its name has it; CUDA reports a per cent less."""
    with nvml() as library:
        handle = library and nvidia_handle(library, uuid, index)
        try:
            return int(library.nvmlDeviceGetMemoryInfo(handle).total) if handle else None
        except Exception:
            return None


def slug(name: str, memory: int, cpu: bool = False) -> str:
    """A tag from a name and bytes of memory: "apple-m4-16gb", "nvidia-rtx-3090-24gb", "cpu-amd-epyc-2c-24gb"."""
    name = re.sub(
        r"\((r|tm)\)|geforce|processor|\bcpu\b|@.*|\d+-core|\d+ ?gb\b|developer kit|engineering reference",
        " ",
        name.lower(),
    )
    words = re.findall(r"[a-z0-9.]+", f"cpu {name} {os.cpu_count()}c" if cpu else name)
    return "-".join([*words, f"{math.ceil(memory / 2**30)}gb"])
