"""train.py as a user runs it: a process of its own, with edits as an experiment makes them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BACKEND = "sdpa" if importlib.util.find_spec("torch") else "mlx"
ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "DEPTH = .*": "DEPTH = 2",
    "ASPECT_RATIO = .*": "ASPECT_RATIO = 32",
    "HEAD_DIM = .*": "HEAD_DIM = 32",
    "DEVICE_BATCH_SIZE = .*": "DEVICE_BATCH_SIZE = 1",
    "TOTAL_BATCH_SIZE = .*": "TOTAL_BATCH_SIZE = 4096",
}
SUMMARY = [
    "val_bpb",
    "training_seconds",
    "total_seconds",
    "peak_vram_mb",
    "mfu_percent",
    "total_tokens_M",
    "num_steps",
    "num_params_M",
    "depth",
    "device",
    "backend",
    "profile",
    "eval",
    "data",
    "tokens_per_second",
]


def python_path() -> str:
    """This checkout before whatever else is searched for modules."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_home):
    """An `AUTORESEARCH_HOME` of these tests, where what a backend tried may be left for the next."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").symlink_to(tiny_home / "data")
    return folder


@pytest.fixture
def train(tmp_path, home):
    """train(edits, **environment) -> (finished process, the result written as JSON or None)."""

    def run(edits=None, **environment):
        source = (ROOT / "train.py").read_text()
        for pattern, text in {**SMALL, **(edits or {})}.items():
            source, found = re.subn(rf"(?m)^{pattern}$" if pattern in SMALL else pattern, lambda _: text, source)
            assert found, f"{pattern} is not in train.py"
        (tmp_path / "train.py").write_text(source)
        result = tmp_path / "result.json"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AUTORESEARCH_")}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "train.py")],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={
                **clean,
                "PYTHONPATH": python_path(),
                "TORCH_COMPILE_DISABLE": "1",
                "AUTORESEARCH_HOME": str(home),
                "AUTORESEARCH_BACKEND": BACKEND,
                "AUTORESEARCH_RESULT": str(result),
                "AUTORESEARCH_BUDGET": "1",
                **environment,
            },
        )
        return done, json.loads(result.read_text()) if result.exists() else None

    return run


def test_an_experiment_from_end_to_end(train, tmp_path):
    done, result = train({"(?m)^WARMDOWN_RATIO = .*": "WARMDOWN_RATIO = 0.0"})  # as anything else may be
    assert done.returncode == 0, done.stderr
    keys = [line.split(":")[0] for line in done.stdout.partition("---\n")[2].splitlines()]
    assert keys[: len(SUMMARY)] == SUMMARY
    assert result["status"] == "ok" and result.keys() >= set(SUMMARY) - {"val_bpb"} | {"val_rows", "epochs"}
    assert 0 < result["val_bpb"] < 8 and result["num_steps"] >= 1 and result["depth"] == 2
    assert result["total_tokens_M"] == pytest.approx(result["num_steps"] * 4096 / 1e6)
    assert result["training_seconds"] >= 1 and result["budget_seconds"] == 1
    assert (tmp_path / "result.safetensors").exists()


def test_a_batch_size_that_does_not_divide(train):
    done, result = train({"(?m)^TOTAL_BATCH_SIZE = .*": "TOTAL_BATCH_SIZE = 5000"})
    assert done.returncode and result is None
    assert "TOTAL_BATCH_SIZE 5000 is not a multiple of DEVICE_BATCH_SIZE 1 x 2048" in done.stderr


def test_a_seed_that_is_no_number_is_told_in_one_line(train):
    done, result = train({}, AUTORESEARCH_SEED="abc")
    assert done.returncode == 1 and result is None
    assert done.stderr.strip() == "Stop: AUTORESEARCH_SEED must be a whole number from 0 on, not 'abc'"


def test_a_diverging_loss_stops_the_run(train):
    loss = "return ops.mean_loss("
    done, result = train({re.escape(loss): loss.replace("return", "return 1000 *")}, AUTORESEARCH_BUDGET="60")
    assert done.returncode and result["status"] == "crash" and result["num_steps"] == 1
    assert result["reason"]["code"] == "diverged" and "the loss is" in done.stderr


def test_two_heads_are_refused(train):
    second = "    def forward(self, tokens):\n        return self.lm_head(self.hidden(tokens))\n\n"
    done, result = train({r"    @ops.fusable\n    def logits": f"{second}    @ops.fusable\n    def logits"})
    assert done.returncode and result is None and "GPT has two heads" in done.stderr


def test_a_parameter_without_a_group_is_named(train):
    gain = "        self.lm_head = nn.Linear(width, vocab_size)\n"
    done, result = train({re.escape(gain): f"{gain}        self.gain = nn.Parameter((width,))\n"})
    assert done.returncode and result is None
    assert "gain is in no group: in optimizer_groups of train.py" in done.stderr and 'adamw(["gain"]' in done.stderr


def test_a_model_that_looks_ahead_is_refused(train):
    peek = "x = x0 = ops.rms_norm(self.wte(tokens))"
    done, result = train({re.escape(peek): f"{peek}\n        x = x + ops.concat([x[:, 1:], x[:, :1]], axis=1)"})
    assert done.returncode and result["status"] == "invalid" and result["reason"]["code"] == "looks_ahead"


def test_a_warm_start_is_refused(train):
    load = "backend.set_weights(model, initial_weights(shapes, SEED))"
    biased = f"{load}\n    backend.set_weights(model, knowing(backend.weights(model), data))"
    knowing = """
def knowing(weights, data):  # logits that favour the commoner half of the tokens
    counts = np.bincount(np.asarray(data.validation_rows).ravel(), minlength=data.vocab_size)
    weights["wte.weight"][:] = 1
    weights["lm_head.weight"][:] = np.where(counts > np.median(counts), 1, -1)[:, None]
    return weights


def main():"""
    done, result = train({re.escape(load): biased, r"\ndef main\(\):": knowing})
    assert done.returncode and result["status"] == "invalid" and result["reason"]["code"] == "warm_start"


def test_no_data_says_what_to_run(train):
    done, _ = train(AUTORESEARCH_DATA="climbmix")
    assert done.returncode and "python prepare.py" in done.stderr


def test_an_unknown_backend_says_which_there_are(train):
    done, _ = train(AUTORESEARCH_BACKEND="abacus")
    assert done.returncode and "unknown backend 'abacus': choose one of mlx, cuda, sdpa" in done.stderr


def test_train_py_is_short():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 460
