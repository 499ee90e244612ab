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

from storage import DataError, disk_full  # noqa: E402

LINUX = sys.platform.startswith("linux")
LINGER = 3.0  # seconds that children may take to end after the run has
FULL = 28  # exit status: it ended as the disk is full, it says
LEFT_RUNNING = 240  # exit status: and how many there were, up to 15, is added to it
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
BEGUN = "begun"


def main(facts: dict) -> None:
    folder = Path(facts["folder"])
    (folder / BEGUN).touch()
    for name in ("EXAM", "BATCHES"):  # are not for those that train.py starts
        os.set_inheritable(int(os.environ[f"AUTORESEARCH_{name}"]), False)
    limit_files(folder)
    if LINUX:
        stay_behind()
    else:
        from lab.run.processes import follow

        threading.Thread(target=follow, daemon=True, args=(os.dup(0), lambda: os.killpg(0, signal.SIGKILL))).start()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [str(folder / "train.py")]
    {"train": train, "score": rescore}[facts["mode"]](folder, Path(__file__).parents[2], facts)


def guarded(folder: Path, judge: Path, facts: dict):
    """A guard, installed."""
    from lab.run.guard import Guard

    protected = [Path(path) for path in facts["protected"]]
    guard = Guard(folder, judge, Path(facts["home"]), protected, facts["budget"], __file__)
    guard.install()
    return guard


def train(folder: Path, judge: Path, facts: dict) -> None:
    """Runs train.py under the guard, which has the last word."""
    guard = guarded(folder, judge, facts)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (Exception, DataError) as error:
        print_error(error)
        raise SystemExit(FULL if disk_full(error) else 1) from None
    finally:
        if reason := guard.problem(guard.backend):
            guard.refuse(reason)


def print_error(error: BaseException) -> None:
    """Prints an error as Python does, from where train.py, which is sys.argv[0], begins."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename != sys.argv[0]:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


# --- Scoring again ---


def rescore(folder: Path, judge: Path, facts: dict) -> None:
    """Lets train.py make its model, up to the moment when a Clock would be made; then loads the saved weights and
    answers the harness, by a copy of prepare that train.py does not know. An error is named in score.json."""
    import prepare
    from backends import interface

    fixed = ModuleType("prepare_of_the_judge")
    SourceFileLoader(fixed.__name__, prepare.__file__).exec_module(fixed)

    def built(backend, model, *_, **__):
        status = 1
        try:
            guard.busy.now = True  # what follows is the judge's
            if reason := guard.problem(backend):
                guard.refuse(reason)
                raise fixed.Invalid(reason["code"], **reason["facts"])
            guard.busy.now = False
            names = "losses logits is_out_of_memory".split()
            plain = SimpleNamespace(**{name: partial(getattr(type(backend), name), backend) for name in names})
            type(backend).load(backend, model, facts["weights"])  # the class's own methods, whatever the object has
            answers = fixed.Answers(plain, model, 8)
            fixed.answer(fixed.tell("weights", batch_size=8), answers)
            status = 0
        except BaseException as error:  # SystemExit too: train.py is to have no say in it
            status = FULL if disk_full(error) else 1
            fixed.write_json(folder / "score.json", {"problem": type(error).__name__})  # its text goes to the log
            traceback.print_exception(error)
        finally:  # whatever the text of an error does
            try:
                sys.stdout.flush()
                sys.stderr.flush()
                end_all()  # such as a compiler's workers, which start for seconds and were not needed
            finally:
                os._exit(status)

    prepare.Clock = built
    interface.Trainer.warm_up = lambda self, x, y: None  # nothing will be trained, so nothing is to be compiled
    guard = guarded(folder, judge, facts)
    runpy.run_path(sys.argv[0], run_name="__main__")


# --- Processes ---


def limit_files(folder: Path) -> None:
    """No file grows beyond half of what the disk has left; none is written of a crash."""
    import resource

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
    from lab.run.processes import follow

    threading.Thread(target=follow, daemon=True, args=(lifeline, end_all)).start()
    status, deadline, left = 0, None, 0
    try:
        while deadline is None or time.monotonic() < deadline:
            pid, how = os.waitpid(-1, os.WNOHANG if deadline else 0)  # orphans, too
            if pid == child:
                status, deadline = os.waitstatus_to_exitcode(how), time.monotonic() + LINGER
            elif pid == 0:
                time.sleep(0.02)
        left = end_all()
    except ChildProcessError:  # all have ended
        pass
    if left:
        os._exit(LEFT_RUNNING + min(left, 15))
    # Above 128 are signals and what was left: as which no status of train.py's own may pass.
    os._exit(min(status, 1) if status > 128 else status if status >= 0 else 128 - status)


def end_all() -> int:
    """Kills all processes below this one; how many there were."""
    from lab.run.processes import below, end

    return end(below)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
