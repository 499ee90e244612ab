"""What each command of `python -m lab` does. Nothing that a run printed is shown but through untrusted.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import filelock

from lab import exchange, gate, show, source
from lab.errors import LabError
from lab.session import Session
from lab.state import CONFIRM, Experiment
from lab.tree import TRAIN

POLL = 0.1  # seconds


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


def free_device(session: Session) -> None:
    """LabError if something else trains on this device."""
    try:
        with session.device_lock.acquire(blocking=False):
            pass
    except filelock.Timeout:
        raise LabError("another session is using this device; one run at a time, else both are slowed: wait for it"
                       ) from None


# --- Commands ---

def do_start(options) -> int:
    from backends.interface import BackendError
    from lab.start import start

    more = {"runs": options.baseline_runs} if options.baseline_runs else {}
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
    with exclusive(session):
        free_device(session)
        if pending := session.state.pending:
            print(f"experiment {pending.number} was interrupted: going on with it first. {TRAIN} was not taken; run "
                  "again afterwards", file=sys.stderr)
        elif answer := begin_change(session, options):
            return tell(session, options, answer, "answered from the ledger, not run again (--again runs it)")
    return follow(session, options, session.launch())


def do_confirm(session: Session, options) -> int:
    if options.pairs < 2 or options.times <= 0:
        raise LabError("at least 2 pairs, and a positive multiple of the budget, please")
    with exclusive(session):
        free_device(session)
        state = session.state
        if not state.pending:
            sound_baseline(session)
            if state.best is state.baseline:
                raise LabError("the baseline is still the best: there is nothing to confirm yet")
            session.begin(kind=CONFIRM, blob=state.best.blob, parent=state.baseline.blob, pairs=options.pairs,
                          commit=state.best.applied["commit"], budget=session.budget * options.times,
                          description=state.best.description, portable=state.best.portable)
    return follow(session, options, session.launch())


def do_wait(session: Session, options) -> int:
    session.refresh()
    if session.supervised:
        return follow(session, options)
    with exclusive(session):
        pending = session.state.pending
    if pending:
        return follow(session, options, session.launch())
    print("nothing is running; the last experiment:", file=sys.stderr)
    return tell(session, options, next(reversed(session.state.experiments.values())))


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
    with exclusive(session):
        if session.state.pending:
            raise LabError("an experiment was interrupted; let it end first: python -m lab wait")
        kept = [exchange.Kept(number=e.number, commit=e.applied["commit"][:7], description=e.description,
                              parent=session.state.kept_as(e.parent).applied["commit"][:7],
                              patch_text=session.tree.patch(e.parent, e.blob)[0])
                for e in session.state.kept if e.parent]
        print(exchange.export_session(session.folder, kept, options.target))
    return 0


def do_import(options) -> int:
    import prepare

    print(exchange.import_session(options.source, prepare.home(), device=options.device))
    return 0


def do_supervise(session: Session, options) -> int:
    from lab.experiment import supervise

    supervise(session)
    return 0


# --- Beginning an experiment ---

def sound_baseline(session: Session) -> None:
    baseline = session.state.baseline
    if baseline is None or baseline.status != "keep":
        why = baseline.verdict["reason"] if baseline and baseline.verdict else "it was not run"
        raise LabError(f"the baseline failed ({why}): mend {TRAIN}, commit it, and start another session")


def begin_change(session: Session, options) -> Experiment | None:
    """Journals what is in train.py, or the near misses together, as an experiment; or gives the one that was decided on
    an equal train.py."""
    sound_baseline(session)
    tree, state = session.tree, session.state
    best, head = state.best, tree.commit_of(session.branch)
    if head is None or tree.blob_of(head) != best.blob:
        raise LabError(f"{TRAIN} on the branch {session.branch} is not the best that this session kept. Put it back: "
                       f"git checkout {best.applied['commit'][:7]} -- {TRAIN} && git commit -m restore; or start "
                       "another session from what is there")
    content = tree.train()
    described = source.describe(content)
    edited = described.digest != best.digest
    if options.near_misses:
        if edited:
            raise LabError(f"{TRAIN} has an edit of yours; run that first, or put it back: git checkout -- {TRAIN}")
        content, members = together(session)
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
    if (same := state.same(described.digest)) and not options.again:
        tree.settle(session.branch, content)
        return same
    blob = tree.store(content)
    if others := tree.changed():
        from lab.start import named
        print(f"not part of the experiment, and left alone: {named(others)}", file=sys.stderr)
    session.begin(
        kind=kind, blob=blob, parent=best.blob, commit=tree.commit(head, blob, message), description=message,
        digest=described.digest, nodes=described.nodes, portable=described.portable,
        patch=tree.patch(best.blob, blob)[1], members=members)
    return None


def together(session: Session) -> tuple[bytes, list[int]]:
    """(train.py with the near misses merged into the best, their numbers): those that go together without conflict."""
    state, tree = session.state, session.tree
    current, members = tree.content(state.best.blob), []
    for number in show.near_misses(session):
        if len(members) == gate.MOST_TOGETHER:
            break
        miss = state.experiments[number]
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in ("current", "base", "other")]
            for path, content in zip(paths, (current, tree.content(miss.parent), tree.content(miss.blob))):
                path.write_bytes(content)
            done = subprocess.run(["git", "merge-file", "-p", *map(str, paths)], capture_output=True, check=False)
        try:
            if done.returncode == 0 and done.stdout != current:
                source.describe(done.stdout)
                current, members = done.stdout, [*members, number]
        except LabError:
            pass  # merged without conflict, and is no Python any more
    if len(members) < gate.FEWEST_TOGETHER:
        raise LabError(f"there are not enough near misses that go together: {len(members)}, and it takes "
                       f"{gate.FEWEST_TOGETHER}")
    return current, members


# --- Waiting and telling ---

def follow(session: Session, options, process: subprocess.Popen | None = None) -> int:
    """Waits for the pending experiment, at most as long as the options say, and tells how it stands."""
    deadline = time.monotonic() + options.wait
    session.refresh()
    experiment = session.state.pending
    if experiment is None:  # it was as good as done
        return tell(session, options, next(reversed(session.state.experiments.values())))
    while not experiment.applied:
        if time.monotonic() > deadline:
            print(json.dumps(show.progress_facts(session, experiment)) if options.json
                  else show.progress(session, experiment))
            return 0
        ended = (process is None or process.poll() is not None) and not session.supervised
        session.refresh()
        if ended and not experiment.applied:
            raise LabError(f"what was to carry out experiment {experiment.number} has ended: {last_words(session)}; "
                           "python -m lab wait tries again")
        time.sleep(POLL)
    return tell(session, options, experiment)


def last_words(session: Session) -> str:
    try:
        lines = (session.folder / "supervisor.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it was killed"


def tell(session: Session, options, experiment: Experiment, note: str = "") -> int:
    if options.json:
        print(json.dumps({**show.facts(session, experiment), **({"note": note} if note else {})}, indent=1))
    else:
        print(show.block(session, experiment) + (f"\n{note}" if note else ""))
    return 0
