"""The connection: who is let in, what crosses it, and what becomes of it when an end is lost."""

import gc
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest

from lab.errors import LabError
from lab.fleet import invitation, wire
from lab.fleet.wire import Alive, Hello, Hub, Lost, Message, Refused
from storage import DataError


class Echo:
    """Operations of a worker: those of the tests."""

    def __init__(self, name="a"):
        self.name, self.leaving, self.tries, self.sleeps, self.long = name, "", 0, 0.0, Future()
        self.long.set_running_or_notify_cancel()

    def hello(self):
        return Hello(self.name)

    def alive(self):
        time.sleep(self.sleeps)  # its loop stands still
        return Alive(hot=True)

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
        if operation == "full":
            raise DataError("the disk is full")
        if operation == "large":
            return {"number": 2**64}
        if operation == "wait":
            time.sleep(60.0)
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

    def run(address, operations, own=keys[1], say=lambda text: None):
        ended = []

        def work():
            try:
                wire.serve(address, own, operations, say=say)
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
    for operation, why in {"refuse": "not here", "full": "the disk is full", "large": "can't be sent"}.items():
        with pytest.raises(LabError, match=why):
            hub.call("a", operation).result(10)
    until(lambda: hub.members["a"].alive.hot)


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


@pytest.mark.parametrize("forwarded", [False, True], ids=["nothing-listens", "forwarded"])
def test_a_head_that_is_not_there_yet_is_waited_for(keys, connect, monkeypatch, forwarded):
    """Where ssh forwards the port, it accepts connections, and ends them."""
    monkeypatch.setattr(wire, "AGAIN_AT_FIRST", 0.1)
    said, worker, ending = [], Echo(), threading.Event()

    def forward(listening):
        while not ending.is_set():
            with suppress(OSError):
                listening.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "tls://127.0.0.1:{}".format(listening.getsockname()[1])
        listening.settimeout(0.1)
        if forwarded:
            forwarding = threading.Thread(target=forward, args=(listening,))
            forwarding.start()
            ended, _ = connect(address, worker, say=said.append)
            until(lambda: worker.tries > 5)
            ending.set()
            forwarding.join()
    if not forwarded:
        ended, _ = connect(address, worker, say=said.append)
        until(lambda: worker.tries > 5)
    assert not ended and len(said) == 1 and said[0].startswith(f"waiting for the head at {address}; Ctrl-C ends it (")
    hub = Hub(address, keys[0], lambda hello: {})
    try:
        until(lambda: "a" in hub.members)
    finally:
        hub.close()


def test_what_is_no_head_is_not_waited_for(connect):
    def answer():
        with listening.accept()[0] as plain:
            plain.recv(1000)
            plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        ended, thread = connect("tls://127.0.0.1:{}".format(listening.getsockname()[1]), Echo())
        thread.join(5)
        assert ended and isinstance(ended[0], Refused)


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


def test_of_two_workers_of_one_name_the_first_stays(hub, dial):
    first, second = dial(), dial()
    first.sendall(packed(Message(hello=Hello("a", token="1"))))
    until(lambda: "a" in hub.members)
    second.sendall(packed(Message(hello=Hello("a", token="2"))))
    assert b"give this one another name" in second.makefile("rb").read() and hub.members["a"].hello.token == "1"


def refused(hub, connect, keys):
    ended, thread = connect(hub.address, Echo(), keys)
    thread.join(5)  # at once, though a head that is not there is waited for
    assert ended and isinstance(ended[0], Refused) and "does not accept this invitation" in str(ended[0])
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
    expired = invitation.keys(session, "worker", days=-1.0)
    refused(hub, connect, replace(expired, until=None))  # by the head, whatever the invitation says
    ended, thread = connect(hub.address, Echo(), expired)
    thread.join(10)
    assert re.match(r"this invitation expired on 20.*python -m lab invite FILE", str(ended[0]))


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
    ended, thread = connect(hub.address.replace("tls://", "tcp://"), Echo())
    thread.join(5)
    assert isinstance(ended[0], LabError) and not hub.members
    with pytest.raises(LabError, match="connections are encrypted"):
        Hub("tcp://127.0.0.1:0", keys[0], lambda hello: {})


def test_an_invitation_is_for_its_owner_alone(tmp_path, keys, monkeypatch):
    path = tmp_path / "a.invitation"
    made = invitation.Invitation("tls://127.0.0.1:1", "fake/night", keys[1], "j", "d")
    written, modes = json.dumps, []

    def look(content, **options):  # the file that is to hold it is there already
        modes.extend(file.stat().st_mode & 0o077 for file in tmp_path.glob("a.invitation*"))
        return written(content, **options)

    monkeypatch.setattr(invitation.json, "dumps", look)
    before = os.umask(0)
    made.write(path)
    os.umask(before)
    assert path.stat().st_mode & 0o077 == 0 and invitation.Invitation.read(path) == made
    path.write_text("{}")
    with pytest.raises(LabError, match="is not an invitation"):
        invitation.Invitation.read(path)


@pytest.fixture
def dial(hub, keys):
    """dial(): a TLS connection of somebody who holds an invitation."""
    made = []

    def connection():
        plain = socket.create_connection(wire.host_and_port(hub.address), timeout=10)
        made.append(keys[1].context(listening=False).wrap_socket(plain))
        return made[-1]

    yield connection
    for each in made:
        each.close()


def packed(content: object) -> bytes:
    encoded = content if isinstance(content, bytes) else msgspec.msgpack.encode(content)
    return wire.LENGTH.pack(len(encoded)) + encoded


HOSTILE = {
    "too-long": b"\xff\xff\xff\xff",
    "no-messagepack": packed(b"\xc1"),
    "no-message": packed(7),
    "no-name": packed({"hello": {}}),
    "runs": packed({"hello": {"name": "a", "runs": [[]]}}),
    "deep": packed(b"\x81\xa6answer\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"),
    "alive": packed({"alive": 7}),
    "hot": packed({"alive": {"hot": [1]}}),
    "log": packed({"alive": {"run": 1, "log": None}}),
    "heat": packed({"alive": {"heat": {"margin": b"1"}}}),
    "id": packed({"id": [], "answer": {}}),
    "answer": packed({"id": 1, "answer": 7}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_message_ends_the_connection(hub, dial, content, caplog):
    """At first, and later; and whoever waits for an answer hears of it."""
    first, later = dial(), dial()
    first.sendall(content)
    assert first.recv(100) == b""
    later.sendall(packed(Message(hello=Hello("a"))))
    until(lambda: "a" in hub.members)
    asked = hub.call("a", "long")
    later.sendall(content)
    with pytest.raises(Lost):
        asked.result(5)
    assert not hub.members and not caplog.records


def test_who_connects_and_says_nothing_is_not_waited_for(hub, dial, monkeypatch):
    monkeypatch.setattr(wire, "CONNECT", 0.3)
    assert dial().recv(100) == b""


def test_who_reads_nothing_is_given_up(hub, dial, monkeypatch):
    """Also while large messages are on their way to it, which would wait for ever."""
    monkeypatch.setattr(wire, "SILENCE", 1.0)
    monkeypatch.setattr(wire, "ALIVE_EVERY", 0.1)
    dial().sendall(packed(Message(hello=Hello("a"))))
    until(lambda: "a" in hub.members)
    for asked in [hub.call("a", "put", content=bytes(4 * wire.PIECE - 1000)) for _ in range(4)]:
        with pytest.raises(Lost):
            asked.result(5)


def test_a_worker_leaves_though_it_works_or_its_head_hangs(keys, connect, monkeypatch):
    monkeypatch.setattr(wire, "CONNECT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        worker = Echo()
        _, thread = connect("tls://127.0.0.1:{}".format(listening.getsockname()[1]), worker)
        with keys[0].context(listening=True).wrap_socket(listening.accept()[0], server_side=True) as head:
            head.sendall(packed(Message(welcome={})) + packed(Message(id=1, do="wait")))
            time.sleep(0.5)
            worker.leaving = "it was given back"  # and the head neither reads nor answers
            thread.join(5)
            assert not thread.is_alive()


def test_a_head_leaves_nothing_behind(keys, connect):
    def left():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = left()
    hub = Hub("tls://127.0.0.1:0", keys[0], lambda hello: {})
    with pytest.raises(LabError, match="can't listen"):
        Hub(hub.address, keys[0], lambda hello: {})
    plain = socket.create_connection(wire.host_and_port(hub.address), timeout=10)
    with keys[1].context(listening=False).wrap_socket(plain):
        until(lambda: hub._handlers)
        hub.close()
    with pytest.raises(Lost):
        hub.call("a", "put").result(1)
    gc.collect()
    assert left() == before


@pytest.mark.parametrize(
    "address", ["h:1", "tls://h", "tls://:1", "tls://h:x", "tls://h:65536", "tls://h:\u00b2", "tls://a..b:1"]
)
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(LabError, match="is not tls://HOST:PORT"):
        wire.host_and_port(address)
    assert wire.host_and_port("tls://[::1]:8786") == ("::1", 8786)


def test_a_slow_line_is_no_silence(hub, dial, monkeypatch):
    """A large message takes longer than the silence after which an end is given up."""
    monkeypatch.setattr(wire, "SILENCE", 0.5)
    monkeypatch.setattr(wire, "ALIVE_EVERY", 0.1)
    content, encrypted = packed(Message(alive=Alive(hot=True, log=bytes(6 * wire.PART)))), dial()
    encrypted.sendall(packed(Message(hello=Hello("a"))))
    until(lambda: "a" in hub.members)
    member = hub.members["a"]
    for offset in range(0, len(content), wire.PART):
        time.sleep(0.2)
        encrypted.sendall(content[offset : offset + wire.PART])
    until(lambda: member.alive.hot)
    assert hub.members["a"] is member
