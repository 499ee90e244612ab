"""Beginning a session: what is checked, what is pinned, what is refused."""

import ctypes
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import sessions
from sessions import ROOT, git

import backends
import storage
from backends.interface import BackendError, Hardware
from calibration import profile
from lab.run import sandbox
from lab.errors import LabError
from lab.session.locks import device_lock
from lab.session.session import Session, at
from lab.session.start import start, which_gpu

PROFILE = json.loads((ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json").read_text())


class Version(str):
    """As PyTorch says its own: a text of a class of its own."""


HARDWARE = Hardware(
    name="CPU",
    slug=PROFILE["device"],
    kind="cpu",
    backend=PROFILE["backend"],
    memory=24 * 2**30,
    versions={name: Version(version) for name, version in PROFILE["versions"].items()},
)


@pytest.fixture
def tree(tmp_path, isolated_home, tiny_home, monkeypatch):
    monkeypatch.setattr(backends, "identify", lambda name=None: HARDWARE)
    monkeypatch.setattr(sandbox, "probe", lambda: "bwrap")
    isolated_home.mkdir()
    (isolated_home / "data").symlink_to(tiny_home / "data")
    storage.write_json(profile.path_of(HARDWARE), PROFILE)
    return sessions.repository(tmp_path / "project")


def begin(tree, tag="nov21", **more):
    return start(tree.path, tag, say=lambda text: None, **more)


def untouched(tree):
    return tree.branch() == "main" and not list(storage.home().glob("sessions/*/*/session.json"))


def test_it_makes_branch_judge_and_a_pending_baseline(tree):
    session = begin(tree)
    assert tree.branch() == f"autoresearch/{HARDWARE.slug}/nov21" and git(tree.path, "status", "--porcelain") == ""
    assert (session.judge / "prepare.py").read_text() == "BUDGET = 300\n"
    assert session.state.oldest_open.kind == "baseline"
    assert session.profile == PROFILE and session.started.profile == profile.tag(PROFILE)
    assert session.local.settings["AUTORESEARCH_PROFILE"] == str(session.folder / "profile.json")
    assert session.local.settings["AUTORESEARCH_DATA"] == "tiny"
    assert at(tree.path).folder == session.folder


def test_a_session_for_a_device_elsewhere_takes_nothing_from_this_one(tree, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(backends, "identify", None)
    there = {"name": "Mac", "slug": "apple-m4-16gb", "kind": "metal", "backend": "mlx", "memory": 2**34, "versions": {}}
    session = begin(tree, described={"hardware": there, "profile": {**PROFILE, "device": "apple-m4-16gb"}})
    assert session.name == "apple-m4-16gb/nov21" and session.fleet == {"devices": [], "elsewhere": True}
    assert session.started.backend == "mlx" and "CUDA_VISIBLE_DEVICES" not in session.local.settings
    assert session.local.gpu == "" and session.local.unified


def test_the_sandbox_is_told(tree):
    said = []
    start(tree.path, "a", say=said.append)
    assert any("bwrap" in text for text in said)


def test_a_quick_calibration_is_told(tree):
    told = {}
    for effort in ("quick", "full"):
        storage.write_json(profile.path_of(HARDWARE), PROFILE | {"effort": effort})
        start(tree.path, effort, say=(said := []).append)
        tree.git("switch", "-q", "main")
        told[effort] = any("quick calibration" in text for text in said)
    assert told == {"quick": True, "full": False}


def test_the_result_of_a_run_by_hand_stays(tree, tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    result.write_text("{}")
    monkeypatch.setenv("AUTORESEARCH_RESULT", str(result))
    begin(tree)
    assert result.exists()


def test_settings_of_the_users_are_pinned(tree, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "7")
    monkeypatch.setenv("AUTORESEARCH_FA3_LIBRARY", "fa3.so")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    session = begin(tree)
    assert session.local.settings["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert session.local.settings["AUTORESEARCH_DEVICE"] == "cpu" and session.budget == 7
    assert session.local.settings["AUTORESEARCH_FA3_LIBRARY"] == str(Path.cwd() / "fa3.so")


@pytest.mark.parametrize("tag", ["", "a b", "../x", "a..b", "x.lock", "-x", "a/b", "x" * 99])
def test_a_tag_that_is_no_name_is_refused(tree, tag):
    with pytest.raises(LabError, match="can't be a tag"):
        begin(tree, tag)
    assert untouched(tree)


def test_an_existing_tag_is_refused(tree):
    begin(tree)
    git(tree.path, "switch", "-q", "main")
    with pytest.raises(LabError, match="session nov21 already"):
        begin(tree)
    assert tree.branch() == "main"


def test_a_branch_of_that_name_that_is_somewhere_else_is_refused(tree):
    git(tree.path, "commit", "-q", "--allow-empty", "-m", "second")
    git(tree.path, "branch", f"autoresearch/{HARDWARE.slug}/nov21", "HEAD^")
    with pytest.raises(LabError, match="a branch .* already"):
        begin(tree)
    assert untouched(tree)


def test_a_detached_head_is_refused(tree):
    git(tree.path, "checkout", "-q", "--detach")
    with pytest.raises(LabError, match="detached"):
        begin(tree)


def test_an_uncommitted_train_is_refused(tree):
    (tree.path / "train.py").write_text("LOSS = 2\n")
    with pytest.raises(LabError, match="not committed"):
        begin(tree)
    assert untouched(tree) and (tree.path / "train.py").read_text() == "LOSS = 2\n"


def test_other_uncommitted_files_are_named_and_stay(tree):
    (tree.path / "prepare.py").write_text("BUDGET = 1\n")
    said = []
    session = start(tree.path, "nov21", say=said.append)
    assert any("prepare.py" in text for text in said)
    assert (session.judge / "prepare.py").read_text() == "BUDGET = 300\n"


def test_without_a_profile_it_says_what_to_run(tree):
    profile.path_of(HARDWARE).unlink()
    with pytest.raises(profile.ProfileError, match="python -m calibration"):
        begin(tree)
    assert untouched(tree)


def test_a_stale_profile_is_refused_by_name(tree, monkeypatch):
    newer = replace(HARDWARE, versions={**HARDWARE.versions, "torch": "9.9"})
    monkeypatch.setattr(backends, "identify", lambda name=None: newer)
    with pytest.raises(profile.ProfileError, match="torch .*9.9"):
        begin(tree)
    assert untouched(tree)


def test_without_data_it_says_what_to_run(tree, isolated_home):
    (isolated_home / "data").unlink()
    with pytest.raises(storage.DataError, match="prepare.py"):
        begin(tree)
    assert untouched(tree)


def test_a_backend_that_is_not_there_is_its_error(tree, monkeypatch):
    def fails(name=None):
        raise BackendError("install it")

    monkeypatch.setattr(backends, "identify", fails)
    with pytest.raises(LabError, match="install it"):
        begin(tree)


def test_without_a_sandbox_it_wants_to_be_told(tree, monkeypatch):
    monkeypatch.setattr(sandbox, "probe", lambda: None)
    with pytest.raises(LabError, match="--unsandboxed"):
        begin(tree)
    assert untouched(tree)
    assert begin(tree, unsandboxed=True).started.sandbox is None


def test_where_no_run_can_be_guarded_no_session_begins(tree, monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(LabError, match="use WSL 2"):
        sandbox.refuse_without(None, unsandboxed=True)


def test_a_start_that_was_killed_half_way_is_begun_again(tree):
    session = begin(tree)
    git(tree.path, "switch", "-q", "main")
    (session.folder / "session.json").unlink()  # it is written last
    again = begin(tree)
    assert again.state.oldest_open.kind == "baseline" and (again.judge / "train.py").exists()


def test_a_session_of_another_repository_is_refused(tree, tmp_path):
    begin(tree)
    shutil.copytree(tree.path, tmp_path / "copy", symlinks=True)
    with pytest.raises(LabError, match="belongs to the repository"):
        at(tmp_path / "copy")


def test_a_branch_without_a_session_says_how_to_begin(tree):
    with pytest.raises(LabError, match="lab start TAG"):
        at(tree.path)


def test_a_session_of_another_format_is_refused(tree):
    session = begin(tree)
    storage.write_json(session.folder / "session.json", {**msgspec.to_builtins(session.local), "format": 99})
    with pytest.raises(LabError, match="another version"):
        Session(session.folder)


def test_no_baseline_is_refused(tree):
    with pytest.raises(LabError, match="at least one"):
        begin(tree, runs=0)


def test_a_start_that_is_killed_at_the_end_leaves_no_session(tree, monkeypatch):
    def killed(path, content):
        if path.name == "session.json":
            raise KeyboardInterrupt
        write(path, content)

    write = storage.write_json
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(tree)
    assert begin(tree).state.oldest_open.kind == "baseline"


def test_a_busy_device_is_refused_before_anything_is_made(tree):
    with device_lock(HARDWARE.slug, ""):
        with pytest.raises(LabError, match="another session is training"):
            begin(tree)
    assert untouched(tree)


@pytest.mark.parametrize(
    "visible, device, gpu",
    [("", "", "0"), ("0", "", "0"), ("", "cuda", "0"), ("2,3", "", "2"), ("2,3", "cuda:1", "3"), ("", "cuda:1", "1")],
)
def test_where_no_driver_tells_a_gpus_uuid_it_is_called_as_cuda_is_told(monkeypatch, visible, device, gpu):
    def no_library(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("AUTORESEARCH_DEVICE", device)
    assert which_gpu("cuda") == gpu and which_gpu("cpu") == ""


def test_worktrees_of_the_users_stay_registered(tree, tmp_path):
    git(tree.path, "worktree", "add", "-q", str(tmp_path / "drive" / "mine"))
    shutil.move(tmp_path / "drive", tmp_path / "away")  # not mounted just now
    begin(tree)
    shutil.move(tmp_path / "away", tmp_path / "drive")
    assert git(tmp_path / "drive" / "mine", "status", "--porcelain") == ""
