"""What the agent is asked for: near misses, kinds of changes not tried yet, and what a plateau calls for.

Plain functions of the session. They name experiments by number; what these were, the prompt tells as data.
"""

from __future__ import annotations

import functools
from collections import Counter

from lab.genome import kinds
from lab.session.session import Session
from lab.session.state import Experiment
from lab.session.repository import Tree

LOOKED_BACK = 40  # experiments, whose kinds are counted
PATIENCE = 10  # experiments without a keep, at least, before it is called a plateau
MORE_CODE = 1.02  # times the nodes of its parent: what adds so much is rather complex
PROMISING = 0.5  # standard errors that it was better all the same
MOST_NAMED = 5


def asked(session: Session) -> list[str]:
    """Requests for the prompt, each a line; none before anything was tried."""
    found = [near_misses(session), too_complex(session), untried(session), plateau(session)]
    return [line for line in found if line]


def named(session: Session) -> list[int]:
    """Numbers of the experiments that requests may speak of."""
    return sorted({*_near(session), *_too_complex(session), *_promising(session), *(e.number for e in _kept(session))})


def changes(session: Session) -> list[Experiment]:
    """Experiments on a change that have their verdict, in order."""
    return [e for e in session.state.decided if e.kind in ("change", "near misses")]


def near_misses(session: Session) -> str | None:
    """Those that could not be told from chance, and were not tried together yet."""
    if not (numbers := _near(session)):
        return None
    how = (
        "two or more of them as one change, or one of them stronger,"
        if len(numbers) > 1
        else "more of the same, or a clearer form of it,"
    )
    return f"{_these(numbers)} looked better and could not be told from chance: {how} may show."


def too_complex(session: Session) -> str | None:
    """Those that were good but added much code."""
    if numbers := _too_complex(session):
        return f"{_these(numbers)} looked a little better and added code: is there a simpler way to most of it?"
    return None


def untried(session: Session) -> str | None:
    """Kinds of changes that were not tried lately; else the one that was tried least."""
    if not changes(session):
        return None
    tried = Counter(kind for e in changes(session)[-LOOKED_BACK:] for kind in kinds_of(session, e)[:1])
    known = [kind for kind in kinds.KINDS if kind != "other"]
    counted = ", ".join(f"{kind} {tried[kind]}" for kind in sorted(known, key=lambda kind: -tried[kind]) if tried[kind])
    if missing := [kind for kind in known if not tried[kind]]:
        return f"Not tried {'lately' if len(changes(session)) > LOOKED_BACK else 'yet'}: {', '.join(missing)}" + (
            f" (tried: {counted})." if counted else "."
        )
    least = min(known, key=lambda kind: tried[kind])
    return f"Tried least lately: {least} ({counted})."


def plateau(session: Session) -> str | None:
    """After many experiments without a keep: combination, ablation or something bold, in turn."""
    tried, kept = changes(session), _kept(session)
    since = next((i for i, e in enumerate(reversed(tried)) if e.status == "keep"), len(tried))
    if since < max(PATIENCE, 2 * (len(tried) - since) // max(1, len(kept))):  # twice what a keep took before
        return None
    promising, best = _promising(session), [e.number for e in kept[-MOST_NAMED:]]
    combine = (
        f"{_these(promising)} came closest; put two or more of them together."
        if len(promising) > 1
        else "two changes of which each helps the other."
    )
    ablate = (
        f"{_these(best)} {'were' if len(best) > 1 else 'was'} kept; what of that, or of what was there before, "
        "is not needed any more?"
        if best
        else "which part of the model or the optimizer is not needed?"
    )
    choices = (
        f"This time combine: {combine}",
        f"This time take something away: {ablate}",
        "This time be bold: a change of another order than those before, even if it is more likely to fail than not.",
    )
    return f"None of the last {since} experiments was kept. {choices[len(tried) % len(choices)]}"


def kinds_of(session: Session, experiment: Experiment) -> tuple[str, ...]:
    """Which of kinds.KINDS an experiment touched, the main one first."""
    return _kinds_of(session.tree, experiment.parent, experiment.blob)


@functools.lru_cache(maxsize=4096)
def _kinds_of(tree: Tree, parent: str, blob: str) -> tuple[str, ...]:
    return kinds.of_change(tree.content(parent), tree.content(blob))


def _kept(session: Session) -> list[Experiment]:
    return [e for e in changes(session) if e.status == "keep"]


def _t(experiment: Experiment) -> float:
    """Standard errors that it was better by."""
    found = experiment.verdict.get("gate", {})
    return found["gain"] / found["error"] if found.get("error") else 0.0


def _near(session: Session) -> list[int]:
    together = {number for e in session.state.experiments.values() for number in e.members}
    missed = [e for e in changes(session) if e.verdict.get("gate", {}).get("near_miss") and e.number not in together]
    return [e.number for e in sorted(missed, key=_t, reverse=True)[:MOST_NAMED]]


def _promising(session: Session) -> list[int]:
    """The best of the lately discarded, on what is the best now."""
    lost = [
        e
        for e in changes(session)[-LOOKED_BACK:]
        if e.status == "discard" and _t(e) > 0 and e.onto == session.state.best.number
    ]
    return [e.number for e in sorted(lost, key=_t, reverse=True)[:MOST_NAMED]]


def _too_complex(session: Session) -> list[int]:
    near = _near(session)
    return [
        e.number
        for e in changes(session)[-LOOKED_BACK:]
        if e.status == "discard"
        and _t(e) >= PROMISING
        and e.nodes > MORE_CODE * session.state.parent_of(e).nodes
        and e.number not in near
    ][-MOST_NAMED:]


def _these(numbers: list[int]) -> str:
    """ "Experiment 4", "Experiments 4, 7 and 9"; the most that are named are the first."""
    words = [str(number) for number in numbers[:MOST_NAMED]]
    return f"Experiment{'s' * (len(words) > 1)} " + " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
