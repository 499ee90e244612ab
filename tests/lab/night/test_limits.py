"""When a night ends or waits, and what keeps the computer awake: of clocks, batteries, GPUs and Windows not here."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import filelock
import psutil
import pytest

from backends import machine
from calibration import identity
from lab.errors import LabError
from lab.night import limits

EVENING = datetime(2025, 11, 21, 22, 30)
Times = namedtuple("Times", "user system")


# --- The time ---


@pytest.fixture
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "now, hours, until, end",
    [
        (EVENING, 8, None, datetime(2025, 11, 22, 6, 30)),
        (EVENING, None, "07:00", datetime(2025, 11, 22, 7)),
        (EVENING, None, "23:00", datetime(2025, 11, 21, 23)),
        (EVENING, None, "22:30", datetime(2025, 11, 22, 22, 30)),
        (EVENING, 8, "7:00", datetime(2025, 11, 22, 6, 30)),
        (EVENING, 10, "07:00", datetime(2025, 11, 22, 7)),
        (EVENING, 0.5, None, datetime(2025, 11, 21, 23)),
        (datetime(2025, 10, 25, 22), None, "07:00", datetime(2025, 10, 26, 7)),  # the night has an hour more
        (datetime(2025, 3, 29, 22), 8, None, datetime(2025, 3, 30, 7)),  # an hour less: eight of them end later
        (datetime(2025, 10, 26, 2, 30, fold=1), None, "02:45", datetime(2025, 10, 26, 2, 45, fold=1)),  # comes twice
    ],
)
def test_the_end_of_a_night(berlin, now, hours, until, end):
    assert limits.deadline(hours, until, now) == end.timestamp()
    elsewhere = now.astimezone(timezone(timedelta(hours=-5)))
    assert limits.deadline(hours, until, elsewhere) == end.timestamp()


def test_a_night_without_limits_has_no_end():
    assert limits.deadline(None, None, EVENING) is None


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e9])
def test_hours_that_are_none(hours):
    with pytest.raises(LabError, match="such as 8"):
        limits.deadline(hours, None, EVENING)


@pytest.mark.parametrize("until", ["", "7", "24:00", "07:60", "7 am", "07:00:00", "٠٧:٠٠", "-1:00"])
def test_times_of_day_that_are_none(until):
    with pytest.raises(LabError, match="such as 07:00"):
        limits.deadline(None, until, EVENING)


# --- Troubles ---


OWN_BATTERY = identity.battery


@pytest.fixture
def sound(tmp_path, monkeypatch):
    """A session on a machine with which all is well."""
    disk = SimpleNamespace(free=50 * limits.GB)
    monkeypatch.setattr(identity, "battery", lambda: None)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda place: disk)
    monkeypatch.setattr(identity, "now", lambda kind, gpu: {})
    monkeypatch.setattr(limits, "others", limits.Others())
    return SimpleNamespace(
        folder=tmp_path,
        local=SimpleNamespace(repository=str(tmp_path), gpu="0"),
        fleet=None,
        supervised=False,
        disk=disk,
        profile={"machine": {"kind": "cuda"}},
        device_lock=filelock.FileLock(tmp_path / "device"),
    )


def test_another_session_on_the_device_is_waited_for(sound):
    with filelock.FileLock(sound.folder / "device"):
        assert told(sound) == [("taken", "wait")]
        sound.supervised = True  # then it is ours
        assert told(sound) == []


def told(session) -> list[tuple[str, str]]:
    return [(one.kind, one.action) for one in limits.troubles(session)]


def test_all_is_well(sound):
    assert told(sound) == []
    sound.profile = {}  # as of sessions whose profile says nothing of the machine
    assert told(sound) == []


@pytest.mark.parametrize(
    "plugged, percent, found",
    [(False, 39.0, [("battery", "stop")]), (False, 40.0, []), (True, 5.0, []), (None, 5.0, []), (False, None, [])],
)
def test_battery(sound, monkeypatch, plugged, percent, found):
    monkeypatch.setattr(identity, "battery", lambda: identity.Battery(percent, plugged))
    assert told(sound) == found


def test_a_mouse_that_runs_low_ends_no_night(sound, monkeypatch, tmp_path):
    mouse = tmp_path / "power_supply" / "hidpp_battery_0"
    mouse.mkdir(parents=True)
    for name, text in (("type", "Battery"), ("scope", "Device"), ("status", "Discharging"), ("capacity", "5")):
        (mouse / name).write_text(text + "\n")
    monkeypatch.setattr(identity, "SUPPLIES", tmp_path / "power_supply")
    monkeypatch.setattr(identity, "battery", OWN_BATTERY)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert told(sound) == []


def test_what_cannot_be_read_is_no_trouble(sound, monkeypatch):
    def broken(*_):
        raise OSError("no such device")

    monkeypatch.setattr(psutil, "sensors_temperatures", broken)
    monkeypatch.setattr(limits.shutil, "disk_usage", broken)
    assert told(sound) == []


def test_disk(sound):
    sound.disk.free = limits.LEAST_FREE
    assert told(sound) == []
    with open(sound.folder / "best.safetensors", "wb") as file:
        file.truncate(limits.LEAST_FREE)
    sound.disk.free = 3 * (limits.LEAST_FREE + limits.FLOOD) - 1
    assert told(sound) == [("disk", "stop")] and "6.2 GB: free some space" in limits.troubles(sound)[0].text
    sound.disk.free += 1
    assert told(sound) == []


@pytest.mark.parametrize(
    "current, critical, found",
    [(100.0, 100.0, [("hot", "wait")]), (99.0, 100.0, []), (40.0, None, []), (40.0, 0.0, []), (70000.0, 65261.8, [])],
)
def test_heat_of_the_system(sound, monkeypatch, current, critical, found):
    sensors = {"coretemp": [SimpleNamespace(label="Package", current=current, high=None, critical=critical)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    assert told(sound) == found


@pytest.mark.parametrize(
    "training, now, found",
    [
        (False, {"margin": 0}, [("hot", "wait")]),
        (False, {"margin": 12}, []),
        (False, {"throttled": "power brake"}, [("throttled", "say")]),
        (False, {"throttled": False}, []),
        (False, {"in_use": 0.9}, [("busy", "say")]),
        (False, {"in_use": 0.2}, []),
        (True, {"in_use": 0.9}, []),
    ],
)
def test_a_gpu(sound, monkeypatch, training, now, found):
    monkeypatch.setattr(identity, "now", lambda kind, gpu: now if (kind, gpu) == ("cuda", "0") else {})
    sound.supervised = training
    assert told(sound) == found


def test_a_device_that_was_throttled_when_it_was_calibrated_is_as_it_was(sound, monkeypatch):
    monkeypatch.setattr(identity, "now", lambda kind, gpu: {"throttled": "governor powersave"})
    assert told(sound) == [("throttled", "say")]
    sound.profile["machine"]["throttled"] = "governor powersave"
    assert told(sound) == []


class Nvml:
    """A pynvml whose GPU is as told; what it lacks is not supported."""

    NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 1

    def __init__(self, **answers):
        self.answers, self.asked = {"nvmlDeviceGetCount": 1} | answers, []

    def __getattr__(self, name):
        def answer(*arguments):
            self.asked.append((name, *arguments))
            if name in ("nvmlInit", "nvmlShutdown") or "Handle" in name:
                return name
            return self.answers[name]

        return answer


@pytest.mark.parametrize(
    "answers, found",
    [
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x1}, {"throttled": False}),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x40}, {"throttled": "thermal limit (hardware)"}),
        ({"nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97)}, {"in_use": 0.97}),
        ({"nvmlDeviceGetMarginTemperature": 3}, {"margin": 3}),
        (
            {
                "nvmlDeviceGetMarginTemperature": 0,
                "nvmlDeviceGetTemperatureThreshold": 98,
                "nvmlDeviceGetTemperature": 87,
            },
            {"margin": 11},
        ),
        ({"nvmlDeviceGetTemperatureThreshold": 98}, {}),
        ({}, {}),
    ],
)
def test_what_nvml_tells_of_now(monkeypatch, answers, found):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(**answers))
    assert identity.now("cuda", "0") == found


def test_the_sessions_own_gpu_is_asked_whatever_is_visible_now(monkeypatch):
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    identity.now("cuda", "GPU-abc")
    assert ("nvmlDeviceGetHandleByUUID", "GPU-abc") in library.asked


def test_other_devices_tell_whether_they_are_throttled(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(identity, "CPUFREQ", tmp_path)
    monkeypatch.setattr(machine, "asked", lambda *_: "CPU_Speed_Limit = 60")
    assert (identity.now("cuda", "0"), identity.now("cpu")) == ({}, {})
    assert identity.now("metal") == {"throttled": "speed limited to 60 %"}


# --- Other programs on the CPU ---


@pytest.fixture
def processes(sound, monkeypatch):
    """Sets which processes there are, at which time: pid -> (parent, seconds of the CPU so far)."""
    clock = SimpleNamespace(now=1000.0, found={})

    def below():
        children = [pid for pid, (parent, _) in clock.found.items() if parent == os.getpid()]
        return [SimpleNamespace(pid=pid) for pid, (parent, _) in clock.found.items() if parent in children] + [
            SimpleNamespace(pid=pid) for pid in children
        ]

    monkeypatch.setattr(limits.processes, "below", below)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(
        psutil,
        "process_iter",
        lambda attrs: [
            SimpleNamespace(
                pid=pid,
                info={
                    "name": f"game\x1b[2J{pid}",
                    "cpu_times": None if seconds is None else Times(seconds, 0.5),
                    "create_time": 1.0,
                },
            )
            for pid, (_, seconds) in clock.found.items()
        ],
    )
    sound.profile["machine"]["kind"] = "cpu"

    def look(after, training=False, **found):
        clock.now += after
        clock.found = {int(pid[1:]): facts for pid, facts in found.items()}
        sound.supervised = training
        return limits.troubles(sound)

    return look


def test_another_program_is_seen_from_the_second_look_on(processes):
    assert processes(0, p7=(1, 100.0), p8=(1, 5.0)) == []
    (found,) = processes(10, p7=(1, 108.0), p8=(1, 10.0))
    assert (found.kind, found.action) == ("busy", "say") and "32% of the CPU" in found.text
    assert "7 above all" in found.text and "\x1b" not in found.text
    assert processes(10, p7=(1, 112.0), p8=(1, 11.0)) == []
    assert processes(10, p9=(1, 20.0))[0].kind == "busy"  # begun since


def test_our_own_processes_and_those_that_ended_are_no_others(processes):
    me = os.getpid()
    agent = {f"p{me}": (1, 0.0), "p70": (me, 0.0), "p71": (70, 0.0)}
    assert processes(0, p50=(1, 0.0), **agent) == []
    assert processes(10, training=True, p50=(1, 40.0), p60=(50, 40.0), **agent) == []  # it trains
    agent = {f"p{me}": (1, 10.0), "p70": (me, 20.0), "p71": (70, 20.0)}
    assert processes(5, p8=(1, None), **agent) == []  # it is done, and gone


def test_a_look_long_ago_says_nothing(processes):
    processes(0, p7=(1, 0.0))
    assert processes(limits.STALE, p7=(1, 240.0)) == []


def test_a_program_that_computes_is_found_among_the_real_ones(sound, monkeypatch):
    sound.profile["machine"]["kind"] = "cpu"
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(limits.processes, "below", list)  # it is no other's here
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        limits.troubles(sound)
        deadline = time.monotonic() + 60
        while not (found := limits.troubles(sound)) and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        other.kill()
        other.wait()
    assert [one.kind for one in found] == ["busy"]


# --- Sleep ---


@pytest.fixture
def unkept(monkeypatch):
    monkeypatch.setenv("WAKEPY_FORCE_FAILURE", "1")


def test_wakepy_keeps_awake_where_it_works(monkeypatch):
    monkeypatch.setenv("WAKEPY_FAKE_SUCCESS", "1")
    with limits.awake() as line:
        assert line.startswith("the computer is kept awake (")


@pytest.mark.parametrize("missing", [True, False])
def test_where_nothing_keeps_it_awake_that_is_said(monkeypatch, unkept, missing):
    if missing:
        monkeypatch.setitem(sys.modules, "wakepy", None)
    with limits.awake() as line:
        assert "turn that off" in line


def test_a_wakepy_that_raises_costs_nothing(monkeypatch):
    class Broken:
        active, method = True, SimpleNamespace(name="bus")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("the bus is gone")

    monkeypatch.setitem(sys.modules, "wakepy", SimpleNamespace(keep=SimpleNamespace(running=lambda on_fail: Broken())))
    with limits.awake() as line:
        assert line == "the computer is kept awake (bus)"


def test_an_error_of_the_night_passes_through(unkept):
    with pytest.raises(KeyError), limits.awake():
        raise KeyError("mine")


def windows(folder, answer: str, ends: str = "cat > /dev/null") -> None:
    """A powershell.exe on PATH: notes what it is asked and that it ends by its input's end."""
    folder.mkdir()
    script = folder / "powershell.exe"
    script.write_text(
        f'#!/bin/sh\nprintf %s "$*" > {folder}/asked\necho $$ > {folder}/pid\necho {answer}\n{ends}\n'
        f"echo done > {folder}/ended\n"
    )
    script.chmod(0o755)


@pytest.fixture
def wsl(tmp_path, monkeypatch, unkept):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setenv("PATH", f"{tmp_path / 'windows'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "windows"


def alive(folder) -> bool:
    return psutil.pid_exists(int((folder / "pid").read_text()))


def test_windows_is_kept_awake_around_wsl(wsl):
    windows(wsl, "True")
    with limits.awake() as line:
        assert "Windows, by powershell.exe" in line and alive(wsl)
        asked = (wsl / "asked").read_text()
        assert "SetThreadExecutionState" in asked and not {'"', "\n"} & set(asked)  # which a command line would change
    assert (wsl / "ended").exists() and not alive(wsl)


@pytest.mark.parametrize("answer", ["False", ""])
def test_windows_that_refuses(wsl, answer):
    windows(wsl, answer)
    with limits.awake() as line:
        assert "turn that off" in line


def test_windows_that_never_answers_is_not_waited_for(wsl, monkeypatch):
    windows(wsl, "", ends="exec sleep 600")
    (wsl / "powershell.exe").write_text("#!/bin/sh\necho $$ > " + f"{wsl}/pid\nexec sleep 600\n")
    monkeypatch.setattr(limits, "WINDOWS_STARTS", 0.5)
    monkeypatch.setattr(limits, "TO_END", 0.2)
    with limits.awake() as line:
        assert "turn that off" in line
    assert not alive(wsl)


def test_wsl_without_windows_programs(wsl):
    with limits.awake() as line:
        assert "turn that off" in line


def test_its_child_ends_with_a_night_that_is_killed(wsl):
    windows(wsl, "True")
    night = (
        "import platform, sys, time; from lab.night import limits; from calibration import identity\n"
        "identity.in_wsl = lambda: True\n"
        "with limits.awake() as line:\n    print(line, flush=True)\n    time.sleep(600)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(limits.__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", night], stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(root)
    )
    assert "Windows" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while not (wsl / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (wsl / "ended").exists()
