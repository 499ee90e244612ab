"""The harness's end of a guarded run: what it trains on and is scored with comes from here, through two sockets.

Rows to score come to a run only once it has saved its weights and their digest was taken; what it answers is judged and
summed up here. Training rows are packed by a process of the harness's, which notes when the first batch was asked for.
"""

from __future__ import annotations

import json
import math
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import dataset
import disturbance
import evaluator
import prepare
import storage
from lab.errors import LabError
from lab.reasons import Reason, because
from lab.run import sandbox

PATIENCE = 10.0  # seconds
SAVING = 2e7  # bytes/s, at least, when weights are saved
LATE = 2.0, 0.02  # seconds, and part of the time, by which the harness's watch may differ from the run's
PAUSES_APART = 3.0, 0.1  # the same of its pauses: a run may stand still where nobody was told to stop it
LARGEST_BATCH = 64


class Asked:
    """A model in a run, with the methods of `prepare.Answers`. ValueError or OSError if an answer is malformed."""

    def __init__(self, run: Connection, vocab_size: int):
        self.run, self.vocab_size = run, vocab_size

    def _ask(self, what: str, tokens: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        self.run.send_bytes(json.dumps({"ask": what, "shape": tokens.shape}).encode())
        for array in (tokens, other):
            self.run.send_bytes(array.astype(np.int32).tobytes())
        return np.frombuffer(self.run.recv_bytes(4 * math.prod(shape)), np.float32).reshape(shape)

    def losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self._ask("losses", tokens, targets, tokens.shape)

    def logits(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        return self._ask("logits", tokens, places, (len(tokens), len(places), self.vocab_size))


class Exam:
    """The exam of one run. To be used as a context, in which the run is started with `settings` and `descriptors`.

    Args:
        request: as of runner.py. weights: where the run saves them, or has done so.
        parts: of the dataset, that are scored: "validation" and then "held_out", with the keys of their scores.
        trains: it gets training rows.
        told: `self.told` of the run that saved these weights, if there is one.
        untrained: called once, when the run is ready to train and has not begun to. It waits meanwhile.

    Attributes:
        scores: bits per byte by part. rows: "val_nats" and so on, float64 (rows,).
        reason: why there are none, as `results.Refusal.reason`.
        told: of a run that trains, one place of each validation row and what was told there, (rows,) both.
        digest: of the weights, when the run said that they are saved.
        begun, stopped, saved: times by time.monotonic, when it took its first batch, stopped training, had saved.
    """

    def __init__(self, request, weights: Path, parts: dict[str, str], trains: bool, told=None, untrained=None):
        sandbox.refuse_windows()
        try:
            self.data = dataset.opened(dataset.folder_of(request.home, request.settings.get("AUTORESEARCH_DATA")))
        except storage.DataError as error:
            raise LabError(f"{error}") from error
        self.weights, self.parts, self.trains, self.told = weights, parts, trains, told
        self.untrained = untrained
        self.scores, self.rows, self.reason, self.digest = {}, {}, None, ""
        self.begun = self.stopped = self.saved = None
        ours, run = socket.socketpair()
        packer, batches = socket.socketpair()
        self._theirs, self._run = (run, batches), Connection(ours.detach())
        self._packer = None
        if trains:
            command = [sys.executable, "-B", str(request.judge / "dataset.py"), str(self.data.folder), "note"]
            self._packer = subprocess.Popen(
                command, stdin=packer.fileno(), stdout=packer.fileno(), stderr=subprocess.PIPE, text=True
            )
        packer.close()
        self._thread = threading.Thread(target=self._examine, name="exam", daemon=True)
        self.descriptors = [run.fileno(), batches.fileno()]
        self.settings = {prepare.EXAM: f"{run.fileno()}", dataset.BATCHES: f"{batches.fileno()}"}

    def __enter__(self) -> Exam:
        return self

    def start(self) -> None:
        """The run has its ends of the sockets."""
        for end in self._theirs:
            end.close()
        self._thread.start()

    def __exit__(self, *_) -> None:
        for end in self._theirs:
            end.close()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        self._run.close()
        if self._packer:
            self._packer.kill()
            noted = self._packer.communicate()[1]
            with suppress(ValueError, IndexError):
                self.begun = float(noted.splitlines()[0])

    def _examine(self) -> None:
        # It has ended, or says what it should not. So that it waits for no answer, the connection is closed then.
        with self._run, suppress(EOFError, OSError, ValueError, KeyError, TypeError):
            while True:
                told = json.loads(self._run.recv_bytes(1000))
                if told["event"] == "weights":
                    break
                if told["event"] == "untrained":
                    self._ready()
                    continue
                self.stopped = self.stopped or time.monotonic()
            self.saved, self.digest = time.monotonic(), storage.sha256(self.weights)
            size = min(max(int(told["batch_size"]), 1), LARGEST_BATCH)
            try:
                self._score(size)
            except prepare.Invalid as error:
                self.reason = error.reason
            bpb = next(iter(self.scores.values()), None)
            done = {"ask": "done", "refused": self.reason, "bpb": bpb, "rows": self.data.eval_rows}
            self._run.send_bytes(json.dumps(done).encode())

    def _ready(self) -> None:
        """The run says that it has not trained yet. Once it has had a batch, that is not believed."""
        untrained, self.untrained = self.untrained, None
        if untrained and self._packer and self._packer.stderr:
            if not select.select([self._packer.stderr], [], [], 0)[0]:
                untrained()
        self._run.send_bytes(b"{}")

    def _score(self, batch_size: int) -> None:
        """All parts in one examination: what is asked again is chosen from all rows."""
        data, asked = self.data, Asked(self._run, self.data.vocab_size)
        parts = [getattr(data, f"{part}_rows")[: data.eval_rows] for part in self.parts]
        if self.told:  # before it has seen any of these rows
            evaluator.compare_apart(asked, parts[0], data.vocab_size, batch_size, *self.told)
        rows = np.concatenate(parts)
        said = np.empty((len(rows), rows.shape[1] - 1), np.float32) if self.trains else None
        of_rows = evaluator.examine(asked, rows, data.token_bytes, batch_size, said=said)
        if said is not None:
            places = np.random.default_rng().integers(0, said.shape[1] - 1, len(said))
            self.told = places, said[np.arange(len(said)), places]
        for key, nats, sizes in zip(self.parts.values(), *(np.split(each, [len(parts[0])]) for each in of_rows)):
            self.rows |= {f"{key}_nats": nats, f"{key}_bytes": sizes}
            self.scores[f"{key}_bpb"] = evaluator.bits_per_byte(nats, sizes)

    def problem(self, facts: dict, paused: float = 0.0) -> Reason | None:
        """Why a run's result is not believed. It stood still for `paused` seconds, as the harness saw it."""
        training_seconds, pauses = facts["training_seconds"], facts["paused_seconds"]
        disturbed = min(facts["disturbance"], disturbance.MOST - 1)
        if facts["eval"] != self.data.eval_tag:
            return because("other_data", name=self.data.name)
        if not self.scores or self.saved is None:
            return because("not_examined")
        if not self.weights.is_file() or storage.sha256(self.weights) != self.digest:
            return because("changed_weights")
        stopped = self.stopped or self.saved
        if self.begun is not None:
            seconds = stopped - self.begun
            told = training_seconds * (1 + disturbed) + pauses
            if seconds > told + LATE[0] + LATE[1] * seconds or (
                pauses > paused + PAUSES_APART[0] + PAUSES_APART[1] * seconds
            ):
                return because("other_watch", told=told, seconds=seconds)
        if self.saved - stopped > PATIENCE + self.weights.stat().st_size / SAVING:
            return because("slow_saving", seconds=self.saved - stopped)
        return None
