"""The demo (`make demo`): a session with one experiment, from data to report, in minutes and in a few lines.

It trains on the Python standard library's own source, for 40 s in place of 300, uncompiled, and makes one baseline run
in place of three. It shows how a session goes; it is too short to tell whether the change helps. The session's branch
is made in a clone, `.demo/clone`, so that the branch that is checked out here stays.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

import terminal

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".demo"
CLONE, LOG, REPORT = FOLDER / "clone", FOLDER / "log.txt", FOLDER / "report.html"
SETTINGS = {  # with a home of its own: what it prepares and measures roughly is not for a real night
    "AUTORESEARCH_HOME": str(FOLDER / "home"),
    "TORCH_COMPILE_DISABLE": "1",
    "AUTORESEARCH_DATA": "stdlib",
    "AUTORESEARCH_BUDGET": "40",
}
CHANGE, BEFORE, AFTER = "a longer cooldown", "WARMDOWN_RATIO = 0.5", "WARMDOWN_RATIO = 0.7"
WIDTH = 44  # columns of the picture
BUSY = 20  # percent of the CPU in other programs that the demo tells of


def main() -> int:
    terminal.spell_what_is_missing()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    print(
        "This is a small run of autoresearch. It measures this machine, trains a tiny language model for 40 s "
        "without\nand for 40 s with one change, and decides whether the change is kept. It takes about five "
        f"minutes. The log is\n{LOG}\n"
    )
    busy_before = psutil.cpu_percent(interval=1.0)  # now and at the end nothing of the demo runs
    if busy_before >= BUSY:
        print(f"Other programs take {busy_before:.0f}% of the CPU, so it will take longer.\n")
    began, environment = time.time(), os.environ | SETTINGS
    tag = time.strftime("demo-%Y%m%d-%H%M%S")
    clone = "git clone --quiet . .demo/clone && git -C .demo/clone checkout --quiet -B demo"
    lab = [sys.executable, "-m", "lab"]
    start = [*lab, "start", tag, "--baseline-runs", "1", "--unsandboxed", "--wait", "1200"]
    run = [*lab, "run", "-m", CHANGE, "--wait", "1200"]
    report = [*lab, "report", "--out", str(REPORT)]
    data = [sys.executable, "prepare.py", "--dataset", "stdlib"]
    try:
        done = (
            step("prepare data: the standard library's source", data, 30, env=environment)
            and step("measure this machine", [sys.executable, "-m", "calibration", "--quick"], 45, env=environment)
            and step("make a clone to work in", ["sh", "-c", clone], 1)
            and step("train the baseline", start, 90, cwd=CLONE, env=environment)
            and edit(CLONE / "train.py")
            and step(f"train with {CHANGE}", run, 80, cwd=CLONE, env=environment)
            and step("write the report", report, 5, cwd=CLONE, env=environment)
        )
    except KeyboardInterrupt:
        print("\nInterrupted. A run that has started ends by itself within two minutes.")
        return 130
    if not done:
        return 1
    print("", *picture(asked("log", environment), asked("status", environment)["noise"]["sd"]), sep="\n")
    took = time.time() - began
    if (busy := max(busy_before, psutil.cpu_percent(interval=1.0))) >= BUSY:
        print(f"\nThe machine was busy: other programs took up to {busy:.0f}% of its CPU, and everything took longer.")
    print(f"\nIt took {took:.0f} s. The report, to open in a browser: {REPORT}")
    return 0


def step(title: str, command: list[str], expected: float, **settings) -> bool:
    """Whether the command succeeded. `expected`: seconds on two quiet cores of a CPU."""
    return terminal.step(title, command, LOG, expected, **({"cwd": HERE} | settings)) == 0


def edit(train: Path) -> bool:
    """Makes the demo's change."""
    source = train.read_text(encoding="utf-8")
    edited = re.sub(rf"(?m)^{re.escape(BEFORE)}", AFTER, source)
    if edited == source:
        print(f"  {train} has no line that begins with {BEFORE}: this needs the train.py of the repository")
        return False
    train.write_text(edited, encoding="utf-8", newline="\n")
    return True


def asked(command: str, environment: dict):
    """What a command of the lab says, as data."""
    command_line = [sys.executable, "-m", "lab", command, "--json"]
    return json.loads(
        subprocess.run(command_line, cwd=CLONE, env=environment, stdout=subprocess.PIPE, check=True).stdout
    )


def picture(experiments: list[dict], noise: float) -> list[str]:
    """What was tried and what it scored, as places on one axis.

    Args:
        experiments: those of `lab log --json`, the baseline first.
        noise: one standard deviation of a run's val_bpb. It is drawn as a line to both sides of the baseline.
    """
    scores = [e["val_bpb"] for e in experiments if e["val_bpb"] is not None]
    if not scores:
        return ["No experiment has a score."]
    low, high = min(*scores, scores[0] - noise), max(*scores, scores[0] + noise)

    def place(score: float) -> int:
        return round((score - low) / max(high - low, 1e-6) * (WIDTH - 1))

    lines = [f"{'tried':<20} {'val_bpb':>9}   {'better':<{WIDTH - 5}}worse"]
    for e in experiments:
        axis, score = ["·"] * WIDTH, "-"
        if e["val_bpb"] is not None:
            if e["kind"] == "baseline":
                first, last = place(e["val_bpb"] - noise), place(e["val_bpb"] + noise)
                axis[first : last + 1] = "─" * (last + 1 - first)
            axis[place(e["val_bpb"])], score = "●", f"{e['val_bpb']:.6f}"
        lines.append(f"{e['description'][:20]:<20} {score:>9}   {''.join(axis)}   {e['status']}")
    lines.append(f"The line shows where chance alone puts two of three runs of the baseline (±{noise:.3f}).")
    if experiments[-1]["reason"]:
        lines += textwrap.wrap(f"The verdict is {experiments[-1]['status']}: {experiments[-1]['reason']}.", 90)
    return lines


if __name__ == "__main__":
    sys.exit(main())
