"""A session for others: what it kept, what it tried, and all of it as a branch that they can build on.

The branch exp/<device>/<tag> begins at the session's first commit, has a commit for each kept change of train.py, and
ends with one that adds the folder session/: the export. So what it changes of train.py is the best configuration.
"""

from __future__ import annotations

import os
from pathlib import Path

import storage
from lab.genome import kinds
from lab.share import exchange
from lab.share.bundle import EFFECT, MOST_OF_A_PATCH, Bundle, Kept, Wrong, check_patch, verified
from lab.errors import LabError
from lab.share.packing import files_of
from lab.session.session import PREFIX, Session, folder_of
from lab.session.state import CONFIRM, REPEAT, Experiment
from lab.session.repository import here


def kept_of(session: Session) -> list[Kept]:
    """The changes that moved its branch, in order."""
    state = session.state
    return [
        Kept(
            number=e.number,
            commit=e.applied["commit"][:7],
            description=e.description,
            parent=state.parent_of(e).applied["commit"][:7],
            patch_text=session.tree.diff(e.parent, e.blob),
        )
        for e in state.kept
        if e.parent and e.applied
    ]


def changes_of(session: Session) -> list[dict]:
    """Every decided experiment, as a Bundle has them."""
    decided = sorted((e for e in session.state.decided if e.applied and e.kind != REPEAT), key=lambda e: e.number)
    contents = session.tree.contents([blob for e in decided for blob in (e.blob, e.parent) if blob])
    return [_told(session, e, contents) for e in decided]


def _told(session: Session, experiment: Experiment, contents: dict[str, bytes]) -> dict:
    e, parent = experiment, experiment.parent
    changes = parent is not None and e.kind != CONFIRM
    text = session.tree.diff(parent, e.blob) if changes else ""
    try:
        check_patch("", text.encode()[: MOST_OF_A_PATCH + 1])
    except Wrong:  # something odd that was tried once shall not keep the rest from being exported
        text = ""
    found = e.verdict.get("gate", {})
    measured = e.status in ("keep", "discard") and found.get("error")
    return {
        "number": e.number,
        "kind": e.kind,
        "status": e.status,
        "description": e.description,
        "reason": e.verdict["reason"],
        "near_miss": bool(found.get("near_miss")),
        **{name: found[name] if measured else None for name in EFFECT},
        "kinds": list(kinds.of_change(contents[parent], contents[e.blob])) if changes else [],
        "commit": e.applied["commit"][:7],
        "parent": e.onto,
        "patch": e.patch,
        "origin": e.origin,
        "patch_text": text,
    }


def bundle_of(session: Session) -> Bundle:
    """A session of this machine, as it may leave it. LabError if something of it is damaged."""
    return exchange.bundle_of(session.folder, kept_of(session), changes_of(session))


def own(source: str) -> Session | None:
    """A session of this machine by its folder, its branch or DEVICE/TAG; None if there is none.

    Raises:
        LabError: it is somebody else's folder. What it says would be believed, and where: git runs in the repository
            that its session.json names, with the settings that are there.
    """
    for folder in (Path(os.path.expanduser(source)), folder_of(source.removeprefix(PREFIX))):
        if (folder / "journal.jsonl").exists():
            if (storage.home() / "sessions").resolve() not in folder.resolve().parents:
                raise LabError(
                    f"{folder} is a session's working folder, and not under {storage.home() / 'sessions'}: "
                    "get it exported where it was run (python -m lab export X.tar.gz); or, if that was "
                    "here, set AUTORESEARCH_HOME to where it belongs"
                )
            return Session(folder)
    return None


def find(source: str, device: str | None = None) -> Bundle:
    """A session by its name: a path of a folder, archive or ledger; DEVICE/TAG of one on this machine, its own or an
    imported one; or a published branch of the repository here.

    Args:
        device: of the rows of a ledger that don't say it.

    Raises:
        LabError: there is none, or it was refused.
    """
    if session := own(source):
        return bundle_of(session)
    for path in (Path(os.path.expanduser(source)), storage.home() / "imported" / source.removeprefix(PREFIX)):
        if path.exists():
            return exchange.read_bundle(path, device)
    tree = here()
    try:
        if tree and (files := exchange.branch_files(tree, source)) is not None:
            return verified(files)
    except Wrong as error:
        raise LabError(f"the branch {source} was refused: {error}; get it published again") from None
    raise LabError(
        f"there is no session {source}: neither a folder, an archive or a ledger of that name, nor "
        f"DEVICE/TAG in {storage.home()}, nor a branch that lab export --publish made; check the name"
    )


def publish(session: Session, replace: bool = False) -> tuple[str, str]:
    """Makes its branch; nothing that is checked out is touched, nothing is sent.

    Args:
        replace: an older one of that name.

    Returns:
        (the branch, its last commit).

    Raises:
        LabError: there is another branch of that name, or the session is damaged; nothing was changed.
    """
    tree, branch, bundle = session.tree, f"exp/{session.name}", bundle_of(session)
    commit = session.facts["commit"]
    for kept, experiment in zip(bundle.kept, (e for e in session.state.kept if e.parent and e.applied)):
        commit = tree.commit(commit, experiment.blob, kept.description, like=experiment.applied["commit"])
    files = {exchange.PUBLISHED + name: data for name, data in files_of(bundle).items()}
    commit = tree.commit_files(commit, exchange.PUBLISHED, files, f"session {session.name}: its export")
    there = tree.commit_of(f"refs/heads/{branch}")
    if there and tree.same_files(there, commit):
        return branch, there
    if there and not replace:
        raise LabError(
            f"the branch {branch} exists, at {there[:7]}, and holds something else than this session now: "
            f"--replace replaces it"
        )
    tree.git("branch", "--no-track", *["--force"] * bool(there), branch, commit)
    return branch, commit
