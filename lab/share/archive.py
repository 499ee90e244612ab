"""The files of an exported session by name: read from a folder, an archive or a branch with no trust in any of them.

MANIFEST.json, with the size and sha256 of each, is added when they are written, and checked when they are read.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import zlib
from pathlib import Path

import storage
from lab.session.journal import sync_files
from lab.session.repository import Repository
from lab.session.session import BY_ITSELF

Files = dict[str, bytes]

NAME = re.compile(
    r"journal\.jsonl|train\.py|(profile|MANIFEST)\.json|results\.tsv|SUMMARY\.md|\.gitattributes|rows/[0-9]{4,9}\.npz"
)
ROWS = "rows"  # the only folder
MANIFEST, ATTRIBUTES = "MANIFEST.json", ".gitattributes"
UNCHANGED = b"* -text\n"  # ATTRIBUTES: git is to leave the files of a branch as they are
ARCHIVES = (".tar.gz", ".tgz")
PUBLISHED = "session/"  # the folder of a branch
MOST_FILES, MOST_BYTES = 5000, 2**28


class Wrong(ValueError):
    """What is wrong with an exported session, beginning with the file's name."""


# --- The manifest ---


def _manifest(files: Files) -> dict:
    return {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}


def sealed(files: Files) -> Files:
    """Files with their manifest."""
    return files | {MANIFEST: json.dumps(_manifest(files), indent=1, sort_keys=True).encode() + b"\n"}


def unsealed(files: Files) -> Files:
    """The files without their manifest. Wrong if the manifest lists other files."""
    if files.get(ATTRIBUTES, UNCHANGED) != UNCHANGED:
        raise Wrong(f"{ATTRIBUTES} says something else than {UNCHANGED.decode().strip()!r}")
    if MANIFEST not in files:
        raise Wrong(f"{MANIFEST} is missing")
    manifest = read_json(MANIFEST, files[MANIFEST])
    files = {name: data for name, data in files.items() if name not in (MANIFEST, ATTRIBUTES)}
    facts = _manifest(files)
    for name in sorted(facts.keys() | manifest.keys()):
        if name not in manifest:
            raise Wrong(f"{name} is not in {MANIFEST}")
        if name not in facts:
            raise Wrong(f"{name[:200]!r}, which {MANIFEST} lists, is missing")
        if manifest[name] != facts[name]:
            raise Wrong(f"{name} is damaged: it is not what {MANIFEST} says")
    return files


def read_json(name: str, data: bytes) -> dict:
    """The object that a file holds. Wrong if it holds none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise Wrong(f"{name} does not hold a JSON object")
    return content


# --- Writing ---


def write(files: Files, target: Path, name: str, replace: bool = False) -> Path:
    """Writes files and their manifest to a new folder, or an archive if `target` ends in .tar.gz: durably, whole or not
    at all. What an archive holds, a folder of this name, depends on names and contents alone.

    Args:
        replace: a folder that is there.

    Raises:
        DataError: it can't be written; the reason says why.
    """
    files = sealed(files)
    if target.name.endswith(ARCHIVES):
        with storage.atomic(target) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for path in sorted(files):
                    member = tarfile.TarInfo(f"{name}/{path}")
                    member.size = len(files[path])
                    archive.addfile(member, io.BytesIO(files[path]))
        return target
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    try:
        with storage.writing(target):
            for path, data in files.items():
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                (temporary / path).write_bytes(data)
            for folder in {(temporary / path).parent for path in files}:
                sync_files(folder)
            if replace:  # no system puts a folder in place of one that holds files
                os.rename(target, old)
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replace and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
    storage.sync_folder(target.parent)
    return target


# --- Reading ---


def read(source: Path) -> Files:
    """The files of an exported session, each with a name that is expected. Wrong if there is anything else."""
    return unsealed(_in_folder(source) if source.is_dir() else _in_archive(source))


def is_archive(source: Path) -> bool:
    """Whether a file is compressed; else it may be a ledger."""
    with open(source, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _allow(sizes: dict[str, int], name: str, size: int) -> None:
    """Notes a file before it is read. Wrong if an export may not have it."""
    if not NAME.fullmatch(name):
        raise Wrong(f"{name[:200]!r} does not belong in an exported session")
    if name in sizes or size < 0:
        raise Wrong(f"{name} is in it twice, or has an impossible size")
    sizes[name] = size
    if len(sizes) > MOST_FILES:
        raise Wrong(f"it holds more than {MOST_FILES:,} files")
    if sum(sizes.values()) > MOST_BYTES:
        raise Wrong(f"with {name} it has more than {MOST_BYTES:,} bytes")


def _in_folder(source: Path) -> Files:
    sizes, files = {}, {}
    for path in [*source.glob("*"), *source.glob(f"{ROWS}/*")]:
        name, status = path.relative_to(source).as_posix(), path.lstat()
        if BY_ITSELF.fullmatch(path.name):
            continue
        if name == ROWS and stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise Wrong(f"{name[:200]!r} is not a plain file")
        _allow(sizes, name, status.st_size)
        files[name] = path.read_bytes()
    return files


def _in_archive(source: Path) -> Files:
    sizes, files, tops = {}, {}, set()
    most = MOST_BYTES + 3 * 512 * MOST_FILES  # with headers, padding and folders
    try:
        with gzip.open(source) as packed:
            content = packed.read(most + 1)
        if len(content) > most:
            raise Wrong(f"it unpacks to more than {MOST_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for count, member in enumerate(archive):
                top, _, name = member.name.partition("/")
                tops.add(top)
                if count > MOST_FILES + 10:
                    raise Wrong(f"it holds more than {MOST_FILES:,} files")
                if top in ("", "..") or len(tops) > 1:
                    raise Wrong(f"{member.name[:200]!r} is not in one folder with the rest")
                if member.isdir() and name in ("", ROWS):
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise Wrong(f"{member.name[:200]!r} is not a plain file")
                _allow(sizes, name, member.size)
                file = archive.extractfile(member)
                files[name] = file.read() if file else b""
                if len(files[name]) != member.size:
                    raise Wrong(f"{name} is cut short")
    except Wrong:
        raise
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise Wrong(f"it is not a valid .tar.gz ({error})") from None
    return files


def read_branch(repository: Repository, name: str) -> Files | None:
    """The files of the session that a branch holds (see export.py), read from git's objects; None if there is no such
    branch: a local one, or a remote one with or without the remote."""
    refs = repository.git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes").split("\n")
    remotes = [ref for ref in refs if ref.startswith("refs/remotes/") and name in (ref[13:], ref.split("/", 3)[-1])]
    ref = f"refs/heads/{name}" if f"refs/heads/{name}" in refs else next(iter(remotes), None)
    if ref is None:
        return None
    sizes, blobs = {}, {}
    for entry in filter(None, repository.git("ls-tree", "-r", "-l", "-z", ref, "--", PUBLISHED).split("\0")):
        facts, _, path = entry.partition("\t")
        mode, _, blob, size = facts.split()
        file = path.removeprefix(PUBLISHED)
        if mode not in ("100644", "100755"):
            raise Wrong(f"{file[:200]!r} is not a plain file")
        _allow(sizes, file, int(size))
        blobs[file] = blob
    if not blobs:
        raise Wrong(f"it has no folder {PUBLISHED}, which lab export --publish makes")
    contents = repository.contents(list(blobs.values()))
    return unsealed({file: contents[blob] for file, blob in blobs.items()})
