"""What each command of `python -m lab` does. Nothing that a run printed is shown but through untrusted.py."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict

from pathlib import Path

from msgspec.structs import asdict as fields_of

from lab import untrusted
from lab.cli import render
from lab.errors import LabError
from lab.genome.syntax import TRAIN, beyond_the_surface, describe
from lab.session.locks import refuse_if_busy
from lab.session.repository import here
from lab.session.session import PREFIX, Session, at
from lab.session.state import APART, Experiment
from lab.untrusted import counted
from lab.verdict import opening
from lab.verdict.executor import launch, supervise

MOST_DAYS = 3650  # that an invitation holds
TO_END = 30.0  # seconds that a run may take to end once it was asked to
NO_ARCHIVES = (".zip", ".tar", ".xz", ".bz2", ".7z", ".zst")  # endings of files that export can't write
ANOTHER = 3  # exit status: what was asked for was not done, as an interrupted experiment had to be finished first


def do_start(options) -> int:
    from lab.session.start import start

    def say(text):
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    described = None
    if options.of:
        from lab.fleet import here as devices

        described = devices.described(options.of)
    session = start(Path.cwd(), options.tag, options.unsandboxed, options.baseline_runs, say, described)
    if described:
        say(
            f"session {session.name} in {session.folder}, on branch {session.branch}. Its runs are made on the other "
            "machine. Next: python -m lab invite FILE --address HOST:PORT; take FILE there and type: python -m lab "
            "join FILE; then here: python -m lab night"
        )
        return tell(session, options, session.state.last) if options.json else 0
    say(
        f"session {session.name} in {session.folder}\non branch {session.branch}; now the baseline is run: at least "
        f"{counted(session.started.baseline_runs, 'run')} of {session.budget:g} s"
    )
    return follow(session, options, launch(session))


def do_run(session: Session, options) -> int:
    opening.refuse_if_not_ours(session)
    with opening.exclusive(session, device=True):
        interrupted, own = session.state.oldest_open, False
        if interrupted:
            own = session.repository.content(interrupted.blob) == session.repository.train()
            options.note = _finished_first(interrupted, "" if own else f"Your {TRAIN}")
        elif answer := opening.open_change(session, options.message, options.near_misses, options.again):
            options.note = "this was tried before, so the ledger answers; --again runs it all the same"
            return tell(session, options, answer)
        elif others := session.repository.changed():
            print(f"not part of the experiment, and left as they are: {untrusted.listed(others)}", file=sys.stderr)
        process = launch(session)
    return follow(session, options, process) or ANOTHER * bool(interrupted and not own)


def _finished_first(interrupted: Experiment, left: str) -> str:
    """What to say of an experiment that was open, and of what was `left`, if anything."""
    if not left:
        return f"experiment {interrupted.number}, this edit, had been interrupted, and was finished"
    return (
        f"experiment {interrupted.number} had been interrupted, and was finished first. {left} was not run: run the "
        "command again"
    )


def do_confirm(session: Session, options) -> int:
    times = 1.0 if options.times is None else options.times

    def open_experiment() -> None:
        if options.scale:
            opening.open_scale(session, options.pairs)
        else:
            opening.open_confirmation(session, options.pairs, times, options.file)

    return _measure(session, options, open_experiment)


def do_transfer(session: Session, options) -> int:
    """Opens two experiments: the baseline in another size, which is not judged, and on it the best in that size. With
    --each two for each kept change: its parent, and the change."""
    if options.depth == options.times == 1:
        raise LabError(
            "with --depth 1 and --times 1 nothing is another size: python -m lab confirm tests the best as it is"
        )
    sizes = options.depth, options.times, options.pairs, options.each
    return _measure(session, options, lambda: opening.open_transfer(session, *sizes))


def _measure(session: Session, options, open_experiment: Callable[[], None]) -> int:
    """Opens an experiment that tries nothing new, unless one was interrupted, and follows what is open."""
    opening.refuse_if_not_ours(session)
    with opening.exclusive(session, device=True):
        interrupted = session.state.oldest_open
        if interrupted is None:
            opening.sound_baseline(session)
            open_experiment()
        elif interrupted.kind in APART:
            said = f"experiment {interrupted.number} ({interrupted.kind}) had been interrupted, and was finished"
            options.note = f"{said}. If you asked for something else, run the command again"
        else:
            options.note = _finished_first(interrupted, "What you asked for")
        process = launch(session)
    return follow(session, options, process) or ANOTHER * bool(interrupted and interrupted.kind not in APART)


def do_reproduce(options) -> int:
    from lab.share import reproduce, sources

    if Path(options.of or "").suffix == ".tsv":
        raise LabError(f"{options.of} says in words what was changed: --of takes a session, or an export of one")
    record = sources.read(options.of or _checked_out())
    told = sys.stderr if options.json else sys.stdout
    found = reproduce.reproduce(record, options.number, options.pairs, lambda line: print(line, file=told, flush=True))
    print(json.dumps(found, indent=1) if options.json else reproduce.told(found))
    return 0 if found["stands"] else 1


def do_check(options) -> int:
    """Tries the train.py that is here, as the session that is here would run it; exit status 1 if it would fail."""
    from lab.run import check  # here, as it imports much

    repository = here()
    train = (repository.path if repository else Path.cwd()) / TRAIN
    try:
        content = train.read_bytes()
    except OSError as error:
        raise LabError(f"{TRAIN} can't be read: {error}") from error
    digest, session = describe(content).digest, _session_here()
    remarks = [f"line {p.line}: {p.found}: use {p.use}" for p in beyond_the_surface(content)]
    if session:
        if session.supervised and os.environ.get("LAB_TURN"):  # beside the runs: what only reads disturbs none
            remarks.append("it was only read, and not tried: an experiment is running on the device")
            print(json.dumps({"remarks": remarks}, indent=1) if options.json else "\n".join(remarks))
            return 0
        if session.supervised:
            raise LabError(opening.RUNNING)
        refuse_if_busy(session.device_lock)
        if equal := session.state.equal(digest):
            remarks.append(f"it is equal to experiment {equal.number}, which {equal.became}")
    tried = check.tried(train, session.local.settings if session else {})
    facts = {**asdict(tried), "remarks": remarks}
    print(json.dumps(facts, indent=1) if options.json else render.tried(tried, remarks))
    return 1 if tried.problem else 0


def _session_here() -> Session | None:
    try:
        return at(Path.cwd())
    except LabError:
        return None


def do_findings(options) -> int:
    """Lists what was found elsewhere, and how it fared in the session that is here, if there is one."""
    from lab.night import findings  # here, as it imports much

    rows = findings.rows(_session_here())
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else render.findings(rows))
    return 0


def do_wait(session: Session, options) -> int:
    session.refresh()
    if session.supervised:
        return follow(session, options)
    if session.state.open:  # else there is nothing that would need the lock
        opening.refuse_if_held(session)
        with opening.exclusive(session):
            process = launch(session) if session.state.open else None
        if process:
            return follow(session, options, process)
    print("nothing is running; the last experiment:", file=sys.stderr)
    return tell(session, options, session.state.last)


def do_pause(session: Session, options) -> int:
    """Pauses the session. Returns once the current run has ended, unless it may finish."""
    session.hold("paused", now=not options.after_run)
    deadline = time.monotonic() + TO_END
    while not options.after_run and session.supervised and time.monotonic() < deadline:
        time.sleep(opening.POLL)
    session.refresh()
    print(render.paused(session))
    return 0


def do_resume(session: Session, options) -> int:
    """Doing it twice changes nothing: of two supervisors the later one leaves."""
    said = "resumed" if session.held else "it was not paused"
    session.release()
    session.refresh()
    if session.owned_by_night:
        print(f"{said}: the night continues by itself")
    elif experiment := session.state.oldest_open:
        launch(session)
        print(f"{said}: experiment {experiment.number} continues; to follow it: python -m lab wait")
    else:
        print(f"{said}: nothing is running; you can run the next experiment")
    return 0


def before_night(options) -> bool:
    """Tells what a night will take, and makes what is missing for it; whether it is to begin."""
    from lab.night import limits, plan

    if options.planned is not None:
        return True
    planned = plan.plan(Path.cwd(), options)
    with limits.awake() as awake:
        print(*plan.tell(planned, awake), *plan.advice(options.agent), sep="\n", flush=True)
        if not options.plan:
            plan.provide(planned, options, lambda text: print(text, flush=True))
    options.planned = planned.deadline or 0.0
    return not options.plan


def do_night(session: Session, options) -> int:
    from lab.night import loop

    return loop.go(session, options)


def do_status(session: Session, options) -> int:
    print(json.dumps(render.status_facts(session), indent=1) if options.json else render.status(session))
    return 0


def do_log(session: Session, options) -> int:
    experiments = session.state.experiments
    if options.number is None:
        known = list(experiments.values())
        facts = [render.facts(e) for e in known] if options.json else []
        print(json.dumps(facts, indent=1) if options.json else render.table(known))
        return 0
    if options.number not in experiments:
        raise LabError(f"there is no experiment {options.number}; the last is {max(experiments)}")
    return tell(session, options, experiments[options.number])


def do_sample(session: Session, options) -> int:
    from lab.verdict.sample import sample

    opening.refuse_if_held(session)
    with opening.exclusive(session, device=True):
        sampled = sample(session, options.prompt, options.tokens)
    print(json.dumps(fields_of(sampled), indent=1) if options.json else render.sampled(sampled))
    return 0


def do_mcp(options) -> int:
    from lab.cli import server

    server.serve()
    return 0


def do_export(session: Session, options) -> int:
    from lab.share import export

    if options.publish:
        branch, commit = export.publish(session, options.replace)
        print(
            f"{branch} at {commit[:7]}: train.py is the best, and session/ is the export. Nothing was sent; to share "
            f"the branch: git push REMOTE {branch}"
        )
        return 0
    if options.target is None:
        raise LabError("name a target: a folder or an archive (x.tar.gz), or give --publish")
    if options.target.suffix in NO_ARCHIVES:
        raise LabError(f"{options.target}: the only archives are .tar.gz; for a folder give another name")
    print(export.export_session(session, options.target))
    return 0


def do_import(options) -> int:
    from lab.share import sources

    print(sources.import_session(options.source, options.device))
    return 0


def do_compare(options) -> int:
    from lab.compare import comparison, tables
    from lab.compare.analysis import Analysis
    from lab.share import sources

    compared = comparison.compare([Analysis(record) for record in sources.read_all(options.sources, options.device)])
    if options.svg:
        from lab.report import charts, page

        if (chart := charts.kinds(compared.kinds, 720, 420)) is None:
            raise LabError("no change was tried: there is nothing to draw, leave --svg out")
        page.save({options.svg: (charts.picture(chart), charts.XML)})
    if options.json:
        print(json.dumps(compared.facts()["kinds"] if options.kinds else compared.facts(), indent=1))
    else:
        print(tables.kinds_text(compared) if options.kinds else tables.text(compared))
    return 0


def do_report(options) -> int:
    if options.price is not None and not 0 <= options.price < math.inf:
        raise LabError("--price has to be a number, 0 or above: what a kWh costs")
    gc.disable()  # this process is short, and makes many small objects: collecting takes a fifth of its time
    try:
        from lab.report import page
        from lab.share import sources

        records = sources.read_all(options.sources or [_checked_out()], options.device)
        print(*page.write(records, options.out, options.png, options.price), sep="\n")
    finally:
        gc.enable()
    return 0


def _checked_out() -> str:
    """The session's branch that is checked out here."""
    repository = here()
    branch = repository and repository.branch()
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
    from lab.fleet import settings

    if settings.is_pooled(session):
        from lab.fleet.pool import Pool

        supervise(session, Pool(session))
    else:
        supervise(session)
    return 0


# --- Several devices ---


def do_invite(session: Session, options) -> int:
    from lab.fleet import invitation, settings

    if options.none:
        if session.owned_by_night:
            raise LabError(
                "the night that is running may use workers: end it with Ctrl-C, then: python -m lab invite --none"
            )
        settings.listen(session, None)
        print(
            f"{session.name} listens for no other machine any more. Invitations that were written can be used again "
            "once you invite again"
        )
        return 0
    if not 0 < options.days <= MOST_DAYS:
        raise LabError(f"--days has to be a number above 0, and at most {MOST_DAYS}")
    if session.fleet is None and (session.owned_by_night or session.supervised):
        raise LabError(
            "experiments are being run by this machine alone: end the night with Ctrl-C, or wait (python -m lab wait); "
            "then invite. The next night listens for workers"
        )
    listen = invitation.invite(session, options.target, options.address, options.listen, options.days)
    settings.listen(session, listen)
    print(
        f"{options.target}: whoever has this file can be a worker of {session.name} for {options.days:g} days. On the "
        f"other machine: python -m lab join {options.target.name}. The night listens at {listen}"
    )
    return 0


def do_join(options) -> int:
    from lab.fleet import here as devices, join

    if options.describe:
        devices.describe(options.describe)
        print(
            f"{options.describe}: take it to the head, and type: python -m lab start TAG --for {options.describe.name}"
        )
        return 0
    if options.invitation is None:
        raise LabError("name an invitation: python -m lab join FILE. On the head, python -m lab invite FILE makes one")
    return join.join(options.invitation, options.devices or "all", options.name, options.local)


def do_leave(options) -> int:
    from lab.fleet import join

    left = join.leave()
    print(f"given back to this machine: {', '.join(left)}" if left else "no device of this machine works for a session")
    return 0


def do_fleet(session: Session, options) -> int:
    from lab.fleet import settings

    known = settings.status(session)
    print(json.dumps(known, indent=1) if options.json else render.fleet(session, known))
    return 0


# --- Waiting and telling ---


def follow(session: Session, options, process: subprocess.Popen | None = None) -> int:
    """Waits for the experiments that are open, at most as long as the options say, and tells how each stands, up to the
    first that is not done. As JSON that is a list if several were open."""
    session.refresh()
    end, opened, facts = time.monotonic() + options.wait, session.state.open, []
    # What was decided when it was opened is the base of a transfer, of which there is nothing to tell.
    awaited = [each for each in opened if each.decided is None] or opened or [session.state.last]
    for experiment in awaited:
        with _bar(session, experiment) as show:
            done = opening.await_verdict(session, experiment, process, end - time.monotonic(), show)
        if options.json:
            facts.append(_facts(options, experiment) if done else render.progress_facts(session, experiment))
        elif done:
            tell(session, options, experiment)
        else:
            print(render.progress(session, experiment))
        if not done:
            break
    if options.json:
        print(json.dumps(facts if len(awaited) > 1 else facts[0], indent=1))
    return 0


@contextmanager
def _bar(session: Session, experiment: Experiment):
    """Returns the function that draws the progress of the current run on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from lab.night.view import progress_of

    columns = TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"experiment {experiment.number}", total=None)

        def show():
            run = experiment.run_under_way
            progress = progress_of(session.run_folder(run.number) / "run.log") if run else {}
            text = f"experiment {experiment.number}"
            if run:
                percent = progress.get("percent", 0)
                doing = "starts" if not progress else "trains" if percent < 100 else "is scored"
                text += f", run {run.number} (seed {run.seed}) {doing}"
            bar.update(task, description=text, completed=progress.get("percent", 0), total=100 if progress else None)

        yield show


def tell(session: Session, options, experiment: Experiment) -> int:
    facts = _facts(options, experiment)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(render.block(session, experiment), *filter(None, [facts.get("note")]), sep="\n")
    return 0


def _facts(options, experiment: Experiment) -> dict:
    return render.facts(experiment) | ({"note": options.note} if getattr(options, "note", "") else {})
