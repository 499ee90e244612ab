"""What several sessions say together (lab.compare), as parts of a page: the cross-hardware view."""

from __future__ import annotations

from functools import partial
from xml.etree.ElementTree import Element

from lab.compare import effects
from lab.compare.classify import CLASSES, OPEN
from lab.compare.comparison import SOURCE, Cell, Comparison, Facts, Shared, compare, tally
from lab.report import curve
from lab.report.figure import Figure, Line, Marks, Plot
from lab.report.html import cleaned, el, number, table
from lab.report.svg import svg
from lab.report.view import View

MOST = 300  # changes that a table shows
GAINS = (1120, 330, 12.5), (360, 290, 11)  # of the chart, as in page.py
WIDE, HIGH = 150, 18  # pixels of an interval


def sections(page, views: list[View]) -> list[Element]:
    """The parts, in order. LabError as of compare."""
    found = compare([view.record for view in views])
    sure = [change for change in found.shared if not change.by_words]
    said = [change for change in found.shared if change.by_words]
    parts = [
        (
            "sessions",
            "Side by side",
            [
                _links(views),
                *_sessions(found.sessions),
                page.chart(
                    "together",
                    partial(curve.together, views),
                    GAINS,
                    "How far each session's best was below its own baseline, by experiment",
                    legend=lambda figure: [(name, "line", view.name) for name, view in curve.hues(views)],
                ),
            ],
        ),
        (
            "transfer",
            "What holds where",
            [
                *([_counts(sure)] if any(change.source for change in sure) else []),
                *(
                    [
                        _changes(
                            found,
                            sure,
                            "The same change: its effect in bits per byte (below 0 is better), with a 90 % interval",
                        )
                    ]
                    if sure
                    else []
                ),
                *(
                    [_changes(found, said, "By its words: probably the same change, matched by its description alone")]
                    if said
                    else []
                ),
                None
                if sure or said
                else el(
                    "p",
                    "No change was tried in more than one of these places. To try on this "
                    "machine what another one found: python -m lab replay SESSION",
                ),
            ],
        ),
        ("agreement", "How far devices agree", [_agreement(found)] if found.agreements else []),
        ("paid", "Which kinds of change paid", [_kinds(found)] if found.kinds else []),
        (
            "notes",
            "To keep in mind",
            [el("ul", *(el("li", cleaned(note, 400)) for note in found.notes))] if found.notes else [],
        ),
    ]
    return [
        el("section", el("h2", title, id=f"{name}-head"), *inner, aria_labelledby=f"{name}-head")
        for name, title, inner in parts
        if inner
    ]


def _links(views: list[View]) -> Element:
    return el(
        "nav",
        "Each by itself: ",
        *(
            part
            for place, view in enumerate(views)
            for part in (" · " * bool(place), el("a", view.name, href=f"#s{place}"))
        ),
        aria_label="Sessions",
    )


def _sessions(sessions: list[Facts]) -> list[Element]:
    """A table of scores for each group that compares (one evaluator, as many seconds; an unknown evaluator is a group
    of its own), and one of what it took."""
    groups: dict[tuple, list[Facts]] = {}
    for one in sessions:
        groups.setdefault(one.measured, []).append(one)
    found = []
    for its in groups.values():
        heads = "session", "baseline", "best", "gain", "gain, %", "confirmed", "noise"
        found.append(
            table(
                its[0].measured_by,
                heads,
                [
                    (
                        one.name,
                        number(one.baseline, ".6f"),
                        number(one.best, ".6f"),
                        number(one.gain, ".6f"),
                        number(one.relative and 100 * one.relative, ".2f", " %"),
                        _confirmed(one),
                        number(one.noise, ".6f"),
                    )
                    for one in its
                ],
            )
        )
    found.append(
        table(
            "What it took; of the baseline → of the best",
            ("session", "tried", "kept", "crashed", "an hour", "tokens a run, M", "PFLOP a run", "MFU, %"),
            [
                (
                    one.name,
                    str(one.experiments),
                    f"{one.kept} ({number(one.keep_rate, '.0%')})",
                    f"{one.crashed} ({number(one.crash_rate, '.0%')})",
                    number(one.per_hour, ".1f"),
                    _two(one.tokens, 1e6),
                    _two(one.flops, 1e15),
                    _two(one.mfu, 1),
                )
                for one in sessions
            ],
        )
    )
    return found


def _two(values: tuple[float | None, float | None], unit: float) -> str:
    """Of the baseline, and of the best."""
    shown = ["–" if value is None else f"{value / unit:.3g}" for value in values]
    return shown[0] if shown[0] == shown[1] else " → ".join(shown)


def _confirmed(one: Facts) -> str:
    known = one.confirmed
    if known is None:
        return "no"
    return number(-known.value, "+.4f") + (
        f" [{number(-known.high, '+.4f')}, {number(-known.low, '+.4f')}]" if known.error is not None else ""
    )


# --- Changes ---


def _changes(found: Comparison, changes: list[Shared], caption: str) -> Element:
    """A row for each change, a column for each place. All intervals are drawn to one scale."""
    ends = sorted(
        abs(end)
        for change in changes
        for cell in change.cells.values()
        if cell.effect
        for end in (cell.effect.low, cell.effect.high, cell.effect.value)
        if end is not None
    )
    reach = 1.15 * ends[int(0.9 * (len(ends) - 1))] if ends else 0.0
    places = [place for place in found.places if any(place in change.cells for change in changes)]
    rows = [
        (
            [cleaned(change.description, 200), el("small", change.kinds[0]) if change.kinds else None],
            *(_cell(change, place, reach or 1.0) for place in places),
        )
        for change in changes[:MOST]
    ]
    left_out = len(changes) - MOST
    return table(caption + f"; {left_out} more are left out" * (left_out > 0), ("change", *places), rows)


def _cell(change: Shared, place: str, reach: float) -> list:
    cell = change.cells.get(place)
    if cell is None:
        return ["not tried"]
    effect = cell.effect
    said = cell.verdict.replace(SOURCE, "found here")
    tag = el("span", said, class_=f"tag {'open' if cell.verdict == OPEN else cell.verdict}") if said else None
    if effect is None:
        return [tag, el("small", "no score: " + ", ".join(cell.tried))]
    spread = f" [{number(effect.low, '+.4f')}, {number(effect.high, '+.4f')}]" if effect.low is not None else ""
    return [
        tag,
        el("div", number(effect.value, "+.5f"), el("span", spread, class_="soft"), class_="n"),
        svg(_interval(effect, reach), f"{effect.value:+.5f}{spread}", class_="forest chart"),
        *(el("small", text) for text in _remarks(change, place, cell)),
    ]


def _interval(effect, reach: float) -> Figure:
    figure, plot = Figure(WIDE, HIGH), Plot(6, 0, WIDE - 6, HIGH, (-reach, reach), (0, 1))

    def x(value):
        return plot.x(max(-reach, min(reach, value)))

    figure.add(Line("zero", [(plot.x(0), 1), (plot.x(0), HIGH - 1)]))
    if effect.low is not None:
        figure.add(Line("interval best", [(x(effect.low), HIGH / 2), (x(effect.high), HIGH / 2)]))
    sign = "ring" if effect.flattered or effect.low is None else "dot"
    figure.add(Marks("kept", sign, [(x(effect.value), HIGH / 2)], 4))
    return figure


def _remarks(change: Shared, place: str, cell: Cell) -> list[str]:
    found = [cleaned(change.texts.get(place, ""), 120)] if change.by_words else []
    if cell.effect.flattered and cell.verdict in (SOURCE, ""):
        found.append(effects.FLATTERED[cell.effect.picked])
    if cell.effect.low is None:
        found.append("unconfirmed: nothing was repeated")
    if cell.verdict == OPEN:
        more = (
            [
                f"{cell.more[where]} {there}"
                for where, there in (("here", "here"), ("source", "where it was found"))
                if cell.more[where]
            ]
            if cell.more
            else []
        )
        found.append(cell.why + ("; more runs of it and its parent that would tell: " + ", ".join(more)) * bool(more))
    return [text for text in [*found, cell.due] if text]


def _counts(changes: list[Shared]) -> Element:
    rows = [
        (source, place, str(its.total()), *(str(its[one]) for one in CLASSES))
        for (source, place), its in tally(changes).items()
    ]
    return table(
        "Changes found in one place and measured in another", ("found on", "measured on", "changes", *CLASSES), rows
    )


# --- The rest ---


def _agreement(found: Comparison) -> Element:
    rows = [
        (
            f"{one.one} and {one.other}",
            str(one.n),
            f"{one.share:.0%} [{one.share_low:.0%}, {one.share_high:.0%}]",
            "–"
            if one.rho is None
            else f"{number(one.rho, '+.2f')} [{number(one.rho_low, '+.2f')}, {number(one.rho_high, '+.2f')}]",
            "matched by words" if one.by_words else f"{one.flattered} effects as selected" * bool(one.flattered),
        )
        for one in found.agreements
    ]
    return table(
        "With 90 % intervals; noise lowers both figures",
        ("places", "changes", "same sign", "rank correlation", "remark"),
        rows,
    )


def _kinds(found: Comparison) -> Element:
    sorts = list(dict.fromkeys(one.sort for one in found.kinds))
    by = {(one.kind, one.sort): one for one in found.kinds}

    def cell(kind, sort):
        one = by.get((kind, sort))
        return (
            "–"
            if one is None
            else [
                f"{one.kept} of {one.tried}",
                el("small", number(one.median, "+.2f", " %")) if one.median is not None else None,
            ]
        )

    return table(
        "Kept of those tried, and the median effect in per cent of the parent's val_bpb",
        ("kind", *sorts),
        [(kind, *(cell(kind, sort) for sort in sorts)) for kind in dict.fromkeys(one.kind for one in found.kinds)],
    )
