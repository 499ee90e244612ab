"""What a night takes, told before it begins; and what is missing for it, made."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import dataset as datasets
import prepare
import storage
from calibration import identity
from calibration.profile import ProfileError
from lab.compare import published
from lab.errors import LabError
from lab.fleet import here, invitation, wire
from lab.genome.syntax import TRAIN
from lab.night import agent, limits, serve
from lab.night.view import clock, lasting
from lab.run import sandbox
from lab.session.events import NIGHT_EVENTS
from lab.session.journal import Journal
from lab.session.repository import Repository
from lab.session.session import PREFIX, Session, at, folder_of
from lab.session.start import checked_profile, identified, refuse_leftover, refuse_tag, start
from lab.session.state import BESIDE
from lab.untrusted import counted
from lab.verdict.plan import SCALES

DEFAULT = "climbmix"  # what prepare.py makes when it is not told
# Gigabytes, about: to download, and prepared on the disk with what was downloaded. climbmix has eleven files of 0.1 GB
# and 60 M tokens of two bytes each; tinystories, by its publisher, 0.67 GB and 2.2 G characters.
SIZES = {"climbmix": (1.1, 2.4), "tinystories": (0.7, 1.8), "stdlib": (0.0, 0.02)}
CALIBRATION = 600.0  # seconds, at most; says `python -m calibration --help`
RUNS_EACH = 1.3  # per experiment of the proposer, in simulated nights (benchmarks/README.md)
SCALE_RUNS = 3  # of the baseline for each other time
OVERHEAD = 60.0  # seconds of a run beside its training: a guess for a device on which nothing was run yet
TURN = {"agent": 120.0, "proposer": 3.0}  # seconds between experiments: a guess for an agent
ENOUGH = 3  # experiments of a session, from which on it is asked and not the guesses
DISK = 0.7, 0.02  # gigabytes, guesses: of the weights and compiled code that are kept, and of an experiment's logs


@dataclass
class Plan:
    """What `python -m lab night` would do here.

    Attributes:
        repository, tag: of the session. by: who proposes. session: the one that is gone on with, or None.
        missing: of "data", "calibration", "session", "baseline", in the order in which they are made.
        dataset: its name or path. prepares: arguments of Python that make it, where it is missing.
        download, disk: gigabytes that this takes. free: gigabytes that there are.
        each: seconds of an experiment. basis: where that is from. first: seconds until the first one can begin. last:
            seconds for the baseline's runs for other times, at the end.
        deadline: seconds as of time.time(), or None. most: experiments that are wanted, or None. box: the sandbox, or
            None. findings: whether what was found elsewhere comes first. workers: whose devices make the runs,
            where other machines' may; else "".
    """

    repository: Repository
    tag: str
    by: str
    session: Session | None
    deadline: float | None
    most: int | None
    missing: list[str] = field(default_factory=list)
    dataset: str = ""
    prepares: list[str] = field(default_factory=list)
    download: float = 0.0
    disk: float = 0.0
    free: float = 0.0
    each: float = 0.0
    basis: str = ""
    first: float = 0.0
    last: float = 0.0
    box: str | None = None
    findings: bool = False
    workers: str = ""

    @property
    def experiments(self) -> int | None:
        """How many there is time for; None without a limit."""
        fit = [] if self.most is None else [self.most]
        if self.deadline is not None:
            fit.append(max(0, int((self.deadline - time.time() - self.first - self.last) // self.each)))
        return min(fit, default=None)


def plan(path: Path, options) -> Plan:
    """What a night in the repository at `path` would do. Nothing is changed.

    Args:
        options: tag, agent, findings, hours, until, max_experiments, unsandboxed, dataset, baseline_runs, scale.

    Raises:
        LabError: it can't begin; the message says what to do first.
    """
    repository = Repository(path)
    session, tag = checked_out(repository, options.tag)
    deadline = limits.deadline(options.hours, options.until, datetime.now())
    by, most, runs = "agent" if options.agent else "proposer", options.max_experiments, options.baseline_runs
    if options.findings:
        published.library()  # before anything begins: each has to be readable
    made = Plan(repository, tag, by, session, deadline, most, findings=options.findings)
    if session:
        night = Journal(session.folder / "night.jsonl", NIGHT_EVENTS)
        if began := limits.interrupted(night.events, options, time.time()):
            made.deadline = began.deadline
            if most is not None:
                made.most = max(0, most - (session.state.last.number - began.first + 1))
        if options.dataset and dataset(options.dataset)[0] != session.started.dataset:
            raise LabError(
                f"the session's dataset is {session.started.dataset}: for another one begin another session, --tag NAME"
            )
        made.dataset, made.box, runs = session.started.dataset, session.started.sandbox, session.started.baseline_runs
        made.missing = [] if session.state.baseline.applied else ["baseline"]
        made.workers = workers(session.fleet or {}, options.devices)
    else:
        hardware = identified()
        refuse_if_taken(repository, f"{hardware.slug}/{tag}")
        made.box = sandbox.probe()
        made.dataset, made.prepares = dataset(options.dataset or os.environ.get("AUTORESEARCH_DATA"))
        calibrated = has_profile(hardware, repository)
        made.missing = [*["data"] * bool(made.prepares), *["calibration"] * (not calibrated), "session", "baseline"]
    run, made.each, made.basis = duration(session, by)
    made.first = CALIBRATION * ("calibration" in made.missing) + runs * run * ("baseline" in made.missing)
    made.last = scale_takes(session) if options.scale else 0.0
    if "data" in made.missing:
        made.download, made.disk = SIZES.get(made.dataset, (0.0, 0.0))
    if options.devices:  # whether they are there, and can take part
        invitation.require()
        here.devices(options.devices)
    made.disk += DISK[0] + DISK[1] * (100 if made.experiments is None else made.experiments)
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
                f"the branch of session {session.name} is checked out, and --tag says {asked}: leave --tag out to "
                "continue the session. For another session, first switch to the branch that it is to start from, "
                "for example: git switch main"
            )
        return session, session.started.tag
    repository.refuse_uncommitted()
    tag = asked or time.strftime("%b%d").lower()
    refuse_tag(tag)
    return None, tag


def refuse_if_taken(repository: Repository, name: str) -> None:
    """LabError if this device has a session of that name, whose branch is not the one checked out."""
    if (folder_of(name) / "session.json").exists():
        session = Session(folder_of(name))
        there = f"it belongs to {session.local.repository}"
        if session.local.repository == str(repository.path):
            there = f"to continue it: git switch {session.branch}, then the same command"
        raise LabError(f"there is a session {session.started.tag} already: {there}. To begin another: --tag NAME")
    refuse_leftover(repository, f"{PREFIX}{name}")


def dataset(asked: str | None) -> tuple[str, list[str]]:
    """(name, []) of the dataset that a session would take; or, where that or a file of it is missing, (its name or
    path, arguments of Python that prepare it). That files are whole is checked when they are read.

    Args:
        asked: a name or path; None takes the one prepared last.
    """
    data = storage.home() / "data"
    if not asked and (data / "current").is_file():
        asked = (data / "current").read_text(encoding="utf-8").strip()
    asked = asked or DEFAULT
    origin = str(Path(os.path.expanduser(asked)).resolve())
    for path in sorted(data.glob("*/manifest.json")):
        try:
            manifest = datasets.read_manifest(path.parent)
        except storage.DataError:
            continue
        if manifest["name"] != asked and manifest["origin"] != origin:
            continue
        files = [(path.parent / name, known["size"]) for name, known in datasets.known_files(manifest).items()]
        if "eval_tag" in manifest and all(file.is_file() and file.stat().st_size == size for file, size in files):
            return manifest["name"], []
        if (command := shlex.split(manifest["command"]))[:2] == ["python", "prepare.py"]:
            return manifest["name"], command[1:]
    return asked, ["prepare.py", "--dataset", asked]


def has_profile(hardware, repository: Repository) -> bool:
    """Whether this device is calibrated; else it has to be measured first."""
    try:
        checked_profile(hardware, repository.path / TRAIN, say=lambda text: None)
    except ProfileError:
        if os.environ.get("AUTORESEARCH_PROFILE"):
            raise  # calibration would write another file
        return False
    return True


def workers(fleet: dict, devices: str | None) -> str:
    """Whose devices make a session's runs, in words, where other machines' may; else "".

    Args:
        fleet: the session's. devices: of this machine, as they were asked for.
    """
    if "listen" not in fleet:
        lacking = "none was invited yet, and the session's device is another machine's: python -m lab invite FILE ..."
        return lacking if fleet.get("elsewhere") and not devices else ""
    others = f"those of other machines, at {fleet['listen']}"
    if devices:
        return f"{devices} of this machine, and {others}"
    if fleet.get("elsewhere"):
        return others
    return (
        f"{others}; no device of this machine takes part unless --devices all is given (to invite nobody any more: "
        "python -m lab invite --none)"
    )


# --- What it takes ---


def duration(session: Session | None, by: str) -> tuple[float, float, str]:
    """(seconds of a run, seconds from an experiment to the next, where that is from)."""
    took = session.state.took() if session else []
    run = statistics.fmean(took) if took else (session.budget if session else prepare.budget()) + OVERHEAD
    decided = session.state.decided if session else []
    starts = sorted(e.runs[0].time for e in decided if e.kind not in BESIDE and e.runs)
    if len(starts) > ENOUGH:  # the median: there are days between two nights
        each = statistics.median(later - earlier for earlier, later in zip(starts, starts[1:]))
        return run, each, f"measured on {len(starts)} of this session"
    basis = "measured on the runs of its baseline" if took else "a guess, as nothing was run here yet"
    guess = f" (and {TURN['agent'] / 60:.0f} min for the agent, a guess)" if by == "agent" else ""
    return run, RUNS_EACH * run + TURN[by], basis + guess


def scale_takes(session: Session | None) -> float:
    """Seconds for the baseline's runs for other times; 0 once they were made."""
    budget, beside = session.budget if session else prepare.budget(), [OVERHEAD]
    if session:
        if any(experiment.kind == "scale" for experiment in session.state.experiments.values()):
            return 0.0
        beside = [max(0.0, run.seconds - budget) for run in session.state.baseline.runs if run.ok] or beside
    return SCALE_RUNS * sum(share * budget + statistics.median(beside) for share in SCALES)


# --- Telling ---


def tell(plan: Plan, awake: str = "") -> list[str]:
    """The plan in words.

    Args:
        awake: whether the computer is kept so, and how.
    """
    lines = [f"a new session: {plan.tag}, with the dataset {plan.dataset}"]
    if plan.session:
        tried = counted(len(plan.session.state.experiments) - 1, "experiment")
        lines = [f"session {plan.session.name} continues, after {tried}"]
    download = f" ({plan.download:.1f} GB to download)" if plan.download else ""
    steps = {
        "data": f"prepare {plan.dataset}{download}",
        "calibration": "measure this device (at most ten minutes)",
        "baseline": "run the baseline",
    }
    if first := ", ".join(steps[name] for name in plan.missing if name in steps):
        beside = " beside the download" if plan.download else ""
        lines.append(f"first: {first}, about {lasting(plan.first)}{beside}")
    each, count = f"then: experiments of about {lasting(plan.each)}, {plan.basis}", plan.experiments
    until = f", until {clock(plan.deadline)}" if plan.deadline else ""
    many = ", until it is stopped (Ctrl-C)" if count is None else f", about {count} of them{until}"
    room = "" if plan.disk < plan.free else ": NOT ENOUGH, free some space first"
    power = {"battery": "BATTERY; plug it in, or the night ends early", "mains": "mains"}
    return [
        *lines,
        each + many,
        *[f"at the end (--scale): the baseline with shorter and longer training, about {lasting(plan.last)}"]
        * (plan.last > 0),
        f"disk: about {plan.disk:.1f} GB of the {plan.free:.0f} GB that are free{room}",
        f"changes are proposed by the {plan.by}" + ", after the published findings" * plan.findings,
        *[f"workers: {plan.workers}"] * bool(plan.workers),
        f"sandbox: {plan.box}" if plan.box else sandbox.describe(None),
        *([awake] if awake else []),
        f"power: {power.get(identity.power_source() or '', 'unknown')}",
    ]


def advice(agent: str | None) -> list[str]:
    """What to know of an agent whose model runs here, if it does."""
    if not agent or not re.search(r"ollama|--oss", agent) or os.environ.get("OLLAMA_KEEP_ALIVE") == "0":
        return []
    return [
        "a local model that stays loaded takes memory of the device from the experiments: start its server with "
        "OLLAMA_KEEP_ALIVE=0, so that it is unloaded after each answer"
    ]


# --- Making ---


def provide(plan: Plan, options, say) -> None:
    """Makes what is missing, up to a session whose baseline is to be run. Raises LabError where something fails, and
    what `start` raises."""
    if program := agent.unknown_program(options.agent or ""):
        raise LabError(
            f"the shell does not find the agent, {program}: check how it is spelt, or install it (docs/agents.md). "
            "Without --agent the built-in search proposes the changes"
        )
    if options.page is not None and not (plan.session and plan.session.owned_by_night):  # else that night is told
        serve.listening(options.page).server_close()
    if plan.session:
        listen = (plan.session.fleet or {}).get("listen")
        if listen and not plan.session.supervised:  # else its head may listen there
            wire.try_to_listen(listen)
        return
    sandbox.refuse_without(plan.box, options.unsandboxed)
    if plan.disk >= plan.free:
        raise LabError(
            f"about {plan.disk:.1f} GB are needed and {plan.free:.1f} GB are free under {storage.home()}: free some "
            "space on that disk, or set AUTORESEARCH_HOME to a folder on another disk"
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
    session = start(path, plan.tag, options.unsandboxed, options.baseline_runs, say)
    say(f"session {session.name} in {session.folder}, on branch {session.branch}")


def carry_out(path: Path, *arguments: str) -> None:
    """Runs one of the project's commands in the repository, with its output passed through."""
    sys.stdout.flush()
    if status := subprocess.call([sys.executable, *arguments], cwd=path):
        command = shlex.join(["python", *arguments])
        raise LabError(
            f"{command} failed, and its last lines say why. Fix that, then run the same command again: it continues "
            f"where it stopped (exit status {status})"
        )
