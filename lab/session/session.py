"""A session: a folder with its journal and what was pinned at its start; how it is found, locked, held and resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

import storage
from backends import machine
from lab.errors import LabError
from lab.reasons import because
from lab.run import processes
from lab.session import ledger
from lab.session.events import Event, ExperimentOpened, RunEnded, RunStarted, SessionStarted
from lab.session.journal import Journal
from lab.session.locks import Lock, device_lock, is_held
from lab.session.repository import Repository
from lab.session.state import Experiment, Run, State

FORMAT = 2
HOLD, SUPERVISOR, FLEET = "hold.json", "supervisor.json", "fleet.json"
PREFIX = "autoresearch/"  # of branches: autoresearch/<device>/<tag>
HELD = ("paused", "stopped")  # by `lab pause`, by the end of a night; also codes of reasons
# Settings of the user's that stay as they were at the start.
PASSED_ON = (*(f"AUTORESEARCH_{name}" for name in ("BACKEND", "DEVICE", "FA3_LIBRARY")), *machine.CHOOSING_GPUS)
BY_ITSELF = re.compile(r"\.DS_Store|\._.*|\.Spotlight-V100|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # of file managers


class Local(msgspec.Struct):
    """What is true of the session on this machine alone: session.json. It does not leave the machine.

    Attributes:
        repository: the user's. commit: where the session began, and its judge is. gpu: its name (`machine.gpu_name`),
            or "". executable: the Python. settings: variables of its runs. judge: sha256 of the judge's files.
        memory_ceiling: bytes a run may use. unified: they are the machine's own.
    """

    format: int
    repository: str
    commit: str
    gpu: str
    executable: str
    settings: dict[str, str]
    memory_ceiling: int | None
    unified: bool
    judge: dict[str, str]


class Session:
    """An open session.

    Attributes:
        folder: where everything is kept; judge, ledger: in it. turn: the clone that an agent edits in, while its turn
            lasts. local: session.json. journal, state: what happened so far.
        lock: held by whoever writes the journal. night_lock: by the night that owns the session.

    Raises:
        LabError: there is none, or it can't be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.judge, self.turn = folder, folder / "judge", folder / "turn"
        self.ledger = folder / "results.tsv"
        try:
            content = (folder / "session.json").read_bytes()
            if json.loads(content).get("format") != FORMAT:
                raise LabError(
                    f"{folder} was made by another version of this project: use that, or start another session"
                )
            self.local = msgspec.json.decode(content, type=Local)
        except FileNotFoundError:
            raise LabError(f"there is no session in {folder}; to begin one: python -m lab start TAG") from None
        except (ValueError, AttributeError, OSError, msgspec.DecodeError) as error:
            raise LabError(f"{folder / 'session.json'} can't be read ({error})") from error
        self.journal = Journal(folder / "journal.jsonl")
        self.state = State(self.journal.events)
        self._taken = len(self.journal.events)  # into the state
        self.lock = Lock(folder / "lock")
        self.night_lock = Lock(folder / "night.lock")

    @property
    def started(self) -> SessionStarted:
        return self.state.started

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def branch(self) -> str:
        return PREFIX + self.name

    @property
    def ref(self) -> str:
        """The branch in full: a tag may have the same name."""
        return f"refs/heads/{self.branch}"

    @property
    def budget(self) -> float:
        """Seconds of training of a run."""
        return self.state.budget

    @cached_property
    def repository(self) -> Repository:
        path = Path(self.local.repository)
        if not path.is_dir():
            raise LabError(f"the session's repository is gone: {path}")
        return Repository(path)

    @cached_property
    def profile(self) -> dict:
        """The device's calibration."""
        return json.loads((self.folder / "profile.json").read_text(encoding="utf-8"))

    @property
    def device_lock(self) -> Lock:
        return device_lock(self.started.device, self.local.gpu)

    @property
    def dataset(self) -> Path:
        """The folder of its dataset."""
        return storage.home() / "data" / self.local.settings.get("AUTORESEARCH_DATA", self.started.dataset)

    def log(self, event: Event) -> None:
        """Journals an event, and takes it into the state."""
        try:
            self.journal.append(event)
        finally:  # if it failed, others' events were read all the same
            self._take()

    def refresh(self) -> None:
        """Takes in what others have journalled."""
        self.journal.refresh()
        self._take()

    def _take(self) -> None:
        for event in self.journal.events[self._taken :]:
            self._taken += 1
            self.state.take(event)

    def write_ledger(self) -> str | None:
        """Makes results.tsv what the journal says; a line for people if it was not written, or was edited by hand."""
        return ledger.write(self.ledger, self.state)

    @property
    def supervised(self) -> bool:
        """Whether a process is at work on this session, or is about to be."""
        return is_held(self.lock) or self.starting

    @property
    def starting(self) -> bool:
        """Whether the process that was launched last still runs: until it has the lock, nothing else tells."""
        return processes.noted(self.folder / SUPERVISOR) is not None

    @property
    def owned_by_night(self) -> bool:
        """Whether a night is at work on this session: this process's own, or another's."""
        return self.night_lock.is_locked or is_held(self.night_lock)

    # --- Held: nothing is to use the device ---

    @property
    def held(self) -> dict[str, Any] | None:
        """{"why": one of HELD, "now": whether a run under way ends, too}, or None. A file that says neither still
        holds, as somebody wanted the device left alone; but no run is ended on the strength of it."""
        try:
            content = json.loads((self.folder / HOLD).read_bytes())
            return {"why": HELD[HELD.index(content["why"])], "now": content["now"] is True}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return {"why": HELD[0], "now": False}

    def hold(self, why: str, now: bool) -> None:
        """Holds the session: nothing is trained or scored until `release`. A pause stays a pause.

        Args:
            why: one of HELD. now: what is being trained or scored ends, too, and is done again later.
        """
        with Lock(self.folder / "hold.lock", timeout=10):
            held = self.held
            if held and held["why"] == "paused" and why != "paused":
                why, now = "paused", now or held["now"]
            storage.write_json(self.folder / HOLD, {"why": why, "now": now})

    def release(self, why: str | None = None) -> None:
        """Ends the hold; with `why`, only one for this reason."""
        with Lock(self.folder / "hold.lock", timeout=10):
            if why is None or (self.held or {}).get("why") == why:
                (self.folder / HOLD).unlink(missing_ok=True)
                storage.sync_folder(self.folder)

    @property
    def fleet(self) -> dict[str, Any] | None:
        """What the night said of its devices (fleet/settings.py), where there are several; else None."""
        return storage.read_json(self.folder / FLEET)

    def ending(self) -> str | None:
        """Why a run under way is to end now, if it is: one of HELD."""
        held = self.held
        return held["why"] if held and held["now"] else None

    # --- Runs ---

    def run_folder(self, number: int) -> Path:
        return self.folder / "runs" / f"{number:04d}"

    def run_id(self, number: int) -> str:
        """What marks every process of a run."""
        return f"{self.name}/{number}"

    def open_experiment(self, **facts) -> Experiment:
        """Journals an experiment after the baseline. To be called with the lock held."""
        number = self.state.last.number + 1
        self.repository.move(f"refs/autoresearch/{self.name}/{number}", facts["commit"])
        self.log(ExperimentOpened(number=number, **facts))
        return self.state.experiments[number]

    def start_run(self, experiment: Experiment, blob: str, seed: int, budget: float, **more) -> Run:
        """Journals that a run begins; more: facts of RunStarted. To be called with the lock held."""
        number = self.state.next_run()
        started = RunStarted(number=number, experiment=experiment.number, blob=blob, seed=seed, budget=budget, **more)
        self.log(started)
        return self.state.runs[number]

    # --- Resuming ---

    def restore_judge(self) -> list[str]:
        """Puts back the judge's files that are not as they were pinned, and names them."""
        wrong = differing(self.judge, self.local.judge)
        if wrong:
            judge = Repository(self.judge)
            judge.git("checkout", "--force", "--quiet", self.local.commit, "--", ".")
            judge.git("clean", "-ffdxq")
            if still := differing(self.judge, self.local.judge):
                raise LabError(f"the session's judge can't be restored: {', '.join(still[:5])} in {self.judge}")
        return wrong

    def recover(self, end_run: Callable[[str], int], goes_on: Callable[[Run], bool] = lambda run: False) -> list[str]:
        """After a kill or a power failure: ends what is left of runs, frees what a dead git locked, notes runs that
        were lost, and makes git and the ledger what the journal says. To be called with the lock held.

        Args:
            end_run: ends every process of a run, by its id. goes_on: whether a run goes on, on another device.

        Returns:
            What it did, in lines for people.
        """
        self.refresh()
        state, repository = self.state, self.repository
        done = [f"removed a lock that a killed git process had left: {path}" for path in repository.unlock(self.branch)]
        for experiment in state.open:
            if experiment.runs and not experiment.runs[-1].worker:
                end_run(self.run_id(experiment.runs[-1].number))  # training, or being scored
        for run in state.runs.values():
            if run.ended is None and not goes_on(run):
                self.log(RunEnded(run=run.number, status="lost", reason=because(self.ending() or "killed")))
                done.append(f"run {run.number} was interrupted")
        best, head = state.best, repository.commit_of(self.ref)
        if best and best.applied and head and head == repository.commit_of(f"{best.here}^"):
            repository.move(f"refs/heads/{self.branch}", best.here, head)
            done.append(f"the branch did not point to the best; it is at {best.here[:7]} again")
        if said := self.write_ledger():
            done.append(said)
        return done


# --- The judge ---


def fingerprints(judge: Path) -> dict[str, str]:
    """sha256 of each of a judge's files, without those that systems put anywhere by themselves."""
    paths = []
    for folder, folders, files in os.walk(judge):
        folders[:] = [name for name in folders if name not in ("__pycache__", ".git")]
        paths += [Path(folder, name) for name in files if name != ".git" and not BY_ITSELF.fullmatch(name)]
    return {
        path.relative_to(judge).as_posix(): storage.sha256(path) if path.is_file() else "a link to nothing"
        for path in paths
    }


def differing(judge: Path, pinned: dict[str, str]) -> list[str]:
    """Files of a judge that differ from what was pinned, are missing or new."""
    return sorted({name for name, _ in fingerprints(judge).items() ^ pinned.items()})


# --- Finding one ---


def at(path: Path) -> Session:
    """The session whose branch is checked out in the repository at `path`. LabError if there is none."""
    repository = Repository(path)
    branch = repository.branch()
    if not branch or not branch.startswith(PREFIX):
        raise LabError(f"no session's branch is checked out ({branch or 'HEAD is detached'}); to begin one: python "
                       f"-m lab start TAG; to go back to one: git switch {PREFIX}<device>/<tag>")  # fmt: skip
    session = Session(folder_of(branch[len(PREFIX) :]))
    clones = [path.resolve() for path in (session.turn, *session.folder.glob("turn-*"))]
    if repository.path not in (Path(session.local.repository), *clones):
        raise LabError(
            f"session {session.name} belongs to the repository {session.local.repository}, not to {repository.path}"
        )
    if not session.judge.is_dir():
        raise LabError(f"the session's judge is gone; get it back with: git worktree prune; git worktree add --force "
                       f"--detach {session.judge} {session.local.commit}")  # fmt: skip
    return session


def folder_of(name: str) -> Path:
    """Where the session of this name, DEVICE/TAG, is kept."""
    return storage.home() / "sessions" / name
