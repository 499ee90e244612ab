"""What the operating system adds to a guarded run: no network, nothing of the user's in sight, little to write to.

Three tools, the first that works here: bubblewrap (bwrap) and util-linux's unshare on Linux, sandbox-exec on macOS.
Each makes the same arrangement. Everything can be read, except folders that are hidden, from which only what a run
needs is shown again; nothing can be written but what is named. Devices stay, so that GPUs do. On Linux a run also sees
no processes but its own, which end when it ends.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends import machine
from lab.errors import LabError

Paths = Sequence[Path]
NAMES = ("bwrap", "unshare", "sandbox-exec")
SYSTEM_TEMPORARY = Path("/tmp")
MOUNTS = Path("/proc/self/mounts")
NAMESPACES = Path("/proc/sys")  # settings of the kernel
KEPT = ("/proc", "/sys", "/dev")  # file systems that stay as they are
LOCKED = {"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime"}  # options that a remount has to repeat


def probe() -> str | None:
    """The tool that makes the arrangement here, found by trying; None if none does."""
    return next((name for name in NAMES if shutil.which(name) and works(name)), None)


TRIAL = """
import os, socket, sys
secret, seen, out = sys.argv[1:]
open(out + "/yes", "w").close()
for path, mode in ((secret, "r"), (seen + "/no", "w")):
    try:
        open(path, mode).close()
        os._exit(1)
    except OSError:
        pass
try:
    socket.create_connection(("192.0.2.1", 80), 0.2)  # an address for documentation (RFC 5737)
    os._exit(1)
except TimeoutError:
    os._exit(1)
except OSError:
    pass
"""


def works(name: str) -> bool:
    """Whether, under this tool, what is hidden is, what is read-only is, and what is writable can be written."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-probe-") as folder:
        root = Path(folder).resolve()
        secret, seen, out, temporary = (root / part for part in ("home/secret", "home/seen", "out", "tmp"))
        for path in (seen, out, temporary):
            path.mkdir(parents=True)
        secret.write_text("x")
        command = [sys.executable, "-IS", "-c", TRIAL, str(secret), str(seen), str(out)]
        readable, hidden = [seen, *interpreter()], [root / "home"]
        command = wrap(name, command, readable=readable, writable=[out], hidden=hidden, temporary=temporary, cwd=out)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and (out / "yes").exists()


def describe(name: str | None) -> str:
    """What is protected by this tool and what is not, in a sentence."""
    if name is None:
        return (
            "This system has no sandbox that works: train.py would run with your rights, could read your files and "
            f"use the network, and only its Python code would be watched.{advice()}"
        )
    return (
        f"Runs are sandboxed by {name}: they have no network, can't see your home folder, and can write only to "
        "their own folder and the compilers' caches; this stops mistakes, not a determined attacker."
    )


def advice() -> str:
    """What would bring a sandbox to this system, as a sentence with a blank before it; nothing where there is none."""
    if not sys.platform.startswith("linux"):
        return ""
    if machine.told(NAMESPACES / "kernel/apparmor_restrict_unprivileged_userns") == "1":  # Ubuntu from 23.10 on
        return (
            " AppArmor forbids user namespaces here. Give bubblewrap the profile that Ubuntu has for it: sudo apt "
            "install bubblewrap apparmor-profiles && sudo ln -s "
            "/usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/ && sudo systemctl reload "
            "apparmor."
        )
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):  # of Debian once; of any Linux
        if machine.told(NAMESPACES / name) == "0":
            setting = name.replace("/", ".")
            return f" The setting {setting} is 0; bubblewrap needs 1 or more: sudo sysctl -w {setting}=NUMBER"
    if not shutil.which("bwrap"):
        return " Installing bubblewrap may help."
    return " bubblewrap is installed and fails: most containers lack the right to make user namespaces."


def refuse_windows() -> None:
    if os.name != "posix":
        raise LabError("guarded runs need Linux or macOS. On Windows use WSL 2, or run python train.py by itself")


def refuse_without(name: str | None, unsandboxed: bool) -> None:
    """LabError if there is no sandbox, unless `unsandboxed`; or if the system can't guard runs."""
    refuse_windows()
    if name is None and not unsandboxed:
        raise LabError(f"{describe(None)} To go on without a sandbox, add --unsandboxed")


def interpreter() -> list[Path]:
    """What this Python needs to run: where it is installed, and its packages."""
    binary = Path(sys.executable)
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    paths += [binary.parent, binary.resolve().parent, *sys.path[1:]]
    if site.ENABLE_USER_SITE:
        paths.append(site.getuserbase())
    return [Path(path) for path in paths if path and os.path.exists(path)]


def wrap(
    name: str | None,
    command: list[str],
    *,
    readable: Paths,
    writable: Paths,
    hidden: Paths,
    temporary: Path,
    cwd: Path,
    instead: Mapping[Path, Path] | None = None,
) -> list[str]:
    """The command that carries out `command` in `cwd` under a tool; None changes nothing.

    Args:
        readable, writable: shown where they lie in a hidden folder; writable ones can be written.
        hidden: folders in place of which an empty one is seen.
        temporary: on Linux it is seen as /tmp; it can be written.
        instead: on Linux, what is seen in place of a folder; it can be written.
    """
    if name is None:
        return list(command)
    temporary, hidden = Path(temporary).resolve(), [path for path in resolved(hidden) if path != Path("/")]
    readable, writable = resolved(readable), resolved(writable)
    if name == "sandbox-exec":
        return [name, "-p", macos_profile(readable, [*writable, temporary], hidden), *command]
    arrange = {"bwrap": _bwrap, "unshare": _unshare}[name]
    mounted = {place: what.resolve() for where, what in (instead or {}).items() for place in resolved([where])}
    steps = layers(readable, writable, hidden, {**mounted, SYSTEM_TEMPORARY: temporary})
    return arrange(list(command), steps, temporary, cwd)


def mounts_folders(name: str | None) -> bool:
    """Whether a tool can show one folder in place of another."""
    return name in ("bwrap", "unshare")


def seen(name: str | None, temporary: Path) -> Path:
    """Where a run sees its folder for temporary files."""
    return SYSTEM_TEMPORARY if mounts_folders(name) else temporary


def resolved(paths: Paths) -> list[Path]:
    """The paths as given and with links followed: a path may be used in either form."""
    return list(dict.fromkeys(form for path in paths for form in (Path(os.path.abspath(path)), Path(path).resolve())))


def layers(
    readable: Paths, writable: Paths, hidden: Paths, instead: Mapping[Path, Path]
) -> list[tuple[str, Path, Path]]:
    """What is to be mounted over a file tree that can't be written, outer folders first: ("hide", path, path), or
    ("show" or "write", what, where)."""

    def covered(path):
        return any(cover in path.parents for cover in (*hidden, SYSTEM_TEMPORARY))

    wanted = {path: "show" for path in readable if covered(path)}
    wanted |= {path: "write" for path in writable if covered(path) or path == path.resolve()}
    wanted |= dict.fromkeys(hidden, "hide")
    steps = [(what, path, path) for path, what in wanted.items() if os.path.exists(path)]
    steps += [("write", what, where) for where, what in instead.items()]
    return sorted(steps, key=lambda step: len(step[2].parts))


def _bwrap(command, steps, temporary, cwd):
    arguments = """bwrap --unshare-user --unshare-pid --unshare-net --unshare-ipc --as-pid-1 --die-with-parent
    --cap-drop ALL --ro-bind / / --dev-bind /dev /dev --tmpfs /dev/shm --proc /proc""".split()
    for what, source, target in steps:
        arguments += {"hide": ["--tmpfs"], "show": ["--ro-bind", str(source)], "write": ["--bind", str(source)]}[what]
        arguments.append(str(target))
    return [*arguments, "--chdir", str(cwd), "--", *command]


def _unshare(command, steps, temporary, cwd):
    """The same by hand: a copy of the file tree is mounted on `temporary`/root, changed, and made the root."""
    root = temporary / "root"

    def at(path):
        return shlex.quote(f"{root}{path}")

    def remount(options, where):
        return f"mount -o {','.join(['remount', 'bind', 'ro', *sorted(LOCKED & options)])} {where}"

    script = ["set -e", f"mkdir -p {at('')}", f"mount --rbind / {at('')}", f"mount --make-rprivate {at('')}"]
    script += [
        remount(options, at(target)) + ("" if target == "/" else " 2>/dev/null || true")
        for target, options in mounts()
        if not target.startswith(KEPT)
    ]
    script.append(f"mount -t tmpfs tmpfs {at('/dev/shm')} || true")
    for what, source, target in steps:
        if what == "hide":
            script += [f"mkdir -p {at(target)}", f"mount -t tmpfs tmpfs {at(target)}"]
            continue
        make = f"mkdir -p {at(target)}" if source.is_dir() else f"mkdir -p {at(target.parent)}; touch {at(target)}"
        script += [f"[ -e {at(target)} ] || {{ {make}; }}", f"mount --bind {shlex.quote(str(source))} {at(target)}"]
        if what == "show":
            script.append(remount(options_of(source), at(target)))
    script += [f"mount -t proc proc {at('/proc')}", f"cd {at('')}", "pivot_root . .", "umount -l ."]
    script += [f"cd {shlex.quote(str(cwd))}", "ip link set lo up 2>/dev/null || true"]
    # What hides a folder could be unmounted by whoever may mount. setpriv is of util-linux, as unshare is.
    script.append('if command -v setpriv >/dev/null; then set -- setpriv --bounding-set=-all --inh-caps=-all "$@"; fi')
    script.append('exec "$@"')
    tool = "unshare --user --map-root-user --mount --net --ipc --pid --fork --kill-child sh -c".split()
    return [*tool, "PATH=$PATH:/usr/sbin:/sbin\n" + "\n".join(script), "sh", *command]


def mounts() -> list[tuple[str, set[str]]]:
    """(target, options) of what is mounted here."""
    rows = [line.split(" ") for line in (machine.told(MOUNTS) or "").split("\n")]
    return [
        (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), row[1]), set(row[3].split(","))) for row in rows
    ]


def options_of(path: Path) -> set[str]:
    """The mount options that a remount of something on this file system has to repeat."""
    holding = [mount for mount in mounts() if Path(mount[0]) in (path, *path.parents)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def macos_profile(readable: list[Path], writable: list[Path], hidden: list[Path]) -> str:
    """In the language of sandbox-exec (SBPL), in which the last rule that fits decides. What a path leads through can
    still be looked up; Metal's compiler keeps its cache in the user's part of /var/folders."""

    def subpaths(folders):
        names = (str(path).replace("\\", "\\\\").replace('"', '\\"') for path in folders)
        return "".join(f'\n  (subpath "{name}")' for name in names)

    rules = ["(version 1)", "(allow default)", "(deny network*)"]
    rules += [f"(deny file-read-data{subpaths(hidden)})"] if hidden else []
    rules += [f"(allow file-read-data{subpaths([*readable, *writable])})", '(deny file-write* (subpath "/"))']
    places = '\n  (subpath "/dev")\n  (regex #"^/private/var/folders/[^/]+/[^/]+/C/")' + subpaths(writable)
    return "\n".join([*rules, f"(allow file-write*{places})"])
