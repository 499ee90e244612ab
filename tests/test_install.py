"""What gets installed where: a Mac needs MLX and no PyTorch, anything else PyTorch and, if asked for, MLX."""

import re
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
