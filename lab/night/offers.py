"""What other sessions of this home keep on other devices, offered to this one: replays, for a share of its runs.

So what holds on one device is tried on the others in the same night, beside the branch, and the comparison fills up.
"""

from __future__ import annotations

import storage
from lab.errors import LabError
from lab.genome.syntax import normalised
from lab.session.session import Session
from lab.session.state import State
from lab.share import replay, sources

RUNS = 2  # of an offered change and of the baseline, at least


def room(state: State, share: float) -> bool:
    """Whether replays have had less than their share of the runs since the baseline."""
    runs = [run for run in state.runs.values() if state.experiments[run.experiment].kind != "baseline"]
    spent = sum(state.experiments[run.experiment].kind == "replay" for run in runs)
    return share > 0 and spent < share * (len(runs) + 1)


def next_offer(session: Session, skipped: set[str]) -> replay.Candidate | None:
    """The first change that another session has kept and this one has not tried, made on the baseline; None if there is
    none.

    Args:
        skipped: origins of what does not apply here, which are added to.
    """
    state, started = session.state, session.started
    tried = {e.origin for e in state.experiments.values() if e.origin} | {
        f"{session.name}/{e.change}" for e in state.experiments.values()
    }
    for folder in sorted((storage.home() / "sessions").glob("*/*")):
        if folder == session.folder or not (folder / "session.json").exists():
            continue
        try:
            record = sources.of_session(Session(folder))
            there = record.started
            if (there.eval, there.data) != (started.eval, started.data):
                continue
            if (there.device, there.backend) == (started.device, started.backend):
                continue
            changes = replay.candidates(record)
        except LabError:  # it has kept nothing yet, or is damaged: its own night says so
            continue
        for candidate in (one for one in changes if one.origin not in tried | skipped):
            here = normalised(session.repository.content(state.baseline.blob))
            replay.look(session, candidate, state.baseline, here, False, RUNS)
            if candidate.content is not None:
                return candidate
            skipped.add(candidate.origin)
    return None
