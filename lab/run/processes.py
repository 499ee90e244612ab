"""Processes: which there are, whether they still run, and how they are ended."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

import storage

POLL = 0.05  # seconds
SAME_START = 0.005  # seconds; the system counts in hundredths
UNENDABLE = 10.0  # seconds after which a process that was killed hangs in the kernel, and is given up


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def below() -> list[psutil.Process]:
    """All processes that this process started, and those that they started."""
    return tree(os.getpid())[1:]


def marked(**variables: str) -> list[psutil.Process]:
    """The processes with these environment variables, this one excepted, and all below them."""
    return _with_descendants(lambda process: variables.items() <= process.environ().items())


def in_group(group: int) -> list[psutil.Process]:
    """The processes of a group, also those whose parents have ended, and all below them."""
    return _with_descendants(lambda process: os.getpgid(process.pid) == group)


def shell(command: str, **options) -> subprocess.Popen:
    """Has the shell run a command, in a session of its own: Ctrl-C does not reach it. Options are those of Popen."""
    return subprocess.Popen(command, shell=True, start_new_session=True, **options)


def left_of(process: subprocess.Popen | None, **variables: str) -> list[psutil.Process]:
    """What runs of all that a command has started: below it, of its group, or with these environment variables."""
    family = marked(**variables) + ([*tree(process.pid), *in_group(process.pid)] if process else [])
    return [member for member in set(family) if runs(member)]


def _with_descendants(wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    family = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and runs(process) and wanted(process):
                family |= {member.pid: member for member in tree(process.pid)}
    family.pop(os.getpid(), None)
    return list(family.values())


def note(path: Path, pid: int) -> psutil.Process | None:
    """Writes down a process, for `noted`; gives it. None, and no file, if it has ended already."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        created = process.create_time()
        storage.write_json(path, {"pid": pid, "created": created, "after_boot": created - psutil.boot_time()})
        return process


def noted(path: Path) -> psutil.Process | None:
    """The process that was written down there, if it still runs: a later one with its number is another. On Linux both
    the time of its start and that of the system's move with a clock that is set."""
    known = storage.read_json(path) or {}
    with suppress(KeyError, psutil.Error):
        process = psutil.Process(known["pid"])
        created = process.create_time()
        moved = abs(created - psutil.boot_time() - known.get("after_boot", math.inf)) < SAME_START
        return process if (created == known["created"] or moved) and runs(process) else None


def runs(process: psutil.Process) -> bool:
    """Not ended, nor a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end(find: Callable[[], Iterable[psutil.Process]], patience: float = 0.0, ask: bool = False) -> int:
    """Ends processes until there are none; returns how many it ended.

    Args:
        find: those that are to end. It is called again and again: what is being ended may start another.
        patience: seconds they have to end by themselves, before they are killed.
        ask: sends each of them SIGTERM first.
    """
    ended, killing = set(), time.monotonic() + patience
    while alive := [process for process in find() if runs(process)]:
        now = time.monotonic()
        if now > killing + UNENDABLE:
            break
        for process in alive:
            with suppress(psutil.Error):
                if now >= killing:
                    process.kill()
                    ended.add(process.pid)
                elif ask and process.pid not in ended:
                    process.terminate()
                    ended.add(process.pid)
        time.sleep(POLL)
    return len(ended)


def follow(lifeline: int, end) -> None:
    """Ends this process, after what `end` ends, once nobody has the other end of the pipe `lifeline` any more. Not in
    child.py, whose threads would be taken for train.py's: both are `__main__`."""
    while os.read(lifeline, 1):
        pass
    end()
    os._exit(1)
