"""Sessions as folders, archives and branches: export, and import with everything checked first and nothing executed.

An imported session is AUTORESEARCH_HOME/imported/<device>/<tag>: the files of the export, as bundle.py lists them.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import storage
from lab.session import ledger
from lab.share.bundle import (
    FOLDERS,
    MOST_BYTES,
    MOST_FILES,
    TEXTS,
    Bundle,
    Kept,
    Wrong,
    check_name,
    is_tag,
    unpacked,
    verified,
)
from lab.errors import LabError
from lab.share.packing import files_of, slug
from lab.session.repository import Tree

__all__ = ["Bundle", "Kept", "export_session", "import_session", "read_bundle"]

ARCHIVES = (".tar.gz", ".tgz")
NUMBERS = ("baseline_runs", "memory_ceiling")  # of a session, beside its texts
PUBLISHED = "session/"  # of a branch
PART = r"[\w.+@$-]+"  # of a path
SHOWN = 5  # damaged lines


# --- Export ---


def export_session(session_folder: Path, kept: list[Kept], target: Path, changes: list[dict] = ()) -> Path:
    """Writes a session as a folder, or as an archive if `target` ends in .tar.gz: whole or not at all.

    Args:
        changes: as of a Bundle.

    Raises:
        LabError: `target` exists, or something of the session is damaged.
        DataError: it can't be written; the reason says why.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise LabError(f"{target} exists; remove it, or export under another name")
    return write(files_of(bundle_of(Path(session_folder), kept, changes)), target)


def bundle_of(folder: Path, kept: list[Kept], changes: list[dict] = ()) -> Bundle:
    """The session of this machine that is in a folder, as it may leave it: paths are cut down to names in all but the
    patches, which have to stay what they are.

    Raises:
        LabError: something of it is damaged.
    """
    try:
        bundle = _of_session(folder, kept, changes)
        verified(files_of(bundle))  # what this project would not import is no use to anybody
    except (Wrong, OSError, ValueError) as error:
        raise LabError(f"session {folder} can't be exported: {error}; mend that and export again") from error
    return bundle


def _of_session(folder: Path, kept: list[Kept], changes: list[dict]) -> Bundle:
    facts = json.loads((folder / "session.json").read_text(encoding="utf-8"))
    without_paths = _path_remover(facts.get("tree"), folder, storage.home(), Path.home())
    found = ledger.read(folder / "results.tsv")
    session = {name: str(facts.get(name) or "") for name in TEXTS}
    session |= {name: facts[name] for name in NUMBERS if isinstance(facts.get(name), (int, float))}
    session |= {
        "branch": f"autoresearch/{facts['device']}/{facts['tag']}",
        "budget": facts.get("budget"),
        "sandbox": str(facts.get("sandbox") or "none"),
        "versions": facts.get("versions", {}),
    }
    losses = {}
    for run in sorted({row["run"] for row in found.rows} - {None}):
        path = folder / "runs" / f"{run:04d}" / "rows.npz"
        if path.is_file():
            losses[run] = unpacked(str(path), path.read_bytes())
    return Bundle(
        session=without_paths(session),
        rows=without_paths(found.rows),
        losses=losses,
        kept=[Kept(one.number, one.commit, one.parent, one.patch_text, without_paths(one.description)) for one in kept],
        changes=[without_paths(one) | {"patch_text": one["patch_text"]} for one in changes],
        base=(folder / "judge" / "train.py").read_bytes(),
        profile=without_paths(json.loads((folder / "profile.json").read_text(encoding="utf-8"))),
        set_aside=without_paths(_told(found.set_aside)),
    )


def _path_remover(*known):
    """A function that cuts absolute paths, in the texts of any JSON, down to their last part: they name people.

    Args:
        known: folders of this machine, which may have blanks in their names.
    """
    folders = {str(path) for path in known if path and len(str(path)) > 1}
    roots = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))
    pattern = re.compile(
        rf"(?<![\w.~/])(?:(?:{roots})(?!{PART})(?:[/\\]+{PART})*|(?:/{PART}){{2,}}"
        rf"|[A-Za-z]:(?:[/\\]+{PART})+)"
    )

    def name(found):
        return "..." if found[0] in folders else ".../" + re.split(r"[/\\]", found[0])[-1]

    def cut(part):
        if isinstance(part, dict):
            return {key: cut(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [cut(inner) for inner in part]
        return pattern.sub(name, part) if isinstance(part, str) else part

    return cut


def _told(set_aside: list[ledger.SetAside]) -> str:
    return "".join(f"line {one.line}: {one.why}: {ledger.escape(one.text)}\n" for one in set_aside)


def write(files: dict[str, bytes], target: Path) -> Path:
    """Writes files by name into a new folder or archive, durably."""
    if target.name.endswith(ARCHIVES):
        session = json.loads(files["session.json"])
        with storage.atomic(target) as file:
            _archive(files, f"{session['device']}-{session['tag']}", file)
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name, data in files.items():
            with storage.atomic(temporary / name) as file:
                file.write(data)
        with storage.writing(target):
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    storage.sync_folder(target.parent)
    return target


def _archive(files: dict[str, bytes], top: str, file) -> None:
    """Nothing but names and contents decides its bytes."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name in sorted(files):
                member = tarfile.TarInfo(f"{top}/{name}")
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))


# --- Import ---


def import_session(
    source: Path | str,
    home: Path,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    tree: Tree | None = None,
) -> Path:
    """Checks an exported session (folder, .tar.gz) or a bare ledger, and copies it to home/imported/<device>/<tag>.

    Args:
        source: a path; or, where there is nothing of that name, a published branch of the repository `tree`.
        device: of the rows of a ledger that don't say it: its tag, such as nvidia-h100-80gb.
        say: is told what was set aside.

    Raises:
        LabError: it is none, is damaged, holds what it must not, or another one is there; nothing was changed.
    """
    path = Path(source)
    try:
        published = None if path.exists() or tree is None else branch_files(tree, str(source))
        if not published and is_ledger(path):
            bundle = of_ledger(path, device, say)
            files = files_of(bundle)
            verified(files)
        else:
            files = published or read_files(path)
            bundle = verified(files)
            if device and device != bundle.session["device"]:
                raise Wrong(f"session.json names {bundle.session['device']} (leave --device out)")
    except (Wrong, OSError) as error:
        raise _refusal(source, error) from None
    target = Path(home) / "imported" / bundle.session["device"] / bundle.session["tag"]
    if not target.exists():
        try:
            return write(files, target)
        except storage.DataError:
            if not target.exists():  # else another import was faster
                raise
    try:
        same = read_files(target) == files
    except (Wrong, OSError):
        same = False
    if not same:
        raise LabError(
            f"{target} holds something else under that name; remove it to import {source}, or rename a bare "
            "ledger's file"
        )
    say(f"{bundle.name} is there already")
    return target


def read_bundle(source: Path, device: str | None = None) -> Bundle:
    """An exported or imported session, or a bare ledger (`device`: of its rows, if they don't say it), checked.
    LabError if it is none."""
    source = Path(source)
    try:
        if source.is_file() and is_ledger(source):
            return of_ledger(source, device, lambda text: None)
        return verified(read_files(source))
    except (Wrong, OSError) as error:
        raise _refusal(source, error) from None


def _refusal(source: Path, error: Exception) -> LabError:
    return LabError(f"{source} was refused: {error}; get the session exported and sent again, or mend what this names")


def is_ledger(source: Path) -> bool:
    """Whether it is a file that is no archive. LabError if it is not there."""
    if source.is_dir():
        return False
    if not source.is_file():
        raise LabError(f"there is no folder or file {source}; check the path")
    with open(source, "rb") as file:
        return file.read(2) != b"\x1f\x8b"


def of_ledger(source: Path, device: str | None, say: Callable[[str], None]) -> Bundle:
    """A session of which only the ledger is known; its file's name is its tag."""
    if source.stat().st_size > MOST_BYTES:
        raise Wrong(f"it has more than {MOST_BYTES:,} bytes, too many for a results.tsv")
    try:
        found = ledger.read(source)
    except LabError as error:
        raise LabError(f"{error}; a session is a results.tsv, or a folder or .tar.gz from lab export") from None
    if not found.headed:
        say(f"{source.name} does not name its columns; they are taken for {' '.join(found.columns)}")
    for one in found.set_aside[:SHOWN]:
        say(f"{source.name}, line {one.line}, was set aside: {one.why}")
    if more := found.set_aside[SHOWN:]:
        say(f"so were {len(more)} more lines of {source.name}")
    if not found.rows:
        raise Wrong("it holds no rows")
    named = {row["device"] for row in found.rows}
    if "" in named and not device:
        raise LabError(
            f"the rows of {source} don't say which device they are of; name it, such as: --device nvidia-h100-80gb"
        )
    if others := sorted(named - {"", device or ""}):
        if device or len(others) > 1:
            raise Wrong(f"its rows are of {', '.join(others)}" + f", not of {device}" * bool(device))
        device = others[0]
    if not is_tag(device):
        raise LabError(f"{device!r} can't name a device: letters, digits, dots and dashes, such as nvidia-h100-80gb")

    def only(name):
        values = {row[name] for row in found.rows}
        return values.pop() if len(values) == 1 else ""

    session = dict.fromkeys(TEXTS, "") | {name: only(name) for name in ("backend", "eval", "data", "profile")}
    session |= {"device": device, "tag": slug(source.stem), "budget": None, "versions": {}}
    rows = [row | {"device": device} for row in found.rows]
    return Bundle(session, rows, set_aside=_told(found.set_aside))


# --- Reading folders and archives, with no trust in either ---


class Room:
    """What an export may still have: files and bytes."""

    def __init__(self):
        self.names, self.bytes = set(), 0

    def take(self, name: str, size: int) -> None:
        check_name(name)
        if name in self.names or size < 0:
            raise Wrong(f"{name} is there twice, or with a size that can't be")
        self.names.add(name)
        self.bytes += size
        if len(self.names) > MOST_FILES:
            raise Wrong(f"it holds more than {MOST_FILES:,} files")
        if self.bytes > MOST_BYTES:
            raise Wrong(f"with {name} it has more than {MOST_BYTES:,} bytes")


def read_files(source: Path) -> dict[str, bytes]:
    """The files of an exported session by name, each with a name that is expected. Wrong if there is anything else."""
    return _read_folder(source) if source.is_dir() else _read_archive(source)


def branch_files(tree: Tree, name: str) -> dict[str, bytes] | None:
    """The files of the session that a branch holds (publish.py), read from git's objects; None if there is no such
    branch. `name`: a local one's, or a remote one's with or without the remote."""
    known = tree.git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes").split("\n")
    ref = next((ref for ref in known if name == ref.removeprefix("refs/heads/")), None) or next(
        (
            ref
            for ref in known
            if ref.startswith("refs/remotes/") and name in (ref.split("/", 2)[-1], ref.split("/", 3)[-1])
        ),
        None,
    )
    if ref is None:
        return None
    room, blobs = Room(), {}
    for entry in filter(None, tree.git("ls-tree", "-r", "-l", "-z", ref, "--", PUBLISHED).split("\0")):
        facts, _, path = entry.partition("\t")
        mode, _, blob, size = facts.split()
        name = path.removeprefix(PUBLISHED)
        if mode not in ("100644", "100755"):
            raise Wrong(f"{name[:200]!r} is not a plain file")
        room.take(name, int(size))
        blobs[name] = blob
    if not blobs:
        raise Wrong(f"it has no folder {PUBLISHED}, as lab export --publish makes it")
    contents = tree.contents(list(blobs.values()))
    return {name: contents[blob] for name, blob in blobs.items()}


def _read_folder(source: Path) -> dict[str, bytes]:
    room, files = Room(), {}
    for folder in ("", *FOLDERS):
        path = source / folder
        if folder and not path.is_dir():  # a link to one was refused before, in the folder it is in
            continue
        for entry in os.scandir(path):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not folder and name in FOLDERS and entry.is_dir(follow_symlinks=False):
                continue
            if not entry.is_file(follow_symlinks=False):
                raise Wrong(f"{name[:200]!r} is not a plain file")
            size = entry.stat(follow_symlinks=False).st_size
            room.take(name, size)
            files[name] = _read_plain(path / entry.name, name, size)
    return files


def _read_plain(path: Path, name: str, size: int) -> bytes:
    """A file's content, if it is still the plain file that was seen, and not larger by now."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Wrong(f"{name} is not a plain file")
        return file.read(size)


class Unpacking:
    """A file being decompressed, up to the most that an export may have."""

    def __init__(self, file):
        self.file, self.left = file, MOST_BYTES + 3 * 512 * MOST_FILES  # headers, padding, folders

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise Wrong(f"it unpacks to more than {MOST_BYTES:,} bytes")
        return data


def _read_archive(source: Path) -> dict[str, bytes]:
    room, files, tops, members = Room(), {}, set(), 0
    try:
        with gzip.open(source, "rb") as packed, tarfile.open(fileobj=Unpacking(packed), mode="r|") as archive:
            for member in archive:
                members += 1
                if members > MOST_FILES + 10:
                    raise Wrong(f"it holds more than {MOST_FILES:,} files")
                top, _, name = member.name.partition("/")
                tops.add(top)
                if top in ("", "..") or len(tops) > 1:
                    raise Wrong(f"{member.name[:200]!r} is not in one folder with the rest")
                if member.type == tarfile.DIRTYPE and name in ("", *FOLDERS):
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                    raise Wrong(f"{member.name[:200]!r} is not a plain file")
                room.take(name, member.size)
                files[name] = archive.extractfile(member).read()
                if len(files[name]) != member.size:
                    raise Wrong(f"{name} is cut short")
    except Wrong:
        raise
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise Wrong(f"it is no sound .tar.gz ({error})") from None
    return files
