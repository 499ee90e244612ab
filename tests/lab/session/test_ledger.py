"""The ledger: a view of the journal, put back when somebody edits it."""

import csv
import io
import math
import os
import random
import unicodedata

import pytest
import sessions
from sessions import attempt, edited, rows_of

import storage
from lab.session import ledger
from lab.verdict import executor
from results import MEASURES

RESULT = {
    "status": "ok", "val_bpb": 1.2345678, "val_rows": 128, "training_seconds": 300.04, "total_seconds": 333.3,
    "budget_seconds": 300.0, "peak_vram_mb": 2048.0, "num_steps": 1234, "total_tokens_M": 6.9171, "epochs": 1,
    "tokens_per_second": 23057.0, "device": "cpu-x-1gb", "backend": "sdpa", "profile": "abc", "speed": 0.987,
    "dataset": "tiny", "eval": "e1", "data": "d1", "mfu_percent": 40.0, "model_tflops": 2.306, "num_params_M": 11.5,
    "depth": 2,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.tsv"


def row(run=1, **columns):
    columns = {"commit": "abc1234", "status": "keep", "description": f"change {run}", "reason": "better"} | columns
    return ledger.measured(RESULT) | {"run": run} | columns


# --- Rows ---


def test_a_row_of_a_result_comes_back(path):
    written = row(7, seed=3, started="2026-11-21T01:02:03Z", parent="abc0000", change="f" * 16, portable="yes")
    path.write_bytes(ledger.dumps([written]))
    (there,) = rows_of(path)
    assert tuple(there) == ledger.COLUMNS
    rounded = {"val_bpb": 1.234568, "training_seconds": 300.0, "tokens_M": 6.917, "speed": 0.99}
    empty = {name: None if name in ledger.FORMS else "" for name in ledger.COLUMNS}
    assert there == empty | written | rounded
    assert (written["memory_gb"], written["steps"], written["tok_per_s"], written["mfu"]) == (2, 1234, 23057, 40)
    assert all(type(value) is type(there[name]) for name, value in written.items())


def test_the_columns_are_the_originals_and_then_ours(path):
    path.write_bytes(ledger.dumps([row()]))
    names = path.read_text().split("\n")[0].split("\t")
    assert names[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert {measure.column for measure in MEASURES if measure.column} <= set(names) and len(set(names)) == len(names)


def test_a_crash_has_the_originals_zeros_and_no_score(path):
    path.write_bytes(ledger.dumps([{"run": 1, "commit": "abc", "status": "crash", "reason": "out of memory"}]))
    fields = path.read_text().split("\n")[1].split("\t")
    assert fields[1:3] == ["0.000000", "0.0"] and fields[11:20] == [""] * 9
    (found,) = rows_of(path)
    assert found["val_bpb"] is found["memory_gb"] is found["steps"] is None and found["device"] == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_written_as_unknown(path, value):
    path.write_bytes(ledger.dumps([row(speed=value, val_bpb=value)]))
    assert rows_of(path)[0]["speed"] is rows_of(path)[0]["val_bpb"] is None


# --- Text ---


def texts(count):
    rng = random.Random(1)
    alphabet = "\\\\\\tnr\"'\t\n\r abcé😀\u2028|,;<&\x00\x07\x1b\x7f\x85\x9b\ufeff\ud800"
    for _ in range(count):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


def plain(text):
    """What may be lost: control characters that don't end lines or fields, what is not seen, halves of characters."""
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cf", "Zl"))
    return text.encode(errors="replace").decode()


def test_text_of_all_kinds_comes_back(path):
    wanted = list(texts(3000))
    path.write_bytes(ledger.dumps([row(i, description=text, reason=text[::-1]) for i, text in enumerate(wanted)]))
    rows = rows_of(path)
    assert [r["description"] for r in rows] == [plain(text) for text in wanted]
    assert [r["reason"] for r in rows] == [plain(text[::-1]) for text in wanted]
    assert not set(map(chr, [*range(9), *range(11, 32), 127, 133, 155])) & set(path.read_text(encoding="utf-8"))


def test_readers_of_csv_see_the_same_rows(path):
    starts = ['"quoted" start', '"open', 'in the "middle"', "plain", '"']
    path.write_bytes(ledger.dumps([row(i, description=text) for i, text in enumerate(starts)]))
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))
    assert [r["run"] for r in rows] == list("01234")
    assert [r["description"].removeprefix("\\") for r in rows] == starts


# --- The view ---


@pytest.fixture
def session(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


def test_an_edited_ledger_is_put_back_and_that_is_said(session):
    before = session.ledger.read_bytes()
    session.ledger.write_bytes(before.replace(b"keep", b"best"))
    said = session.write_ledger()
    edited_copy = session.folder / "results.edited.tsv"
    assert session.ledger.read_bytes() == before and edited_copy.read_bytes() == before.replace(b"keep", b"best")
    assert "was edited" in said and str(edited_copy) in said
    assert session.write_ledger() is None
    session.ledger.write_bytes(b"mine")
    session.write_ledger()
    assert (session.folder / "results.edited2.tsv").read_bytes() == b"mine" != edited_copy.read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 300])
def test_an_older_or_a_torn_ledger_is_written_anew_without_a_word(session, cut):
    before = session.ledger.read_bytes()
    attempt(session, edited(LOSS=1.1))
    for there in (before, before[:-cut], b""):
        session.ledger.write_bytes(there)
        assert session.write_ledger() is None and session.ledger.read_bytes().startswith(before)
    session.ledger.unlink()
    assert session.write_ledger() is None and session.ledger.read_bytes().startswith(before)


def test_a_ledger_that_is_locked_by_another_program_costs_nothing(session, monkeypatch, capsys):
    """A spreadsheet on Windows lets nobody replace what it has open."""
    before, replace = session.ledger.read_bytes(), os.replace

    def locked(source, target):
        if str(target).endswith(".tsv"):
            raise PermissionError(13, "The process cannot access the file")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", locked)
        assert attempt(session, edited(LOSS=0.9)).status == "keep"
    assert "close the program that has it open" in capsys.readouterr().err and session.ledger.read_bytes() == before
    assert session.write_ledger() is None
    assert session.ledger.read_bytes() == ledger.dumps(ledger.rows_of(session.state)) != before


def test_a_full_disk_is_told(session, monkeypatch):
    attempt(session, edited(LOSS=1.1))
    session.ledger.unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "free some space" in session.write_ledger()
    assert session.write_ledger() is None and session.ledger.exists()
    assert storage.disk_full(OSError(28, ""))


# --- What others may do with a ledger, and what others' ledgers may do ---


@pytest.mark.parametrize("text", ["=1+1", "+1", "@SUM(A1)", "-1", '"quoted', "=\\=", "a = b"])
def test_no_cell_is_a_formula(path, text):
    path.write_bytes(ledger.dumps([row(description=text, reason=text)]))
    cells = path.read_text().splitlines()[1].split("\t")
    assert not any(c.startswith(tuple("=+@")) or c.startswith("-") and not c[1:2].isdigit() for c in cells), cells
    assert rows_of(path)[0]["description"] == text


def test_what_turns_text_around_or_is_not_seen_is_left_out(path):
    path.write_bytes(ledger.dumps([row(description="a\u202eb\u2066c\u200bd\x1b[31me\ufefff")]))
    assert rows_of(path)[0]["description"] == "abcd[31mef"
