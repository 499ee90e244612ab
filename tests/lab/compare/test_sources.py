"""A session is read the same wherever it is kept."""

import argparse
import dataclasses
import json
import shutil
import subprocess

import pytest
import sessions
from test_experiment import attempt, edited

from lab import report
from lab.cli import commands
from lab.session import ledger
from lab.share import exchange, publish
from lab.verdict import executor as experiment
from lab.compare import comparison, show, sources
from lab.errors import LabError

ORIGINAL = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
a\t0.998000\t44.0\tkeep\tbaseline
b\t0.986000\t43.9\tkeep\thalve batch 524K to 262K (more steps in 5 min)
c\t0.987000\t60.2\tdiscard\tadd 5% warmup
d\t0.000000\t0.0\tcrash\tbatch 131K (assert fail)
e\t0.981000\t60.2\tkeep\twarmdown 0.5 to 0.7
"""


@pytest.fixture
def session(tmp_path, runner):
    """One with a keep, a discard, a crash, and a confirmation."""
    session = sessions.make(tmp_path / "project")
    experiment.supervise(session)
    attempt(session, edited(LOSS=0.9), message="LOSS down")
    attempt(session, edited(LOSS=0.95), message="LOSS up again")
    attempt(session, edited(LOSS=0.9, FAILS="crash"), message="a crash")
    with commands.exclusive(session):
        best = session.state.best
        session.begin(
            kind="confirm",
            blob=best.blob,
            parent=session.state.baseline.blob,
            onto=0,
            pairs=3,
            commit=best.applied["commit"],
            budget=session.budget,
            description=best.description,
        )
    experiment.supervise(session)
    attempt(session, edited(LOSS=0.8), message="LOSS further down")
    real = sessions.ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json"
    facts = json.loads(real.read_text()) | {"device": sessions.DEVICE, "backend": "fake"}  # one that can be exported
    (session.folder / "profile.json").write_text(json.dumps(facts))
    return session


def told(record):
    """What has to be the same in a session and in its export, which has fewer digits."""
    return {
        number: (
            c.parent,
            c.status,
            c.kind,
            c.description,
            c.patch,
            c.kinds,
            c.commit,
            c.near_miss,
            c.reason,
            [
                (t.run, t.seed, pytest.approx(t.bpb, abs=1e-6), t.eval, t.budget, t.confirms, t.beside, round(t.tokens))
                for t in c.trials
            ],
        )
        for number, c in record.changes.items()
    }


def test_a_session_of_ones_own(session):
    found = sources.read(session.name)
    assert [(c.number, c.parent, c.status) for c in found.changes.values()] == [
        (0, None, "keep"),
        (1, 0, "keep"),
        (2, 1, "discard"),
        (3, 1, "crash"),
        (5, 1, "keep"),
    ]
    assert found.name == session.name and found.tagged and found.budget == 300.0 and found.noise == session.noise
    assert found.rows == len(ledger.read(session.ledger).rows)
    baseline, best = found.changes[0], found.changes[1]
    assert [t.confirms for t in baseline.trials].count(True) == 3 == [t.confirms for t in best.trials].count(True)
    assert {t.beside for t in best.trials if t.confirms} == {4} and best.trials[0].flops is None
    assert "-LOSS = 1.0\n+LOSS = 0.9" in best.text and best.key == best.patch
    assert found.confirmation.startswith("on held-out rows and 3 new seeds")
    assert sources.read(session.folder) == found
    assert sources.read(session.branch) == found


@pytest.mark.parametrize("suffix", ["", ".tar.gz"])
def test_an_export_tells_the_same(session, tmp_path, suffix, isolated_home):
    target = tmp_path / f"out{suffix}"
    commands.do_export(session, argparse.Namespace(target=target, publish=False, replace=False))
    own, found = sources.read(session.name), sources.read(target)
    assert told(found) == told(own)
    assert found.confirmation[:60] == own.confirmation[:60] and found.rows == own.rows
    assert found.hours == pytest.approx(own.hours, abs=0.01) and found.device == own.device
    assert [c.text is None for c in found.changes.values()] == [c.text is None for c in own.changes.values()]
    if not suffix:  # imported where the session itself is not known
        exchange.import_session(target, isolated_home)
        shutil.rmtree(session.folder)
        assert told(sources.read(own.name)) == told(own)


def test_an_export_of_the_first_format_tells_the_same_of_what_it_has(session):
    bundle = publish.bundle_of(session)
    own, found = sources.of_bundle(bundle), sources.of_bundle(dataclasses.replace(bundle, changes=[]))
    assert found.changes.keys() == own.changes.keys()
    for number, change in own.changes.items():
        other = found.changes[number]
        assert (other.parent, other.status, other.trials, other.patch) == (
            change.parent,
            change.status,
            change.trials,
            change.patch,
        )


def test_a_published_branch_is_read_without_being_checked_out(session, monkeypatch):
    branch, _ = publish.publish(session)
    own = sources.of_bundle(publish.bundle_of(session))
    monkeypatch.chdir(session.tree.path)
    before = sessions.git(session.tree.path, "status", "--porcelain", "--branch")
    assert told(sources.read(branch)) == told(own)
    assert sessions.git(session.tree.path, "status", "--porcelain", "--branch") == before


def test_the_originals_ledger(tmp_path):
    path = tmp_path / "mar8.tsv"
    path.write_text(ORIGINAL)
    found = sources.read(path, "nvidia-h100-80gb")
    assert not found.tagged and found.noise is None and found.rows == 5 and found.hours is None
    assert [(c.parent, c.status, len(c.trials)) for c in found.changes.values()] == [
        (None, "keep", 1),
        (0, "keep", 1),
        (1, "discard", 1),
        (1, "crash", 0),
        (1, "keep", 1),
    ]
    assert [c.kinds for c in found.changes.values()] == [(), ("batch",), ("schedule",), ("batch",), ("schedule",)]
    assert "unconfirmed" in found.notes[-1]


@pytest.mark.parametrize(
    "odd",
    [
        {"eval": "\x1b[2J\u202e", "backend": "\x1b]0;owned\x07"},
        {"reason": "trial of 1.2.3 s; x"},
        {"reason": "trial of 0 s; x"},
        {"reason": "trial of 1e+999 s; x"},
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
        {"started": "0001-01-01T00:00:00Z"},
    ],
)
def test_odd_figures_and_words_of_a_ledger_break_nothing(tmp_path, odd):
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
        usual | {"commit": commit, "run": str(run), "seed": str(run), "parent": "a" * (commit != "a")} | odd
        for run, commit in enumerate("aab")
    ]
    path = tmp_path / "odd.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in (ledger.COLUMNS, *map(dict.values, rows))))
    found = sources.read(path)
    text = show.text(comparison.compare([found]))
    assert text.replace("\n", "").isprintable()
    json.dumps(comparison.compare([found]).facts(), allow_nan=False)
    report.write([found], tmp_path / "r.html")
    assert found.budget == 300.0 and found.hours is not None


def test_devices_are_given_in_order_to_those_ledgers_that_need_one(tmp_path, session):
    for name in ("one.tsv", "two.tsv"):
        (tmp_path / name).write_text(ORIGINAL)
    names = [str(tmp_path / "one.tsv"), str(session.ledger), str(tmp_path / "two.tsv")]
    found = sources.read_all(names, ["nvidia-h100-80gb", "apple-m4-16gb"])
    assert [one.device for one in found] == ["nvidia-h100-80gb", sessions.DEVICE, "apple-m4-16gb"]
    with pytest.raises(LabError, match="--device"):
        sources.read_all(names, ["nvidia-h100-80gb"])
    with pytest.raises(LabError, match="is of none of these"):
        sources.read_all([names[1]], ["nvidia-h100-80gb"])


def test_what_is_no_session_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "train.py").write_text("x = 1\n")
    for name in ("nowhere", "a/b", "~nobody-of-this-name/x", "exp/a/b", str(tmp_path / "no.tar.gz")):
        with pytest.raises(LabError, match="there is no"):
            sources.read(name)


def test_somebody_elses_working_folder_is_refused_before_its_repository_is_looked_at(session, tmp_path, monkeypatch):
    shutil.copytree(session.folder, tmp_path / "sent")
    monkeypatch.setattr("lab.session.repository.Tree.contents", lambda *_: pytest.fail("git was run there"))
    for read in (sources.read, publish.find):
        with pytest.raises(LabError, match="working folder, and not under .*lab export"):
            read(str(tmp_path / "sent"))


def test_the_repository_may_be_gone(session):
    shutil.rmtree(session.tree.path)
    found = sources.read(session.folder)
    assert found.changes[1].text is None and found.changes[1].trials


def test_runs_of_another_length_are_noted(session):
    with commands.exclusive(session):
        best = session.state.best
        session.begin(
            kind="confirm",
            blob=best.blob,
            parent=session.state.baseline.blob,
            onto=0,
            pairs=2,
            commit=best.applied["commit"],
            budget=1200.0,
            description=best.description,
        )
    experiment.supervise(session)
    assert sources.read(session.name).notes == ["4 runs of 1200 s instead of 300 s are left out"]


def test_reading_changes_nothing(session):
    with session.lock, session.night_lock:
        before = {path: path.read_bytes() for path in session.folder.rglob("*") if path.is_file()}
        sources.read(session.name)
        assert {path: path.read_bytes() for path in session.folder.rglob("*") if path.is_file()} == before
