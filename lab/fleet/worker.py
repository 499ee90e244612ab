"""A worker: one device of this machine, which makes one run at a time for a head that it is connected to.

It holds data, the judge, calibration and compilers' caches, and nothing else: what is run and what comes of it is the
head's to say. A run goes on while the head is away, and is there when it comes back. All goes through the same runner
as on one machine (run/runner.py).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import msgspec

import dataset
import storage
from calibration import identity
from lab.errors import LabError
from lab.fleet import here
from lab.fleet.wire import Alive, Hello, PIECE, begun
from lab.reasons import Reason, because
from lab.run import log, runner, sandbox
from lab.session.locks import device_lock
from lab.session.session import PASSED_ON, differing

LOG_SENT = 2**20  # bytes of a run's log, its end
TAIL = 4000  # bytes of the log of a run under way that go with a sign of life
TO_TAKE = 10.0  # seconds for a device to be free
ALONE = 600.0  # seconds without a head, after which a worker that a head has started ends
ARCHIVE = "judge.tar.gz"  # its name on both ends
CODE = (
    "lab",
    "backends",
    "calibration",
    "prepare.py",
    "evaluator.py",
    "dataset.py",
    "disturbance.py",
    "storage.py",
    "results.py",
)


def version(digests: dict[str, str]) -> str:
    """A digest of the code that makes runs, from the sha256 of each file: both ends need the same."""
    own = {name: sha for name, sha in digests.items() if name.split("/")[0] in CODE and name.endswith(".py")}
    return storage.digest_of(sorted(own.items()))[:12]


def sources(project: Path) -> dict[str, str]:
    """sha256 of the code of a checkout, by file."""
    paths = [
        path for name in CODE for path in ([project / name] if name.endswith(".py") else (project / name).rglob("*"))
    ]
    return {path.relative_to(project).as_posix(): storage.sha256(path) for path in paths if path.suffix == ".py"}


@dataclass
class Doing:
    """A run, and the scoring of its weights: the result of each, as a dict."""

    number: int
    folder: Path
    trained: Future = field(default_factory=Future)
    scored: Future | None = None
    ending: str | None = None  # why it is to end now
    request: Any = None


class Worker:
    """What a head may ask of this machine; each `do_...` is an operation.

    Args:
        name: of the device in the fleet. device: "cpu", "cpu:1", "cuda:0": which one of this machine.
        settings: of its runs, by which they find the device. expected: digests that an invitation names: of the judge
            ("judge") and of the dataset ("data"); none where the head is this machine's own.
        local: a head on this machine started it: without that head and a run it ends after a while.

    Attributes:
        leaving: why it does not come back.
    """

    def __init__(self, name: str, device: str, settings: dict[str, str], expected: dict[str, str] | None, local: bool):
        self.name, self.device, self.settings, self.expected, self.local = name, device, settings, expected, local
        self.gpu = settings.get("CUDA_VISIBLE_DEVICES", "")  # its name; "" for another device
        self.root = storage.home().absolute() / "fleet" / re.sub(r"[^0-9A-Za-z.-]+", "-", name)
        self.judge, self.leaving, self.session, self.facts = self.root / "judge", "", "", {}
        self.doing: dict[int, Doing] = {}
        self._lock: filelock.BaseFileLock | None = None
        self._box: str | None = None
        self._guard, self._work, self._measuring = threading.Lock(), threading.Lock(), threading.Lock()
        self._seen, self._token = time.monotonic(), os.urandom(8).hex()
        self._version = version(sources(Path(__file__).resolve().parents[2]))

    # --- What wire.serve asks for ---

    def hello(self) -> Hello:
        return Hello(self.name, self._version, self._token, self.local, set(self.doing))

    def alive(self) -> Alive:
        self._seen = time.monotonic()
        heat = identity.now("cuda", self.gpu) if self.gpu else {}
        alive = Alive(hot=bool(identity.overheated() or heat.get("margin", 1) <= 0), heat=heat)
        for doing in list(self.doing.values()):
            if not doing.trained.done():
                alive.run, alive.log = doing.number, log.tail(doing.folder / "run.log", TAIL)
        return alive

    def welcomed(self, welcome: dict) -> None:
        self._seen = time.monotonic()
        if self.session and welcome["session"] != self.session:
            self._forget()

    def alone(self) -> None:
        busy = any(not doing.trained.done() for doing in list(self.doing.values()))
        if self.local and not busy and time.monotonic() > self._seen + ALONE:
            self.leaving = "its head did not come back"

    def do(self, operation: str, facts: dict) -> dict | Future:
        return getattr(self, f"do_{operation}")(**facts)

    # --- Preparing ---

    def do_prepare(self, **facts) -> dict:
        """Says what is missing here of a session: files by path below this worker's folder, or the home ("data/...").
        LabError if this device is not what the session is for.

        Args:
            facts: session, device, backend, versions, judge (sha256 by file), archive (sha256), dataset, manifest,
                settings, profile, sandbox, memory_ceiling, unified.
        """
        digests = digests_of(facts["judge"], facts["manifest"])
        for what, name in {"judge": "the judge", "data": "the dataset"}.items():
            if self.expected and self.expected[what] != digests[what]:
                raise LabError(f"{name} of this head is not the one that the invitation names")
        if facts["session"] != self.session:
            self._forget()
        self.session, self.facts = facts["session"], facts
        with self._measuring:  # the head asks again if the connection was lost meanwhile
            self._take_device(facts["device"])
            if not self.local and (problem := here.unlike(facts, self.settings)):
                raise LabError(problem)
        missing = [ARCHIVE] if differing(self.judge, facts["judge"]) else []
        folder = storage.home() / "data" / facts["dataset"]
        with suppress(OSError):
            own = (folder / "manifest.json").read_text(encoding="utf-8", errors="replace")
            if not self.local and content_of(own) != content_of(facts["manifest"]):
                raise LabError(f"{folder} is another dataset of that name: move it, or set AUTORESEARCH_HOME")
        for name, known in files_of(facts).items():
            path = storage.home() / name
            if not path.is_file() or known and path.stat().st_size != known["size"]:
                missing.append(name)
        return {"missing": missing}

    def do_put(self, path: str, offset: int, content: bytes, last: bool) -> dict:
        """A piece of a file, which appears once it is whole."""
        target = self._path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with open(part, "r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(content)
            storage.sync(file.fileno())
        if last:
            part.replace(target)
        return {}

    def _path(self, path: str) -> Path:
        """The path for a file from the head. LabError if it belongs neither to the judge nor to the dataset."""
        of = self.facts["dataset"]
        if path in files_of(self.facts) and re.fullmatch(r"[\w.-]+", of) and ".." not in path:
            return storage.home() / path
        if path == ARCHIVE:
            return self.root / path
        raise LabError(f"{path} is not a file that a worker accepts")

    def do_ready(self) -> dict:
        """Checks what was fetched, by sha256. LabError where something is not what the head says it is."""
        archive = self.root / ARCHIVE
        if differing(self.judge, self.facts["judge"]):
            if not archive.is_file() or storage.sha256(archive) != self.facts["archive"]:
                raise LabError("the judge that was fetched is not the session's")
            self._restore_judge()
        folder = storage.home() / "data" / self.facts["dataset"]
        try:
            manifest = dataset.read_manifest(folder)
        except storage.DataError as error:
            raise LabError(str(error)) from error
        for name, known in dataset.known_files(manifest).items():
            if damage := dataset.damage(folder / name, known):
                raise LabError(f"{folder / name} is not the session's: {damage}")
        storage.write_json(self.root / "profile.json", self.facts["profile"])
        return {"sandbox": self._sandbox()}

    def _sandbox(self) -> str | None:
        """The sandbox of runs here. LabError if there is none, and the head is elsewhere."""
        if self.local:
            return self.facts["sandbox"]
        self._box = self._box or sandbox.probe()  # which starts processes: once is enough
        if self._box is None:
            raise LabError("this machine offers no sandbox, and runs for another machine need one (docs/sandbox.md)")
        return self._box

    def _restore_judge(self) -> list[str]:
        """Unpacks the judge where files of it are not as the head lists them, and names these. LabError if what was
        fetched, for this session or for one with the same judge, is no better."""
        pinned = self.facts["judge"]
        if not (wrong := differing(self.judge, pinned)):
            return []
        runner.remove(self.judge)
        with tarfile.open(self.root / ARCHIVE) as archive:
            for member in archive:  # files alone, which the head has listed by name
                if member.isfile() and member.name in pinned and (content := archive.extractfile(member)):
                    target = self.judge / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
                    target.chmod(0o755 if member.mode & 0o100 else 0o644)
        if still := differing(self.judge, pinned):
            raise LabError(f"the judge that was fetched is not the session's: {', '.join(still[:3])}")
        return wrong

    # --- Runs ---

    def do_run(self, number: int, train: bytes, **facts) -> Future:
        """Makes a run, unless it is being made or was made. The answer: status, reason, result, seconds, traceback,
        log.

        Args:
            facts: seed, budget, timeout, run_id, reference, keeps_caches, lineage: as of runner.Request.
        """
        with self._guard:
            if known := self.doing.get(number):
                return known.trained
            self.do_stop("stopped")  # one at a time: what the head does not wait for any more ends
            doing = self.doing[number] = Doing(number, self.root / "runs" / f"{number:04d}")
            doing.trained = begun(self._train, doing, train, facts)
        return doing.trained

    def _train(self, doing: Doing, train: bytes, facts: dict) -> dict:
        with self._work:
            self._restore_judge()
            runner.remove(doing.folder)
            doing.folder.mkdir(parents=True)
            (doing.folder / "train.py").write_bytes(train)
            doing.request = self._request(doing, **facts)
            made = runner.run(doing.request)
            if changed := self._restore_judge():
                made.status, made.reason = "invalid", because("changed_judge", files=", ".join(changed[:3]))
            answer = vars(made) | {"reason": msgspec.to_builtins(made.reason)}
            return answer | {"log": log.tail(doing.folder / "run.log", LOG_SENT)}

    def _request(self, doing: Doing, **facts):
        known, settings = self.facts, {**self.facts["settings"]}
        if not self.local:  # the user's of this machine, and not of the head's
            settings |= {name: os.environ.get(name, "") for name in PASSED_ON}
            settings["AUTORESEARCH_BACKEND"] = known["backend"]
        settings |= self.settings
        settings = {name: value for name, value in settings.items() if value} | {
            "AUTORESEARCH_HOME": str(storage.home().absolute()),
            "AUTORESEARCH_PROFILE": str(self.root / "profile.json"),
        }
        return runner.Request(
            judge=self.judge,
            folder=doing.folder,
            settings=settings,
            gpu=self.gpu,
            memory_ceiling=known["memory_ceiling"],
            unified=known["unified"],
            sandbox=self._sandbox(),
            protected=[self.root, *(Path(path) for path in known["protected"] if self.local)],
            ending=lambda: doing.ending,
            **facts,
        )

    def do_score(self, number: int) -> Future:
        """Scores a run's weights again. The answer: val_bpb, held_out_bpb and rows (the file rows.npz), or problem."""
        doing = self._known(number)
        with self._guard:
            if doing.scored is None or doing.scored.done():
                doing.ending = None
                doing.scored = begun(self._score, doing)
            return doing.scored

    def _score(self, doing: Doing) -> dict:
        with self._work:
            self._restore_judge()
            weights = doing.folder / "result.safetensors"
            try:
                scores = runner.score(doing.request, weights)
            except runner.Halted as halted:
                return {"halted": str(halted)}
            if isinstance(scores, Reason):
                return {"problem": msgspec.to_builtins(scores)}
            rows = (doing.folder / "rows.npz").read_bytes()
            return {**vars(scores), "rows": rows, "weights": weights.stat().st_size}

    def do_stop(self, why: str) -> dict:
        """Ends what is being done."""
        for doing in list(self.doing.values()):
            doing.ending = why
        return {}

    def do_piece(self, number: int, offset: int) -> dict:
        """A piece of a run's weights."""
        with open(self._known(number).folder / "result.safetensors", "rb") as file:
            file.seek(offset)
            return {"content": file.read(PIECE)}

    def do_drop(self, number: int) -> dict:
        """Ends a run if it lasts, and deletes all of it."""

        def remove(doing: Doing) -> None:
            with self._work:
                runner.remove(doing.folder)
                runner.told_of(doing.folder).unlink(missing_ok=True)

        if doing := self.doing.pop(number, None):
            doing.ending = "stopped"
            threading.Thread(target=remove, args=(doing,), daemon=True).start()
        return {}

    def do_leave(self, why: str) -> dict:
        self.do_stop("stopped")
        self.leaving = why
        return {}

    def _known(self, number: int) -> Doing:
        if number not in self.doing:
            raise LabError(f"there is no run {number} here")
        return self.doing[number]

    def _forget(self) -> None:
        """Another session: what is here of the last one goes."""
        for number in list(self.doing):
            self.do_drop(number)
        for name in ("runs", "compiled"):
            shutil.rmtree(self.root / name, ignore_errors=True)  # also what a worker that was killed has left

    def _take_device(self, tag: str) -> None:
        """Has the device to itself from here on. LabError while another session trains on it."""
        if self._lock is None:
            lock = device_lock(tag, self.gpu or self.device.partition(":")[2])
            try:
                lock.acquire(timeout=TO_TAKE)
            except filelock.Timeout:
                raise LabError("another session is training on this device") from None
            self._lock = lock


def files_of(facts: dict) -> dict[str, dict | None]:
    """The files of a session's dataset by their paths below the home: size and sha256; None for the manifest.

    Args:
        facts: as of Worker.do_prepare.
    """
    files = {**dataset.known_files(json.loads(facts["manifest"])), "manifest.json": None}
    return {f"data/{facts['dataset']}/{name}": known for name, known in files.items()}


def digests_of(judge: dict[str, str], manifest: str) -> dict[str, str]:
    """What an invitation names of a session: digests of the judge's files, and of what its dataset holds."""
    return {"judge": storage.digest_of(sorted(judge.items())), "data": storage.digest_of(content_of(manifest))}


def content_of(manifest: str) -> list | None:
    """What makes two datasets equal: their files, and how they are scored. Where they are from, and the command that
    makes them, differ between machines. None if that can't be read."""
    try:
        known = json.loads(manifest)
        files = {name: (file["size"], file["sha256"]) for name, file in dataset.known_files(known).items()}
        return [sorted(files.items()), known.get("eval_rows"), known.get("eval_tag")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def archive_of(judge: Path, pinned: dict[str, str]) -> bytes:
    """The judge's files as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in sorted(pinned):
            archive.add(judge / name, name, recursive=False)
    return buffer.getvalue()
