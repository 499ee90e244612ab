"""Which files of a judge are compared with what was pinned."""

import pytest

from lab.session.session import differing, fingerprints


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "backends").mkdir()
    for name in ("prepare.py", "backends/interface.py"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", [
    ".DS_Store", "backends/.DS_Store", "._prepare.py", "backends/._interface.py", "Thumbs.db", "thumbs.db",
    "desktop.ini", "__pycache__/prepare.cpython-312.pyc", "backends/__pycache__/x.pyc", ".git",
])  # fmt: skip
def test_a_file_that_appears_by_itself_is_no_change(judge, name):
    pinned = fingerprints(judge)
    (judge / name).parent.mkdir(exist_ok=True)
    (judge / name).write_text("made by the system")
    assert differing(judge, pinned) == [] and pinned.keys() == {"prepare.py", "backends/interface.py"}


@pytest.mark.parametrize(
    "name", ["prepare.py", "numpy.py", "backends/new.py", ".hidden.py", "DS_Store", "torch/__init__.py"]
)
def test_any_other_file_is_one(judge, name):
    pinned = fingerprints(judge)
    (judge / name).parent.mkdir(exist_ok=True)
    (judge / name).write_text("else")
    assert differing(judge, pinned) == [name]


def test_a_missing_file_is_a_change(judge):
    pinned = fingerprints(judge)
    (judge / "prepare.py").unlink()
    assert differing(judge, pinned) == ["prepare.py"]
