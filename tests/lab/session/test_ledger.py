"""The ledger: a view of the journal, put back when somebody edits it; and ledgers of others, read without guessing."""

import csv
import io
import math
import os
import random
import unicodedata

import pytest
import sessions
from sessions import attempt, edited

import storage
from lab.errors import LabError
from lab.session import ledger
from lab.verdict import executor
from results import MEASURES

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
FIVE = HEADER + (
    "baseline\t1.250000\t12.5\tkeep\tbaseline\n"
    "aaaa111\t1.240000\t12.6\tkeep\tlonger warmup (50 \\ 100 steps), C:\\new\\tables\n"
    "bbbb222\t0.000000\t0.0\tcrash\tdouble width (out of memory)\n"
)
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
    return ledger.EMPTY | ledger.measured(RESULT) | {"run": run} | columns


# --- Rows ---


def test_a_row_of_a_result_comes_back(path):
    written = row(7, seed=3, started="2026-11-21T01:02:03Z", parent="abc0000", change="f" * 16, portable="yes")
    path.write_bytes(ledger.dumps([written]))
    found = ledger.read(path)
    assert not found.set_aside and found.headed and found.columns == ledger.COLUMNS
    rounded = {"val_bpb": 1.234568, "training_seconds": 300.0, "tokens_M": 6.917, "speed": 0.99}
    assert found.rows == [written | rounded]
    assert (written["memory_gb"], written["steps"], written["tok_per_s"], written["mfu"]) == (2, 1234, 23057, 40)
    assert all(type(value) is type(written[name]) for name, value in found.rows[0].items())


def test_the_columns_are_the_originals_and_then_ours(path):
    path.write_bytes(ledger.dumps([row()]))
    names = path.read_text().split("\n")[0].split("\t")
    assert names[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert {measure.column for measure in MEASURES if measure.column} <= set(names) and len(set(names)) == len(names)


def test_a_crash_has_the_originals_zeros_and_no_score(path):
    path.write_bytes(ledger.dumps([{"run": 1, "commit": "abc", "status": "crash", "reason": "out of memory"}]))
    fields = path.read_text().split("\n")[1].split("\t")
    assert fields[1:3] == ["0.000000", "0.0"] and fields[11:20] == [""] * 9
    found = ledger.read(path).rows[0]
    assert found["val_bpb"] is found["memory_gb"] is found["steps"] is None and found["device"] == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_written_as_unknown(path, value):
    path.write_bytes(ledger.dumps([row(speed=value, val_bpb=value)]))
    assert ledger.read(path).rows[0]["speed"] is ledger.read(path).rows[0]["val_bpb"] is None


# --- Text ---


def texts(count):
    rng = random.Random(1)
    alphabet = "\\\\\\tnr\"'\t\n\r abcé😀\u2028|,;<&\x00\x07\x1b\x7f\x85\x9b\ufeff\ud800"
    for _ in range(count):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


def plain(text):
    """What may be lost: control characters that don't end lines or fields, and halves of characters."""
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) != "Cc")
    return text.encode(errors="replace").decode()


def test_text_of_all_kinds_comes_back(path):
    wanted = list(texts(3000))
    path.write_bytes(ledger.dumps([row(i, description=text, reason=text[::-1]) for i, text in enumerate(wanted)]))
    found = ledger.read(path)
    assert not found.set_aside
    assert [r["description"] for r in found.rows] == [plain(text) for text in wanted]
    assert [r["reason"] for r in found.rows] == [plain(text[::-1]) for text in wanted]
    assert not set(map(chr, [*range(9), *range(11, 32), 127, 133, 155])) & set(path.read_text(encoding="utf-8"))


def test_readers_of_csv_see_the_same_rows(path):
    starts = ['"quoted" start', '"open', 'in the "middle"', "plain", '"']
    path.write_bytes(ledger.dumps([row(i, description=text) for i, text in enumerate(starts)]))
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))
    assert [r["run"] for r in rows] == list("01234")
    assert [r["description"].removeprefix("\\") for r in rows] == starts


# --- The original's files, and others ---


def test_the_originals_file_is_read_as_it_is(path):
    path.write_text(FIVE)
    found = ledger.read(path)
    assert not found.set_aside and found.columns == ledger.ORIGINAL
    assert [r["val_bpb"] for r in found.rows] == [1.25, 1.24, None]
    assert [r["memory_gb"] for r in found.rows] == [12.5, 12.6, None]
    assert found.rows[1]["description"] == "longer warmup (50 \\ 100 steps), C:\\new\\tables"
    assert found.rows[2] == ledger.EMPTY | {
        "commit": "bbbb222",
        "status": "crash",
        "description": "double width (out of memory)",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n\n",
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("\t12.5", "\t 12.5 "),
    ],
)
def test_ends_of_lines_blank_lines_and_marks_make_no_difference(path, change):
    path.write_bytes(FIVE.encode())
    rows = ledger.read(path).rows
    path.write_bytes(change(FIVE).encode())
    assert ledger.read(path).rows == rows and not ledger.read(path).set_aside


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_ledger_that_windows_wrote_is_read(path, encoding):
    text = FIVE.replace("longer", "längeres")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + text.replace("\n", "\r\n")).encode(encoding))
    ledger_of_windows = ledger.read(path)
    path.write_bytes(text.encode())
    assert ledger_of_windows.rows == ledger.read(path).rows and not ledger_of_windows.set_aside


def test_a_utf_16_ledger_that_was_cut_short_loses_its_last_line_only(path):
    path.write_bytes(FIVE.encode("utf-16")[:-9])
    cut = ledger.read(path)
    assert [row["commit"] for row in cut.rows] == ["baseline", "aaaa111"] and len(cut.set_aside) == 1


def test_a_missing_header_is_told(path):
    path.write_text(FIVE.removeprefix(HEADER))
    found = ledger.read(path)
    assert not found.headed and [r["commit"] for r in found.rows] == ["baseline", "aaaa111", "bbbb222"]


def test_unknown_columns_are_kept(path):
    path.write_text(FIVE.replace("description\n", "description\tgpu_hours\n").replace(")\n", ")\t1.5\n"))
    found = ledger.read(path)
    assert [r["gpu_hours"] for r in found.rows] == ["1.5"] and found.set_aside[0].why == "it has 5 fields instead of 6"


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"<html>\nx\n",
        b"a\tb\tc\td\te\n",
        b"commit\tval_bpb\tcommit\n",
        b"commit\tval_bpb\t\n",
        b"{}\n",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(LabError, match="is no ledger|names a column twice"):
        ledger.read(path)


def test_a_ledger_that_is_not_there_is_an_error_that_says_so(path):
    with pytest.raises(LabError, match="there is no ledger .*; check the path"):
        ledger.read(path)
    with pytest.raises(LabError, match="can't be read"):
        ledger.read(path.parent)


# --- Damage ---


@pytest.mark.parametrize("text", ["1_000", "1.2.3", "0x10", "inf", "-inf", "1e999", "٣", "one", "1,5", "--"])
def test_a_row_with_a_number_that_is_none_is_set_aside(path, text):
    path.write_text(FIVE.replace("1.240000", text), encoding="utf-8")
    found = ledger.read(path)
    assert [r["commit"] for r in found.rows] == ["baseline", "bbbb222"]
    (aside,) = found.set_aside
    assert (aside.line, aside.text.split("\t")[0]) == (3, "aaaa111") and f"val_bpb is '{text}'" in aside.why


def test_damaged_lines_are_set_aside_and_the_others_read(path):
    lines = FIVE.encode().split(b"\n")
    no_text = b"caf\xe9\t1.0\t1.0\tkeep\tx"
    path.write_bytes(b"\n".join([lines[0], b"\0" * 20, lines[1], no_text, lines[2], b"a\tb", b""]))
    found = ledger.read(path)
    assert [r["commit"] for r in found.rows] == ["baseline", "aaaa111"]
    assert [aside.line for aside in found.set_aside] == [2, 4, 6]
    assert "zero bytes" in found.set_aside[0].why and "2 fields instead of 5" in found.set_aside[2].why


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
    assert "close what has it open" in capsys.readouterr().err and session.ledger.read_bytes() == before
    assert session.write_ledger() is None
    assert session.ledger.read_bytes() == ledger.dumps(ledger.rows_of(session.state)) != before


def test_a_full_disk_is_told(session, monkeypatch):
    attempt(session, edited(LOSS=1.1))
    session.ledger.unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "make room" in session.write_ledger()
    assert session.write_ledger() is None and session.ledger.exists()
    assert storage.disk_full(OSError(28, ""))
