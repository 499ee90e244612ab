"""Does a run learn the same when something else uses the machine? And does a file gain that disturbs itself?

    python benchmarks/disturbed.py [--conditions half,full,...] [--repeats 8] [--seconds 10] [--before CHECKOUT]
    python benchmarks/disturbed.py --device cuda --conditions cores,gpu_half,gpu_full,gpu_bursts,stop
    python benchmarks/disturbed.py --conditions batch_warmup,window,fifth,host [--device cuda ... hungry,loads_probe]

Small runs of train.py, in turn: quiet, then under each condition, and so again. A condition is other programs, or a
file that is edited to be odd. Each run gets what a session hands on to its runs. Told are steps relative to the median
of the quiet runs, how much longer than its training a run took, and val_bpb minus the mean of the quiet ones, over all
other programs with its 90 % interval. Of an edited file, "longer by the wall" is what it gained, and should be 0.
With --new each run is the first one of its file, as most of a session's are: only the device is known. CHECKOUT, an
older copy of the project, makes every run too. Stopped by Ctrl-C it tells what it has.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import disturbance
from backends import machine
from lab.verdict.gate import t_quantile

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "cpu": dict(DEPTH=2, ASPECT_RATIO=32, HEAD_DIM=32, DEVICE_BATCH_SIZE=1, TOTAL_BATCH_SIZE=2048),
    "cuda": dict(DEPTH=4, DEVICE_BATCH_SIZE=32, TOTAL_BATCH_SIZE=2**17, WINDOW_PATTERN="'L'"),
}
BUSY = "import time\nwhile True:\n  end = time.time() + {on}\n  while time.time() < end: {work}\n  time.sleep({off})"
MATRIX = "import torch\nx = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)\n"
PRODUCT = "x @ x; torch.cuda.synchronize()"
STOPPED = 15.0  # seconds
PROGRAMS = {  # beside a run: how many, seconds at work and seconds at rest, and whether on the GPU
    "quiet": (0, 0, 0, False), "half": (1, 0.05, 0.05, False), "full": (1, 1, 0, False), "three": (3, 1, 0, False),
    "bursts": (2, 2, 3, False), "stop": (0, 0, 0, False), "cores": (machine.cores(), 1, 0, False),
    "gpu_half": (1, 0.05, 0.05, True), "gpu_full": (1, 1, 0, True), "gpu_bursts": (1, 2, 3, True),
}  # fmt: skip
TICK, UPDATE = "        seconds = clock.tick(loss)", "        trainer.step("
LOOP = "    smooth_loss = None\n"
HOG = "    import threading, torch\n    big = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)\n"
SIDE = """    def hog(side=torch.cuda.Stream()):
        with torch.cuda.stream(side):
            while not clock.stopped:
                big @ big; side.synchronize()
    threading.Thread(target=hog, daemon=True).start()
"""
EDITS = {  # of train.py: a patch of tests/edits, or text that stands in place of other text
    "batch_warmup": "batch_warmup.patch",
    "window": "window.patch",
    "fifth": [(UPDATE, "        if clock.steps % 5 == 4: trainer.step(")],  # an update of every fifth batch
    "host": [(TICK, "        __import__('time').sleep(0.1 * (clock.steps % 7 == 0))\n" + TICK)],
    "hungry": [(LOOP, LOOP + HOG), (TICK, "        for _ in range(4 if progress > 0.3 else 0): big @ big\n" + TICK)],
    "loads_probe": [(LOOP, LOOP + HOG + SIDE)],
}


def edited(root: Path, condition: str, device: str, folder: Path) -> Path:
    """train.py of this size, with the edit of the condition."""
    train, edit = folder / "train.py", EDITS.get(condition, [])
    train.write_text((root / "train.py").read_text())
    if isinstance(edit, str):
        subprocess.run(["git", "apply", "--unidiff-zero", root / "tests" / "edits" / edit], cwd=folder, check=True)
    source = train.read_text()
    for old, new in [] if isinstance(edit, str) else edit:
        if source.count(old) != 1:
            raise SystemExit(f"{old.strip()!r} stands {source.count(old)} times in train.py: correct the edit here")
        source = source.replace(old, new)
    for name, size in SIZES[device].items():
        source = re.sub(rf"(?m)^{name} = .*", f"{name} = {size}", source)
    train.write_text(source)
    return train


def run(root: Path, condition: str, asked, reference: dict) -> dict:
    """The result of one run, with the seconds by the wall from its first step to its last."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        train = edited(root, condition, asked.device, Path(folder))
        settings = {"AUTORESEARCH_RESULT": str(result), "AUTORESEARCH_BUDGET": f"{asked.seconds:g}"}
        settings |= {"AUTORESEARCH_REFERENCE": json.dumps(reference), "AUTORESEARCH_DEVICE": asked.device}
        process = subprocess.Popen(
            [sys.executable, str(train)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings, "PYTHONPATH": str(root)},
        )
        assert process.stdout
        printed, others = "", []
        try:
            number, on, off, on_gpu = PROGRAMS.get(condition, PROGRAMS["quiet"])
            beside = (MATRIX if on_gpu else "") + BUSY.format(on=on, off=off, work=PRODUCT if on_gpu else "pass")
            if on_gpu:  # it takes seconds to start
                others = [subprocess.Popen([sys.executable, "-c", beside]) for _ in range(number)]
            while "step 00001" not in printed and (more := process.stdout.read(1)):
                printed += more
            if not on_gpu:
                others = [subprocess.Popen([sys.executable, "-c", beside]) for _ in range(number)]
            begun = time.monotonic()
            if condition == "stop":
                time.sleep(asked.seconds / 3)
                process.send_signal(signal.SIGSTOP)
                time.sleep(STOPPED)
                process.send_signal(signal.SIGCONT)
            while "val_bpb" not in printed and (more := process.stdout.read(1)):
                printed += more
                if printed.endswith("\n") and "100.0%" in printed:
                    for other in others:  # the evaluation is not what is compared
                        other.kill()
            wall = time.monotonic() - begun
            process.communicate()
        finally:
            for other in [process, *others]:
                other.kill()
                other.wait()
        if process.returncode:
            raise SystemExit(f"a run failed, {condition}: {printed[-2000:]}")
        return json.loads(result.read_text()) | {"wall": wall}


def interval(values: list[float]) -> str:
    """Mean and 90 % interval."""
    mean = statistics.fmean(values)
    half = t_quantile(0.05, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def reference(condition: str, of_side: dict[str, list[dict]], new: bool) -> dict:
    """What a session would hand on to a run of a file that it has run before, or of a new one."""
    if new:
        return disturbance.reference(of_side["quiet"], [])
    unedited = [result for name, results in of_side.items() if name not in EDITS for result in results]
    return disturbance.reference(of_side["quiet"], of_side[condition] if condition in EDITS else unedited)


def tell(side: str, of_side: dict[str, list[dict]]) -> None:
    quiet = of_side["quiet"]
    steps = statistics.median(result["num_steps"] for result in quiet)
    mean = statistics.fmean(result["val_bpb"] for result in quiet)
    for condition, results in of_side.items():
        if results:
            ratios = [result["num_steps"] / steps for result in results]
            longer = statistics.median(result.get("disturbance", 0.0) for result in results)
            told = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of quiet"
            print(f"{side:>6} {condition:>12}: {len(results)} runs, steps {told}, {longer:.1%} longer by the wall")
    disturbed = [r["val_bpb"] - mean for name in PROGRAMS if name != "quiet" for r in of_side.get(name, [])]
    if len(quiet) > 1 and len(disturbed) > 1:
        sd = statistics.stdev(result["val_bpb"] for result in quiet)
        print(f"{side:>6} disturbed minus quiet, bits per byte: {interval(disturbed)}; sd of quiet runs {sd:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", default="half,full,bursts,stop")
    parser.add_argument("--device", choices=[*SIZES], default="cpu")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--new", action="store_true", help="nothing is known of the file's steps")
    parser.add_argument("--before", type=Path)
    asked = parser.parse_args()
    if unknown := set(asked.conditions.split(",")) - PROGRAMS.keys() - EDITS.keys():
        parser.error(f"no such condition: {', '.join(unknown)}; there are {', '.join([*PROGRAMS, *EDITS])}")
    roots = {"now": ROOT} | ({"before": asked.before.resolve()} if asked.before else {})
    found = {side: {name: [] for name in ("quiet", *asked.conditions.split(","))} for side in roots}
    with suppress(KeyboardInterrupt):
        for _ in range(asked.repeats):
            for condition in found["now"]:
                for side, root in roots.items():
                    result = run(root, condition, asked, reference(condition, found[side], asked.new))
                    found[side][condition].append(result)
                    told = {
                        name: result.get(name)
                        for name in ("num_steps", "wall", "disturbance", "probe_seconds", "val_bpb")
                    }
                    print(side, condition, json.dumps(told), flush=True)
    for side, of_side in found.items():
        tell(side, of_side)


if __name__ == "__main__":
    main()
