"""What is refused in a session from elsewhere: each thing that it must not hold."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from exports import BASE, events_in, imported, refused, tampered, with_, with_events, written

from lab.genome.change import diff
from lab.reasons import sentence
from lab.share import sources, verify

# --- Files ---


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"SUMMARY.md": b"changed"}, "SUMMARY.md is damaged"),
        ({"SUMMARY.md": None}, "'SUMMARY.md'.* is missing"),
        ({"results.tsv": None}, "'results.tsv'.* is missing"),
        ({"journal.jsonl": None}, "'journal.jsonl'.* is missing"),
        ({"MANIFEST.json": None}, "MANIFEST.json is missing"),
        ({"rows/0099.npz": b"x"}, "rows/0099.npz is not in MANIFEST"),
        ({"MANIFEST.json": b"[]"}, "does not hold a JSON object"),
        ({"MANIFEST.json": b"{"}, "is not JSON"),
        ({"MANIFEST.json": b"{}"}, "is not in MANIFEST"),
        ({"MANIFEST.json": b'{"train.py": 1}'}, "is not in MANIFEST"),
        ({"MANIFEST.json": b"[" * 100_000}, "is not JSON"),
        ({"MANIFEST.json": b"\xff\xfe"}, "is not JSON"),
    ],
)
def test_files_have_to_be_what_the_manifest_says(sent, tmp_path, changes, match):
    refused(tampered(sent, seal=False, **changes), tmp_path / "elsewhere", match)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"train.py": None}, "train.py, which its diffs are made on, is missing"),
        ({"train.py": b"A = 1\n"}, "train.py is not what the session began with"),
        ({"journal.jsonl": None}, "journal.jsonl is missing"),
        ({".gitattributes": b"* filter=evil\n"}, ".gitattributes says something else"),
    ],
)
def test_files_that_can_not_be_are_refused(sent, tmp_path, changes, match):
    refused(tampered(sent, **changes), tmp_path / "elsewhere", match)


def test_an_impossible_profile_is_refused(sent, tmp_path):
    good = json.loads((sent / "profile.json").read_bytes())
    for changes in (
        {"versions": 3},
        {"settings": {}},
        {"format": 9},
        {"products": {"square": 1, "rates": []}},
        {"device": "other-1gb"},
        {"backend": "mlx"},
        {"trials": [{"depth": []}]},
    ):
        tampered(sent, **{"profile.json": json.dumps(good | changes).encode()})
        refused(sent, tmp_path / "elsewhere", "profile.json")
    imported(tampered(sent, **{"profile.json": json.dumps(good).encode()}), tmp_path / "elsewhere")


# --- Journals ---


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda text: text[:-20], "cut short: its last line does not end"),
        (lambda text: text[:-20] + b"\n", "line [0-9]+ is damaged"),
        (lambda text: b"", "cut short"),
        (lambda text: b"\n", "line 1"),
        (lambda text: text + b'{"event":"zapped","time":1}\n', "line [0-9]+: an event of the unknown kind 'zapped'"),
        (lambda text: text + b'{"event":"decided"}\n', "line [0-9]+ .*missing required field"),
        (lambda text: text + b"7\n", "line [0-9]+ is damaged"),
        (lambda text: text.replace(b'"seed":42', b'"seed":NaN', 1), "line [0-9]+ .*JSON is malformed"),
        (lambda text: text.replace(b'"seed":42', b'"seed":"42"', 1), "line [0-9]+ .*Expected `int"),
        (lambda text: text.replace(b'"seconds":320.0', b'"seconds":1e999', 1), "line [0-9]+ is damaged"),
        (lambda text: text + b'{"event":"failed","experiment":99}\n', "experiment 99, which it never opened"),
        (lambda text: text + b'{"event":"scored","run":99}\n', "run 99, which it never started"),
        (lambda text: text + b'{"event":"failed","experiment":' + b"[" * 10**5 + b"\n", "journal.jsonl: "),
        (
            lambda text: text + b'{"event":"decided","experiment":1,"verdict":{"status":"keep","reason":'
            + b'{"code":"a","facts":{"a":' * 10**4 + b"1" + b"}}" * 10**4 + b"}}\n",
            "journal.jsonl: .*recursion",
        ),
    ],
)  # fmt: skip
def test_journals_that_are_damaged_or_contradict_themselves_are_refused(sent, tmp_path, change, match):
    content = (sent / "journal.jsonl").read_bytes()
    refused(tampered(sent, **{"journal.jsonl": change(content)}), tmp_path / "elsewhere", match)


def test_an_event_that_is_there_twice_changes_nothing(sent, tmp_path):
    before = sources.read(sent).state
    lines = (sent / "journal.jsonl").read_bytes().splitlines(keepends=True)
    doubled = b"".join(line * 2 for line in lines)
    imported(tampered(sent, **{"journal.jsonl": doubled}), tmp_path / "elsewhere")
    assert vars(sources.read(sent).state) == vars(before)


def test_more_than_a_session_needs_is_refused(sent, tmp_path, monkeypatch):
    for name, most, match in (
        ("MOST_JSON", 1000, "bytes, and may have 1,000"),
        ("LONGEST", len(BASE) - 1, "makes a train.py of .* bytes"),
        ("MOST_TRAINS", 3 * len(BASE), "that is too much"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(verify, name, most)
            refused(sent, tmp_path / "elsewhere", match)


def of(events, kind, **facts):
    """The first event of a kind that has these facts."""
    return next(e for e in events if e["event"] == kind and facts.items() <= e.items())


FIRST = {"event": "experiment", "number": 5, "kind": "change", "blob": "a" * 40, "parent": "b" * 40, "onto": 4}


@pytest.mark.parametrize(
    "change, match",
    [
        # what the session rests on
        (lambda e: e[0].update(device="../../x"), "line 1"),
        (lambda e: e[0].update(tag="/etc"), "line 1"),
        (lambda e: e[0].update(tag=""), "line 1"),
        (lambda e: e[0].update(tag="a\nb"), "line 1"),
        (lambda e: e[0].update(tag="a\n"), "line 1"),
        (lambda e: e[0].update(tag="a..b"), "line 1"),
        (lambda e: e[0].update(tag="x."), "line 1"),
        (lambda e: e[0].update(tag="x.lock"), "line 1"),
        (lambda e: e[0].update(device="other-1gb"), "profile.json is of .* the session of other-1gb"),
        (lambda e: e[0].update(device=5), "line 1"),
        (lambda e: e[0].update(eval=None), "line 1"),
        (lambda e: e[0].update(backend="x" * 300), "line 1"),
        (lambda e: e[0].update(budget=-1), "line 1"),
        (lambda e: e[0].update(budget=True), "line 1"),
        (lambda e: e[0].update(budget="300"), "line 1"),
        (lambda e: e[0].update(versions=[]), "line 1"),
        (lambda e: e[0].update(versions={"a": 1}), "line 1"),
        (lambda e: e[0].update(commit="--output=x"), "line 1"),
        (lambda e: e[0].update(time=-1), r"line 1 .*\$.time"),
        (lambda e: e[0].update(time=1e13), r"line 1 .*\$.time"),
        (lambda e: e.pop(0), "does not begin with the start of the session"),
        (lambda e: e.append(e[0] | {"tag": "other"}), "contradicts itself"),
        # experiments
        (lambda e: e.append(FIRST), "was made from b+, which is not"),
        (lambda e: of(e, "experiment", number=1).update(number=-1), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=1).update(number=10**12), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=1).update(number="1"), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=2).update(number=1), "opens experiment 1 twice"),
        (lambda e: of(e, "experiment", number=2).update(onto=2), "experiment 2, which it never opened"),
        (lambda e: of(e, "experiment", number=2).update(onto=0), "was made from .* not the train.py of 0"),
        (lambda e: of(e, "experiment", number=2).update(onto=None), "was made from nothing"),
        (lambda e: of(e, "experiment", number=0).update(kind="change"), "experiment 0 is a change"),
        (lambda e: of(e, "experiment", number=2).update(kind="baseline"), "experiment 2 is a baseline"),
        (lambda e: of(e, "experiment", number=2).update(kind="x"), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=2).update(kinds=["x"]), r"line [0-9]+ .*'x'.*kinds"),
        (lambda e: of(e, "experiment", number=2).update(kinds="other"), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=2).update(change="../x"), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=2).update(commit="--all"), "line [0-9]+"),
        (lambda e: of(e, "experiment", number=2).update(origin="../../etc/passwd"), r"line [0-9]+ .*\$.origin"),
        (lambda e: of(e, "experiment", number=2).update(origin="a/b"), r"line [0-9]+ .*\$.origin"),
        (lambda e: of(e, "experiment", number=2).update(origin="a/b/c\n"), r"line [0-9]+ .*\$.origin"),
        (lambda e: of(e, "experiment", number=2).update(members=[77]), "experiment 77, which it never opened"),
        (lambda e: of(e, "experiment", number=2).update(description="\x1b[2J"), "description holds a control"),
        (lambda e: of(e, "experiment", number=2).update(description="x" * 5000), "line [0-9]+"),
        (lambda e: e.remove(of(e, "decided", experiment=2)), "applies experiment 2, which it never decided"),
        # runs
        (lambda e: of(e, "run", number=4).update(blob="a" * 40), "run 4 belongs to no train.py of experiment 1"),
        (lambda e: of(e, "ran", run=4)["result"].update(val_bpb="1"), "run 4 has val_bpb '1'"),
        (lambda e: of(e, "ran", run=4)["result"].update(num_steps=1.5), "run 4 has num_steps 1.5"),
        (lambda e: of(e, "ran", run=4)["result"].update(compiled=1), "run 4 has compiled 1"),
        (lambda e: of(e, "ran", run=4)["result"].update(depth=True), "run 4 has depth True"),
        (lambda e: of(e, "ran", run=4)["result"].update(val_bpb=-1.0), "a score of -1"),
        (lambda e: of(e, "ran", run=4)["result"].update(val_bpb=0), "a score of 0"),
        (lambda e: of(e, "ran", run=4)["result"].update(val_bpb=1e300), "val_bpb is 1e"),
        (lambda e: of(e, "ran", run=4)["result"].update(depth=10**500), "depth is 1000"),
        (lambda e: of(e, "ran", run=4)["result"].update(new="\x07"), "new holds a control character"),
        (lambda e: of(e, "ran", run=4)["result"].pop("val_bpb"), "run 4 ended well without a score"),
        (lambda e: of(e, "ran", run=4).update(result=None), "run 4 ended well without a score"),
        (lambda e: of(e, "ran", run=4).update(status="?"), "line [0-9]+"),
        (lambda e: of(e, "ran", run=4).update(traceback="\x1b"), "traceback holds a control character"),
        (lambda e: of(e, "scored", run=4).update(held_out_bpb=-2.0), r"line [0-9]+ .*\$.held_out_bpb"),
        # verdicts
        (lambda e: of(e, "decided", experiment=1)["verdict"].update(status="?"), "line [0-9]+"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["evidence"].update(gain="x"), "line [0-9]+"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["evidence"].update(low=True), "line [0-9]+"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["evidence"].update(low=1e300), "low is 1e"),
        (lambda e: of(e, "decided", experiment=1)["verdict"].update(gains={}), "line [0-9]+ .*val_bpb"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["reason"].update(facts={"a": "\x1b"}), "control"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["reason"].update(code="\u202e\x00"), "control"),
        (lambda e: of(e, "decided", experiment=1)["verdict"]["reason"].update(facts={"a": 10**40}), "a is 1000"),
    ],
)
def test_events_that_can_not_be_are_refused(sent, tmp_path, change, match):
    events = events_in(sent)
    change(events)
    refused(tampered(sent, **{"journal.jsonl": written(events)}), tmp_path / "elsewhere", match)


def test_what_this_version_does_not_know_is_kept(sent, tmp_path):
    """Measures, fields and reasons of a later version."""

    def change(events):
        of(events, "ran", run=4)["result"]["watts"] = 350.5
        of(events, "ran", run=4)["later"] = 1
        of(events, "decided", experiment=1)["verdict"]["reason"] = {"code": "later", "facts": {"by": 2}}
        of(events, "decided", experiment=2)["verdict"]["reason"]["facts"] = {"amount": "many", "x": {"code": "later"}}

    state = sources.read(imported(with_events(sent, change), tmp_path / "elsewhere")).state
    assert state.runs[4].result["watts"] == 350.5
    assert sentence(state.experiments[1].verdict.reason) == "later (by 2)"
    assert state.experiments[2].verdict.said


# --- Diffs ---

GOOD = diff(BASE, with_(BASE, A=0.1))


@pytest.mark.parametrize(
    "text, match",
    [
        (GOOD.replace("train.py", "prepare.py"), "and nothing else"),
        (GOOD.replace("b/train.py", "b/prepare.py"), "nothing else"),
        (GOOD.replace("a/train.py", "/dev/null"), "nothing else"),
        (GOOD.replace("a/train.py", "../train.py"), "nothing else"),
        (GOOD.replace("b/train.py", "b/train.py\tx"), "nothing else"),
        (GOOD + GOOD.replace("train.py", "prepare.py"), "more than changes"),
        (GOOD + GOOD, "more than changes"),
        (GOOD + "diff --git a/prepare.py b/prepare.py\n", "more than changes"),
        ("\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/train.py\nold mode 100644\nnew mode 100755\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/x.py\nrename from train.py\nrename to x.py\n", "nothing else"),
        ("diff --git a/train.py b/train.py\nindex 1234567..89abcde 120000\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/train.py\nBinary files differ\n", "nothing else"),
        (GOOD[:40], "cut short|more than changes|another train.py"),
        (GOOD[:-9], "cut short"),
        (GOOD.replace("-1,4 +1,4", "-1,9 +1,9"), "cut short"),
        (GOOD.replace("-1,4 +1,4", "-1,2 +1,2"), "more than changes"),
        (GOOD.replace(" B = 0.0", "B = 0.0"), "cut short"),
        (GOOD.replace("B = 0.0", "B = 0.1"), "does not fit the train.py"),
        (GOOD.replace("+A = 0.1", "+A = 0.2"), "its diff makes another train.py than was run"),
        ("--- a/train.py\n+++ b/train.py\n", "its diff makes another train.py"),
        ("", "is not known"),
        (GOOD + "x" * 2**21, "line [0-9]+"),
    ],
)
def test_diffs_that_make_something_else_are_refused(sent, tmp_path, text, match):
    events = events_in(sent)
    of(events, "experiment", number=1)["diff"] = text
    refused(tampered(sent, **{"journal.jsonl": written(events)}), tmp_path / "elsewhere", match)


def test_a_bare_ledger_brings_no_diffs(sent, tmp_path):
    events = events_in(sent)
    events[0]["source"] = "ledger"
    tampered(sent, **{"journal.jsonl": written(events), "train.py": None})
    refused(sent, tmp_path / "elsewhere", "train.py, which its diffs are made on, is missing")


# --- Hostile arrays ---


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_losses(sent, data):
    """With a journal that names these."""

    def change(events):
        next(e for e in events if e["event"] == "scored" and e["run"] == 3)["rows"] = hashlib.sha256(data).hexdigest()

    return with_events(tampered(sent, **{"rows/0003.npz": data}), change)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-never-be-made",)


def lying_header():
    """A header that asks for 8 TB."""
    import zipfile

    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("val_nats.npy", array.getvalue() + b"\0" * 80)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, match",
    [
        (lambda: npz(val_nats=np.array([Bomb()], dtype=object)), "allow_pickle=False"),
        (lambda: b"junk", "pickle"),
        (lambda: npz(val_nats=np.ones(3), val_bytes=np.ones(4)), "not of the same rows"),
        (lambda: npz(val_nats=np.ones(3)), "not of the same rows"),
        (lambda: npz(arr_0=np.ones(3)), "it holds arr_0"),
        (lambda: npz(val_nats=np.ones(3, np.float32), val_bytes=np.ones(3, np.float32)), "float64"),
        (lambda: npz(val_nats=np.ones((3, 1)), val_bytes=np.ones((3, 1))), "one value a row"),
        (lying_header, "allocate|EOF|reading"),
        (lambda: npz(val_nats=np.array([np.nan]), val_bytes=np.ones(1)), "not finite"),
        (lambda: npz(val_nats=np.array([-1.0]), val_bytes=np.ones(1)), "negative"),
    ],
)
def test_arrays_are_plain_numbers_or_refused(sent, tmp_path, data, match):
    refused(with_losses(sent, data()), tmp_path / "elsewhere", f"rows/0003.npz does not hold losses by row .*{match}")
    assert not Path("/tmp/this-must-never-be-made").exists()


def test_arrays_that_unpack_to_too_much_are_refused(sent, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "MOST_LOSSES", 10**5)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, val_nats=np.zeros(10**5), val_bytes=np.zeros(10**5))
    refused(with_losses(sent, buffer.getvalue()), tmp_path / "elsewhere", "unpacks to more than 100,000 bytes")


def test_losses_that_the_journal_does_not_name_are_refused(sent, tmp_path):
    other = (sent / "rows/0003.npz").read_bytes()
    refused(tampered(sent, **{"rows/0004.npz": other}), tmp_path / "elsewhere", "rows/0004.npz is not what the journal")
    refused(tampered(sent, **{"rows/0077.npz": other}), tmp_path / "elsewhere", "belongs to no run that|0004")
    refused(tampered(sent, **{"rows/0004.npz": None}), tmp_path / "elsewhere", "rows/0077.npz belongs to no run")
