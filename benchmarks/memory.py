"""What training takes on a Mac, estimated: peak memory of the MLX backend by depth and rows, from MLX's CPU build.

    python benchmarks/memory.py [--depths 2 4 6 8] [--rows 2 4] [--precision bfloat16]

MLX's CPU build runs the same unfused operations as Metal's; a fused CUDA kernel would tell nothing of a Mac. But Metal
frees what a command buffer used only when all of it is done, 40 to 50 operations later: how much that adds is not
known. Each point is one accumulated batch and one optimizer step of the unedited train.py in a process of its own,
with rows of 2048 tokens, uncompiled, attention by blocks with recomputed probabilities and the smallest chunks of
logits (what is chosen where memory is short). To it a float32 gradient of every parameter is added, which a second
pass holds beside its own. Peak memory grows in a line with the rows, which the first two numbers of rows give; a third
one checks it. It takes half an hour, most of it for depth 8.

The table then says how many rows fit into a Mac of each size by the rule for a batch that fits: at most 80 % of the
free memory, taken here as the working set that Metal recommends (two thirds of the memory, three quarters above 36 GB).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from peers import execute, patched  # beside this file

ROOT = Path(__file__).resolve().parents[1]

MACS = (8, 16, 24, 64)  # GiB of unified memory
SHARE = 0.8  # of the free memory, for a batch that fits


def measure(depth: int, rows: int, precision: str) -> int:
    """Peak bytes of a batch of `rows` and a step, in this process."""
    import numpy as np

    import backends
    import prepare
    from backends import bench
    from backends.mlx import cross_entropy

    cross_entropy.SHARE_OF_MEMORY = 2**60
    patched(bench.choose_attention, lambda *_: {"full": "recomputed", "window": "recomputed"}).start()
    backend = backends.load("mlx", precision, compiled=False)
    patched(backends.load, lambda **_: backend).start()
    source, found = re.subn(r"(?m)^DEPTH = [^#\n]*", f"DEPTH = {depth} ", (ROOT / "train.py").read_text())
    assert found == 1
    train = execute("train", source)

    model = train.GPT(depth, 8192)
    shapes = backend.shapes(model)
    backend.set_weights(model, train.initial_weights(shapes, 42))
    groups = train.optimizer_groups(shapes)
    trainer = backend.Trainer(model, train.training_loss, groups)
    x = np.random.default_rng(0).integers(0, 8192, (rows, prepare.MAX_SEQ_LEN), dtype=np.int32)
    trainer.backward(x, x)
    trainer.step([group["hyper"] for group in groups])
    backend.synchronize()
    return backend.peak_memory() + 4 * sum(math.prod(shape) for shape in shapes.values())


def working_set(memory: float) -> float:
    """GB that Metal recommends to use of this many GiB."""
    return memory * 2**30 / 1e9 * (0.75 if memory > 36 else 2 / 3)


def rows_that_fit(fixed: float, per_row: float, memory: float) -> int:
    """The largest power of two, or 0."""
    rows = (SHARE * working_set(memory) - fixed) / per_row
    return 2 ** (int(rows).bit_length() - 1) if rows >= 1 else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4], help="the first two give the line")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT", json.dumps(measure(options.depths[0], options.rows[0], options.precision)))
        return

    print("depth  GB fixed  GB a row | rows that fit into " + ", ".join(f"{memory} GB" for memory in MACS))
    for depth in options.depths:
        peaks = {}
        for rows in options.rows:
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--child",
                    "--depths",
                    str(depth),
                    "--rows",
                    str(rows),
                    "--precision",
                    options.precision,
                ],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "AUTORESEARCH_DEVICE": "cpu"},
            )
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            peaks[rows] = json.loads(done.stdout.rsplit("RESULT", 1)[1]) / 1e9
        (a, first), (b, second), *others = peaks.items()
        per_row = (second - first) / (b - a)
        fixed = first - a * per_row
        print(
            f"{depth:5} {fixed:9.2f} {per_row:9.3f} | "
            + ", ".join(str(rows_that_fit(fixed, per_row, memory)) for memory in MACS)
            + "".join(
                f" | {rows} rows: {peak:.2f} GB, by the line {fixed + rows * per_row:.2f}" for rows, peak in others
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
