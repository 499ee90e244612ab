"""The page: what it says, and that nothing of what it is told can become more than text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from records import Builder, analysed
from report_records import HOSTILE, begun, replayed, session, source

from lab.compare import tables
from lab.compare.comparison import compare
from lab.report import charts, page
from lab.share.summary import summary

FILES = Path(page.__file__).parent
ATTRIBUTES = set(
    """aria-expanded aria-hidden aria-label aria-labelledby aria-live autocomplete charset class clip-path colspan
content cx cy d data-label data-session fill fill-opacity font-size for height hidden href http-equiv id lang
name opacity r rel role scope spellcheck stroke stroke-dasharray stroke-linecap stroke-linejoin stroke-opacity
stroke-width tabindex text-anchor transform type viewBox viewbox width x y""".split()
)
VOID = {"meta", "link", "input", "br"}


class Parsed(HTMLParser):
    """A page taken apart: (tag, attributes) of its elements, texts by tag, the text of what carries an id."""

    def __init__(self, content: bytes):
        super().__init__()
        self.elements, self.texts, self.comments, self.open = [], {}, [], []
        self.feed(content.decode())
        assert not self.open, f"{self.open} were not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(text)

    def handle_comment(self, text):
        self.comments.append(text)

    @property
    def text(self):
        return " ".join(" ".join(texts) for tag, texts in self.texts.items() if tag not in ("script", "style"))

    def all(self, tag, **wanted):
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in wanted.items())
        ]


def parsed(*analyses):
    return Parsed(page.written(list(analyses)))


def data_of(found):
    return json.loads(next(text for text in found.texts["script"] if text.startswith("{")))


def test_differences_to_the_parent_are_in_bits_per_byte():
    one = session(6)
    columns = {head: texts for head, _, texts in page._columns(one, list(one.experiments.values())[1:])}
    first = one.scores[1] - one.scores[0]
    assert columns["against parent"][0] == f"{first:+.6f}".replace("-", "−") and abs(first) > 0.001
    assert one.step(one.experiments[1]) == pytest.approx(first / one.scores[0])


# --- Nothing hostile gets out ---


@pytest.mark.parametrize("several", (False, True))
def test_hostile_words_stay_words(several):
    started = {"notes": HOSTILE, "dataset": HOSTILE[1], "python": HOSTILE[1], "versions": {HOSTILE[0]: HOSTILE[2]}}
    hostile = session(40, texts=HOSTILE, tag="x", backend=HOSTILE[3], **started)
    others = [session(12, device="nvidia-h200-141gb")] if several else []
    found, benign = parsed(hostile, *others), parsed(session(40, tag="x"), *others)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in benign.elements}
    names = {name for _, attributes in found.elements for name in attributes}
    assert names <= ATTRIBUTES and len(found.all("script")) == 2
    assert {link["href"][:1] for link in found.all("a")} | {use["href"][:1] for use in found.all("use")} == {"#"}
    assert "window.pwned" in found.text  # it is told, as text
    assert len(found.comments) == 1


def test_nothing_in_a_chart_is_read_as_mathematics():
    text = "$\\frac{1}{2}$ $\\undefined{$ 100%"
    analysis = session(10, texts=[text], tag="x")
    assert text in parsed(analysis).texts["text"]
    assert charts.card([analysis], text).startswith(b"\x89PNG")


def test_embedded_data_can_end_no_script_and_is_whole():
    raw = page.written([session(40, texts=HOSTILE)])
    block = re.search(rb'<script type="application/json" id="data">(.*?)</script>', raw, re.DOTALL)[1]
    assert not set("<>&\u2028\u2029") & set(block.decode()) and block.isascii()
    details = json.loads(block)["sessions"]["s0"]
    assert (
        details["1"]["diff"] == HOSTILE[1]
        and details["14"]["facts"][0][1] == f"its saved weights could not be scored again: {HOSTILE[5]}"
    )


def test_no_character_acts_on_the_reader():
    text = page.written([session(40, texts=HOSTILE)]).decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]", text)
    diff = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["sessions"]["s0"]["4"]["diff"]
    assert "<U+001B>[2J" in diff and "<U+202E>" in diff  # in a diff what is unseen is spelt out


def test_an_endless_line_is_cut_and_said_so():
    found = page.written([session(60, texts=["x" * 2**20, "y\n" * 2**19])])
    assert len(found) < 2**23 and b"characters more" in found


# --- No network, no script but its own ---


def test_its_policy_allows_its_own_style_and_script_and_nothing_else():
    found = parsed(session(3), session(3, tag="other"))
    policy = next(meta["content"] for meta in found.all("meta") if meta.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, tag in (("style-src", "style"), ("script-src", "script")):
        digest = hashlib.sha256(found.texts[tag][-1].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_it_refers_to_no_other_file():
    found = parsed(session(12), session(3, tag="other"))
    links = [
        value
        for _, attributes in found.elements
        for name, value in attributes.items()
        if name in ("href", "src", "action", "xlink:href", "srcset")
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|@font-face", (FILES / "page.css").read_text())
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch|XMLHttp|import\(|new Function",
        (FILES / "page.js").read_text(),
    )


# --- What it says ---


def test_the_headline_has_gain_noise_and_counts():
    analysis = session(10, sd=0.002)
    text, best, base = parsed(analysis).text, analysis.scores[10], analysis.scores[0]
    assert f"{100 * (base - best) / base:.2f} % better than the baseline" in text
    assert f"val_bpb {best:.6f} instead of {base:.6f}" in text
    assert "2 kept, 7 discarded, 1 crashed" in text
    assert "moves a single run by 0.002000" in text and f"the gain is {(base - best) / 0.002:.1f} times that" in text


@pytest.mark.parametrize(
    "gains, badge", ((None, "Unconfirmed"), ((0.02, 0.01, 0.03), "Confirmed"), ((0.001, -0.01, 0.012), "Not confirmed"))
)
def test_what_a_confirmation_came_to_is_said(gains, badge):
    then = (lambda builder: builder.confirm(6, 5, [1.1] * 3, [1.2] * 3, gains)) if gains else None
    found = parsed(session(5, then=then))
    assert badge in found.texts["span"]
    if gains:
        assert f"held-out rows and 3 new seeds the best is {gains[0]:+.6f} bits per byte better" in found.text


def test_what_was_kept_after_a_confirmation_is_not_called_confirmed():
    def confirmed(then):
        return parsed(session(5, then=then)).text

    def kept_later(builder):
        builder.confirm(6, 5, [1.1], [1.2], (0.02, 0.01, 0.03)).change(7, [1.0], "keep", onto=5)

    assert "is not confirmed" in confirmed(kept_later)
    both = confirmed(lambda builder: (kept_later(builder), builder.confirm(8, 7, [1.1], [1.2], (0.02, 0.01, 0.03))))
    assert "is not confirmed" not in both


def test_a_confirmation_that_failed_or_was_of_another_length_does_not_take_the_place_of_the_sessions():
    def longer(builder, number):
        builder.confirm(number, 5, [1.1], [1.2], (0.001, -0.01, 0.012))
        builder.state.experiments[number].budget = 1200.0

    def then(builder):
        builder.confirm(6, 5, [1.1], [1.2], (0.02, 0.01, 0.03))
        builder.confirm(7, 5, [1.1], [1.2], None)
        longer(builder, 8)

    whole, alone = session(5, then=then), session(5, then=lambda builder: longer(builder, 6))
    badges = [parsed(analysis).texts["span"] for analysis in (whole, alone)]
    assert "Confirmed" in badges[0] and "Not confirmed" in badges[1]
    assert "+0.02000 (+0.0100 to +0.0300)  " in tables.text(compare([whole]))
    assert "not: +0.00100 (-0.0100 to +0.0120), after 1200 s" in tables.text(compare([alone]))
    assert "+0.020000 bits per byte" in summary(whole.record)
    assert "In runs of 1200 s, on held-out rows" in parsed(alone).text
    assert "confirmation: in runs of 1200 s, on held-out rows" in summary(alone.record)


def test_every_experiment_has_a_row_that_opens():
    analysis = session(30)
    found = parsed(analysis)
    rows = [row["id"] for row in found.all("tr") if "id" in row]
    assert rows == [f"s0-e{number}" for number in analysis.experiments]
    details = data_of(found)["sessions"]["s0"]
    assert details.keys() == {str(number) for number in analysis.experiments}
    assert details["5"]["diff"] == analysis.experiments[5].diff and details["0"]["diff"] == ""
    assert details["5"]["runs"] == [[run.number, run.seed, f"{run.bpb:.6f}", ""] for run in analysis.runs[5]]


def test_a_disturbed_run_is_marked():
    analysis = session(3)
    analysis.runs[2][0].result.update(disturbance=0.42)
    (_, _, _, said), *_ = data_of(parsed(analysis))["sessions"]["s0"]["2"]["runs"]
    assert said.endswith("42% longer because of disturbance")


def test_charts_lead_to_rows_without_a_script():
    found = parsed(session(30))
    rows = {f"#{row['id']}" for row in found.all("tr") if "id" in row}
    links = [link["href"] for link in found.all("a") if link["href"].startswith("#s0-e")]
    assert set(links) <= rows and {f"#s0-e{number}" for number in (0, 5, 10, 15, 20, 25, 30)} <= set(links)


def test_crashes_are_told_with_their_reasons():
    text = parsed(session(8, texts=["out of memory"])).text
    assert "could not be scored again: out of memory" in text and "Crashed and invalid" in text
    assert "Crashed and invalid" not in parsed(session(4)).text


def test_kinds_are_counted():
    found = parsed(session(10))
    cells = " ".join(found.texts["td"])
    for kind, crashed in (("schedule", 1), ("architecture", 0)):  # odd ones, even ones
        assert re.search(rf"{kind} 1 of 5 \d+% \(\d+% to \d+%\) {crashed} [+−]", cells)


def bare(device="nvidia-h100-80gb"):
    """As read from a ledger of five columns."""
    builder = Builder(device, "mar8", {"eval": "", "total_tokens_M": None}, 0.0, source="ledger", budget=None, eval="")
    builder.baseline([0.9979], budget=None)
    builder.change(1, [0.986], "keep", change="", description="halve batch", runs={"budget": None})
    return analysed(builder.change(2, [0.987], onto=1, change="", description="warmup", runs={"budget": None}), None)


def test_a_ledger_of_five_columns_leaves_out_what_it_does_not_know():
    found = parsed(bare())
    assert "1.19 % better" in found.text and "it is not known how far chance moves" in found.text
    assert "minutes " not in found.text and "tokens" not in " ".join(found.texts["th"])
    details = data_of(found)["sessions"]["s0"]["1"]
    assert details["diff"] is None and ["made from", "experiment 0"] in details["facts"]


def test_a_session_that_has_just_begun_can_be_reported():
    assert "No score yet" in parsed(analysed(begun(), None)).text
    opened = begun()
    opened.open(0, "baseline", description="baseline")
    assert "No score yet" in parsed(analysed(opened, None)).text
    assert "No score yet" in parsed(analysed(begun().baseline([], "crash"), None)).text
    assert "Nothing kept yet" in parsed(analysed(begun().baseline([1.2]), None)).text


# --- Several sessions ---


def test_several_sessions_are_compared():
    of = source([-0.02, -0.01, -0.015, -0.001])
    found = parsed(of, replayed(of, [-0.02, -0.002, 0.012, -0.001]))
    tags = [text for text in found.texts["span"] if text in ("holds", "fades", "reverses", "can't be told")]
    assert tags == ["holds", "fades", "reverses", "can't be told"]
    assert "3 of 4 replayed changes help here" in found.text


def test_scores_of_different_evaluators_stand_in_different_tables():
    of = source([-0.02])
    captions = parsed(of, replayed(of, [-0.02])).texts["caption"]
    assert [text for text in captions if text.startswith("Measured by")] == [
        f"Measured by evaluator {12 * letter}, after 300 s of training" for letter in "ef"
    ]
    unknown = [bare(device=device) for device in ("nvidia-a", "nvidia-b")]
    assert sum(text.startswith("Evaluator unknown") for text in parsed(*unknown).texts["caption"]) == 2
    same = [session(5, device=device) for device in ("cpu-a", "cpu-b")]
    assert sum(text.startswith("Measured by") for text in parsed(*same).texts["caption"]) == 1


def test_a_replay_that_helps_is_not_the_best():
    analysis = session(10, then=lambda builder: builder.replay(11, [0.7], "x/y/" + "1" * 16, "keep"))
    assert analysis.best.number == 10 and analysis.counts["keep"] == 3


def test_without_a_shared_change_it_says_how_to_get_one():
    assert "python -m lab replay" in parsed(session(5, device="cpu-a"), session(5, device="cpu-b", family="f")).text


def test_a_family_is_shown_as_probably_the_same():
    def of(device, change):
        builder = begun(device).baseline().change(1, [0.9], change=change * 16, family="a" * 16)
        return analysed(builder)

    captions = parsed(of("cpu-a", "1"), of("cpu-b", "2")).texts["caption"]
    assert any(caption.startswith("Probably the same change") for caption in captions)


# --- To everybody ---


def test_headings_tables_and_charts_are_named():
    found = parsed(session(12), session(12, tag="other"))
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert all(th.get("scope") in ("col", "row") for th in found.all("th"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in found.all("svg"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(
        attributes["aria-labelledby"] in ids for _, attributes in found.elements if "aria-labelledby" in attributes
    )
