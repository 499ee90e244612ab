"""Ledgers, where nothing else is known of a session, as events: what reads journals reads them.

They are the original's results.tsv (five columns with tabs between, nothing escaped) and those of other programs, whose
columns and statuses have other names. Each row is the one run of a change of the best before it.
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

# How its GPUs' names begin.
NVIDIA = re.compile(r"(nvidia|tesla|geforce|quadro|rtx|gtx|titan|g?[abhlptv]\d{1,3})\b", re.I)
LARGEST, MOST_ROWS = 2**24, 100_000  # bytes and rows: a night has some hundred rows
MOST, MOST_MEASURED = 1e6, 1e12  # of a score and of gigabytes; of what else is measured
NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?")
STATUSES = ("keep", "discard", "crash", "invalid")
OWN = {"experiment", "kind", "run", "seed"}  # columns of this project's
COLUMNS = {"exp": "commit", "experiment_id": "commit", "peak_mem_gb": "memory_gb", "peak_vram_gb": "memory_gb"}
NEEDED = ("val_bpb", "status", "description")
KEPT = ("baseline", "best")  # statuses of other programs that mean keep
LEFT_OUT = ("skip",)  # ... and that no run was made
MEASURED = {  # by their names here
    "tok_sec": "tokens_per_second", "mfu": "mfu_percent", "steps": "num_steps", "total_energy_joules": "joules",
    "watts": "watts", "joules_per_token": "joules_per_token",
}  # fmt: skip
NOTHING = ("", "-", "--", "nan", "na", "n/a", "none", "null")  # words for no score, in the row of a run that failed
OTHER_METRIC = re.compile(r"(val|valid|validation|test|eval)?_?(loss|ppl|perplexity|acc|accuracy|score|bpc|metric)")
SHOWN = 5  # damaged lines
TEXT, LONGEST_DESCRIPTION = 4000, 500  # characters
FIVE = "only a ledger: each change was run once, so how far chance moves its scores is unknown; unconfirmed"


def events_of(source: Path, device: str | None) -> Iterator[Event]:
    """The events of a ledger, whose file's name is the session's tag.

    Args:
        device: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError, Wrong: it is not a ledger, or its device is not known.
    """
    if source.stat().st_size > LARGEST or (content := source.read_bytes()).count(b"\n") > MOST_ROWS:
        raise Wrong(f"it has more than {LARGEST >> 20} MiB or {MOST_ROWS:,} rows; compare a part of it")
    rows, notes = parse(content, source.name)
    named = sorted({row["gpu_name"] for row in rows if row.get("gpu_name")})
    if not device and len(named) == 1:
        words = re.findall(r"[a-z0-9]+", re.sub("geforce|tesla", "", named[0].lower()))
        if words[:1] != ["nvidia"] and NVIDIA.match(named[0]):  # as older drivers name it
            words.insert(0, "nvidia")
        device = "-".join(words)[:60]
        notes.append(f"{source.name} names its device, {named[0]}; it is taken as {device}")
    if not device:
        raise LabError(f"{source} does not name its device; name it, such as: --device nvidia-h100-80gb")
    if not events.is_tag(device):
        raise LabError(f"{device!r} can't be the name of a device: use letters, digits, dots, dashes: nvidia-h100-80gb")
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
        result = {
            "val_bpb": score,
            "peak_vram_mb": row["memory_gb"] and row["memory_gb"] * 1024,
            **row.get("measured", {}),
        }
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
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    *lines, tail = content.split(b"\n")
    rows, notes, aside, unread = [], [], [], Counter()
    columns, commas = (), False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = [untrusted.one_line(field, TEXT) for field in _fields(line.decode())]
            if not columns:
                header = [field.strip().lower() for field in fields]
                named = "status" in header and "description" in header
                columns, found = _columns(header, name) if named else (ORIGINAL, [])
                if not named:
                    found = [f"{name} does not name its columns; they are taken to be {' '.join(columns)}"]
                texts = [_fields(each.decode(errors="replace")) for each in lines[number - (not named) :]]
                commas = _has_commas(texts, columns)
                notes += found + [f"the numbers of {name} have commas for decimal points"] * commas
                if named:
                    continue
            rows.append(_row(columns, fields, commas, unread))
        except Wrong:
            raise
        except ValueError as error:  # UnicodeDecodeError is one
            aside.append(_set_aside(name, number, line, error))
    if tail.strip():
        aside.append(_set_aside(name, len(lines) + 1, tail, "it may be cut short; if not, end the line"))
    if OWN <= set(columns):
        raise Wrong("it is the ledger of a session of this project; take its export (python -m lab export X.tar.gz)")
    if not rows:
        raise Wrong(
            f"it is not a ledger, or has no rows. A row is {', '.join(ORIGINAL)}, separated by tabs. A session is a "
            "results.tsv, or a folder or .tar.gz from lab export" + "".join(f"\n{note}" for note in aside[:1])
        )
    if unread:
        figures = ", ".join(f"{column} in {untrusted.counted(n, 'row')}" for column, n in unread.items())
        notes.append(f"{name}: these are no numbers that fit their columns, and are left out: {figures}")
    rows = _statuses(rows, name, notes)
    notes += _unknown(name, Counter(row["status"] for row in rows if row["status"] not in STATUSES))
    if len(aside) > SHOWN:
        aside[SHOWN:] = [f"{len(aside) - SHOWN} more lines of {name} were set aside, too"]
    if all(row["status"] == "crash" for row in rows):
        aside.append(f"every row of {name} is a crash: nothing was measured")
    return rows, notes + aside


def _columns(fields: list[str], name: str) -> tuple[list[str], list[str]]:
    """(the columns of a header by our names, notes on what was taken for what). Wrong if its scores are of another
    kind, or one is missing."""
    if "val_bpb" not in fields:
        others = [field for field in fields if OTHER_METRIC.fullmatch(field.lower())]
        what = f"its scores are {untrusted.listed(others[:3])}" if others else "it has no column val_bpb"
        raise Wrong(f"{what}: only validation bits per byte (val_bpb) can be compared here")
    columns = [COLUMNS.get(field, field) if COLUMNS.get(field) not in fields else field for field in fields]
    if missing := [column for column in NEEDED if column not in columns]:
        raise Wrong(f"it has no column {missing[0]}")
    if twice := [column for column in NEEDED if columns.count(column) > 1]:
        raise Wrong(f"it has two columns {twice[0]}; leave the one that is meant")
    taken = [f"{old} for {new}" for old, new in zip(fields, columns) if old != new]
    taken += [f"{old} for {new}" for old, new in MEASURED.items() if old in fields and old != new]
    return columns, [f"{name}: these columns were used: {', '.join(taken)}"] * bool(taken)


def _fields(line: str) -> list[str]:
    """The fields of a row. Excel puts quotes around one that has a comma or a quote."""
    fields = line.rstrip("\r").split("\t")
    quoted = re.compile(r'"(.*)"', re.DOTALL)
    return [found[1].replace('""', '"') if (found := quoted.fullmatch(field)) else field for field in fields]


def _has_commas(rows: list[list[str]], columns: Sequence[str]) -> bool:
    """Whether scores are written with commas for decimal points: more of them than with points."""
    place = columns.index("val_bpb")
    scores = [row[place].strip() for row in rows if len(row) > place]
    commas, points = (
        sum(bool(re.fullmatch(rf"\d+{mark}\d+", s)) for s in scores if s.strip(" 0,.")) for mark in (",", r"\.")
    )
    return commas > points


def _statuses(rows: list[dict], name: str, notes: list[str]) -> list[dict]:
    """Rows with the statuses of other programs in ours. Left out are those in which nothing was run, and those of a
    baseline that was run before. What failed before the first one that was kept comes after it."""
    scored = next((row for row in rows if row["status"] in ("keep", *KEPT) and row["val_bpb"]), None)
    if scored and not any(row["val_bpb"] for row in rows[: rows.index(scored)]):
        rows = [scored, *(row for row in rows if row is not scored)]
    kept = Counter(row["status"] for row in rows if row["status"] in KEPT)
    if not kept:  # a program that has neither knows no skip either
        return rows
    skipped = [row for row in rows if row["status"] in LEFT_OUT and row["val_bpb"] is None]
    again = [row for row in rows if row["status"] == "baseline" and row["val_bpb"]][1:]
    told = [f"{untrusted.counted(n, 'row')} of status {status} taken for keep" for status, n in kept.items()]
    told += [f"{untrusted.counted(len(skipped), 'row')} of status skip left out: nothing was run"] * bool(skipped)
    if again:
        told.append(f"{untrusted.counted(len(again), 'row')} of these baselines left out, as there was one before")
    notes.append(f"{name}: {'; '.join(told)}")
    out = {id(row) for row in (*skipped, *again)}
    return [row | {"status": "keep" if row["status"] in KEPT else row["status"]} for row in rows if id(row) not in out]


def _unknown(name: str, statuses: Counter[str]) -> list[str]:
    if not statuses:
        return []
    which = untrusted.listed([untrusted.one_line(status, 40) or "an empty one" for status in statuses])
    return [
        f"the status of {untrusted.counted(statuses.total(), 'row')} of {name} is none of {', '.join(STATUSES)} "
        f"({which}): their scores are left out. Write keep or discard there to have them counted"
    ]


def _row(columns: Sequence[str], fields: list[str], commas: bool, unread: Counter[str]) -> dict:
    """A row by column. ValueError if its score can't be read; other columns that can't be are counted in `unread`."""
    while len(fields) > len(columns) and not fields[-1]:
        fields = fields[:-1]
    if len(fields) != len(columns):
        raise ValueError(f"it has {len(fields)} fields instead of {len(columns)}")
    texts = dict(zip(columns, fields)) | {name: "" for name in ("commit", "memory_gb") if name not in columns}
    row: dict = {**texts, "status": texts["status"].strip().lower()}

    def number(name: str, most: float = MOST) -> float | None:
        text = texts[name].replace(",", ".") if commas else texts[name]
        try:
            return _number(name, "" if text.lower() in NOTHING and name != "val_bpb" else text, most)
        except ValueError:
            if name == "val_bpb":
                raise
            unread[name] += 1
            return None

    if row["status"] in ("crash", *LEFT_OUT) and texts["val_bpb"].lower() in NOTHING:
        texts["val_bpb"] = ""
    measured = {new: number(old, MOST_MEASURED) for old, new in MEASURED.items() if old in row}
    if steps := measured.get("num_steps"):
        measured["num_steps"] = int(steps)
    row |= {name: number(name) for name in ("val_bpb", "memory_gb")}
    return row | {"measured": measured} if measured else row


def _number(name: str, text: str, most: float) -> float | None:
    value = float(text or 0) if NUMBER.fullmatch(text.lower()) or not text else -1.0
    if not 0 <= value < most:
        raise ValueError(f"{name} is {text[:40]!r}, not a number that fits its column")
    return value or None


def _set_aside(name: str, number: int, line: bytes, why: Exception | str) -> str:
    return f"{name}, line {number}, was set aside: {why}: {untrusted.one_line(line.decode(errors='replace'))}"
