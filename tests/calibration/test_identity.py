"""Names and facts of machines that are not here."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import backends
from backends import machine
from backends.interface import Hardware
from calibration import identity

GIB = 2**30


@pytest.mark.parametrize(
    "name, memory, tag",
    [
        ("Apple M4", 16 * GIB, "apple-m4-16gb"),
        ("Apple M4", 24 * GIB, "apple-m4-24gb"),
        ("Apple M3 Max", 128 * GIB, "apple-m3-max-128gb"),
        ("NVIDIA GeForce RTX 3090", 24576 * 2**20, "nvidia-rtx-3090-24gb"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 8188 * 2**20, "nvidia-rtx-4070-laptop-gpu-8gb"),
        ("NVIDIA H200", 143771 * 2**20, "nvidia-h200-141gb"),
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20, "nvidia-h100-hbm3-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40960 * 2**20, "nvidia-a100-sxm4-40gb"),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            8 * GIB,
            "nvidia-jetson-orin-nano-super-8gb",
        ),
        ("AMD Radeon RX 7900 XTX", 24 * GIB, "amd-radeon-rx-7900-xtx-24gb"),
    ],
)
def test_tags(name, memory, tag):
    assert machine.slug(name, memory) == tag


@pytest.mark.parametrize(
    "name, cores, tag",
    [
        ("AMD EPYC", 2, "cpu-amd-epyc-2c-24gb"),
        ("AMD EPYC 7763 64-Core Processor", 128, "cpu-amd-epyc-7763-128c-24gb"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 8, "cpu-11th-gen-intel-core-i7-1165g7-8c-24gb"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", 28, "cpu-intel-xeon-e5-2680-v4-28c-24gb"),
    ],
)
def test_tags_of_processors(monkeypatch, name, cores, tag):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert machine.slug(name, 24 * GIB, cpu=True) == tag


def memory_blocks(folder: Path, online: int, offline: int = 0) -> Path:
    folder.mkdir()
    (folder / "block_size_bytes").write_text("8000000\n")  # 128 MiB, hexadecimal
    for i in range(online + offline):
        (folder / f"memory{i}").mkdir()
        (folder / f"memory{i}" / "online").write_text("1\n" if i < online else "0\n")
    return folder


def test_installed_memory_does_not_vary_with_what_the_kernel_keeps(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMORY_BLOCKS", memory_blocks(tmp_path / "memory", online=64, offline=8))
    for left in (7.9, 7.1):
        monkeypatch.setattr(psutil, "virtual_memory", lambda left=left: SimpleNamespace(total=int(left * GIB)))
        assert machine.installed_memory() == 8 * GIB


def test_where_linux_does_not_tell_the_total_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMORY_BLOCKS", tmp_path / "none")
    assert machine.installed_memory() == psutil.virtual_memory().total


def test_a_containers_limit_bounds_what_is_available(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory() <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    assert machine.available_memory() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 1_000_000


def test_a_jetson_names_its_board(monkeypatch, tmp_path):
    tree = tmp_path / "model"
    monkeypatch.setattr(machine, "DEVICE_TREE", tree)
    assert machine.jetson() is None
    tree.write_bytes(b"Raspberry Pi 5\0")
    assert machine.jetson() is None
    tree.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert machine.jetson() == "NVIDIA Jetson Orin Nano Developer Kit"


def test_this_machine_has_the_same_tag_twice():
    assert backends.identify() == backends.identify()


# --- facts


def hardware(kind, **versions):
    return Hardware("sdpa", "Some Device", "some-device-8gb", kind, 8 * GIB, versions)


def test_this_machine_is_described():
    facts = identity.describe(backends.identify())
    assert facts["os"] and facts["processor"] and facts["cores"] >= 1 and facts["system_memory"] > GIB
    assert all(": " in reason for reason in facts["unknown"])


def test_wsl_is_told_from_linux(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert identity.operating_system().startswith("WSL 5.15")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-generic")
    assert identity.operating_system().startswith("Linux 6.8")


class Nvml:
    """As much of pynvml as is asked; what `broken` names raises."""

    NVML_TEMPERATURE_GPU = 0
    broken: tuple[str, ...] = ()
    reasons, running = 0, ()

    def __getattr__(self, name):
        def answer(*arguments):
            if name in self.broken:
                raise RuntimeError("Not Supported")
            return {
                "nvmlSystemGetDriverVersion": b"580.159.04",
                "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons,
                "nvmlDeviceGetPowerManagementLimit": 700_000,
                "nvmlDeviceGetTemperature": 41,
                "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=pid) for pid in self.running],
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143771 * 2**20),
            }.get(name, "handle")

        return answer


@pytest.fixture
def nvml(monkeypatch):
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_what_nvml_tells(nvml):
    facts = identity.describe(hardware("cuda", cuda="13.0"))
    assert facts["driver"] == "580.159.04" and facts["throttled"] is False and facts["power_limit_watts"] == 700
    assert facts["other_processes"] == 0 and not identity.warnings({**facts, "power": "mains"})
    assert machine.nvidia_memory("some-uuid") == 143771 * 2**20


def test_a_throttled_and_busy_gpu_is_said_aloud(nvml):
    nvml.reasons, nvml.running = 0x4 | 0x40, (7, 8)
    facts = identity.describe(hardware("cuda", cuda="13.0"))
    said = "\n".join(identity.warnings({**facts, "power": "battery"}))
    for part in ("throttled: power cap, thermal limit (hardware)", "2 other processes", "battery"):
        assert part in said


def test_an_idle_gpus_clocks_are_not_throttled(nvml):
    nvml.reasons = 0x1  # idle
    assert identity.describe(hardware("cuda"))["throttled"] is False


def test_each_answer_of_nvml_is_optional(nvml):
    nvml.broken = ("nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetMemoryInfo")
    facts = identity.describe(hardware("cuda"))
    assert facts["driver"] == "580.159.04" and "throttled" not in facts
    assert "throttled: NVML says Not Supported" in facts["unknown"]
    assert machine.nvidia_memory("some-uuid") is None


@pytest.mark.parametrize("library", [None, Nvml])
def test_without_nvml_less_is_known(monkeypatch, library):
    if library:
        broken = library()
        broken.broken = ("nvmlInit",)
        monkeypatch.setitem(sys.modules, "pynvml", broken)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it is an ImportError
    facts = identity.describe(hardware("cuda"))
    assert "driver" not in facts and any("NVML" in reason for reason in facts["unknown"])
    assert machine.nvidia_memory() is None


def test_nvml_is_asked_for_the_gpu_that_is_visible(nvml, monkeypatch):
    asked = []
    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByIndex", lambda self, i: asked.append(i), raising=False)
    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByUUID", lambda self, u: asked.append(u), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    machine.nvidia_handle(nvml)
    machine.nvidia_handle(nvml, index=1)
    machine.nvidia_handle(nvml, uuid="def")
    assert asked == [3, "GPU-abc", "GPU-def"]


def test_amd_has_its_drivers_version(monkeypatch, tmp_path):
    monkeypatch.setattr(identity, "AMDGPU", tmp_path / "version")
    assert any("driver" in reason for reason in identity.describe(hardware("cuda", cuda="hip 6.2"))["unknown"])
    (tmp_path / "version").write_text("6.8.5\n")
    assert identity.describe(hardware("cuda", cuda="hip 6.2"))["driver"] == "amdgpu 6.8.5"


@pytest.mark.parametrize(
    "therm, throttled", [("CPU_Speed_Limit \t= 70\n", "speed limited to 70 %"), ("CPU_Speed_Limit = 100", False)]
)
def test_a_macs_speed_limit(monkeypatch, therm, throttled):
    answers = {"pmset": therm, "system_profiler": '{"SPDisplaysDataType": [{"sppci_cores": "10"}]}'}
    monkeypatch.setattr(machine, "asked", lambda command, *_: answers[command])
    facts = identity.of_device(hardware("metal"))
    assert facts == {"throttled": throttled, "gpu_cores": 10, "unknown": []}


def test_a_mac_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(machine, "asked", lambda *_: "")
    assert len(identity.of_device(hardware("metal"))["unknown"]) == 2


@pytest.mark.parametrize(
    "limit, governor, preference, throttled",
    [
        ("3000", "performance", False, False),
        ("1500", "performance", False, "limited to 50% of its frequency"),
        ("3000", "powersave", False, "governor powersave"),
        ("3000", "powersave", True, False),
    ],
)
def test_a_slowed_processor(monkeypatch, tmp_path, limit, governor, preference, throttled):
    monkeypatch.setattr(identity, "CPUFREQ", tmp_path)
    for name, text in (("scaling_max_freq", limit), ("cpuinfo_max_freq", "3000"), ("scaling_governor", governor)):
        (tmp_path / name).write_text(text + "\n")
    if preference:
        (tmp_path / "energy_performance_preference").write_text("balance_power\n")
    assert identity.of_device(hardware("cpu"))["throttled"] == throttled


@pytest.mark.parametrize(
    "battery, source",
    [
        (None, "mains"),
        (SimpleNamespace(power_plugged=True), "mains"),
        (SimpleNamespace(power_plugged=False), "battery"),
        (SimpleNamespace(power_plugged=None), None),
    ],
)
def test_power(monkeypatch, battery, source):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert identity.power_source() == source


def test_a_power_supply_that_cannot_be_read(monkeypatch):
    def broken():
        raise ValueError("could not convert string to float")

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    assert identity.power_source() is None


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("tool", 20), PermissionError()])
def test_a_vendors_tool_that_fails_says_nothing(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert machine.asked("tool") == ""
