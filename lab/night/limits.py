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
from lab.errors import LabError
from lab.run import processes
from lab.run.log import FLOOD
from lab.run.outcome import LEAST_FREE
from lab.session.events import NightBegan, NightEnded, NightEvent
from lab.session.locks import is_held
from lab.session.session import Session

GB = 10**9
LOWEST_CHARGE = 40  # percent of a battery that is being used up
RUNS_TO_FIT = 3  # on it, at least
BUSY_GPU = 0.5  # share of the time; a desktop that plays a video takes less
BUSY_CPU = 0.25  # share of all cores
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
        time_of_day = TIME_OF_DAY.fullmatch(until.strip())
        if not time_of_day:
            raise LabError("--until takes a time of day between 00:00 and 23:59, such as 07:00")
        hour, minute = map(int, time_of_day.groups())
        today = now.astimezone().replace(tzinfo=None, hour=hour, minute=minute, second=0, microsecond=0)
        # A fold: clocks were put back, and the time comes twice.
        times = [(today + timedelta(days)).replace(fold=fold).timestamp() for days in (0, 1) for fold in (0, 1)]
        ends.append(min(at for at in times if at > now.timestamp()))
    return min(ends, default=None)


def asked(options) -> dict:
    """The limits, as a night's journal has them."""
    return {name: getattr(options, name) for name in ("hours", "until", "max_experiments")}


def interrupted(events: list[NightEvent], options, now: float) -> NightBegan | None:
    """The begin of a killed night that was given the same limits, which this night continues.

    Args:
        events: of night.jsonl. options: hours, until, max_experiments. now: as of time.time().
    """
    last = next((event for event in reversed(events) if isinstance(event, (NightBegan, NightEnded))), None)
    if isinstance(last, NightBegan) and last.asked == asked(options) and (last.deadline or math.inf) > now:
        return last
    return None


# --- Troubles ---


@dataclass(frozen=True)
class Trouble:
    """The reason why a night can't continue now, or takes longer.

    Attributes:
        kind: "battery", "disk", "hot", "throttled", "busy" or "taken" (by another session). text: for people.
        action: "stop" if a person has to fix it, "wait" if it may pass, "say" if runs only take longer by it.
    """

    kind: str
    text: str
    action: str


def troubles(session: Session) -> list[Trouble]:
    """The present troubles, as far as this system reports them."""
    machine, training = session.profile.get("machine", {}), session.supervised
    device = identity.now(kind := machine.get("kind", ""), session.local.gpu)
    throttled, in_use = device.get("throttled"), device.get("in_use", 0.0)
    hot = identity.overheated() or (device.get("margin", 1) <= 0 and "the GPU is as hot as it may get")
    busy = others.look(training) if kind == "cpu" else ""
    if not training and in_use >= BUSY_GPU:
        busy = f"another program uses the GPU {in_use:.0%} of the time"
    known = [
        Trouble("battery", low_battery(), "stop"),
        Trouble("disk", full_disk(session), "stop"),
        Trouble("hot", hot or "", "wait"),
        Trouble("busy", busy, "say"),
    ]
    if throttled and throttled != machine.get("throttled"):  # else it was measured like that
        known.append(Trouble("throttled", f"the device is throttled: {throttled}", "say"))
    if not training and session.fleet is None and is_held(session.device_lock):  # else its own workers may hold it
        known.append(Trouble("taken", "another session is training on this device", "wait"))
    return [trouble for trouble in known if trouble.text]


def low_battery() -> str:
    battery = identity.battery()
    if battery is None or battery.plugged is not False or battery.percent is None or battery.percent >= LOWEST_CHARGE:
        return ""
    return f"the computer runs on battery, with {battery.percent:.0f} % left: plug it in"


def full_disk(session: Session) -> str:
    """The trouble that the home's or the repository's disk has no space for some more runs."""
    weights = session.folder / "best.safetensors"
    needed = max(LEAST_FREE, RUNS_TO_FIT * ((weights.stat().st_size if weights.exists() else 0) + FLOOD))
    for place in (storage.home(), Path(session.local.repository)):
        with suppress(OSError):
            if (free := shutil.disk_usage(place).free) < needed:
                return (
                    f"{free / GB:.1f} GB are free on the disk of {place}, and {RUNS_TO_FIT} runs may take "
                    f"{needed / GB:.1f} GB: free some space"
                )
    return ""


class Others:
    """What programs that are not this night's take of the CPU, from look to look."""

    def __init__(self):
        self._at, self._seconds = -math.inf, {}  # of the last look, and the seconds of the CPU by process then

    def look(self, training: bool) -> str:
        """Who keeps the CPU busy since the last look. Processes that have ended are not counted, so that a run of ours
        which ended in between is not; while one goes on (`training`) its processes can't be told from others."""
        before, last, self._seconds, self._at = self._seconds, self._at, {}, time.monotonic()
        names, ours = {}, {os.getpid(), *(process.pid for process in processes.below())}
        for process in psutil.process_iter(["name", "cpu_times", "create_time"]):
            if times := process.info["cpu_times"]:
                key = process.pid, process.info["create_time"]
                self._seconds[key], names[key] = times.user + times.system, process.info["name"]
        if training or not 0 < self._at - last < STALE:
            return ""
        took = {key: now - before.get(key, 0.0) for key, now in self._seconds.items() if key[0] not in ours}
        share = sum(took.values()) / (self._at - last) / (os.cpu_count() or 1)
        if not took or share < BUSY_CPU:
            return ""
        name = untrusted.one_line(names[max(took, key=lambda key: took[key])] or "a program without a name", 40)
        return f"other programs, {name} above all, take {min(share, 1):.0%} of the CPU"


others = Others()


# --- Sleep ---


@contextmanager
def awake():
    """Keeps the computer awake meanwhile, where that can be done; yields a line that says whether, and how."""
    with ExitStack() as stack:
        how = []
        with suppress(Exception):  # not installed, or a bus that answers nonsense: no reason for not having a night
            from wakepy import keep

            mode = keep.running(on_fail="pass")
            stack.callback(_leave, mode)
            mode.__enter__()
            if mode.active and mode.method:
                how.append(mode.method.name)
        if identity.in_wsl() and stack.enter_context(_kept_by_windows()):
            how.append("Windows, by powershell.exe")
        if how:
            yield f"the computer is kept awake ({' and '.join(how)})"
        else:
            yield ("the computer can't be kept awake: if it goes to sleep by itself, turn that off for the night")


def _leave(mode) -> None:
    with suppress(Exception):
        mode.__exit__(None, None, None)


@contextmanager
def _kept_by_windows():
    """Keeps Windows awake, around this Linux; whether it does. Its child ends with us, however we end: by its input."""
    lines = STAY_AWAKE.strip().replace("\n", "; ")
    command = ["powershell.exe", "-NoProfile", "-NonInteractive", "-Command", lines]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, start_new_session=True)
    except OSError:  # Windows' programs are not to be had here
        yield False
        return
    assert child.stdin and child.stdout
    try:
        ready, _, _ = select.select([child.stdout], [], [], WINDOWS_STARTS)
        yield bool(ready) and child.stdout.readline().strip() == b"True"
    finally:
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(TO_END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
