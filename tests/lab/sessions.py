"""Sessions without training: a small repository, and a runner that computes a score instead of a model."""

import argparse
import functools
import hashlib
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import backends
import storage
from calibration import profile, rule
from lab.fleet.worker import CODE
from lab.genome.syntax import describe
from lab.reasons import Reason
from lab.run import runner, sandbox
from lab.session import ledger
from lab.session.events import ExperimentOpened, SessionStarted
from lab.session.journal import Journal
from lab.session.repository import Repository
from lab.session.session import FORMAT, PREFIX, Local, Session, fingerprints
from lab.session.start import pin
from lab.session.state import State
from lab.verdict import executor, opening

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JUDGED = (*CODE, "terminal.py")
DEVICE, TAG = "fake-1gb", "night"
TRAIN = b"LOSS = 1.0\nNOISE = 0.001\nFAILS = None\nLEAK = 0.0\n"
PROFILE = {
    "settings": {"precision": "float32"},
    "products": {"rates": {"float32": {"median": 100.0, "low": 95.0, "high": 105.0, "n": 9}}},
}


def git(path: Path, *arguments: str) -> str:
    command = ["git", "-C", str(path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def repository(path: Path, train: bytes = TRAIN, project: bool = False) -> Repository:
    """
    Args:
        project: with all that it takes to run and judge a train.py, tests/lab/fake_train.py say.
    """
    path.mkdir(parents=True)
    git(path, "init", "-q", "-b", "main")
    (path / "train.py").write_bytes(train)
    (path / "prepare.py").write_text("BUDGET = 300\n")
    (path / "program.md").write_text("be good\n")
    if project:
        for name in ("findings", *JUDGED):
            if name.endswith(".py"):
                shutil.copy(ROOT / name, path)
            else:
                shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "fake_backend.py", path)
        (path / ".gitignore").write_text("__pycache__/\n")
    git(path, "add", ".")
    git(path, "commit", "-qm", "first")
    return Repository(path)


def make(
    path: Path,
    train: bytes = TRAIN,
    project: bool = False,
    settings: dict | None = None,
    device: str = DEVICE,
    tag: str = TAG,
    **facts,
) -> Session:
    """A session as `start` leaves it, in a repository of its own. `facts` are of SessionStarted."""
    repository_ = repository(path, train, project)
    commit, name = repository_.commit_of("HEAD"), f"{device}/{tag}"
    folder = storage.home() / "sessions" / name
    pin(repository_, folder, commit)
    storage.write_json(folder / "profile.json", PROFILE)
    journal = Journal(folder / "journal.jsonl")
    known = {
        "device": device,
        "tag": tag,
        "backend": "fake",
        "commit": commit,
        "budget": 300.0,
        "baseline_runs": 3,
        "dataset": "tiny",
        "eval": "e" * 12,
        "data": "d" * 12,
        "profile": "p" * 12,
    }
    journal.append(SessionStarted(**known | facts))
    source = describe(train)
    journal.append(
        ExperimentOpened(
            number=0,
            kind="baseline",
            blob=repository_.blob_of(commit),
            commit=commit,
            description="baseline",
            digest=source.digest,
            complexity=source.complexity,
            portable=source.portable,
        )
    )
    repository_.move(f"refs/heads/{PREFIX}{name}", commit)
    repository_.git("symbolic-ref", "HEAD", f"refs/heads/{PREFIX}{name}")
    local = Local(
        format=FORMAT,
        repository=str(repository_.path),
        commit=commit,
        gpu="",
        executable=sys.executable,
        settings=settings or {},
        memory_ceiling=None,
        unified=True,
        judge=fingerprints(folder / "judge"),
    )
    storage.write_json(folder / "session.json", msgspec.to_builtins(local))
    return Session(folder)


def edited(**values) -> bytes:
    """A train.py with other constants."""
    names = [line.split(b" = ")[0].decode() for line in TRAIN.splitlines()]
    content = TRAIN.decode()
    for name, value in values.items():
        if name in names:
            lines = [f"{name} = {value!r}" if line.startswith(f"{name} =") else line for line in content.splitlines()]
            content = "\n".join(lines) + "\n"
        else:
            content += f"{name} = {value!r}\n"
    return content.encode()


def attempt(session: Session, content: bytes | None = None, message: str = "why", **more):
    """What `run` does, to the verdict, in this process. Gives the experiment."""
    if content is not None:
        (session.repository.path / "train.py").write_bytes(content)
    with opening.exclusive(session):
        if answer := opening.open_change(session, message, **more):
            return answer
    executor.supervise(session)
    return session.state.last


def options(**values) -> argparse.Namespace:
    """What a command is given."""
    return argparse.Namespace(**{"json": False, "wait": 5.0, "number": None, "note": "", **values})


def said(capsys, command, session, **values) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert command(session, options(**values)) == 0
    return capsys.readouterr().out


def check(session: Session) -> None:
    """No row lost, none twice; the branch at the best; a clean tree; the state is what the journal says."""
    state = session.state
    assert state.open == []
    rows = [row["run"] for row in rows_of(session.ledger)]
    assert sorted(rows) == sorted(run.number for run in state.runs.values() if run.status != "lost")
    assert session.repository.blob_of(session.branch) == state.best.blob
    assert git(session.repository.path, "status", "--porcelain") == ""
    assert ledger.dumps(ledger.rows_of(State(Journal(session.journal.path).events))) == session.ledger.read_bytes()


class Alive:
    """In place of the process that carries an experiment out: it does so at once, in this process."""

    def __init__(self, session):
        executor.supervise(Session(session.folder))

    def poll(self):
        return 0


class Runner:
    """In place of lab.runner: a run "trains" by reading constants of its train.py. Counts what it did.

    A train.py sets LOSS and NOISE (standard deviation), FAILS ("crash", "invalid" or None), LEAK (how much better it is
    on validation rows than on others), FIXED (weights it always starts with), EVAL (tag),
    ATTENTION (provider), DISTURBED, STEP (seconds), LIES (how much better it says it is), DAMAGES (the judge).
    """

    def __init__(self):
        self.runs, self.scored, self.ended = [], [], []

    def install(self, monkeypatch):
        for name in ("run", "score", "end"):
            monkeypatch.setattr(runner, name, getattr(self, name))
        return self

    def run(self, request):
        made, facts = self._facts(request.folder)
        self.runs.append((made, request.seed, request.budget))
        if facts.get("DAMAGES"):
            (request.judge / "prepare.py").write_text("BUDGET = 3000\n")
        if facts.get("FAILS"):
            return SimpleNamespace(
                status=facts["FAILS"],
                reason=Reason("exit_status", {"status": facts["FAILS"]}),
                result=None,
                seconds=1.0,
                traceback="Traceback: boom" if facts["FAILS"] == "crash" else "",
            )
        bpb = self._bpb(made, facts, request.seed)
        (request.folder / "result.safetensors").write_text(repr(bpb))
        result = {
            "val_bpb": bpb - facts.get("LIES", 0),
            "training_seconds": request.budget,
            "total_tokens_M": 2800.0,
            "tokens_per_second": 1000.0,
            "disturbance": facts.get("DISTURBED", 0.0),
            "paused_seconds": 0.0,
            "probe_seconds": 1e-4,
            "step_seconds": {"1.1x2048+1.step": facts.get("STEP", 0.1)},
            "speed": 1.0,
            "peak_vram_mb": 1024.0,
            "num_steps": 10,
            "num_params_M": 1.0,
            "initial_weights": drawn(facts.get("FIXED", request.seed)),
            "eval": facts.get("EVAL", "e" * 12),
            "data": "d" * 12,
            "profile": "p" * 12,
            "device": DEVICE,
            "backend": "fake",
            "depth": 2,
            "val_rows": 8,
            "mfu_percent": 40.0,
            "attention_provider": facts.get("ATTENTION"),
            "total_seconds": request.budget + 20,
        }
        return SimpleNamespace(status="ok", reason=None, result=result, seconds=request.budget + 20, traceback="")

    def score(self, request, weights):
        _, facts = self._facts(request.folder)
        self.scored.append(request.folder.name)
        try:
            bpb = float(weights.read_text())
        except OSError:
            return Reason("no_weights")
        rng = np.random.default_rng(0)
        nats = rng.normal(1000, 10, 64)
        np.savez(
            request.folder / "rows.npz",
            val_nats=nats * bpb,
            val_bytes=np.full(64, 1000.0),
            held_nats=nats * (bpb + facts["LEAK"]),
            held_bytes=np.full(64, 1000.0),
        )
        return SimpleNamespace(val_bpb=bpb, held_out_bpb=bpb + 0.01 + facts["LEAK"])

    def end(self, run_id):
        self.ended.append(run_id)
        return 0

    @staticmethod
    def _facts(folder: Path) -> tuple[bytes, dict]:
        content, facts = (folder / "train.py").read_bytes(), {}
        exec(content, facts)
        return content, facts

    @staticmethod
    def _bpb(content: bytes, facts: dict, seed: int) -> float:
        digest = hashlib.sha256(content + str(seed).encode()).hexdigest()
        return facts["LOSS"] + random.Random(digest).gauss(0, facts["NOISE"])


def drawn(seed) -> str:
    """What stands for initial weights drawn with this seed."""
    return hashlib.sha256(f"{seed}".encode()).hexdigest()[:48]


@functools.cache
def available() -> list:
    """The sandboxes that work here, as parameters; the others are skipped."""
    return [
        pytest.param(
            name,
            marks=()
            if shutil.which(name) and sandbox.works(name)
            else pytest.mark.skip(reason=f"{name} does not work here"),
        )
        for name in sandbox.NAMES
    ]


def made_up_profile(backend: str) -> Path:
    """A profile of this device in the test's home, so that a run has nothing to find out."""
    hardware, spread = backends.identify(backend), {"median": 1e10, "low": 9e9, "high": 2e10, "n": 3}
    kinds = {"sdpa": {"full": "sdpa_causal", "window": "sdpa_blocks"}, "mlx": {"full": "fused", "window": "fused"}}
    path = storage.home() / "sessions" / "profile.json"
    made = {
        "format": profile.FORMAT,
        "device": hardware.slug,
        "backend": backend,
        "made": "now",
        "train": "x",
        "versions": hardware.versions,
        "products": {"square": 64, "rates": {"float32": spread}},
        "trials": [],
        "settings": {**asdict(rule.SAFE), "precision": "float32", "attention": kinds[backend]},
    }
    storage.write_json(path, made)
    return path


def rows_of(path) -> list[dict]:
    """The rows of a ledger by column, as they were before they were written: numbers, None where nothing is, texts."""
    header, *lines = [line.split("\t") for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    return [{name: _value(name, text) for name, text in zip(header, fields, strict=True)} for fields in lines]


def _value(name, text):
    if name not in ledger.FORMS:
        meaning = {"t": "\t", "n": "\n", "r": "\r"}
        return re.sub(r"\\(.)", lambda escape: meaning.get(escape[1], escape[1]), text)
    number = None if not text else int(text) if ledger.FORMS[name] == "d" else float(text)
    return None if name in ledger.NEVER_ZERO and not number else number
