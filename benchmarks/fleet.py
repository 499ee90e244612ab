"""What several devices cost beside the runs: overhead of each run, time from a worker's start to its first run, an idle
worker's memory and CPU. With the tests' trainer of half a second, and workers of this machine.

    python benchmarks/fleet.py DATA [--experiments 15]

DATA is the folder of a prepared dataset, such as ~/.cache/autoresearch/data/stdlib.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
for folder in ("", "tests", "tests/lab", "tests/lab/verdict", "tests/lab/fleet"):
    sys.path.insert(0, str(ROOT / folder))
IDLE = 20.0  # seconds that an idle worker is watched


def made(base: Path, tag: str, data: Path):
    """A session of the tests' trainer."""
    import sessions

    import dataset

    manifest = dataset.read_manifest(data)
    home, train = os.environ["AUTORESEARCH_HOME"], (sessions.HERE / "fake_train.py").read_bytes()
    settings = {"AUTORESEARCH_HOME": home, "AUTORESEARCH_DATA": data.name}
    tags = {"eval": manifest["eval_tag"], "data": manifest["data_tag"], "profile": "abc"}
    return sessions.make(base / tag, train, True, settings, tag=tag, budget=0.1, baseline_runs=2, **tags)


def night(session, devices: str | None, experiments: int) -> str:
    """A night, and what its runs took."""
    import nights

    from lab.session.session import Session

    begun = time.monotonic()
    nights.begin(session, Path(os.environ["AUTORESEARCH_HOME"]), experiments, devices).communicate()
    wall, runs = time.monotonic() - begun, list(Session(session.folder).state.runs.values())
    beside = [run.ended.time - run.time - run.seconds for run in runs if run.ok]
    workers: dict[str, list] = {}
    for run in runs:
        workers.setdefault(run.worker, []).append(run)
    gaps = [b.time - a.ended.time for own in workers.values() for a, b in zip(own, own[1:]) if b.experiment]
    return (
        f"{len(runs)} | {wall:.1f} | {statistics.fmean(run.seconds for run in runs):.2f} | "
        f"{statistics.fmean(beside):.3f} | {statistics.median(gaps):.3f}"
    )


def idle(session) -> None:
    """Starts a worker, has it make one run, and watches it idle."""
    from lab.fleet import settings
    from lab.fleet.pool import Pool
    from lab.session.session import Session
    from lab.verdict.plan import orders

    settings.choose(session, ["cpu"])
    there = Session(session.folder)
    with there.lock, Pool(there) as pool:
        begun = time.monotonic()
        while not there.state.runs:
            pool.begin(orders(there.state)[:1])
            pool.wait()
        print(f"from the worker's start to its first run: {time.monotonic() - begun:.2f} s")
        worker = psutil.Process(pool._started["cpu"].pid)
        while any(run.ended is None for run in there.state.runs.values()):
            pool.wait()
        before, begun = worker.cpu_times(), time.monotonic()
        while time.monotonic() < begun + IDLE:
            pool.wait()
        after, memory = worker.cpu_times(), worker.memory_full_info()
        share = (after.user + after.system - before.user - before.system) / IDLE
        sizes = {name: getattr(memory, name) / 2**20 for name in ("rss", "uss", "pss")}
        print(f"idle worker: {share:.1%} of a CPU, {sizes['rss']:.0f} MB resident, {sizes['uss']:.0f} MB its alone,")
        print(f"{sizes['pss']:.0f} MB with its share of what others have, too")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--experiments", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ["AUTORESEARCH_HOME"] = str(base / "home")
        (base / "home" / "data").mkdir(parents=True)
        (base / "home" / "data" / options.data.name).symlink_to(options.data.resolve())
        print("| devices | runs | night, s | runner, s a run | beside it | until the next run |")
        print("|---|---|---|---|---|---|")
        for name, devices in {"own": None, "one worker": "cpu", "two workers": "cpu,cpu"}.items():
            session = made(base, name.replace(" ", "-"), base / "home" / "data" / options.data.name)
            print(f"| {name} | {night(session, devices, options.experiments)} |", flush=True)
        idle(made(base, "idle", base / "home" / "data" / options.data.name))


if __name__ == "__main__":
    main()
