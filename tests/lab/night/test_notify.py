"""A line to the user's command: it arrives, and nothing that the command does reaches the night."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lab.night import notify

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands here are a Unix shell's")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(notify, "failing", set())


def sent(command, text="new best 0.9912", wait=True):
    """What `send` said."""
    said = []
    thread = notify.send(command, text, said.append)
    if wait:
        thread.join()
    return said


def test_it_arrives_on_standard_input_and_as_a_variable(tmp_path):
    assert sent(f'cat > {tmp_path}/in; printf %s "$LAB_MESSAGE" > {tmp_path}/variable') == []
    assert (tmp_path / "in").read_text() == "new best 0.9912\n"
    assert (tmp_path / "variable").read_text() == "new best 0.9912"


def test_it_is_one_clean_line(tmp_path):
    sent(f"cat > {tmp_path}/in", "\x1b[31mnew\nbest $(touch x) \u202e`id`")
    assert (tmp_path / "in").read_text() == "new best $(touch x) `id`\n"


def test_a_command_that_reads_nothing_and_prints_much_is_fine():
    assert sent("head -c 1000000 /dev/zero") == []


def test_nobody_waits_for_it(tmp_path):
    said = []
    thread = notify.send(f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done", "text", said.append)
    assert thread.is_alive() and not thread.daemon  # the last message is sent, too
    (tmp_path / "go").touch()
    thread.join()
    assert said == []


def test_a_failure_is_said_once_until_it_works_again(tmp_path):
    command = f"[ -e {tmp_path}/works ] || {{ echo starting; echo 'no such\x1b[31m host' >&2; exit 7; }}"
    first = sent(command)
    assert len(first) == 1 and "exit status 7: no such host" in first[0] and "the night continues" in first[0]
    assert sent(command) == []
    (tmp_path / "works").touch()
    assert sent(command) == []
    (tmp_path / "works").unlink()
    assert len(sent(command)) == 1


def test_what_cannot_be_started_is_a_failure_too(monkeypatch):
    def full(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", full)
    assert "no more processes" in sent("true")[0]


@pytest.mark.parametrize(
    "command",
    [
        "echo $$ >> {0}; trap '' TERM; sleep 1000 & echo $! >> {0}; wait",
        '{1} -c \'import os, time; os.setsid(); open("{0}", "a").write(str(os.getpid()) + "\\n"); time.sleep(1000)\' & '
        "sleep 1; exit 0",
    ],
)
def test_one_that_does_not_end_is_ended_with_what_it_started(tmp_path, monkeypatch, command):
    monkeypatch.setattr(notify, "LIMIT", 2.0)
    pids = tmp_path / "pids"
    assert "longer than 2 s" in sent(command.format(pids, shlex.quote(sys.executable)))[0]
    for pid in map(int, pids.read_text().split()):
        assert ended(pid)


def test_what_it_leaves_behind_may_finish(tmp_path):
    assert sent(f"(sleep 1; touch {tmp_path}/done) &") == []
    assert Path(tmp_path, "done").exists()


def ended(pid):
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False
