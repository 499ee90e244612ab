"""What is refused in a session from elsewhere. Nothing of it is ever executed.

journal.jsonl  the session: its events, with the diffs of all that was tried
train.py       what it began with
profile.json   the device's calibration
rows/NNNN.npz  nats and bytes of each row that run NNNN's weights were scored on
results.tsv    a view of the journal for people and notebooks; SUMMARY.md: another one. Neither is believed: an import
               makes them of the journal again
"""

from __future__ import annotations

import hashlib
import io
import re

import msgspec
import numpy as np

from lab.errors import LabError
from lab.genome.syntax import LONGEST, normalised
from lab.session.events import Event, SessionStarted
from lab.session.journal import read_events
from lab.session.record import Record
from lab.session.state import BASELINE, Experiment, Run, State
from lab.share.archive import Files, Wrong, read_json
from results import BY_NAME

CONTROL = re.compile(r"[^\t\n\f\r\x20-\x7e\xa0-\U0010ffff]")
LOSSES = {"val_nats", "val_bytes", "held_nats", "held_bytes"}  # per row, as a run's folder has them
MOST_LOSSES = 2**24  # bytes of one run's
MOST_JSON = 2**26  # bytes of a journal: in memory they are a few times as many
MOST_TRAINS = 2**28  # bytes of all experiments' train.py together
MOST_TEXT, MOST_NUMBER = 20_000, 1e15


def verified(files: Files) -> Record:
    """The session that files by name are an export of.

    Raises:
        Wrong: they are none; the reason names the file.
    """
    if "journal.jsonl" not in files:
        raise Wrong("journal.jsonl is missing")
    try:
        state = State(_events(files["journal.jsonl"]))
        record = Record(state, files.get("train.py"))
        if BASELINE not in state.experiments:
            raise Wrong("it has no baseline")
        for experiment in state.experiments.values():
            _check_experiment(state, experiment)
        for run in state.runs.values():
            _check_run(state, run)
        _check_trains(record)
    except (Wrong, LabError, RecursionError) as error:
        raise Wrong(f"journal.jsonl: {error}") from None
    if "profile.json" in files:
        _check_profile(files["profile.json"], state.started)
    _check_losses(files, state)
    return record


# --- The journal ---


def _events(content: bytes) -> list[Event]:
    if len(content) > MOST_JSON:
        raise Wrong(f"it has {len(content):,} bytes, and may have {MOST_JSON:,}")
    if not content.endswith(b"\n"):
        raise Wrong("it is cut short: its last line does not end")
    events = read_events(content)
    for line, event in enumerate(events, 1):
        _check_values(msgspec.to_builtins(event), f"line {line}")
    return events


def _check_values(value, where: str, name: str = "") -> None:
    """Refuses texts that a terminal would obey, or that are endless, and numbers that nothing can have measured. A diff
    is shown only by what cleans it."""
    match value:
        case dict():
            for key, inner in value.items():
                _check_values(key, where, "a name")
                _check_values(inner, where, key)
        case list():
            for inner in value:
                _check_values(inner, where, name)
        case str() if name != "diff" and len(value) > MOST_TEXT:
            raise Wrong(f"{where}: {name} is too long")
        case str() if name != "diff" and (odd := CONTROL.search(value)):
            raise Wrong(f"{where}: {name} holds a control character, {odd[0]!r}")
        case int() | float() if name != "seed" and not -MOST_NUMBER < value < MOST_NUMBER:
            raise Wrong(f"{where}: {name} is {str(value)[:40]}")


def _check_experiment(state: State, experiment: Experiment) -> None:
    where, parent = f"experiment {experiment.number}", state.parent_of(experiment)
    is_baseline = experiment.number == BASELINE
    if is_baseline != (experiment.kind == "baseline") or is_baseline and parent:
        raise Wrong(f"{where} is a {experiment.kind}")
    if parent is None and not is_baseline and state.started.source == "session":
        raise Wrong(f"{where} was made from nothing")
    if experiment.parent != (parent.blob if parent else None):
        raise Wrong(f"{where} was made from {experiment.parent}, which is not the train.py of {experiment.onto}")


def _check_run(state: State, run: Run) -> None:
    experiment = state.experiments[run.experiment]
    if run.blob not in (experiment.blob, experiment.parent) and experiment.kind != "shared":
        raise Wrong(f"run {run.number} belongs to no train.py of experiment {run.experiment}")
    if any(not 0 <= place < len(experiment.patches) for place in run.patches or ()):
        raise Wrong(f"run {run.number} holds a patch that experiment {run.experiment} does not have")
    for name, value in run.result.items():
        measure = BY_NAME.get(name)
        if measure is None or value is None:  # what this version does not know is kept as it is
            continue
        if type(value) not in ((int, float) if measure.type is float else (measure.type,)):
            raise Wrong(f"run {run.number} has {name} {value!r}")
    score = run.result.get("val_bpb")
    if score is None and run.ok:
        raise Wrong(f"run {run.number} ended well without a score")
    if score is not None and not score > 0:
        raise Wrong(f"run {run.number} has a score of {score}")


def _check_trains(record: Record) -> None:
    """Every experiment's train.py is what the diffs make of the first one, and what git knows it by."""
    experiments, left = record.state.experiments, MOST_TRAINS
    if record.base is None:
        if record.started.source != "ledger" or any(experiment.diff for experiment in experiments.values()):
            raise Wrong("train.py, which its diffs are made on, is missing")
        return
    if not _is_blob(record.base, experiments[BASELINE].blob):
        raise Wrong("train.py is not what the session began with")
    for number, experiment in experiments.items():
        try:
            train = record.train(number)
        except LabError as error:
            raise Wrong(f"experiment {number}: {error}") from None
        left -= len(train)
        if len(train) > LONGEST or left < 0:
            raise Wrong(f"experiment {number} makes a train.py of {len(train):,} bytes: that is too much")
        if number != BASELINE and not _is_blob(train, experiment.blob):
            raise Wrong(f"experiment {number}: its diff makes another train.py than was run")


def _is_blob(content: bytes, blob: str) -> bool:
    """Whether git has this id for a train.py, with the line ends of either system."""
    algorithm = hashlib.sha256 if len(blob) == 64 else hashlib.sha1
    texts = content, normalised(content), normalised(content).replace(b"\n", b"\r\n")
    return any(algorithm(b"blob %d\0" % len(text) + text).hexdigest() == blob for text in texts)


# --- The other files ---


def _check_profile(data: bytes, started: SessionStarted) -> None:
    from calibration import profile  # here, because what only reads a session shall start fast

    content = read_json("profile.json", data)
    if content.get("format") != profile.FORMAT:
        raise Wrong(f"profile.json is of format {str(content.get('format'))[:20]}, and this is {profile.FORMAT}")
    try:
        problem = profile.impossible(content)
    except Exception as error:  # it is made for profiles that were written here
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise Wrong(f"profile.json can't be true: {problem}")
    about, device = (content["device"], content["backend"]), (started.device, started.backend)
    if about != device:
        raise Wrong(f"profile.json is of {' with '.join(about)}, the session of {' with '.join(device)}")


def _check_losses(files: Files, state: State) -> None:
    digests = {f"rows/{run.number:04d}.npz": run.scored.rows for run in state.runs.values() if run.scored}
    for name in (name for name in files if name.startswith("rows/")):
        if not digests.get(name):
            raise Wrong(f"{name} belongs to no run that was scored again")
        if hashlib.sha256(files[name]).hexdigest() != digests[name]:
            raise Wrong(f"{name} is not what the journal says")
        try:
            _check_arrays(files[name])
        except Exception as error:  # what a hostile file makes the readers raise is not foreseeable
            raise Wrong(f"{name} does not hold losses by row ({error})") from None


def _check_arrays(data: bytes) -> None:
    """ValueError, or what numpy raises, if an .npz is not of LOSSES by row: flat arrays of float64."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if sum(member.file_size for member in arrays.zip.infolist()) > MOST_LOSSES:
            raise ValueError(f"it unpacks to more than {MOST_LOSSES:,} bytes")
        if unknown := sorted(set(arrays.files) - LOSSES):
            raise ValueError(f"it holds {', '.join(unknown[:5])}")
        losses = {name: arrays[name] for name in arrays.files}
    for name, values in losses.items():
        if values.dtype != np.float64 or values.ndim != 1:
            raise ValueError(f"{name} is {values.dtype} {values.shape}, and has to be float64 with one value a row")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"values of {name} are negative or not finite")
    for rows in ("val", "held"):
        if np.shape(losses.get(f"{rows}_nats", ())) != np.shape(losses.get(f"{rows}_bytes", ())):
            raise ValueError(f"{rows}_nats and {rows}_bytes are not of the same rows")
