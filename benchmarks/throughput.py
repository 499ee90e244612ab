"""Our train.py against a public single-file trainer of the same shape: tokens per second and peak memory of both.

    python benchmarks/throughput.py THEIR_TRAIN_PY [--float32] [--depth 4 --device-batch 2 --total-batch 8192]
    python benchmarks/throughput.py THEIR_TRAIN_PY --attention NANOCHAT_FLASH_ATTENTION_PY       (on a GPU)

THEIR_TRAIN_PY is train.py of karpathy/autoresearch or of a port of it. Both programs run in turn, each in its own
process, on the dataset prepared last; theirs is read, changed as follows, and run. Its constants for depth, batches
and windows become ours; its data come from our loader; its evaluation is left out, as ours is; Flash Attention 3, where
it asks for it, becomes the module given by --attention; the check for macOS goes. With --float32 its autocast is turned
off and its bfloat16 casts become float32, and ours computes in float32. Its first steps stay uncounted, as it has it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def with_constants(source: str, options) -> str:
    values = {"DEPTH": options.depth, "DEVICE_BATCH_SIZE": options.device_batch,
              "TOTAL_BATCH_SIZE": options.total_batch, "WINDOW_PATTERN": "SSSL"}
    for name, value in values.items():
        source, found = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r} ", source)
        assert found == 1, f"{name} is set {found} times"
    return source


def execute(name: str, source: str):
    """The source as an imported module: torch.compile looks a function's globals up by their module's name."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def run_ours(options) -> dict:
    import backends
    import prepare

    if options.float32:
        backend = backends.load(precision="float32")
        backends.load = lambda *_: backend
    result = {}

    def stop(backend, model, data, clock, **_):
        clock.stop()
        result.update(tokens_per_second=clock.loader.tokens / clock.elapsed, steps=clock.steps,
                      waited_percent=100 * clock.loader.waited / clock.elapsed, gigabytes=backend.peak_memory() / 1e9,
                      device=backend.device.name, precision=backend.device.precision, notes=backend.device.notes)

    prepare.evaluate_bpb, prepare.report = stop, lambda *_, **__: None
    os.environ["AUTORESEARCH_BUDGET"] = str(options.seconds)
    execute("ours", with_constants((ROOT / "train.py").read_text(), options)).main()
    return result


def run_theirs(options) -> dict:
    import torch

    source = with_constants(options.theirs.read_text(), options)
    if options.attention:
        sys.path.insert(0, str(options.attention.resolve().parent))
        fa3 = f"from {options.attention.stem} import flash_attn as fa3"
        source = re.sub(r"(?ms)^from kernels import.*?^fa3 = [^\n]*$", fa3, source)
    source = source.replace("\nverify_macos_env()\n", "\n")
    uncounted = 10 if torch.cuda.is_available() else 1
    source = source.replace("step > 10", f"step > {uncounted}")
    if options.float32:
        source = re.sub(r"torch\.amp\.autocast\([^)]*\)", "__import__('contextlib').nullcontext()", source)
        source = source.replace("torch.bfloat16", "torch.float32").replace(".bfloat16()", ".float()")
    sys.modules["prepare"] = stub(options.seconds)
    theirs = execute("theirs", source)
    counted = theirs.step - uncounted - 1
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own_peak()
    return dict(tokens_per_second=counted * options.total_batch / theirs.total_training_time, steps=theirs.step,
                gigabytes=memory / 1e9)


def own_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stub(seconds: float):
    """What theirs imports from its own prepare.py, over our data."""
    import torch
    from loader import our_batches  # beside this file

    import prepare

    data = prepare.open_data()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Tokenizer:
        from_directory = classmethod(lambda cls: cls())
        get_vocab_size = lambda self: data.vocab_size  # noqa: E731

    def make_dataloader(tokenizer, batch_size, length, split):
        loader = our_batches(data, batch_size)
        for x, y in loader:
            yield torch.from_numpy(x).to(device).long(), torch.from_numpy(y).to(device).long(), loader.epoch

    return types.SimpleNamespace(MAX_SEQ_LEN=prepare.MAX_SEQ_LEN, TIME_BUDGET=seconds, Tokenizer=Tokenizer,
                                 make_dataloader=make_dataloader, evaluate_bpb=lambda *_: float("nan"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--attention", type=Path, help="nanochat's flash_attention.py, for theirs without FA3")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--device-batch", type=int, default=128)
    parser.add_argument("--total-batch", type=int, default=2**19)
    parser.add_argument("--seconds", type=float, default=25, help="of counted training in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        result = {"ours": run_ours, "theirs": run_theirs}[options.child](options)
        print("\nRESULT", json.dumps(result))
        return
    results = {"ours": [], "theirs": []}
    for _ in range(options.rounds):
        for child in results:
            started = time.time()
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", child], capture_output=True,
                                  text=True, check=False)
            if done.returncode:
                sys.exit(f"{child} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            results[child].append(json.loads(done.stdout.rsplit("RESULT", 1)[1]))
            print(f"{child:7} {time.time() - started:5.0f} s  {results[child][-1]}", flush=True)
    rates = {child: statistics.median(r["tokens_per_second"] for r in runs) for child, runs in results.items()}
    print(f"tokens/s, medians: ours {rates['ours']:,.0f}, theirs {rates['theirs']:,.0f}, "
          f"{rates['ours'] / rates['theirs']:.2f} times")


if __name__ == "__main__":
    main()
