"""The connection between a head and its workers: the only file that imports `distributed`.

What is used of it is its transport (framed messages over TCP with mutual TLS) and none of its scheduler: who does what
is the head's to say (pool.py). A worker connects to the head, keeps one connection, and connects again whenever it is
lost: so only the head's port has to be reached. Over it the head calls operations of the worker, several at a time, and
both say regularly that they are there. Messages are of numbers, texts, bytes, tuples and dicts; nothing in them is
executed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from distributed.comm.core import CommClosedError, connect, listen
from distributed.security import Security

from lab.errors import LabError

ALIVE_EVERY = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which the other end is given up
CONNECT = 5.0  # seconds for a connection to be made
LOOK = 0.2  # seconds between looks whether it is to leave
AGAIN = 0.5  # seconds until that is tried again
PIECE = 16 * 2**20  # bytes of a file in one message
MESSAGES = ("msgpack",)

logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what happens is told by who calls this


class Refused(LabError):
    """One end does not want the other; the reason says why."""


class Lost(Exception):
    """A worker was lost before it answered."""


@dataclass(frozen=True)
class Keys:
    """What one end of a connection proves who it is with, each a text in PEM: the authority that both are certified by,
    its certificate, and its private key."""

    authority: str
    certificate: str
    key: str

    def arguments(self, listening: bool) -> dict[str, Any]:
        mine = "scheduler" if listening else "worker"
        security = Security(
            require_encryption=True,
            tls_ca_file=self.authority,
            **{f"tls_{mine}_cert": self.certificate, f"tls_{mine}_key": self.key},
        )
        return security.get_listen_args(mine) if listening else security.get_connection_args(mine)


class _Line:
    """A connection that several may write to."""

    def __init__(self, comm):
        self.comm, self.heard, self._writing = comm, time.monotonic(), asyncio.Lock()

    async def write(self, message: dict) -> None:
        async with self._writing:
            await self.comm.write(message, serializers=MESSAGES)

    async def read(self) -> dict:
        message = await self.comm.read(deserializers=MESSAGES)
        self.heard = time.monotonic()
        if not isinstance(message, dict):
            raise CommClosedError("what came is no message")
        return message

    async def stay(self, facts: Callable[[], dict]) -> None:
        """Says regularly that this end is there; ends the connection once the other end has been silent for long."""
        with suppress(OSError):
            while time.monotonic() < self.heard + SILENCE:
                await self.write({"alive": facts()})
                await asyncio.sleep(ALIVE_EVERY)
        self.comm.abort()


# --- The head's end ---


@dataclass
class Member:
    """A worker that is connected. `hello`: what it said of itself at first; `alive`: what it says now and then."""

    name: str
    hello: dict
    line: _Line
    alive: dict = field(default_factory=dict)
    waiting: dict[int, Future] = field(default_factory=dict)


class Hub:
    """The head's end: listens, knows who is connected, calls them.

    Args:
        address: "tls://127.0.0.1:0", say. admit: called with what a worker says of itself ("name" at least); gives what
            it is told, or raises Refused.

    Attributes:
        address: with the port that it listens at. members: by name. left: why those who said so do not come back.
        stir: set whenever something has happened.

    Raises:
        OSError: it can't listen there.
    """

    def __init__(self, address: str, keys: Keys, admit: Callable[[dict], dict]):
        self.members: dict[str, Member] = {}
        self.left: dict[str, str] = {}
        self.stir = threading.Event()
        self._admit, self._numbers = admit, itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)
        self._thread.start()
        self._listener = self._do(self._listen(address, keys)).result()
        self.address: str = self._listener.contact_address

    def call(self, name: str, operation: str, **facts) -> Future:
        """Has a worker do something. The answer is a dict; Lost if it is lost before, LabError if it says no."""
        answer: Future = Future()
        answer.add_done_callback(lambda _: self.stir.set())
        answer.set_running_or_notify_cancel()
        self._do(self._call(name, operation, facts, answer))
        return answer

    def close(self) -> None:
        """Ends all connections. Workers try to come back."""

        async def close():
            self._listener.stop()
            for member in self.members.values():
                member.line.comm.abort()
            await asyncio.sleep(0)

        if not self._loop.is_running():
            return
        self._do(close()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _do(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _listen(self, address: str, keys: Keys):
        listener: Any = listen(address, self._connected, deserialize=False, **keys.arguments(listening=True))
        await listener.start()
        return listener

    async def _call(self, name: str, operation: str, facts: dict, answer: Future) -> None:
        member, number = self.members.get(name), next(self._numbers)
        if member is None:
            return answer.set_exception(Lost(name))
        member.waiting[number] = answer
        try:
            await member.line.write({"id": number, "do": operation, "facts": facts})
        except Exception as error:  # OSError if it is lost
            if member.waiting.pop(number, None):
                answer.set_exception(Lost(f"{name}: {error}"))

    async def _connected(self, comm) -> None:
        line, member = _Line(comm), None
        with suppress(OSError):
            hello = (await line.read()).get("hello")
            try:
                if not isinstance(hello, dict) or not isinstance(hello.get("name"), str):
                    raise Refused("it says nothing of itself")
                welcome = self._admit(hello)
            except Refused as refusal:
                await line.write({"refused": str(refusal)})
                return await comm.close()
            await line.write({"welcome": welcome})
            member = Member(hello["name"], hello, line)
            if before := self.members.get(member.name):  # it comes back before it was missed
                before.line.comm.abort()
                self._leave(before)
            self.members[member.name] = member
            self.left.pop(member.name, None)
            self.stir.set()
            staying = asyncio.create_task(line.stay(dict))
            try:
                while True:
                    message = await line.read()
                    if "alive" in message:
                        member.alive = message["alive"]
                    elif (answer := member.waiting.pop(message.get("id", 0), None)) and "answer" in message:
                        answer.set_result(message["answer"])
                    elif answer:
                        answer.set_exception(LabError(str(message.get("problem"))))
            finally:
                staying.cancel()
                self._leave(member)
                comm.abort()

    def _leave(self, member: Member) -> None:
        if self.members.get(member.name) is member:
            del self.members[member.name]
            if why := member.alive.get("leaving"):
                self.left[member.name] = str(why)
        while member.waiting:
            member.waiting.popitem()[1].set_exception(Lost(member.name))
        self.stir.set()


# --- A worker's end ---


class Operations(Protocol):
    """What a worker does when it is called."""

    leaving: str  # why it does not come back, "" while it does; may be set at any moment

    def hello(self) -> dict: ...

    def alive(self) -> dict: ...

    def welcomed(self, welcome: dict) -> None: ...

    def do(self, operation: str, facts: dict) -> dict | Future: ...

    def alone(self) -> None:
        """Called now and then while there is no head. May set `leaving`."""
        ...


def serve(address: str, keys: Keys, operations: Operations, patience: float = float("inf")) -> None:
    """Connects to the head, and does what it asks for, until `operations.leaving`; comes back whenever it was lost.

    Args:
        patience: seconds for the first connection.

    Raises:
        Refused: the head says no, or is not the one that these keys are for, or there was none.
    """
    asyncio.run(_serve(address, keys, operations, time.monotonic() + patience))


async def _serve(address: str, keys: Keys, operations: Operations, deadline: float) -> None:
    arguments, met = keys.arguments(listening=False), False
    while not operations.leaving:
        problem = "it does not answer"
        try:
            comm = await connect(address, timeout=CONNECT, deserialize=False, **arguments)
            line = _Line(comm)
            try:
                await line.write({"hello": operations.hello()})
                first = await asyncio.wait_for(line.read(), SILENCE)
                if "refused" in first:
                    raise Refused(first["refused"])
                met = True
                operations.welcomed(first["welcome"])
                await _talk(line, operations)
            finally:
                comm.abort()
        except (OSError, asyncio.TimeoutError, ssl.SSLError) as error:
            cause = error.__cause__ or error
            problem = str(cause) or type(cause).__name__
        if not met and time.monotonic() > deadline:
            raise Refused(f"there is no head at {address}, or it does not accept this invitation: {problem}")
        operations.alone()
        await asyncio.sleep(AGAIN)


async def _talk(line: _Line, operations: Operations) -> None:
    """Answers what is asked, until the connection ends or `operations.leaving`."""

    async def leave() -> None:
        while not operations.leaving:
            await asyncio.sleep(LOOK)
        with suppress(OSError):
            await line.write({"alive": {"leaving": operations.leaving}})
        await line.comm.close()

    tasks = {asyncio.create_task(line.stay(operations.alive)), asyncio.create_task(leave())}

    async def answer(message: dict) -> None:
        reply: dict[str, Any] = {"id": message["id"]}
        try:
            made = await asyncio.to_thread(operations.do, message["do"], message["facts"])
            reply["answer"] = await asyncio.wrap_future(made) if isinstance(made, Future) else made
        except LabError as error:  # a SystemExit
            reply["problem"] = str(error)
        except Exception as error:
            reply["problem"] = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            await line.write(reply)

    try:
        while True:
            message = await line.read()
            if "do" in message:
                tasks.add(task := asyncio.create_task(answer(message)))
                task.add_done_callback(tasks.discard)
    finally:
        for task in list(tasks):
            task.cancel()
