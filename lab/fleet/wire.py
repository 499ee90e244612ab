"""The connection between a head and its workers: messages over TCP with mutual TLS.

A worker connects to the head, keeps one connection, and connects again whenever it is lost: so only the head's port has
to be reached. Over it the head calls operations of the worker, several at a time, and both say regularly that they are
there. A message is its length in four bytes, the most significant first, and a dict as MessagePack; nothing in it is
executed.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lab.errors import LabError

ALIVE_EVERY = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which the other end is given up
CONNECT = 5.0  # seconds for a connection to be made
LOOK = 0.2  # seconds between looks whether it is to leave
AGAIN = 0.5  # seconds until that is tried again
PIECE = 16 * 2**20  # bytes of a file in one message
LONGEST = 4 * PIECE  # bytes of a message
PART = 2**18  # bytes of it that are waited for at a time
LENGTH = struct.Struct(">I")


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

    def context(self, listening: bool) -> ssl.SSLContext:
        """What has both ends prove who they are. At which address is no part of it: home networks have no names."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listening else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authority)
        with tempfile.TemporaryDirectory() as folder:  # its owner's alone; ssl reads keys from files only
            path = Path(folder) / "own.pem"
            path.write_text(self.certificate + self.key)
            context.load_cert_chain(path)
        return context


class _Line:
    """A connection that several may write to. Its methods raise an OSError once it is lost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer, self.heard, self._writing = reader, writer, time.monotonic(), asyncio.Lock()

    async def write(self, message: dict) -> None:
        content = msgspec.msgpack.encode(message)
        async with self._writing:
            self.writer.writelines([LENGTH.pack(len(content)), content])
            await self.writer.drain()

    async def read(self) -> dict:
        (length,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        if length > LONGEST:
            raise ConnectionError(f"a message of {length} bytes")
        try:
            return msgspec.msgpack.decode(await self._exactly(length), type=dict)
        except msgspec.DecodeError as error:
            raise ConnectionError(f"what it received is not a message: {error}") from error

    async def _exactly(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            part = await self.reader.read(min(PART, length - len(content)))
            if not part:
                raise ConnectionError("the other end has closed the connection")
            content += part
            self.heard = time.monotonic()  # a large message may take longer than SILENCE
        return bytes(content)

    async def close(self) -> None:
        """Ends the connection once all that was written has gone."""
        with suppress(OSError):
            self.writer.close()
            await self.writer.wait_closed()

    def abort(self) -> None:
        self.writer.transport.abort()

    async def stay(self, facts: Callable[[], dict]) -> None:
        """Says regularly that this end is there; ends the connection once the other end has been silent for long."""
        with suppress(OSError):
            while time.monotonic() < self.heard + SILENCE:
                await self.write({"alive": facts()})
                await asyncio.sleep(ALIVE_EVERY)
        self.abort()


def _parts(address: str) -> tuple[str, int]:
    """Host and port of "tls://HOST:PORT"; LabError for anything else."""
    host, port = address.removeprefix("tls://").rpartition(":")[::2]
    if not address.startswith("tls://") or not host or not port.isdigit():
        raise LabError(f"{address} is no tls://HOST:PORT: connections are encrypted")
    return host.strip("[]"), int(port)


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
        OSError: it can't listen there. LabError: the address is not one of tls://.
    """

    def __init__(self, address: str, keys: Keys, admit: Callable[[dict], dict]):
        where = _parts(address)
        self.members: dict[str, Member] = {}
        self.left: dict[str, str] = {}
        self.stir = threading.Event()
        self._admit, self._numbers = admit, itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)
        self._thread.start()
        self._handlers: set[asyncio.Task] = set()
        listening = asyncio.start_server(self._connected, *where, ssl=keys.context(listening=True))
        self._listener = self._do(listening).result()
        self.address = "tls://{}:{}".format(where[0], self._listener.sockets[0].getsockname()[1])

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
            self._listener.close()
            for member in self.members.values():
                member.line.abort()
            if self._handlers:
                await asyncio.wait(self._handlers, timeout=1.0)

        if not self._loop.is_running():
            return
        self._do(close()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _do(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

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

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._handlers.add(task)
        line = _Line(reader, writer)
        try:
            with suppress(OSError):
                await self._attend(line)
        finally:
            line.abort()
            self._handlers.discard(task)

    async def _attend(self, line: _Line) -> None:
        """Listens to a worker until it is lost."""
        hello = (await line.read()).get("hello")
        try:
            if not isinstance(hello, dict) or not isinstance(hello.get("name"), str):
                raise Refused("it does not say what it is")
            welcome = self._admit(hello)
        except Refused as refusal:
            await line.write({"refused": str(refusal)})
            return await line.close()
        await line.write({"welcome": welcome})
        member = Member(hello["name"], hello, line)
        if before := self.members.get(member.name):  # it comes back before it was missed
            before.line.abort()
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
        """Called repeatedly while there is no head. May set `leaving`."""
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
    (host, port), context, met = _parts(address), keys.context(listening=False), False
    while not operations.leaving:
        problem = "it does not answer"
        try:
            connecting = asyncio.open_connection(host, port, ssl=context)
            line = _Line(*await asyncio.wait_for(connecting, CONNECT))
            try:
                await line.write({"hello": operations.hello()})
                first = await asyncio.wait_for(line.read(), SILENCE)
                if "refused" in first:
                    raise Refused(first["refused"])
                met = True
                operations.welcomed(first["welcome"])
                await _talk(line, operations)
            finally:
                line.abort()
        except (OSError, asyncio.TimeoutError) as error:
            problem = str(error) or type(error).__name__
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
        await line.close()

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
