"""Who works on a session: looking takes nothing from anybody, and a process that is starting counts."""

import multiprocessing
import subprocess
import sys
import time

import psutil
import pytest
import sessions

import storage
from lab.errors import LabError
from lab.session.session import SUPERVISOR, Session, device_lock, is_held
from lab.verdict import executor, opening


def look(folder, ready, over):
    session = Session(folder)
    ready.set()
    while not over.is_set():
        session.supervised  # noqa: B018
        is_held(session.lock)


@pytest.fixture
def session(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


def test_four_that_look_keep_nobody_from_work(session):
    context = multiprocessing.get_context("spawn")
    over, ready = context.Event(), [context.Event() for _ in range(4)]
    lookers = [context.Process(target=look, args=(session.folder, one, over)) for one in ready]
    for looker in lookers:
        looker.start()
    for one in ready:
        one.wait(60)
    try:
        for _ in range(60):
            with opening.exclusive(session):
                pass
    finally:
        over.set()
        for looker in lookers:
            looker.join()


def test_what_is_held_is_seen_by_others_and_by_another_object_here(session):
    assert not is_held(session.lock)
    with session.lock:
        assert is_held(Session(session.folder).lock) and Session(session.folder).supervised
    assert not is_held(session.lock) and not is_held(device_lock("nobody-1gb", ""))


def test_a_supervisor_that_has_no_lock_yet_counts(session):
    """Between two commands within a second it was taken for interrupted."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        known = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        storage.write_json(session.folder / SUPERVISOR, known)
        assert session.starting and session.supervised
        with pytest.raises(LabError, match="an experiment is running"):
            with opening.exclusive(session):
                pass
        storage.write_json(session.folder / SUPERVISOR, known | {"created": known["created"] - 100})
        assert not session.starting  # another process by now
        storage.write_json(session.folder / SUPERVISOR, known)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while session.starting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not session.supervised


def test_a_pause_that_somebody_asks_for_while_a_night_checks_stays(session):
    session.hold("paused", now=False)
    session.hold("stopped", now=True)
    assert session.held == {"why": "paused", "now": True}
    session.release("stopped")
    assert session.held["why"] == "paused"
    session.release()
    assert session.held is None
