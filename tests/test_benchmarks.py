"""The benchmarks follow the code that they measure: each can be imported, and its edits of train.py still apply."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# In one process, as most of the time goes into importing the frameworks.
HELP = """
import runpy, sys, traceback
failed, names = [], sys.argv[1:]
for name in names:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        failed += [name] if end.code else []
    except ModuleNotFoundError as error:
        failed += [] if error.name in ("torch", "mlx") else [f"{name}: {error}"]
    except Exception as error:
        traceback.print_exc()
        failed.append(name)
sys.exit(", ".join(failed) or 0)
"""
EDITS = """
import disturbed, findings, session
text = (session.ROOT / "train.py").read_text(encoding="utf-8")
once = [old for _, _, old, _ in session.EDITS]
once += [old for edits in disturbed.EDITS.values() if isinstance(edits, list) for old, _ in edits]
gone = [old for old in once if text.count(old) != 1]
gone += [said for said, where, what in findings.CHANGES if findings.edited(text, where, what) in (None, text)]
sys.exit(str(gone) if gone else 0)
"""
STEPS = """
import math, steps
said = {
    "Halve DEVICE_BATCH_SIZE to increase gradient steps": None,
    "Longer rows; the TOTAL_BATCH_SIZE stays, half the rows per step": None,
    "Increase MATRIX_LR from 0.04 to 0.06 with the existing half-batch": ("MATRIX_LR", 1.5),
    "set MATRIX_LR from 0.001 to 5e-4": ("MATRIX_LR", 2),
    "z-loss with 0.6 embedding LR from 1e-4 to 3e-4": None,
    "Halve TOTAL_BATCH_SIZE for more steps": ("TOTAL_BATCH_SIZE", 2),
    "halve batch 524K to 262K": ("TOTAL_BATCH_SIZE", 2),
}
for words, meant in said.items():
    read = steps.step(words)
    same = read and meant and read[0] == meant[0] and math.isclose(read[1], math.log(meant[1]))
    if not (same if meant else read is None):
        sys.exit(f"{words}: {read}")
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}", *arguments], cwd=BENCHMARKS, capture_output=True, text=True
    )


def test_every_benchmark_shows_its_help():
    names = sorted(path.name for path in BENCHMARKS.glob("*.py"))
    done = python(HELP, *names)
    assert done.returncode == 0, done.stderr
    without = {"apart.py", "peers.py"}  # these are imported by others
    assert done.stdout.count("usage: ") == len(set(names) - without)


def test_the_edits_of_benchmarks_apply_to_train_py():
    done = python(EDITS)
    assert done.returncode == 0, done.stderr


def test_the_words_of_ledgers_are_read_as_they_are_meant():
    done = python(STEPS)
    assert done.returncode == 0, done.stderr
