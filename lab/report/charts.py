"""The report's charts, drawn by matplotlib: scores by experiment, and several sessions' gains. As SVG a chart takes its
colours from the page's style sheet and can be pointed at; as PNG it is for sharing.

A pixel is a point of matplotlib's (72 to an inch).
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import numpy as np
from matplotlib import rc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.cells import cell_len

from lab.compare import effects
from lab.compare.analysis import Analysis
from lab.compare.comparison import Paid
from lab.report.html import cleaned, el

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
COLOURS = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", STYLE[: STYLE.index("}")]))
VARIABLES = {colour: f"var(--{name})" for name, colour in reversed(COLOURS.items())}
HUES = "best replay near hue3 hue4 crash".split()  # of several sessions
LETTER = 12  # size of all letters, in pixels
SIGNS = {  # by kind of experiment: colour, matplotlib's marker, its size in pixels, sign in a legend, meaning
    "far": ("discard", "^", 7, "▲", "discarded, and beyond the top of the chart"),
    "discard": ("discard", ".", 7, "●", "discarded"),
    "near": ("near", "o", 7, "○", "near misses: better, but could not be told from chance"),
    "replayed": ("replay", "o", 7, "○", "replayed, and better than the baseline"),
    "crash": ("crash", "x", 7, "×", "crashed or invalid (at the bottom)"),
    "moved": ("discard", "|", 7, "|", "superseded: not judged, as the best had changed (at the bottom)"),
    "kept": ("best", ".", 10, "●", "kept: the line is the best so far"),
}
LABELS, ROWS = 40, 3  # kept steps that are tried to be named, and rows above and below a step that are tried for it
MOST_LINKS = 100  # marks that lead to a row without a script; from all others the script does
SHARE = r"[01](\.\d+)?"  # of the steps of a run
XML = b"<?xml"  # that an SVG file begins with
MOST_NAMED = 12  # sessions in the legend of a picture

rc("figure", facecolor="none", dpi=72)
rc("font", size=LETTER)
rc("text", parse_math=False)  # nobody's words are mathematics
rc("axes", facecolor="none", edgecolor=COLOURS["axis"], labelcolor=COLOURS["soft"], grid=True, axisbelow=True)
rc("axes", titlecolor=COLOURS["soft"], titlelocation="left", titlesize="medium")
rc("axes.spines", top=False, left=False, right=False)
rc("axes.grid", axis="y")
rc("grid", color=COLOURS["line"])
rc("axes.formatter", useoffset=False)
rc("path", simplify=False)
rc("svg", fonttype="none", hashsalt="report")


@dataclass
class Chart:
    """A figure, with what in it can be pointed at."""

    figure: Figure
    axes: Axes
    key: str = ""  # that ids of the experiments' rows in the page begin with
    # (x, y, number), in pixels from the left and top; (colour, sign, meaning) of what is drawn.
    spots: list[tuple[float, float, int]] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)

    def pixels(self, points) -> np.ndarray:
        """The places of values: (x, y) in pixels from the left and from the bottom."""
        return self.axes.transData.transform(np.asarray(points, dtype=float))

    def mark(self, kinds: dict[int, str], points: np.ndarray, scale: float = 1.0) -> None:
        """Marks experiments, of these kinds of SIGNS, at values (x, y)."""
        height = 72 * self.figure.get_figheight()
        self.spots = [(x, height - y, number) for (x, y), number in zip(self.pixels(points).tolist(), kinds)]
        for kind, (colour, marker, size, sign, meaning) in SIGNS.items():
            places = {number: point for (number, of), point in zip(kinds.items(), points) if of == kind}
            if not places:
                continue
            self.legend.append((colour, sign, meaning))
            xs, ys = np.transpose(list(places.values()))
            paint = {"color": COLOURS[colour], "gid": kind, "zorder": 3}
            if kind == "kept" and len(places) <= MOST_LINKS:
                self.link(xs, ys, list(places), scale * size, **paint)
            elif marker in ".o":
                self.dots(xs, ys, scale * size, **paint)
                if marker == "o":  # a ring
                    self.dots(xs, ys, scale * size - 3, color=COLOURS["paper"], zorder=3)
            else:
                self.axes.plot(xs, ys, marker, markersize=scale * size, **paint)

    def dots(self, xs: np.ndarray, ys: np.ndarray, size: float, **paint) -> None:
        """Dots as one line, of lengths of nearly nothing with round ends: thousands of marks take longer."""
        ends = np.repeat(xs, 3)
        ends[1::3] += 1e-3
        ends[2::3] = np.nan
        line = {"linewidth": size, "solid_capstyle": "round", "snap": False}
        self.axes.plot(ends, np.repeat(ys, 3), **line, **paint)

    def link(self, xs, ys, numbers: list[int], size: float, **paint) -> None:
        """Dots that lead to the rows of experiments, also without a script."""
        urls = [f"#{self.key}-e{number}" for number in numbers]
        self.axes.scatter(xs, ys, size**2, linewidths=0, urls=urls, **paint)


def _chart(width: float, height: float, up: str, key: str = "", head: float = 0.0) -> Chart:
    """Axes with a grid, in pixels, across which experiments are counted; `head` is left free above."""
    figure = Figure((width / 72, height / 72))
    left, foot, top = 5.2 * LETTER, 3.6 * LETTER, head + 2.2 * LETTER
    axes = figure.add_axes((left / width, foot / height, 1 - (left + 12) / width, 1 - (foot + top) / height))
    axes.set_xlabel("experiment", loc="right")
    axes.set_title(up)
    axes.tick_params(length=0, labelcolor=COLOURS["soft"])
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > 600 else 4, integer=True, steps=[1, 2, 5, 10]))
    return Chart(figure, axes, key)


# --- The charts ---


def progress(analysis: Analysis, key: str, width: float, height: float, head: float = 0.0) -> Chart | None:
    """Scores by experiment, the best so far and, around it, one standard deviation of a run. None without any."""
    if not analysis.steps:
        return None
    scores, steps = analysis.scores, [analysis.scores[e.number] for e in analysis.steps]
    sd = analysis.noise.sd if analysis.noise else 0.0
    ordered = sorted(scores.values())
    usual = ordered[int(0.8 * len(ordered))]  # a few that failed badly would flatten the rest
    span = max(steps[0] - min(steps), 4 * sd, usual - min(steps), 1e-4 * steps[0])
    high, low = max(steps) + max(0.35 * span, 1.3 * sd), min(ordered[0], min(steps) - sd)
    low -= 0.2 * (high - low)  # room for labels and for what crashed
    last, pad = max(1, *analysis.experiments), 0.02 * (high - low)
    chart = _chart(width, height, "val_bpb, lower is better", key, head)
    chart.axes.set(xlim=(-0.01 * last, 1.01 * last), ylim=(low, high))
    xs, ys = np.array([*(e.number for e in analysis.steps), last]), np.array([*steps, steps[-1]])
    if sd:
        band = {"step": "post", "alpha": 0.14, "linewidth": 0, "gid": "band"}
        chart.axes.fill_between(xs, ys - sd, ys + sd, color=COLOURS["best"], **band)
        chart.legend.append(("best soft", "■", f"one standard deviation of a single run (±{sd:.4f}) around the best"))
    chart.axes.step(xs, ys, where="post", color=COLOURS["best"], linewidth=2.2, gid="best")
    kinds = {number: _kind(analysis, number, high) for number in analysis.experiments}
    points = np.array([(number, min(scores.get(number, low + pad), high - pad)) for number in kinds])
    chart.mark(kinds, points, 1.0 if last <= 400 else 0.6)
    _label(chart, analysis, chart.pixels(points))
    return chart


def _kind(analysis: Analysis, number: int, high: float) -> str:
    """The sign in SIGNS for an experiment, in a chart that ends at a score."""
    experiment, score = analysis.experiments[number], analysis.scores.get(number)
    if score is None:
        return "moved" if experiment.status == "superseded" else "crash"
    if experiment.status == "keep":
        return "replayed" if experiment.kind == "replay" else "kept"
    return "far" if score > high else "near" if experiment.near_miss else "discard"


def _label(chart: Chart, analysis: Analysis, marks: np.ndarray) -> None:
    """Names the kept steps where there is room, those that gained most first: below the line or above it, and beside
    the marks. A name leads to the experiment's row."""
    steps = chart.pixels([(e.number, analysis.scores[e.number]) for e in analysis.steps])
    left, foot, right, top = chart.axes.bbox.extents
    ends = np.vstack([steps[1:], (right, steps[-1, 1])])
    across = np.column_stack([steps[:, 0], steps[:, 1] - 3, ends[:, 0], steps[:, 1] + 3])
    down = np.column_stack([ends[:, 0] - 2, ends[:, 1], ends[:, 0] + 2, steps[:, 1]])
    taken = np.vstack([np.hstack([marks - 3, marks + 3]), across, down])  # boxes (left, bottom, right, top)
    gains = -np.diff([analysis.scores[e.number] for e in analysis.steps])
    for i in np.argsort(-gains)[:LABELS].tolist():
        experiment, (x, y) = analysis.steps[i + 1], steps[i + 1].tolist()
        text = cleaned(experiment.description, 48 if right > 600 else 24) or "(not described)"
        wide = 0.54 * LETTER * cell_len(text)  # about, as fonts differ
        rows = [6 + LETTER * 1.25 * row for row in range(ROWS)]
        tries = [(aside, up) for row in rows for up in (-row - LETTER, row) for aside in (-3 - wide, 4)]
        for aside, up in tries:
            box = x + aside, y + up - 0.25 * LETTER, x + aside + wide, y + up + LETTER
            inside = left <= box[0] and box[2] <= right and foot + 14 <= box[1] and box[3] <= top
            if inside and not overlapping(box, taken):
                taken = np.vstack([taken, box])
                how = {"textcoords": "offset points", "color": COLOURS["ink"], "size": 0.9 * LETTER, "gid": "label"}
                place = experiment.number, analysis.scores[experiment.number]
                chart.axes.annotate(text, place, (aside, up), url=f"#{chart.key}-e{experiment.number}", **how)
                break


def overlapping(box: tuple[float, float, float, float], boxes: np.ndarray) -> bool:
    """Whether a box (left, bottom, right, top) overlaps any of several."""
    left, bottom, right, top = boxes.T
    return bool(((left < box[2]) & (right > box[0]) & (bottom < box[3]) & (top > box[1])).any())


def gains(analyses: list[Analysis], width: float, height: float, head: float = 0.0) -> Chart | None:
    """How far each session's best was below its own baseline, in percent, by experiment. A replay of others' changes
    stays at its baseline, and is left out. None without any."""
    searched = {i: analysis for i, analysis in enumerate(analyses) if analysis.baseline and not analysis.only_replays}
    if not searched:
        return None
    chart = _chart(width, height, "below the session's own baseline, %", head=head)
    for i, analysis in searched.items():
        hue, name, numbers = HUES[i % len(HUES)], cleaned(analysis.name), [e.number for e in analysis.steps]
        below = [max(0.0, 100 * (1 - analysis.scores[number] / analysis.scores[0])) for number in numbers]
        line = {"color": COLOURS[hue], "linewidth": 2.2, "gid": "best", "label": name}
        chart.axes.step([*numbers, max(analysis.experiments)], [*below, below[-1]], where="post", **line)
        chart.key = f"s{i}"
        chart.link(numbers, below, numbers, 7, color=COLOURS[hue], gid="kept", zorder=3)
        chart.legend.append((hue, "━", name))
    chart.axes.set(xlim=(0, None), ylim=(0, max(0.1, chart.axes.get_ylim()[1])))
    return chart


def kinds(summaries: list[Paid], width: float, height: float) -> Chart | None:
    """The rate at which changes of each kind were kept on each sort of device, drawn towards that of all kinds there,
    with its 90 % interval. None without any."""
    if not summaries:
        return None
    sorts, names = (list(dict.fromkeys(getattr(one, name) for one in summaries)) for name in ("sort", "kind"))
    chart = _chart(width, height, "changes kept of those tried, %, with 90 % intervals")
    for i, sort in enumerate(sorts):
        hue = COLOURS[HUES[i % len(HUES)]]
        rates = {one.kind: [100 * part for part in one.rate] for one in summaries if one.sort == sort}
        xs = [names.index(kind) + 0.7 * ((i + 0.5) / len(sorts) - 0.5) for kind in rates]
        middles, lows, highs = np.transpose(list(rates.values()))
        chart.axes.vlines(xs, lows, highs, color=hue, linewidth=2.2)
        chart.axes.plot(xs, middles, "o", color=hue, markersize=7, label=cleaned(sort))
        for x, high, one in zip(xs, highs, (one for one in summaries if one.sort == sort)):
            how = {"textcoords": "offset points", "ha": "center", "size": 0.75 * LETTER, "color": COLOURS["soft"]}
            chart.axes.annotate(f"{one.kept}/{one.tried}", (x, high), (0, 4), **how)
    chart.axes.set(ylim=(0, 118), xlim=(-0.5, len(names) - 0.5), xlabel="")
    chart.axes.set_xticks(range(len(names)), names)
    chart.axes.set_yticks(range(0, 101, 20))
    chart.axes.legend(labelcolor=COLOURS["soft"], frameon=False, ncols=len(sorts), loc="upper right")
    return chart


def losses(analysis: Analysis, width: float, height: float) -> Chart | None:
    """Training loss by tokens of what was kept last, each a change of the one before. None without two of them."""
    drawn = {}
    for step in analysis.steps[-len(HUES) :]:
        run = next((run for run in analysis.judged[step.number] if run.result.get("losses")), None)
        if run and (tokens := effects.quantity(run, "total_tokens_M")):
            told = run.result["losses"].items()
            points = sorted((float(s) * tokens, v) for s, v in told if re.fullmatch(SHARE, s) and float(s) <= 1)
            if len(points) > 1:
                drawn[step.number] = points
    if len(drawn) < 2:
        return None
    chart = _chart(width, height, "training loss, nats")
    chart.axes.set_xlabel("million tokens", loc="right")
    for hue, (number, points) in zip(HUES, drawn.items()):
        chart.axes.plot(*zip(*points), color=COLOURS[hue], linewidth=2.2, gid="best")
        chart.legend.append((hue, "━", f"{number}: {cleaned(analysis.experiments[number].description, 48)}"))
    late = sorted(value for points in drawn.values() for share, value in points if share >= 0.2 * points[-1][0])
    pad = 0.1 * (late[-1] - late[0]) or 0.1
    chart.axes.set(xlim=(0, None), ylim=(late[0] - pad, late[-1] + pad))
    return chart


# --- As files ---


def card(analyses: list[Analysis], said: str) -> bytes | None:
    """A PNG for sharing, 1200 by 630: one session's progress, or the gains of several. None without any score.

    Args:
        said: a line below the title.
    """
    width, height, head = 960, 504, 78
    if len(analyses) == 1:
        title = f"{analyses[0].started.tag} on {analyses[0].started.device}"
        chart = progress(analyses[0], "", width, height, head=head)
    else:
        title, chart = f"{len(analyses)} sessions", gains(analyses, width, height, head=head)
    if chart is None:
        return None
    if len(analyses) > 1:
        lines = chart.axes.get_legend_handles_labels()[0][:MOST_NAMED]
        chart.axes.legend(handles=lines, labelcolor=COLOURS["soft"], frameon=False)
    chart.figure.text(20 / width, 1 - 38 / height, cleaned(title, 80), size=22, color=COLOURS["ink"])
    chart.figure.text(20 / width, 1 - 64 / height, said, size=14, color=COLOURS["soft"])
    return png(chart, 1200 / width)


def png(chart: Chart, scale: float = 1.0) -> bytes:
    """The chart on the page's light paper, enlarged."""
    return _saved(chart, "png", facecolor=COLOURS["paper"], dpi=72 * scale)


def picture(chart: Chart) -> bytes:
    """The chart on the page's light paper, as an SVG file that is the same for the same figures."""
    return _saved(chart, "svg", facecolor=COLOURS["paper"], metadata={"Date": None})


def _saved(chart: Chart, form: str, **options) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        chart.figure.savefig(content, format=form, **options)
    return content.getvalue()


def svg(chart: Chart, label: str, name: str) -> Element:
    """The chart as an element of a page; `label` says it to those who don't see it, `name` begins its ids.

    The page forbids inline styles, so they become attributes; colours become variables of the style sheet.
    """
    drawn = fromstring(_saved(chart, "svg"))
    ids = {element.get("id"): f"{name}-{i}" for i, element in enumerate(drawn.iter()) if element.tag.endswith(DEFINED)}
    width, height = 72 * chart.figure.get_size_inches()
    attributes = {"role": "img", "aria_label": label, "id": name, "class_": "chart"}
    root = el("svg", viewBox=f"0 0 {width:g} {height:g}", stroke_linejoin="round", **attributes)
    root.extend(_plain(element, ids) for element in drawn if element.tag.endswith("}g"))
    return root


DEFINED = "}path", "}clipPath"
NAMED = {*SIGNS, "band", "best", "label"}  # groups that stay told apart
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
