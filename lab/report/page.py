"""The report: one HTML file with everything in it. It needs no network, and is forbidden to use one."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from lab import untrusted
from lab.compare.record import Change, Record
from lab.report import across, curve
from lab.report.figure import Figure
from lab.report.html import cleaned, el, embedded, number, table
from lab.report.svg import sign, svg
from lab.report.view import View, in_short, words

HERE = Path(__file__).resolve().parent
MARK = "<!doctype html>\n<!-- python -m lab report -->\n"  # what a file of ours begins with
SAID = {"keep": "kept", "discard": "discarded", "crash": "crashed", "invalid": "invalid"}
LONG = 30  # rows of a table that is not folded
# Of charts, on a desk and on a phone: width, height, size of letters.
PROGRESS, BARS, HALVES = (
    ((1120, 430, 12.5), (360, 330, 11)),
    ((1120, 240, 12.5), (360, 220, 11)),
    ((540, 300, 12.5), (360, 250, 11)),
)
BARS_TOLD = (
    ("own", "bar", "training the change"),
    ("around", "bar", "start, compilation, evaluation"),
    ("beside", "bar", "training what it is measured against; confirmations"),
)
TOKENS_TOLD = (
    "A run ends by the clock. A change that only makes it faster moves along the others' slope; one that "
    "learns more from each token lies below it."
)


class Page:
    """A page being written.

    Attributes:
        data: for the script: {"sessions": {session: {number: details}}, "charts": {id: [session, x, y, number, ...]}}.
    """

    def __init__(self):
        self.data = {"sessions": {}, "charts": {}}

    def chart(
        self,
        name: str,
        draw: Callable[[float, float, float], Figure | None],
        sizes: tuple,
        label: str,
        session: str = "",
        legend: Callable[[Figure], Iterable] = lambda figure: (),
    ) -> Element | None:
        """A chart for a desk and one for a phone, of which the style sheet shows one, with its legend (name, sign,
        meaning of each entry); None without anything to draw."""
        drawn = []
        for class_, size in zip(("wide", "narrow"), sizes):
            if (figure := draw(*size)) is None:
                return None
            self.data["charts"][f"{name}-{class_}"] = [
                session,
                *(round(part, 1) for spot in figure.spots for part in spot),
            ]
            drawn.append(svg(figure, label, id=f"{name}-{class_}", class_=f"chart {class_}"))
        signs = [el("li", sign(*kind), text) for *kind, text in legend(figure)]
        return el("figure", *drawn, el("ul", *signs, class_="legend") if signs else None)


def html(records: list[Record]) -> bytes:
    """The page about one session, or about several and what they say together."""
    page, views = Page(), [View(record) for record in records]
    if len(views) == 1:
        title = f"{views[0].record.tag} on {views[0].record.device}"
        main = [
            el("h1", el("span", "autoresearch session ", class_="over"), cleaned(title)),
            *_session(page, "s0", views[0], "h2"),
        ]
    else:
        title = f"{len(views)} sessions on {len({record.device for record in records})} devices"
        main = [
            el("h1", el("span", "autoresearch ", class_="over"), title),
            *across.sections(page, views),
            *(
                el(
                    "section",
                    el("h2", view.name),
                    *_session(page, f"s{place}", view, "h3"),
                    id=f"s{place}",
                    class_="session",
                )
                for place, view in enumerate(views)
            ),
        ]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    whole = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=policy),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="referrer", content="no-referrer"),
            el("meta", name="color-scheme", content="light dark"),
            el("link", rel="icon", href="data:,"),
            el("title", f"{cleaned(title)} – autoresearch"),
            el("style", style),
        ),
        el(
            "body",
            el("a", "Skip to the content", href="#main", class_="skip"),
            el("header", el("button", "Dark", type="button", id="theme", hidden="")),
            el("main", *main, el("footer", _stamp()), id="main"),
            el("div", id="tip", role="status", aria_live="polite", hidden=""),
            el("script", embedded(page.data), type="application/json", id="data"),
            el("script", script),
        ),
        lang="en",
    )
    return (MARK + tostring(whole, encoding="unicode", method="html")).encode(errors="replace") + b"\n"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _stamp() -> str:
    return (
        f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by python -m lab report. val_bpb: "
        "validation bits per byte, lower is better. This file holds everything that it shows, and loads nothing."
    )


# --- A session ---


def _session(page: Page, key: str, view: View, head: str) -> list[Element]:
    """The sections about a session; `head` is the tag of their headings, `key` begins their ids."""

    def section(name, title, *parts):
        if not any(part is not None for part in parts):
            return None
        return el("section", el(head, title, id=f"{key}-{name}-head"), *parts, aria_labelledby=f"{key}-{name}-head")

    pair = [
        page.chart(f"{key}-{what}", partial(curve.against, view, what), HALVES, f"val_bpb against {what} of a run", key)
        for what in ("tokens", "flops")
    ]
    found = [
        _headline(view),
        section(
            "progress",
            "Progress",
            page.chart(
                f"{key}-progress",
                partial(curve.progress, view),
                PROGRESS,
                _told(view),
                key,
                partial(curve.legend, view),
            ),
            _kept(view),
        ),
        section("ledger", "Experiments", _ledger(page, key, view)),
        section("failed", "Crashed and invalid", _failed(view)),
        section("kinds", "Kinds of change", _kinds(view)),
        section(
            "time",
            "Where the time went",
            _shares(view),
            page.chart(
                f"{key}-minutes",
                partial(curve.minutes, view),
                BARS,
                "Minutes of runs by experiment",
                key,
                lambda figure: BARS_TOLD,
            ),
        ),
        section("tokens", "Score against tokens and FLOPs", el("p", TOKENS_TOLD), el("div", *pair, class_="pair"))
        if any(chart is not None for chart in pair)
        else None,
        section("under", "What it was measured under", _under(view)),
    ]
    return [part for part in found if part is not None]


def _headline(view: View) -> Element:
    big, said = in_short(view)
    record, noise = view.record, view.record.noise
    chance = "Nothing was run twice, so nobody knows how far chance moves a score."
    if noise:
        times = f"; the gain is {view.gain / noise.sd:.1f} times that" if view.gain else ""
        chance = (
            f"Chance alone moves a single run by {noise.sd:.6f} (standard deviation between seeds, {noise.df} "
            f"degrees of freedom){times}."
        )
    counts = [f"{view.counts[status]} {SAID[status]}" for status in SAID if view.counts[status]]
    facts = [
        ("experiments", str(view.tried), ", ".join(counts)),
        ("runs", str(sum(len(c.trials) for c in view.changes)), "that ended with a score"),
        ("time", number(record.hours, ".1f", " h"), f"{view.tried / record.hours:.1f} experiments an hour")
        if record.hours
        else None,
        ("training", f"{record.budget:g} s", "in each run") if record.budget else None,
    ]
    tiles = [el("div", el("dt", name), el("dd", value, el("small", more))) for name, value, more in filter(None, facts)]
    return el(
        "section",
        el("p", big, class_="big"),
        el("p", said),
        el("p", *_badge(view)) if view.gain else None,
        el("p", chance),
        el("dl", *tiles, class_="tiles"),
        *(el("p", cleaned(note, 400), class_="note") for note in record.notes),
        aria_label="In short",
    )


def _badge(view: View) -> list:
    said = cleaned(view.record.confirmation, 400)
    if view.confirmed is None:
        return [
            el("span", "Unconfirmed", class_="badge open"),
            " What is kept for its scores is flattered by them: "
            "python -m lab confirm measures it again, with new seeds and on held-out rows.",
        ]
    sure = view.confirmed
    badge = el("span", "Confirmed" if sure else "Not confirmed", class_=f"badge {'yes' if sure else 'no'}")
    later = " Something was kept after that, and is not confirmed." * view.confirmed_before
    return [badge, f" {said[:1].upper()}{said[1:]}.{later}"]


def _told(view: View) -> str:
    """The progress chart in words."""
    if view.best is None:
        return ""
    return (
        f"val_bpb of {view.tried} experiments: from {view.scores[view.steps[0].number]:.6f} down to "
        f"{view.scores[view.best.number]:.6f} in {len(view.steps) - 1} kept steps"
    )


def _kept(view: View) -> Element | None:
    rows = []
    for before, change in zip(view.steps, view.steps[1:]):
        step = view.scores[change.number] - view.scores[before.number]
        rows.append(
            (
                f"{change.number}",
                words(change),
                f"{view.scores[change.number]:.6f}",
                number(step, "+.6f"),
                str(len(view.judged[change.number])),
            )
        )
    return _folded("What was kept, in order", ("experiment", "what", "val_bpb", "step", "runs"), rows)


def _failed(view: View) -> Element | None:
    rows = [
        (f"{c.number}", [el("span", SAID[c.status], class_=f"tag {c.status}")], words(c), cleaned(c.reason) or "–")
        for c in view.changes
        if c.status in ("crash", "invalid")
    ]
    return _folded("What did not get a score, and why", ("experiment", "verdict", "what", "why"), rows)


def _folded(caption: str, heads: tuple[str, ...], rows: list) -> Element | None:
    """A table, to be unfolded if it is long; None if it is empty."""
    if len(rows) <= LONG:
        return table(caption, heads, rows) if rows else None
    return el("details", el("summary", f"{caption}: {len(rows)}"), table(caption, heads, rows))


def _kinds(view: View) -> Element | None:
    rows = [
        (kind, str(tried), str(kept), str(crashed), number(effect, "+.6f"))
        for kind, tried, kept, crashed, effect in view.kinds
    ]
    return (
        table("By what most of a change is about", ("kind", "tried", "kept", "crashed", "median against parent"), rows)
        if rows
        else None
    )


def _shares(view: View) -> Element | None:
    shares = view.shares
    total = sum(hours for _, hours in shares)
    rows = [
        (what, f"{hours:.2f} h" if total >= 1 else f"{60 * hours:.1f} min", f"{100 * hours / total:.0f} %")
        for what, hours in shares
    ]
    return table("Of the whole session", ("what", "time", "share"), rows, "plain") if rows else None


def _under(view: View) -> Element:
    record = view.record
    facts = [
        ("device", record.device),
        ("backend", record.backend),
        ("training", f"{record.budget:g} s a run" if record.budget else ""),
        *(
            (name, str(record.facts.get(name) or ""))
            for name in ("dataset", "eval", "data", "profile", "python", "made")
        ),
    ]
    return el(
        "dl",
        *(part for name, text in facts if text for part in (el("dt", name), el("dd", cleaned(text)))),
        class_="facts",
    )


# --- The ledger ---


def _ledger(page: Page, key: str, view: View) -> Element:
    """All experiments as a table: rows are there without a script, which sorts, filters and opens them."""
    page.data["sessions"][key] = {c.number: _details(view, c) for c in view.changes}
    columns = [(head, class_, cells) for head, class_, cells in _columns(view) if any(cell != "–" for cell in cells)]
    body = el("tbody", role="rowgroup")
    for place, change in enumerate(view.changes):
        row = el(
            "tr",
            el("th", str(change.number), scope="row", role="rowheader"),
            el("td", el("span", _verdict(change), class_=f"tag {change.status}"), role="cell"),
            id=f"{key}-e{change.number}",
            role="row",
        )
        for _, class_, cells in columns:
            row.append(el("td", cells[place], class_=class_, role="cell"))
        row.append(el("td", words(change), class_="what", role="cell"))
        body.append(row)
    heads = [("#", None), ("verdict", None), *((head, class_) for head, class_, _ in columns), ("what", "what")]
    choices = ["all", *dict.fromkeys(_verdict(c) for c in view.changes)]
    return el(
        "div",
        el(
            "form",
            el("label", "Find ", el("input", type="search", autocomplete="off", spellcheck="false")),
            el("label", "Verdict ", el("select", *(el("option", one) for one in choices))),
            el("output", aria_live="polite"),
            class_="tools",
            hidden="",
        ),
        el(
            "table",
            el("caption", f"{len(view.changes)} experiments, the baseline among them"),
            el(
                "thead",
                el(
                    "tr",
                    *(el("th", head, scope="col", role="columnheader", class_=class_) for head, class_ in heads),
                    role="row",
                ),
                role="rowgroup",
            ),
            body,
            role="table",
        ),
        class_="ledger",
        data_session=key,
    )


def _verdict(change: Change) -> str:
    if change.number == 0 and change.status == "keep":
        return "baseline"
    return "near miss" if change.near_miss and change.status == "discard" else SAID[change.status]


def _columns(view: View) -> list[tuple[str, str, list[str]]]:
    """(head, class, a cell for each experiment)."""
    changes = view.changes

    def of(name, scale=1.0):
        means = [None if (mean := view.mean(c, name)) is None else mean / scale for c in changes]
        form = ".1f" if max(filter(None, means), default=0) >= 10 else ".3f"
        return [number(mean, form) for mean in means]

    spent = [view.spent.get(c.number) for c in changes]
    return [
        ("val_bpb", "n", [number(view.scores.get(c.number), ".6f") for c in changes]),
        ("against parent", "n", [number(view.effect(c), "+.6f") for c in changes]),
        ("runs", "n few more", [str(len(view.judged[c.number]) or "–") for c in changes]),
        ("kind", "more", [c.kinds[0] if c.kinds else "–" for c in changes]),
        ("tokens, M", "n more", of("tokens", 1e6)),
        ("GB", "n few more", of("memory")),
        ("minutes", "n more", [number(one.total / 60 if one else None, ".1f") for one in spent]),
    ]


def _details(view: View, change: Change) -> dict:
    """What the row of an experiment opens to. Texts are cleaned already; the script shows them as text."""
    facts = [
        ("why", cleaned(change.reason, 400)),
        ("kind", ", ".join(change.kinds)),
        ("made from", "" if change.parent is None else f"experiment {change.parent}"),
        ("begun", change.started),
        ("commit", change.commit),
        ("patch", change.patch),
        ("repeats", change.origin),
    ]
    runs = [
        [
            t.run,
            t.seed,
            f"{t.bpb:.6f}",
            "confirmation" if t.confirms else "" if t.beside == change.number else f"beside experiment {t.beside}",
        ]
        for t in change.trials
        if t.run is not None
    ]
    return {
        "facts": [[name, cleaned(text, 400)] for name, text in facts if text],
        "runs": runs,
        "diff": None if change.text is None else untrusted.visible(change.text),
    }
