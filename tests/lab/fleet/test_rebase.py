"""Several open experiments: who runs what, and that the branch only moves to what was run against what it replaces."""

import random
import time

import pytest
import sessions
from nights import sound
from sessions import Alive, check, edited
from test_loop import Seen, options

import storage
from lab.cli import render
from lab.compare.analysis import Analysis
from lab.fleet import settings, spread
from lab.night import limits, loop, proposer
from lab.reasons import because
from lab.report import page
from lab.run import runner
from lab.session.events import RunEnded, RunScored
from lab.session.journal import Journal
from lab.session.session import Session
from lab.share import sources
from lab.share.summary import summary
from lab.verdict import executor, opening
from lab.verdict.plan import orders, plan


class Many:
    """Devices in this process: what is begun ends when it is waited for, in any order."""

    def __init__(self, session, names=("a", "b", "c"), seed=0, before=lambda: None):
        self.session, self.names, self.before = session, names, before
        self.rng, self.busy = random.Random(seed), {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def makes(self, run):
        if run.worker:
            self.busy[run.worker] = run
        return bool(run.worker)

    def begin(self, orders):
        session, begun = self.session, False
        for order in orders:
            free = [name for name in self.names if name not in self.busy]
            if found := spread.placed(order, session.state, free, self.names):
                name, order = found
                begun = True
                if order.score is not None:
                    executor.score_again(session, order.experiment, session.state.runs[order.score])
                    continue
                self.busy[name] = executor.begin(session, order, name)
        return begun

    def wait(self):
        self.before()
        self.session.refresh()
        if not self.busy:
            return False
        run = self.busy.pop(self.rng.choice(sorted(self.busy)))
        executor.ended(self.session, run, runner.run(executor.request(self.session, run)))
        return True


@pytest.fixture
def session(tmp_path, runner, monkeypatch):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session, Many(session))
    return session


def opened(session, content, description="why"):
    assert opening.open_change(session, description, content=content) is None
    return session.state.last


def test_baselines_and_pairs_are_spread_over_devices(session):
    assert sorted(run.worker for run in session.state.runs.values()) == ["a", "b", "c"]
    changes = [opened(session, edited(LOSS=1.0 - 0.0002 * n)) for n in range(5, 30)]  # neither clear nor hopeless
    executor.supervise(session, Many(session))
    on = {(run.blob, run.seed): run.worker for run in session.state.runs.values()}
    repeated = 0
    for change in changes:
        seeds = [run.seed for run in change.own_runs]
        assert all(on[change.blob, seed] == on[change.parent, seed] for seed in seeds[1:])
        if len(seeds) > 1:
            repeated += 1
            assert len({on[change.blob, seed] for seed in seeds}) > 1
    assert repeated, [(e.status, len(e.own_runs), str(e.verdict.reason)) for e in changes]
    sound(session)


def test_one_device_is_todays_behaviour(session, tmp_path, monkeypatch):
    """The same journal, times and names of devices aside, whether a session runs on its own device or a pool of one."""
    other = sessions.make(tmp_path / "other", tag="other")
    mine = sessions.make(tmp_path / "mine", tag="mine")
    executor.supervise(other)
    executor.supervise(mine, Many(mine, ["a"]))
    for content in (edited(LOSS=0.999), edited(LOSS=0.9), edited(FAILS="crash"), edited(LOSS=0.8995)):
        for one, devices in ((other, None), (mine, Many(mine, ["a"]))):
            opened(one, content)
            executor.supervise(one, devices)

    def told(session):
        return [
            (type(event).__name__, getattr(event, "experiment", None), getattr(event, "seed", None))
            for event in Journal(session.journal.path).events
        ]

    assert told(other) == told(mine)


def test_what_both_want_is_run_once(session):
    for loss in (0.998, 0.9981, 0.9982):
        opened(session, edited(LOSS=loss))
    executor.supervise(session, Many(session, list("abcdef")))
    runs = [(run.blob, run.seed) for run in session.state.runs.values()]
    assert len(runs) == len(set(runs))
    sound(session)
    check(session)


def test_a_promising_change_whose_parent_is_no_longer_the_best_is_superseded(session):
    first = opened(session, edited(LOSS=0.9))
    second = opened(session, edited() + b"LOSS = LOSS - 0.05\n")
    worse = opened(session, edited(LOSS=1.1))
    executor.supervise(session, Many(session, ["a"]))
    assert (first.status, second.status, worse.status) == ("keep", "superseded", "discard")
    assert second.verdict.reason.facts == {"best": first.number} and "made again" in second.verdict.said
    assert session.state.best is first and session.state.equal(second.digest) is None
    sound(session)
    check(session)


@pytest.fixture
def night(session, monkeypatch):
    """night(contents, names, **options): a night with these proposals on these devices, run; the session."""

    def run(contents, names=("a", "b", "c"), seed=0, before=lambda: None, **values):
        settings.choose(session, list(names))
        folder = session.folder / "fleet"
        folder.mkdir(exist_ok=True)
        rows = [{"name": name, "usable": True} for name in names]
        storage.write_json(folder / settings.STATUS, {"time": time.time() + 1000, "devices": rows})

        class Launched(Alive):
            def __init__(self, session):
                there = Session(session.folder)
                executor.supervise(there, Many(there, names, seed, before))

        queue = list(contents)

        def propose(session, *_):
            number = session.state.last.number + 1
            return proposer.Proposal(queue.pop(0) if queue else edited(LOSS=1.0 + number), f"proposal {number}")

        monkeypatch.setattr(executor, "launch", Launched)
        monkeypatch.setattr(limits, "troubles", lambda session: [])
        monkeypatch.setattr(loop, "POLL", 0.001)
        monkeypatch.setattr(proposer, "propose", propose)
        one = loop.Night(session, options(**values), Seen())
        one.run()
        return Session(session.folder), one

    return run


def test_it_is_made_again_on_the_best_and_judged_against_it(night, tmp_path):
    content = [edited(LOSS=0.9), edited() + b"LOSS = LOSS - 0.05\n"]
    session, _ = night(content, ["a"], max_experiments=3)
    again = session.state.experiments[3]
    assert [e.status for e in session.state.experiments.values()] == ["keep", "keep", "superseded", "keep"]
    assert again.rebased == 2 and again.onto == 1 and again.own_runs and session.state.best is again
    assert session.repository.content(again.blob) == edited(LOSS=0.9) + b"LOSS = LOSS - 0.05\n"
    assert "2 kept" in render.status(session) and "1 superseded" in render.status(session)
    assert "made on           a" in render.block(session, again)
    sound(session)
    check(session)
    record = sources.of_session(session)
    assert [e.number for e in Analysis(record).tried] == [1, 3]  # what was not judged is not tried
    assert "changes tried: 2; better: 2" in summary(record) and "What did not help" not in summary(record)
    (path,) = page.write([record], tmp_path / "report.html")
    assert "superseded" in path.read_text() and "2 experiments: 2 kept" in path.read_text()


def test_what_can_not_be_merged_ends_there_and_is_told(night):
    session, one = night([edited(LOSS=0.9), edited(LOSS=0.95)], ["a"], max_experiments=3)
    assert [e.status for e in session.state.experiments.values()] == ["keep", "keep", "superseded", "discard"]
    assert any("experiment 2 was made on an earlier best" in line for line in one.view.lines)
    assert session.state.last.rebased is None and session.state.best.number == 1
    check(session)


def test_one_of_two_equal_ones_is_made_again(session):
    more = b"LOSS = min(LOSS, 0.95)\n"  # does nothing on the best
    for content in (edited(LOSS=0.9), edited() + more, edited(LOSS=0.9) + more):  # the last holds both
        opened(session, content)
    executor.supervise(session, Many(session, ["a"]))
    one = loop.Night(session, options(), Seen())
    assert one._rebase() and session.state.last.rebased == 2
    executor.supervise(session, Many(session, ["a"]))
    assert [e.status for e in session.state.experiments.values()] == ["keep", "keep", *["superseded"] * 2, "discard"]
    assert not one._rebase() and session.state.last.number == 4
    assert "experiment 3 would be equal to experiment 4 now: it is not made again" in one.view.lines
    check(session)


@pytest.mark.parametrize("other, why", [
    (edited(LOSS=0.9), "the best itself"), (edited(LOSS=0.8), "the same line"),
    (edited() + b"if True:\n", "no Python"), (edited() + b"LOSS = LOSS - 0.05\n", ""),
])  # fmt: skip
def test_what_was_made_on_an_earlier_best_is_merged_if_it_can_be(session, other, why):
    opened(session, edited(LOSS=0.9))
    executor.supervise(session, Many(session, ["a"]))
    blob = session.repository.store(other)
    assert bool(opening.on_best(session, blob, session.state.baseline.blob)) is not bool(why)


def test_a_night_keeps_devices_supplied_and_proposes_nothing_twice(night):
    seen = set()

    def before():
        known = {e.digest: e.number for e in night_state().open}
        seen.add(len(known))
        assert len(known) == len(night_state().open)

    def night_state():
        return Session(folder).state

    folder = next((storage.home() / "sessions").glob("*/*"))
    session, _ = night(
        [edited(LOSS=1.01 + 0.01 * n) for n in range(20)], list("abcd"), before=before, max_experiments=20
    )
    assert max(seen) >= 4 and len(session.state.experiments) == 21
    sound(session)
    check(session)


@pytest.mark.parametrize("seed", range(6))
def test_random_nights_are_sound(night, seed):
    rng = random.Random(seed)
    contents = []
    for _ in range(14):
        if rng.random() < 0.5:
            contents.append(edited(LOSS=1 - rng.uniform(-0.004, 0.006)))
        else:
            contents.append(edited() + f"LOSS = LOSS - {rng.uniform(-0.002, 0.004):.5f}\n".encode())
    session, _ = night(contents, list("abcd"), seed, max_experiments=18)
    sound(session)
    check(session)
    assert not orders(session.state)


def lost(session, change, worker, seed=42):
    run = session.start_run(change, change.blob, seed, session.budget, worker=worker)
    session.log(RunEnded(run=run.number, status="lost", reason=because("device_lost")))


def test_a_run_whose_device_was_lost_is_made_on_another(session):
    change = opened(session, edited(LOSS=0.9))

    def device(free, present):
        found = spread.placed(orders(session.state)[0], session.state, free, present)
        return found and found[0]

    for worker in "ab":
        assert device([worker], ["a", "b", "c"]) == worker
    lost(session, change, "a")
    assert device(["a"], ["a", "b"]) is None
    assert device(["a", "b"], ["a", "b"]) == "b"
    assert device(["a"], ["a"]) == "a"  # there is no other
    executor.supervise(session, Many(session, ["a", "b"]))
    assert change.status == "keep" and [run.worker for run in change.own_runs if run.ok][0] == "b"


def test_a_change_that_takes_two_devices_down_is_a_suspect(session):
    change = opened(session, edited(LOSS=0.9))
    for worker in ("a", "a", "b"):
        lost(session, change, worker)
    executor.supervise(session, Many(session))
    assert change.status == "crash" and not change.verdict.judged
    assert change.verdict.said == "not judged: the devices a, b were lost while they ran it: it may crash them"
    check(session)


def test_where_the_weights_are_lost_another_run_is_made(session):
    """The first scoring finds them gone, as the device has left meanwhile."""
    change = opened(session, edited(LOSS=0.9))
    run = session.start_run(change, change.blob, 42, session.budget, worker="a")
    made = trained(session, run)
    executor.ended(session, run, made)
    assert plan(change, session.state).score == (run.number,)
    session.log(RunScored(run=run.number, problem=because("weights_lost")))
    assert plan(change, session.state).jobs[0].seed == 43
    executor.supervise(session, Many(session))
    assert change.status == "keep" and len(change.own_runs) > 1
    check(session)


def trained(session, run):
    folder = session.run_folder(run.number)
    folder.mkdir(parents=True)
    (folder / "train.py").write_bytes(session.repository.content(run.blob))
    return runner.run(executor.request(session, run))
