"""A session to export, and exports to tamper with."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import storage
from lab.session import ledger
from lab.share import bundle, exchange
from lab.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
DEVICE, TAG = "cpu-amd-epyc-2c-24gb", "nov21"
FIRST = "LR = 1\nDEPTH = 2\n\n\n\n\n\nEND = True\n"
SECOND, THIRD = FIRST.replace("LR = 1", "LR = 3"), FIRST.replace("LR = 1", "LR = 3").replace("END = True\n", "END = 1")


def patch_of(before, after, folder):
    """As git makes it of the two files."""
    (folder / "a").mkdir(exist_ok=True)
    (folder / "b").mkdir(exist_ok=True)
    for side, text in (("a", before), ("b", after)):
        (folder / side / "train.py").write_bytes(text.encode())
    command = ["git", "diff", "--no-index", "--no-prefix", "a/train.py", "b/train.py"]
    text = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout.decode()
    assert text.startswith("diff --git a/train.py b/train.py")
    return text


def session_in(home, tmp_path):
    """(the folder of a session with two kept changes and a crash, what was kept)."""
    folder = home / "sessions" / DEVICE / TAG
    facts = {
        "format": 1,
        "tag": TAG,
        "device": DEVICE,
        "backend": "sdpa",
        "tree": str(tmp_path / "my project"),
        "before": "main",
        "commit": "c" * 40,
        "budget": 300.0,
        "baseline_runs": 2,
        "dataset": "stdlib",
        "eval": "e" * 12,
        "data": "d" * 12,
        "profile": "p" * 12,
        "versions": {"torch": "2.13.0+cpu"},
        "settings": {"AUTORESEARCH_HOME": str(home)},
        "sandbox": "bwrap",
        "memory_ceiling": 10**10,
        "python": "3.11.7",
        "made": "2026-11-21T00:00:00Z",
        "judge": {"prepare.py": "0" * 64},
    }
    storage.write_json(folder / "session.json", facts)
    (folder / "judge").mkdir()
    (folder / "judge" / "train.py").write_text(FIRST)
    profile = ROOT / "calibration" / "profiles" / f"{DEVICE}-sdpa.json"
    (folder / "profile.json").write_bytes(profile.read_bytes())
    told = {"device": DEVICE, "backend": "sdpa", "eval": "e" * 12}
    rows = [
        ledger.row_of(
            {"val_bpb": 1.5 - run / 100},
            run=run,
            seed=run,
            commit=commit,
            status=status,
            description=text,
            reason=reason,
            **told,
        )
        for run, (commit, status, text, reason) in enumerate(
            [
                ("ccccccc", "keep", "baseline", "baseline, 2 seeds"),
                ("ccccccc", "keep", "baseline", ""),
                ("aaaa111", "keep", "LR times | three", f"better, see {folder}/runs/0002/run.log"),
                ("bbbb222", "crash", "depth\t12", 'File "/home/jane/x.py", /usr/lib/python3/zip.py: no memory'),
                ("dddd333", "keep", "END is 1 <b>[x](http://y)</b>", "simpler"),
            ],
            1,
        )
    ]
    rows[3]["val_bpb"] = None
    ledger.append(folder / "results.tsv", rows)
    for run in (1, 3):
        losses = {name: np.arange(4, dtype=np.float64) * run for name in bundle.LOSSES}
        (folder / "runs" / f"{run:04d}").mkdir(parents=True)
        np.savez(folder / "runs" / f"{run:04d}" / "rows.npz", **losses)
        (folder / "runs" / f"{run:04d}" / "run.log").write_text("secret")
    kept = [
        exchange.Kept(1, "aaaa111", "ccccccc", patch_of(FIRST, SECOND, tmp_path), "LR times | three"),
        exchange.Kept(3, "dddd333", "aaaa111", patch_of(SECOND, THIRD, tmp_path), "END is 1 <b>[x](http://y)</b>"),
    ]
    return folder, kept


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tampered(export, sealed=True, **changes):
    """An export with files changed (None: removed); `sealed`: its manifest knows."""
    for name, data in changes.items():
        if data is None:
            (export / name).unlink()
        else:
            (export / name).parent.mkdir(exist_ok=True)
            (export / name).write_bytes(data)
    if sealed:
        files = {name: data for name, data in contents(export).items() if name != "MANIFEST.json"}
        manifest = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        }
        storage.write_json(export / "MANIFEST.json", {"format": bundle.FORMAT, "files": manifest})
    return export


def refused(source, home, match):
    before = contents(home) if home.exists() else {}
    with pytest.raises(LabError, match=match):
        exchange.import_session(source, home, say=print)
    assert (contents(home) if home.exists() else {}) == before


def json_with(export, name, **changes):
    content = json.loads((export / name).read_text())
    content.update(changes)
    return json.dumps(content).encode()
