"""Fixtures: a judge, and requests of runs of the fake train.py, edited."""

import re
import shutil
from pathlib import Path

import pytest
import sessions

from lab.run import runner

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JUDGED = ("prepare.py", "dataset.py", "storage.py", "results.py", "terminal.py", "backends", "calibration", "lab")
BUDGET = 0.1


@pytest.fixture
def session(tiny_home, isolated_home) -> Path:
    """The folder of a session: a judge, and a ledger."""
    shutil.copytree(tiny_home, isolated_home)
    folder = isolated_home / "sessions" / "fake-1gb" / "night"
    for name in JUDGED:
        source, target = ROOT / name, folder / "judge" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copy(HERE / "fake_backend.py", folder / "judge")
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


@pytest.fixture(name="runner")
def quick_runner(monkeypatch) -> sessions.Runner:
    """In place of the runner: nothing is trained."""
    return sessions.Runner().install(monkeypatch)
