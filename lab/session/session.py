"""A session: what was pinned at its start, where its things are, and how it is found, locked and resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from functools import cached_property
from pathlib import Path

import filelock

import storage
from lab.run import runner
from lab.verdict import gate
from lab.errors import LabError
from lab.session.journal import Journal
from lab.session.state import REPLAY, Experiment, Run, State
from lab.session.repository import TRAIN, Tree

FORMAT = 1
HOLD = "hold.json"
PREFIX = "autoresearch/"  # of branches: autoresearch/<device>/<tag>
FIRST_TIMEOUT = 1200  # seconds beyond the budget, before anything was measured
SLACK = 120  # seconds beyond the budget and twice what start and evaluation took: another shape has to be compiled
HELD = ("paused", "stopped")  # by `lab pause`, by the end of a night
PASSED_ON = ("BACKEND", "DEVICE", "FA3_LIBRARY")  # settings of the user's that stay as they were at the start


class Session:
    """An open session.

    Attributes:
        folder: where everything is kept. facts: session.json. journal, state: what happened so far.
        lock: held by whoever writes the journal. night_lock: by the night that owns the session.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.facts = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LabError(f"there is no session in {folder}; begin one: python -m lab start TAG") from None
        except (ValueError, OSError) as error:
            raise LabError(f"{folder / 'session.json'} can't be read ({error})") from error
        if not isinstance(self.facts, dict) or self.facts.get("format") != FORMAT:
            raise LabError(f"{folder} was made by another version of this project: use that one, or start anew")
        self.journal = Journal(folder / "journal.jsonl")
        self.state = State(self.journal.events)
        self.lock = filelock.FileLock(folder / "lock")
        self.night_lock = filelock.FileLock(folder / "night.lock")

    @property
    def name(self) -> str:
        return f"{self.facts['device']}/{self.facts['tag']}"

    @property
    def branch(self) -> str:
        return PREFIX + self.name

    @property
    def judge(self) -> Path:
        return self.folder / "judge"

    @property
    def ledger(self) -> Path:
        return self.folder / "results.tsv"

    @property
    def budget(self) -> float:
        return self.facts["budget"]

    @cached_property
    def tree(self) -> Tree:
        path = Path(self.facts["tree"])
        if not path.is_dir():
            raise LabError(f"the session's repository is gone: {path}")
        return Tree(path)

    @cached_property
    def profile(self) -> dict:
        return json.loads((self.folder / "profile.json").read_text(encoding="utf-8"))

    @property
    def device_lock(self) -> filelock.FileLock:
        return device_lock(self.facts["device"], self.facts["gpu"])

    def log(self, event: str, **facts) -> None:
        """Journals an event, and takes it into the state."""
        seen = len(self.journal.events)
        self.journal.append(event, **facts)
        for new in self.journal.events[seen:]:
            self.state.take(new)

    def refresh(self) -> None:
        for event in self.journal.refresh():
            self.state.take(event)

    @property
    def supervised(self) -> bool:
        """Whether a process is at work on this session."""
        return taken(self.lock)

    @property
    def owned_by_night(self) -> bool:
        """Whether a night is at work on this session: this process's own, or another's."""
        return self.night_lock.is_locked or taken(self.night_lock)

    # --- Held: nothing is to use the device ---

    @property
    def held(self) -> dict | None:
        """{"why": one of HELD, "now": whether a run under way ends, too}, or None. A file that says neither still
        holds, as somebody wanted the device left alone; but no run is ended on the strength of it."""
        try:
            found = json.loads((self.folder / HOLD).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            found = None
        found = found if isinstance(found, dict) else {}
        return {"why": found["why"] if found.get("why") in HELD else HELD[0], "now": found.get("now") is True}

    def hold(self, why: str, now: bool) -> None:
        """From here on nothing is trained or scored, until `release`.

        Args:
            why: one of HELD. now: what is being trained or scored ends, too, and is done again later.
        """
        storage.write_json(self.folder / HOLD, {"why": why, "now": now})

    def release(self) -> None:
        (self.folder / HOLD).unlink(missing_ok=True)
        storage.sync_folder(self.folder)

    def ending(self) -> str | None:
        """Why a run under way is to end now, if it is."""
        held = self.held
        return held["why"] if held and held["now"] else None

    # --- What the gate needs ---

    @property
    def noise(self) -> gate.Noise:
        """Standard deviation of val_bpb between seeds: pooled over the session's repeats, calibration's as a prior."""
        return gate.pooled(self.state.repeats(self.budget), self._noise_prior())

    def _noise_prior(self) -> float:
        from calibration.noise import expected  # here, because what only reads a session shall start fast

        run = next(run for run in self.state.baseline.runs if run.status == "ok")
        return run.bpb * expected(run.result["total_tokens_M"] * 1e6)

    @property
    def account(self) -> gate.Account:
        account = gate.Account()
        for experiment in self.state.decided:
            if "gate" in experiment.verdict:
                costs = {"loss": 0.0} if experiment.kind == REPLAY else {}  # the branch did not move
                account = account.after(experiment.verdict["gate"] | costs)
        return account

    # --- What a run needs ---

    def overhead(self) -> float | None:
        """The most seconds that a run took beside its training."""
        took = [run.seconds - run.result["training_seconds"] for run in self.state.runs.values() if run.status == "ok"]
        return max(took, default=None)

    def timeout(self, budget: float) -> float:
        overhead = self.overhead()
        return budget + (FIRST_TIMEOUT if overhead is None else 2 * overhead + SLACK)

    def run_folder(self, number: int) -> Path:
        return self.folder / "runs" / f"{number:04d}"

    def run_id(self, number: int) -> str:
        return f"{self.name}/{number}"

    def request(self, number: int, blob: str, seed: int, budget: float) -> runner.Request:
        """A guarded run of this train.py, whose folder is made anew."""
        folder = self.run_folder(number)
        runner.remove(folder)
        folder.mkdir(parents=True)
        (folder / TRAIN).write_bytes(self.tree.content(blob))
        return self.again(number, seed, budget)

    def again(self, number: int, seed: int, budget: float) -> runner.Request:
        """As `request`, for a run whose folder is there."""
        return runner.Request(
            judge=self.judge,
            folder=self.run_folder(number),
            seed=seed,
            budget=budget,
            timeout=self.timeout(budget),
            run_id=self.run_id(number),
            settings=self.facts["settings"],
            memory_ceiling=self.facts["memory_ceiling"],
            unified=self.facts["unified"],
            sandbox=self.facts["sandbox"],
            protected=[self.tree.path, self.folder],
            ending=self.ending,
        )

    def mend_judge(self) -> list[str]:
        """Files of the judge that are not as they were pinned; they are put back."""
        wrong = differing(self.judge, self.facts["judge"])
        if wrong:
            judge = Tree(self.judge)
            judge.git("checkout", "--force", "--quiet", self.facts["commit"], "--", ".")
            judge.git("clean", "-ffdxq")
            if still := differing(self.judge, self.facts["judge"]):
                raise LabError(f"the session's judge can't be restored: {', '.join(still[:5])} in {self.judge}")
        return wrong

    # --- Resuming ---

    def recover(self) -> list[str]:
        """After a kill or a power failure: ends what is left of a run, frees what a dead git locked, and notes runs
        that were lost. To be called with the lock held. Returns what it did, in words."""
        self.refresh()
        state, tree = self.state, self.tree
        done = [f"removed a lock that a killed git had left: {path}" for path in tree.unlock(self.branch)]
        tree.sweep()
        if state.pending and state.pending.runs:
            runner.end(self.run_id(state.pending.runs[-1].number))  # training, or being scored
        for run in state.runs.values():
            if run.status is None:
                self.log("ran", run=run.number, status="lost", reason=self.ending() or "the harness was killed")
                done.append(f"run {run.number} was interrupted")
        best, head = state.best, tree.commit_of(self.branch)
        if best and best.applied and head and head == tree.commit_of(f"{best.applied['commit']}^"):
            tree.move(f"refs/heads/{self.branch}", best.applied["commit"], head)
            done.append(f"the branch was behind: it is at {best.applied['commit'][:7]} again")
        return done

    def launch(self) -> subprocess.Popen:
        """Starts the process that brings the pending experiment to its verdict. It outlives whoever started it."""
        program = self.judge / "lab" / "__main__.py"
        command = [self.facts["executable"], str(program), "--session", str(self.folder), "supervise"]
        detached = (
            {"start_new_session": True}
            if os.name == "posix"
            else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
        )
        with open(self.folder / "supervisor.log", "wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **detached
            )

    def begin(self, **facts) -> Experiment:
        """Journals an experiment after the baseline, to be launched. To be called with the lock held."""
        number = self.state.last.number + 1
        self.tree.move(f"refs/autoresearch/{self.name}/{number}", facts["commit"])
        self.log("experiment", number=number, begun=time.time(), **facts)
        return self.state.experiments[number]

    def begin_run(self, experiment: Experiment, blob: str, seed: int, budget: float) -> Run:
        number = self.state.next_run()
        self.log(
            "run", number=number, experiment=experiment.number, blob=blob, seed=seed, budget=budget, begun=time.time()
        )
        return self.state.runs[number]


# Files and folders that appear by themselves, made by Python, git, file managers, and macOS on foreign disks.
BY_THEMSELVES = re.compile(r"__pycache__|\.git|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)


def fingerprints(judge: Path) -> dict[str, str]:
    """sha256 of each of a judge's files, those aside that appear by themselves."""
    digests = {}
    for folder, folders, files in os.walk(judge):
        folders[:] = [name for name in folders if not BY_THEMSELVES.fullmatch(name)]
        for path in (Path(folder, name) for name in files if not BY_THEMSELVES.fullmatch(name)):
            digests[path.relative_to(judge).as_posix()] = (
                storage.sha256(path) if path.is_file() else "a link to nothing"
            )
    return digests


def differing(judge: Path, pinned: dict[str, str]) -> list[str]:
    """Files of a judge that differ from what was pinned, are missing or new."""
    return sorted({name for name, _ in fingerprints(judge).items() ^ pinned.items()})


def device_lock(device: str, gpu: str) -> filelock.FileLock:
    """Held while anything trains on this device, in whatever session."""
    name = re.sub(r"[^0-9A-Za-z.-]", "", f"{device}-{gpu}".strip("-"))
    path = storage.home() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path)


def taken(lock: filelock.FileLock) -> bool:
    """Whether a lock is held, by another process or another object of this one."""
    try:
        with lock.acquire(blocking=False):
            return False
    except filelock.Timeout:
        return True


def refuse_if_busy(lock: filelock.FileLock) -> None:
    """LabError if something else trains on the device."""
    if taken(lock):
        raise LabError(
            "another session is training on this device, and two at once would slow each other down: wait "
            "until it is done (python -m lab wait, in its repository), then run this again"
        )


def at(path: Path) -> Session:
    """The session whose branch is checked out in the repository at `path`. LabError if there is none."""
    tree = Tree(path)
    branch = tree.branch()
    if not branch or not branch.startswith(PREFIX):
        raise LabError(
            f"no session's branch is checked out ({branch or 'HEAD is detached'}); begin one: python -m lab "
            f"start TAG, or go back to one: git switch {PREFIX}<device>/<tag>"
        )
    session = Session(folder_of(branch[len(PREFIX) :]))
    if Path(session.facts["tree"]) != tree.path:
        raise LabError(f"session {session.name} belongs to the repository {session.facts['tree']}, not to {tree.path}")
    if not session.judge.is_dir():
        raise LabError(
            f"the session's judge is gone; get it back with: git worktree prune; git worktree add --force "
            f"--detach {session.judge} {session.facts['commit']}"
        )
    return session


def folder_of(name: str) -> Path:
    return storage.home() / "sessions" / name
