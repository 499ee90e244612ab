"""Sessions that travel: what was exported is what arrives, and nothing else gets in."""

import gzip
import io
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from exports import DEVICE, FIRST, TAG, THIRD, contents, refused, session_in

import storage
from lab.share import exchange, packing
from lab.errors import LabError


@pytest.fixture
def session(isolated_home, tmp_path):
    return session_in(isolated_home, tmp_path)


# --- There and back ---


@pytest.mark.parametrize("ending", ["", ".tar.gz", ".tgz"])
def test_a_session_arrives_as_it_was_exported(session, export, tmp_path, ending):
    sent = exchange.export_session(*session, tmp_path / f"sent{ending}")
    there = exchange.import_session(sent, tmp_path / "elsewhere")
    assert there == tmp_path / "elsewhere" / "imported" / DEVICE / TAG
    assert contents(there) == contents(export)
    assert not list(there.parent.glob(".*"))
    again = exchange.write(packing.files_of(exchange.read_bundle(there)), tmp_path / "again")
    assert contents(again) == contents(export)


def test_what_arrives_is_what_was_there(session, export):
    found = exchange.read_bundle(export)
    assert found.kept == session[1] and found.name == f"{DEVICE}/{TAG}"
    assert found.session["budget"] == 300 and found.session["versions"] == {"torch": "2.13.0+cpu"}
    assert [(r["run"], r["val_bpb"], r["status"]) for r in found.rows] == [
        (1, 1.49, "keep"),
        (2, 1.48, "keep"),
        (3, 1.47, "keep"),
        (4, None, "crash"),
        (5, 1.45, "keep"),
    ]
    assert found.rows[3]["description"] == "depth\t12"
    assert sorted(found.losses) == [1, 3] and found.losses[3]["held_nats"].tolist() == [0, 3, 6, 9]
    assert found.profile["device"] == DEVICE and found.set_aside == ""


def test_the_patches_apply_in_order(export, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "train.py").write_text(FIRST)
    for patch in sorted((export / "patches").iterdir()):
        subprocess.run(["git", "apply", patch], cwd=tree, check=True, env=os.environ | {"GIT_DIR": "/dev/null"})
    assert (tree / "train.py").read_text() == THIRD
    assert [p.name for p in sorted((export / "patches").iterdir())] == [
        "0001-lr-times-three.patch",
        "0002-end-is-1-b-x-http-y-b.patch",
    ]


def test_patches_without_blanks_on_empty_lines_travel(session, tmp_path):
    """As git makes them with diff.suppressBlankEmpty."""
    folder, kept = session
    bare = [replace(one, patch_text=one.patch_text.replace("\n \n", "\n\n").replace("\n \n", "\n\n")) for one in kept]
    assert any("\n\n" in one.patch_text for one in bare)
    sent = exchange.export_session(folder, bare, tmp_path / "sent.tar.gz")
    assert exchange.read_bundle(exchange.import_session(sent, tmp_path / "elsewhere")).kept == bare


def test_an_archive_is_the_same_each_time(session, tmp_path, monkeypatch):
    one = exchange.export_session(*session, tmp_path / "one.tar.gz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    other = exchange.export_session(*session, tmp_path / "other.tar.gz")
    assert one.read_bytes() == other.read_bytes()
    with tarfile.open(one) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
    assert {m.name.split("/")[0] for m in members} == {f"{DEVICE}-{TAG}"}


def test_nothing_of_the_machine_goes_along(session, export, isolated_home, tmp_path):
    text = b"\n".join(data for name, data in contents(export).items() if not name.endswith(".npz")).decode()
    for private in (
        str(isolated_home),
        str(tmp_path),
        str(Path.home()) + "/",
        "jane",
        "/usr/lib",
        "my project",
        "judge",
        "AUTORESEARCH_HOME",
        "secret",
    ):
        assert private not in text, private
    reasons = [r["reason"] for r in exchange.read_bundle(export).rows]
    assert reasons[2:4] == ["better, see .../run.log", 'File ".../x.py", .../zip.py: no memory']


@pytest.mark.parametrize(
    "text, cut",
    [
        ("/home/jane/x.py failed", ".../x.py failed"),
        ("C:\\Users\\jane\\x.py failed", ".../x.py failed"),
        ("in /data/my files/lab/run.log.", "in .../run.log."),
        ("in /data/my files", "in ..."),
        ("=/usr/include", "=.../include"),
        ("and/or 1/2/4 a/b/c", "and/or 1/2/4 a/b/c"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("\\alpha\\beta lr/2 ~/x/y ../a/b", "\\alpha\\beta lr/2 ~/x/y ../a/b"),
        ("a /data/my files2", "a .../my files2"),
    ],
)
def test_paths_are_cut_down_to_names(text, cut):
    assert exchange._path_remover(Path("/data/my files"), None)({"a": [text, 1, None]}) == {"a": [cut, 1, None]}


def test_the_readme_shows_words_as_words(export):
    text = (export / "README.md").read_text()
    assert r"| 1 | 1 | aaaa111 | 1.470000 | LR times \| three | patches/0001-lr-times-three.patch |" in text
    assert r"\<b\>\[x\]\(http://y\)\</b\>" in text and "5: 4 keep, 1 crash" in text


def test_a_target_that_exists_is_left_alone(session, export, tmp_path):
    before = contents(export)
    with pytest.raises(LabError, match="exists; remove it"):
        exchange.export_session(*session, export)
    assert contents(export) == before
    (tmp_path / "link.tar.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LabError, match="exists"):
        exchange.export_session(*session, tmp_path / "link.tar.gz")


@pytest.mark.parametrize("ending", ["", ".tar.gz"])
def test_an_export_that_fails_leaves_nothing(session, tmp_path, monkeypatch, ending):
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > (4 if not ending else 0):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.DataError, match="make room"):
        exchange.export_session(*session, tmp_path / "out" / f"x{ending}")
    assert list((tmp_path / "out").iterdir()) == []


def test_lines_that_were_set_aside_go_along(session, tmp_path):
    folder, kept = session
    with open(folder / "results.tsv", "ab") as file:
        file.write(b"torn\t1.\x1b")
    sent = exchange.export_session(folder, kept, tmp_path / "sent")
    found = exchange.read_bundle(sent)
    assert len(found.rows) == 5 and found.set_aside.startswith("line 7: it may be cut short")
    assert found.set_aside.endswith(r": torn\t1." + "\n")


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda folder: (folder / "runs/0001/rows.npz").write_bytes(b"x"), "0001/rows.npz does not hold losses"),
        (lambda folder: (folder / "profile.json").write_text("{}"), "profile.json is of format None"),
        (lambda folder: (folder / "profile.json").write_text("{"), "can't be exported"),
        (lambda folder: (folder / "results.tsv").unlink(), "there is no ledger"),
    ],
)
def test_a_damaged_session_is_not_exported(session, tmp_path, damage, match):
    damage(session[0])
    with pytest.raises(LabError, match=match):
        exchange.export_session(*session, tmp_path / "sent")
    assert not (tmp_path / "sent").exists()


def test_importing_again_changes_nothing_and_another_is_refused(session, export, tmp_path):
    home, said = tmp_path / "elsewhere", []
    there = exchange.import_session(export, home)
    assert exchange.import_session(export, home, say=said.append) == there
    assert said == [f"{DEVICE}/{TAG} is there already"]
    (session[0] / "runs" / "0003" / "rows.npz").unlink()
    other = exchange.export_session(*session, tmp_path / "other")
    refused(other, home, "holds something else under that name; remove it")
    (there / "README.md").unlink()
    refused(export, home, "holds something else")


def test_only_a_bare_ledger_takes_a_device(export, tmp_path):
    with pytest.raises(LabError, match="leave --device out"):
        exchange.import_session(export, tmp_path / "elsewhere", device="other-1gb")


# --- Bare ledgers ---

FIVE = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\nbaseline\t1.250000\t12.5\tkeep\tbaseline\n"
    "aaaa111\t0.000000\t0.0\tcrash\tC:\\new | odd\n"
)


def test_the_originals_ledger_becomes_a_session(tmp_path):
    source = tmp_path / "H100 Mar8.tsv"
    source.write_text(FIVE)
    there = exchange.import_session(source, tmp_path / "home", device="nvidia-h100-80gb")
    assert there == tmp_path / "home" / "imported" / "nvidia-h100-80gb" / "h100-mar8"
    found = exchange.read_bundle(there)
    assert [(r["device"], r["val_bpb"], r["description"]) for r in found.rows] == [
        ("nvidia-h100-80gb", 1.25, "baseline"),
        ("nvidia-h100-80gb", None, "C:\\new | odd"),
    ]
    assert found.profile is None and found.kept == [] and found.session["budget"] is None
    assert exchange.import_session(source, tmp_path / "home", device="nvidia-h100-80gb") == there
    source.write_text(FIVE + "bbbb222\t1.2\t1\tkeep\tmore\n")
    with pytest.raises(LabError, match="holds something else"):
        exchange.import_session(source, tmp_path / "home", device="nvidia-h100-80gb")


def test_what_of_a_ledger_can_not_be_read_is_told_and_kept(tmp_path):
    source, said = tmp_path / "r.tsv", []
    source.write_text(FIVE.split("\n", 1)[1] + "x\ty\n" * 7 + "aaaa")
    there = exchange.import_session(source, tmp_path / "home", "a-1gb", said.append)
    assert said[0] == "r.tsv does not name its columns; they are taken for commit val_bpb memory_gb status description"
    assert said[1] == "r.tsv, line 3, was set aside: it has 2 fields instead of 5"
    assert len(said) == 7 and said[-1] == "so were 3 more lines of r.tsv"
    assert len(exchange.read_bundle(there).set_aside.splitlines()) == 8


def test_a_ledger_has_to_have_a_device_that_can_name_a_folder(tmp_path):
    source = tmp_path / "r.tsv"
    source.write_text(FIVE)
    refused(source, tmp_path / "home", "don't say which device .* --device nvidia-h100-80gb")
    for device in ("../x", "a/b", ".", "..", "a..b", "/x", "a b", "é", "x.lock", "a" * 99):
        with pytest.raises(LabError, match="can't name a device"):
            exchange.import_session(source, tmp_path / "home", device)
    assert not (tmp_path / "home").exists()


def test_our_own_ledger_brings_its_device(session, tmp_path):
    source = tmp_path / "mine.tsv"
    source.write_bytes((session[0] / "results.tsv").read_bytes())
    there = exchange.import_session(source, tmp_path / "elsewhere")
    assert there.parent.name == DEVICE and exchange.read_bundle(there).session["backend"] == "sdpa"
    with pytest.raises(LabError, match=f"rows are of {DEVICE}, not of other-1gb"):
        exchange.import_session(source, tmp_path / "elsewhere", "other-1gb")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"hello\n", "is no ledger.*session is a results"),
        (b"", "holds no rows"),
        (FIVE.encode()[:55], "holds no rows"),
        (b"PK\x03\x04zip\n", "is no ledger"),
        (b"\x1f\x8b but no archive", "no sound .tar.gz"),
        (gzip.compress(b"text"), "no sound .tar.gz"),
    ],
)
def test_other_files_are_refused(tmp_path, content, match):
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", tmp_path / "home", match)


def test_what_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "home", "there is no folder or file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "home", "MANIFEST.json is missing")


# --- Hostile archives ---


def archive_of(files, path, *more, top="top"):
    """A .tar.gz of files by name, and of further (TarInfo, content)."""
    with tarfile.open(path, "w:gz") as archive:
        members = [(tarfile.TarInfo(f"{top}/{name}"), data) for name, data in files.items()]
        for member, data in (*members, *more):
            member.size = len(data) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
    return path


def member(name, kind=tarfile.REGTYPE, data=b"x", link=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found, data


def test_what_the_session_began_with_travels_as_it_is(export):
    assert exchange.read_bundle(export).base == FIRST.encode() == (export / "train.py").read_bytes()


@pytest.mark.parametrize(
    "more, match",
    [
        (member("../evil"), "not in one folder"),
        (member("/etc/evil"), "not in one folder"),
        (member("top/../evil"), "no part"),
        (member("top/patches/../../evil"), "no part"),
        (member("other/README.md"), "not in one folder"),
        (member("top//etc/evil"), "no part"),
        (member("top\\..\\evil"), "not in one folder"),
        (member("top/prepare.py"), "no part"),
        (member("top/README.md"), "README.md is there twice"),
        (member("top/rows", tarfile.SYMTYPE, link="/etc"), "not a plain"),
        (member("top/rows/0009.npz", tarfile.SYMTYPE, link="/etc/passwd"), "not a plain file"),
        (member("top/rows/0009.npz", tarfile.LNKTYPE, link="top/README.md"), "not a plain file"),
        (member("top/rows/0009.npz", tarfile.CHRTYPE), "not a plain file"),
        (member("top/x", tarfile.DIRTYPE), "not a plain"),
        (member("top/rows/0009.npz", tarfile.BLKTYPE), "not a plain file"),
        (member("top/deep/er", tarfile.DIRTYPE), "not a plain"),
        (member("top/rows/0009.npz", tarfile.FIFOTYPE), "not a plain file"),
        (member("top/rows/0009.npz"), "not in MANIFEST"),
        (member("top/rows/0009.npz", tarfile.GNUTYPE_SPARSE), "not a plain file|no sound"),
        (member("top/rows/0009.npz", tarfile.CONTTYPE), "not a plain file"),
    ],
)
def test_members_that_are_no_part_of_an_export_are_refused(export, tmp_path, more, match):
    source = archive_of(contents(export), tmp_path / "x.tar.gz", more)
    refused(source, tmp_path / "elsewhere", match)
    assert not (tmp_path / "evil").exists() and not Path("/etc/evil").exists()


@pytest.mark.parametrize("top", [".", "renamed by hand"])
def test_an_archive_packed_again_by_hand_is_taken(export, tmp_path, top):
    folders = [member(name, tarfile.DIRTYPE, b"") for name in (top, f"{top}/patches", f"{top}/rows")]
    source = archive_of(contents(export), tmp_path / "x.tar.gz", *folders, top=top)
    assert contents(exchange.import_session(source, tmp_path / "elsewhere")) == contents(export)


@pytest.mark.parametrize("top", ["..", "", "/etc"])
def test_an_archive_without_a_folder_of_its_own_is_refused(export, tmp_path, top):
    source = archive_of(contents(export), tmp_path / "x.tar.gz", top=top)
    refused(source, tmp_path / "elsewhere", "not in one folder|no part of")


def test_a_file_with_holes_is_refused(tmp_path):
    info, data = member("top/README.md")
    info.size, info.pax_headers = len(data), {"GNU.sparse.map": "0,1", "GNU.sparse.size": "100000"}
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    refused(tmp_path / "x.tar.gz", tmp_path / "elsewhere", "not a plain file")


def test_an_archive_with_too_many_bytes_is_refused_while_it_is_read(export, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "MOST_BYTES", 2**20)
    monkeypatch.setattr(exchange, "MOST_FILES", 20)
    zeros = member("top/rows/0009.npz", data=bytes(2**20))
    source = archive_of(contents(export), tmp_path / "x.tar.gz", zeros)
    refused(source, tmp_path / "elsewhere", "more than 1,048,576 bytes")
    hidden = tmp_path / "y.tar.gz"  # in a header's own data, where no member's size says it
    with tarfile.open(hidden, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info, data = member("top/README.md")
        info.pax_headers, info.size = {"comment": "x" * 2**22}, len(data)
        archive.addfile(info, io.BytesIO(data))
    assert hidden.stat().st_size < 2**16
    refused(hidden, tmp_path / "elsewhere", "unpacks to more than 1,048,576 bytes")


def test_a_folder_with_too_many_bytes_is_refused_before_it_is_read(export, tmp_path, monkeypatch):
    with open(export / "rows" / "0009.npz", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    refused(export, tmp_path / "elsewhere", "with rows/0009.npz it has more than")


def test_too_many_files_are_refused(export, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "MOST_FILES", 50)
    many = [member(f"top/rows/{run:04d}.npz") for run in range(10, 100)]
    refused(archive_of(contents(export), tmp_path / "x.tar.gz", *many), tmp_path / "elsewhere", "more than 50 files")
    folders = [member("top", tarfile.DIRTYPE) for _ in range(100)]
    refused(archive_of({}, tmp_path / "y.tar.gz", *folders), tmp_path / "elsewhere", "more than 50 files")
    for run in range(10, 100):
        (export / "rows" / f"{run:04d}.npz").write_bytes(b"x")
    refused(export, tmp_path / "elsewhere", "more than 50 files")


def test_an_archive_cut_short_or_changed_anywhere_is_refused(session, tmp_path):
    source = exchange.export_session(*session, tmp_path / "x.tar.gz")
    good = source.read_bytes()
    for end in range(0, len(good), 97):
        source.write_bytes(good[:end])
        refused(source, tmp_path / "elsewhere", "no sound .tar.gz|missing|no rows|cut short|no ledger")
    tar = bytearray(gzip.decompress(good))
    for at in range(0, len(tar), 997):
        changed = tar.copy()
        changed[at] ^= 0xFF
        source.write_bytes(gzip.compress(bytes(changed), 1))
        try:
            there = exchange.import_session(source, tmp_path / "elsewhere", say=lambda text: None)
        except LabError:
            continue
        exchange.read_bundle(there)  # it was padding


def test_a_size_below_nothing_is_refused(export, tmp_path):
    source = tmp_path / "x.tar.gz"
    info = tarfile.TarInfo("top/README.md")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    source.write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    refused(source, tmp_path / "elsewhere", "a size that can't be|no sound|missing")
