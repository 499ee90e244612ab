"""Profiles: what a calibration measured and chose, as a JSON file that people and programs read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import prepare
import storage
from backends.bench import KINDS, PRECISIONS
from backends.interface import Calibrated, Hardware
from calibration.rule import Completed, Failed, Outcome, Settings

FORMAT = 1
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
AGAIN = "run: python -m calibration"
WITHOUT_EFFECT = {"python", "system"}  # on what a device can do


class ProfileError(storage.Stop):
    """A profile can't be used; the reason says what to do."""


def path_of(hardware: Hardware) -> Path:
    """Where the profile of this device is kept, one for each backend."""
    return storage.home() / "profiles" / f"{hardware.slug}-{hardware.backend}.json"


def chosen_path(hardware: Hardware) -> Path | None:
    """The profile that `AUTORESEARCH_PROFILE` names, whether it is there or not, else this device's; None if it has
    none."""
    if named := os.environ.get("AUTORESEARCH_PROFILE"):
        return Path(named)
    path = path_of(hardware)
    return path if os.path.exists(path) else None


def baseline(path: Path = TRAIN) -> str:
    """Tag of the `train.py` that a calibration measures and a session starts from."""
    return storage.sha256(path)[:12]


def tag(profile: dict) -> str:
    """The profile's digest, which results carry."""
    return hashlib.sha256(json.dumps(profile, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path, hardware: Hardware | None = None) -> dict:
    """A profile, checked.

    Args:
        hardware: the device that it must have been made on; None for any.

    Raises:
        ProfileError: it is missing, cut short, of another format or device, or has impossible values.
    """
    if hardware is None:
        advice = "name a file that python -m calibration wrote"
    elif path == path_of(hardware):
        advice = f"delete it and {AGAIN}"
    else:
        advice = f"unset AUTORESEARCH_PROFILE and {AGAIN}"
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError(f"there is no profile {path}; {advice.removeprefix('delete it and ')}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ProfileError(f"{path} can't be read ({error}); {advice}") from error
    if not isinstance(profile, dict) or profile.get("format") != FORMAT:
        raise ProfileError(f"{path} is not a profile of format {FORMAT}; {advice}")
    if problem := impossible(profile):
        raise ProfileError(f"{path} can't be right: {problem}; {advice}")
    if hardware and (profile["device"], profile["backend"]) != (hardware.slug, hardware.backend):
        raise ProfileError(
            f"{path} was measured on {profile['device']} with {profile['backend']}, and this is {hardware.slug} with "
            f"{hardware.backend}; unset AUTORESEARCH_PROFILE and {AGAIN}"
        )
    return profile


def impossible(profile: dict) -> str | None:
    """What is wrong with a profile's values, or None."""
    try:
        for name in ("device", "backend", "made", "train"):
            if not (isinstance(profile[name], str) and profile[name]):
                return f"{name} is {profile[name]!r}"
        if not isinstance(profile.get("attention_provider"), (str, type(None))):
            return f"attention_provider is {profile['attention_provider']!r}"
        probe = profile.get("probe")
        if probe and not all(0 < probe[name] < math.inf for name in ("probe", "clock_rate")):
            return f"its probe is {probe}"
        kernels = profile.get("kernels") or {}
        if not (isinstance(kernels, dict) and all(isinstance(v, int) and v >= 0 for v in kernels.values())):
            return f"kernels are {kernels!r}"
        if not isinstance(profile["versions"], dict):
            return f"versions are {profile['versions']!r}"
        settings = Settings(**profile["settings"])
        sizes = settings.depth, settings.device_batch_size, settings.total_batch_size
        if not all(type(size) is int and size > 0 for size in sizes):
            return f"sizes are {sizes}, and have to be positive whole numbers"
        if settings.total_batch_size % (settings.device_batch_size * prepare.MAX_SEQ_LEN):
            return (
                f"total_batch_size {settings.total_batch_size} is not a multiple of {settings.device_batch_size} "
                f"rows of {prepare.MAX_SEQ_LEN} tokens"
            )
        if not settings.window_pattern or set(settings.window_pattern) - set("SL"):
            return f"window_pattern is {settings.window_pattern!r}"
        named = all(isinstance(name, str) for name in settings.attention.values())
        if settings.precision not in PRECISIONS or settings.attention.keys() != KINDS.keys() or not named:
            return f"precision is {settings.precision!r}, attention {settings.attention!r}"
        square, products = profile["products"]["square"], profile["products"]["rates"]
        if not (isinstance(square, int) and square > 0 and "median" in products[settings.precision]):
            return f"it has no rate of matrix products in {settings.precision}"
        if problem := _impossible_spread(profile, ""):
            return problem
        for kind, name in settings.attention.items() if "attention" in profile else ():
            if not isinstance(profile["attention"][kind][name], dict):
                return f"attention {name} is chosen, and was {profile['attention'][kind][name]}"
        for trial in completed(profile):
            sizes = trial.depth, trial.flops_per_token, trial.peak_memory, trial.free_memory, trial.rate
            if not all(0 < size < math.inf for size in sizes):
                return f"a trial at depth {trial.depth} has {trial}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _impossible_spread(part, where: str) -> str | None:
    """The first measurement anywhere in a profile that is not positive, finite and between its bounds."""
    if isinstance(part, dict):
        if "median" in part:
            values = [part["low"], part["median"], part["high"]]
            sound = all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values) and values == sorted(values)
            return None if sound else f"{where[1:]} is {part}"
        part = part.items()
    elif isinstance(part, list):
        part = enumerate(part)
    else:
        return None
    return next((problem for name, inner in part if (problem := _impossible_spread(inner, f"{where}.{name}"))), None)


def other_versions(before: dict, now: dict) -> list[str]:
    """Names of what has another version, if that may matter for what a device can do."""
    names = sorted({*before, *now} - WITHOUT_EFFECT)
    return [name for name in names if str(before.get(name)) != str(now.get(name))]


def stale(profile: dict, hardware: Hardware, train: str | None = None) -> list[str]:
    """What has changed since a profile was made, by name.

    Args:
        train: `baseline` of the train.py that a session starts from; None while experiments edit it.
    """
    before, now = profile["versions"], hardware.versions
    others = other_versions(before, now)
    reasons = [f"made with {name} {before.get(name)}, here is {now.get(name)}" for name in others]
    if train and profile["train"] != train:
        reasons.append(f"made for another train.py ({profile['train']}, here is {train})")
    return reasons


def settings(profile: dict) -> Settings:
    return Settings(**profile["settings"])


def calibrated(profile: dict) -> Calibrated:
    """What a backend takes from a profile instead of trying it."""
    chosen, products = settings(profile), profile["products"]
    rate = products["rates"][chosen.precision]["median"]
    return Calibrated(
        tag(profile),
        chosen.precision,
        chosen.attention,
        rate,
        products["square"],
        profile.get("attention_provider"),
        profile.get("kernels"),
    )


def trials(profile: dict) -> list[Outcome]:
    return [Failed(**trial) if "failed" in trial else Completed(**trial) for trial in profile["trials"]]


def completed(profile: dict) -> list[Completed]:
    return [trial for trial in trials(profile) if isinstance(trial, Completed)]
