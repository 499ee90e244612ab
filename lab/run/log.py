"""The log of a run: what it prints goes through a pipe into a file that stays small, whatever is printed."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

HEAD, TAIL = 256 * 1024, 384 * 1024  # bytes that are kept of what a run printed first and last
MOST = 1024 * 1024  # a longer file is cut down to those
FLOOD = 64 * 1024 * 1024  # bytes, after which a run is ended
PROGRESS_EVERY = 1.0  # seconds between the lines kept of one that is written over and over
LONGEST = 8192  # bytes of an unfinished line that are held back
# What a terminal would obey when it shows the file: escape sequences (ECMA-48), and what is left of control characters.
ESCAPES = re.compile(rb"\x1b(?:[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\[[0-?]*[ -/]*[@-~]?|[ -/]*[0-~]?)")
CONTROLS = bytes(c for c in range(32) if c not in b"\t\n\r") + b"\x7f"


class Log:
    """Drains a pipe into a file, on a thread, until its other ends are closed; then it closes the pipe's own end.

    The file grows while the run prints (`tail -f`). A line that is written over itself, after a carriage return, is
    kept once a second.

    Attributes:
        flooded: more was printed than any sound run prints.
    """

    def __init__(self, pipe: IO[bytes], path: Path, flood: int = FLOOD):
        self.pipe, self.flood, self.flooded = pipe, flood, False
        self._file = open(path, "wb+")
        self._read = self._left_out = 0
        self._line, self._shown = b"", 0.0  # what is unfinished; when progress was kept last
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._drain, name="log", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while chunk := os.read(self.pipe.fileno(), 65536):
            self._read += len(chunk)
            self.flooded = self.flooded or self._read > self.flood
            with self._lock:
                if self.flooded or self._closed:  # what is left of the run is not to be held up by a full pipe
                    continue
                try:
                    self._take(chunk)
                except OSError:  # a full disk: the run is not to be held up by its log
                    self._line = b""
        self.pipe.close()

    def _take(self, chunk: bytes) -> None:
        text, newline, rest = (self._line + chunk).replace(b"\r\n", b"\n").rpartition(b"\n")
        written_over, _, self._line = rest.rpartition(b"\r")
        if b"\r" in text:
            text = b"\n".join(map(last_written, text.split(b"\n")))
        text += newline
        if (seen := last_written(written_over)) and time.monotonic() - self._shown >= PROGRESS_EVERY:
            text, self._shown = text + seen + b"\n", time.monotonic()
        if len(self._line) > LONGEST:
            text, self._line = text + self._line, b""
        self._write(text)

    def _write(self, text: bytes) -> None:
        text = ESCAPES.sub(b"", text).translate(None, CONTROLS + b"\r")
        self._file.write(text)
        self._file.flush()
        size = self._file.tell()
        if size > MOST:
            self._file.seek(size - TAIL)
            tail = self._file.read()
            self._left_out += size - HEAD - TAIL
            self._file.seek(HEAD)
            self._file.truncate()
            self._file.write(b"\n... %d bytes were left out here ...\n" % self._left_out + tail)
            self._file.flush()

    def close(self, patience: float = 2.0) -> None:
        """Waits until everything is written. A process that still holds the pipe is waited for `patience` seconds; what
        it prints later is dropped."""
        self._thread.join(patience)
        with self._lock, suppress(OSError):
            self._closed = True
            self._write(last_written(self._line))
        with suppress(OSError):  # a full disk
            self._file.close()


def last_written(line: bytes) -> bytes:
    """What is seen of a line that was written over."""
    return next((part for part in reversed(line.split(b"\r")) if part.strip()), b"")


def read(path: Path) -> str:
    """A log as text, or nothing."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def tail(path: Path, most: int) -> bytes:
    """The last bytes of a file that may be growing, or nothing."""
    with suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
                return file.read(most)
    return b""


def last_line(path: Path) -> str:
    """The last line of a log that says something, or nothing."""
    return (read(path).strip().splitlines() or [""])[-1]
