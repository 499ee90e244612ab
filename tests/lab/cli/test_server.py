"""The lab as an MCP server: what an agent in a sandbox can do through it, and what it leaves when it hangs up."""

import json
import os
import subprocess
import sys
import time

import pytest
from sessions import check
from test_kill import project  # noqa: F401 (a fixture)

from lab.cli import server
from lab.session.session import Session

pytest.importorskip("mcp")


class Client:
    """Speaks MCP's lines: JSON-RPC 2.0 on pipes."""

    def __init__(self, folder, home, **variables):
        environment = {**os.environ, "AUTORESEARCH_HOME": str(home), **variables}
        command = [sys.executable, "-m", "lab", "mcp"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process, self.number = subprocess.Popen(command, cwd=folder, env=environment, **pipes), 0
        about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
        self.about = self.ask("initialize", about)
        self.send({"method": "notifications/initialized"})

    def send(self, message):
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.process.stdin.flush()

    def ask(self, method, given):
        self.number += 1
        self.send({"id": self.number, "method": method, "params": given})
        while answer := json.loads(self.process.stdout.readline()):
            if answer.get("id") == self.number:
                return answer["result"]

    def call(self, tool, **given) -> str:
        return self.ask("tools/call", {"name": tool, "arguments": given})["content"][0]["text"]

    def hang_up(self):
        self.process.stdin.close()
        return self.process.wait(20)


@pytest.fixture
def begun(project, isolated_home):  # noqa: F811
    """(session, client) with a baseline."""
    client = Client(project.repository.path, isolated_home)
    assert "baseline" in client.call("wait")
    yield project, client
    if client.process.poll() is None:
        client.hang_up()


def test_a_session_of_experiments(begun):
    session, client = begun
    tools = {tool["name"]: tool for tool in client.ask("tools/list", {})["tools"]}
    assert sorted(tools) == ["check", "log", "propose", "status", "wait"]
    assert tools["status"]["annotations"]["readOnlyHint"] and not tools["propose"]["annotations"]["readOnlyHint"]
    said = client.call("propose", message="less", edits=[{"old": "LEARNING = 0.9", "new": "LEARNING = 0.7"}])
    while "running" in said:
        said = client.call("wait")
    assert "less" in said and "experiment 1" in said
    assert "is in train.py 0 times" in client.call("propose", message="x", edits=[{"old": "ABSENT", "new": "MO"}])
    assert "less" in client.call("log") and "less" in client.call("log", number=1)
    assert client.call("status").startswith("session fake-1gb/night: 1 experiment")
    assert client.hang_up() == 0
    check(Session(session.folder))


def test_a_client_that_hangs_up_in_the_middle_of_a_run(begun):
    session, client = begun
    edits = [{"old": "LEARNING = 0.9", "new": "LEARNING = 0.8"}]
    asked = {"name": "propose", "arguments": {"message": "more", "edits": edits}}
    client.send({"id": 99, "method": "tools/call", "params": asked})
    while len(Session(session.folder).state.experiments) < 2:
        time.sleep(0.05)
    client.hang_up()
    deadline = time.monotonic() + 60
    while ((there := Session(session.folder)).state.open or there.supervised) and time.monotonic() < deadline:
        time.sleep(0.1)
    state = there.state
    assert state.last.description == "more" and state.last.applied
    check(Session(session.folder))


def test_what_is_not_taken_is_put_back(begun, isolated_home):
    session, client = begun
    client.hang_up()
    client = Client(session.repository.path, isolated_home, LAB_TURN="an agent's")
    said = client.call("propose", message="x", edits=[{"old": "LEARNING = 0.9", "new": "LEARNING = 0.8"}])
    assert "the night runs the experiments" in said
    assert "LEARNING = 0.9" in (session.repository.path / "train.py").read_text()
    client.hang_up()


@pytest.mark.parametrize(
    "edits, content, problem",
    [
        ([("a", "b")], b"b c", ""),
        ([("a", "b"), ("b c", "d")], b"d", ""),
        ([], b"a c", ""),
        ([("x", "y")], b"a c", "edit 1 is in train.py 0 times"),
        ([("a", "cc"), ("c", "d")], b"a c", "edit 2 is in train.py 3 times"),
        ([("", "y")], b"a c", "has to be once"),
    ],
    ids=["one", "two", "none", "missing", "several", "empty"],
)
def test_edits(edits, content, problem):
    made, said = server.edited(b"a c", [server.Edit(*edit) for edit in edits])
    assert made == content and problem in said and bool(said) == bool(problem)


def test_edits_of_a_file_with_windows_line_ends():
    edits = [server.Edit("a\nb\n", "a\nc\n"), server.Edit("d\r\n", "e\n")]
    assert server.edited(b"a\r\nb\r\nd\r\n", edits) == (b"a\r\nc\r\ne\r\n", "")
    assert "is no UTF-8 text" in server.edited(b"\xff", edits)[1]
