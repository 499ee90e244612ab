"""What is refused in a session from elsewhere. Nothing of it is ever executed.

journal.jsonl  the session: its events, with the diffs of all that was tried
train.py       what it began with
results.tsv    a view of the journal for people and notebooks; SUMMARY.md: another one
profile.json   the device's calibration
rows/NNNN.npz  nats and bytes of each row that run NNNN's weights were scored on
MANIFEST.json  size and sha256 of each of these
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile

import msgspec
import numpy as np

from lab.errors import LabError
from lab.genome import kinds
from lab.genome.syntax import normalised
from lab.session import ledger
from lab.session.events import Event, SessionStarted
from lab.session.journal import kind_of, read_events
from lab.session.record import Record
from lab.session.state import BASELINE, Experiment, Run, State
from lab.share.archive import Files, Wrong
from results import BY_NAME

ATTRIBUTES = b"* -text\n"  # of .gitattributes: git is to leave the files of a branch as they are
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")  # of a session; of a device too: they name folders
CONTROL = re.compile(r"[^\t\n\f\r\x20-\x7e\xa0-\U0010ffff]")
LOSSES = ("val_nats", "val_bytes", "held_nats", "held_bytes")  # per row, as a run's folder has them
MOST_LOSSES = 2**24  # bytes of one run's
MOST_JSON = 2**26  # bytes of a journal: in memory they are a few times as many
MOST_TRAIN, MOST_TRAINS = 2**20, 2**28  # bytes of a train.py, and of all experiments' together
MOST_TEXT, MOST_NUMBER, LAST_TIME = 20_000, 1e15, 1e11


def verified(files: Files) -> Record:
    """The session that files by name are an export of.

    Raises:
        Wrong: they are none; the reason names the file.
    """
    for name in ("MANIFEST.json", "journal.jsonl", "results.tsv"):
        if name not in files:
            raise Wrong(f"{name} is missing")
    _check_manifest(files)
    try:
        events = _events(files["journal.jsonl"])
        state = State(events)
        _check_session(state)
        for experiment in state.experiments.values():
            _check_experiment(state, experiment)
        for run in state.runs.values():
            _check_run(state, run)
        record = Record(state, files.get("train.py"), notes=list(state.started.notes))
        _check_trains(record)
        view = ledger.dumps(ledger.rows_of(state))
    except (Wrong, LabError, RecursionError) as error:
        raise Wrong(f"journal.jsonl: {error}") from None
    _check_view(files["results.tsv"], view)
    _check_text("SUMMARY.md", files.get("SUMMARY.md", b""))
    if "profile.json" in files:
        record.profile = _profile(files["profile.json"], state.started)
    _check_losses(files, state)
    return record


def is_tag(text: str) -> bool:
    """Whether a text can name a session or a device, and so a folder and a branch."""
    return bool(TAG.fullmatch(text)) and ".." not in text and not text.endswith((".", ".lock"))


def is_origin(text: str) -> bool:
    """Whether a text names a change elsewhere, as DEVICE/TAG/ID, or nothing."""
    device, tag, change = text.split("/") if text.count("/") == 2 else ("", "", "")
    return not text or is_tag(device) and is_tag(tag) and bool(re.fullmatch("[0-9a-f]{1,64}", change))


def _read_json(name: str, data: bytes) -> dict:
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Wrong(f"{name} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise Wrong(f"{name} holds no object")
    return content


def _check_manifest(files: Files) -> None:
    if files.get(".gitattributes", ATTRIBUTES) != ATTRIBUTES:
        raise Wrong(f".gitattributes says something else than {ATTRIBUTES.decode().strip()!r}")
    manifest = _read_json("MANIFEST.json", files["MANIFEST.json"])
    if extra := sorted(files.keys() - manifest.keys() - {"MANIFEST.json", ".gitattributes"}):
        raise Wrong(f"{extra[0]} is not in MANIFEST.json")
    for name, facts in manifest.items():
        if name not in files:
            raise Wrong(f"{name[:200]!r}, which MANIFEST.json lists, is missing")
        if facts != {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}:
            raise Wrong(f"{name} is damaged: it is not what MANIFEST.json says")


# --- The journal ---


def _events(content: bytes) -> list[Event]:
    if len(content) > MOST_JSON:
        raise Wrong(f"it has {len(content):,} bytes, and may have {MOST_JSON:,}")
    if not content.endswith(b"\n"):
        raise Wrong("it is cut short: its last line does not end")
    try:
        events = read_events(content)
    except ValueError as error:
        line = int((re.match(r"line (\d+)", str(error)) or [0, 1])[1])
        kind = kind_of(content.splitlines()[line - 1])
        if kind and "$.event" in str(error):
            raise Wrong(f"line {line}: an event of the unknown kind {kind[:40]!r}; update this project") from None
        raise Wrong(str(error)) from None
    for line, event in enumerate(events, 1):
        if not 0 <= event.time < LAST_TIME:
            raise Wrong(f"line {line}: its time is {event.time}")
        _check_values(msgspec.to_builtins(event), f"line {line}")
    return events


def _check_values(value, where: str, name: str = "") -> None:
    """Refuses texts that a terminal would obey, or that are endless, and numbers that nothing can have measured. A diff
    is shown only by what cleans it."""
    if isinstance(value, str) and name != "diff":
        if len(value) > MOST_TEXT or (odd := CONTROL.search(value)):
            problem = f"holds a control character, {odd[0]!r}" if len(value) <= MOST_TEXT else "is too long"
            raise Wrong(f"{where}: {name} {problem}")
    elif isinstance(value, (int, float)):
        if not -MOST_NUMBER < value < MOST_NUMBER and name != "seed":
            raise Wrong(f"{where}: {name} is {str(value)[:40]}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_values(key, where, "a name")
            _check_values(inner, where, key)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, where, name)


def _check_session(state: State) -> None:
    for name in ("device", "tag"):
        if not is_tag(text := getattr(state.started, name)):
            raise Wrong(f"{name} {text!r} can't name a folder")
    if BASELINE not in state.experiments:
        raise Wrong("it has no baseline")


def _check_experiment(state: State, experiment: Experiment) -> None:
    where, parent = f"experiment {experiment.number}", state.parent_of(experiment)
    is_baseline = experiment.number == BASELINE
    if is_baseline != (experiment.kind == "baseline") or is_baseline and parent:
        raise Wrong(f"{where} is a {experiment.kind}")
    if experiment.parent != (parent.blob if parent else None) or (
        parent is None and not is_baseline and state.started.source == "session"
    ):
        raise Wrong(f"{where} was made from {experiment.parent}, which is not the train.py of {experiment.onto}")
    if unknown := sorted(set(experiment.kinds) - set(kinds.KINDS)):
        raise Wrong(f"{where} is about {unknown[0]!r}")
    if not is_origin(experiment.origin):
        raise Wrong(f"{where} has the origin {experiment.origin!r}, which names no change")
    if set(experiment.members) - state.experiments.keys():
        raise Wrong(f"{where} puts experiments together that are not there")
    for verdict in (experiment.decided, experiment.judged):
        if verdict and verdict.gains is not None and not {"val_bpb", "held_out_bpb"} <= verdict.gains.keys():
            raise Wrong(f"{where} confirms something on other rows")


def _check_run(state: State, run: Run) -> None:
    experiment = state.experiments[run.experiment]
    if run.blob not in (experiment.blob, experiment.parent):
        raise Wrong(f"run {run.number} is of no train.py of experiment {run.experiment}")
    for name, value in run.result.items():
        measure = BY_NAME.get(name)  # what this version does not know is kept as it is
        fits = (
            measure is None
            or value is None
            or type(value) in ((int, float) if measure.type is float else (measure.type,))
        )
        if not fits:
            raise Wrong(f"run {run.number} has {name} {value!r}")
    for score in (run.result.get("val_bpb"), run.scored and run.scored.val_bpb, run.scored and run.scored.held_out_bpb):
        if score is not None and not score > 0:
            raise Wrong(f"run {run.number} has a score of {score}")
    if run.ok and run.result.get("val_bpb") is None:
        raise Wrong(f"run {run.number} ended well without a score")


def is_blob(content: bytes, blob: str) -> bool:
    """Whether git has this id for a train.py, with the line ends of either system."""
    algorithm = hashlib.sha256 if len(blob) == 64 else hashlib.sha1
    texts = content, normalised(content), normalised(content).replace(b"\n", b"\r\n")
    return any(algorithm(b"blob %d\0" % len(text) + text).hexdigest() == blob for text in texts)


def _check_trains(record: Record) -> None:
    """Every experiment's train.py is what the diffs make of the first one."""
    experiments, left = record.state.experiments, MOST_TRAINS
    if record.base is None:
        if record.started.source != "ledger" or any(experiment.diff for experiment in experiments.values()):
            raise Wrong("train.py, which its diffs are made on, is missing")
        return
    if not is_blob(record.base, experiments[BASELINE].blob):
        raise Wrong("train.py is not what the session began with")
    for number, experiment in experiments.items():
        try:
            train = record.train(number)
        except LabError as error:
            raise Wrong(f"experiment {number}: {error}") from None
        left -= len(train)
        if len(train) > MOST_TRAIN or left < 0:
            raise Wrong(f"experiment {number} makes a train.py of {len(train):,} bytes: that is too much")
        if number != BASELINE and not is_blob(train, experiment.blob):
            raise Wrong(f"experiment {number}: its diff makes another train.py than was run")


# --- The other files ---


def _check_view(content: bytes, view: bytes) -> None:
    """results.tsv says what the journal does, in the columns that are known here; sentences may be worded otherwise."""
    theirs, ours = (
        [line.split("\t") for line in _check_text("results.tsv", text).split("\n")] for text in (content, view)
    )
    if len(theirs) != len(ours):
        raise Wrong(f"results.tsv has {len(theirs) - 2} rows, and its journal {len(ours) - 2}")
    shared = [
        (theirs[0].index(name), place) for place, name in enumerate(ours[0]) if name in theirs[0] and name != "reason"
    ]
    for line, (fields, known) in enumerate(zip(theirs[1:-1], ours[1:]), 2):
        if len(fields) != len(theirs[0]) or any(fields[there] != known[here] for there, here in shared):
            raise Wrong(f"results.tsv, line {line}, is not what the journal says")
    if missing := set(ledger.ORIGINAL) - set(theirs[0]):
        raise Wrong(f"results.tsv has no column {min(missing)}")


def _check_text(name: str, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Wrong(f"{name} is no UTF-8 text ({error})") from None
    if odd := CONTROL.search(text):
        raise Wrong(f"{name} holds a control character, {odd[0]!r}")
    return text


def _profile(data: bytes, started: SessionStarted) -> dict:
    from calibration import profile  # here, because what only reads a session shall start fast

    content = _read_json("profile.json", data)
    if content.get("format") != profile.FORMAT:
        raise Wrong(f"profile.json is of format {str(content.get('format'))[:20]}, and this is {profile.FORMAT}")
    try:
        problem = profile.impossible(content)
    except Exception as error:  # it is made for profiles that were written here
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise Wrong(f"profile.json can't be true: {problem}")
    if (content["device"], content["backend"]) != (started.device, started.backend):
        raise Wrong(
            f"profile.json is of {content['device']} with {content['backend']}, the session of {started.device} "
            f"with {started.backend}"
        )
    return content


def _check_losses(files: Files, state: State) -> None:
    digests = {f"rows/{run.number:04d}.npz": run.scored.rows for run in state.runs.values() if run.scored}
    for name in (name for name in files if name.startswith("rows/")):
        if not digests.get(name):
            raise Wrong(f"{name} is of no run that was scored again")
        if hashlib.sha256(files[name]).hexdigest() != digests[name]:
            raise Wrong(f"{name} is not what the journal says")
        unpacked(name, files[name])


def unpacked(name: str, data: bytes) -> dict[str, np.ndarray]:
    """Losses by row from an .npz, of which only flat float64 arrays are taken; nothing is unpickled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if set(members) - set(LOSSES) or len(members) != len(archive.infolist()):
                raise ValueError(f"it holds {', '.join(archive.namelist()[:5])}")
            if sum(info.file_size for info in members.values()) > MOST_LOSSES:
                raise ValueError(f"it unpacks to more than {MOST_LOSSES:,} bytes")
            losses = {part: _array(archive.read(info)) for part, info in members.items()}
        for rows in ("val", "held"):
            if losses.get(f"{rows}_nats", np.empty(0)).shape != losses.get(f"{rows}_bytes", np.empty(0)).shape:
                raise ValueError(f"{rows}_nats and {rows}_bytes are not of the same rows")
    except Exception as error:  # what a hostile file makes the readers raise is not foreseeable
        raise Wrong(f"{name} does not hold losses by row ({error})") from None
    return losses


def _array(content: bytes) -> np.ndarray:
    """np.load would believe a header that asks for more memory than there are bytes."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array is of another version of its format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 1 or dtype != np.dtype("<f8") or file.tell() + 8 * shape[0] != len(content):
        raise ValueError(f"an array is {dtype} {shape}, and has to be float64 with one value a row")
    values = np.frombuffer(content, dtype, offset=file.tell())
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("values are negative or not finite")
    return values
