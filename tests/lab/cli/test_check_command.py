"""`python -m lab check`: for anybody, also in a turn, and never beside a run."""

import json
from pathlib import Path

import pytest
import sessions
from agents import trial

from lab import __main__ as program
from lab.errors import LabError
from lab.cli import commands
from lab.run import check
from lab.verdict.executor import supervise

ROOT = Path(__file__).resolve().parents[3]
SOUND = check.Tried("", "", 3_000_000, 4.2)


@pytest.fixture
def here(tmp_path, runner, monkeypatch):
    """A session in whose repository the command is given; what is tried is not run."""
    session = sessions.make(tmp_path / "repo")
    supervise(session)
    monkeypatch.chdir(session.repository.path)
    session.came_to = SOUND
    monkeypatch.setattr(check, "tried", lambda train, settings: session.came_to)
    return session


def said(capsys, **values):
    status = commands.do_check(sessions.options(**values))
    return status, capsys.readouterr().out


def test_a_sound_edit_and_what_is_remarked_of_it(here, capsys):
    train = here.repository.path / "train.py"
    status, text = said(capsys)
    assert status == 0 and "it is equal to experiment 0, which was kept" in text
    train.write_bytes(sessions.edited(LOSS=0.9) + b"import torch\n")
    status, text = said(capsys)
    assert status == 0 and "remark: line 5: import torch: use nn and ops" in text
    assert "nothing wrong was found in 4 s: 3.0 M parameters" in text and "bpb" not in text
    assert json.loads(said(capsys, json=True)[1])["num_params"] == 3_000_000


def test_a_broken_edit(here, capsys):
    here.came_to = check.Tried("NameError: x", "Traceback (most recent call last):\n  ...\nNameError: \x1b[31mx", None)
    status, text = said(capsys)
    assert status == 1 and "a run of this train.py would fail: NameError: x" in text and "\x1b" not in text
    (here.repository.path / "train.py").write_text("def (:\n")
    with pytest.raises(LabError, match="train.py line 1"):
        said(capsys)
    (here.repository.path / "train.py").unlink()
    with pytest.raises(LabError, match="can't be read"):
        said(capsys)


def test_not_beside_a_run(here, capsys):
    with here.device_lock, pytest.raises(LabError, match="another session is training"):
        said(capsys)


@pytest.mark.parametrize("command, may", [("check", True), ("log", True), ("run", False), ("night", False)])
def test_what_an_agent_may_ask_for_in_its_turn(here, capsys, monkeypatch, command, may):
    monkeypatch.setenv("LAB_TURN", "an agent's")
    monkeypatch.setattr(program, "judges", lambda: None)
    assert program.main([command]) == int(not may)
    assert ("the night runs the experiments" in capsys.readouterr().err) is not may


def test_the_skill_is_the_same_for_all_agents():
    one, other = (ROOT / f".{who}" / "skills" / "autoresearch" / "SKILL.md" for who in ("agents", "claude"))
    assert one.read_bytes() == other.read_bytes()


def test_recipes_are_those_that_are_tried():
    text = (ROOT / "docs" / "agents.md").read_text()
    for name, recipe in trial.RECIPES.items():
        assert f"`{recipe.command}`" in text, name
    opencode = trial.OPENCODE.replace("{url}", "http://localhost:11434")
    assert f"```json\n{opencode}```" in text
