"""Does the built-in proposer find more than random search does? Whole nights, simulated on recorded trials.

    python benchmarks/proposer.py [--pairs 40] [--experiments 60] [--first 1000]
    python benchmarks/proposer.py --record MINUTES [--trials FILE] [--together 8 --gpus 2]    # on the dataset in use

Recorded are short trials of train.py with configurations drawn at random from its block: an eighth of them everywhere
within the bounds, an eighth the default, the others in one to eight variables. Time is counted, not measured, so that
other work on the machine, other trials too, doesn't matter: so much for each floating-point operation, and for each
parameter updated.

A Gaussian process through the trials stands for training: its mean is a configuration's true score, to which a run adds
normal noise with the standard deviation between recorded seeds. It is fitted to asinh of how much worse than the
default a configuration is, in units of WARP: far from the default only the order of magnitude counts, and seeds differ
by more. The verdict is the lab's: gate.next_step asks for runs, keeps or discards; the proposer sees a session's state,
as in a real night. Its opponents:

    random search   draws every variable of each experiment anew, uniformly within the same bounds
    random steps    changes one to three variables of the best, as the proposer does, but at random

In a pair all have the same noise for the same experiment and seed. Better is whose best has the lower true score at the
end.
"""

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.genome.syntax import describe
from lab.genome import block
from lab.night import proposer
from lab.reasons import because
from lab.session.events import (
    ExperimentApplied,
    ExperimentDecided,
    ExperimentOpened,
    RunEnded,
    RunStarted,
    SessionStarted,
    Verdict,
)
from lab.session.state import State
from lab.verdict import gate
from lab.verdict.plan import pooled

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).with_name("recorded_trials.tsv")


class Counted(NamedTuple):
    """A recorded trial: calibrated defaults (depth, rows, tokens per step, windows), tokens of a row and how many rows
    are scored; the budget in counted seconds, operations in a second, seconds per parameter and step."""

    sizes: tuple[int, int, int, str]
    length: int
    rows: int
    budget: float
    rate: float
    update: float


COUNTED = {
    "cpu": Counted((2, 8, 2048, "SL"), 256, 64, 7.0, 2e11, 2e-8),  # one core's
    "cuda": Counted((4, 32, 2**16, "L"), 2048, 256, 5.0, 3.8e14, 3e-11),  # an H200's
}
LONGEST = 600  # seconds of a trial, by the wall, with what it compiles
NOT_COUNTED = 77  # exit status of a trial whose time was not the counted one
BASELINE_RUNS = 3
STEPS = 3  # variables that change at once, at most
FAR_WORSE = 1.05  # times the default's score
WARP = 0.05  # bits per byte beside the default's score, where its scale goes over from linear to logarithmic
ARMS = ("proposer", "random search", "random steps")


# --- Recording ---


def record(options) -> None:
    """Trains and scores configurations drawn at random, some of them at once, and appends them to the file. Every
    eighth is the default with another seed; of some others a second seed is tried, too: from these the noise is known.
    """
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    variables, end = block.read(text), time.monotonic() + 60 * options.record
    new = not options.trials.exists()
    first = 0 if new else len(options.trials.read_text().splitlines()) - 1
    with open(options.trials, "a", newline="") as file, ThreadPoolExecutor(options.together) as pool:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        if new:
            out.writerow(["val_bpb", "steps", "seed", *(variable.name for variable in variables)])
        under_way, numbers = {}, itertools.count(first)
        while under_way or time.monotonic() < end:
            while len(under_way) < options.together and time.monotonic() < end:
                number = next(numbers)
                rng = np.random.default_rng(number)
                changed = [0, len(variables), *[int(rng.integers(1, 9))] * 6][number % 8]
                chosen = rng.choice(len(variables), changed, replace=False)
                values = {variables[i].name: drawn(variables[i], rng) for i in chosen}
                for seed in (number, number + 1000) if number % 4 == 2 else (number,):
                    under_way[pool.submit(trial, block.write(text, values), seed, number % options.gpus)] = seed, values
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                (bpb, steps), (seed, values) = done.result(), under_way.pop(done)
                out.writerow([bpb, steps, seed, *(values.get(one.name, one.value) for one in variables)])
                file.flush()


def trial(source: str, seed: int, gpu: int) -> tuple[float | str, int]:
    """(val_bpb, steps) of a train.py, in a process of its own; ("crash", 0) if it can't be trained: a result, too."""
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder, "train.py")
        train.write_text(source, encoding="utf-8")
        environment = {
            **os.environ,
            "AUTORESEARCH_SEED": str(seed),
            "AUTORESEARCH_RESULT": f"{folder}/result.json",
            "CUDA_VISIBLE_DEVICES": str(gpu),
        }
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--child", train],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                timeout=LONGEST,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "crash", 0
    if done.returncode == NOT_COUNTED:
        raise SystemExit("a run ended by another clock than the one that counts: find what else it reads the time from")
    if done.returncode or "RESULT" not in done.stdout:
        if source == (ROOT / "train.py").read_text(encoding="utf-8"):
            raise SystemExit(f"the default itself fails here; to see why: python {__file__} --child train.py")
        return "crash", 0
    bpb, steps = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return bpb, steps


def train_counted(train: Path) -> tuple[float, int]:
    """(val_bpb, steps) of a train.py whose time is counted. This process is of no other use then."""
    import backends
    import calibration
    import dataset
    import disturbance
    import prepare
    from peers import execute, patched  # beside this file

    backend, data = backends.load(calibrated=calibration.defaults().calibrated), prepare.open_data()
    how = COUNTED[backend.device.kind]
    rows = data.validation_rows[:, : prepare.MAX_SEQ_LEN].reshape(-1, how.length)[: how.rows]
    short = np.concatenate([rows, rows[:, -1:]], axis=1)
    mock.patch.object(dataset.Data, "validation_rows", property(lambda self: short)).start()
    data.eval_rows = how.rows
    patched(
        dataset.Data.packed, lambda self: dataset.endless(self.batches)
    ).start()  # in this process, which has short rows
    prepare.MAX_SEQ_LEN, dataset.ROW = how.length, how.length + 1
    now, found = [0.0], {}
    prepare.time = SimpleNamespace(**{**vars(time), "perf_counter": lambda: now[0]})
    score = prepare.evaluate_bpb

    class Counting(prepare.Clock):
        """Its time goes on by the work of a step, at each tick."""

        def __init__(self, backend, model, loader):
            shapes = backend.shapes(model)
            self.per_token = sys.modules["train_here"].flops_per_token(model, shapes) / how.rate
            self.per_step, self.counted = how.update * sum(map(math.prod, shapes.values())), 0
            super().__init__(backend, model, loader, how.budget)

        def tick(self, loss):
            now[0] += self.per_step + (self.loader.tokens - self.counted) * self.per_token
            self.counted = self.loader.tokens
            return super().tick(loss)

    def undisturbed(witness):
        witness.probes.append(None)
        return [disturbance.Slowdown(1, 1) for _ in witness.probes]

    def evaluate(*arguments, clock, **options):
        found.update(bpb=score(*arguments, clock=clock, **options), steps=clock.steps)
        return found["bpb"]

    patched(prepare.Clock, Counting).start()
    patched(disturbance.Witness.now, lambda witness: now[0]).start()
    patched(disturbance.Witness.read, undisturbed).start()
    patched(backends.load, lambda **_: backend).start()
    patched(prepare.open_data, lambda: data).start()
    patched(prepare.evaluate_bpb, evaluate).start()
    patched(prepare.report, lambda *_, **__: None).start()
    patched(calibration.defaults, lambda: calibration.Defaults(*how.sizes)).start()
    execute("train_here", train.read_text(encoding="utf-8")).main()
    if now[0] < how.budget:
        sys.exit(NOT_COUNTED)
    return found["bpb"], found["steps"]


def drawn(variable: block.Variable, rng):
    """A value at random within the bounds."""
    return variable.at(rng.integers(len(variable.choices)) if variable.kind == "choice" else rng.random())


# --- What stands for training ---


def warp(worse):
    """Differences in bits per byte, on the scale of the fit."""
    return np.arcsinh(worse / WARP)


def unwarp(warped):
    return WARP * np.sinh(warped)


class Surrogate:
    """A Gaussian process through recorded trials: a sum of one smooth function of each variable, and one of all.

    Attributes:
        variables: of the block. start: val_bpb of the default. noise: standard deviation between seeds of one
            configuration as good as that, known with `df` degrees of freedom. trials: how many were recorded.
        x, y, variances: of each configuration, its coordinates, how much worse than the default it is (asinh, in units
            of WARP), how well known.
        r2: of what is predicted for configurations left out, a tenth at a time. kernel: (length, share of the sum).
    """

    def __init__(self, path: Path, variables, kernel: tuple[float, float] | None = None):
        self.variables = variables
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["val_bpb"] != "crash"]
        groups: dict[tuple, list[float]] = {}
        for row in rows:
            places = tuple(
                one.place(row[one.name] if one.kind == "choice" else float(row[one.name])) for one in variables
            )
            groups.setdefault(places, []).append(float(row["val_bpb"]))
        self.start, self.trials = statistics.fmean(groups[tuple(one.place(one.value) for one in variables)]), len(rows)
        warped = [warp(np.array(group) - self.start) for group in groups.values()]
        self.df = sum(len(group) - 1 for group in warped)
        variance = sum(((group - group.mean()) ** 2).sum() for group in warped) / self.df
        self.noise = WARP * math.sqrt(variance)
        self.x = self.spread(np.array(list(groups)))
        self.y = np.array([group.mean() for group in warped])
        self.variances = np.array([variance / len(group) for group in warped])
        self.mean, self.sd = self.y.mean(), self.y.std()
        self.r2, self.kernel = max(
            (self.held_out(kernel), kernel)
            for kernel in ([kernel] if kernel else itertools.product((0.2, 0.3, 0.5, 0.8, 1.2), (0.5, 0.8, 0.95)))
        )
        self.weights = self.solved(self.x, self.y, self.variances)

    def spread(self, places: np.ndarray) -> np.ndarray:
        """Places (n, variables) with a column for each of a choice's values. Beyond the bounds all is as at them."""
        columns = []
        for place, one in zip(places.T, self.variables):
            columns += [(place == i) * 0.5 for i in range(len(one.choices))] or [np.clip(place, 0, 1)]
        return np.array(columns).T

    def covariance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length, share = self.kernel
        squares = ((a[:, None] - b[None]) / length) ** 2
        return share * np.exp(-0.5 * squares).mean(-1) + (1 - share) * np.exp(-0.5 * squares.sum(-1) / 2)

    def solved(self, x, y, variances) -> np.ndarray:
        noise = np.diag(variances / self.sd**2 + 1e-6)
        return np.linalg.solve(self.covariance(x, x) + noise, (y - self.mean) / self.sd)

    def held_out(self, kernel) -> float:
        self.kernel, errors = kernel, np.zeros(len(self.y))
        parts = np.random.default_rng(0).permutation(len(self.y)) % 10
        for part in range(10):
            out, rest = parts == part, parts != part
            weights = self.solved(self.x[rest], self.y[rest], self.variances[rest])
            errors[out] = self.mean + self.sd * self.covariance(self.x[out], self.x[rest]) @ weights - self.y[out]
        return 1 - (errors**2).mean() / self.y.var()

    def true(self, text: str) -> float:
        """The score of a train.py."""
        values = {one.name: one.value for one in block.read(text)}
        x = self.spread(np.array([[one.place(values[one.name]) for one in self.variables]]))
        return self.start + float(unwarp(self.mean + self.sd * (self.covariance(x, self.x) @ self.weights)[0]))


# --- Nights ---


class Night:
    """A session as the proposer sees it, whose runs are noise around what the surrogate says."""

    profile = {"settings": {}}

    def __init__(self, text: str, surrogate: Surrogate, seed: int):
        self.surrogate, self.seed, self.repository, self.texts = surrogate, seed, self, {}
        self.state, self.account = (
            State([SessionStarted(tag="simulated", device="simulated", budget=1.0)]),
            gate.Account(),
        )
        self.open(text, "baseline", "baseline")
        for round in range(BASELINE_RUNS):
            self.run(self.state.last, self.state.last.blob, gate.seed(round))
        self.decide(Verdict("keep", because("baseline")))

    def content(self, blob: str) -> bytes:
        return self.texts[blob]

    def contents(self, blobs: list[str]) -> dict[str, bytes]:
        return {blob: self.texts[blob] for blob in blobs}

    def open(self, text: str, description: str, kind="change") -> None:
        blob, best = f"{zlib.crc32(text.encode()):08x}", self.state.best
        self.texts[blob] = text.encode()
        self.state.take(
            ExperimentOpened(
                number=len(self.state.experiments),
                kind=kind,
                blob=blob,
                parent=best.blob if best else None,
                onto=best.number if best else None,
                commit=f"{self.seed}",
                description=description,
                digest=describe(text.encode()).digest,
            )
        )

    def run(self, experiment, blob: str, seed: int) -> None:
        rng = np.random.default_rng([self.seed, experiment.number, seed, blob != experiment.blob])
        bpb = self.surrogate.true(self.texts[blob].decode()) + self.surrogate.noise * rng.standard_normal()
        number = self.state.next_run()
        self.state.take(RunStarted(number=number, experiment=experiment.number, blob=blob, seed=seed, budget=1.0))
        self.state.take(RunEnded(run=number, status="ok", result={"val_bpb": bpb}))

    def decide(self, verdict: Verdict) -> None:
        number = self.state.last.number
        self.state.take(ExperimentDecided(experiment=number, verdict=verdict))
        self.state.take(ExperimentApplied(experiment=number, commit=f"{number}"))

    def noise(self) -> gate.Noise:
        return pooled(self.state, self.surrogate.noise)

    def judge(self, text: str, description: str) -> None:
        """One experiment, as the executor carries it out."""
        best = self.state.best
        self.open(text, description)
        experiment = self.state.last
        while True:
            scores, others = self.state.results(experiment.blob), self.state.results(best.blob)
            step = gate.next_step(scores, others, self.noise(), self.account)
            if step.seed is None:
                break
            self.run(experiment, experiment.blob if step.action == "run candidate" else best.blob, step.seed)
        self.account = self.account.after(step.evidence)
        self.decide(Verdict("keep" if step.action == "keep" else "discard", step.reason, evidence=step.evidence))


class Found(NamedTuple):
    """What a night came to: after each experiment the best's true gain, and the runs so far, (experiments,) both; the
    share of proposals that are far worse than the default; how many were kept."""

    gains: np.ndarray
    runs: np.ndarray
    worse: float
    kept: int

    def after(self, runs: int) -> float:
        """The gain after so many runs; at the end, if it has fewer."""
        return float(self.gains[max(0, np.searchsorted(self.runs, runs, "right") - 1)])


def night(arm: str, text: str, surrogate: Surrogate, seed: int, experiments: int) -> Found:
    session, rng, scores = Night(text, surrogate, seed), np.random.default_rng([seed, 7]), []
    start, worse, runs = surrogate.true(text), 0, []
    for _ in range(experiments):
        best = session.content(session.state.best.blob).decode()
        if arm == "proposer":
            with (
                mock.patch.object(proposer, "noise_of", lambda state: session.noise()),
                mock.patch.object(proposer.findings, "ideas", lambda *_, **__: iter(())),
            ):
                proposal = proposer.propose(session)
            session.judge(proposal.content.decode(), proposal.description)
        else:
            free = surrogate.variables
            if arm == "random steps":
                free = [free[i] for i in rng.choice(len(free), rng.integers(1, STEPS + 1), replace=False)]
            session.judge(block.write(best, {variable.name: drawn(variable, rng) for variable in free}), arm)
        scores.append(surrogate.true(session.content(session.state.best.blob).decode()))
        runs.append(len(session.state.runs))
        worse += surrogate.true(session.content(session.state.last.blob).decode()) > FAR_WORSE * start
    return Found(start - np.array(scores), np.array(runs), worse / experiments, len(session.state.kept) - 1)


def mean_of(gains) -> str:
    return f"{np.mean(gains):.4f} ± {np.std(gains) / math.sqrt(len(gains)):.4f}"


def sign_test(wins: int, losses: int) -> float:
    """One-sided p-value, ties left out."""
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=float, metavar="MINUTES", help="begin trials for so long")
    parser.add_argument("--trials", type=Path, default=RECORDED, metavar="FILE", help="recorded ones, or to be")
    parser.add_argument("--together", type=int, default=1, help="trials at once, while recording")
    parser.add_argument("--gpus", type=int, default=1, help="that they share")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--experiments", type=int, default=60)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first pair")
    parser.add_argument("--noise", type=float, default=1.0, help="times the recorded one")
    parser.add_argument(
        "--kernel",
        type=float,
        nargs=2,
        metavar=("LENGTH", "SHARE"),
        help="of the surrogate, instead of the one that predicts best",
    )
    options = parser.parse_args()
    if options.child:
        print("\nRESULT", json.dumps(train_counted(options.child)))
        return None
    if options.record:
        return record(options)
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    text = text[: text.index("\ndef ")]  # the block is all that the surrogate knows of
    surrogate = Surrogate(options.trials, block.read(text), options.kernel)
    start = surrogate.true(text)
    print(
        f"{surrogate.trials} trials of {len(surrogate.y)} configurations; held-out R2 {surrogate.r2:.3f}, kernel "
        f"{surrogate.kernel}; noise {surrogate.noise:.4f} ({surrogate.df} degrees of freedom); the default has "
        f"{start:.4f} ({surrogate.start:.4f} recorded), others {unwarp(surrogate.y.min()):+.4f} to "
        f"{unwarp(surrogate.y.max()):+.4f} beside it"
    )
    surrogate.noise *= options.noise
    began, ends = time.monotonic(), {}
    for arm in options.arms:
        nights = [
            night(arm, text, surrogate, options.first + pair, options.experiments) for pair in range(options.pairs)
        ]
        ends[arm] = np.array([found.gains[-1] for found in nights])
        curve = np.mean([found.gains for found in nights], axis=0)
        after = ", ".join(f"{curve[n - 1]:.4f} after {n}" for n in (10, 20, 40, 60, 100) if n <= len(curve))
        most = max(found.runs[-1] for found in nights)
        by_runs = {n: [found.after(n) for found in nights] for n in (25, 50, 75, 100) if n <= most}
        print(
            f"{arm}: gain {mean_of(ends[arm])} ({after}), "
            f"{', '.join(f'{mean_of(gains)} after {n} runs' for n, gains in by_runs.items())}; "
            f"{np.mean([found.runs[-1] for found in nights]):.1f} runs, "
            f"{np.mean([found.kept for found in nights]):.1f} kept; "
            f"{np.mean([found.worse for found in nights]):.0%} of proposals over 5 % worse than the default; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    own = ends.pop("proposer", None)
    for arm in ends if own is not None else ():
        difference = own - ends[arm]
        wins, losses = int((difference > 1e-12).sum()), int((difference < -1e-12).sum())
        print(
            f"proposer against {arm}: better in {wins} of {options.pairs} pairs, worse in {losses}; one-sided sign "
            f"test p = {sign_test(wins, losses):.2g}"
        )


if __name__ == "__main__":
    main()
