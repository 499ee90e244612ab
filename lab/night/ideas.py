"""What the agent is asked for: near misses, kinds of changes not tried yet, and what a plateau calls for.

Plain functions of the state. They name experiments by number; what these were, the prompt tells as data.
"""

from __future__ import annotations

from collections import Counter

from lab.genome import kinds
from lab.session.state import Experiment, State
from lab.verdict.near_misses import used

LOOKED_BACK = 40  # experiments, whose kinds are counted
PATIENCE = 10  # experiments without a keep, at least, before it is called a plateau
MORE_CODE = 1.02  # times the complexity of its parent: what adds so much is rather complex
PROMISING = 0.5  # standard errors by more than which it was better all the same
MOST_NAMED = 5


def requests(state: State) -> list[str]:
    """Requests for the prompt, each a line; none before anything was tried."""
    return [line for line in (near_misses(state), too_complex(state), untried(state), plateau(state)) if line]


def named(state: State) -> list[int]:
    """Numbers of the experiments that requests may speak of."""
    return sorted({e.number for of in (_near, _too_complex, _promising, _kept) for e in of(state)})


def changes(state: State) -> list[Experiment]:
    """Experiments on a change that have their verdict, in order."""
    return [e for e in state.decided if e.kind in ("change", "near misses", "joint")]


def near_misses(state: State) -> str | None:
    """Names the near misses that were not tried together yet."""
    if not (numbers := _near(state)):
        return None
    several = "try two or more of them as one change, or one of them stronger"
    how = several if len(numbers) > 1 else "try a stronger or a clearer form of it"
    return f"{_these(numbers)} looked better and could not be told from chance: {how}."


def too_complex(state: State) -> str | None:
    """Names the changes that looked better but added much code."""
    if numbers := _too_complex(state):
        return f"{_these(numbers)} looked a little better and added code: is there a simpler way to most of it?"
    return None


def untried(state: State) -> str | None:
    """Kinds of changes that were not tried lately; else the one that was tried least."""
    tried = changes(state)
    if not tried:
        return None
    times = dict.fromkeys((kind for kind in kinds.KINDS if kind != "other"), 0)
    times |= Counter(kind for e in tried[-LOOKED_BACK:] for kind in e.kinds[:1] if kind in times)
    counted = ", ".join(f"{kind} {times[kind]}" for kind in sorted(times, key=lambda kind: -times[kind]) if times[kind])
    if missing := [kind for kind in times if not times[kind]]:
        when = "lately" if len(tried) > LOOKED_BACK else "yet"
        return f"Not tried {when}: {', '.join(missing)}" + (f" (tried: {counted})." if counted else ".")
    return f"Tried least lately: {min(times, key=lambda kind: times[kind])} ({counted})."


def plateau(state: State) -> str | None:
    """After many experiments without a keep: asks for a combination, an ablation or something bold, in turn."""
    tried, kept = changes(state), _kept(state)
    since = next((i for i, e in enumerate(reversed(tried)) if e.status == "keep"), len(tried))
    if since < max(PATIENCE, 2 * (len(tried) - since) // max(1, len(kept))):  # twice what a keep took before
        return None
    promising, best = _promising(state), kept[-MOST_NAMED:]
    combine = "two changes of which each helps the other."
    if len(promising) > 1:
        combine = f"{_these(promising)} came closest; put two or more of them together."
    ablate = "which part of the model or the optimizer is not needed?"
    if best:
        were = "were" if len(best) > 1 else "was"
        ablate = f"{_these(best)} {were} kept; what of that, or of what was there before, is not needed any more?"
    choices = (
        f"This time combine: {combine}",
        f"This time take something away: {ablate}",
        "This time be bold: a change of another order than those before, even if it is more likely to fail than not.",
    )
    return f"None of the last {since} experiments was kept. {choices[len(tried) % len(choices)]}"


def _kept(state: State) -> list[Experiment]:
    return [e for e in changes(state) if e.status == "keep"]


def _closest(experiments: list[Experiment]) -> list[Experiment]:
    return sorted(experiments, key=lambda e: -(e.t or 0.0))[:MOST_NAMED]


def _near(state: State) -> list[Experiment]:
    together = used(state)
    return _closest([e for e in changes(state) if e.near_miss and e.number not in together])


def _better(state: State, least: float) -> list[Experiment]:
    """Recently discarded experiments that were better than their parents by more than so many standard errors."""
    return [e for e in changes(state)[-LOOKED_BACK:] if e.status == "discard" and (e.t or 0.0) > least]


def _promising(state: State) -> list[Experiment]:
    """The best of the lately discarded, on what is the best now."""
    return _closest([e for e in _better(state, 0.0) if state.best and e.onto == state.best.number])


def _too_complex(state: State) -> list[Experiment]:
    near = _near(state)
    pairs = [(e, state.parent_of(e)) for e in _better(state, PROMISING) if e not in near]
    return [e for e, parent in pairs if parent and e.complexity > MORE_CODE * parent.complexity][-MOST_NAMED:]


def _these(experiments: list[Experiment]) -> str:
    """ "Experiment 4", "Experiments 4, 7 and 9"."""
    *rest, last = (str(e.number) for e in experiments)
    return f"Experiments {', '.join(rest)} and {last}" if rest else f"Experiment {last}"
