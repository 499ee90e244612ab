"""Tries here what another machine kept: each of its changes is made on this train.py, run, and judged as any other.

A change is made three ways: what it changed there is changed here (merge.py). Where the same lines are others here, it
does not apply; that is said, and nothing is forced. With `each` a change is made on the baseline's train.py and judged
against the baseline, beside the branch, which stays where it is; stacked, they are made one after the other on the
best so far, and what is kept moves the branch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from lab import untrusted
from lab.cli import render as show
from lab.genome import syntax as source
from lab.share import publish
from lab.verdict import gate
from lab.session.begin import await_verdict, exclusive, head_of_best, refuse_if_not_ours, sound_baseline
from lab.share.bundle import MOST_OF_A_PATCH, Bundle
from lab.compare import effects
from lab.compare.effects import Effect
from lab.compare.record import Trial
from lab.errors import LabError
from lab.genome.merge import Conflict, merged, patched
from lab.session.session import Session, refuse_if_busy
from lab.session.state import CONFIRM, REPEAT, REPLAY, Experiment

WIDTH = 160  # characters of a description, or of a line
MOST_SHOWN = 12  # lines of a conflict
MOST_RUNS = 100


@dataclass(frozen=True)
class Candidate:
    """A change from elsewhere.

    Attributes:
        number: there. origin: "DEVICE/TAG/PATCH" of who made it first. before, after: train.py there, with \\n at the
            ends of lines. gain: bits per byte, as the verdict had it there; None if unknown.
        problem: why it can't be had, "" if it can.
    """

    number: int
    description: str
    origin: str
    before: bytes
    after: bytes
    gain: float | None = None
    problem: str = ""


@dataclass
class Step:
    """What becomes of a candidate here.

    Attributes:
        content: the train.py to run, and `here`, what it is made of; None if nothing is to be run, and `why`.
        again: the experiment that is to be run more often; done: the one that told, or tells now.
        conflicts: the lines where it does not apply.
    """

    candidate: Candidate
    content: bytes | None = None
    here: bytes = b""
    why: str = ""
    again: Experiment | None = None
    done: Experiment | None = None
    conflicts: list[Conflict] = field(default_factory=list)


# --- What there is to try ---


def candidates(bundle: Bundle, more: bool = False) -> list[Candidate]:
    """The changes that a session kept, in order.

    Args:
        more: near misses too, and what it found by replays.

    Raises:
        LabError: it has none.
    """
    if bundle.base is None:
        raise LabError(
            f"{bundle.name} is a bare ledger: it says what was changed in words alone, and there are no "
            "patches to replay. Ask for the session itself (python -m lab export); compare reads ledgers"
        )
    told = {one["number"]: one for one in bundle.changes}
    ids = {row["commit"]: (row["patch"], row["origin"]) for row in bundle.rows}
    texts, last, found = {0: _ends(bundle.base)}, 0, []

    def add(number, description, commit, parent, patch_text):
        facts = told.get(number, {})
        patch, origin = (facts["patch"], facts["origin"]) if facts else ids.get(commit, ("", ""))
        origin = origin or f"{bundle.name}/{patch}"
        problem, before, after = "", texts.get(parent, b""), b""
        try:
            if parent not in texts:
                raise LabError(f"what it was made on, {parent}, is not known")
            after = patched(before, patch_text.replace("\r\n", "\n"))
            if len(after) > MOST_OF_A_PATCH:
                raise LabError(f"it makes a train.py of {len(after):,} bytes; it has at most {MOST_OF_A_PATCH:,}")
            texts[number] = after
        except LabError as error:
            problem = str(error)
        if not patch:
            problem = problem or "its patch has no id"
        found.append(
            Candidate(number, untrusted.one_line(description, WIDTH), origin, before, after, facts.get("gain"), problem)
        )

    for kept in bundle.kept:
        add(kept.number, kept.description, kept.commit, last, kept.patch_text)
        last = kept.number
    for one in bundle.changes if more else ():
        beside = one["kind"] == REPLAY and one["status"] == "keep"
        if (one["near_miss"] and one["status"] == "discard" or beside) and one["patch_text"]:
            add(one["number"], one["description"], one["commit"], one["parent"], one["patch_text"])
    if not found:
        hint = "; --all takes its near misses" * (not more and any(one["near_miss"] for one in bundle.changes))
        raise LabError(f"{bundle.name} kept no change: there is nothing to replay{hint}")
    return sorted(found, key=lambda one: one.number)


def _ends(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")


def look(session: Session, candidate: Candidate, onto: Experiment, here: bytes, stack: bool, runs: int = 1) -> Step:
    """What is to be done with a candidate.

    Args:
        onto: the experiment that it is made on. here: its train.py, as git has it.
        runs: of it and of its parent, at least.
    """
    if candidate.problem:
        return Step(candidate, why=candidate.problem)
    state = session.state
    decided = [e for e in reversed(state.decided) if e.kind not in (CONFIRM, REPEAT) and not e.verdict.get("unjudged")]
    before = next((e for e in decided if e.origin == candidate.origin and (e.kind == REPLAY) != stack), None)
    if before is None:
        content, conflicts = merged(_ends(here), candidate.before, candidate.after)
        if conflicts:
            return Step(candidate, why="does not apply: the same lines are others here", conflicts=conflicts)
        content = content.replace(b"\n", b"\r\n") if b"\r\n" in here else content
        try:
            described = source.describe(content)
        except LabError as error:
            return Step(candidate, why=f"what it makes of train.py here is no Python: {error}")
        if described.digest == source.describe(here).digest:
            return Step(candidate, why="changes nothing: it is here already")
        before = (
            state.same(described.digest)
            if stack
            else next((e for e in decided if e.digest == described.digest and e.onto == onto.number), None)
        )
        if before is None:
            return Step(candidate, content, here)
    seeds = {gate.seed(round) for round in range(runs)}
    missing = any(seeds - state.results(blob).keys() for blob in (before.blob, before.parent))
    if not stack and before.status in ("keep", "discard") and runs > 1 and missing:
        return Step(candidate, why=f"was replayed as experiment {before.number}", again=before)
    what = "replayed" if before.origin == candidate.origin else "decided"
    return Step(candidate, why=f"was {what} here before: experiment {before.number}, {before.status}", done=before)


# --- Doing it ---


def go(session: Session, options) -> int:
    """Replays a session's changes; see __main__.py for the options."""
    if not 1 <= options.runs <= MOST_RUNS or options.limit is not None and options.limit < 1:
        raise LabError(f"--runs is at least 1 and at most {MOST_RUNS}, --limit at least 1")
    bundle = publish.find(options.source)
    if bundle.name == session.name:
        raise LabError(f"{bundle.name} is this session itself; replay it in another one: python -m lab start TAG")
    found = candidates(bundle, options.all)

    def say(text):
        if not options.json:
            print(text, flush=True)

    say(
        f"{show.counted(len(found), 'change')} of {bundle.name}, each on the "
        f"{'best so far' if options.stack else 'baseline'}, at least {show.counted(options.runs, 'run')} of "
        f"{session.budget:g} s"
    )
    if not options.dry_run:
        say("they are somebody's code, which --dry-run shows: read it first")
    for name in ("eval", "budget"):
        if bundle.session.get(name) not in (None, "", session.facts[name]):
            say(f"its {name} is {bundle.session[name]}, here it is {session.facts[name]}: only effects compare")
    if not options.dry_run:
        refuse_if_not_ours(session)
    steps = []
    for place, step in enumerate(_steps(session, found, options, say), 1):
        steps.append(step)
        say(f"{place:3d}/{len(found)}  {_told(session, step)}")
        for line in _edited(step) if options.dry_run else _shown(step):
            say(f"         {line}")
    if options.json:
        print(json.dumps([_facts(session, step) for step in steps], indent=1))
    elif not options.dry_run:
        say("\n" + transferred(session, options.source))
    return 0


def _steps(session: Session, found: list[Candidate], options, say) -> Iterator[Step]:
    """Each candidate's step, once it is done; or, in a dry run, as if all were kept."""
    begun, text = 0, None
    if not options.dry_run:
        _finish(session, say)
        sound_baseline(session)
    for candidate in found:
        onto = options.stack and session.state.best or session.state.baseline
        here = text or session.tree.contents([onto.blob])[onto.blob]
        step = look(session, candidate, onto, here, options.stack, options.runs)
        to_run = step.content is not None or step.again is not None
        if options.dry_run:
            text = step.content or text if options.stack else None
        elif to_run and options.limit is not None and begun == options.limit:
            step = Step(candidate, why="left for later (--limit)")
        elif to_run:
            begun += 1
            say(f"         {untrusted.one_line(candidate.description, WIDTH)} ...")
            step.done = _carry_out(session, step, onto, options)
        yield step


def _finish(session: Session, say) -> None:
    """Lets what runs, or was interrupted, come first: a replay that was ended with Ctrl-C has left it behind."""
    session.refresh()
    if (pending := session.state.pending) and session.supervised:
        say(f"experiment {pending.number} is running, and comes first")
        await_verdict(session, pending)
    with exclusive(session):
        refuse_if_busy(session.device_lock)
        pending = session.state.pending
    if pending:
        say(f"experiment {pending.number} was interrupted, and comes first")
        await_verdict(session, pending, session.launch())


def _carry_out(session: Session, step: Step, onto: Experiment, options) -> Experiment:
    """Has a step's experiment run; the experiment, with its verdict."""
    refuse_if_not_ours(session)
    with exclusive(session):
        refuse_if_busy(session.device_lock)
        if session.state.pending or options.stack and session.state.best is not onto:
            raise LabError("another command has begun an experiment meanwhile: python -m lab wait, then replay again")
        if step.again:
            experiment = _repeat(session, step, options.runs)
        else:
            experiment = _begin(session, step, onto, options)
    await_verdict(session, experiment, session.launch())
    return experiment


def _begin(session: Session, step: Step, onto: Experiment, options) -> Experiment:
    tree, candidate, described = session.tree, step.candidate, source.describe(step.content)
    head = head_of_best(session) if options.stack else onto.commit
    if options.stack and source.describe(tree.train()).digest != onto.digest:
        raise LabError("train.py has an edit of yours; run that first, or put it back: git checkout -- train.py")
    blob = tree.git("hash-object", "-w", "--stdin", content=step.content)  # as git has it: no filters
    message = candidate.description or f"change {candidate.number} of {candidate.origin}"
    return session.begin(
        kind="change" if options.stack else REPLAY,
        blob=blob,
        parent=onto.blob,
        onto=onto.number,
        commit=tree.commit(head, blob, message),
        description=message,
        digest=described.digest,
        nodes=described.nodes,
        portable=described.portable,
        patch=tree.patch(onto.blob, blob)[1],
        origin=candidate.origin,
        fewest=options.runs,
    )


def _repeat(session: Session, step: Step, runs: int) -> Experiment:
    """Further runs of what was decided before, and of its parent, on the seeds that are missing."""
    e = step.again
    said = {"status": e.status, "reason": f"as experiment {e.number}, of which these are further runs"}
    return session.begin(
        kind=REPEAT,
        blob=e.blob,
        parent=e.parent,
        onto=e.onto,
        commit=e.applied["commit"],
        description=e.description,
        digest=e.digest,
        nodes=e.nodes,
        portable=e.portable,
        patch=e.patch,
        origin=e.origin or step.candidate.origin,
        fewest=runs,
        judged=said,
    )


# --- Telling ---


def effect(session: Session, experiment: Experiment) -> Effect | None:
    """How much it moved val_bpb, by all runs of it and of its parent; None if they have no scores."""
    own, parent = (
        [Trial(None, seed, bpb) for seed, bpb in session.state.results(blob).items()]
        for blob in (experiment.blob, experiment.parent)
    )
    if not own or not parent or experiment.status not in ("keep", "discard"):
        return None
    return effects.between(own, parent, session.noise)


def _told(session: Session, step: Step) -> str:
    what = untrusted.one_line(step.candidate.description, WIDTH)
    if step.done is None:
        return f"{step.why or 'applies'}{', and would be run again' * bool(step.again)}: {what}"
    found = effect(session, step.done)
    numbers = (
        ""
        if found is None
        else (
            f", {found.value:+.6f} against its parent (90 % interval {found.low:+.6f} to {found.high:+.6f}; "
            f"{found.runs} runs against {found.parent_runs})"
        )
    )
    if not step.content and not step.again:
        return f"{step.why}{numbers}: {what}"
    why = "" if found else f" ({untrusted.one_line(step.done.verdict['reason'], WIDTH)})"
    return f"experiment {step.done.number}: {step.done.status.upper()}{numbers}{why}: {what}"


def _edited(step: Step) -> Iterator[str]:
    """What it would change here, or what stands in the way."""
    if step.content is None:
        yield from _shown(step)
        return
    rows = [content.decode(errors="replace").replace("\r\n", "\n").split("\n") for content in (step.here, step.content)]
    diff = list(difflib.unified_diff(*rows, lineterm="", n=1))[2:]
    yield from untrusted.visible("\n".join(diff)).split("\n")  # whole: blanks could push code out of what is read


def _shown(step: Step) -> Iterator[str]:
    """The lines of its conflicts."""
    rows = [
        f"{mark} {row.decode(errors='replace')}"
        for one in step.conflicts
        for mark, lines in (
            (f"line {one.line} is here:", one.here),
            ("was there:", one.before),
            ("became there:", one.after),
        )
        for row in lines or [b"(nothing)"]
    ]
    yield from (untrusted.one_line(row, WIDTH) for row in rows[:MOST_SHOWN])
    if len(rows) > MOST_SHOWN:
        yield f"and {len(rows) - MOST_SHOWN} more lines"


def _facts(session: Session, step: Step) -> dict:
    """A step for machines."""
    candidate, done = step.candidate, step.done
    found = effect(session, done) if done else None
    return {
        "number": candidate.number,
        "origin": candidate.origin,
        "description": candidate.description,
        "gain_there": candidate.gain,
        "experiment": done.number if done else None,
        "status": done.status if done else None,
        "effect": {name: getattr(found, name) for name in ("value", "low", "high", "runs", "parent_runs")}
        if found
        else None,
        "why": step.why,
        "conflicts": list(_shown(step)),
    }


def transferred(session: Session, source: str) -> str:
    """What became here of what was found there, all replays of it taken together."""
    from lab.compare import comparison, show as pages, sources  # here, because what only replays shall start fast

    found = comparison.compare([sources.read(source), sources.of_session(session)])
    return f"{pages.transfer(found)}\n\nall of it: python -m lab compare {source} {session.name}"
