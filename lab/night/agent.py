"""A turn of the agent: a command of the user's gets a prompt, and edits train.py in a clone that is made for the turn.

It costs a bounded time and a bounded log. Afterwards nothing of it runs, and what train.py holds in the clone is taken;
the rest of the clone is thrown away. The user's own checkout has no part in it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path

import prepare
from lab.errors import LabError
from lab.genome import kinds
from lab.genome.syntax import TRAIN, describe
from lab.run import log as logs, processes, runner
from lab.session.events import TurnTaken
from lab.session.repository import ELSEWHERE
from lab.session.session import Session
from lab.untrusted import listed, one_line, plain
from lab.verdict.opening import best_of

MARK = prepare.TURN  # in the environment of everything that a turn starts
BEGUN = ".git/begun"  # a second index of the clone, of the files as they were when the turn began
GRACE, GRACE_LEFT = 5.0, 1.0  # seconds between being asked to end and being ended; of what an agent left running
POLL = 0.1  # seconds
TIRES = 3  # failures in a row, after which the proposer steps in
LONGEST_REST = 8  # experiments until the agent is tried again
UNSERVED = "unserved"  # the outcome of a turn whose service failed
NEUTRAL = ("stopped", "interrupted", UNSERVED)  # outcomes that are no fault of the agent's
PRINTED = 32 * 2**20  # bytes, at most, in a turn
MOST_NAMED = 100  # files that it changed elsewhere
MOST_COPIED = 2**20  # bytes of a file or folder that git does not have and the clone gets
LAST_LINES, MOST_QUOTED = 40, 3  # of what it printed: where the failure of a service is looked for; that are told
# What agents print when the service of their model fails: surely; and what says so only of a command that failed.
SERVICE_FAILED = re.compile(
    r"\b(?:error|status|code|http)\b\W{0,14}(?:40[1-9]|42\d|5\d\d)\b|\b(?:40[1-9]|42\d|5\d\d)\b\W{0,3}(?:\w+ ){0,3}"
    r"(?:error|unauthori[sz]ed|forbidden|too many|internal|bad gateway|service|<html|\{)|"
    r"(?<!learning )rate.?limit|too many requests|"
    r"\bquota\b|usage limit|authentication.?error|invalid.{0,4}api.?key|unauthori[sz]ed|api.?(?:connection.?)?error|"
    r"internal ?server ?error|service unavailable|bad gateway|overloaded|empty response|stream closed|"
    r"stream disconnected|connection (?:refused|reset|error)|ECONN|ENOTFOUND|fetch failed|"
    r"credit (?:balance|limit)|no credit",
    re.IGNORECASE,
)
PERHAPS_FAILED = re.compile(r"error|limit|quota|\b[45]\d\d\b|timed? ?out|retry", re.IGNORECASE)
CHANGE = re.compile(r"[\s>*_#`-]*change[\s*_`]*:[\s*_`]*(.*?)[\s*_`]*", re.IGNORECASE)


def due(turns: list[TurnTaken], fruitless: Collection[int] = ()) -> bool:
    """Whether the agent is asked next, and not the proposer: it is left alone for 1, 2, 4, and then always 8
    experiments once it has failed 3 times in a row, until it edits something that can be run. A service that failed,
    or may have, as the turn came to its time limit without an edit, is left alone so from the first time on.

    Args:
        fruitless: numbers of experiments that crashed or could not be judged: an agent whose are all so fails, too.
    """
    failures, unserved, rest = 0, 0, set()
    for turn in turns:
        if turn.by != "agent":
            rest.add(turn.experiment)
        elif turn.outcome in (UNSERVED, "hung"):
            unserved, rest = unserved + 1, set()
        elif turn.outcome not in NEUTRAL:
            done = turn.outcome == "edited" and turn.experiment is not None and turn.experiment not in fruitless
            failures, unserved, rest = 0 if done else failures + 1, 0, set()
    after = [unserved - 1] * (unserved > 0) + [failures - TIRES] * (failures >= TIRES)
    return len(rest) >= max((min(2**many, LONGEST_REST) for many in after), default=0)


def take_turn(
    session: Session,
    command: str,
    prompt: str,
    log: Path,
    seconds: float,
    most_bytes: int = PRINTED,
    stop: Callable[[], bool] = lambda: False,
) -> TurnTaken:
    """Lets the agent edit train.py once. The clone stays until `discard`: what is in it then was not journalled.

    Args:
        command: for the shell, in the clone, with the user's environment.
        prompt: for its standard input. It is kept beside the log.
        log: gets what it prints, the first and the last of it. seconds, most_bytes: limits.
        stop: asked again and again; once it says True, the turn is over.

    Raises:
        LabError: git or the repository can't be used.
    """
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    discard(session)
    _prepare(session)
    before = {path for path, _ in _locked(session)}
    log.with_suffix(".prompt").write_text(prompt, encoding="utf-8", errors="replace")
    status, problem, left = _run(session, command, log, seconds, most_bytes, stop)
    locked = _unlocked(session, before)
    how = {
        "hung": f"reached its time limit of {seconds:g} s",
        "flooded": f"printed more than {most_bytes / 2**20:g} MB",
    }.get(problem, "")
    if status:
        how = f"ended with exit status {status}" + " (the shell did not find the command)" * (status == 127)
    # Other files than train.py that the agent changed, and that git does not ignore.
    names = _git(session, "ls-files", "-z", "--modified", "--others", "--exclude-standard").split("\0")
    others = sorted(set(names) - {"", TRAIN, f"{TRAIN}/"})
    turn = _judged(session, log, prompt, problem, how, bool(others))
    turn.left = left  # compilers' and language servers, too: no fault of the model's
    turn.saved = "" if turn.blob else _saved(session, log.with_suffix(".train.py"))
    elsewhere = f"; it changed {listed(others, 3)}, which has no effect" if others else ""
    elsewhere += f"; it made {listed(locked, 3)} unreadable or read-only, which was undone" if locked else ""
    turn.said = one_line(turn.said + elsewhere, 500)
    turn.others = [one_line(name) for name in others[:MOST_NAMED]]
    turn.reproached, turn.seconds = bool(others or locked), time.monotonic() - begun
    return turn


def told(turn: TurnTaken) -> str:
    """What came of a turn, for the person: with what the agent left, and where what it wrote is."""
    parts = [turn.said]
    parts += [f"left {_processes(turn.left)} running; the harness ended them"] * bool(turn.left)
    parts += [f"left an edit that was not run; it is in {turn.saved}"] * bool(turn.saved)
    return "; it ".join(parts)


def recover(session: Session, log: Path) -> str:
    """Ends what is left of a turn whose night was killed, and saves what it had written. What was done, in words.

    Args:
        log: of the next turn to be journalled. If that had begun already, it was interrupted.
    """
    done = []
    if left := _end(session):
        done.append(f"left {_processes(left)} of an interrupted turn running; the harness ended them")
    _unlocked(session, set())
    if session.turn.exists() and log.with_suffix(".prompt").exists():
        done.append("was interrupted")
        if saved := _saved(session, log.with_suffix(".interrupted.py")):
            done.append(f"left an edit that was not run; it is in {saved}")
    return "; it ".join(done)


def discard(session: Session) -> None:
    """Ends what still runs of a turn and deletes its clone."""
    _end(session)
    runner.remove(session.turn)


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


# --- The clone ---


def _prepare(session: Session) -> None:
    """Makes the clone, with the best train.py and with what git does not have of the user's settings: what is not
    committed at the top level of the checkout, or in a hidden folder there, if it is small."""
    repository, clone = session.repository, session.turn
    repository.clone(clone, session.branch)
    for name in repository.changed(ignored=True):
        path = repository.path / name
        if ("/" in name.rstrip("/") and not name.startswith(".")) or path in session.folder.parents:
            continue
        with suppress(OSError):
            if path.is_dir() and _is_small(path):
                shutil.copytree(path, clone / name, symlinks=True, dirs_exist_ok=True)
            elif path.is_file() and _is_small(path):
                (clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, clone / name)
    (clone / TRAIN).write_bytes(repository.content(best_of(session).blob))
    shutil.copy(clone / ".git" / "index", clone / BEGUN)
    _git(session, "add", "--all")


def _is_small(path: Path) -> bool:
    files = path.rglob("*") if path.is_dir() else [path.resolve()]
    return all(size <= MOST_COPIED for size in accumulate(file.lstat().st_size for file in files))


def _git(session: Session, *arguments: str) -> str:
    """The output of a git command that compares the clone's files with how they were; empty if git fails."""
    git, clone = session.repository.git, session.turn
    return git(*arguments, check=False, GIT_DIR=clone / ".git", GIT_WORK_TREE=clone, GIT_INDEX_FILE=clone / BEGUN)


def _locked(session: Session) -> Iterator[tuple[Path, int]]:
    """What this user can't read, as after chmod 000, with the rights that are needed: of the clone and, lest the night
    end there, of what it needs in the user's checkout, where it writes, too."""
    clone, checkout = session.turn, Path(session.local.repository)
    walked = chain.from_iterable(map(os.walk, (checkout / ".git", clone)))  # lists a folder after it was allowed
    below = (Path(place, name) for place, folders, files in walked for name in (*folders, *files))
    for path in chain([checkout, checkout / TRAIN, checkout / ".git", clone], below):
        with suppress(OSError):
            mode = path.lstat().st_mode
            needed = 0o500 if stat.S_ISDIR(mode) else 0o400
            if not path.is_relative_to(clone) and (stat.S_ISDIR(mode) or path == checkout / TRAIN):
                needed |= 0o200
            if mode & needed != needed and not stat.S_ISLNK(mode):
                yield path, stat.S_IMODE(mode) | needed


def _unlocked(session: Session, before: set[Path]) -> list[str]:
    """Gives back the rights that an agent took. The names of what lacked them, and did not before its turn."""
    clone, checkout, found = session.turn, Path(session.local.repository), []
    for path, rights in _locked(session):
        with suppress(OSError):
            if path not in before:
                path.chmod(rights | 0o200)
                found.append(str(path.relative_to(clone if path.is_relative_to(clone) else checkout.parent)))
    return sorted(found)


def _train(session: Session) -> bytes | None:
    """The content of the clone's train.py; None if it is not a file, or another user's."""
    path = session.turn / TRAIN
    with suppress(OSError):
        return path.read_bytes() if path.is_file() and not path.is_symlink() else None


def _saved(session: Session, path: Path) -> str:
    """Keeps train.py in a file where it is not the best; which one, "" if it is."""
    content = _train(session)
    if content is None or session.repository.store(content) == best_of(session).blob:
        return ""
    path.write_bytes(content)
    return str(path)


# --- The agent's processes ---


def unknown_program(command: str) -> str:
    """The program that a shell's command begins with, if the shell has none, no builtin and no function of that name;
    "" also if the command begins in another way, and on Windows."""
    first = re.match(r"\s*(?:\w+=\S*\s+)*([\w./~][\w./~+-]*)(?=\s|$)", command)
    if not first or os.name == "nt":
        return ""
    environment = {**os.environ, "PATH": _path()}
    asked = subprocess.run(
        ["/bin/sh", "-c", f"command -v {first[1]}"], env=environment, capture_output=True, check=False
    )
    return first[1] if asked.returncode else ""


def _path() -> str:
    """Where an agent's programs are looked for: `python` is the one that has what the lab needs."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _run(
    session: Session, command: str, log: Path, seconds: float, most_bytes: int, stop: Callable[[], bool]
) -> tuple[int | None, str, int]:
    """(exit status if it ended by itself; "hung", "flooded" or "stopped" if not; how many processes it left)."""
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    environment |= {MARK: _mark(session), "PATH": _path()}
    environment["GIT_CONFIG_GLOBAL"] = str(_settings_of_git(session))
    with open(log.with_suffix(".prompt"), "rb") as prompt:  # a file: who never reads it blocks nobody
        pipes = {"stdin": prompt, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = processes.shell(command, cwd=session.turn, env=environment, **pipes)
    assert process.stdout
    output = logs.Log(process.stdout, log, flood=most_bytes)
    deadline, problem = time.monotonic() + seconds, ""
    try:
        while process.poll() is None and not problem:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            if output.flooded or stop():
                problem = "flooded" if output.flooded else "stopped"
            elif time.monotonic() > deadline:
                problem = "hung"
    finally:
        status = process.poll()
        left = _end(session, process, GRACE if status is None else GRACE_LEFT)
        process.wait()
        output.close()
    if output.flooded:
        problem = "flooded"
    elif status is not None and problem == "hung":  # it was done at the last moment
        problem = ""
    return status, problem, 0 if status is None else left


def _settings_of_git(session: Session) -> Path:
    """The user's settings of git, included from a file of the clone's: there `git config --global` writes."""
    places = [os.environ.get("XDG_CONFIG_HOME", "~/.config") + "/git/config", "~/.gitconfig"]
    if own := os.environ.get("GIT_CONFIG_GLOBAL"):
        places = [own]
    names = (os.path.abspath(os.path.expanduser(place)).replace("\\", "/") for place in places)
    path = session.turn / ".git" / "config-global"
    path.write_text("".join(f'[include]\n\tpath = "{name}"\n' for name in names), encoding="utf-8")
    return path


def _mark(session: Session) -> str:
    """The same for all turns in one clone of a session: what a killed night left is found by the next one."""
    return uuid.uuid5(uuid.NAMESPACE_URL, session.turn.absolute().as_uri()).hex


def _end(session: Session, process: subprocess.Popen | None = None, patience: float = GRACE_LEFT) -> int:
    """Ends all that a turn has started; how many that were."""
    return processes.end(lambda: processes.left_of(process, **{MARK: _mark(session)}), patience, ask=True)


# --- What came of it ---


def _judged(session: Session, log: Path, prompt: str, problem: str, how: str, others: bool) -> TurnTaken:
    """The turn, as far as train.py and the agent's last words tell.

    Args:
        how: the command ended, in words; "" if it did well. others: it changed other files.
    """
    turn = TurnTaken(by="agent", outcome="stopped", said="was stopped with the night", log=str(log))
    if problem == "stopped":
        return turn
    lines = [line.strip() for line in plain(logs.read(log)).split("\n") if line.strip()]
    content = _train(session)
    flaw, why = _flaw(session, content)
    if content is not None and flaw == "edited":
        turn.description, turn.blob = _described(session, lines, prompt, content), session.repository.store(content)
        turn.outcome, turn.said = flaw, f"edited {TRAIN}: {turn.description}" + (f"; it {how}" if how else "")
        return turn
    turn.said = " and ".join(filter(None, [how, why])) or f"did not edit {TRAIN}"
    last = one_line(lines[-1], 120) if lines else ""
    if not flaw and not others and problem != "flooded" and (failures := _of_service(lines, prompt, bool(how))):
        turn.outcome = UNSERVED
        turn.said = f"did not work{f' ({how})' if how else ''}; its last lines say: " + " | ".join(failures)
    elif outcome := problem or flaw:
        turn.outcome = outcome
    elif how:
        turn.outcome, turn.said = "failed", turn.said + (f'; its last line: "{last}"' if last else "")
    elif re.search(r"[?？][\s*_`\"')\]]*$", last):
        turn.outcome, turn.said = "asked", f'{turn.said} and asked a question, which nobody answers: "{last}"'
    else:
        turn.outcome = "elsewhere" if others else "nothing"
    return turn


def _of_service(lines: list[str], prompt: str, failed: bool) -> list[str]:
    """The last lines that say that the service of the agent's model failed; none if nothing says so.

    Args:
        failed: the command did not end well: then less is taken for it.
    """
    echoed = {line.strip() for line in prompt.split("\n")}
    last = [line for line in lines[-LAST_LINES:] if line not in echoed]
    sure = [line for line in last if SERVICE_FAILED.search(line)]
    if not sure and failed:
        sure = [line for line in last if PERHAPS_FAILED.search(line)]
    return [one_line(line, 150) for line in dict.fromkeys(sure)][-MOST_QUOTED:]


def _flaw(session: Session, content: bytes | None) -> tuple[str, str]:
    """(the outcome that this train.py is by itself, "edited" if it is to be run, or ""; what the agent did, or "")."""
    best = best_of(session)
    if content is None:
        return "", f"deleted {TRAIN}, or replaced it by a folder or a link"
    try:
        digest = describe(content).digest
    except LabError as error:
        return "no python", f"wrote invalid Python: {one_line(str(error).partition(';')[0], 160)}"
    if digest == best.digest:
        return "", "" if session.repository.store(content) == best.blob else f"changed only comments of {TRAIN}"
    if equal := session.state.equal(digest):
        what = f"experiment {equal.number}, {one_line(equal.description)}, which {equal.became}"
        return "again", f"made a {TRAIN} that is equal to {what}"
    return "edited", ""


def _described(session: Session, lines: list[str], prompt: str, content: bytes) -> str:
    """The change in the agent's words, the last that begin with CHANGE:, or in ours. Agents echo their prompt."""
    echoed = {line.strip() for line in prompt.split("\n")}
    for line in reversed(lines):
        if (said := CHANGE.fullmatch(line)) and said[1] and line not in echoed:
            return one_line(said[1])
    return kinds.summary(session.repository.content(best_of(session).blob), content) or "moved things around"
