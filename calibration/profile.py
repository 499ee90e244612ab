"""Profiles: what a calibration found, as a JSON file that people and programs read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import prepare
import storage
from backends.bench import KINDS, PRECISIONS
from backends.interface import Calibrated, Hardware
from calibration.rule import Settings, Trial

FORMAT = 1
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
AGAIN = "run: python -m calibration"
WITHOUT_EFFECT = {"python", "system"}  # on what a device can do


class ProfileError(storage.Stop):
    """A profile can't be used; the reason says what to do."""


def path_of(hardware: Hardware) -> Path:
    """Where the profile of this device is kept, one for each backend."""
    return storage.home() / "profiles" / f"{hardware.slug}-{hardware.backend}.json"


def baseline(path: Path = TRAIN) -> str:
    """Tag of the `train.py` that a calibration measures and a session starts from."""
    return storage.sha256(path)[:12]


def tag(found: dict) -> str:
    """A profile's own: what results carry."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path, hardware: Hardware | None = None) -> dict:
    """A profile, checked.

    Args:
        hardware: what it has to be of.

    Raises:
        ProfileError: it is missing, cut short, of another format or device, or says what can't be.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError(f"there is no profile {path}; {AGAIN}, or unset AUTORESEARCH_PROFILE") from None
    except (ValueError, OSError) as error:
        raise ProfileError(f"{path} can't be read ({error}); delete it and {AGAIN}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ProfileError(f"{path} is not a profile of format {FORMAT}; delete it and {AGAIN}")
    if problem := impossible(found):
        raise ProfileError(f"{path} can't be true: {problem}; delete it and {AGAIN}")
    if hardware and (found["device"], found["backend"]) != (hardware.slug, hardware.backend):
        raise ProfileError(
            f"{path} is of {found['device']} with {found['backend']}, and this is {hardware.slug} with "
            f"{hardware.backend}; unset AUTORESEARCH_PROFILE and {AGAIN}"
        )
    return found


def impossible(found: dict) -> str | None:
    """What is wrong with a profile's values, or None."""
    try:
        for name in ("device", "backend", "made", "train"):
            if not (isinstance(found[name], str) and found[name]):
                return f"{name} is {found[name]!r}"
        if not isinstance(found.get("attention_provider"), (str, type(None))):
            return f"attention_provider is {found['attention_provider']!r}"
        kernels = found.get("kernels") or {}
        if not (isinstance(kernels, dict) and all(isinstance(v, int) and v >= 0 for v in kernels.values())):
            return f"kernels are {kernels!r}"
        if not isinstance(found["versions"], dict):
            return f"versions are {found['versions']!r}"
        settings = Settings(**found["settings"])
        sizes = settings.depth, settings.device_batch_size, settings.total_batch_size
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"sizes are {sizes}, and have to be positive whole numbers"
        if settings.total_batch_size % (settings.device_batch_size * prepare.MAX_SEQ_LEN):
            return (
                f"total_batch_size {settings.total_batch_size} is not a multiple of {settings.device_batch_size} "
                f"rows of {prepare.MAX_SEQ_LEN} tokens"
            )
        if not settings.window_pattern or set(settings.window_pattern) - set("SL"):
            return f"window_pattern is {settings.window_pattern!r}"
        if settings.precision not in PRECISIONS or settings.attention.keys() != KINDS.keys():
            return f"precision is {settings.precision!r}, attention {settings.attention!r}"
        square, products = found["products"]["square"], found["products"]["rates"]
        if not (isinstance(square, int) and square > 0 and isinstance(products[settings.precision], dict)):
            return f"there is no rate of products in {settings.precision}"
        if problem := _impossible_spread(found, ""):
            return problem
        for kind, name in settings.attention.items() if "attention" in found else ():
            if not isinstance(found["attention"][kind][name], dict):
                return f"attention {name} is chosen, and was {found['attention'][kind][name]}"
        for trial in trials(found):
            if not trial.failed and min(trial.flops_per_token, trial.peak_memory, trial.free_memory, trial.rate) <= 0:
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


def stale(found: dict, hardware: Hardware, train: str | None = None) -> list[str]:
    """What has changed since a profile was made, by name.

    Args:
        train: `baseline` of the train.py that a session starts from; None while experiments edit it.
    """
    before, now = found["versions"], hardware.versions
    reasons = [
        f"made with {name} {before.get(name)}, here is {now.get(name)}"
        for name in sorted({*before, *now})
        if name not in WITHOUT_EFFECT and before.get(name) != now.get(name)
    ]
    if train and found["train"] != train:
        reasons.append(f"made for another train.py ({found['train']}, here is {train})")
    return reasons


def settings(found: dict) -> Settings:
    return Settings(**found["settings"])


def calibrated(found: dict) -> Calibrated:
    """What a backend takes from a profile instead of trying it."""
    chosen, products = settings(found), found["products"]
    rate = products["rates"][chosen.precision]["median"]
    return Calibrated(
        tag(found),
        chosen.precision,
        chosen.attention,
        rate,
        products["square"],
        found.get("attention_provider"),
        found.get("kernels"),
    )


def trials(found: dict) -> list[Trial]:
    return [Trial(**trial) for trial in found["trials"]]


def as_json(trial: Trial) -> dict:
    return {name: value for name, value in asdict(trial).items() if value is not None}
