"""The fixed part of an experiment, the same for every framework: data, loader, training clock, evaluation, report.

    data = open_data()
    loader = Loader(data, batch_size)
    clock = Clock(backend, model, loader)  # the model is still untrained
    while not clock.finished:
        x, y = next(loader)  # the first batch starts the clock
        ...; clock.tick(loss)
    evaluate_bpb(backend, model, data, clock=clock)
    report(clock, num_params=..., flops_per_token=..., depth=...)

As a command (python prepare.py --help) this file prepares a dataset; corpus.py does the work.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import numbers
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import dataset
import disturbance
import evaluator
import terminal
from dataset import FIRST_ROWS, MAX_SEQ_LEN, Data, inputs_and_targets
from results import MEASURES, Diverged, Invalid, fill
from storage import DataError, Stop, home, require_writable, write_json

TIME_BUDGET = 300  # seconds of training
CURVE = 32  # points of the training loss that a run tells
BATCHES_AHEAD = 4  # what the loader has ready before it is asked for
LATE = 2.0  # seconds that a training may end late, beside its last step: the host may be busy
RECENT = 1000  # steps that tell how long one takes
EXAM = "AUTORESEARCH_EXAM"  # descriptor of the harness's end, which scores a guarded run
TURN = "LAB_TURN"  # set while a night's agent has its turn


def budget() -> float:
    """Seconds of training: `AUTORESEARCH_BUDGET` (for trials), else `TIME_BUDGET`. Stop if that is not positive."""
    text = os.environ.get("AUTORESEARCH_BUDGET") or str(TIME_BUDGET)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise Stop(f"AUTORESEARCH_BUDGET must be a positive number of seconds, not {text!r}")


def seed() -> int:
    """The seed of the initial weights: `AUTORESEARCH_SEED`, else 42. Stop if that is no whole number, or below 0."""
    text = os.environ.get("AUTORESEARCH_SEED") or "42"
    with suppress(ValueError):
        if int(text) >= 0:
            return int(text)
    raise Stop(f"AUTORESEARCH_SEED must be a whole number from 0 on, not {text!r}")


# ---- Training ----


def refuse_in_turn() -> None:
    """Nobody trains, nor measures the device, within a turn: an agent would choose by scores that nobody counts."""
    if os.environ.get(TURN):
        raise Stop(
            "an agent's turn must not train or measure: edit train.py and end the turn; then the edit is run. To try "
            "an edit within seconds, without a score: python -m lab check"
        )


def open_data(name: str | None = None) -> Data:
    """The dataset that a run trains on and is scored by; see `dataset.open_data`.

    A run begins here, so an older result where `AUTORESEARCH_RESULT` points is removed: a run that crashes leaves none.
    Stop if its budget can't be read, or its result could not be written there, before anything is compiled.
    """
    budget()
    terminal.spell_what_is_missing()
    if result := result_path():
        if result.is_dir() or result.suffix == ".safetensors":  # the weights' place, beside it, would be the same
            raise Stop(f"AUTORESEARCH_RESULT must be a file to write JSON to, as result.json is; {result} can't be one")
        if result.is_file():
            result.unlink()
    return dataset.open_data(name)


class Loader(Iterator, AbstractContextManager):
    """Endless iterator over training batches (x, y), fresh int32 (batch_size, 2048) each. Rows are packed ahead by a
    process of its own (`dataset.PackedElsewhere`), and come once the first batch is asked for; that needs a `Clock`,
    which also ends the supply.

    Attributes:
        batches, rows, tokens: handed out so far.
        epoch: pass over the documents, from 1, that packing the last batch had reached.
        waited: seconds the caller waited for batches.
    """

    def __init__(self, data: Data, batch_size: int):
        refuse_in_turn()  # here, before anything is compiled
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.data, self.batch_size = data, batch_size
        self.batches = self.rows = self.tokens = 0
        self.epoch, self.waited = 1, 0.0
        self.clock: Clock | None = None  # which sets itself
        self._source, self._first = data.packed(), []
        self._rows: Iterator[tuple[np.ndarray, int]] = self._source
        self._closed, self._thread, self._ahead = False, ThreadPoolExecutor(1, "loader"), deque()

    def first_rows(self) -> np.ndarray:
        """The first rows of the first batch, (FIRST_ROWS, 2049), before it is asked for."""
        if not self._first:
            self._first = [next(self._source) for _ in range(FIRST_ROWS)]
            self._rows = chain(self._first, self._source)
        return np.stack([row for row, _ in self._first])

    def _batch(self) -> tuple[np.ndarray, np.ndarray, int]:
        rows, epochs = zip(*[next(self._rows) for _ in range(self.batch_size)])
        return *inputs_and_targets(np.stack(rows)), epochs[-1]

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._closed:
            raise RuntimeError("the loader is closed")
        clock = admit(self.clock)
        asked = time.perf_counter()
        if not self.batches:
            if release := getattr(self._source, "release", None):
                release()
            self._ahead.extend(self._thread.submit(self._batch) for _ in range(BATCHES_AHEAD))
        try:
            x, y, self.epoch = self._ahead.popleft().result()
        except Exception as error:
            self.close()
            raise RuntimeError(f"the loader's thread failed: {error!r}") from error
        self._ahead.append(self._thread.submit(self._batch))
        self.waited += time.perf_counter() - asked
        self.batches += 1
        self.rows += len(x)
        self.tokens += len(x) * MAX_SEQ_LEN
        clock.start()
        return x, y

    def close(self) -> None:
        """Ends the thread and the process; no batches after this."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._source.close()

    def __exit__(self, *_) -> None:
        self.close()


class Clock:
    """Training time: from the first batch that the loader hands out to `stop`, which `evaluate_bpb` calls, in seconds
    of the undisturbed device (disturbance.py).

    Making it scores the untrained model, which must know nothing yet: Invalid if it does (a warm start). DataError if
    the weights could not be saved in the end.

    Attributes:
        seconds: of training allowed, `budget()` by default.
        steps, longest: number of `tick` calls; seconds the longest took. in_step: has had a batch since the last tick.
        loss: of the last step that is known to be done, a float.
        took: seconds that each step took, by the wall.
        meter, witness: what tells the time, and what it rests on.
        val_bpb, val_rows: the score and how many rows it is of, once there is one.
        initial_weights: their sketch: with another seed, it is another.
    """

    def __init__(self, backend, model, loader: Loader, seconds: float | None = None):
        refuse_in_turn()
        if EXAM not in os.environ:  # else the harness made the folder
            require_writable(weights_path())
        self.backend, self.loader = backend, loader
        self.seconds = budget() if seconds is None else seconds
        self.started: float | None = None  # times by time.perf_counter()
        self.stopped: float | None = None
        self.ticked = self._last = self._window = self._paused = 0.0  # ticked: by the witness's clock
        self.steps, self.longest, self.in_step, self.took = 0, 0.0, False, []
        self.loss: float | None = None
        self.losses: list[float] = []  # of all steps
        self._unread: tuple[int, Any] | None = None
        self.evaluated, self.val_bpb, self.val_rows, self.initial_weights = False, None, None, None
        self.meter = disturbance.Meter(disturbance.REFERENCE.get("steps"))
        self.witness = disturbance.Witness(backend, *map(disturbance.REFERENCE.get, ("probe", "clock_rate")))
        with recorded(self):
            sys.audit("autoresearch.clock", self, backend)
            self.initial_weights = sketch(backend.weights(model))
            values = Answers(backend, model, FIRST_ROWS).losses(*inputs_and_targets(loader.first_rows()))
            evaluator.require_untrained(values, loader.data.vocab_size)
        if examiner := tell("untrained"):
            examiner.recv_bytes()  # until it has kept what was compiled
        loader.clock = self
        gc.collect()
        gc.freeze()  # what exists by now stays: going through it again would stall a step by half a second

    def start(self) -> None:
        """Called by the loader with each batch; the first one starts the clock."""
        with recorded(self):
            sys.audit("autoresearch.batch", self)
        if self.started is None:
            self.backend.step_kind()  # of the warm-up
            self.witness.start()
            self.started = self._window = time.perf_counter()
            self.ticked, self._paused = self.witness.now(), self.witness.paused
        self.in_step = True

    def tick(self, loss) -> float:
        """Ends a step, and returns the seconds that a step takes: those since the last tick (or the start).

        Args:
            loss: of this step, as `Trainer.backward` returns it: a scalar on the device. It is waited for at the next
                tick: the device has a step to do while the next one is prepared, and never more than that. A number
                says nothing of the device, which is then waited for at once; so it is after the first step, and at the
                end, lest a step too many be begun.

        Raises:
            Diverged: see `require_loss`.
        """
        if self.started is None:
            raise RuntimeError("clock.tick() before the first batch: take it from the loader, train, then tick")
        ending = self.elapsed + 2 * self.longest >= self.seconds
        at_once = isinstance(loss, numbers.Number) or self.loss is None or ending
        window = time.perf_counter() - self._window >= disturbance.window(self.seconds)
        waits = at_once or self._unread is not None
        if not at_once:
            loss = self.backend.read_later(loss)
        if at_once or window:  # a probe would wait for the device, outside the training time
            self.backend.synchronize()
        self._read()  # of the step before
        seconds, witnessed, paused = self._since_tick(), None, self.witness.paused - self._paused
        if window:
            witnessed, self._window = self.witness.read(), time.perf_counter()
        kind = self.backend.step_kind()
        if paused and not self.witness.is_cpu:
            seconds = self.meter.paused(kind, seconds, paused)
        sys.audit("autoresearch.tick", self, kind, seconds, witnessed)
        self.meter.add(kind, seconds, witnessed)
        self.ticked, self._paused = self.witness.now(), self.witness.paused  # a probe is no training time
        self.steps, self.in_step = self.steps + 1, False
        self.longest = max(self.longest, seconds)
        self.took.append(seconds)
        self._unread = self.steps, loss
        if at_once:
            self._read()
        self._last = seconds if waits else self._last  # a tick that waited for nothing tells nothing
        return self._last

    def _since_tick(self) -> float:
        """Seconds since the last tick, without pauses."""
        return self.witness.now() - self.ticked

    def _read(self) -> None:
        """Waits for the loss that has not been read yet, if there is one, and checks it."""
        if self._unread is None:
            return
        (step, loss), self._unread = self._unread, None
        self.loss = float(loss)
        with recorded(self):
            require_loss(self.loss, step, self.losses, self.loader.data.vocab_size)
        self.losses.append(self.loss)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far: 0 before the first batch, fixed after `stop`."""
        if self.started is None or self.stopped is not None:
            return self.meter.elapsed
        return self.meter.elapsed + self._since_tick() / self.meter.slowdown

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, from 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    @property
    def finished(self) -> bool:
        return self.elapsed >= self.seconds

    def stop(self) -> None:
        """Waits for the device and ends the training time; again, it changes nothing."""
        if self.stopped is None:
            self.backend.synchronize()
            self._read()
            admit(self)
            if self.started is not None:
                self.meter.add("", self._since_tick())
            self.stopped = time.perf_counter()  # from here on nothing of train.py's runs that could train
            self.witness.stop()


def sketch(weights: dict[str, np.ndarray]) -> str:
    """A sketch of weights by name: 24 random projections of samples of all that were drawn, each parameter counting
    alike, as hexadecimal int8. Two independent draws are as far apart as their own lengths say; see `results.apart`."""
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), (24, 4096))
    total, drawn = np.zeros(24), 0
    for name in sorted(weights):
        flat = weights[name].reshape(-1)
        sample = flat[:: -(-flat.size // 4096)].astype(np.float64) if flat.size else np.zeros(1)
        if sample.min() != sample.max():  # a constant was not drawn
            own = np.roll(signs, zlib.crc32(name.encode()) % 4096, axis=1)[:, : len(sample)]
            total, drawn = total + own @ sample / np.linalg.norm(sample), drawn + 1
    return np.clip(np.rint(32 * total / max(drawn, 1) ** 0.5), -127, 127).astype(np.int8).tobytes().hex()


def admit(clock: Clock | None) -> Clock:
    """The clock of a run. Refuses training before a clock checked the model, after the evaluation, or far beyond the
    budget."""
    with recorded(clock):
        if clock is None:
            raise Invalid("batch_before_clock")
        if clock.stopped is not None:
            raise Invalid("batch_after_evaluation")
        require_time(clock.seconds, clock.elapsed, clock.took, clock.meter.elapsed if clock.in_step else None)
        return clock


def require_time(seconds: float, elapsed: float, steps: list[float], begun: float | None) -> None:
    """Refuses more training than a budget of `seconds` allows. Times are seconds since the first batch.

    Args:
        elapsed: until now. steps: how long each took. begun: the step under way; None between steps.
    """
    # A step that begins in time may end late, but not outlast its like; to begin another after that is to ignore the
    # clock. Of a first step nothing is known: it may take the budget (in short trials, the standard one).
    usual = max(3 * float(np.median(steps[-RECENT:])), 2 * steps[-1]) if steps else max(seconds, TIME_BUDGET)
    limit = seconds + usual + LATE if begun is None else max(min(begun, seconds + usual), seconds) + usual + LATE
    if not steps:
        limit = usual + LATE
    if elapsed > limit:
        raise Invalid("overtime", seconds=elapsed, budget=seconds, limit=limit)


def require_loss(loss: float, step: int, before: list[float], vocab_size: int) -> None:
    """Diverged if a loss is not finite, or above twice chance, which first steps are above by little. One that begins
    above that is taken for a sum of several, at most eight, and may be twice as high as it began."""
    chance, first = math.log(vocab_size), before[0] if before else loss
    limit = 2 * (min(first, 8 * chance) if first > 2 * chance else chance)
    if not (math.isfinite(loss) and loss <= limit):
        raise Diverged("diverged", loss=loss, step=step, limit=limit)


# ---- Evaluation ----


def evaluate_bpb(backend, model, data: Data, rows="validation", count=None, batch_size=8, clock=None) -> float:
    """Bits per byte of stored rows ("validation" or "held_out"): nats over bytes of the targets over ln 2, in float64.

    Special tokens count in neither sum. The first `count` rows are scored, `data.eval_rows` by default, `batch_size` at
    once or fewer if they don't fit; the score does not depend on it. With the `clock` of a training run, the run ends
    here: its time stops, and the weights are saved before anything can go wrong, beside `AUTORESEARCH_RESULT` with
    suffix .safetensors, else as last/weights.safetensors. It is scored over the standard rows, the default.
    Raises Invalid if the model or run must not be scored, DataError if rows are missing or weights can't be saved."""
    batch_size = max(1, int(batch_size))
    with recorded(clock):
        sys.audit("autoresearch.evaluate", clock, backend)
        if clock is not None:
            if clock.evaluated:
                raise Invalid("evaluated_twice")
            clock.stop()
            tell("stopped")
            clock.evaluated = True
            weights = weights_path()
            backend.save(model, weights)
            if rows != "validation" or count is not None:
                raise Invalid("other_rows")
        if clock is not None and EXAM in os.environ:
            bpb, count = examined(Answers(backend, model, batch_size), weights)
        else:
            stored = getattr(data, f"{rows}_rows")
            count = data.eval_rows if count is None else count
            if not 1 <= count <= len(stored):
                raise DataError(f"{count} {rows} rows were asked for, and {len(stored)} are stored; prepare more text")
            answers = Answers(backend, model, batch_size)
            bpb = evaluator.bits_per_byte(*evaluator.examine(answers, stored[:count], data.token_bytes, batch_size))
    if clock is not None:
        clock.val_bpb, clock.val_rows = bpb, count
        sys.audit("autoresearch.scored", clock, bpb)
    return bpb


class Answers:
    """What a model says of tokens, in this process. A batch that does not fit into the memory is taken in parts."""

    def __init__(self, backend, model, batch_size: int):
        self.backend, self.model, self.fit = backend, model, batch_size

    def losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Nats of each target, float32 (B, T)."""
        parts, done = [], 0
        while done < len(tokens):
            size = min(self.fit, len(tokens) - done)
            part = halving(
                self.backend, size, lambda n: self._losses(tokens[done : done + n], targets[done : done + n])
            )
            if len(part) < size:
                self.fit = len(part)
            parts.append(part)
            done += len(part)
        return np.concatenate(parts)

    def _losses(self, tokens, targets) -> np.ndarray:
        values = np.asarray(self.backend.losses(self.model, tokens, targets))
        if values.shape != targets.shape:
            raise Invalid("losses_shape", shape=f"{values.shape}", expected=f"{targets.shape}")
        return values.astype(np.float32, copy=False)

    def logits(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The logits at some places of each row, float32 (B, len(places), V)."""

        def logits(size):
            values = np.asarray(self.backend.logits(self.model, tokens[:size]))
            if values.ndim != 3 or values.shape[:2] != tokens[:size].shape:
                raise Invalid("logits_shape", shape=f"{values.shape}", expected=f"{(*tokens[:size].shape, 'V')}")
            return values[:, places].astype(np.float32, copy=False)

        first = halving(self.backend, len(tokens), logits)
        return (
            first if len(first) == len(tokens) else np.concatenate([first, self.logits(tokens[len(first) :], places)])
        )


harness = functools.cache(Connection)  # by its descriptor


def tell(event: str, **facts) -> Connection | None:
    """Tells the harness of a guarded run how far it is; the connection to it."""
    if EXAM not in os.environ:
        return None
    connection = harness(int(os.environ[EXAM]))
    connection.send_bytes(json.dumps({"event": event, **facts}).encode())
    return connection


def examined(answers: Answers, weights: Path) -> tuple[float, int]:
    """Is examined by the harness with the saved weights, whose digest it takes before it sends rows: score and rows."""
    examiner = tell("weights", batch_size=answers.fit)
    if examiner is None:
        raise RuntimeError("there is no harness to examine this run")
    answers.backend.load(answers.model, weights)
    return answer(examiner, answers)


def answer(examiner: Connection, answers: Answers) -> tuple[float, int]:
    """Answers the harness until it tells the score. Invalid if it refuses one."""
    while True:
        asked = json.loads(examiner.recv_bytes())
        if asked["ask"] == "done":
            if reason := asked["refused"]:
                raise Invalid(reason["code"], **reason["facts"])
            return asked["bpb"], asked["rows"]
        tokens, given = (np.frombuffer(examiner.recv_bytes(), np.int32) for _ in range(2))
        tokens = tokens.reshape(asked["shape"])
        if asked["ask"] == "losses":
            given = given.reshape(asked["shape"])
        examiner.send_bytes(np.ascontiguousarray(getattr(answers, asked["ask"])(tokens, given)).tobytes())


def halving(backend, size: int, action):
    """action(size), or with half of it and so on while memory runs out."""
    while True:
        try:
            return action(size)
        except Exception as error:
            if size == 1 or not backend.is_out_of_memory(error):
                raise
        size //= 2  # the traceback, and with it the arrays that did not fit, is gone by now


# ---- Result ----


def result_path() -> Path | None:
    """Where `AUTORESEARCH_RESULT` wants the result as JSON."""
    path = os.environ.get("AUTORESEARCH_RESULT")
    return Path(path) if path else None


def weights_path() -> Path:
    """Where a run saves its weights: beside its result, if one is wanted."""
    return (result_path() or home() / "last" / "weights").with_suffix(".safetensors")


@contextmanager
def recorded(clock: Clock | None):
    """Writes why a run ends without a score to `AUTORESEARCH_RESULT`, before the error is raised again."""
    try:
        yield
    except (Invalid, Diverged) as error:
        sys.audit("autoresearch.refused", error)
        if path := result_path():
            status = "invalid" if isinstance(error, Invalid) else "crash"
            write_json(path, {"status": status, "reason": error.reason, **(measured(clock) if clock else {})})
        raise


def curve_of(losses: list[float]) -> dict[str, float]:
    """Means of the steps' losses over at most CURVE equal parts of the steps, by the share of the steps until then."""
    ends = sorted({round(len(losses) * part / CURVE) for part in range(1, CURVE + 1)} - {0})
    parts = zip([0, *ends], ends)
    return {f"{end / len(losses):.4g}": float(np.mean(losses[start:end])) for start, end in parts if end > start}


def measured(clock: Clock) -> dict:
    """What the clock and its loader know about a run, finished or not."""
    loader, data, backend, seconds = clock.loader, clock.loader.data, clock.backend, clock.elapsed
    meter, witness = clock.meter, clock.witness
    return {
        "training_seconds": seconds, "total_seconds": time.time() - psutil.Process().create_time(),
        "disturbance": meter.disturbance,
        "paused_seconds": witness.paused, "probe_seconds": witness.usual_probe,
        "clock_rate": witness.usual_clock_rate, "step_seconds": meter.costs,
        "budget_seconds": clock.seconds, "peak_vram_mb": backend.peak_memory() / 2**20,
        "losses": curve_of(clock.losses),
        "num_steps": clock.steps, "total_tokens_M": loader.tokens / 1e6, "epochs": loader.epoch,
        "tokens_per_second": loader.tokens / seconds if seconds else 0.0,
        "device": backend.device.slug, "backend": backend.name,
        "profile": backend.device.profile or "none", "speed": backend.device.speed,
        "attention_provider": backend.device.attention_provider,
        "dataset": data.name, "eval": data.eval_tag, "data": data.data_tag,
        "initial_weights": clock.initial_weights, **backend.warmed_up,
    }  # fmt: skip


def plain(value) -> Any:
    """A fact as JSON can hold it: arrays are lists, those without dimensions their number, and None is one that is not
    finite. What JSON has no word for is told as text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def report(clock: Clock, *, num_params: int, flops_per_token: float, depth: int, **extra) -> dict:
    """Prints the summary block, the original's lines first, and writes it as JSON where `AUTORESEARCH_RESULT` points.
    `mfu_percent` is relative to the rate of matrix products measured on this device, `speed` is how that rate is now
    relative to calibration's; nan (JSON: null) where unknown.
    `extra` follows in both. Notes tell of repeated data, and of a trial: a budget other than `TIME_BUDGET`."""
    sys.audit("autoresearch.report", clock)
    if clock.val_bpb is None:
        raise RuntimeError("nothing to report yet: call evaluate_bpb(..., clock=clock) on the validation rows first")
    facts = {"status": "ok", "val_bpb": clock.val_bpb, "val_rows": clock.val_rows, **measured(clock)}
    peak, trial = clock.backend.device.peak_flops, clock.seconds != TIME_BUDGET
    num_params, flops_per_token, depth = map(plain, (num_params, flops_per_token, depth))
    rate = flops_per_token and flops_per_token * facts["tokens_per_second"]
    facts |= {"num_params_M": num_params and num_params / 1e6, "depth": depth, "flops_per_token": flops_per_token}
    facts |= {"model_tflops": rate and rate / 1e12, "mfu_percent": 100 * rate / peak if rate and peak else None}
    extra = {name: plain(value) for name, value in extra.items() if name not in facts}  # what was measured stays
    facts |= extra
    formats = {measure.name: measure.summary for measure in MEASURES if measure.summary}
    formats |= ({"budget_seconds": "g"} if trial else {}) | dict.fromkeys(extra, "")
    print("---")
    for name, form in formats.items():
        print(f"{name + ':':<17}", fill(f"{{it:{form}}}", {"it": math.nan if facts[name] is None else facts[name]}))
    if facts["epochs"] > 1:
        size = clock.loader.data.train_tokens / 1e6
        print(f"note: pass {facts['epochs']} of the training data was begun; one pass has {size:.1f} M tokens")
    if trial:
        print(
            f"note: this was a trial of {clock.seconds:g} s; its score can't be compared with that of a run of "
            f"{TIME_BUDGET} s"
        )
    if path := result_path():
        write_json(path, facts)
    return facts


if __name__ == "__main__":
    import corpus

    terminal.spell_what_is_missing()
    sys.exit(terminal.printed(lambda: corpus.main(sys.argv[1:])))
