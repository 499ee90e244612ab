"""The check of `train.py`'s surface, and the rule that only backends import a framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from backends.operations import NN, OPERATIONS, OPS
from backends.surface import FRAMEWORKS, INSTEAD, check, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "line, found, use",
    [
        ("import torch.nn.functional as F", "import torch.nn.functional as F", "backends.load()"),
        ("from mlx import core as mx", "from mlx import core as mx", "backends.load()"),
        ("y = ops.cat([x, g])", "ops.cat", "ops.concat"),
        ("y = backend.ops.softmaxx(x)", "backend.ops.softmaxx", "ops.softmax"),
        ("y = nn.ModulList([])", "nn.ModulList", "nn.ModuleList"),
        ("y = ops.mean(x, dim=-1)", "ops.mean(..., dim=...)", "axis="),
        ("y = ops.sum(x, axis=-1, keepdim=True)", "ops.sum(..., keepdim=...)", "keepdims="),
        ("y = ops.std(x, -1, 0)", "ops.std with 3 arguments by position", "ops.std(x, /, *, axis=None"),
        ("y = ops.expand_dims(x, -1)", "ops.expand_dims with 2 arguments by position", "axis=...: ops.expand_dims("),
        ("y = ops.take(x, g)", "ops.take without axis", "ops.take(x, indices, /, *, axis)"),
        ("y = ops.rope(x)", "ops.rope without base", "ops.rope(x, /, base)"),
        ("y = ops.sort(x, descend=True)", "ops.sort(..., descend=...)", "descending="),
        ("y = ops.abs(x, whatever=1)", "ops.abs(..., whatever=...)", "ops.abs(x, /)"),
        ("y = x.roll(1)", "x.roll(...)", "ops.roll"),
        ("y = x.logsumexp(-1)", "x.logsumexp(...)", "ops.logsumexp"),
        ("y = x[..., ::-1]", "x[..., ::-1]", "ops.flip"),
        ("import importlib", "import importlib", "a plain import"),
        ("m = __import__(name)", "__import__(...)", "a plain import"),
        ("import random", "import random", "ops.dropout"),
        ("from random import random", "from random import random", "ops.dropout"),
        ("y = self.c_q(x).view(B, T)", "self.c_q(x).view(...)", "x.reshape"),
        ("y = x.mean(-1, keepdim=True)", "x.mean(...)", "ops.mean"),
        ("y = x.square().sum()", "x.square().sum(...)", "ops.sum"),
        ("y = (2 * x).to(g.device)", "(2 * x).to(...)", "ops.astype"),
        ("y = loss.item()", "loss.item(...)", "float(x)"),
        ("loss.backward()", "loss.backward(...)", "trainer.backward"),
        ("x.mul_(2).add_(g)", "x.mul_(2).add_(...)", "never changed"),
        ("x.mul_(2).add_(g)", "x.mul_(...)", "never changed"),
        ("x.fill_(0)", "x.fill_(...)", "never changed"),
        ("q, k = x.split(n, dim=2)", "x.split(...)", "slices"),
        ("q, k = ops.rms_norm(x).split([3, 4])", "ops.rms_norm(x).split(...)", "slices"),
        ("y = x.size(-1)", "x.size(...)", "x.shape"),
        ("y = g @ self.weight.mT", "self.weight.mT", "ops.matrix_transpose"),
        ("y = x[x > 0]", "x[x > 0]", "ops.where"),
        ("y = x[~(x > 0) & (g < 1)]", "x[~(x > 0) & (g < 1)]", "ops.where"),
        ("x[:, 0] = 1", "x[:, 0] = ...", "ops.where"),
        ("x[..., n] *= 2", "x[..., n] = ...", "ops.where"),
        ("x[x < 0] = 0", "x[x < 0] = ...", "ops.where"),
    ],
)
def test_reports(line, found, use):
    advice = {problem.found: problem.use for problem in check(f"def f(self, x, g, model, loss, n):\n    {line}\n")}
    assert use in advice[found]


@pytest.mark.parametrize("constant", ["np.arange(n)", "TABLE"])
def test_an_array_of_numpys_in_a_modules_arithmetic(constant):
    source = f"""
import numpy as np
TABLE = np.ones(3)
def initial(n, scale):
    return scale * {constant}
class Block(nn.Module):
    def forward(self, x, n):
        return x * np.sqrt(3) + x * {constant}
"""
    problems = check(source)
    assert [(problem.line, problem.found) for problem in problems] == [(8, f"x * {constant}")]
    assert f"ops.asarray({constant})" in problems[0].use


def test_what_stands_behind_a_star_is_unknown():
    assert (
        check("y = ops.take(*x); z = ops.take(x, i, **k); w = ops.einsum('ij,j', x, y); v = ops.rope(x, base=1)") == []
    )


def test_a_name_counts_as_numpys_only_where_it_is_bound_to_it():
    source = "import numpy as np\ndef f():\n    x = np.ones(3)\n    x.mean()\ndef g(x):\n    x.mean()\n"
    assert [problem.line for problem in check(source)] == [6]


ORDINARY = """
import argparse, math, os, re, statistics, time
import numpy as np, backends, prepare
from pathlib import Path
backend = backends.load()
nn, ops = backend.nn, backend.ops
PATTERN = re.compile("a")
args = argparse.ArgumentParser().parse_args()
class Meter:
    mT: int = 1
    def tile(self):
        return statistics.mean(self.mT)
def initial(shapes, seed, rng):
    weights = {}
    for name, shape in sorted(shapes.items()):
        w = rng.standard_normal(shape, dtype=np.float32)
        w[:, 0], w[w > 1] = 0, 1
        u, s, _ = np.linalg.svd(np.zeros(shape).astype(np.float32).transpose(1, 0) * w.max())
        u[..., 1] = w.mean(axis=-1)
        weights[name] = (2 * w - w.mean()).T.astype(np.float32) + s.max(axis=0).sum().item() + u.T
    return {name: w.astype(np.float32).flatten() for name, w in backend.weights(model).items()}
def text(line, separator, config, options, lines, logger):
    a, b = line.split(",")
    c = "a b".split() + line.split(separator, 1) + options.name.split(separator) + os.environ["X"].split(":")
    names = [n for n in lines if n.endswith(("a", "b"))]
    names[0], names[1:3], options["lr"] = "z", [], options["lr"] * 2
    names.sort(); names.sort(key=len); names.copy(); names.index(1); logger.log("loss", 1); config.size = lines.size()
    seen = set(); seen.add(1); seen.add(a); total = sum(len(n) for n in names); low = min(1, max(names), abs(total))
    pick = ("no", "yes")[total > 1], names[len(names) > 1], names[0 if names == [] else -1], names[::-1]
    found = PATTERN.sub("", a).split(b) + re.split("a", b), re.match("a", b).expand("a"), Path("x").parent / "y"
    print(time.time(), math.sqrt(2), math.exp(args.T), f"{total}".strip(), all(names), lines.all(), lines.any())
    return args.type, names.count("a"), statistics.mean([1]), config.norm(a), Meter().mT, [[0] * 3][0][1]
class Model(nn.Module):
    def __init__(self, windows):
        self.blocks = nn.ModuleList([nn.Linear(1, 1) for _ in windows])
        self.named = nn.ModuleDict({f"layer{i}": nn.Embedding(1, 1) for i in range(3)})
        self.scale, self.gather = nn.Parameter((3,)), nn.Linear(1, 1)
    def forward(self, x):
        B, T, _ = x.shape
        for i, block in enumerate(self.blocks):
            x = block(x) * self.scale[i] + x[..., :4].reshape(B, T, -1) + x[:, None, -1] + x[0, 1:, ::2]
        y = ops.where(x > 0, x, 0.0) @ ops.matrix_transpose(self.named[f"layer{i}"](self.gather(x)))
        return ops.astype(y, x.dtype).reshape(B, -1), x.ndim, abs(y), -y, y ** 2, len(x), y.shape[0]
def main():
    data = prepare.open_data(); meter = Meter(); x, y = next(prepare.Loader(data, 2))
    trainer = backend.Trainer(Model([1]), lambda m, x, y: m(x), [dict(names=[], init=dict, hyper={"lr": 1})])
    loss = trainer.backward(x, y, 1.0); backend.save(model, "x"); meter.tile(); data.view(float(loss))
    print(backend.device.name, trainer.gradients()["x"].mean(), backend.weights(model)["x"].std(axis=0))
"""


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


def test_the_page_shows_every_operation_and_module(capsys):
    assert main([]) == 0
    page = capsys.readouterr().out
    assert all(f"\n{name}(" in page for name in OPERATIONS)
    assert all(f"\n{name}" in page for name in NN)
    assert max(map(len, page.splitlines())) <= 120 and len(page.splitlines()) < 150


@pytest.mark.parametrize(
    "source, status, out, error",
    [
        ("y = 1\nz = f(x).view(3)\n", 1, ":2: f(x).view(...)  use x.reshape(...)\n", ""),
        ("y = 1\n", 0, "", ""),
        ("def f(:\n", 1, "", "line 1"),
        (None, 1, "", "No such file"),
    ],
)
def test_command_line(tmp_path, capsys, source, status, out, error):
    file = tmp_path / "edited.py"
    if source:
        file.write_text(source)
    assert main([str(file)]) == status
    printed = capsys.readouterr()
    assert printed.out == (f"{file}{out}" if out else "") and error in printed.err


def imported(path: Path) -> set[str]:
    """The top modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def project_files() -> list[Path]:
    """By path within the project; none in hidden folders or virtual environments."""
    return [
        path
        for path in (found.relative_to(ROOT) for found in sorted(ROOT.rglob("*.py")))
        if not any(part.startswith(".") or part in ("venv", "site-packages", "build") for part in path.parts)
    ]


def test_only_backends_import_a_framework():
    free = [
        path
        for path in project_files()
        if path.parts[0] not in ("backends", "tests", "benchmarks") or path.parent == Path("backends")
    ]
    assert {*map(Path, ("train.py", "prepare.py", "corpus.py", "backends/interface.py"))} <= set(free)
    assert {str(path): names for path in free if (names := imported(path) & FRAMEWORKS)} == {}


def test_backends_do_not_import_each_others_framework():
    for path in project_files():
        if path.parts[0] == "backends" and len(path.parts) > 2:
            assert not imported(path) & ({"torch"} if path.parts[1] == "mlx" else {"mlx"}), path


def test_reading_data_loads_no_framework():
    code = "import sys, backends.surface, corpus, prepare; print(*({'torch', 'mlx', 'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
