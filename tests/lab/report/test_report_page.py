"""The page: what it says, and that nothing of what it is told can become more than text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_records import HOSTILE, replayed, session, source, trial

from lab.compare.record import Change, Record
from lab.report import page
from lab.report.view import View

FILES = Path(page.__file__).parent
ATTRIBUTES = set(
    """anchor aria-expanded aria-hidden aria-label aria-labelledby aria-live autocomplete charset class
content d data-label data-session font-size for hidden href http-equiv id lang name rel role scope spellcheck
stroke-width tabindex text-anchor type viewBox viewbox x y""".split()
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


def parsed(*records):
    return Parsed(page.html(list(records)))


def data_of(found):
    return json.loads(next(text for text in found.texts["script"] if text.startswith("{")))


# --- Nothing hostile gets out ---


@pytest.mark.parametrize("several", (False, True))
def test_hostile_words_stay_words(several):
    hostile = session(40, texts=HOSTILE, tag="x", confirmation=HOSTILE[0], notes=HOSTILE)
    hostile.facts = dict.fromkeys(("dataset", "python"), HOSTILE[1])
    others = [session(12, device="nvidia-h200-141gb")] if several else []
    found, benign = parsed(hostile, *others), parsed(session(40, tag="x"), *others)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in benign.elements}
    names = {name for _, attributes in found.elements for name in attributes}
    assert names <= ATTRIBUTES and len(found.all("script")) == 2
    assert {link["href"][:1] for link in found.all("a")} == {"#"}
    assert "window.pwned" in found.text  # it is told, as text
    assert len(found.comments) == 1


def test_embedded_data_can_end_no_script_and_is_whole():
    raw = page.html([session(40, texts=HOSTILE)])
    block = re.search(rb'<script type="application/json" id="data">(.*?)</script>', raw, re.DOTALL)[1]
    assert not set("<>&\u2028\u2029") & set(block.decode()) and block.isascii()
    details = json.loads(block)["sessions"]["s0"]
    assert details["1"]["diff"] == HOSTILE[1] and details["2"]["facts"][0][1] == HOSTILE[2]


def test_no_character_acts_on_the_reader():
    text = page.html([session(40, texts=HOSTILE)]).decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]", text)
    diff = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["sessions"]["s0"]["4"]["diff"]
    assert "<U+001B>[2J" in diff and "<U+202E>" in diff  # in a diff what is unseen is spelt out


def test_an_endless_line_is_cut_and_said_so():
    found = page.html([session(60, texts=["x" * 2**20, "y\n" * 2**19])])
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
    record = session(10, sd=0.002)
    text = parsed(record).text
    best = sum(t.bpb for t in record.changes[10].trials) / 2
    base = sum(t.bpb for t in record.changes[0].trials) / 3
    assert f"{100 * (base - best) / base:.2f} % better than the baseline" in text
    assert f"val_bpb {best:.6f} instead of {base:.6f}" in text
    assert "2 kept, 7 discarded, 1 crashed" in text
    assert "moves a single run by 0.002000" in text and f"the gain is {(base - best) / 0.002:.1f} times that" in text


CONFIRMED = (
    "on held-out rows and 3 new seeds the best is {} bits per byte better than the baseline (90 % interval {} to {})"
)


@pytest.mark.parametrize(
    "confirmation, badge",
    (
        ("", "Unconfirmed"),
        (CONFIRMED.format("+0.020000", "+0.010000", "+0.030000"), "Confirmed"),
        (CONFIRMED.format("+0.001000", "-0.010000", "+0.012000"), "Not confirmed"),
    ),
)
def test_what_a_confirmation_came_to_is_said(confirmation, badge):
    found = parsed(session(5, confirmation=confirmation))
    assert badge in found.texts["span"] and confirmation[1:] in found.text


def test_what_was_kept_after_a_confirmation_is_not_called_confirmed():
    record = session(10, confirmation=CONFIRMED.format("+0.02", "+0.01", "+0.03"))
    record.changes[5] = with_trials(record.changes[5], trial(90, 1.1, 11, confirms=True))
    assert "is not confirmed" in parsed(record).text
    record.changes[10] = with_trials(record.changes[10], trial(91, 1.1, 12, confirms=True))
    assert "is not confirmed" not in parsed(record).text


def with_trials(change, *more):
    return Change(**{**vars(change), "trials": (*change.trials, *more)})


def test_every_experiment_has_a_row_that_opens():
    record = session(30)
    found = parsed(record)
    rows = [row["id"] for row in found.all("tr") if "id" in row]
    assert rows == [f"s0-e{number}" for number in record.changes]
    details = data_of(found)["sessions"]["s0"]
    assert details.keys() == {str(number) for number in record.changes}
    assert details["5"]["diff"] == record.changes[5].text and details["0"]["diff"] is None
    assert details["5"]["runs"] == [[t.run, t.seed, f"{t.bpb:.6f}", ""] for t in record.changes[5].trials]


def test_crashes_are_told_with_their_reasons():
    text = parsed(session(8)).text
    assert "RuntimeError: out of memory" in text and "Crashed and invalid" in text
    assert "Crashed and invalid" not in parsed(session(4)).text


def test_kinds_are_counted():
    found = parsed(session(10))
    cells = found.texts["td"]
    counts = [cells[i : i + 3] for i in range(len(cells))]
    assert ["5", "1", "1"] in counts and ["5", "1", "0"] in counts  # tried, kept, crashed: odd ones, and even ones
    assert {"schedule", "architecture"} <= set(found.texts["th"])


UNKNOWN = {"seed": None, "eval": "", "budget": None, "tokens": None, "flops": None, "mfu": None, "seconds": None}


def bare(device="nvidia-h100-80gb"):
    """As read from a ledger of five columns."""
    changes = {
        0: Change(0, None, "keep", "baseline", "baseline", trials=(trial(None, 0.9979, 0, **UNKNOWN),)),
        1: Change(1, 0, "keep", "change", "halve batch", trials=(trial(None, 0.986, 1, **UNKNOWN),)),
        2: Change(2, 1, "discard", "change", "warmup", trials=(trial(None, 0.987, 2, **UNKNOWN),)),
    }
    return Record(device, "mar8", changes, tagged=False)


def test_a_ledger_of_five_columns_leaves_out_what_it_does_not_know():
    found = parsed(bare())
    assert "1.19 % better" in found.text and "nobody knows how far chance moves" in found.text
    assert "minutes " not in found.text and "tokens" not in " ".join(found.texts["th"])
    assert data_of(found)["sessions"]["s0"]["1"] == {"facts": [["made from", "experiment 0"]], "runs": [], "diff": None}


def test_a_session_that_has_just_begun_can_be_reported():
    assert "No score yet" in parsed(Record("cpu-x", "t", {})).text
    crashed = {0: Change(0, None, "crash", "baseline", "baseline", reason="no memory")}
    assert "No score yet" in parsed(Record("cpu-x", "t", crashed)).text
    alone = {0: Change(0, None, "keep", "baseline", "baseline", trials=(trial(1, 1.2, 0),))}
    assert "Nothing kept yet" in parsed(Record("cpu-x", "t", alone, budget=300.0)).text


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
    assert sum(text.startswith("Measured by what is not known") for text in parsed(*unknown).texts["caption"]) == 2
    same = [session(5, device=device) for device in ("cpu-a", "cpu-b")]
    assert sum(text.startswith("Measured by") for text in parsed(*same).texts["caption"]) == 1


def test_a_replay_that_helps_is_not_the_best():
    record = session(10)
    best = View(record).best
    record.changes[11] = Change(11, 0, "keep", "replay", "another's", trials=(trial(99, 0.7, 11),))
    assert View(record).best is best and View(record).counts["keep"] == 3


def test_without_a_shared_change_it_says_how_to_get_one():
    one, other = session(5, device="cpu-a"), session(5, device="cpu-b")
    other.changes = {number: Change(**{**vars(c), "patch": f"f{number:015x}"}) for number, c in other.changes.items()}
    assert "python -m lab replay" in parsed(one, other).text


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
