"""The check of `train.py`'s surface, and the rule that only backends import a framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from backends.interface import OPS
from backends.surface import FRAMEWORKS, INSTEAD, NN, check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("line, found, use", [
    ("import torch", "import torch", "backends.load()"),
    ("import torch.nn.functional as F", "import torch.nn.functional", "backends.load()"),
    ("from mlx import core as mx", "from mlx import core", "backends.load()"),
    ("m = __import__('jax')", "__import__('jax')", "backends.load()"),
    ("m = importlib.import_module('torch.nn')", "importlib.import_module('torch.nn')", "backends.load()"),
    ("y = x.view(B, T, -1)", "x.view(...)", "x.reshape"),
    ("y = x.transpose(1, 2)", "x.transpose(...)", "ops.permute_dims"),
    ("y = self.c_q(x).view(B, T)", "self.c_q(x).view(...)", "x.reshape"),
    ("q, k, v = x.split(64, dim=2)", "x.split(...)", "slices"),
    ("q, k = x.split(self.width, dim=2)", "x.split(...)", "slices"),
    ("q, k = x.split([3, 4])", "x.split(...)", "slices"),
    ("q, k = ops.rms_norm(x).split(n)", "ops.rms_norm(x).split(...)", "slices"),
    ("y = x.mean(-1, keepdim=True)", "x.mean(...)", "ops.mean"),
    ("y = x.square().sum()", "x.square().sum(...)", "ops.sum"),
    ("y = x.max(dim=1)", "x.max(...)", "ops.max"),
    ("y = x.float()", "x.float(...)", "ops.float32"),
    ("y = x.to(other)", "x.to(...)", "ops.astype"),
    ("y = x.astype(y.dtype)", "x.astype(...)", "ops.astype"),
    ("y = x.T", "x.T", "ops.matrix_transpose"),
    ("y = g @ self.weight.mT", "self.weight.mT", "ops.matrix_transpose"),
    ("y = x.size(0)", "x.size(...)", "x.shape"),
    ("y = loss.item()", "loss.item(...)", "float(x)"),
    ("y = x.detach()", "x.detach(...)", "ops.stop_gradient"),
    ("y = x.unsqueeze(1)", "x.unsqueeze(...)", "ops.expand_dims"),
    ("y = x.repeat(2, 1)", "x.repeat(...)", "ops.concat"),
    ("x.mul_(2)", "x.mul_(...)", "x * y"),
    ("loss.backward()", "loss.backward(...)", "trainer.backward"),
    ("y = model.parameters()", "model.parameters(...)", "backend.weights"),
    ("y = ops.cat([a, b])", "ops.cat", "ops.concat"),
    ("y = ops.rmsnorm(x)", "ops.rmsnorm", "ops.rms_norm"),
    ("y = backend.ops.softmaxx(x)", "ops.softmaxx", "ops.softmax"),
    ("y = ops.mean(x, dim=-1)", "ops.mean(..., dim=...)", "axis="),
    ("y = ops.sum(x, axis=-1, keepdim=True)", "ops.sum(..., keepdim=...)", "keepdims="),
    ("y = nn.Dropout(0.1)", "nn.Dropout", "Linear"),
    ("y = nn.ModulList([])", "nn.ModulList", "nn.ModuleList"),
    ("y = x[x > 0]", "x[x > 0]", "ops.where"),
    ("y = x[~(x > 0)]", "x[~(x > 0)]", "ops.where"),
    ("y = x[ops.greater(x, 0) & (x < 1)]", "x[ops.greater(x, 0) & (x < 1)]", "ops.where"),
    ("x[:, 0] = 1", "x[:, 0] = ...", "ops.where"),
    ("x[..., 1:] *= 2", "x[..., 1:] = ...", "ops.where"),
    ("x[x < 0] = 0", "x[x < 0] = ...", "ops.where"),
])
def test_reports(line, found, use):
    problems = check(f"def f(self, x, g, model, loss, n):\n    pass\n    {line}\n")
    assert [(problem.line, problem.found) for problem in problems if problem.found == found] == [(3, found)]
    assert use in next(problem.use for problem in problems if problem.found == found)


@pytest.mark.parametrize("line, found", [
    ("y[0] = 1", "y[0] = ..."),  # a list may be assigned to, an array may not
    ("z = y[::-1]", "y[::-1]"),
    ("z = y[ops.arange(3)]", "y[ops.arange(3)]"),
    ("z = (2 * y).round()", "(2 * y).round(...)"),
    ("z = y.any()", "y.any(...)"),
    ("z = y[y2 > 0]", "y[y2 > 0]"),
])
def test_knows_what_ops_gave(line, found):
    head = "def f(x):\n    y = ops.exp(x)\n    y = y + x\n    y2 = x * y\n"
    assert [problem.found for problem in check(f"{head}    {line}\n")] == [found]


def test_knows_aliases_of_ops():
    assert [problem.found for problem in check("O = backend.ops\ny = O.cat([a])\nz = O.exp(y).any()\n")] == [
        "ops.cat", "O.exp(y).any(...)"]


ORDINARY = '''
import argparse, collections, functools, json, math, os, random, re, statistics, time
from pathlib import Path
import numpy as np
import backends, prepare
from dataclasses import dataclass

backend = backends.load()
nn, ops = backend.nn, backend.ops
PATTERN = re.compile(r"a")

@dataclass
class Config:
    T: int = 1
    size: int = 2
    data: str = "x"

class Meter:
    def mean(self):
        return statistics.mean(self.values)
    def view(self):
        return self.mean()

def initial(shapes, seed, rng):
    weights = {}
    for name, shape in sorted(shapes.items()):
        w = rng.standard_normal(shape, dtype=np.float32)
        w[:, 0] = 0
        w[w > 1] = 1
        v = np.zeros(shape).astype(np.float32)
        v[..., 1] = w.mean(axis=-1)
        weights[name] = (w - w.mean()).T.astype(np.float32) + v.max(axis=0).sum().item()
    u, s, vt = np.linalg.svd(np.eye(3))
    weights["u"] = u.transpose(1, 0).copy() * s.max()
    return {name: w.astype(np.float32) for name, w in backend.weights(model).items()}

def text(line: str, separator, config, options, lines, x):
    a, b = line.split(",")
    c = "a b".split() + line.split(separator, 1) + options.name.split(separator) + os.environ["X"].split(":")
    config.lr, config.T = 1, config.size
    names = [n for n in lines if n.endswith(("a", "b"))]
    names[0] = "z"
    names[1:3] = []
    options["lr"] = options["lr"] * 2
    table = collections.Counter(names)
    table[a] += 1
    names.sort(); names.copy(); names.index("a"); names.insert(0, "b"); table.update({}); names.reverse()
    seen = set(); seen.add(a); queue = collections.deque(); queue.append(seen)
    big = max(len(n) for n in names); low = min(1, 2); total = sum(table.values()); r = round(1.5, 1); p = pow(2, 3)
    part = names[: len(names) // 2]; back = names[::-1]; last = names[-1]; pick = ("no", "yes")[total > 1]
    key = {"S": 1}[a]; grid = [[0] * 3 for _ in range(3)]; grid[0][1] = 2
    found = PATTERN.sub("", a).split(b); also = re.sub("a", "b", a); path = Path("x").parent / "y"
    start = time.time(); root = math.sqrt(2) + math.exp(1) + math.log(3); random.random()
    parser = argparse.ArgumentParser(); flags = parser.parse_args(); size = flags.size; kind = flags.type
    print(json.dumps({}), f"{total:.2f}".strip(), path.read_text().splitlines())
    return functools.partial(max, 1), [n.lower() for n in names if n.count("a") > 1], statistics.mean([1])

class Model(nn.Module):
    def __init__(self, windows):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1) for _ in windows])
        self.named = nn.ModuleDict({f"layer{i}": nn.Embedding(1, 1) for i in range(3)})
        self.scale = nn.Parameter((3,))
        self.windows = windows
    def forward(self, x):
        B, T, _ = x.shape
        for i, block in enumerate(self.blocks):
            x = block(x) * self.scale[i] + x[..., :4].reshape(B, T, -1) + x[:, None, -1] + x[0, 1:, ::2]
            if f"layer{i}" in self.named and i > 0 and self.windows[i] > 0:
                x = x + self.named[f"layer{i}"](x)
        y = ops.where(x > 0, x, 0.0) @ ops.matrix_transpose(x)
        return ops.astype(y, x.dtype).reshape(B, -1), x.ndim, abs(y), -y, y ** 2, len(x), y.shape[0]

def update(param, grad, state, hyper):
    state = dict(state, mean=hyper["beta"] * state["mean"] + grad)
    return param - hyper["lr"] * state["mean"] * max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5, state

def main():
    data = prepare.open_data(); loader = prepare.Loader(data, 2); model = Model([1]); meter = Meter()
    trainer = backend.Trainer(model, lambda m, x, y: m(x), [dict(names=[], init=dict, update=update)])
    clock = prepare.Clock(backend, model, loader)
    while not clock.finished:
        x, y = next(loader)
        loss = trainer.backward(x, y, 1.0)
        trainer.step([{"lr": 1}])
        seconds = clock.tick(float(loss))
    backend.synchronize(); backend.save(model, "x"); meter.mean(); meter.view(); Config().T
    print(backend.device.name, backend.device.kind, data.name, trainer.gradients()["x"].mean(), Config().data)
'''


def test_no_false_positives_on_ordinary_python():
    assert check(ORDINARY) == []


def test_train_py_keeps_to_the_surface():
    assert check((ROOT / "train.py").read_text(encoding="utf-8")) == []


def test_advice_names_ops_that_exist():
    for advice in INSTEAD.values():
        for part in advice.split("ops.")[1:]:
            assert part.split("(")[0] in OPS, advice


def test_every_backend_has_the_nn_names(backend):
    assert [name for name in NN if not hasattr(backend.nn, name)] == []


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "backends.surface", *map(str, arguments)], cwd=ROOT, check=False,
                          capture_output=True, text=True)


def test_command_line(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("y = 1\nz = f(x).view(3)\n")
    done = run(file)
    assert (done.returncode, done.stdout) == (1, f"{file}:2: f(x).view(...)  use x.reshape(...)\n")
    file.write_text("y = 1\n")
    assert (run(file).returncode, run(file).stdout) == (0, "")


def test_command_line_with_a_file_that_is_no_python(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def f(:\n")
    done = run(file)
    assert done.returncode == 1 and "line 1" in done.stderr and "Traceback" not in done.stderr


def imported(path: Path) -> set[str]:
    """The top modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def python_files():
    """The project's own files, by path within it: none in hidden folders or virtual environments."""
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if not any(part.startswith(".") or part in ("venv", "site-packages", "build") for part in inside.parts):
            yield inside


def test_only_backends_import_a_framework():
    free = [path for path in python_files() if path.parts[0] not in ("backends", "tests", "benchmarks")]
    free += [Path("backends/interface.py"), Path("backends/__init__.py"), Path("backends/surface.py")]
    assert Path("train.py") in free and Path("prepare.py") in free
    assert {str(path): names for path in free if (names := imported(ROOT / path) & FRAMEWORKS)} == {}


@pytest.mark.parametrize("module", ["backends", "backends.interface", "backends.surface", "prepare"])
def test_importing_these_loads_no_framework(module):
    code = f"import sys, {module}; print(*({{'torch', 'mlx', 'jax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_backends_do_not_import_each_others_framework():
    for path in python_files():
        if path.parts[0] == "backends" and len(path.parts) > 2:
            foreign = {"mlx"} if path.parts[1] != "mlx" else {"torch"}
            assert not imported(ROOT / path) & foreign, path
