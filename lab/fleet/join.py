"""`python -m lab join`: this machine's devices work for a head, until they are given back."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

import storage
from lab.errors import LabError
from lab.fleet import here
from lab.fleet.invitation import Invitation
from lab.fleet.wire import serve
from lab.fleet.worker import Worker
from lab.run import processes

PATIENCE = 60.0  # seconds for a head of this machine, which has started a worker, to answer for the first time
GIVEN_BACK, OVER = "it was given back", "the night is over"  # why a worker leaves
PROGRAM = Path(__file__).resolve().parents[1] / "__main__.py"


def join(path: Path, asked: str, called: str | None, local: bool) -> int:
    """Works for the head that an invitation is of; returns once all devices are given back.

    Args:
        asked: devices, as of here.devices. called: what this machine is called in the fleet. local: the head is this
            machine's own, and has started this process.

    Raises:
        LabError: the head refuses, or is refused; the reason says why.
    """
    invitation = Invitation.read(path)
    devices = [asked] if local else here.devices(asked)
    if len(devices) > 1:
        return _each(path, devices, called)
    device = devices[0]
    expected = {"judge": invitation.judge, "data": invitation.data} if invitation.judge and invitation.data else None
    if not local and expected is None:
        raise LabError(f"{path} does not name the judge and the dataset: it is for workers that the head starts itself")
    worker = Worker(here.name_of(device, local, called), device, here.settings_of(device), expected, local)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _give_back(worker))
    if not local:  # those of the head's own night end with it
        processes.note(worker.root / "worker.json", os.getpid())
    print(f"{worker.name} works for {invitation.session} at {invitation.address}", flush=True)
    try:
        # A head elsewhere listens once its night has something to run, and the night may begin hours later.
        patience = PATIENCE if local else math.inf
        serve(invitation.address, invitation.keys, worker, patience, lambda text: print(text, flush=True))
    finally:
        worker.do_stop("stopped")
        processes.end(processes.below)  # also a calibration
        (worker.root / "worker.json").unlink(missing_ok=True)
    print(f"{worker.name} has left: {worker.leaving}", flush=True)
    return 0 if worker.leaving in (GIVEN_BACK, OVER) or local else 1


def _give_back(worker: Worker) -> None:
    if worker.leaving:
        raise KeyboardInterrupt
    worker.do_stop("stopped")
    worker.leaving = GIVEN_BACK


def _each(path: Path, devices: list[str], called: str | None) -> int:
    """A process for each device."""
    more = ["--name", called] if called else []
    command = [sys.executable, str(PROGRAM), "join", str(path), *more, "--devices"]
    signal.signal(signal.SIGTERM, lambda *_: leave())
    workers = [subprocess.Popen([*command, device]) for device in devices]
    while True:
        try:
            return max(abs(worker.wait()) for worker in workers)  # below 0: killed
        except KeyboardInterrupt:  # which they have got, too
            continue


def leave() -> list[str]:
    """Gives this machine's devices back: those who work for a head end. Gives their names."""
    found = []
    for path in sorted((storage.home() / "fleet").glob("*/worker.json")):
        if process := processes.noted(path):
            with suppress(psutil.Error):  # it has just ended
                process.send_signal(signal.SIGTERM)
                found.append(path.parent.name)
    return found
