"""Begins a session: checks what it will rest on, pins it, and puts the repository on a branch of its own."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

import backends
import prepare
import storage
from backends import machine
from calibration import profile, rule
from lab.cli import render as show
from lab.genome import syntax as source
from lab.run import sandbox
from lab.errors import LabError
from lab.verdict.executor import BASELINE_RUNS
from lab.session.journal import Journal
from lab.session.session import FORMAT, PASSED_ON, PREFIX, Session, device_lock, fingerprints, folder_of, refuse_if_busy
from lab.session.state import BASELINE
from lab.session.repository import TRAIN, Tree

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


def start(path: Path, tag: str, unsandboxed: bool = False, runs: int = BASELINE_RUNS, say=print) -> Session:
    """A new session in the repository at `path`; its baseline is journalled, and still to be run.

    Args:
        unsandboxed: go on where the system offers no sandbox.
        runs: of the baseline, each with another seed.

    Raises:
        LabError, DataError, ProfileError, BackendError: something it would rest on is missing; nothing was changed.
    """
    if runs < 1:
        raise LabError("the baseline needs at least one run")
    if not TAG.fullmatch(tag) or tag.endswith((".", ".lock")) or ".." in tag:
        raise LabError(f"{tag!r} can't be a tag: letters, digits, dots, dashes and underscores, please, such as nov21")
    tree = Tree(path)
    tree.some_branch()
    commit = tree.commit_of("HEAD")
    if commit is None or tree.blob_of(commit) is None:
        raise LabError(f"{TRAIN} is not committed yet: commit it first")
    tree.refuse_uncommitted()
    source.describe(tree.train())

    hardware = backends.identify()
    folder = folder_of(f"{hardware.slug}/{tag}")
    if (folder / "session.json").exists():
        raise LabError(
            f"there is a session {tag} already: git switch {PREFIX}{hardware.slug}/{tag} goes on with it; "
            "or take another tag"
        )
    found = checked_profile(hardware, tree.path / TRAIN, say)
    data = prepare.open_data()
    box = sandbox.probe()
    sandbox.refuse_without(box, unsandboxed)
    say(sandbox.describe(box))
    if others := tree.changed():
        say(f"not part of the session, being no part of its commit: {show.listed(others)}")

    gpu = which_gpu(hardware.kind)
    refuse_if_busy(device_lock(hardware.slug, gpu))
    branch = f"{PREFIX}{hardware.slug}/{tag}"
    if tree.commit_of(f"refs/heads/{branch}") not in (None, commit):
        raise LabError(
            f"there is a branch {branch} already, without its session; delete or rename it, or take another tag"
        )
    settings = {
        f"AUTORESEARCH_{name}": value for name in PASSED_ON if (value := os.environ.get(f"AUTORESEARCH_{name}"))
    }
    if library := settings.get("AUTORESEARCH_FA3_LIBRARY"):  # runs have a home and a working folder of their own
        settings["AUTORESEARCH_FA3_LIBRARY"] = str(Path(library).expanduser().absolute())
    settings |= {"CUDA_VISIBLE_DEVICES": seen} if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) else {}
    settings |= {
        "AUTORESEARCH_HOME": str(storage.home().absolute()),
        "AUTORESEARCH_DATA": data.name,
        "AUTORESEARCH_PROFILE": str(folder / "profile.json"),
        "AUTORESEARCH_BACKEND": hardware.backend,
    }
    facts = {
        "format": FORMAT, "tag": tag, "device": hardware.slug, "backend": hardware.backend, "tree": str(tree.path),
        "commit": commit, "gpu": gpu, "executable": sys.executable, "budget": prepare.budget(), "baseline_runs": runs,
        "dataset": data.name, "eval": data.eval_tag, "data": data.data_tag, "profile": profile.tag(found),
        "versions": hardware.versions, "settings": settings, "sandbox": box,
        "memory_ceiling": int(rule.SHARE_OF_MEMORY * found["free_memory"]),
        "unified": hardware.kind in ("cpu", "metal", "mps") or bool(machine.jetson()),
        "python": sys.version.split()[0], "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    with device_lock(hardware.slug, f"start-{tag}"):  # two commands with one tag
        if (folder / "session.json").exists():
            raise LabError(f"session {tag} was started by another command just now")
        pin(tree, folder, commit)
        storage.write_json(folder / "profile.json", found)
        Journal(folder / "journal.jsonl").append(
            "experiment",
            number=BASELINE,
            kind="baseline",
            blob=tree.blob_of(commit),
            parent=None,
            commit=commit,
            description="baseline",
            begun=time.time(),
            **vars(source.describe(tree.train())),
        )
        tree.move(f"refs/heads/{branch}", commit)
        tree.git("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        # Last: with it there is a session.
        storage.write_json(folder / "session.json", facts | {"judge": fingerprints(folder / "judge")})
    return Session(folder)


def which_gpu(kind: str) -> str:
    """The GPU that is used, as CUDA_VISIBLE_DEVICES names it: an index or a UUID; "" for what there is one of."""
    if kind != "cuda":
        return ""
    index = int(os.environ.get("AUTORESEARCH_DEVICE", "").partition(":")[2] or 0)
    visible = machine.visible_gpus()
    return visible[index] if index < len(visible) else str(index)


def checked_profile(hardware, train: Path, say) -> dict:
    """The profile of this device. ProfileError if there is none, or one made with other versions."""
    path = Path(os.environ.get("AUTORESEARCH_PROFILE") or profile.path_of(hardware))
    if not path.exists():
        raise profile.ProfileError(f"{hardware.slug} with {hardware.backend} is not calibrated; {profile.AGAIN}")
    found = profile.read(path, hardware)
    if reasons := profile.stale(found, hardware):
        raise profile.ProfileError(f"the profile is stale: {'; '.join(reasons)}; {profile.AGAIN}")
    if profile.stale(found, hardware, profile.baseline(train)):
        say("the profile was measured with another train.py than this one: its sizes are used all the same")
    return found


def pin(tree: Tree, folder: Path, commit: str) -> None:
    """Makes the judge: a worktree of the commit. What a start that was killed has left goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tree.git("worktree", "add", "--quiet", "--force", "--detach", str(folder / "judge"), commit)
