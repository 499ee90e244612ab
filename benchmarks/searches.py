"""Searches against each other for real: nights side by side on the devices of this machine, their bests confirmed.

    python benchmarks/searches.py now=. before=../before:--no-findings --times 2 --gpus 2 --hours 0.3 --out FOLDER

Each search is NAME=CLONE, whose last commit is used, with arguments for `lab night` after a colon. All sessions begin
together, each in a clone and with a home of its own, on its share of the processor's cores. They take the datasets and
profiles of this home with what was compiled there, and what the environment sets (AUTORESEARCH_PROFILE,
AUTORESEARCH_BUDGET). With --turns one run trains or is scored at a time on each GPU, while others start and compile. A
night ends after --hours or --experiments; then `lab confirm --pairs` tests its best on new seeds and held-out rows,
where something was kept. Journals are copied to --out. --sizes replaces those of the profile, for which the probe of
disturbance.py is then measured on each GPU alone. A proposal is far worse if it fails, or its first run is over
5 % worse than the baseline's mean. Searches are compared with the first one: Welch's 90 % interval of the difference of
their means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backends
import storage
from calibration import profile as profiles
from lab.session.session import Session
from lab.verdict import gate

FAR_WORSE = 1.05
TRIES = 3  # of a confirmation, which first carries out what the night left
TURNS = """

import fcntl


class _InTurn(Exam):
    turn = None

    def _take(self):
        if self.turn is None:
            self.turn = open({lock!r}, "w")
            fcntl.flock(self.turn, fcntl.LOCK_EX)  # first come, first served

    def _ready(self):
        self._take()
        super()._ready()

    def _score(self, batch_size):
        self._take()
        super()._score(batch_size)

    def _examine(self):
        try:
            super()._examine()
        finally:
            if self.turn:
                self.turn.close()


Exam = _InTurn
"""  # added to a clone's lab/run/exam.py


class Search(NamedTuple):
    """A search by name: its clone, and arguments for `lab night`."""

    name: str
    clone: Path
    arguments: list[str]


def search(text: str) -> Search:
    name, _, rest = text.partition("=")
    clone, *arguments = rest.split(":")
    if not name or not Path(clone, ".git").exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=CLONE or NAME=CLONE:--option, of a git clone")
    return Search(name, Path(clone).resolve(), arguments)


def sizes(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not depth=4,total_batch_size=65536 or the like") from None


def sized(chosen: dict[str, int], gpus: int, out: Path) -> Path:
    """The profile in use with other sizes, and with the quickest probe of a trial of them on each GPU."""
    hardware = backends.identify()
    if not (path := profiles.chosen_path(hardware)):
        raise SystemExit("this device has no profile to take the other values from: run python -m calibration")
    profile, target = profiles.read(path, hardware), out / "profile.json"
    profile["settings"] |= chosen
    storage.write_json(target, profile)
    profiles.read(target, hardware)
    results = [out / f"trial-{i}.json" for i in range(gpus or 1)]
    trials = [
        subprocess.Popen(
            [sys.executable, "-m", "calibration.trial", str(result), "8"],
            cwd=profiles.TRAIN.parent,
            env=os.environ | {"AUTORESEARCH_PROFILE": str(target)} | ({"CUDA_VISIBLE_DEVICES": f"{i}"} if gpus else {}),
        )
        for i, result in enumerate(results)
    ]
    if any([trial.wait() for trial in trials]):
        raise SystemExit("a trial of these sizes failed")
    probes = [json.loads(result.read_text())["probe"] for result in results]
    if all(all(probe.values()) for probe in probes):
        profile["probe"] = min(probes, key=lambda probe: probe["probe"] * probe["clock_rate"])
        storage.write_json(target, profile)
    return target


class Place(NamedTuple):
    """Where a session runs: the cores, and the GPU if there are any."""

    cores: list[int]
    gpu: int | None


def places(sessions: int, gpus: int, turns: bool) -> list[Place]:
    """A place for each session: cores in equal parts, GPUs in turn. With `turns` two share a part twice as large, since
    most of a session's time is then spent waiting, and a compiler can use more."""
    cores = sorted(os.sched_getaffinity(0))
    share = min(len(cores), max(1, (1 + turns) * len(cores) // sessions))
    shares = [[cores[(i * share + j) % len(cores)] for j in range(share)] for i in range(sessions)]
    return [Place(own, i % gpus if gpus else None) for i, own in enumerate(shares)]


def night(one: Search, tag: str, place: Place, work: Path, options) -> tuple[float, str]:
    """(gain on held-out rows, a line of the table) of a night and its confirmation."""
    home, clone = work / f"home-{tag}", work / tag
    for name in ("data", "profiles", "cache"):  # one calibration for all
        if (storage.home() / name).is_dir():
            shutil.copytree(storage.home() / name, home / name)
    for kernels in (home / "cache").rglob("__grp__*.json"):  # Triton's lists, which name each file by its whole path
        kernels.write_text(kernels.read_text().replace(str(storage.home()), str(home)))
    subprocess.run(["git", "clone", "-q", one.clone, clone], check=True)
    subprocess.run(["git", "checkout", "-q", "-B", "main"], cwd=clone, check=True)
    if options.turns:
        with open(clone / "lab" / "run" / "exam.py", "a") as exam:
            exam.write(TURNS.format(lock=str(work / f"gpu-{place.gpu}.lock")))
        subprocess.run(["git", "commit", "-qam", "Runs train in turn"], cwd=clone, check=True)
    settings = {"AUTORESEARCH_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(clone), *sys.path[2:]])}
    if place.gpu is not None:
        settings["CUDA_VISIBLE_DEVICES"] = str(place.gpu)

    def lab(*arguments: str) -> None:
        with open(options.out / f"{tag}.log", "a") as log:
            subprocess.run(
                [sys.executable, "-m", "lab", *arguments],
                cwd=clone,
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, place.cores),
                check=False,  # its log says why, and the journal what there is
            )

    hours = options.hours and options.hours - (time.monotonic() - options.begun) / 3600
    limits = {"hours": hours, "max-experiments": options.experiments}
    lab("night", "--tag", tag, *(f"--{name}={limit}" for name, limit in limits.items() if limit), *one.arguments)
    (folder,) = home.glob(f"sessions/*/{tag}")
    for _ in range(TRIES):
        state = Session(folder).state
        if not state.kept[1:] or state.confirmation:
            break
        lab("confirm", "--pairs", str(options.pairs), "--wait", "3600")
    shutil.copy(folder / "journal.jsonl", options.out / f"{tag}.jsonl")
    return told(Session(folder).state, tag)


def told(state, tag: str) -> tuple[float, str]:
    baseline, tried = state.mean(state.baseline), [e for e in state.tried if e.kind == "change"]
    first = [run.bpb for e in tried for run in e.own_runs[:1] if run.ok]
    worse = sum(bpb > FAR_WORSE * baseline for bpb in first) + len(tried) - len(first)
    runs = sum(len(e.runs) for e in state.experiments.values() if e.kind != "confirm")
    gain, said = 0.0, "nothing kept"
    if state.kept[1:]:
        gain, said = math.nan, "not confirmed"
    if state.confirmation and state.confirmation.verdict.gains:
        gain, low, high = state.confirmation.verdict.gains["held_out_bpb"]
        said = f"{gain:+.4f} ({low:.4f} to {high:.4f})"
    kept = len(state.kept) - 1
    return gain, f"{tag} | {len(tried)}, {runs} | {baseline:.4f} | {worse} of {len(tried)} | {kept} | {said}"


def difference(own: list[float], other: list[float]) -> str:
    """Mean difference and its 90 % interval, by Welch."""
    mean = statistics.fmean(own) - statistics.fmean(other)
    parts = [statistics.variance(gains) / len(gains) for gains in (own, other)]
    if not sum(parts) > 0:
        return f"{mean:+.4f}"
    df = sum(parts) ** 2 / sum(part**2 / (len(gains) - 1) for part, gains in zip(parts, (own, other)))
    half = gate.t_quantile(0.05, max(1, int(df))) * math.sqrt(sum(parts))
    return f"{mean:+.4f} ({mean - half:.4f} to {mean + half:.4f})"


def rotated(searches: list[Search], by: int) -> list[Search]:
    by %= len(searches)
    return searches[by:] + searches[:by]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", type=search, metavar="NAME=CLONE[:OPTION]")
    parser.add_argument("--times", type=int, default=1, help="nights of each search, all at once")
    parser.add_argument("--gpus", type=int, default=0, help="that the nights share, in turn")
    parser.add_argument("--turns", action="store_true", help="on each GPU one run trains at a time")
    parser.add_argument("--sizes", type=sizes, metavar="NAME=SIZE,...", help="instead of the profile's: of rule.Sizes")
    parser.add_argument("--hours", type=float, help="from now on, until all nights end")
    parser.add_argument("--experiments", type=int)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("searches"))
    options = parser.parse_args()
    options.begun = time.monotonic()
    if not (options.hours or options.experiments):
        parser.error("say when a night ends: --hours or --experiments")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sizes:
        os.environ["AUTORESEARCH_PROFILE"] = str(sized(options.sizes, options.gpus, options.out))
        print(f"trials of the sizes: {time.monotonic() - options.begun:.0f} s", flush=True)
    turns = range(options.times)  # each begins with another search, so that none has a GPU of its own
    begun = [(one, f"{one.name}-{i + 1}") for i in turns for one in rotated(options.searches, i)]
    gains: dict[str, list[float]] = {one.name: [] for one in options.searches}
    print("night | experiments, runs | baseline | over 5 % worse | kept | confirmed on held-out rows", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(begun)) as pool:
        under_way = {
            pool.submit(night, one, tag, place, Path(folder), options): one.name
            for (one, tag), place in zip(begun, places(len(begun), options.gpus, options.turns))
        }
        for done in as_completed(under_way):
            gain, line = done.result()
            print(line, flush=True)
            gains[under_way[done]].append(gain)
    for name, found in gains.items():
        print(f"{name}: mean {statistics.fmean(found):+.4f} of {len(found)} nights")
    first, *others = (one.name for one in options.searches)
    for name in others if options.times > 1 else ():
        print(f"{first} less {name}: {difference(gains[first], gains[name])}")


if __name__ == "__main__":
    main()
