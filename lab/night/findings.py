"""What was found elsewhere, and was not tried here: published findings, and what other sessions of this home kept."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import storage
from lab.compare import published
from lab.compare.analysis import Analysis
from lab.compare.published import Finding
from lab.errors import LabError
from lab.genome import block, edits, kinds
from lab.genome.merge import merged
from lab.genome.syntax import describe, normalised, text_of, with_ends_of
from lab.session.events import Patch
from lab.session.session import Session
from lab.session.state import MEASURING, Experiment, State
from lab.share import replay, sources
from lab.verdict import blocks
from lab.verdict.plan import noise_of

LIKELY = 0.0001  # bits per byte: expected of what is tried before the search begins
ALONE = 0.5  # of the noise: less shows in no experiment of one change
MOST_TRIED = 20  # changes of other sessions that are weighed, the likeliest first
MOST_MERGED = 500  # that are merged for them: some conflict with the best, or are in it already


@dataclass(frozen=True)
class Idea:
    """Something to try: a whole train.py. `gain`: bits per byte expected of it. `name`: of a published finding."""

    origin: str
    description: str
    content: bytes
    gain: float
    name: str = ""


def tried(state: State) -> dict[str, Experiment]:
    """What became of changes from elsewhere: the last experiment with each, by the id that its origin ends with."""
    return {e.key: e for e in _attempts(state)}


def _attempts(state: State) -> list[Experiment]:
    """Experiments with changes from elsewhere."""
    return [e for e in state.attempts if e.origin and e.kind not in MEASURING]


def _key(origin: str) -> str:
    """The id of a change from elsewhere."""
    return origin.rpartition("/")[2]


def models(session: Session) -> set:
    """What was trained and judged here, or is to be, however it is spelt: values that `block.model` gives."""
    contents = session.repository.contents([e.blob for e in session.state.told])
    return {block.model(text_of(content), session.profile["settings"]) for content in contents.values()}


def ideas(session: Session, least: float = LIKELY, drawn: Callable[[float], float] = float) -> Iterator[Idea]:
    """What applies to the best, was not tried, and of which at least so much is expected, the most promising first:
    what other sessions kept, and published findings.

    Args:
        drawn: what is taken for the gain of one of which so much is expected, for the order.
    """
    state = session.state
    best = session.repository.content(state.best.blob) if state.best else b""
    calibrated = session.profile["settings"]
    found: list[tuple[float, str, str, Callable[[], bytes]]] = []
    first = blocks.plainly_good(state)  # a block has tried it, and said that it is worth its own experiment
    known = {e.key for e in _attempts(state) if not e.kept_beside}
    known |= {_key(origin) for origin in blocks.screened(state) if origin != first}
    for one in untried(session, MOST_TRIED):
        gain = one.change.gain or 0.0
        if gain >= least and one.change.key not in known:
            found.append((gain, one.origin, one.description, functools.partial(with_ends_of, best, one.content or b"")))
    known |= {_key(origin) for _, origin, *_ in found}
    for finding in published.library():
        gain = finding.expected(state.started.device, session.budget)
        if gain >= least and finding.key not in known:
            found.append((gain, finding.origin, finding.title, functools.partial(finding.apply, best, calibrated)))
    trained = models(session) if found else set()
    for gain, origin, description, make in sorted(found, key=lambda one: -drawn(one[0])):
        try:
            content = make()
        except edits.NotHere:
            continue
        if not state.equal(describe(content).digest) and block.model(text_of(content), calibrated) not in trained:
            device, name, _ = origin.split("/")
            # On a changed file an edit may set another value than its words say.
            if state.best and state.best is not state.baseline:
                description = f"{description} ({kinds.summary(best, content)})"
            yield Idea(origin, description, content, gain, name if device == published.PUBLISHED else "")


def alone(session: Session, quiet: float = LIKELY) -> float:
    """What a finding has to promise, in bits per byte, to be an experiment of its own: `quiet`, or more where noise is
    so large that findings share runs, unless that was given up. A night without the time for it would learn nothing
    from trying each."""
    return max(quiet, ALONE * noise_of(session.state).sd) if blocks.suit(session.state) else quiet


def plainly_good(session: Session) -> Idea | None:
    """What a block of shared runs found to need no company, as long as it applies and was not tried."""
    first = session.state.best and blocks.plainly_good(session.state)
    return next((idea for idea in ideas(session) if idea.origin == first), None) if first else None


@dataclass(frozen=True)
class Row:
    """A published finding for a list. `here`: what became of it in a session; `effect`: (value, low, high) there."""

    name: str
    why: str
    evidence: list[str]
    expected: float | None
    here: str = ""
    effect: tuple[float, float | None, float | None] | None = None


def rows(session: Session | None) -> list[Row]:
    """The published findings, the most promising first for the session's device; by name without a session."""
    if session is None or session.state.best is None:
        return [_row(finding) for finding in published.library()]
    analysis, best = Analysis(sources.of_session(session)), session.repository.content(session.state.best.blob)
    device, known = session.started.device, tried(session.state)
    estimates = {
        origin: (e.number, effect)
        for e in session.state.decided
        for origin, effect in (e.verdict.effects or {}).items()
    }
    joint: defaultdict[str, list[Experiment]] = defaultdict(list)
    for e in session.state.attempts:
        for patch in e.patches if e.kind == "joint" else ():
            joint[patch.origin].append(e)
    found = []
    for finding in published.library():
        effect = None
        if experiment := known.get(finding.key):
            told = analysis.effect(experiment) if experiment.decided else None
            said, why = published.verdict(finding.effect(device), told)
            here = f"experiment {experiment.number}, {experiment.status}: {said}, {why}"
            effect = told and (told.value, told.low, told.high)
        elif finding.origin in estimates:
            number, effect = estimates[finding.origin]
            here = f"in shared runs, experiment {number}"
            here += "" if effect else ": they failed with it, or were far worse"
            here += "".join(f"; with others in experiment {e.number}, {e.status}" for e in joint[finding.origin])
        else:
            try:
                content = finding.apply(best, session.profile["settings"])
                equal = session.state.equal(describe(content).digest)
                here = f"experiment {equal.number}, {equal.status}, was equal to it" if equal else "not tried"
            except edits.NotHere as error:
                here = f"does not apply: {error}"
        found.append(_row(finding, finding.expected(device, session.budget), here, effect))
    return sorted(found, key=lambda row: -(row.expected or 0.0))


def _row(finding: Finding, expected: float | None = None, here: str = "", effect=None) -> Row:
    evidence = [f"{one.effect} on {one.device}" for one in finding.evidence]
    return Row(finding.name, finding.why, evidence, expected, here, effect)


def patches(session: Session) -> list[Patch]:
    """What a block of shared runs may hold: the ideas that are published findings."""
    known = {finding.origin: finding for finding in published.library()}
    found = [known[idea.origin] for idea in ideas(session) if idea.origin in known]
    return [Patch(finding.origin, finding.title, finding.edit.text) for finding in found]


@functools.lru_cache(maxsize=64)
def _kept(folder: Path, written: int) -> tuple[str, list[replay.Kept]]:
    """(backend, what was kept) of a session; nothing of one that can't be read. `written`: when it was changed."""
    try:
        record = sources.read(folder)
        return record.started.backend, [one for one in replay.candidates(record) if not one.why]
    except LabError:
        return "", []


def untried(session: Session, most: int = 3) -> list[replay.Kept]:
    """The kept changes of other sessions that are likeliest to help here: from this device before its backend before
    others, the clearest first, each with its train.py on the best."""
    state, home, found = session.state, storage.home(), []
    known = {key for e in state.attempts for key in (e.key, e.change) if key}
    for journal in [*home.glob("imported/*/*/journal.jsonl"), *home.glob("sessions/*/*/journal.jsonl")]:
        if journal.parent != session.folder:
            backend, kept = _kept(journal.parent, journal.stat().st_mtime_ns)
            near = (journal.parents[1].name == state.started.device, backend == state.started.backend)
            found += [(near, one.change.t or 0.0, one) for one in kept if one.change.key not in known]
    found.sort(key=lambda one: one[:2], reverse=True)
    best = normalised(session.repository.content(state.best.blob)) if state.best else b""
    chosen, seen = [], set()
    for *_, one in found[:MOST_MERGED]:
        content, conflicts = merged(best, one.before, one.after)
        if conflicts:
            continue
        try:
            digest = describe(content).digest
        except LabError:
            continue
        if digest not in seen and not state.equal(digest):
            seen.add(digest)
            chosen.append(replace(one, content=content))
            if len(chosen) == most:
                break
    return chosen
