"""Ledgers of which nothing else is known: the original's five columns, and ours, as sessions."""

import gzip
import json

import pytest
from exports import begun, confirm, contents, imported, refused, replayed
from sessions import DEVICE

from lab.errors import LabError
from lab.session import ledger
from lab.share import archive, sources
from lab.share.archive import Wrong
from lab.share.ledgers import events_of

FIVE = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\nbaseline\t1.250000\t12.5\tkeep\tbaseline\n"
    "aaaa111\t0.000000\t0.0\tcrash\tC:\\new | odd\n"
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
    assert record.profile is None and record.base is None and record.started.budget is None
    assert imported(source, elsewhere, "nvidia-h100-80gb") == there
    source.write_text(FIVE + "bbbb222\t1.2\t1\tkeep\tmore\n")
    refused(source, elsewhere, "holds something else", "nvidia-h100-80gb")


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
    assert "unconfirmed" in record.notes[-1] and record.started.source == "ledger"
    assert [row["val_bpb"] for row in ledger.rows_of(record.state)] == [0.998, 0.986, 0.987, None, 0.981]


def test_statuses_that_this_project_does_not_know_are_told(tmp_path):
    path = tmp_path / "mar8.tsv"
    path.write_text(ORIGINAL.replace("\tkeep\t", "\tbaseline\t", 1).replace("\tkeep\t", "\tbest\t", 1))
    record = sources.read(path, "nvidia-h100-80gb")
    (told,) = [note for note in record.notes if "status" in note]
    assert told.startswith("2 rows of mar8.tsv") and "(baseline, best)" in told and "Write keep or discard" in told


def test_our_own_ledger_tells_what_the_session_does(session, tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_bytes(session.ledger.read_bytes())
    record, own = sources.read(path), session.state
    assert record.name == f"{DEVICE}/mine" and record.started.budget == 300.0 and not record.notes
    assert (record.started.backend, record.started.eval) == ("fake", "e" * 12)
    for number, experiment in own.experiments.items():
        there = record.state.experiments[number]
        assert (there.status, there.kind, there.onto, there.change, there.family, there.description) == (
            experiment.status,
            experiment.kind,
            experiment.onto,
            experiment.change,
            experiment.family,
            experiment.description,
        )
        assert [(run.number, run.seed, run.status, run.time) for run in there.runs] == [
            (run.number, run.seed, run.status, int(run.time)) for run in experiment.runs
        ]
        assert record.state.mean(there) == (own.mean(experiment) and pytest.approx(own.mean(experiment), abs=1e-6))
    assert record.state.best.number == own.best.number
    assert ledger.dumps(ledger.rows_of(record.state)) == path.read_bytes()  # nothing of it was lost
    with pytest.raises(LabError, match=f"rows are of {DEVICE}, not of other-1gb"):
        sources.read(path, "other-1gb")


def test_parents_run_again_and_confirmations_are_read_from_our_ledger(session, sent, tmp_path, capsys):
    other = begun(tmp_path / "other", tag="other")
    replayed(other, sent, capsys, runs=5)
    replayed(other, sent, capsys, runs=6)
    replayed(other, sent, capsys, stack=True)
    confirm(other)
    path = tmp_path / "other.tsv"
    path.write_bytes(other.ledger.read_bytes())
    record = sources.read(path)
    assert ledger.dumps(ledger.rows_of(record.state)) == path.read_bytes()
    for number, experiment in other.state.experiments.items():
        there = record.state.experiments[number]
        assert (there.kind, there.origin, there.onto) == (experiment.kind, experiment.origin, experiment.onto)
        assert [(run.number, run.seed, run.blob == there.blob) for run in there.runs] == [
            (run.number, run.seed, run.blob == experiment.blob) for run in experiment.runs
        ]
        if experiment.kind == "replay":  # a stacked change is another commit than the replay of it, of the same file
            assert record.state.results(there.blob) == pytest.approx(other.state.results(experiment.blob), abs=1e-6)
    (confirmation,) = [e for e in record.state.decided if e.kind == "confirm"]
    assert confirmation.verdict.said.startswith("on held-out rows and 2 new seeds")


def test_what_of_a_ledger_can_not_be_read_is_told_and_kept(tmp_path):
    source, told = tmp_path / "r.tsv", []
    source.write_text(FIVE.split("\n", 1)[1] + "x\ty\n" * 7 + "aaaa")
    there = imported(source, tmp_path / "home", "a-1gb", told.append)
    assert told[0] == "r.tsv does not name its columns; they are taken for commit val_bpb memory_gb status description"
    assert told[1] == "r.tsv, line 3, was set aside: it has 2 fields instead of 5: x y"
    assert len(told) == 8 and told[-2] == "so were 3 more lines of r.tsv"
    assert sources.read(there).notes == told  # they go along


def test_a_ledger_has_to_have_a_device_that_can_name_a_folder(tmp_path):
    source = tmp_path / "r.tsv"
    source.write_text(FIVE)
    refused(source, tmp_path / "home", "don't say which device .* --device nvidia-h100-80gb")
    for device in ("../x", "a/b", ".", "..", "a..b", "/x", "a b", "é", "x.lock", "a" * 99):
        refused(source, tmp_path / "home", "can't name a device", device)
    assert not (tmp_path / "home").exists()


def test_rows_of_several_devices_are_refused(session, tmp_path):
    path = tmp_path / "two.tsv"
    path.write_bytes(session.ledger.read_bytes().replace(DEVICE.encode(), b"b-1gb", 1))
    refused(path, tmp_path / "home", f"its rows are of b-1gb, {DEVICE}")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"hello\n", "is no ledger.*session is a results"),
        (b"", "holds no rows"),
        (FIVE.encode()[:55], "holds no rows"),
        (b"PK\x03\x04zip\n", "is no ledger"),
        (b"\x1f\x8b but no archive", "no sound .tar.gz"),
        (gzip.compress(b"text"), "no sound .tar.gz"),
    ],
)
def test_other_files_are_refused(tmp_path, content, match):
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", tmp_path / "home", match)


def test_what_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "home", "there is no session")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "home", "MANIFEST.json is missing")


@pytest.mark.parametrize(
    "odd",
    [
        {"eval": "\x1b[2J\u202e", "backend": "\x1b]0;owned\x07"},
        {"val_bpb": "-1"},
        {"val_bpb": "1e308"},
        {"tokens_M": "1e308"},
        {"tokens_M": "-5"},
        {"total_seconds": "0"},
        {"total_seconds": "1e308"},
        {"mfu": "1e308"},
        {"memory_gb": "1e308"},
        {"tok_per_s": "1e-300"},
        {"tflops": "1e300"},
        {"seed": "-5"},
        {"seed": "9" * 30},
        {"budget": "0"},
        {"started": "0001-01-01T00:00:00Z"},
        {"started": "9999-12-31T23:59:59Z"},
        {"change": "../x", "family": "\u202e", "origin": "a/b", "portable": "?", "kind": "?"},
        {"commit": "--all"},
        {"description": "x" * 9000, "reason": "{facts}" + "y" * 9000},
        {"status": "skip"},
    ],
)
@pytest.mark.parametrize("numbered", [True, False])
def test_odd_figures_and_words_break_nothing(tmp_path, odd, numbered):
    usual = dict.fromkeys(ledger.COLUMNS, "") | {
        "val_bpb": "1.0",
        "memory_gb": "1.0",
        "status": "keep",
        "description": "d",
        "device": "d-1gb",
        "eval": "e" * 12,
        "tokens_M": "1",
        "tok_per_s": "10",
        "tflops": "1",
        "total_seconds": "330",
        "started": "2026-01-01T00:00:00Z",
    }
    rows = [
        usual
        | {"commit": "ab"[place > 1], "run": str(place), "seed": str(place), "parent": "a" * (place > 1)}
        | {"experiment": str(int(place > 1)) * numbered}
        | odd
        for place in range(3)
    ]
    path = tmp_path / "odd.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in (ledger.COLUMNS, *map(dict.values, rows))))
    record = sources.read(path)
    assert len(record.state.experiments) == (2 if numbered else 3) and len(record.state.runs) == 3
    files = archive.read(imported(path, tmp_path / "home"))
    text = b"".join(files.values()).decode()
    assert text.replace("\n", "").replace("\t", "").isprintable() and "1e308" not in text
    assert json.loads(files["journal.jsonl"].splitlines()[0])["device"] == "d-1gb"


@pytest.mark.parametrize(
    "odd, match",
    [
        ({"experiment": "1"}, "it has no baseline"),
        ({"run": "1"}, "starts run 1 twice"),
    ],
)
def test_our_own_ledger_has_to_hang_together(session, tmp_path, odd, match):
    content = ledger.read(session.ledger)
    path = tmp_path / "odd.tsv"
    path.write_bytes(ledger.dumps([row | {name: int(value) for name, value in odd.items()} for row in content.rows]))
    refused(path, tmp_path / "home", match)


def test_an_endless_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x.tsv", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(Wrong, match="too many for a results.tsv"):
        events_of(tmp_path / "x.tsv", "a-1gb")


def test_the_summary_of_a_ledger_lists_its_changes(tmp_path):
    (tmp_path / "mar8.tsv").write_text(ORIGINAL)
    text = contents(imported(tmp_path / "mar8.tsv", tmp_path / "home", "a-1gb"))["SUMMARY.md"].decode()
    assert "| 1 | halve batch 524K to 262K \\(more steps in 5 min\\) | batch |" in text and "lab replay" not in text
