"""What the machine calls itself: names for tags and logs. What it can do is measured elsewhere.

Nothing here fails: where the system or a vendor's tool does not answer, less is known.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath

import psutil

MEMORY_BLOCKS = Path("/sys/devices/system/memory")
DEVICE_TREE = Path("/proc/device-tree/model")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CHOOSING_GPUS = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # of its compute driver: one for each CPU and GPU
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CUDA_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
# Limit, what is used of it, and in memory.stat the files among that: by the files' names in a cgroup of each version.
LIMITS_V2 = ("memory.max", "memory.high"), "memory.current", "inactive_file"
LIMITS_V1 = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"


def told(path: Path) -> str | None:
    """What a file of the system says, without the blanks around it; None if it can't be read. Bytes that are not UTF-8
    stay what they are (as `os.fsdecode` has them): a mounted folder or a cgroup may have any name."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return None


def asked(*command: str) -> str:
    """What a system's tool prints, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processor_name() -> str:
    """The CPU's marketing name; on a Mac, the chip's."""
    if platform.system() == "Darwin":
        return asked("sysctl", "-n", "machdep.cpu.brand_string") or "Apple"
    named = re.search(r"^model name\s*:\s*(.+)$", told(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def jetson() -> str | None:
    """The name of a Jetson board: "NVIDIA Jetson Orin Nano Developer Kit"."""
    model = (told(DEVICE_TREE) or "").strip("\0")
    return model if "jetson" in model.lower() else None


@cache
def host() -> str:
    """A name of this computer while it is up: the same in all its containers, another on each computer that shares a
    home with it."""
    return told(BOOT_ID) or asked("sysctl", "-n", "kern.bootsessionuuid") or platform.node()


def installed_memory() -> int:
    """Bytes of memory in the machine: where Linux tells it, all of it, not what the kernel left, which varies."""
    try:
        size = int(told(MEMORY_BLOCKS / "block_size_bytes") or "", 16)
        online = [told(block / "online") == "1" for block in MEMORY_BLOCKS.glob("memory[0-9]*")]
    except ValueError:
        online = []
    total = psutil.virtual_memory().total
    return size * sum(online) if online and size * sum(online) >= total else total


def available_memory() -> int:
    """Bytes that a program can have now without swapping: what is free, within the limits of containers and jobs."""
    return max(min([psutil.virtual_memory().available, *_left_in_cgroups(), *_left_to_a_slurm_job()]), 0)


def _cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 1) of each cgroup that this process is in: its own, those around it, and that
    at the root, which is the container's own where the container has a namespace for them."""
    for line in (told(OWN_CGROUPS) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, own = CGROUPS / controller if controllers else CGROUPS, PurePosixPath(path).relative_to("/")
        yield from ((root / folder, bool(controllers)) for folder in (own, *own.parents))


def _left_in_cgroups() -> list[int]:
    """Bytes left in each cgroup that has a limit."""
    left = []
    for folder, old in _cgroups("memory"):
        limits, usage, files = LIMITS_V1 if old else LIMITS_V2
        try:
            used = int(told(folder / usage) or "")
        except ValueError:  # the root of all has none; a path of the host's is not seen in a container
            continue
        # A cache of files counts as used, and is given up when asked for.
        cached = re.search(rf"^{files} (\d+)", told(folder / "memory.stat") or "", re.MULTILINE)
        used -= int(cached[1]) if cached else 0
        left += [int(limit) - used for name in limits if (limit := told(folder / name) or "").isdigit()]
    return left


def quota() -> float:
    """How many processors' time this process gets at most, as containers limit it; infinity without such a limit."""
    least = math.inf
    for folder, old in _cgroups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if old else ("cpu.max",)
        with suppress(ValueError):  # "max", or there are no such files
            time, period = map(int, " ".join(told(folder / name) or "" for name in names).split())
            least = min(least, time / period) if time > 0 < period else least
    return least


def _left_to_a_slurm_job() -> list[int]:
    """Bytes left of what Slurm gave this job on this node: some clusters end it for more, without any cgroup."""
    try:
        megabytes = int(os.environ.get("SLURM_MEM_PER_NODE") or 0)
        megabytes = megabytes or int(os.environ["SLURM_MEM_PER_CPU"]) * int(os.environ["SLURM_CPUS_ON_NODE"])
    except (KeyError, ValueError):
        return []
    return [megabytes * 2**20 - psutil.Process().memory_info().rss] if megabytes else []  # 0: all of the node's


def peak_resident() -> int:
    """The most bytes of memory this process has had. On Linux not by getrusage, which begins with the parent's."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    peak = re.search(r"^VmHWM:\s*(\d+) kB", told(Path("/proc/self/status")) or "", re.MULTILINE)
    if peak:
        return int(peak[1]) * 1024
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
    """The entries of CUDA_VISIBLE_DEVICES, indices or UUIDs, in the order that CUDA numbers them by. ROCm has another
    name for it, HIP_VISIBLE_DEVICES, whose indices are those of what ROCR_VISIBLE_DEVICES leaves."""
    cuda, hip, rocr = (
        [entry.strip() for entry in os.environ.get(f"{name}_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        for name in ("CUDA", "HIP", "ROCR")
    )
    if not AMD_NODES.exists():  # a scheduler may set them all
        return cuda
    left = {str(index): entry for index, entry in enumerate(rocr)}
    return [left.get(entry, entry) for entry in cuda or hip] or rocr


def gpu_name(index: int = 0) -> str:
    """The one name of a GPU: its UUID, "GPU-..." or, of a slice, "MIG-...", where that can be found out; else the
    index, or the entry of CUDA_VISIBLE_DEVICES.

    Args:
        index: CUDA's, in this process: within CUDA_VISIBLE_DEVICES, and by default the fastest GPU first. NVML numbers
            GPUs by their place on the bus, so that none of its indices can be taken for CUDA's.
    """
    visible = visible_gpus()
    entry = visible[index] if index < len(visible) else str(index)
    own = _uuid_by_cuda(index)
    with nvml() as library:
        if library is None:
            return f"GPU-{own}" if own else entry
        with suppress(Exception):  # NVML raises by card, driver and permission
            return text(library.nvmlDeviceGetUUID(_handle(library, own or entry)))
    return f"GPU-{own}" if own else entry


def _uuid_by_cuda(index: int) -> str | None:
    """The UUID of a GPU, or of a slice of one, as CUDA's driver has it; None without the driver."""
    for name in CUDA_DRIVERS:
        with suppress(OSError, AttributeError):  # no such library, or one from before CUDA 11.4
            driver = ctypes.CDLL(name)
            device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            answered = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
            if not answered and not driver.cuDeviceGetUuid_v2(ctypes.byref(found), device):  # 0 is success
                return str(uuid.UUID(bytes=bytes(found)))
    return None


def nvidia_handle(library, name: str | None = None, index: int = 0):
    """NVML's handle of a GPU, or None.

    Args:
        name: its UUID, whole or shortened, with or without "GPU-". index: CUDA's, for want of a name.
    """
    try:
        return _handle(library, name or gpu_name(index))
    except Exception:  # an old driver, a Jetson, an index of CUDA's where the cards differ
        return None


def _handle(library, name: str):
    """NVML's handle of the GPU, or the slice of one, of this name. Raises what NVML raises, and LookupError."""
    count = library.nvmlDeviceGetCount()
    if name.isdigit():
        # The same card in both orders: the only one, or by the bus.
        if count > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            raise LookupError(f"CUDA's index {name} is not NVML's")
        return library.nvmlDeviceGetHandleByIndex(int(name))
    prefixed = [name] if name.startswith(("GPU-", "MIG-")) else [f"GPU-{name}", f"MIG-{name}"]
    for whole in prefixed:
        with suppress(Exception):
            return library.nvmlDeviceGetHandleByUUID(whole)
    handles = [library.nvmlDeviceGetHandleByIndex(place) for place in range(count)]
    alike = [handle for handle in handles if text(library.nvmlDeviceGetUUID(handle)).startswith(prefixed[0])]
    if len(alike) != 1:
        raise LookupError(f"{len(alike)} GPUs are called {name}")
    return alike[0]


def card_of(library, handle):
    """The card's handle, of a slice's too (MIG): temperature, clocks and use are the card's."""
    with suppress(Exception):  # a whole card, or an NVML that knows of no slices
        return library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return handle


def nvidia_memory(name: str | None = None, index: int = 0) -> int | None:
    """Bytes of an NVIDIA GPU's memory as its name has it; CUDA reports a per cent less. Of a slice (MIG), its own."""
    with nvml() as library:
        handle = library and nvidia_handle(library, name, index)
        try:
            return int(library.nvmlDeviceGetMemoryInfo(handle).total) if handle else None
        except Exception:
            return None


def nvidia_clock_rate(name: str | None = None, index: int = 0) -> float | None:
    """Hz of an NVIDIA GPU's processors now; None where NVML does not tell."""
    if known := _lasting(name, index):
        library, card, _ = known
        with suppress(Exception):  # NVML raises by card, driver and permission
            return 1e6 * library.nvmlDeviceGetClockInfo(card, library.NVML_CLOCK_SM)
    return None


@cache
def _lasting(name: str | None, index: int):
    """NVML, a card of its, and what keeps it started: that takes longer than a question. None without it."""
    stack = ExitStack()
    library = stack.enter_context(nvml())
    handle = library and nvidia_handle(library, name, index)
    return (library, card_of(library, handle), stack) if handle else None


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def cores() -> float:
    """Processors that this process may use; a container may limit their time to a part of one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota())


def slug(name: str, memory: int, cpu: bool = False) -> str:
    """A tag from a name and bytes of memory: "apple-m4-16gb", "nvidia-rtx-3090-24gb", "cpu-amd-epyc-2c-24gb"."""
    name = re.sub(
        r"\((r|tm)\)|geforce|processor|\bcpu\b|@.*|\d+-core|\d+ ?gb\b|developer kit|engineering reference",
        " ",
        name.lower(),
    )
    words = re.findall(r"[a-z0-9.]+", f"cpu {name} {math.ceil(cores())}c" if cpu else name)
    return "-".join([*words, f"{math.ceil(memory / 2**30)}gb"])
