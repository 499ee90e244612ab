"""Does a run learn the same when something else uses the machine? Planted disturbances, each beside quiet runs.

    python benchmarks/disturbed.py [--conditions half,full,...] [--repeats 8] [--seconds 10] [--before CHECKOUT]

Small runs of train.py on this machine's CPU, in turn: quiet, then with each disturbance, and so again. Each run gets
what a session hands on: what the least disturbed run so far told of the undisturbed device. Told are steps relative to
the median of the quiet runs, how much longer than its training a run took, and val_bpb minus the mean of the quiet
ones, over all conditions with its 90 % interval. CHECKOUT, an older copy of the project, makes every run too.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.verdict.gate import t_quantile

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(DEPTH=4, ASPECT_RATIO=32, HEAD_DIM=32, DEVICE_BATCH_SIZE=1, TOTAL_BATCH_SIZE=2048)
BUSY = "import time\nwhile True:\n  end = time.time() + {on}\n  while time.time() < end: pass\n  time.sleep({off})"
STOPPED = 15.0  # seconds
CONDITIONS = {  # programs beside a run: how many, seconds at work and seconds at rest
    "quiet": (0, 0, 0), "half": (1, 0.05, 0.05), "full": (1, 1, 0), "three": (3, 1, 0), "bursts": (2, 2, 3),
    "stop": (0, 0, 0),
}  # fmt: skip


def run(root: Path, condition: str, seconds: float, reference: dict) -> dict:
    """The result of one run, with the seconds by the wall from its first step to its last."""
    source = (root / "train.py").read_text()
    for name, size in SIZES.items():
        source = re.sub(rf"(?m)^{name} = .*", f"{name} = {size}", source)
    with tempfile.TemporaryDirectory() as folder:
        train, result = Path(folder) / "train.py", Path(folder) / "result.json"
        train.write_text(source)
        settings = {"AUTORESEARCH_RESULT": str(result), "AUTORESEARCH_BUDGET": f"{seconds:g}", "PYTHONPATH": str(root)}
        settings |= {"AUTORESEARCH_REFERENCE": json.dumps(reference), "AUTORESEARCH_DEVICE": "cpu"}
        process = subprocess.Popen(
            [sys.executable, str(train)], stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}
        )
        assert process.stdout
        printed = ""
        while "step 00001" not in printed and (more := process.stdout.read(1)):
            printed += more
        number, on, off = CONDITIONS[condition]
        others = [subprocess.Popen([sys.executable, "-c", BUSY.format(on=on, off=off)]) for _ in range(number)]
        begun = time.monotonic()
        if condition == "stop":
            time.sleep(seconds / 3)
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
        for other in others:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", default="half,full,bursts,stop")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--before", type=Path)
    asked = parser.parse_args()
    roots = {"now": ROOT} | ({"before": asked.before.resolve()} if asked.before else {})
    found = {side: {name: [] for name in ("quiet", *asked.conditions.split(","))} for side in roots}
    for _ in range(asked.repeats):
        for condition in found["now"]:
            for side, root in roots.items():
                known = [result for results in found[side].values() for result in results if "step_seconds" in result]
                reference = {}
                if known:
                    least = min(known, key=lambda result: result["disturbance"])
                    reference = {"probe": known[0]["probe_seconds"], "steps": least["step_seconds"]}
                result = run(root, condition, asked.seconds, reference)
                found[side][condition].append(result)
                told = {name: result.get(name) for name in ("num_steps", "wall", "disturbance", "val_bpb")}
                print(side, condition, json.dumps(told), flush=True)
    for side, of_side in found.items():
        quiet = of_side["quiet"]
        steps = statistics.median(result["num_steps"] for result in quiet)
        mean = statistics.fmean(result["val_bpb"] for result in quiet)
        for condition, results in of_side.items():
            ratios = [result["num_steps"] / steps for result in results]
            longer = statistics.median(result.get("disturbance", 0.0) for result in results)
            told = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of quiet"
            print(f"{side:>6} {condition:>7}: steps {told}, {longer:.0%} longer by the wall")
        if len(quiet) > 1:
            apart = [r["val_bpb"] - mean for name, results in of_side.items() if name != "quiet" for r in results]
            sd = statistics.stdev(result["val_bpb"] for result in quiet)
            print(f"{side:>6} disturbed minus quiet, bits per byte: {interval(apart)}; sd of quiet runs {sd:.4f}")


if __name__ == "__main__":
    main()
