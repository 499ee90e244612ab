"""A figure as an SVG element of a page: one path for each kind of shape, however many there are."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

from lab.report.figure import Area, Bars, Figure, Line, Marks, Text


def svg(figure: Figure, label: str, **attributes: str) -> Element:
    """The element; `label` says it to those who don't see it."""
    attributes = {name.rstrip("_"): value for name, value in attributes.items()}
    root = Element(
        "svg", {"viewBox": f"0 0 {figure.width:g} {figure.height:g}", "role": "img", "aria-label": label, **attributes}
    )
    for shape in figure.shapes:
        if isinstance(shape, Text):
            text = SubElement(
                root,
                "text",
                {
                    "class": shape.name,
                    "x": _n(shape.x),
                    "y": _n(shape.y),
                    "font-size": f"{shape.size:g}",
                    "text-anchor": shape.anchor,
                },
            )
            text.text = shape.text
        elif isinstance(shape, Marks):
            SubElement(root, "path", {"class": f"{shape.name} {shape.sign}", "d": _signs(shape), **_pen(shape)})
        else:
            SubElement(root, "path", {"class": shape.name, "d": _path(shape)})
    return root


def sign(name: str, kind: str) -> Element:
    """What stands for a kind of shape in a legend: a sign as in Marks, "band", "bar" or "line"."""
    root = Element("svg", {"viewBox": "0 0 22 14", "class": "sign", "aria-hidden": "true"})
    if kind in ("band", "bar"):
        SubElement(root, "path", {"class": name, "d": "M2 2h18v10h-18z"})
    elif kind == "line":
        SubElement(root, "path", {"class": name, "d": "M1 7h20"})
    else:
        shape = Marks(name, kind, [(11, 7)], 4)
        SubElement(root, "path", {"class": f"{name} {kind}", "d": _signs(shape), **_pen(shape)})
    return root


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(shape: Line | Area | Bars) -> str:
    if isinstance(shape, Bars):
        return "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in shape.boxes)
    points = "L".join(f"{_n(x)} {_n(y)}" for x, y in shape.points)
    return f"M{points}" + "z" * isinstance(shape, Area)


def _signs(shape: Marks) -> str:
    r = shape.radius
    if shape.sign == "dot":  # of no length, with round ends as wide as the dot
        return "".join(f"M{_n(x)} {_n(y)}h0" for x, y in shape.points)
    if shape.sign == "ring":
        return "".join(
            f"M{_n(x - r)} {_n(y)}a{r:g} {r:g} 0 1 0 {_n(2 * r)} 0a{r:g} {r:g} 0 1 0 {_n(-2 * r)} 0"
            for x, y in shape.points
        )
    if shape.sign == "cross":
        return "".join(
            f"M{_n(x - r)} {_n(y - r)}l{_n(2 * r)} {_n(2 * r)}m0 {_n(-2 * r)}l{_n(-2 * r)} {_n(2 * r)}"
            for x, y in shape.points
        )
    return "".join(f"M{_n(x - r)} {_n(y + r)}L{_n(x)} {_n(y - r)}L{_n(x + r)} {_n(y + r)}z" for x, y in shape.points)


def _pen(shape: Marks) -> dict[str, str]:
    return {"stroke-width": f"{2 * shape.radius:g}"} if shape.sign == "dot" else {}
