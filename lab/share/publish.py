"""A session as a branch that others can build on: exp/DEVICE/TAG.

It begins at the session's first commit, has a commit for each kept change of train.py, and ends with one that adds the
folder session/: the export. So what it changes of train.py is the best configuration.
"""

from __future__ import annotations

from lab.errors import LabError
from lab.session.session import Session
from lab.share import archive
from lab.share.export import files_of
from lab.share.verify import ATTRIBUTES, verified


def publish(session: Session, replace: bool = False) -> tuple[str, str]:
    """Makes its branch; nothing that is checked out is touched, nothing is sent.

    Args:
        replace: an older one of that name.

    Returns:
        (the branch, its last commit).

    Raises:
        LabError: there is another branch of that name, or the session is damaged; nothing was changed.
    """
    repository, branch, files = session.repository, f"exp/{session.name}", files_of(session)
    commit = session.started.commit
    for experiment in verified(files).state.kept:  # as it may leave this machine
        if experiment.number and experiment.applied:
            commit = repository.commit(commit, experiment.blob, experiment.description, like=experiment.here)
    files = {archive.PUBLISHED + name: data for name, data in (files | {".gitattributes": ATTRIBUTES}).items()}
    commit = repository.commit_files(commit, archive.PUBLISHED, files, f"session {session.name}: its export")
    there = repository.commit_of(f"refs/heads/{branch}")
    if there and repository.same_files(there, commit):
        return branch, there
    if there and not replace:
        raise LabError(
            f"the branch {branch} exists, at {there[:7]}, and holds something else than this session now: "
            "--replace replaces it"
        )
    repository.git("branch", "--no-track", *["--force"] * bool(there), branch, commit)
    return branch, commit
