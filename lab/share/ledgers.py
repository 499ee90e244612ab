"""The original's results.tsv, where nothing else is known of a session, as events: what reads journals reads it.

Of its five columns, with tabs between, nothing is escaped. Each row is the one run of a change of the best before it.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab import untrusted
from lab.errors import LabError
from lab.genome.kinds import of_words
from lab.reasons import because
from lab.session import events
from lab.session.events import Event, Verdict
from lab.session.ledger import ORIGINAL
from lab.share.archive import Wrong

LARGEST, MOST_ROWS = 2**24, 100_000  # bytes and rows: a night has some hundred rows
MOST = 1e6  # of a score, and of gigabytes
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,3})?")
STATUSES = ("keep", "discard", "crash", "invalid")
SHOWN = 5  # damaged lines
TEXT, LONGEST_DESCRIPTION = 4000, 500  # characters
FIVE = "a ledger of five columns: each change was run once, and how far chance moves scores is unknown: unconfirmed"


def events_of(source: Path, device: str | None) -> Iterator[Event]:
    """The events of a ledger, whose file's name is the session's tag.

    Args:
        device: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError, Wrong: it is no ledger, or its device is not known.
    """
    if source.stat().st_size > LARGEST or (content := source.read_bytes()).count(b"\n") > MOST_ROWS:
        raise Wrong(f"it has more than {LARGEST >> 20} MiB or {MOST_ROWS:,} rows; compare a part of it")
    rows, notes = parse(content, source.name)
    if not device:
        raise LabError(f"{source} does not say which device it is of; name it, such as: --device nvidia-h100-80gb")
    if not events.is_tag(device):
        raise LabError(f"{device!r} can't name a device: letters, digits, dots and dashes, such as nvidia-h100-80gb")
    tag = "-".join(re.findall(r"[a-z0-9]+", source.stem.lower()))[:40].strip("-") or "unnamed"
    yield events.SessionStarted(tag=tag, device=device, source="ledger", notes=[*notes, FIVE])
    best = None  # number and blob
    for number, row in enumerate(rows):
        blob = hashlib.sha256(f"{number} {row['commit']}".encode()).hexdigest()[:40]
        opened = events.ExperimentOpened(
            number=number,
            kind="change" if number else "baseline",
            blob=blob,
            commit=re.sub("[^0-9A-Za-z]", "", row["commit"])[:64],
            description=row["description"][:LONGEST_DESCRIPTION],
            kinds=list(of_words(row["description"])) if number else [],
        )
        if best:
            opened.onto, opened.parent = best
        yield opened
        score, status, told = row["val_bpb"], row["status"], because("told", words="")
        ok = score is not None and status in ("keep", "discard")
        failed = "crash" if status == "crash" else "invalid"
        result = {"val_bpb": score, "peak_vram_mb": row["memory_gb"] and row["memory_gb"] * 1024}
        yield events.RunStarted(number=number + 1, experiment=number, blob=blob)
        yield events.RunEnded(
            run=number + 1,
            status="ok" if ok else failed,
            reason=None if ok else told,
            result={name: value for name, value in result.items() if value is not None},
        )
        yield events.ExperimentDecided(experiment=number, verdict=Verdict(status if ok else failed, told, score))
        yield events.ExperimentApplied(experiment=number, commit=opened.commit)
        best = (number, blob) if ok and status == "keep" else best


def parse(content: bytes, name: str) -> tuple[list[dict], list[str]]:
    """The rows of a ledger by column, and notes on what was not believed of it. A score or a peak of memory is None
    where nothing was measured. Wrong if there are no rows.

    Args:
        name: what the notes call it.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # of PowerShell's `>` and Excel's Unicode text
        content = content.decode("utf-16", errors="replace").encode()
    *lines, tail = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    rows, notes, aside = [], [], []
    columns = ()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = [untrusted.one_line(field, TEXT) for field in line.decode().split("\t")]
            if not columns and set(ORIGINAL) <= set(fields):
                columns = fields
                continue
            if not columns:
                columns = ORIGINAL
                notes = [f"{name} does not name its columns; they are taken for {' '.join(columns)}"]
            rows.append(_row(columns, fields))
        except ValueError as error:  # UnicodeDecodeError is one
            aside.append(_set_aside(name, number, line, error))
    if tail.strip():
        aside.append(_set_aside(name, len(lines) + 1, tail, "it may be cut short: end the line if it is whole"))
    if "experiment" in columns:
        raise Wrong("it is the ledger of a session of this project; take its export (python -m lab export X.tar.gz)")
    if not rows:
        raise Wrong(
            f"it is no ledger, or holds no rows: those are {', '.join(ORIGINAL)} with tabs between; a session is a "
            "results.tsv, or a folder or .tar.gz from lab export"
        )
    notes += _unknown(name, Counter(row["status"] for row in rows if row["status"] not in STATUSES))
    if len(aside) > SHOWN:
        aside[SHOWN:] = [f"so were {len(aside) - SHOWN} more lines of {name}"]
    return rows, notes + aside


def _unknown(name: str, statuses: Counter[str]) -> list[str]:
    if not statuses:
        return []
    which = untrusted.listed([untrusted.one_line(status, 40) or "an empty one" for status in statuses])
    return [
        f"the status of {untrusted.counted(statuses.total(), 'row')} of {name} is none of {', '.join(STATUSES)} "
        f"({which}): their scores are left out. Write keep or discard there to have them counted"
    ]


def _row(columns: Sequence[str], fields: list[str]) -> dict:
    if len(fields) != len(columns):
        raise ValueError(f"it has {len(fields)} fields instead of {len(columns)}")
    row = dict(zip(columns, fields))
    return row | {name: _number(name, row[name]) for name in ("val_bpb", "memory_gb")}


def _number(name: str, text: str) -> float | None:
    value = float(text or 0) if NUMBER.fullmatch(text.lower()) or not text else -1.0
    if not 0 <= value < MOST:
        raise ValueError(f"{name} is {text[:40]!r}, not a number that fits its column")
    return value or None


def _set_aside(name: str, number: int, line: bytes, why: Exception | str) -> str:
    return f"{name}, line {number}, was set aside: {why}: {untrusted.one_line(line.decode(errors='replace'))}"
