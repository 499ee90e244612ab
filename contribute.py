"""Measures this machine for the project, runs a short session, and writes both as an archive; or prints the table.

    python contribute.py            calibrates, runs a session of three runs, and writes DEVICE-BACKEND.tar.gz
    python contribute.py --quick    the same in some three minutes, roughly measured and uncompiled
    python contribute.py --table    what the project was tried on, from calibration/profiles and calibration/tried

Nothing is sent. CONTRIBUTING.md says what to do with the archive.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import backends
import demo
import storage
import terminal
from backends.interface import Hardware
from calibration import profile as profiles
from lab.genome.syntax import TRAIN
from lab.session.repository import Repository
from lab.session.session import Session
from lab.share import archive, export

ROOT = Path(__file__).resolve().parent
PROFILES, TRIED = ROOT / "calibration" / "profiles", ROOT / "calibration" / "tried"
PACKAGES = """torch triton mlx mlx-metal numpy kernels safetensors tiktoken rustbpe psutil filelock nvidia-ml-py
huggingface_hub pyarrow msgspec""".split()
DATASET = "stdlib"
BASELINE_RUNS = 2
PATIENCE = 3600  # seconds that the session may take
COLUMNS = "hardware, backend, system, precision, attention, model, tokens/s, session".split(", ")


def contribute(target: Path | None, quick: bool, budget: float) -> Path:
    """Measures this machine, runs a short session on it, and writes both as an archive.

    Args:
        target: of the archive; by default DEVICE-BACKEND.tar.gz here. budget: seconds of training of each run.

    Raises:
        Stop, CalledProcessError: something of it failed, and said why.
    """
    hardware = backends.identify()
    target = target or Path(f"{hardware.slug}-{hardware.backend}.tar.gz")
    if target.exists():
        raise storage.DataError(f"{target} exists; remove it, or name another file")
    storage.require_writable(target)  # before the work
    with _kept(storage.home() / "data" / "current"):  # what is trained on by default is not this's to choose
        _command(ROOT, "prepare.py", "--dataset", DATASET)
    if not _calibrated(hardware):
        _command(ROOT, "-m", "calibration", *["--quick"] * quick)
    with tempfile.TemporaryDirectory(prefix="autoresearch-", ignore_cleanup_errors=True) as folder:
        clone = Path(folder).resolve() / "autoresearch"
        session = _session(clone, budget, quick)
        exported = archive.sealed(export.files_of(session))
        files = {f"session/{name}": content for name, content in exported.items()}
        facts = tried(session.profile, session)
        shutil.rmtree(session.folder, ignore_errors=True)  # its repository goes, too
    files |= {"tried.json": json.dumps(facts, indent=1).encode() + b"\n", "README.md": contents(facts).encode()}
    archive.write(files, target, f"{hardware.slug}-{hardware.backend}")
    print(f"\n{contents(facts)}\nwritten to {target}, {target.stat().st_size / 1e3:.0f} kB")
    return target


@contextmanager
def _kept(path: Path):
    """Puts a file back as it was, or away if it was not there."""
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


def _calibrated(hardware: Hardware) -> bool:
    """Whether there is a profile of this device, made with what is installed."""
    path = profiles.path_of(hardware)
    return path.exists() and not profiles.stale(profiles.read(path, hardware), hardware)


def _session(clone: Path, budget: float, quick: bool) -> Session:
    """A session of a baseline and the demo's change, in a clone of the project."""
    environment = {"AUTORESEARCH_DATA": DATASET, "AUTORESEARCH_BUDGET": f"{budget:g}"}
    if quick:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    Repository(ROOT).git("clone", "--quiet", str(ROOT), str(clone))
    repository = Repository(clone)
    repository.git("checkout", "--quiet", "-B", "contribute")
    tag, wait = time.strftime("contributed-%Y%m%d-%H%M%S"), ["--wait", str(PATIENCE)]
    start = ["start", tag, "--baseline-runs", str(BASELINE_RUNS), "--unsandboxed", *wait]
    _command(clone, "-m", "lab", *start, **environment)
    if not demo.edit(clone / TRAIN):
        raise storage.DataError("nothing was written")
    _command(clone, "-m", "lab", "run", "-m", demo.CHANGE, *wait, **environment)
    return Session(storage.home() / "sessions" / (repository.branch() or "").partition("/")[2])


def _command(folder: Path, *arguments: str, **environment: str) -> None:
    """Runs a command of the project's; what it says is shown."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **environment}, check=True)


def tried(profile: dict, session: Session | None = None) -> dict:
    """The facts of a machine: the device, the chosen settings, the speed, and the result of the session."""
    settings, machine = profiles.settings(profile), profile["machine"]
    # At the chosen batch; where that was cut down to suit the total batch, at those tried with this depth.
    trials = [trial for trial in profiles.completed(profile) if trial.depth == settings.depth]
    chosen = [trial for trial in trials if trial.rows == settings.device_batch_size] or trials
    facts = {
        "device": profile["device"],
        "name": machine["name"],
        "backend": profile["backend"],
        "kind": machine["kind"],
        "system": machine["os"],
        "versions": profile["versions"],
        "calibrated": profile["effort"],
        "precision": settings.precision,
        "attention": settings.attention["full"],
        "depth": settings.depth,
        "tokens_per_second": round(max(trial.rate for trial in chosen)),
    }
    if session is None:
        return facts
    state, started = session.state, session.started
    return facts | {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "session": {
            "sandbox": started.sandbox or "none",
            "commit": started.commit,
            "budget": started.budget,
            "dataset": started.dataset,
            "runs": len(state.runs),
            "failed": [str(run.reason) for run in state.runs.values() if not run.ok],
            "baseline": state.mean(state.baseline) if state.baseline else None,
            "verdict": state.last.status,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def contents(facts: dict) -> str:
    """What an archive holds and says, in Markdown."""
    session = facts["session"]
    baseline = "no score" if session["baseline"] is None else f"{session['baseline']:.4f} bits per byte"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    found = {
        "device": f"{facts['name']} ({facts['device']}, {facts['kind']})",
        "system": facts["system"],
        "backend": f"{facts['backend']}, {versions}",
        "precision": facts["precision"],
        "attention": facts["attention"],
        "model": f"depth {facts['depth']}, {facts['tokens_per_second']:,} tokens/s ({facts['calibrated']} calibration)",
        "sandbox": session["sandbox"],
        "session": f"{session['runs']} runs of {session['budget']:g} s, {len(session['failed'])} failed; baseline "
        f"{baseline}; one change: {session['verdict']}",
    }
    name = f"{facts['device']}-{facts['backend']}"
    return "\n".join(
        [
            f"# {name}",
            "",
            *_markdown(("what", "found"), found.items()),
            "",
            *[f"A run failed: {reason}" for reason in session["failed"]],
            "- `session/`: the session as `python -m lab export` writes it; `session/profile.json` is the calibration, "
            f"and goes to `calibration/profiles/{name}.json`",
            f"- `tried.json`: the table above as JSON; goes to `calibration/tried/{name}.json`",
            "",
            "Paths of your machine are cut down to their last part. The archive holds nothing else.",
            "",
        ]
    )


def table() -> str:
    """What the project was tried on, as the README has it."""
    rows = []
    for path in sorted(PROFILES.glob("*.json")):
        given = TRIED / path.name
        facts = json.loads(given.read_text(encoding="utf-8")) if given.exists() else tried(profiles.read(path))
        session = facts.get("session")
        ran = f"{session['runs']} runs of {session['budget']:g} s, sandbox: {session['sandbox']}" if session else "-"
        framework = next(f"{name} {facts['versions'][name]}" for name in ("torch", "mlx") if name in facts["versions"])
        rows.append(
            (
                facts["device"], f"`{facts['backend']}`, {framework}", re.sub(r" \S+ \(", " (", facts["system"]),
                facts["precision"], facts["attention"], f"depth {facts['depth']}",
                f"{facts['tokens_per_second']:,}", ran,
            )
        )  # fmt: skip
    return "\n".join(_markdown(COLUMNS, rows))


def _markdown(heads, rows) -> list[str]:
    """A table in lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="contribute.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", nargs="?", type=Path, help="the archive (default DEVICE-BACKEND.tar.gz)")
    parser.add_argument("--quick", action="store_true", help="take about three minutes instead of twenty, uncompiled")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="seconds of training in a run (default 120; with --quick 20)"
    )
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the machines that the project was tried on"
    )
    options = parser.parse_args(arguments)
    if options.table and (options.target or options.quick or options.budget is not None):
        parser.error("--table goes alone: it only prints a table")
    if options.target and not options.target.name.endswith(archive.ARCHIVES):
        parser.error(f"{options.target} has to end in .tar.gz: it is to be an archive")
    if options.budget is not None and not 0 < options.budget < math.inf:
        parser.error(f"--budget has to be a number of seconds above 0, not {options.budget:g}")
    terminal.spell_what_is_missing()
    if options.table:
        print(table())
        return 0
    try:
        contribute(options.target, options.quick, options.budget or (20.0 if options.quick else 120.0))
    except subprocess.CalledProcessError as error:
        print(f"\nthe last command failed, with exit status {error.returncode}; nothing was written", file=sys.stderr)
        return 1
    except storage.Stop as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(terminal.printed(main))
