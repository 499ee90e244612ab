"""One command for a sceptic: a change of a session, alone, against its parent, in a clean clone with new seeds.

The clone is of the session's repository at the commit that it began with if it is this machine's own, else of the
repository that this is called in, as it is.
Its train.py becomes the change's parent, as the session's diffs make it, and the baseline of a session; the change is
then confirmed against it: in turn, on seeds that selected nothing, each run's weights scored on held-out rows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import storage
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.session.events import Verdict
from lab.session.record import Record
from lab.session.repository import SETTINGS, Repository, here
from lab.share import sources
from lab.untrusted import one_line
from lab.verdict.gate import MARGIN

HELD = "held_out_bpb"


def reproduce(record: Record, number: int, pairs: int, say: Callable[[str], None]) -> dict:
    """Runs a change and its parent.

    Args:
        say: is told what is done.

    Returns:
        The claim, the gain now, each (gain, low, high) in bits per byte, above 0 is better, and whether it "stands":
        True, False, or None where the runs don't tell, or nothing was claimed.

    Raises:
        LabError: there is no such change, or it can't be run here.
    """
    experiment, repository = record.state.experiments.get(number), here()
    if experiment is None or experiment.onto is None or experiment.decided is None:
        raise LabError(f"{record.name} has no decided change {number}. python -m lab log lists the changes")
    if pairs < 2:
        raise LabError("--pairs has to be 2 at least: one pair says nothing of chance")
    if repository is None:
        raise LabError("run this in a clone of the project: it is cloned again from there")
    before, after = record.train(experiment.onto), record.train(number)
    if before == after:
        raise LabError(f"experiment {number} of {record.name} changes nothing of {TRAIN}")
    session = sources.own(record.name)
    environment = os.environ | (session.local.settings if session else {"AUTORESEARCH_DATA": record.started.dataset})
    environment["AUTORESEARCH_BUDGET"] = f"{record.started.budget:g}"
    environment.pop("AUTORESEARCH_PROFILE", None)  # this device's own
    tag = f"reproduce-{record.started.tag}"[:40] + f"-{number}"
    folder = storage.home() / "reproduced" / record.started.device / tag
    if folder.exists():
        sessions = storage.home() / "sessions" / "*" / tag
        raise LabError(
            f"{folder} exists from an earlier call. To do it again, remove it and {sessions}, if there is one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    commit = session.local.commit if session else repository.git("rev-parse", "HEAD")
    cloned = session.local.repository if session else str(repository.path)

    def step(*command: str) -> None:
        try:
            done = subprocess.run(
                command, cwd=folder if folder.exists() else None, env=environment, stdout=subprocess.PIPE
            )
        except KeyboardInterrupt:
            raise LabError(
                f"interrupted; what had begun goes on in a session of its own: cd {folder} && python -m lab wait"
            ) from None
        if done.returncode:
            raise LabError(f"{' '.join(command[:4])} failed, in {folder}: its message is above")

    lab, author = (sys.executable, "-m", "lab"), ("user.name=lab", "user.email=lab@localhost")
    settings = [part for setting in (*SETTINGS, *author) for part in ("-c", setting)]
    say(f"a clean clone at {commit[:7]} in {folder}")
    try:
        step("git", "clone", "--quiet", "--no-checkout", cloned, str(folder))
        step("git", "checkout", "--quiet", "-B", "reproduce", commit)
        (folder / TRAIN).write_bytes(before)
        step("git", *settings, "commit", "--quiet", "--allow-empty", "-am", "parent")
    except LabError:
        shutil.rmtree(folder, ignore_errors=True)  # nothing was run there
        raise
    say(f"the parent of experiment {number}, as a baseline")
    unsandboxed = ["--unsandboxed"] * (not record.started.sandbox)
    try:
        step(*lab, "start", tag, "--baseline-runs", "1", "--wait", "1e9", *unsandboxed)
    except LabError:
        if not any(storage.home().glob(f"sessions/*/{tag}/session.json")):  # none began: the device was busy, say
            shutil.rmtree(folder, ignore_errors=True)
        raise
    change = folder.with_suffix(".py")
    change.write_bytes(after)
    say(f"the change against it, {pairs} pairs of runs: {one_line(experiment.description, 80)}")
    step(*lab, "confirm", "--file", str(change), "--pairs", str(pairs), "--wait", "1e9")
    change.unlink()
    branch = Repository(folder).some_branch()
    found = sources.read(branch).state.last
    return {"change": f"{record.name} #{number}", "session": branch, **compared(experiment.verdict, found.verdict)}


def compared(claimed: Verdict, found: Verdict) -> dict:
    """What was claimed, what was found, and whether that stands: that a change is better, or that one that was kept as
    simpler loses less than the gate's margin."""
    evidence = claimed.evidence
    claim = (evidence.gain, evidence.low, evidence.high) if evidence and evidence.error else None
    gain, stands, why = found.gains and found.gains[HELD], None, ""
    if claimed.status != "keep":
        why = "it was not kept, so nothing was claimed of it"
    elif gain:
        least = -MARGIN if evidence and evidence.simpler else 0.0
        stands = True if gain[1] > least else False if gain[2] < least else None
    return {"claimed": claim, "found": gain, "stands": stands, "why": why if gain else found.said}


def told(found: dict) -> str:
    """The result in words."""
    words = {True: "stands", False: "does not stand: it goes the other way", None: "can't be told from these runs"}
    lines = [f"{found['change']}: the claim {words[found['stands']]}"]
    if found["found"] and found["why"]:
        lines = [f"{found['change']}: {found['why']}"]
    for name in ("claimed", "found"):
        if found[name]:
            was = "estimated" if name == "claimed" and found["why"] else name
            lines.append(
                "  {:<9} {:+.6f} bits per byte better (90 % interval {:+.6f} to {:+.6f})".format(was, *found[name])
            )
    return "\n".join([*lines, *([f"  why: {found['why']}"] if found["why"] and not found["found"] else [])])
