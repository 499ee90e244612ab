"""A session of which only a results.tsv is known, the original's or ours, as events: what reads journals reads it."""

from __future__ import annotations

import hashlib
import re
import statistics
from calendar import timegm
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import strptime
from typing import Any, get_args

from lab import untrusted
from lab.errors import LabError
from lab.genome.kinds import of_words
from lab.session import ledger
from lab.session.events import Kind
from lab.session.state import BASELINE, MEASURING
from lab.share.archive import MOST_BYTES, Wrong
from lab.share.verify import LAST_TIME, is_origin, is_tag

FEWEST, MOST = 1e-9, 1e15  # of anything that a run is measured by
COUNTED = ("experiment", "run", "seed")
SHOWN = 5  # damaged lines
TEXT = 4000  # characters
FIVE = "a ledger of five columns: each change was run once, and how far chance moves scores is unknown: unconfirmed"


def events_of(source: Path, device: str | None) -> list[dict]:
    """The events of a ledger, as JSON has them. Its file's name is the session's tag.

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
    rows: list[dict[str, Any]] = [{name: _believed(name, value) for name, value in row.items()} for row in content.rows]
    numbered = all(row["experiment"] is not None and row["run"] is not None for row in rows)
    values = {name: {row[name] for row in rows} for name in ("backend", "eval", "data", "profile")}
    started = {
        "event": "session",
        "time": next((time for row in rows if (time := _time(row["started"]))), 0.0),
        "tag": "-".join(re.findall(r"[a-z0-9]+", source.stem.lower()))[:40].strip("-") or "unnamed",
        "device": _device(source, {row["device"] for row in rows}, device),
        "budget": Counter(row["budget"] for row in rows).most_common(1)[0][0],
        "source": "ledger",
        "notes": [*_notes(source.name, content), *[FIVE] * (not numbered)],
        **{name: known.pop()[:200] if len(known) == 1 else "" for name, known in values.items()},
    }
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


STATUSES = ("keep", "discard", "crash", "invalid")


def _notes(name: str, content: ledger.Ledger) -> Iterator[str]:
    unknown = Counter(row["status"] for row in content.rows if row["status"] not in STATUSES)
    if unknown:
        which = untrusted.listed([untrusted.one_line(status, 40) or "an empty one" for status in unknown])
        yield (
            f"{untrusted.counted(sum(unknown.values()), 'row')} of {name} have a status that is none of "
            f"{', '.join(STATUSES)} ({which}): their scores are left out. Write keep or discard there to have "
            "them counted"
        )
    if not content.headed:
        yield f"{name} does not name its columns; they are taken for {' '.join(content.columns)}"
    for line in content.set_aside[:SHOWN]:
        yield f"{name}, line {line.line}, was set aside: {line.why}: {untrusted.one_line(line.text)}"
    if more := content.set_aside[SHOWN:]:
        yield f"so were {len(more)} more lines of {name}"


def _believed(name: str, value: Any) -> Any:
    """A field with no text that a terminal would obey. A figure that nothing can have measured, and that would break
    sums, is unknown."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= TEXT else untrusted.one_line(value, TEXT)
    low, high = (-1, 1e9) if name in COUNTED else (FEWEST, MOST)
    return value if value is not None and low < value < high else None


def _time(text: str) -> float:
    try:
        time = float(timegm(strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0
    return time if 0 < time < LAST_TIME else 0.0


def _experiments(rows: list[dict], numbered: bool) -> Iterator[dict]:
    """
    Args:
        numbered: the rows name their experiments and runs; else each is an experiment on the best before it.
    """
    groups: dict[int, list[dict]] = {}
    for place, row in enumerate(rows):
        if not numbered:
            row |= {"experiment": place, "run": place + 1}
        groups.setdefault(row["experiment"], []).append(row)
    numbers: dict[str, int] = {}  # by commit
    blobs: dict[int, str] = {}
    best = None
    for number, group in groups.items():
        own = [row for row in group if row["kind"] != "parent"]
        first, scored = (own or group)[0], [row for row in own if _is_ok(row)]
        kind = _kind(number, first)
        parent = first["parent"] or next((row["commit"] for row in group if row["kind"] == "parent"), "")
        onto = None if number == BASELINE else numbers.get(parent) if numbered else best
        of = numbers.get(first["commit"], number) if kind in MEASURING else number
        blobs[number] = blobs.get(of) or hashlib.sha256(f"{number} {first['commit']}".encode()).hexdigest()[:40]
        commit = re.sub("[^0-9A-Za-z]", "", first["commit"])[:64] if own else ""
        yield {
            "event": "experiment",
            "time": _time(first["started"]),
            "number": number,
            "kind": kind,
            "blob": blobs[number],
            "parent": None if onto is None else blobs[onto],
            "onto": onto,
            "commit": commit,
            "description": first["description"],
            "portable": first["portable"] != "no",
            "kinds": of_words(first["description"]) if number else (),
            "origin": first["origin"] if is_origin(first["origin"]) else "",
            **{name: first[name] * bool(re.fullmatch("[0-9a-f]{1,64}", first[name])) for name in ("change", "family")},
        }
        for row in group:
            yield from _run(row, blobs[number if row["kind"] != "parent" or onto is None else onto])
        statuses = {row["status"] for row in own}
        verdict = {
            "status": next((known for known in ("keep", "discard", "crash") if known in statuses), "invalid"),
            "reason": _told((scored or group)[-1]),
            "mean": statistics.fmean(row["val_bpb"] for row in scored) if scored else None,
        }
        yield {"event": "decided", "experiment": number, "verdict": verdict}
        yield {"event": "applied", "experiment": number, "commit": commit}
        if kind not in MEASURING and own:
            numbers[first["commit"]] = number
        best = number if verdict["status"] == "keep" else best


def _kind(number: int, row: dict) -> str:
    if number == BASELINE or row["kind"] in (set(get_args(Kind)) - {"baseline"}):
        return "baseline" if number == BASELINE else row["kind"]
    return "replay" if row["origin"] and not row["kind"] else "change"


def _run(row: dict, blob: str) -> Iterator[dict]:
    time, seconds, run, ok = _time(row["started"]), row["total_seconds"] or 0.0, row["run"], _is_ok(row)
    result = {}
    for name, measure in ledger.MEASURED.items():
        if row[name] not in (None, ""):
            value = row[name] == "yes" if measure.type is bool else row[name]
            result[measure.name] = value / measure.scale if measure.type is float else value
    facts = {"experiment": row["experiment"], "blob": blob, "seed": row["seed"], "budget": row["budget"]}
    yield {"event": "run", "time": time, "number": run, **facts}
    facts = {"result": result, "seconds": seconds, "reason": None if ok else _told(row)}
    status = "ok" if ok else "crash" if row["status"] == "crash" else "invalid"
    yield {"event": "ran", "time": time and time + seconds, "run": run, "status": status, **facts}
    if row["held_out_bpb"] is not None:
        yield {"event": "scored", "time": time, "run": run, "held_out_bpb": row["held_out_bpb"]}


def _told(row: dict) -> dict:
    return {"code": "told", "facts": {"words": row["reason"]}}


def _is_ok(row: dict) -> bool:
    return row["val_bpb"] is not None and row["status"] in ("keep", "discard")
