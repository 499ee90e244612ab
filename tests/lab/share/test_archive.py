"""Archives and folders from elsewhere: nothing that is no part of an export gets in, however it is packed."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from exports import contents, imported, refused, tampered

from lab.errors import LabError
from lab.share import archive
from lab.share.export import export_session


@pytest.mark.parametrize(
    "name",
    [
        "extra.txt",
        "sitecustomize.py",
        "patches/0001-a.patch",
        "rows/1.npz",
        "rows/é.npz",
        "deeper/x",
        "SUMMARY.md\n",
        "session.json",
    ],
)
def test_files_that_are_no_part_of_an_export_are_refused(sent, tmp_path, name):
    refused(tampered(sent, **{name: b"x"}), tmp_path / "elsewhere", "does not belong in an exported|not a plain file")


def test_what_a_file_manager_leaves_in_a_folder_is_passed_over(sent, tmp_path):
    (sent / ".DS_Store").write_bytes(b"x")
    there = imported(sent, tmp_path / "elsewhere")
    assert not (there / ".DS_Store").exists() and (there / "SUMMARY.md").exists()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("place", ["SUMMARY.md", "rows/0003.npz", "rows"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_folder_are_refused(sent, tmp_path, place, kind):
    moved = tmp_path / "moved"
    (sent / place).rename(moved)
    if kind == "link":
        (sent / place).symlink_to(moved)
    else:
        os.mkfifo(sent / place)
    refused(sent, tmp_path / "elsewhere", "is a link|not a plain file|does not belong")


def archive_of(files, path, *more, top="top"):
    """A .tar.gz of files by name, and of further (TarInfo, content)."""
    with tarfile.open(path, "w:gz") as packed:
        members = [(tarfile.TarInfo(f"{top}/{name}"), data) for name, data in files.items()]
        for member, data in (*members, *more):
            member.size = len(data) if member.type == tarfile.REGTYPE else 0
            packed.addfile(member, io.BytesIO(data))
    return path


def member(name, kind=tarfile.REGTYPE, data=b"x", link=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found, data


@pytest.mark.parametrize(
    "more, match",
    [
        (member("../evil"), "not in one folder"),
        (member("/etc/evil"), "not in one folder"),
        (member("top/../evil"), "does not belong"),
        (member("top/rows/../../evil"), "does not belong"),
        (member("other/SUMMARY.md"), "not in one folder"),
        (member("top//etc/evil"), "does not belong"),
        (member("top\\..\\evil"), "not in one folder"),
        (member("top/prepare.py"), "does not belong"),
        (member("top/SUMMARY.md"), "SUMMARY.md is in it twice"),
        (member("top/rows", tarfile.SYMTYPE, link="/etc"), "not a plain"),
        (member("top/rows/0009.npz", tarfile.SYMTYPE, link="/etc/passwd"), "not a plain file"),
        (member("top/rows/0009.npz", tarfile.LNKTYPE, link="top/SUMMARY.md"), "not a plain file"),
        (member("top/rows/0009.npz", tarfile.CHRTYPE), "not a plain file"),
        (member("top/x", tarfile.DIRTYPE), "not a plain"),
        (member("top/rows/0009.npz", tarfile.BLKTYPE), "not a plain file"),
        (member("top/deep/er", tarfile.DIRTYPE), "not a plain"),
        (member("top/rows/0009.npz", tarfile.FIFOTYPE), "not a plain file"),
        (member("top/rows/0009.npz"), "not in MANIFEST"),
        (member("top/rows/0009.npz", tarfile.GNUTYPE_SPARSE), "not a plain file|not a valid"),
        (member("top/rows/0009.npz", tarfile.CONTTYPE), "not a plain file"),
    ],
)
def test_members_that_are_no_part_of_an_export_are_refused(sent, tmp_path, more, match):
    source = archive_of(contents(sent), tmp_path / "x.tar.gz", more)
    refused(source, tmp_path / "elsewhere", match)
    assert not (tmp_path / "evil").exists() and not Path("/etc/evil").exists()


@pytest.mark.parametrize("top", [".", "renamed by hand"])
def test_an_archive_packed_again_by_hand_is_taken(sent, tmp_path, top):
    folders = [member(name, tarfile.DIRTYPE, b"") for name in (top, f"{top}/rows")]
    source = archive_of(contents(sent), tmp_path / "x.tar.gz", *folders, top=top)
    assert contents(imported(source, tmp_path / "elsewhere")) == contents(sent)


@pytest.mark.parametrize("top", ["..", "", "/etc"])
def test_an_archive_without_a_folder_of_its_own_is_refused(sent, tmp_path, top):
    source = archive_of(contents(sent), tmp_path / "x.tar.gz", top=top)
    refused(source, tmp_path / "elsewhere", "not in one folder|does not belong")


def test_a_file_with_holes_is_refused(tmp_path):
    info, data = member("top/SUMMARY.md")
    info.size, info.pax_headers = len(data), {"GNU.sparse.map": "0,1", "GNU.sparse.size": "100000"}
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as packed:
        packed.addfile(info, io.BytesIO(data))
    refused(tmp_path / "x.tar.gz", tmp_path / "elsewhere", "not a plain file")


def test_an_archive_with_too_many_bytes_is_refused_while_it_is_read(sent, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_BYTES", 2**20)
    monkeypatch.setattr(archive, "MOST_FILES", 20)
    zeros = member("top/rows/0009.npz", data=bytes(2**20))
    source = archive_of(contents(sent), tmp_path / "x.tar.gz", zeros)
    refused(source, tmp_path / "elsewhere", "more than 1,048,576 bytes")
    hidden = tmp_path / "y.tar.gz"  # in a header's own data, where no member's size says it
    with tarfile.open(hidden, "w:gz", format=tarfile.PAX_FORMAT) as packed:
        info, data = member("top/SUMMARY.md")
        info.pax_headers, info.size = {"comment": "x" * 2**22}, len(data)
        packed.addfile(info, io.BytesIO(data))
    assert hidden.stat().st_size < 2**16
    refused(hidden, tmp_path / "elsewhere", "unpacks to more than 1,048,576 bytes")


def test_a_folder_with_too_many_bytes_is_refused_before_it_is_read(sent, tmp_path, monkeypatch):
    with open(sent / "rows" / "0009.npz", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    refused(sent, tmp_path / "elsewhere", "with rows/0009.npz it has more than")


def test_too_many_files_are_refused(sent, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_FILES", 50)
    many = [member(f"top/rows/{run:04d}.npz") for run in range(10, 100)]
    refused(archive_of(contents(sent), tmp_path / "x.tar.gz", *many), tmp_path / "elsewhere", "more than 50 files")
    folders = [member("top", tarfile.DIRTYPE) for _ in range(100)]
    refused(archive_of({}, tmp_path / "y.tar.gz", *folders), tmp_path / "elsewhere", "more than 50 files")
    for run in range(10, 100):
        (sent / "rows" / f"{run:04d}.npz").write_bytes(b"x")
    refused(sent, tmp_path / "elsewhere", "more than 50 files")


def test_an_archive_cut_short_or_changed_anywhere_is_refused(session, sent, tmp_path):
    files = contents(sent)
    source = export_session(session, tmp_path / "x.tar.gz")
    good = source.read_bytes()
    for end in range(0, len(good), 97):
        source.write_bytes(good[:end])
        refused(source, tmp_path / "elsewhere", "not a valid .tar.gz|missing|no rows|cut short|not a ledger")
    tar = bytearray(gzip.decompress(good))
    for at in range(0, len(tar), 997):
        changed = tar.copy()
        changed[at] ^= 0xFF
        source.write_bytes(gzip.compress(bytes(changed), 1))
        try:
            there = imported(source, tmp_path / "elsewhere")
        except LabError:
            continue
        assert contents(there) == files  # it was padding


def test_a_size_below_nothing_is_refused(sent, tmp_path):
    source = tmp_path / "x.tar.gz"
    info = tarfile.TarInfo("top/SUMMARY.md")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    source.write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    refused(source, tmp_path / "elsewhere", "an impossible size|not a valid|missing")
