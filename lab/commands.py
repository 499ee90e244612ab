"""What each command of `python -m lab` does. Nothing that a run printed is shown but through untrusted.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

import prepare
from lab import near, show, source
from lab.errors import LabError
from lab.session import PREFIX, Session, refuse_if_busy
from lab.state import CONFIRM, Experiment
from lab.tree import TRAIN, Tree

POLL = 0.1  # seconds
TO_END = 30.0  # seconds that a run may take to end once it was asked to


@contextmanager
def exclusive(session: Session):
    """The session to oneself, resumed. LabError while something runs."""
    try:
        lock = session.lock.acquire(blocking=False)
    except filelock.Timeout:
        raise LabError("an experiment is running; wait for it: python -m lab wait") from None
    with lock:
        for text in session.recover():
            print(text, file=sys.stderr)
        yield


def refuse_if_not_ours(session: Session) -> None:
    """LabError while a night runs the experiments, or nothing is to be run."""
    if session.owned_by_night:
        raise LabError(f"a night owns this session and runs the experiments: edit {TRAIN} and end your turn, and it is "
                       "run then. To run one by hand, end the night first: Ctrl-C where it runs")
    refuse_if_held(session)


def refuse_if_held(session: Session) -> None:
    """LabError while nothing is to be run."""
    if held := session.held:
        raise LabError(show.held(held))


# --- Commands ---

def do_start(options) -> int:
    from backends.interface import BackendError
    from lab.start import start

    more = {} if options.baseline_runs is None else {"runs": options.baseline_runs}
    quiet = {"say": lambda text: print(text, file=sys.stderr)} if options.json else {}
    try:
        session = start(Path.cwd(), options.tag, options.unsandboxed, **more, **quiet)
    except BackendError as error:
        raise LabError(str(error)) from error
    if not options.json:
        print(f"session {session.name} in {session.folder}\non branch {session.branch}; now the baseline, "
              f"{show.counted(session.facts['baseline_runs'], 'run')} of {session.budget:g} s", flush=True)
    return follow(session, options, session.launch())


def do_run(session: Session, options) -> int:
    refuse_if_not_ours(session)
    with exclusive(session):
        refuse_if_busy(session.device_lock)
        if pending := session.state.pending:
            options.note = (f"experiment {pending.number} had been interrupted, and came first: {TRAIN} was not taken. "
                            "Run again")
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
            session.begin(kind=CONFIRM, blob=state.best.blob, parent=state.baseline.blob, onto=0, pairs=options.pairs,
                          commit=state.best.applied["commit"], budget=session.budget * options.times,
                          description=state.best.description, portable=state.best.portable)
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

    for record in (prepare.home() / "sessions").glob(f"*/*/{agent.RECORD}"):
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
        print(json.dumps([show.facts(session, e) for e in experiments], indent=1) if options.json
              else show.table(session, experiments))
        return 0
    if options.number not in session.state.experiments:
        raise LabError(f"there is no experiment {options.number}; the last is {max(session.state.experiments)}")
    return tell(session, options, session.state.experiments[options.number])


def do_export(session: Session, options) -> int:
    from lab import exchange, publish

    if options.publish:
        branch, commit = publish.publish(session, options.replace)
        print(f"{branch} at {commit[:7]}: train.py is the best, session/ the export; nothing was sent. To share it: "
              f"git push REMOTE {branch}")
        return 0
    if options.target is None:
        raise LabError("say where to: a folder, an archive's name (x.tar.gz), or --publish")
    kept, changes = publish.kept_of(session), publish.changes_of(session)
    print(exchange.export_session(session.folder, kept, options.target, changes))
    return 0


def do_import(options) -> int:
    from lab import exchange

    try:
        tree = Tree(Path.cwd())
    except LabError:
        tree = None
    print(exchange.import_session(options.source, prepare.home(), device=options.device, tree=tree))
    return 0


def do_compare(options) -> int:
    from lab.compare import comparison, show as pages, sources

    found = comparison.compare(sources.read_all(options.sources, options.device))
    print(json.dumps(found.facts(), indent=1) if options.json else pages.text(found))
    return 0


def do_report(options) -> int:
    from lab import report
    from lab.compare import sources

    for path in report.write(sources.read_all(options.sources or [_checked_out()], options.device), options.out,
                             options.png):
        print(path)
    return 0


def _checked_out() -> str:
    """The session's branch that is checked out here."""
    branch = None
    with suppress(LabError):
        branch = Tree(Path.cwd()).branch()
    if not branch or not branch.startswith(PREFIX):
        raise LabError("no session's branch is checked out here: name a session, as DEVICE/TAG, a folder, an export or "
                       "a results.tsv")
    return branch


def do_replay(session: Session, options) -> int:
    from lab import replay

    return replay.go(session, options)


def do_supervise(session: Session, options) -> int:
    from lab.experiment import supervise

    supervise(session)
    return 0


# --- Beginning an experiment ---

def sound_baseline(session: Session) -> None:
    baseline = session.state.baseline
    if baseline.status != "keep":
        raise LabError(f"the baseline failed ({baseline.verdict['reason']}): mend that, commit {TRAIN} if it changed, "
                       "and start another session")


def head_of_best(session: Session) -> str:
    """The branch's last commit. LabError if its train.py is not the best."""
    tree, best, head = session.tree, session.state.best, session.tree.commit_of(session.branch)
    if head is None or tree.blob_of(head) != best.blob:
        if head and tree.blob_of(f"{head}^") == best.blob:
            raise LabError(f"{TRAIN} was committed, which is for the lab to do. Take the commit back, leaving the file "
                           "as it is, and run again: git reset --soft HEAD^")
        raise LabError(f"{TRAIN} on the branch {session.branch} is not the best that this session kept. Put it back: "
                       f"git checkout {best.applied['commit'][:7]} -- {TRAIN} && git commit -m restore; or start "
                       "another session from what is there")
    return head


def begin_change(session: Session, options) -> Experiment | None:
    """Journals what is in train.py, or the near misses together, as an experiment; or gives the one that was decided on
    an equal train.py."""
    sound_baseline(session)
    tree, state = session.tree, session.state
    best, head = state.best, head_of_best(session)
    content = tree.train()
    described = source.describe(content)
    edited = described.digest != best.digest
    if options.near_misses:
        if edited:
            raise LabError(f"{TRAIN} has an edit of yours; run that first, or put it back: git checkout -- {TRAIN}")
        content, members = near.together(session)
        described = source.describe(content)
        message = options.message or "near misses together: " + "; ".join(
            f"{number} {state.experiments[number].description}" for number in members)
        kind = "near misses"
    else:
        if not edited:
            raise LabError(f"{TRAIN} is not edited (comments and docstrings aside): there is nothing to run yet")
        if not (options.message or "").strip():
            raise LabError('say what was changed, and why: python -m lab run -m "..."')
        members, message, kind = (), options.message, "change"
    blob = tree.store(content)
    if (same := state.same(described.digest)) and not options.again:
        tree.settle(session.branch, blob, best.blob)
        return same
    session.begin(
        kind=kind, blob=blob, parent=best.blob, onto=best.number, commit=tree.commit(head, blob, message),
        description=message, digest=described.digest, nodes=described.nodes, portable=described.portable,
        patch=tree.patch(best.blob, blob)[1], members=members)
    return None


# --- Waiting and telling ---

def follow(session: Session, options, process: subprocess.Popen | None = None) -> int:
    """Waits for the pending experiment, at most as long as the options say, and tells how it stands."""
    session.refresh()
    experiment = session.state.pending
    if experiment is None:  # it was as good as done
        return tell(session, options, session.state.last)
    if not await_verdict(session, experiment, process, options.wait):
        print(json.dumps(show.progress_facts(session, experiment)) if options.json
              else show.progress(session, experiment))
        return 0
    return tell(session, options, experiment)


def await_verdict(session: Session, experiment: Experiment, process: subprocess.Popen | None = None,
                  seconds: float = math.inf) -> bool:
    """Waits, at most so long, for what carries an experiment out; whether it is done. LabError if that ended before."""
    deadline = time.monotonic() + seconds
    while not experiment.applied:
        if time.monotonic() > deadline:
            return False
        ended = (process is None or process.poll() is not None) and not session.supervised
        session.refresh()
        if ended and not experiment.applied:
            refuse_if_held(session)
            raise LabError(f"what was to carry out experiment {experiment.number} has ended: {last_words(session)}; "
                           "python -m lab wait tries again")
        time.sleep(POLL)
    return True


def last_words(session: Session) -> str:
    try:
        lines = (session.folder / "supervisor.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it was killed"


def tell(session: Session, options, experiment: Experiment) -> int:
    note = {"note": options.note} if getattr(options, "note", "") else {}
    if options.json:
        print(json.dumps({**show.facts(session, experiment), **note}, indent=1))
    else:
        print(show.block(session, experiment), *note.values(), sep="\n")
    return 0
