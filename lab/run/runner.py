"""One guarded run of a train.py, and the scoring of what it left: processes of their own, watched from here.

A run can crash, hang, print without end, use up memory or leave processes behind: then it is ended, and the reason is
reported. It gets its own home, temporary and working folders, and only the environment variables that it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import site
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

import numpy as np
import psutil
from huggingface_hub.constants import HF_HUB_CACHE

import disturbance
import prepare
import storage
from lab.errors import LabError
from lab.reasons import Reason, because
from lab.run import child, guard, outcome, processes, sandbox
from lab.run.energy import EnergyMeter
from lab.run.exam import Exam
from lab.run.log import FLOOD, Log
from lab.run.outcome import Ended, Outcome

GRACE = 5.0  # seconds between being asked to end and being ended
POLL = 0.25  # seconds
LOOK_EVERY = 1.0  # seconds between looks at its memory, and whether it stands still
PATH_LIMIT = 60  # characters of TMPDIR: sockets in it have 108, and some libraries use most of them for their names
OF_SCORE = ("rows.npz", "score.json", "score.log", guard.MARK, child.BEGUN)
RECORDS = ("run.log", "result.json", "result.safetensors", *OF_SCORE)
MOST_COMPILED, MOST_COPIED = 4, 2**29  # files whose compiled code is kept, and bytes of one: usually tens of megabytes
UNFOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK if os.name == "posix" else 0
WRAPPERS = ("bwrap", "unshare", "sh", "dash", "bash", "sandbox-exec")  # what stands between here and the run

# Settings that a run inherits, by name or by how it begins.
SAFE = "PATH LANG LANGUAGE TZ LD_LIBRARY_PATH USER LOGNAME VIRTUAL_ENV CONDA_PREFIX CC CXX".split()
SAFE_PREFIXES = tuple(
    """LC_ CUDA_ CUBLAS_ CUDNN_ NVIDIA_ NCCL_ HIP_ HSA_ ROCR_ ROCM_ OMP_ KMP_ MKL_ OPENBLAS_ BLIS_
VECLIB_ NUMEXPR_ PYTORCH_ TORCH_ TORCHINDUCTOR_ TORCHDYNAMO_ TRITON_ MLX_ METAL_ MTL_ KERNELS_ XLA_""".split()
)
# Parts of names: of secrets, and of where compilers write, which must be its home's cache.
NOT_SAFE = "TOKEN KEY SECRET PASSW CREDENTIAL AUTH TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR".split()


@dataclass(frozen=True)
class Request:
    """What is to be run.

    Attributes:
        judge: the folder whose prepare.py, backends/ and lab/ it runs with.
        folder: the run's own, in one of all runs; holds train.py, and gets everything else.
        seed: of the initial weights. budget: seconds of training. timeout: seconds for everything.
        run_id: marks every process of the run.
        settings: AUTORESEARCH_* variables by their full names; AUTORESEARCH_HOME has to be among them.
        gpu: name of the NVIDIA GPU that it runs on; "" for another device.
        reference: what an earlier run told of the undisturbed device; see disturbance.py.
        memory_ceiling: bytes of device memory; more is invalid.
        unified: device memory is the machine's own, so that what the run's processes hold counts too.
        sandbox: one of sandbox.NAMES, or None.
        keeps_caches: what compilers make stays for later runs, which else work on a copy of what such runs have left.
        lineage: names of its train.py and of the one that it was made from. Later runs of the file, and of what is made
            from it, begin with what this run compiles before it trains.
        protected: folders that the run has nothing to write in, its own excepted.
        ending: asked while it lasts; the code of a reason to end it that is not its fault, or None.
    """

    judge: Path
    folder: Path
    seed: int
    budget: float
    timeout: float
    run_id: str
    settings: dict[str, str] = field(default_factory=dict)
    reference: dict = field(default_factory=dict)
    gpu: str = ""
    memory_ceiling: int | None = None
    unified: bool = False
    sandbox: str | None = None
    keeps_caches: bool = False
    lineage: Sequence[str] = ()
    protected: Sequence[Path] = ()
    ending: Callable[[], str | None] = field(default=lambda: None, repr=False)

    @property
    def home(self) -> Path:
        return Path(self.settings.get("AUTORESEARCH_HOME") or storage.home())

    @property
    def kept_cache(self) -> Path:
        """What the baseline and calibration have left."""
        return self.home.absolute() / "cache"

    @property
    def cache(self) -> Path:
        return self.kept_cache if self.keeps_caches else self.folder.absolute() / "cache"

    @property
    def compiled(self) -> list[Path]:
        """Where it is kept what runs of each of its lineage compiled before they trained."""
        return [self.folder.absolute().parent.with_name("compiled") / name for name in self.lineage]

    @property
    def cache_seen(self) -> Path:
        """Where the run finds its cache. Triton, and PyTorch with it, write paths of the cache into their files,
        which work only in the folder where they were made."""
        return self.kept_cache if sandbox.mounts_folders(self.sandbox) else self.cache


@dataclass(frozen=True)
class Scores:
    """Scores of saved weights, in bits per byte. rows.npz in the run's folder has each row's nats and bytes: val_nats,
    val_bytes, held_nats, held_bytes, float64 (rows,)."""

    val_bpb: float
    held_out_bpb: float


class Halted(Exception):
    """What was being run was ended because the request's `ending` gave this code of a reason."""


def run(request: Request) -> Outcome:
    """Trains and evaluates. LabError if it could not be begun, which is not train.py's fault."""
    clear(request.folder, RECORDS)
    told_of(request.folder).unlink(missing_ok=True)
    result = request.folder / "result.json"
    weights = result.with_suffix(".safetensors")
    with (
        EnergyMeter(request.gpu or None) as meter,
        Exam(request, weights, {"validation": "val"}, trains=True, untrained=partial(keep_compiled, request)) as exam,
    ):
        log = request.folder / "run.log"
        try:
            ended = execute(request, "train", log, exam, look=meter.look, AUTORESEARCH_RESULT=str(result))
        except Halted as halted:
            return Outcome("lost", because(str(halted)))
    if exam.told:
        save_arrays(told_of(request.folder), *exam.told)
    found = outcome.of_run(request, ended, exam)
    if found.result is not None:  # what train.py says of it counts for nothing
        found.result["joules"] = meter.joules(exam.begun, exam.stopped or exam.saved)
    return found


def told_of(folder: Path) -> Path:
    """What a run told at some places (`Exam.told`): beside its folder, where scoring its weights again does
    not see it."""
    return folder.with_name(f"{folder.name}.told.npz")


def save_arrays(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> None:
    with storage.atomic(path) as file:
        np.savez(file, *arrays, **named)  # pyright: ignore


def score(request: Request, weights: Path) -> Scores | Reason:
    """Scores the weights of a run again, in a fresh process and by the judge's evaluator.

    Returns:
        Their scores, or why they can't be scored.

    Raises:
        Halted: it was ended from outside.
        LabError: it could not be begun.
    """
    clear(request.folder, OF_SCORE)
    if not weights.is_file():
        return because("no_weights")
    parts, told = {"validation": "val", "held_out": "held"}, told_of(request.folder)
    with np.load(told, allow_pickle=False) if told.exists() else nullcontext({}) as saved:
        told = tuple(saved[name] for name in saved)
    with Exam(request, weights, parts, trains=False, told=told) as exam:
        ended = execute(request, "score", request.folder / "score.log", exam, weights)
    if outcome.full(request.folder, ended):
        raise LabError(f"the disk of {request.folder} is full; free some space, and run the same command again")
    if problem := outcome.unscored(request, ended, exam):
        return problem
    save_arrays(request.folder / "rows.npz", **exam.rows)
    return Scores(exam.scores["val_bpb"], exam.scores["held_bpb"])


# --- A process, from its start to its end ---


def clear(folder: Path, records: Sequence[str]) -> None:
    """Makes the folder as a new run finds it."""
    for name in records:
        (folder / name).unlink(missing_ok=True)
    for name in guard.OWN:
        remove(folder / name)
        (folder / name).mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Deletes a folder, even one whose contents may not be listed or changed; as much of it as can be."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    with suppress(OSError):
        folder.chmod(0o700)
    for place, folders, _ in os.walk(folder):  # which lists a folder after it was allowed to
        for path in (Path(place, name) for name in folders):
            with suppress(OSError):
                if not path.is_symlink():
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def execute(
    request: Request, mode: str, log: Path, exam: Exam, weights: Path | None = None, look=lambda: None, **settings: str
) -> Ended:
    """Starts child.py, watches it, and sees to it that nothing of it is left. look: called meanwhile, every POLL."""
    folder, temporary = request.folder.absolute(), short_temporary(request)
    fill_cache(request)
    facts = {"mode": mode, "folder": str(folder), "home": str(request.home), "budget": request.budget}
    facts |= {"protected": [str(path) for path in request.protected], "weights": str(weights)}
    command = [sys.executable, str(request.judge.absolute() / "lab" / "run" / "child.py"), json.dumps(facts)]
    command = sandbox.wrap(
        request.sandbox,
        command,
        readable=[*readable(request), *([weights.absolute()] if weights else [])],
        writable=[folder, request.cache],
        instead={request.cache_seen: request.cache},
        hidden=[Path.home(), request.home, Path("/run/user")],  # the user's files, other runs, the session's sockets
        temporary=temporary,
        cwd=folder / "work",
    )
    settings |= environment(request, temporary) | exam.settings
    begun = time.monotonic()
    process = Popen(
        command, cwd=folder / "work", env=settings, stdin=PIPE, stdout=PIPE, stderr=STDOUT,
        start_new_session=True, pass_fds=exam.descriptors,
    )  # fmt: skip
    exam.start()
    assert process.stdin and process.stdout
    output = Log(process.stdout, log)
    try:
        problem, paused = watch(process, request, output, begun + request.timeout, look)
    finally:
        try:
            ask_to_end(process)
        finally:
            process.stdin.close()  # the lifeline
            left = end(request.run_id, request.home, 0.0 if child.LINUX else child.LINGER)
            output.close()
            if temporary != folder / "tmp":
                remove(temporary)
    seconds = time.monotonic() - begun
    if not (folder / child.BEGUN).exists():
        raise LabError(
            f"the run could not be started ({request.sandbox or 'no sandbox'}); {log} says why. If the sandbox no "
            "longer works, start a new session"
        )
    code = process.returncode
    if child.LINUX and code > child.LEFT_RUNNING:
        left, code = left + code - child.LEFT_RUNNING, 0
    if output.flooded and not problem:  # also if it has ended by itself
        problem = because("flooded", most=FLOOD // 2**20)
    if left and not problem:
        problem = because("left_processes", count=left)
    return Ended(128 - code if code > 128 else code, seconds, problem, paused)


def watch(
    process: Popen, request: Request, output: Log, deadline: float, look_on=lambda: None
) -> tuple[Reason | None, float]:
    """Waits for the end of a process, while it or the whole machine stands still beyond the deadline, too. Returns why
    it can't be waited for, if so, and the seconds that it stood still. Halted if it is to end now."""
    ceiling = request.memory_ceiling if request.unified else None
    look = before = time.monotonic()
    paused = 0.0
    while True:
        with suppress(TimeoutExpired):
            process.wait(POLL)
            return None, paused
        if why := request.ending():
            raise Halted(why)
        if output.flooded:
            return None, paused  # `execute` says so
        look_on()
        now = time.monotonic()
        gap, before = now - before, now
        if gap > POLL + disturbance.PAUSE:
            paused += gap
        if now > deadline + paused:
            return because("timeout", seconds=request.timeout, budget=request.budget), paused
        if now >= look:
            if stands_still(process.pid):
                paused += LOOK_EVERY
            look = now + LOOK_EVERY
            if ceiling is not None and (used := memory(process.pid)) > ceiling:
                return because("memory", used_mb=used / 2**20, most_mb=ceiling / 2**20), paused


def stands_still(pid: int) -> bool:
    """Whether somebody has stopped a process of the run."""
    for process in processes.tree(pid):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                return True
    return False


def memory(pid: int) -> int:
    """Bytes that a process and those below it hold; what they share counts once where that can be told."""
    family, resident = processes.tree(pid), 0
    if len(family) > 1 and child.LINUX:  # it takes longer to tell, and matters only to processes that share much
        with suppress(psutil.Error, OSError):
            return sum(process.memory_full_info().pss for process in family)
    for process in family:
        with suppress(psutil.Error):
            resident += process.memory_info().rss
    return resident


def ask_to_end(process: Popen) -> None:
    """SIGTERM to everything below a process that still runs; a little later, SIGKILL."""

    def wraps(each: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return each.name() in WRAPPERS
        return False

    if process.poll() is None:
        processes.end(lambda: [each for each in processes.tree(process.pid) if not wraps(each)], GRACE, ask=True)
        processes.end(lambda: processes.tree(process.pid))
        process.wait()


def end(run_id: str, home: Path | None = None, patience: float = 0.0) -> int:
    """Ends every process of a run, found by the mark in its environment, and those below; how many there were.

    Args:
        home: the AUTORESEARCH_HOME of the run; prepare's by default.
        patience: seconds that they are given to end by themselves.
    """
    mark = {"AUTORESEARCH_RUN": run_id, "AUTORESEARCH_HOME": str(home or storage.home().absolute())}
    return processes.end(lambda: processes.marked(**mark), patience)


# --- What it gets ---


def fill_cache(request: Request) -> None:
    """Copies what compilers have kept to a run's own cache, unless it would serve only where it was made."""
    request.cache.mkdir(parents=True, exist_ok=True)
    source = next(filter(Path.is_dir, [*request.compiled, request.kept_cache]), None)
    if request.keeps_caches or source is None:
        return
    if request.cache_seen == request.kept_cache or not any(source.glob("triton*")):
        with suppress(OSError):  # another run may be writing there: what was not copied is compiled again
            shutil.copytree(source, request.cache, symlinks=True, dirs_exist_ok=True)
            os.utime(source)


def keep_compiled(request: Request) -> None:
    """Keeps what a run has compiled by now for later ones of its file. No weights are in it, as nothing was trained."""
    if request.keeps_caches or not request.compiled or not sandbox.mounts_folders(request.sandbox):
        return
    kept = request.compiled[0]
    unfinished = kept.with_suffix(".part")
    try:
        if not kept.is_dir():
            remove(unfinished)
            copy_folder(request.cache, unfinished)
            unfinished.rename(kept)
            os.utime(kept)
            for old in sorted(kept.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-MOST_COMPILED]:
                remove(old)
    except OSError:  # the disk may be full, and a run do with its cache what it likes
        remove(unfinished)


def copy_folder(source: Path, target: Path) -> None:
    """Copies folders and ordinary files, and follows no link, as what is copied may be changed meanwhile. OSError if
    that can't be done, or is too much."""
    copied = 0
    for place, _, files, descriptor in os.fwalk(source):
        there = target / os.path.relpath(place, source)
        there.mkdir(parents=True)
        for name in files:
            copied += copy_file(name, descriptor, there / name)
            if copied > MOST_COPIED:
                raise OSError(f"{source} has more than {MOST_COPIED} bytes")


def copy_file(name: str, folder: int, target: Path) -> int:
    """Copies a file of an open folder, and gives its size; nothing of what is no ordinary file, or has gone."""
    try:
        descriptor = os.open(name, UNFOLLOWED, dir_fd=folder)
    except OSError:
        return 0
    with open(descriptor, "rb") as source:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        with target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
            return copy.tell()


def environment(request: Request, temporary: Path) -> dict[str, str]:
    """All that a run is told."""

    inherited = {
        name: value
        for name, value in os.environ.items()
        if (name in SAFE or name.startswith(SAFE_PREFIXES)) and not any(part in name.upper() for part in NOT_SAFE)
    }
    protected = {str(path) for path in request.protected}
    if path := [part for part in listed("PYTHONPATH") if not guard.within(os.path.abspath(part), protected)]:
        inherited["PYTHONPATH"] = os.pathsep.join(path)
    cache, folder = request.cache_seen, request.folder.absolute()
    gpu = "".join(f"-{request.settings.get(name, '')}" for name in ("CUDA_VISIBLE_DEVICES", "AUTORESEARCH_DEVICE"))
    driver = re.sub("[^A-Za-z0-9]+", "-", f"cuda{gpu}").strip("-")  # of its compiler, for each GPU apart
    (request.cache / driver).mkdir(parents=True, exist_ok=True)
    told = {
        "HOME": str(folder / "home"),
        **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(sandbox.seen(request.sandbox, temporary))),
        "CUDA_CACHE_PATH": str(cache / driver),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": HF_HUB_CACHE,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUSERBASE": site.getuserbase(),
        **request.settings,
        "AUTORESEARCH_HOME": str(request.home),
        "AUTORESEARCH_CACHE": str(cache),
        "AUTORESEARCH_RUN": request.run_id,
        "AUTORESEARCH_SEED": str(request.seed),
    }
    if request.reference:
        told["AUTORESEARCH_REFERENCE"] = json.dumps(request.reference)
    if request.budget != prepare.TIME_BUDGET:
        told["AUTORESEARCH_BUDGET"] = f"{request.budget!r}"
    return inherited | told


def short_temporary(request: Request) -> Path:
    """The run's folder for temporary files: its own, unless sockets could not be made under so long a path."""
    own = request.folder.absolute() / "tmp"
    if len(str(sandbox.seen(request.sandbox, own))) <= PATH_LIMIT:
        return own
    name = hashlib.sha256(f"{own}".encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"autoresearch-{name}"
    remove(path)
    try:
        path.mkdir(mode=0o700)  # nobody else's: it must not be there
    except FileExistsError:
        raise LabError(f"{path} can't be removed; remove it, and run the same command again") from None
    return path


def readable(request: Request) -> list[Path]:
    """What a run needs of folders that are hidden from it."""
    named: list[str | Path] = [part for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") for part in listed(name)]
    named += [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "KERNELS_CACHE")]
    named += [request.settings.get(f"AUTORESEARCH_{name}", "") for name in ("PROFILE", "FA3_LIBRARY")]
    if library := request.settings.get("AUTORESEARCH_FA3_LIBRARY"):
        named += Path(library).parent.glob("libcudart.so*")  # which is loaded from beside it
    # Of the data only what tells about them: documents and rows come from the harness.
    for pattern in ("data/current", "data/*/manifest.json", "data/*/tokenizer.json", "trials*.json"):
        named += request.home.glob(pattern)
    named += [request.judge, HF_HUB_CACHE]
    return [*sandbox.interpreter(), *(Path(path) for path in named if os.path.isabs(path))]


def listed(name: str) -> list[str]:
    """The folders that a variable lists."""
    return [part for part in os.environ.get(name, "").split(os.pathsep) if part]
