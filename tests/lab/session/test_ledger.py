"""The ledger: every row that was appended is there once, and no row is made of what a power failure left."""

import csv
import io
import json
import math
import multiprocessing
import os
import random
import signal
import unicodedata

import filelock
import pytest

import storage
from lab.session import ledger
from lab.errors import LabError

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
    "dataset": "tiny", "eval": "e1", "data": "d1", "mfu_percent": 40.0, "num_params_M": 11.5, "depth": 2,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.tsv"


def row(run=1, **columns):
    columns = {"commit": "abc1234", "status": "keep", "description": f"change {run}", "reason": "better"} | columns
    return ledger.row_of(RESULT, run=run, **columns)


# --- Rows ---


def test_a_row_of_a_result_comes_back(path):
    written = row(7, seed=3, started="2026-11-21T01:02:03Z", parent="abc0000", patch="f" * 16, portable="yes")
    ledger.append(path, [written])
    found = ledger.read(path)
    assert not found.set_aside and found.headed and found.columns == ledger.COLUMNS
    rounded = {"val_bpb": 1.234568, "training_seconds": 300.0, "tokens_M": 6.917, "speed": 0.99}
    assert found.rows == [written | rounded]
    assert (written["memory_gb"], written["steps"], written["tok_per_s"], written["mfu"]) == (2, 1234, 23057, 40)
    assert all(type(value) is type(written[name]) for name, value in found.rows[0].items())


def test_the_columns_are_the_originals_and_then_ours(path):
    ledger.append(path, [row()])
    names = path.read_text().split("\n")[0].split("\t")
    assert names[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert (
        names[5:]
        == (
            "device backend run seed started training_seconds total_seconds tokens_M steps params_M depth "
            "tok_per_s tflops mfu speed val_rows eval data profile parent patch origin portable reason"
        ).split()
    )


def test_tflops_come_from_flops_per_token():
    assert ledger.row_of(RESULT)["tflops"] is None
    exact = ledger.row_of(RESULT | {"flops_per_token": 1e8})
    assert exact["tflops"] == pytest.approx(2.3057)


def test_what_is_given_by_name_wins_and_an_unknown_name_is_an_error():
    assert ledger.row_of(RESULT, device="mine", val_bpb=1.5)["device"] == "mine"
    with pytest.raises(TypeError, match="no column tokens$"):
        ledger.row_of(RESULT, tokens=3)


def test_a_crash_has_the_originals_zeros_and_no_score(path):
    ledger.append(path, [ledger.row_of({}, run=1, commit="abc", status="crash", reason="out of memory")])
    fields = path.read_text().split("\n")[1].split("\t")
    assert fields[1:3] == ["0.000000", "0.0"] and fields[10:20] == [""] * 10
    found = ledger.read(path).rows[0]
    assert found["val_bpb"] is found["memory_gb"] is found["steps"] is None and found["device"] == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_written_as_unknown(path, value):
    ledger.append(path, [row(speed=value, val_bpb=value)])
    assert ledger.read(path).rows[0]["speed"] is ledger.read(path).rows[0]["val_bpb"] is None


@pytest.mark.parametrize("columns", [{"steps": 10.5}, {"mfu": "fast"}, {"speed": [1]}])
def test_what_is_no_number_is_refused_before_anything_is_written(path, columns):
    with pytest.raises(ValueError, match=f"{next(iter(columns))} is .* does not fit"):
        ledger.append(path, [row(1), row(2, **columns)])
    assert not path.exists()


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
    ledger.append(path, [row(i, description=text, reason=text[::-1]) for i, text in enumerate(wanted)])
    found = ledger.read(path)
    assert not found.set_aside
    assert [r["description"] for r in found.rows] == [plain(text) for text in wanted]
    assert [r["reason"] for r in found.rows] == [plain(text[::-1]) for text in wanted]
    assert not set(map(chr, [*range(9), *range(11, 32), 127, 133, 155])) & set(path.read_text(encoding="utf-8"))


def test_readers_of_csv_see_the_same_rows(path):
    starts = ['"quoted" start', '"open', 'in the "middle"', "plain", '"']
    ledger.append(path, [row(i, description=text) for i, text in enumerate(starts)])
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


def test_a_missing_header_is_told(path):
    path.write_text(FIVE.removeprefix(HEADER))
    found = ledger.read(path)
    assert not found.headed and [r["commit"] for r in found.rows] == ["baseline", "aaaa111", "bbbb222"]
    ledger.append(path.with_name("ours.tsv"), [row(1), row(2)])
    ours = path.with_name("ours.tsv").read_bytes()
    assert [r["run"] for r in ledger.parse(ours.split(b"\n", 1)[1]).rows] == [1, 2]


def test_unknown_columns_are_kept(path):
    path.write_text(FIVE.replace("description\n", "description\tgpu_hours\n").replace(")\n", ")\t1.5\n"))
    found = ledger.read(path)
    assert [r["gpu_hours"] for r in found.rows] == ["1.5"] and found.set_aside[0].why == "it has 5 fields instead of 6"


def test_rows_are_appended_in_the_files_own_order_of_columns(path):
    names = ["later", *reversed(ledger.COLUMNS)]
    path.write_text("\t".join(names) + "\n")
    ledger.append(path, [row(3, description="a\tb")])
    assert ledger.read(path).rows[0]["description"] == "a\tb" and ledger.read(path).rows[0]["later"] == ""


def test_our_rows_are_not_forced_into_the_originals_columns(path):
    path.write_text(FIVE)
    with pytest.raises(LabError, match="has no column device, .* Move it away"):
        ledger.append(path, [row()])
    assert path.read_text() == FIVE


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


def test_a_row_cut_short_at_any_byte_is_set_aside_and_made_good(path):
    ledger.append(path, [row(1), row(2)])
    ledger.append(path, [row(3, description="tab\tand é")])
    content = path.read_bytes()
    begin = content[:-1].rfind(b"\n") + 1
    for end in range(begin + 1, len(content)):
        path.write_bytes(content[:end])
        found = ledger.read(path)
        assert [r["run"] for r in found.rows] == [1, 2]
        assert [(aside.line, aside.text) for aside in found.set_aside] == [
            (4, content[begin:end].decode(errors="replace"))
        ]
        ledger.append(path, [row(3, description="tab\tand é")])
        assert path.read_bytes() == content
        damaged = path.with_name("results.tsv.damaged")
        assert damaged.read_bytes() == content[begin:end] + b"\n"
        damaged.unlink()


def test_a_header_cut_short_at_any_byte_is_made_good(path):
    ledger.append(path, [row(1)])
    content = path.read_bytes()
    for end in range(content.index(b"\n") + 1):
        path.write_bytes(content[:end])
        assert ledger.read(path).rows == []
        ledger.append(path, [row(1)])
        assert path.read_bytes() == content


def test_a_torn_tail_is_moved_although_nothing_is_new(path):
    ledger.append(path, [row(1)])
    content = path.read_bytes()
    path.write_bytes(content + b"abc\t1.")
    ledger.append(path, [row(1)])
    assert path.read_bytes() == content
    assert path.with_name("results.tsv.damaged").read_bytes() == b"abc\t1.\n"


def test_what_is_cut_off_is_kept_once_whenever_the_writer_is_killed(path, monkeypatch):
    ledger.append(path, [row(1)])
    with open(path, "ab") as file:
        file.write(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # after the tail is in the other file, before it is cut off
            ledger.append(path, [row(2)])
    assert path.read_bytes().endswith(b"\ntorn")
    ledger.append(path, [row(2)])
    assert [r["run"] for r in ledger.read(path).rows] == [1, 2] and not ledger.read(path).set_aside
    assert path.with_name("results.tsv.damaged").read_bytes() == b"torn\n"


# --- Appending ---


def test_a_run_is_recorded_once(path):
    ledger.append(path, [row(1), row(2)])
    ledger.append(path, [row(2, description="again"), row(3), row(3)])
    assert [(r["run"], r["description"]) for r in ledger.read(path).rows] == [
        (1, "change 1"),
        (2, "change 2"),
        (3, "change 3"),
    ]


def test_rows_without_a_run_are_all_appended(path):
    ledger.append(path, [row(None), row(None)])
    ledger.append(path, [row(None)])
    assert len(ledger.read(path).rows) == 3


def test_nothing_to_append_makes_no_file(path):
    ledger.append(path, [])
    assert not path.exists()


def test_a_row_is_flushed_before_append_returns(path, monkeypatch):
    flushed, fsync, stat = [], os.fsync, os.fstat
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append((stat(fd).st_ino, stat(fd).st_size)), fsync(fd)))
    ledger.append(path, [row(1)])
    assert (path.stat().st_ino, path.stat().st_size) in flushed
    if os.name == "posix":
        assert path.parent.stat().st_ino in [inode for inode, _ in flushed]


def test_a_disk_that_is_full_is_an_error_that_says_so(path, monkeypatch):
    ledger.append(path, [row(1)])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(storage.DataError, match="make room"):
            ledger.append(path, [row(2)])
    ledger.append(path, [row(2)])
    assert [r["run"] for r in ledger.read(path).rows] == [1, 2]


def test_another_writer_is_waited_for_and_not_for_ever(path, monkeypatch):
    monkeypatch.setattr(ledger, "PATIENCE", 0.1)
    with filelock.FileLock(path.with_name("results.tsv.lock")):
        with pytest.raises(LabError, match="another process has been writing"):
            ledger.append(path, [row(1)])
    ledger.append(path, [row(1)])


def write_rows(path, first, count, ready):
    ready.wait()
    for run in range(first, first + count):
        ledger.append(path, [row(run, description=f"change {run} " + "x" * (run % 300))])


def write_for_ever(path, sent):
    for run in range(10**6):
        ledger.append(path, [row(run)])
        sent.send(run)


def test_two_writers_at_once_lose_and_mix_nothing(path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writers = [context.Process(target=write_rows, args=(path, first, 200, ready)) for first in (0, 1000, 100)]
    for writer in writers:
        writer.start()
    ready.set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = ledger.read(path)
    assert not found.set_aside and not path.with_name("results.tsv.damaged").exists()
    wanted = {*range(300), *range(1000, 1200)}  # the last writer's first hundred are also the first's
    assert len(found.rows) == len(wanted) and {r["run"] for r in found.rows} == wanted
    assert all(r["description"].strip("x") == f"change {r['run']} " for r in found.rows)


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_writer_that_is_killed_holds_nothing_and_what_it_told_is_there(path):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    writer = context.Process(target=write_for_ever, args=(path, send))
    writer.start()
    send.close()
    while receive.recv() < 20:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    last = 20
    while receive.poll():
        try:
            last = receive.recv()
        except EOFError:
            break
    ledger.append(path, [row(-1)])
    runs = [r["run"] for r in ledger.read(path).rows]
    assert runs[-1] == -1 and runs[:-1] == list(range(len(runs) - 1)) and len(runs) - 2 >= last


def test_a_ledger_is_json(path):
    ledger.append(path, [row(1), ledger.row_of({}, run=2, status="crash")])
    assert json.loads(json.dumps(ledger.read(path).rows, allow_nan=False)) == ledger.read(path).rows
