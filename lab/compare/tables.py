"""A comparison as sections of tables and sentences, once: as text for a terminal here, as a page in report/html.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lab.compare import classify, effects
from lab.compare.comparison import CHANGE, FAMILY, SOURCE, WORDS, Cell, Comparison, Paid, Shared, tally
from lab.compare.analysis import Analysis
from lab.compare.effects import Effect
from lab.untrusted import counted, one_line

WIDTH = 100  # of a terminal
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_STEPS = 12  # kept changes of a session that the table of tokens shows
MOST_CHANGES = 300  # that a table shows
CAPTIONS = {
    CHANGE: "The same change: its effect in bits per byte (below 0 is better), with its 90 % interval",
    FAMILY: "Probably the same change: the same lines in the same definition, beside others",
    WORDS: "By its words: probably the same change, matched by its description alone",
}


class Place(str):
    """A place's name, for which a terminal has a letter."""


class Tag(str):
    """A verdict."""


Entry = str | Effect  # a text may be anybody's, and is cleaned when it is shown


@dataclass
class Table:
    """Rows under heads.

    Attributes:
        grouped: the first entry of a row is one for all rows of the same change.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    grouped: bool = False


@dataclass
class Section:
    """What belongs together; a part that is a str is a paragraph."""

    name: str
    title: str
    parts: Sequence[Table | str]


def sections(comparison: Comparison) -> list[Section]:
    """All that a comparison says."""
    all_sections = [
        Section("sessions", "Side by side", [*_scores(comparison.sessions), _costs(comparison.sessions)]),
        Section("transfer", "What holds where", _transfer(comparison)),
        Section("agreement", "How far devices agree", _agreements(comparison)),
        Section("paid", "Which kinds of change paid", [kinds_table(comparison.kinds)] if comparison.kinds else []),
        Section("steps", "Scores against tokens and FLOPs", _steps(comparison.sessions)),
        Section("notes", "To keep in mind", [f"note: {one_line(note, 400)}" for note in comparison.notes]),
    ]
    return [section for section in all_sections if section.parts]


# --- Sessions ---


def _scores(sessions: list[Analysis]) -> list[Table]:
    """A table for each group whose scores compare: one evaluator, as many seconds. What an unknown evaluator measured
    compares with nothing."""
    groups: dict[tuple, list[Analysis]] = {}
    for session in sessions:
        groups.setdefault((session.eval, session.budget, "" if session.eval else session.name), []).append(session)
    heads = "place", "session", "baseline", "best", "gain", "gain, %", "confirmed", "noise"
    tables = []
    for (tag, budget, _), group in groups.items():
        caption = "Measured by what is not known: these scores compare with no others"
        if tag:
            caption = f"Measured by evaluator {tag}" + (f", after {budget:g} s of training" if budget else "")
        rows = []
        for session in group:
            scores = [number(e and session.scores[e.number], ".6f") for e in (session.baseline, session.best)]
            gains = number(session.gain, "+.6f"), number(session.relative, "+.2%"), _confirmed(session.confirmed)
            noise = number(session.noise and session.noise.sd, ".6f")
            rows.append((Place(session.place), session.name, *scores, *gains, noise))
        tables.append(Table(caption, heads, rows))
    return tables


def _confirmed(effect: Effect | None) -> str:
    """The gain that a confirmation showed."""
    if effect is None:
        return "no"
    if effect.low is None or effect.high is None:
        return f"{-effect.value:+.4f}"
    return f"{-effect.value:+.4f} ({-effect.high:+.4f} to {-effect.low:+.4f})"


def _costs(sessions: list[Analysis]) -> Table:
    heads = "place", "rows", "experiments", "kept", "crashed", "an hour", "M tokens a run", "PFLOP a run", "MFU %"
    rows = []
    for session in sessions:
        tried, counts = len(session.tried), session.counts
        shares = [f"{counts[status]} ({counts[status] / max(1, tried):.0%})" for status in ("keep", "crash")]
        figures = [_pair(session, *figure) for figure in (("tokens", 1e6), ("flops", 1e15), ("mfu_percent", 1))]
        hourly = number(session.per_hour, ".1f")
        rows.append((Place(session.place), str(session.rows), str(tried), *shares, hourly, *figures))
    return Table("What it took; of the baseline -> of the best", heads, rows)


def _pair(session: Analysis, name: str, unit: float) -> str:
    """A figure of the baseline's runs, and of the best's."""
    means = [session.mean(experiment, name) for experiment in (session.baseline, session.best)]
    shown = ["-" if value is None else f"{value / unit:.3g}" for value in means]
    return shown[0] if shown[0] == shown[1] else " -> ".join(shown)


# --- Changes ---


def _transfer(comparison: Comparison) -> list[Table | str]:
    """The changes that more than one place has tried."""
    if len(comparison.places) < 2:
        return []
    parts: list[Table | str] = []
    for joined, caption in CAPTIONS.items():
        changes = [change for change in comparison.shared if change.joined == joined]
        if not changes:
            continue
        left_out = len(changes) - MOST_CHANGES
        caption += f"; {left_out} more are left out" * (left_out > 0)
        rows = [row for change in changes[:MOST_CHANGES] for row in _rows(change)]
        parts.append(Table(caption, ("change", "place", "verdict", "effect", "remarks"), rows, grouped=True))
        if counts := tally(changes):
            rows = [
                (
                    Place(source),
                    Place(place),
                    *map(str, [sum(count.values()), *(count[verdict] for verdict in classify.CLASSES)]),
                )
                for (source, place), count in counts.items()
            ]
            parts.append(Table("What holds where", ("from", "on", "changes", *classify.CLASSES), rows))
        parts += [
            f"What {place} found flatters itself until it is measured again on that device: "
            f"python -m lab start TAG, then python -m lab replay {session} --runs 3"
            for place, session in _unmeasured(changes).items()
        ]
    if not parts:
        parts.append(
            "No change was tried in more than one of these places. To try what one found on another machine: "
            "python -m lab replay SESSION --runs 3"
        )
    return parts


def _unmeasured(changes: list[Shared]) -> dict[str, str]:
    """place -> a session there whose findings were not run again (by a replay, which takes what was kept)."""
    return {
        change.source: change.cells[change.source].sessions[0]
        for change in reversed(changes)
        if change.source and (effect := change.cells[change.source].effect) and effect.flattered and effect.picked
    }


def _rows(change: Shared) -> list[tuple[Entry, ...]]:
    about = one_line(change.description, WIDTH - 20) + f" [{change.kind}]" * bool(change.kind)
    return [
        (
            about,
            Place(place),
            Tag(cell.verdict.replace(SOURCE, "found here")),
            cell.effect or "no score",
            "; ".join(filter(None, _remarks(change, cell))),
        )
        for place, cell in change.cells.items()
    ]


def _remarks(change: Shared, cell: Cell) -> list[str]:
    if cell.effect is None:
        return [cell.why or ", ".join(cell.tried)]
    remarks = [one_line(cell.description, 40)] if change.joined != CHANGE else []
    if cell.effect.low is None:
        remarks.append("unconfirmed")
    if cell.effect.flattered and cell.verdict in (SOURCE, ""):
        remarks.append(effects.FLATTERED[cell.effect.picked])
    if cell.verdict == classify.OPEN:
        remarks.append(_missing(cell))
    return [*remarks, cell.due]


def _missing(cell: Cell) -> str:
    """Why it can't be told, and after how many more runs of the change and of its parent each it probably could."""
    if cell.more is None:
        return cell.why + f"; over {classify.MOST} more runs" * (not cell.why.startswith(classify.NO_RUNS))
    here, source = cell.more["here"], cell.more["source"]
    where = "here and there" if here and source else "here" if here else "there"
    return f"{cell.why}; {counted(max(here, source), 'more run')} {where}"


# --- The rest ---


def _agreements(comparison: Comparison) -> list[Table | str]:
    heads = "", "", "changes", "same sign", "rank correlation", "remark"
    remarks = {FAMILY: "probably the same", WORDS: "by words"}
    rows = [
        (
            Place(agreed.one),
            Place(agreed.other),
            str(agreed.n),
            "{:.0%} ({:.0%} to {:.0%})".format(*agreed.share),
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*agreed.rho) if agreed.rho else "-",
            remarks.get(agreed.joined) or f"{agreed.flattered} effects as selected" * bool(agreed.flattered),
        )
        for agreed in comparison.agreements
    ]
    return [Table("Agreement, with 90 % intervals; noise lowers both figures", heads, rows)] if rows else []


def kinds_table(summaries: list[Paid]) -> Table:
    sorts = list(dict.fromkeys(summary.sort for summary in summaries))
    by_kind = {(summary.kind, summary.sort): summary for summary in summaries}

    def entry(summary: Paid | None) -> str:
        if summary is None:
            return "-"
        crashed = f", {summary.crashed} crashed" if summary.crashed else ""
        median = f", {summary.median:+.2f} %" if summary.median is not None else ""
        return f"{summary.kept} of {summary.tried}{crashed}{median}"

    all_kinds = dict.fromkeys(summary.kind for summary in summaries)
    rows = [(kind, *(entry(by_kind.get((kind, sort))) for sort in sorts)) for kind in all_kinds]
    return Table("Kept of those tried, and the median step in per cent of the parent's val_bpb", ("kind", *sorts), rows)


def _steps(sessions: list[Analysis]) -> list[Table | str]:
    """val_bpb of what was kept against tokens and FLOPs."""
    groups: dict[tuple, list[Sequence[Entry]]] = {}
    for session in sessions:
        steps = [step for step in session.steps if session.eval and session.mean(step, "tokens")]
        for step in [*steps[:1], *steps[1:][1 - MOST_STEPS :]]:
            score, means = session.scores[step.number], [session.mean(step, name) for name in ("tokens", "flops")]
            figures = [number(mean and mean / unit, ".4g") for mean, unit in zip(means, (1e6, 1e15))]
            row = Place(session.place), str(step.number), f"{score:.6f}", *figures, one_line(step.description, 50)
            groups.setdefault((session.eval, session.budget), []).append(row)
    heads = "place", "#", "val_bpb", "M tokens", "PFLOP", "what"
    caption = "val_bpb against tokens and FLOPs, of what was kept"
    return [
        Table(f"{caption} (evaluator {tag}{f', {budget:g} s' if budget else ''})", heads, rows)
        for (tag, budget), rows in groups.items()
    ]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- As text ---


def text(comparison: Comparison) -> str:
    """For a terminal of 100 columns."""
    letters = {place: LETTERS[i] if i < len(LETTERS) else str(i + 1) for i, place in enumerate(comparison.places)}
    parts = [part for section in sections(comparison) for part in section.parts]
    return _text(parts, letters)


def transfer(comparison: Comparison) -> str:
    """Of it only the changes that more than one place has tried."""
    letters, parts = dict(zip(comparison.places, LETTERS)), _transfer(comparison)
    if not parts:
        return textwrap.fill(
            f"Both are of {comparison.places[0]}: its own findings, measured again, no longer flatter themselves when "
            "another device's replay of them is compared",
            WIDTH,
        )
    return "\n".join(f"  {letter}: {place}" for place, letter in letters.items()) + "\n\n" + _text(parts, letters)


def _text(parts: Sequence[Table | str], letters: dict[str, str]) -> str:
    return "\n\n".join(
        textwrap.fill(part, WIDTH, break_on_hyphens=False)
        if isinstance(part, str)
        else f"{one_line(part.caption, WIDTH)}\n{_rows_as_text(part, letters)}"
        for part in parts
    )


def _rows_as_text(table: Table, letters: dict[str, str]) -> str:
    """Columns: those of numbers to the right. A group has its name on a line of its own."""
    skipped = 1 if table.grouped else 0
    rows = [[_entry(entry, letters) for entry in row[skipped:]] for row in table.rows]
    heads = ["" if head == "place" else head for head in table.heads[skipped:]]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    right = [not table.grouped and _figures([row[i] for row in rows]) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        padded = (e.rjust(width) if r else e.ljust(width) for e, width, r in zip(row, widths, right))
        return ("    " if table.grouped else "  ") + "  ".join(padded).rstrip()

    if not table.grouped:
        return "\n".join(map(line, [heads, *rows]))
    lines = []
    for first, group in groupby(zip(table.rows, rows), key=lambda pair: id(pair[0][0])):
        group = list(group)
        lines += [f"  {_entry(group[0][0][0], letters)}", *(line(row) for _, row in group)]
    return "\n".join(lines)


def _entry(entry: Entry, letters: dict[str, str]) -> str:
    if isinstance(entry, Effect):
        return f"{entry.value:+.5f}{spread(entry)}"
    if isinstance(entry, Place):
        return letters.get(entry, entry)
    return one_line(entry, 200) or "-" * isinstance(entry, Tag)


def spread(effect: Effect) -> str:
    """Its interval; "" without one."""
    return f" ({effect.low:+.4f} to {effect.high:+.4f})" if effect.low is not None and effect.high is not None else ""


def _figures(entries: list[str]) -> bool:
    shown = [entry for entry in entries if entry]
    return bool(shown) and all(entry == "-" or entry[0] in "+-.0123456789" for entry in shown)
