"""What each tool protects, tried by really running under it; of the one for macOS, what is asked for."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sessions import available

from lab.errors import LabError
from lab.run import sandbox

ABSENT = [name for name in sandbox.NAMES if not shutil.which(name)]


@pytest.fixture
def inside(tmp_path):
    """inside(name, code) -> what the code prints, run under a tool. Folders: home (hidden; in it, seen is shown, and
    out can be written), temporary, cwd."""
    for part in ("home/seen/deep", "home/out", "home/hidden in it", "temporary", "cwd"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "home" / "secret").write_text("secret")
    (tmp_path / "home" / "seen" / "deep" / "file").write_text("seen")
    (tmp_path / "home" / "profile.json").write_text("profile")
    (tmp_path / "link").symlink_to(tmp_path / "home" / "seen")

    def run(name, code, **changes):
        folders = {
            "readable": [
                tmp_path / "home" / "seen",
                tmp_path / "home" / "profile.json",
                tmp_path / "none",
                tmp_path / "link",
                *sandbox.interpreter(),
            ],
            "writable": [tmp_path / "home" / "out", tmp_path / "cwd"],
            "hidden": [tmp_path / "home"],
        }
        command = sandbox.wrap(
            name,
            [sys.executable, "-IS", "-c", f"import os\nROOT = {str(tmp_path)!r}\n{code}"],
            temporary=tmp_path / "temporary",
            cwd=tmp_path / "cwd",
            **folders | changes,
        )
        done = subprocess.run(command, cwd=tmp_path / "cwd", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("name", available())
def test_what_is_hidden(inside, name):
    assert inside(name, "print(sorted(os.listdir(ROOT + '/home')))") == "['out', 'profile.json', 'seen']"
    assert (
        inside(name, "print(open(ROOT + '/home/seen/deep/file').read(), open(ROOT + '/home/profile.json').read())")
        == "seen profile"
    )


@pytest.mark.parametrize("name", available())
def test_what_can_be_written(inside, name, tmp_path):
    tried = """
import sys
for path in (ROOT + '/home/out/a', ROOT + '/cwd/a', 'b', '/tmp/of-a-test', '/dev/null', ROOT + '/home/seen/a',
             ROOT + '/home/profile.json', '/usr/a', sys.prefix + '/a'):
    try:
        open(path, 'w').close()
        print(1, end=' ')
    except OSError:
        print(0, end=' ')
"""
    assert inside(name, tried) == "1 1 1 1 1 0 0 0 0"
    assert (tmp_path / "home" / "out" / "a").exists() and (tmp_path / "cwd" / "b").exists()
    assert (tmp_path / "temporary" / "of-a-test").exists() and not os.path.exists("/tmp/of-a-test"), "/tmp is its own"
    assert (tmp_path / "home" / "profile.json").read_text() == "profile"


@pytest.mark.parametrize("name", available())
def test_folders_in_folders(inside, name, tmp_path):
    """Hidden in what is shown, shown in what is hidden there."""
    (tmp_path / "home" / "seen" / "other").mkdir()
    (tmp_path / "home" / "seen" / "other" / "run").mkdir()
    seen = inside(
        name,
        "print(os.listdir(ROOT + '/home/seen/other'), os.listdir(ROOT + '/home/seen/deep'))",
        hidden=[tmp_path / "home", tmp_path / "home" / "seen" / "other"],
        writable=[tmp_path / "home" / "seen" / "other" / "run", tmp_path / "cwd"],
    )
    assert seen == "['run'] ['file']"


@pytest.mark.parametrize("name", available())
def test_no_network(inside, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        tried = f"""
import socket
try:
    socket.create_connection(('127.0.0.1', {port}), 2)
    print('connected')
except OSError:
    print('no')
"""
        assert inside(name, tried) == "no"


@pytest.mark.parametrize("name", available())
def test_where_it_is(inside, name, tmp_path):
    assert inside(name, "print(os.getcwd())") == str(tmp_path / "cwd")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not hidden")
@pytest.mark.parametrize("name", available())
def test_no_processes_but_its_own(inside, name):
    assert inside(name, "print(os.getpid(), sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))") == "1 [1]"
    assert inside(name, "print(os.path.exists('/dev/null'), os.path.isdir('/sys/devices'))") == "True True"


def test_the_first_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
    for first in sandbox.NAMES:
        monkeypatch.setattr(sandbox, "works", lambda name, first=first: name == first)
        assert sandbox.probe() == first
    monkeypatch.setattr(sandbox, "works", lambda name: False)
    assert sandbox.probe() is None


@pytest.mark.parametrize("pretender", ["exit 1", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'])
def test_a_tool_that_protects_nothing_does_not_work(pretender, tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{pretender}\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert not sandbox.works("bwrap")


def test_none_changes_nothing(tmp_path):
    unchanged = sandbox.wrap(None, ["a", "b"], readable=[], writable=[], hidden=[], temporary=tmp_path, cwd=tmp_path)
    assert unchanged == ["a", "b"]


@pytest.mark.parametrize("name", [*sandbox.NAMES, None])
def test_described_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr(sandbox, "advice", str)
    text = sandbox.describe(name)
    assert text.endswith(".") and text.count(". ") == 0 and (name or "no sandbox") in text


@pytest.mark.parametrize(
    "setting, value, told",
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "bwrap-userns-restrict /etc/apparmor.d/"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone"),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces"),
        ("user/max_user_namespaces", "95000", "bubblewrap"),
    ],
)
def test_what_keeps_a_sandbox_away_is_told(monkeypatch, tmp_path, setting, value, told):
    (tmp_path / setting).parent.mkdir(parents=True)
    (tmp_path / setting).write_text(f"{value}\n")
    monkeypatch.setattr(sandbox, "NAMESPACES", tmp_path)
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    text = sandbox.describe(None)
    assert told in text and ("sysctl" in text) == told.startswith("sysctl")
    with pytest.raises(LabError, match="add --unsandboxed"):
        sandbox.refuse_without(None, unsandboxed=False)


def test_installing_bubblewrap_is_advised_only_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "NAMESPACES", tmp_path)
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    for path, told in ((None, "Installing bubblewrap may help"), ("/usr/bin/bwrap", "is installed and fails")):
        monkeypatch.setattr(sandbox.shutil, "which", lambda name, path=path: path)
        assert told in sandbox.describe(None)


@pytest.fixture
def mounted(monkeypatch, tmp_path):
    """Says what /proc/self/mounts holds beside the root."""

    def has(line: bytes) -> None:
        (tmp_path / "mounts").write_bytes(b"/dev/vda / ext4 rw,relatime 0 0\n" + line)
        monkeypatch.setattr(sandbox, "MOUNTS", tmp_path / "mounts")

    return has


def test_a_mounted_folder_may_have_any_name(mounted, tmp_path):
    mounted(b"/dev/sda1 /media/caf\xe9\\040\\134\xe2\x80\xa8 vfat rw,nosuid 0 0\n")
    ((root, _), (target, options)) = sandbox.mounts()
    assert (root, os.fsencode(target), options) == ("/", b"/media/caf\xe9 \\\xe2\x80\xa8", {"rw", "nosuid"})
    assert sandbox.options_of(Path(target) / "x") == {"rw", "nosuid"}
    command = sandbox.wrap("unshare", ["true"], readable=[], writable=[], hidden=[], temporary=tmp_path, cwd=tmp_path)
    assert any(b"/media/caf\xe9" in os.fsencode(part) for part in command)  # as it goes to the system


@pytest.mark.skipif(not hasattr(os, "fork"), reason="where unshare is")
def test_the_script_of_mounts_is_one_for_any_name(mounted, tmp_path):
    """The shell takes it; that a remount of a folder that is not there fails does no harm."""
    mounted(b"/dev/sda1 /media/caf\xe9'\"$(x) vfat rw 0 0\n")
    command = sandbox.wrap("unshare", ["true"], readable=[], writable=[], hidden=[], temporary=tmp_path, cwd=tmp_path)
    script = command[command.index("-c") + 1]
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_profile_for_macos():
    text = sandbox.macos_profile([Path("/Users/me/venv"), Path('/a "b"')], [Path("/Users/me/run")], [Path("/Users/me")])
    shown = "".join(f"\n  (subpath {one})" for one in ('"/Users/me/venv"', '"/a \\"b\\""', '"/Users/me/run"'))
    order = [
        "(version 1)",
        "(allow default)",
        "(deny network*)",
        '(deny file-read-data\n  (subpath "/Users/me"))',
        f"(allow file-read-data{shown})",
        '(deny file-write* (subpath "/"))',
        "(allow file-write*",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places) and text.rindex('(subpath "/Users/me/run")') > places[-1]
    assert text.count("(") == text.count(")") and '(subpath "/Users/me/venv")' not in text[places[-1] :]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("name", available())
def test_what_hides_can_not_be_unmounted(inside, name):
    code = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapPrm', 'CapBnd'))])\n"
    assert inside(name, code) == f"['{'0' * 16}', '{'0' * 16}']"
    code = "import ctypes\nprint(ctypes.CDLL(None).umount2((ROOT + '/home').encode(), 2))"
    assert inside(name, code) == "-1"
