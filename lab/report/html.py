"""Elements of a page. Nothing of it is ever put together from strings: what a description says stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element

from lab import untrusted
from lab.compare.effects import Effect
from lab.compare.tables import Entry, Table, Tag, spread

LONG = 30  # rows of a table that is not folded


def el(tag: str, *parts, **attributes) -> Element:
    """An element; parts are elements, texts, or None. Of attributes' names `_` becomes `-`, and goes at the end:
    class_="x". An attribute that is None is left out."""
    element = Element(
        tag, {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items() if value is not None}
    )
    add(element, parts)
    return element


def add(element: Element, parts: Iterable) -> None:
    for part in parts:
        if part is None:
            continue
        if isinstance(part, Element):
            element.append(part)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + str(part)
        else:
            element.text = (element.text or "") + str(part)


def table(model: Table, class_: str = "stack") -> Element:
    """A table, to be unfolded if it is long. On a narrow screen each row of class "stack" is a list; the roles keep it
    a table for those who hear it. All intervals are drawn to one scale."""
    ends = sorted(
        abs(end)
        for row in model.rows
        for entry in row
        if isinstance(entry, Effect)
        for end in (entry.low, entry.high, entry.value)
        if end is not None
    )
    reach = 1.15 * ends[int(0.9 * (len(ends) - 1))] if ends else 1.0
    head = el("tr", *(el("th", text, scope="col", role="columnheader") for text in model.heads), role="row")
    body, before = el("tbody", role="rowgroup"), None
    for first, *rest in model.rows:
        row = el("tr", role="row")
        if not (model.grouped and first is before):
            spanned = sum(other[0] is first for other in model.rows) if model.grouped else 1
            attributes = {"rowspan": spanned if spanned > 1 else None, "data_label": model.heads[0]}
            row.append(el("th", *_entry(first, reach), scope="row", role="rowheader", **attributes))
        for label, entry in zip(model.heads[1:], rest):
            narrow = isinstance(entry, str) and len(entry) < 14 and not entry[:1].isalpha()  # a figure, on one line
            name = "n" if narrow or isinstance(entry, Effect) else None
            row.append(el("td", *_entry(entry, reach), role="cell", data_label=label, class_=name))
        body.append(row)
        before = first
    head = el("thead", head, role="rowgroup")
    whole = el("table", el("caption", typeset(model.caption)), head, body, class_=class_, role="table")
    scroll = el("div", whole, class_="scroll", tabindex="0", role="region", aria_label=typeset(model.caption))
    if len(model.rows) <= LONG:
        return scroll
    return el("details", el("summary", f"{typeset(model.caption)}: {len(model.rows)} rows"), scroll)


def _entry(entry: Entry, reach: float) -> list:
    if isinstance(entry, Effect):
        interval = el("span", typeset(spread(entry)), class_="soft")
        return [typeset(f"{entry.value:+.5f}"), interval, _forest(entry, reach)]
    if isinstance(entry, Tag):
        return [el("span", entry, class_=f"tag {entry.replace(' ', '-')}")] if entry else []
    return [cleaned(typeset(entry), 400)]


def _forest(effect: Effect, reach: float) -> Element:
    """An effect with its interval, drawn around 0 in 150 by 18 pixels; hollow where it may flatter itself."""

    def x(value: float) -> str:
        return f"{75 + 69 * max(-1.0, min(1.0, value / reach)):.1f}"

    root = el("svg", viewBox="0 0 150 18", class_="forest", aria_hidden="true")
    root.append(el("path", d="M75 1v16", class_="zero"))
    if effect.low is not None and effect.high is not None:
        root.append(el("path", d=f"M{x(effect.low)} 9H{x(effect.high)}"))
    root.append(el("circle", cx=x(effect.value), cy="9", r="4", class_=None if effect.sure else "hollow"))
    return root


def typeset(text: str) -> str:
    """With a true minus sign before a number, an arrow, and a dash for what is unknown."""
    return "–" if text == "-" else re.sub(r"(?<![\w.)])-(?=[0-9])", "−", text).replace("->", "→")


def embedded(data) -> str:
    """JSON for a script element: nothing in it can end that, or begin a comment; everything beyond ASCII is escaped."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cleaned(text: str, width: int = 200) -> str:
    """Somebody's words on one line, cleaned, cut."""
    text = text[: 10 * width]  # cut first: cleaning takes time
    if text.isascii() and text.isprintable():
        return untrusted.cut(" ".join(text.split()), width)
    return untrusted.one_line(text, width)
