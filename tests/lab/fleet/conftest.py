"""Fixtures: a session in a copy of this project, and that no worker is left behind."""

import pytest
from nights import processes
from test_kill import project  # noqa: F401 (a fixture)

from lab.run.processes import end


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    session = request.getfixturevalue("project") if "project" in request.fixturenames else None
    yield
    for what in ("night", "supervise", "join") if session else ():
        end(lambda what=what: processes(session, what))
