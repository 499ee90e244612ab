"""What machine this is, as its system and its vendor's tools tell. What they don't tell is listed as unknown."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from backends import machine
from backends.interface import Hardware

# NVML's reasons for lower clocks that are not the owner's own setting or an idle GPU (nvml.h, clocks event reasons).
THROTTLED_BY = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal limit (software)",
    0x40: "thermal limit (hardware)",
    0x80: "power brake",
}
POWER_CAP = 0x4  # what any GPU meets at full load, and met when it was calibrated
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
AMDGPU = Path("/sys/module/amdgpu/version")


def describe(hardware: Hardware) -> dict:
    """Facts about the machine: os, processor, cores, memory, power, driver, throttled; and `unknown`, a list of what
    could not be found out, with the reason."""
    facts = {
        "name": hardware.name, "kind": hardware.kind, "memory": hardware.memory, "os": operating_system(),
        "processor": machine.processor_name(), "cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False), "system_memory": machine.installed_memory(),
        "power": power_source(), "board": machine.jetson(),
    }  # fmt: skip
    facts |= of_device(hardware)
    unknown = facts.pop("unknown", [])
    unknown += [f"{name}: the system does not tell" for name in ("physical_cores", "power") if facts[name] is None]
    return {name: value for name, value in facts.items() if value is not None} | {"unknown": unknown}


def operating_system() -> str:
    """Like "Linux 6.8.0 (Ubuntu 24.04 LTS)"; a Linux inside Windows is called WSL."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    name = f"{platform.system()} {platform.release()}"
    if platform.system() == "Linux":
        try:
            name += f" ({platform.freedesktop_os_release()['PRETTY_NAME']})"
        except (OSError, KeyError):
            pass
        if in_wsl():
            name = name.replace("Linux", "WSL", 1)
    return name


def in_wsl() -> bool:
    """Whether this is a Linux inside Windows."""
    return platform.system() == "Linux" and "microsoft" in platform.release().lower()


def power_source() -> str | None:
    """ "mains" or "battery", or None where that can't be told; a machine without a battery runs on mains."""
    try:
        battery = psutil.sensors_battery()
    except Exception:  # psutil passes on what the system's files make it raise
        return None
    if battery is None:
        return "mains"
    return {True: "mains", False: "battery"}.get(battery.power_plugged)


def of_device(hardware: Hardware) -> dict:
    """driver, throttled (the reason, or False), other_processes on the device: as far as the vendor's tool tells."""
    if hardware.kind == "metal" or hardware.kind == "mps":
        return _apple()
    if hardware.kind == "cuda":
        if "hip" in hardware.versions.get("cuda", ""):
            return _amd()
        return _nvidia()
    return _processor()


def now(kind: str, gpu: str = "") -> dict:
    """What changes from minute to minute, as far as it can be read in milliseconds: throttled (the reason, if that is
    more than a power cap, or False); for an NVIDIA GPU also margin (degrees Celsius below the temperature at which it
    slows down) and in_use (share of the last second or less in which it computed, for any program).

    Args:
        kind: `Hardware.kind`. gpu: an entry of CUDA_VISIBLE_DEVICES.
    """
    if kind == "cuda":
        return _nvidia_now(gpu)
    speed = _apple_speed() if kind in ("metal", "mps") else _processor()
    return {name: value for name, value in speed.items() if name == "throttled"}


def _nvidia_now(gpu: str) -> dict:
    facts = {}
    with machine.nvml() as library, suppress(Exception):
        if library is None:
            return facts
        handle = machine.named_gpu(library, gpu)

        def ask(name: str, question: Callable):
            with suppress(Exception):  # NVML raises by card, driver and permission
                facts[name] = question()

        def below_slowdown() -> int:
            slowdown = library.nvmlDeviceGetTemperatureThreshold(handle, library.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
            return slowdown - library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU)

        ask("throttled", lambda: _reasons(library.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & ~POWER_CAP))
        ask("in_use", lambda: int(library.nvmlDeviceGetUtilizationRates(handle).gpu) / 100)
        ask("margin", lambda: library.nvmlDeviceGetMarginTemperature(handle))
        # Preferred, where the GPU tells it: where the hardware steps in, not the temperature that the GPU is kept at.
        ask("margin", below_slowdown)
    return facts


def overheated() -> str | None:
    """Which sensor of the system is at its critical temperature, in words; None if none is."""
    try:
        sensors = psutil.sensors_temperatures()
    except Exception:  # there are none on Windows and macOS
        return None
    for name, entries in sensors.items():
        for sensor in entries:
            # A critical temperature outside this range is made up.
            if sensor.critical and 50 <= sensor.critical <= 150 and sensor.current >= sensor.critical:
                return f"{sensor.label or name} is at {sensor.current:.0f} °C, its critical temperature"
    return None


def _nvidia() -> dict:
    with machine.nvml() as library:
        index = os.environ.get("AUTORESEARCH_DEVICE", "").partition(":")[2]  # "cuda:1"
        handle = library and machine.nvidia_handle(library, index=int(index or 0))
        if library is None or not handle:
            return {"unknown": ["driver, throttled: NVIDIA's management library (NVML) does not answer"]}
        facts, unknown = {}, []

        def ask(name: str, question: Callable):
            try:
                facts[name] = question()
            except Exception as error:  # each answer is optional: NVML raises by card, driver and permission
                unknown.append(f"{name}: NVML says {error}")

        ask("driver", lambda: _text(library.nvmlSystemGetDriverVersion()))
        ask("throttled", lambda: _reasons(library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        ask("power_limit_watts", lambda: library.nvmlDeviceGetPowerManagementLimit(handle) / 1000)
        ask("temperature", lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))
        if platform.system() != "Windows":  # where NVML counts the desktop's
            ask(
                "other_processes",
                lambda: len([p for p in library.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid != os.getpid()]),
            )
        return facts | {"unknown": unknown}


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _reasons(mask: int) -> str | bool:
    return ", ".join(text for bit, text in THROTTLED_BY.items() if mask & bit) or False


def _amd() -> dict:
    try:
        return {"driver": f"amdgpu {AMDGPU.read_text().strip()}", "unknown": ["throttled: ROCm is not asked"]}
    except OSError:
        return {"unknown": ["driver: the kernel's own amdgpu has no version", "throttled: ROCm is not asked"]}


def _apple() -> dict:
    facts = {"unknown": []} | _apple_speed()
    if "throttled" not in facts:
        facts["unknown"].append("throttled: pmset has no record")
    try:
        displays = json.loads(machine.asked("system_profiler", "SPDisplaysDataType", "-json"))["SPDisplaysDataType"]
        facts["gpu_cores"] = int(displays[0]["sppci_cores"])
    except (ValueError, KeyError, IndexError, TypeError):
        facts["unknown"].append("gpu_cores: system_profiler does not tell")
    return facts


def _apple_speed() -> dict:
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", machine.asked("pmset", "-g", "therm"))
    if not limit:
        return {}
    return {"throttled": f"speed limited to {limit.group(1)} %" if int(limit.group(1)) < 100 else False}


def _processor() -> dict:
    """Whether a governor or limit keeps the CPU below its highest frequency."""
    try:
        limit, highest = (int((CPUFREQ / name).read_text()) for name in ("scaling_max_freq", "cpuinfo_max_freq"))
        governor = (CPUFREQ / "scaling_governor").read_text().strip()
    except (OSError, ValueError):
        return {"unknown": ["throttled: this system does not tell its frequency (as in most virtual machines)"]}
    slow = [f"limited to {limit / highest:.0%} of its frequency"] if limit < highest else []
    hardware_decides = (CPUFREQ / "energy_performance_preference").exists()  # "powersave" is then its usual mode
    slow += ["governor powersave"] * (governor == "powersave" and not hardware_decides)
    return {"throttled": ", ".join(slow) or False}


def warnings(facts: dict) -> list[str]:
    """Those of these facts that make the device slower than it can be, in words."""
    texts = []
    if facts.get("power") == "battery":
        texts.append("running on battery, where most laptops are slower: plug it in and calibrate again")
    if facts.get("throttled"):
        texts.append(f"the device is throttled: {facts['throttled']}")
    if facts.get("other_processes"):
        texts.append(f"{facts['other_processes']} other processes use the device")
    return texts
