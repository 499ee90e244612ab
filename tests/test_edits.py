"""Edits of train.py are portable: every patch in tests/edits trains, and trains alike, on every backend.

A patch is what an experiment leaves behind: `git diff -U1 train.py`. Its `main` runs, for a few steps and on the same
few rows, between stand-ins for clock, loader and evaluation. Two backends are compared from the same weights, none of
them zero (with projections of zero some gradients are rounding noise, which the optimizers blow up), in float32.
"""

import itertools
import linecache
import math
import os
import re
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import test_train

import backends
import calibration
import prepare
from backends import surface
from tests.backends.support import opened

ROOT = Path(__file__).resolve().parents[1]
EDITS = sorted(path.stem for path in (ROOT / "tests" / "edits").glob("*.patch"))
ROWS, LENGTH, STEPS = 2, 64, 4
PREFIXES = (1, 7, LENGTH)
NOISE = 0.1  # standard deviation of what is added to the initial weights

# How far apart two backends may be. In brackets, what MLX and PyTorch on one CPU came to, the worst of all edits.
SAME_GRADIENT = 5e-5  # of a parameter's, relative to its norm or 1e-4 of the whole gradient's (6.7e-6)
SAME_LOSS = 1e-4  # of each step, relative (3e-6)
SAME_WEIGHTS = 1e-2  # of a parameter after all steps, relative to the way it went (5e-3)
OTHER_LOSS = 3e-3  # an edit changes some step's loss, or the logits, by more than this, relative (at least 4e-2)


class Run(NamedTuple):
    """Some steps of training, and the logits afterwards, of what the file gives to the evaluator."""

    gradients: dict[str, np.ndarray]  # of the first step
    losses: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    logits: dict[int, np.ndarray]  # of the rows' first tokens, by how many


class Rows:
    """A loader that gives the same rows again and again. `taken`, `trained`: how many were."""

    epoch, taken, trained = 1, 0, 0

    def __init__(self, x, y, batch_size):
        self.x, self.y, self.batch_size = x, y, batch_size

    def __next__(self):
        places = np.arange(self.taken, self.taken + self.batch_size) % len(self.x)
        self.taken += self.batch_size
        return self.x[places], self.y[places]


class Clock:
    """Ends training after STEPS steps, at half of the progress, and keeps what was seen."""

    running, steps, loss = False, 0, None

    def __init__(self):
        self.losses, self.gradients = [], {}

    def started(self, backend, model, loader):
        self.running, self.before, self.loader = True, backend.weights(model), loader
        return self

    @property
    def progress(self):
        return 0.5 * self.steps / STEPS

    @property
    def finished(self):
        return self.steps == STEPS

    def tick(self, loss):
        self.loss, self.steps = float(loss), self.steps + 1
        self.losses.append(self.loss)
        return 1.0


def patched(edit: str, source: str) -> str:
    """The text of train.py, `source`, with this edit applied."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "train.py"
        path.write_text(source, encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        # Within a repository git would pass over a file that is not where the patch says, and call that success.
        environment["GIT_CEILING_DIRECTORIES"] = str(path.parents[1])
        done = subprocess.run(
            ["git", "apply", str(ROOT / "tests" / "edits" / f"{edit}.patch")],
            cwd=path.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        result = path.read_text(encoding="utf-8")
    if done.returncode or result == source:
        pytest.fail(
            f"tests/edits/{edit}.patch does not apply to train.py any more. Rebase the patch: make its edit in "
            f"train.py, `git diff -U1 train.py > tests/edits/{edit}.patch`, take the edit out.\n{done.stderr}"
        )
    return result


def source_of(edit: str | None) -> str:
    """train.py, edited."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    return patched(edit, source) if edit else source


def shrunk(source: str) -> str:
    """train.py at test_train.py's small sizes, with one pass of all rows to a step."""
    sizes = {
        "DEVICE_BATCH_SIZE = .*": f"DEVICE_BATCH_SIZE = {ROWS}",
        "TOTAL_BATCH_SIZE = .*": f"TOTAL_BATCH_SIZE = {ROWS * LENGTH}",
    }
    for pattern, text in {**test_train.SMALL, **sizes}.items():
        source, found = re.subn(f"(?m)^{pattern}$", text, source)
        assert found, f"{pattern} is not in train.py"
    # Most of what a step of so small a model takes; an edit may have no Muon.
    return re.sub("(?m)^MUON_STEPS = 5 ", "MUON_STEPS = 2 ", source)


def executed(source: str, backend) -> ModuleType:
    """This train.py as a module on `backend`, for rows of LENGTH tokens."""
    module, filename = ModuleType("train_here"), f"<train.py {zlib.crc32(source.encode()):x}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename  # so that it can be read
    sizes = calibration.Defaults(4, 2, 2**13, "SSSL")
    with (
        mock.patch.object(backends, "load", lambda **_: backend),
        mock.patch.object(prepare, "MAX_SEQ_LEN", LENGTH),
        mock.patch.object(calibration, "defaults", lambda: sizes),
    ):
        exec(compile(source, filename, "exec"), vars(module))
    return module


def initialised(train, vocab_size):
    """(model, initial weights) of this train.py."""
    model = train.GPT(train.DEPTH, vocab_size)
    shapes = train.backend.shapes(model)
    weights = train.initial_weights(shapes, 42)
    train.backend.set_weights(model, weights)
    return model, weights


@contextmanager
def one_thread():
    """For PyTorch: where another process keeps a core busy, two threads wait for each other 100 times as long as these
    small matrices take."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    try:
        if torch:
            torch.set_num_threads(1)
        yield
    finally:
        if torch:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(tiny_home):
    """(x, y, size of the vocabulary): rows of real tokens, int32 (ROWS, LENGTH), of two documents each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(tiny_home))
        data = prepare.open_data("tiny")
    parts = []
    for row in np.asarray(data.held_out_rows, np.int32):  # around where its second document begins
        start = np.flatnonzero(row == data.bos)[1:2] - LENGTH // 3
        parts += [row[i : i + LENGTH + 1] for i in start if i + LENGTH < len(row)]
    tokens = np.stack(parts[:ROWS])
    return tokens[:, :-1].copy(), tokens[:, 1:].copy(), data.vocab_size


def noise(name, shape):
    """Drawn for each parameter by itself, so that an edit which adds one doesn't change the others'."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def trained(rows):
    """trained(edit, name of a backend) -> Run; each once. Skips the test if that backend can't run."""
    runs = {}
    x, y, vocab_size = rows

    def train_here(edit, name):
        backend = opened(name, "float32")
        if (edit, name) not in runs:
            with one_thread():
                runs[edit, name] = run(executed(shrunk(source_of(edit)), backend))
        return runs[edit, name]

    def run(train):
        backend, weights = train.backend, train.initial_weights
        noisy = lambda *given: {name: w + NOISE * noise(name, w.shape) for name, w in weights(*given).items()}  # noqa: E731
        data = SimpleNamespace(name="a few rows", vocab_size=vocab_size)
        clock = Clock()

        class Watched(backend.Trainer):
            def backward(self, x, y, scale=1.0):
                clock.loader.trained += len(x)
                return super().backward(x, y, scale)

            def step(self, schedule):
                if clock.running and not clock.gradients:
                    clock.gradients = self.gradients()
                super().step(schedule)

        def evaluate(backend, model, data, **_):
            clock.after = backend.weights(model)
            clock.logits = {length: backend.logits(model, x[:, :length].copy()) for length in PREFIXES}

        with (
            mock.patch.object(train, "initial_weights", noisy),
            mock.patch.object(backend, "Trainer", Watched),
            mock.patch.object(prepare, "MAX_SEQ_LEN", LENGTH),
            mock.patch.object(prepare, "open_data", lambda: data),
            mock.patch.object(prepare, "Loader", lambda _, batch_size: Rows(x, y, batch_size)),
            mock.patch.object(prepare, "Clock", clock.started),
            mock.patch.object(prepare, "evaluate_bpb", evaluate),
            mock.patch.object(prepare, "report", lambda *_, **__: None),
        ):
            train.main()
        assert clock.loader.trained == clock.loader.taken, "what a run takes is counted as what it trains on"
        return Run(clock.gradients, np.array(clock.losses), clock.before, clock.after, clock.logits)

    return train_here


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def apart(one, other) -> float:
    """The largest relative difference of two curves."""
    return np.abs(one / other - 1).max()


# ---- Every edit ----


def test_there_are_edits():
    assert len(EDITS) >= 20


@pytest.mark.parametrize("edit", EDITS)
def test_keeps_to_the_surface(edit):
    assert surface.check(source_of(edit)) == []


def test_a_patch_that_does_not_apply_asks_to_be_rebased():
    source = source_of(None).replace("ops.square(ops.relu(", "ops.silu((")
    with pytest.raises(pytest.fail.Exception, match=r"gelu.patch does not apply .* Rebase (?s:.*)error: "):
        patched("gelu", source)


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("edit", EDITS)
def test_learns(trained, edit, name):
    losses = trained(edit, name).losses
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("edit", EDITS)
def test_changes_something(trained, edit, name):
    edited, unedited = trained(edit, name), trained(None, name)
    logits = edited.logits[LENGTH] - unedited.logits[LENGTH]
    assert apart(edited.losses, unedited.losses) > OTHER_LOSS or norm(logits) > OTHER_LOSS * norm(
        unedited.logits[LENGTH]
    )


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("edit", EDITS)
def test_looks_only_back(trained, edit, name):
    """Logits don't depend on the tokens that follow, and the first position does without any before it."""
    logits = trained(edit, name).logits
    for length in PREFIXES:
        np.testing.assert_allclose(logits[length], logits[LENGTH][:, :length], atol=1e-4)


@pytest.mark.parametrize("one, other", list(itertools.combinations(backends.NAMES, 2)))
@pytest.mark.parametrize("edit", EDITS)
def test_backends_agree(trained, edit, one, other):
    ours, theirs = trained(edit, one), trained(edit, other)
    assert ours.gradients.keys() == theirs.gradients.keys()
    whole = norm([norm(gradient) for gradient in ours.gradients.values()])
    for name, gradient in ours.gradients.items():
        assert norm(gradient) > 0, name
        assert norm(gradient - theirs.gradients[name]) <= SAME_GRADIENT * max(norm(gradient), 1e-4 * whole), name
    assert apart(ours.losses, theirs.losses) < SAME_LOSS
    for name, after in ours.after.items():
        assert norm(after - theirs.after[name]) <= SAME_WEIGHTS * norm(after - ours.before[name]), name


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("edit", EDITS)
def test_starts_as_it_should_at_real_sizes(rows, edit, name):
    """The evaluator wants of an untrained model that every token is about as likely."""
    x, y, vocab_size = rows
    train = executed(source_of(edit), opened(name, "float32"))
    with one_thread():
        model, weights = initialised(train, vocab_size)
        losses = train.backend.losses(model, x, y)
    assert losses.mean() == pytest.approx(math.log(vocab_size), rel=0.02)
    shapes = {name: weight.shape for name, weight in weights.items()}
    matrices = sum(weight.size for name, weight in weights.items() if name.endswith(".weight"))
    assert train.flops_per_token(model, shapes) > 2 * matrices


# ---- As a user runs them ----

train, home = test_train.train, test_train.home  # the fixtures


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["adamw", "smear"])
def test_an_experiment_from_end_to_end_on_mlx(train, tmp_path, monkeypatch, edit):
    opened("mlx", "float32")  # skips where it can't run
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "train.py").write_text(source_of(edit), encoding="utf-8")
    path = test_train.python_path()
    monkeypatch.setattr(test_train, "ROOT", tmp_path / "tree")  # where the fixture takes train.py from
    done, result = train(AUTORESEARCH_BACKEND="mlx", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert result["status"] == "ok" and result["backend"] == "mlx" and result["num_steps"] >= 1
    assert 0 < result["val_bpb"] < 8
