"""The power fails at every point where something is made durable: what was not flushed by then is gone or torn."""

import os
import random
import shutil
from pathlib import Path

import pytest
import sessions
from sessions import Runner
from sessions import attempt, edited

import storage
from lab.verdict import executor
from lab.session.session import Session
from lab.genome.syntax import TRAIN as FILE


class PowerLost(BaseException):
    pass


class Disk:
    """Knows what of a folder's files would survive a power failure.

    A file survives as it was when it was last flushed, with some of what was appended since; a new or replaced name
    once its folder was flushed too. Raises PowerLost at flush number `fails_at`, before or after it took effect.
    """

    def __init__(self, root: Path, fails_at: int, after: bool):
        self.root, self.fails_at, self.after, self.flushes = root, fails_at, after, 0
        self.content = {path: path.read_bytes() for path in self._files()}  # flushed, by inode's present name
        self.names = set(self.content)  # that survive
        self.pending: dict[Path, bytes | None] = {}  # replaced names whose folder is not flushed: what was there

    def _files(self):
        return [
            path
            for path in self.root.rglob("*")
            if path.is_file() and ".git" not in path.parts and "judge" not in path.parts
        ]

    def install(self, monkeypatch):
        fsync, replace = os.fsync, os.replace

        def watched_fsync(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.root not in path.parents and path != self.root:
                return fsync(descriptor)
            self.flushes += 1
            if self.flushes == self.fails_at and not self.after:
                raise PowerLost
            if path.is_dir():
                self.names |= {child for child in path.iterdir() if child.is_file()}
                for name in [name for name in self.pending if name.parent == path]:
                    del self.pending[name]
            else:
                self.content[path] = path.read_bytes()
            if self.flushes == self.fails_at:
                raise PowerLost
            return None

        def watched_replace(source, target):
            source, target = Path(source), Path(target)
            replace(source, target)
            if self.root in target.parents:
                self.pending.setdefault(target, self.content.get(target) if target in self.names else None)
                self.content[target] = self.content.pop(source, b"")

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)

    def fail(self, rng: random.Random) -> None:
        """Leaves on disk what survives."""
        for path in self._files():
            if path in self.pending:
                before = self.pending[path]
                survives = before if rng.random() < 0.5 else self.content.get(path, b"")
                path.unlink() if survives is None else path.write_bytes(survives)
            elif path not in self.names:
                if rng.random() < 0.5:
                    path.unlink()
                else:
                    path.write_bytes(self.content.get(path, b""))
            else:
                flushed, now = self.content.get(path, b""), path.read_bytes()
                tail = now[len(flushed) :] if now.startswith(flushed) else b""
                path.write_bytes(flushed + tail[: rng.randint(0, len(tail))])


def check(session):
    """No row lost, none twice; the branch at the best; a clean tree."""
    state = session.state
    assert state.oldest_open is None
    rows = [row["run"] for row in sessions.rows_of(session.ledger)]
    assert sorted(rows) == sorted(run.number for run in state.runs.values() if run.status != "lost")
    assert session.repository.blob_of(session.branch) == state.best.blob
    assert sessions.git(session.repository.path, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "kept, after",
    [
        pytest.param(True, False, id="keep, before a flush"),
        pytest.param(False, True, id="discard, after a flush"),
        pytest.param(True, True, id="keep, after a flush", marks=pytest.mark.slow),
        pytest.param(False, False, id="discard, before a flush", marks=pytest.mark.slow),
    ],
)
def test_whatever_was_not_flushed(tmp_path, monkeypatch, kept, after):
    Runner().install(monkeypatch)
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    content = edited(LOSS=0.9 if kept else 1.1)
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tmp_path, snapshot, symlinks=True, ignore=lambda *_: ["snapshot"])
    survived, fails_at = 0, 1
    while True:
        for name in ("project", "home"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(snapshot / name, tmp_path / name, symlinks=True)
        session = Session(storage.home() / "sessions" / sessions.DEVICE / sessions.TAG)
        (session.repository.path / FILE).write_bytes(content)  # the user's, and flushed long ago
        disk = Disk(tmp_path, fails_at, after)
        with monkeypatch.context() as patch:
            disk.install(patch)
            try:
                attempt(session, content)
            except PowerLost:
                survived += 1
            else:
                break
        disk.fail(random.Random(fails_at))
        fails_at += 1
        session.lock.release(force=True)
        session = Session(session.folder)
        taken = session.state.oldest_open is not None or len(session.state.experiments) > 1
        executor.supervise(session)
        if not taken:  # it had not been taken yet, and train.py is still there to be run
            assert (session.repository.path / FILE).read_bytes() == content
            attempt(session, content)
        check(session)
        assert len(session.state.experiments) == 2
        assert list(session.state.experiments.values())[-1].status == ("keep" if kept else "discard")
    assert survived >= 10
