"""Fixtures for all tests: a home of their own, and a small prepared dataset."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpus  # noqa: E402
import dataset  # noqa: E402
import prepare  # noqa: E402
from fakes import Backend, Bigram  # noqa: E402
from texts import sentences, write_files  # noqa: E402


# Files whose tests mostly wait for processes: begun first, they do not keep one worker busy at the end.
WAITING = ("fleet/", "test_night_kill", "test_kill", "test_hold", "test_install", "test_train.py", "test_kernels")


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in WAITING))


@pytest.fixture(autouse=True)
def isolated_home(tmp_path, monkeypatch) -> Path:
    """No test sees the user's data, profile or settings."""
    for name in ("DATA", "BUDGET", "RESULT", "SEED", "PROFILE"):
        monkeypatch.delenv(f"AUTORESEARCH_{name}", raising=False)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory) -> Iterator[Path]:
    """An `AUTORESEARCH_HOME` whose current dataset is `tiny`: 300 generated text files, seconds to build."""
    root = tmp_path_factory.mktemp("tiny")
    write_files(root / "text", [sentences(i, 60 + i % 37) for i in range(300)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(root / "home"))
        assert corpus.main(["--dataset", str(root / "text"), "--name", "tiny"]) == 0
    yield root / "home"
    # What one test leaves there, another finds: it would depend on their order.
    assert os.listdir(root / "home") == ["data"], "a test has written to the home that all tests share"


@pytest.fixture
def tiny_data(tiny_home, monkeypatch) -> prepare.Data:
    """The dataset `tiny`, opened; a few hundred tokens of vocabulary and a few validation rows."""
    with monkeypatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(tiny_home))
        return prepare.open_data("tiny")


@pytest.fixture
def copy(tiny_home, isolated_home) -> Path:
    """The folder of a dataset `tiny` that may be damaged."""
    shutil.copytree(tiny_home, isolated_home)
    return isolated_home / "data" / "tiny"


@pytest.fixture
def model(tiny_data):
    rows = np.stack(list(dataset.pack(tiny_data.batches()))[:40])
    return Bigram(tiny_data).train(rows)


@pytest.fixture
def run(tiny_data):
    """A run that has just begun: backend, model, loader, clock."""
    backend, model = Backend(), Bigram(tiny_data)
    with prepare.Loader(tiny_data, 2) as loader:
        yield backend, model, loader, prepare.Clock(backend, model, loader, seconds=100)


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_RESULT", str(tmp_path / "out" / "result.json"))
    return lambda: json.loads((tmp_path / "out" / "result.json").read_text())
