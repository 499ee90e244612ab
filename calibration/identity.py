"""What machine this is, as its system and its vendor's tools tell. What they don't tell is listed as unknown."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
SUPPLIES = Path("/sys/class/power_supply")
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
    unknown += [f"{name}: the system does not report it" for name in ("physical_cores", "power") if facts[name] is None]
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


@dataclass(frozen=True)
class Battery:
    """The computer's own.

    Attributes:
        percent: of its charge; None where that is not told. plugged: whether it runs on mains; None likewise.
    """

    percent: float | None
    plugged: bool | None


def battery() -> Battery | None:
    """The battery that this computer runs on when it is unplugged; None if it has none. That of a mouse or a headset
    is none: Linux lists those beside it, and psutil takes whichever comes first."""
    if platform.system() == "Linux":
        return _battery_by_linux()
    try:
        sensed = psutil.sensors_battery()
    except Exception:  # psutil passes on what the system makes it raise
        return Battery(None, None)
    return Battery(sensed.percent, sensed.power_plugged) if sensed else None


def _battery_by_linux() -> Battery | None:
    """The power source by /sys/class/power_supply (the kernel's Documentation/ABI/testing/sysfs-class-power)."""
    try:
        supplies = [folder for folder in SUPPLIES.iterdir() if machine.told(folder / "scope") != "Device"]
    except OSError:
        return None
    batteries = [folder for folder in supplies if machine.told(folder / "type") == "Battery"]
    batteries = [folder for folder in batteries if machine.told(folder / "present") != "0"]
    if not batteries:
        return None
    online = {machine.told(folder / "online") for folder in supplies if folder not in batteries}
    states = {machine.told(folder / "status") for folder in batteries}
    if "1" in online:
        plugged = True
    elif "Discharging" in states:
        plugged = False
    else:
        plugged = True if states & {"Charging", "Full", "Not charging"} else False if "0" in online else None
    charges = [charge for folder in batteries if (charge := _charge(folder)) is not None]
    return Battery(sum(charges) / len(charges) if charges else None, plugged)


def _charge(folder: Path) -> float | None:
    """Percent of a battery's charge."""
    names = [("capacity",), ("energy_now", "energy_full"), ("charge_now", "charge_full")]
    for texts in ([machine.told(folder / name) for name in quantity] for quantity in names):
        with suppress(TypeError, ValueError, ZeroDivisionError):
            now, full = [float(text) for text in texts if text is not None] + [100.0] * (len(texts) == 1)
            return 100 * now / full
    return None


def power_source() -> str | None:
    """ "mains" or "battery", or None where that can't be told; a machine without a battery runs on mains."""
    own = battery()
    return "mains" if own is None else {True: "mains", False: "battery", None: None}[own.plugged]


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
        kind: `Hardware.kind`. gpu: its name (`machine.gpu_name`).
    """
    if kind == "cuda":
        return _nvidia_now(gpu)
    speed = _apple_speed() if kind in ("metal", "mps") else _processor()
    return {name: value for name, value in speed.items() if name == "throttled"}


def _nvidia_now(gpu: str) -> dict:
    facts = {}
    with machine.nvml() as library:
        handle = library and machine.nvidia_handle(library, gpu)
        if library is None or not handle:
            return facts
        handle = machine.card_of(library, handle)

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
            return {"unknown": ["driver, throttled: NVIDIA's management library (NVML) does not know this GPU"]}
        handle = machine.card_of(library, handle)
        facts, unknown = {}, []

        def ask(name: str, question: Callable):
            try:
                facts[name] = question()
            except Exception as error:  # each answer is optional: NVML raises by card, driver and permission
                unknown.append(f"{name}: NVML says {error}")

        ask("driver", lambda: machine.text(library.nvmlSystemGetDriverVersion()))
        ask("throttled", lambda: _reasons(library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        ask("power_limit_watts", lambda: library.nvmlDeviceGetPowerManagementLimit(handle) / 1000)
        ask("temperature", lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))
        if platform.system() != "Windows":  # where NVML counts the desktop's
            ask(
                "other_processes",
                lambda: len([p for p in library.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid != os.getpid()]),
            )
        return facts | {"unknown": unknown}


def _reasons(mask: int) -> str | bool:
    return ", ".join(text for bit, text in THROTTLED_BY.items() if mask & bit) or False


def _amd() -> dict:
    unknown = ["throttled: not asked of ROCm"]
    if version := machine.told(AMDGPU):
        return {"driver": f"amdgpu {version}", "unknown": unknown}
    return {"unknown": ["driver: the kernel's own amdgpu has no version", *unknown]}


def _apple() -> dict:
    facts = {"unknown": []} | _apple_speed()
    if "throttled" not in facts:
        facts["unknown"].append("throttled: pmset has no record")
    try:
        displays = json.loads(machine.asked("system_profiler", "SPDisplaysDataType", "-json"))["SPDisplaysDataType"]
        facts["gpu_cores"] = int(displays[0]["sppci_cores"])
    except (ValueError, KeyError, IndexError, TypeError):
        facts["unknown"].append("gpu_cores: system_profiler does not report them")
    return facts


def _apple_speed() -> dict:
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", machine.asked("pmset", "-g", "therm"))
    if not limit:
        return {}
    return {"throttled": f"speed limited to {limit.group(1)} %" if int(limit.group(1)) < 100 else False}


def _processor() -> dict:
    """Whether a governor or limit keeps the CPU below its highest frequency."""
    try:
        limit, highest = (int(machine.told(CPUFREQ / name) or "") for name in ("scaling_max_freq", "cpuinfo_max_freq"))
        governor = machine.told(CPUFREQ / "scaling_governor")
    except ValueError:
        return {"unknown": ["throttled: the system does not report its frequency (as in most virtual machines)"]}
    slow = [f"limited to {limit / highest:.0%} of its frequency"] if limit < highest else []
    hardware_decides = (CPUFREQ / "energy_performance_preference").exists()  # "powersave" is then its usual mode
    slow += ["governor powersave"] * (governor == "powersave" and not hardware_decides)
    return {"throttled": ", ".join(slow) or False}


def warnings(facts: dict) -> list[str]:
    """The facts that make the device slower than it can be, in words."""
    texts = []
    if facts.get("power") == "battery":
        texts.append("running on battery, where most laptops are slower: plug it in and calibrate again")
    if facts.get("throttled"):
        texts.append(f"the device is throttled: {facts['throttled']}")
    if facts.get("other_processes"):
        texts.append(f"{facts['other_processes']} other processes use the device")
    return texts
