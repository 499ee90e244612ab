"""The report: one HTML file with everything in it. It needs no network, and is forbidden to use one."""

from __future__ import annotations

import base64
import hashlib
import html
import time
from typing import Any
from pathlib import Path
from string import Template
from xml.etree.ElementTree import Element, SubElement, tostring

import storage
from lab.compare import comparison, tables
from lab.compare.analysis import Analysis, kind_of
from lab.compare.tables import Table, Tag
from lab.errors import LabError
from lab.report import charts
from lab.report.charts import Chart
from lab.report.html import cleaned, el, embedded, table, tag
from lab.session.record import Record
from lab.session.state import Experiment
from lab.untrusted import counted, plain, visible
from lab.verdict.plan import WORTH_TELLING

# For the script: {"sessions": {key: {number: details}}, "charts": {id: [key, x, y, number, ...]}}.
Data = dict[str, Any]
HERE = Path(__file__).resolve().parent
MARK, PNG = "<!doctype html>\n<!-- python -m lab report -->\n", b"\x89PNG\r\n\x1a\n"  # what files of ours begin with
SAID = {"keep": "kept", "discard": "discarded", "crash": "crashed", "invalid": "invalid", "superseded": "superseded"}
TOKENS_TOLD = (
    "A run ends by the clock. A change that only makes it faster moves along the others' slope; one that "
    "learns more from each token lies below it."
)


def write(records: list[Record], page: Path, picture: Path | None = None, price: float | None = None) -> list[Path]:
    """Writes the page about these sessions, and their progress as a PNG if there is a path for it. A report that is
    there already is replaced, whole or not at all. price: of a kWh.

    Returns:
        What was written.

    Raises:
        LabError: something else is there, or there is nothing to draw.
        DataError: it can't be written; the reason says why.
    """
    if picture and picture.absolute() == page.absolute():
        raise LabError(f"{page} can't be both the page and the picture: give --out and --png different files")
    analyses = [Analysis(record) for record in records]
    files = {page: (written(analyses, price), MARK.encode())}
    if picture:
        if (card := charts.card(analyses, subtitle(analyses))) is None:
            raise LabError("there is nothing to draw (no score yet, or only replays): leave --png out")
        files[picture] = card, PNG
    save(files)
    return list(files)


def save(files: dict[Path, tuple[bytes, bytes]]) -> None:
    """Writes files, each (its content, what files of its kind begin with). Raises LabError where something else is
    there, DataError where it can't be written."""
    for path, (_, begins) in files.items():
        if path.is_dir():
            raise LabError(f"{path} is a folder; name a file in it")
        if path.exists():
            with open(path, "rb") as file:
                if file.read(len(begins)) != begins:
                    raise LabError(
                        f"{path} exists, and was not written by this command: remove it, or name another file"
                    )
    for path, (content, _) in files.items():
        with storage.atomic(path) as file:
            file.write(content)


def written(analyses: list[Analysis], price: float | None = None) -> bytes:
    """The page about one session, or about several and what they say together."""
    data = {"sessions": {}, "charts": {}}
    started, names = [a.started for a in analyses], [cleaned(a.name) for a in analyses]
    if len(analyses) == 1:
        title, over = f"{started[0].tag} on {started[0].device}", "autoresearch session"
        parts = _session(data, "s0", analyses[0], "h2", price)
    else:
        title, over = f"{len(analyses)} sessions on {len({s.device for s in started})} devices", "autoresearch"
        parts = _together(data, analyses, names)
        for i, analysis in enumerate(analyses):
            inner = _session(data, f"s{i}", analysis, "h3", price)
            parts.append(el("section", el("h2", names[i]), *inner, id=f"s{i}", class_="session"))
    script = (HERE / "page.js").read_text(encoding="utf-8")
    content = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(cleaned(title)),
        over=over,
        main="\n".join(tostring(part, encoding="unicode", method="html") for part in parts),
        data=embedded(data),
        now=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **{"style": charts.STYLE, "style_digest": _digest(charts.STYLE)},
        **{"script": script, "script_digest": _digest(script)},
    )
    return (MARK + content).encode(errors="replace")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _section(name: str, title: str, head: str, *parts: Element | Table | str | None) -> Element | None:
    """A section with a heading, of tables, paragraphs and what else is in it; None if it is empty."""
    shown = []
    for part in parts:
        if isinstance(part, Table):
            shown += [table(part)] if part.rows else []
        elif part is not None:
            shown.append(el("p", cleaned(part, 500)) if isinstance(part, str) else part)
    return el("section", el(head, title, id=f"{name}-head"), *shown, aria_labelledby=f"{name}-head") if shown else None


def _figure(data: Data, chart: Chart | None, identity: str, label: str) -> Element | None:
    """A chart with its legend; None without one. label: says it to those who don't see it."""
    if chart is None:
        return None
    data["charts"][identity] = [chart.key, *(round(part, 1) for spot in chart.spots for part in spot)]
    entries = [
        el("li", el("span", sign, class_=f"sign {hue}", aria_hidden="true"), meaning)
        for hue, sign, meaning in chart.legend
    ]
    return el("figure", charts.svg(chart, label, identity), el("ul", *entries, class_="legend") if entries else None)


# --- Several sessions ---


def _together(data: Data, analyses: list[Analysis], names: list[str]) -> list[Element]:
    """What they say together."""
    links = [part for i, name in enumerate(names) for part in (" · " * bool(i), el("a", name, href=f"#s{i}"))]
    label = "How far each session's best was below its own baseline, by experiment"
    gains = _figure(data, charts.gains(analyses, 1120, 330), "together", label)
    sections = [
        _section(section.name, section.title, "h2", *section.parts, gains if section.name == "sessions" else None)
        for section in tables.sections(comparison.compare(analyses))
    ]
    nav = el("nav", "Each by itself: ", *links, aria_label="Sessions")
    return [nav, *(section for section in sections if section is not None)]


# --- A session ---


def _session(data: Data, key: str, analysis: Analysis, head: str, price: float | None) -> list[Element]:
    """The sections about a session; `head` is the tag of their headings, `key` begins their ids."""
    label = f"Scores by experiment, and the best so far. {': '.join(in_short(analysis))}"
    progress = _figure(data, charts.progress(analysis, key, 1120, 430), f"{key}-progress", label)
    steps = tables.steps_tables([analysis])
    losses = _figure(
        data, charts.losses(analysis, 1120, 330), f"{key}-losses", "Training loss by tokens, of what was kept"
    )
    sections = {
        "Progress": (progress,),
        "Experiments": (_experiments(data, key, analysis),),
        "Crashed and invalid": (_failed(analysis),),
        "Kinds of change": (tables.kinds_table(comparison.paid([analysis])),),
        "Where the time went": (_shares(analysis),),
        "Loss against tokens": (losses,),
        "Score against tokens and FLOPs": (TOKENS_TOLD, *steps) if steps else (),
        "What the models write": (_sample(analysis),),
        "Measured with": (_under(analysis),),
    }
    shown = [_section(f"{key}-{i}", title, head, *parts) for i, (title, parts) in enumerate(sections.items())]
    return [_headline(analysis, price), *(section for section in shown if section is not None)]


def in_short(analysis: Analysis) -> tuple[str, str]:
    """(the headline, a sentence)."""
    best, tried = analysis.best, len(analysis.tried)
    if best is None:
        return "No score yet", "No run has ended with a score."
    score = f"{analysis.scores[best.number]:.6f}"
    if analysis.baseline is None or analysis.gain is None or analysis.relative is None:
        return score, "val_bpb of the last kept change. The record has no baseline to compare it with."
    if analysis.only_replays:
        told = f"Each of them was judged against the baseline, whose val_bpb is {score}."
        return f"{analysis.counts['keep']} of {tried} replayed changes help here", told
    if best is analysis.baseline:
        told = (
            f"The baseline's val_bpb is {score}. Of {tried} experiments none was better by more than chance explains."
        )
        return "Nothing kept yet", told
    better, less = ("better", "less") if analysis.gain > 0 else ("worse", "more")  # a simplification may cost a little
    return (
        f"{100 * abs(analysis.relative):.2f} % {better} than the baseline",
        f"val_bpb {score} instead of {analysis.scores[0]:.6f}: {abs(analysis.gain):.6f} bits per byte {less}, after "
        f"{tried} experiments.",
    )


def subtitle(analyses: list[Analysis]) -> str:
    """A line for the picture: of one session, what it came to."""
    if len(analyses) != 1:
        return ""
    analysis, said = analyses[0], in_short(analyses[0])[0]
    if analysis.gain:
        confirmation = analysis.confirmation
        sure = confirmation and confirmation.verdict.confirmed and not analysis.kept_since
        said += ", confirmed" if sure else ", not confirmed"
    return said + (f" (band: ±{analysis.noise.sd:.4f}, see the report)" if analysis.noise else "")


def _headline(analysis: Analysis, price: float | None) -> Element:
    big, said = in_short(analysis)
    chance = "Nothing was run twice, so it is not known how far chance moves a score."
    if noise := analysis.noise:
        times = f"; the gain is {analysis.gain / noise.sd:.1f} times that" if analysis.gain else ""
        chance = (
            f"Chance alone moves a single run by {noise.sd:.6f} (standard deviation between seeds, {noise.df} "
            f"degrees of freedom){times}."
        )
        if noise.explained >= WORTH_TELLING:
            chance += (
                f" Disturbance, and tokens that single runs lacked, explained {noise.explained:.0%} of the differences "
                "between equal runs; this is taken out."
            )
    counts = ", ".join(f"{n} {said}" for status, said in SAID.items() if (n := analysis.counts[status]))
    facts = [f"{len(analysis.tried)} experiments: {counts}" if counts else "no experiment yet"]
    facts.append(counted(sum(map(len, analysis.runs.values())), "run") + " with a score")
    facts += [f"{analysis.budget:g} s of training in each"] if analysis.budget else []
    facts += [f"{analysis.hours:.1f} h, {analysis.per_hour:.1f} experiments an hour"] if analysis.hours else []
    facts += [energy] if (energy := analysis.said_of_energy(price)) else []
    if under_way := analysis.state.oldest_open:
        facts.append(f"experiment {under_way.number} is under way: {cleaned(under_way.description, 80)}")
    parts = [el("p", big, class_="big"), el("p", said), el("p", *_badge(analysis)) if analysis.gain else None]
    notes = [el("p", cleaned(note, 400), class_="note") for note in analysis.notes]
    if time_told := analysis.said_of_time:
        parts.append(el("p", f"{time_told[:1].upper()}{time_told[1:]}."))
    for experiment in analysis.state.decided:
        if experiment.kind == "transfer" and experiment.pairs:
            parts.append(el("p", f"Transfer: {cleaned(experiment.came_to, 400)}."))
    return el("section", *parts, el("p", chance), el("p", "; ".join(facts) + "."), *notes, aria_label="In short")


def _badge(analysis: Analysis) -> list:
    confirmation = analysis.confirmation
    if confirmation is None or confirmation.verdict.confirmed is None:
        return [
            el("span", "Unconfirmed", class_="badge open"),
            " The scores that a change was kept for are biased in its favour. To measure it again, with new seeds "
            "and on held-out rows: python -m lab confirm",
        ]
    sure, said = confirmation.verdict.confirmed, cleaned(analysis.state.said_of(confirmation), 400)
    badge = el("span", "Confirmed" if sure else "Not confirmed", class_=f"badge {'yes' if sure else 'no'}")
    later = " A later change was kept, and is not confirmed." * analysis.kept_since
    return [badge, f" {said[:1].upper()}{said[1:]}.{later}"]


def _failed(analysis: Analysis) -> Table:
    rows = [
        (f"{e.number}", Tag(SAID[e.status]), e.description or "(not described)", e.verdict.said or "-")
        for e in analysis.experiments.values()
        if e.status in ("crash", "invalid")
    ]
    return Table("Runs without a score, and why", ("experiment", "verdict", "what", "why"), rows)


def _shares(analysis: Analysis) -> Table:
    total = sum(analysis.shares.values())
    rows = [(what, f"{hours:.2f} h", f"{100 * hours / total:.0f} %") for what, hours in analysis.shares.items()]
    return Table("Of the whole session", ("what", "time", "share"), rows)


def _sample(analysis: Analysis) -> Element | None:
    """What the baseline and the best continue a prompt with."""
    sampled = analysis.state.sampled
    if sampled is None:
        return None
    texts = {"prompt": sampled.prompt, "the baseline": sampled.baseline}
    texts |= {f"the best, {sampled.experiment}": sampled.best} if sampled.experiment else {}
    shown = (part for name, text in texts.items() for part in (el("dt", name), el("dd", el("pre", plain(text)))))
    return el("dl", *shown, class_="facts samples")


def _under(analysis: Analysis) -> Element:
    started = analysis.started
    names = "device backend dataset eval data profile python sandbox attention_provider".split()
    facts = [(name.replace("_", " "), str(getattr(started, name) or "")) for name in names]
    facts += [("training", f"{started.budget:g} s a run" if started.budget else ""), *started.versions.items()]
    known = [(cleaned(name), cleaned(text)) for name, text in facts if text]
    return el("dl", *(part for name, text in known for part in (el("dt", name), el("dd", text))), class_="facts")


# --- The experiments ---


def _experiments(data: Data, key: str, analysis: Analysis) -> Element:
    """All experiments as a table: rows are there without a script, which sorts, filters and opens them."""
    experiments = list(analysis.experiments.values())
    data["sessions"][key] = {e.number: _details(analysis, e) for e in experiments}
    columns = [column for column in _columns(analysis, experiments) if any(text != "–" for text in column[2])]
    verdicts = [_verdict(experiment) for experiment in experiments]
    body = el("tbody", role="rowgroup")
    for i, (experiment, verdict) in enumerate(zip(experiments, verdicts)):
        number = el("th", str(experiment.number), scope="row", role="rowheader")
        row = el("tr", number, el("td", tag(verdict), role="cell"), id=f"{key}-e{experiment.number}", role="row")
        for _, name, texts in columns:  # most of the page, and so without el
            SubElement(row, "td", {"class": name, "role": "cell"}).text = texts[i]
        body.append(row)
    heads = [("#", None), ("verdict", None), *((head, name) for head, name, _ in columns)]
    head = [el("th", text, scope="col", role="columnheader", class_=name) for text, name in heads]
    options = [el("option", text) for text in ["all", *dict.fromkeys(verdicts)]]
    find = el("label", "Find ", el("input", type="search", autocomplete="off", spellcheck="false"))
    choose = el("label", "Verdict ", el("select", *options))
    form = el("form", find, choose, el("output", aria_live="polite"), class_="tools", hidden="")
    caption = el("caption", f"{len(experiments)} experiments, including the baseline")
    whole = el("table", caption, el("thead", el("tr", *head, role="row"), role="rowgroup"), body, role="table")
    return el("div", form, whole, class_="experiments", data_session=key)


def _verdict(experiment: Experiment) -> str:
    if experiment.kind == "baseline" and experiment.status == "keep":
        return "baseline"
    return "near miss" if experiment.near_miss and experiment.status == "discard" else SAID[experiment.status]


def _columns(analysis: Analysis, experiments: list[Experiment]) -> list[tuple[str, str, list[str]]]:
    """(head, class, a text for each experiment)."""

    def shown(values: list[float | None], form: str = "") -> list[str]:
        form = form or (".1f" if max(filter(None, values), default=0) >= 10 else ".3f")
        return ["–" if value is None else format(value, form).replace("-", "−") for value in values]

    tokens = [analysis.mean(e, "tokens") for e in experiments]
    return [
        ("val_bpb", "n", shown([analysis.scores.get(e.number) for e in experiments], ".6f")),
        ("against parent", "n", shown(list(map(analysis.difference, experiments)), "+.6f")),
        ("runs", "n few more", [str(len(analysis.judged[e.number]) or "–") for e in experiments]),
        ("kind", "more", [kind_of(e) for e in experiments]),
        ("tokens, M", "n more", shown([None if value is None else value / 1e6 for value in tokens])),
        ("GB", "n few more", shown([analysis.mean(e, "memory") for e in experiments])),
        ("W", "n few more", shown([analysis.mean(e, "watts") for e in experiments])),
        ("J per M tokens", "n few more", shown([analysis.mean(e, "joules_per_M") for e in experiments])),
        ("what", "what", [cleaned(e.description) or "(not described)" for e in experiments]),
    ]


def _details(analysis: Analysis, experiment: Experiment) -> dict:
    """What the row of an experiment opens to. Texts are cleaned already; the script shows them as text."""
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(experiment.time)) if experiment.time > 0 else ""
    facts = [
        ("why", experiment.verdict.said),
        ("in time", str(analysis.times(experiment) or "")),
        ("kind", ", ".join(experiment.kinds)),
        ("made from", "" if experiment.onto is None else f"experiment {experiment.onto}"),
        ("begun", begun),
        ("commit", experiment.here[:7]),
        ("change", experiment.change),
        ("family", experiment.family),
        ("repeats", experiment.origin),
    ]
    runs = []
    for run in analysis.runs[experiment.number]:  # some were made for another experiment
        beside = "" if run.experiment == experiment.number else f"beside experiment {run.experiment}"
        said = "confirmation" if analysis.confirms(run) else beside
        longer = f"{run.disturbance:.0%} longer because of disturbance" if run.disturbance >= WORTH_TELLING else ""
        runs.append([run.number, run.seed, f"{run.bpb:.6f}", ", ".join(filter(None, (said, longer)))])
    unknown = experiment.onto is not None and not experiment.diff
    shown = [[name, cleaned(text, 400)] for name, text in facts if text]
    return {"facts": shown, "runs": runs, "diff": None if unknown else visible(experiment.diff)}
