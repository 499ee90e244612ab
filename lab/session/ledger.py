"""The ledger, results.tsv: a row for each run, flushed to disk before anything follows from it, read without guessing.

Its first five columns are the original's, so that notebooks for those read it: a run without a score or a peak of
memory has 0.000000 and 0.0 there; elsewhere what is unknown is empty. In text, tabs, line ends and backslashes are
escaped as \\t, \\n, \\r and \\\\, and so is a quotation mark at the start, with which a quoted field would begin in
CSV. Other control characters are removed.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

import storage
from lab.errors import LabError

COLUMNS = tuple(
    """commit val_bpb memory_gb status description device backend run seed started training_seconds
total_seconds tokens_M steps params_M depth tok_per_s tflops mfu speed val_rows eval data profile parent patch origin
portable reason""".split()
)
ORIGINAL = COLUMNS[:5]
NUMBERS = {  # how they are written; mfu is in percent
    "val_bpb": ".6f", "memory_gb": ".1f", "run": "d", "seed": "d", "training_seconds": ".1f", "total_seconds": ".1f",
    "tokens_M": ".3f", "steps": "d", "params_M": ".3f", "depth": "d", "tok_per_s": ".1f", "tflops": ".4g", "mfu": ".2f",
    "speed": ".2f", "val_rows": "d",
}  # fmt: skip
NEVER_ZERO = ("val_bpb", "memory_gb")  # a zero there says that nothing was measured
EMPTY = {name: None if name in NUMBERS else "" for name in COLUMNS}
FROM_RESULT = {  # columns by the names that prepare.report gives them
    "val_bpb": "val_bpb", "training_seconds": "training_seconds", "total_seconds": "total_seconds",
    "tokens_M": "total_tokens_M", "steps": "num_steps", "params_M": "num_params_M", "depth": "depth",
    "tok_per_s": "tokens_per_second", "mfu": "mfu_percent", "speed": "speed", "val_rows": "val_rows", "eval": "eval",
    "data": "data", "profile": "profile", "device": "device", "backend": "backend",
}  # fmt: skip

PATIENCE = 60  # seconds for another writer to end
ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
ESCAPING = {**dict.fromkeys([*range(32), *range(127, 160)]), **{ord(plain): text for plain, text in ESCAPES.items()}}
MEANING = {text[1]: plain for plain, text in ESCAPES.items()} | {'"': '"'}


@dataclass(frozen=True)
class SetAside:
    """A line that is no sound row: its number (from 1), its text, and why it is not believed."""

    line: int
    text: str
    why: str


@dataclass(frozen=True)
class Ledger:
    """What a ledger holds.

    Attributes:
        rows: dicts by column, all of COLUMNS and what else the file has. Numbers are float or int, None where empty;
            everything else is text.
        set_aside: lines that were cut short or damaged.
        columns: of the file; none if it has no whole line. headed: whether it names them itself.
    """

    rows: list[dict]
    set_aside: list[SetAside]
    columns: tuple[str, ...]
    headed: bool


# --- Reading ---


def read(path: Path) -> Ledger:
    """A ledger: ours, or the original's with its five columns, in which nothing is escaped.

    Raises:
        LabError: it is missing, can't be read, or is no ledger.
    """
    try:
        return parse(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise LabError(f"there is no ledger {path}; check the path") from None
    except OSError as error:
        raise LabError(f"{path} can't be read ({error}); check the path and its permissions") from error


def parse(content: bytes, name: str = "results.tsv") -> Ledger:
    """As `read`, of a file's content; `name` is what errors call it."""
    *lines, tail = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows, set_aside, row_of_fields, columns, headed = [], [], None, (), False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = _fields(line)
            if row_of_fields is None:
                columns, headed = _columns(fields, name)
                row_of_fields = _reader(columns)
                if headed:
                    continue
            rows.append(row_of_fields(fields))
        except ValueError as error:
            set_aside.append(SetAside(number, line.decode(errors="replace").removesuffix("\r"), str(error)))
    if tail.strip():
        why = "it may be cut short: the line does not end (if it is whole, end it)"
        set_aside.append(SetAside(len(lines) + 1, tail.decode(errors="replace"), why))
    return Ledger(rows, set_aside, columns, headed)


def _fields(line: bytes) -> list[str]:
    if b"\0" in line:
        raise ValueError("it holds zero bytes, where a part was lost")
    return line.decode().removesuffix("\r").split("\t")  # UnicodeDecodeError is a ValueError


def _columns(fields: list[str], name: str) -> tuple[tuple[str, ...], bool]:
    """(names of the columns, whether these fields are the names). LabError if this is no ledger."""
    names = tuple(field.strip() for field in fields)
    if {"commit", "val_bpb"} <= set(names):
        if len(set(names)) == len(names) and all(name and name.isprintable() for name in names):
            return names, True
        raise LabError(f"{name} names a column twice, or not at all: {', '.join(names)}; mend its first line")
    for known in (ORIGINAL, COLUMNS):
        if len(fields) == len(known):
            try:
                _number("val_bpb", fields[1])
            except ValueError:
                break
            return known, False
    raise LabError(
        f"{name} is no ledger: its first line has neither the columns' names, {' '.join(ORIGINAL)} and so "
        "on with tabs between, nor a row of them"
    )


def _reader(columns: tuple[str, ...]):
    """fields -> row."""
    numbers = [name for name in columns if name in NUMBERS]
    words = [name for name in columns if name not in NUMBERS]
    escaped = "run" in columns  # the original escapes nothing

    def row(fields: list[str]) -> dict:
        if len(fields) != len(columns):
            raise ValueError(f"it has {len(fields)} fields instead of {len(columns)}")
        found = EMPTY | dict(zip(columns, fields))
        for name in numbers:
            found[name] = _number(name, found[name])
        if escaped:
            for name in words:
                if "\\" in found[name]:
                    found[name] = unescape(found[name])
        return found

    return row


def _number(name: str, text: str) -> int | float | None:
    if not (text := text.strip()):
        return None
    try:
        value = int(text) if NUMBERS[name] == "d" else float(text)
    except ValueError:
        value = math.inf
    if value == math.inf or value == -math.inf or "_" in text or not text.isascii():  # Python takes 1_0
        raise ValueError(f"{name} is {text[:40]!r}, not a number that fits its column")
    return None if value != value or value == 0 and name in NEVER_ZERO else value


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: MEANING.get(found[1], found[0]), text)


# --- Writing ---


def append(path: Path, rows: list[dict]) -> None:
    """Appends rows (dicts by column, as `row_of` makes them) and returns once they are on disk. A row whose `run` is in
    the ledger already is left out, so that a step which was interrupted can be done again. What a power failure left of
    a last line is moved to <name>.damaged first. Safe beside other writers.

    Raises:
        LabError: the file there is another ledger or none, or another writer does not end.
        DataError: it can't be written; the reason says why.
    """
    path = Path(path)
    with _alone(path), storage.writing(path):
        content = path.read_bytes() if path.exists() else b""
        sound, tail = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        before = parse(sound, str(path))
        if before.columns and (missing := [name for name in COLUMNS if name not in before.columns]):
            raise LabError(
                f"{path} has no column {', '.join(missing)}: rows of this version don't fit there. Move it "
                "away and do the same again; a new one is then begun"
            )
        known, new = {row["run"] for row in before.rows} - {None}, []
        for row in rows:
            if row.get("run") not in known:
                new.append(row)
                known |= {row.get("run")} - {None}
        added = dumps(new, before.columns) if before.columns else dumps(new)
        if before.columns:
            added = added.split(b"\n", 1)[1]
        if tail:
            _move_to_damaged(path, tail)
        if not (tail or new):
            return
        with open(path, "ab") as file:
            file.truncate(len(sound))
            file.write(added)
            file.flush()
            storage.sync(file.fileno())
        if not content:
            storage.sync_folder(path.parent)


@contextmanager
def _alone(path: Path):
    """The only writer. The system itself takes this lock from a process that dies."""
    with storage.writing(path):
        lock = filelock.FileLock(path.with_name(path.name + ".lock"), timeout=PATIENCE, poll_interval=0.005)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise LabError(
                f"another process has been writing {path} for {PATIENCE} s; end it, and do the same again"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _move_to_damaged(path: Path, tail: bytes) -> None:
    """Copies what is about to be cut off, unless a process that was killed has done it just before."""
    damaged = path.with_name(path.name + ".damaged")
    there = damaged.read_bytes() if damaged.exists() else b""
    if there.endswith(tail + b"\n"):
        return
    with open(damaged, "ab") as file:
        file.write(tail + b"\n")
        file.flush()
        storage.sync(file.fileno())
    storage.sync_folder(path.parent)


def dumps(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> bytes:
    """A ledger's content: header and rows. ValueError for a number that is none."""
    lines = ["\t".join(map(escape, columns))]
    lines += ["\t".join(_written(name, row.get(name)) for name in columns) for row in rows]
    return "".join(line + "\n" for line in lines).encode(errors="replace")


def _written(name: str, value) -> str:
    if name not in NUMBERS:
        return escape("" if value is None else str(value))
    try:
        if value is None or not math.isfinite(value):
            return format(0, NUMBERS[name]) if name in NEVER_ZERO else ""
        return format(value, NUMBERS[name])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}, which does not fit its column ({NUMBERS[name]})") from None


def escape(text: str) -> str:
    text = text.translate(ESCAPING)
    return "\\" + text if text.startswith('"') else text


def row_of(result: dict, **columns) -> dict:
    """A row from what `prepare.report` measured, {} after a crash. Columns given by name win over that."""
    if unknown := columns.keys() - EMPTY.keys():
        raise TypeError(f"the ledger has no column {', '.join(sorted(unknown))}")
    row = EMPTY | {name: result[key] for name, key in FROM_RESULT.items() if result.get(key) is not None}
    if (megabytes := result.get("peak_vram_mb")) is not None:
        row["memory_gb"] = megabytes / 1024
    if (per_token := result.get("flops_per_token")) and (rate := result.get("tokens_per_second")):
        row["tflops"] = per_token * rate / 1e12
    return row | columns
