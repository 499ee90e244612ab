"""The loop: what is proposed, run and told, where it ends, and where one that was killed goes on."""

import argparse
import time
from types import SimpleNamespace

import pytest
import sessions
from sessions import Alive, edited

import storage
from lab.errors import LabError
from lab.fleet import settings
from lab.night import agent, limits, loop, notify, proposer
from lab.reasons import because
from lab.run.outcome import Outcome
from lab.session.session import Session
from lab.session.events import NIGHT_EVENTS, ExperimentDecided, NightEnded, TurnTaken, Verdict
from lab.verdict import executor
from lab.verdict.opening import facts_of_change, open_change
from lab.verdict.plan import MOST_LOST, orders


class Killed(BaseException):
    """In place of a signal: nothing that the loop could catch."""


class Seen:
    """In place of the view."""

    def __init__(self):
        self.lines, self.phases, self.at = [], [], {}

    def say(self, text):
        self.lines.append(text)

    def update(self, now):
        if now.phase not in self.phases:
            self.phases.append(now.phase)
        for phase, action in list(self.at.items()):
            if now.phase.startswith(phase):
                del self.at[phase]
                action()


@pytest.fixture
def session(tmp_path, runner, at_once):
    return sessions.make(tmp_path / "project")


@pytest.fixture
def proposals(monkeypatch):
    """What the proposer proposes, in turn; as many more as are asked for."""
    queue = []

    def propose(session, *_):
        number = session.state.last.number + 1
        content = queue.pop(0) if queue else edited(LOSS=1.0 + 0.01 * number)
        return proposer.Proposal(content, f"proposal {number}")

    monkeypatch.setattr(proposer, "propose", propose)
    return queue


def options(**values):
    return argparse.Namespace(
        **{
            "agent": None,
            "agents": 0,
            "scale": False,
            "findings": False,
            "offers": 0.1,
            "turn_seconds": 60.0,
            "hours": None,
            "until": None,
            "max_experiments": 3,
            "notify": None,
            "planned": None,
            **values,
        }
    )


def night(session, **values):
    return loop.Night(session, options(**values), Seen())


def statuses(session):
    return [(e.status, e.description) for e in Session(session.folder).state.experiments.values()]


def test_a_night_runs_the_baseline_and_as_many_experiments_as_were_wanted(session, proposals):
    proposals.append(edited(LOSS=0.9))
    one = night(session)
    assert one.run() == "3 experiments, as many as --max-experiments allows"
    assert statuses(session) == [
        ("keep", "baseline"),
        ("keep", "proposal 1"),
        ("discard", "proposal 2"),
        ("discard", "proposal 3"),
    ]
    assert [turn.experiment for turn in one.turns] == [1, 2, 3]
    assert any("keep" in line and "proposal 1" in line for line in one.view.lines)


def test_the_next_night_goes_on_with_the_session(session, proposals):
    night(session, max_experiments=1).run()
    night(session, max_experiments=2).run()
    assert len(statuses(session)) == 4


def test_a_night_that_was_killed_counts_on(session, proposals, monkeypatch):
    first = night(session, max_experiments=3)
    first.view.at["training"] = lambda: None
    calls = []

    def killed(session):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return Alive(session)

    monkeypatch.setattr(executor, "launch", killed)
    with pytest.raises(Killed):
        first.run()
    monkeypatch.setattr(executor, "launch", lambda session: Alive(session))
    second = night(Session(session.folder), max_experiments=3)
    assert (second.now.first, second.now.begun) == (first.now.first, first.now.begun)
    second.run()
    assert [what for _, what in statuses(session)] == ["baseline", "proposal 1", "proposal 2", "proposal 3"]


def test_the_time_that_is_left_has_to_do_for_a_run(session, proposals, monkeypatch):
    now = time.time()
    monkeypatch.setattr(limits, "deadline", lambda *_: now + 1.1 * session.budget)
    assert "not enough for another experiment" in night(session, hours=0.1).run()
    assert len(statuses(session)) == 1


def test_what_runs_at_the_deadline_is_ended_and_goes_on_the_next_night(session, proposals, monkeypatch):
    class Endless(Alive):
        def __init__(self, session):
            pass

        def poll(self):
            return None

    night(session, max_experiments=0).run()  # the baseline
    monkeypatch.setattr(executor, "launch", lambda session: Endless(session))
    one = night(session, max_experiments=2)
    one.view.at["training"] = lambda: setattr(one.now, "deadline", time.time())
    assert one.run() == "the time is up"
    assert Session(session.folder).state.oldest_open.number == 1 and session.held is None
    monkeypatch.setattr(executor, "launch", lambda session: Alive(session))
    night(Session(session.folder), max_experiments=1).run()
    assert [what for _, what in statuses(session)] == ["baseline", "proposal 1", "proposal 2"]


def test_a_pause_holds_the_night_until_it_is_resumed(session, proposals):
    one = night(session, max_experiments=1)
    session.hold("paused", now=True)
    one.view.at["paused"] = session.release
    one.run()
    assert any(phase.startswith("paused") for phase in one.view.phases) and len(statuses(session)) == 2


def test_a_pause_that_comes_while_the_night_ends_stays(session, proposals, monkeypatch):
    one = night(session, max_experiments=0)
    real = session.hold

    def hold(why, now):
        Session(session.folder).hold("paused", now=True)
        real(why, now)

    monkeypatch.setattr(session, "hold", hold)
    one.run()
    assert session.held == {"why": "paused", "now": True}


def test_a_pause_that_comes_while_the_night_checks_stays(session, monkeypatch):
    session.hold("stopped", now=False)
    one, branch = night(session), session.repository.branch()
    held, asked = Session(session.folder), []

    def supervised(_):
        if not asked:
            held.hold("paused", now=True)
        asked.append(1)
        return False

    monkeypatch.setattr(Session, "supervised", property(supervised))
    one._in_the_way()  # it has seen the night's own hold, and meanwhile comes the pause
    assert session.held["why"] == "paused" and one._in_the_way()[0] == "paused" and branch


def test_a_night_that_was_killed_as_it_ended_begins_nothing_more(session, proposals):
    night(session, max_experiments=0).run()
    session.hold("stopped", now=True)
    assert "as many as --max-experiments allows" in night(session, max_experiments=0).run()
    assert len(statuses(session)) == 1 and session.held is None


def test_where_train_py_is_a_link_it_stays_one(session, proposals, tmp_path):
    train, mine = session.repository.path / "train.py", tmp_path / "mine.py"
    train.rename(mine)
    train.symlink_to(mine)
    proposals.append(edited(LOSS=0.9))
    night(session, max_experiments=2).run()
    assert train.is_symlink() and mine.read_bytes() == edited(LOSS=0.9)


def test_a_hold_that_a_killed_night_left_is_taken_away(session, proposals):
    session.hold("stopped", now=True)
    night(session, max_experiments=1).run()
    assert len(statuses(session)) == 2 and session.held is None


def test_a_trouble_that_passes_is_waited_out(session, proposals, monkeypatch):
    hot = [limits.Trouble("hot", "the GPU has 97 degrees", "wait")]
    monkeypatch.setattr(limits, "troubles", lambda session: hot)
    monkeypatch.setattr(loop, "LOOK_AGAIN", 0.0)
    one = night(session, max_experiments=1)
    one.view.at["waiting"] = hot.clear
    one.run()
    assert one.view.lines[0] == "waiting: the GPU has 97 degrees" and len(statuses(session)) == 2


def test_what_the_last_run_leaves_for_a_moment_is_not_waited_for_aloud(session, proposals, monkeypatch):
    looks = [[limits.Trouble("taken", "another session is training", "wait")]]
    monkeypatch.setattr(limits, "troubles", lambda session: looks.pop() if looks else [])
    monkeypatch.setattr(loop, "LOOK_AGAIN", 0.2)
    one = night(session, max_experiments=1)
    one.run()
    assert not looks and not any(phase.startswith("waiting") for phase in one.view.phases)


def test_heat_that_stays_ends_the_night(session, proposals, monkeypatch):
    monkeypatch.setattr(limits, "troubles", lambda session: [limits.Trouble("hot", "it stays", "wait")])
    monkeypatch.setattr(loop, "LONGEST_WAIT", 0.0)
    assert night(session, max_experiments=1).run() == "the device stays too hot: it stays"
    assert len(statuses(session)) == 1


def test_a_busy_machine_is_told_once_and_not_waited_for(session, proposals, monkeypatch):
    busy = [limits.Trouble("busy", "another program uses the GPU", "say")]
    monkeypatch.setattr(limits, "troubles", lambda session: busy)
    monkeypatch.setattr(loop, "LOOK_EVERY", 0.0)
    one = night(session, max_experiments=1)
    one.run()
    assert len(statuses(session)) == 2 and not any(phase.startswith("waiting") for phase in one.view.phases)
    assert one.view.lines.count("another program uses the GPU: runs take longer, but train as much") == 1


def test_a_trouble_that_stops_is_told(session, proposals, monkeypatch):
    sent = []
    monkeypatch.setattr(notify, "send", lambda command, text, say: sent.append((command, text)))
    monkeypatch.setattr(limits, "troubles", lambda session: [limits.Trouble("disk", "0.1 GB are free", "stop")])
    assert night(session, notify="tell me").run() == "0.1 GB are free"
    assert sent[0][0] == "tell me" and "0.1 GB are free" in sent[0][1]


def test_a_new_best_and_the_morning_are_told(session, proposals, monkeypatch):
    sent = []
    monkeypatch.setattr(notify, "send", lambda command, text, say: sent.append(text))
    proposals.append(edited(LOSS=0.9))
    night(session, max_experiments=1, notify="x").run()
    assert ["new best 0.9" in sent[0], "in the morning" in sent[1]] == [True, True] and "1 kept" in sent[1]


def test_a_supervisor_that_fails_is_started_again_and_then_given_up(session, proposals, monkeypatch):
    starts = []

    def failing(session):
        starts.append(1)
        (session.folder / "supervisor.log").write_text("the disk is full\n")
        return SimpleNamespace(poll=lambda: 1)

    monkeypatch.setattr(executor, "launch", failing)
    one = night(session)
    with pytest.raises(LabError, match="the disk is full"):
        one.run()
    assert (
        len(starts) == 3
        and "tried again: the process that runs the experiments has ended: the disk" in one.view.lines[0]
    )


def test_a_disk_that_stays_full_ends_the_night_and_no_experiment(session, proposals, monkeypatch):
    proposals.append(edited(LOSS=0.9))
    with monkeypatch.context() as patch:
        patch.setattr("lab.run.runner.run", lambda request: Outcome("lost", because("disk_full")))
        one = night(session)
        with pytest.raises(LabError, match="free some space"):
            one.run()
    assert one.journal.events[-1].why.startswith("trouble: the disk of ") and session.state.last.decided is None
    executor.supervise(session)
    assert session.state.last.status == "keep"


def test_data_that_is_gone_ends_the_night_and_no_experiment(session, proposals, monkeypatch):
    proposals.append(edited(LOSS=0.9))

    def gone(request):
        raise storage.DataError("dataset tiny is not there")

    with monkeypatch.context() as patch:
        patch.setattr("lab.run.runner.run", gone)
        one = night(session)
        with pytest.raises(storage.DataError, match="is not there"):
            one.run()
        for _ in range(MOST_LOST):  # asked for again by hand
            with pytest.raises(storage.DataError, match="is not there"):
                executor.supervise(session)
    assert session.state.last.decided is None and session.state.last.runs[-1].reason == because("not_begun")
    executor.supervise(session)
    assert session.state.last.status == "keep"


def test_a_baseline_that_fails_ends_the_night_with_what_to_do(tmp_path, session, proposals, monkeypatch):
    run = executor.runner.run

    def crashing(request):
        (request.folder / "train.py").write_bytes(edited(FAILS="crash"))
        return run(request)

    monkeypatch.setattr(executor.runner, "run", crashing)
    with pytest.raises(LabError, match="the baseline failed"):
        night(session).run()


def test_what_is_in_train_py_already_is_the_first_experiment(session, proposals):
    night(session, max_experiments=0).run()
    (session.repository.path / "train.py").write_bytes(edited(LOSS=0.8))
    night(session, max_experiments=1).run()
    assert statuses(session)[1] == ("keep", "the edit that train.py had already")


def test_an_edit_that_a_killed_night_had_not_begun_keeps_its_description(session, proposals, monkeypatch):
    night(session, max_experiments=0).run()
    one = night(session, max_experiments=2)

    def killed(*_, **__):
        raise Killed

    begin = loop.open_change
    monkeypatch.setattr(loop, "open_change", killed)
    with pytest.raises(Killed):
        one.run()
    monkeypatch.setattr(loop, "open_change", begin)
    night(Session(session.folder), max_experiments=2).run()
    assert [what for _, what in statuses(session)] == ["baseline", "proposal 1", "proposal 2"]


def test_a_train_py_that_is_no_python_is_put_aside(session, proposals):
    night(session, max_experiments=0).run()
    (session.repository.path / "train.py").write_bytes(b"def broken(:")
    one = night(session, max_experiments=1)
    one.run()
    assert statuses(session)[1][1] == "proposal 1" and any("put back" in line for line in one.view.lines)
    assert [path.read_bytes() for path in (session.folder / "turns").glob("*.yours.py")] == [b"def broken(:"]


def test_while_another_branch_is_checked_out_the_night_waits(session, proposals):
    night(session, max_experiments=0).run()
    sessions.git(session.repository.path, "switch", "-q", "main")
    one = night(session, max_experiments=1)
    one.view.at["waiting"] = lambda: sessions.git(session.repository.path, "switch", "-q", session.branch)
    one.run()
    assert statuses(session)[1][1] == "proposal 1" and "git switch" in one.view.lines[0]


def test_what_can_not_be_begun_is_tried_again_and_then_told(session, proposals, monkeypatch):
    sent, failing = [], [LabError("another git holds index.lock"), ValueError("odd")]
    monkeypatch.setattr(notify, "send", lambda command, text, say: sent.append(text))
    propose = proposer.propose

    def moody(session, *_):
        if failing:
            raise failing.pop(0)
        return propose(session)

    monkeypatch.setattr(proposer, "propose", moody)
    night(session, notify="x", max_experiments=1).run()
    assert len(statuses(session)) == 2 and ["index.lock" in sent[0], "odd" in sent[1]] == [True, True]
    failing += 3 * [LabError("nothing is left to propose")]
    with pytest.raises(LabError, match="nothing is left"):
        night(session, notify="x", max_experiments=1).run()
    assert "nothing is left" in sent[-1] and session.held is None
    assert isinstance(loop.Journal(session.folder / "night.jsonl", NIGHT_EVENTS).events[-1], NightEnded)


def test_a_machine_on_which_everything_crashes_ends_the_night(session, proposals, monkeypatch):
    monkeypatch.setattr(loop, "FRUITLESS", 4)
    proposals += [edited(FAILS="crash", EXTRA=i) for i in range(9)]
    one = night(session, max_experiments=9)
    assert "4 experiments in a row had no result" in one.run() and len(statuses(session)) == 5
    assert any("the last 3 experiments crashed" in line for line in one.view.lines)


def test_what_crashed_in_an_earlier_night_ends_none_after_it(session, proposals, monkeypatch):
    monkeypatch.setattr(loop, "FRUITLESS", 3)
    proposals += [edited(FAILS="crash", EXTRA=i) for i in range(4)] + [edited(LOSS=1.1 + 0.1 * i) for i in range(2)]
    assert "3 experiments in a row" in night(session, max_experiments=9).run()
    assert "max-experiments" in night(Session(session.folder), max_experiments=3).run() and len(statuses(session)) == 7


def test_a_turn_whose_train_py_can_not_be_run_is_not_tried_again(session, turns):
    turns += [sessions.TRAIN + b"A = '" + b"x" * 2**19 + b"'\n", edited(LOSS=0.9)]
    night(session, agent="generous", max_experiments=1).run()
    assert statuses(session)[1:] == [("keep", "the agent's idea")]


def test_an_agent_whose_experiments_all_crash_is_left_alone(session, proposals, turns):
    turns += [edited(FAILS="crash", EXTRA=i) for i in range(3)] + [edited(LOSS=0.9)]
    night(session, agent="hasty", max_experiments=5).run()
    assert [what for _, what in statuses(session)][1:] == 3 * ["the agent's idea"] + ["proposal 4", "the agent's idea"]


def test_remarks_in_train_py_are_not_written_over_without_a_copy(session, proposals):
    night(session, max_experiments=0).run()
    train = session.repository.path / "train.py"
    train.write_bytes(train.read_bytes() + b"# a thought\n")
    night(session, max_experiments=1).run()
    assert train.read_bytes().endswith(b"# a thought\n")  # as what is not kept is never written there
    proposals.append(edited(LOSS=0.9))
    night(session, max_experiments=2).run()
    assert train.read_bytes() == edited(LOSS=0.9)
    assert [b"# a thought" in path.read_bytes() for path in (session.folder / "turns").glob("*.yours.py")] == [True]


def test_what_a_person_writes_while_experiments_run_is_the_next_one(session, proposals, monkeypatch):
    night(session, max_experiments=0).run()
    train, edits = session.repository.path / "train.py", [edited(LOSS=0.8)]

    def launch(session):
        if edits:
            train.write_bytes(edits.pop())
        return Alive(session)

    monkeypatch.setattr(executor, "launch", launch)
    night(session, max_experiments=2).run()
    assert statuses(session)[1:] == [("discard", "proposal 1"), ("keep", "the edit that train.py had already")]
    assert train.read_bytes() == edited(LOSS=0.8)


@pytest.mark.parametrize("edit", [b"# more\nEXTRA = 1\n", None])
def test_what_a_person_writes_while_a_change_is_kept_does_not_undo_it(session, proposals, monkeypatch, edit):
    night(session, max_experiments=0).run()
    train, proposals[:] = session.repository.path / "train.py", [edited(LOSS=0.9)]
    mine = edited() + edit if edit else edited(LOSS=0.7)
    edits = [mine]

    def launch(session):
        if edits:
            train.write_bytes(edits.pop())
        return Alive(session)

    monkeypatch.setattr(executor, "launch", launch)
    one = night(session, max_experiments=2)
    one.run()
    kept, own = session.state.experiments[1], session.state.experiments[2]
    assert kept.status == "keep" and own.onto == kept.number
    assert [path.read_bytes() for path in (session.folder / "turns").glob("*.yours.py")] == [mine]
    if edit:
        assert session.repository.content(own.blob) == edited(LOSS=0.9) + edit
        assert any(
            "was edited while another change was kept, and is merged with it now" in line for line in one.view.lines
        )
    else:
        assert own.description == "proposal 2" and any("both changed the same lines" in line for line in one.view.lines)


def test_a_view_that_fails_costs_the_picture_alone(session, proposals):
    def broken(now):
        raise KeyError("of the view's")

    one = night(session, max_experiments=1)
    one.view.update = broken
    one.run()
    assert len(statuses(session)) == 2 and sum("the display has failed" in line for line in one.view.lines) == 1


def test_a_hot_device_rests_between_the_runs_of_an_experiment(session, proposals, monkeypatch):
    night(session, max_experiments=0).run()
    one, waited = night(session, max_experiments=1), []
    one._between()
    one.now.troubles = [limits.Trouble("hot", "97 degrees", "wait")]
    one._looked = float("inf")
    best = session.state.best
    session.open_experiment(
        kind="change", commit="HEAD", description="x", **facts_of_change(session, best, edited(LOSS=2.0))
    )

    def wait():
        waited.append(session.held)
        one.now.troubles.clear()
        session.release()

    monkeypatch.setattr(one, "_between", wait)
    one._follow()
    assert waited == [{"why": "stopped", "now": False}]


def test_near_misses_are_tried_together_before_anything_new(session, proposals, monkeypatch):
    night(session, max_experiments=0).run()
    asked = []

    def open_change(session, message, near_misses_together=False, content=None, more=None):
        asked.append(near_misses_together)
        raise loop.Over("seen")

    monkeypatch.setattr(loop.near_misses, "ready", lambda session: [1, 2])
    monkeypatch.setattr(loop, "open_change", open_change)
    night(session).run()
    assert asked == [True]


# --- With an agent ---


@pytest.fixture
def turns(monkeypatch):
    """What the agent does, in turn: bytes for train.py, or the outcome of a turn that gave nothing."""
    queue = []

    def take_turn(session, command, prompt, log, seconds, stop):
        did = queue.pop(0)
        if isinstance(did, BaseException):
            raise did
        if isinstance(did, bytes):
            facts = {"description": "the agent's idea", "blob": session.repository.store(did)}
            return TurnTaken(by="agent", outcome="edited", said="edited train.py", log=str(log), **facts)
        return TurnTaken(by="agent", outcome=did, said=did, log=str(log))

    monkeypatch.setattr(agent, "take_turn", take_turn)
    return queue


def test_an_agent_is_asked_once_for_each_experiment(session, proposals, turns):
    turns += [edited(LOSS=0.9), edited(LOSS=1.2)]
    night(session, agent="clever", max_experiments=2).run()
    assert [e for e in statuses(session)][1:] == [("keep", "the agent's idea"), ("discard", "the agent's idea")]


def test_after_three_failures_the_proposer_steps_in_until_the_agent_recovers(session, proposals, turns):
    turns += ["failed", "failed", "asked", "nothing", edited(LOSS=0.9), edited(LOSS=0.8)]
    one = night(session, agent="moody", max_experiments=5)
    one.run()
    assert [turn.by for turn in one.turns[:4]] == ["agent", "agent", "agent", "proposer"]
    assert [what for _, what in statuses(session)].count("the agent's idea") == 2
    assert any("steps in" in line for line in one.view.lines)


@pytest.mark.parametrize("outcome", ["unserved", "hung"])
def test_where_a_service_fails_the_proposer_runs_more_and_more_in_between(session, proposals, turns, outcome):
    turns += [outcome, outcome, edited(LOSS=0.9)]
    one = night(session, agent="unlucky", max_experiments=4)
    one.run()
    assert [turn.by[0] for turn in one.turns] == list("apappa")
    assert any("steps in" in line and ("fails again" in line) is (outcome == "hung") for line in one.view.lines)


def test_what_was_tried_before_is_not_run_again(session, proposals, tmp_path):
    (tmp_path / "all").write_text("1.2 1.2 1.3")
    forgetful = (
        f'read a b < {tmp_path / "all"}; echo $b > {tmp_path / "all"}; sed -i.bak "s/LOSS = .*/LOSS = $a/" train.py'
    )
    one = night(session, agent=forgetful, max_experiments=2)
    one.run()
    assert [turn.outcome for turn in one.turns] == ["edited", "again", "edited"]
    assert len(statuses(session)) == 3


def test_a_night_killed_during_a_turn_goes_on_with_another(session, proposals, turns, monkeypatch):
    night(session, max_experiments=0).run()
    monkeypatch.setattr(agent, "recover", lambda session, log: "was interrupted; it left an edit that was not run")
    turns += [edited(LOSS=0.9)]
    one = night(Session(session.folder), agent="slow", max_experiments=1)
    one.run()
    assert [turn.outcome for turn in one.turns] == ["interrupted", "edited"]
    assert statuses(session)[1] == ("keep", "the agent's idea")


def test_a_night_killed_after_a_turn_runs_what_it_gave(session, proposals, turns, monkeypatch):
    night(session, max_experiments=0).run()
    turns += [edited(LOSS=0.9)]

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_change", killed)
        with pytest.raises(Killed):
            night(Session(session.folder), agent="quick", max_experiments=1).run()
    assert session.repository.train() == edited()  # nobody has written there
    one = night(Session(session.folder), agent="quick", max_experiments=1)
    one.run()
    assert [turn.outcome for turn in one.turns] == ["edited"] and statuses(session)[1] == ("keep", "the agent's idea")


def test_an_edit_that_can_not_be_opened_at_once_is_opened_later(session, proposals, turns, monkeypatch):
    night(session, max_experiments=0).run()
    turns += [edited(LOSS=0.9)]
    failing, begin = [LabError("git is in use")], loop.open_change

    def open_change(*arguments, **named):
        if failing:
            raise failing.pop()
        return begin(*arguments, **named)

    monkeypatch.setattr(loop, "open_change", open_change)
    one = night(session, agent="clever", max_experiments=1)
    one.run()
    assert statuses(session)[1] == ("keep", "the agent's idea") and len(one.turns) == 1
    assert "it is tried again: git is in use" in one.view.lines[0]


def test_the_checkout_follows_what_is_kept_and_nothing_else_touches_it(session, proposals):
    night(session, max_experiments=0).run()
    train, seen = session.repository.path / "train.py", []
    proposals.extend([edited(LOSS=1.5), edited(LOSS=0.9)])
    one = night(session, max_experiments=2)
    one.view.update = lambda now: seen.append(train.read_bytes())
    one.run()
    assert list(dict.fromkeys(seen)) == [edited(), edited(LOSS=0.9)]
    assert sessions.git(session.repository.path, "status", "--porcelain") == ""


def budgets(session):
    return [run.budget for run in session.state.last.runs]


def test_in_the_end_the_baseline_is_run_for_other_times_once(session, proposals):
    assert night(session, max_experiments=2, scale=True).run() == "2 experiments, as many as --max-experiments allows"
    session.refresh()
    assert [e.kind for e in session.state.experiments.values()] == ["baseline", "change", "change", "scale"]
    assert budgets(session) == [75.0, 150.0, 600.0] * 3 and session.state.last.status == "keep"
    night(session, max_experiments=1, scale=True).run()
    session.refresh()
    assert [e.kind for e in session.state.experiments.values()][3:] == ["scale", "change"]


def test_time_is_reserved_for_the_scale_and_without_enough_it_is_left_out(session, proposals, monkeypatch):
    night(session, max_experiments=1).run()
    session.refresh()
    one = night(session, max_experiments=None, scale=True, hours=1.0)
    assert 3 * 825 < one._scale_takes() < 2 * 3 * 825
    clock = SimpleNamespace(**{**vars(time), "time": lambda: one.now.deadline - one._scale_takes() - 1})
    monkeypatch.setattr(loop, "time", clock)
    assert "not enough for another experiment" in one.run()
    session.refresh()
    assert session.state.last.kind == "scale" and budgets(session) == [75.0, 150.0, 600.0] * 3


def test_a_night_with_too_little_time_for_the_scale_says_so(session, proposals):
    night(session, max_experiments=1).run()
    one = night(session, max_experiments=1, scale=True, hours=0.5)
    one.run()
    session.refresh()
    assert session.state.last.kind != "scale" and any("no time is left for --scale" in s for s in one.view.lines)


# --- With several devices ---


@pytest.fixture
def fleet(session):
    """The session after its baseline, with two devices that nobody uses."""
    executor.supervise(session)
    settings.choose(session, ["a", "b"])
    (session.folder / "fleet").mkdir()
    rows = [{"name": name, "usable": True} for name in "ab"]
    storage.write_json(session.folder / "fleet" / settings.STATUS, {"time": time.time() + 1000, "devices": rows})
    return session


def kept(session, number, applied=True):
    """The head keeps an experiment, or has decided to."""
    there = Session(session.folder)
    experiment = there.state.experiments[number]
    if experiment.decided is None:
        there.log(ExperimentDecided(experiment=number, verdict=Verdict("keep", because("baseline"), 0.9, 1.0)))
    if applied:
        executor.apply(there, experiment)


@pytest.mark.parametrize("applied", [True, False])
def test_an_edit_is_made_on_what_was_kept_during_the_turn(fleet, monkeypatch, applied):
    mine, other = edited() + b"LOSS = LOSS - 0.05\n", edited(LOSS=0.9)
    open_change(fleet, "of another device", content=other)

    def take_turn(session, *arguments, **named):
        kept(session, 1, applied)
        blob = session.repository.store(mine)
        return TurnTaken(by="agent", outcome="edited", description="the agent's idea", blob=blob)

    monkeypatch.setattr(agent, "take_turn", take_turn)
    one = night(fleet, agent="slow")
    one._go_on()
    assert fleet.state.last.number == 1 and one._room() is applied and not one.view.lines
    kept(fleet, 1)
    fleet.refresh()
    one._go_on()
    last = fleet.state.last
    assert (last.onto, last.description, len(one.turns)) == (1, "the agent's idea", 1)
    assert fleet.repository.content(last.blob) == other + b"LOSS = LOSS - 0.05\n"


def test_several_devices_run_the_scale_to_its_end(fleet, monkeypatch):
    class Head:
        """In place of the process that runs the experiments: makes a run each time it is looked at."""

        def __init__(self, session):
            self.session = Session(session.folder)

        def poll(self):
            if wanted := orders(self.session.state):
                executor.carry_out(self.session, wanted[0])
            for experiment in self.session.state.open:
                executor.settle(self.session, experiment)

    monkeypatch.setattr(executor, "launch", Head)
    one = night(fleet, scale=True, hours=2.0, max_experiments=None)
    one.now.deadline = time.time() + one._scale_takes() + 60
    assert "not enough for another experiment" in one.run()
    fleet.refresh()
    assert fleet.state.last.kind == "scale" and budgets(fleet) == [75.0, 150.0, 600.0] * 3
    assert fleet.state.last.status == "keep" and fleet.held is None


def test_each_heat_is_waited_out_by_itself(fleet, monkeypatch):
    """Also while the head is at work, as it is all night."""
    hot_from = now = time.time()
    hot = limits.Trouble("hot", "97 degrees", "wait")

    def sleep(seconds):
        nonlocal now
        now += 5.0

    clock = SimpleNamespace(time=lambda: now, monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(limits, "troubles", lambda session: [hot] if 0 <= now - hot_from < 60 else [])
    monkeypatch.setattr(Session, "supervised", True)
    one = night(fleet)
    for hot_from in (now, now + 2 * loop.LONGEST_WAIT):
        now = hot_from
        one._check()
        one._between()
        assert now >= hot_from + 60


def test_an_edit_of_a_person_stays_while_it_is_run(fleet, proposals):
    train = fleet.repository.path / "train.py"
    train.write_bytes(edited(LOSS=0.8))
    one = night(fleet)
    one._go_on()
    assert fleet.state.last.description == "the edit that train.py had already" and one.now.by == "user"
    one._go_on()
    assert fleet.state.last.description == "proposal 2" and one.now.by == "proposer"
    assert train.read_bytes() == edited(LOSS=0.8) and not one.view.lines


def test_what_became_of_an_equal_train_py_is_told(session, proposals):
    night(session, max_experiments=0).run()
    proposals.append(edited(FAILS="crash"))
    night(session, max_experiments=1).run()
    (session.repository.path / "train.py").write_bytes(edited(FAILS="crash"))
    one = night(session, max_experiments=1)
    one.run()
    assert "train.py is equal to experiment 1, which crashed. It was put back" in one.view.lines[0]
