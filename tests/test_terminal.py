"""Output where the encoding lacks characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json"


def printed(*command, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_profile_is_shown_on_any_terminal(encoding):
    text = printed("-m", "calibration", "show", str(PROFILE), encoding=encoding)
    assert ("+-" if encoding == "ascii" else "±") in text and "train.py for a few seconds" in text
    assert "varlen: does not run here (NotImplementedError" in text and "aten::" not in text


def test_what_is_missing_is_spelt():
    program = (
        "import terminal; terminal.spell_what_is_missing(); print('Zöllner 5 ± 1 °C → …', chr(0x1F600), 'ﬁ', '½ 5² µs')"
    )
    assert printed("-c", program, encoding="ascii") == "Zollner 5 +- 1  deg C -> ... ? fi ? 5? us\n"
    assert printed("-c", program, encoding="utf-8").startswith("Zöllner 5 ± 1 °C → …")


def test_a_command_that_is_interrupted_says_so_and_no_more():
    interrupt = "lambda: os.kill(os.getpid(), signal.SIGINT)"
    program = (  # a shell's background job begins with the signal ignored
        "import os, signal, sys, terminal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.exit(terminal.printed({interrupt}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
