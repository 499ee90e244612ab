"""Proposes the next experiment where no agent does: other hyperparameters, now and then another structure.

What was tried is the memory: each experiment's train.py, read as a point in the space of the block's variables
(block.py), with its mean score. It is rebuilt from the journal each time, so a night that was killed goes on as if
nothing had happened. The next point is sampler.py's.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from lab.errors import LabError
from lab.genome.change import identify
from lab.genome.syntax import describe
from lab.night import block, edits
from lab.night.sampler import Trial, ranked
from lab.session.session import Session
from lab.session.state import APART, State
from lab.verdict.opening import best_of
from lab.verdict.plan import noise_of

EVERY = 6  # proposals, of which one is a structural edit
ATTEMPTS = 20  # at something new before the bounds are widened
WIDER = 3  # times, at most
HOPELESS = -2.0  # standard errors: a structural edit that did so from another best is not tried again
MARK = " (proposer)"


@dataclass(frozen=True)
class Proposal:
    """A whole train.py, and what it changes."""

    content: bytes
    description: str


def propose(session: Session) -> Proposal:
    """The next change of the best train.py: a function of the journal, and never what was decided on before.

    Raises:
        LabError: nothing is left to propose.
    """
    state, best = session.state, session.repository.content(best_of(session).blob)
    text = _text(best)
    number = state.last.number + 1
    rng = np.random.default_rng([number, zlib.crc32(state.baseline.commit.encode())])
    change = None if number % EVERY else _structural(state, text)
    change = change or _numbers(session, text, rng) or _structural(state, text)
    if change is None:
        raise LabError(
            "the proposer has nothing left to propose: no hyperparameter of train.py can be read, or all were "
            "tried; edit train.py, or give the night an agent (--agent COMMAND)"
        )
    edited, description = change
    return Proposal((edited.replace("\n", "\r\n") if b"\r\n" in best else edited).encode(), description + MARK)


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def _new(state: State, text: str) -> bool:
    """Whether it is Python, and nothing equal was decided on."""
    try:
        digest = describe(text.encode()).digest
    except LabError:
        return False
    return (state.best is None or digest != state.best.digest) and not state.equal(digest)


def _structural(state: State, text: str) -> tuple[str, str] | None:
    """(train.py with an edit of the library, what that is): first those that were never tried, then those that did best
    elsewhere."""
    found, best = None, HOPELESS
    for edit in edits.LIBRARY:
        if (edited := edit.apply(text)) and _new(state, edited):
            family = identify(text.encode(), edited.encode()).family
            tried = [e.t for e in state.decided if e.family == family]
            standing = max((-np.inf if t is None else t for t in tried), default=np.inf)  # a crash is hopeless
            if standing > best:
                found, best = (edited, f"{edit.name}: {edit.why}"), standing
    return found


def _numbers(session: Session, text: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """(train.py with other values, what they are)."""
    trials = remembered(session, text)
    variables = [
        variable if variable.kind == "choice" else variable.wider(*(trial.at[variable.name] for trial in trials))
        for variable in read(session, text)
    ]
    for _ in range(1 + WIDER if variables else 0):
        for values in _suggested(variables, trials, noise_of(session.state).sd, rng):
            changed = {v.name: values[v.name] for v in variables if values[v.name] != v.value}
            edited = block.write(text, changed)
            if changed and _new(session.state, edited):
                return edited, ", ".join(
                    f"{v.name} {v.written(v.value)} -> {v.written(changed[v.name])}"
                    for v in variables
                    if v.name in changed
                )
        variables = [variable.wider() for variable in variables]
    return None


def read(session: Session, text: str) -> list[block.Variable]:
    """The variables of a train.py, without choices that only spell out what was calibrated."""
    variables = []
    for variable in block.read(text):
        name = variable.name.lower()
        same = f'"{session.profile["settings"].get(name)}"' if f"defaults.{name}" in variable.choices else None
        kept = tuple(choice for choice in variable.choices if choice == variable.value or choice != same)
        variables.append(replace(variable, choices=kept))
    return variables


def remembered(session: Session, text: str) -> list[Trial]:
    """What was tried with the structure of the best, `text`, or of those it comes from, as values by variable. Scores
    of the latter are shifted by what the structures that were kept since have gained."""
    state = session.state
    decided = [e for e in state.decided if e.kind not in APART and e.verdict.judged]
    contents = session.repository.contents([e.blob for e in decided])
    texts = {blob: _text(content) for blob, content in contents.items()}
    shifts = {block.structure(text): 0.0}
    for kept in reversed(state.kept):
        own, parent = block.structure(texts[kept.blob]), state.parent_of(kept)
        if own in shifts and parent:
            gained = (state.mean(kept) or 0.0) - (state.mean(parent) or 0.0)
            shifts.setdefault(block.structure(texts[parent.blob]), shifts[own] + gained)
    variables, trials = read(session, text), {}
    for e in decided:
        shift, tried = shifts.get(block.structure(texts[e.blob])), {v.name: v for v in block.read(texts[e.blob])}
        if shift is not None and all(v.fits(tried.get(v.name)) for v in variables):
            mean = state.mean(e) if e.status in ("keep", "discard") else None
            values = {v.name: tried[v.name].value for v in variables}
            trials[e.blob] = Trial(values, None if mean is None else mean + shift, len(state.results(e.blob)))
    return list(trials.values())


def _suggested(variables: list[block.Variable], trials: list[Trial], noise: float, rng: np.random.Generator):
    """Values by name, the most promising first."""

    def point(values: dict) -> dict:
        places = {v.name: v.place(values[v.name]) for v in variables}
        return {v.name: places[v.name] if v.choices else min(max(places[v.name], 0.0), 1.0) for v in variables}

    here = point({v.name: v.value for v in variables})

    def values(point: dict) -> dict:  # what stays is left as it is written, and not rounded
        return {v.name: v.value if point[v.name] == here[v.name] else v.at(point[v.name]) for v in variables}

    choices = {v.name: len(v.choices) for v in sorted(variables, key=lambda v: v.name)}
    tried = [Trial(point(trial.at), trial.score, trial.runs) for trial in trials]
    return map(values, ranked(here, tried, choices, noise, lambda step: point(values(step)), rng)[:ATTEMPTS])
