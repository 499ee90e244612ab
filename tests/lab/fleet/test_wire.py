"""The connection: who is let in, what crosses it, and what becomes of it when an end is lost."""

import socket
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from lab.errors import LabError
from lab.fleet import invitation, wire
from lab.fleet.wire import Hub, Lost, Refused


class Echo:
    """Operations of a worker: those of the tests."""

    def __init__(self, name="a"):
        self.name, self.leaving, self.tries, self.sleeps, self.long = name, "", 0, 0.0, Future()
        self.long.set_running_or_notify_cancel()

    def hello(self):
        return {"name": self.name}

    def alive(self):
        time.sleep(self.sleeps)  # its loop stands still
        return {"hot": False}

    def welcomed(self, welcome):
        self.welcome = welcome

    def alone(self):
        self.tries += 1

    def do(self, operation, facts):
        if operation == "long":
            return self.long
        if operation == "fail":
            raise ValueError("no")
        if operation == "refuse":
            raise LabError("not here")
        if operation == "leave":
            self.leaving = "told to"
        return {"operation": operation, **facts}


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def session(tmp_path):
    return SimpleNamespace(folder=tmp_path, name="fake/night")


@pytest.fixture
def keys(session):
    return invitation.keys(session, "head"), invitation.keys(session, "worker")


@pytest.fixture
def connect(keys):
    """connect(address, operations, keys=...): a worker in a thread; what it ended with is in `ended`."""
    served = []

    def run(address, operations, own=keys[1], patience=20.0):
        ended = []

        def work():
            try:
                wire.serve(address, own, operations, patience)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        served.append((thread, operations))
        return ended, thread

    yield run
    for thread, operations in served:
        operations.leaving = "the test is over"
        thread.join(10)


@pytest.fixture
def hub(keys):
    hub = Hub("tls://127.0.0.1:0", keys[0], lambda hello: {"session": "fake/night"})
    yield hub
    hub.close()


def test_what_is_asked_is_answered_and_a_mistake_is_told(hub, connect):
    connect(hub.address, Echo())
    until(lambda: "a" in hub.members)
    content = bytes(range(256)) * 2**14
    answer = hub.call("a", "put", content=content, offset=1, names=["x"], nothing=None).result(10)
    assert answer == {"operation": "put", "content": content, "offset": 1, "names": ["x"], "nothing": None}
    with pytest.raises(LabError, match="ValueError: no"):
        hub.call("a", "fail").result(10)
    with pytest.raises(LabError, match="not here"):
        hub.call("a", "refuse").result(10)
    until(lambda: hub.members["a"].alive == {"hot": False})


def test_while_it_works_it_answers(hub, connect):
    worker = Echo()
    connect(hub.address, worker)
    until(lambda: "a" in hub.members)
    long = hub.call("a", "long")
    begun = time.monotonic()
    assert hub.call("a", "stop").result(10) == {"operation": "stop"} and time.monotonic() < begun + 1
    assert not long.done()
    worker.long.set_result({"done": True})
    assert long.result(10) == {"done": True}


def test_a_worker_that_leaves_is_missed_at_once(hub, connect):
    connect(hub.address, Echo())
    until(lambda: "a" in hub.members)
    long = hub.call("a", "long")
    assert hub.call("a", "leave").result(10)
    with pytest.raises(Lost):
        long.result(2)
    until(lambda: not hub.members)
    with pytest.raises(Lost):
        hub.call("a", "put").result(2)


def test_it_comes_back_to_the_next_head_with_what_it_has(hub, keys, connect):
    worker = Echo()
    connect(hub.address, worker)
    until(lambda: "a" in hub.members)
    first = hub.call("a", "long")
    hub.close()
    with pytest.raises(Lost):
        first.result(2)
    time.sleep(1.0)
    again = Hub(hub.address, keys[0], lambda hello: {"session": "fake/night"})
    try:
        begun = time.monotonic()
        until(lambda: "a" in again.members)
        assert time.monotonic() < begun + 4
        second = again.call("a", "long")
        worker.long.set_result({"kept": 1})
        assert second.result(5) == {"kept": 1}
    finally:
        again.close()


def test_who_is_silent_is_given_up(hub, connect, monkeypatch):
    monkeypatch.setattr(wire, "SILENCE", 0.5)
    monkeypatch.setattr(wire, "ALIVE_EVERY", 0.1)
    worker = Echo()
    connect(hub.address, worker)
    until(lambda: "a" in hub.members)
    asked = hub.call("a", "long")
    worker.sleeps = 3.0
    with pytest.raises(Lost):
        asked.result(5)


def test_the_head_says_no_with_its_reason(keys, connect):
    def admit(hello):
        raise Refused("not today")

    hub = Hub("tls://127.0.0.1:0", keys[0], admit)
    try:
        ended, thread = connect(hub.address, Echo())
        thread.join(10)
        assert isinstance(ended[0], Refused) and str(ended[0]) == "not today" and not hub.members
    finally:
        hub.close()


def refused(hub, connect, keys):
    ended, thread = connect(hub.address, Echo(), keys, patience=1.0)
    thread.join(20)
    assert isinstance(ended[0], Refused) and "does not accept this invitation" in str(ended[0])
    assert not hub.members
    return str(ended[0])


def test_a_foreign_certificate_is_refused(hub, connect, tmp_path, keys):
    (tmp_path / "foreign").mkdir()
    foreign = invitation.keys(SimpleNamespace(folder=tmp_path / "foreign", name="other/night"), "worker")
    refused(hub, connect, foreign)  # neither accepts the other
    mixed = wire.Keys(keys[1].authority, foreign.certificate, foreign.key)
    refused(hub, connect, mixed)  # the head does not accept the worker


def test_a_head_with_a_foreign_certificate_is_refused(connect, tmp_path, keys):
    (tmp_path / "foreign").mkdir()
    foreign = invitation.keys(SimpleNamespace(folder=tmp_path / "foreign", name="other/night"), "head")
    hub = Hub("tls://127.0.0.1:0", foreign, lambda hello: {})
    try:
        refused(hub, connect, keys[1])
    finally:
        hub.close()


def test_an_invitation_makes_nobody_a_head(connect, keys, session):
    hub = Hub("tls://127.0.0.1:0", invitation.keys(session, "worker"), lambda hello: {})
    try:
        refused(hub, connect, keys[1])
    finally:
        hub.close()


def test_an_expired_certificate_is_refused(hub, connect, session):
    refused(hub, connect, invitation.keys(session, "worker", days=-1.0))


def test_plain_tcp_is_refused(hub, connect, keys):
    address = hub.address.removeprefix("tls://").rsplit(":", 1)
    with socket.create_connection((address[0], int(address[1])), timeout=5) as plain:
        plain.sendall(b"\x00" * 64)
        plain.settimeout(5)
        try:
            said = plain.recv(1000)
        except ConnectionResetError:
            said = b""
    assert b"welcome" not in said and not hub.members
    ended, thread = connect(hub.address.replace("tls://", "tcp://"), Echo(), patience=1.0)
    thread.join(20)
    assert isinstance(ended[0], LabError) and not hub.members
    with pytest.raises(LabError, match="connections are encrypted"):
        Hub("tcp://127.0.0.1:0", keys[0], lambda hello: {})


def test_an_invitation_is_for_its_owner_alone(tmp_path, keys):
    path = tmp_path / "a.invitation"
    made = invitation.Invitation("tls://127.0.0.1:1", "fake/night", keys[1], "j", "d")
    made.write(path)
    assert path.stat().st_mode & 0o077 == 0 and invitation.Invitation.read(path) == made
    path.write_text("{}")
    with pytest.raises(LabError, match="is not an invitation"):
        invitation.Invitation.read(path)


def test_what_is_no_message_ends_the_connection(hub, keys):
    """Too long, no MessagePack, or no dict: of somebody who holds an invitation."""
    host, port = wire._parts(hub.address)
    for content in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x01\x07"):
        with socket.create_connection((host, port), timeout=10) as plain:
            with keys[1].context(listening=False).wrap_socket(plain) as encrypted:
                encrypted.sendall(content)
                assert encrypted.recv(100) == b""
    assert not hub.members


def test_a_slow_line_is_no_silence(hub, keys, monkeypatch):
    """A large message takes longer than the silence after which an end is given up."""
    monkeypatch.setattr(wire, "SILENCE", 0.5)
    content = wire.msgspec.msgpack.encode({"alive": {"content": bytes(6 * wire.PART)}})
    hello = wire.msgspec.msgpack.encode({"hello": {"name": "a"}})
    with socket.create_connection(wire._parts(hub.address), timeout=10) as plain:
        with keys[1].context(listening=False).wrap_socket(plain) as encrypted:
            monkeypatch.setattr(wire, "ALIVE_EVERY", 0.1)
            encrypted.sendall(wire.LENGTH.pack(len(hello)) + hello)
            until(lambda: "a" in hub.members)
            member = hub.members["a"]
            encrypted.sendall(wire.LENGTH.pack(len(content)))
            for offset in range(0, len(content), wire.PART):
                time.sleep(0.2)
                encrypted.sendall(content[offset : offset + wire.PART])
            until(lambda: member.alive)
            assert hub.members["a"] is member
