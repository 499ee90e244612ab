"""How long the GPU waits for the host: train.py's step as it is launched in a run, on tokens drawn at random.

    python benchmarks/idle.py --depth 8 --rows 16                        (on a CUDA device)
    python benchmarks/idle.py --depth 8 --rows 16 --singly --loops 16
    python benchmarks/idle.py --depth 2 --rows 1 --total-batch 4096 --steps 20 --loops 1         (on a CPU)

--singly launches one kernel at a time, without CUDA graphs. --loops is of processes that keep so many cores busy. Steps
are timed as in a run, where the host prepares one while the device does the one before; then some more in the profiler.
"Busy" is the part of these in which a kernel ran or memory was copied; what stands between others for more than 5
microseconds is listed. On a CPU nothing is profiled: what loops beside it cost is seen in the tokens per second.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time

from peers import execute, with_constants  # beside this file
from seed_noise import TRAIN

import numpy as np

import prepare

PROFILED, WARM_UP = 6, 5  # steps


@contextlib.contextmanager
def busy_cores(count: int):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


class Steps:
    """A model of `train`'s, and steps of it."""

    def __init__(self, train, rows: int, total: int):
        self.train, self.backend, self.accumulation = train, train.backend, total // rows // prepare.MAX_SEQ_LEN
        model = train.GPT(train.DEPTH, 8192)
        shapes = self.backend.shapes(model)
        self.backend.set_weights(model, train.initial_weights(shapes, 42))
        self.groups = train.optimizer_groups(shapes)
        self.trainer = self.backend.Trainer(model, train.training_loss, self.groups)
        drawn = np.random.default_rng(0).integers(0, 64, (8, rows, prepare.MAX_SEQ_LEN + 1)).astype(np.int32)
        self.batches = [(tokens[:, :-1].copy(), tokens[:, 1:].copy()) for tokens in drawn]
        begun = time.perf_counter()
        self.trainer.warm_up(*self.batches[0])
        self.warm_up_seconds = time.perf_counter() - begun
        self.done, self._passes, self._loss = 0, 0, None

    def step(self) -> float:
        """Launches a step and waits for the one before; seconds that launching it took."""
        begun, loss = time.perf_counter(), 0.0
        for _ in range(self.accumulation):
            batch = self.batches[self._passes % len(self.batches)]
            loss = loss + self.trainer.backward(*batch, 1 / self.accumulation) / self.accumulation
            self._passes += 1
        self.trainer.step(self.train.schedule(self.groups, min(1, self.done / 400), self.done))
        launched = time.perf_counter() - begun
        last, self._loss = self._loss, self.backend.read_later(loss)
        if last is not None:
            float(last)
        self.done += 1
        return launched


def profiled(steps: Steps) -> tuple[float, float, list]:
    """(part of the time in which the device worked, kernels per step, what it waited between)"""
    import torch

    steps.backend.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            steps.step()
        steps.backend.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name[:60]) for e in on_device)
    waited, end, before = {}, spans[0][1], spans[0][2]
    for start, stop, name in spans[1:]:
        if start > end:
            gap = waited.setdefault((before, name), [0.0, 0])
            gap[0], gap[1] = gap[0] + start - end, gap[1] + 1
        if stop > end:
            end, before = stop, name
    idle = sum(microseconds for microseconds, _ in waited.values())
    longest = [(us / PROFILED, n / PROFILED, *names) for names, (us, n) in waited.items() if us / n > 5]
    return 1 - idle / (end - spans[0][0]), len(spans) / PROFILED, sorted(longest, reverse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="of a pass")
    parser.add_argument("--total-batch", type=int, default=2**17, help="tokens per step")
    parser.add_argument("--windows", default="L")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--singly", action="store_true", help="without CUDA graphs")
    parser.add_argument("--loops", type=int, default=0, help="processes that keep cores busy")
    options = parser.parse_args()
    options.device_batch = options.rows
    train = execute("train", with_constants(TRAIN.read_text(), options))
    from backends.pytorch import runtime

    runtime.captured = runtime.captured and not options.singly
    steps = Steps(train, options.rows, options.total_batch)
    with busy_cores(options.loops):
        launches, ends = [], []
        for _ in range(options.steps):
            launches.append(steps.step())
            ends.append(time.perf_counter())
        took, launch = np.diff(ends)[WARM_UP:], 1000 * statistics.median(launches)
        tenth, median, ninetieth = 1000 * np.quantile(took, (0.1, 0.5, 0.9))
        print(
            f"{train.backend.device.name}: depth {options.depth}, {options.rows} rows per pass, "
            f"{'CUDA graphs' if runtime.captured else 'one kernel at a time'}, {options.loops} busy cores; "
            f"warm-up {steps.warm_up_seconds:.1f} s, peak memory {train.backend.peak_memory() / 1e9:.2f} GB\n"
            f"{options.total_batch / took.mean():,.0f} tokens/s; a step {median:.1f} ms, from {tenth:.1f} (tenth "
            f"percentile) to {ninetieth:.1f} (ninetieth), launched in {launch:.1f}"
        )
        if train.backend.device.kind != "cuda":
            return
        busy, kernels, longest = profiled(steps)
    print(f"busy {100 * busy:.1f} % of the time, {kernels:.0f} kernels and copies per step")
    for microseconds, times, before, after in longest[:10]:
        print(f"  {microseconds:.0f} us per step ({times:.1f} times) between {before} and {after}")


if __name__ == "__main__":
    main()
