"""Where the time beside training goes: a run of train.py, from the start of its process to its summary.

    python benchmarks/start.py [--seconds 5] [--starts 2] [--change DEPTH=11 [ASPECT_RATIO=80 ...]]

Each start is a process of its own and trains for so many seconds; the second one finds what the first compiled. Then
each change of a constant is started once. Told is for each stage how long it lasted; a device is waited for at the end
of each.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from peers import execute, patched, run_apart, with_values  # beside this file

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def staged(options) -> dict:
    """Seconds by stage."""
    last, stages = psutil.Process().create_time(), {}

    def done(stage: str) -> None:
        nonlocal last
        now = time.time()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    def then(function, stage: str, before: str | None = None) -> None:
        """Has a function say when it was begun, if that ends a stage, and when it is done."""

        def timed(*arguments, **keywords):
            if before:
                done(before)
            result = function(*arguments, **keywords)
            done(stage)
            return result

        patched(function, timed).start()

    import backends
    import evaluator
    import prepare

    done("python, numpy, this project")
    load = backends.load

    def loaded(**how):
        backend = load(**how)
        done("framework, device, attention, kernels")
        then(backend.Trainer.warm_up, "compilation and warm-up", before="model, weights, optimizer")
        then(type(backend).save, "weights to disk")
        return backend

    patched(load, loaded).start()
    then(prepare.open_data, "data")
    then(prepare.Clock.__init__, "check of the untrained model")
    then(prepare.Clock.stop, "training")
    then(evaluator.examine, "evaluation")
    os.environ["AUTORESEARCH_BUDGET"] = str(options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_RESULT"] = f"{folder}/result.json"
        changed = dict(change.split("=") for change in options.change)
        execute("ours", with_values(TRAIN.read_text(), changed)).main()
        done("summary")
    return stages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of training")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME=VALUE", help="of train.py's constants")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\nRESULT", json.dumps(staged(options)))
        return
    begun = {f"start {i + 1}": () for i in range(options.starts)} | {change: (change,) for change in options.change}
    starts = [run_apart(__file__, what, "--child", "--change", *how) for what, how in begun.items()]
    print(f"| seconds | {' | '.join(begun)} |\n|{'---|' * (1 + len(starts))}", flush=True)
    for stage in starts[0]:
        print(f"| {stage} | " + " | ".join(f"{start.get(stage, 0):.1f}" for start in starts) + " |")
    before = [sum(list(start.values())[: list(start).index("training")]) for start in starts]
    print("| **to the first step** | " + " | ".join(f"{seconds:.1f}" for seconds in before) + " |")
    beside = [sum(start.values()) - start["training"] for start in starts]
    print("| **beside training** | " + " | ".join(f"{seconds:.1f}" for seconds in beside) + " |")


if __name__ == "__main__":
    sys.exit(main())
