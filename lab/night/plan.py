"""What a night takes, told before it begins; and what is missing for it, made."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import dataset as datasets
import prepare
import storage
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.night import limits
from lab.run import sandbox
from lab.session.events import NIGHT_EVENTS
from lab.session.journal import Journal
from lab.session.repository import Repository
from lab.session.session import PREFIX, Session, at, folder_of
from lab.session.state import BESIDE
from lab.untrusted import counted

DEFAULT = "climbmix"  # what prepare.py makes when it is not told
# Gigabytes, about: to download, and prepared on the disk with what was downloaded. climbmix has eleven files of 0.1 GB
# and 60 M tokens of two bytes each; tinystories, by its publisher, 0.67 GB and 2.2 G characters.
SIZES = {"climbmix": (1.1, 2.4), "tinystories": (0.7, 1.8), "stdlib": (0.0, 0.02)}
CALIBRATION = 600.0  # seconds, at most; says `python -m calibration --help`
RUNS_EACH = 1.3  # per experiment of the proposer, in simulated nights (benchmarks/README.md)
START = 20.0  # seconds that a run takes to start and to compile (11 to 66 were measured)
GUESSED_OVERHEAD = 60.0  # seconds of a run beside its training, on a device that nothing is known of
TURN = {"agent": 120.0, "proposer": 3.0}  # seconds between experiments: a guess for an agent
ENOUGH = 3  # experiments of a session, from which on it is asked and not the guesses
RUN_MB, CACHE_MB = 0.3, 15.0  # guesses: that stay on the disk: of a run its logs, of a change what compilers keep of it


@dataclass
class Plan:
    """What `python -m lab night` would do here.

    Attributes:
        repository, tag: of the session. by: who proposes. session: the one that is gone on with, or None.
        missing: of "data", "calibration", "session", "baseline", in the order in which they are made.
        dataset: its name or path. prepares: arguments of Python that make it, where it is missing.
        download, disk: gigabytes that this takes. free: gigabytes that there are.
        each: seconds of an experiment. basis: where that is from. first: seconds until the first one can begin.
        deadline: seconds as of time.time(), or None. most: experiments that are wanted, or None.
        box: the sandbox, or None. power: "mains", "battery" or None. awake: of the computer, if the caller knows.
    """

    repository: Repository
    tag: str
    by: str
    session: Session | None = None
    missing: list[str] = field(default_factory=list)
    dataset: str = ""
    prepares: list[str] = field(default_factory=list)
    download: float = 0.0
    disk: float = 0.0
    free: float = 0.0
    each: float = 0.0
    basis: str = ""
    first: float = 0.0
    deadline: float | None = None
    most: int | None = None
    box: str | None = None
    power: str | None = None
    awake: str = ""

    @property
    def experiments(self) -> int | None:
        """How many there is time for; None without a limit."""
        fit = [] if self.most is None else [self.most]
        if self.deadline is not None:
            fit.append(max(0, math.floor((self.deadline - time.time() - self.first) / self.each)))
        return min(fit, default=None)


def plan(path: Path, options) -> Plan:
    """What a night in the repository at `path` would do. Nothing is changed.

    Args:
        options: tag, agent, hours, until, max_experiments, unsandboxed, dataset, baseline_runs.

    Raises:
        LabError: it can't begin; the message says what to do first.
    """
    import backends
    from calibration import identity
    from lab.session.start import BASELINE_RUNS

    repository = Repository(path)
    session, tag = checked_out(repository, options.tag)
    made = Plan(repository, tag, "agent" if options.agent else "proposer", session)
    made.most, made.deadline = options.max_experiments, limits.deadline(options.hours, options.until, datetime.now())
    made.power = identity.power_source()
    if session:
        night = Journal(session.folder / "night.jsonl", NIGHT_EVENTS)
        if began := limits.interrupted(night.events, options, time.time()):
            made.deadline = began.deadline
            if made.most is not None:
                made.most = max(0, made.most - (session.state.last.number - began.first + 1))
        made.dataset, made.box, profile = session.started.dataset, session.started.sandbox, session.profile
        made.missing = [] if session.state.baseline.applied else ["baseline"]
        budget, runs, rows = session.budget, session.started.baseline_runs, scored_rows(made.dataset)
    else:
        with backend_errors():
            hardware = backends.identify()
        refuse_if_taken(repository, f"{hardware.slug}/{tag}")
        made.box = sandbox.probe()
        made.dataset, manifest, made.prepares = dataset(options.dataset or os.environ.get("AUTORESEARCH_DATA"))
        profile = usable_profile(hardware, repository)
        made.missing = [*["data"] * bool(made.prepares), *["calibration"] * (not profile), "session", "baseline"]
        budget, runs = prepare.budget(), BASELINE_RUNS if options.baseline_runs is None else options.baseline_runs
        rows = manifest["eval_rows"] if manifest else scored_rows(made.dataset)
    overhead, between, each_runs, made.basis = duration(session, profile, rows, made.by)
    made.each = each_runs * (budget + overhead) + between
    made.first = CALIBRATION * ("calibration" in made.missing)
    made.first += runs * (budget + overhead) * ("baseline" in made.missing)
    if "data" in made.missing:
        made.download, made.disk = SIZES.get(made.dataset, (0.0, 0.0))
    weights = 4 * chosen_trial(profile).get("num_params", 50e6) / 1e9
    count = made.experiments if made.experiments is not None else 100
    made.disk += 2 * weights + (count * (RUNS_EACH * RUN_MB + CACHE_MB) + runs * RUN_MB) / 1e3
    home = storage.home().absolute()
    made.free = shutil.disk_usage(next(path for path in (home, *home.parents) if path.exists())).free / 1e9
    return made


# --- What is there ---


def checked_out(repository: Repository, asked: str | None) -> tuple[Session | None, str]:
    """(the session that is gone on with, its tag), or (None, the tag of the one to begin)."""
    name = branch[len(PREFIX) :] if (branch := repository.some_branch()).startswith(PREFIX) else None
    if name and folder_of(name).exists() and not (folder_of(name) / "session.json").exists():
        asked = name.rpartition("/")[2]  # its start was interrupted: it is begun once more
    elif name:
        session = at(repository.path)
        if asked not in (None, session.started.tag):
            raise LabError(
                f"the branch of session {session.name} is checked out, and --tag says {asked}: leave that out to go on "
                "with the session, or switch to the branch that another is to start from (git switch main, say)"
            )
        return session, session.started.tag
    repository.refuse_uncommitted()
    return None, asked or time.strftime("%b%d").lower()


def refuse_if_taken(repository: Repository, name: str) -> None:
    """LabError if this device has a session of that name, whose branch is not the one checked out."""
    if (folder_of(name) / "session.json").exists():
        session = Session(folder_of(name))
        there = f"it belongs to {session.local.repository}"
        if session.local.repository == str(repository.path):
            there = f"git switch {session.branch}, and the same command goes on with it"
        raise LabError(f"there is a session {session.started.tag} already: {there}; or --tag NAME begins another")


@contextmanager
def backend_errors():
    """Why a backend can't run, as a LabError."""
    from backends.interface import BackendError

    try:
        yield
    except BackendError as error:
        raise LabError(str(error)) from error


def dataset(asked: str | None) -> tuple[str, dict | None, list[str]]:
    """(its name, its manifest, []) of the dataset that a session would take; or, where that or a file of it is missing,
    (its name or path, None, arguments of Python that prepare it). That files are whole is checked when they are read.

    Args:
        asked: a name or path; None takes the one prepared last.
    """
    data = storage.home() / "data"
    if not asked and (data / "current").is_file():
        asked = (data / "current").read_text(encoding="utf-8").strip()
    asked = asked or DEFAULT
    origin = str(Path(asked).expanduser().resolve())
    for path in sorted(data.glob("*/manifest.json")):
        try:
            manifest = datasets.read_manifest(path.parent)
        except storage.DataError:
            continue
        if manifest["name"] != asked and manifest["origin"] != origin:
            continue
        files = [(path.parent / name, known["size"]) for name, known in datasets.known_files(manifest).items()]
        if "eval_tag" in manifest and all(file.is_file() and file.stat().st_size == size for file, size in files):
            return manifest["name"], manifest, []
        if (command := shlex.split(manifest["command"]))[:2] == ["python", "prepare.py"]:
            return manifest["name"], None, command[1:]
    return asked, None, ["prepare.py", "--dataset", asked]


def usable_profile(hardware, repository: Repository) -> dict | None:
    """What calibration found out about this device; None if it has to be measured first."""
    from calibration.profile import ProfileError
    from lab.session.start import checked_profile

    try:
        return checked_profile(hardware, repository.path / TRAIN, say=lambda text: None)
    except ProfileError:
        if os.environ.get("AUTORESEARCH_PROFILE"):
            raise  # calibration would write another file
        return None


def scored_rows(name: str) -> int:
    """Of a dataset by name, before it is prepared."""
    return 128 if name == "stdlib" else 768


# --- What it takes ---


def duration(session: Session | None, profile: dict | None, rows: int, by: str) -> tuple[float, float, float, str]:
    """(seconds of a run beside its training, seconds between experiments, runs of each, where that is from)."""
    between, guess = TURN[by], f" (and {TURN['agent'] / 60:.0f} min for the agent, a guess)" if by == "agent" else ""
    state = session.state if session else None
    if state and (beside := [run.seconds - run.result["training_seconds"] for run in state.runs.values() if run.ok]):
        overhead = statistics.fmean(beside)
        changes = [e for e in state.decided if e.kind not in BESIDE and e.runs]
        if len(changes) < ENOUGH:
            return overhead, between, RUNS_EACH, f"from the runs of its baseline{guess}"
        ends = [e.runs[-1].time + e.runs[-1].seconds for e in changes]
        pauses = [e.runs[0].time - end for e, end in zip(changes[1:], ends)]
        between = max(0.0, statistics.median(pauses))  # not the mean: there are days between two nights
        return overhead, between, statistics.fmean(len(e.runs) for e in changes), f"from {len(changes)} of this session"
    if rate := chosen_trial(profile).get("tokens_per_second", {}).get("median"):
        # A forward pass costs a third of a step; half, with what the evaluator does to it.
        overhead = START + rows * prepare.MAX_SEQ_LEN / (2 * rate)
        return overhead, between, RUNS_EACH, f"estimated from the calibration{guess}"
    return GUESSED_OVERHEAD, between, RUNS_EACH, "a guess: nothing was measured here yet"


def chosen_trial(profile: dict | None) -> dict:
    """What calibration measured of the defaults it chose, or nothing."""
    trials, chosen = (profile or {}).get("trials", []), (profile or {}).get("settings", {})
    wanted = chosen.get("depth"), chosen.get("device_batch_size")
    return next((t for t in trials if t.get("tokens_per_second") and (t["depth"], t["rows"]) == wanted), {})


# --- Telling ---


def tell(plan: Plan) -> list[str]:
    """The plan in words."""
    lines = [f"a new session: {plan.tag}, with the dataset {plan.dataset}"]
    if plan.session:
        tried = counted(len(plan.session.state.experiments) - 1, "experiment")
        lines = [f"session {plan.session.name}: goes on, with {tried} behind it"]
    download = f" ({plan.download:.1f} GB to download)" if plan.download else ""
    steps = {
        "data": f"prepare {plan.dataset}{download}",
        "calibration": "measure this device (at most ten minutes)",
        "baseline": "run the baseline",
    }
    if first := ", ".join(steps[name] for name in plan.missing if name in steps):
        beside = " beside the download" if plan.download else ""
        lines.append(f"first: {first}, about {minutes(plan.first)}{beside}")
    each, count = f"then: experiments of about {minutes(plan.each)}, {plan.basis}", plan.experiments
    until = f", until {time.strftime('%a %H:%M', time.localtime(plan.deadline))}" if plan.deadline else ""
    many = ", until it is stopped (Ctrl-C)" if count is None else f", about {count} of them{until}"
    room = "" if plan.disk < plan.free else ": NOT ENOUGH, make room first"
    power = {"battery": "BATTERY; plug it in, or the night ends early", "mains": "mains"}
    return [
        *lines,
        each + many,
        f"disk: about {plan.disk:.1f} GB of the {plan.free:.0f} GB that are free{room}",
        f"changes are proposed by the {plan.by}",
        f"sandbox: {plan.box}" if plan.box else sandbox.describe(None),
        *([plan.awake] if plan.awake else []),
        f"power: {power.get(plan.power or '', 'the system does not tell')}",
    ]


def minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"


# --- Making ---


def provide(plan: Plan, options, say) -> None:
    """Makes what is missing, up to a session whose baseline is to be run. Raises LabError where something fails, and
    what `start` raises."""
    if plan.session:
        return
    from lab.session.start import BASELINE_RUNS, start

    sandbox.refuse_without(plan.box, options.unsandboxed)
    if plan.disk >= plan.free:
        raise LabError(
            f"about {plan.disk:.1f} GB are needed and {plan.free:.1f} GB are free under {storage.home()}: "
            "make room on that disk, or set AUTORESEARCH_HOME to a folder on another"
        )
    path = plan.repository.path
    if plan.prepares:
        say(f"preparing {plan.dataset}")
        carry_out(path, *plan.prepares)
    if options.dataset:  # not the one prepared last
        os.environ["AUTORESEARCH_DATA"] = dataset(options.dataset)[0]
    if "calibration" in plan.missing:
        say("measuring this device")
        carry_out(path, "-m", "calibration")
    runs = BASELINE_RUNS if options.baseline_runs is None else options.baseline_runs
    with backend_errors():
        session = start(path, plan.tag, options.unsandboxed, runs, say)
    say(f"session {session.name} in {session.folder}, on branch {session.branch}")


def carry_out(path: Path, *arguments: str) -> None:
    """Runs one of the project's commands in the repository, with its output passed through."""
    sys.stdout.flush()
    if status := subprocess.call([sys.executable, *arguments], cwd=path):
        command = shlex.join(["python", *arguments])
        raise LabError(
            f"{command} failed, and its last lines say why. Fix that, then run the same again: it goes on where it was "
            f"(exit status {status})"
        )
