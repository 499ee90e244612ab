"""What an exported session consists of, and what is refused in one from elsewhere. Nothing of it is ever executed.

session.json         what was pinned at its start, and which changes were kept
results.tsv          the ledger, with all columns of ledger.py
results.tsv.damaged  lines of it that could not be read
profile.json         the device's calibration
train.py             what the session began with
patches/NNNN-*       the kept changes of train.py, each on top of the one before
changes.json         every change that was decided, what was not kept too; not in format 1
rows/NNNN.npz        nats and bytes of each row that a run's weights were scored on
README.md            the same for people
SUMMARY.md           what was found, in words
.gitattributes       where they are in a repository (publish.py): git is to leave them as they are
MANIFEST.json        size and sha256 of each of these
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass, field

import numpy as np

from lab.genome import kinds
from lab.session import ledger
from lab.errors import LabError

FORMAT = 2
FORMATS = (1, FORMAT)  # that are read
NAME = re.compile(
    r"(session|profile|changes|MANIFEST)\.json|results\.tsv(\.damaged)?|(README|SUMMARY)\.md|train\.py"
    r"|\.gitattributes"
    r"|patches/[0-9]{4}-[a-z0-9-]{1,50}\.patch|rows/[0-9]{4,9}\.npz"
)
FOLDERS = ("patches", "rows")
MOST_FILES, MOST_BYTES, MOST_OF_A_PATCH = 5000, 2**28, 2**20  # of a train.py, too
MOST_OF_JSON = 2**25  # bytes: in memory they are up to twenty times as many
LOSSES = ("val_nats", "val_bytes", "held_nats", "held_bytes")  # per row, as a run's folder has them
MOST_LOSSES = 2**24  # bytes of one run's
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")  # of a session; of a device too: they name folders
ATTRIBUTES = b"* -text\n"  # what .gitattributes says
TEXTS = ("device", "tag", "branch", "backend", "dataset", "eval", "data", "profile", "made", "commit", "python")

CHANGE = {
    "number": int,
    "kind": str,
    "status": str,
    "description": str,
    "commit": str,
    "patch": str,
    "origin": str,
    "near_miss": bool,
    "reason": str,
    "patch_text": str,
}  # of a change; beside "parent", "kinds" and
EFFECT = ("gain", "low", "high")
KINDS_OF_EXPERIMENT = ("baseline", "change", "near misses", "replay", "confirm")
STATUSES = ("keep", "discard", "crash", "invalid")

HUNK = re.compile(r"@@ -[0-9]{1,7}(?:,([0-9]{1,7}))? \+[0-9]{1,7}(?:,([0-9]{1,7}))? @@( .*)?\r?")
HEAD = re.compile(
    r"(diff --git a/train\.py b/train\.py\n)?(index [0-9a-f]{4,64}\.\.[0-9a-f]{4,64}( 100(644|755))?\n)?"
    r"--- a/train\.py\n\+\+\+ b/train\.py\n"
)


class Wrong(ValueError):
    """What is wrong with an exported session, beginning with the file's name."""


@dataclass(frozen=True)
class Kept:
    """A change that a session kept.

    Attributes:
        number: of the experiment. commit, parent: of the change and of what it was made on.
        patch_text: a unified diff of train.py.
    """

    number: int
    commit: str
    parent: str
    patch_text: str
    description: str


@dataclass
class Bundle:
    """A session, wherever it was run.

    Attributes:
        session: at least the names in TEXTS, "budget" (seconds or None) and "versions"; empty where unknown.
        rows: of the ledger. set_aside: lines of it that could not be read, as text.
        kept: in order. profile: None where only a ledger is known.
        base: the train.py that the session began with, byte for byte; None where only a ledger is known.
        losses: by run, arrays of float64 by the names in LOSSES.
        changes: every decided experiment by number, the baseline first; [] where unknown. Dicts: number, kind (one of
            KINDS_OF_EXPERIMENT), status (one of STATUSES), description, reason, near_miss, kinds (of kinds.KINDS);
            commit, as its rows name it; parent: number of what it was made from, None for the baseline; patch: stable
            id of the change; gain, low, high: bits per byte that it is better by, and the 90 % interval of that, as the
            verdict had them, None if it had none; origin: "DEVICE/TAG/PATCH" of the one that it repeats, or "";
            patch_text: a unified diff on top of its parent, "" for a baseline, a confirmation, and what is no text.
    """

    session: dict
    rows: list[dict]
    kept: list[Kept] = field(default_factory=list)
    profile: dict | None = None
    base: bytes | None = None
    losses: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    set_aside: str = ""
    changes: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.session['device']}/{self.session['tag']}"


def verified(files: dict[str, bytes]) -> Bundle:
    """The session that files by name are an export of. Wrong, with the file and the reason, if they are none."""
    for name in files:
        check_name(name)
    for name in ("MANIFEST.json", "session.json", "results.tsv"):
        if name not in files:
            raise Wrong(f"{name} is missing")
    _check_manifest(files)
    session = _session(files["session.json"])
    rows = _rows(files["results.tsv"], session["device"])
    kept = _kept(session.pop("kept"), files)
    changes = _changes(files["changes.json"], kept) if "changes.json" in files else []
    profile = _profile(files["profile.json"], session) if "profile.json" in files else None
    losses, runs = {}, {row["run"] for row in rows}
    for name in (name for name in files if name.startswith("rows/")):
        run = int(name[5:-4])
        if run not in runs or name != f"rows/{run:04d}.npz":
            raise Wrong(f"{name} is of no run in results.tsv")
        losses[run] = unpacked(name, files[name])
    for name in ("README.md", "SUMMARY.md", "results.tsv.damaged"):
        _text(name, files.get(name, b""))
    if files.get(".gitattributes", ATTRIBUTES) != ATTRIBUTES:
        raise Wrong(f".gitattributes says something else than {ATTRIBUTES.decode().strip()!r}")
    if (base := files.get("train.py")) and len(base) > MOST_OF_A_PATCH:
        raise Wrong(f"train.py has {len(base):,} bytes; it has at most {MOST_OF_A_PATCH:,}")
    return Bundle(session, rows, kept, profile, base, losses, files.get("results.tsv.damaged", b"").decode(), changes)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Wrong(f"{name[:200]!r} is no part of an exported session")


def _check_manifest(files: dict[str, bytes]) -> None:
    manifest = _read_json("MANIFEST.json", files["MANIFEST.json"])
    known = manifest.get("files")
    if not isinstance(known, dict):
        raise Wrong("MANIFEST.json lists no files")
    if extra := sorted(files.keys() - known.keys() - {"MANIFEST.json"}):
        raise Wrong(f"{extra[0]} is not in MANIFEST.json")
    for name, facts in known.items():
        if name not in files:
            raise Wrong(f"{name[:200]!r}, which MANIFEST.json lists, is missing")
        if facts != {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}:
            raise Wrong(f"{name} is damaged: it is not what MANIFEST.json says")


def _read_json(name: str, data: bytes, versions: tuple[int, ...] = FORMATS) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no number")

    if len(data) > MOST_OF_JSON:
        raise Wrong(f"{name} has {len(data):,} bytes; it has at most {MOST_OF_JSON:,}")
    try:
        found = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Wrong(f"{name} holds no object")
    if (its := found.get("format")) not in versions:
        last = max(versions)
        newer = isinstance(its, int) and its > last
        raise Wrong(f"{name} is of format {str(its)[:20]}, and this is {last}" + "; update this project" * newer)
    return found


def _session(data: bytes) -> dict:
    session = _read_json("session.json", data)
    for name in TEXTS:
        text = session.get(name)
        if not (isinstance(text, str) and len(text) <= 200 and text.isprintable()):
            raise Wrong(f"session.json has {name} {str(text)[:100]!r}")
    for name in ("device", "tag"):
        if not is_tag(session[name]):
            raise Wrong(f"session.json has {name} {session[name]!r}, which can't name a folder")
    budget, versions = session.get("budget"), session.get("versions")
    if not (budget is None or type(budget) in (int, float) and 0 < budget < 1e9):
        raise Wrong(f"session.json has budget {str(budget)[:100]!r}")
    if not (isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())):
        raise Wrong(f"session.json has versions {str(versions)[:100]!r}")
    if not isinstance(session.get("kept"), list):
        raise Wrong("session.json does not say what was kept")
    return session


def is_tag(text: str) -> bool:
    return bool(TAG.fullmatch(text)) and ".." not in text and not text.endswith((".", ".lock"))


def _rows(data: bytes, device: str) -> list[dict]:
    try:
        found = ledger.parse(data)
    except LabError as error:
        raise Wrong(str(error)) from None
    if found.set_aside:
        raise Wrong(f"results.tsv, line {found.set_aside[0].line}: {found.set_aside[0].why}")
    if missing := [name for name in ledger.COLUMNS if name not in found.columns]:
        raise Wrong(f"results.tsv has no column {missing[0]}")
    if others := {row["device"] for row in found.rows} - {device}:
        raise Wrong(f"results.tsv has rows of {sorted(others)[0][:100]!r}, the session is of {device}")
    return found.rows


def _kept(told: list, files: dict[str, bytes]) -> list[Kept]:
    kinds = {"number": int, "commit": str, "parent": str, "description": str, "patch": str}
    kept, patches = [], []
    for facts in told:
        if not (
            isinstance(facts, dict)
            and facts.keys() == kinds.keys()
            and all(type(facts[name]) is kind for name, kind in kinds.items())
            and all(re.fullmatch("[0-9A-Za-z]{0,64}", facts[name]) for name in ("commit", "parent"))
        ):
            raise Wrong(f"session.json has a kept change {str(facts)[:100]}")
        name = facts.pop("patch")
        if not name.startswith(f"patches/{len(kept) + 1:04d}-") or name not in files:
            raise Wrong(f"{name[:100]!r}, a patch that session.json lists, is missing or out of order")
        patches.append(name)
        kept.append(Kept(patch_text=check_patch(name, files[name]), **facts))
    if extra := sorted({name for name in files if name.startswith("patches/")} - set(patches)):
        raise Wrong(f"{extra[0]} is not in session.json")
    return kept


def _changes(data: bytes, kept: list[Kept]) -> list[dict]:
    changes, known = _read_json("changes.json", data, (FORMAT,)).get("changes"), {}
    if not isinstance(changes, list):
        raise Wrong("changes.json lists no changes")
    for change in changes:
        if not (
            isinstance(change, dict)
            and change.keys() == CHANGE.keys() | {"parent", "kinds", *EFFECT}
            and all(type(change[name]) is kind for name, kind in CHANGE.items())
        ):
            raise Wrong(f"changes.json has a change {str(change)[:100]}")
        number, parent, text = change["number"], change["parent"], change["patch_text"]
        name = f"changes.json, change {number}"
        if not max(known, default=-1) < number < 10**9:
            raise Wrong(f"{name}: its number is out of order")
        if change["kind"] not in KINDS_OF_EXPERIMENT or change["status"] not in STATUSES:
            raise Wrong(f"{name} is a {change['kind'][:40]!r} that was {change['status'][:40]!r}")
        if (
            (parent is None) != (change["kind"] == "baseline")
            or parent is not None
            and (type(parent) is not int or parent not in known)
        ):
            raise Wrong(f"{name} was made from {str(parent)[:40]}, which is not before it")
        if not (
            re.fullmatch("[0-9a-f]{0,64}", change["patch"])
            and re.fullmatch("[0-9A-Za-z]{0,64}", change["commit"])
            and is_origin(change["origin"])
        ):
            raise Wrong(f"{name} names its patch, commit or origin in a way that can't be")
        if not (isinstance(change["kinds"], list) and set(map(str, change["kinds"])) <= set(kinds.KINDS)):
            raise Wrong(f"{name} is about {str(change['kinds'])[:100]}")
        if not all(one is None or type(one) in (int, float) and abs(one) < 1e9 for one in map(change.get, EFFECT)) or (
            len({change[one] is None for one in EFFECT}) > 1
        ):
            raise Wrong(f"{name} has a gain of {str([change[one] for one in EFFECT])[:100]}")
        if text:
            check_patch(name, text.encode(errors="replace"))
        known[number] = change
    for one in kept:
        told = known.get(one.number)
        if told is None or (told["status"], told["patch_text"]) != ("keep", one.patch_text):
            raise Wrong(f"changes.json does not tell of change {one.number} what patches/ has")
    return changes


def is_origin(text: str) -> bool:
    """Whether a text names a change elsewhere, as DEVICE/TAG/PATCH, or nothing."""
    device, tag, patch = text.split("/") if text.count("/") == 2 else ("", "", "")
    return not text or is_tag(device) and is_tag(tag) and bool(re.fullmatch("[0-9a-f]{1,64}", patch))


def _profile(data: bytes, session: dict) -> dict:
    from calibration import profile  # here, because what only reads a session shall start fast

    found = _read_json("profile.json", data, (profile.FORMAT,))
    try:
        problem = profile.impossible(found)
    except Exception as error:  # it is made for profiles that were written here
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise Wrong(f"profile.json can't be true: {problem}")
    if (found["device"], found["backend"]) != (session["device"], session["backend"]):
        raise Wrong(
            f"profile.json is of {found['device']} with {found['backend']}, the session of {session['device']} "
            f"with {session['backend']}"
        )
    return found


def _text(name: str, data: bytes) -> str:
    """Text without control characters other than those of Python source. CR ends lines on Windows."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Wrong(f"{name} is no UTF-8 text ({error})") from None
    if found := re.search(r"[^\t\n\f\r\x20-\x7e\xa0-\U0010ffff]", text):
        raise Wrong(f"{name} holds a control character, {found[0]!r}")
    return text


def check_patch(name: str, data: bytes) -> str:
    """The text of a patch, a unified diff that changes lines of train.py and nothing else."""
    if len(data) > MOST_OF_A_PATCH:
        raise Wrong(f"{name} has {len(data):,} bytes; a patch has at most {MOST_OF_A_PATCH:,}")
    text = _text(name, data)
    if not (head := HEAD.match(text)):
        raise Wrong(f"{name} does not begin as a patch of train.py and of nothing else")
    lines = text[head.end() :].split("\n")
    if lines.pop():
        raise Wrong(f"{name} is cut short: its last line does not end")
    if not lines:
        raise Wrong(f"{name} changes nothing")
    while lines:
        if not (hunk := HUNK.fullmatch(lines[0])):
            raise Wrong(f"{name} has more than hunks of train.py: {lines[0][:80]!r}")
        lines = _after_hunk(name, lines[1:], int(hunk[1] or 1), int(hunk[2] or 1))
    return text


def _after_hunk(name: str, lines: list[str], before: int, after: int) -> list[str]:
    """What follows a hunk that has so many lines of the file before and after the change."""
    for at, line in enumerate(lines):
        mark = line[:1] or " "  # git's diff.suppressBlankEmpty leaves the blank of an empty line out
        if before == after == 0 and mark != "\\":  # of "\ No newline at end of file"
            return lines[at:]
        if mark not in " -+\\":
            raise Wrong(f"{name} has a hunk with fewer lines than it says")
        before -= mark in " -"
        after -= mark in " +"
        if min(before, after) < 0:
            raise Wrong(f"{name} has a hunk with other lines than it says")
    if before or after:
        raise Wrong(f"{name} is cut short: its last hunk lacks lines")
    return []


def unpacked(name: str, data: bytes) -> dict[str, np.ndarray]:
    """Losses by row from an .npz, of which only flat float64 arrays are taken; nothing is unpickled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if set(members) - set(LOSSES) or len(members) != len(archive.infolist()):
                raise ValueError(f"it holds {', '.join(archive.namelist()[:5])}")
            if sum(info.file_size for info in members.values()) > MOST_LOSSES:
                raise ValueError(f"it unpacks to more than {MOST_LOSSES:,} bytes")
            found = {part: _array(archive.read(info)) for part, info in members.items()}
        for rows in ("val", "held"):
            if found.get(f"{rows}_nats", np.empty(0)).shape != found.get(f"{rows}_bytes", np.empty(0)).shape:
                raise ValueError(f"{rows}_nats and {rows}_bytes are not of the same rows")
    except Exception as error:  # what a hostile file makes the readers raise is not foreseeable
        raise Wrong(f"{name} does not hold losses by row ({error})") from None
    return found


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
