"""What a run leaves: weights, its report, a sketch of its initial weights."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import Backend, Bigram

import prepare
import results
import storage

from prepare import Clock, Invalid, Loader, evaluate_bpb, report
from results import BY_NAME
from results import MEASURES


# ---- weights and report ----


def test_weights_are_saved_before_anything_else(run, tiny_data, isolated_home):
    backend, model, loader, clock = run
    next(loader)
    backend.calls.clear()
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    assert backend.calls[0] == "save" and (isolated_home / "last" / "weights.safetensors").exists()


def test_weights_lie_beside_the_result_also_of_a_refused_model(run, tiny_data, result, tmp_path):
    backend, model, loader, clock = run
    next(loader)
    model.table[:] = np.nan
    with pytest.raises(Invalid, match="not finite"):
        evaluate_bpb(backend, model, tiny_data, clock=clock)
    assert (tmp_path / "out" / "result.safetensors").exists()
    assert result()["status"] == "invalid" and result()["reason"]["code"] == "not_finite"
    assert result()["total_tokens_M"] == 2 * 2048 / 1e6
    with pytest.raises(RuntimeError, match="nothing to report"):
        report(clock, num_params=1, flops_per_token=1, depth=1)


def test_report(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    clock.tick(5.0)
    bpb = evaluate_bpb(backend, model, tiny_data, clock=clock)
    facts = report(clock, num_params=11_500_000, flops_per_token=1000, depth=4, seed=3)
    lines = capsys.readouterr().out.splitlines()
    keys = [*(measure.name for measure in MEASURES if measure.summary), "budget_seconds", "seed"]
    original = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M
    depth""".split()
    assert keys[: len(original)] == original
    block = [line for line in lines if not line.startswith("note: ")]
    assert block[0] == "---" and [line.split(":")[0] for line in block[1:]] == keys
    assert lines[: len(block)] == block, "notes come last"
    assert lines[1] == f"val_bpb:          {bpb:.6f}" and lines[8] == "num_params_M:     11.5"
    assert lines[9] == "depth:            4" and lines[10] == "device:           fake-1gb"
    assert "trial" in lines[-1]
    written = result()
    assert (written["profile"], written["speed"]) == ("abc", 0.9)
    assert written["attention_provider"] == "library sha256:0123456789ab"
    assert written["status"] == "ok" and written["val_bpb"] == bpb and written["seed"] == 3
    assert written["val_rows"] == tiny_data.eval_rows and written["eval"] == tiny_data.eval_tag
    assert written["tokens_per_second"] == pytest.approx(2 * 2048 / written["training_seconds"])
    assert written["model_tflops"] == pytest.approx(1000 * written["tokens_per_second"] / 1e12)
    assert (written["compiled"], written["rows_at_once"]) == (True, None)
    assert written["mfu_percent"] == pytest.approx(100 * 1000 * written["tokens_per_second"] / 1e9)
    assert written["total_seconds"] >= written["training_seconds"]
    assert facts["val_bpb"] == bpb and set(written) == {"status", *facts} == {"status", "seed", *BY_NAME} - {"joules"}


def test_steps_are_timed(run):
    _, _, loader, clock = run
    for _ in range(2):
        next(loader)
        clock.tick(5.0)
    assert len(clock.took) == 2 and min(clock.took) > 0
    assert sum(clock.took) == pytest.approx(clock.meter.seconds) and clock.meter.seconds <= clock.elapsed


def test_what_is_announced(run, tiny_data, monkeypatch):
    """By `sys.audit`, for the guard of a run: each step of it, and every reading of rows."""
    backend, model, loader, clock = run
    told = []
    monkeypatch.setattr(prepare.sys, "audit", lambda event, *_: told.append(event.partition(".")[2]))
    next(loader)
    clock.tick(5.0)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    report(clock, num_params=1, flops_per_token=1, depth=1)
    assert [event for event in told if event != "rows"] == ["batch", "tick", "evaluate", "scored", "report"]
    told.clear()
    with pytest.raises(Invalid):
        evaluate_bpb(backend, model, tiny_data, clock=clock)
    tiny_data.validation_rows, tiny_data.held_out_rows, tiny_data.train
    assert told == ["evaluate", "refused", "rows", "rows", "rows"]


def test_values_begin_in_the_originals_column(run, tiny_data, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    report(clock, num_params=1, flops_per_token=1, depth=1)
    for line in capsys.readouterr().out.splitlines()[1:]:
        if not line.startswith("note: "):
            name, value = line.split()
            assert line.index(value, len(name)) == max(18, len(name) + 1), line


def test_report_says_that_data_were_repeated(run, tiny_data, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    for epoch in (1, 3):
        loader.epoch = epoch
        facts = report(clock, num_params=1, flops_per_token=1, depth=1)
        assert facts["epochs"] == epoch
        assert ("note: pass 3 of the training data was begun" in capsys.readouterr().out) == (epoch == 3)


def test_report_takes_numbers_of_any_framework(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    extra = {"rate": np.float32(0.5), "layers": np.array(3), "worst": math.nan, "kind": "none"}
    report(clock, num_params=np.int64(2), flops_per_token=np.float32(1), depth=np.int64(2), **extra)
    report(clock, num_params=1, flops_per_token=1, depth=2.0)
    assert "depth:            2.0" in capsys.readouterr().out
    report(clock, num_params=np.int64(2), flops_per_token=np.float32(1), depth=np.int64(2), **extra)
    told = result()
    assert (told["rate"], told["layers"], told["worst"], told["kind"], told["depth"]) == (0.5, 3, None, "none", 2)


def test_a_fact_that_is_none_is_no_reason_to_lose_the_run(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    evaluate_bpb(backend, model, tiny_data, clock=clock)
    extra = {"rates": np.array([1.0, math.nan]), "by": {1: np.float32(2)}, "kind": backend.device.__class__}
    report(clock, num_params=math.nan, flops_per_token=math.nan, depth=math.nan, **extra)
    told = result()
    assert told["status"] == "ok" and told["model_tflops"] is told["mfu_percent"] is told["num_params_M"] is None
    assert told["rates"] == [1, None] and told["by"] == {"1": 2} and "SimpleNamespace" in told["kind"]
    assert "num_params_M:     nan" in capsys.readouterr().out


def test_report_replaces_nothing_measured(run, tiny_data, result, capsys):
    backend, model, loader, clock = run
    next(loader)
    bpb = evaluate_bpb(backend, model, tiny_data, clock=clock)
    claims = {"val_bpb": 0.1, "status": "keep", "training_seconds": 1.0, "eval": "x", "profile": "x", "speed": 2.0}
    report(clock, num_params=1, flops_per_token=1, depth=1, **claims)
    assert result()["val_bpb"] == bpb and result()["status"] == "ok" and result()["speed"] == 0.9
    assert result()["profile"] == "abc"
    assert result()["eval"] == tiny_data.eval_tag and f"val_bpb:          {bpb:.6f}" in capsys.readouterr().out


def test_report_of_a_full_budget_without_a_known_peak(tiny_data, result, capsys):
    backend, model = Backend(peak_flops=None), Bigram(tiny_data)
    backend.device.profile = backend.device.speed = None
    with Loader(tiny_data, 2) as loader:
        clock = Clock(backend, model, loader)
        next(loader)
        evaluate_bpb(backend, model, tiny_data, clock=clock)
        report(clock, num_params=1, flops_per_token=1, depth=1)
    text = capsys.readouterr().out
    assert "budget_seconds" not in text and "trial" not in text and "mfu_percent:      nan" in text
    assert result()["mfu_percent"] is None and result()["budget_seconds"] == 300
    assert "speed:            nan" in text and result()["speed"] is None and result()["profile"] == "none"


def test_what_is_written_whole_is_durable_by_name_too(tmp_path, monkeypatch):
    """The file is flushed before it gets its name, and then the folder."""
    done, real = [], (prepare.os.fsync, prepare.os.replace)
    monkeypatch.setattr(
        prepare.os,
        "fsync",
        lambda file: done.append("folder" if prepare.Path(f"/dev/fd/{file}").is_dir() else "file") or real[0](file),
    )
    monkeypatch.setattr(prepare.os, "replace", lambda *names: done.append("name") or real[1](*names))
    storage.write_json(tmp_path / "a" / "result.json", {})
    assert done == ["file", "name", "folder"]
    storage.sync_folder(tmp_path / "none")


@pytest.mark.parametrize("refuses", [False, True])
def test_where_it_takes_more_the_drive_is_flushed(tmp_path, monkeypatch, refuses):
    """As macOS asks for it; file systems that can't are flushed as elsewhere."""
    asked, flushed = [], []

    def control(descriptor, what):
        asked.append(what)
        if refuses:
            raise OSError(45, "not supported")

    monkeypatch.setattr(storage, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    monkeypatch.setattr(prepare.os, "fsync", flushed.append)
    storage.write_json(tmp_path / "result.json", {})
    assert asked == [51, 51] and len(flushed) == (2 if refuses else 0), "the file and its folder"


def test_result_on_a_full_disk(tmp_path):
    code = """
import resource, storage
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    storage.write_json(Path("result.json"), {"status": "ok", "val_bpb": 1.0})
except storage.DataError as error:
    print(error)
"""
    root = str(prepare.__file__).rpartition("/")[0]
    ended = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"], cwd=tmp_path,
                           capture_output=True, text=True)  # fmt: skip
    assert "could not write result.json" in ended.stdout and not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


# ---- initial weights ----


def start(seed, share=1.0, nudge=0.0):
    """Ten parameters; of `share` of them the values are drawn with this seed, of the others always the same ones."""
    draw = np.random.default_rng
    return {
        f"p{i}": draw(i + 100 * seed * (i < 10 * share)).normal(size=(64, 100)).astype(np.float32)
        * np.float32(1 + nudge * seed)
        for i in range(10)
    } | {"gain": np.ones(64, np.float32), "zero": np.zeros((4, 4), np.float32), "none": np.zeros(0, np.float32)}


def test_two_draws_are_apart_and_one_that_is_nudged_is_not():
    def between(**how):
        sketches = [prepare.sketch(start(seed, **how)) for seed in range(1, 9)]
        assert sketches == [prepare.sketch(start(seed, **how)) for seed in range(1, 9)] and len(sketches[0]) == 48
        return [results.apart(a, b) for a, b in itertools.combinations(sketches, 2)]

    assert 0.35 < min(between()) and max(between()) < 2 and np.mean(between()) == pytest.approx(1, abs=0.15)
    assert min(between(share=0.7)) > 0.2, "a fixed start of some parameters is fine"
    assert max(between(share=0.0)) == 0 and max(between(share=0.0, nudge=1e-7)) < 1e-3
    assert results.apart("", "00") == 0 and results.apart("none", "other") == 1


def test_a_runs_losses_are_told_as_means_of_few_parts():
    told = prepare.curve_of([float(step) for step in range(1, 65)])
    assert len(told) == 32 and told["0.03125"] == 1.5 and told["1"] == 63.5
    assert prepare.curve_of([3.0, 2.0]) == {"0.5": 3.0, "1": 2.0} and prepare.curve_of([]) == {}
