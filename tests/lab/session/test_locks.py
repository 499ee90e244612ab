"""Who works on a session: looking takes nothing from anybody, and a process that is starting counts."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import sessions

import storage
from backends import machine
from lab.errors import LabError
from lab.run import processes
from lab.session.locks import Lock, device_lock, is_held
from lab.session.session import SUPERVISOR, Session
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


def test_a_gpu_has_one_lock_whatever_else_it_is_called():
    assert device_lock("nvidia-x-8gb", "GPU-8932f937").lock_file == device_lock("other", "GPU-8932f937").lock_file
    assert device_lock("nvidia-x-8gb", "MIG-1").lock_file != device_lock("nvidia-x-8gb", "MIG-2").lock_file


def test_two_computers_that_share_a_home_have_a_lock_each(monkeypatch):
    names = set()
    for host in ("3f0c", "3f0c", "91aa"):
        monkeypatch.setattr(machine, "host", lambda host=host: host)
        names.add(device_lock("cpu-amd-epyc-2c-24gb", "").lock_file)
    assert len(names) == 2


def test_a_computers_name_is_there_without_a_boot_id(monkeypatch, tmp_path):
    own = machine.host()
    monkeypatch.setattr(machine, "BOOT_ID", tmp_path / "none")
    monkeypatch.setattr(machine, "asked", lambda *_: "")
    assert machine.host.__wrapped__() and machine.host() == own


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_told(monkeypatch, tmp_path, number):
    """NFS without its lock daemon has ENOLCK, some shared folders of virtual machines ENOSYS."""

    fcntl = pytest.importorskip("fcntl")

    def fails(descriptor, operation):
        raise OSError(number, os.strerror(number))

    lock = Lock(tmp_path / "lock")
    lock_file = Path(lock.lock_file)
    lock_file.touch()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fails)
        for use in (lock.acquire, lambda: lock.acquire(blocking=False), lambda: is_held(lock), lock.__enter__):
            with pytest.raises(
                LabError, match="can't be locked .*set AUTORESEARCH_HOME to a folder .* on a disk of this"
            ):
                use()
    with Lock(lock_file):
        assert is_held(lock)


def test_a_home_that_cannot_be_written_is_told(monkeypatch, isolated_home):
    isolated_home.write_text("a file where the folder should be")
    with pytest.raises(storage.DataError, match="set AUTORESEARCH_HOME to a folder that you can write to"):
        device_lock("cpu", "")
    with pytest.raises(LabError, match="can't be locked"):
        Lock(isolated_home / "lock").acquire()


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


def test_a_supervisor_that_has_let_go_of_the_lock_and_is_about_to_end_is_waited_for(session):
    """A night opened nothing after a verdict, and told of trouble."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    storage.write_json(
        session.folder / SUPERVISOR, {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
    )
    waiting = threading.Thread(target=process.wait)
    waiting.start()
    with opening.exclusive(session, patience=20.0):
        assert not session.starting and session.lock.is_locked
    waiting.join()


def test_a_process_is_known_after_the_clock_was_set(tmp_path, monkeypatch):
    """`lab leave` found no worker, and the next head started another beside it."""
    processes.note(tmp_path / "worker.json", os.getpid())
    created, boot = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) - 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() - 3600)
    assert processes.noted(tmp_path / "worker.json")
    monkeypatch.setattr(psutil, "boot_time", boot)
    assert processes.noted(tmp_path / "worker.json") is None  # another process


def test_a_pause_that_somebody_asks_for_while_a_night_checks_stays(session):
    session.hold("paused", now=False)
    session.hold("stopped", now=True)
    assert session.held == {"why": "paused", "now": True}
    session.release("stopped")
    assert session.held["why"] == "paused"
    session.release()
    assert session.held is None


def test_a_folder_that_a_sandbox_keeps_from_being_written_is_told(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(LabError, match="this shell may not write .*sandbox.*MCP server"):
        Lock(tmp_path / "lock").acquire()
