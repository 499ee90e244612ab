"""The report's charts, drawn by matplotlib: the way of the best, several sessions' gains, scores against tokens and
FLOPs, time. As SVG a chart takes its colours from the page's style sheet and can be pointed at; as PNG it is for
sharing.

A pixel is a point of matplotlib's (72 to an inch). Marks of one kind are one path, however many: it is drawn at once.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import numpy as np
from numpy.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from rich.cells import cell_len

from lab import untrusted
from lab.compare.analysis import Analysis
from lab.report.html import cleaned, el
from lab.session.state import Experiment

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
COLOURS = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", STYLE[: STYLE.index("}")]))
VARIABLES = {colour: f"var(--{name})" for name, colour in reversed(COLOURS.items())}
HUES = "best replay near hue3 hue4 crash".split()  # of several sessions
RING = Outline.unit_regular_polygon(16)
FORMS = {  # of a mark of radius 1: its corners, and matplotlib's codes of them
    "dot": ([(0, 0), (0.01, 0)], [1, 2]),  # of hardly any length, with round ends as wide as the dot
    "ring": (RING.vertices, RING.codes),
    "cross": ([(-1, -1), (1, 1), (-1, 1), (1, -1)], [1, 2, 1, 2]),
    "up": ([(-1, -1), (0, 1), (1, -1), (-1, -1)], [1, 2, 2, 79]),
}
SIGNS = {  # by kind of experiment: colour, form, radius, sign in a legend, meaning
    "far": ("discard", "up", 3.4, "▲", "discarded, and further above than is drawn"),
    "discard": ("discard", "dot", 3.4, "●", "discarded"),
    "near": ("near", "ring", 3.4, "○", "near misses: better, but not told from chance"),
    "replayed": ("replay", "ring", 3.4, "○", "replayed, and better than the baseline"),
    "crash": ("crash", "cross", 3.4, "×", "crashed or invalid, at the foot"),
    "kept": ("best", "dot", 5.1, "●", "kept: the line is the best so far"),
}
LABELS, ROWS = 40, 10  # kept steps that are tried to be named, and rows above and below a step that are tried for it
MOST_LINKS = 100  # marks that lead to a row without a script; from all others the script does
MOST_NAMED = 12  # sessions in the legend of a picture


@dataclass
class Chart:
    """A figure, with what in it can be pointed at.

    Attributes:
        spots: (x, y, number) of each experiment, in pixels from the left and from the top.
        legend: (colour, sign, meaning) of what is drawn.
    """

    figure: Figure
    axes: Axes
    spots: list[tuple[float, float, int]] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)

    def pixels(self, points: ArrayLike) -> np.ndarray:
        """Where values are drawn: (x, y) in pixels from the left and from the bottom."""
        return self.axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))

    def draw(self, corners: np.ndarray, codes: ArrayLike, name: str, **paint) -> None:
        """Adds a path of corners in pixels, with matplotlib's codes of them."""
        path = PathPatch(
            Outline(corners / 72, codes), transform=self.figure.dpi_scale_trans, **({"facecolor": "none"} | paint)
        )
        path.set(gid=name, zorder=3, snap=False)
        self.figure.add_artist(path)

    def mark(self, kinds: dict[int, str], places: np.ndarray, key: str, scale: float = 1.0) -> None:
        """Marks experiments at pixels, those that lie above the chart at its upper edge.

        Args:
            kinds: of SIGNS, by experiment. key: that ids of their rows in the page begin with.
        """
        (_, top), by_kind = self.axes.transAxes.transform((0, 1)), {}
        for i, (number, kind) in enumerate(kinds.items()):
            if places[i, 1] > top:
                kind, places[i, 1] = "far", top - 5
            by_kind.setdefault(kind, []).append(i)
        self.spots = [(x, 72 * self.figure.get_figheight() - y, n) for (x, y), n in zip(places.tolist(), kinds)]
        for kind, (colour, form, radius, sign, meaning) in SIGNS.items():
            if there := by_kind.get(kind):
                self.legend.append((colour, sign, meaning))
                if kind == "kept" and len(there) <= MOST_LINKS:
                    self.link(places[there], scale * radius, COLOURS[colour], key, [list(kinds)[i] for i in there])
                    continue
                corners, codes = FORMS[form]
                corners = (places[there][:, None] + scale * radius * np.asarray(corners)).reshape(-1, 2)
                paint = {"facecolor": COLOURS[colour] if form == "up" else "none", "edgecolor": COLOURS[colour]}
                paint |= {"linewidth": 2 * scale * radius if form == "dot" else 1.6, "capstyle": "round"}
                self.draw(corners, np.tile(codes, len(there)), kind, **paint)

    def link(self, places: np.ndarray, radius: float, colour: str, key: str, numbers: list[int]) -> None:
        """Dots at pixels that lead to the rows of experiments without a script."""
        inches, outline = self.figure.dpi_scale_trans, [Outline.circle(radius=radius)]
        dots = PathCollection(outline, offsets=places / 72, offset_transform=inches, facecolor=colour, linewidth=0)
        dots.set(transform=Affine2D(), gid="kept", zorder=3, urls=[f"#{key}-e{number}" for number in numbers])
        self.figure.add_artist(dots)

    def text(self, x: float, y: float, text: str, size: float, colour: str = "soft", **how) -> None:
        """Adds a text at pixels from the left and from the bottom; nothing in it is mathematics."""
        width, height = 72 * self.figure.get_size_inches()
        how = {"color": COLOURS[colour], "parse_math": False, "zorder": 4} | how
        self.figure.text(x / width, y / height, text, size=size, **how)


def _chart(size: Sequence[float], across: str, up: str, xs: tuple, ys: tuple, whole=False, head=0.0, left=5.2) -> Chart:
    """Axes with a grid.

    Args:
        size: width, height, size of letters, in pixels. across, up: what the axes measure. whole: x is counted.
        head: so much is left free above. left: room for ticks, in letters.
    """
    width, height, letter = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
    foot, top, left = 3.6 * letter, head + 2.2 * letter, left * letter
    box = left / width, foot / height, (width - 12 - left) / width, (height - foot - top) / height
    axes = figure.add_axes(box, xlim=xs, ylim=ys, facecolor="none")
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["axis"])
    axes.tick_params(length=0, pad=6, labelsize=letter, labelcolor=COLOURS["soft"])
    axes.grid(axis="y", color=COLOURS["line"])
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > 600 else 4, integer=whole, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(useOffset=False, style="plain")
    chart = Chart(figure, axes)
    chart.text(width - 12, 0.5 * letter, across, letter, ha="right")
    chart.text(left, height - top + 0.8 * letter, up, letter)
    return chart


# --- The charts ---


def sign_of(analysis: Analysis, experiment: Experiment) -> str:
    """Which of SIGNS stands for an experiment."""
    if experiment.number not in analysis.scores or experiment.status in ("crash", "invalid"):
        return "crash"
    if experiment.status == "keep":
        return "replayed" if experiment.kind == "replay" else "kept"
    return "near" if experiment.near_miss else "discard"


def progress(analysis: Analysis, key: str, *size: float, head: float = 0.0) -> Chart | None:
    """Scores by experiment, with the best so far and, around it, one standard deviation of one run. None without any.

    Args:
        key: of the session in the page. size: see _chart. head: room above.
    """
    if not analysis.steps:
        return None
    kinds = {number: sign_of(analysis, experiment) for number, experiment in analysis.experiments.items()}
    steps, sd = [analysis.scores[e.number] for e in analysis.steps], analysis.noise.sd if analysis.noise else 0.0
    shown = [analysis.scores[number] for number, kind in kinds.items() if kind != "crash"]
    usual = sorted(shown)[int(0.8 * len(shown))]  # a few that failed badly would flatten the rest
    span = max(steps[0] - min(steps), 4 * sd, usual - min(steps), 1e-4 * steps[0])
    high, low = max(steps) + max(0.35 * span, 1.3 * sd), min(*shown, min(steps) - sd)
    low -= 0.2 * (high - low)  # room for labels and for what crashed
    last = max(1, *kinds)
    limits = (-0.01 * last, 1.01 * last), (low, high)
    chart = _chart(size, "experiment", "val_bpb, lower is better", *limits, whole=True, head=head)
    xs, ys = np.array([*(e.number for e in analysis.steps), last]), np.array([*steps, steps[-1]])
    if sd:
        band = {"step": "post", "alpha": 0.14, "linewidth": 0, "gid": "band"}
        chart.axes.fill_between(xs, ys - sd, ys + sd, color=COLOURS["best"], **band)
        chart.legend.append(("best soft", "■", f"one standard deviation of a single run (±{sd:.4f}) around the best"))
    chart.axes.step(xs, ys, where="post", color=COLOURS["best"], linewidth=2.2, gid="best")
    places = chart.pixels([(number, analysis.scores.get(number, low)) for number in kinds])
    failed = [kind == "crash" for kind in kinds.values()]
    places[failed, 1] = chart.pixels([(0, low)])[0, 1] + 7
    chart.mark(kinds, places, key, (1.0 if size[0] > 600 else 0.75) * (1.0 if last <= 400 else 0.6))
    _label(chart, analysis, key, places[np.logical_not(failed)], size)
    return chart


class Taken:
    """Room in a chart that is taken already, as boxes (left, bottom, right, top)."""

    def __init__(self, boxes: Iterable[Sequence[float]] = ()):
        self.boxes = np.array(list(boxes), dtype=float).reshape(-1, 4)

    def free(self, box: Sequence[float]) -> bool:
        left, bottom, right, top = box
        a, b, c, d = self.boxes.T
        return not ((a < right) & (c > left) & (b < top) & (d > bottom)).any()

    def take(self, *boxes: Sequence[float]) -> None:
        self.boxes = np.vstack([self.boxes, *boxes])


def _label(chart: Chart, analysis: Analysis, key: str, marks: np.ndarray, size: Sequence[float]) -> None:
    """Names the kept steps where there is room, those that gained most first: below the line or above it, and beside
    the marks. A name leads to the experiment's row."""
    steps = chart.pixels([(e.number, analysis.scores[e.number]) for e in analysis.steps])
    (left, foot), (right, top) = chart.pixels(np.transpose([chart.axes.get_xlim(), chart.axes.get_ylim()]))
    taken = Taken([(x - 3, y - 3, x + 3, y + 3) for x, y in marks.tolist()])
    for (x, y), (end, below) in itertools.pairwise([*steps.tolist(), [right, steps[-1][1]]]):
        taken.take((x, y - 3, end, y + 3), (end - 2, min(y, below), end + 2, max(y, below)))
    letter, most = 0.9 * size[2], 48 if size[0] > 600 else 24
    gains, stems = -np.diff([analysis.scores[e.number] for e in analysis.steps]), []
    for i in np.argsort(-gains)[:LABELS].tolist():
        experiment, (x, y) = analysis.steps[i + 1], steps[i + 1].tolist()
        text = cleaned(experiment.description, most) or "(not described)"
        wide = 0.56 * letter * cell_len(text)  # about, as fonts differ
        rows = [8 + letter * (1 + 1.25 * row) for row in range(ROWS)]
        tries = [(x - 3 - wide, y - rows[0]), *((x + 4, y + row - letter) for row in rows)]
        tries += [(start, y - row) for start in (x - 3 - wide, x + 4) for row in rows]
        for start, base in tries:
            box = (start, base - 0.25 * letter, start + wide, base + letter)
            stem = (x - 1, base, x + 1, y - 4) if base < y else (x - 1, y + 4, x + 1, base)
            inside = left <= box[0] and box[2] <= right and foot + 14 <= box[1] and box[3] <= top
            if inside and taken.free(box) and taken.free(stem):
                taken.take(box, stem)
                stems += [(x, stem[1]), (x, stem[3])]
                chart.text(start, base, text, letter, "ink", gid="label", url=f"#{key}-e{experiment.number}")
                break
    lines = np.array(stems).reshape(-1, 2)
    chart.draw(lines, [1, 2] * (len(stems) // 2), "stem", edgecolor=COLOURS["axis"], linewidth=0.8)


def gains(analyses: list[Analysis], *size: float, head: float = 0.0) -> Chart | None:
    """How far each session's best was below its own baseline, in percent, by experiment. A replay of others' changes
    stays at its baseline, and is left out. None without any."""
    searched = [(i, a) for i, a in enumerate(analyses) if a.baseline and not a.only_replays]
    if not searched:
        return None
    below = {i: [max(0.0, 100 * (1 - a.scores[e.number] / a.scores[0])) for e in a.steps] for i, a in searched}
    last = max(1, *(max(analysis.experiments) for _, analysis in searched))
    limits = (0, 1.01 * last), (0, max(0.1, 1.12 * max(map(max, below.values()))))
    chart = _chart(size, "experiment", "below the session's own baseline, %", *limits, whole=True, head=head, left=4.2)
    for i, analysis in searched:
        hue, numbers = HUES[i % len(HUES)], [e.number for e in analysis.steps]
        xs, ys = [*numbers, max(analysis.experiments)], [*below[i], below[i][-1]]
        chart.axes.step(xs, ys, where="post", color=COLOURS[hue], linewidth=2.2, gid="best")
        chart.link(chart.pixels(list(zip(numbers, below[i]))), 3.4, COLOURS[hue], f"s{i}", numbers)
        chart.legend.append((hue, "━", cleaned(analysis.name)))
    return chart


def against(analysis: Analysis, what: str, key: str, *size: float) -> Chart | None:
    """Scores against "tokens" or "flops" of a run; None where fewer than two differ."""
    points = {
        number: (amount, analysis.scores[number])
        for number, experiment in analysis.experiments.items()
        if number in analysis.scores and (amount := analysis.mean(experiment, what))
    }
    amounts, scores = (list(side) for side in zip(*points.values())) if points else ([], [])
    if len(set(map(round, amounts))) < 2:
        return None
    kept = [score for number, (_, score) in points.items() if analysis.experiments[number].status == "keep"] or scores
    sd = analysis.noise.sd if analysis.noise else 0.0
    high, low = min(max(scores), max(kept) + 1.5 * max(max(kept) - min(kept), 4 * sd, 1e-3)), min(scores)
    pad, pad_up = 0.04 * (max(amounts) - min(amounts)), 0.05 * (high - low) or 1e-3
    power = min(18, max(0, (len(str(int(max(amounts)))) - 1) // 3 * 3))
    prefix = ["", "thousand ", "million ", "billion ", "trillion ", "quadrillion ", "quintillion "][power // 3]
    unit = f"{prefix}{'tokens' if what == 'tokens' else 'FLOPs of the model'} in a run"
    xs = (min(amounts) - pad) / 10**power, (max(amounts) + pad) / 10**power
    chart = _chart(size, unit, "val_bpb", xs, (low - pad_up, high + pad_up))
    kinds = {n: "kept" if analysis.experiments[n].status == "keep" else "discard" for n in points}
    chart.mark(kinds, chart.pixels([(amount / 10**power, score) for amount, score in points.values()]), key)
    chart.legend = []
    return chart


def minutes(analysis: Analysis, *size: float) -> Chart | None:
    """How long the runs of each experiment took. None where no record says it."""
    if not analysis.spent:
        return None
    numbers, spent = list(analysis.spent), list(analysis.spent.values())
    last, most = max(1, *numbers), max(part.total for part in spent) / 60
    limits = (-0.6, last + 0.6), (0, 1.05 * most)
    chart = _chart(size, "experiment", "minutes", *limits, whole=True, left=4.2)
    feet = np.zeros(len(numbers))
    for name, colour, meaning in (
        ("own", "best", "training the change"),
        ("beside", "beside", "training what it is measured against; confirmations"),
        ("around", "around", "start, compilation, evaluation"),
    ):
        heads = feet + np.array([getattr(part, name) / 60 for part in spent])
        sides = [
            (x + dx, y) for x, a, b in zip(numbers, feet, heads) for dx, y in zip((-0.4, -0.4, 0.4, 0.4), (a, b, b, a))
        ]
        corners = np.insert(chart.pixels(sides).reshape(-1, 4, 2), 4, 0, axis=1).reshape(-1, 2)
        bars = {"facecolor": COLOURS[colour], "linewidth": 0}
        chart.draw(corners, np.tile([1, 2, 2, 2, 79], len(numbers)), name, **bars)
        chart.legend.append((colour, "■", meaning))
        feet = heads
    spots = chart.pixels(list(zip(numbers, feet))).tolist()
    chart.spots = [(x, size[1] - y, number) for (x, y), number in zip(spots, numbers)]
    return chart


# --- As files ---


def card(analyses: list[Analysis], said: str) -> bytes | None:
    """A PNG for sharing, 1200 by 630: one session's progress, or the gains of several. None without any score.

    Args:
        said: a line below the title.
    """
    size, named = (1200.0, 630.0, 15.0), 0
    if len(analyses) == 1:
        title = f"{analyses[0].started.tag} on {analyses[0].started.device}"
        chart = progress(analyses[0], "", *size, head=96)
    else:
        title, named = f"{len(analyses)} sessions", min(MOST_NAMED, len(analyses))
        chart = gains(analyses, *size, head=max(96, 78 + 20 * named))
    if chart is None:
        return None
    chart.text(24, 630 - 48, cleaned(title, 80), 28, "ink")
    chart.text(24, 630 - 80, said, 18)
    for place, (hue, _, name) in enumerate(chart.legend[:named]):
        chart.text(24, 630 - 84 - 20 * place, "■", 15, hue)
        chart.text(48, 630 - 84 - 20 * place, untrusted.cut(name, 90), 15)
    return png(chart)


def png(chart: Chart) -> bytes:
    """The chart on the page's light paper."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        FigureCanvasAgg(chart.figure).print_figure(content, facecolor=COLOURS["paper"], dpi=72)
    return content.getvalue()


def svg(chart: Chart, label: str, name: str, class_: str) -> Element:
    """The chart as an element of a page; `label` says it to those who don't see it, `name` begins its ids.

    The page forbids inline styles, so they become attributes; colours become variables of the style sheet.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        FigureCanvasSVG(chart.figure).print_svg(content, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = fromstring(content.getvalue())
    ids = {element.get("id"): f"{name}-{i}" for i, element in enumerate(drawn.iter()) if element.tag.endswith(DEFINED)}
    width, height = 72 * chart.figure.get_size_inches()
    attributes = {"role": "img", "aria_label": label, "id": name, "class_": f"chart {class_}"}
    root = el("svg", viewBox=f"0 0 {width:g} {height:g}", stroke_linejoin="round", **attributes)
    root.extend(_plain(element, ids) for element in drawn if element.tag.endswith("}g"))
    return root


DEFINED = "}path", "}clipPath"
NAMED = {*SIGNS, "band", "best", "label", "own", "beside", "around"}  # groups that stay told apart
LINK = "{http://www.w3.org/1999/xlink}href"
LEFT_OUT = "style", "id", "target", "font-family", LINK


def _plain(element: Element, ids: dict[str | None, str]) -> Element:
    """An element of matplotlib's with attributes in place of styles, no namespaces, and ids that are the page's own."""
    style = dict(re.findall(r"([\w-]+): ([^;]+)", element.get("style", "")))
    attributes = {name: value for name, value in (element.attrib | style).items() if name not in LEFT_OUT}
    if font := attributes.pop("font", None):
        attributes["font-size"] = font.split("px")[0]
    if link := element.get(LINK):
        attributes["href"] = f"#{ids[link[1:]]}" if link[1:] in ids else link
    if identity := element.get("id"):
        attributes |= {"id": ids[identity]} if identity in ids else {"class": identity} if identity in NAMED else {}
    if clip := attributes.get("clip-path"):
        attributes["clip-path"] = f"url(#{ids[clip[5:-1]]})"
    if "d" in attributes:
        attributes["d"] = " ".join(re.sub(r"(?<=\.\d)\d+", "", attributes["d"]).split())
    plain = Element(element.tag.partition("}")[2], {k: VARIABLES.get(v, v) for k, v in attributes.items()})
    if element.tag.endswith("}a"):
        plain.set("tabindex", "-1")
    plain.text = element.text if element.tag.endswith("}text") else None
    plain.extend(_plain(child, ids) for child in element)
    return plain
