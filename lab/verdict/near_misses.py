"""Near misses: changes that looked better and could not be told from chance, several of them as one patch."""

from __future__ import annotations

from functools import cache

from lab.errors import LabError
from lab.genome.merge import merged_patch
from lab.genome.syntax import describe, is_python
from lab.session.session import Session
from lab.session.state import Experiment, State
from lab.verdict import gate


def remembered(state: State) -> list[int]:
    """Numbers of the experiments to try together, the most convincing first: those not tried so before."""
    left = {e.number: e.verdict.evidence for e in _untried(state)}
    return gate.together([(number, found.gain, found.error) for number, found in left.items() if found])


def used(state: State) -> set[int]:
    """Numbers of those that were tried together, or are."""
    return {number for e in state.attempts if e.kind == "near misses" for number in e.members}


def _untried(state: State) -> list[Experiment]:
    """Near misses that were not tried together yet."""
    tried = used(state)
    return [e for e in state.decided if e.number not in tried and e.near_miss]


def together(session: Session) -> tuple[bytes, list[int]]:
    """(train.py with near misses merged into the best, their numbers): those that go together without conflict.

    Raises:
        LabError: there are too few.
    """
    state, repository = session.state, session.repository
    if state.best is None:
        raise LabError("there is no best yet on which near misses could be tried")
    numbers = remembered(state)
    if not numbers:
        raise LabError(
            f"near misses are tried together once there are {gate.MOST_TOGETHER}; {len(_untried(state))} are there"
        )
    current, members, content_of = repository.content(state.best.blob), [], cache(repository.content)
    for number in numbers:
        if len(members) == gate.MOST_TOGETHER:
            break
        miss = state.experiments[number]
        parent = content_of(miss.parent or "")
        try:
            content, conflicts = merged_patch(current, parent, miss.diff)
        except LabError:  # no diff of this train.py
            continue
        if not conflicts and content != current and is_python(content):
            current, members = content, [*members, number]
    if len(members) < gate.FEWEST_TOGETHER:
        raise LabError(
            f"there are not enough untried near misses that can be combined: {len(members)}, and "
            f"{gate.FEWEST_TOGETHER} are needed"
        )
    if equal := state.equal(describe(current).digest):
        raise LabError(f"together the near misses are equal to experiment {equal.number}: there is nothing new to try")
    return current, members


def ready(session: Session) -> list[int]:
    """The near misses that would be tried together now; empty while there are too few."""
    try:
        return together(session)[1] if remembered(session.state) else []
    except LabError:
        return []
