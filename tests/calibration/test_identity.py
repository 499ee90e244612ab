"""Names and facts of machines that are not here."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
import uuid
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
    monkeypatch.setattr(machine, "cores", lambda: float(cores))
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


# --- memory


def cgroup(folder: Path, version: int, limit, used: int = 600_000, files: int = 100_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 500000\n{names[2]} {files}\n")


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """(the tree, a function that says which lines /proc/self/cgroup has)"""
    own = tmp_path / "self"
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "tree")
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB, total=24 * GIB))
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "tree", lambda text: own.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    "lines, limits, processors",
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),  # of the slice around it
        ("0::/\n", {"cpu.max": "20000 100000"}, 0.2),  # a container with a namespace of its own
        (
            "4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu/docker/x/cpu.cfs_quota_us": "400000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_a_container_may_limit_the_processors_time(cgroups, monkeypatch, lines, limits, processors):
    tree, own = cgroups
    own(lines)
    for name, text in limits.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"{text}\n")
    assert machine.quota() == processors
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert machine.cores() == min(64, processors)
    assert f"-{math.ceil(min(64, processors))}c-" in machine.slug("EPYC", 2**34, cpu=True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)  # by taskset or a cpuset
    assert f"-{math.ceil(min(1, processors))}c-" in machine.slug("EPYC", 2**34, cpu=True)


def test_without_any_cgroup_what_is_free_counts(cgroups):
    assert machine.available_memory() == 20 * GIB


@pytest.mark.parametrize(
    "version, lines, where",
    [
        (2, "0::/\n", "."),  # a container with a namespace of its own
        (2, "0::/user.slice/user-1000.slice/run-7.scope\n", "user.slice/user-1000.slice/run-7.scope"),
        (2, "0::/user.slice/user-1000.slice/run-7.scope\n", "user.slice"),  # systemd-run --slice, or one for all users
        (2, "0::/../other/a b\n", "../other/a b"),
        (1, "5:cpu:/x\n4:memory:/docker/cfe0\n0::/\n", "memory/docker/cfe0"),
        (1, "5:cpu:/x\n4:memory,hugetlb:/docker/cfe0\n", "memory"),  # of the host's path nothing is seen
        (1, "4:memory:/slurm/uid_1000/job_7/step_0\n", "memory/slurm/uid_1000/job_7"),
    ],
)
def test_a_limit_bounds_what_is_available_wherever_it_is_set(cgroups, version, lines, where):
    tree, own = cgroups
    own(lines)
    cgroup(tree / where, version, 1_000_000)
    assert machine.available_memory() == 500_000


def test_the_tightest_of_several_limits_counts(cgroups):
    tree, own = cgroups
    own("0::/a/b\n")
    cgroup(tree / "a", 2, 3_000_000)
    cgroup(tree / "a" / "b", 2, "max")
    assert machine.available_memory() == 2_500_000
    (tree / "a" / "b" / "memory.high").write_text("1200000\n")
    assert machine.available_memory() == 700_000
    cgroup(tree / "a" / "b", 2, 500_000, files=0)
    assert machine.available_memory() == 0  # never below


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_no_limit_is_none(cgroups, limit):
    tree, own = cgroups
    own("4:memory:/a\n" if limit != "max" else "0::/a\n")
    cgroup(tree / "memory/a" if limit != "max" else tree / "a", 1 if limit != "max" else 2, limit)
    assert machine.available_memory() == 20 * GIB


def test_a_cgroup_may_have_any_name(cgroups):
    tree, own = cgroups
    own(b"0::/caf\xe9\n")
    cgroup(tree / os.fsdecode(b"caf\xe9"), 2, 1_000_000)
    assert machine.available_memory() == 500_000


@pytest.mark.parametrize(
    "variables, megabytes",
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "3"}, 6144),
        ({"SLURM_MEM_PER_NODE": "0"}, None),  # all of it
        ({"SLURM_MEM_PER_CPU": "2048"}, None),
        ({"SLURM_MEM_PER_NODE": "4G"}, None),
    ],
)
def test_what_slurm_gave_a_job_bounds_what_is_available(cgroups, monkeypatch, variables, megabytes):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    available = machine.available_memory()
    if megabytes is None:
        assert available == 20 * GIB
    else:
        used = psutil.Process().memory_info().rss
        assert megabytes * 2**20 - 1.5 * used < available < megabytes * 2**20 - 0.5 * used


# --- names


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
                "nvmlDeviceGetCount": 1,
                "nvmlDeviceGetUUID": "GPU-some-uuid",
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


DESKTOP, FAST = (str(uuid.UUID(int=number << 96)) for number in (0x8932F937, 0xDE41A5C0))
SLICE = str(uuid.UUID(int=0x77 << 96))


class TwoCards(Nvml):
    """The desktop's card is first on the bus, and hot; the fast one, which CUDA numbers first, has a slice."""

    by_bus = (DESKTOP, FAST)

    def nvmlDeviceGetCount(self):
        return len(self.by_bus)

    def nvmlDeviceGetHandleByIndex(self, place):
        return f"GPU-{self.by_bus[place]}"

    def nvmlDeviceGetHandleByUUID(self, name):
        if name in (*(f"GPU-{own}" for own in self.by_bus), f"MIG-{SLICE}"):
            return name
        raise RuntimeError("Not Found")

    def nvmlDeviceGetUUID(self, handle):
        return handle.encode()  # as old versions of pynvml give it

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        if handle != f"MIG-{SLICE}":
            raise RuntimeError("Invalid Argument")
        return f"GPU-{FAST}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total={f"GPU-{DESKTOP}": 8, f"GPU-{FAST}": 24, f"MIG-{SLICE}": 6}[handle] * GIB)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x40 if handle == f"GPU-{DESKTOP}" else 0

    NVML_CLOCK_SM = 1

    def nvmlDeviceGetClockInfo(self, handle, domain):
        return {f"GPU-{DESKTOP}": 1468, f"GPU-{FAST}": 1695}[handle] if domain == self.NVML_CLOCK_SM else 0

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle.startswith("MIG-"):
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=90 if handle == f"GPU-{DESKTOP}" else 10)


class Driver:
    """CUDA's, as it numbers the GPUs of this process."""

    def __init__(self, *numbered):
        self.numbered = numbered

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0 if index < len(self.numbered) else 101

    def cuDeviceGetUuid_v2(self, found, device):
        found._obj[:] = uuid.UUID(self.numbered[device.value]).bytes
        return 0


@pytest.fixture
def two_cards(monkeypatch):
    """A function that says how CUDA numbers the GPUs; without arguments, that its driver is not found."""
    monkeypatch.setitem(sys.modules, "pynvml", TwoCards())
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "AUTORESEARCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)

    def numbered(*uuids):
        def library(name):
            if not uuids:
                raise OSError(f"{name}: cannot open shared object file")
            return Driver(*uuids)

        monkeypatch.setattr(ctypes, "CDLL", library)

    numbered()
    machine._lasting.cache_clear()
    yield numbered
    machine._lasting.cache_clear()


def test_a_gpu_is_the_one_that_cuda_numbers_so(two_cards):
    two_cards(FAST, DESKTOP)
    assert [machine.gpu_name(index) for index in (0, 1)] == [f"GPU-{FAST}", f"GPU-{DESKTOP}"]
    assert machine.nvidia_memory() == 24 * GIB and machine.nvidia_memory(index=1) == 8 * GIB
    assert identity.describe(hardware("cuda", cuda="13.0"))["throttled"] is False
    assert identity.now("cuda", machine.gpu_name())["in_use"] == 0.1


def test_a_clock_rate_is_that_of_the_gpu_itself(two_cards, monkeypatch):
    """The one that CUDA calls the first is the second one on the bus."""
    two_cards(FAST, DESKTOP)
    assert machine.nvidia_clock_rate() == machine.nvidia_clock_rate(FAST) == 1.695e9
    assert machine.nvidia_clock_rate(index=1) == 1.468e9 and machine.nvidia_clock_rate("GPU-beef") is None
    assert machine.nvidia_clock_rate(f"MIG-{SLICE}") == 1.695e9
    machine._lasting.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.nvidia_clock_rate(FAST) is None


@pytest.mark.parametrize(
    "cuda, hip, rocr, entries",
    [
        ("1", "", "", "1"),
        ("", "1", "", "1"),
        ("", "", "2,GPU-a", "2,GPU-a"),
        ("1", "", "2,GPU-a", "GPU-a"),
        ("", "0, 1", "3,2", "3,2"),
        ("GPU-b", "", "", "GPU-b"),
    ],
)
def test_rocm_has_other_names_for_what_is_visible(monkeypatch, tmp_path, cuda, hip, rocr, entries):
    for name, value in zip(("CUDA", "HIP", "ROCR"), (cuda, hip, rocr)):
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
    assert ",".join(machine.visible_gpus()) == cuda  # NVIDIA's know of no other name
    monkeypatch.setattr(machine, "AMD_NODES", tmp_path)
    assert ",".join(machine.visible_gpus()) == entries


@pytest.mark.parametrize("entry", [f"GPU-{FAST}", "GPU-de41a5c0", "GPU-de"])
def test_a_shortened_uuid_is_its_gpu(two_cards, monkeypatch, entry):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", entry)
    assert machine.gpu_name() == f"GPU-{FAST}"
    assert identity.now("cuda", entry)["in_use"] == 0.1


def test_without_cudas_driver_an_index_is_taken_only_where_it_is_nvmls_too(two_cards, monkeypatch):
    assert machine.gpu_name(1) == "1" and machine.nvidia_memory(index=1) is None
    assert identity.now("cuda", "1") == {}  # rather nothing than another card's heat
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert machine.gpu_name(1) == f"GPU-{FAST}"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setattr(TwoCards, "by_bus", (DESKTOP,))
    assert machine.gpu_name() == f"GPU-{DESKTOP}"


def test_a_slice_of_a_gpu_has_its_own_name_and_memory_and_its_cards_heat(two_cards, monkeypatch):
    for given in (SLICE, ""):
        two_cards(*filter(None, [given]))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{SLICE}")
        assert machine.gpu_name() == f"MIG-{SLICE}" and machine.nvidia_memory() == 6 * GIB
    assert identity.now("cuda", f"MIG-{SLICE}")["in_use"] == 0.1


def test_what_names_no_gpu_or_several_finds_none(two_cards):
    with machine.nvml() as library:
        for name in ("GPU-", "GPU-beef", "MIG-77", "7", "x"):
            assert machine.nvidia_handle(library, name) is None
        assert machine.nvidia_handle(library, FAST) == f"GPU-{FAST}"  # as PyTorch has it


def test_without_nvml_cudas_driver_still_names_a_gpu(two_cards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    two_cards(FAST)
    assert machine.gpu_name() == f"GPU-{FAST}" and machine.gpu_name(1) == "1"


def test_the_driver_is_asked_as_a_library_is(monkeypatch, tmp_path):
    """Through ctypes, against a library of our own."""
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(
        "#include <string.h>\nint cuInit(unsigned f) { return f; }\n"
        "int cuDeviceGet(int *d, int i) { *d = i; return i > 1 ? 101 : 0; }\n"
        "int cuDeviceGetUuid_v2(unsigned char *u, int d) { memset(u, 0, 16); u[0] = 0xab; u[15] = d; return 0; }\n"
    )
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(machine, "CUDA_DRIVERS", ("nothing.so", str(library)))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = [machine.gpu_name(index) for index in range(3)]
    assert names == ["GPU-ab000000-0000-0000-0000-000000000000", "GPU-ab000000-0000-0000-0000-000000000001", "2"]


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


@pytest.fixture
def supplies(monkeypatch, tmp_path):
    """Makes an entry of /sys/class/power_supply."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(identity, "SUPPLIES", tmp_path / "power_supply")

    def supply(name, **facts):
        folder = tmp_path / "power_supply" / name
        folder.mkdir(parents=True)
        for fact, value in facts.items():
            (folder / fact).write_text(f"{value}\n")

    return supply


MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": 35, "online": 1}


def test_a_mouses_battery_is_not_the_computers(supplies):
    assert identity.battery() is None and identity.power_source() == "mains"
    supplies("hidpp_battery_0", **MOUSE)
    assert identity.battery() is None and identity.power_source() == "mains"
    supplies("BAT0", type="Battery", status="Discharging", capacity=80, present=1)
    supplies("AC", type="Mains", online=0)
    assert identity.battery() == identity.Battery(80, False) and identity.power_source() == "battery"


@pytest.mark.parametrize(
    "online, status, plugged",
    [
        (1, "Discharging", True),  # some drain a little on mains
        (0, "Discharging", False),
        (0, "Unknown", False),
        (None, "Charging", True),
        (None, "Full", True),
        (None, "Discharging", False),
        (None, "Unknown", None),
    ],
)
def test_whether_a_laptop_is_plugged_in(supplies, online, status, plugged):
    supplies("BATT", type="Battery", scope="System", status=status, energy_now=20, energy_full=50)
    if online is not None:
        supplies("ucsi-source-psy-USBC000:001", type="USB", online=online)
    assert identity.battery() == identity.Battery(40, plugged)
    assert identity.power_source() == {True: "mains", False: "battery", None: None}[plugged]


def test_two_batteries_and_an_empty_bay(supplies):
    supplies("BAT0", type="Battery", status="Not charging", capacity=90)
    supplies("BAT1", type="Battery", status="Discharging", charge_now=10, charge_full=100)
    supplies("BAT2", type="Battery", status="Unknown", present=0, capacity=0)
    assert identity.battery() == identity.Battery(50, False)


def test_a_battery_that_does_not_tell_its_charge(supplies):
    supplies("BAT0", type="Battery", status="Discharging", energy_now="?", charge_full=0)
    assert identity.battery() == identity.Battery(None, False)


def sensed(percent=50.0, plugged=None):
    return SimpleNamespace(percent=percent, power_plugged=plugged)


@pytest.mark.parametrize(
    "battery, source",
    [(None, "mains"), (sensed(plugged=True), "mains"), (sensed(plugged=False), "battery"), (sensed(), None)],
)
def test_power_where_psutil_tells_it(monkeypatch, battery, source):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert identity.power_source() == source


def test_a_power_supply_that_cannot_be_read(monkeypatch):
    def broken():
        raise ValueError("could not convert string to float")

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    assert identity.battery() == identity.Battery(None, None) and identity.power_source() is None


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("tool", 20), PermissionError()])
def test_a_vendors_tool_that_fails_says_nothing(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert machine.asked("tool") == ""
