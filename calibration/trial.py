"""One short run of the real train.py in this process: how fast it is, and what memory it takes.

    python -m calibration.trial RESULT.json SECONDS

`AUTORESEARCH_PROFILE` names the sizes to try. Around train.py stand random tokens instead of a dataset, a clock that
stops early, and no evaluation.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from pathlib import Path

import numpy as np

import calibration
import dataset
import disturbance
import prepare
import storage
from backends import interface
from calibration.profile import TRAIN

FEWEST, MOST = 3, 40  # steps that are timed
UNTIMED = 2  # steps before: the first may still compile, and no tick waits for the second
LONGEST = 20  # times the seconds asked for, when steps are slow
STRETCHES = 5  # that the timed steps are divided into


class Tokens:
    """A dataset of random tokens with the frequencies of words, where `prepare.open_data` gives a real one."""

    name, eval_rows, vocab_size, bos = "random", 8, dataset.VOCAB_SIZE, 0
    eval_tag = data_tag = "random"

    def __init__(self):
        self._rng = np.random.default_rng(0)
        frequencies = 1 / np.arange(1, self.vocab_size + 1)  # Zipf's law
        self._cumulative = np.cumsum(frequencies / frequencies.sum())
        self.train = [(self._draw(2**22), None, None)]

    def _draw(self, count):
        drawn = np.searchsorted(self._cumulative, self._rng.random(count))
        return np.minimum(drawn, self.vocab_size - 1).astype(np.uint16)

    def packed(self):
        return dataset.endless(self.batches)

    def batches(self):
        """Documents of 512 tokens, in batches of 128."""
        tokens = self.train[0][0]
        for start in range(0, len(tokens), 2**16):
            yield tokens[start : start + 2**16], [512] * 128


class Clock(prepare.Clock):
    """Ends after a few seconds of steps."""

    def __init__(self, backend, model, loader, seconds: float):
        super().__init__(backend, model, loader, LONGEST * seconds)
        self.enough, self.parent = seconds, os.getppid()

    def tick(self, loss):
        if os.getppid() != self.parent:  # the calibration was killed; the next one must not be disturbed
            raise SystemExit("the calibration that started this trial has ended")
        return super().tick(loss)

    @property
    def finished(self):
        counted = len(self.took) - UNTIMED
        return counted >= MOST or counted >= FEWEST and self.elapsed >= self.enough or super().finished


def rates(tokens: float, took: list[float]) -> list[float]:
    """Tokens per second of consecutive stretches of steps. Not of each step: the clock waits for the step before, and
    at a probe for all of them, so that where one step seems too long the next one seems too short.

    Args:
        tokens: of a step. took: seconds of each.
    """
    stretches = np.array_split(took, min(STRETCHES, len(took)))
    return [float(tokens * len(stretch) / stretch.sum()) for stretch in stretches]


def main(result: Path, seconds: float) -> None:
    noted = {}
    warm_up = interface.Trainer.warm_up

    def watched(self, x, y):
        warm_up(self, x, y)
        noted["rows_at_once"] = min(self.rows_at_once.values())

    def report(clock, *, num_params, flops_per_token, depth, **_):
        if (depth, clock.loader.batch_size) != (asked.depth, asked.device_batch_size):
            raise SystemExit("train.py does not take its sizes from the profile: calibrate with an unedited train.py")
        tokens = clock.loader.tokens / clock.steps
        storage.write_json(
            result,
            {
                "tokens_per_second": rates(tokens, clock.took[UNTIMED:] or clock.took),
                "peak_memory": clock.backend.peak_memory(),
                "num_params": num_params,
                "flops_per_token": flops_per_token,
                "probe": {
                    "probe": clock.witness.usual_probe,
                    "clock_rate": clock.witness.usual_clock_rate,
                    "size": disturbance.product_size(clock.backend.device.peak_flops),
                },
                **noted,
            },
        )

    def evaluate(backend, model, data, clock, **_):
        clock.stop()
        shapes = set(backend.shapes(model).values())
        noted["matrices"] = sorted(shape for shape in shapes if len(shape) == 2)

    asked = calibration.defaults()
    interface.Trainer.warm_up = watched
    prepare.open_data, prepare.evaluate_bpb, prepare.report = Tokens, evaluate, report
    prepare.Clock = functools.partial(Clock, seconds=seconds)
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
