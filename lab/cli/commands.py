"""What each command of `python -m lab` does. Nothing that a run printed is shown but through untrusted.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import storage
from lab.cli import render as show
from lab.session.begin import (
    POLL,
    await_verdict,
    begin_change,
    exclusive,
    refuse_if_held,
    refuse_if_not_ours,
    sound_baseline,
)
from lab.errors import LabError
from lab.session.session import PREFIX, Session, refuse_if_busy
from lab.session.state import CONFIRM, Experiment
from lab.session.repository import TRAIN, Tree, here

TO_END = 30.0  # seconds that a run may take to end once it was asked to


# --- Commands ---


def do_start(options) -> int:
    from backends.interface import BackendError
    from lab.session.start import start

    more = {} if options.baseline_runs is None else {"runs": options.baseline_runs}
    quiet = {"say": lambda text: print(text, file=sys.stderr)} if options.json else {}
    try:
        session = start(Path.cwd(), options.tag, options.unsandboxed, **more, **quiet)
    except BackendError as error:
        raise LabError(str(error)) from error
    if not options.json:
        print(
            f"session {session.name} in {session.folder}\non branch {session.branch}; now the baseline, "
            f"{show.counted(session.facts['baseline_runs'], 'run')} of {session.budget:g} s",
            flush=True,
        )
    return follow(session, options, session.launch())


def do_run(session: Session, options) -> int:
    refuse_if_not_ours(session)
    with exclusive(session):
        refuse_if_busy(session.device_lock)
        if pending := session.state.pending:
            options.note = (
                f"experiment {pending.number} had been interrupted, and came first: {TRAIN} was not taken. Run again"
            )
        elif answer := begin_change(session, options):
            options.note = "answered from the ledger, not run again (--again runs it)"
            return tell(session, options, answer)
        elif others := session.tree.changed():
            print(f"not part of the experiment, and left alone: {show.listed(others)}", file=sys.stderr)
    return follow(session, options, session.launch())


def do_confirm(session: Session, options) -> int:
    if options.pairs < 2 or options.times <= 0:
        raise LabError("at least 2 pairs, and a positive multiple of the budget, please")
    refuse_if_not_ours(session)
    with exclusive(session):
        refuse_if_busy(session.device_lock)
        state = session.state
        if not state.pending:
            sound_baseline(session)
            if state.best is state.baseline:
                raise LabError("the baseline is still the best: there is nothing to confirm yet")
            session.begin(
                kind=CONFIRM,
                blob=state.best.blob,
                parent=state.baseline.blob,
                onto=0,
                pairs=options.pairs,
                commit=state.best.applied["commit"],
                budget=session.budget * options.times,
                description=state.best.description,
                portable=state.best.portable,
            )
    return follow(session, options, session.launch())


def do_wait(session: Session, options) -> int:
    session.refresh()
    if session.supervised:
        return follow(session, options)
    refuse_if_held(session)
    with exclusive(session):
        pending = session.state.pending
    if pending:
        return follow(session, options, session.launch())
    print("nothing is running; the last experiment:", file=sys.stderr)
    return tell(session, options, session.state.last)


def do_pause(session: Session, options) -> int:
    """Nothing is begun from here on. Returns once what runs has ended, unless it may go on to its end."""
    session.hold("paused", now=not options.after_run)
    deadline = time.monotonic() + TO_END
    while not options.after_run and session.supervised and time.monotonic() < deadline:
        time.sleep(POLL)
    session.refresh()
    print(show.paused(session))
    return 0


def do_resume(session: Session, options) -> int:
    """Doing it twice changes nothing: of two supervisors the later one leaves."""
    held = session.held
    session.release()
    session.refresh()
    said = "resumed" if held else "it was not paused"
    if session.owned_by_night:
        print(f"{said}: the night goes on by itself")
    elif pending := session.state.pending:
        session.launch()
        print(f"{said}: experiment {pending.number} goes on; python -m lab wait follows it")
    else:
        print(f"{said}: nothing is under way, and the next experiment may come")
    return 0


def before_night(options) -> bool:
    """Tells what a night will take, and makes what is missing for it; whether it is to begin."""
    from lab.night import limits, plan

    if options.planned is not None:
        return True
    if not options.plan:
        _recover_turn(Tree(Path.cwd()))
    made = plan.plan(Path.cwd(), options)
    with limits.awake() as made.awake:
        print(*plan.tell(made), sep="\n", flush=True)
        if not options.plan:
            plan.provide(made, options, lambda text: print(text, flush=True))
    options.planned = made.deadline or 0.0
    return not options.plan


def _recover_turn(tree: Tree) -> None:
    """Puts HEAD back where a night was killed while its agent had another branch checked out."""
    from lab.night import agent

    for record in (storage.home() / "sessions").glob(f"*/*/{agent.RECORD}"):
        with suppress(LabError):  # of another version, say
            session = Session(record.parent)
            if session.facts["tree"] == str(tree.path) and not session.owned_by_night:
                for text in agent.recover(session):
                    print(f"the agent {text}")


def do_night(session: Session, options) -> int:
    from lab.night import loop

    return loop.go(session, options)


def do_status(session: Session, options) -> int:
    print(json.dumps(show.status_facts(session), indent=1) if options.json else show.status(session))
    return 0


def do_log(session: Session, options) -> int:
    if options.number is None:
        experiments = list(session.state.experiments.values())
        print(
            json.dumps([show.facts(session, e) for e in experiments], indent=1)
            if options.json
            else show.table(session, experiments)
        )
        return 0
    if options.number not in session.state.experiments:
        raise LabError(f"there is no experiment {options.number}; the last is {max(session.state.experiments)}")
    return tell(session, options, session.state.experiments[options.number])


def do_export(session: Session, options) -> int:
    from lab.share import exchange, publish

    if options.publish:
        branch, commit = publish.publish(session, options.replace)
        print(
            f"{branch} at {commit[:7]}: train.py is the best, session/ the export; nothing was sent. To share it: "
            f"git push REMOTE {branch}"
        )
        return 0
    if options.target is None:
        raise LabError("say where to: a folder, an archive's name (x.tar.gz), or --publish")
    kept, changes = publish.kept_of(session), publish.changes_of(session)
    print(exchange.export_session(session.folder, kept, options.target, changes))
    return 0


def do_import(options) -> int:
    from lab.share import exchange

    print(exchange.import_session(options.source, storage.home(), device=options.device, tree=here()))
    return 0


def do_compare(options) -> int:
    from lab.compare import comparison, show as pages, sources

    found = comparison.compare(sources.read_all(options.sources, options.device))
    print(json.dumps(found.facts(), indent=1) if options.json else pages.text(found))
    return 0


def do_report(options) -> int:
    from lab import report
    from lab.compare import sources

    for path in report.write(
        sources.read_all(options.sources or [_checked_out()], options.device), options.out, options.png
    ):
        print(path)
    return 0


def _checked_out() -> str:
    """The session's branch that is checked out here."""
    tree = here()
    branch = tree and tree.branch()
    if not branch or not branch.startswith(PREFIX):
        raise LabError(
            "no session's branch is checked out here: name a session, as DEVICE/TAG, a folder, an export or "
            "a results.tsv"
        )
    return branch


def do_replay(session: Session, options) -> int:
    from lab.share import replay

    return replay.go(session, options)


def do_supervise(session: Session, options) -> int:
    from lab.verdict.executor import supervise

    supervise(session)
    return 0


# --- Waiting and telling ---


def follow(session: Session, options, process: subprocess.Popen | None = None) -> int:
    """Waits for the pending experiment, at most as long as the options say, and tells how it stands."""
    session.refresh()
    experiment = session.state.pending
    if experiment is None:  # it was as good as done
        return tell(session, options, session.state.last)
    if not await_verdict(session, experiment, process, options.wait):
        print(
            json.dumps(show.progress_facts(session, experiment)) if options.json else show.progress(session, experiment)
        )
        return 0
    return tell(session, options, experiment)


def tell(session: Session, options, experiment: Experiment) -> int:
    note = {"note": options.note} if getattr(options, "note", "") else {}
    if options.json:
        print(json.dumps({**show.facts(session, experiment), **note}, indent=1))
    else:
        print(show.block(session, experiment), *note.values(), sep="\n")
    return 0
