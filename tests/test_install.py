"""What gets installed where: a Mac needs MLX and no PyTorch, anything else PyTorch and, if asked for, MLX."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backends

ROOT = Path(__file__).resolve().parents[1]
MAC = {"sys_platform": "darwin", "platform_machine": "arm64", "extra": ""}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}


def required(environment) -> set[str]:
    """Names of the dependencies that pyproject.toml asks for in this environment."""
    requirements = pytest.importorskip("packaging.requirements")
    listed = re.search(r"(?ms)^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text())[1]
    found = [requirements.Requirement(line) for line in re.findall(r'"(.*?)",$', listed, re.M)]
    return {r.name for r in found if r.marker is None or r.marker.evaluate(environment)}


def test_a_mac_gets_mlx_and_no_torch():
    assert "mlx" in required(MAC) and not {"torch", "kernels"} & required(MAC)


def test_linux_gets_torch_and_no_mlx():
    assert {"torch", "kernels"} <= required(LINUX) and "mlx" not in required(LINUX)


@pytest.mark.parametrize(
    "system, machine, mlx, wanted",
    [
        ("Darwin", "arm64", True, "mlx"),
        ("Darwin", "arm64", False, "sdpa"),
        ("Darwin", "x86_64", True, "sdpa"),
        ("Linux", "x86_64", True, "sdpa"),
    ],
)
def test_the_best_backend(monkeypatch, system, machine, mlx, wanted):
    pytest.importorskip("torch")  # which must not be imported for the first time on a Mac that is none
    monkeypatch.setattr(backends.platform, "system", lambda: system)
    monkeypatch.setattr(backends.platform, "machine", lambda: machine)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if mlx else None)
    assert backends.best() == wanted


def test_mlx_runs_without_torch(isolated_home):
    pytest.importorskip("mlx.core")
    program = (
        "import sys; sys.modules['torch'] = None  # importing it now fails\n"
        "import prepare, backends\n"
        "from backends import bench; bench.Bench.attention_shape = 256, 1, 64  # a quick trial\n"
        "print(backends.load('mlx', 'float32').device.kind)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() in ("metal", "cuda", "cpu"), done.stderr


# --- make, where other settings would have their way


@pytest.fixture
def make(tmp_path):
    """make(target, **environment) -> what it says, in a folder with a name that needs care."""
    folder = tmp_path / "ein Weg mit Lücken"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    if not shutil.which("make"):
        pytest.skip("there is no make")

    def made(target, status=0, **environment):
        outer = {name: value for name, value in os.environ.items() if name not in ("UV", "MAKEFLAGS", "MFLAGS")}
        environment = outer | {"PYTHON": sys.executable} | environment  # whatever make these tests are run by
        done = subprocess.run(
            ["make", target], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    made.folder = folder
    return made


@pytest.mark.slow
def test_pins_of_the_surroundings_go_first_and_are_named(make):
    assert "PIP_CONSTRAINT is set: versions are those of" not in make(".venv/created", PIP_CONSTRAINT="")
    ours = (make.folder / ".venv" / "constraints.txt").read_text()
    assert "tiktoken==" in ours
    (make.folder / ".venv" / "created").unlink()
    said = make(".venv/created", PIP_CONSTRAINT="/etc/pip/constraint.txt")
    assert "PIP_CONSTRAINT is set: versions are those of /etc/pip/constraint.txt" in said
    assert (make.folder / ".venv" / "constraints.txt").read_text() == ""


def test_an_install_that_fails_says_what_may_have_kept_it(make):
    (make.folder / ".venv").mkdir()
    (make.folder / ".venv" / "created").touch()  # with nothing in it
    assert "Without that variable: make PIP_CONSTRAINT= .venv/installed" in make(".venv/installed", status=2)


def test_a_folder_without_git_is_told_how_to_become_a_repository(make):
    (make.folder / ".venv").mkdir()
    for name in ("created", "installed"):
        (make.folder / ".venv" / name).touch()
    assert "git init && git add . && git commit" in make("demo", status=2)
