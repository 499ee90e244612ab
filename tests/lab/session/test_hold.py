"""Pausing: nothing uses the device until it is resumed, what ran is done again, and a night keeps others out."""

import json
import random
import signal
import threading
import time

import psutil
import pytest
import sessions
from sessions import check, edited, options, said
from test_kill import LONGEST, WHO, Night, project  # noqa: F401 (a fixture)

from lab.cli import commands, render
from lab.run import runner
from lab.verdict import executor, opening
from lab.verdict.plan import MOST_LOST
from lab.cli.arguments import parser
from lab.errors import LabError
from lab.reasons import because
from lab.run.outcome import Outcome
from lab.run.runner import Halted
from lab.session.session import Session


@pytest.fixture(name="quick")
def with_a_baseline(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


def begin(session, content=None):
    (session.repository.path / "train.py").write_bytes(content or edited(LOSS=0.9))
    with opening.exclusive(session):
        assert opening.open_change(session, "m") is None


def halting(session, monkeypatch, name, times=1):
    """Makes the runner's run or score find, at its first calls, that it is to end: the session is paused during it."""
    real, left = getattr(runner, name), [times]

    def halted(request, *more):
        if left[0]:
            left[0] -= 1
            Session(session.folder).hold("paused", now=True)
            if name == "run":
                return Outcome("lost", because(request.ending()))
            raise Halted(request.ending())
        return real(request, *more)

    monkeypatch.setattr(runner, name, halted)


# --- The file ---


def test_a_hold_is_read_as_it_was_written_and_released_for_good(quick):
    assert quick.held is None and quick.ending() is None
    quick.hold("stopped", now=False)
    assert Session(quick.folder).held == {"why": "stopped", "now": False} and quick.ending() is None
    quick.hold("paused", now=True)
    assert quick.ending() == "paused"
    quick.release()
    quick.release()
    assert quick.held is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"why": "x\\u001b", "now": "yes"}'])
def test_a_damaged_hold_holds_and_ends_no_run(quick, content):
    (quick.folder / "hold.json").write_bytes(content)
    assert quick.held == {"why": "paused", "now": False} and quick.ending() is None


# --- The supervisor ---


def test_held_it_begins_nothing_and_goes_on_after_release(quick, runner):
    begin(quick)
    quick.hold("paused", now=False)
    before = len(runner.runs)
    executor.supervise(quick)
    assert len(runner.runs) == before and quick.state.oldest_open
    quick.release()
    executor.supervise(quick)
    assert quick.state.last.status == "keep"
    check(quick)


def held_meanwhile(session, runner, monkeypatch, why):
    """Has the session held, after the run, as soon as one has begun."""
    real = runner.run

    def run(request):
        Session(session.folder).hold(why, now=False)
        return real(request)

    monkeypatch.setattr("lab.run.runner.run", run)


def test_after_a_run_it_ends_and_no_run_is_lost(quick, runner, monkeypatch):
    begin(quick)
    held_meanwhile(quick, runner, monkeypatch, "paused")
    executor.supervise(quick)
    assert [run.status for run in quick.state.oldest_open.runs] == ["ok"]


def test_what_needs_no_device_is_done_while_held(quick, runner, monkeypatch):
    begin(quick, edited(LOSS=1.1))
    held_meanwhile(quick, runner, monkeypatch, "stopped")
    executor.supervise(quick)
    assert quick.state.last.status == "discard" and quick.held
    check(quick)


def test_a_run_that_was_ended_is_done_again_with_its_seed_and_counts_for_nothing(quick, runner, monkeypatch):
    begin(quick)
    ended = MOST_LOST + 2
    halting(quick, monkeypatch, "run", times=ended)
    for _ in range(ended):
        executor.supervise(quick)
        lost = quick.state.oldest_open.runs[-1]
        assert (lost.status, lost.reason.code) == ("lost", "paused")
        quick.release()
    executor.supervise(quick)
    runs = quick.state.last.own_runs
    assert {run.seed for run in runs[: ended + 1]} == {runs[0].seed} and runs[ended].status == "ok"
    assert quick.state.last.status == "keep" and len(render.facts(quick.state.last)["runs"]) < len(runs)
    check(quick)
    assert Session(quick.folder).state.last.verdict == quick.state.last.verdict


def test_a_score_that_was_ended_is_done_again(quick, runner, monkeypatch):
    begin(quick)
    halting(quick, monkeypatch, "score")
    executor.supervise(quick)
    assert quick.state.oldest_open and not any(run.scored for run in quick.state.oldest_open.runs)
    trained = len(runner.runs)
    quick.release()
    executor.supervise(quick)
    assert quick.state.last.status == "keep" and len(runner.runs) == trained
    check(quick)


def test_killed_before_it_noted_that_it_was_ended(quick, monkeypatch):
    begin(quick)
    with quick.lock:
        quick.start_run(quick.state.oldest_open, quick.state.oldest_open.blob, 1, 300.0)
    quick.hold("paused", now=True)
    with opening.exclusive(Session(quick.folder)):
        pass
    quick.refresh()
    assert quick.state.last.runs[-1].reason.code == "paused"


# --- A real process ---


@pytest.mark.parametrize("scoring", [False, True])
def test_a_process_ends_soon_and_nothing_of_it_is_left(request_for, scoring):
    if scoring:
        assert runner.run(request_for()).status == "ok"
    begun, reasons = [], []

    def ending():
        begun.append(time.monotonic())
        return reasons[0] if reasons else None

    asked = request_for({"LEARNING = 0.9": "time.sleep(20)\nLEARNING = 0.9"}, ending=ending)
    threading.Timer(1.0, lambda: reasons.append("stopped")).start()
    if scoring:
        with pytest.raises(Halted, match="^stopped$"):
            runner.score(asked, asked.folder / "result.safetensors")
    else:
        assert runner.run(asked) == Outcome("lost", because("stopped"))
    assert begun[-1] - begun[0] < 15
    assert runner.end(asked.run_id) == 0
    assert scoring == (asked.folder / "result.safetensors").exists()


# --- The commands ---


def test_while_paused_the_commands_say_what_to_do(quick, capsys):
    begin(quick)
    assert "nothing is running; experiment 1 is left as it is" in said(
        capsys, commands.do_pause, quick, after_run=False
    )
    for command in (commands.do_run, commands.do_confirm, commands.do_wait):
        with pytest.raises(LabError, match="paused.*lab resume"):
            command(quick, options(pairs=2, times=1))
    assert "paused" in said(capsys, commands.do_status, quick)
    assert "was interrupted" not in said(capsys, commands.do_status, quick)
    assert json.loads(said(capsys, commands.do_status, quick, json=True))["held"] == {"why": "paused", "now": True}


def test_who_waits_is_told_of_the_pause(quick):
    begin(quick)
    quick.hold("paused", now=True)
    with pytest.raises(LabError, match="lab resume"):
        commands.follow(quick, options())


def test_resume_launches_what_is_pending_unless_a_night_does(quick, capsys, monkeypatch):
    launched = []
    monkeypatch.setattr(commands, "launch", lambda session: launched.append(session.name))
    assert "not paused: nothing is running" in said(capsys, commands.do_resume, quick)
    quick.hold("paused", now=True)
    assert "resumed: nothing is running" in said(capsys, commands.do_resume, quick)
    begin(quick)
    quick.hold("paused", now=True)
    with Session(quick.folder).night_lock:
        assert "the night continues" in said(capsys, commands.do_resume, quick)
    assert not launched and quick.held is None
    quick.hold("stopped", now=True)
    assert "experiment 1 continues" in said(capsys, commands.do_resume, quick)
    assert launched == [quick.name] and quick.held is None


def test_a_pause_after_the_run_lets_it_go_on(quick, capsys):
    begin(quick)
    with quick.lock:
        quick.start_run(quick.state.oldest_open, quick.state.oldest_open.blob, 1, 300.0)
        other = Session(quick.folder)
        text = said(capsys, commands.do_pause, other, after_run=True)
    assert "is ending" in text and "lab resume" in text and other.held == {"why": "paused", "now": False}


def test_a_pause_waits_until_the_run_has_ended(quick, runner, capsys, monkeypatch):
    begin(quick)
    begun = threading.Event()

    def lasting(request):
        begun.set()
        while not (why := request.ending()):
            time.sleep(0.01)
        return Outcome("lost", because(why))

    monkeypatch.setattr("lab.run.runner.run", lasting)
    supervisor = threading.Thread(target=lambda: executor.supervise(Session(quick.folder)))
    supervisor.start()
    assert begun.wait(20)
    text = said(capsys, commands.do_pause, quick, after_run=False)
    supervisor.join(20)
    assert "was ended, and is repeated later. The device is free" in text


def test_a_night_keeps_others_out(quick, capsys):
    assert not quick.owned_by_night
    with quick.night_lock:
        other = Session(quick.folder)
        assert quick.owned_by_night and other.owned_by_night
        for command in (commands.do_run, commands.do_confirm):
            with pytest.raises(LabError, match="a night is running this session.*ends its turn"):
                command(other, options(pairs=2, times=1, message="m", near_misses=False, again=False))
        assert "a night is running" in said(capsys, commands.do_status, other)
        assert "nothing was running" in said(capsys, commands.do_pause, other, after_run=False)
    assert not quick.owned_by_night


def test_the_parser_knows_them():
    assert parser().parse_args(["pause", "--after-run"]).after_run is True
    assert parser().parse_args(["pause"]).after_run is False and parser().parse_args(["resume"]).command == "resume"


# --- Kills ---


def under_way(session) -> bool:
    session.refresh()
    return any(run.status is None for run in session.state.last.runs)


def paused_and_killed(session, home, times, seed):
    """An experiment is begun, paused at a random moment, somebody killed at another, resumed: as without all that."""
    rng = random.Random(seed)
    night, lost = Night(session, home, rng), 0
    night.finish()
    for _ in range(times):
        night.train.write_bytes(night.edit())
        content, taken = night.train.read_bytes(), len(Session(session.folder).state.experiments)
        command = night.command("run", "-m", f"edit {night.edits}", "--wait", "60")
        if rng.random() < 0.5:  # while a run is under way
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not under_way(session):
                time.sleep(0.02)
            session.hold("paused", now=True)
            pause = night.command("status")
        else:
            time.sleep(rng.uniform(0, LONGEST))
            pause = night.command("pause", *rng.choice([(), ("--after-run",)]))
        time.sleep(rng.uniform(0, 1.5))
        who = rng.choice([*WHO, "pause", "nobody"])
        victims = {"pause": lambda: [psutil.Process(pause.pid)], "nobody": list}
        for process in victims.get(who, lambda: night.processes(who, command))():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        command.communicate(timeout=120)
        pause.communicate(timeout=120)
        resume = night.command("resume")
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 1))
            resume.kill()
            resume.communicate()
            resume = night.command("resume")
        assert "resumed" in (text := resume.communicate(timeout=60)[0]) or "not paused" in text
        night.finish()
        after = Session(session.folder)
        if len(after.state.experiments) == taken:  # paused or killed before it was taken
            assert night.train.read_bytes() == content
            night.train.write_bytes(after.repository.content(after.state.best.blob))
        check(after)
        assert after.held is None
        lost += sum(run.reason is not None and run.reason.code == "paused" for run in after.state.last.runs)
    return lost


def test_killed_around_a_pause(project, isolated_home):  # noqa: F811
    paused_and_killed(project, isolated_home, 1, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 22))
def test_killed_around_many_pauses(project, isolated_home, seed):  # noqa: F811
    assert paused_and_killed(project, isolated_home, 30, seed) > 3
