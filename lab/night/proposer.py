"""Proposes the next experiment where no agent does: other hyperparameters, now and then another structure.

What was tried is the memory: each experiment's train.py, read as a point in the space of the block's variables
(block.py), with its mean score. It is rebuilt from the journal each time, so a night that was killed goes on as if
nothing had happened. What to try next is asked of Optuna, with a sampler made for this (sampler.py).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from lab.genome import syntax as source
from lab.errors import LabError
from lab.night import block, edits
from lab.session.session import Session
from lab.session.state import CONFIRM, Experiment, State

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
    state, tree = session.state, session.tree
    content = tree.content(state.best.blob)
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    number = state.last.number + 1
    rng = np.random.default_rng([number, zlib.crc32(state.baseline.commit.encode())])
    if not number % EVERY and (found := _structural(state, text)):
        return _proposal(*found, content)
    if found := _numbers(session, text, rng) or _structural(state, text):
        return _proposal(*found, content)
    raise LabError(
        "the proposer has nothing left to propose: no hyperparameter of train.py can be read, or all were "
        "tried; edit train.py, or give the night an agent (--agent COMMAND)"
    )


def _proposal(text: str, description: str, best: bytes) -> Proposal:
    return Proposal((text.replace("\n", "\r\n") if b"\r\n" in best else text).encode(), description + MARK)


def _new(state: State, text: str) -> bool:
    """Whether it is Python, and nothing equal was decided on."""
    try:
        digest = source.describe(text.encode()).digest
    except LabError:
        return False
    return digest != state.best.digest and not state.same(digest)


# --- Structure ---


def _structural(state: State, text: str) -> tuple[str, str] | None:
    """(train.py with an edit of the library, what that is): first those that were never tried, then those that did best
    elsewhere."""
    tried = {
        edit.name: max(
            (_standing(e) for e in state.decided if e.description.startswith(f"{edit.name}: ")), default=np.inf
        )
        for edit in edits.LIBRARY
    }
    for edit in sorted(edits.LIBRARY, key=lambda one: -tried[one.name]):
        edited = edit.apply(text) if tried[edit.name] > HOPELESS else None
        if edited and _new(state, edited):
            return edited, f"{edit.name}: {edit.why}"
    return None


def _standing(experiment: Experiment) -> float:
    """Standard errors that it was better than its parent; a crash is hopeless."""
    gate = experiment.verdict.get("gate")
    return gate["gain"] / gate["error"] if gate and gate["error"] else -np.inf


# --- Numbers ---


@dataclass(frozen=True)
class Trial:
    """What is known of one train.py with the structure of the best: its values, by variable; its mean val_bpb, None if
    it failed, as if it had the best's structure in full; how many runs that rests on."""

    values: dict
    score: float | None
    runs: int


def _numbers(session: Session, text: str, rng) -> tuple[str, str] | None:
    """(train.py with other values, what they are)."""
    trials = remembered(session, text)
    variables = [
        one.wider(*(trial.values[one.name] for trial in trials)) if one.kind != "choice" else one
        for one in read(session, text)
    ]
    for _ in range(1 + WIDER):
        for values in _suggested(variables, trials, session.noise.sd, rng) if variables else ():
            changed = {one.name: value for one in variables if (value := values[one.name]) != one.value}
            edited = block.write(text, changed)
            if changed and _new(session.state, edited):
                return edited, ", ".join(
                    f"{one.name} {one.written(one.value)} -> {one.written(changed[one.name])}"
                    for one in variables
                    if one.name in changed
                )
        variables = [one.wider() for one in variables]
    return None


def read(session: Session, text: str) -> list[block.Variable]:
    """The variables of a train.py, without choices that only spell out what was calibrated."""
    settings = session.profile["settings"]

    def spelt_out(one, choice):
        return (
            f"defaults.{one.name.lower()}" in one.choices
            and choice != one.value
            and (choice == f'"{settings.get(one.name.lower())}"')
        )

    return [
        replace(one, choices=tuple(choice for choice in one.choices if not spelt_out(one, choice)))
        for one in block.read(text)
    ]


def remembered(session: Session, text: str) -> list[Trial]:
    """What was tried with the structure of the best, `text`, or of those it comes from. Scores of the latter are
    shifted by what the structures that were kept since have gained."""
    state = session.state
    decided = [e for e in state.decided if e.kind != CONFIRM and not e.verdict.get("unjudged")]
    sources = {
        blob: content.decode("utf-8-sig", "replace").replace("\r\n", "\n")
        for blob, content in session.tree.contents([e.blob for e in decided]).items()
    }
    shifts = {block.structure(text): 0.0}
    for kept in reversed(state.kept):
        own, parent = block.structure(sources[kept.blob]), state.parent_of(kept)
        if own in shifts and parent:
            shifts.setdefault(
                block.structure(sources[parent.blob]), shifts[own] + state.mean(kept) - state.mean(parent)
            )
    variables, found = read(session, text), {}
    for experiment in decided:
        tried = sources[experiment.blob]
        shift, values = shifts.get(block.structure(tried)), {one.name: one for one in block.read(tried)}
        if shift is not None and all(one.fits(values.get(one.name)) for one in variables):
            mean = state.mean(experiment) if experiment.status in ("keep", "discard") else None
            found[experiment.blob] = Trial(
                {one.name: values[one.name].value for one in variables},
                None if mean is None else mean + shift,
                len(state.results(experiment.blob)),
            )
    return list(found.values())


def _suggested(variables: list[block.Variable], trials: list[Trial], noise: float, rng):
    """Yields values by name, the most promising first."""
    import optuna

    from lab.night.sampler import StepSampler  # here, because Optuna takes a moment to import

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {
        one.name: optuna.distributions.CategoricalDistribution(range(len(one.choices)))
        if one.choices
        else optuna.distributions.FloatDistribution(0.0, 1.0)
        for one in variables
    }

    def places(values):
        return {
            one.name: place if one.choices else min(max(place, 0.0), 1.0)
            for one in variables
            for place in [one.place(values[one.name])]
        }

    here = places({one.name: one.value for one in variables})

    def values(places):  # what stays is left as it is written, and not rounded
        return {
            one.name: one.value if places[one.name] == here[one.name] else one.at(places[one.name]) for one in variables
        }

    study = optuna.create_study(sampler=StepSampler(here, noise, lambda step: places(values(step)), rng))
    study.add_trials(
        [
            optuna.create_trial(
                params=places(trial.values),
                distributions=space,
                value=trial.score,
                user_attrs={"runs": trial.runs},
                state=optuna.trial.TrialState.FAIL if trial.score is None else optuna.trial.TrialState.COMPLETE,
            )
            for trial in trials
        ]
    )
    for _ in range(ATTEMPTS):
        yield values(study.ask(space).params)
