"""Steps as CUDA graphs: the same training as without them, and what happens where they can't be had."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.pytorch import runtime  # noqa: E402
from tests.backends import tiny  # noqa: E402
from tests.backends.support import opened  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA runs on")


@pytest.fixture
def backend(monkeypatch):
    """Compiled and captured; what a test turns off is on again after it."""
    found = opened("sdpa", "float32", compiled=True)
    for name in ("compiled", "by_layer", "captured"):
        monkeypatch.setattr(runtime, name, True)
    monkeypatch.setattr(runtime, "attention", runtime.attention)
    return found


def warm(backend, loss=None, optimizer=None, batch=None):
    model = tiny.build(backend)
    names = list(backend.weights(model))
    optimizer = optimizer or [
        tiny.adam(backend, [n for n in names if n != "scale"], stack=True),
        tiny.descent(["scale"]),
    ]
    trainer = backend.Trainer(model, loss or tiny.loss(backend), optimizer)
    trainer.warm_up(*(batch or tiny.batch()))
    return model, trainer, optimizer


def trained(backend, steps=6, **how):
    """(losses, weights) of some steps, of two passes each, with rates that change."""
    model, trainer, optimizer = warm(backend, **how)
    losses = []
    for step in range(steps):
        for seed in (2 * step, 2 * step + 1):
            losses.append(trainer.backward(*tiny.batch(seed=seed), 0.5))
        trainer.step(tiny.schedule(optimizer, 1 / (1 + step)))
    return np.array([float(loss) for loss in losses]), backend.weights(model)


def test_the_same_training_as_without_graphs(backend, monkeypatch, capsys):
    losses, weights = trained(backend)
    assert backend.warmed_up["captured"] and "one kernel at a time" not in capsys.readouterr().out
    monkeypatch.setattr(runtime, "captured", False)
    wanted_losses, wanted = trained(backend)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)  # read at the end: none was overwritten
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, wanted[name], rtol=1e-3, atol=1e-5)


def test_kernels_are_launched_together(backend):
    _, trainer, optimizer = warm(backend)
    with torch.profiler.profile() as profile:
        trainer.backward(*tiny.batch())
        trainer.step(tiny.schedule(optimizer))
        backend.synchronize()
    launched = sum(event.count for event in profile.key_averages() if event.key == "cudaLaunchKernel")
    graphs = sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")
    assert graphs >= 3 and launched < 20, (graphs, launched)


def test_what_the_loss_reads_of_the_file_may_change(backend):
    weight = {"of": 1.0}
    plain = tiny.loss(backend)
    model, trainer, _ = warm(backend, loss=lambda model, x, y: weight["of"] * plain(model, x, y))
    once = float(trainer.backward(*tiny.batch()))
    weight["of"] = 3.0
    assert float(trainer.backward(*tiny.batch())) == pytest.approx(3 * once, rel=1e-5)


def test_dropout_draws_anew_in_each_pass(backend):
    plain, ops = tiny.loss(backend), backend.ops

    def loss(model, x, y):
        return plain(model, x, y) + ops.sum(ops.uniform((1,), key=(0, 3))) * ops.sum(model.scale + 1)

    _, trainer, _ = warm(backend, loss=loss)
    drawn = {float(trainer.backward(*tiny.batch())) for _ in range(4)}
    assert len(drawn) == 4


def test_batches_of_other_shapes(backend):
    model, trainer, optimizer = warm(backend)
    for rows in (1, 2, 3, 4):
        captured = float(trainer.backward(*tiny.batch(rows=rows)))
        wanted = float(tiny.loss(backend)(model, *(torch.from_numpy(t).cuda() for t in tiny.batch(rows=rows))))
        assert captured == pytest.approx(wanted, rel=1e-4)
    trainer.step(tiny.schedule(optimizer))


def test_a_value_read_in_the_middle_of_a_step(backend, capsys):
    plain = tiny.loss(backend)

    def loss(model, x, y):
        value = plain(model, x, y)
        return value * (2.0 if float(value) > 0 else 1.0)

    _, trainer, _ = warm(backend, loss=loss)
    assert "does not compile" in capsys.readouterr().out
    assert np.isfinite(float(trainer.backward(*tiny.batch())))


def test_a_driver_without_graphs(backend, monkeypatch, capsys):
    def refused(*_, **__):
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "__new__", refused)
    losses, _ = trained(backend)
    said = capsys.readouterr().out
    assert "one kernel at a time" in said and "operation not supported" in said and "does not compile" not in said
    assert np.isfinite(losses).all() and backend.warmed_up["captured"] is False and runtime.compiled


def test_a_step_that_fails_while_it_is_recorded(backend, monkeypatch, capsys):
    calls = []
    capture_end = torch.cuda.CUDAGraph.capture_end

    def fails(self):
        capture_end(self)
        calls.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fails)
    losses, _ = trained(backend)
    assert calls and "one kernel at a time" in capsys.readouterr().out
    assert np.isfinite(losses).all() and not runtime.captured


def test_memory_too_small_to_record(backend, capsys):
    batch = tiny.batch(rows=1024, length=512)
    _, trainer, _ = warm(backend, batch=tiny.batch(rows=64, length=512))
    share = 4 * runtime.recorded_memory / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        trainer.warm_up(*batch)
        assert "do not fit" in capsys.readouterr().out and trainer.rows_at_once[batch[0].shape] < 1024
        assert np.isfinite(float(trainer.backward(*batch))) and trainer.compiled and trainer.captured
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


MEMORY = """
import json
from backends.pytorch import runtime
from tests.backends import tiny
from tests.backends.support import opened
from tests.backends.test_capture import warm
backend = opened("sdpa", "float32", compiled=True)
runtime.compiled = runtime.by_layer = runtime.captured = True
rows = 8, 256, 504
told = [warm(backend, batch=tiny.batch(rows=n, length=256)) and backend.peak_memory() for n in rows]
print(json.dumps(told))
"""


def test_memory_of_a_step_is_told():
    """What each row adds; cuBLAS's workspace, which is recorded, too, is tens of megabytes whatever the batch. In a new
    process: what others recorded before it leaves the allocator blocks of other sizes."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told[2] - told[1]) / (told[1] - told[0]) == pytest.approx(1, abs=0.25), told


def test_memory_of_the_largest_batch_is_told(backend):
    _, trainer, _ = warm(backend, batch=tiny.batch(rows=504, length=256))
    told = backend.peak_memory()
    trainer.warm_up(*tiny.batch(rows=8, length=256))
    assert backend.peak_memory() >= told
