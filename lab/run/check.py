"""A few tiny steps of a train.py, to find mistakes before a run is spent on them: no data, no compiling, no score.

    python lab/run/check.py TRAIN.PY RESULT.json       what `tried` starts, as a process of its own

train.py runs between stand-ins. Its model has the real sizes; it gets some rows of random tokens, of the real length,
at the start, in the middle and at the end of its schedule. Then it is asked what the evaluator asks of every run.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # run by its path: modules come from the folder of this file's project
    sys.path[0] = __file__.replace("\\", "/").rsplit("/", 3)[0]

import inspect  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import runpy  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import AbstractContextManager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired  # noqa: E402

import numpy as np  # noqa: E402

import dataset  # noqa: E402
import evaluator  # noqa: E402
import prepare  # noqa: E402
import results  # noqa: E402
import storage  # noqa: E402
from backends import interface  # noqa: E402
from calibration.trial import Tokens  # noqa: E402
from lab.run.child import print_error  # noqa: E402

ROWS, EXAMINED = 2, 2  # of a batch that is trained on; that the evaluator asks about
PROBED_ROWS = 4  # that it asks about with another ending
PROGRESS = (0.0, 0.5, 0.999)  # through the budget, at each step
SECONDS = 120.0  # in which all has to be done: a busy machine takes several times as long
INSIDE = ("AUTORESEARCH_RESULT", "AUTORESEARCH_EXAM", "AUTORESEARCH_BATCHES")  # are for guarded runs
NOT_HERE = 3  # exit status: the device can't be used from here


@dataclass(frozen=True)
class Tried:
    """What came of it.

    Attributes:
        problem: why a run would fail, "" if nothing was found. printed: by train.py and Python, if there is one.
        num_params: of the model. seconds: that it took. elsewhere: it could not use the device, and took the CPU.
    """

    problem: str
    printed: str = ""
    num_params: int | None = None
    seconds: float = 0.0
    elsewhere: bool = False


def tried(train: Path, settings: dict[str, str]) -> Tried:
    """Tries a train.py.

    Args:
        settings: AUTORESEARCH_* variables, as runs have them.
    """
    begun = time.monotonic()
    inherited = {name: value for name, value in os.environ.items() if name not in INSIDE}
    with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
        result = Path(folder) / "result.json"
        status, printed = _run(train, result, inherited | settings)
        if elsewhere := status == NOT_HERE:
            on_cpu = {"AUTORESEARCH_DEVICE": "cpu", "AUTORESEARCH_BACKEND": "sdpa"}
            plain = {name: value for name, value in settings.items() if name != "AUTORESEARCH_PROFILE"}
            status, printed = _run(train, result, inherited | plain | on_cpu | {"AUTORESEARCH_PROFILE": ""})
        facts = json.loads(result.read_text()) if result.exists() else {}
    seconds = time.monotonic() - begun
    if status is None:
        return Tried(f"it was not done after {SECONDS:g} s", printed, None, seconds, elsewhere)
    if status or not facts:
        last = next((line for line in reversed(printed.split("\n")) if line.strip()), "")
        problem = facts.get("problem") or f"it ended with exit status {status}: {last}"
        return Tried(problem, printed, None, seconds, elsewhere)
    return Tried("", "", facts["num_params"], seconds, elsewhere)


def _run(train: Path, result: Path, environment: dict[str, str]) -> tuple[int | None, str]:
    """(exit status, None if it took too long; the last that it printed)."""
    from lab.run import log, processes

    command = [sys.executable, __file__, str(train), str(result)]
    environment = {**environment, "TORCH_COMPILE_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = Popen(
        command, cwd=result.parent, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )
    assert process.stdout
    output = log.Log(process.stdout, result.with_suffix(".log"))
    try:
        status = process.wait(SECONDS)
    except TimeoutExpired:
        status = None
    finally:
        processes.end(lambda: [*processes.tree(process.pid), *processes.in_group(process.pid)])
        process.wait()
        output.close()
    return status, log.read(result.with_suffix(".log"))


# --- Inside ---


class Batches(Iterator, AbstractContextManager):
    """Replaces prepare.Loader: a few rows of random tokens at a time."""

    epoch, waited = 1, 0.0
    clock: Steps | None = None

    def __init__(self, data, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.data, self.batch_size, self.tokens, self.batches, self.rows = data, batch_size, 0, 0, 0

    def __next__(self):
        if self.clock is None:
            raise prepare.Invalid("batch_before_clock")
        if self.clock.steps > len(PROGRESS):
            raise RuntimeError("training continues although clock.finished is true")
        rows = self.data.some_rows(min(ROWS, self.batch_size))
        self.batches, self.rows, self.tokens = self.batches + 1, self.rows + len(rows), self.tokens + rows.size
        return dataset.inputs_and_targets(rows)

    def first_rows(self):
        return self.data.some_rows(EXAMINED)

    def close(self, *_) -> None:
        pass

    __exit__ = close


class Data(Tokens):
    """Random tokens, in rows."""

    token_bytes = np.ones(dataset.VOCAB_SIZE, np.int64)

    def some_rows(self, count: int) -> np.ndarray:
        """int32 (count, 2049)."""
        starts = self._rng.integers(0, len(self.train[0][0]) - dataset.MAX_SEQ_LEN - 1, count)
        return np.stack([self.train[0][0][i : i + dataset.MAX_SEQ_LEN + 1] for i in starts]).astype(np.int32)


class Steps:
    """Replaces prepare.Clock: one step at each of PROGRESS, however long it takes."""

    def __init__(self, backend, model, loader: Batches, seconds: float | None = None):
        self.backend, self.model, self.loader, self.data = backend, model, loader, loader.data
        self.seconds = prepare.budget() if seconds is None else seconds
        self.steps, self.loss, self.started, self.stopped = 0, None, None, None
        self.evaluated, self.in_step, self.longest = False, False, 1.0
        self.took, self.losses = [], []
        self.reported: dict | None = None
        tokens, targets = dataset.inputs_and_targets(loader.first_rows())
        evaluator.require_untrained(self._answers().losses(tokens, targets), self.data.vocab_size)
        loader.clock = self

    def _answers(self):
        return prepare.Answers(self.backend, self.model, EXAMINED)

    @property
    def progress(self) -> float:
        return PROGRESS[min(self.steps, len(PROGRESS) - 1)]

    @property
    def elapsed(self) -> float:
        return self.progress * self.seconds

    @property
    def finished(self) -> bool:
        return self.steps >= len(PROGRESS)

    def tick(self, loss) -> float:
        self.loss, self.steps = float(loss), self.steps + 1
        prepare.require_loss(self.loss, self.steps, self.losses, self.data.vocab_size)
        self.losses.append(self.loss)
        self.took.append(1.0)
        return 1.0

    def stop(self) -> None:
        self.stopped = True

    def examine(self) -> None:
        """The evaluator's questions."""
        rows = self.data.some_rows(EXAMINED)
        evaluator.examine(self._answers(), rows, self.data.token_bytes, EXAMINED)


def stand_in() -> list[Steps]:
    """Puts the stand-ins in place; the clocks that will be made."""
    clocks: list[Steps] = []
    backward = interface.Trainer.backward

    def clock(*given, **named):
        clocks.append(Steps(*given, **named))
        return clocks[-1]

    def first_of_step(self, x, y, scale=1.0):
        """The passes of a step are alike: one is enough."""
        step = clocks[-1].steps if clocks else None
        if getattr(self, "tried_step", None) != (step,):
            self.tried_step, self.tried_loss = (step,), backward(self, x, y, scale)
        return self.tried_loss

    def evaluate(backend, model, data, rows="validation", count=None, batch_size=8, clock=None):
        if clock is None:
            raise prepare.Invalid("evaluates_without_clock")
        if clock.evaluated:
            raise prepare.Invalid("evaluated_twice")
        if rows != "validation" or count is not None:
            raise prepare.Invalid("other_rows")
        if not clock.steps:
            raise RuntimeError("nothing was trained: evaluate_bpb before the first step")
        clock.evaluated = True
        clock.examine()
        return math.nan

    def report(clock, **facts):
        inspect.signature(real_report).bind(clock, **facts)
        if not clock.evaluated:
            raise RuntimeError("nothing to report yet: call evaluate_bpb(..., clock=clock) first")
        clock.reported = facts

    real_report = prepare.report
    evaluator.PROBED_ROWS = PROBED_ROWS
    prepare.open_data, prepare.Loader, prepare.Clock = lambda *_: Data(), Batches, clock
    prepare.evaluate_bpb, prepare.report = evaluate, report
    interface.Trainer.warm_up = lambda self, x, y: None  # it would compile
    interface.Trainer.backward = first_of_step
    return clocks


def inside(train: str, result: Path) -> int:
    """Runs train.py; exit status."""
    clocks = stand_in()
    sys.argv = [train]
    try:
        try:
            runpy.run_path(train, run_name="__main__")
        except SystemExit as error:
            if isinstance(error, storage.Stop) or error.code not in (None, 0):
                raise
        if not clocks:
            problem = "train.py made no Clock"
        else:
            problem = "" if clocks[-1].reported else "it ended without a result: prepare.report was not called"
    except interface.BackendError as error:
        print(error)
        return NOT_HERE
    except (Exception, SystemExit) as error:
        if isinstance(error, storage.Stop) and not isinstance(error, results.Refusal):
            print(error)
            return NOT_HERE
        if not isinstance(error, results.Refusal):
            print_error(error)
        problem = f"{type(error).__name__}: {error}"
    reported = clocks[-1].reported if clocks else None
    num_params = reported["num_params"] if reported and not problem else None
    storage.write_json(result, {"problem": problem, "num_params": num_params})
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(inside(sys.argv[1], Path(sys.argv[2])))
