"""`python -m lab mcp`: the lab for agents whose shells may not write here or use the device, over MCP on standard input
and output. The agent's program starts it outside of the sandbox; the official SDK does the protocol.

Each tool is one of the lab's commands, run as a process: the session's judge carries it out, and an experiment goes on
when the client hangs up.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from lab.errors import LabError
from lab.genome.syntax import TRAIN, normalised, with_ends_of
from lab.session.repository import here

WAIT = 45  # seconds that a call takes at most: clients give up after 60
INSTRUCTIONS = """Experiments on train.py, judged by val_bpb (lower is better). `propose` makes one change and runs it;
while it says that the experiment is running, call `wait` again. Afterwards train.py is the best so far again."""


@dataclass
class Edit:
    """A part of train.py, which has to be there once, and what takes its place."""

    old: str
    new: str


def serve() -> None:
    """Serves until the client hangs up.

    Raises:
        LabError: the SDK is not installed.
    """
    try:
        import anyio
        from mcp.server.mcpserver import MCPServer
        from mcp.types import ToolAnnotations
    except ImportError as error:
        raise LabError(f'this needs the package mcp ({error}): pip install -c constraints.txt ".[mcp]"') from error

    server = MCPServer("lab", instructions=INSTRUCTIONS)
    reads = ToolAnnotations(read_only_hint=True)
    acts = ToolAnnotations(read_only_hint=False, destructive_hint=False)

    async def lab(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "lab", *arguments]
        with anyio.CancelScope(shield=True):  # a client that hangs up would have it killed between two steps
            done = await anyio.run_process(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
        return done.returncode, done.stdout.decode(errors="replace").strip()

    @server.tool(annotations=reads)
    async def status() -> str:
        """The best so far, the noise, the smallest gain that can be seen, recent experiments, near misses."""
        return (await lab("status"))[1]

    @server.tool(annotations=reads)
    async def log(number: int | None = None) -> str:
        """The experiments so far; with a number, one of them with its runs."""
        return (await lab("log", *([] if number is None else [str(number)])))[1]

    @server.tool(annotations=reads)
    async def check() -> str:
        """Tries train.py as it is in the repository: a few tiny steps, within seconds and without a score."""
        return (await lab("check"))[1]

    @server.tool(annotations=acts)
    async def propose(message: str, edits: list[Edit]) -> str:
        """Makes edits of train.py, runs it for its budget, and tells the verdict, or that it is running still.

        Args:
            message: what is changed, and why.
            edits: made one after the other; none, to take train.py as it is in the repository.
        """
        repository = here()
        if repository is None:
            return "there is no git repository here"
        before = await anyio.to_thread.run_sync((repository.path / TRAIN).read_bytes)
        after, problem = edited(before, edits)
        if problem:
            return problem
        (repository.path / TRAIN).write_bytes(after)
        code, said = await lab("run", f"--message={message}", f"--wait={WAIT}")
        if code and (repository.path / TRAIN).read_bytes() == after:  # it was not taken
            (repository.path / TRAIN).write_bytes(before)
        return said

    @server.tool(annotations=acts)
    async def wait() -> str:
        """Goes on waiting for the experiment that is running, or resumes what was interrupted."""
        return (await lab("wait", f"--wait={WAIT}"))[1]

    server.run()


def edited(content: bytes, edits: list[Edit]) -> tuple[bytes, str]:
    """(train.py with the edits made, ""), or (as it was, what is wrong with one)."""
    try:
        text = normalised(content).decode()
    except UnicodeDecodeError as error:
        return content, f"nothing was run: {TRAIN} is no UTF-8 text ({error})"
    for number, edit in enumerate(edits, 1):
        old, new = (side.replace("\r\n", "\n") for side in (edit.old, edit.new))
        if (times := text.count(old)) != 1 or not old:
            return content, (
                f"nothing was run: the old text of edit {number} is in {TRAIN} {times} times, and has to be once"
            )
        text = text.replace(old, new)
    return with_ends_of(content, text.encode()), ""
