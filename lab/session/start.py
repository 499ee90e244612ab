"""Begins a session: checks data, profile and repository, pins the judge, and checks out a new branch."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec

import backends
import dataset
import prepare
import storage
from backends import machine
from backends.interface import BackendError, Hardware
from calibration import measure, profile as profiles, rule
from lab import untrusted
from lab.errors import LabError
from lab.genome.syntax import TRAIN, describe
from lab.run import sandbox
from lab.session import session as sessions
from lab.session.events import ExperimentOpened, SessionStarted, is_tag
from lab.session.journal import Journal
from lab.session.locks import device_lock, refuse_if_busy
from lab.session.repository import Repository
from lab.session.session import PREFIX, Session
from lab.session.state import BASELINE

BASELINE_RUNS = 3  # seeds: two alone understate the noise threefold in a quarter of all nights


def start(
    path: Path,
    tag: str,
    unsandboxed: bool = False,
    runs: int = BASELINE_RUNS,
    say=print,
    described: dict | None = None,
) -> Session:
    """A new session in the repository at `path`; its baseline is journalled, and still to be run.

    Args:
        unsandboxed: go on without a sandbox if the system offers none.
        runs: of the baseline, each with another seed.
        described: a device of another machine, which makes all runs: its "hardware" and "profile" (fleet/here.py).

    Raises:
        LabError, DataError, ProfileError: something it would rest on is missing; nothing was changed.
    """
    if runs < 1:
        raise LabError("the baseline needs at least one run")
    refuse_tag(tag)
    repository = Repository(path)
    repository.some_branch()
    commit = repository.commit_of("HEAD")
    if commit is None or repository.blob_of(commit) is None:
        raise LabError(f"{TRAIN} is not committed yet: commit it first")
    repository.refuse_uncommitted()
    describe(repository.train())

    try:
        hardware = Hardware(**described["hardware"]) if described else identified()
    except TypeError as error:
        raise LabError(f"the description of the device is of another version of this project: {error}") from error
    folder, branch = sessions.folder_of(f"{hardware.slug}/{tag}"), f"{PREFIX}{hardware.slug}/{tag}"
    if (folder / "session.json").exists():
        raise LabError(f"there is a session {tag} already: to continue it: git switch {branch}; or choose another tag")
    profile = described["profile"] if described else checked_profile(hardware, repository.path / TRAIN, say)
    data = dataset.open_data()
    box = sandbox.probe()
    sandbox.refuse_without(box, unsandboxed)
    say(sandbox.describe(box))
    if others := repository.changed():
        say(f"not part of the session, as they are not committed: {untrusted.listed(others)}")

    gpu = "" if described else which_gpu(hardware.kind)
    if not described:
        refuse_if_busy(device_lock(hardware.slug, gpu))
    refuse_leftover(repository, branch)
    passed_on = () if described else sessions.PASSED_ON
    settings = {name: os.environ[name] for name in passed_on if os.environ.get(name)}
    if library := settings.get("AUTORESEARCH_FA3_LIBRARY"):  # runs have a home and a working folder of their own
        settings["AUTORESEARCH_FA3_LIBRARY"] = os.path.abspath(os.path.expanduser(library))
    settings |= {
        "AUTORESEARCH_HOME": str(storage.home().absolute()),
        "AUTORESEARCH_DATA": data.name,
        "AUTORESEARCH_PROFILE": str(folder / "profile.json"),
        "AUTORESEARCH_BACKEND": hardware.backend,
    }
    started = SessionStarted(
        time=time.time(),
        tag=tag,
        device=hardware.slug,
        backend=hardware.backend,
        commit=commit,
        budget=prepare.budget(),
        baseline_runs=runs,
        dataset=data.name,
        eval=data.eval_tag,
        data=data.data_tag,
        profile=profiles.tag(profile),
        versions={name: str(version) for name, version in hardware.versions.items()},
        sandbox=box,
        python=sys.version.split()[0],
        attention_provider=profile.get("attention_provider"),
    )
    facts = {"blob": repository.blob_of(commit) or "", "commit": commit, **vars(describe(repository.train()))}
    baseline = ExperimentOpened(number=BASELINE, kind="baseline", description="baseline", **facts)
    free = profile.get("free_memory")
    if not isinstance(free, (int, float)) or not 0 < free < math.inf:
        raise LabError(f"the profile says {free!r} of free_memory: calibrate again with python -m calibration")
    with device_lock(hardware.slug, f"start-{tag}"):  # two commands with one tag
        if (folder / "session.json").exists():
            raise LabError(f"session {tag} was started by another command just now")
        pin(repository, folder, commit)
        storage.write_json(folder / "profile.json", profile)
        journal = Journal(folder / "journal.jsonl")
        journal.append(started)
        journal.append(baseline)
        repository.move(f"refs/heads/{branch}", commit)
        repository.git("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        local = sessions.Local(
            format=sessions.FORMAT,
            repository=str(repository.path),
            commit=commit,
            gpu=gpu,
            executable=sys.executable,
            settings=settings,
            memory_ceiling=int(rule.SHARE_OF_MEMORY * free),
            unified=hardware.kind in ("cpu", "metal", "mps") or bool(profile.get("machine", {}).get("board")),
            judge=sessions.fingerprints(folder / "judge"),
        )
        if described:
            storage.write_json(folder / sessions.FLEET, {"devices": [], "elsewhere": True})
        storage.write_json(folder / "session.json", msgspec.to_builtins(local))  # last: with it there is a session
    return Session(folder)


def identified() -> Hardware:
    """What runs would execute on. LabError if no backend can run here."""
    try:
        return backends.identify()
    except BackendError as error:
        raise LabError(str(error)) from error


def refuse_tag(tag: str) -> None:
    """LabError if a session can't be called so."""
    if not is_tag(tag):
        raise LabError(f"{tag!r} can't be a tag: use letters, digits, dots, dashes and underscores, such as nov21")


def refuse_leftover(repository: Repository, branch: str) -> None:
    """LabError if there is such a branch, which a session without its folder has left, with commits of its own."""
    if repository.commit_of(f"refs/heads/{branch}") not in (None, repository.commit_of("HEAD")):
        raise LabError(
            f"there is a branch {branch} already, without its session; delete or rename it, or choose another tag"
        )


def which_gpu(kind: str) -> str:
    """The name of the GPU that is used (`machine.gpu_name`); "" for a device that there is one of."""
    if kind != "cuda":
        return ""
    return machine.gpu_name(int(os.environ.get("AUTORESEARCH_DEVICE", "").partition(":")[2] or 0))


def checked_profile(hardware, train: Path, say) -> dict:
    """The profile of this device. ProfileError if there is none, or one made with other versions."""
    path = Path(os.environ.get("AUTORESEARCH_PROFILE") or profiles.path_of(hardware))
    if not path.exists():
        raise profiles.ProfileError(f"{hardware.slug} with {hardware.backend} is not calibrated; {profiles.AGAIN}")
    profile = profiles.read(path, hardware)
    if reasons := profiles.stale(profile, hardware):
        raise profiles.ProfileError(f"the profile is stale: {'; '.join(reasons)}; {profiles.AGAIN}")
    if profiles.stale(profile, hardware, profiles.baseline(train)):
        say("the profile was measured with a different train.py; its sizes are used all the same")
    if profile.get("effort") == measure.QUICK.name:
        say("the sizes are those of a quick calibration, and may be too small; for better ones: python -m calibration")
    return profile


def pin(repository: Repository, folder: Path, commit: str) -> None:
    """Makes the judge: a worktree of the commit. What a start that was killed has left goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    repository.git("worktree", "add", "--quiet", "--force", "--detach", str(folder / "judge"), commit)
