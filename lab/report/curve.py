"""The report's charts: the way of the best, several sessions' gains, scores against tokens and FLOPs, time."""

from __future__ import annotations

import itertools
import math

from lab import untrusted
from lab.report.figure import Area, Bars, Figure, Line, Marks, Plot, Taken, Text, width_of
from lab.report.html import cleaned
from lab.report.view import View, in_short, words
from lab.session.state import REPLAY

LABEL = 48  # characters of a label in a chart
LABELS = 80  # that are tried; the table below the chart has the rest
MOST_NAMED = 12  # sessions in the legend of a picture
ROWS = 14  # of labels, below a step and above it, that are tried
SIGNS = (  # name, sign, what it stands for: in the order of the legend
    ("kept", "dot", "kept: the line is the best so far"),
    ("near", "ring", "near misses: better, but not told from chance"),
    ("discard", "dot", "discarded"),
    ("replay", "ring", "replayed, and better than the baseline"),
    ("crash", "cross", "crashed or invalid, at the foot"),
    ("far", "up", "discarded, and further above than is drawn"),
)


def sort_of(view: View, change) -> str:
    """Which of SIGNS stands for a change."""
    if change.number not in view.scores or change.status in ("crash", "invalid"):
        return "crash"
    if change.status == "keep":
        return "replay" if change.kind == REPLAY else "kept"
    return "near" if change.near_miss else "discard"


def progress(view: View, width: float, height: float, size: float = 12.5, head: float = 0) -> Figure | None:
    """Scores by experiment, with the best so far and, around it, one standard deviation of one run. None without any.

    Args:
        size: of letters, in pixels. head: so much is left free above.
    """
    if not view.steps:
        return None
    figure, line, sd = Figure(width, height), [view.scores[c.number] for c in view.steps], _sd(view)
    sorts = {c.number: sort_of(view, c) for c in view.changes}
    shown = [view.scores[number] for number, sort in sorts.items() if sort != "crash"]
    usual = sorted(shown)[int(0.8 * len(shown))]  # a few that failed badly would flatten the rest
    span = max(line[0] - min(line), 4 * sd, usual - min(line), 1e-4 * line[0])
    high = max(line) + max(0.35 * span, 1.3 * sd)
    low = min(*shown, min(line) - sd)
    low -= 0.2 * (high - low)  # room for labels and for what crashed
    last = max(1, view.changes[-1].number)
    plot = Plot(
        5.2 * size, head + 2.2 * size, width - 12, height - 3.6 * size, (-0.01 * last, 1.01 * last), (low, high)
    )
    plot.axes(figure, size, "experiment", "val_bpb, lower is better", whole=True, most=9 if width > 600 else 5)

    edge = plot.top + 5
    places: dict[str, list] = {name: [] for name, _, _ in SIGNS}
    for change in view.changes:
        sort, x = sorts[change.number], plot.x(change.number)
        if sort == "crash":
            y = plot.bottom - 7
        elif (y := plot.y(view.scores[change.number])) < plot.top:
            sort, y = "far", edge
        places[sort].append((x, y))
        figure.spots.append((x, y, change.number))
    steps = _stairs([(plot.x(c.number), plot.y(view.scores[c.number])) for c in view.steps], plot.x(last))
    if sd:
        band = plot.y(low) - plot.y(low + sd)
        figure.add(
            Area(
                "band",
                [(x, max(plot.top, y - band)) for x, y in steps]
                + [(x, min(plot.bottom, y + band)) for x, y in reversed(steps)],
            )
        )
    radius = (3.4 if width > 600 else 2.6) * (1.0 if last <= 400 else 0.6)
    for name, sign, _ in (SIGNS[2], SIGNS[1], SIGNS[3], SIGNS[4], SIGNS[5]):
        if places[name]:
            figure.add(Marks(name, sign, places[name], radius))
    figure.add(Line("best", steps))
    figure.add(Marks("kept", "dot", places["kept"], radius * 1.5))
    _label(figure, view, plot, steps, places["discard"] + places["near"] + places["kept"], size)
    return figure


def legend(view: View, figure: Figure) -> list[tuple[str, str, str]]:
    """(name, sign, meaning) of what a progress chart shows."""
    there = {shape.name for shape in figure.shapes if isinstance(shape, Marks)}
    found = [one for one in SIGNS if one[0] in there]
    if sd := _sd(view):
        found.insert(1, ("band", "band", f"one standard deviation of a single run ({sd:.6f}) above and below the best"))
    return found


def _sd(view: View) -> float:
    return view.record.noise.sd if view.record.noise else 0.0


def _stairs(points: list, end: float) -> list:
    """A line that stays at a value until the next one."""
    steps = [points[0]]
    for (_, before), (x, y) in itertools.pairwise(points):
        steps += [(x, before), (x, y)]
    return [*steps, (end, points[-1][1])]


def _label(figure: Figure, view: View, plot: Plot, steps: list, dots: list, size: float) -> None:
    """Names the kept steps where there is room, those that gained most first: below the line or above it, and beside
    the dots."""
    line = Taken(
        [
            (min(a[0], b[0]) - 2, min(a[1], b[1]) - 3, max(a[0], b[0]) + 2, max(a[1], b[1]) + 3)
            for a, b in itertools.pairwise(steps)
        ]
    )
    labels, points = Taken(), Taken([(x - 3, y - 3, x + 3, y + 3) for x, y in dots])
    small, most = size * 0.9, LABEL if figure.width > 600 else 24
    gains = {
        c.number: view.scores[before.number] - view.scores[c.number] for before, c in itertools.pairwise(view.steps)
    }
    for change in sorted(view.steps[1:], key=lambda c: -gains[c.number])[:LABELS]:
        text = untrusted.cut(words(change), most)
        x, y, wide = plot.x(change.number), plot.y(view.scores[change.number]), width_of(text, small)
        rows = [8 + small * (1 + 1.25 * row) for row in range(ROWS)]
        tries = [(x - 3 - wide, y + rows[0])]
        tries += [(x + 4, y + small - row) for row in rows]
        tries += [(left, y + row) for left in (x - 3 - wide, x + 4) for row in rows]
        for left, foot in tries:
            box = (left, foot - small, left + wide, foot + 0.25 * small)
            stem = (x - 1, y + 4, x + 1, foot) if foot > y else (x - 1, foot - small, x + 1, y - 4)
            inside = plot.left <= box[0] and box[2] <= plot.right and plot.top <= box[1] and box[3] <= plot.bottom - 14
            if inside and line.free(box) and points.free(box) and labels.free(box) and labels.free(stem):
                labels.take(box, stem)
                figure.add(Line("stem", [(x, y + math.copysign(5, foot - y)), (x, foot)]))
                anchor = "start" if left > x else "end"
                figure.add(Text("label", left if left > x else left + wide, foot, text, small, anchor))
                break


def together(views: list[View], width: float, height: float, size: float = 12.5, head: float = 0) -> Figure | None:
    """How far each session's best was below its own baseline, in percent, by experiment. None without any.

    Args:
        size, head: as of `progress`.
    """
    drawn, figure = hues(views), Figure(width, height)
    if not drawn:
        return None
    views = [view for _, view in drawn]
    most = max(100 * (1 - view.scores[c.number] / view.scores[0]) for view in views for c in view.steps)
    last = max(1, *(view.changes[-1].number for view in views))
    plot = Plot(
        4.2 * size, head + 2.2 * size, width - 12, height - 3.6 * size, (0, 1.01 * last), (0, max(most * 1.12, 0.1))
    )
    plot.axes(
        figure, size, "experiment", "below the session's own baseline, %", whole=True, most=9 if width > 600 else 5
    )
    for name, view in drawn:
        points = [
            (plot.x(c.number), plot.y(max(0.0, 100 * (1 - view.scores[c.number] / view.scores[0])))) for c in view.steps
        ]
        figure.add(Line(name, _stairs(points, plot.x(view.changes[-1].number))))
        figure.add(Marks(name.replace("best", "kept"), "dot", points, 3.4))
    return figure


def hues(views: list[View]) -> list[tuple[str, View]]:
    """(name of its line, session) of those that searched: a replay of others' changes stays at its baseline."""
    return [(f"best hue{place % 6}", view) for place, view in enumerate(views) if view.baseline and not view.replays]


def card(views: list[View]) -> Figure | None:
    """A picture for sharing, 1200 by 630: one session's progress, or the gains of several. None without any score."""
    width, height, head, one, named = 1200, 630, 96, views[0], []
    if len(views) > 1:
        named = hues(views)[:MOST_NAMED]
        figure = together(views, width, height, 15, max(head, 78 + 20 * len(named)))
        title, said = f"{len(views)} sessions", ""
    else:
        figure = progress(one, width, height, 15, head)
        title, said = f"{one.record.tag} on {one.record.device}", in_short(one)[0]
        if one.gain:
            said += ", confirmed" if one.confirmed and not one.confirmed_before else ", not confirmed"
    if figure is None:
        return None
    figure.add(Text("title", 24, 48, cleaned(title, 80), 28))
    figure.add(Text("told", 24, 80, said, 18))
    if len(views) == 1 and (sd := _sd(one)):
        figure.add(Text("tick", width - 12, 80, f"band: ±{sd:.4f}, one standard deviation of a single run", 14, "end"))
    for place, (name, view) in enumerate(named):
        y = 84 + 20 * place
        figure.add(Line(name, [(24, y - 5), (54, y - 5)]))
        figure.add(Text("told", 64, y, untrusted.cut(view.name, 90), 15))
    return figure


def against(view: View, what: str, width: float, height: float, size: float = 12.5) -> Figure | None:
    """Scores against "tokens" or "flops" of a run; None where fewer than two differ."""
    found = [
        (view.mean(c, what), view.scores[c.number], c)
        for c in view.changes
        if c.number in view.scores and c.status != "invalid"
    ]
    found = [one for one in found if one[0]]
    if len({round(one[0]) for one in found}) < 2:
        return None
    figure = Figure(width, height)
    unit, scale = _unit(max(one[0] for one in found), what)
    xs = [one[0] / scale for one in found]
    ys = [one[1] for one in found]
    kept = [one[1] for one in found if one[2].status == "keep"] or ys
    high = max(kept) + 1.5 * max(max(kept) - min(kept), 4 * _sd(view), 1e-3)
    high, low, pad = min(high, max(ys)), min(ys), 0.04 * (max(xs) - min(xs))
    pad_y = 0.05 * (high - low) or 1e-3
    plot = Plot(
        5.2 * size,
        2.2 * size,
        width - 12,
        height - 3.6 * size,
        (min(xs) - pad, max(xs) + pad),
        (low - pad_y, high + pad_y),
    )
    plot.axes(figure, size, unit, "val_bpb", most=6)
    places: dict[str, list] = {"discard": [], "kept": [], "far": []}
    for x, (_, score, change) in zip(xs, found):
        y, sort = plot.y(score), "kept" if change.status == "keep" else "discard"
        if y < plot.top:
            sort, y = "far", plot.top + 5
        places[sort].append((plot.x(x), y))
        figure.spots.append((plot.x(x), y, change.number))
    for name, sign, radius in (("discard", "dot", 3.2), ("far", "up", 3.2), ("kept", "dot", 4.6)):
        if places[name]:
            figure.add(Marks(name, sign, places[name], radius))
    return figure


def _unit(most: float, what: str) -> tuple[str, float]:
    """(name, factor) that makes numbers handy."""
    power = min(18, max(0, 3 * math.floor(math.log10(most) / 3)))
    prefix = {
        0: "",
        3: "thousand ",
        6: "million ",
        9: "billion ",
        12: "trillion ",
        15: "quadrillion ",
        18: "quintillion ",
    }[power]
    return f"{prefix}{'tokens' if what == 'tokens' else 'FLOPs of the model'} in a run", 10.0**power


def minutes(view: View, width: float, height: float, size: float = 12.5) -> Figure | None:
    """How long the runs of each experiment took. None where no ledger says it."""
    if not view.spent:
        return None
    figure, last = Figure(width, height), max(1, *view.spent)
    most = max(spent.total for spent in view.spent.values()) / 60
    plot = Plot(4.2 * size, 2.2 * size, width - 12, height - 3.6 * size, (-0.6, last + 0.6), (0, most * 1.05))
    plot.axes(figure, size, "experiment", "minutes", whole=True, most=9 if width > 600 else 5)
    wide = max(0.6, 0.8 * (plot.x(1) - plot.x(0)))
    boxes: dict[str, list] = {"own": [], "beside": [], "around": []}
    for number, spent in view.spent.items():
        foot = 0.0
        for name in boxes:
            if part := getattr(spent, name) / 60:
                top = plot.y(foot + part)
                boxes[name].append((plot.x(number) - wide / 2, top, wide, plot.y(foot) - top))
                foot += part
        figure.spots.append((plot.x(number), plot.y(foot), number))
    for name in boxes:
        if boxes[name]:
            figure.add(Bars(name, boxes[name]))
    return figure
