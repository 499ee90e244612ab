"""The ledger, results.tsv: a view of the journal with a row for each run, and the reading of ledgers from elsewhere.

Its first five columns are the original's, so that notebooks for those read it: a run without a score or a peak of
memory has 0.000000 and 0.0 there; elsewhere what is unknown is empty. In text, tabs, line ends and backslashes are
escaped as \\t, \\n, \\r and \\\\, and so is a quotation mark at the start, with which a quoted field would begin in
CSV. Other control characters are removed.
"""

from __future__ import annotations

import codecs
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.reasons import because, sentence
from lab.session.state import Experiment, Run, State
from results import MEASURES
from storage import DataError, atomic

ORIGINAL = ("commit", "val_bpb", "memory_gb", "status", "description")
OWN = ("experiment", "kind", "run", "seed", "started", "held_out_bpb")  # beside what runs measure
CHANGE = ("parent", "change", "family", "origin", "portable", "reason")
MEASURED = {measure.column: measure for measure in MEASURES if measure.column}
COLUMNS = (*ORIGINAL, *OWN, *(name for name in MEASURED if name not in ORIGINAL), *CHANGE)
FORMS = {name: measure.form for name, measure in MEASURED.items() if measure.type in (int, float)} | {
    "experiment": "d", "run": "d", "seed": "d", "held_out_bpb": ".6f",
}  # fmt: skip
NEVER_ZERO = ("val_bpb", "memory_gb")  # a zero there says that nothing was measured
EMPTY = {name: None if name in FORMS else "" for name in COLUMNS}

ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
ESCAPING = {**dict.fromkeys([*range(32), *range(127, 160)]), **{ord(plain): text for plain, text in ESCAPES.items()}}
MEANING = {text[1]: plain for plain, text in ESCAPES.items()} | {'"': '"'}


# --- A view of the journal ---


def rows_of(state: State) -> list[dict]:
    """A row for each run of the experiments that are done, in the order in which they were."""
    return [
        row_of(state, experiment, run)
        for experiment in state.done
        for run in experiment.runs
        if run.status not in (None, "lost")
    ]


def row_of(state: State, experiment: Experiment, run: Run) -> dict:
    """A run as a row, by column. Of a run of the parent beside it, the row is about the parent."""
    started, parent = state.started, state.parent_of(experiment)
    subject = parent if parent and run.blob != experiment.blob else experiment
    own = subject is experiment
    verdict = experiment.verdict
    status, said = (verdict.status, verdict.said) if own else ("keep", str(because("parent", of=experiment.number)))
    if not run.ok:
        status, said = ("crash" if run.status == "crash" else "invalid"), sentence(run.reason)
    conditions = {name: getattr(started, name) for name in ("device", "backend", "eval", "data", "profile")}
    return {
        **EMPTY,
        **measured(conditions | {"budget_seconds": run.budget} | run.result),
        "commit": subject.here[:7],
        "status": status,
        "description": subject.description,
        "experiment": experiment.number,
        "kind": experiment.kind if own else "parent",
        "run": run.number,
        "seed": run.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.time)) if run.time else "",
        "held_out_bpb": run.scored.held_out_bpb if run.scored else None,
        "total_seconds": run.seconds or None,
        "parent": parent.here[:7] if own and parent else "",
        "change": subject.change,
        "family": subject.family,
        "origin": subject.origin,
        "portable": "yes" if subject.portable else "no",
        "reason": said,
    }


def measured(result: dict) -> dict:
    """The columns that a run's measures fill; what is unknown is left out."""
    row = {}
    for name, measure in MEASURED.items():
        value = result.get(measure.name)
        if value is not None:
            known = ("yes" if value else "no") if measure.type is bool else value
            row[name] = value * measure.scale if measure.type is float else known
    return row


def write(path: Path, state: State) -> str | None:
    """Rewrites the ledger whole, if it is not as the journal has it.

    Returns:
        A line for people: that an edited ledger was put back, and where the edited one is; or that it can't be written
        now. None if all is well.
    """
    content = dumps(rows_of(state))
    try:
        there = path.read_bytes() if path.exists() else b""
        if there == content:
            return None
        edited = None
        if not content.startswith(there):  # an older one is a beginning of this
            edited = path.with_name(f"{path.stem}.edited{path.suffix}")
            with atomic(edited) as file:
                file.write(there)
        with atomic(path) as file:
            file.write(content)
    except (DataError, OSError) as error:
        return f"{path} could not be written ({error}); close what has it open: it is written again with the next event"
    return (
        f"{path} was edited, and is put back as the journal has it; what was there is in {edited}" if edited else None
    )


def dumps(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> bytes:
    """A ledger's content: header and rows."""
    lines = ["\t".join(map(escape, columns))]
    lines += ["\t".join(_written(name, row.get(name)) for name in columns) for row in rows]
    return "".join(line + "\n" for line in lines).encode(errors="replace")


def _written(name: str, value) -> str:
    if name not in FORMS:
        return escape("" if value is None else str(value))
    if value is None or not math.isfinite(value):
        return format(0.0, FORMS[name]) if name in NEVER_ZERO else ""
    return format(value, FORMS[name])


def escape(text: str) -> str:
    text = text.translate(ESCAPING)
    return "\\" + text if text.startswith('"') else text


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: MEANING.get(match[1], match[0]), text)


# --- Ledgers from elsewhere ---


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
    *lines, tail = _utf8(content).split(b"\n")
    rows, set_aside, row_of_fields, headed = [], [], None, False
    columns: tuple[str, ...] = ()
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


def _utf8(content: bytes) -> bytes:
    """A file's content without its mark; from UTF-16, as PowerShell's `>` and Excel's "Unicode text" write it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", errors="replace").encode()
    return content.removeprefix(codecs.BOM_UTF8)


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
        raise LabError(f"{name} names a column twice, or not at all: {', '.join(names)}; fix its first line")
    if len(fields) == len(ORIGINAL):
        try:
            _number("val_bpb", fields[1])
            return ORIGINAL, False
        except ValueError:
            pass
    raise LabError(
        f"{name} is no ledger: its first line has neither the columns' names, {' '.join(ORIGINAL)} and so "
        "on with tabs between, nor a row of them"
    )


def _reader(columns: tuple[str, ...]):
    """fields -> row."""
    numbers = [name for name in columns if name in FORMS]
    words = [name for name in columns if name not in FORMS]
    escaped = "run" in columns  # the original escapes nothing

    def row(fields: list[str]) -> dict:
        if len(fields) != len(columns):
            raise ValueError(f"it has {len(fields)} fields instead of {len(columns)}")
        values: dict = EMPTY | dict(zip(columns, fields))
        for name in numbers:
            values[name] = _number(name, values[name])
        if escaped:
            for name in words:
                if "\\" in values[name]:
                    values[name] = unescape(values[name])
        return values

    return row


def _number(name: str, text: str) -> int | float | None:
    if not (text := text.strip()):
        return None
    try:
        value = int(text) if FORMS[name] == "d" else float(text)
    except ValueError:
        value = math.inf
    if value in (math.inf, -math.inf) or "_" in text or not text.isascii():  # Python takes 1_0
        raise ValueError(f"{name} is {text[:40]!r}, not a number that fits its column")
    return None if value != value or value == 0 and name in NEVER_ZERO else value
