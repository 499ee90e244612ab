"""Finding processes and ending them."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from lab.run import processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
POLITE = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
)
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
BREEDING = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]).wait()"


@pytest.fixture
def start():
    started = []

    def begin(code, **variables) -> subprocess.Popen:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, **variables}, start_new_session=True
        )
        started.append(process)
        process.stdout.readline()  # it is there
        return process

    yield begin
    for process in started:
        for member in processes.tree(process.pid):
            member.kill()
        process.wait()
        process.stdout.close()


def ended(process, **how) -> int:
    return processes.end(lambda: processes.tree(process.pid), **how)


def test_one_that_is_asked_ends_by_itself(start):
    polite = start(POLITE)
    assert ended(polite, patience=10, ask=True) == 1 and polite.wait() == 7


def test_one_that_does_not_listen_is_killed_when_its_time_is_up(start):
    stubborn, begun = start(STUBBORN), time.monotonic()
    assert ended(stubborn, patience=0.5, ask=True) == 1 and stubborn.wait() == -9
    assert 0.5 <= time.monotonic() - begun < 5


def test_patience_without_asking(start):
    polite = start(POLITE)
    assert ended(polite, patience=0.3) == 1 and polite.wait() == -9
    short = start("import time; print(flush=True); time.sleep(0.3)")
    assert ended(short, patience=10) == 0 and short.wait() == 0, "it ended by itself"


def test_what_it_started_ends_too(start):
    family = start(BREEDING)
    assert len(processes.tree(family.pid)) == 2
    assert ended(family) == 2 and family.wait() == -9 and ended(family) == 0


def test_the_exit_status_is_left_to_who_started_it(start):
    """A zombie counts as ended, and is not waited for."""
    short = start("import sys; print(flush=True); sys.exit(3)")
    while processes.runs(psutil.Process(short.pid)):
        time.sleep(0.01)
    assert ended(short) == 0 and short.wait() == 3


def test_found_by_variables_and_by_group(start):
    first, second = start(BREEDING, MARK="a", NIGHT="1"), start(STUBBORN, MARK="a", NIGHT="2")
    pids = {member.pid for member in processes.tree(first.pid)}
    assert {process.pid for process in processes.marked(MARK="a", NIGHT="1")} == pids
    assert {process.pid for process in processes.marked(MARK="a")} == {*pids, second.pid}
    assert processes.marked(MARK="b") == []
    assert {process.pid for process in processes.in_group(first.pid)} == pids
    assert os.getpid() not in {process.pid for process in processes.in_group(os.getpgid(0))}
    assert set(processes.below()) >= set(processes.in_group(second.pid))
