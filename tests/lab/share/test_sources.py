"""A session is read the same wherever it is kept."""

import shutil
import subprocess

import pytest
from exports import ROOT, contents, imported
from sessions import DEVICE, TAG, attempt
from test_ledgers import ORIGINAL

from lab.errors import LabError
from lab.session import events
from lab.session.repository import Repository
from lab.share import export, sources
from lab.share.export import export_session


def told(record):
    """What a reader sees of a session."""
    return record.name, record.base, vars(record.state)


def test_a_session_of_ones_own(session):
    record = sources.read(session.name)
    assert record.name == f"{DEVICE}/{TAG}" and vars(record.state) == vars(session.state)
    assert record.base == session.repository.content(session.state.baseline.blob)
    assert told(sources.read(session.folder)) == told(sources.read(session.branch)) == told(record)


@pytest.mark.parametrize("ending", ["", ".tar.gz"])
def test_an_export_an_import_and_a_branch_tell_the_same(session, tmp_path, isolated_home, ending):
    attempt(session, session.repository.train() + b"MORE = 1\n", message="no path in it")
    for event in session.journal.events:  # there is one in another message
        if isinstance(event, events.ExperimentOpened):
            event.description = event.description.replace(str(tmp_path), "...")
    for experiment in session.state.experiments.values():
        experiment.description = experiment.description.replace(str(tmp_path), "...")
    own = sources.of_session(session)
    target = export_session(session, tmp_path / f"out{ending}")
    branch, _ = export.publish(session)
    assert told(sources.read(target)) == told(sources.read(branch)) == told(own)
    imported(target, isolated_home)
    shutil.rmtree(session.folder)  # where the session itself is not known
    assert told(sources.read(session.name)) == told(own)


def test_the_example_in_the_documents_is_read():
    folder = ROOT / "docs" / "example" / "session"
    record = sources.read(folder)
    best = record.state.best
    assert best is not None and best.number > 0
    assert f"{record.state.mean(best):.6f}" in (folder.parent / "README.md").read_text(encoding="utf-8")
    assert f"{record.state.mean(best):.6f}" in (folder.parent / "report.html").read_text(encoding="utf-8")


def test_a_session_at_work_is_read_as_far_as_it_has_come(session):
    best = session.state.best
    session.log(events.ExperimentOpened(number=5, kind="change", blob="a" * 40, parent=best.blob, onto=best.number))
    session.log(events.RunStarted(number=8, experiment=5, blob="a" * 40))
    with open(session.folder / "journal.jsonl", "ab") as file:
        file.write(b'{"event":"ran","run":8,"sta')  # being written, or cut short by a power failure
    state = sources.read(session.name).state
    assert [e.number for e in state.open] == [5] and state.runs[8].status is None and state.best.number == 4


def test_a_damaged_journal_is_said(session):
    path = session.folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][:20] + b"\n", *lines[4:]]))
    with pytest.raises(LabError, match="line 4 is damaged"):
        sources.read(session.name)
    path.write_bytes(b"".join([*lines, b'{"event":"zapped","time":1}\n']))
    with pytest.raises(LabError, match="unknown kind 'zapped'"):
        sources.read(session.name)


def test_reading_changes_nothing_and_takes_no_lock(session):
    with session.lock, session.night_lock:
        before = contents(session.folder)
        sources.read(session.name)
        assert contents(session.folder) == before


def test_the_repository_may_be_gone(session, monkeypatch):
    monkeypatch.chdir(session.folder)
    shutil.rmtree(session.repository.path)
    record = sources.read(session.folder)
    assert record.train(4).startswith(b"A = 0.1\n") and record.state.runs[4].ok


def test_devices_are_given_to_ledgers_in_order(tmp_path, sent):
    for name in ("one.tsv", "two.tsv"):
        (tmp_path / name).write_text(ORIGINAL)
    names = [str(tmp_path / "one.tsv"), str(sent), str(tmp_path / "two.tsv")]
    records = sources.read_all(names, ["nvidia-h100-80gb", "apple-m4-16gb"])
    assert [record.started.device for record in records] == ["nvidia-h100-80gb", DEVICE, "apple-m4-16gb"]
    with pytest.raises(LabError, match="--device"):
        sources.read_all(names, ["nvidia-h100-80gb"])
    with pytest.raises(LabError, match="belongs to none of these"):
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
    monkeypatch.setattr(Repository, "git", lambda *_: pytest.fail("git was run there"))
    with pytest.raises(LabError, match="working folder, and not under .*lab export"):
        sources.read(tmp_path / "sent")
