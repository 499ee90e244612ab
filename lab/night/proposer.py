"""Proposes the next experiment where no agent does: a small step of the hyperparameters, or a published finding.

What was tried is the memory: each experiment's train.py, read as a point in the space of the block's variables
(genome/block.py), with its mean score. It is rebuilt from the journal each time, so a night that was killed goes on as
if nothing had happened. The next point is sampler.py's. Whether it is a step or a finding is drawn by how often each
was better so far, and which finding by what is expected of it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np

from lab.errors import LabError
from lab.genome import block
from lab.genome.syntax import describe, text_of, with_ends_of
from lab.night import findings
from lab.night.sampler import Step, Trial, kind_of, prior, ranked
from lab.session.session import Session
from lab.session.state import APART, Experiment, State
from lab.verdict.opening import best_of
from lab.verdict.plan import noise_of

ATTEMPTS = 20  # at something new before the bounds are widened
WIDER = 3  # times, at most
HELPED = {"step": (1.5, 7.0), "finding": (1.0, 4.0)}  # and did not: counts before any, after the published ledgers
BETTER = 1.0  # standard errors, from which on an experiment counts as better
SPREAD = 0.003  # bits per byte: standard deviation of what a finding does around what is expected of it
REACH = (0.5, 3.0)  # of steps, in those of the published ledgers
PLAINLY = -3.0  # standard errors: worse than that is no matter of noise
MUCH_WIDER, A_LITTLE_WIDER, NARROWER = 2.0, 1.25, 0.5
MARK = " (proposer)"


@dataclass(frozen=True)
class Proposal:
    """A whole train.py, and what it changes. `origin`: of a finding."""

    content: bytes
    description: str
    origin: str = ""


def propose(session: Session, findings_too: bool = True) -> Proposal:
    """The next change of the best train.py: a function of the journal, and never what was decided on before.

    Args:
        findings_too: published findings are proposed, too.

    Raises:
        LabError: nothing is left to propose.
    """
    state, best = session.state, session.repository.content(best_of(session).blob)
    rng = np.random.default_rng([state.last.number + 1, zlib.crc32(state.baseline.commit.encode())])
    for arm in _arms(state, rng):
        if arm == "finding":
            if not findings_too:
                continue
            least = findings.alone(session, -math.inf)
            for idea in findings.ideas(session, least, drawn=lambda gain: rng.normal(gain, SPREAD)):
                return Proposal(idea.content, idea.description + MARK, idea.origin)
        elif change := _numbers(session, text_of(best), rng):
            edited, description = change
            return Proposal(with_ends_of(best, edited.encode()), description + MARK)
    raise LabError(
        "the proposer has nothing left to propose: it can read no hyperparameter of train.py, or has tried all. Edit "
        "train.py, or give the night an agent (--agent COMMAND)"
    )


def _arms(state: State, rng: np.random.Generator) -> list[str]:
    """What to look for, in order: by a draw from the posterior of how often each is better (Thompson sampling)."""
    tried = {"step": _steps(state), "finding": [e for e in state.decided if e.origin and e.verdict.judged]}
    drawn = {}
    for arm, (better, worse) in HELPED.items():
        good = sum(e.status == "keep" or (e.t or 0.0) > BETTER for e in tried[arm])
        drawn[arm] = rng.beta(better + good, worse + len(tried[arm]) - good)
    return sorted(drawn, key=lambda arm: -drawn[arm])


def _steps(state: State) -> list[Experiment]:
    """The search's own steps with a verdict: an agent's edits say nothing of them, nor do near misses together, whose
    description ends with that of the last."""
    own = (e for e in state.decided if e.kind == "change" and e.description.endswith(MARK))
    return [e for e in own if not e.origin and e.verdict.judged]


def _reach(state: State) -> float:
    """How far steps reach: a trust region, wider after a step that was kept or that noise hides, narrower after one
    that was plainly worse."""
    reach = 1.0
    for e in _steps(state):
        plainly = e.status not in ("keep", "discard") or (e.t or 0.0) < PLAINLY
        factor = NARROWER if plainly else MUCH_WIDER if e.status == "keep" else A_LITTLE_WIDER
        reach = min(max(reach * factor, REACH[0]), REACH[1])
    return reach


def _new(session: Session, trained: set, text: str) -> bool:
    """Whether it is Python that something can be trained with, another model than those that are open or were judged,
    and nothing equal is open or was decided on."""
    state, calibrated = session.state, session.profile["settings"]
    try:
        digest = describe(text.encode()).digest
    except LabError:
        return False
    if block.too_small(text, calibrated) or block.model(text, calibrated) in trained:
        return False
    return not state.equal(digest)


def _numbers(session: Session, text: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """(train.py with other values, what they are)."""
    variables = read(session, text)
    trials = remembered(session, text, variables)
    variables = [
        variable if variable.kind == "choice" else variable.wider(*(trial.at[variable.name] for trial in trials))
        for variable in variables
    ]
    noise = noise_of(session.state).sd if variables else 0.0
    trained = findings.models(session)
    for _ in range(1 + WIDER if variables else 0):
        for values in _suggested(variables, trials, noise, _reach(session.state), rng):
            changed = {v.name: values[v.name] for v in variables if values[v.name] != v.value}
            edited = block.write(text, changed)
            if changed and _new(session, trained, edited):
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


def remembered(session: Session, text: str, variables: list[block.Variable]) -> list[Trial]:
    """What was tried with the structure of the best, `text`, or of those it comes from, as values by variable: where
    one had not been written yet, the best's. Scores of the latter are shifted by what the structures that were kept
    since have gained."""
    state = session.state
    decided = [e for e in state.decided if e.kind not in APART and e.verdict.judged]
    contents = session.repository.contents([e.blob for e in decided])
    texts = {blob: text_of(content) for blob, content in contents.items()}
    shifts = {block.structure(text): 0.0}
    for kept in reversed(state.kept):
        own, parent = block.structure(texts[kept.blob]), state.parent_of(kept)
        if own in shifts and parent:
            gained = (state.mean(kept) or 0.0) - (state.mean(parent) or 0.0)
            shifts.setdefault(block.structure(texts[parent.blob]), shifts[own] + gained)
    trials = {}
    for e in decided:
        shift, tried = shifts.get(block.structure(texts[e.blob])), {v.name: v for v in block.read(texts[e.blob])}
        if shift is not None and all(v.fits(tried.get(v.name, v)) for v in variables):
            mean = state.mean(e) if e.status in ("keep", "discard") else None
            values = {v.name: tried.get(v.name, v).value for v in variables}
            trials[e.blob] = Trial(values, None if mean is None else mean + shift, len(state.results(e.blob)))
    return list(trials.values())


def _suggested(variables: list[block.Variable], trials: list[Trial], noise: float, reach: float, rng):
    """Values by name, the most promising first."""

    def point(values: dict) -> dict:
        places = {v.name: v.place(values[v.name]) for v in variables}
        return {v.name: places[v.name] if v.choices else min(max(places[v.name], 0.0), 1.0) for v in variables}

    here = point({v.name: v.value for v in variables})

    def values(point: dict) -> dict:  # what stays is left as it is written, and not rounded
        return {v.name: v.value if point[v.name] == here[v.name] else v.at(point[v.name]) for v in variables}

    choices = {v.name: len(v.choices) for v in sorted(variables, key=lambda v: v.name)}
    tried = [Trial(point(trial.at), trial.score, trial.runs) for trial in trials]
    steps = {v.name: step_of(v) for v in variables}
    found = ranked(here, tried, choices, noise, lambda step: point(values(step)), rng, steps, reach)
    return map(values, found[:ATTEMPTS])


def step_of(variable: block.Variable) -> Step:
    """How a variable is changed: as published ones of its kind were, and by one where its values are whole."""
    step = prior()[kind_of(variable.name)]
    if variable.kind == "choice":
        return step
    size = step.size
    if variable.kind == "size":
        size = max(size, math.log(2))
    elif variable.whole and variable.scale == "linear":
        size = 1.0
    elif variable.scale == "linear":
        size = prior()["part"].size if variable.kind == "part" else variable.width / 3
    return step._replace(size=size / variable.width)
