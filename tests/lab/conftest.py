"""Fixtures: a judge, and requests of runs of the fake train.py, edited."""

import compileall
import os
import re
import shutil
from pathlib import Path

import pytest
import sessions

from lab.run import runner
from lab.session import repository

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = 0.1


@pytest.fixture(autouse=True)
def disk_is_not_waited_for(monkeypatch) -> None:
    """No power fails while tests run; those of what a failure would take (test_power_loss, test_journal) see each flush
    by what they put in place of fsync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(repository, "durable", lambda: "core.fsync=none")


@pytest.fixture(scope="session")
def pinned(tmp_path_factory) -> Path:
    """What a judge consists of, with the bytecode that the lab's first command leaves there: each test has a copy."""
    folder = tmp_path_factory.mktemp("judge")
    for source in (*(ROOT / name for name in sessions.JUDGED), HERE / "fake_backend.py"):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    compileall.compile_dir(folder, quiet=1)
    return folder


@pytest.fixture
def session(pinned, tiny_home, isolated_home) -> Path:
    """The folder of a session: a judge, and a ledger."""
    shutil.copytree(tiny_home, isolated_home)
    folder = isolated_home / "sessions" / "fake-1gb" / "night"
    shutil.copytree(pinned, folder / "judge")
    (folder / "results.tsv").write_text("commit\tval_bpb\n")
    return folder


@pytest.fixture
def request_for(session, tmp_path, isolated_home):
    """request_for(edits, number=1, **changes) -> Request of a run of the fake train.py.

    `edits`: pattern -> text, as of re.sub, or a whole source.
    """
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "train.py").write_text("mine\n")

    def make(edits=None, number=1, **changes):
        folder = session / "runs" / f"{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        source = edits if isinstance(edits, str) else (HERE / "fake_train.py").read_text()
        for pattern, text in (edits if isinstance(edits, dict) else {}).items():
            source, found = re.subn(pattern, lambda _: text, source)
            assert found, f"{pattern} is not in fake_train.py"
        (folder / "train.py").write_text(source)
        facts = {
            "judge": session / "judge",
            "folder": folder,
            "seed": 1,
            "budget": BUDGET,
            "timeout": 30.0,
            "run_id": f"fake-1gb/night/{number}",
            "protected": [tree, session],
            "settings": {"AUTORESEARCH_HOME": str(isolated_home)},
        }
        return runner.Request(**facts | changes)

    return make


@pytest.fixture(scope="session")
def sound_run(tmp_path_factory) -> tuple[Path, list]:
    """A folder for the weights of the first sound run, and a list for its outcome: what needs no more shares it."""
    return tmp_path_factory.mktemp("sound"), []


@pytest.fixture
def honest(request_for, sound_run):
    """(request, outcome) of a sound run of the fake train.py; its folder holds the weights that the run has left."""
    (kept, outcomes), request = sound_run, request_for()
    if not outcomes:
        outcomes.append(runner.run(request))
        assert outcomes[0].status == "ok", outcomes
        shutil.copy(request.folder / "result.safetensors", kept)
    shutil.copy(kept / "result.safetensors", request.folder)
    return request, outcomes[0]


@pytest.fixture(name="runner")
def quick_runner(monkeypatch) -> sessions.Runner:
    """In place of the runner: nothing is trained."""
    return sessions.Runner().install(monkeypatch)
