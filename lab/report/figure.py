"""Charts as shapes in a plane, drawn alike as SVG (svg.py) and as PNG (png.py): scales, ticks, room for labels.

A shape's `name` says what it stands for; how that looks is the style sheet's and png.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.cells import cell_len

Point = tuple[float, float]
WIDE = 0.56  # of a character, in its height: about, as fonts differ


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Area:
    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Bars:
    """Rectangles: (left, top, width, height) of each."""

    name: str
    boxes: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Marks:
    """Signs of one kind. `sign`: "dot", "ring", "cross" or "up" (what lies above the chart)."""

    name: str
    sign: str
    points: Sequence[Point]
    radius: float


@dataclass(frozen=True)
class Text:
    """At its baseline. `anchor`: "start", "middle" or "end"."""

    name: str
    x: float
    y: float
    text: str
    size: float
    anchor: str = "start"


@dataclass
class Figure:
    """A chart of this width and height, in pixels; y goes down.

    Attributes:
        shapes: in the order in which they are drawn.
        spots: (x, y, number) of what can be pointed at.
    """

    width: float
    height: float
    shapes: list = field(default_factory=list)
    spots: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, shape) -> None:
        self.shapes.append(shape)


@dataclass(frozen=True)
class Plot:
    """A rectangle with scales: where values lie in a figure."""

    left: float
    top: float
    right: float
    bottom: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.bottom - self.top)

    def axes(
        self,
        figure: Figure,
        size: float,
        across: str,
        up: str,
        told_x: Callable = None,
        told_y: Callable = None,
        whole: bool = False,
        most: int = 9,
    ) -> None:
        """Draws a grid, ticks and names of the axes.

        Args:
            size: of letters. across, up: what the axes measure. whole: x is counted.
        """
        ticks, step = nice(*self.ys, 6)
        for tick in ticks:
            figure.add(Line("grid", [(self.left, self.y(tick)), (self.right, self.y(tick))]))
            text = told_y(tick) if told_y else fixed(tick, step)
            figure.add(Text("tick", self.left - 7, self.y(tick) + size * 0.35, text, size, "end"))
        ticks, step = nice(*self.xs, most, whole)
        for tick in ticks:
            text = told_x(tick) if told_x else fixed(tick, step)
            figure.add(Text("tick", self.x(tick), self.bottom + size * 1.6, text, size, "middle"))
        figure.add(Line("axis", [(self.left, self.bottom), (self.right, self.bottom)]))
        figure.add(Text("tick", self.right, self.bottom + size * 3.1, across, size, "end"))
        figure.add(Text("tick", self.left, self.top - 0.8 * size, up, size))


def nice(low: float, high: float, most: int, whole: bool = False) -> tuple[list[float], float]:
    """(round numbers from low to high, at most so many, the step between them)."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)], step


def fixed(value: float, step: float) -> str:
    """With as many digits as tell ticks apart."""
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def width_of(text: str, size: float) -> float:
    """About how wide a text is."""
    return cell_len(text) * WIDE * size


class Taken:
    """Room in a figure that is taken already, as boxes (left, top, right, bottom)."""

    def __init__(self, boxes: Sequence[Sequence[float]] = ()):
        self.boxes = np.array(boxes, dtype=float).reshape(-1, 4)

    def free(self, box: Sequence[float]) -> bool:
        left, top, right, bottom = box
        a, b, c, d = self.boxes.T
        return not ((a < right) & (c > left) & (b < bottom) & (d > top)).any()

    def take(self, *boxes: Sequence[float]) -> None:
        self.boxes = np.vstack([self.boxes, *boxes])
