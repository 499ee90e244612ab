"""Which published findings help after the same work? Each alone on the default, in runs whose time is counted.

    python benchmarks/counted.py half-batch:8 one-layer-more:8 narrower muon-rows [--seeds 4] --out counted.tsv

Runs are those of proposer.py's recorded trials: floating-point operations and updates are counted instead of seconds,
so no other program matters, nor another run on the same device (--together, --gpus); but neither does how fast the
operations of a finding are here. Without names, all that apply are tried. After a colon: how many seeds. The file
gets a line for each run; what it holds is not run again. An effect is the mean over pairs of one seed. Its 90 %
interval is Student's, with the variance of the finding's own differences: what hardly changes a run leaves it close to
the default's run with that seed, other changes do not. The verdict is that of `lab findings`.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backends
from lab.compare import published
from lab.compare.effects import Effect
from lab.genome import edits
from lab.verdict import gate
from proposer import COUNTED, ROOT, trial  # beside this file

DEFAULT = "default"
SIZES = ("depth", "device_batch_size", "total_batch_size", "window_pattern")


def sources(names: list[str], calibrated: dict) -> dict[str, str]:
    """train.py by name: the default, and with each finding that applies."""
    train = (ROOT / "train.py").read_bytes()
    found = {DEFAULT: train.decode()}
    for finding in published.library():
        if not names or finding.name in names:
            try:
                found[finding.name] = finding.apply(train, calibrated).decode()
            except edits.NotHere as error:
                print(f"{finding.name}: does not apply: {error}")
    return found


def read(path: Path, texts: dict[str, str], device: str) -> dict[str, dict[int, float | None]]:
    """val_bpb by name and seed, of these train.py on this device; None of a run that failed."""
    runs: dict[str, dict[int, float | None]] = {name: {} for name in texts}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if row["device"] == device and row["train"] == digest(texts.get(row["finding"], "")):
                    bpb = None if row["val_bpb"] == "crash" else float(row["val_bpb"])
                    runs[row["finding"]][int(row["seed"])] = bpb
    return runs


def digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def run(options, wanted: dict[str, int], texts: dict[str, str], device: str) -> None:
    """Runs what the file lacks."""
    made = read(options.out, texts, device)
    missing = [
        (name, gate.seed(round))
        for name, round in sorted(
            ((name, round) for name in texts for round in range(wanted[name])),
            key=lambda each: (each[1] + 0.5) / wanted[each[0]],  # whenever it ends, each has its share of the runs
        )
        if gate.seed(round) not in made[name]
    ]
    new = not options.out.exists()
    with open(options.out, "a", newline="") as file, ThreadPoolExecutor(options.together) as pool:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        if new:
            out.writerow(["device", "finding", "train", "seed", "val_bpb", "steps"])
        under_way = {
            pool.submit(trial, texts[name], seed, i % options.gpus): (name, seed)
            for i, (name, seed) in enumerate(missing)
        }
        for done in as_completed(under_way):
            name, seed = under_way[done]
            out.writerow([device, name, digest(texts[name]), seed, *done.result()])
            file.flush()


def tell(runs: dict[str, dict[int, float | None]], device: str) -> None:
    """Prints a line for each finding, the best first."""
    base = runs.pop(DEFAULT)
    pairs = {
        name: [bpb - start for seed, bpb in scores.items() if bpb is not None and (start := base.get(seed)) is not None]
        for name, scores in runs.items()
    }
    scores = [bpb for bpb in base.values() if bpb is not None]
    start = statistics.fmean(scores)
    spread = f"; seeds differ by {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    print(f"default: {start:.4f} ({len(scores)} runs){spread}")
    known = {finding.name: finding for finding in published.library()}
    print("finding | runs | published | effect, 90 % interval | pairs differ by | verdict")
    for name in sorted(pairs, key=lambda name: statistics.fmean(pairs[name] or [math.inf])):
        told, expected = pairs[name], known[name].effect(device)
        there, here, differ, verdict = "-" if expected is None else f"{expected:+.4f}", "fails", "-", "-"
        if told:
            value, sd = statistics.fmean(told), statistics.stdev(told) if len(told) > 1 else None
            effect = Effect(value, value / start, sd and sd / math.sqrt(len(told)), len(told) - 1, runs=len(told))
            here, verdict = f"{value:+.4f}", published.verdict(expected, effect)[0] if sd else "can't be told"
            if sd:
                here, differ = f"{here} ({effect.low:+.4f} to {effect.high:+.4f})", f"{sd:.4f}"
        print(f"{name} | {len(told)} of {len(runs[name])} | {there} | {here} | {differ} | {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("findings", nargs="*", metavar="NAME[:SEEDS]")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--together", type=int, default=1, help="runs at once")
    parser.add_argument("--gpus", type=int, default=1, help="that they share")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    try:
        parts = (each.partition(":") for each in options.findings)
        seeds = {name: int(count or options.seeds) for name, _, count in parts}
    except ValueError:
        parser.error("the number of seeds after a finding's name has to be a whole number, as in half-batch:8")
    if min([*seeds.values(), options.seeds]) < 1 or not options.out.absolute().parent.is_dir():
        parser.error("at least one seed is needed, and a folder for --out that exists")
    hardware = backends.identify()
    texts = sources(list(seeds), dict(zip(SIZES, COUNTED[hardware.kind].sizes)))
    if unknown := seeds.keys() - {finding.name for finding in published.library()}:
        parser.error(f"no finding is named {', '.join(sorted(unknown))}: python -m lab findings lists them")
    wanted = {name: seeds.get(name, options.seeds) for name in texts}
    run(options, wanted | {DEFAULT: max(wanted.values())}, texts, hardware.slug)
    tell(read(options.out, texts, hardware.slug), hardware.slug)


if __name__ == "__main__":
    main()
