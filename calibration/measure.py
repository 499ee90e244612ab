"""Measures a device, step by step: what was found is kept after each step, so that a killed calibration goes on.

Products, bandwidth and attention are measured in this process, once before the first trial of `train.py` and again
after each: what changes over the minutes belongs to their spread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import backends
import prepare
import storage
from backends import bench
from calibration import identity, profile, rule
from calibration.rule import Settings, Trial

LARGEST_SQUARE, SQUARE_SECONDS = 8192, 0.05  # of the products that set the peak: doubled until one takes so long
COPIED = 2**28  # bytes, or a 32nd of the memory
SMALLEST_MATRIX = 2**12  # a weight with fewer elements is no matter of matrix products
SCATTER = 0.15  # half the range of repeats over their median, beyond which something else was using the device
TRIAL_TIMEOUT = 300  # seconds, of which compiling may take a hundred


class CalibrationError(storage.Stop):
    """This device can't be calibrated; the reason says what to do."""


class Effort:
    """How long a calibration takes: `QUICK` or `FULL`.

    Attributes:
        limit: seconds after which no further trial is begun.
        repeats, trial_seconds: of a measurement, of a run.
        compiled: whether runs compile their step, which takes a minute on some devices.
    """

    def __init__(self, name, limit, repeats, trial_seconds, compiled):
        self.name, self.limit, self.repeats = name, limit, repeats
        self.trial_seconds, self.compiled = trial_seconds, compiled


FULL = Effort("full", 420, 9, 6.0, True)
QUICK = Effort("quick", 32, 3, 2.0, False)


def spread(values: list[float]) -> dict:
    """Median, lowest, highest and number of repeats. Values are rounded to 5 digits: noise has no more."""
    low, middle, high = (float(f"{value:.5g}") for value in (min(values), statistics.median(values), max(values)))
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def merged(before, now):
    """Measurements and a later round of the same: a spread over both, the median being the mean of theirs."""
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
        return {**before, **{name: merged(before[name], one) if name in before else one for name, one in now.items()}}
    if isinstance(before, list) and isinstance(now, list):
        return [merged(*pair) for pair in zip(before, now)]
    return before


def scatter(found: dict) -> float:
    return (found["high"] - found["low"]) / 2 / found["median"]


class Measurement:
    """A calibration under way.

    Args:
        effort: FULL or QUICK.
        progress: called with what is being tried and the seconds that should be left.
        fresh: forget what an interrupted calibration found.
    """

    def __init__(self, effort: Effort, progress: Callable[[str, float], None] = lambda *_: None, fresh: bool = False):
        self.effort, self.progress = effort, progress
        self.hardware = backends.identify()
        self.path = profile.path_of(self.hardware)
        self.partial = self.path.with_suffix(".json.partial")
        self.begun = time.monotonic()
        self.sort = {
            "format": profile.FORMAT,
            "device": self.hardware.slug,
            "backend": self.hardware.backend,
            "versions": self.hardware.versions,
            "train": profile.baseline(),
            "effort": effort.name,
        }
        self.found = {} if fresh else self._resumed()
        self.earlier = self.found.get("seconds", 0.0)
        self.found |= self.sort

    def _resumed(self) -> dict:
        """What an interrupted calibration of the same kind left."""
        try:
            found = json.loads(self.partial.read_text())
            return found if found.items() >= self.sort.items() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    @property
    def spent(self) -> float:
        return self.earlier + time.monotonic() - self.begun

    def step(self, name: str, text: str, left: float, action: Callable):
        """Does one step unless it was done before, and keeps what it found."""
        if name not in self.found:
            self.progress(text, left)
            self.found[name] = action()
            self._keep()
        return self.found[name]

    def _keep(self) -> None:
        storage.write_json(self.partial, self.found | {"seconds": self.spent})

    def run(self) -> dict:
        """The finished profile, which is also written.

        Raises:
            CalibrationError: nothing runs here, or what was measured can't be.
        """
        found, left = self.found, self.effort.limit - self.spent
        self.progress("what this machine is", left)
        found["machine"] = identity.describe(self.hardware)  # now, also when an earlier calibration goes on
        # MLX compiles in no time, and has no switch that a trial would see.
        compiled = None if self.effort.compiled or self.hardware.backend == "mlx" else False
        self.progress("the backend, and kernels that it can fetch", left)
        self.backend = backends.load(compiled=compiled, fetch=True)
        device, bench_ = self.backend.device, self.backend.bench
        found["compiled"] = device.compiled
        self.step("free_memory", "free memory", left, self.backend.free_memory)
        tried = self.step("precisions", "precisions", left, lambda: bench.try_precisions(bench_, self.effort.repeats))
        precision = bench.choose_precision(tried)
        if precision != device.precision:  # what was remembered from a busier hour
            self.backend = backends.load(precision=precision, compiled=compiled, fetch=True)
        self._settle_provider()
        try:
            self.step(
                "round", "matrix products, memory bandwidth, attention", left, lambda: self._round(tried, precision)
            )
        except Exception as error:  # whatever a framework raises
            raise CalibrationError(
                f"measuring this device failed: {bench.reason(bench_, error)}. If its memory is "
                "full, close what uses it; then calibrate again"
            ) from error
        self._trials(tried, precision)
        return self._finish()

    def _settle_provider(self) -> None:
        """What an interrupted calibration measured with another provider of attention says nothing of this one."""
        provider = self.backend.bench.attention_provider
        if self.found.get("attention_provider", provider) != provider:
            for name in ("round", "chosen", "trials", "matrices", "cut_short"):
                self.found.pop(name, None)
        self.found |= {"attention_provider": provider, "kernels": self.backend.device.kernels}

    def _provider(self, attention: dict[str, str]) -> str | None:
        """Where what was chosen comes from, unless all of it is the framework's own."""
        return self.found["attention_provider"] if "fa3" in attention.values() else None

    # --- On the device, in this process ---

    def _round(self, tried: dict, precision: str) -> dict:
        """One round of what this process measures."""
        found = {
            "products": self._products(tried, precision),
            "bandwidth": self._bandwidth(),
            "attention": (attention := self._attention(precision)),
        }
        found["rows"] = max(one["rows"] for one in attention["full"].values() if not isinstance(one, str))
        if best := rule.best_depth(self._known()):
            found["model_products"] = {sizes(best): self._model_products(precision, best)}
        self.backend.bench.forget()
        return found

    def _another_round(self, tried: dict, precision: str) -> None:
        """What a later round adds; if it fails, the earlier ones stand."""
        try:
            self.found["round"] = merged(self.found["round"], self._round(tried, precision))
        except Exception as error:  # memory that something else has taken meanwhile
            self.progress(f"measuring once more failed: {bench.reason(self.backend.bench, error)}", 5.0)
        self._keep()

    def _square(self, precision: str) -> int:
        """The size of products that keeps the device busy."""
        if "round" in self.found:
            return self.found["round"]["products"]["square"]
        square = 512
        while square < LARGEST_SQUARE:
            took = min(bench.seconds(self.backend.bench.product(precision, square, square, square), 2))
            if took > SQUARE_SECONDS / 4:
                break
            square *= 2
        return square

    def _products(self, tried: dict, precision: str) -> dict:
        """Rates of square products in each usable precision; of smaller ones in one too slow for them."""
        square, rates = self._square(precision), {}
        for name, found in tried.items():
            n = square if not isinstance(found, str) and found["product"] * SQUARE_SECONDS * 8 > 2 * square**3 else 512
            rates[name] = (
                found
                if isinstance(found, str)
                else spread(bench.product_rates(self.backend.bench, name, n, self.effort.repeats))
            )
        return {"square": square, "rates": rates}

    def _bandwidth(self) -> dict:
        """Bytes per second, read and written, of a copy."""
        size = min(COPIED, self.hardware.memory // 32)
        return spread([2 * size / took for took in bench.seconds(self.backend.bench.copy(size), self.effort.repeats)])

    def _attention(self, precision: str) -> dict:
        rows = self.found["round"]["rows"] if "round" in self.found else None
        tried = bench.try_attention(self.backend.bench, precision, self.effort.repeats, forward=True, rows=rows)
        return {
            kind: {
                name: found
                if isinstance(found, str)
                else found | {part: spread(found[part]) for part in ("forward", "both")}
                for name, found in by_name.items()
            }
            for kind, by_name in tried.items()
        }

    def _model_products(self, precision: str, best: Trial) -> list[dict]:
        """At the shapes of the model's weights, for the tokens of a pass."""
        tokens, results = best.rows * prepare.MAX_SEQ_LEN, []
        for out, into in self.found["matrices"][str(best.depth)]:
            if out * into < SMALLEST_MATRIX:
                continue
            took = bench.seconds(self.backend.bench.product(precision, tokens, into, out), self.effort.repeats)
            results.append({"shape": [tokens, into, out], "rate": spread([2 * tokens * into * out / t for t in took])})
        return results

    # --- The real train.py, each trial in a process of its own ---

    def _known(self) -> list[Trial]:
        return [Trial(**trial) for trial in self.found.get("trials", [])]

    def _trials(self, tried: dict, precision: str) -> None:
        chosen, pattern = self.step("chosen", "attention", 1.0, lambda: self._chosen(precision))
        first = rule.start(self.found["round"]["products"]["rates"][precision]["median"], self.found["free_memory"])
        self.found.setdefault("trials", [])
        self.found.setdefault("matrices", {})
        took = 30.0 if self.effort.compiled else 8.0
        while (wanted := rule.wanted(self._known(), first)) is not None:
            known = self._known()
            if known and self.spent + took > self.effort.limit and rule.best_depth(known):
                self.found["cut_short"] = f"no time was left to try depth {wanted[0]} with {wanted[1]} rows"
                break
            depth, rows = wanted
            self.progress(
                f"train.py at depth {depth} with {rows} rows a pass",
                max(self.effort.limit - self.spent, took) if len(known) < 3 else 3 * took,
            )
            start = time.monotonic()
            best = rule.best_depth(known)  # whose batch the optimizer's work is to be spread over as in a whole run
            total = rule.total_batch(best.rate * prepare.TIME_BUDGET) if best else first[2]
            same = rule.at(known, depth)  # trials of one depth have one batch, so that rows are all that differs
            total = max(same[0].total_batch_size if same else total, rows * prepare.MAX_SEQ_LEN)
            trial = Trial(depth, rows, total, pattern, precision)
            self._record(trial, self._try(trial, chosen))
            failed = self._known()[-1].failed
            if failed and "memory" not in failed and "not done" not in failed:
                self.partial.unlink(missing_ok=True)
                raise CalibrationError(f"train.py does not run here: {failed}. Mend that, and calibrate again")
            self._another_round(tried, precision)
            took = time.monotonic() - start
        best = rule.best_depth(self._known())
        if not best:
            self.partial.unlink(missing_ok=True)  # what is free may be more the next time
            raise CalibrationError(rule.nothing_fits(self._known()))
        if sizes(best) not in self.found["round"].get("model_products", {}):  # killed before it was measured
            self._another_round(tried, precision)

    def _chosen(self, precision: str) -> tuple[dict[str, str], str]:
        """Attention and window pattern of the trials: settled before them, so that they compare."""
        attention = self.found["round"]["attention"]
        chosen = bench.choose_attention(rule.medians(attention), self.hardware.memory, self.found["compiled"])
        return chosen, rule.window_pattern(attention, chosen)[0]

    def _record(self, trial: Trial, found: dict) -> None:
        if matrices := found.pop("matrices", None):
            self.found["matrices"][str(trial.depth)] = matrices
        self.found["trials"].append(profile.as_json(replace(trial, **found)))
        self._keep()

    def _try(self, trial: Trial, attention: dict) -> dict:
        """What a run of train.py at these sizes found: fields of Trial, and "matrices"."""
        settings = Settings(
            trial.depth, trial.rows, trial.total_batch_size, trial.window_pattern, trial.precision, attention
        )
        free = self.backend.free_memory()
        with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
            asked, result = Path(folder) / "profile.json", Path(folder) / "result.json"
            storage.write_json(
                asked,
                {
                    **self.sort,
                    "made": "a trial",
                    "settings": asdict(settings),
                    "attention_provider": self._provider(attention),
                    "kernels": self.found.get("kernels"),
                    "products": self.found["round"]["products"],
                    "trials": [],
                },
            )
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "calibration.trial", str(result), str(self.effort.trial_seconds)],
                    cwd=profile.TRAIN.parent,
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
                return {"free_memory": free, "failed": f"not done after {TRIAL_TIMEOUT} s"}
            if done.returncode or not result.exists():
                return {"free_memory": free, "failed": why(done)}
            found = json.loads(result.read_text())
        if found.pop("rows_at_once") < trial.rows:
            return {"free_memory": free, "failed": "out of memory"}
        return found | {"free_memory": free, "tokens_per_second": spread(found["tokens_per_second"])}

    # --- The profile ---

    def _finish(self) -> dict:
        only_here = "round", "chosen", "matrices", "seconds"
        found = {name: value for name, value in self.found.items() if name not in only_here}
        found |= {name: value for name, value in self.found["round"].items() if name != "rows"}
        settings, reasons = rule.scale(
            {"chosen": self.found["chosen"][0], "attention": found["attention"], "trials": self._known()}
        )
        found["model_products"] = found.get("model_products", {}).get(sizes(rule.best_depth(self._known())), [])
        result = {
            **found,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(self.spent, 1),
            "settings": asdict(settings),
            "attention_provider": self._provider(settings.attention),
            "reasons": reasons,
        }
        result["warnings"] = identity.warnings(found["machine"]) + unsteady(result)
        result["trials"] = drifting(result)
        if problem := profile.impossible(result):
            raise CalibrationError(
                f"what was measured can't be true: {problem}. Run it again with --fresh; if that "
                f"says the same, please report it with the file {self.partial}"
            )
        storage.write_json(self.path, result)
        self.partial.unlink(missing_ok=True)
        return result


def environment(**values: str) -> dict[str, str]:
    """For a trial: nothing of the user's that would change what is measured."""
    of_machine = [f"AUTORESEARCH_{name}" for name in ("HOME", "DEVICE", "FA3_LIBRARY")]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("AUTORESEARCH_") or name in of_machine
    }
    return {**inherited, **values}


def why(done: subprocess.CompletedProcess) -> str:
    """Why a trial failed, in a line."""
    if "out of memory" in done.stderr.lower() or "OutOfMemory" in done.stderr or "MemoryError" in done.stderr:
        return "out of memory"
    if done.returncode in (-9, -6):  # by the system; by MLX on a CPU, which has no other way to say so
        return f"killed by signal {-done.returncode}: most likely out of memory"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return (lines or [f"exit status {done.returncode}"])[-1].strip()[:200]


def drifting(found: dict) -> list[dict]:
    """The trials, each with at least the spread that products had over the minutes: a trial is made once, and another
    calibration makes it in another minute."""
    drift = scatter(found["products"]["rates"][found["settings"]["precision"]])

    def widened(one):
        low, high = (float(f"{side * one['median']:.5g}") for side in (1 / (1 + drift), 1 + drift))
        return {**one, "low": min(low, one["low"]), "high": max(high, one["high"])}

    return [
        trial if "failed" in trial else {**trial, "tokens_per_second": widened(trial["tokens_per_second"])}
        for trial in found["trials"]
    ]


def sizes(trial: Trial) -> str:
    return f"depth {trial.depth}, {trial.rows} rows"


def unsteady(found: dict) -> list[str]:
    """Measurements whose repeats are so far apart that something else must have been using the device."""
    precision = found["settings"]["precision"]
    measured = {
        f"products in {precision}": found["products"]["rates"][precision],
        "memory bandwidth": found["bandwidth"],
    }
    measured |= {
        f"train.py at {sizes(trial)}": trial.tokens_per_second for trial in profile.trials(found) if not trial.failed
    }
    return [
        f"{name}: repeats from {one['low']:.3g} to {one['high']:.3g}: is another program using the device? Close "
        "it and calibrate again"
        for name, one in measured.items()
        if scatter(one) > SCATTER
    ]
