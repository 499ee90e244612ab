"""Locks between processes: files that the system locks, so that a process that dies leaves none."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import filelock

import storage
from backends import machine
from lab.errors import LabError


class Lock(filelock.FileLock):
    """A lock of `filelock`'s, which is taken by the system or not at all.

    Raises:
        LabError: the file system has no locks, or can't be written; it says what to do.
    """

    def __init__(self, path: Path | str, timeout: float = -1, poll_interval: float = 0.05):
        super().__init__(path, timeout, poll_interval=poll_interval, fallback_to_soft=False)

    def acquire(self, *arguments, **named):
        try:
            return super().acquire(*arguments, **named)
        except filelock.Timeout:
            raise
        except OSError as error:
            raise no_locks(self, error) from error


def no_locks(lock: filelock.BaseFileLock, problem: OSError) -> LabError:
    if problem.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return LabError(
            f"this shell may not write {Path(lock.lock_file).parent} ({problem.strerror}), as in an agent's sandbox. "
            "Run this command in a shell outside of it, let the sandbox write there, or have the agent use the "
            "lab's MCP server, which runs outside (docs/agents.md). Commands that only read work here: status, log"
        )
    return LabError(
        f"{lock.lock_file} can't be locked ({problem}): set AUTORESEARCH_HOME to a folder that you can write to, on "
        "a disk of this computer"
    )


def device_lock(device: str, gpu: str) -> Lock:
    """Held while anything trains on the device of this tag, in whatever session. Computers that share a home have locks
    of their own: a GPU's name (`machine.gpu_name`, or "") is its alone, others are called by their computer, too.
    """
    own = gpu if gpu.startswith(("GPU-", "MIG-")) else f"{device}-{gpu}-{machine.host()}"
    path = storage.home() / "locks" / f"{re.sub(r'[^0-9A-Za-z.-]', '', own)}.lock"
    with storage.writing(path):
        return Lock(path)


def is_held(lock: filelock.BaseFileLock) -> bool:
    """Whether a lock is held, by another process or another object of this one. Looking never takes it where the
    system can tell: a look must not keep anybody from work. LabError if the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows: there is no other way than to try
        try:
            with lock.acquire(blocking=False):
                return False
        except filelock.Timeout:
            return True
    try:
        file = open(lock.lock_file, "rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: pollers do not see one another
        except (BlockingIOError, PermissionError):  # EACCES is what some systems say of a lock that another has
            return True
        except OSError as error:
            raise no_locks(lock, error) from error
    return False


def refuse_if_busy(lock: filelock.BaseFileLock) -> None:
    """LabError if something else trains on the device."""
    if is_held(lock):
        raise LabError(
            "another session is training on this device, and two at once would slow each other down. Wait until it "
            "is done (python -m lab wait, in its repository), then run this again"
        )
