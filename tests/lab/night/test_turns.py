"""Several turns of the agent at once."""

import shlex
import sys
import threading
import time
from pathlib import Path

import pytest
import sessions
from nights import sound
from sessions import check, edited
from test_loop import Seen, options

from lab.errors import LabError
from lab.night import agent, limits, loop
from lab.night.turns import Turns
from lab.session.events import TurnTaken
from lab.session.session import Session

Going = type("Going", (), {"is_alive": lambda self: True})  # in place of a thread
STUB = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('stub_agent.py')))}"


@pytest.fixture
def session(tmp_path, runner, at_once):
    return sessions.make(tmp_path / "project")


@pytest.fixture
def thinking(monkeypatch):
    """In place of turns: each makes another edit. The first ones go on until there are as many as may be; all end in
    the order in which they began. How many went on at once, and the prompts."""
    at_once, going, made, guard = [], [], [], threading.Lock()

    def take_turn(session, command, prompt, log, seconds, stop=lambda: False):
        with guard:
            made.append(prompt)
            going.append(number := len(made))
            at_once.append(len(going))
        most, deadline = int(prompt.rstrip(".\n").split(" of ")[-1]), time.monotonic() + 5
        while (max(at_once) < most or number > min(going)) and time.monotonic() < deadline:
            time.sleep(0.005)
        blob = session.repository.store(edited(LOSS=1.0 + 0.01 * number))
        with guard:
            going.remove(number)
        if command == "failing":
            raise LabError("git is in use")
        return TurnTaken(by="agent", outcome="edited", description=f"idea {number}", blob=blob)

    monkeypatch.setattr(agent, "take_turn", take_turn)
    return at_once, made


def night(session, **values):
    one = loop.Night(Session(session.folder), options(**values), Seen())
    return one, one.run()


def test_as_many_turns_go_on_as_were_asked_for(session, thinking):
    at_once, made = thinking
    one, why = night(session, agent="quick", agents=3, max_experiments=8)
    assert why == "8 experiments, as many as --max-experiments allows" and max(at_once) == 3
    state = Session(session.folder).state
    assert len({e.digest for e in state.experiments.values()}) == 9
    assert [turn.experiment for turn in one.turns] == list(range(1, 9))
    assert "number 1 of 3" in made[0] and "number 2 of 3" in made[1]
    sound(Session(session.folder))
    check(Session(session.folder))


def test_what_was_made_on_an_older_best_is_made_on_the_best(session, thinking, monkeypatch):
    """The first edit is kept; the others were begun before."""
    real = agent.take_turn

    def take_turn(session, *arguments, **named):
        turn = real(session, *arguments, **named)
        number = int(turn.description.split()[1])
        content = edited(LOSS=0.9) if number == 1 else edited() + f"LOSS = LOSS + 0.01 * {number}\n".encode()
        if session.state.best.number:
            content = session.repository.content(session.state.best.blob) + f"LOSS = LOSS + 0.1 * {number}\n".encode()
        turn.blob = session.repository.store(content)
        while number == 2 and len(Session(session.folder).state.experiments) < 2:  # the first edit is run first
            time.sleep(0.005)
        return turn

    monkeypatch.setattr(agent, "take_turn", take_turn)
    night(session, agent="quick", agents=2, max_experiments=4)
    state = Session(session.folder).state
    assert state.best.number == 1
    for experiment in list(state.experiments.values())[2:]:
        assert experiment.onto == 1
        assert session.repository.content(experiment.blob).startswith(edited(LOSS=0.9))
    check(Session(session.folder))


def test_a_turn_that_can_not_be_begun_is_tried_again_and_ends_the_night(session, thinking):
    with pytest.raises(LabError, match="git is in use"):
        night(session, agent="failing", agents=2, max_experiments=2)


def test_no_turn_begins_whose_edit_could_not_be_run(session, monkeypatch):
    night(session, max_experiments=0)
    begun = []
    monkeypatch.setattr(
        Turns, "begin", lambda self, slot, *_: begun.append(slot) or self._going.update({slot: Going()})
    )
    last = loop.Night(Session(session.folder), options(agent="x", agents=2, max_experiments=0), Seen())
    last._think()
    late = loop.Night(Session(session.folder), options(agent="x", agents=2, hours=1.0, max_experiments=None), Seen())
    late.now.deadline = time.time() + late._run_takes() + 30  # enough for a run, and not for a turn before it
    late.now.phase = loop.THINKING
    late._think()
    assert begun == [] and late._enough() and not late._turns.under_way
    late.now.deadline += 60
    late._think()
    assert begun == [1, 2] and late._turns.under_way
    late.now.deadline -= 60
    assert not late._enough()  # as a turn is under way


def test_while_agents_think_the_night_looks_around_now_and_then(session, monkeypatch):
    night(session, max_experiments=0)
    monkeypatch.setattr(Turns, "begin", lambda self, slot, *_: self._going.update({slot: Going()}))
    one = loop.Night(Session(session.folder), options(agent="x", agents=2, max_experiments=1), Seen())
    looks, seen = [], []
    monkeypatch.setattr(limits, "troubles", lambda session: looks.append("troubles") or [])
    monkeypatch.setattr(loop.near_misses, "ready", lambda session: looks.append("near misses"))

    def update(now):
        seen.append(now.phase)
        if seen.count(loop.THINKING) == 20:
            one._turns._going.clear()
            blob = session.repository.store(edited(LOSS=0.9))
            one._turns.ended.append(TurnTaken(by="agent", outcome="edited", description="the idea", blob=blob))
        elif len(seen) == 10:
            one._looked -= loop.LOOK_EVERY

    monkeypatch.setattr(one.view, "update", update)
    while not one.session.state.open:
        one._between()
        one._go_on()
    assert looks == 2 * ["troubles", "near misses"] and one.session.state.last.description == "the idea"


def test_real_turns_leave_nothing_behind(session):
    one, why = night(session, agent=STUB, agents=2, max_experiments=3)
    assert "as many as --max-experiments allows" in why and all(turn.outcome == "edited" for turn in one.turns)
    assert not list(session.folder.glob("turn")) and not list(session.folder.glob("turn-*"))
    check(Session(session.folder))
