"""Our train.py against a public single-file trainer of the same shape: tokens per second and peak memory of both.

    python benchmarks/throughput.py THEIR_TRAIN_PY [--float32] [--depth 4 --device-batch 2 --total-batch 8192]
    python benchmarks/throughput.py THEIR_TRAIN_PY --attention NANOCHAT_FLASH_ATTENTION_PY       (on a GPU)
    python benchmarks/throughput.py THEIR_TRAIN_PY --fa3 [--our-device-batch 64]                 (on a Hopper)
    python benchmarks/throughput.py THEIR_TRAIN_PY --fa3 --defaults --seconds 300 --score --rounds 1
    AUTORESEARCH_BACKEND=mlx python benchmarks/throughput.py AN_MLX_TRAINER ...

THEIR_TRAIN_PY is train.py of karpathy/autoresearch or of a port of it to PyTorch or MLX, or parameter-golf's
train_gpt_mlx.py. Both programs run in turn, each in its own process, on the dataset prepared last; theirs is read,
changed, and run (peers.py says how). Depth, batches and windows become equal (or, with --defaults, stay those of its
file and of our profile); its data come from our loader; Flash Attention 3, where it asks for it, becomes the one that
ours finds (--fa3) or the module given by --attention. With --float32 both compute in float32; else ours in the
precision it chooses, and theirs as it is written. --patch changes our train.py first, to give it, say, the other's
optimizer. Ours trains in what AUTORESEARCH_BACKEND names.

Ours compiles before its clock starts, and each of its steps counts. Theirs leaves its first ones uncounted (11 in the
original; parameter-golf's own clock includes the first): what they train is extra to the --seconds, which in the score
is to its advantage.

With --score the trained weights of both are scored in bits per byte, by our evaluator on our validation rows; otherwise
both evaluations are left out. Peak memory is always that of training. MFU is as the original has it: of its count of
FLOP per token, relative to 989.5 TFLOP/s. "Beside training" is the whole process less the counted seconds: imports,
compilation, uncounted steps, and the evaluation. --only runs one side: two GPUs can share the work.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from peers import (  # beside this file
    add_options,
    check_options,
    execute,
    patched,
    run_apart,
    run_parameter_golf,
    sized,
    trainer,
)

ROOT = Path(__file__).resolve().parents[1]
PEAK = 989.5e12  # FLOP/s of an H100's bfloat16 products as its vendor has it
COLUMNS = {  # of the table: what a run measured, and its form
    "tokens_per_second": ",.0f",
    "ms_per_step": ".1f",
    "mfu_percent": ".2f",
    "gigabytes": ".2f",
    "steps": ".0f",
    "seconds": ".1f",
    "beside_training": ".1f",
    "val_bpb": ".6f",
}


def run_ours(options) -> dict:
    import backends
    import prepare

    if options.float32:
        backend = backends.load(precision="float32")
        patched(backends.load, lambda **_: backend).start()
    result, evaluate_bpb, batch = {}, prepare.evaluate_bpb, options.our_device_batch or options.device_batch

    def finish(backend, model, data, clock, **how):
        clock.stop()
        seconds = clock.stopped - clock.started  # by the wall, as theirs: the clock takes disturbance off
        result.update(
            tokens_per_second=clock.loader.tokens / seconds,
            steps=clock.steps,
            seconds=seconds,
            waited_percent=100 * clock.loader.waited / seconds,
            gigabytes=backend.peak_memory() / 1e9,
            device=backend.device.name,
            precision=backend.device.precision,
            notes=backend.device.notes,
            attention_provider=backend.device.attention_provider,
        )
        if options.score:
            bpb = evaluate_bpb(backend, model, data, clock=clock, **how)
            result.update(val_bpb=bpb, val_rows=data.eval_rows, eval=data.eval_tag, data=data.data_tag)

    def report(clock, flops_per_token, **_):
        result.update(flops_per_token=flops_per_token)

    patched(evaluate_bpb, finish).start()
    patched(prepare.report, report).start()
    os.environ.update(AUTORESEARCH_BUDGET=str(options.seconds), AUTORESEARCH_SEED=str(options.seed))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_RESULT"] = f"{folder}/result.json"  # scoring saves the weights beside it
        sizes = argparse.Namespace(**{**vars(options), "device_batch": batch})
        ours = execute("ours", sized(our_source(options.patch), sizes))
        ours.main()
    return dict(result, tokens_per_step=ours.TOTAL_BATCH_SIZE, rows=ours.DEVICE_BATCH_SIZE, depth=ours.DEPTH)


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
    add_options(parser)
    parser.add_argument("--our-device-batch", type=int, metavar="N", help="rows per pass of ours, if not the same")
    parser.add_argument("--defaults", action="store_true", help="all sizes are those of its file, of our profile")
    parser.add_argument("--seconds", type=float, default=25, help="of counted training in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--patch", type=Path, help="applied to our train.py before it runs")
    parser.add_argument("--score", action="store_true", help="also the val_bpb of the final weights")
    parser.add_argument("--seed", type=int, default=42, help="of the initial weights of both (default 42)")
    parser.add_argument("--only", choices=["ours", "theirs"], help="run this side alone")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_options(parser, options)
    if trainer(options) is run_parameter_golf and (options.defaults or set(options.windows) != {"L"}):
        parser.error("parameter-golf's attention is full in every layer: add --windows L, and no --defaults")
    return options


def run_child(child: str) -> dict:
    """The result of one side, run in a process of its own."""
    started = time.time()
    result = run_apart(__file__, child, "--child", child)
    result["beside_training"] = time.time() - started - result["seconds"]
    result["ms_per_step"] = 1000 * result["tokens_per_step"] / result["tokens_per_second"]
    if "flops_per_token" in result:
        result["mfu_percent"] = 100 * result["flops_per_token"] * result["tokens_per_second"] / PEAK
    print(f"{child:7} {result}", flush=True)
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

    columns = [name for name in COLUMNS if all(name in run for runs in results.values() for run in runs)]
    print(f"medians of {options.rounds}\n| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    medians = {
        child: {name: statistics.median(run[name] for run in runs) for name in columns}
        for child, runs in results.items()
    }
    for child, median in medians.items():
        print(f"| {child} | " + " | ".join(f"{median[name]:{COLUMNS[name]}}" for name in columns) + " |")
    if not options.only:
        rates = [median["tokens_per_second"] for median in medians.values()]
        print(f"ours does {rates[0] / rates[1]:.3f} times as many tokens/s")
        one, other = (sorted({run.get("attention_provider") or "none" for run in runs}) for runs in results.values())
        if options.fa3 and one != other:
            print(f"but not with the same Flash Attention 3: ours {one}, theirs {other}")


if __name__ == "__main__":
    main()
