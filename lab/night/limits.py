"""What ends a night or makes it wait: the time, the battery, the disk, heat, and other programs. And what keeps the
computer from falling asleep meanwhile."""

from __future__ import annotations

import math
import os
import re
import select
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil

import storage
from calibration import identity
from lab import untrusted
from lab.run import log as capture
from lab.errors import LabError
from lab.session.session import taken

GB = 10**9
LOWEST_CHARGE = 40  # percent of a battery that is being used up
LEAST_FREE = 2 * GB  # bytes of disk
RUNS_TO_FIT = 3  # on it, at least
BUSY_GPU = 0.5  # share of the time; a desktop that plays a video takes less
BUSY_CPU = 0.25  # share of all cores: so much less is what a run would be marked for
STALE = 60.0  # seconds between two looks, after which their difference says little of now
TO_END = 5.0  # seconds that it is given to end by itself
WINDOWS_STARTS = 20.0  # seconds that PowerShell may take to start and compile a line
TIME_OF_DAY = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)

# What it asked for ends with it, and it ends when nobody is left to read from.
STAY_AWAKE = """
$source = '[DllImport({0}kernel32.dll{0})] public static extern uint SetThreadExecutionState(uint flags);' -f [char]34
$power = Add-Type -PassThru -Name Power -Namespace Autoresearch -MemberDefinition $source
$continuous, $end = [uint32]2147483649, [Console]::OpenStandardInput().ReadAsync((New-Object byte[] 1), 0, 1)
[bool]$power::SetThreadExecutionState($continuous)
while (-not $end.Wait(30000)) { [void]$power::SetThreadExecutionState($continuous) }
"""


def deadline(hours: float | None, until: str | None, now: datetime) -> float | None:
    """When a night ends, in seconds as time.time() has them: the earlier of both limits; None without any.

    Args:
        hours: how long it lasts. until: a time of day, local: "07:00". now: when it begins; naive is local time.

    Raises:
        LabError: one of them can't be; the reason says what to write.
    """
    ends = []
    if hours is not None:
        if not (math.isfinite(hours) and 0 < hours <= 24 * 366):
            raise LabError("--hours takes a positive number of hours, such as 8 or 0.5")
        ends.append(now.timestamp() + 3600 * hours)
    if until is not None:
        found = TIME_OF_DAY.fullmatch(until.strip())
        if not found:
            raise LabError("--until takes a time of day between 00:00 and 23:59, such as 07:00")
        today = now.astimezone().replace(tzinfo=None, hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
        times = [(today + timedelta(days)).replace(fold=fold).timestamp() for days in (0, 1) for fold in (0, 1)]
        ends.append(min(one for one in times if one > now.timestamp()))  # a fold: clocks were put back, it comes twice
    return min(ends, default=None)


def asked(options) -> dict:
    """The limits, as a night's journal has them."""
    return {name: getattr(options, name) for name in ("hours", "until", "max_experiments")}


def interrupted(events: list[dict], asked: dict, now: float) -> dict | None:
    """The event with which a night began that was killed and asked for the same limits: it goes on as it was.

    Args:
        events: of night.jsonl. asked: the limits. now: as of time.time().
    """
    last = next((event for event in reversed(events) if event["event"] in ("began", "ended")), None)
    goes_on = last and last["event"] == "began" and last["asked"] == asked and (last["deadline"] or math.inf) > now
    return last if goes_on else None


# --- Troubles ---


@dataclass(frozen=True)
class Trouble:
    """Why a night can't go on now.

    Attributes:
        kind: "battery", "disk", "hot", "throttled", "busy" or "taken" (by another session). text: for people.
        action: "stop" if it has to be mended by somebody, "wait" if it may pass.
    """

    kind: str
    text: str
    action: str


def troubles(session) -> list[Trouble]:
    """What is the matter now, as far as it can be read: what this system does not tell is no trouble."""
    found = [
        Trouble(kind, text, "stop") for kind, text in (("battery", low_battery()), ("disk", full_disk(session))) if text
    ]
    kind = session.profile.get("machine", {}).get("kind", "")
    device, training = identity.now(kind, session.facts["gpu"]), session.supervised
    if text := identity.overheated() or (device.get("margin", 1) <= 0 and "the GPU is as hot as it may get"):
        found.append(Trouble("hot", text, "wait"))
    throttled = device.get("throttled")
    if throttled and throttled != session.profile.get("machine", {}).get("throttled"):  # else it was measured like that
        found.append(Trouble("throttled", f"the device is throttled: {throttled}", "wait"))
    text = others.look(training) if kind == "cpu" else None
    if not training and device.get("in_use", 0.0) >= BUSY_GPU:
        text = f"another program uses the GPU, {device['in_use']:.0%} of the time"
    if text:
        found.append(Trouble("busy", text, "wait"))
    if not training and taken(session.device_lock):
        found.append(Trouble("taken", "another session is training on this device", "wait"))
    return found


def low_battery() -> str | None:
    try:
        battery = psutil.sensors_battery()
    except Exception:  # psutil passes on what the system's files make it raise
        return None
    if battery is None or battery.power_plugged is not False or battery.percent >= LOWEST_CHARGE:
        return None
    return f"the computer runs on battery, of which {battery.percent:.0f} % are left: plug it in"


def full_disk(session) -> str | None:
    """That the home's or the repository's disk has no room for some more runs."""
    weights = session.folder / "best.safetensors"
    size = weights.stat().st_size if weights.exists() else 0
    needed = max(LEAST_FREE, RUNS_TO_FIT * (size + capture.FLOOD))
    for place in (storage.home(), Path(session.facts["tree"])):
        with suppress(OSError):
            free = shutil.disk_usage(place).free
            if free < needed:
                return (
                    f"{free / GB:.1f} GB are free on the disk of {place}, and {RUNS_TO_FIT} runs may take "
                    f"{needed / GB:.1f} GB: make room"
                )
    return None


class Others:
    """What programs that are not this night's take of the CPU, from look to look."""

    def __init__(self):
        self._at, self._seconds = -math.inf, {}  # seconds of the CPU by process

    def look(self, training: bool) -> str | None:
        """Who keeps the CPU busy since the last look. Processes that have ended are not counted, so that a run of ours
        which ended in between is not; while one goes on (`training`) its processes can't be told from others."""
        before, last, now = self._seconds, self._at, time.monotonic()
        alive = {
            (one.pid, one.info["create_time"]): one.info
            for one in psutil.process_iter(["ppid", "name", "cpu_times", "create_time"])
            if one.info["cpu_times"]
        }
        self._seconds = {key: info["cpu_times"].user + info["cpu_times"].system for key, info in alive.items()}
        self._at = now
        if training or not 0 < now - last < STALE:
            return None
        ours = below(os.getpid(), {pid: info["ppid"] for (pid, _), info in alive.items()})
        took = {key: self._seconds[key] - before.get(key, 0.0) for key in alive if key[0] not in ours}
        share = sum(took.values()) / (now - last) / (os.cpu_count() or 1)
        if not took or share < BUSY_CPU:
            return None
        name = untrusted.one_line(alive[max(took, key=took.get)]["name"] or "one without a name", 40)
        return f"other programs, {name} above all, take {min(share, 1):.0%} of the CPU"


others = Others()


def below(pid: int, parents: dict[int, int]) -> set[int]:
    """A process and all below it."""
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


# --- Sleep ---


@contextmanager
def awake():
    """Keeps the computer awake meanwhile, where that can be done; yields a line that says whether, and how."""
    with ExitStack() as held:
        how = []
        if name := held.enter_context(_kept_by_the_system()):
            how.append(name)
        if identity.in_wsl() and held.enter_context(_kept_by_windows()):
            how.append("Windows, by powershell.exe")
        yield (
            f"the computer is kept awake ({' and '.join(how)})"
            if how
            else "nothing here can keep the computer awake: if it sleeps by itself, switch that off for the night"
        )


@contextmanager
def _kept_by_the_system():
    """What keeps the computer awake, in a word or two, or None."""
    mode = None
    with suppress(Exception):  # not installed, or a bus that answers nonsense: no reason for not having a night
        from wakepy import keep

        mode = keep.running(on_fail="pass")
        mode.__enter__()
    try:
        yield mode.method.name if mode and mode.active else None
    finally:
        if mode:
            with suppress(Exception):
                mode.__exit__(None, None, None)


@contextmanager
def _kept_by_windows():
    """Whether Windows, around this Linux, stays awake. Its child ends with us, however we end: by its input."""
    try:
        lines = STAY_AWAKE.strip().replace("\n", "; ")
        child = subprocess.Popen(
            ["powershell.exe", "-NoProfile", "-NonInteractive", "-Command", lines],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # Windows' programs are not to be had here
        yield False
        return
    try:
        ready, _, _ = select.select([child.stdout], [], [], WINDOWS_STARTS)
        yield bool(ready and child.stdout.readline().strip() == b"True")
    finally:
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(TO_END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
