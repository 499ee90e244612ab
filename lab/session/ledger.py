"""The ledger, results.tsv: a view of the journal with a row for each run.

Its first five columns are the original's, so that notebooks for those read it: a run without a score or a peak of
memory has 0.000000 and 0.0 there; elsewhere what is unknown is empty. In text, tabs, line ends and backslashes are
escaped as \\t, \\n, \\r and \\\\, and so is a quotation mark at the start, with which a quoted field would begin in
CSV. Other control characters are removed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

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

ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
UNSEEN = [*range(32), *range(127, 160), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF]
ESCAPING = {**dict.fromkeys(UNSEEN), **{ord(plain): text for plain, text in ESCAPES.items()}}
FORMULA = '"=+@-'  # what a spreadsheet takes for more than text, at the beginning of a cell


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
    shared = experiment.kind == "shared"
    subject = parent if parent and run.blob != experiment.blob and not shared else experiment
    own = subject is experiment
    verdict = experiment.verdict
    status, said = (verdict.status, verdict.said) if own else ("keep", str(because("parent", of=experiment.number)))
    status = "measured" if subject.measured else status
    if not run.ok:
        status, said = ("crash" if run.status == "crash" else "invalid"), sentence(run.reason)
    conditions = {name: getattr(started, name) for name in ("device", "backend", "eval", "data", "profile")}
    return {
        **measured(conditions | {"budget_seconds": run.budget} | run.result),
        "commit": subject.here[:7],
        "status": status,
        "description": _of_patches(experiment, run) if shared else subject.description,
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


def _of_patches(block: Experiment, run: Run) -> str:
    """What a shared run held."""
    names = [block.patches[place].description.partition(":")[0] for place in run.patches]
    return f"shared run: {', '.join(names) or 'the parent alone'}"


def measured(result: dict) -> dict:
    """The columns that a run's measures fill; what is unknown is left out."""
    row = {}
    for name, measure in MEASURED.items():
        if (value := result.get(measure.name)) is not None:
            row[name] = value * measure.scale if measure.type is float else value
            if measure.type is bool:
                row[name] = "yes" if value else "no"
    return row


def _edited(path: Path) -> Iterator[Path]:
    """Names for ledgers that somebody edited."""
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}.edited{number if number > 1 else ''}{path.suffix}")


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
        said, edited = None, next(name for name in _edited(path) if not name.exists())
        if not content.startswith(there):  # an older one is a beginning of this
            with atomic(edited) as file:
                file.write(there)
            said = f"{path} was edited. It is written again from the journal; the edited file is kept as {edited}"
        with atomic(path) as file:
            file.write(content)
        return said
    except (DataError, OSError) as error:
        return f"{path} could not be written ({error}); close the program that has it open. The next event writes it"


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
    return "\\" + text if text.startswith(tuple(FORMULA)) else text
