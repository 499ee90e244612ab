"""A turn of the agent: a command of the user's gets a prompt, and edits train.py; whatever else it did is put right.

It costs a bounded time and a bounded log. Afterwards nothing of it runs, HEAD and branch are where they were, and
train.py is a sound edit of the best, or the best. Other files are left as the agent left them, and named.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

import storage
from lab.errors import LabError
from lab.genome import kinds
from lab.genome.syntax import TRAIN, describe
from lab.run import log as logs, processes
from lab.session.events import TurnTaken
from lab.session.repository import Repository
from lab.session.session import Session
from lab.untrusted import listed, one_line, plain
from lab.verdict.opening import best_of

RECORD = "turn.json"  # in the session's folder, until a turn is journalled
MARK = "LAB_TURN"  # in the environment of everything that a turn starts
GRACE, GRACE_LEFT = 5.0, 1.0  # seconds between being asked to end and being ended; of what an agent left running
POLL = 0.1  # seconds
TIRES = 3  # failures in a row, after which the proposer steps in
LONGEST_REST = 8  # experiments until the agent is tried again
NEUTRAL = ("stopped", "interrupted")  # outcomes that are the night's doing
PRINTED = 32 * 2**20  # bytes, at most, in a turn
MOST_NAMED = 100  # files that it changed elsewhere
LARGE = 16 * 2**20  # bytes: a larger file counts as changed when its time or size is
CHANGE = re.compile(r"[\s>*_#`-]*change[\s*_`]*:[\s*_`]*(.*?)[\s*_`]*", re.IGNORECASE)


class Place(msgspec.Struct):
    """Where things were when a turn began, and once it is over, what came of it.

    Attributes:
        branch, commit: of HEAD. begun: as of time.time(). log: path of what the agent prints.
        link: where train.py points, if it is a symbolic link. last: number of the last experiment.
        config: the file with git's settings for the repository. settings: what it held, each byte as a character.
    """

    branch: str | None
    commit: str
    begun: float
    log: str
    link: str | None
    last: int
    config: str
    settings: str
    turn: TurnTaken | None = None


def due(turns: list[TurnTaken], fruitless: Collection[int] = ()) -> bool:
    """Whether the agent is asked next, and not the proposer: it is left alone for 1, 2, 4, and then always 8
    experiments once it has failed 3 times in a row, until it edits something that can be run.

    Args:
        fruitless: numbers of experiments that crashed or could not be judged: an agent whose are all so fails, too.
    """
    failures, rest = 0, set()
    for turn in turns:
        if turn.by != "agent":
            rest.add(turn.experiment)
        elif turn.outcome not in NEUTRAL:
            done = turn.outcome == "edited" and turn.experiment is not None and turn.experiment not in fruitless
            failures, rest = 0 if done else failures + 1, set()
    return failures < TIRES or len(rest) >= min(2 ** (failures - TIRES), LONGEST_REST)


def take_turn(
    session: Session,
    command: str,
    prompt: str,
    log: Path,
    seconds: float,
    most_bytes: int = PRINTED,
    stop: Callable[[], bool] = lambda: False,
) -> TurnTaken:
    """Lets the agent edit train.py once. It is remembered until `settle`.

    Args:
        command: for the shell, in the session's repository, with the user's environment.
        prompt: for its standard input. It is kept beside the log.
        log: gets what it prints, the first and the last of it. seconds, most_bytes: limits.
        stop: asked again and again; once it says True, the turn is over.

    Raises:
        LabError: git or the repository can't be used.
    """
    begun, repository = time.monotonic(), session.repository
    train = repository.path / TRAIN
    log.parent.mkdir(parents=True, exist_ok=True)
    notes = recover(session)
    if saved := put_back(session, log.with_suffix(".before.py")):
        notes.append(f"found {TRAIN} edited when its turn began, by somebody else; that is in {saved}")
    config = repository.path / repository.git("rev-parse", "--git-path", "config")
    place = Place(
        branch=repository.branch(),
        commit=repository.git("rev-parse", "HEAD"),
        begun=time.time(),
        log=str(log),
        link=os.readlink(train) if train.is_symlink() else None,
        last=session.state.last.number,
        config=str(config),
        settings=config.read_bytes().decode("latin-1"),
    )
    _write(session, place)
    before = _digests(session)
    asked = log.with_suffix(".prompt")
    asked.write_text(prompt, encoding="utf-8", errors="replace")
    try:
        status, problem, left = _run(command, repository.path, asked, log, _mark(session), seconds, most_bytes, stop)
        settings = _restore_settings(place)
        repository.unlock(session.branch)
        older, told = _go_back(repository, place)
        told += settings
        after = _digests(session)
        others = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if left:
            told.append(f"left {_processes(left)} running, which had to be ended")
        how = _how(status, problem, seconds)
        outcome, said, description = _judged(session, log, prompt, problem, how, older, bool(others))
        if outcome != "edited" and (saved := put_back(session, log.with_suffix(".train.py"))):
            told.append(f"had what it wrote put aside, in {saved}")
        if others:
            told.append(f"changed {listed(others, 3)}, which has no effect")
        place.turn = TurnTaken(
            by="agent",
            outcome=outcome,
            said=one_line("; it ".join([said, *told, *notes]), 500),
            description=description,
            log=str(log),
            others=[one_line(name) for name in others[:MOST_NAMED]],
            seconds=time.monotonic() - begun,
            righted=bool(told),
        )
        _write(session, place)
    except BaseException:
        recover(session)
        raise
    return place.turn


def finished(session: Session) -> TurnTaken | None:
    """A turn that is over and was not settled: that of a night which was killed then."""
    place = _read(session)
    return place.turn if place else None


def settle(session: Session) -> None:
    """Forgets the last turn, once it is journalled."""
    (session.folder / RECORD).unlink(missing_ok=True)


def recover(session: Session) -> list[str]:
    """Puts right what a turn has left whose night was killed: its processes, HEAD and branch, train.py. Returns what
    was done, in words."""
    left, place, told = _end(_mark(session)), _read(session), []
    if left:
        told.append(f"left {_processes(left)} of an interrupted turn running, which had to be ended")
    if place is None or place.turn is not None:
        return told
    if place.last == session.state.last.number:  # else it was long ago, and somebody has worked here since
        told += _restore_settings(place)
        session.repository.unlock(session.branch)
        told += _go_back(session.repository, place)[1]
        if saved := put_back(session, Path(place.log).with_suffix(".interrupted.py")):
            told.append(f"was interrupted; what it had written is in {saved}")
    settle(session)
    return told


def _write(session: Session, place: Place) -> None:
    storage.write_json(session.folder / RECORD, msgspec.to_builtins(place))


def _read(session: Session) -> Place | None:
    """None if no turn was under way, or it had not yet begun."""
    try:
        return msgspec.json.decode((session.folder / RECORD).read_bytes(), type=Place)
    except (OSError, msgspec.DecodeError):
        return None


def _mark(session: Session) -> str:
    """The same for all turns of a session: what a killed night left is found by the next one."""
    return uuid.uuid5(uuid.NAMESPACE_URL, session.folder.absolute().as_uri()).hex


# --- The agent's processes ---


def _run(
    command: str, folder: Path, asked: Path, log: Path, mark: str, seconds: float, most_bytes: int, stop
) -> tuple[int | None, str | None, int]:
    """(exit status if it ended by itself; "hung", "flooded" or "stopped" if not; how many processes it left)."""
    reading, writing = os.pipe()
    output = logs.Log(reading, log, flood=most_bytes)
    try:
        with open(asked, "rb") as prompt:  # a file: who never reads it blocks nobody
            process = subprocess.Popen(
                command,
                shell=True,
                cwd=folder,
                stdin=prompt,
                stdout=writing,
                stderr=writing,
                env={**os.environ, MARK: mark},
                start_new_session=os.name == "posix",
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" else 0,  # pyright: ignore
            )
    finally:
        os.close(writing)
    deadline, problem = time.monotonic() + seconds, None
    try:
        while process.poll() is None and not problem:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            reached = {"flooded": output.flooded, "stopped": stop(), "hung": time.monotonic() > deadline}
            problem = next((name for name, true in reached.items() if true), None)
        ended = process.poll() is not None
    finally:
        left = _end(mark, process.pid, GRACE if process.poll() is None else GRACE_LEFT)
        process.wait()
        output.close()
    if output.flooded:
        problem = "flooded"
    elif ended and problem == "hung":  # it was done at the last moment
        problem = None
    return (process.returncode if ended else None), problem, left if ended else 0


def _end(mark: str, top: int | None = None, patience: float = GRACE_LEFT) -> int:
    """Ends every process of a turn: those with its mark, and those below `top` or of its group; how many."""
    return processes.end(lambda: _alive(mark, top), patience, ask=True)


def _alive(mark: str, top: int | None) -> list[psutil.Process]:
    family = processes.marked(**{MARK: mark})
    if top is not None:
        family += [*processes.tree(top), *processes.in_group(top)]
    return [process for process in set(family) if processes.runs(process)]


# --- The repository ---


def _digests(session: Session) -> dict[str, str]:
    """Of the content of every file that git does not ignore, train.py and the session's own aside."""
    repository, digests = session.repository, {}
    names = repository.git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in set(names) - {"", TRAIN}:
        path = repository.path / name
        with suppress(OSError):
            if session.folder in path.parents:
                continue
            about = path.lstat()
            if path.is_symlink():
                digests[name] = f"-> {os.readlink(path)}"
            elif path.is_file() and about.st_size > LARGE:
                digests[name] = f"{about.st_size} {about.st_mtime_ns}"
            elif path.is_file():
                digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _go_back(repository: Repository, place: Place) -> tuple[bool, list[str]]:
    """Makes HEAD and its branch what they were; what was committed since stays in the files. train.py becomes a file,
    or the link that it was.

    Files that came with another commit go back with it; nobody's edits do, as with `git checkout`.

    Returns:
        (whether train.py is that of another commit and no edit, what was done in words).
    """
    path, branch, commit = repository.path / TRAIN, place.branch, place.commit
    ours = not path.is_symlink() or os.readlink(path) == place.link
    content = path.read_bytes() if path.is_file() and ours else None
    if path.is_symlink():  # what git writes shall not be written to where it points
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    if path.is_dir():
        shutil.move(path, f"{place.log}.folder")
    older, told, head = False, [], repository.commit_of("HEAD")
    if repository.branch() != branch or head != commit:
        base, new = _base(repository, head, commit, place.begun)
        if head and new:
            told.append(f"committed, which was taken back (the files stay; it was {head[:7]})")
        if base != commit or repository.branch() != branch:
            told.append(f"moved HEAD to {repository.branch() or (head or 'nowhere')[:7]}, which was undone")
        if base:
            repository.git("update-ref", "--no-deref", "HEAD", base)  # detached: the branch it is on is left alone
        if branch:
            repository.move(f"refs/heads/{branch}", commit)
        if base and base != commit:
            older = repository.edited_blob() in (None, repository.blob_of(base))
            repository.put_back(base)
            # It refuses to overwrite what was edited.
            repository.git("checkout", "--quiet", branch or commit, "--", check=False)
            if content is not None:
                path.write_bytes(content)
        if branch:
            repository.git("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        else:
            repository.git("update-ref", "--no-deref", "HEAD", commit)
    if place.link is not None:  # what it points to has what was written since
        if path.is_file():
            with storage.atomic((path.parent / place.link).resolve()) as file:
                file.write(path.read_bytes())
            path.unlink()
        path.symlink_to(place.link)
    return older, told


def _restore_settings(place: Place) -> list[str]:
    """Makes git's settings for the repository what they were, before git is asked anything; what was done in words."""
    before, path = place.settings.encode("latin-1"), Path(place.config)
    now = path.read_bytes() if path.is_file() else b""
    if now == before:
        return []
    Path(f"{place.log}.config").write_bytes(now)
    with storage.atomic(path) as file:
        file.write(before)
    return [f"changed git's settings for the repository, which was undone (they are in {place.log}.config)"]


def _base(repository: Repository, head: str | None, commit: str, begun: float) -> tuple[str | None, int]:
    """(the commit that those made since grew on, how many these are)."""
    if head is None:
        return None, 0
    lines = repository.git("rev-list", "--first-parent", "--max-count=1000", "--timestamp", head).split("\n")
    for new, (made, ancestor) in enumerate(line.split(" ") for line in lines):
        if int(made) < int(begun) or repository.git("merge-base", ancestor, commit, check=False) == ancestor:
            return ancestor, new
    return None, 0


def write_train(session: Session, content: bytes) -> None:
    """Replaces train.py; where it is a link, what that points to."""
    with storage.atomic((session.repository.path / TRAIN).resolve()) as file:
        file.write(content)


def put_back(session: Session, saved: Path | None = None) -> Path | None:
    """Makes train.py, and its index entry, the best again. What was there instead is kept in the file `saved`, which is
    given back if so."""
    repository, kept = session.repository, None
    now = repository.edited_blob()
    if now == best_of(session).blob:
        return None
    if saved and now:
        kept = shutil.copyfile(repository.path / TRAIN, saved)
    repository.put_back(session.branch)
    return kept


# --- What came of it ---


def _how(status: int | None, problem: str | None, seconds: float) -> str:
    """How the command ended, in words; "" if it did well."""
    if problem:
        limit = {"hung": f"reached its time limit of {seconds:g} s", "flooded": "printed more than it may"}
        return limit.get(problem, "was stopped with the night")
    not_found = " (the shell did not find the command)" if status == 127 else ""
    return f"ended with exit status {status}{not_found}" if status else ""


def _judged(
    session: Session, log: Path, prompt: str, problem: str | None, how: str, older: bool, others: bool
) -> tuple[str, str, str]:
    """(outcome, what it did in words, description of the change).

    Args:
        older: train.py is that of another commit. others: other files changed.
    """
    lines = [line.strip() for line in plain(logs.read(log)).split("\n") if line.strip()]
    last = one_line(lines[-1], 120) if lines else ""
    if problem in ("stopped", "flooded"):
        return problem, f"{how}, and {TRAIN} was put back", ""
    content, flaw, why = _edit(session)
    if content is not None and older:
        content, flaw, why = None, "older", f"brought back an older {TRAIN}, which is no edit"
    if content is not None:
        description = _described(session, lines, prompt, content)
        return "edited", f"edited {TRAIN}: {description}" + (f"; it {how}" if how else ""), description
    said = " and ".join(filter(None, [how, why])) or f"did not edit {TRAIN}"
    if problem or flaw == "no python":
        return problem or flaw, said, ""
    if how:
        return "failed", said + (f'; its last line: "{last}"' if last else ""), ""
    if re.search(r"[?？][\s*_`\"')\]]*$", last):
        return "asked", f'{said} and asked, where nobody answers: "{last}"', ""
    return "elsewhere" if others and not flaw else "nothing", said, ""


def _edit(session: Session) -> tuple[bytes | None, str, str]:
    """(train.py if it is another program than the best; else None, what it is instead, and that in words)."""
    repository, best = session.repository, best_of(session)
    if not (repository.path / TRAIN).is_file():
        return None, "none", f"deleted {TRAIN}, or made a folder or a link of it"
    content = repository.train()
    try:
        if describe(content).digest != best.digest:
            return content, "", ""
    except LabError as error:
        return None, "no python", f"wrote what is no Python: {one_line(str(error).partition(';')[0], 160)}"
    if repository.edited_blob() == best.blob:
        return None, "", ""
    return None, "comments", f"changed only comments of {TRAIN}"


def _described(session: Session, lines: list[str], prompt: str, content: bytes) -> str:
    """The change in the agent's words, the last that begin with CHANGE:, or in ours. Agents echo their prompt."""
    echoed = {line.strip() for line in prompt.split("\n")}
    for line in reversed(lines):
        if (said := CHANGE.fullmatch(line)) and said[1] and line not in echoed:
            return one_line(said[1])
    return kinds.summary(session.repository.content(best_of(session).blob), content) or "moved things around"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"
