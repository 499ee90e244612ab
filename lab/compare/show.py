"""A comparison as text, for a terminal of 100 columns."""

from __future__ import annotations

from itertools import groupby

from lab.compare import classify, effects
from lab.compare.comparison import SOURCE, Agreement, Cell, Comparison, Facts, Paid, Point, Shared, tally
from lab.cli.render import counted
from lab.untrusted import cut, one_line

WIDTH = 100
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_STEPS = 12  # kept changes of a session that the table of tokens shows


def text(found: Comparison) -> str:
    marks = _marks(found)
    parts = [
        _sessions(found.sessions, marks),
        _transfer(found, marks),
        _agreements(found.agreements, marks),
        _kinds(found.kinds),
        _scores(found, marks),
        _notes(found.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def transfer(found: Comparison) -> str:
    """Of it only the changes that more than one place has tried."""
    marks = _marks(found)
    if len(marks) == 1:
        return (
            f"Both are of {found.places[0]}: its own findings, measured again, no longer flatter themselves when "
            "another\ndevice's replay of them is compared"
        )
    return "\n".join([*(f"  {mark}: {place}" for place, mark in marks.items()), "", _transfer(found, marks)])


def _marks(found: Comparison) -> dict[str, str]:
    return {place: LETTERS[i] if i < len(LETTERS) else str(i + 1) for i, place in enumerate(found.places)}


def table(heads: list[str], rows: list[list[str]], indent: str = "  ") -> str:
    """Columns: the first to the left, those of numbers to the right."""
    cells = [heads, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    right = [any(_figure(row[i]) for row in rows) and all(_figure(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join(
        (
            indent
            + "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right)
            )
        ).rstrip()
        for row in cells
    )


def _figure(cell: str) -> bool:
    return cell == "-" or cell[:1] in "+-.0123456789" and cell[:1] != ""


# --- Sessions ---


def _sessions(sessions: list[Facts], marks: dict[str, str]) -> str:
    """Scores stand beside each other only where one evaluator measured them, after the same time."""
    parts = []
    for group in dict.fromkeys(one.measured for one in sessions):
        its = [one for one in sessions if one.measured == group]
        parts.append(
            its[0].measured_by
            + "\n"
            + table(
                ["", "session", "baseline", "best", "gain", "", "confirmed", "noise"],
                [
                    [
                        marks[one.place],
                        one.name,
                        _score(one.baseline),
                        _score(one.best),
                        _number(one.gain, "+.6f"),
                        _number(one.relative, "+.2%"),
                        _confirmed(one),
                        _number(one.noise, ".6f"),
                    ]
                    for one in its
                ],
            )
        )
    parts.append(
        "What it took"
        + "\n"
        + table(
            ["", "rows", "experiments", "kept", "crashed", "an hour", "M tokens a run", "PFLOP a run", "MFU %"],
            [
                [
                    marks[one.place],
                    str(one.rows),
                    str(one.experiments),
                    _of(one.kept, one.keep_rate),
                    _of(one.crashed, one.crash_rate),
                    _number(one.per_hour, ".1f"),
                    _two(one.tokens, 1e6),
                    _two(one.flops, 1e15),
                    _two(one.mfu, 1),
                ]
                for one in sessions
            ],
        )
    )
    return "\n\n".join(parts)


def _confirmed(one: Facts) -> str:
    if one.confirmed is None:
        return "no"
    known = one.confirmed
    spread = f" ({-known.high:+.4f} to {-known.low:+.4f})" if known.error is not None else ""
    return f"{-known.value:+.4f}{spread}"


# --- Changes ---


def _transfer(found: Comparison, marks: dict[str, str]) -> str:
    sure = [change for change in found.shared if not change.by_words]
    said = [change for change in found.shared if change.by_words]
    parts = []
    if sure:
        parts.append(
            "The same change, in bits per byte (below 0 is better), with its 90 % interval; what is missing: "
            "runs of\nthe change and of its parent each, here or where it was found\n"
            + "\n".join(_change(change, marks) for change in sure)
        )
        parts.append(_counts(sure, marks))
        parts += [
            f"What {marks[place]} found flatters itself until it is measured again on that device: python -m lab "
            f"start TAG,\nthen python -m lab replay {name} --runs 3"
            for place, name in _unmeasured(sure).items()
        ]
    if said:
        parts.append(
            "By its words: probably the same change, matched by description alone\n"
            + "\n".join(_change(change, marks) for change in said)
        )
    if len(found.places) > 1 and not parts:
        parts.append(
            "No change was tried in more than one of these places. To try what one found on another machine:"
            "\npython -m lab replay SESSION --runs 3"
        )
    return "\n\n".join(part for part in parts if part)


def _unmeasured(changes: list[Shared]) -> dict[str, str]:
    """place -> a session there whose findings were not run again (by a replay, which takes what was kept)."""
    return {
        change.source: change.cells[change.source].tried[0].split(" ")[0]
        for change in reversed(changes)
        if change.source and (effect := change.cells[change.source].effect) and effect.flattered and effect.picked
    }


def _change(change: Shared, marks: dict[str, str]) -> str:
    what = one_line(change.description, WIDTH - 4)
    rows = []
    for place, cell in change.cells.items():
        said = cell.verdict.replace(SOURCE, "found here") or (
            "-" if not change.by_words else one_line(change.texts[place], 40)
        )
        rows.append([f"  {marks[place]}", said, *_cell(cell)])
    kind = f" [{change.kinds[0]}]" if change.kinds else ""
    return f"  {what}{kind}\n{_plain(rows)}"


def _plain(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip() for row in rows)


def _cell(cell: Cell) -> list[str]:
    effect = cell.effect
    if effect is None:
        return ["no score", "", cell.why]
    spread = f"({effect.low:+.4f} to {effect.high:+.4f})" if effect.error is not None else "unconfirmed"
    remarks = [cell.due] * bool(cell.due)
    if effect.flattered and cell.verdict in (SOURCE, ""):
        remarks.insert(0, effects.FLATTERED[effect.picked])
    if cell.verdict == classify.OPEN:
        remarks.insert(0, _missing(cell))
    return [f"{effect.value:+.5f}", spread, "; ".join(filter(None, remarks))]


def _missing(cell: Cell) -> str:
    """Why it can't be told, and after how many more runs of the change and of its parent each it probably could."""
    if cell.more is None:
        return cell.why + f"; over {classify.MOST} more runs" * (not cell.why.startswith(classify.NO_RUNS))
    here, source = cell.more["here"], cell.more["source"]
    where = "here and there" if here and source else "here" if here else "there"
    return f"{cell.why}; {counted(max(here, source), 'more run')} {where}"


def _counts(changes: list[Shared], marks: dict[str, str]) -> str:
    rows = [
        [marks[source], marks[place], str(its.total()), *(str(its[one]) for one in classify.CLASSES)]
        for (source, place), its in tally(changes).items()
    ]
    return "What holds where\n" + table(["from", "on", "changes", *classify.CLASSES], rows) if rows else ""


# --- The rest ---


def _agreements(found: list[Agreement], marks: dict[str, str]) -> str:
    if not found:
        return ""
    return "Agreement (90 % intervals; noise lowers both)\n" + table(
        ["", "changes", "same sign", "", "rank correlation", "", ""],
        [
            [
                f"{marks[one.one]} {marks[one.other]}",
                str(one.n),
                f"{one.share:.0%}",
                f"({one.share_low:.0%} to {one.share_high:.0%})",
                _number(one.rho, "+.2f"),
                f"({one.rho_low:+.2f} to {one.rho_high:+.2f})" if one.rho is not None else "",
                "by words" * one.by_words or f"{one.flattered} effects as selected" * bool(one.flattered),
            ]
            for one in found
        ],
    )


def _kinds(found: list[Paid]) -> str:
    sorts = list(dict.fromkeys(one.sort for one in found))
    if not found:
        return ""
    by = {(one.kind, one.sort): one for one in found}

    def cell(one: Paid | None) -> str:
        if one is None:
            return ""
        return f"{one.kept} of {one.tried}" + (f", {one.median:+.2f} %" if one.median is not None else "")

    return "Kinds of change: kept of those tried, median effect in per cent of val_bpb\n" + table(
        ["", *sorts],
        [[kind, *(cell(by.get((kind, sort))) for sort in sorts)] for kind in dict.fromkeys(one.kind for one in found)],
    )


def _scores(found: Comparison, marks: dict[str, str]) -> str:
    """val_bpb of what was kept against tokens and FLOPs."""
    points = [point for point in found.points if point.tokens and point.eval and point.status == "keep"]
    parts = []
    for (tag, budget), its in groupby(
        sorted(points, key=lambda p: (p.eval, p.budget or 0)), key=lambda p: (p.eval, p.budget or 0)
    ):
        rows = []
        for _, steps in groupby(sorted(its, key=lambda p: (p.session, p.number)), key=lambda p: p.session):
            steps = list(steps)
            left_out = len(steps) - MOST_STEPS
            rows += [_step(point, marks) for point in ([steps[0], *steps[left_out + 1 :]] if left_out > 0 else steps)]
        parts.append(
            f"val_bpb against tokens and FLOPs, of what was kept (evaluator {tag}"
            f"{f', {budget:g} s' if budget else ''})\n" + table(["", "#", "val_bpb", "M tokens", "PFLOP", "what"], rows)
        )
    return "\n\n".join(parts)


def _step(point: Point, marks: dict[str, str]) -> list[str]:
    return [
        marks[point.place],
        str(point.number),
        f"{point.bpb:.6f}",
        f"{point.tokens / 1e6:.4g}",
        f"{point.flops / 1e15:.4g}" if point.flops else "-",
        one_line(point.what, 50),
    ]


def _notes(notes: list[str]) -> str:
    return "\n".join(f"note: {cut(one_line(note, 400), 400)}" for note in notes)


def _score(value: float | None) -> str:
    return _number(value, ".6f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _of(count: int, rate: float | None) -> str:
    return f"{count}" + (f" ({rate:.0%})" if rate is not None else "")


def _two(values: tuple[float | None, float | None], unit: float) -> str:
    """Of the baseline, and of the best."""
    shown = ["-" if value is None else f"{value / unit:.3g}" for value in values]
    return shown[0] if shown[0] == shown[1] else " -> ".join(shown)
