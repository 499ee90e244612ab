"""The original's ledgers, of which nothing else is known, as sessions: read without guessing."""

import gzip
import os

import pytest
from exports import contents, imported, refused

from lab.compare.analysis import Analysis
from lab.session import ledger
from lab.share import archive, sources
from lab.share.archive import Wrong
from lab.share.ledgers import events_of, parse

FIVE = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\nbaseline\t1.250000\t12.5\tkeep\tbaseline\n"
    "aaaa111\t0.000000\t0.0\tcrash\tC:\\new | odd\n"
)
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
MORE = HEADER + (
    "baseline\t1.250000\t12.5\tkeep\tbaseline\n"
    "aaaa111\t1.240000\t12.6\tkeep\tlonger warmup (50 \\ 100 steps), C:\\new\\tables\n"
    "bbbb222\t0.000000\t0.0\tcrash\tdouble width (out of memory)\n"
)
ORIGINAL = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
a\t0.998000\t44.0\tkeep\tbaseline
b\t0.986000\t43.9\tkeep\thalve batch 524K to 262K (more steps in 5 min)
c\t0.987000\t60.2\tdiscard\tadd 5% warmup
d\t0.000000\t0.0\tcrash\tbatch 131K (assert fail)
e\t0.981000\t60.2\tkeep\twarmdown 0.5 to 0.7
"""


def test_the_originals_ledger_becomes_a_session(tmp_path):
    source, elsewhere = tmp_path / "H100 Mar8.tsv", tmp_path / "home"
    source.write_text(FIVE)
    there = imported(source, elsewhere, "nvidia-h100-80gb")
    assert there == elsewhere / "imported" / "nvidia-h100-80gb" / "h100-mar8"
    record = sources.read(there)
    assert [(run.status, run.result.get("val_bpb")) for run in record.state.runs.values()] == [
        ("ok", 1.25),
        ("crash", None),
    ]
    assert record.state.experiments[1].description == "C:\\new | odd" and record.state.best.number == 0
    assert record.base is None and record.started.budget is None
    assert imported(source, elsewhere, "nvidia-h100-80gb") == there
    source.write_text(FIVE + "bbbb222\t1.2\t1\tkeep\tmore\n")
    assert imported(source, elsewhere, "nvidia-h100-80gb") == there  # it has grown
    assert sources.read(there).state.best.number == 2
    source.write_text(MORE)
    refused(source, elsewhere, "holds another session", "nvidia-h100-80gb")


def test_a_ledger_whose_last_line_was_finished_is_imported_again(tmp_path):
    """Though what was noted of it is no longer said."""
    source, elsewhere, row = tmp_path / "night.tsv", tmp_path / "home", "bbbb222\t1.2\t1\tkeep\tmore"
    source.write_text(FIVE + row)
    there = imported(source, elsewhere, "nvidia-h100-80gb")
    before = sources.read(there).started
    source.write_text(FIVE + row + "\ncccc333\t1.1\t1\tkept\twhat?\n")
    assert imported(source, elsewhere, "nvidia-h100-80gb") == there
    assert sources.read(there).state.best.number == 2 and sources.read(there).started.notes != before.notes


def test_a_row_of_five_columns_is_an_experiment_on_the_best_before_it(tmp_path):
    path = tmp_path / "mar8.tsv"
    path.write_text(ORIGINAL)
    record = sources.read(path, "nvidia-h100-80gb")
    experiments = record.state.experiments.values()
    assert [(e.onto, e.status, sum(run.ok for run in e.runs)) for e in experiments] == [
        (None, "keep", 1),
        (0, "keep", 1),
        (1, "discard", 1),
        (1, "crash", 0),
        (1, "keep", 1),
    ]
    assert [e.kinds for e in experiments] == [[], ["batch"], ["schedule"], ["batch"], ["schedule"]]
    assert (
        record.state.runs[2].result["peak_vram_mb"] == pytest.approx(43.9 * 1024) and record.state.runs[2].seed is None
    )
    assert "unconfirmed" in record.started.notes[-1] and record.started.source == "ledger"
    assert [row.get("val_bpb") for row in ledger.rows_of(record.state)] == [0.998, 0.986, 0.987, None, 0.981]


def test_a_ledger_that_numbers_its_experiments_is_read(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text("experiment\tcommit\tval_bpb\tmemory_gb\tstatus\tdescription\n0\ta\t1.5\t1\tkeep\tbaseline\n")
    assert sources.read(path, "nvidia-h100-80gb").state.runs[1].result["val_bpb"] == 1.5


def test_a_sessions_own_ledger_is_refused_for_its_export(session, tmp_path):
    refused(session.ledger, tmp_path / "home", "of a session of this project; take its export", "a-1gb")


def test_what_of_a_ledger_can_not_be_read_is_told_and_kept(tmp_path, capsys):
    source = tmp_path / "r.tsv"
    source.write_text(FIVE.split("\n", 1)[1] + "x\ty\n" * 7 + "aaaa")
    there = imported(source, tmp_path / "home", "a-1gb")
    told = capsys.readouterr().err.splitlines()
    assert (
        told[0] == "r.tsv does not name its columns; they are taken to be commit val_bpb memory_gb status description"
    )
    assert told[1] == "r.tsv, line 3, was set aside: it has 2 fields instead of 5: x y"
    assert len(told) == 8 and told[-2] == "3 more lines of r.tsv were set aside, too"
    assert sources.read(there).started.notes == told  # they go along


@pytest.mark.skipif(os.name == "nt", reason="whether NUL exists depends on the version")
@pytest.mark.parametrize("device", [None, "a"])
def test_what_is_no_file_is_no_ledger(tmp_path, device):
    refused(os.devnull, tmp_path / "home", "it is neither a file nor a folder", device)


def test_a_ledger_has_to_have_a_device_that_can_name_a_folder(tmp_path):
    source = tmp_path / "r.tsv"
    source.write_text(FIVE)
    refused(source, tmp_path / "home", "does not name its device.* --device nvidia-h100-80gb")
    for device in ("../x", "a/b", ".", "..", "a..b", "/x", "a b", "é", "x.lock", "a" * 99):
        refused(source, tmp_path / "home", "can't be the name of a device", device)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "content, match",
    [
        (b"hello\n", "is not a ledger.*session is a results"),
        (b"", "has no rows"),
        (FIVE.encode()[:55], "has no rows"),
        (b"PK\x03\x04zip\n", "is not a ledger"),
        (b"\x1f\x8b but no archive", "not a valid .tar.gz"),
        (gzip.compress(b"text", mtime=0), "not a valid .tar.gz"),
    ],
)
def test_other_files_are_refused(tmp_path, content, match):
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", tmp_path / "home", match, None if content[:1] == b"\x1f" else "a-1gb")


def test_what_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "home", "there is no session")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "home", "MANIFEST.json is missing")


@pytest.mark.parametrize(
    "odd, rows",
    [
        ({"description": "\x1b[2J\u202e" + "x" * 9000}, 3),
        ({"description": "{facts}", "commit": "\x1b]0;owned\x07"}, 3),
        ({"commit": "--all"}, 3),
        ({"status": "skip"}, 3),
        ({"status": ""}, 3),
        ({"val_bpb": "0.000000"}, 3),
        ({"val_bpb": ""}, 3),
        ({"val_bpb": "1e-300"}, 3),
        ({"memory_gb": "0.0"}, 3),
        ({"val_bpb": "-1"}, 0),
        ({"val_bpb": "1e308"}, 0),
        ({"memory_gb": "-5"}, 3),
        ({"memory_gb": "1e308"}, 3),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_odd_figures_and_words_break_nothing(tmp_path, odd, rows, which):
    usual = {"commit": "abc", "val_bpb": "1.0", "memory_gb": "1.0", "status": "keep", "description": "d"}
    lines = [(usual | odd if place == which else usual).values() for place in range(3)]
    path = tmp_path / "odd.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in (ledger.ORIGINAL, *lines)))
    record = sources.read(path, "d-1gb")
    assert len(record.state.experiments) == len(record.state.runs) == (rows or 2)
    files = archive.read(imported(path, tmp_path / "home", "d-1gb"))
    text = b"".join(data for name, data in files.items() if rows or name != "journal.jsonl").decode()
    assert text.replace("\n", "").replace("\t", "").isprintable() and "owned\x07" not in text


def test_an_endless_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x.tsv", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(Wrong, match="more than 16 MiB"):
        list(events_of(tmp_path / "x.tsv", "a-1gb"))


def test_the_summary_of_a_ledger_lists_its_changes(tmp_path):
    (tmp_path / "mar8.tsv").write_text(ORIGINAL)
    text = contents(imported(tmp_path / "mar8.tsv", tmp_path / "home", "a-1gb"))["SUMMARY.md"].decode()
    assert "| 1 | halve batch 524K to 262K \\(more steps in 5 min\\) | batch |" in text and "lab replay" not in text


# --- Reading ---


def test_the_originals_file_is_read_as_it_is():
    rows, notes = parse(MORE.encode(), "r.tsv")
    assert not notes and tuple(rows[0]) == ledger.ORIGINAL
    assert [r["val_bpb"] for r in rows] == [1.25, 1.24, None]
    assert [r["memory_gb"] for r in rows] == [12.5, 12.6, None]
    assert rows[1]["description"] == "longer warmup (50 \\ 100 steps), C:\\new\\tables"
    assert rows[2] == {
        "commit": "bbbb222",
        "val_bpb": None,
        "memory_gb": None,
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
def test_ends_of_lines_blank_lines_and_marks_make_no_difference(change):
    assert parse(change(MORE).encode(), "r.tsv") == parse(MORE.encode(), "r.tsv")


def test_a_missing_header_is_told():
    rows, notes = parse(MORE.removeprefix(HEADER).encode(), "r.tsv")
    assert "does not name its columns" in notes[0] and len(notes) == 1
    assert [r["commit"] for r in rows] == ["baseline", "aaaa111", "bbbb222"]


def test_unknown_columns_are_kept():
    content = MORE.replace("description\n", "description\tgpu_hours\n").replace(")\n", ")\t1.5\n")
    rows, notes = parse(content.encode(), "r.tsv")
    assert [r["gpu_hours"] for r in rows] == ["1.5"] and "it has 5 fields instead of 6" in notes[0]


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
def test_what_is_no_ledger_is_refused(content):
    with pytest.raises(Wrong, match="is not a ledger"):
        parse(content, "r.tsv")


# --- Damage ---


@pytest.mark.parametrize("text", ["1_000", "1.2.3", "0x10", "inf", "-inf", "1e999", "٣", "one", "1,5", "--"])
def test_a_row_with_a_number_that_is_none_is_set_aside(text):
    rows, (note,) = parse(MORE.replace("1.240000", text).encode(), "r.tsv")
    assert [r["commit"] for r in rows] == ["baseline", "bbbb222"]
    assert note.startswith(f"r.tsv, line 3, was set aside: val_bpb is '{text}'") and "aaaa111" in note


def test_damaged_lines_are_set_aside_and_the_others_read():
    lines = MORE.encode().split(b"\n")
    no_text = b"caf\xe9\t1.0\t1.0\tkeep\tx"
    content = b"\n".join([lines[0], b"\0" * 20, lines[1], no_text, lines[2], b"a\tb", b""])
    rows, notes = parse(content, "r.tsv")
    assert [r["commit"] for r in rows] == ["baseline", "aaaa111"]
    assert [note.split(",")[1] for note in notes] == [" line 2", " line 4", " line 6"]
    assert "1 fields instead of 5" in notes[0] and "2 fields instead of 5" in notes[2]


def test_an_endless_ledger_is_not_read(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + "a\t1.25\t12.5\tkeep\tx\n" * 100_001)
    with pytest.raises(Wrong, match="100,000 rows; compare a part"):
        list(events_of(path, "nvidia-h100-80gb"))
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(Wrong, match="more than 16 MiB"):
        list(events_of(path, "nvidia-h100-80gb"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_ledgers_that_windows_wrote_are_read(encoding):
    assert parse(FIVE.encode(encoding), "x.tsv") == parse(FIVE.encode(), "x.tsv")


def test_a_status_that_is_not_known_is_named_and_its_score_left_out(tmp_path):
    path = tmp_path / "mar8.tsv"
    path.write_text(MORE.replace("12.6\tkeep", "12.6\tkept"))
    record = sources.read(path, "nvidia-h100-80gb")
    assert record.state.experiments[1].status == "invalid"
    assert any("the status of 1 row of mar8.tsv is none of" in note and "kept" in note for note in record.started.notes)


# --- Ledgers of other programs ---

OTHER = (
    "exp\tdescription\tval_bpb\tpeak_mem_gb\ttok_sec\tmfu\tsteps\tstatus\tnotes\tgpu_name\twatts\tjoules_per_token\n"
    "exp0\tbaseline\t1.088927\t5.9\t300333\t17.1\t2750\tbaseline\tdepth=8\tNVIDIA GeForce RTX 5090\t508.6\t0.001693\n"
    "exp1\thalf the batch\t0.000000\t0.0\t0\t0.0\t0\tcrash\t\tNVIDIA GeForce RTX 5090\t0.0\t0.0\n"
    "exp2\t\t0.000000\t0.0\t0\t0.0\t0\tskip\t\tNVIDIA GeForce RTX 5090\t0.0\t0.0\n"
    "exp3\twarmup 0.05\t1.078907\t5.9\t299900\t17.1\t2748\tbest\t\tNVIDIA GeForce RTX 5090\t514.7\t0.001715\n"
)


def other(tmp_path, text, device=None):
    path = tmp_path / "other.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return sources.read(path, device)


def test_the_ledger_of_another_program_is_read(tmp_path):
    record = other(tmp_path, OTHER)
    assert record.started.device == "nvidia-rtx-5090"
    assert [e.status for e in record.state.experiments.values()] == ["keep", "crash", "keep"]
    run = record.state.runs[3]
    assert (run.bpb, run.result["tokens_per_second"], run.result["num_steps"]) == (1.078907, 299900.0, 2748)
    assert run.result["peak_vram_mb"] == pytest.approx(5.9 * 1024) and run.result["joules_per_token"] == 0.001715
    told = " ".join(record.started.notes)
    assert "exp for commit, peak_mem_gb for memory_gb, tok_sec for tokens_per_second" in told
    assert "1 row of status baseline taken for keep; 1 row of status best taken for keep" in told
    assert "1 row of status skip left out" in told and "taken as nvidia-rtx-5090" in told


@pytest.mark.parametrize("gpu, device", [
    ("Tesla T4", "nvidia-t4"), ("GeForce RTX 3090", "nvidia-rtx-3090"), ("AMD MI300X", "amd-mi300x"),
    ("A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
])  # fmt: skip
def test_names_that_older_drivers_give_name_the_same_device(tmp_path, gpu, device):
    assert other(tmp_path, OTHER.replace("NVIDIA GeForce RTX 5090", gpu)).started.device == device


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_it_is_read_in_the_encodings_of_windows(tmp_path, encoding):
    assert other(tmp_path, OTHER.encode(encoding)).state.best.number == 2


def test_commas_for_decimal_points_are_read_and_told(tmp_path):
    record = other(tmp_path, OTHER.replace(".", ","))
    assert record.state.runs[1].bpb == 1.088927 and record.state.runs[1].result["watts"] == 508.6
    assert any("commas for decimal points" in note for note in record.started.notes)
    mixed = other(tmp_path, OTHER.replace("1.078907", "1,078907"))
    assert mixed.state.best.number == 0 and any(
        "set aside: val_bpb is '1,078907'" in note for note in mixed.started.notes
    )


@pytest.mark.parametrize(
    "old, new", [("0,000000\t0,0", "nan\t-"), ("1,078907", "1"), ("1,088927\t5,9", '"1,088927"\t"5,9"')]
)
def test_commas_are_read_whatever_single_fields_say(tmp_path, old, new):
    record = other(tmp_path, OTHER.replace(".", ",").replace(old, new))
    assert [e.status for e in record.state.experiments.values()] == ["keep", "crash", "keep"]
    assert record.state.runs[1].bpb == 1.088927 and record.state.runs[1].result["peak_vram_mb"] == 5.9 * 1024


def test_commas_are_read_without_a_header(tmp_path):
    rows, notes = parse(FIVE.split("\n", 1)[1].replace(".", ",").encode(), "r.tsv")
    assert rows[0]["val_bpb"] == 1.25 and any("commas" in note for note in notes)


@pytest.mark.parametrize("old, new, column", [("5.9", "5.9 GB", "memory_gb"), ("17.1", "17.1%", "mfu")])
def test_a_figure_that_cant_be_read_costs_no_row(tmp_path, old, new, column):
    record = other(tmp_path, OTHER.replace(f"\t{old}\t", f"\t{new}\t"))
    assert [e.status for e in record.state.experiments.values()] == ["keep", "crash", "keep"]
    assert any(f"left out: {column} in 2 rows" in note for note in record.started.notes)


def test_a_refused_ledger_says_what_is_wrong_with_its_first_row(tmp_path):
    with pytest.raises(Wrong, match="line 1, was set aside: val_bpb is 'one'"):
        parse(b"a\tone\t1.0\tkeep\tx\n", "r.tsv")


def test_a_second_baseline_is_no_change(tmp_path):
    lines = OTHER.rstrip("\n").split("\n")
    again = lines[1].replace("exp0", "exp9").replace("1.088927", "1.090000")
    record = other(tmp_path, "\n".join([*lines, again, ""]))
    assert [e.status for e in record.state.experiments.values()] == ["keep", "crash", "keep"]
    assert record.state.best.number == 2 and any(
        "1 row of these baselines left out" in note for note in record.started.notes
    )


def test_a_baseline_that_crashed_first_is_still_the_baseline(tmp_path):
    lines = OTHER.rstrip("\n").split("\n")
    record = other(tmp_path, "\n".join([lines[0], lines[2], lines[1], lines[4], ""]))
    assert record.state.baseline.description == "baseline" and record.state.baseline.status == "keep"
    assert [e.status for e in record.state.experiments.values()] == ["keep", "crash", "keep"]


def test_a_first_row_that_crashed_is_no_baseline():
    text = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\na\t0\t0\tcrash\tone\nb\t1.1\t1\tkeep\tbaseline\n"
    rows, _ = parse(text.encode(), "x.tsv")
    assert [row["description"] for row in rows] == ["baseline", "one"]


def test_a_header_in_capitals_old_line_ends_and_a_tab_too_many():
    text = "Commit\tVal_bpb\tMemory_gb\tStatus\tDescription\ra\t.95\t1\tKEEP \tbaseline\t\r"
    rows, notes = parse(text.encode(), "x.tsv")
    assert [(row["val_bpb"], row["status"]) for row in rows] == [(0.95, "keep")] and not notes


@pytest.mark.parametrize("column", ["val_bpb", "status", "description"])
def test_a_column_that_is_there_twice_is_refused(column):
    with pytest.raises(Wrong, match=f"two columns {column}; leave the one that is meant"):
        parse(f"commit\tval_bpb\tstatus\tdescription\t{column}\na\t1.1\tkeep\tx\t1.2\n".encode(), "x.tsv")


def test_the_energy_of_another_programs_runs_counts(tmp_path):
    text = OTHER.replace("\tjoules_per_token\n", "\tjoules_per_token\ttotal_energy_joules\n")
    lines = [line + "\t152580.5" * (0 < i and bool(line)) for i, line in enumerate(text.split("\n"))]
    analysis = Analysis(other(tmp_path, "\n".join(lines)))
    assert "kWh" in analysis.said_of_energy(0.3)


@pytest.mark.parametrize("metric", ["val_loss", "accuracy", "perplexity"])
def test_another_metric_is_refused(tmp_path, metric):
    refused_file = tmp_path / "other.tsv"
    refused_file.write_text(OTHER.replace("val_bpb", metric))
    refused(refused_file, tmp_path / "home", f"its scores are {metric}: only validation bits per byte")


def test_a_ledger_of_only_crashes_is_imported_as_such(tmp_path):
    lines = OTHER.split("\n")
    path = tmp_path / "crashes.tsv"
    path.write_text("\n".join([lines[0], lines[2].replace("exp1", "exp0"), lines[2], ""]))
    there = imported(path, tmp_path / "home")
    record = sources.read(there)
    assert [e.status for e in record.state.experiments.values()] == ["crash", "crash"] and record.state.best is None
    assert "every row" in " ".join(record.started.notes)


def test_a_ledger_without_a_status_or_rows_is_refused(tmp_path):
    path = tmp_path / "other.tsv"
    path.write_text(OTHER.split("\n")[0] + "\n")
    refused(path, tmp_path / "home", "has no rows", "a-1gb")
    path.write_text(OTHER.replace("\tstatus\t", "\tverdict\t"))
    refused(path, tmp_path / "home", "is not a ledger", "a-1gb")
