"""Files that a crash or a power failure leaves whole, and where they are kept. Everything here may use this module.

A file is replaced as a whole (`atomic`), and what was written is on the disk before anything relies on it (`sync`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


FULL = re.compile("No space left|File too large|requested and .* written")  # as safetensors and numpy say it


class Stop(SystemExit):
    """Ends the process with exit status 1 and the reason, `str(error)`, as its last line: "Invalid: it looks ahead".
    Being a SystemExit it shows no traceback, and an `except Exception` in train.py does not swallow it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.code = f"\n{type(self).__name__}: {reason}"  # Python prints this; a line of progress may be unfinished
        with suppress(OSError, ValueError, AttributeError):  # it may be closed, or none
            sys.stdout.flush()  # what was printed before comes first


class DataError(Stop):
    """Data are missing, damaged or too small; the reason says what to do next."""


def home() -> Path:
    """The folder that everything is kept under: `AUTORESEARCH_HOME`, else ~/.cache/autoresearch.

    Raises:
        DataError: that is not an absolute path, or this user has no home folder.
    """
    named = os.environ.get("AUTORESEARCH_HOME")
    path = Path(os.path.expanduser(named or "~/.cache/autoresearch"))
    if path.is_absolute():
        return path
    if named and not named.startswith("~"):  # commands are run from several folders: each would have a home of its own
        raise DataError(
            f"AUTORESEARCH_HOME={named} is not an absolute path; set it to {Path(named).absolute()}, for example"
        )
    raise DataError(f"there is no home folder for {path}; set AUTORESEARCH_HOME to a folder that you can write to")


def disk_full(error: BaseException) -> bool:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or bool(FULL.search(str(error)))


@contextmanager
def writing(path: Path):
    """Makes the folder of `path`; what goes wrong with the disk meanwhile becomes a DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or disk_full(error) or "os error" in str(error)):  # of safetensors
            raise
        advice = "; free some space on that disk and run the same command again" if disk_full(error) else ""
        if not advice and home() in path.parents:
            advice = "; set AUTORESEARCH_HOME to a folder that you can write to"
        raise DataError(f"could not write {path} ({error}){advice}") from error


def require_writable(path: Path) -> None:
    """DataError if no file can be made where `path` is to be (see `writing`)."""
    with writing(path), TemporaryFile(dir=path.parent):
        pass


@contextmanager
def atomic(path: Path, mode: int = 0o666):
    """A binary file to write that appears at `path` complete or, on any failure, not at all (see `writing`). Its
    permissions are `mode`, less the umask, from the beginning."""
    with replacing(path) as temporary:
        with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
            yield file
            file.flush()
            sync(file.fileno())


@contextmanager
def replacing(path: Path):
    """The name of a file to write, one that no other process or thread uses. It is put in place of `path` at the end,
    and removed on any failure (see `writing`)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # it would hide why nothing could be written
            temporary.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Returns once what was written to a file is on the disk. macOS would leave it in the drive's cache at fsync."""
    flush_drive = getattr(fcntl, "F_FULLFSYNC", None)
    if fcntl and flush_drive is not None:
        try:
            fcntl.fcntl(descriptor, flush_drive)
            return
        except OSError:  # a file system that can't
            pass
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as durable as what they name; a system that can't open folders does so by itself."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        sync(descriptor)
    except OSError:  # a file system that can't
        pass
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict, mode: int = 0o666) -> None:
    with atomic(path, mode) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict | None:
    """The object that a file holds; None if there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
