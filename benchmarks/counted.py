"""Which published findings help after the same work? Each alone on the default, in runs whose time is counted.

    python benchmarks/counted.py half-batch:8 one-layer-more:8 narrower muon-rows [--seeds 4] --out counted.tsv

Runs are those of proposer.py's recorded trials: floating-point operations and updates are counted instead of seconds,
so no other program matters, nor another run on the same device (--together, --gpus); but neither does how fast the
operations of a finding are here. Without names, all that apply are tried. After a colon: how many seeds. The file
gets a line for each run, the seeds in turn; what it holds is not run again. An effect is the mean over pairs of one
seed, its 90 % interval is Student's with the variance of such differences, pooled over the findings, and the verdict
is that of `lab findings`.
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
        for round in range(max(wanted.values()))
        for name in texts
        if round < wanted[name] and gate.seed(round) not in made[name]
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
    df = sum(len(each) - 1 for each in pairs.values() if len(each) > 1)
    squares = sum((len(each) - 1) * statistics.variance(each) for each in pairs.values() if len(each) > 1)
    if not df:
        raise SystemExit("nothing was repeated, so nothing is known of chance: at least two seeds are needed")
    start, sd = statistics.fmean(bpb for bpb in base.values() if bpb is not None), math.sqrt(squares / df)
    print(f"default: {start:.4f} ({len(base)} runs); pairs differ by {sd:.4f}, {df} degrees of freedom")
    known = {finding.name: finding for finding in published.library()}
    print("finding | runs | published | effect, 90 % interval | verdict")
    for name in sorted(pairs, key=lambda name: statistics.fmean(pairs[name] or [math.inf])):
        told, expected = pairs[name], known[name].effect(device)
        there, here, verdict = "-" if expected is None else f"{expected:+.4f}", "fails", ""
        if told:
            value = statistics.fmean(told)
            effect = Effect(value, value / start, sd / math.sqrt(len(told)), df, runs=len(told))
            here = f"{value:+.4f} ({effect.low:+.4f} to {effect.high:+.4f})"
            verdict, _ = published.verdict(expected, effect)
        print(f"{name} | {len(told)} of {len(runs[name])} | {there} | {here} | {verdict}")


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
