"""Elements of a page. Nothing of it is ever put together from strings: what a description says stays text."""

from __future__ import annotations

import json
import re
from xml.etree.ElementTree import Element

from lab import untrusted
from lab.compare.tables import Table, Tag

LONG = 30  # rows of a table that is not folded


def el(tag: str, *parts, **attributes) -> Element:
    """An element; parts are elements, texts, or None. Of attributes' names `_` becomes `-`, and goes at the end:
    class_="x". An attribute that is None is left out."""
    known = {name: str(value) for name, value in attributes.items() if value is not None}
    element = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in known.items()})
    for part in parts:
        if isinstance(part, Element):
            element.append(part)
        elif part is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + part
        elif part is not None:
            element.text = (element.text or "") + part
    return element


def table(model: Table) -> Element:
    """A table, to be unfolded if it is long. On a narrow screen each row is a list; the roles keep it a table for those
    who hear it."""
    caption, body = typeset(model.caption), el("tbody", role="rowgroup")
    for first, *rest in model.rows:
        over = None if rest else len(model.heads)
        row = el("tr", el("th", *_entry(first), scope="row", role="rowheader", colspan=over), role="row")
        for label, entry in zip(model.heads[1:], rest):
            figure = "n" if len(entry) < 14 and not entry[:1].isalpha() else None  # on one line
            row.append(el("td", *_entry(entry), role="cell", data_label=label, class_=figure))
        body.append(row)
    heads = el("tr", *(el("th", text, scope="col", role="columnheader") for text in model.heads), role="row")
    whole = el("table", el("caption", caption), el("thead", heads, role="rowgroup"), body, class_="stack", role="table")
    scroll = el("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
    if len(model.rows) <= LONG:
        return scroll
    return el("details", el("summary", f"{caption}: {len(model.rows)} rows"), scroll)


def _entry(entry: str) -> list:
    return [tag(entry)] if isinstance(entry, Tag) and entry else [cleaned(typeset(entry), 400)]


def tag(text: str) -> Element:
    """A verdict in its colour."""
    return el("span", text, class_=f"tag {text.replace(' ', '-')}")


def typeset(text: str) -> str:
    """A text with a true minus sign before a number, an arrow, and a dash for an unknown value."""
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
