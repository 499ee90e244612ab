"""What a person makes of the checkout's train.py while a night runs on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from lab.errors import LabError
from lab.genome.syntax import TRAIN, describe
from lab.session.session import Session
from lab.verdict.opening import best_of, on_best


class Edit(NamedTuple):
    """content: a train.py that is to be run. told: what was done with the edit, where it is not run as it is."""

    content: bytes | None = None
    told: str = ""


def edit(session: Session, saved: Path) -> Edit:
    """What is in the user's train.py, if that is the user's. What can't be run as it is, is merged with the best, or
    put back and saved in a file."""
    path, made = session.repository.path / TRAIN, None
    try:
        content = session.repository.train()
        digest = describe(content).digest
        session.refresh()  # a keep puts another one there, and says so before
        if digest == best_of(session).digest:
            return Edit()
        blob, kept = session.repository.store(content), {kept.blob for kept in session.state.kept}
        if blob in kept:
            return Edit()  # the best until now: the one after it is about to be put there
        if (equal := session.state.equal(digest)) is None:
            begun = session.repository.settled_blob()
            if begun not in kept - {best_of(session).blob}:
                return Edit(content)
            made = on_best(session, blob, begun)  # another change was kept since
            why = f"{TRAIN} was edited while another change was kept"
            why += ", and is merged with it now" if made else ", and both changed the same lines"
        elif equal.applied is None:
            return Edit()  # it was opened with this edit, which stays there until then
        else:
            why = f"{TRAIN} is equal to experiment {equal.number}, which {equal.became}"
    except LabError as error:
        why = str(error)
    if path.is_file():
        shutil.copyfile(path, saved)
        why += f". {'It' if made else 'It was put back; the edit'} is saved in {saved}{' as it was' if made else ''}"
    session.repository.put_back(session.branch)
    if made:
        path.write_bytes(made)  # in place: a link stays one, and a mode what it is
    return Edit(made, why)
