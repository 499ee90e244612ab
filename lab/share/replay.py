"""Tries here what another machine kept, or what was published: each change is made on this train.py, run, and judged
as any other.

A session's change is made three ways: what it changed there is changed here (genome/merge.py). Where the same lines are
others here, it does not apply; that is said, and nothing is forced. Each is made on the baseline's train.py and judged
against the baseline, beside the branch, which stays where it is; or, stacked, they are made one after the other on the
best so far, and what is kept moves the branch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lab import untrusted
from lab.compare import effects, published
from lab.compare.published import Finding
from lab.errors import LabError
from lab.genome import block, edits
from lab.genome.change import diff
from lab.genome.merge import Conflict, merged
from lab.genome.syntax import describe, normalised, text_of, with_ends_of
from lab.session.record import Record
from lab.session.session import Session
from lab.session.state import MEASURING, Experiment
from lab.share import sources
from lab.untrusted import counted
from lab.verdict import executor, gate, opening

WIDTH = 160  # characters of a description, or of a line
MOST_SHOWN = 12  # lines of a conflict
MOST_RUNS = 100
EFFECT = "{value:+.6f} against its parent (90 % interval {low:+.6f} to {high:+.6f}; {runs} runs against {parent_runs})"


@dataclass
class Candidate:
    """A change from elsewhere, and its result here."""

    description: str  # a clean line
    origin: str  # "DEVICE/TAG/ID" of who made it first
    before: bytes = b""  # train.py there
    after: bytes = b""
    why: str = ""  # it can't be had, is not to be run, or was known before
    content: bytes | None = None  # the train.py to run; None if nothing is
    here: bytes = b""  # what that is made of
    again: Experiment | None = None  # that is to be run more often
    done: Experiment | None = None  # that told, or tells now
    conflicts: list[Conflict] = field(default_factory=list)  # the lines where it does not apply


@dataclass
class Kept(Candidate):
    """What another session kept, or nearly. `change`: its experiment there."""

    change: Experiment = field(kw_only=True)


@dataclass
class Published(Candidate):
    """A published finding, which changes any train.py: what is here is what was before."""

    finding: Finding = field(kw_only=True)


def candidates(record: Record, more: bool = False) -> list[Kept]:
    """The changes that a session kept, in order.

    Args:
        more: near misses too, and what it found by replays.

    Raises:
        LabError: it has none.
    """
    if record.base is None:
        raise LabError(
            f"{record.name} is only a ledger: it describes changes in words, so there is nothing to replay. Ask for "
            "the session itself (python -m lab export); lab compare reads ledgers"
        )
    state = record.state
    near = [e for e in state.decided if e.near_miss and e.status == "discard" and e.kind not in MEASURING]
    beside = [e for e in state.decided if e.kept_beside]
    changes = [e for e in state.kept if e.number] + (near + beside) * more
    if not changes:
        hint = "; --all tries its near misses" * bool(near)
        raise LabError(f"{record.name} kept no change: there is nothing to replay{hint}")
    found = []
    for change in sorted(changes, key=lambda change: change.number):
        description = untrusted.one_line(change.description, WIDTH) or f"change {change.number} of {record.name}"
        candidate = Kept(description, change.origin or f"{record.name}/{change.change}", change=change)
        if not change.key:
            candidate.why = "it changes only comments or layout"
        try:
            candidate.before, candidate.after = record.train(change.onto or 0), record.train(change.number)
        except LabError as error:
            candidate.why = str(error)
        found.append(candidate)
    return found


def look(session: Session, candidate: Candidate, onto: Experiment, here: bytes, stack: bool, runs: int) -> None:
    """Says what is to be done with a candidate.

    Args:
        onto: the experiment that it is made on. here: its train.py.
        runs: of it and of its parent, at least.
    """
    if candidate.why:
        return
    state = session.state
    decided = [e for e in reversed(state.decided) if e.kind not in MEASURING and e.verdict.judged]
    known = next((e for e in decided if e.origin == candidate.origin and (e.kind == "replay") != stack), None)
    if known is None:
        if isinstance(candidate, Published):
            try:
                candidate.before = here
                candidate.after = candidate.finding.apply(here, session.profile["settings"])
            except edits.Already:
                candidate.after = here
            except edits.NotHere as error:
                candidate.why = f"does not apply: {error}"
                return
        content, candidate.conflicts = merged(here, candidate.before, candidate.after)
        if candidate.conflicts:
            candidate.why = "does not apply: these lines differ here"
            return
        try:
            digest = describe(content).digest
        except LabError as error:
            candidate.why = f"it would make train.py here invalid Python: {error}"
            return
        if name := block.too_small(text_of(content), session.profile["settings"]):
            candidate.why = f"does not apply: {name} would be too small on this device"
            return
        if digest == describe(here).digest:
            candidate.why = "changes nothing: train.py here has it already"
            return
        same = (e for e in decided if e.digest == digest and e.onto == onto.number)
        known = state.equal(digest) if stack else next(same, None)
    if known is None:
        candidate.content, candidate.here = content, here
        return
    seeds = set(map(gate.seed, range(runs)))
    missing = any(seeds - state.results(blob or "").keys() for blob in (known.blob, known.parent))
    if not stack and known.status in ("keep", "discard") and runs > 1 and missing:
        candidate.again, candidate.why = known, f"was replayed as experiment {known.number}"
        return
    what = "replayed" if known.origin == candidate.origin else "decided"
    candidate.why = f"was {what} here before: experiment {known.number}, {known.status}"
    candidate.done = known


# --- Doing it ---


def go(session: Session, options) -> int:
    """Replays a session's changes, or findings; see cli/arguments.py for the options."""
    if not 1 <= options.runs <= MOST_RUNS:
        raise LabError(f"--runs has to be from 1 to {MOST_RUNS}")
    record, changes = None, []
    if (found := published.named(options.source)) is not None:
        changes += [Published(untrusted.one_line(one.title, WIDTH), one.origin, finding=one) for one in found]
    else:
        try:
            record = sources.read(options.source)
        except LabError as error:
            if not published.NAME.fullmatch(options.source):
                raise
            raise LabError(f"{error}. It is no finding either; to list those: python -m lab findings") from error
        if record.name == session.name:
            raise LabError(f"{record.name} is this session itself; replay it in another one: python -m lab start TAG")
        changes += candidates(record, options.all)

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    onto = "best so far" if options.stack else "baseline"
    runs = f"at least {counted(options.runs, 'run')} of {session.budget:g} s"
    say(f"{counted(len(changes), 'change')} of {record.name if record else options.source}, each on the {onto}, {runs}")
    for name in ("eval", "budget"):
        here = getattr(session.started, name)
        there = getattr(record.started, name) if record else here
        if there and there != here:
            say(f"its {name} is {there}, and here it is {here}: effects can be compared, scores can not")
    if not options.dry_run and (
        record or {one.origin for one in changes} - {one.origin for one in published.library()}
    ):
        say("these changes are another person's code. To read it first: --dry-run")
    for place, candidate in enumerate(_carried_out(session, changes, options, say), 1):
        say(f"{place:3d}/{len(changes)}  {_told(session, candidate)}")
        for line in _conflicts(candidate) + _edited(candidate) * options.dry_run:
            say(f"         {line}")
    if options.json:
        print(json.dumps([_facts(session, candidate) for candidate in changes], indent=1))
    elif record and not options.dry_run:
        from lab.compare import comparison, tables  # here, because what only replays shall start fast
        from lab.compare.analysis import Analysis

        compared = comparison.compare([Analysis(record), Analysis(sources.of_session(session))])
        say(f"\n{tables.transfer(compared)}\n\nall of it: python -m lab compare {options.source} {session.name}")
    return 0


def _carried_out(session: Session, changes: list[Candidate], options, say: Callable) -> Iterator[Candidate]:
    """Each candidate, once it is done; or, in a dry run, as if all were kept."""
    stacked = None
    if not options.dry_run:
        opening.refuse_if_not_ours(session)
        _finish(session, say)
        opening.sound_baseline(session)
    for candidate in changes:
        onto = options.stack and session.state.best or session.state.baseline
        here = stacked or normalised(session.repository.content(onto.blob))
        look(session, candidate, onto, here, options.stack, options.runs)
        if options.dry_run:
            stacked = candidate.content or stacked if options.stack else None
        elif candidate.content is not None or candidate.again:
            say(f"         {candidate.description} ...")
            candidate.done = _run(session, candidate, onto, options)
        yield candidate


def _finish(session: Session, say: Callable) -> None:
    """Lets what runs, or was interrupted, come first: a replay that was ended with Ctrl-C has left it behind."""
    session.refresh()
    if (experiment := session.state.oldest_open) and session.supervised:
        say(f"experiment {experiment.number} is running, and is finished first")
        opening.await_verdict(session, experiment)
    with opening.exclusive(session, device=True):
        experiment = session.state.oldest_open
        process = executor.launch(session) if experiment else None
    if experiment:
        say(f"experiment {experiment.number} was interrupted, and is finished first")
        opening.await_verdict(session, experiment, process)


def _run(session: Session, candidate: Candidate, onto: Experiment, options) -> Experiment:
    """Has a candidate's experiment run; the experiment, with its verdict."""
    opening.refuse_if_not_ours(session)
    with opening.exclusive(session, device=True):
        if session.state.open or options.stack and session.state.best is not onto:
            raise LabError("another command has begun an experiment meanwhile: python -m lab wait, then replay again")
        experiment = opened(session, candidate, onto, options.runs, options.stack)
        process = executor.launch(session)
    opening.await_verdict(session, experiment, process)
    return experiment


def opened(session: Session, candidate: Candidate, onto: Experiment, runs: int, stack: bool = False) -> Experiment:
    """Journals a candidate as an experiment, or as further runs of one. With the lock held, or by a night that has
    several devices; arguments as of `look`."""
    facts = _further_runs(candidate.again) if candidate.again else _made(session, candidate, onto, stack)
    return session.open_experiment(**{"origin": candidate.origin} | facts, min_runs=runs)


def _further_runs(known: Experiment) -> dict:
    """What opens further runs of what was decided before, and of its parent."""
    names = "blob parent onto description digest complexity portable change family kinds diff".split()
    facts = {name: getattr(known, name) for name in names} | ({"origin": known.origin} if known.origin else {})
    return facts | {"kind": "repeat", "commit": known.here, "members": [known.number]}


def _made(session: Session, candidate: Candidate, onto: Experiment, stack: bool) -> dict:
    """What opens an experiment with a candidate's train.py, which is committed with the line ends that are here."""
    repository = session.repository
    head = opening.head_of_best(session) if stack else onto.commit
    if stack and describe(repository.train()).digest != onto.digest:
        raise LabError("train.py has an edit of yours. Run it first, or discard it: git checkout -- train.py")
    content = with_ends_of(repository.content(onto.blob), candidate.content or b"")
    facts = opening.facts_of_change(session, onto, content) | {"description": candidate.description}
    commit = repository.commit(head, facts["blob"], candidate.description)
    return facts | {"kind": "change" if stack else "replay", "commit": commit}


# --- Telling ---


def effect(session: Session, experiment: Experiment) -> effects.Effect | None:
    """How much it moved val_bpb, by all runs of it and of its parent; None if they have no scores."""
    from lab.compare.analysis import Analysis  # which has much to import

    analysis = Analysis(sources.of_session(session))
    same = [e for e in analysis.experiments.values() if (e.blob, e.onto) == (experiment.blob, experiment.onto)]
    return analysis.effect(same[-1]) if same else None


def _told(session: Session, candidate: Candidate) -> str:
    done, why, description = candidate.done, candidate.why, candidate.description
    if done is None:
        return f"{why or 'applies'}{', and would be run again' * bool(candidate.again)}: {description}"
    moved = effect(session, done)
    numbers = f", {EFFECT.format_map(vars(moved))}" if moved and moved.error is not None else ""
    if isinstance(candidate, Published) and moved:
        said, share = published.verdict(candidate.finding.effect(session.started.device), moved)
        numbers += f"; {said}, {share}"
    if not candidate.content and not candidate.again:
        return f"{why}{numbers}: {description}"
    reason = "" if moved else f" ({untrusted.one_line(done.verdict.said, WIDTH)})"
    return f"experiment {done.number}: {done.status.upper()}{numbers}{reason}: {description}"


def _edited(candidate: Candidate) -> list[str]:
    """What it would change here, whole: blanks could push code out of what is read."""
    if candidate.content is None:
        return []
    changed = diff(candidate.here, candidate.content).split("\n")[2:-1]
    return untrusted.visible("\n".join(changed)).split("\n")


def _conflicts(candidate: Candidate) -> list[str]:
    """The lines where it does not apply."""
    rows = []
    for conflict in candidate.conflicts:
        sides = {f"line {conflict.line} here is:": conflict.here, "was there:": conflict.before}
        for side, lines in (sides | {"became there:": conflict.after}).items():
            rows += [f"{side} {line.decode(errors='replace')}" for line in lines] or [f"{side} (nothing)"]
    more = [f"and {len(rows) - MOST_SHOWN} more lines"] * (len(rows) > MOST_SHOWN)
    return [untrusted.one_line(row, WIDTH) for row in rows[:MOST_SHOWN]] + more


def _facts(session: Session, candidate: Candidate) -> dict:
    """A candidate for machines."""
    done, number, gain, figures = candidate.done, None, None, ("value", "low", "high", "runs", "parent_runs")
    moved = effect(session, done) if done else None
    if isinstance(candidate, Kept):
        number, gain = candidate.change.number, candidate.change.gain
    elif isinstance(candidate, Published) and (told := candidate.finding.effect(session.started.device)) is not None:
        gain = -told
    return {
        "number": number,
        "origin": candidate.origin,
        "description": candidate.description,
        "gain_there": gain,
        "experiment": done and done.number,
        "status": done and done.status,
        "effect": moved and {name: getattr(moved, name) for name in figures},
        "why": candidate.why,
        "conflicts": _conflicts(candidate),
    }
