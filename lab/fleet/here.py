"""The devices of this machine, as workers: what they are called, how runs find them, whether they are what a session is
for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import storage
from backends import machine
from backends.interface import Hardware
from calibration import profile as profiles
from lab.errors import LabError
from lab.session import events

PROJECT = Path(__file__).resolve().parents[2]
BAND = 0.1  # share by which a device's tokens/s may differ from its tag's; or as much as its own measurements do
TO_IDENTIFY, TO_CALIBRATE = 300.0, 1200.0  # seconds
IDENTIFY = """import json, backends
print(json.dumps(vars(backends.identify())))"""


def devices(asked: str, kind: str = "") -> list[str]:
    """Names of devices: "all", or a list such as "0,1", "cuda:0" or "cpu,cpu".

    Args:
        kind: of the session's device, "cuda" say; of "all", those that can be used.

    Raises:
        LabError: there is no such device.
    """
    count = gpus()
    if asked == "all":
        if kind in ("", "cuda") and count:
            return [f"cuda:{index}" for index in range(count)]
        return [kind or "cpu"]
    found = []
    for name in map(str.strip, asked.split(",")):
        if gpu := re.fullmatch(r"(?:cuda:)?(\d+)", name, re.ASCII):
            name = f"cuda:{int(gpu[1])}"
            if int(gpu[1]) >= count:
                raise LabError(f"there is no GPU {int(gpu[1])} here: {count} can be seen, numbered from 0")
            if name in found:
                raise LabError(f"{name} is named twice: a GPU makes one run at a time")
        elif not re.fullmatch(r"(cpu|mps|metal)(:\d+)?", name, re.ASCII):  # cpu:1 is what the second of cpu,cpu becomes
            raise LabError(f"{name!r} is not a device: give all, numbers of GPUs such as 0,1, or cpu, mps, metal")
        again = sum(one.partition(":")[0] == name for one in found)
        found.append(f"{name}:{again}" if again else name)
    return found


def gpus() -> int:
    """How many NVIDIA GPUs CUDA would see here."""
    visible = machine.visible_gpus()
    if visible or "CUDA_VISIBLE_DEVICES" in os.environ:
        return len(visible)
    with machine.nvml() as library:
        return library.nvmlDeviceGetCount() if library else 0


def settings_of(device: str) -> dict[str, str]:
    """The variables by which runs find a device."""
    if not device.startswith("cuda:"):
        return {}
    return {"CUDA_VISIBLE_DEVICES": machine.gpu_name(int(device[5:])), "AUTORESEARCH_DEVICE": ""}


def name_of(device: str, local: bool, called: str | None = None) -> str:
    """What a device is called in a fleet: other machines' with a few letters of their own, which tell nobody whose."""
    if local:
        return device
    return f"{called or hashlib.sha256(machine.host().encode()).hexdigest()[:4]}/{device}"


def unlike(facts: dict, settings: dict[str, str]) -> str | None:
    """Why runs of this device can't be compared with those of a session, if so: another device, other versions, another
    source of attention, or another speed than its tag's.

    Args:
        facts: of the session, as of Worker.do_prepare.
    """
    environment = {**os.environ, **settings, "AUTORESEARCH_BACKEND": facts["backend"]}
    hardware = _identified(environment)
    if hardware["slug"] != facts["device"]:
        return f"this device is {hardware['slug']}, and the session is for {facts['device']}"
    own, wanted = hardware["versions"], facts["versions"]
    if others := profiles.other_versions(own, wanted):
        told = (f"{name} {own.get(name)} instead of {wanted.get(name)}" for name in others)
        return f"other versions are installed here: {', '.join(told)}"
    profile = _calibrated(hardware, environment)
    here, there = (known.get("attention_provider") or "the framework" for known in (profile, facts["profile"]))
    if here != there:
        return f"attention comes from {here} here, and from {there} there"
    return outside_of_band(profile, facts["profile"])


def describe(path: Path) -> None:
    """Writes what a head elsewhere needs to begin a session for this device: what it is, and its calibration, which is
    made if it is not there. LabError if the file exists, or the device can't be used."""
    if os.path.lexists(path):
        raise LabError(f"{path} exists; remove it, or give another name")
    hardware = _identified(dict(os.environ))
    storage.write_json(path, {"hardware": hardware, "profile": _calibrated(hardware, dict(os.environ))})


def described(path: Path) -> dict:
    """What `describe` has written. LabError if it is nothing of that kind."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        hardware, profile = known["hardware"], known["profile"]
        alike = all(profile[name] == hardware[own] for name, own in {"device": "slug", "backend": "backend"}.items())
        if not alike or not events.is_tag(hardware["slug"]):
            raise ValueError("its profile was measured on another device")
        if problem := profiles.impossible(profile):
            raise ValueError(problem)
        return {"hardware": hardware, "profile": profile}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(
            f"{path} does not describe a device ({error}); make the file on the other machine: python -m lab join "
            "--describe FILE"
        ) from None


def _identified(environment: dict[str, str]) -> dict:
    """The device that runs would be on. LabError if it can't be used."""
    return json.loads(_asked(environment, TO_IDENTIFY, "-c", IDENTIFY).splitlines()[-1])


def _calibrated(hardware: dict, environment: dict[str, str]) -> dict:
    """This machine's profile of a device; made if there is none, or other versions that matter to it are installed now.
    LabError if that can't be."""
    path = profiles.path_of(Hardware(**hardware))
    profile = storage.read_json(path)
    if profile is None or profiles.other_versions(profile["versions"], hardware["versions"]):
        _asked(environment, TO_CALIBRATE, "-m", "calibration")
        profile = storage.read_json(path)
    if profile is None:
        raise LabError("this device could not be measured: python -m calibration says why")
    return profile


def outside_of_band(own: dict, others: dict) -> str | None:
    """Why a device is not as fast as its tag's: tokens/s of the same trial, in two profiles."""

    def trials(profile: dict) -> dict[tuple, dict]:
        names = ("depth", "rows", "total_batch_size", "window_pattern", "precision")
        done = [trial for trial in profile.get("trials", []) if "failed" not in trial]
        return {tuple(trial[name] for name in names): trial["tokens_per_second"] for trial in done}

    mine, theirs = trials(own), trials(others)
    common = mine.keys() & theirs.keys()
    if not common:
        return "the sizes at which this device's speed was measured are not those of the session's"
    key = max(common, key=lambda key: theirs[key]["median"] * key[0])
    allowed = max(BAND, *(math.log(rate["high"] / rate["low"]) / 2 for rate in (mine[key], theirs[key])))
    here, there = mine[key]["median"], theirs[key]["median"]
    if abs(math.log(here / there)) <= allowed:
        return None
    return (
        f"it makes {here:,.0f} tokens/s, and the session's device makes {there:,.0f}; they may differ by {allowed:.0%}"
    )


def _asked(environment: dict[str, str], seconds: float, *arguments: str) -> str:
    """What Python prints. LabError with its last line if it fails."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise LabError(f"python {' '.join(arguments[:2])} took more than {seconds:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise LabError(f"this device can't be used: {last}")
    return done.stdout
