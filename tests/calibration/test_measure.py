"""A calibration from end to end: on a device that is made up, and once with the real train.py."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import backends
import calibration
import disturbance
import storage
from backends import bench
from backends.interface import Device, Hardware
from calibration import __main__ as command
from calibration import measure, profile, rule, show
from calibration.trial import rates
from tests.calibration.devices import GIB, M4, RTX_3090, spread

HARDWARE = Hardware("sdpa", "NVIDIA GeForce RTX 3090", "nvidia-rtx-3090-24gb", "cuda", 24 * GIB, {"torch": "2.13.0"})


class Bench(bench.Bench):
    """Calls that take as long as their FLOPs on a device of 1 TFLOP/s, by a clock that only they move."""

    size, attentions, memory = 256, ("sdpa_causal", "flex"), 24 * GIB
    now = 0.0

    def _work(self, seconds):
        def work(calls):
            Bench.now += calls * seconds

        return work

    def product_error(self, precision):
        return 1e-6

    def product(self, precision, m, k, n):
        return self._work(2 * m * k * n / {"float32": 2e11, "bfloat16": 1e12, "float16": 1e12}[precision])

    def mlp(self, precision, n):
        return self.product(precision, n, n, 2 * n)

    def copy(self, size):
        return self._work(2 * size / 1e11)

    def attention_error(self, name, window):
        return 1e-6 if name == "flex" or window is None else 0.5

    def attention(self, name, window, rows, backward):
        return self._work((3 if backward else 1) * rows * (1e-3 if window is None else 0.6e-3))

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)


@pytest.fixture
def device(monkeypatch):
    """A made-up GPU; `device.simulated` says what train.py does on it, `device.tried` what was tried."""
    here = SimpleNamespace(simulated=RTX_3090, tried=[], loaded=[], fetched=[])

    def load(precision=None, compiled=None, fetch=False):
        here.loaded.append(precision)
        here.fetched.append(fetch)
        found = Device(**vars(HARDWARE), precision=precision or "bfloat16", peak_flops=1e12, compiled=True)
        return SimpleNamespace(device=found, bench=Bench(), free_memory=lambda: int(here.simulated.free))

    def run(self, trial, attention):
        here.tried.append((trial.depth, trial.rows))
        outcome = dataclasses.replace(here.simulated.run(trial.depth, trial.rows), **vars(trial))
        return outcome, [[64 * trial.depth, 64 * trial.depth]]

    monkeypatch.setattr(backends, "identify", lambda: HARDWARE)
    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(measure.Measurement, "_try", run)
    monkeypatch.setattr(disturbance, "others", lambda: 0.0)
    real = bench.seconds
    monkeypatch.setattr(bench, "seconds", lambda work, *a, **k: real(work, *a, **{**k, "clock": lambda: Bench.now}))
    return here


def test_a_calibration_writes_a_sound_profile(device):
    said = []
    measurement = measure.Measurement(measure.FULL, lambda text, left: said.append((text, left)))
    found = measurement.run()
    assert profile.read(profile.path_of(HARDWARE), HARDWARE) == json.loads(json.dumps(found))
    assert not measurement.partial.exists() and found["warnings"] == []
    assert found["products"]["rates"]["bfloat16"]["median"] == pytest.approx(1e12, rel=1e-3)
    assert found["products"]["rates"]["float32"]["median"] == pytest.approx(2e11, rel=1e-3)
    assert found["bandwidth"]["median"] == pytest.approx(1e11, rel=1e-3)
    assert found["attention"]["window"]["sdpa_causal"] == "wrong: relative error 5.0e-01"
    assert found["attention"]["full"]["flex"]["forward"]["median"] * 3 == pytest.approx(
        found["attention"]["full"]["flex"]["both"]["median"], rel=1e-3
    )
    assert found["model_products"][0]["rate"]["median"] == pytest.approx(1e12, rel=1e-3)
    assert [(trial["depth"], trial["rows"]) for trial in found["trials"]] == device.tried
    assert any("train.py at depth" in text for text, _ in said) and all(left > 0 for _, left in said)
    defaults = calibration.defaults()
    assert defaults.depth == found["settings"]["depth"] and defaults.window_pattern == "SSSL"
    assert defaults.calibrated.precision == "bfloat16"
    assert defaults.calibrated.attention == {"full": "sdpa_causal", "window": "flex"}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_calibration_goes_on_where_it_was(device, monkeypatch, after):
    whole = measure.Measurement(measure.FULL).run()
    tried = list(device.tried)
    device.tried.clear()
    profile.path_of(HARDWARE).unlink()
    alive = measure.Measurement._try

    def killed(self, trial, attention):
        if len(device.tried) == after:
            raise KeyboardInterrupt
        return alive(self, trial, attention)

    with monkeypatch.context() as patch:
        patch.setattr(measure.Measurement, "_try", killed)
        with pytest.raises(KeyboardInterrupt):
            measure.Measurement(measure.FULL).run()
    assert not profile.path_of(HARDWARE).exists()
    monkeypatch.setattr(bench, "try_precisions", None)  # not again
    again = measure.Measurement(measure.FULL).run()
    assert device.tried == tried and again["settings"] == whole["settings"]


@pytest.fixture
def fa3(monkeypatch):
    """Attention that a backend got from somewhere; it is the fastest."""
    work = Bench.attention
    monkeypatch.setattr(Bench, "attentions", ("fa3", "sdpa_causal"))
    monkeypatch.setattr(Bench, "attention_provider", "kernels a/b@0123")
    monkeypatch.setattr(Bench, "attention_error", lambda *_: 1e-6)
    monkeypatch.setattr(
        Bench,
        "attention",
        lambda self, name, window, rows, backward: work(
            self, name, window, rows * (1 if name == "fa3" else 3), backward
        ),
    )


def test_the_provider_of_attention_is_part_of_the_profile(device, fa3, monkeypatch):
    found = measure.Measurement(measure.FULL).run()
    assert found["settings"]["attention"] == {"full": "fa3", "window": "fa3"}
    assert found["attention_provider"] == "kernels a/b@0123" == calibration.defaults().calibrated.attention_provider
    assert "fa3 is from kernels a/b@0123" in show.text(found, HARDWARE) and device.fetched == [True]
    found["attention_provider"] = 3
    assert "attention_provider is 3" in profile.impossible(found)


def test_a_provider_of_attention_that_was_not_chosen_is_not_recorded(device, fa3, monkeypatch):
    monkeypatch.setattr(Bench, "attention_error", lambda self, name, window: 1.0 if name == "fa3" else 1e-6)
    found = measure.Measurement(measure.FULL).run()
    assert found["attention_provider"] is None and calibration.defaults().calibrated.attention_provider is None


def test_what_was_measured_with_another_provider_of_attention_is_measured_again(device, fa3, monkeypatch):
    alive = measure.Measurement._try

    def killed(self, trial, attention):
        if device.tried:
            raise KeyboardInterrupt
        return alive(self, trial, attention)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure.Measurement, "_try", killed)
        measure.Measurement(measure.FULL).run()
    first = list(device.tried)
    monkeypatch.setattr(Bench, "attention_provider", "library sha256:abc")
    found = measure.Measurement(measure.FULL).run()
    assert device.tried[1:2] == first and found["attention_provider"] == "library sha256:abc"


def test_what_an_interrupted_calibration_of_another_kind_left_is_not_used(device):
    measurement = measure.Measurement(measure.FULL)
    measurement.results["free_memory"] = 1
    measurement._keep()
    assert "free_memory" in measure.Measurement(measure.FULL).results
    assert "free_memory" not in measure.Measurement(measure.QUICK).results
    assert "free_memory" not in measure.Measurement(measure.FULL, fresh=True).results
    measurement.partial.write_text('{"format"')
    assert "free_memory" not in measure.Measurement(measure.FULL).results


def test_another_program_on_the_device_is_seen_in_the_spread_and_said(device, monkeypatch):
    alive = measure.Measurement._try

    def disturbed(self, trial, attention):
        completed, matrices = alive(self, trial, attention)
        wide = {"median": completed.rate, "low": completed.rate / 2, "high": 1.1 * completed.rate, "n": 5}
        return dataclasses.replace(completed, tokens_per_second=wide), matrices

    monkeypatch.setattr(measure.Measurement, "_try", disturbed)
    warnings = measure.Measurement(measure.FULL).run()["warnings"]
    assert any("train.py at depth" in text and "Is another program using the device" in text for text in warnings)


def test_a_busy_machine_is_told(device, monkeypatch):
    monkeypatch.setattr(measure.Measurement, "spent", 0.0)
    measurement = measure.Measurement(measure.FULL)
    measurement.begun -= 1e6  # so that it does not matter how long this test takes
    measurement.others -= 0.5e6 * (os.cpu_count() or 1)
    warnings = measurement.run()["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith("other programs took 50% of the processors' time")


def test_memory_that_runs_out_leads_to_smaller_defaults(device):
    device.simulated = dataclasses.replace(M4, free=1.0 * GIB, a_row=30)
    found = measure.Measurement(measure.FULL).run()
    assert found["trials"][0]["failed"] == "out of memory"
    assert found["settings"]["depth"] < found["trials"][0]["depth"]


def test_a_device_on_which_nothing_runs(device):
    device.simulated = dataclasses.replace(M4, free=0.1 * GIB)
    with pytest.raises(measure.CalibrationError, match="not even depth 1 with 1 rows .* out of memory"):
        measure.Measurement(measure.FULL).run()
    assert not profile.path_of(HARDWARE).exists()


def test_when_time_is_up_it_says_what_was_left_out(device, monkeypatch):
    monkeypatch.setattr(measure.Measurement, "spent", property(lambda self: 410.0 + 20 * len(device.tried)))
    found = measure.Measurement(measure.FULL).run()
    assert len(found["trials"]) == 1 and "there was no time to try depth" in found["cut_short"]


def test_a_precision_remembered_from_a_busier_hour_is_not_kept(device, monkeypatch):
    monkeypatch.setattr(bench, "choose_precision", lambda tried: "float16")
    assert measure.Measurement(measure.FULL).run()["settings"]["precision"] == "float16"
    assert device.loaded == [None, "float16"]


def test_measurements_that_cannot_be_are_refused(device, monkeypatch):
    monkeypatch.setattr(measure.Measurement, "_bandwidth", lambda self: spread(float("inf")))
    with pytest.raises(measure.CalibrationError, match="can't be right: bandwidth is .* --fresh"):
        measure.Measurement(measure.FULL).run()


def test_a_trials_spread_is_at_least_the_drift_of_the_products():
    def found(high):
        rates = {"bfloat16": {"median": 10.0, "low": 8.0, "high": high, "n": 9}}
        trial = {"tokens_per_second": {"median": 100.0, "low": 90.0, "high": 130.0, "n": 5}}
        return {
            "settings": {"precision": "bfloat16"},
            "products": {"rates": rates},
            "trials": [trial, {"failed": "no"}],
        }

    trial, failed = measure.drifting(found(12.0))
    assert trial["tokens_per_second"] == {"median": 100.0, "low": 83.333, "high": 130.0, "n": 5}
    assert failed == {"failed": "no"}
    assert measure.drifting(found(8.0))[0]["tokens_per_second"]["low"] == 90.0


def test_rounds_of_a_measurement_become_one():
    def one(median, low, high, n):
        return {"median": median, "low": low, "high": high, "n": n}

    first = {"a": one(2.0, 1.0, 3.0, 3), "b": ["text", one(1.0, 1.0, 1.0, 1)], "c": 5}
    later = {"a": one(4.0, 3.5, 5.0, 1), "b": ["text", one(2.0, 2.0, 2.0, 1)], "d": one(1.0, 1.0, 1.0, 1)}
    assert measure.merged(first, later) == {
        "a": one(2.5, 1.0, 5.0, 4),
        "b": ["text", one(1.5, 1.0, 2.0, 2)],
        "c": 5,
        "d": one(1.0, 1.0, 1.0, 1),
    }


def test_a_trial_that_hangs_is_given_up(real, monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    failed, _ = real._try(rule.Trial(1, 1, 2048, "L", "float32"), ATTENTION)
    assert failed.failed == "not done after 300 s"


def test_trials_that_all_hang_end_a_calibration(device, monkeypatch):
    tried = []

    def hangs(self, trial, attention):
        tried.append(trial)
        return rule.Failed(**vars(trial), free_memory=GIB, failed=measure.NOT_DONE), []

    monkeypatch.setattr(measure.Measurement, "_try", hangs)
    with pytest.raises(measure.CalibrationError, match="train.py does not run here: not done after 300 s"):
        measure.Measurement(measure.FULL).run()
    assert len(tried) == measure.MOST_SLOW


def test_after_a_failure_it_starts_again(device):
    device.simulated = dataclasses.replace(M4, free=0.1 * GIB)
    with pytest.raises(measure.CalibrationError):
        measure.Measurement(measure.FULL).run()
    device.simulated = M4
    assert measure.Measurement(measure.FULL).run()["settings"]["depth"] >= 2


@pytest.mark.parametrize(
    "stderr, status, reason",
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", 1, "out of memory"),
        ("RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp", 1, "out of memory"),
        ("", -9, "killed by signal 9"),
        ("Traceback\nValueError: no", 1, "ValueError: no"),
        ("", 3, "exit status 3"),
        ("OSError: [Errno 24] no\nx.py:3: UserWarning: old\n  warnings.warn(", 1, "OSError: [Errno 24] no"),
        ("RuntimeError: an illegal memory access", 1, "RuntimeError: an illegal memory access"),
    ],
)
def test_why_a_trial_failed(stderr, status, reason):
    assert measure.reason_of(SimpleNamespace(stderr=stderr, returncode=status)).startswith(reason)


def test_a_trial_sees_no_settings_of_the_users(monkeypatch):
    for name in ("SEED", "BUDGET", "RESULT", "DATA", "DEVICE"):
        monkeypatch.setenv(f"AUTORESEARCH_{name}", "1")
    monkeypatch.delenv("AUTORESEARCH_FA3_LIBRARY", raising=False)  # which it would keep
    found = measure.environment(AUTORESEARCH_PROFILE="p")
    assert {name for name in found if name.startswith("AUTORESEARCH_")} == {
        "AUTORESEARCH_HOME",
        "AUTORESEARCH_DEVICE",
        "AUTORESEARCH_PROFILE",
    }


# --- the command


def test_show(device, capsys):
    found = measure.Measurement(measure.FULL).run()
    assert command.main(["show"]) == 0
    text = capsys.readouterr().out
    for part in (
        "nvidia-rtx-3090-24gb with sdpa",
        profile.tag(found),
        "matrix products",
        "bfloat16: 1 TFLOP/s ± 0%",
        "memory bandwidth: 100 GB/s",
        "* flex",
        "wrong: relative error",
        "train.py for a few seconds",
        f"depth: {found['settings']['depth']}",
        "because",
    ):
        assert part in text
    assert "STALE" not in text and "WARNING" not in text
    assert command.main(["show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_show_names_what_is_stale(device, capsys, monkeypatch):
    measure.Measurement(measure.FULL).run()
    monkeypatch.setattr(profile, "baseline", lambda: "another")
    monkeypatch.setattr(backends, "identify", lambda: dataclasses.replace(HARDWARE, versions={"torch": "2.14"}))
    command.main(["show"])
    text = capsys.readouterr().out
    assert "STALE: made with torch 2.13.0, here is 2.14" in text and "measured with a different train.py" in text


def test_show_before_a_calibration(device):
    with pytest.raises(profile.ProfileError, match="is not calibrated; run: python -m calibration"):
        command.main(["show"])


def test_the_command_calibrates_and_prints(device, capsys):
    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert "min left)" in text and "defaults" in text and str(profile.path_of(HARDWARE)) in text


def test_the_command_goes_on_after_an_interruption(device, capsys, monkeypatch):
    def interrupted(self, trial, attention):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure.Measurement, "_try", interrupted)
        assert command.main([]) == 130
    assert "the same command continues from here" in capsys.readouterr().err
    assert command.main([]) == 0
    assert "continuing an interrupted calibration" in capsys.readouterr().out


# --- the real train.py


@pytest.fixture
def real(monkeypatch):
    """What `_try` needs of a Measurement, on this machine; quick, with a rate of products made up."""
    pytest.importorskip("torch")
    monkeypatch.setenv("AUTORESEARCH_BACKEND", "sdpa")
    measurement = measure.Measurement(measure.QUICK)
    measurement.backend = SimpleNamespace(free_memory=lambda: 8 * GIB)
    measurement.results["round"] = {"products": {"square": 256, "rates": {"float32": spread(1e11)}}}
    return measurement


ATTENTION = {"full": "sdpa_causal", "window": "sdpa_blocks"}


def test_probes_in_trials_are_kept_where_a_clock_rate_goes_with_them(real, monkeypatch):
    told = [(0.0030, 1.9e9), (0.0032, 1.7e9), (0.0060, 1.9e9), (0.0030, None), (None, None)]
    probes = iter([dict(probe=probe, clock_rate=rate, size=512) for probe, rate in told])

    def run(command, **_):
        result = {"tokens_per_second": [1.0] * 3, "peak_memory": 1, "num_params": 1, "flops_per_token": 1.0}
        result |= {"matrices": [], "rows_at_once": 1, "probe": next(probes)}
        storage.write_json(pathlib.Path(command[3]), result)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(measure.subprocess, "run", run)
    for _ in range(5):
        assert isinstance(real._try(rule.Trial(1, 1, 4096, "L", "float32"), ATTENTION)[0], rule.Completed)
    assert [probe["probe"] for probe in real.results["probes"]] == [0.0030, 0.0032, 0.0060]


@pytest.mark.parametrize("size, kept", [(512, 0.0032), (1024, 0.0004), (256, None)])
def test_a_profile_has_the_probe_of_fewest_cycles_of_the_size_that_runs_take(device, monkeypatch, size, kept):
    one = {"probe": 0.0030, "clock_rate": 1.9e9, "size": 512}
    probes = [one, one | {"probe": 0.0032, "clock_rate": 1.7e9}, one | {"probe": 0.0004, "size": 1024}]
    monkeypatch.setattr(disturbance, "product_size", lambda peak: size)
    measurement = measure.Measurement(measure.FULL)
    measurement.results["probes"] = probes
    made = measurement.run()
    assert "probes" not in made and made.get("probe", {}).get("probe") == kept


def test_a_trial_runs_the_real_train_py(real):
    trial, matrices = real._try(rule.Trial(1, 1, 4096, "L", "float32"), ATTENTION)
    assert isinstance(trial, rule.Completed), trial
    assert trial.rate > 0 and trial.tokens_per_second["n"] >= 3 and trial.peak_memory > 2**27
    assert "probes" not in real.results  # of a CPU
    assert [8192, 128] in matrices and [512, 128] in matrices
    assert trial.num_params > 2e6 and trial.flops_per_token == 6 * (12 * 128**2 + 8192 * 128 + 32) + 12 * 128 * 2048


def test_a_step_that_waited_for_the_one_before_makes_no_rate_of_its_own():
    """40 steps of 0.1 s; at every fourth the clock waits for all that the device has, and the next is short."""
    took = [0.17, 0.03, 0.1, 0.1] * 10
    assert rates(1000, took) == pytest.approx([10_000] * 5)
    assert rates(1000, [0.5, 1.0, 1.0]) == pytest.approx([2000, 1000, 1000])


def test_a_trial_that_fails_says_why(real, monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("raise ValueError('an edit')\n")
    monkeypatch.setattr(profile, "TRAIN", tmp_path / "train.py")
    monkeypatch.setenv("PYTHONPATH", str(measure.Path(measure.__file__).resolve().parents[1]))
    sub = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **k: sub(
            [
                command[0],
                "-c",
                "import sys, runpy\nfrom pathlib import Path\nfrom calibration import trial\n"
                f"trial.TRAIN = Path({str(tmp_path / 'train.py')!r})\ntrial.main(Path(sys.argv[1]), 1.0)",
                *command[3:],
            ],
            **k,
        ),
    )
    failed, matrices = real._try(rule.Trial(1, 1, 2048, "L", "float32"), ATTENTION)
    assert failed.failed == "ValueError: an edit" and failed.free_memory == 8 * GIB and matrices == []


@pytest.mark.slow
def test_a_quick_calibration_of_this_machine(isolated_home):
    done = subprocess.run(
        [sys.executable, "-m", "calibration", "--quick"],
        cwd=profile.TRAIN.parent,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "defaults" in done.stdout and len(list((isolated_home / "profiles").glob("*.json"))) == 1
