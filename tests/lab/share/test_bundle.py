"""What is refused in a session from elsewhere: each thing that it must not hold."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from exports import DEVICE, json_with, refused, session_in, tampered

from lab.session import ledger
from lab.share import bundle, exchange, summary

FIVE = b"commit\tval_bpb\tmemory_gb\tstatus\tdescription\nbaseline\t1.250000\t12.5\tkeep\tbaseline\n"


@pytest.fixture
def session(isolated_home, tmp_path):
    return session_in(isolated_home, tmp_path)


# --- Files ---


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"README.md": b"changed"}, "README.md is damaged"),
        ({"README.md": None}, "'README.md'.* is missing"),
        ({"results.tsv": None}, "results.tsv is missing"),
        ({"MANIFEST.json": None}, "MANIFEST.json is missing"),
        ({"rows/0099.npz": b"x"}, "rows/0099.npz is not in MANIFEST"),
        ({"MANIFEST.json": b"[]"}, "holds no object"),
        ({"MANIFEST.json": b"{"}, "is no JSON"),
        ({"MANIFEST.json": b'{"format": 1}'}, "lists no files"),
        ({"MANIFEST.json": b'{"format": 3, "files": {}}'}, "format 3, and this is 2; update this project"),
        ({"MANIFEST.json": b"[" * 100_000}, "is no JSON"),
        ({"MANIFEST.json": b"\xff\xfe"}, "is no JSON"),
    ],
)
def test_files_have_to_be_what_the_manifest_says(export, tmp_path, changes, match):
    refused(tampered(export, sealed=False, **changes), tmp_path / "elsewhere", match)


@pytest.mark.parametrize(
    "name",
    [
        "extra.txt",
        ".DS_Store",
        "sitecustomize.py",
        "patches/x.sh",
        "patches/0001-A.patch",
        "rows/1.npz",
        "patches/0001-é.patch",
        "deeper/x",
        "README.md\n",
    ],
)
def test_files_that_are_no_part_of_an_export_are_refused(export, tmp_path, name):
    refused(tampered(export, **{name: b"x"}), tmp_path / "elsewhere", "no part of an exported|not a plain file")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("place", ["README.md", "rows/0001.npz", "patches"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_folder_are_refused(export, tmp_path, place, kind):
    moved = tmp_path / "moved"
    (export / place).rename(moved)
    if kind == "link":
        (export / place).symlink_to(moved)
    else:
        os.mkfifo(export / place)
    refused(export, tmp_path / "elsewhere", "is a link|not a plain file|no part of")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"device": "../../x"}, "can't name a folder"),
        ({"tag": "/etc"}, "can't name a folder"),
        ({"tag": ""}, "can't name"),
        ({"tag": "a\nb"}, "has tag"),
        ({"device": "other-1gb"}, "rows of"),
        ({"device": 5}, "has device '5'"),
        ({"eval": None}, "has eval"),
        ({"backend": "x" * 300}, "has backend"),
        ({"backend": "mlx"}, "profile.json is of"),
        ({"budget": -1}, "has budget"),
        ({"budget": True}, "has budget"),
        ({"budget": "300"}, "has budget"),
        ({"versions": []}, "has versions"),
        ({"versions": {"a": 1}}, "has versions"),
        ({"kept": None}, "what was kept"),
        ({"kept": []}, "patches/0001-.* is not in session.json"),
        ({"kept": ["x"]}, "kept change"),
        ({"format": 0}, "format 0"),
    ],
)
def test_a_session_that_can_not_be_is_refused(export, tmp_path, changes, match):
    tampered(export, **{"session.json": json_with(export, "session.json", **changes)})
    refused(export, tmp_path / "elsewhere", match)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda kept: kept[::-1], "missing or out of order"),
        (lambda kept: [kept[0], kept[0]], "missing or out of order"),
        (lambda kept: [kept[0] | {"patch": "README.md"}, kept[1]], "missing or out of order"),
        (lambda kept: [kept[0] | {"commit": "--output=x"}, kept[1]], "kept change"),
        (lambda kept: [kept[0] | {"number": "1"}, kept[1]], "kept change"),
        (lambda kept: [kept[0] | {"more": 1}, kept[1]], "kept change"),
    ],
)
def test_what_was_kept_has_to_be_the_patches(export, tmp_path, change, match):
    kept = change(json.loads((export / "session.json").read_text())["kept"])
    tampered(export, **{"session.json": json_with(export, "session.json", kept=kept)})
    refused(export, tmp_path / "elsewhere", match)


def test_an_impossible_profile_is_refused(export, tmp_path):
    for changes in (
        {"versions": 3},
        {"settings": {}},
        {"format": 9},
        {"products": {"square": 1, "rates": []}},
        {"device": "other-1gb"},
        {"trials": [{"depth": []}]},
    ):
        good = (export / "profile.json").read_bytes()
        tampered(export, **{"profile.json": json_with(export, "profile.json", **changes)})
        refused(export, tmp_path / "elsewhere", "profile.json")
        tampered(export, **{"profile.json": good})
    exchange.import_session(export, tmp_path / "elsewhere")


def test_a_damaged_ledger_is_refused(export, tmp_path):
    good = (export / "results.tsv").read_bytes()
    for content, match in (
        (good[:-3], "line 6: it may be cut short"),
        (good + b"a\tb\n", "2 fields"),
        (FIVE, "no column"),
        (b"hello\n", "is no ledger"),
        (good.replace(DEVICE.encode(), b"x", 1), "rows of 'x'"),
    ):
        tampered(export, **{"results.tsv": content})
        refused(export, tmp_path / "elsewhere", match)


# --- For people ---


@pytest.mark.parametrize("budget", [300, 5])
def test_only_the_sessions_own_runs_are_told_as_its_scores(budget):
    """Confirmations are on other seeds, often of another length; disturbed runs count for nothing."""
    own = f"trial of {budget} s; " if budget != 300 else ""
    told = [
        ("aaaa111", 1.4, "keep", f"{own}better"),
        ("aaaa111", 1.42, "keep", f"{own}the parent again, beside 2"),
        ("aaaa111", 0.9, "keep", "confirmation 3, held out 0.91"),
        ("aaaa111", 0.8, "keep", "confirmation 3"),
        ("aaaa111", 0.7, "keep", "trial of 600 s; confirmation 4, held out 0.7"),
        ("aaaa111", 0.6, "keep", "trial of 1 s; better"),
        ("aaaa111", 0.5, "invalid", f"{own}slower"),
        ("aaaa111", None, "crash", f"{own}ValueError"),
    ]
    rows = [
        ledger.row_of({} if bpb is None else {"val_bpb": bpb}, run=run, commit=commit, status=status, reason=reason)
        for run, (commit, bpb, status, reason) in enumerate(told, 1)
    ]
    session = dict.fromkeys(bundle.TEXTS, "") | {"budget": budget, "versions": {}}
    kept = bundle.Kept(1, "aaaa111", "ccccccc", GOOD, "faster")
    text = summary.readme(bundle.Bundle(session, rows, [kept]), ["patches/0001-faster.patch"])
    assert "first 1.410000, lowest 1.410000" in text and "| aaaa111 | 1.410000 | faster |" in text


# --- Hostile patches ---

GOOD = "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n-LR = 1\n+LR = 3\n DEPTH = 2\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "diff --git a/train.py b/train.py\nindex 1234567..89abcdef 100644\n" + GOOD,
        GOOD + "@@ -9 +9 @@ def f():\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n",
        GOOD + "@@ -9,0 +10,2 @@\n+--- a/other.py\n++++ b/other.py\n",
        GOOD.replace("LR = 1", "LR = 1\r"),
        GOOD.replace("-1,2 +1,2", "-1,4 +1,4").replace(" DEPTH", "\n DEPTH") + "\n",
    ],
)
def test_patches_of_train_are_taken(text):
    assert bundle.check_patch("p", text.encode()) == text


@pytest.mark.parametrize(
    "text, match",
    [
        (GOOD.replace("train.py", "prepare.py"), "of nothing else"),
        (GOOD.replace("b/train.py", "b/prepare.py"), "nothing else"),
        (GOOD.replace("a/train.py", "/dev/null"), "nothing else"),
        (GOOD.replace("a/train.py", "../train.py"), "nothing else"),
        (GOOD.replace("train.py", "x/train.py"), "nothing else"),
        (GOOD.replace("b/train.py", "b/train.py\tx"), "nothing else"),
        (GOOD + GOOD.replace("train.py", "prepare.py"), "more than hunks"),
        (GOOD + GOOD, "more than hunks"),
        (GOOD + "diff --git a/prepare.py b/prepare.py\n", "more than hunks"),
        ("", "nothing else"),
        ("\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/train.py\nold mode 100644\nnew mode 100755\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/x.py\nrename from train.py\nrename to x.py\n", "nothing else"),
        ("diff --git a/train.py b/train.py\nindex 1234567..89abcde 120000\n" + GOOD, "nothing else"),
        ("diff --git a/train.py b/train.py\nBinary files differ\n", "nothing else"),
        (GOOD[:40], "does not end"),
        (GOOD.replace("-1,2 +1,2", "-1,3 +1,3"), "cut short"),
        (GOOD.replace("-1,2 +1,2", "-1 +1"), "more than hunks"),
        (GOOD.replace("-1,2 +1,2", "-1,1 +1,2"), "other lines"),
        (GOOD[:-1], "does not end"),
        (GOOD + "\n", "more than hunks"),
        (GOOD.replace(" DEPTH", "DEPTH"), "fewer lines"),
        (GOOD + "\x1b[2J\n", "control character"),
        (GOOD + "@@ -9,9 +9,9 @@\n a\n--- a/prepare.py\n+++ b/prepare.py\n@@ -1 +1 @@\n", "hunk"),
        (GOOD + "x" * 2**20, "at most"),
        ("--- a/train.py\n+++ b/train.py\n", "changes nothing"),
    ],
)
def test_patches_of_anything_else_are_refused(export, tmp_path, text, match):
    tampered(export, **{"patches/0001-lr-times-three.patch": text.encode()})
    refused(export, tmp_path / "elsewhere", f"patches/0001-lr-times-three.patch .*({match})")


# --- Hostile arrays ---


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


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
        (lambda: npz(val_nats=np.array([Bomb()], dtype=object)), "float64"),
        (lambda: b"junk", "not a zip"),
        (lambda: npz(val_nats=np.ones(3), val_bytes=np.ones(4)), "not of the same rows"),
        (lambda: npz(val_nats=np.ones(3)), "not of the same rows"),
        (lambda: npz(arr_0=np.ones(3)), "it holds arr_0"),
        (lambda: npz(val_nats=np.ones(3, np.float32), val_bytes=np.ones(3, np.float32)), "float64"),
        (lambda: npz(val_nats=np.ones((3, 1)), val_bytes=np.ones((3, 1))), "one value a row"),
        (lying_header, "float64"),
        (lambda: npz(val_nats=np.array([np.nan]), val_bytes=np.ones(1)), "not finite"),
        (lambda: npz(val_nats=np.array([-1.0]), val_bytes=np.ones(1)), "negative"),
    ],
)
def test_arrays_are_plain_numbers_or_refused(export, tmp_path, data, match):
    tampered(export, **{"rows/0001.npz": data()})
    refused(export, tmp_path / "elsewhere", f"rows/0001.npz does not hold losses by row .*{match}")
    assert not Path("/tmp/this-must-never-be-made").exists()


def test_arrays_that_unpack_to_too_much_are_refused(export, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_LOSSES", 10**5)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, val_nats=np.zeros(10**5), val_bytes=np.zeros(10**5))
    tampered(export, **{"rows/0001.npz": buffer.getvalue()})
    refused(export, tmp_path / "elsewhere", "unpacks to more than 100,000 bytes")


def test_losses_of_a_run_that_is_not_in_the_ledger_are_refused(export, tmp_path):
    tampered(export, **{"rows/0077.npz": (export / "rows/0001.npz").read_bytes()})
    refused(export, tmp_path / "elsewhere", "rows/0077.npz is of no run")
