"""Our train.py against a public single-file trainer of the same shape: tokens per second and peak memory of both.

    python benchmarks/throughput.py THEIR_TRAIN_PY [--float32] [--depth 4 --device-batch 2 --total-batch 8192]
    python benchmarks/throughput.py THEIR_TRAIN_PY --attention NANOCHAT_FLASH_ATTENTION_PY       (on a GPU)
    AUTORESEARCH_BACKEND=mlx python benchmarks/throughput.py AN_MLX_TRAINER ...

THEIR_TRAIN_PY is train.py of karpathy/autoresearch or of a port of it to PyTorch or MLX, or parameter-golf's
train_gpt_mlx.py. Both programs run in turn, each in its own process, on the dataset prepared last; theirs is read,
changed, and run (peers.py says how). Depth, batches and windows become equal; its data come from our loader; Flash
Attention 3, where it asks for it, becomes the module given by --attention. With --float32 both compute in float32; else
ours in the precision it chooses, and theirs as it is written. --patch changes our train.py first, to give it, say, the
other's optimizer. Ours trains in what AUTORESEARCH_BACKEND names.

Ours compiles before its clock starts, and each of its steps counts. Theirs leaves its first ones uncounted in the rate
(parameter-golf's own clock includes the first), and what they train is extra to the --seconds.

With --score (MLX only) the trained weights of both are scored in bits per byte, by our evaluator on our validation
rows; otherwise both evaluations are left out. Peak memory is always that of training. --only runs one side: two GPUs
can share the work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import execute, run_parameter_golf, run_torch, trainer, with_constants  # beside this file

ROOT = Path(__file__).resolve().parents[1]


def run_ours(options) -> dict:
    import backends
    import prepare

    if options.float32:
        backend = backends.load(precision="float32")
        backends.load = lambda **_: backend
    result, evaluate_bpb = {}, prepare.evaluate_bpb

    def finish(backend, model, data, clock, **how):
        clock.stop()
        result.update(tokens_per_second=clock.loader.tokens / clock.elapsed, steps=clock.steps, seconds=clock.elapsed,
                      waited_percent=100 * clock.loader.waited / clock.elapsed, gigabytes=backend.peak_memory() / 1e9,
                      device=backend.device.name, precision=backend.device.precision, notes=backend.device.notes)
        if options.score:
            bpb = evaluate_bpb(backend, model, data, clock=clock, **how)
            result.update(val_bpb=bpb, eval=data.eval_tag, data=data.data_tag)

    prepare.evaluate_bpb, prepare.report = finish, lambda *_, **__: None
    os.environ["AUTORESEARCH_BUDGET"] = str(options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_RESULT"] = f"{folder}/result.json"  # scoring saves the weights beside it
        execute("ours", with_constants(our_source(options.patch), options)).main()
    return result


def our_source(patch: Path | None) -> str:
    """Our train.py, with the patch applied if there is one."""
    source = (ROOT / "train.py").read_text()
    if not patch:
        return source
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "train.py")
        copy.write_text(source)
        # Inside a repository, git would silently skip a file that is not where the patch says.
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
        subprocess.run(["git", "apply", str(patch.resolve())], cwd=folder, env=alone, check=True)
        changed = copy.read_text()
    assert changed != source, f"{patch} changes nothing in train.py"
    return changed


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--attention", type=Path, help="nanochat's flash_attention.py, for theirs without FA3")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--device-batch", type=int, default=128)
    parser.add_argument("--total-batch", type=int, default=2**19)
    parser.add_argument("--windows", default="SSSL", help="of attention by layer: S short, L full (default SSSL)")
    parser.add_argument("--seconds", type=float, default=25, help="of counted training in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--patch", type=Path, help="applied to our train.py before it runs")
    parser.add_argument("--score", action="store_true", help="also the val_bpb of the final weights")
    parser.add_argument("--only", choices=["ours", "theirs"], help="run this side alone")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    peer = trainer(options)
    if options.score and peer is run_torch:
        parser.error("--score needs a peer in MLX")
    if peer is run_parameter_golf and set(options.windows) != {"L"}:
        parser.error("parameter-golf's attention is full in every layer: add --windows L")
    return options


def run_child(child: str) -> dict:
    """The result of one side, run in a process of its own."""
    started = time.time()
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", child], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        sys.exit(f"{child} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    print(f"{child:7} {time.time() - started:5.0f} s  {result}", flush=True)
    return result


def main():
    options = parse_options()
    if options.child:
        run = {"ours": run_ours, "theirs": trainer(options)}[options.child]
        print("\nRESULT", json.dumps(run(options)))
        return
    results = {child: [] for child in ([options.only] if options.only else ["ours", "theirs"])}
    for _ in range(options.rounds):
        for child in results:
            results[child].append(run_child(child))

    def medians(name):
        return {child: statistics.median(run[name] for run in runs) for child, runs in results.items()}

    rates = medians("tokens_per_second")
    times = "" if options.only else f", {rates['ours'] / rates['theirs']:.2f} times"
    print("tokens/s, medians: " + ", ".join(f"{child} {rate:,.0f}" for child, rate in rates.items()) + times)
    if options.score:
        print("val_bpb, medians: " + ", ".join(f"{child} {bpb:.6f}" for child, bpb in medians("val_bpb").items()))


if __name__ == "__main__":
    main()
