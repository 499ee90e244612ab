"""Blocks of shared runs: which there are, opening one, and opening what is tested at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lab.genome import edits
from lab.genome.edits import NotHere
from lab.genome.syntax import text_of, with_ends_of
from lab.session.events import Patch
from lab.session.session import Session
from lab.session.state import Experiment, State
from lab.verdict import opening, shared
from lab.verdict.plan import noise_of


def made(content: bytes, patches: Sequence[Patch], places: Iterable[int]) -> tuple[bytes, list[int]]:
    """(train.py with patches, their places): those that can be made one after the other."""
    text, held = text_of(content), {}
    for place in places:
        edit = edits.read(patches[place].edit)
        if any(edit.meets(other) for other in held.values()):
            continue
        try:
            text = edit.apply(text)
        except NotHere:
            continue
        held[place] = edit
    return with_ends_of(content, text.encode()), list(held)


def screened(state: State) -> set[str]:
    """Origins of what some block has tried to its end, or is trying."""
    blocks = [e for e in state.experiments.values() if e.kind == "shared"]
    done = [e for e in blocks if e.decided is None or e.decided.reason.code in ("screened", "screened_in_vain")]
    return {patch.origin for e in done for patch in e.patches}


def given_up(state: State) -> bool:
    """Whether shared runs turned out not to suit this list on this device."""
    return any(e.kind == "shared" and e.verdict.reason.code == "mostly_bad" for e in state.decided)


def suit(state: State) -> bool:
    """Whether findings share runs: noise hides what one does alone, and sharing was not given up."""
    return noise_of(state).sd >= shared.QUIET and not given_up(state)


def plainly_good(state: State) -> str:
    """The origin of what the last block found to need no company, until it was tried; "" if there is none."""
    blocks = [e for e in state.decided if e.kind == "shared"]
    facts = blocks[-1].verdict.reason.facts if blocks else {}
    origin = str(facts.get("origin", ""))
    return "" if any(e.origin == origin for e in state.attempts) else origin


def untested(state: State) -> Experiment | None:
    """The block whose best patches are to be tested together now: the last one."""
    tested = {number for e in state.attempts if e.kind == "joint" for number in e.members}
    blocks = [e for e in state.decided if e.kind == "shared" and e.verdict.reason.code == "screened"]
    last = blocks[-1] if blocks else None
    return last if last and last.number not in tested else None


def open_block(session: Session, patches: Sequence[Patch], runs: int) -> Experiment:
    """Journals a block of so many shared runs on the best, those of its test included. With the lock held."""
    best = opening.best_of(session)
    opening.head_of_best(session)
    facts = {name: getattr(best, name) for name in "blob digest complexity portable".split()}
    facts |= {"kind": "shared", "parent": best.blob, "onto": best.number, "commit": best.here}
    said = f"{len(patches)} findings in shared runs"
    return session.open_experiment(description=said, patches=list(patches), pairs=runs, **facts)


def open_joint(session: Session, block: Experiment) -> Experiment | None:
    """Journals the best patches of a block as one change, to be tested. With the lock held. None if they can't be made
    on the best any more."""
    state, best, head = session.state, opening.best_of(session), opening.head_of_best(session)
    chosen = [place for place, patch in enumerate(block.patches) if patch.origin in chosen_of(block)]
    content, held = made(session.repository.content(best.blob), block.patches, chosen)
    if not held:
        return None
    patches = [block.patches[place] for place in held]
    names = ", ".join(patch.description.partition(":")[0] for patch in patches)
    facts = opening.facts_of_change(session, best, content) | {"members": [block.number], "patches": patches}
    facts |= {"pairs": shared.tested(noise_of(state).sd)}
    facts["description"] = f"these {len(patches)} together: {names}"[: opening.LONGEST_DESCRIPTION]
    if len(patches) == 1:
        facts["origin"] = patches[0].origin
    commit = session.repository.commit(head, facts["blob"], names)
    return session.open_experiment(kind="joint", commit=commit, **facts)


def chosen_of(block: Experiment) -> list[str]:
    """Origins of the patches that a decided block gives to its test."""
    return str(block.verdict.reason.facts.get("origins", "")).split()
