"""The inner end of a guarded run: the program that runner.py starts, which runs train.py, or scores its weights again.

    python <judge>/lab/run/child.py {"mode": "train", ...}

Its standard input is the runner's lifeline: once that is closed, because the runner has ended or was killed, so is the
run. On Linux the first process stays behind as the one that orphans fall to: it sees what a run leaves running.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # run by its path: modules come from the judge's folder, and not from lab/
    sys.path[0] = __file__.replace("\\", "/").rsplit("/", 3)[0]

import ctypes  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import runpy  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from functools import partial  # noqa: E402
from importlib.machinery import SourceFileLoader  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType, SimpleNamespace  # noqa: E402

LINUX = sys.platform.startswith("linux")
LINGER = 3.0  # seconds that children may take to end after the run has
LEFT_RUNNING = 240  # exit status: and how many there were, up to 15, is added to it
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
BEGUN = "begun"


def main(facts: dict) -> None:
    folder = Path(facts["folder"])
    (folder / BEGUN).touch()
    limit_files(folder)
    if LINUX:
        stay_behind()
    else:
        threading.Thread(target=follow, daemon=True, args=(os.dup(0), end_group)).start()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [str(folder / "train.py")]
    {"train": train, "score": rescore}[facts["mode"]](folder, Path(__file__).parents[2], facts)


def train(folder: Path, judge: Path, facts: dict) -> None:
    """Runs train.py under the guard, which has the last word."""
    guard = make_guard(folder, judge, facts)
    guard.install()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception as error:
        show(error)
        raise SystemExit(1) from None
    finally:
        if reason := guard.problem(guard.backend):
            guard.refuse(reason)


def show(error: Exception) -> None:
    """Prints a traceback that begins where train.py does."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename != sys.argv[0]:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def make_guard(folder, judge, facts):
    from lab.run.guard import Guard

    protected = [Path(path) for path in facts["protected"]]
    return Guard(folder, judge, Path(facts["home"]), protected, facts["budget"], __file__)


# --- Scoring again ---


def rescore(folder: Path, judge: Path, facts: dict) -> None:
    """Lets train.py make its model, up to the moment when a Clock would be made; then loads the saved weights and
    scores them, by a copy of prepare that train.py does not know. The scores go to score.json and rows.npz."""
    import prepare
    from backends import interface
    from storage import atomic

    fixed = private_copy(prepare.__file__)

    def built(backend, model, *_, **__):
        error = None
        try:
            guard.busy.now = True  # what follows is the judge's
            if reason := guard.problem(backend):
                guard.refuse(reason)
                raise fixed.Invalid(reason["code"], **reason["facts"])
            guard.busy.now = False
            scores = score(fixed, atomic, backend, model, facts["weights"], folder)
        except BaseException as raised:  # SystemExit too: train.py is to have no say in it
            error, scores = raised, {"problem": type(raised).__name__}  # its text goes to the log, not into a reason
        status = 1
        try:
            fixed.write_json(folder / "score.json", scores)
            status = 0
            if error:
                traceback.print_exception(error)
            sys.stdout.flush()
            sys.stderr.flush()
            end_all()  # such as a compiler's workers, which start for seconds and were not needed
        finally:  # whatever the text of an error does
            os._exit(status)

    prepare.Clock = built
    interface.Trainer.warm_up = lambda self, x, y: None  # nothing will be trained, so nothing is to be compiled
    guard = make_guard(folder, judge, facts)
    guard.install()
    runpy.run_path(sys.argv[0], run_name="__main__")


def private_copy(path: str):
    """Another copy of a module, which no name leads to."""
    module = ModuleType("prepare_of_the_judge")
    SourceFileLoader(module.__name__, path).exec_module(module)
    return module


def score(fixed, atomic, backend, model, weights: str, folder: Path) -> dict:
    """Bits per byte on validation rows and as many held-out ones. Each row's nats and bytes are written to rows.npz."""
    import numpy as np

    methods = {
        name: partial(getattr(type(backend), name), backend) for name in ("losses", "logits", "is_out_of_memory")
    }
    plain = SimpleNamespace(**methods)  # the class's own methods, whatever the object was given
    data = fixed.open_data()
    type(backend).load(backend, model, weights)
    scores, rows = {}, {}
    for name, key, stored in (("val_bpb", "val", data.validation_rows), ("held_out_bpb", "held", data.held_out_rows)):
        nats, sizes = fixed.score_rows(plain, model, data, stored[: data.eval_rows], 8)
        rows |= {f"{key}_nats": nats, f"{key}_bytes": sizes}
        scores[name] = fixed.bits_per_byte(nats, sizes)
    with atomic(folder / "rows.npz") as file:
        np.savez(file, **rows)
    return scores


# --- Processes ---


def limit_files(folder: Path) -> None:
    """No file grows beyond half of what the disk has left; none is written of a crash."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for which, wanted in ((resource.RLIMIT_FSIZE, shutil.disk_usage(folder).free // 2), (resource.RLIMIT_CORE, 0)):
        most = resource.getrlimit(which)[1]
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(which, (limit, limit))


def stay_behind() -> None:
    """Returns in a new process; this one ends when that has, and all that it started."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    lifeline, parent = os.dup(0), os.getpid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    child = os.fork()
    if child == 0:
        os.close(lifeline)
        prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # meant for the run, which is sent it too
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True, args=(lifeline, end_all)).start()
    status = reap(child)
    deadline = time.monotonic() + LINGER
    while children := not nothing_left():
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if children and (left := end_all()):
        os._exit(LEFT_RUNNING + min(left, 15))
    os._exit(status if status >= 0 else 128 - status)


def reap(child: int) -> int:
    """The exit status of a child, negative for a signal. Orphans that end meanwhile are buried."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def nothing_left() -> bool:
    """Whether all children have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return False
    except ChildProcessError:
        return True


def follow(lifeline: int, end) -> None:
    """Ends the run when the runner does."""
    while os.read(lifeline, 1):
        pass
    end()
    os._exit(1)


def end_group() -> None:
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)


def end_all() -> int:
    """Kills all processes below this one; how many there were."""
    from lab.run.processes import below, end

    return end(below)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
