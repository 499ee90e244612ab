"""The user's git repository: what the lab reads of it, and the few things it changes.

An experiment's commit is made beside the branch, without touching index or files; refs/autoresearch/ keeps it for good.
The branch moves, in one step, when the experiment is kept. So at every moment it is at the best commit kept so far.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

import storage
from lab.errors import LabError
from lab.genome.syntax import TRAIN, normalised
from lab.reasons import Reason, because

SETTINGS = ("gc.auto=0", "commit.gpgSign=false", "core.hooksPath=/dev/null")
# Set while a hook runs, these would make git look at another repository.
ELSEWHERE = {f"GIT_{name}" for name in ("DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "NAMESPACE", "PREFIX")}
FALLBACK_IDENTITY = {"NAME": "autoresearch", "EMAIL": "autoresearch@localhost"}
LOCK_PATIENCE = 5.0  # seconds that another git may hold a lock


class Repository:
    """A repository with train.py at its root.

    Raises:
        LabError: there is no git or no such repository.
    """

    def __init__(self, path: Path):
        self.path = path
        root = self.git("rev-parse", "--show-toplevel", check=False)
        if not root and not any((folder / ".git").exists() for folder in (path, *path.absolute().parents)):
            raise LabError(
                f"{path} is not in a git repository (it was perhaps downloaded as ZIP), and each experiment is a "
                "commit. To make it one: git init && git add . && git commit -m start"
            )
        root = root or self.git("rev-parse", "--show-toplevel")  # which says why it can't be used
        self.path = Path(root)
        if not (self.path / TRAIN).is_file():
            known = self.git("ls-files", "--", TRAIN)
            raise LabError(
                f"{TRAIN} is gone; get it back with: git checkout HEAD -- {TRAIN}"
                if known
                else f"there is no {TRAIN} at the root of the repository {root}: is this the project?"
            )

    def git(self, *arguments: str, content: bytes | None = None, check: bool = True, **environment: str | Path) -> str:
        """What a git command prints. LabError with its message if it fails; with check=False then nothing."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while (done := self._run(arguments, content, environment)).returncode and check:
            if b".lock'" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.1)  # an editor looks at the repository, say
        if done.returncode and check:
            message = "; ".join(done.stderr.decode(errors="replace").split("\n")).strip("; ")
            raise LabError(f"git {arguments[0]} failed in {self.path}: {message}")
        return "" if done.returncode else done.stdout.decode(errors="replace").rstrip("\n")

    def _run(self, arguments, content: bytes | None = None, more: dict | None = None) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
        if arguments[0] == "commit-tree":
            environment = self._identity() | environment
        environment |= {"GIT_OPTIONAL_LOCKS": "0", **(more or {})}  # a look changes nothing, the index neither
        try:  # In a session of its own: Ctrl-C is for who called it.
            settings = [part for setting in (*SETTINGS, durable()) for part in ("-c", setting)]
            command = ["git", "-C", str(self.path), *settings, *arguments]
            return subprocess.run(command, input=content, env=environment, capture_output=True, start_new_session=True)
        except FileNotFoundError as error:
            raise LabError("git was not found; install it") from error

    def _identity(self) -> dict[str, str]:
        """The author of commits: the user if git knows one."""
        known = {name: self.git("config", f"user.{name.lower()}", check=False) for name in FALLBACK_IDENTITY}
        return {
            f"GIT_{role}_{name}": known[name] or fallback
            for role in ("AUTHOR", "COMMITTER")
            for name, fallback in FALLBACK_IDENTITY.items()
        }

    # --- Reading ---

    def branch(self) -> str | None:
        """The branch that is checked out; None if HEAD is detached."""
        # Not --short: where a tag has the branch's name that would be "heads/NAME".
        return self.git("symbolic-ref", "--quiet", "HEAD", check=False).removeprefix("refs/heads/") or None

    def some_branch(self) -> str:
        """The branch that is checked out. LabError if HEAD is detached."""
        if (branch := self.branch()) is None:
            raise LabError("HEAD is detached, so there is no branch to return to. First make one: git switch -c NAME")
        return branch

    def refuse_uncommitted(self) -> None:
        """LabError if train.py has changes that no commit holds."""
        if self.git("status", "--porcelain", "--", TRAIN):
            raise LabError(
                f"{TRAIN} has changes that are not committed. A session starts from a commit. To commit them: git "
                f"commit {TRAIN}; to discard them: git checkout -- {TRAIN}"
            )

    def commit_of(self, name: str) -> str | None:
        return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False) or None

    def blob_of(self, commit: str) -> str | None:
        """The id of a commit's train.py."""
        return self.git("rev-parse", "--verify", "--quiet", f"{commit}:{TRAIN}", check=False) or None

    def settled_blob(self) -> str | None:
        """The id of the train.py that was put there last, on which an edit in the working tree was begun."""
        return self.blob_of("")  # of no commit: git's index

    def content(self, blob: str) -> bytes:
        """The content as git would check it out as train.py."""
        done = self._run(("cat-file", "--filters", f"--path={TRAIN}", blob))
        if done.returncode:
            raise LabError(f"git does not have {blob}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def contents(self, blobs: list[str]) -> dict[str, bytes]:
        """Blob id -> what git stores for it, of many at once; those that it does not have are left out."""
        done = self._run(("cat-file", "--batch"), content="\n".join(dict.fromkeys(blobs)).encode())
        found, at, text = {}, 0, done.stdout
        while at < len(text):
            end = text.index(b"\n", at)
            blob, *facts = text[at:end].decode().split(" ")
            at = end + 1
            if facts[0] == "blob":
                size = int(facts[1])
                found[blob], at = text[at : at + size], at + size + 1
        return found

    def train(self) -> bytes:
        """The user's train.py as it is now, in bytes. LabError if it can't be read."""
        try:
            return (self.path / TRAIN).read_bytes()
        except OSError as error:
            raise LabError(
                f"{self.path / TRAIN} can't be read ({error}); get it back with: git checkout -- {TRAIN}"
            ) from error

    def store(self, content: bytes) -> str:
        """The blob id of a train.py, which is stored: with the line ends that git has, whatever an editor makes of
        them."""
        content = content if self._stores_crlf else normalised(content)
        return self.git("hash-object", "-w", "--no-filters", "--stdin", content=content)

    @functools.cached_property
    def _stores_crlf(self) -> bool:
        """Whether train.py was committed with the line ends of Windows."""
        blob = self.blob_of("HEAD")
        return bool(blob) and b"\r\n" in self.contents([blob]).get(blob, b"")

    def changed(self, ignored: bool = False) -> list[str]:
        """Files other than train.py that differ from what is committed, or are new, or are ignored; a folder without
        any other file stands for what is in it, with a slash."""
        more = ["--ignored"] * ignored
        entries = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=normal", *more).split("\0")
        return [entry[3:] for entry in entries if entry and entry[3:] != TRAIN]

    def clone(self, folder: Path, branch: str) -> None:
        """A repository of its own in a folder that is not there yet, with this branch checked out, all refs of this one
        and its objects, which are shared. It has no remote: what git does in it moves nothing here."""
        options = "--quiet", "--shared", "--mirror", "--template=", "--origin", "origin"
        self.git("clone", *options, str(self.path), str(folder / ".git"))
        for command in (
            ("config", "--remove-section", "remote.origin"),
            ("config", "core.bare", "false"),
            ("symbolic-ref", "HEAD", f"refs/heads/{branch}"),
            ("reset", "--quiet", "--hard"),
        ):
            self.git(*command, GIT_DIR=folder / ".git", GIT_WORK_TREE=folder)

    # --- Changing ---

    def commit(self, parent: str, blob: str, message: str, like: str | None = None) -> str:
        """A commit on top of `parent` with this train.py and nothing else changed; no branch, index or file is.

        Args:
            like: a commit that it is made at the time of.
        """
        return self._commit(parent, f"{self._mode(parent)} {blob}\t{TRAIN}\0", message, like)

    def commit_files(self, parent: str, folder: str, files: dict[str, bytes], message: str) -> str:
        """A commit on top of `parent` in which a folder (its name with a slash) holds these files, by path, and nothing
        else; no branch, index or file is changed."""
        known = filter(None, self.git("ls-tree", "-r", "--name-only", "-z", parent, "--", folder).split("\0"))
        entries = [f"0 {'0' * len(parent)}\t{path}\0" for path in known]
        with tempfile.TemporaryDirectory() as temporary:
            paths = [Path(temporary, str(place)) for place in range(len(files))]
            for path, data in zip(paths, files.values()):
                path.write_bytes(data)
            names = "\n".join(map(str, paths)).encode()
            blobs = self.git("hash-object", "-w", "--no-filters", "--stdin-paths", content=names).split("\n")
        entries += [f"100644 {blob}\t{name}\0" for name, blob in zip(files, blobs)]
        return self._commit(parent, "".join(entries), message)

    def _commit(self, parent: str, entries: str, message: str, like: str | None = None) -> str:
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            self.git("read-tree", parent, GIT_INDEX_FILE=index)
            self.git("update-index", "-z", "--index-info", content=entries.encode(), GIT_INDEX_FILE=index)
            root = self.git("write-tree", GIT_INDEX_FILE=index)
        when = self.git("show", "--no-patch", "--format=%cI", like) if like else None
        dates = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), when) if when else {}
        return self.git("commit-tree", root, "-p", parent, "-F", "-", content=message.encode(errors="replace"), **dates)

    def _mode(self, commit: str) -> str:
        return self.git("ls-tree", commit, TRAIN).split(" ")[0]

    def move(self, ref: str, commit: str, before: str | None = None) -> None:
        """Sets a ref; LabError if it is not at `before`, where that is given."""
        self.git("update-ref", ref, commit, *([before] if before else []))

    def settle(self, branch: str, tested: str, parent: str) -> Reason | None:
        """Makes train.py and its index entry those of the branch again after an experiment; or, if another branch is
        checked out, those of that one.

        Args:
            tested, parent: blobs that train.py may be at, as nobody has edited it then.

        Returns:
            Why train.py was left as it is, or None.
        """
        head, here, now = self.blob_of("HEAD"), self.branch() == branch, self.edited_blob()
        if here and now not in (tested, parent, head) or not here and now not in (tested, head):
            return because("edited_meanwhile")
        if head is None:
            return because("no_train", branch=self.branch() or "HEAD")
        self.put_back("HEAD")
        return None if here else because("not_checked_out", branch=branch)

    def edited_blob(self) -> str | None:
        """The blob id of train.py as it is now; None if it is not a file."""
        path = self.path / TRAIN
        return self.store(path.read_bytes()) if path.is_file() else None

    def put_back(self, commit: str) -> None:
        """Makes train.py and its index entry those of a commit. A link stays one, and a mode stays what it is."""
        if (blob := self.blob_of(commit)) is None:
            return
        path, mode, content = (self.path / TRAIN).resolve(), self._mode(commit), self.content(blob)
        if not path.is_file() or path.read_bytes() != content:
            there = path.stat().st_mode if path.exists() else None
            with storage.atomic(path) as file:
                file.write(content)
            path.chmod(there if there is not None else 0o755 if mode == "100755" else 0o644)
        # Not `reset`: it keeps what the index knew of the file's size, which line ends may have changed.
        self.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{TRAIN}")

    def unlock(self, branch: str) -> list[str]:
        """Removes locks that a killed git left on what the lab changes, and names them; and what a killed `settle` has
        left of train.py."""
        names = ("index", "HEAD", f"refs/heads/{branch}", "packed-refs")
        locks = [self.path / self.git("rev-parse", "--git-path", f"{name}.lock") for name in names]
        refs = self.path / self.git("rev-parse", "--git-path", "refs/autoresearch")
        locks += refs.rglob("*.lock") if refs.is_dir() else ()
        deadline = time.monotonic() + LOCK_PATIENCE
        while (held := [lock for lock in locks if lock.exists()]) and self._git_runs():
            if time.monotonic() > deadline:
                raise LabError(f"another git process holds {held[0]}; wait until it ends, then run this again")
            time.sleep(0.1)
        for path in (*held, *self.path.glob(f"{TRAIN}.[0-9]*.tmp")):
            path.unlink(missing_ok=True)
        return [str(lock) for lock in held]

    def _git_runs(self) -> bool:
        """Whether a git works on this repository."""
        for process in psutil.process_iter(["name", "cmdline", "cwd"]):
            about = process.info
            if (about["name"] or "").startswith("git") and about["cwd"] is not None:
                if Path(about["cwd"]).is_relative_to(self.path) or str(self.path) in (about["cmdline"] or ()):
                    return True
        return False


def here() -> Repository | None:
    """The repository of the working directory; None if that is in none."""
    try:
        return Repository(Path.cwd())
    except LabError:
        return None


@functools.cache
def durable() -> str:
    """The setting that makes git flush what it writes."""
    done = subprocess.run(["git", "version"], capture_output=True, text=True, check=False)
    version = tuple(map(int, re.findall(r"\d+", done.stdout)[:2]))
    return "core.fsync=all" if version >= (2, 36) else "core.fsyncObjectFiles=true"
