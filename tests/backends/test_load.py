"""What loading a backend does before any framework is there."""

import importlib
import sys

import pytest

import backends


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose bytecode nobody keeps, as in a container with PYTHONDONTWRITEBYTECODE."""
    (tmp_path / "site" / "large").mkdir(parents=True)
    (tmp_path / "site" / "large" / "__init__.py").write_text("")
    (tmp_path / "site" / "large" / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield tmp_path
    for name in ("large", "large.part"):
        sys.modules.pop(name, None)


def kept(folder):
    return [path.name.partition(".")[0] for path in folder.rglob("*.pyc")]


def test_bytecode_that_nobody_keeps_is_kept_at_home(package):
    backends.keep_bytecode("large")
    importlib.import_module("large.part")
    assert sorted(kept(package / "home" / "cache" / "bytecode")) == ["__init__", "part"]
    assert not kept(package / "site")


def test_two_gpus_share_no_bytecode(package, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,2")
    backends.keep_bytecode("large")
    assert sys.pycache_prefix == str(package / "home" / "cache" / "bytecode-GPU-1-2")


def test_bytecode_beside_its_source_stays_there(package, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    importlib.import_module("large")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # as in a guarded run
    backends.keep_bytecode("large")
    assert sys.pycache_prefix is None and sys.dont_write_bytecode


@pytest.mark.parametrize("name", ["none_of_that_name", "sys"])
def test_a_package_without_bytecode_changes_nothing(package, name):
    backends.keep_bytecode(name)
    assert sys.pycache_prefix is None and sys.dont_write_bytecode
