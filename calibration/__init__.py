"""What this device is and can do, and the defaults of `train.py` scaled to it.

    python -m calibration             measures, and writes a profile under AUTORESEARCH_HOME/profiles
    python -m calibration --quick     the same in a minute, roughly
    python -m calibration show        prints it; --json for machines

`defaults()` is what `train.py` reads. Nothing here imports a framework: what is measured goes through `backends`, and
`train.py` itself is tried as a subprocess.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import backends
from backends.interface import Calibrated
from calibration import profile, rule


@dataclass(frozen=True)
class Defaults(rule.Settings):
    """Settings for `train.py`.

    Attributes:
        calibrated: for `backends.load`; None where the backend has to find out for itself.
        notes: for the run's log: where these come from.
    """

    calibrated: Calibrated | None = None
    notes: tuple[str, ...] = ()


def defaults() -> Defaults:
    """Those of the profile that `AUTORESEARCH_PROFILE` names, else of this device's; safe ones where there is none.

    A profile made with other versions of the framework still gives sizes, and is called stale; precision and attention
    are then tried anew.

    Raises:
        ProfileError: the profile can't be read, is impossible or another device's; it says what to do.
    """
    hardware = backends.identify()
    named = os.environ.get("AUTORESEARCH_PROFILE")
    path = Path(named) if named else profile.path_of(hardware)
    if not named and not path.exists():
        return Defaults(
            **vars(rule.SAFE),
            notes=(
                "calibration has not run on this device: these are safe defaults, far from what it can do. Run: "
                "python -m calibration",
            ),
        )
    found = profile.read(path, hardware)
    settings = profile.settings(found)
    reasons = profile.stale(found, hardware)
    if reasons:
        return Defaults(
            **vars(settings),
            notes=(f"profile {path} is stale: {'; '.join(reasons)}. Its sizes are used; run: python -m calibration",),
        )
    return Defaults(
        **vars(settings),
        calibrated=profile.calibrated(found),
        notes=(f"profile {profile.tag(found)} of {found['made']}",),
    )
