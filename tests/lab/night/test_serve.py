"""The report over the network: with the address and in no other way, as it is now, and only to read."""

import http.client
import socket
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import sessions
from sessions import attempt, edited

from lab.errors import LabError
from lab.night import serve
from lab.verdict import executor


@pytest.fixture
def night(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


@pytest.fixture
def address(night):
    said = []
    with serve.served(night, 0, said.append) as addresses:
        assert addresses[0] in said[0]
        yield addresses[0]


def asked(address, method="GET", path=None):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request(method, parts.path if path is None else path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_report_as_it_is_now(night, address):
    answer, before = asked(address)
    assert answer.status == 200 and b"Nothing kept yet" in before
    assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Refresh"]
    attempt(night, edited(LOSS=0.5))
    assert b"better than the baseline" in asked(address)[1]
    answer, content = asked(address, "HEAD")
    assert answer.status == 200 and content == b""


def test_a_client_that_takes_its_time_holds_up_nobody(night):
    with serve.served(night, 0, lambda line: None) as addresses:
        parts = urlsplit(addresses[0])
        with socket.create_connection((parts.hostname, parts.port)) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nX: ")
            assert asked(addresses[0])[0].status == 200


def test_what_can_not_be_shown_now_is_shown_later(night, address, monkeypatch):
    def broken(session):
        raise LabError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "report", broken)
        answer, content = asked(address)
    assert answer.status == 503 and content == b"no report now: the disk is full"
    assert asked(address)[0].status == 200


@pytest.mark.parametrize(
    "path", ["/", "/report.html", "/../journal.jsonl", "/{}", "/{}/journal.jsonl", "/{}/?x", "//", "/é/"]
)
def test_without_the_address_there_is_nothing(address, path):
    key = urlsplit(address).path.strip("/")
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 10) as connection:
        connection.sendall(f"GET {path.format(key)} HTTP/1.0\r\n\r\n".encode())
        said = b"".join(iter(lambda: connection.recv(4096), b""))
    assert said.split()[1] in (b"404", b"400") and b"session" not in said and key.encode() not in said


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(address, method):
    assert asked(address, method)[0].status == 501


def test_who_hangs_up_or_says_nothing_holds_up_nobody_for_long(address, monkeypatch):
    parts = urlsplit(address)
    for said in (b"", b"GET", b"\x00\xff\r\n\r\n"):
        with socket.create_connection((parts.hostname, parts.port), 10) as connection:
            connection.sendall(said)
    assert asked(address)[0].status == 200


def test_a_report_that_fails_ends_nothing(night, address, monkeypatch):
    monkeypatch.setattr(serve, "report", lambda session: 1 / 0)
    assert asked(address)[0].status == 503


def test_each_night_has_another_address_and_ends_with_it(night):
    with serve.served(night, 0, lambda line: None) as one:
        pass
    with serve.served(night, 0, lambda line: None) as other:
        assert urlsplit(one[0]).path != urlsplit(other[0]).path
    with pytest.raises(OSError):
        asked(other[0])


def test_a_port_that_is_taken(night):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LabError, match=f"port {port} can't be used"), serve.served(night, port, print):
            pass


def test_an_alias_of_a_network_card_is_an_address(monkeypatch):
    card = [SimpleNamespace(family=socket.AF_INET, address="192.168.1.2")]
    alias = [SimpleNamespace(family=socket.AF_INET, address="192.168.1.3")]
    monkeypatch.setattr(serve.psutil, "net_if_addrs", lambda: {"eth0": card, "eth0:1": alias})
    monkeypatch.setattr(serve.psutil, "net_if_stats", lambda: {"eth0": SimpleNamespace(isup=True)})
    assert serve.hosts() == ["192.168.1.2", "192.168.1.3"]


def test_by_default_nothing_is_served(night):
    with serve.served(night, None, print) as addresses:
        assert addresses == []
