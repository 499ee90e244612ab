"""The files of an exported session by name: read from a folder, an archive or a branch with no trust in any of them."""

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
from lab.session.repository import Repository

Files = dict[str, bytes]

NAME = re.compile(
    r"journal\.jsonl|train\.py|(profile|MANIFEST)\.json|results\.tsv|SUMMARY\.md|\.gitattributes|rows/[0-9]{4,9}\.npz"
)
ROWS = "rows"  # the only folder
ARCHIVES = (".tar.gz", ".tgz")
PUBLISHED = "session/"  # the folder of a branch
MOST_FILES, MOST_BYTES = 5000, 2**28


class Wrong(ValueError):
    """What is wrong with an exported session, beginning with the file's name."""


def sealed(files: Files) -> Files:
    """Files with their manifest."""
    manifest = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return files | {"MANIFEST.json": json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"}


# --- Writing ---


def write(files: Files, target: Path, name: str) -> Path:
    """Writes files into a new folder, or an archive if `target` ends in .tar.gz: durably, whole or not at all.

    Args:
        name: of the folder that an archive holds.
    """
    if target.name.endswith(ARCHIVES):
        with storage.atomic(target) as file:
            _pack(files, name, file)
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for path, data in files.items():
            with storage.writing(temporary / path), open(temporary / path, "wb") as file:
                file.write(data)
                file.flush()
                storage.sync(file.fileno())
        for folder in {(temporary / path).parent for path in files}:
            storage.sync_folder(folder)
        with storage.writing(target):
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    storage.sync_folder(target.parent)
    return target


def _pack(files: Files, top: str, file) -> None:
    """Nothing but names and contents decides the bytes of an archive."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name in sorted(files):
                member = tarfile.TarInfo(f"{top}/{name}")
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))


# --- Reading ---


def _allow(sizes: dict[str, int], name: str, size: int) -> None:
    """Notes a file that an export may have. Wrong if it may not."""
    if not NAME.fullmatch(name):
        raise Wrong(f"{name[:200]!r} is no part of an exported session")
    if name in sizes or size < 0:
        raise Wrong(f"{name} is there twice, or with a size that can't be")
    sizes[name] = size
    if len(sizes) > MOST_FILES:
        raise Wrong(f"it holds more than {MOST_FILES:,} files")
    if sum(sizes.values()) > MOST_BYTES:
        raise Wrong(f"with {name} it has more than {MOST_BYTES:,} bytes")


def read(source: Path) -> Files:
    """The files of an exported session, each with a name that is expected. Wrong if there is anything else."""
    return _read_folder(source) if source.is_dir() else _read_archive(source)


def is_archive(source: Path) -> bool:
    """Whether a file is compressed; else it may be a ledger."""
    with open(source, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read_folder(source: Path) -> Files:
    sizes, files = {}, {}
    for folder in ("", f"{ROWS}/"):
        if folder and not (source / folder).is_dir():  # a link to one was refused before, in the folder it is in
            continue
        for entry in os.scandir(source / folder):
            name, is_file = folder + entry.name, entry.is_file(follow_symlinks=False)
            if name == ROWS and entry.is_dir(follow_symlinks=False):
                continue
            size = entry.stat(follow_symlinks=False).st_size
            if not is_file:
                raise Wrong(f"{name[:200]!r} is not a plain file")
            _allow(sizes, name, size)
            files[name] = _read_plain(source / name, name, size)
    return files


def _read_plain(path: Path, name: str, size: int) -> bytes:
    """A file's content, if it is still the plain file that was seen, and not larger by now."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Wrong(f"{name} is not a plain file")
        return file.read(size)


def _read_archive(source: Path) -> Files:
    sizes, files, tops = {}, {}, set()
    most = MOST_BYTES + 3 * 512 * MOST_FILES  # with headers, padding and folders
    try:
        with gzip.open(source, "rb") as packed:
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
                if member.type == tarfile.DIRTYPE and name in ("", ROWS):
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:  # pyright: ignore
                    raise Wrong(f"{member.name[:200]!r} is not a plain file")
                _allow(sizes, name, member.size)
                file = archive.extractfile(member)
                files[name] = file.read() if file else b""
                if len(files[name]) != member.size:
                    raise Wrong(f"{name} is cut short")
    except Wrong:
        raise
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise Wrong(f"it is no sound .tar.gz ({error})") from None
    return files


def read_branch(repository: Repository, name: str) -> Files | None:
    """The files of the session that a branch holds (see publish.py), read from git's objects; None if there is no such
    branch.

    Args:
        name: a local branch's, or a remote one's with or without the remote.
    """
    refs = repository.git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes").split("\n")
    remotes = [ref for ref in refs if ref.startswith("refs/remotes/") and name in (ref[13:], ref.split("/", 3)[-1])]
    ref = next(iter([ref for ref in refs if ref == f"refs/heads/{name}"] + remotes), None)
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
        raise Wrong(f"it has no folder {PUBLISHED}, as lab export --publish makes it")
    contents = repository.contents(list(blobs.values()))
    return {file: contents[blob] for file, blob in blobs.items()}
