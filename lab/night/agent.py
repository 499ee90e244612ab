"""A turn of the agent: a command of the user's gets a prompt, and edits train.py; whatever else it did is put right.

It costs a bounded time and a bounded log. Afterwards nothing of it runs, HEAD and branch are where they were, and
train.py is a sound edit of the best, or the best. Other files are left as the agent left them, and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

import storage
from lab import untrusted
from lab.genome import kinds, syntax as source
from lab.run import log as capture
from lab.errors import LabError
from lab.run import processes
from lab.session.session import Session
from lab.session.repository import TRAIN, Tree

RECORD = "turn.json"  # in the session's folder, while a turn is under way: where HEAD was
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


@dataclass(frozen=True)
class Turn:
    """What came of a turn.

    Attributes:
        outcome: "edited"; else train.py is the best again, and it "failed" (exit status), "hung" (time limit),
            "flooded" (output limit), "asked" (a question, of nobody), wrote "no python", changed only files "elsewhere"
            or did "nothing"; or it was "stopped" by who owns the loop, which is no failure.
        said: what it did, on a clean line that goes on from "the agent ...".
        description: of the change, what and why; "" unless edited.
        righted: something beside train.py had to be put right, or has no effect; `said` tells what.
        others: files beside train.py that changed meanwhile.
    """

    outcome: str
    said: str
    description: str
    others: list[str]
    seconds: float
    righted: bool = False


def due(turns: list[dict], fruitless=frozenset()) -> bool:
    """Whether the agent is asked next, and not the proposer: it is left alone for 1, 2, 4, and then always 8
    experiments once it has failed 3 times in a row, until it edits something that can be run.

    Args:
        fruitless: numbers of experiments that crashed or could not be judged: an agent whose are all so fails, too.
    """
    failures, rest = 0, set()
    for turn in turns:
        number = turn.get("experiment")
        if turn["by"] != "agent":
            rest.add(number)
        elif turn["outcome"] not in NEUTRAL:
            done = turn["outcome"] == "edited" and number is not None and number not in fruitless
            failures, rest = 0 if done else failures + 1, set()
    return failures < TIRES or len(rest) >= min(2 ** (failures - TIRES), LONGEST_REST)


def take_turn(
    session: Session,
    command: str,
    prompt: str,
    log: Path,
    seconds: float,
    most_bytes: int = PRINTED,
    stop=lambda: False,
) -> Turn:
    """Lets the agent edit train.py once. It is remembered until `settle`.

    Args:
        command: for the shell, in the session's repository, with the user's environment.
        prompt: for its standard input. It is kept beside the log.
        log: gets what it prints, the first and the last of it. seconds, most_bytes: limits.
        stop: asked again and again; once it says True, the turn is over.

    Raises:
        LabError: git or the repository can't be used.
    """
    begun, tree = time.monotonic(), session.tree
    log.parent.mkdir(parents=True, exist_ok=True)
    notes = recover(session)
    if saved := put_back(session, log.with_suffix(".before.py")):
        notes.append(f"found {TRAIN} edited when its turn began, by somebody else; that is in {saved}")
    place = {
        "branch": tree.branch(),
        "commit": tree.commit_of("HEAD"),
        "begun": time.time(),
        "log": str(log),
        "linked": (tree.path / TRAIN).is_symlink(),
        "experiment": session.state.last.number,
    }
    storage.write_json(_record(session), place)
    before = _digests(session)
    asked = log.with_suffix(".prompt")
    asked.write_text(prompt, encoding="utf-8", errors="replace")
    try:
        code, problem, left = _run(command, tree.path, asked, log, _mark(session), seconds, most_bytes, stop)
        tree.unlock(session.branch)
        elsewhere, told = _go_back(tree, place)
        after = _digests(session)
        others = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if left:
            told.append(f"left {_processes(left)} running, which had to be ended")
        outcome, said, description = _judged(session, log, prompt, code, problem, seconds, elsewhere, others)
        if outcome != "edited" and (saved := put_back(session, log.with_suffix(".train.py"))):
            told.append(f"had what it wrote put aside, in {saved}")
        if others:
            told.append(f"changed {_listed(others)}, which has no effect")
        turn = Turn(
            outcome,
            untrusted.one_line("; it ".join([said, *told, *notes]), 500),
            description,
            [untrusted.one_line(name) for name in others[:MOST_NAMED]],
            time.monotonic() - begun,
            bool(told),
        )
        storage.write_json(_record(session), place | {"turn": asdict(turn)})
    except BaseException:
        recover(session)
        raise
    return turn


def finished(session: Session) -> tuple[Turn, str] | None:
    """(a turn that is over and was not settled, its log): that of a night which was killed then."""
    place = _place(session)
    return (Turn(**place["turn"]), place["log"]) if place and "turn" in place else None


def settle(session: Session) -> None:
    """Forgets the last turn, once it is journalled."""
    _record(session).unlink(missing_ok=True)


def recover(session: Session) -> list[str]:
    """Puts right what a turn has left whose night was killed: its processes, HEAD and branch, train.py. Returns what
    was done, in words."""
    left = end(_mark(session))
    done = [f"left {_processes(left)} of an interrupted turn running, which had to be ended"] if left else []
    place = _place(session)
    if not place or "turn" in place:
        return done
    if place["experiment"] != session.state.last.number:  # long ago: somebody has worked here since
        _record(session).unlink()
        return done
    session.tree.unlock(session.branch)
    _, told = _go_back(session.tree, place)
    if saved := put_back(session, Path(place["log"]).with_suffix(".interrupted.py")):
        told.append(f"was interrupted; what it had written is in {saved}")
    _record(session).unlink()
    return done + told


def _record(session: Session) -> Path:
    return session.folder / RECORD


def _place(session: Session) -> dict | None:
    """What the record says; None if no turn was under way, or it had not yet begun."""
    try:
        return json.loads(_record(session).read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    output = capture.Log(reading, log, flood=most_bytes)
    detached = (
        {"start_new_session": True} if os.name == "posix" else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    )
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
                **detached,
            )
    finally:
        os.close(writing)
    deadline, problem = time.monotonic() + seconds, None
    try:
        while process.poll() is None and not problem:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            problem = (
                "flooded"
                if output.flooded
                else "stopped"
                if stop()
                else "hung"
                if time.monotonic() > deadline
                else None
            )
        ended = process.poll() is not None
    finally:
        left = end(mark, process.pid, GRACE if process.poll() is None else GRACE_LEFT)
        process.wait()
        output.close()
    if output.flooded:
        problem = "flooded"
    elif ended and problem == "hung":  # it was done at the last moment
        problem = None
    return (process.returncode if ended else None), problem, left if ended else 0


def end(mark: str, group: int | None = None, patience: float = GRACE_LEFT) -> int:
    """Ends every process with this mark in its environment or of this process group, and those below; how many."""
    return processes.end(lambda: _alive(mark, group), patience, ask=True)


def _alive(mark: str, group: int | None) -> list[psutil.Process]:
    return processes.marked(**{MARK: mark}) + (processes.in_group(group) if group is not None else [])


# --- The repository ---


def _digests(session: Session) -> dict[str, str]:
    """Of the content of every file that git does not ignore, train.py and the session's own aside."""
    tree, found = session.tree, {}
    names = tree.git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in set(names) - {"", TRAIN}:
        path = tree.path / name
        with suppress(OSError):
            if session.folder in path.parents:
                continue
            about = path.lstat()
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[name] = (
                    f"{about.st_size} {about.st_mtime_ns}"
                    if about.st_size > LARGE
                    else hashlib.sha256(path.read_bytes()).hexdigest()
                )
    return found


def _go_back(tree: Tree, place: dict) -> tuple[bool, list[str]]:
    """Makes HEAD and its branch what they were, and train.py a file; what was committed since stays in the files.

    Files that came with another commit go back with it; nobody's edits do, as with `git checkout`.

    Returns:
        (whether train.py is that of another commit and no edit, what was done in words).
    """
    path, branch, commit = tree.path / TRAIN, place["branch"], place["commit"]
    if path.is_symlink() and not place["linked"]:  # what is put back shall not be written to where it points
        path.unlink()
    if path.is_dir():
        shutil.move(path, f"{place['log']}.folder")
    ref, head = f"refs/heads/{branch}", tree.commit_of("HEAD")
    if tree.branch() == branch and head == commit:
        return False, []
    base, new = _base(tree, head, commit, place["begun"])
    told = [f"committed, which was taken back (the files stay; it was {head[:7]})"] if new else []
    if base != commit or tree.branch() != branch:
        told.append(f"moved HEAD to {tree.branch() or (head or 'nowhere')[:7]}, which was undone")
    aside = path.read_bytes() if path.is_file() else None
    if base:
        tree.git("update-ref", "--no-deref", "HEAD", base)  # detached: the branch it is on is left alone
    if branch:
        tree.move(ref, commit)
    elsewhere = bool(base and base != commit and _blob(tree) in (None, tree.blob_of(base)))
    if base and base != commit:
        _restore(tree, base)
        tree.git("checkout", "--quiet", branch or commit, "--", check=False)  # refuses to overwrite what was edited
        if aside is not None:
            path.write_bytes(aside)
    tree.git(*(("symbolic-ref", "HEAD", ref) if branch else ("update-ref", "--no-deref", "HEAD", commit)))
    return elsewhere, told


def _base(tree: Tree, head: str | None, commit: str, begun: float) -> tuple[str | None, int]:
    """(the commit that those made since grew on, how many these are)."""
    lines = tree.git("rev-list", "--first-parent", "--max-count=1000", "--timestamp", head).split("\n") if head else []
    for new, (made, one) in enumerate(line.split(" ") for line in lines):
        if int(made) < int(begun) or tree.git("merge-base", one, commit, check=False) == one:
            return one, new
    return None, 0


def _blob(tree: Tree) -> str | None:
    """Id of train.py as it is now; None if it is no file."""
    path = tree.path / TRAIN
    return tree.git("hash-object", f"--path={TRAIN}", "--", str(path)) if path.is_file() else None


def _restore(tree: Tree, commit: str) -> None:
    """Makes train.py and its index entry those of a commit."""
    path, mode = tree.path / TRAIN, tree.git("ls-tree", commit, TRAIN).split(" ")[0]
    blob = tree.blob_of(commit)
    if blob is None:
        return
    with storage.atomic(path) as file:
        file.write(tree.content(blob))
    if mode == "100755":
        path.chmod(0o755)
    tree.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{TRAIN}")


def put_back(session: Session, saved: Path | None = None) -> Path | None:
    """Makes train.py, and its index entry, the best again. What was there instead is kept in the file `saved`, which is
    given back if so."""
    tree, kept = session.tree, None
    now, path = _blob(tree), session.tree.path / TRAIN
    if now == session.state.best.blob:
        return None
    if saved and now:
        kept = shutil.copyfile(path, saved)
    _restore(tree, session.branch)
    return kept


# --- What came of it ---


def _judged(
    session: Session,
    log: Path,
    prompt: str,
    code: int | None,
    problem: str | None,
    seconds: float,
    elsewhere: bool,
    others: list[str],
) -> tuple[str, str, str]:
    """(outcome, what it did in words, description of the change)."""
    text = untrusted.plain(capture.read(log))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    last = untrusted.one_line(lines[-1], 120) if lines else ""
    how = {
        "hung": f"reached its time limit of {seconds:g} s",
        "stopped": "was stopped with the night",
        "flooded": "printed more than it may",
    }.get(problem) or (f"ended with exit status {code}" if code else "")
    if code == 127:
        how += " (the shell did not find the command)"
    if problem in ("stopped", "flooded"):
        return problem, f"{how}, and {TRAIN} was put back", ""
    content, why = _edit(session)
    if content is not None and elsewhere:
        content, why = None, f"brought back an older {TRAIN}, which is no edit"
    if content is not None:
        description = _described(session, lines, prompt, content)
        return "edited", f"edited {TRAIN}: {description}" + (f"; it {how}" if how else ""), description
    said = [part for part in (how, why) if part]
    if why and why.startswith("wrote"):
        return "hung" if problem else "no python", " and ".join(said), ""
    said = " and ".join(said or [f"did not edit {TRAIN}"])
    if problem:
        return "hung", said, ""
    if code:
        return "failed", said + (f'; its last line: "{last}"' if last else ""), ""
    if re.search(r"[?？][\s*_`\"')\]]*$", last):
        return "asked", f'{said} and asked, where nobody answers: "{last}"', ""
    return "elsewhere" if others and not why else "nothing", said, ""


def _edit(session: Session) -> tuple[bytes | None, str]:
    """(train.py if it is another program than the best; or None, and why not in words, if there is some to say)."""
    if not (session.tree.path / TRAIN).is_file():
        return None, f"deleted {TRAIN}, or made a folder or a link of it"
    content = session.tree.train()
    try:
        if source.describe(content).digest != session.state.best.digest:
            return content, ""
    except LabError as error:
        return None, f"wrote what is no Python: {untrusted.one_line(str(error).partition(';')[0], 160)}"
    return None, "" if _blob(session.tree) == session.state.best.blob else f"changed only comments of {TRAIN}"


def _described(session: Session, lines: list[str], prompt: str, content: bytes) -> str:
    """The change in the agent's words, the last that begin with CHANGE:, or in ours. Agents echo their prompt."""
    echoed = {line.strip() for line in prompt.split("\n")}
    for line in reversed(lines):
        if (found := CHANGE.fullmatch(line)) and found[1] and line not in echoed:
            return untrusted.one_line(found[1])
    return kinds.summary(session.tree.content(session.state.best.blob), content) or "moved things around"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _listed(files: list[str], most: int = 3) -> str:
    return ", ".join(untrusted.one_line(name, 80) for name in files[:most]) + (
        f" and {len(files) - most} more" if len(files) > most else ""
    )
