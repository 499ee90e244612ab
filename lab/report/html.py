"""Elements of a page. Nothing of it is ever put together from strings: what a description says stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from lab import untrusted


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


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence], class_: str = "stack") -> Element:
    """A table whose rows begin with what they are about. On a narrow screen each row of class "stack" is a list; the
    roles keep it a table for those who hear it."""
    body = el("tbody", role="rowgroup")
    for first, *rest in rows:
        body.append(
            el(
                "tr",
                el("th", *_many(first), scope="row", role="rowheader", data_label=heads[0]),
                *(
                    el("td", *_many(cell), role="cell", data_label=head, class_="n" if _short(cell) else None)
                    for head, cell in zip(heads[1:], rest)
                ),
                role="row",
            )
        )
    return el(
        "div",
        el(
            "table",
            el("caption", caption),
            el(
                "thead",
                el("tr", *(el("th", head, scope="col", role="columnheader") for head in heads), role="row"),
                role="rowgroup",
            ),
            body,
            class_=class_,
            role="table",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _many(cell) -> Sequence:
    return cell if isinstance(cell, (list, tuple)) else (cell,)


def _short(cell) -> bool:
    """Whether it is a figure, which stays on one line."""
    return isinstance(cell, str) and len(cell) < 14 and not cell[:1].isalpha()


def embedded(data) -> str:
    """JSON for a script element: nothing in it can end that, or begin a comment; everything beyond ASCII is escaped."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cleaned(text: str, width: int = 200) -> str:
    """Somebody's words on one line, cleaned, cut."""
    return untrusted.one_line(str(text)[: 10 * width], width)  # cut first: cleaning takes time


def number(value: float | None, form: str, unit: str = "") -> str:
    """With a true minus sign; "–" where it is unknown."""
    return "–" if value is None else re.sub("^-", "−", format(value, form)) + unit
