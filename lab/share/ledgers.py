"""A session of which only a results.tsv is known, the original's or ours, as events: what reads journals reads it."""

from __future__ import annotations

import hashlib
import re
import statistics
from calendar import timegm
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import strptime
from typing import get_args

from lab import untrusted
from lab.errors import LabError
from lab.genome.kinds import of_words
from lab.reasons import because
from lab.session import ledger
from lab.session.events import (
    Event,
    ExperimentApplied,
    ExperimentDecided,
    ExperimentOpened,
    Kind,
    RunEnded,
    RunScored,
    RunStarted,
    SessionStarted,
    Verdict,
)
from lab.session.state import BASELINE, MEASURING
from lab.share.archive import MOST_BYTES, Wrong
from lab.share.verify import LAST_TIME, is_origin, is_tag

FEWEST, MOST = 1e-9, 1e15  # of anything that a run is measured by
SHOWN = 5  # damaged lines
TEXT, NAME = 4000, 200  # characters
COUNTED = ("experiment", "run", "seed")
FIVE = (
    "a ledger of five columns: each change was run once, and nothing says how far chance moves scores; its effects are "
    "unconfirmed"
)


def events_of(source: Path, device: str | None) -> list[Event]:
    """The events of a ledger. Its file's name is the session's tag.

    Args:
        device: of the rows that don't say it: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError, Wrong: it is no ledger, or not of one device.
    """
    if source.stat().st_size > MOST_BYTES:
        raise Wrong(f"it has more than {MOST_BYTES:,} bytes, too many for a results.tsv")
    try:
        content = ledger.read(source)
    except LabError as error:
        raise LabError(f"{error}; a session is a results.tsv, or a folder or .tar.gz from lab export") from None
    if not content.rows:
        raise Wrong("it holds no rows")
    rows = [_believed(row) for row in content.rows]
    numbered = all(row["experiment"] is not None and row["run"] is not None for row in rows)
    started = SessionStarted(
        time=next((time for row in rows if (time := _time(row["started"]))), 0.0),
        tag="-".join(re.findall(r"[a-z0-9]+", source.stem.lower()))[:40].strip("-") or "unnamed",
        device=_device(source, {row["device"] for row in rows}, device),
        budget=next(iter(Counter(row["budget"] for row in rows if row["budget"])), None),
        source="ledger",
        notes=[*_notes(source.name, content), *[FIVE] * (not numbered)],
        **{name: _only(row[name] for row in rows) for name in ("backend", "eval", "data", "profile")},
    )
    return [started, *_experiments(rows, numbered)]


def _device(source: Path, named: set[str], device: str | None) -> str:
    if "" in named and not device:
        raise LabError(
            f"the rows of {source} don't say which device they are of; name it, such as: --device nvidia-h100-80gb"
        )
    others = sorted(named - {"", device or ""})
    if others and (device or len(others) > 1):
        raise Wrong(f"its rows are of {', '.join(others)}" + f", not of {device}" * bool(device))
    name = device or others[0]
    if not is_tag(name):
        raise LabError(f"{name!r} can't name a device: letters, digits, dots and dashes, such as nvidia-h100-80gb")
    return name


def _notes(name: str, content: ledger.Ledger) -> Iterator[str]:
    if not content.headed:
        yield f"{name} does not name its columns; they are taken for {' '.join(content.columns)}"
    for line in content.set_aside[:SHOWN]:
        yield f"{name}, line {line.line}, was set aside: {line.why}: {untrusted.one_line(line.text)}"
    if more := content.set_aside[SHOWN:]:
        yield f"so were {len(more)} more lines of {name}"


def _believed(row: dict) -> dict:
    """A row with no text that a terminal would obey. A figure that nothing can have measured, and that would break
    sums, is unknown."""

    def believed(name: str, value):
        if isinstance(value, str):
            return value if value.isprintable() and len(value) <= TEXT else untrusted.one_line(value, TEXT)
        low, high = (-1, 1e9) if name in COUNTED else (FEWEST, MOST)
        return value if value is not None and low < value < high else None

    return {name: believed(name, value) for name, value in row.items()}


def _time(text: str) -> float:
    try:
        time = float(timegm(strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0
    return time if 0 < time < LAST_TIME else 0.0


def _only(values: Iterable[str]) -> str:
    """What all agree on, or ""."""
    different = set(values)
    return different.pop()[:NAME] if len(different) == 1 else ""


def _experiments(rows: list[dict], numbered: bool) -> Iterator[Event]:
    """
    Args:
        numbered: the rows name their experiments and runs; else each is an experiment on the best before it.
    """
    groups: dict[int, list[dict]] = {}
    for place, row in enumerate(rows):
        if not numbered:
            row |= {"experiment": place, "run": place + 1}
        groups.setdefault(row["experiment"], []).append(row)
    by_commit: dict[str, int] = {}
    blobs: dict[int, str] = {}
    best = None
    for number, group in groups.items():
        own = [row for row in group if row["kind"] != "parent"]
        first = (own or group)[0]
        kind = first["kind"] if own and first["kind"] in get_args(Kind) and number else "change"
        kind = "baseline" if number == BASELINE else kind if kind != "baseline" else "change"
        if kind == "change" and first["origin"] and not first["kind"]:
            kind = "replay"
        base = first["parent"] or next((row["commit"] for row in group if row["kind"] == "parent"), "")
        onto = None if number == BASELINE else by_commit.get(base) if numbered else best
        same = by_commit.get(first["commit"]) if kind in MEASURING else None
        blobs[number] = blobs[same] if same is not None else _digest(f"{number} {first['commit']}")
        statuses = {row["status"] for row in own}
        status = next((known for known in ("keep", "discard", "crash") if known in statuses), "invalid")
        yield ExperimentOpened(
            time=_time(first["started"]),
            number=number,
            kind=kind,
            blob=blobs[number],
            parent=None if onto is None else blobs[onto],
            onto=onto,
            commit=(commit := _plain(first["commit"] if own else "", "[^0-9A-Za-z]")),
            description=first["description"],
            portable=first["portable"] != "no",
            change=_plain(first["change"], "^.*[^0-9a-f].*$"),
            family=_plain(first["family"], "^.*[^0-9a-f].*$"),
            kinds=list(of_words(first["description"])) if number else [],
            origin=first["origin"] if is_origin(first["origin"]) else "",
        )
        for row in group:
            yield from _run(row, blobs[number if row["kind"] != "parent" or onto is None else onto])
        scores = [row["val_bpb"] for row in own if _is_ok(row)]
        told = [row for row in own if _is_ok(row)] or group
        verdict = Verdict(
            status, because("told", words=told[-1]["reason"]), statistics.fmean(scores) if scores else None
        )
        yield ExperimentDecided(experiment=number, verdict=verdict)
        yield ExperimentApplied(experiment=number, commit=commit)
        if kind not in MEASURING and own:
            by_commit[first["commit"]] = number
        best = number if status == "keep" else best


def _run(row: dict, blob: str) -> Iterator[Event]:
    time, run = _time(row["started"]), row["run"]
    ok = _is_ok(row)
    result = {}
    for name, measure in ledger.MEASURED.items():
        if (value := row[name]) not in (None, ""):
            known = (
                value == "yes" if measure.type is bool else value / measure.scale if measure.type is float else value
            )
            result[measure.name] = known
    yield RunStarted(
        time=time, number=run, experiment=row["experiment"], blob=blob, seed=row["seed"], budget=row["budget"]
    )
    yield RunEnded(
        time=time and time + (row["total_seconds"] or 0.0),
        run=run,
        status="ok" if ok else "crash" if row["status"] == "crash" else "invalid",
        reason=None if ok else because("told", words=row["reason"]),
        result=result,
        seconds=row["total_seconds"] or 0.0,
    )
    if row["held_out_bpb"] is not None:
        yield RunScored(time=time, run=run, held_out_bpb=row["held_out_bpb"])


def _is_ok(row: dict) -> bool:
    return row["val_bpb"] is not None and row["status"] in ("keep", "discard")


def _plain(text: str, odd: str) -> str:
    return re.sub(odd, "", text)[:64]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
