"""A turn of an agent that behaves, and of one that misbehaves in every way."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import sessions
import stub_agent

from lab.errors import LabError
from lab.verdict.executor import supervise
from lab.night import agent
from lab.session.events import TurnTaken
from lab.session.session import Session

STUB = Path(stub_agent.__file__)
RECIPES = {  # as in the README
    "claude": "claude -p --permission-mode acceptEdits",
    "codex": "codex exec --sandbox workspace-write -",
    "gemini": "gemini --skip-trust --approval-mode auto_edit",
    "codex, local": "codex exec --oss --local-provider ollama --sandbox workspace-write -",
    "aider, local": "aider --model ollama_chat/qwen3-coder --yes-always --no-auto-commits --no-show-model-warnings "
    "--no-detect-urls --no-pretty --message-file /dev/stdin train.py",
    "opencode, local": 'opencode run -m ollama/qwen3-coder "$(cat)"',
}
PROMPT = "Improve it.\n- End with the line `CHANGE: what, and why`\nCHANGE: what, and why\n"


@pytest.fixture
def night(tmp_path, runner) -> Session:
    """A session that has kept one change; main is behind, and somebody has edited program.md."""
    session = sessions.make(tmp_path / "repo")
    supervise(session)
    sessions.attempt(session, sessions.edited(LOSS=0.9), "less")
    assert session.state.best.number == 1
    (session.repository.path / "program.md").write_text("be better\n")
    return session


@pytest.fixture
def take(night, tmp_path, monkeypatch):
    """take(word or command, **limits) -> Turn. Afterwards nothing of it runs, and the repository is as it was."""
    monkeypatch.setattr(agent, "GRACE", 0.5)
    monkeypatch.setattr(agent, "GRACE_LEFT", 0.2)
    numbers = iter(range(100))

    def one(command, seconds=30.0, most_bytes=1 << 22, **more):
        if command in stub_agent.DEEDS:
            command = shlex.join([sys.executable, str(STUB), "stub", command])
        train = night.repository.path / "train.py"
        link = os.readlink(train) if train.is_symlink() else None
        place = night.repository.branch(), night.repository.commit_of("HEAD")
        log = tmp_path / "turns" / f"{next(numbers)}.log"
        turn = agent.take_turn(night, command, PROMPT, log, seconds, most_bytes, **more)
        assert (night.repository.branch(), night.repository.commit_of("HEAD")) == place
        assert not agent._alive(agent._mark(night), None)
        assert agent.finished(night) == turn and agent.recover(night) == []  # until it is journalled
        agent.settle(night)
        assert agent.finished(night) is None
        assert (night.repository.train() == best(night)) == (turn.outcome != "edited")
        assert (os.readlink(train) if train.is_symlink() else None) == link
        assert bool(turn.description) == (turn.outcome == "edited")
        for line in (turn.said, turn.description):
            assert line == " ".join(line.split()) and len(line) <= 500
        return turn

    return one


def best(session: Session) -> bytes:
    return session.repository.content(session.state.best.blob)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_readme(take, tmp_path, monkeypatch, recipe):
    path = stub_agent.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    turn = take(RECIPES[recipe])
    assert turn.outcome == "edited" and turn.others == []
    assert re.fullmatch(r"LOSS from 0.9 to \S+, a guess", turn.description)


@pytest.mark.parametrize(
    "command, outcome, said",
    [
        ("claude -p", "asked", "May I?"),
        ("codex exec -", "asked", "May I?"),
        ("codex exec --ask-for-approval never -", "failed", "exit status 2"),
        ("gemini --yolo --approval-mode yolo", "failed", "exit status 2"),
        ("aider --yes-always --message-file /dev/stdin train.py", "edited", "committed, which was taken back"),
        ("opencode", "failed", "a terminal is needed"),
        ("no-such-agent --please", "failed", "did not find the command"),
    ],
)
def test_an_agent_called_otherwise(take, tmp_path, monkeypatch, command, outcome, said):
    path = stub_agent.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    turn = take(command)
    assert turn.outcome == outcome and said in turn.said


@pytest.mark.parametrize(
    "word, outcome, said",
    [
        ("edit", "edited", "edited train.py: LOSS from 0.9"),
        ("silent", "edited", "edited train.py: LOSS 0.9 -> "),
        ("deaf", "edited", "edited train.py"),
        ("edit-fail", "edited", "ended with exit status 3"),
        ("nothing", "nothing", "did not edit train.py"),
        ("comments", "nothing", "changed only comments"),
        ("delete", "nothing", "deleted train.py"),
        ("folder", "nothing", "deleted train.py"),
        ("link", "nothing", "or made a folder or a link of it"),
        ("ask", "asked", 'nobody answers: "Shall I **go on?**"'),
        ("fail", "failed", 'exit status 1; its last line: "Error: no credit left"'),
        ("elsewhere", "elsewhere", "changed notes.txt, prepare.py, which has no effect"),
        ("nopython", "no python", "wrote what is no Python: train.py line 1"),
    ],
)
def test_an_outcome(take, night, word, outcome, said):
    turn = take(word)
    assert (turn.outcome, said in turn.said) == (outcome, True), turn.said
    assert turn.others == (["notes.txt", "prepare.py"] if word == "elsewhere" else [])


def test_what_was_no_python_is_kept_beside_the_log(take, tmp_path):
    turn = take("nopython")
    saved = tmp_path / "turns" / "0.train.py"
    assert saved.read_text() == "def broken(:\n" and str(saved) in turn.said
    assert (tmp_path / "turns" / "0.prompt").read_text() == PROMPT


def test_other_files_are_named_and_left(take, night):
    (night.repository.path / "old.txt").write_text("was there, and dirty")
    turn = take("edit-elsewhere")
    assert turn.outcome == "edited" and turn.others == ["notes.txt", "prepare.py"]
    assert (night.repository.path / "notes.txt").read_text() == "mine"
    assert (night.repository.path / "prepare.py").read_text().endswith("BUDGET = 3000\n")
    assert take("edit").others == []  # what an earlier turn has changed is not blamed on this one


@pytest.mark.parametrize(
    "word, outcome, said",
    [
        ("hang", "hung", "reached its time limit of 2 s"),
        ("stubborn", "hung", "reached its time limit"),
        ("nopython-hang", "hung", "wrote what is no Python"),
        ("edit-hang", "edited", "it reached its time limit of 2 s"),
    ],
)
def test_a_turn_that_does_not_end(take, word, outcome, said):
    turn = take(word, seconds=2.0)
    assert turn.outcome == outcome and said in turn.said


def test_a_flood(take, tmp_path):
    turn = take("flood", most_bytes=100_000)
    assert turn.outcome == "flooded" and (tmp_path / "turns" / "0.log").stat().st_size < 200_000


def test_stopped_from_outside(take):
    asked = []
    turn = take("edit-hang", stop=lambda: asked.append(1) or len(asked) > 10)
    assert turn.outcome == "stopped"


@pytest.mark.parametrize("word", ["child", "orphan"])
def test_processes_that_it_leaves_are_ended(take, word):
    turn = take(word)
    assert turn.outcome == "edited" and "left 1 process running" in turn.said


@pytest.mark.parametrize(
    "word, outcome",
    [
        ("commit", "edited"),
        ("amend", "edited"),
        ("branch", "edited"),
        ("checkout-edit", "edited"),
        ("lock", "edited"),
        ("commit-elsewhere", "elsewhere"),
        ("checkout", "nothing"),
        ("detach", "nothing"),
        ("unborn", "nothing"),
        ("lose-branch", "nothing"),
        ("reset", "nothing"),
        ("stash", "elsewhere"),
    ],
)
def test_git_is_put_right(take, night, word, outcome):
    program = night.repository.path / "program.md"
    turn = take(word)
    assert turn.outcome == outcome, turn.said
    assert turn.others == {
        "commit-elsewhere": ["notes.txt", "prepare.py"],
        "stash": ["program.md"],
        "reset": ["program.md"],
    }.get(word, [])
    # What the agent itself has put away or thrown away is not ours to bring back.
    assert program.read_text() == ("be good\n" if word in ("stash", "reset") else "be better\n")
    assert bool(night.repository.git("stash", "list")) == (word == "stash")
    assert "BUDGET = 300" in (night.repository.path / "prepare.py").read_text()
    assert take("edit").outcome == "edited"  # and so on


@pytest.mark.parametrize(
    "word, outcome",
    [
        ("edit", "edited"),
        ("nothing", "nothing"),
        ("nopython", "no python"),
        ("delete", "nothing"),
        ("folder", "nothing"),
        ("link", "nothing"),
        ("commit", "edited"),
        ("checkout", "nothing"),
        ("sed s/0.9/0.8/ train.py > new && mv new train.py", "edited"),
    ],
)
def test_a_link_that_was_there_before_stays_one(take, night, tmp_path, word, outcome):
    train, elsewhere = night.repository.path / "train.py", tmp_path / "mine.py"
    train.rename(elsewhere)
    train.symlink_to(elsewhere)
    turn = take(word)
    assert turn.outcome == outcome, turn.said
    assert os.readlink(train) == str(elsewhere) and not elsewhere.is_symlink()
    agent.put_back(night)
    assert elsewhere.read_bytes() == best(night) and train.is_symlink()
    agent.write_train(night, b"LOSS = 0.7\n")
    assert elsewhere.read_bytes() == b"LOSS = 0.7\n" and train.is_symlink()


def test_an_older_train_py_is_no_edit(take, night):
    turn = take("git checkout -q main && echo CHANGE: went back")
    assert turn.outcome == "nothing" and "brought back an older train.py" in turn.said
    turn = take("git checkout -q main && echo '# NOISE' >> train.py")
    assert turn.outcome == "edited" and turn.description == "LOSS 0.9 -> 1.0"  # to be judged like any other


def test_files_that_came_with_another_commit_go_back_with_it(take, night):
    tree = night.repository
    (tree.path / "prepare.py").write_text("BUDGET = 200\n")
    sessions.git(tree.path, "commit", "-qm", "the human's", "prepare.py")
    turn = take("git checkout -q main && test $(cat prepare.py | tr -dc 0-9) = 300 && echo new > new.txt")
    assert turn.outcome == "nothing" and turn.others == ["new.txt"]
    assert (tree.path / "prepare.py").read_text() == "BUDGET = 200\n"


def test_the_last_line_that_says_change_is_the_description(take):
    edit = "sed -i.bak s/0.9/0.8/ train.py; rm train.py.bak; "
    assert take(edit + "printf 'change: one\\nCHANGE: what, and why\\n'").description == "one"  # the prompt's own line
    assert take(edit + "printf '> **Change**: two  \\033[31mred\\033[0m\\nbye\\n'").description == "two red"
    assert take(edit + "echo CHANGE:").description == "LOSS 0.9 -> 0.8"


def test_an_edit_that_somebody_left_is_kept_in_a_file(take, night, tmp_path):
    (night.repository.path / "train.py").write_text("LOSS = 3\n")
    turn = take("nothing")
    saved = tmp_path / "turns" / "0.before.py"
    assert saved.read_text() == "LOSS = 3\n" and str(saved) in turn.said


def test_an_interrupted_turn_is_put_right_by_the_next(take, night, tmp_path, monkeypatch):
    def killed(*arguments):
        os.environ[agent.MARK] = agent._mark(night)
        stub_agent.child("import time; time.sleep(600)", start_new_session=True)
        del os.environ[agent.MARK]
        sessions.git(night.repository.path, "checkout", "-qb", "elsewhere")
        (night.repository.path / "train.py").write_text("def half(")
        raise KeyboardInterrupt

    branch = night.repository.branch()
    with monkeypatch.context() as patch:
        patch.setattr(agent, "_run", killed)
        patch.setattr(agent, "recover", lambda session: [])  # as a kill would have it
        with pytest.raises(KeyboardInterrupt):
            agent.take_turn(night, "true", PROMPT, tmp_path / "turns" / "killed.log", 9.0, 1000)
    assert night.repository.branch() == "elsewhere"
    told = agent.recover(night)
    assert night.repository.branch() == branch and night.repository.train() == best(night)
    assert (tmp_path / "turns" / "killed.interrupted.py").read_text() == "def half("
    assert any("left 1 process" in text for text in told) and agent.recover(night) == []
    assert take("edit").outcome == "edited"


def test_what_was_kept_since_an_interrupted_turn_stays(night, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "_run", lambda *arguments: os._exit(1))
    if (pid := os.fork()) == 0:
        agent.take_turn(night, "true", PROMPT, tmp_path / "killed.log", 9.0, 1000)
    assert os.waitpid(pid, 0)[1]
    head = night.repository.commit_of(night.branch)
    sessions.attempt(night, sessions.edited(LOSS=0.5), "better")
    now = night.repository.commit_of(night.branch)
    assert night.state.best.number == 2 and now != head
    assert agent.recover(night) == [] and night.repository.commit_of("HEAD") == now


def test_a_prompt_nobody_reads_blocks_nothing(night, tmp_path):
    turn = agent.take_turn(night, "true", "x" * 5_000_000, tmp_path / "a.log", 20.0, 1000)
    assert turn.outcome == "nothing"


def test_no_git_no_turn(night, tmp_path):
    with pytest.raises(LabError):
        agent.take_turn(night, "mv .git gone", PROMPT, tmp_path / "a.log", 20.0, 1000)


def turns(text: str) -> list[TurnTaken]:
    """ "F": the agent failed; "E": it edited; "S": stopped; "p": the proposer."""
    outcomes = {"F": "failed", "E": "edited", "S": "stopped", "I": "interrupted", "p": "edited"}
    return [
        TurnTaken(
            by="proposer" if letter == "p" else "agent",
            outcome=outcomes[letter],
            experiment=i if letter in "Ep" else None,
        )
        for i, letter in enumerate(text)
    ]


@pytest.mark.parametrize(
    "text, due",
    [
        ("", True),
        ("FF", True),
        ("FFF", False),
        ("FFFp", True),
        ("FFFpF", False),
        ("FFFpFp", False),
        ("FFFpFpp", True),
        ("FFFpFppFppp", False),
        ("FFFpFppFpppp", True),
        ("F" * 9 + "p" * 7, False),
        ("F" * 9 + "p" * 8, True),
        ("F" * 99 + "p" * 8, True),
        ("FFFpEFF", True),
        ("FFFpEFFF", False),
        ("FFEF", True),
        ("FFSSIS", True),
        ("ppp", True),
    ],
)
def test_when_the_agent_is_asked(text, due):
    assert agent.due(turns(text)) is due


@pytest.mark.parametrize(
    "deed", ["git config user.name Agent; git config core.bare true", "echo '[broken' >> .git/config", "rm .git/config"]
)
def test_settings_of_git_are_put_back(night, take, deed):
    config = night.repository.path / ".git" / "config"
    before = config.read_bytes()
    turn = take(f"{deed}; echo LOSS = 0.8 > train.py")
    assert config.read_bytes() == before and turn.righted and "git's settings" in turn.said
    assert turn.outcome == "edited"
    kept = Path(f"{turn.log}.config").read_bytes()
    assert kept != before


def test_settings_that_stay_are_no_trouble(night, take):
    assert "settings" not in take("echo LOSS = 0.8 > train.py").said
