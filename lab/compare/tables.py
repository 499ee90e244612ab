"""A comparison as sections of tables and sentences, once: as text for a terminal here, as a page in report/html.py."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from lab.compare import classify, effects
from lab.compare.comparison import CHANGE, FAMILY, SOURCE, WORDS, Agreement, Cell, Comparison, Paid, Shared
from lab.compare.analysis import Analysis
from lab.compare.effects import Effect
from lab.genome.kinds import KINDS
from lab.session.events import Interval
from lab.untrusted import counted, one_line

WIDTH = 100  # of a terminal
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_STEPS = 12  # kept changes of a session that the table of tokens shows
MOST_CHANGES = 300  # that a table shows
CAPTIONS = {
    CHANGE: "The same change: its effect in bits per byte (below 0 is better), with its 90 % interval",
    FAMILY: "Probably the same change: the same lines in the same definition, beside others",
    WORDS: "Matched by the description alone: perhaps the same change",
}


class Place(str):
    """A place's name, for which a terminal has a letter."""


class Tag(str):
    """A verdict."""


@dataclass
class Table:
    """Rows under heads. A row of one entry is a heading for those below it. Entries may be anybody's words, which are
    cleaned when they are shown."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """What belongs together; a part that is a str is a paragraph."""

    name: str
    title: str
    parts: Sequence[Table | str]


def sections(comparison: Comparison) -> list[Section]:
    """All sections of a comparison that are not empty."""
    all_sections = [
        Section("sessions", "Side by side", [*_scores(comparison.sessions), _costs(comparison.sessions)]),
        Section("transfer", "What holds where", _transfer(comparison)),
        Section("published", "Which published findings hold", _published(comparison)),
        Section("agreement", "How far devices agree", _agreements(comparison.agreements)),
        Section("paid", "Which kinds of change paid", _paid(comparison)),
        Section("steps", "Scores against tokens and FLOPs", steps_tables(comparison.sessions)),
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
    heads = "place", "session", "baseline", "best", "gain", "gain, %", "confirmed", "in time", "noise"
    tables = []
    for (tag, budget, _), group in groups.items():
        caption = f"Measured by evaluator {tag}" + (f", after {budget:g} s of training" if budget else "")
        rows = []
        for session in group:
            scores = [number(e and session.scores[e.number], ".6f") for e in (session.baseline, session.best)]
            gains = number(session.gain, "+.6f"), number(session.relative, "+.2%"), _confirmed(session)
            noise = number(session.noise and session.noise.sd, ".6f")
            time = str(session.gained or "-").replace(" of the time", "")
            rows.append((Place(session.place), session.name, *scores, *gains, time, noise))
        unknown = "Evaluator unknown: these scores can be compared with no others"
        tables.append(Table(caption if tag else unknown, heads, rows))
    return tables


def _confirmed(session: Analysis) -> str:
    """The best's gain on held-out rows, as the session's confirmation has it; "no" where there is none."""
    last = session.confirmation
    if not last or not last.verdict.gains or session.kept_since:
        return "no"
    gain, low, high = last.verdict.gains["held_out_bpb"]
    length = "" if session.state.is_usual(last) else f", after {last.budget:g} s"
    return f"{'' if last.verdict.confirmed else 'not: '}{gain:+.5f} ({low:+.4f} to {high:+.4f}){length}"


def _shown(effect: Effect) -> str:
    """An effect with its interval."""
    if effect.low is None or effect.high is None:
        return f"{effect.value:+.5f}"
    return f"{effect.value:+.5f} ({effect.low:+.4f} to {effect.high:+.4f})"


def _costs(sessions: list[Analysis]) -> Table:
    rows = []
    for session in sessions:
        counts = [session.rows, len(session.tried), session.counts["keep"], session.counts["crash"]]
        means = [session.mean(session.best, name) for name in ("mfu_percent", "watts", "joules_per_M")]
        figures = number(session.per_hour, ".1f"), *(number(value, ".3g") for value in means)
        rows.append((Place(session.place), *map(str, counts), *figures))
    return Table(
        "What it took",
        ("place", "runs", "experiments", "kept", "crashed", "an hour", "MFU %, best", "W", "J/M tokens"),
        rows,
    )


# --- Changes ---


def _transfer(comparison: Comparison) -> list[Table | str]:
    parts: list[Table | str] = []
    for joined, caption in CAPTIONS.items():
        changes = [change for change in comparison.shared if change.joined == joined]
        if not changes:
            continue
        left_out = len(changes) - MOST_CHANGES
        caption += f"; {left_out} more are left out" * (left_out > 0)
        rows = [row for change in changes[:MOST_CHANGES] for row in _rows(change)]
        parts.append(Table(caption, ("place", "verdict", "effect", "remarks"), rows))
        origins = {change.source: change.cells[change.source] for change in changes if _is_unmeasured(change)}
        parts += [
            f"What {place} found is biased by selection until it is measured again on that device: "
            f"python -m lab start TAG, then python -m lab replay {cell.session} --runs 3"
            for place, cell in origins.items()
        ]
    if not parts and len(comparison.places) > 1:
        parts.append(
            "No change was tried in more than one of these places. To try what one found on another machine: "
            "python -m lab replay SESSION --runs 3"
        )
    return parts


def _published(comparison: Comparison) -> list[Table | str]:
    """The published findings that were tried, with what was published for such a device."""
    rows: list[tuple[str, ...]] = []
    for one in comparison.published:
        rows.append((one_line(one.finding.title, WIDTH - 20),))
        for place, cell in one.change.cells.items():
            effect = _shown(cell.effect) if cell.effect else "no score"
            told = one.effect(place)
            why = [f"published {told:+.5f}"] if told is not None else []
            why.append(cell.why if cell.effect else ", ".join(cell.tried))
            rows.append((Place(place), Tag(cell.verdict), effect, "; ".join(why)))
    caption = "Published findings: their effect here in bits per byte (below 0 is better), with its 90 % interval"
    return [Table(caption, ("place", "verdict", "effect", "remarks"), rows)] if rows else []


def _is_unmeasured(change: Shared) -> bool:
    """Whether its source has not run it again, which a replay would do: that takes what was kept."""
    effect = change.cells[change.source].effect if change.source else None
    return effect is not None and effect.biased and effect.picked


def _rows(change: Shared) -> list[tuple[str, ...]]:
    about = one_line(change.description, WIDTH - 20) + f" [{change.kind}]" * bool(change.kind)
    rows: list[tuple[str, ...]] = [(about,)]
    for place, cell in change.cells.items():
        effect = _shown(cell.effect) if cell.effect else "no score"
        verdict = Tag(cell.verdict.replace(SOURCE, "found here"))
        rows.append((Place(place), verdict, effect, "; ".join(filter(None, _remarks(change, cell)))))
    return rows


def _remarks(change: Shared, cell: Cell) -> list[str]:
    if cell.effect is None:
        return [cell.why or ", ".join(cell.tried)]
    remarks = [one_line(cell.description, 40)] if change.joined != CHANGE else []
    if cell.times:
        remarks.append(f"in {cell.times}" + f", where it {cell.verdict_in_time}" * _differs(cell))
    if cell.effect.low is None:
        remarks.append("unconfirmed")
    if cell.effect.biased and cell.verdict in (SOURCE, ""):
        remarks.append(effects.FLATTERED[cell.effect.picked])
    if cell.verdict == classify.OPEN:
        remarks.append(_missing(cell))
    return [*remarks, cell.due]


def _differs(cell: Cell) -> bool:
    """Whether the effect has another class as a factor of time."""
    return cell.verdict_in_time not in ("", classify.OPEN, cell.verdict)


def _missing(cell: Cell) -> str:
    """Why it can't be told, and after how many more runs of the change and of its parent each it probably could."""
    if cell.more is None:
        wanted = f"; it would take more than {classify.MOST} further runs"
        return cell.why + wanted * (not cell.why.startswith(classify.NO_RUNS))
    here, source = cell.more["here"], cell.more["source"]
    where = "here and there" if here and source else "here" if here else "there"
    return f"{cell.why}; {counted(max(here, source), 'more run')} {where}"


# --- The rest ---


def _agreements(agreements: list[Agreement]) -> list[Table | str]:
    heads = "", "", "changes", "same sign", "rank correlation", "remark"
    remarks, rows = {FAMILY: "probably the same", WORDS: "by words"}, []
    for agreed in agreements:
        figures = "{:.0%} ({:.0%} to {:.0%})".format(*agreed.share), "-"
        if agreed.rho:
            figures = figures[0], "{:+.2f} ({:+.2f} to {:+.2f})".format(*agreed.rho)
        remark = remarks.get(agreed.joined) or f"{agreed.biased} biased by selection" * bool(agreed.biased)
        rows.append((Place(agreed.one), Place(agreed.other), str(agreed.n), *figures, remark))
    return [Table("Agreement, with 90 % intervals; noise lowers both figures", heads, rows)] if rows else []


def _paid(comparison: Comparison) -> list[Table | str]:
    """The kinds of change by sort of device: which paid where, on all of them, and what separates the sessions."""
    if not comparison.kinds:
        return []
    tried = [(session, e) for session in comparison.sessions if session.scores for e in session.tried]
    single = sum(len(session.judged[e.number]) == 1 for session, e in tried)
    worded = sum(session.started.source == "ledger" for session, _ in tried)
    scored = sum(e.number in session.scores for session, e in tried)
    said = f"Of {counted(len(tried), 'experiment')} {scored} have a score, {single} of these from a single run, after "
    said += "which what is kept may be chance"
    said += f". What {worded} of them change is known from their descriptions alone" * bool(worded)
    parts = [kinds_table(comparison.kinds), f"{said}."]
    return [*parts, *_across(comparison), *_gains(comparison.sessions)]


def kinds_table(summaries: list[Paid]) -> Table:
    sorts, rows = list(dict.fromkeys(summary.sort for summary in summaries)), []
    for one in sorted(summaries, key=lambda summary: sorts.index(summary.sort)):
        rate = "{:.0%} ({:.0%} to {:.0%})".format(*one.rate)
        figures = f"{one.kept} of {one.tried}", rate, str(one.crashed), number(one.median, "+.2f")
        rows.append((one.sort, one.kind, *figures))
    caption = "By sort of device; the rate is drawn towards that of all kinds there, with its 90 % interval"
    return Table(caption, ("device", "kind", "kept", "rate", "crashed", "median step, %"), rows)


def _across(comparison: Comparison) -> list[Table | str]:
    """Which kinds hold across sorts of device."""
    if not comparison.across:
        return []
    sorts = list(dict.fromkeys(sort for one in comparison.across for sort in one.by_sort))
    rows = [
        (one.kind, *(_ratio(one.by_sort.get(sort)) for sort in sorts), _ratio(one.overall), one.told)
        for one in comparison.across
    ]
    caption = "Odds of being kept, relative to the other changes of the same sessions, with 90 % intervals"
    return [Table(caption, ("kind", *sorts, "all", "kept"), rows)]


def _ratio(interval: Interval | None) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*interval) if interval else "-"


def _gains(sessions: list[Analysis]) -> list[Table | str]:
    """What each session gained by kind, those with the fewest steps first: what separates large from small."""
    known = [session for session in sessions if session.baseline and session.best is not session.baseline]
    if len(known) < 2:
        return []
    steps = {session.name: session.mean(session.baseline, "num_steps") for session in known}
    known.sort(key=lambda session: steps[session.name] or math.inf)
    kinds = [kind for kind in KINDS if any(kind in session.gain_by_kind for session in known)]
    rows = []
    for session in known:
        tokens, params = (session.mean(session.baseline, name) for name in ("tokens", "num_params_M"))
        per = tokens / 1e6 / params if tokens and params else None
        best = session.mean(session.best, "num_steps")
        sizes = number(steps[session.name], ".0f"), number(best, ".0f"), number(per, ".2g")
        gains = (number(100 * session.gain_by_kind.get(kind, 0.0), ".2f") for kind in kinds)
        rows.append((Place(session.place), session.started.tag, *sizes, *gains))
    heads = "place", "session", "steps", "of the best", "tokens/param.", *kinds
    caption = "What the kept changes of each kind gained, in per cent of the baseline's val_bpb"
    parts: list[Table | str] = [Table(caption, heads, rows)]
    told = [session for session in known if steps[session.name]]
    with_steps = [steps[session.name] or 0.0 for session in told]
    ranks = {kind: effects.spearman(with_steps, [s.gain_by_kind.get(kind, 0.0) for s in told]) for kind in kinds}
    if shown := ["{} {:+.2f} ({:+.2f} to {:+.2f})".format(kind, *rho) for kind, rho in ranks.items() if rho]:
        parts.append(
            f"Rank correlation of these gains with the baseline's steps, over {len(told)} sessions, with 90 % "
            f"intervals as if no two were of one device: {', '.join(shown)}."
        )
    return parts


def steps_tables(sessions: list[Analysis]) -> list[Table | str]:
    """val_bpb of what was kept against tokens and FLOPs."""
    groups: dict[str, list[Sequence[str]]] = {}
    for session in sessions:
        steps = [step for step in session.steps if session.eval and session.mean(step, "tokens")]
        for step in [*steps[:1], *steps[1:][1 - MOST_STEPS :]]:
            score, means = session.scores[step.number], [session.mean(step, name) for name in ("tokens", "flops")]
            figures = [number(mean and mean / unit, ".4g") for mean, unit in zip(means, (1e6, 1e15))]
            row = Place(session.place), str(step.number), f"{score:.6f}", *figures, one_line(step.description[:500], 50)
            measured = f"evaluator {session.eval}" + (f", {session.budget:g} s" if session.budget else "")
            groups.setdefault(measured, []).append(row)
    heads, caption = ("place", "#", "val_bpb", "M tokens", "PFLOP", "what"), "val_bpb against tokens and FLOPs"
    return [Table(f"{caption}, of what was kept ({measured})", heads, rows) for measured, rows in groups.items()]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- As text ---


def text(comparison: Comparison, only: Sequence[str] = ()) -> str:
    """The comparison for a terminal of 100 columns. only: the names of the sections to show; by default all."""
    shown = [section for section in sections(comparison) if not only or section.name in only]
    return _text([part for section in shown for part in section.parts], _letters(comparison))


def kinds_text(comparison: Comparison) -> str:
    """The part of the text about kinds of change, with what its letters stand for."""
    names = "\n".join(f"  {letter}: {place}" for place, letter in _letters(comparison).items())
    return f"{names}\n\n{text(comparison, ['agreement', 'paid'])}"


def transfer(comparison: Comparison) -> str:
    """The part of the text about changes that more than one place has tried."""
    letters, parts = _letters(comparison), _transfer(comparison)
    if not parts:
        return textwrap.fill(
            f"Both are of {comparison.places[0]}: its own findings, measured again, are no longer biased when "
            "another device's replay of them is compared",
            WIDTH,
        )
    return "\n".join(f"  {letter}: {place}" for place, letter in letters.items()) + "\n\n" + _text(parts, letters)


def _letters(comparison: Comparison) -> dict[str, str]:
    return {place: LETTERS[i] if i < len(LETTERS) else str(i + 1) for i, place in enumerate(comparison.places)}


def _text(parts: Sequence[Table | str], letters: dict[str, str]) -> str:
    return "\n\n".join(
        textwrap.fill(part, WIDTH, break_on_hyphens=False)
        if isinstance(part, str)
        else f"{one_line(part.caption, WIDTH)}\n{_rows_as_text(part, letters)}"
        for part in parts
    )


def _rows_as_text(table: Table, letters: dict[str, str]) -> str:
    """Columns: those of numbers to the right. What stands under a heading is indented."""
    rows = [[_entry(entry, letters) for entry in row] for row in table.rows]
    heads = ["" if head == "place" else head for head in table.heads]
    cells = [row for row in rows if len(row) > 1]
    grouped = len(cells) < len(rows)
    columns = list(zip(*([] if grouped else [heads]), *cells))
    widths = [max(map(len, column)) for column in columns]
    right = [not grouped and all(entry[:1] in "+-.0123456789" for entry in column[1:]) for column in columns]

    def line(row: list[str]) -> str:
        if len(row) == 1:
            return f"  {row[0]}"
        padded = (e.rjust(width) if r else e.ljust(width) for e, width, r in zip(row, widths, right))
        return (4 if grouped else 2) * " " + "  ".join(padded).rstrip()

    return "\n".join(map(line, rows if grouped else [heads, *rows]))


def _entry(entry: str, letters: dict[str, str]) -> str:
    return letters.get(entry, entry) if isinstance(entry, Place) else one_line(entry) or "-" * isinstance(entry, Tag)
