"""What this device is and can do, and the defaults of `train.py` scaled to it.

    python -m calibration             measures, and writes a profile under AUTORESEARCH_HOME/profiles
    python -m calibration --quick     the same in a minute, roughly
    python -m calibration show        prints it; --json for machines

`defaults()` is what `train.py` reads. Nothing here imports a framework: what is measured goes through `backends`, and
`train.py` itself is tried as a subprocess.
"""

from __future__ import annotations

from dataclasses import dataclass

import backends
from backends.interface import Calibrated
from calibration import profile as profiles, rule


@dataclass(frozen=True)
class Defaults(rule.Sizes):
    """What `train.py` takes its sizes from.

    Attributes:
        calibrated: for `backends.load`; None where the backend has to find out for itself.
        notes: for the run's log: where these come from.
    """

    calibrated: Calibrated | None = None
    notes: tuple[str, ...] = ()


def defaults() -> Defaults:
    """Defaults from the profile that `AUTORESEARCH_PROFILE` names, else from this device's; safe ones without any.

    A profile made with other versions of the framework still gives sizes, and is called stale; precision and attention
    are then tried anew.

    Raises:
        ProfileError: the profile can't be read, is impossible or another device's; it says what to do.
    """
    hardware = backends.identify()
    path = profiles.chosen_path(hardware)
    if path is None:
        return Defaults(
            **vars(rule.SAFE),
            notes=(
                "calibration has not run on this device: these are safe defaults, for a very small model. Run: "
                "python -m calibration",
            ),
        )
    profile = profiles.read(path, hardware)
    chosen = profiles.settings(profile)
    sizes = chosen.depth, chosen.device_batch_size, chosen.total_batch_size, chosen.window_pattern
    if reasons := profiles.stale(profile, hardware):
        return Defaults(
            *sizes,
            notes=(
                f"profile {path} is stale: {'; '.join(reasons)}. Its sizes are used. To measure again: python -m "
                "calibration",
            ),
        )
    return Defaults(
        *sizes,
        calibrated=profiles.calibrated(profile),
        notes=(f"profile {profiles.tag(profile)} of {profile['made']}",),
    )
