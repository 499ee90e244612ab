"""Near misses: changes that looked better and could not be told from chance, several of them as one patch."""

from __future__ import annotations

from lab.genome import syntax as source
from lab.verdict import gate
from lab.errors import LabError
from lab.genome.merge import merged
from lab.session.session import Session


def remembered(session: Session) -> list[int]:
    """Numbers of the experiments to try together, the most convincing first: those not tried so before."""
    state = session.state
    used = {number for experiment in state.experiments.values() for number in experiment.members}
    return gate.together(
        [
            (e.number, e.verdict["gate"]["gain"], e.verdict["gate"]["error"])
            for e in state.decided
            if e.number not in used and e.verdict.get("gate", {}).get("near_miss")
        ]
    )


def together(session: Session) -> tuple[bytes, list[int]]:
    """(train.py with near misses merged into the best, their numbers): those that go together without conflict.

    Raises:
        LabError: there are too few.
    """
    state, tree = session.state, session.tree
    current, members = tree.content(state.best.blob), []
    for number in remembered(session):
        if len(members) == gate.MOST_TOGETHER:
            break
        miss = state.experiments[number]
        content, conflicts = merged(current, tree.content(miss.parent), tree.content(miss.blob))
        try:
            if not conflicts and content != current:
                source.describe(content)
                current, members = content, [*members, number]
        except LabError:
            pass  # merged without conflict, and is no Python any more
    if len(members) < gate.FEWEST_TOGETHER or state.same(source.describe(current).digest):
        raise LabError(
            f"there are not enough near misses that go together: {len(members)}, and it takes "
            f"{gate.FEWEST_TOGETHER}, not tried before"
        )
    return current, members


def ready(session: Session) -> list[int]:
    """Those that would be tried together now; none while there are too few."""
    try:
        return together(session)[1] if remembered(session) else []
    except LabError:
        return []
