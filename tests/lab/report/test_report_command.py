"""The command: from a session, an export or a ledger to files, and nothing overwritten that is somebody else's."""

import subprocess
import sys
from pathlib import Path

import exports
import pytest
import sessions
from report_records import session as made_up
from sessions import attempt, edited

from lab import __main__ as main
from lab.report import page as report
from lab.errors import LabError
from lab.session.session import Session
from lab.verdict.executor import supervise

ROOT = Path(__file__).resolve().parents[3]
LEDGER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + "".join(
    f"{line}\n"
    for line in (
        "aaaaaaa\t0.997900\t44.0\tkeep\tbaseline",
        "bbbbbbb\t0.986041\t43.9\tkeep\thalve batch",
        "ccccccc\t0.000000\t0.0\tcrash\tdouble depth",
        "ddddddd\t0.990000\t44.0\tdiscard\twarmup",
    )
)


@pytest.fixture(name="session")
def finished(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    supervise(session)
    for loss in (0.9, 1.3):
        attempt(session, edited(LOSS=loss), message=f"loss {loss}")
    return session


def contents(session):
    return {path: path.read_bytes() for path in session.folder.glob("*.*") if path.is_file()}


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "mar8.tsv"
    path.write_text(LEDGER)
    return path


def test_a_ledger_becomes_a_page_and_a_picture(ledger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["report", str(ledger), "--device", "nvidia-h100-80gb", "--png", "out/p.png"]) == 0
    assert capsys.readouterr().out.split() == ["report.html", "out/p.png"]
    page = (tmp_path / "report.html").read_text()
    assert "1.19 % better than the baseline" in page and "1 kept, 1 discarded, 1 crashed" in page
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(report.PNG)


def test_page_and_picture_are_two_files(tmp_path):
    with pytest.raises(LabError, match="different files"):
        report.write([made_up(3).record], tmp_path / "r", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path):
    page, picture = tmp_path / "r.html", tmp_path / "p.png"
    for count in (3, 12):
        report.write([made_up(count).record], page, picture)
    assert page.read_text().count('id="s0-e') == 13
    for other in (tmp_path / "train.py", tmp_path / "photo.png"):
        other.write_bytes(b"mine")
        with pytest.raises(LabError, match="was not written by this command"):
            report.write([made_up(3).record], *((other, None) if other.suffix == ".py" else (page, other)))
        assert other.read_bytes() == b"mine"
    assert page.read_text().count('id="s0-e') == 13  # nothing of a report that can't be written whole
    with pytest.raises(LabError, match="is a folder"):
        report.write([made_up(3).record], tmp_path)


def test_a_session_is_reported_in_its_repository_also_while_something_runs(session, monkeypatch, capsys):
    monkeypatch.chdir(session.repository.path)
    with session.lock, session.night_lock:
        before = contents(session)
        assert main.main(["report", "--out", "../r.html"]) == 0
        assert contents(session) == before
    assert "loss 0.9" in Path("../r.html").read_text() and "loss 1.3" in Path("../r.html").read_text()


def test_an_export_is_reported(tmp_path, monkeypatch, runner):
    session = exports.worked(tmp_path / "project")
    monkeypatch.chdir(session.repository.path)
    assert main.main(["export", str(tmp_path / "x.tar.gz")]) == 0
    assert main.main(["report", str(tmp_path / "x.tar.gz"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"{session.started.tag} on {session.started.device}" in page and "+++ b/train.py" in page


def test_an_agent_may_ask_for_it_in_its_turn(ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_TURN", "1")
    assert main.main(["report", str(ledger), "--device", "nvidia-h100-80gb"]) == 0


def test_without_a_session_it_says_what_to_name(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "lab" / "__main__.py"), "report"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "name a session" in done.stderr and not list(tmp_path.iterdir())


def test_there_is_nothing_to_draw_before_the_first_score(tmp_path, monkeypatch, capsys):
    session = sessions.make(tmp_path / "project")
    assert main.main(["report", str(session.folder), "--out", str(tmp_path / "r.html")]) == 0
    assert "No score yet" in (tmp_path / "r.html").read_text()
    assert main.main(["report", str(session.folder), "--png", str(tmp_path / "p.png")]) == 1
    assert "leave --png out" in capsys.readouterr().err
    assert Session(session.folder).state.oldest_open
