"""Is the calibrated default a good one? Whole runs of train.py beside it: half and twice its depth, and other sizes.

    python -m calibration
    python benchmarks/defaults.py --seeds 42 43
    python benchmarks/defaults.py --sizes default 4,4096,SSSL 4,8192,SSSL 4,16384,SSSL --seeds 42

A size is `default`, `half`, `twice` (of the depth, all else equal), or DEPTH,TOTAL_BATCH,WINDOWS. Every run is the
unedited train.py with the full budget, in turn, in a process of its own, on the dataset prepared last; what differs is
a copy of this device's profile. About six minutes each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import backends  # noqa: E402
from calibration import profile  # noqa: E402
from prepare import MAX_SEQ_LEN  # noqa: E402


def resized(found: dict, size: str, rows: int | None) -> dict:
    """A profile with the settings of this size."""
    settings = dict(found["settings"])
    if "," in size:
        depth, total, windows = size.split(",")
        settings |= {"depth": int(depth), "total_batch_size": int(total), "window_pattern": windows}
    else:
        settings["depth"] = max(1, int(settings["depth"] * {"default": 1, "half": 0.5, "twice": 2}[size]))
    most = rows or settings["device_batch_size"]
    settings["device_batch_size"] = min(most, settings["total_batch_size"] // MAX_SEQ_LEN)
    return {**found, "settings": settings}


def run(found: dict, seed: int, budget: float | None) -> dict:
    """The result that train.py writes, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder, "profile.json"), Path(folder, "result.json")
        path.write_text(json.dumps(found))
        environment = {
            **os.environ,
            "AUTORESEARCH_PROFILE": str(path),
            "AUTORESEARCH_RESULT": str(result),
            "AUTORESEARCH_SEED": str(seed),
        }
        if budget:
            environment["AUTORESEARCH_BUDGET"] = str(budget)
        done = subprocess.run(
            [sys.executable, "train.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return json.loads(result.read_text()) if result.exists() else {"status": done.stderr.strip()[-300:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["default", "half", "twice"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--rows", type=int, help="rows per pass, at most, instead of the profile's")
    parser.add_argument("--budget", type=float, help="seconds, for a trial of this script")
    options = parser.parse_args()
    hardware = backends.identify()
    found = profile.read(profile.path_of(hardware), hardware)
    columns = "size seed depth batch windows val_bpb tokens/s Mtokens steps MFU% speed GB".split()
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for seed in options.seeds:
        for size in options.sizes:
            sized = resized(found, size, options.rows)
            settings, result = sized["settings"], run(sized, seed, options.budget)
            row = [size, seed, settings["depth"], settings["total_batch_size"], settings["window_pattern"]]
            if result["status"] == "ok":
                row += [
                    f"{result['val_bpb']:.6f}",
                    f"{result['tokens_per_second']:,.0f}",
                    f"{result['total_tokens_M']:.2f}",
                    result["num_steps"],
                    f"{result['mfu_percent']:.1f}",
                    f"{result['speed'] or 0:.2f}",
                    f"{result['peak_vram_mb'] / 953.67:.2f}",
                ]
            else:
                row += [result.get("reason", result["status"])]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
