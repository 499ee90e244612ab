"""Measures a device, step by step. Results are stored after each step, so that a killed calibration can be continued.

Products, bandwidth and attention are measured in this process, once before the first trial of `train.py` and again
after each: what changes over the minutes belongs to their spread.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import backends
import disturbance
import prepare
import storage
from backends import bench, interface
from calibration import identity, profile as profiles, rule
from calibration.rule import Completed, Failed, Outcome, Settings, Spread, Trial

LARGEST_SQUARE, SQUARE_SECONDS = 8192, 0.05  # of the products that set the peak: doubled until one takes so long
COPIED = 2**28  # bytes, or a 32nd of the memory
SMALLEST_MATRIX = 2**12  # elements of the smallest weight whose matrix products are measured
BUSY = 0.1  # share of the processors' time, beyond which what others do is told
SCATTER = 0.15  # half the range of repeats over their median, beyond which something else was using the device
TRIAL_TIMEOUT = 300  # seconds, of which compiling may take a hundred
NOT_DONE, MOST_SLOW = f"not done after {TRIAL_TIMEOUT} s", 3  # of trials, after which it is not the size


class CalibrationError(storage.Stop):
    """This device can't be calibrated; the reason says what to do."""


@dataclass(frozen=True)
class Effort:
    """How long a calibration takes: `QUICK` or `FULL`.

    Attributes:
        limit: seconds after which no further trial is begun.
        repeats: of each measurement. trial_seconds: how long a trial runs.
        compiled: whether trials compile their step, which takes a minute on some devices.
    """

    name: str
    limit: float
    repeats: int
    trial_seconds: float
    compiled: bool


FULL = Effort("full", 420, 9, 6.0, True)
QUICK = Effort("quick", 32, 3, 2.0, False)


def spread(values: list[float]) -> Spread:
    """Median, lowest, highest and number of repeats. Values are rounded to 5 digits: noise has no more."""
    low, middle, high = (float(f"{value:.5g}") for value in (min(values), statistics.median(values), max(values)))
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def merged(before, now):
    """Measurements combined with a later round of the same: each spread is over both, its median the mean of theirs."""
    if isinstance(before, dict) and isinstance(now, dict):
        if "median" in before:
            n = before["n"] + now["n"]
            middle = (before["n"] * before["median"] + now["n"] * now["median"]) / n
            return {
                "median": float(f"{middle:.5g}"),
                "low": min(before["low"], now["low"]),
                "high": max(before["high"], now["high"]),
                "n": n,
            }
        later = {name: merged(before[name], part) if name in before else part for name, part in now.items()}
        return {**before, **later}
    if isinstance(before, list) and isinstance(now, list):
        return [merged(*pair) for pair in zip(before, now)]
    return before


def scatter(repeats: Spread) -> float:
    """Half the range of the repeats, as a share of their median."""
    return (repeats["high"] - repeats["low"]) / 2 / repeats["median"]


class Measurement:
    """A calibration under way.

    Args:
        effort: FULL or QUICK.
        progress: called with what is being tried and the seconds that should be left.
        fresh: forget what an interrupted calibration measured.

    Attributes:
        header: what the profile is of; results of an interrupted calibration with another header are not used.
        results: what was measured so far, with the header, as it is kept in the file `partial`.
        backend, precision: what it measures, from `run` on.
    """

    def __init__(self, effort: Effort, progress: Callable[[str, float], None] = lambda *_: None, fresh: bool = False):
        prepare.refuse_in_turn()
        self.effort, self.progress = effort, progress
        self.hardware = backends.identify()
        self.path = profiles.path_of(self.hardware)
        self.partial = self.path.with_suffix(".json.partial")
        self.begun, self.others = time.monotonic(), disturbance.others()
        self.header = {
            "format": profiles.FORMAT,
            "device": self.hardware.slug,
            "backend": self.hardware.backend,
            "versions": self.hardware.versions,
            "train": profiles.baseline(),
            "effort": effort.name,
        }
        self.results = {} if fresh else self._resumed()
        self.earlier = self.results.get("seconds", 0.0)
        self.results |= self.header

    def _resumed(self) -> dict:
        """What an interrupted calibration of the same kind left."""
        results = storage.read_json(self.partial) or {}
        return results if results.items() >= self.header.items() else {}

    @property
    def spent(self) -> float:
        return self.earlier + time.monotonic() - self.begun

    def step(self, name: str, text: str, left: float, action: Callable):
        """Does one step unless it was done before, and keeps its result."""
        if name not in self.results:
            self.progress(text, left)
            self.results[name] = action()
            self._keep()
        return self.results[name]

    def _keep(self) -> None:
        storage.write_json(self.partial, self.results | {"seconds": self.spent})

    def run(self) -> dict:
        """The finished profile, which is also written.

        Raises:
            CalibrationError: nothing runs here, or what was measured is impossible.
        """
        left = self.effort.limit - self.spent
        self.progress("identifying this machine", left)
        self.results["machine"] = identity.describe(self.hardware)  # now, also when an earlier calibration goes on
        # MLX compiles in no time, and has no switch that a trial would see.
        compiled = None if self.effort.compiled or self.hardware.backend == "mlx" else False
        self.progress("loading the backend, and fetching kernels if there are any", left)
        self.backend = backends.load(compiled=compiled, fetch=True)
        device, bench_ = self.backend.device, self.backend.bench
        self.results["compiled"] = device.compiled
        self.step("free_memory", "free memory", left, self.backend.free_memory)
        tried = self.step("precisions", "precisions", left, lambda: bench.try_precisions(bench_, self.effort.repeats))
        self.precision = bench.choose_precision(tried)
        if self.precision != device.precision:  # what was remembered from a busier hour
            self.backend = backends.load(precision=self.precision, compiled=compiled, fetch=True)
        self._settle_provider()
        try:
            self.step("round", "matrix products, memory bandwidth, attention", left, self._round)
        except Exception as error:  # whatever a framework raises
            raise CalibrationError(
                f"measuring this device failed: {bench.reason(bench_, error)}. If its memory is "
                "full, close what uses it; then calibrate again"
            ) from error
        return self._finish(self._trials())

    def _settle_provider(self) -> None:
        """Drops what an interrupted calibration measured with another provider of attention."""
        provider = self.backend.bench.attention_provider
        if self.results.get("attention_provider", provider) != provider:
            for name in ("round", "chosen", "trials", "matrices", "cut_short"):
                self.results.pop(name, None)
        self.results |= {"attention_provider": provider, "kernels": self.backend.device.kernels}

    def _provider(self, attention: dict[str, str]) -> str | None:
        """Where the chosen attention comes from; None if it is the framework's own."""
        return self.results["attention_provider"] if "fa3" in attention.values() else None

    # --- On the device, in this process ---

    def _round(self) -> dict:
        """One round of what this process measures."""
        measured = {
            "products": self._products(),
            "bandwidth": self._bandwidth(),
            "attention": (attention := self._attention()),
        }
        measured["rows"] = max(times["rows"] for times in attention["full"].values() if not isinstance(times, str))
        if best := rule.best_depth(self._known()):
            measured["model_products"] = {label(best): self._model_products(best)}
        self.backend.bench.forget()
        return measured

    def _another_round(self) -> None:
        """What a later round adds; if it fails, the earlier ones stand."""
        try:
            self.results["round"] = merged(self.results["round"], self._round())
        except Exception as error:  # memory that something else has taken meanwhile
            self.progress(f"measuring once more failed: {bench.reason(self.backend.bench, error)}", 5.0)
        self._keep()

    def _square(self) -> int:
        """The size of products that keeps the device busy."""
        if "round" in self.results:
            return self.results["round"]["products"]["square"]
        square = 512
        while square < LARGEST_SQUARE:
            took = min(bench.seconds(self.backend.bench.product(self.precision, square, square, square), 2))
            if took > SQUARE_SECONDS / 4:
                break
            square *= 2
        return square

    def _products(self) -> dict:
        """Rates of square products in each usable precision; a precision too slow for that size gets a smaller one."""
        square, rates = self._square(), {}
        for name, speeds in self.results["precisions"].items():
            if isinstance(speeds, str):  # why it can't be used
                rates[name] = speeds
                continue
            n = square if speeds["product"] * SQUARE_SECONDS * 8 > 2 * square**3 else 512
            rates[name] = spread(bench.product_rates(self.backend.bench, name, n, self.effort.repeats))
        return {"square": square, "rates": rates}

    def _bandwidth(self) -> Spread:
        """Bytes per second, read and written, while copying."""
        size = min(COPIED, self.hardware.memory // 32)
        return spread([2 * size / took for took in bench.seconds(self.backend.bench.copy(size), self.effort.repeats)])

    def _attention(self) -> dict:
        rows = self.results["round"]["rows"] if "round" in self.results else None
        tried = bench.try_attention(self.backend.bench, self.precision, self.effort.repeats, forward=True, rows=rows)
        return {
            kind: {
                name: times
                if isinstance(times, str)
                else times | {part: spread(times[part]) for part in ("forward", "both")}
                for name, times in by_name.items()
            }
            for kind, by_name in tried.items()
        }

    def _model_products(self, best: Completed) -> list[dict]:
        """Rates of products at the shapes of the model's weights, for the tokens of a pass."""
        tokens, results = best.rows * prepare.MAX_SEQ_LEN, []
        for out, into in self.results["matrices"][str(best.depth)]:
            if out * into < SMALLEST_MATRIX:
                continue
            took = bench.seconds(self.backend.bench.product(self.precision, tokens, into, out), self.effort.repeats)
            results.append({"shape": [tokens, into, out], "rate": spread([2 * tokens * into * out / t for t in took])})
        return results

    # --- The real train.py, each trial in a process of its own ---

    def _known(self) -> list[Outcome]:
        """The outcomes so far."""
        return profiles.trials(self.results) if "trials" in self.results else []

    def _trials(self) -> Completed:
        """Makes the trials that the rule asks for, and returns the best one.

        Raises:
            CalibrationError: train.py fails, or no trial fits.
        """
        chosen, pattern = self.step("chosen", "attention", 1.0, self._chosen)
        results = self.results
        first = rule.start(results["round"]["products"]["rates"][self.precision]["median"], results["free_memory"])
        results.setdefault("trials", [])
        results.setdefault("matrices", {})
        took = 30.0 if self.effort.compiled else 8.0
        while (wanted := rule.wanted(self._known(), first)) is not None:
            known = self._known()
            if known and self.spent + took > self.effort.limit and rule.best_depth(known):
                results["cut_short"] = f"there was no time to try depth {wanted[0]} with {wanted[1]} rows"
                break
            depth, rows = wanted
            self.progress(
                f"train.py at depth {depth} with {rows} rows a pass",
                max(self.effort.limit - self.spent, took) if len(known) < 3 else 3 * took,
            )
            start = time.monotonic()
            best = rule.best_depth(known)  # its batch, so that the optimizer has the share of time of a whole run
            total = rule.total_batch(best.rate * prepare.TIME_BUDGET) if best else first[2]
            same = rule.at(known, depth)  # trials of one depth have one batch, so that rows are all that differs
            total = max(same[0].total_batch_size if same else total, rows * prepare.MAX_SEQ_LEN)
            outcome, matrices = self._try(Trial(depth, rows, total, pattern, self.precision), chosen)
            if matrices:
                results["matrices"][str(depth)] = matrices
            results["trials"].append(asdict(outcome))
            self._keep()
            why = outcome.failed if isinstance(outcome, Failed) else ""
            slow = [trial for trial in self._known() if isinstance(trial, Failed) and trial.failed == NOT_DONE]
            hangs = len(slow) == MOST_SLOW and not rule.best_depth(self._known())
            if hangs or why and not why.endswith(("out of memory", NOT_DONE)):
                self.partial.unlink(missing_ok=True)
                raise CalibrationError(f"train.py does not run here: {why}. Fix that, and calibrate again")
            self._another_round()
            took = time.monotonic() - start
        best = rule.best_depth(self._known())
        if not best:
            self.partial.unlink(missing_ok=True)  # what is free may be more the next time
            raise CalibrationError(rule.nothing_fits(self._known()))
        if label(best) not in results["round"].get("model_products", {}):  # killed before it was measured
            self._another_round()
        return best

    def _chosen(self) -> tuple[dict[str, str], str]:
        """Attention and window pattern of the trials: settled before them, so that they compare."""
        attention = self.results["round"]["attention"]
        chosen = bench.choose_attention(rule.bests(attention), self.hardware.memory, self.results["compiled"])
        return chosen, rule.window_pattern(attention, chosen)[0]

    def _try(self, trial: Trial, attention: dict[str, str]) -> tuple[Outcome, list[list[int]]]:
        """Runs train.py at these sizes. Also returns the shapes of the model's matrices, none where it failed."""
        settings = Settings(
            trial.depth, trial.rows, trial.total_batch_size, trial.window_pattern, trial.precision, attention
        )
        free = self.backend.free_memory()

        def failed(reason: str) -> tuple[Failed, list[list[int]]]:
            return Failed(**vars(trial), free_memory=free, failed=reason), []

        with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
            asked, result = Path(folder) / "profile.json", Path(folder) / "result.json"
            storage.write_json(
                asked,
                {
                    **self.header,
                    "made": "a trial",
                    "settings": asdict(settings),
                    "attention_provider": self._provider(attention),
                    "kernels": self.results.get("kernels"),
                    "products": self.results["round"]["products"],
                    "trials": [],
                },
            )
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "calibration.trial", str(result), str(self.effort.trial_seconds)],
                    cwd=profiles.TRAIN.parent,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    timeout=TRIAL_TIMEOUT,
                    env=environment(
                        AUTORESEARCH_PROFILE=str(asked),
                        AUTORESEARCH_BACKEND=self.hardware.backend,
                        **{} if self.effort.compiled else {"TORCH_COMPILE_DISABLE": "1"},
                    ),
                )
            except subprocess.TimeoutExpired:  # memory that is swapped, most likely
                return failed(NOT_DONE)
            if done.returncode or not result.exists():
                return failed(reason_of(done))
            measured = json.loads(result.read_text())
        matrices = measured.pop("matrices")
        if measured.pop("rows_at_once") < trial.rows:
            return failed("out of memory")
        rate, probe = spread(measured.pop("tokens_per_second")), measured.pop("probe")
        if all(probe.values()):  # a GPU that tells its clock rate
            self.results.setdefault("probes", []).append(probe)
        return Completed(**vars(trial), **measured, tokens_per_second=rate, free_memory=free), matrices

    # --- The profile ---

    def _finish(self, best: Completed) -> dict:
        only_here = "round", "chosen", "matrices", "seconds", "probes"
        measured = {name: value for name, value in self.results.items() if name not in only_here}
        measured |= {name: value for name, value in self.results["round"].items() if name != "rows"}
        settings, reasons = rule.scale(self._known(), measured["attention"], self.results["chosen"][0])
        measured["model_products"] = measured.get("model_products", {}).get(label(best), [])
        size = disturbance.product_size(measured["products"]["rates"][settings.precision]["median"])
        if probes := [probe for probe in self.results.get("probes", []) if probe["size"] == size]:
            measured["probe"] = min(probes, key=lambda probe: probe["probe"] * probe["clock_rate"])
        profile = {
            **measured,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(self.spent, 1),
            "settings": asdict(settings),
            "attention_provider": self._provider(settings.attention),
            "reasons": reasons,
        }
        profile["warnings"] = identity.warnings(profile["machine"]) + unsteady(profile) + self._busy()
        profile["trials"] = drifting(profile)
        if problem := profiles.impossible(profile):
            raise CalibrationError(
                f"the measurements can't be right: {problem}. Run the command again with --fresh; if this happens "
                f"again, please report it, with the file {self.partial}"
            )
        storage.write_json(self.path, profile)
        self.partial.unlink(missing_ok=True)
        return profile

    def _busy(self) -> list[str]:
        """What other programs did meanwhile, where that was much."""
        share = (disturbance.others() - self.others) / ((time.monotonic() - self.begun) * (os.cpu_count() or 1))
        if share < BUSY:
            return []
        return [
            f"other programs took {share:.0%} of the processors' time: rates may be too low, sizes too small. "
            "Calibrate again when the machine is quiet; until then a session uses the speed of its own baseline"
        ]


def environment(**values: str) -> dict[str, str]:
    """The environment of a trial: no setting of the user's that would change what is measured."""
    of_machine = [f"AUTORESEARCH_{name}" for name in ("HOME", "DEVICE", "FA3_LIBRARY")]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_") or name in of_machine
    }
    return {**inherited, **values}


def reason_of(done: subprocess.CompletedProcess) -> str:
    """The reason for which a trial failed, in one line."""
    if interface.says_no_memory(done.stderr):
        return "out of memory"
    if done.returncode in (-9, -6):  # -9 by the system; -6 by MLX on a CPU, which has no other way to say so
        return f"killed by signal {-done.returncode}: most likely out of memory"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines)[-1][:200]  # warnings may follow an error


def drifting(profile: dict) -> list[dict]:
    """The trials, each with at least the spread that products had over the minutes: a trial is made once, and another
    calibration makes it in another minute."""
    drift = scatter(profile["products"]["rates"][profile["settings"]["precision"]])

    def widened(rate: Spread) -> Spread:
        low, high = (float(f"{side * rate['median']:.5g}") for side in (1 / (1 + drift), 1 + drift))
        return {**rate, "low": min(low, rate["low"]), "high": max(high, rate["high"])}

    return [
        trial if "failed" in trial else {**trial, "tokens_per_second": widened(trial["tokens_per_second"])}
        for trial in profile["trials"]
    ]


def label(trial: Trial) -> str:
    return f"depth {trial.depth}, {trial.rows} rows"


def unsteady(profile: dict) -> list[str]:
    """Measurements whose repeats are so far apart that something else must have been using the device."""
    precision = profile["settings"]["precision"]
    spreads: dict[str, Spread] = {
        f"products in {precision}": profile["products"]["rates"][precision],
        "memory bandwidth": profile["bandwidth"],
    }
    spreads |= {f"train.py at {label(trial)}": trial.tokens_per_second for trial in profiles.completed(profile)}
    return [
        f"{name}: repeated measurements differ, from {repeats['low']:.3g} to {repeats['high']:.3g}. Is another "
        "program using the device? Close it and calibrate again"
        for name, repeats in spreads.items()
        if scatter(repeats) > SCATTER
    ]
