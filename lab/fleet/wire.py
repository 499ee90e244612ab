"""The connection between a head and its workers: messages over TCP with mutual TLS.

A worker connects to the head, keeps one connection, and connects again whenever it is lost: so only the head's port has
to be reached. Over it the head calls operations of the worker, several at a time, and both say regularly that they are
there. A message is its length in four bytes, the most significant first, and a `Message` as MessagePack; nothing in it
is executed.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
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
from urllib.parse import urlsplit

import msgspec

from lab.errors import LabError

ALIVE_EVERY = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which the other end is given up
CONNECT = 5.0  # seconds for a connection to be made
LOOK = 0.2  # seconds between looks whether it is to leave
AGAIN = 0.5  # seconds until that is tried again
AGAIN_AT_FIRST = 2.0  # ... where there was no head yet, which may take hours
CLOSED = 3  # connections in a row that a head ends without a word: that is how it refuses a certificate
PIECE = 4 * 2**20  # bytes of a file in one message
LONGEST = 4 * PIECE  # bytes of a message
PART = 2**18  # bytes of it that are waited for at a time
LENGTH = struct.Struct(">I")


class Refused(LabError):
    """One end does not want the other; the reason says why."""


class Lost(Exception):
    """A worker was lost before it answered."""


class Hello(msgspec.Struct):
    """What a worker says of itself at first.

    Attributes:
        version: a digest of the code that makes runs. token: tells it from another worker of that name. local: a head
            on its machine started it. runs: numbers of those that it makes or has made.
    """

    name: str
    version: str = ""
    token: str = ""
    local: bool = False
    runs: set[int] = set()


class Alive(msgspec.Struct, omit_defaults=True):
    """A sign of life. Of a worker also: why it does not come back; whether it is too hot, and other facts of its device
    (calibration/identity.py); the run that it makes, and the end of its log."""

    leaving: str = ""
    hot: bool = False
    heat: dict[str, bool | float | str | None] = {}
    run: int | None = None
    log: bytes = b""


class Message(msgspec.Struct, omit_defaults=True):
    """A worker's `hello`, and what the head says to it: `welcome` or `refused`. `alive`, of both. A call: `id`, `do`,
    `facts`; and what came of it: `id`, and `answer` or `problem`."""

    hello: Hello | None = None
    welcome: dict[str, Any] | None = None
    refused: str | None = None
    alive: Alive | None = None
    id: int = 0
    do: str = ""
    facts: dict[str, Any] = {}
    answer: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Keys:
    """What one end of a connection proves who it is with, each a text in PEM: the authority that both are certified by,
    its certificate, and its private key. `until`: when the certificate expires, in seconds as of time.time()."""

    authority: str
    certificate: str
    key: str
    until: float | None = None

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

    def send(self, message: Message) -> None:
        """Does not wait until it has gone."""
        content = msgspec.msgpack.encode(message)
        self.writer.writelines([LENGTH.pack(len(content)), content])

    async def write(self, message: Message) -> None:
        async with self._writing:
            self.send(message)
            await self.writer.drain()

    async def read(self) -> Message:
        (length,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        if length > LONGEST:
            raise ConnectionError(f"a message of {length} bytes")
        try:
            return msgspec.msgpack.decode(await self._exactly(length), type=Message)
        except (msgspec.DecodeError, RecursionError) as error:
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
        """Ends the connection once all that was written has gone, or if it does not go."""
        with suppress(OSError, asyncio.TimeoutError):
            self.writer.close()
            await asyncio.wait_for(self.writer.wait_closed(), CONNECT)
        self.abort()

    def abort(self) -> None:
        self.writer.transport.abort()

    async def stay(self, facts: Callable[[], Alive]) -> None:
        """Says regularly that this end is there; ends the connection once the other end has been silent for long."""
        try:
            while time.monotonic() < self.heard + SILENCE:
                self.send(Message(alive=facts()))  # not `write`: it would wait for a large message that does not go
                await asyncio.sleep(ALIVE_EVERY)
        finally:
            self.abort()


def host_and_port(address: str) -> tuple[str, int]:
    """Of "tls://HOST:PORT"; LabError for anything else."""
    with suppress(ValueError):
        known = urlsplit(address)
        if known.scheme == "tls" and known.hostname and known.port is not None:
            known.hostname.encode("idna")  # as a look-up does, where an empty label would be no OSError
            return known.hostname, known.port
    raise LabError(f"{address} is not tls://HOST:PORT: connections are encrypted, and need a port")


def begun(do: Callable[..., Any], *arguments: Any) -> Future:
    """Calls it in a thread that the end of this process does not wait for."""
    done: Future = Future()
    done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            done.set_result(do(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done


# --- The head's end ---


async def _listening(address: str, connected: Callable[..., Any], **more: Any) -> asyncio.Server:
    """LabError if one can't listen there."""
    try:
        return await asyncio.start_server(connected, *host_and_port(address), **more)
    except OSError as error:
        hint, elsewhere = "", (errno.EADDRNOTAVAIL, None)  # later Pythons name none where a host has several addresses
        if isinstance(error, socket.gaierror) or error.errno in elsewhere:
            hint = ": it is no address of this machine; python -m lab invite has --listen for one that is"
        elif error.errno == errno.EADDRINUSE:
            hint = ": is another head running here?"
        raise LabError(f"can't listen at {address} ({error}){hint}") from error


def try_to_listen(address: str) -> None:
    """LabError if a head could not listen there now."""

    async def listen() -> None:
        (await _listening(address, lambda *_: None)).close()

    asyncio.run(listen())


@dataclass
class Member:
    """A worker that is connected. `alive`: what it said last."""

    hello: Hello
    line: _Line
    alive: Alive = field(default_factory=Alive)
    waiting: dict[int, Future] = field(default_factory=dict)


class Hub:
    """The head's end: listens, knows who is connected, calls them.

    Args:
        address: "tls://127.0.0.1:0", say. admit: called with what a worker says of itself; gives what it is told, or
            raises Refused.

    Attributes:
        address: with the port that it listens at. members: by name. left: why those who said so do not come back.
        stir: set whenever something has happened.

    Raises:
        LabError: it can't listen there, or the address is not one of tls://.
    """

    def __init__(self, address: str, keys: Keys, admit: Callable[[Hello], dict]):
        context = keys.context(listening=True)
        self.members: dict[str, Member] = {}
        self.left: dict[str, str] = {}
        self.stir = threading.Event()
        self._admit, self._numbers = admit, itertools.count(1)
        self._handlers: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        try:
            listening = _listening(address, self._connected, ssl=context, ssl_handshake_timeout=CONNECT)
            self._listener = self._loop.run_until_complete(listening)
        except BaseException:
            self._loop.close()
            raise
        self.address = "{}:{}".format(address.rpartition(":")[0], self._listener.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)
        self._thread.start()

    def call(self, name: str, operation: str, **facts) -> Future:
        """Has a worker do something. The answer is a dict; Lost if it is lost before, LabError if it says no."""
        answer: Future = Future()
        answer.add_done_callback(lambda _: self.stir.set())
        answer.set_running_or_notify_cancel()
        calling = self._call(name, operation, facts, answer)
        try:
            asyncio.run_coroutine_threadsafe(calling, self._loop)
        except RuntimeError:  # it is closed
            calling.close()
            answer.set_exception(Lost(name))
        return answer

    def close(self) -> None:
        """Ends all connections. Workers try to come back."""

        async def close():
            self._listener.close()
            for handler in self._handlers:
                handler.cancel()
            if self._handlers:
                await asyncio.wait(self._handlers, timeout=1.0)
            await asyncio.sleep(0)  # what they have aborted is closed now

        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _call(self, name: str, operation: str, facts: dict, answer: Future) -> None:
        member, number = self.members.get(name), next(self._numbers)
        if member is None:
            return answer.set_exception(Lost(name))
        member.waiting[number] = answer
        try:
            await member.line.write(Message(id=number, do=operation, facts=facts))
        except Exception as error:  # OSError if it is lost
            if member.waiting.pop(number, None):
                answer.set_exception(Lost(f"{name}: {error}"))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._handlers.add(task)
        line = _Line(reader, writer)
        try:
            with suppress(OSError, asyncio.TimeoutError, asyncio.CancelledError):  # the last if the hub is closed
                await self._attend(line)
        finally:
            line.abort()
            self._handlers.discard(task)

    async def _attend(self, line: _Line) -> None:
        """Listens to a worker until it is lost."""
        hello = (await asyncio.wait_for(line.read(), CONNECT)).hello
        try:
            if hello is None:
                raise Refused("it does not say what it is")
            before = self.members.get(hello.name)
            if before and before.hello.token != hello.token:
                raise Refused(f"there is a device named {hello.name} already: give this one another name (--name)")
            welcome = self._admit(hello)
        except Refused as refusal:
            await line.write(Message(refused=str(refusal)))
            return await line.close()
        line.send(Message(welcome=welcome))
        member = Member(hello, line)
        if before:  # it comes back before it was missed
            before.line.abort()
            self._leave(before)
        self.members[hello.name] = member
        self.left.pop(hello.name, None)
        self.stir.set()
        staying = asyncio.create_task(line.stay(Alive))
        try:
            while True:
                message = await line.read()
                if message.alive:
                    member.alive = message.alive
                elif (answer := member.waiting.pop(message.id, None)) and message.answer is not None:
                    answer.set_result(message.answer)
                elif answer:
                    answer.set_exception(LabError(message.problem))
        finally:
            staying.cancel()
            self._leave(member)

    def _leave(self, member: Member) -> None:
        name = member.hello.name
        if self.members.get(name) is member:
            del self.members[name]
            if member.alive.leaving:
                self.left[name] = member.alive.leaving
        while member.waiting:
            member.waiting.popitem()[1].set_exception(Lost(name))
        self.stir.set()


# --- A worker's end ---


class Operations(Protocol):
    """What a worker does when it is called."""

    leaving: str  # why it does not come back, "" while it does; may be set at any moment

    def hello(self) -> Hello: ...

    def alive(self) -> Alive: ...

    def welcomed(self, welcome: dict) -> None: ...

    def do(self, operation: str, facts: dict) -> dict | Future: ...

    def alone(self) -> None:
        """Called repeatedly while there is no head. May set `leaving`."""
        ...


def serve(
    address: str,
    keys: Keys,
    operations: Operations,
    patience: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Connects to the head, and does what it asks for, until `operations.leaving`; comes back whenever it was lost.

    Args:
        patience: seconds for the first connection. say: is told, once, that a head is waited for that is not there yet.

    Raises:
        Refused: the head says no, or is not the one that these keys are for, or there was none.
    """
    asyncio.run(_serve(address, keys, operations, time.monotonic() + patience, say))


async def _serve(address: str, keys: Keys, operations: Operations, deadline: float, say: Callable[[str], None]) -> None:
    (host, port), context, met = host_and_port(address), keys.context(listening=False), False
    told, closed = False, 0
    while not operations.leaving:
        if keys.until is not None and time.time() > keys.until:  # a head only closes the connection then
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(keys.until))
            raise Refused(
                f"this invitation expired on {when}: have a new one made on the head: python -m lab invite FILE "
                "--address HOST:PORT"
            )
        problem, connected, refused = "it does not answer", False, False
        try:
            connecting = asyncio.open_connection(host, port, ssl=context)
            line = _Line(*await asyncio.wait_for(connecting, CONNECT))
            connected = True
            try:
                await line.write(Message(hello=operations.hello()))
                first = await asyncio.wait_for(line.read(), SILENCE)
                if first.welcome is None:
                    raise Refused(first.refused or "it does not say whether this device is welcome")
                met = True
                operations.welcomed(first.welcome)
                await _talk(line, operations)
            finally:
                line.abort()
        except (OSError, asyncio.TimeoutError) as error:
            problem = str(error) or problem
            # A forwarded port that leads to no head ends the handshake, too, but says nothing of what is wrong with it.
            refused = isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
        closed = closed + 1 if connected else 0
        if not met and (refused or closed == CLOSED or time.monotonic() > deadline):
            raise Refused(f"there is no head at {address}, or it does not accept this invitation: {problem}")
        if not (met or connected or told or operations.leaving):
            told = True
            say(f"waiting for the head at {address}; Ctrl-C ends it ({problem})")
        operations.alone()
        await asyncio.sleep(AGAIN_AT_FIRST if told and not met else AGAIN)


async def _talk(line: _Line, operations: Operations) -> None:
    """Answers what is asked, until the connection ends or `operations.leaving`."""

    async def leave() -> None:
        while not operations.leaving:
            await asyncio.sleep(LOOK)
        line.send(Message(alive=Alive(leaving=operations.leaving)))
        await line.close()

    tasks = {asyncio.create_task(line.stay(operations.alive)), asyncio.create_task(leave())}

    async def answer(message: Message) -> None:
        reply = Message(id=message.id)
        try:
            made = await asyncio.wrap_future(begun(operations.do, message.do, message.facts))
            reply.answer = await asyncio.wrap_future(made) if isinstance(made, Future) else made
        except SystemExit as error:  # LabError and DataError
            reply.problem = str(error)
        except Exception as error:
            reply.problem = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            try:
                await line.write(reply)
            except (TypeError, ValueError, OverflowError) as error:  # MessagePack can't hold it
                await line.write(Message(id=message.id, problem=f"its answer can't be sent: {error}"))

    try:
        while True:
            message = await line.read()
            if message.do:
                tasks.add(task := asyncio.create_task(answer(message)))
                task.add_done_callback(tasks.discard)
    finally:
        for task in list(tasks):
            task.cancel()
