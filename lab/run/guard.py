"""What a guarded run may not do: looked after inside its process by a hook that Python calls before it acts (PEP 578).

The hook sees files being opened, removed and renamed, and what `prepare` and `backends` announce by `sys.audit`:
batches, ticks, the evaluation, rows that are read. It holds off mistakes and lazy cheats. What is done in C (another
framework's reader) or by a program that a run starts, it does not see: that is for the sandbox, and for scoring the
weights again.

A refusal raises prepare.Invalid and leaves a mark beside the result, so that catching the exception gains nothing. Its
reason is a code of results.REFUSALS: of what train.py chooses, its facts hold words and numbers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import dataset
import disturbance
import evaluator
import prepare
import results
import storage

# The judge's modules and packages.
JUDGES = ("prepare", "evaluator", "dataset", "disturbance", "storage", "results", "backends", "calibration")
OWN = ("home", "tmp", "work", "cache")  # parts of a run's folder that are its own
MARK = "refused"
DEVICES, SHARED = {"/dev", "/proc", "/sys"}, {"/dev/shm"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
UNSEEN = re.compile(r"(validation|held_out|train_\d+\.[a-z]+)\.npy")  # files of a dataset
CLOCKS = ("perf_counter", "monotonic", "time", "sleep")
TOLERANCE = 0.5, 0.01  # seconds, and part of the training time, that a clock may be behind another in one process
PROBED = 0.02  # seconds, at most, that a probe of the device may take beside it
LIBRARY = ("math", "numpy")  # whose functions the judge uses, too
# Who may write which file in a run's folder: functions of the judge's.
WRITERS = {
    "result.json": {"report", "recorded", "open_data"}, "result.safetensors": {"evaluate_bpb"},
    "score.json": {"built"},
}  # fmt: skip
# Events whose arguments are paths that get written: which arguments, and which hold the folder they are relative to.
CHANGES = {
    "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)],
    "os.link": [(0, 2), (1, 3)], "os.symlink": [(1, 2)], "os.truncate": [(0, None)], "os.chmod": [(0, 2)],
    "os.utime": [(0, 3)], "shutil.rmtree": [(0, None)],
}  # fmt: skip


class Guard:
    """Looks after one run.

    Args:
        folder: the run's. judge: the code that judges. home: AUTORESEARCH_HOME.
        protected: more folders that are not to be written.
        budget: seconds of training.
        trusted: the file that scores weights again, and may read rows for it.
    """

    def __init__(self, folder: Path, judge: Path, home: Path, protected: list[Path], budget: float, trusted: str):
        def forms(path):  # a path may be used as it is written or with links followed
            return {os.path.abspath(path), os.path.realpath(path)}

        self.budget, self.mark = budget, os.path.join(folder, MARK)
        self.folders, self.judges, self.homes = forms(folder), forms(judge), forms(home)
        self.data = forms(Path(home) / "data")
        self.free = {os.path.join(own, part) for own in self.folders for part in OWN}
        self.free |= forms(os.environ.get("AUTORESEARCH_CACHE") or Path(home) / "cache")
        # It is elsewhere where sockets could not be made under a long path.
        self.free |= forms(os.environ.get("TMPDIR") or Path(folder) / "tmp")
        self.protected = set().union(self.homes, self.data, self.judges, *map(forms, protected))
        self.runs = set().union(*(forms(Path(each).parent) for each in self.folders))
        self.left = self.runs | {os.path.join(each, "last") for each in self.homes}  # what other runs have left
        paths = sysconfig.get_paths()
        self.libraries = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        self.libraries |= {os.path.dirname(os.__file__), *(path for path in sys.path if "site-packages" in path)}
        self.trusted, self.readers = trusted, {prepare.__file__, dataset.__file__, storage.__file__, trusted}
        self.busy = threading.local()
        self.clock = self.backend = self.score = None
        self.now, self.require_time = time.perf_counter, prepare.require_time
        self.find_pauses = disturbance.Witness.now
        self.started: float | None = None  # times by `_awake`
        self.stopped: float | None = None
        self.meter, self.ticked = disturbance.Meter(disturbance.REFERENCE.get("steps")), 0.0
        self.took, self.done = [], 0.0  # seconds of each step by the wall; when the last was done
        self.begun = None  # when the step under way was, in seconds of training
        self.unmetered = 0.0  # seconds by the wall that the clock's meter was not told of
        self.rehearses = False
        self.judged = dict(self._judged())  # none of it is given up, so that no other has its id
        self.known = {place: insides(value) for place, value in self.judged.items()}
        self.library = [((used, name), value) for used in LIBRARY for name, value in vars(sys.modules[used]).items()]

    def install(self) -> None:
        """Begins to guard. It can not be undone."""
        announced = "rows clock batch backward step rehearsal tick evaluate scored report refused load".split()
        events = {f"autoresearch.{name}": getattr(self, f"_{name}") for name in announced}
        events |= {"open": self._open, "import": self._import, "subprocess.Popen": self._program}
        for event, places in CHANGES.items():
            events[event] = functools.partial(self._changed, places, event == "os.mkdir")
        find, busy = events.get, self.busy

        def hook(event, arguments):
            if (action := find(event)) and not getattr(busy, "now", False):
                busy.now = True  # what the guard itself does is its own affair
                try:
                    action(*arguments)
                finally:
                    busy.now = False

        sys.addaudithook(hook)

    def refuse(self, reason: dict, status: str = "invalid") -> None:
        """Leaves the mark. The first reason, {"code": ..., "facts": {...}}, stays."""
        before, self.busy.now = getattr(self.busy, "now", False), True
        try:
            with open(os.open(self.mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
                json.dump({"status": status, "reason": reason}, file)
        except FileExistsError:
            pass
        finally:
            self.busy.now = before

    def _deny(self, code: str, **facts):
        self.refuse({"code": code, "facts": facts})
        raise prepare.Invalid(code, **facts)

    # --- Who is asking ---

    def _callers(self, frame) -> Iterator[types.FrameType]:
        """Frames from the innermost on, without those of Python, its libraries and this file."""
        while frame is not None:
            name = frame.f_code.co_filename
            if name != __file__ and (self._judges(name) or not self._library(name)):
                yield frame
            frame = frame.f_back

    def _library(self, name: str) -> bool:
        return name.startswith("<frozen ") or within(name, self.libraries) and not within(name, self.folders)

    def _judges(self, name: str) -> bool:
        return within(name, self.judges)

    def _functions(self) -> set[str]:
        """Names of the judge's functions that act, without those of others that called them."""
        names = set()
        for frame in self._callers(sys._getframe(1)):
            if not self._judges(frame.f_code.co_filename):
                break
            names.add(frame.f_code.co_name)
        return names

    # --- Files ---

    def _open(self, path, mode, flags) -> None:
        if isinstance(path, int):
            return
        path = os.path.realpath(os.fsdecode(path))  # /proc/self/root and cwd are links, too
        if flags and flags & WRITING:
            self._write(path)
        elif mode is None and os.path.isdir(path):
            self._folder(path)
        else:
            self._read(path)

    def _folder(self, path) -> None:
        """A folder's descriptor would lead to files by names that nobody can look at."""
        inner = within(path, self.protected | self.runs) and not within(path, self.folders | self.free)
        if inner or any(within(each, {path.rstrip(os.sep)}) for each in self.data | self.runs):
            raise PermissionError(errno.EACCES, "a guarded run may not open it as a folder", path)

    def _read(self, path) -> None:
        if not within(path, self.homes | self.data | self.runs) or within(path, self.folders | self.judges):
            return
        name, parts = os.path.basename(path), path.split(os.sep)
        if within(path, self.data):
            by = next(self._callers(sys._getframe(1)), None)
            if name.endswith(".npy") and not (by and by.f_code.co_filename in self.readers):
                self._deny("reads_data", name=named(name))
        elif within(path, self.left) or name.endswith(".safetensors") or {"runs", "sessions"} <= set(parts):
            self._deny("reads_another_run", name=named(name))

    def _changed(self, places, makes: bool, *arguments) -> None:
        for which, beside in places:
            folder = arguments[beside] if beside is not None and beside < len(arguments) else -1
            path = os.fsdecode(arguments[which]) if not isinstance(arguments[which], int) else ""
            if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
                path = os.path.join(path_of(folder), path)
            if path and not (makes and os.path.isdir(path)):
                self._write(path)

    def _write(self, path) -> None:
        path = os.path.realpath(os.fsdecode(path))
        if within(path, self.free):
            return
        if within(path, self.folders):
            name = os.path.basename(path)
            writers = next((by for known, by in WRITERS.items() if name.startswith(known)), set())
            if not self._functions() & writers:
                self._deny("writes_result", name=named(name))
        elif within(path, self.protected):
            if os.path.basename(path).startswith("trials") or within(path, self.libraries):
                raise PermissionError(errno.EACCES, "read-only in a guarded run", path)
            owner = "judge" if within(path, self.judges) else "harness" if within(path, self.homes) else "repository"
            self._deny("changes_file", name=named(os.path.basename(path)), owner=owner)
        elif within(path, self.libraries):
            raise PermissionError(errno.EACCES, "read-only in a guarded run", path)
        elif within(path, SHARED) or not within(path, DEVICES):
            # A later run could go on with what is left there; and a mistake could change what is not the run's.
            raise PermissionError(errno.EACCES, "a guarded run may write only to its own folders", path)

    def _import(self, module, *_) -> None:
        if module.partition(".")[0] == "safetensors":
            by = next(self._callers(sys._getframe(1)), None)
            if by and not self._judges(by.f_code.co_filename):
                self._deny("imports_safetensors")

    def _program(self, program, arguments, *_) -> None:
        words = " ".join(map(os.fsdecode, arguments if isinstance(arguments, (list, tuple)) else [arguments]))
        if named_file := UNSEEN.search(words):
            self._deny("reads_data", name=named_file[0])

    # --- What prepare and backends announce ---

    def _announced(self, function: str) -> bool:
        """Whether the judge's function of this name announces what is being handled."""
        code = sys._getframe(3).f_code
        return self._judges(code.co_filename) and code.co_name == function

    def _rows(self, which) -> None:
        if which == "train":
            self._deny("reads_documents")
        if sys._getframe(3).f_code.co_filename not in self.readers:  # who reads the property
            self._deny("reads_rows", name=which)

    def _clock(self, clock, backend) -> None:
        if self.clock is not None:
            self._deny("second_clock")
        if type(clock) is not self.judged["prepare", "Clock"]:
            self._deny("other_clock")
        self.clock, self.backend = clock, backend
        self._sound()

    def _batch(self, clock) -> None:
        if clock is not self.clock:
            self._deny("batch_by_other_clock")
        if self.started is None:
            self.started = self.ticked = self.done = self._awake()
        self._under_way()

    def _backward(self) -> None:
        """A step is counted where it happens, whatever train.py makes of the clock."""
        if self.rehearses:
            return
        if self.started is None:
            self._deny("trains_before_batch")
        if self.stopped is not None:
            self._deny("trains_after_evaluation")
        self._under_way()

    def _step(self) -> None:
        if not self.rehearses:
            self._backward()
            self._done()

    def _rehearsal(self, begins) -> None:
        caller = sys._getframe(2).f_back
        while caller and caller.f_globals.get("__name__") == "contextlib":
            caller = caller.f_back
        by_warm_up = caller and caller.f_code.co_name == "warm_up" and self._judges(caller.f_code.co_filename)
        if self._announced("rehearsing") and by_warm_up:
            self.rehearses = begins

    def _tick(self, clock, kind, seconds, witnessed) -> None:
        if clock is not self.clock or not self._announced("tick"):
            return
        now = self._awake()
        if self.started is not None:
            self.unmetered += now - self.ticked - seconds
            if witnessed is not None:
                self.unmetered -= min(clock.witness.probes[-1] or 0.0, PROBED)
            if self.unmetered > TOLERANCE[0] + TOLERANCE[1] * (now - self.started):
                self._deny("clock_behind", told=number(seconds), elapsed=now - self.ticked)
            self.meter.add(kind, seconds, witnessed)
        self.ticked = now
        if self.begun is not None:
            self._done()

    def _under_way(self) -> None:
        self._in_time()
        if self.begun is None:
            self.begun = self._elapsed()

    def _done(self) -> None:
        now = self._awake()
        self.took.append(now - self.done)
        self.done, self.begun = now, None

    def _elapsed(self) -> float:
        """Seconds of training, as the clock tells them, by the guard's own watch."""
        if self.started is None:
            return 0.0
        return self.meter.elapsed + ((self.stopped or self._awake()) - self.ticked) / self.meter.slowdown

    def _awake(self) -> float:
        """Seconds by the guard's own watch, without the pauses that the clock's witness found."""
        while self.clock:
            now = self.now()
            self.find_pauses(self.clock.witness)
            if self.now() - now < disturbance.PAUSE:  # else one began between these readings
                return now - self.clock.witness.paused
        return self.now()

    def _in_time(self) -> None:
        """The time by the guard's own clock, even if the run's clock was changed."""
        if self.started is not None:
            try:
                self.require_time(self.budget, self._elapsed(), self.took, self.begun)
            except prepare.Invalid as error:
                self.refuse(error.reason)
                raise

    def _evaluate(self, clock, backend) -> None:
        if clock is None or clock is not self.clock:
            self._deny("evaluates_without_clock")
        self._in_time()
        self.stopped = self.stopped or self._awake()
        self.backend = backend
        self._sound()

    def _scored(self, clock, score) -> None:
        if self._announced("evaluate_bpb"):
            self.score = score

    def _report(self, clock) -> None:
        if self.score is None and clock.val_bpb is None:
            return  # prepare says what is missing
        if clock is not self.clock or clock.val_bpb != self.score:
            self._deny("reports_other_score")
        self._sound()

    def _refused(self, error) -> None:
        if not self._announced("recorded"):
            return
        invalid, by = isinstance(error, prepare.Invalid), error.__traceback__
        own = type(error) in (prepare.Invalid, prepare.Diverged)
        while own and by:  # through whose functions it came
            own, by = by.tb_frame.f_code.co_filename in (prepare.__file__, evaluator.__file__, __file__), by.tb_next
        itself = {"code": "raises_itself", "facts": {"name": "Invalid" if invalid else "Diverged"}}
        self.refuse(error.reason if own else itself, "invalid" if invalid else "crash")

    def _load(self, path) -> None:
        by = sys._getframe(3).f_code
        examined = (by.co_filename, by.co_name) == (prepare.__file__, "examined")
        if by.co_filename != self.trusted and not examined and not within(os.path.realpath(path), self.free):
            self._deny("loads_weights", name=named(os.path.basename(path)))

    # --- The judge's code, as it is in this process ---

    def _sound(self) -> None:
        if reason := self.problem(self.backend):
            self._deny(reason["code"], **reason["facts"])

    def problem(self, backend=None) -> dict | None:
        """What train.py changed, as a reason: the judge's functions, the clocks, the budget."""
        for code, facts in self._problems(backend):
            return {"code": code, "facts": facts}
        return None

    def _problems(self, backend) -> Iterator[tuple[str, dict]]:
        for place, value in self._judged():
            if self.known.get(place) != insides(value):
                yield "replaces", {"name": dotted(*place)}
        for place, value in self.library:
            if getattr(sys.modules[place[0]], place[1], None) is not value:
                yield "replaces", {"name": dotted(*place)}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in JUDGES:
                if not self._judges(getattr(module, "__file__", None) or ""):
                    yield "shadows", {"name": named(name)}
                for of, value in list(vars(module).items()):
                    if self._foreign(value) and mentions(module, of):
                        yield "replaces", {"name": dotted(name, of)}
        if backend is not None:
            yield from self._problems_of(backend)
        if self.clock is not None:
            told = self.clock.seconds
            if told != self.budget:
                yield "other_budget", {"told": number(told), "budget": self.budget}
            if self.stopped is not None and self.clock.stopped is not None:
                elapsed, told = self._elapsed(), self.clock.elapsed
                if not told >= elapsed - TOLERANCE[0] - TOLERANCE[1] * elapsed:
                    yield "clock_behind", {"told": number(told), "elapsed": elapsed}

    def _problems_of(self, backend) -> Iterator[tuple[str, dict]]:
        for kind in type(backend).__mro__[:-1]:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
            if kind.__module__ not in ("abc", "typing") and not self._judges(file):
                yield "other_backend", {"name": named(type(backend).__name__)}
            for of, value in vars(kind).items():
                if self._foreign(value):
                    yield "replaces", {"name": dotted(kind.__name__, of)}
        for of, value in vars(backend).items():
            if of != "Trainer" and callable(value) and hasattr(type(backend), of):
                yield "replaces", {"name": dotted(type(backend).__name__, of)}

    def _judged(self) -> Iterator[tuple[tuple[str, str], object]]:
        """What is compared, and where it is found."""
        for judge in (prepare, evaluator, dataset, disturbance, storage, results):
            for name, value in list(vars(judge).items()):
                if not name.startswith("__"):
                    yield (judge.__name__, name), value
                    own = isinstance(value, type) and value.__module__ == judge.__name__
                    for of, part in list(vars(value).items()) if own else ():
                        if callable(part) or isinstance(part, property):
                            yield (judge.__name__, f"{name}.{of}"), part
            yield ("sys.modules", judge.__name__), sys.modules.get(judge.__name__)
        yield from ((("time", name), getattr(time, name)) for name in CLOCKS)

    def _foreign(self, value) -> bool:
        """Whether this is a function whose code is neither the judge's nor a library's."""
        while isinstance(value, (functools.partial, staticmethod, classmethod)):
            value = value.func if isinstance(value, functools.partial) else value.__func__
        file = value.__code__.co_filename if isinstance(value, types.FunctionType) else "<no function>"
        return not (file.startswith("<") or self._judges(file) or self._library(file))


def insides(value) -> tuple:
    """What a judge's value is, for a comparison: a function with its code and defaults, which can be changed in it."""
    parts = [value.fget] if isinstance(value, property) else [value]
    while isinstance(parts[-1], (functools.partial, staticmethod, classmethod)) or hasattr(parts[-1], "__wrapped__"):
        inner = parts[-1]
        parts.append(inner.func if isinstance(inner, functools.partial) else getattr(inner, "__wrapped__", None))
    function = parts[-1]
    if not isinstance(function, types.FunctionType):
        return (id(value),)
    defaults = (function.__defaults__, function.__kwdefaults__ and tuple(function.__kwdefaults__.items()))
    return id(value), id(function), function.__code__, repr(defaults)


def mentions(module, name: str) -> bool:
    """Whether a module's source has this name: what it has not was added, which changes nothing of it."""
    try:
        with open(module.__file__, encoding="utf-8") as file:
            return bool(re.search(rf"\b{re.escape(name)}\b", file.read()))
    except (OSError, TypeError):
        return True


def path_of(folder: int) -> str:
    """The path of a descriptor, where the system tells; else a folder that is protected from everything."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{folder}")
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import fcntl

        return os.fsdecode(fcntl.fcntl(folder, getattr(fcntl, "F_GETPATH"), b"\0" * 1024).rstrip(b"\0"))  # macOS
    return ""


def named(text) -> str:
    """A name that train.py chose, if it is a word and not a sentence."""
    word = re.fullmatch(r"[\w.-]{1,40}", text, re.ASCII) if isinstance(text, str) else None
    return word[0] if word else "..."


def dotted(*names) -> str:
    return ".".join(map(named, names))


def number(value) -> str:
    """A number, and nothing else that is in its place."""
    return f"{value:g}" if type(value) in (int, float) else "..."


def within(path: str, folders: set[str]) -> bool:
    """Whether a path is one of these folders or in one."""
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)
