"""Several devices of one machine work on one session."""

from nights import begin, processes, state_of, until
from sessions import check

from lab.session.session import Session


def test_a_night_on_two_devices(project, isolated_home):
    said = begin(project, isolated_home, 6, "cpu,cpu").communicate(timeout=200)[0]
    assert "6 experiments, as many as were wanted" in said, said
    session = Session(project.folder)
    check(session)
    runs = list(session.state.runs.values())
    assert {run.worker for run in runs} == {"cpu", "cpu:1"} and all(run.ok for run in runs), said
    at_once = max(sum(other.time <= run.time < other.ended.time for other in runs) for run in runs)
    assert at_once == 2
    until(lambda: not processes(project, "join"), 10)
    assert state_of(project).best.status == "keep"
