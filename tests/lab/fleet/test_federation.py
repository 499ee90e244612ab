"""Sessions of several devices under one home: what one keeps is tried on the others."""

import pytest
import sessions
from nights import sound
from sessions import Alive, check, edited
from test_loop import Seen, options

from lab.compare import comparison
from lab.compare.analysis import Analysis
from lab.night import limits, loop, offers, proposer
from lab.session.session import Session
from lab.share import sources
from lab.verdict import executor


@pytest.fixture
def two(tmp_path, runner, monkeypatch):
    """Two sessions, of two backends on one machine; a night(session, proposals, **options) of each."""
    made = {name: sessions.make(tmp_path / name, tag=name, backend=name) for name in ("pytorch", "mlx")}
    real = executor.runner.run

    def run(request):
        outcome = real(request)
        if outcome.result:
            outcome.result["backend"] = request.run_id.split("/")[1]
        return outcome

    monkeypatch.setattr(executor.runner, "run", run)
    monkeypatch.setattr(executor, "launch", lambda session: Alive(session))
    monkeypatch.setattr(limits, "troubles", lambda session: [])
    monkeypatch.setattr(loop, "POLL", 0.001)

    def night(session, contents, **values):
        queue = list(contents)

        def propose(session, *_):
            number = session.state.last.number + 1
            return proposer.Proposal(queue.pop(0) if queue else edited(LOSS=1.0 + number), f"proposal {number}")

        monkeypatch.setattr(proposer, "propose", propose)
        loop.Night(Session(session.folder), options(**values), Seen()).run()
        return Session(session.folder)

    return made["pytorch"], made["mlx"], night


def test_what_one_keeps_is_replayed_on_the_other_with_its_origin(two):
    pytorch, mlx, night = two
    first = night(pytorch, [edited(LOSS=0.9)], max_experiments=1)
    assert first.state.best.number == 1
    second = night(mlx, [edited(LOSS=1.1)], max_experiments=4, offers=0.5)
    replayed = [e for e in second.state.decided if e.kind == "replay"]
    assert [(e.status, e.origin) for e in replayed] == [("keep", f"fake-1gb/pytorch/{first.state.best.change}")]
    assert len(replayed[0].own_runs) >= offers.RUNS and second.state.best.number == 0
    compared = comparison.compare([Analysis(sources.of_session(one)) for one in (first, second)])
    both = [change for change in compared.changes if len(change.cells) == 2]
    assert len(both) == 1 and len(compared.places) == 2  # the transfer table has a row that is filled
    sound(second)
    check(second)
    assert not [e for e in night(pytorch, [], max_experiments=2).state.decided if e.kind == "replay"]  # its own


def test_offers_have_their_share_of_the_runs_and_no_more(two):
    pytorch, mlx, night = two
    losses = [1.0 - 0.05 * n for n in range(1, 7)]
    contents = [edited(LOSS=loss) for loss in losses]
    night(pytorch, contents, max_experiments=6)
    session = night(mlx, [], max_experiments=20, offers=0.2)
    runs = [run for run in session.state.runs.values() if run.experiment]
    spent = sum(session.state.experiments[run.experiment].kind == "replay" for run in runs)
    assert 0 < spent <= 0.2 * len(runs) + offers.RUNS
    none = night(mlx, [], max_experiments=4, offers=0.0)
    assert none.state.last.kind == "change"


def test_what_does_not_apply_is_passed_over(two):
    pytorch, mlx, night = two
    night(pytorch, [edited(LOSS=0.9)], max_experiments=1)
    night(mlx, [edited(LOSS=0.95)], max_experiments=1, offers=0.0)
    skipped = set()
    session = Session(mlx.folder)
    assert offers.next_offer(session, skipped) is not None  # against the baseline it applies
    session.state.baseline.blob = session.repository.store(edited(LOSS=2.0))
    assert offers.next_offer(session, skipped) is None and len(skipped) == 1
