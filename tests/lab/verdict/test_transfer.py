"""The best against the baseline in another size, and a train.py of any origin against the baseline."""

import json

import pytest
import sessions
from sessions import attempt

from lab.cli import commands, render
from lab.cli.arguments import parsed
from lab.compare.analysis import Analysis
from lab.errors import LabError
from lab.session.record import Record
from lab.share import verify
from lab.share.summary import summary
from lab.share.reproduce import compared, told
from lab.session.events import Evidence, Verdict
from lab.reasons import because
from lab.verdict import executor, opening

SIZES = b"DEPTH = 2\nTOTAL_BATCH_SIZE = 4\nDEVICE_BATCH_SIZE = 2\n"


def better(loss: float) -> bytes:
    return (sessions.TRAIN + SIZES).replace(b"LOSS = 1.0", f"LOSS = {loss}".encode())


@pytest.fixture
def session(tmp_path, runner, monkeypatch):
    session = sessions.make(tmp_path / "project", train=sessions.TRAIN + SIZES)
    executor.supervise(session)
    monkeypatch.setattr("lab.genome.resize.rule.total_batch", lambda tokens: 2**11)
    attempt(session, better(0.9))
    assert session.state.best.number == 1
    return session


def carried(session, pairs=2, **more):
    with session.lock:
        opening.open_transfer(session, more.get("depth", 2), more.get("times", 1), pairs)
    executor.supervise(session)
    return session.state.last


def test_the_best_and_the_baseline_are_run_in_turn_at_twice_the_depth(session, runner):
    before, best = len(runner.runs), session.state.best
    found = carried(session)
    runs = [(content, seed) for content, seed, _ in runner.runs[before:]]
    assert len(runs) == 4 and len({seed for _, seed in runs}) == 2
    assert all(b"DEPTH = max(1, round(2 * (2)))" in content for content, _ in runs)
    assert [b"LOSS = 0.9" in content for content, _ in runs] == [True, False, False, True]
    assert found.verdict.confirmed and "the best at 2 times the depth" in found.verdict.said
    assert session.state.best is best and render.status_facts(session)["transfers"] == [found.verdict.said]
    assert "HOLDS" in render.block(session, found)
    listed = render.table(session.state.decided).splitlines()[-2:]
    assert [line.split()[2] for line in listed] == ["transfer"] * 2  # none of them was kept
    rows = sessions.rows_of(session.ledger)[-4:]
    assert {row["kind"] for row in rows} == {"transfer", "parent"} and {row["status"] for row in rows} == {"measured"}


def test_a_transfer_is_part_of_what_an_export_tells_and_checks(session):
    found = carried(session)
    record = Record(session.state, session.repository.content(session.state.baseline.blob))
    verify._check_trains(record)
    for experiment in session.state.experiments.values():
        verify._check_experiment(session.state, experiment)
    assert b"DEPTH = max(1, round(2 * (2)))" in record.train(found.number)
    assert f"transfer {found.number}: the best at 2 times the depth" in summary(record)


def test_each_kept_change_is_run_against_what_it_was_made_on(session, runner, monkeypatch):
    attempt(session, better(0.8).replace(b"NOISE", b"# a second change\nNOISE"))
    assert [kept.number for kept in session.state.kept] == [0, 1, 2]
    monkeypatch.setattr(commands, "launch", lambda session: None)
    monkeypatch.setattr(commands, "follow", lambda *_: 0)
    before = len(runner.runs)
    commands.do_transfer(session, parsed(["transfer", "--each", "--pairs", "2"]))
    executor.supervise(session)
    losses = [float(content.split(b"LOSS = ")[1].split()[0]) for content, *_ in runner.runs[before:]]
    assert sorted(losses) == [0.8, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0]
    assert all(b"round(2 * (2))" in content for content, *_ in runner.runs[before:])
    carried = [e.verdict for e in session.state.decided if e.kind == "transfer" and e.pairs]
    assert all(verdict.confirmed for verdict in carried) and len(carried) == 2
    assert "change 1 alone at 2 times the depth" in carried[0].said and "change 2 alone" in carried[1].said
    assert [verdict.gains["held_out_bpb"][0] for verdict in carried] == pytest.approx([0.1, 0.1], abs=0.01)
    record = Record(session.state, session.repository.content(session.state.baseline.blob))
    verify._check_trains(record)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_all_that_was_opened_is_waited_for_and_told(session, monkeypatch, capsys, more):
    attempt(session, better(0.8))
    with session.lock:
        opening.open_transfer(session, 2, 1, 2, True)
    monkeypatch.setattr(opening, "await_verdict", lambda session, *_: executor.supervise(session) or True)
    assert commands.follow(session, parsed(["wait", *more])) == 0
    said = capsys.readouterr().out
    assert "change 1 alone at 2 times the depth" in said and "change 2 alone at 2 times the depth" in said
    assert not more or [known["kind"] for known in json.loads(said)] == ["transfer"] * 2  # one document


def test_with_four_times_the_budget_alone_nothing_else_is_changed(session, runner):
    before = len(runner.runs)
    carried(session, depth=1, times=4)
    assert {budget for *_, budget in runner.runs[before:]} == {1200.0}
    assert all(b"round" not in content for content, *_ in runner.runs[before:])


def test_twice_the_depth_that_does_not_fit_is_said_and_judges_nothing(session, monkeypatch, runner):
    run = runner.run

    def too_large(request, **more):
        if b"round(2" in (request.folder / "train.py").read_bytes():
            reason = because("killed_for_memory", signal="SIGKILL")
            return sessions.SimpleNamespace(status="crash", reason=reason, result=None, seconds=1.0, traceback="")
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", too_large)
    best, found = session.state.best, carried(session)
    assert found.status == "crash" and "out of memory" in found.verdict.said and len(found.runs) == 1
    assert session.state.best is best and found.verdict.confirmed is None
    assert "transfer: the best at 2 times the depth: killed by SIGKILL" in render.status(session)
    carried(session)
    assert "experiments crashed" not in render.status(session)  # of changes none did


def test_one_change_that_cannot_be_resized_stops_all_before_anything_is_journaled(session):
    attempt(session, better(0.8) + b"DEPTH = 2\n")
    assert [kept.number for kept in session.state.kept] == [0, 1, 2]
    events = len(session.journal.events)
    with session.lock, pytest.raises(LabError, match="experiment 2 can't be run in another size.*DEPTH 2 times"):
        opening.open_transfer(session, 2, 1, 2, each=True)
    assert len(session.journal.events) == events and session.state.oldest_open is None


@pytest.mark.parametrize("sizes", [("--depth", "nan"), ("--times", "inf"), ("--depth", "-2")])
def test_sizes_that_make_no_sense_are_refused(sizes, capsys):
    with pytest.raises(SystemExit):
        parsed(["transfer", *sizes])
    assert f"{sizes[0]} has to be from 0.01 to 100" in capsys.readouterr().err


def test_the_same_size_is_none(session):
    with pytest.raises(LabError, match="--depth"):
        commands.do_transfer(session, parsed(["transfer", "--depth", "1"]))


def test_a_baseline_that_is_still_the_best_has_nothing_that_could_carry(tmp_path, runner, monkeypatch):
    session = sessions.make(tmp_path / "project", train=sessions.TRAIN + SIZES)
    executor.supervise(session)
    with pytest.raises(LabError, match="still the best"):
        commands.do_transfer(session, parsed(["transfer"]))


def test_a_file_is_confirmed_against_the_baseline(session, tmp_path, monkeypatch):
    path = tmp_path / "other.py"
    path.write_bytes(better(0.8))
    monkeypatch.setattr(commands, "launch", lambda session: None)
    monkeypatch.setattr(commands, "follow", lambda *_: 0)
    commands.do_confirm(session, parsed(["confirm", "--file", str(path), "--pairs", "2"]))
    executor.supervise(session)
    found = session.state.last
    assert found.verdict.confirmed and found.verdict.gains["held_out_bpb"][0] == pytest.approx(0.2, abs=0.01)
    analysis = Analysis(Record(session.state, session.repository.content(session.state.baseline.blob)))
    assert analysis.confirmation is None and analysis.confirmed is None  # of the best nothing was measured
    assert "\nconfirmation: the train.py of other.py: " in render.status(session)
    (crashing := tmp_path / "crashing.py").write_bytes(better(0.8) + b'FAILS = "crash"\n')
    commands.do_confirm(session, parsed(["confirm", "--file", str(crashing), "--pairs", "2"]))
    executor.supervise(session)
    assert session.state.last.status == "crash"
    assert "\nconfirmation: the train.py of other.py: " in render.status(session)  # a later failure hides nothing
    path.write_bytes(b"# only a comment\n" + session.repository.content(session.state.baseline.blob))
    with pytest.raises(LabError, match="other.py is the baseline's train.py, comments left aside"):
        commands.do_confirm(session, parsed(["confirm", "--file", str(path)]))
    path.write_bytes(better(0.8))
    assert (
        Record(session.state, session.repository.content(session.state.baseline.blob)).train(found.number)
        == path.read_bytes()
    )


def test_status_tells_the_confirmation_of_the_best_also_after_that_of_a_file(session, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "launch", lambda session: None)
    monkeypatch.setattr(commands, "follow", lambda *_: 0)
    (tmp_path / "other.py").write_bytes(better(0.8))
    for more in ([], ["--file", str(tmp_path / "other.py")]):
        commands.do_confirm(session, parsed(["confirm", "--pairs", "2", *more]))
        executor.supervise(session)
    said = session.state.said_of(session.state.confirmation)
    assert session.state.last.came_to != said == render.status_facts(session)["confirmation"]


def test_an_interrupted_experiment_is_finished_first_and_that_is_said(session, monkeypatch):
    (session.repository.path / "train.py").write_bytes(better(0.8))
    with opening.exclusive(session):
        opening.open_change(session, "a better one", False, False)
    monkeypatch.setattr(commands, "launch", lambda session: None)
    monkeypatch.setattr(commands, "follow", lambda *_: 0)
    options = parsed(["confirm", "--pairs", "2"])
    assert commands.do_confirm(session, options) == commands.ANOTHER
    assert "experiment 2 had been interrupted" in options.note and session.state.last.number == 2
    executor.supervise(session)
    again = parsed(["confirm", "--pairs", "2"])
    commands.do_confirm(session, again)
    assert session.state.last.kind == "confirm" and not hasattr(again, "note")
    other = parsed(["confirm", "--times", "4"])
    assert commands.do_confirm(session, other) == 0
    assert other.note == (
        f"experiment {session.state.last.number} (confirm) had been interrupted, and was finished. If you asked for "
        "something else, run the command again"
    )


@pytest.mark.parametrize(
    "gain, low, high, stands",
    [(0.1, 0.05, 0.15, True), (-0.1, -0.15, -0.05, False), (0.01, -0.02, 0.04, None)],
)
def test_a_claim_stands_or_not_or_is_open(gain, low, high, stands):
    claimed = Verdict("keep", because("baseline"), evidence=Evidence(gain=0.1, error=0.01, low=0.08, high=0.12))
    gains = {"val_bpb": (gain, low, high), "held_out_bpb": (gain, low, high)}
    found = compared(claimed, Verdict("keep", because("baseline"), gains=gains))
    assert found["stands"] is stands and "claimed" in told(found | {"change": "d/t #1"})
    crashed = compared(claimed, Verdict("crash", because("no_weights")))
    assert crashed["stands"] is None and "no weights" in told(crashed | {"change": "d/t #1"})
