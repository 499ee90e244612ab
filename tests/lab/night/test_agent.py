"""A turn of an agent that behaves, and of one that misbehaves in every way."""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import exports
import pytest
import sessions
import stub_agent

from lab.errors import LabError
from lab.genome.syntax import describe
from lab.verdict.executor import supervise
from lab.night import agent
from lab.run import processes
from lab.session.events import TurnTaken
from lab.session.session import Session

STUB = Path(stub_agent.__file__)
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
    """take(word or command, **limits) -> Turn. Afterwards nothing of it runs, and the user's checkout is as it was."""
    monkeypatch.setattr(agent, "GRACE", 0.5)
    monkeypatch.setattr(agent, "GRACE_LEFT", 0.2)
    numbers = iter(range(100))

    def one(command, seconds=30.0, most_bytes=1 << 22, **more):
        if command in stub_agent.DEEDS:
            command = shlex.join([sys.executable, str(STUB), command])
        log, before = tmp_path / "turns" / f"{next(numbers)}.log", everything(night)
        turn = agent.take_turn(night, command, PROMPT, log, seconds, most_bytes, **more)
        agent.discard(night)
        assert everything(night) == before and not night.turn.exists()
        assert not processes.marked(**{agent.MARK: agent._mark(night)})
        assert bool(turn.blob) == bool(turn.description) == (turn.outcome == "edited")
        if turn.blob:
            assert describe(night.repository.content(turn.blob)).digest != night.state.best.digest
        for line in (turn.said, turn.description):
            assert line == " ".join(line.split()) and len(line) <= 500
        return turn

    return one


def best(session: Session) -> bytes:
    return session.repository.content(session.state.best.blob)


def everything(session: Session) -> dict:
    """All files of the user's repository, with their times, git's own too: objects may be added, and nothing else."""
    root, objects = session.repository.path, session.repository.path / ".git" / "objects"
    files = (path for path in root.rglob("*") if objects not in (path, *path.parents))
    return {
        path: (
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in files
    }


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
        ("link", "nothing", "or replaced it by a folder or a link"),
        ("ask", "asked", 'nobody answers: "Shall I **go on?**"'),
        ("fail", "unserved", "exit status 1); its last lines say: Error: no credit left"),
        ("elsewhere", "elsewhere", "changed notes.txt, prepare.py, which has no effect"),
        ("unknown", "unserved", "exit status 2); its last lines say: error: unknown option"),
        ("late", "edited", "edited train.py: LOSS from 0.9"),
        ("idle-limit", "unserved", "did not work; its last lines say: You've hit your usage limit"),
        ("binary", "edited", "edited train.py: among bytes"),
        ("no-such-agent --please", "failed", "did not find the command"),
        ("nopython", "no python", "wrote invalid Python: train.py line 1"),
    ],
)
def test_an_outcome(take, night, word, outcome, said):
    turn = take(word)
    assert (turn.outcome, said in turn.said) == (outcome, True), turn.said
    assert turn.others == (["notes.txt", "prepare.py"] if word == "elsewhere" else [])


@pytest.mark.parametrize(
    "word, outcome, locked",
    [
        ("edit-lock-away", "edited", "train.py"),
        ("chmod 000 train.py", "nothing", "train.py"),
        ("chmod 000 program.md", "nothing", "program.md"),
        ("mkdir new && echo > new/file && chmod 000 new/file new", "elsewhere", "new, new/file"),
        ("chmod 000 .git", "nothing", ".git"),
        ("chmod 000 .git/begun .git/objects", "nothing", ".git/begun, .git/objects"),
        ("sed -i.bak s/0.9/0.8/ train.py; rm train.py.bak; chmod -R 000 *; chmod 000 .", "edited", "., "),
    ],
)
def test_what_it_makes_unreadable_is_read_all_the_same(take, word, outcome, locked):
    turn = take(word)
    assert (
        turn.outcome == outcome
        and f"it made {locked}" in turn.said
        and "unreadable or read-only, which was undone" in turn.said
    )
    assert turn.others == (["new/file"] if "new" in word else []) and turn.reproached
    assert take("edit").outcome == "edited"


@pytest.mark.parametrize(
    "rights, name",
    [("000", name) for name in ("train.py", ".git", ".git/index", ".git/objects", "")]
    + [("a-w", name) for name in ("train.py", ".git", ".git/refs/heads", "")],
)
def test_what_it_takes_away_of_the_users_checkout_is_given_back(take, night, rights, name):
    path = night.repository.path / name
    turn = take(f"chmod {rights} {shlex.quote(str(path))}")
    assert (
        turn.outcome == "nothing"
        and f"it made {path.relative_to(night.repository.path.parent)} unreadable or read-only, which was undone"
        in turn.said
    )
    assert take("edit").outcome == "edited" and path.stat().st_mode & 0o600 == 0o600


def test_what_was_read_only_before_the_turn_is_left_so(take, night):
    folder = night.repository.path / ".git" / "info"
    folder.chmod(0o555)
    turn = take("edit")
    assert turn.outcome == "edited" and not turn.reproached and folder.stat().st_mode & 0o777 == 0o555


def test_what_was_no_python_is_kept_beside_the_log(take, tmp_path):
    turn = take("nopython")
    saved = tmp_path / "turns" / "0.train.py"
    assert saved.read_text() == "def broken(:\n" and str(saved) in agent.told(turn) and str(saved) not in turn.said
    assert (tmp_path / "turns" / "0.prompt").read_text() == PROMPT


def test_other_files_are_named_and_thrown_away(take, night):
    (night.repository.path / "old.txt").write_text("was there, and dirty")
    turn = take("edit-elsewhere")
    assert turn.outcome == "edited" and turn.others == ["notes.txt", "prepare.py"] and turn.reproached
    turn = take("test ! -e notes.txt && echo more >> old.txt && rm program.md && echo new > .gitignore")
    assert turn.outcome == "elsewhere" and turn.others == [".gitignore", "old.txt", "program.md"]
    assert take("edit").others == []  # what an earlier turn has changed is not blamed on this one


@pytest.mark.parametrize(
    "word, outcome, said",
    [
        ("hang", "hung", "reached its time limit of 2 s"),
        ("stubborn", "hung", "reached its time limit"),
        ("nopython-hang", "hung", "wrote invalid Python"),
        ("edit-hang", "edited", "it reached its time limit of 2 s"),
    ],
)
def test_a_turn_that_does_not_end(take, word, outcome, said):
    turn = take(word, seconds=2.0)
    assert turn.outcome == outcome and said in turn.said


def test_a_flood(take, tmp_path):
    turn = take("flood", most_bytes=100_000)
    assert turn.outcome == "flooded" and (tmp_path / "turns" / "0.log").stat().st_size < 200_000
    turn = take("sed -i.bak s/0.9/0.8/ train.py; rm train.py.bak; yes", most_bytes=1 << 20)
    assert turn.outcome == "edited" and "printed more than 1 MB" in turn.said


def test_stopped_from_outside(take):
    asked = []
    turn = take("edit-hang", stop=lambda: asked.append(1) or len(asked) > 10)
    assert turn.outcome == "stopped"


@pytest.mark.parametrize("word", ["child", "orphan"])
def test_processes_that_it_leaves_are_ended(take, word):
    turn = take(word)
    assert turn.outcome == "edited" and turn.left == 1 and not turn.reproached
    assert "left 1 process running" in agent.told(turn) and "running" not in turn.said  # the model is not blamed


@pytest.mark.parametrize(
    "word, outcome",
    [
        ("commit", "edited"),
        ("amend", "edited"),
        ("branch", "edited"),
        ("checkout-edit", "edited"),
        ("lock", "edited"),
        ("commit-elsewhere", "elsewhere"),
        ("checkout", "again"),  # which is the baseline's train.py
        ("detach", "nothing"),
        ("unborn", "nothing"),
        ("lose-branch", "nothing"),
        ("reset", "again"),
        ("stash", "elsewhere"),
        ("git push -q --all; git push -q origin HEAD:main; git fetch -q", "nothing"),
        ("git for-each-ref --format='delete %(refname)' | git update-ref --stdin", "nothing"),
        ("git config user.name me; git config core.bare true", "nothing"),
        ("git reflog expire --all --expire=now; git repack -adq; git gc -q --prune=now", "nothing"),
        ("git worktree add -q ../../elsewhere main; git worktree prune", "nothing"),
        ("rm -rf .git", "nothing"),
        ("rm -rf .git && git init -q && git add . && sed -i.bak s/0.9/0.8/ train.py", "edited"),
        ("chmod -R a-w . && chmod a-w .", "nothing"),
    ],
)
def test_what_it_does_with_git_touches_its_clone_alone(take, night, word, outcome):
    turn = take(word)
    assert turn.outcome == outcome, turn.said
    if word in ("commit-elsewhere", "stash", "reset"):
        files = {"commit-elsewhere": ["notes.txt", "prepare.py"], "stash": ["program.md"], "reset": ["program.md"]}
        assert turn.others == files[word]
    assert take("edit").outcome == "edited"  # and so on
    assert night.repository.git("fsck", "--connectivity-only", "--no-dangling") == ""


def test_the_users_settings_of_git_are_seen_and_stay(take, tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".gitconfig").write_text("[user]\n\tnick = human\n")
    turn = take(
        "sed -i.bak s/0.9/0.8/ train.py; rm train.py.bak; git config --global user.rank agent; "
        'echo "CHANGE: by $(git config user.nick), $(git config user.rank)"'
    )
    assert turn.description == "by human, agent"
    assert (tmp_path / ".gitconfig").read_text() == "[user]\n\tnick = human\n"


def test_a_night_within_a_hook_of_git_touches_the_clone_alone_too(take, night, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(night.repository.path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(night.repository.path))
    assert take("commit").outcome == "edited"


@pytest.mark.parametrize("word, outcome", [("edit", "edited"), ("link", "nothing"), ("delete", "nothing")])
def test_a_link_in_place_of_the_users_train_py_is_no_matter(take, night, tmp_path, word, outcome):
    train, elsewhere = night.repository.path / "train.py", tmp_path / "mine.py"
    train.rename(elsewhere)
    train.symlink_to(elsewhere)
    assert take(word).outcome == outcome
    assert elsewhere.read_bytes() == best(night) and os.readlink(train) == str(elsewhere)


def test_an_older_train_py_is_no_edit(take, night):
    turn = take("git checkout -q main && echo CHANGE: went back")
    assert turn.outcome == "again" and "is equal to experiment 0, baseline, which was kept" in turn.said
    turn = take("git checkout -q main && echo '# NOISE' >> train.py")
    assert turn.outcome == "again"
    turn = take("git checkout -q main && echo 'NOISE = 0.002' >> train.py")
    assert turn.outcome == "edited" and turn.description.startswith("LOSS 0.9 -> 1.0")  # judged like any other


def test_the_clone_has_what_git_does_not_have_of_the_users_settings(take, night):
    path = night.repository.path
    (path / ".gitignore").write_text(".claude/settings.local.json\nGEMINI.md\n.venv/\n*.log\n")
    (path / "AGENTS.md").write_text("be kind")
    (path / "deep").mkdir()
    (path / "deep" / "code.py").write_text("")
    sessions.git(path, "add", "AGENTS.md", ".gitignore", "deep")
    sessions.git(path, "commit", "-qm", "the human's")
    files = "AGENTS.md GEMINI.md opencode.json .codex/config.toml .claude/settings.local.json .venv/big deep/a.log"
    for name in files.split():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("x" * (2**21 if name == ".venv/big" else 10))
    (path / ".codex" / "gone").symlink_to("/no/such/place")
    copied = "AGENTS.md GEMINI.md opencode.json .codex/config.toml .claude/settings.local.json program.md"
    same = " && ".join(f"cmp {name} {shlex.quote(str(path / name))}" for name in copied.split())
    turn = take(
        f"{same} && test ! -e .venv -a ! -e deep/a.log && echo mine > opencode.json && mkdir .venv && touch .venv/x"
    )
    assert (turn.outcome, turn.others) == ("elsewhere", ["opencode.json"]), turn.said


def test_a_clone_takes_no_time(night):
    for i in range(300):
        (night.repository.path / f"file{i}.py").write_text(f"X = {i}\n" * 1000)
    sessions.git(night.repository.path, "add", ".")
    sessions.git(night.repository.path, "commit", "-qm", "many files")
    took = []
    for _ in range(3):
        began = time.perf_counter()
        agent.discard(night)
        agent._prepare(night)
        took.append(time.perf_counter() - began)
    assert min(took) < 1


def test_a_session_that_is_kept_in_the_repository_is_not_copied_into_itself(take, night, monkeypatch):
    inside = night.repository.path / ".home" / "session"
    shutil.copytree(night.folder, inside)
    moved = Session(inside)
    agent._prepare(moved)
    assert not (moved.turn / ".home").exists() and (moved.turn / "train.py").read_bytes() == best(night)


def test_the_lab_can_be_read_within_a_turn(tmp_path, runner):
    session = exports.begun(tmp_path / "repo", sessions.TRAIN, project=True)
    sessions.attempt(session, sessions.edited(LOSS=0.9), "less of it")
    commands = [
        "python -m lab status",
        "python -m lab log",
        "python -m lab log 1",
        "python -m lab export out",
        f"python -m lab compare {session.name}",
        "python -m lab report --out report.html",
        f"git show refs/autoresearch/{session.name}/1",
    ]
    log = tmp_path / "turn.log"
    turn = agent.take_turn(session, " && echo NEXT && ".join(commands), PROMPT, log, 100.0)
    said = log.read_text().split("NEXT")
    assert turn.outcome == "elsewhere" and turn.others[0].startswith("out"), (turn, log.read_text())
    assert len(said) == len(commands)
    assert all(session.name in said[i] for i in (0, 4)) and "less of it" in said[2] and "+LOSS = 0.9" in said[6]
    commands = ("run -m x", "start other", "night", "resume")
    asked = "; ".join(f"python -m lab {command} && echo done" for command in commands)
    turn = agent.take_turn(session, f"{asked}; exit 1", PROMPT, log, 100.0)
    assert turn.outcome == "failed" and "the night runs the experiments" in turn.said
    assert log.read_text().count("the night runs the experiments") == len(commands) and "done" not in log.read_text()
    agent.discard(session)


def test_the_last_line_that_says_change_is_the_description(take):
    edit = "sed -i.bak s/0.9/0.8/ train.py; rm train.py.bak; "
    assert take(edit + "printf 'change: one\\nCHANGE: what, and why\\n'").description == "one"  # the prompt's own line
    assert take(edit + "printf '> **Change**: two  \\033[31mred\\033[0m\\nbye\\n'").description == "two red"
    assert take(edit + "echo CHANGE:").description == "LOSS 0.9 -> 0.8"


@pytest.fixture
def killed(night, tmp_path, monkeypatch):
    """The log of a turn whose night was killed, and which has left a half edit and a process."""

    def run(*arguments):
        os.environ[agent.MARK] = agent._mark(night)
        stub_agent.child("import time; time.sleep(600)", start_new_session=True)
        del os.environ[agent.MARK]
        sessions.git(night.turn, "checkout", "-qb", "elsewhere")
        (night.turn / "train.py").write_text("def half(")
        raise KeyboardInterrupt

    monkeypatch.setattr(agent, "GRACE_LEFT", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(agent, "_run", run)
        with pytest.raises(KeyboardInterrupt):
            agent.take_turn(night, "true", PROMPT, tmp_path / "turns" / "7.log", 9.0, 1000)
    return tmp_path / "turns" / "7.log"


def test_what_an_interrupted_turn_wrote_is_saved(take, night, killed):
    before = everything(night)
    said = agent.recover(night, killed)
    assert killed.with_suffix(".interrupted.py").read_text() == "def half("
    assert "left 1 process of" in said and "was interrupted" in said and "7.interrupted.py" in said
    agent.discard(night)
    assert agent.recover(night, killed) == "" and everything(night) == before
    assert take("edit").outcome == "edited"


def test_a_turn_that_was_journalled_was_not_interrupted(night, killed):
    assert "was interrupted" not in agent.recover(night, killed.with_name("8.log"))
    assert not list(killed.parent.glob("*.interrupted.py"))


def test_an_interrupted_turn_that_made_its_edit_unreadable_is_saved(night, killed):
    (night.turn / "train.py").chmod(0)
    assert "7.interrupted.py" in agent.recover(night, killed) and (night.turn / "train.py").stat().st_mode & 0o400


def test_what_was_kept_since_an_interrupted_turn_stays(night, killed):
    sessions.attempt(night, sessions.edited(LOSS=0.5), "better")
    now = everything(night)
    assert night.state.best.number == 2
    assert "was interrupted" in agent.recover(night, killed) and everything(night) == now


def test_a_prompt_nobody_reads_blocks_nothing(night, tmp_path):
    turn = agent.take_turn(night, "true", "x" * 5_000_000, tmp_path / "a.log", 20.0, 1000)
    assert turn.outcome == "nothing"


def test_no_git_no_turn(night, tmp_path):
    (night.repository.path / ".git").rename(tmp_path / "gone")
    with pytest.raises(LabError):
        agent.take_turn(night, "true", PROMPT, tmp_path / "a.log", 20.0, 1000)


def turns(text: str) -> list[TurnTaken]:
    """ "F": the agent failed; "E": it edited; "S": stopped; "U": unserved; "p": the proposer."""
    outcomes = {"F": "failed", "E": "edited", "S": "stopped", "I": "interrupted", "U": "unserved", "p": "edited"}
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
        ("U", False),
        ("Up", True),
        ("UpU", False),
        ("UpUp", False),
        ("UpUpp", True),
        ("UpUppEU", False),
        ("UpUppEUp", True),
        ("FUpF", True),
        ("FUpFpF", False),
        ("ppp", True),
    ],
)
def test_when_the_agent_is_asked(text, due):
    assert agent.due(turns(text)) is due


@pytest.mark.skipif(os.name == "nt", reason="only a POSIX shell is asked")
@pytest.mark.parametrize("command, unknown", [
    ("no-such-agent -p", "no-such-agent"), ("A=1 B='x' ./no-such-agent", "./no-such-agent"),
    ("python -m agent", ""), ("cd somewhere && no-such-agent", ""), ('"$AGENT" -p', ""), ("", ""),
])  # fmt: skip
def test_a_program_that_the_shell_does_not_find_is_named(command, unknown):
    assert agent.unknown_program(command) == unknown
