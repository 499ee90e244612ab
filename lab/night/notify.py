"""A line to a command of the user's: a new best, trouble, the morning."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid

from lab import untrusted
from lab.run import processes

LIMIT = 30.0  # seconds
POLL = 0.1  # seconds
failing: set[str] = set()  # commands whose last message did not go out: that is said once


def send(command: str, text: str, say) -> threading.Thread:
    """Has the shell run `command` with the text as its standard input, and as $LAB_MESSAGE; nobody waits for it.

    Args:
        text: of which one clean line is sent.
        say: called, from another thread, with a line if the command fails where it did not the time before.

    Returns:
        what sends it. The program's end waits for it, at most `LIMIT`: the last message is to go out, too.
    """
    thread = threading.Thread(target=_deliver, args=(command, untrusted.one_line(text, 1000), say), name="notify")
    thread.start()
    return thread


def _deliver(command: str, text: str, say) -> None:
    try:
        problem = run(command, text)
    except Exception as error:  # no shell, no temporary folder, no more processes: the night goes on without
        problem = str(error)
    if problem is None:
        failing.discard(command)
    elif command not in failing:
        failing.add(command)
        problem = untrusted.one_line(problem)
        say(f"--notify: the command failed ({problem}); the night continues, and tries it again with the next message")


def run(command: str, text: str) -> str | None:
    """What went wrong, or None. What the command started and left behind has the rest of its time, too."""
    mark = {"LAB_NOTIFICATION": uuid.uuid4().hex}
    with tempfile.TemporaryFile() as message, tempfile.TemporaryFile() as output:
        message.write(text.encode() + b"\n")
        message.seek(0)
        environment = {**os.environ, "LAB_MESSAGE": text, **mark}
        process = processes.shell(command, stdin=message, stdout=output, stderr=output, env=environment)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and (process.poll() is None or processes.left_of(process, **mark)):
            time.sleep(POLL)
        late = processes.end(lambda: processes.left_of(process, **mark))
        status = process.wait()
        if late:
            return f"it took longer than {LIMIT:g} s, and was ended"
        if status == 0:
            return None
        output.seek(0)
        said = output.read(100_000).decode(errors="replace").strip().splitlines()
        return f"exit status {status}" + (f": {said[-1]}" if said else "")
