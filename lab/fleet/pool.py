"""The head of a pool: has the devices of one tag carry out a session's orders.

Git, journal, ledger and gate stay here, in the supervisor's process. A worker is told what to run, and answers what
came of it; each run is journalled before it is begun and once it has ended, as on one device. So this process may be
killed at any moment: the next one asks the workers for what they have.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

import storage
from lab.errors import LabError
from lab.fleet import invitation, spread
from lab.fleet.invitation import Invitation
from lab.fleet.join import OVER
from lab.fleet.settings import STATUS
from lab.fleet.wire import Hello, Hub, Lost, Member, PIECE, Refused
from lab.fleet.worker import ARCHIVE, archive_of, files_of, version
from lab.reasons import Reason, because
from lab.run import log as logs, outcome, processes, runner
from lab.run.outcome import Outcome
from lab.session import events
from lab.session.session import Session
from lab.session.state import Run
from lab.verdict import executor
from lab.verdict.plan import Order
from results import MEASURES

LOOPBACK = "tls://127.0.0.1:0"
POLL = 0.25  # seconds, at most, between two looks at what has changed; an answer is seen at once
TELL_EVERY = 1.0  # seconds between two writings of status.json
GRACE = 20.0  # seconds for a worker to come back, before its run is given up
TO_STOP = 30.0  # seconds for a worker to end its run
MOST_STARTS = 4  # of a worker on this machine, that never becomes ready
NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,60}", re.ASCII)
# What a worker is told of a runner.Request.
OF_REQUEST = "seed budget timeout run_id reference keeps_caches lineage".split()


class Scored(msgspec.Struct):
    """A worker's report of scoring a run's weights. `rows`: the file rows.npz. `weights`: their size in bytes."""

    val_bpb: events.Score | None = None
    held_out_bpb: events.Score | None = None
    rows: bytes = b""
    weights: int = 0
    problem: Reason | None = None
    halted: str = ""


@dataclass
class Device:
    """What the head knows about a worker. `met`: the connection that it was last prepared for. `ready`: it may be given
    work. `gone`: when its connection ended, or None. `run`: the run that it makes, or scores if `scores`. `answer`: to
    what it was asked about that, or None."""

    name: str
    met: Member | None = None
    ready: bool = False
    gone: float | None = None
    refused: str = ""
    run: Run | None = None
    answer: Future | None = None
    scores: bool = False
    tokens: float | None = None  # per second, of its last run


@dataclass
class Pool:
    """The devices of a session (executor.Devices).

    `session.fleet` says which: {"devices": those of this machine, "listen": the address for others, if there are any}.
    """

    session: Session
    devices: dict[str, Device] = field(default_factory=dict)
    _known: dict = field(default_factory=dict)  # session.fleet, as it was when this head began
    _started: dict[str, psutil.Process] = field(default_factory=dict)  # workers on this machine
    _starts: Counter[str] = field(default_factory=Counter)  # of each of them, since it was ready
    _told: float = 0.0
    _stopping: float | None = None

    def __enter__(self) -> Pool:
        session, known = self.session, self.session.fleet or {}
        self._known = known
        self.folder, self.wanted = session.folder / "fleet", list(known.get("devices", []))
        session.restore_judge()
        self.version, self.archive = version(session.local.judge), archive_of(session.judge, session.local.judge)
        self.facts = self._facts()
        found = {name: processes.noted(self._path(name, "json")) for name in self.wanted}  # an earlier head's
        self._started = {name: process for name, process in found.items() if process}
        path, address = self.folder / "address.json", known.get("listen") or LOOPBACK
        asked, before = address, storage.read_json(path) or {}
        if self._started and before.get("asked") == asked:  # they look for it there; else its port may be another's now
            address = before["address"]
        keys = invitation.keys(session, invitation.HEAD, invitation.AUTHORITY_DAYS)
        self.hub = Hub(address, keys, self._admit)
        self.address = f"{address.rpartition(':')[0]}:{self.hub.address.rpartition(':')[2]}"  # with its port
        storage.write_json(path, {"asked": asked, "address": self.address})
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:  # else the next head goes on with them
            for name in [name for name in self._started if name in self.hub.members]:
                with suppress(Exception, LabError):
                    self.hub.call(name, "leave", why=OVER).result(timeout=TO_STOP)
        self.hub.close()
        self._tell(over=True)

    # --- executor.Devices ---

    def makes(self, run: Run) -> bool:
        """It is taken for granted, until the worker says something else or does not come back."""
        if not run.worker:
            return False
        device = self.devices.setdefault(run.worker, Device(run.worker, gone=time.monotonic()))
        device.run = run
        return True

    def begin(self, orders: list[Order]) -> bool:
        state, begun = self.session.state, False
        if self._is_outdated():
            return False
        usable = [device.name for device in self.devices.values() if self._usable(device)]
        for order in orders:
            if order.score is not None and self._is_lost(state.runs[order.score].worker):
                self.session.log(events.RunScored(run=order.score, problem=because("weights_lost")))
                return True
            free = [name for name in usable if self.devices[name].run is None]
            if found := spread.placed(order, state, free, usable):
                with executor.blamed(self.session, order.experiment):
                    self._give(self.devices[found[0]], found[1])
                begun = True
        return begun

    def wait(self) -> bool:
        session, night = self.session, self.session.owned_by_night
        self.hub.stir.wait(timeout=POLL)
        self.hub.stir.clear()
        session.refresh()
        self._look_after_started()
        for name in list(self.hub.members):
            self._meet(name)
        for device in list(self.devices.values()):
            self._look_at(device)
        if session.held:
            self._stop_all(session.held)
        else:
            self._stopping = None
        self._tell()
        busy = any(device.run for device in self.devices.values())
        if session.held or self._is_outdated():
            return busy
        return busy or night or bool(session.state.open)

    def _is_outdated(self) -> bool:
        """Whether a night with other devices has taken the place of the one that this head was started for: it ends
        once nothing is under way, and the night starts another, or makes the runs by itself."""
        return (self.session.fleet or {}) != self._known

    # --- Workers come and go ---

    def _admit(self, hello: Hello) -> dict:
        """Called by the hub, in its thread: looks, and changes nothing."""
        name = hello.name
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} can't be the name of a device")
        if hello.version != self.version:
            commit = self.session.local.commit[:12]
            raise Refused(f"it has another version of the project; check out the session's first commit: {commit}")
        if hello.local and name not in self.wanted:
            raise Refused(f"{name} was not invited to this night")
        return {"session": self.session.name}

    def _meet(self, name: str) -> None:
        """Prepares a worker that has just connected, in a thread of its own."""
        member, device = self.hub.members.get(name), self.devices.setdefault(name, Device(name))
        if member is None or member is device.met:
            return
        device.met, device.gone, device.ready, device.refused = member, None, False, ""
        threading.Thread(target=self._prepare, args=(device,), daemon=True).start()

    def _prepare(self, device: Device) -> None:
        name = device.name
        try:
            missing = self.hub.call(name, "prepare", **self.facts).result()["missing"]
            for path in missing:
                self._send(name, path)
            self.hub.call(name, "ready").result()
            device.ready, self._starts[name] = True, 0
        except Lost:
            return
        except (Exception, LabError) as error:
            self._refuse(device, str(error))
        finally:
            self.hub.stir.set()

    def _send(self, name: str, path: str) -> None:
        if path != ARCHIVE and path not in files_of(self.facts):
            raise LabError(f"it asks for {path}, which is no file of the session")
        with io.BytesIO(self.archive) if path == ARCHIVE else open(storage.home() / path, "rb") as file:
            size, offset = file.seek(0, os.SEEK_END), file.seek(0)
            while offset < size or not offset:
                piece = file.read(PIECE)
                last = offset + len(piece) >= size
                self.hub.call(name, "put", path=path, offset=offset, content=piece, last=last).result()
                offset += len(piece) or 1

    def _facts(self) -> dict:
        """The facts of the session that a worker is told."""
        session, local = self.session, self.session.local
        machines_own = ("AUTORESEARCH_HOME", "AUTORESEARCH_PROFILE")
        return {
            **{name: getattr(session.started, name) for name in ("device", "backend", "versions", "sandbox")},
            **{name: getattr(local, name) for name in ("judge", "memory_ceiling", "unified")},
            "session": session.name,
            "archive": hashlib.sha256(self.archive).hexdigest(),
            "dataset": session.dataset.name,
            "manifest": (session.dataset / "manifest.json").read_text(encoding="utf-8"),
            "settings": {name: value for name, value in local.settings.items() if name not in machines_own},
            "profile": session.profile,
            "protected": [str(session.repository.path), str(session.folder)],
        }

    def _usable(self, device: Device) -> bool:
        member = self.hub.members.get(device.name)
        if member is None or member.alive.hot or member.alive.leaving:
            return False
        return device.ready and not device.refused

    def _is_lost(self, name: str) -> bool:
        """Whether a worker does not come back."""
        if name in self.hub.members:
            return False
        device = self.devices.setdefault(name, Device(name))
        if device.gone is None:
            device.gone = time.monotonic()
        dead = name in self._started and not processes.runs(self._started[name])
        return dead or bool(device.refused) or name in self.hub.left or time.monotonic() > device.gone + GRACE

    # --- Workers on this machine ---

    def _path(self, name: str, suffix: str) -> Path:
        """A file about one of them."""
        return self.folder / f"{re.sub(r'[^0-9A-Za-z.-]', '-', name)}.{suffix}"

    def _look_after_started(self) -> None:
        """Starts those that are not there."""
        if self.session.held:
            return
        refused = {name: known.refused for name in self.wanted if (known := self.devices.get(name)) and known.refused}
        if self.wanted and len(refused) == len(self.wanted) and not self.hub.members:
            raise LabError("no device can be used: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
        for name in self.wanted:
            if name in refused or name in self._started and processes.runs(self._started[name]):
                continue
            if self._starts[name] == MOST_STARTS:
                last = logs.last_line(self._path(name, "log")) or "it says nothing"
                raise LabError(f"the worker of {name} ends again and again: {last}")
            self._starts[name] += 1
            self._start(name)

    def _start(self, name: str) -> None:
        path, log = self._path(name, "invitation"), self._path(name, "log")
        keys = invitation.keys(self.session, f"worker {name}")
        address = self.address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        Invitation(address, self.session.name, keys).write(path)
        program = self.session.judge / "lab" / "__main__.py"
        command = [self.session.local.executable, str(program), "join", str(path), "--devices", name, "--local"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left
        if known := processes.note(self._path(name, "json"), process.pid):
            self._started[name] = known

    # --- Orders ---

    def _give(self, device: Device, order: Order) -> None:
        session = self.session
        if order.score is not None:
            device.run = session.state.runs[order.score]
            device.scores = True
            device.answer = self.hub.call(device.name, "score", number=order.score)
            return
        self._ask(device, executor.begin(session, order, device.name))

    def _ask(self, device: Device, run: Run) -> None:
        """Has a worker make a run, or asks for one that it makes already."""
        request, train = executor.request(self.session, run), self.session.repository.content(run.blob)
        facts = {name: getattr(request, name) for name in OF_REQUEST}
        device.run, device.scores = run, False
        device.answer = self.hub.call(device.name, "run", number=run.number, train=train, **facts)

    def _look_at(self, device: Device) -> None:
        """Takes in what a device has answered; gives up the run of one that is lost."""
        member = self.hub.members.get(device.name)
        if member is None and device.gone is None:
            device.gone, device.ready = time.monotonic(), False
        if device.answer and device.answer.done():
            answer, device.answer, run = device.answer, None, device.run
            assert run is not None
            try:
                self._take(device, run, answer.result())
            except Lost:
                if device.scores:  # it is asked for again
                    device.run = None
            except (Exception, LabError) as error:
                self._failed(device, run, str(error))
        if member and device.ready and device.answer is None:
            if device.run:  # one that the head before this one had begun, or from before the connection was lost
                if device.run.number in member.hello.runs:
                    self._ask(device, device.run)
                else:
                    self._give_up(device)
            else:
                self._drop(device)
        if device.run and device.answer is None and self._is_lost(device.name):
            self._give_up(device)
        if member and (run := device.run) and member.alive.run == run.number:
            with suppress(OSError):
                (self.session.run_folder(run.number) / "run.log").write_bytes(member.alive.log)

    def _take(self, device: Device, run: Run, answer: dict) -> None:
        session, scores = self.session, device.scores
        experiment, folder = session.state.experiments[run.experiment], session.run_folder(run.number)
        device.run = None
        if member := self.hub.members.get(device.name):
            member.hello.runs.add(run.number)
        if experiment.applied if scores else run.ended:
            return  # it was given up, or another keep has superseded it while it was scored
        if scores:
            found = msgspec.convert(answer, Scored)
            if found.problem:
                executor.scored(session, experiment, run, found.problem)
            elif not found.halted and found.val_bpb and found.held_out_bpb:
                (folder / "rows.npz").write_bytes(found.rows)
                self._fetch_weights(device.name, run, found.weights)
                executor.scored(session, experiment, run, runner.Scores(found.val_bpb, found.held_out_bpb))
            return
        told = msgspec.convert(answer, Outcome)
        result = outcome.sound(told.result or {})
        told.result = result or None
        (folder / "run.log").write_bytes(answer["log"])
        if told.status == "ok":
            if lacks := [measure.name for measure in MEASURES if measure.needed and measure.name not in result]:
                raise LabError(f"it does not report {', '.join(lacks)}")
            device.tokens = result.get("tokens_per_second")
            wrong = executor.other_conditions(session, result) or executor.other_attention(session, result)
            if wrong:
                self._refuse(device, str(wrong))
                told.status, told.reason = "lost", because("device_differs", what=wrong)
        executor.ended(session, run, told)
        if told.reason == because("disk_full"):
            self._refuse(device, str(told.reason))

    def _fetch_weights(self, name: str, run: Run, size: int) -> None:
        with storage.atomic(self.session.run_folder(run.number) / "result.safetensors") as file:
            while file.tell() < size:
                piece = self.hub.call(name, "piece", number=run.number, offset=file.tell()).result(timeout=60)
                if not piece["content"]:
                    raise LabError("its weights are cut short")
                file.write(piece["content"])

    def _failed(self, device: Device, run: Run, why: str) -> None:
        """A worker could not do what it was asked for, which is not the fault of what it was to run."""
        device.run = None
        if device.scores:
            self.session.log(events.RunScored(run=run.number, problem=because("weights_lost")))
        elif run.ended is None:
            executor.ended(self.session, run, Outcome("lost", because("device_differs", what=why)))
            self._refuse(device, why)

    def _refuse(self, device: Device, why: str) -> None:
        """Stops using a device; its run does not count."""
        device.refused, device.ready = why, False
        self.hub.call(device.name, "leave", why=why)

    def _give_up(self, device: Device) -> None:
        """The run of a device that was lost; it is made again elsewhere."""
        run, device.run = device.run, None
        if run and run.ended is None:
            executor.ended(self.session, run, Outcome("lost", because("device_lost")))

    def _drop(self, device: Device) -> None:
        """Has a worker forget runs that nothing is wanted of any more: also those that were given up."""
        member, state = self.hub.members.get(device.name), self.session.state
        if member is None:
            return
        for number in member.hello.runs.copy():
            run = state.runs.get(number)
            wanted = run and run.worker == device.name and run.status in (None, "ok")
            if run is None or not wanted or state.experiments[run.experiment].applied:
                member.hello.runs.remove(number)
                self.hub.call(device.name, "drop", number=number)

    def _stop_all(self, held: dict) -> None:
        if held["now"] and self._stopping is None:
            self._stopping = time.monotonic()
            for device in self.devices.values():
                if device.run:
                    self.hub.call(device.name, "stop", why=held["why"])
        if self._stopping and time.monotonic() > self._stopping + TO_STOP:
            raise LabError("some workers did not end their runs; the next night asks them for the results")

    # --- Telling ---

    def _tell(self, over: bool = False) -> None:
        """status.json: who is there, and does what."""
        if not over and time.monotonic() < self._told + TELL_EVERY:
            return
        self._told = time.monotonic()
        rows = []
        for device in self.devices.values():
            member = self.hub.members.get(device.name)
            doing = "waits" if device.ready else "is prepared"
            if member is None:
                doing = self.hub.left.get(device.name, "is away")
            if device.run:
                of, seed = device.run.experiment, device.run.seed
                doing = f"{'scores' if device.scores else 'runs'} experiment {of}, seed {seed}"
            rows.append(
                {
                    "name": device.name,
                    "doing": device.refused and f"refused: {device.refused}" or doing,
                    "usable": self._usable(device),
                    "tokens_per_second": device.tokens,
                    "heat": {"hot": member.alive.hot, **member.alive.heat} if member else {},
                }
            )
        with suppress(storage.DataError):
            storage.write_json(self.folder / STATUS, {"time": 0.0 if over else time.time(), "devices": rows})
