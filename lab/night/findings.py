"""What other sessions of this home kept, and was not tried in this one: changes that apply to the best as they are."""

from __future__ import annotations

import functools
from pathlib import Path

import storage
from lab.errors import LabError
from lab.genome.merge import merged
from lab.genome.syntax import describe
from lab.session.session import Session
from lab.share import replay, sources

MOST_TRIED = 20  # candidates that are looked at, the likeliest first


@functools.lru_cache(maxsize=64)
def _kept(folder: Path, written: int) -> tuple[str, list[replay.Candidate]]:
    """(backend, what was kept) of a session; nothing of one that can't be read. `written`: when it was changed."""
    try:
        record = sources.read(folder)
        return record.started.backend, [one for one in replay.candidates(record) if not one.why]
    except LabError:
        return "", []


def untried(session: Session, most: int = 3) -> list[replay.Candidate]:
    """The likeliest to help here: of this device before those of its backend before others, the clearest first."""
    state, home, found = session.state, storage.home(), []
    known = {key for e in state.experiments.values() for key in (e.key, e.change) if key}
    for journal in [*home.glob("imported/*/*/journal.jsonl"), *home.glob("sessions/*/*/journal.jsonl")]:
        if journal.parent != session.folder:
            backend, kept = _kept(journal.parent, journal.stat().st_mtime_ns)
            near = (journal.parents[1].name == state.started.device, backend == state.started.backend)
            found += [(near, one.change.t or 0.0, one) for one in kept if one.change.key not in known]
    found.sort(key=lambda one: one[:2], reverse=True)
    best, chosen, seen = session.repository.content(state.best.blob) if state.best else b"", [], set()
    for *_, one in found[:MOST_TRIED]:
        content, conflicts = merged(best, one.before, one.after)
        try:
            digest = describe(content).digest
        except LabError:
            continue
        if not conflicts and digest not in seen and digest != describe(best).digest and not state.equal(digest):
            seen.add(digest)
            chosen.append(one)
            if len(chosen) == most:
                break
    return chosen
