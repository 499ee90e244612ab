"""Does the backend matter more than the seed? val_bpb of the same number of steps, for each backend and several seeds.

    python benchmarks/seed_noise.py --backends mlx sdpa --seeds 1 2 3 4 --steps 200

The unedited train.py, with these sizes, in each backend's own precision, on the dataset prepared last. The schedule
goes by steps instead of time, so every run sees the same batches under the same learning rates; what is left are the
initial weights, which the seed draws, and rounding. Nothing is timed, so runs may share a device (--together).

Backends agree if the mean difference over seeds is within the 90 % interval that the seeds' own spread allows (paired
differences would be tighter, but two trajectories of one seed part after a few dozen steps).
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers import execute, patched, run_apart, with_constants  # beside this file

import prepare
from lab.verdict import gate

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class StepClock(prepare.Clock):
    """A clock whose budget is a number of steps."""

    total = 200

    def __init__(self, backend, model, loader):
        super().__init__(backend, model, loader, seconds=1e9)

    progress = property(lambda self: min(1.0, self.steps / self.total))
    finished = property(lambda self: self.steps >= self.total)


def run(options) -> dict:
    StepClock.total = options.steps
    patched(prepare.Clock, StepClock).start()
    result, evaluate_bpb = {}, prepare.evaluate_bpb

    def evaluate(backend, *args, **kwargs):
        result.update(precision=backend.device.precision, val_bpb=evaluate_bpb(backend, *args, **kwargs))

    patched(evaluate_bpb, evaluate).start()
    patched(prepare.report, lambda *_, **__: None).start()
    execute("train_here", with_constants(TRAIN.read_text(), options)).main()
    return result


def child(backend: str, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = run_apart(
            __file__,
            f"{backend}, seed {seed},",
            "--child",
            env={
                **os.environ,
                "AUTORESEARCH_BACKEND": backend,
                "AUTORESEARCH_SEED": str(seed),
                "AUTORESEARCH_RESULT": f"{folder}/result.json",
            },
        )
    print(f"{backend} {result['precision']} seed {seed}: val_bpb {result['val_bpb']:.6f}", flush=True)
    return result["val_bpb"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs=2, default=["mlx", "sdpa"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--device-batch", type=int, default=16)
    parser.add_argument("--total-batch", type=int, default=2**16)
    parser.add_argument("--windows", default="SSSL")
    parser.add_argument("--together", type=int, default=1, help="runs at a time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\nRESULT", json.dumps(run(options)))
        return
    n = len(options.seeds)
    if not 2 <= n <= 8:
        parser.error("give 2 to 8 seeds")
    with ThreadPoolExecutor(options.together) as pool:
        asked = {name: [pool.submit(child, name, seed) for seed in options.seeds] for name in options.backends}
        found = {name: [future.result() for future in futures] for name, futures in asked.items()}
    for name, scores in found.items():
        print(f"{name:5} mean {statistics.mean(scores):.6f}, standard deviation {statistics.stdev(scores):.6f}")
    one, other = found.values()
    difference = statistics.mean(one) - statistics.mean(other)
    noise = math.sqrt((statistics.variance(one) + statistics.variance(other)) / n)
    bound = gate.t_quantile(0.05, 2 * n - 2) * noise
    print(
        f"{' - '.join(found)}: {difference:+.6f}; 90 % interval of no difference: ±{bound:.6f}; "
        f"{'within' if abs(difference) <= bound else 'BEYOND'} the seed noise"
    )


if __name__ == "__main__":
    main()
