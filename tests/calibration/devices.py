"""Devices that are not here: what `train.py` would do on them, from a few numbers, in place of measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibration import rule
from calibration.rule import Completed, Failed, Outcome
from dataset import MAX_SEQ_LEN, VOCAB_SIZE

GIB = 2**30
WINDOWS = {"S": MAX_SEQ_LEN // 2, "L": MAX_SEQ_LEN}


def width(depth):
    return -(-depth * 64 // 128) * 128


def flops_per_token(depth, pattern):
    """As train.py counts them (a test holds them together)."""
    windows = [WINDOWS[pattern[i % len(pattern)]] for i in range(depth - 1)] + [MAX_SEQ_LEN]
    matrices = 12 * depth * width(depth) ** 2 + VOCAB_SIZE * width(depth)
    return 6 * matrices + 12 * width(depth) * sum(windows)


def num_params(depth):
    embeddings = 2 + len([i for i in range(depth) if i % 2 == (depth - 1) % 2])
    return 12 * depth * width(depth) ** 2 + embeddings * VOCAB_SIZE * width(depth)


@dataclass
class Simulated:
    """
    Attributes:
        peak: FLOP/s of products. memory, free: bytes. mfu: share of the peak that wide models reach.
        narrow: width at which a third of that is lost, because kernels are short there.
        full_rows: of width 256 that it takes to keep the device busy.
        spills: whether memory beyond what is free is swapped, at a tenth of the speed, instead of failing.
    """

    peak: float
    memory: float
    free: float
    mfu: float = 0.45
    narrow: float = 0.0
    full_rows: float = 0.0
    pattern: str = "L"
    spills: bool = False
    a_row: float = 1.0  # memory of a row, relative to what is usual

    def run(self, depth: int, rows: int) -> Outcome:
        flops = flops_per_token(depth, self.pattern)
        busy = 1 / (1 + self.narrow / 2 / width(depth)) / (1 + self.full_rows * 256 / (rows * width(depth)) / 2)
        rate = self.peak * self.mfu * busy / flops
        memory = 0.3 * GIB + 20 * num_params(depth) + self.a_row * rows * MAX_SEQ_LEN * width(depth) * depth * 45
        trial = dict(
            depth=depth,
            rows=rows,
            total_batch_size=rows * MAX_SEQ_LEN,
            window_pattern=self.pattern,
            precision="bfloat16",
            free_memory=int(self.free),
        )
        if memory > self.free:
            if not self.spills:
                return Failed(**trial, failed="out of memory")
            rate, memory = rate / 10, 0.7 * self.free  # what it says it takes, and does not have
        return Completed(
            **trial,
            tokens_per_second=dict(median=rate, low=rate, high=rate, n=5),
            peak_memory=int(memory),
            flops_per_token=flops,
            num_params=num_params(depth),
        )

    def calibrate(self):
        """(settings, reasons, trials) as a full calibration of such a device would have them."""
        trials, first = [], rule.start(self.peak, self.free)
        while (wanted := rule.wanted(trials, first)) is not None:
            assert wanted not in [(t.depth, t.rows) for t in trials], "tried twice"
            trials.append(self.run(*wanted))
        window = 0.6 if "S" in self.pattern else 1.0
        one = {"forward": spread(1e-3), "rows": 8, "bytes": None}
        attention = {
            "full": {"fused": one | {"both": spread(3e-3)}},
            "window": {"fused": one | {"both": spread(3e-3 * window)}, "other": "wrong: relative error 1"},
        }
        return *rule.scale(trials, attention, {"full": "fused", "window": "fused"}), trials


def spread(value):
    return {"median": value, "low": 0.98 * value, "high": 1.02 * value, "n": 5}


# Peaks are what products reach, not data sheets; free is what a desktop or a driver leaves.
JETSON = Simulated(8e12, 7.4 * GIB, 4.5 * GIB, mfu=0.35, narrow=128, full_rows=2)  # Orin Nano, 8 GB
M4 = Simulated(3.6e12, 16 * GIB, 9 * GIB, narrow=64, full_rows=1)
RTX_3090 = Simulated(6.5e13, 23.7 * GIB, 22 * GIB, narrow=256, full_rows=8, pattern="SSSL")
H100 = Simulated(7e14, 79 * GIB, 78 * GIB, mfu=0.5, narrow=512, full_rows=32, pattern="SSSL")
CPU = Simulated(7.8e11, 24 * GIB, 22 * GIB, mfu=0.38, pattern="SSSL")


def log_distance(ratio):
    return abs(math.log(ratio / rule.TOKENS_PER_PARAMETER))
