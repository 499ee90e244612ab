"""A profile as a person wants to read it."""

from __future__ import annotations

import re

from backends.interface import Hardware
from calibration import profile as profiles
from calibration.measure import scatter
from calibration.rule import Completed, Spread


def summary(profile: dict) -> str:
    """What was chosen, in a few lines."""
    settings = profile["settings"]
    chosen = [f"  {name}: {value}" for name, value in settings.items()]
    warnings = [f"WARNING: {warning}" for warning in profile.get("warnings", [])]
    return "\n".join([f"{profile['device']} with {profile['backend']}; train.py's defaults here:", *chosen, *warnings])


def text(profile: dict, hardware: Hardware | None = None) -> str:
    """The profile in lines of text.

    Args:
        hardware: this machine, to say whether the profile is stale here; None for another machine's profile.
    """
    machine, settings = profile["machine"], profile["settings"]
    lines = [
        f"{profile['device']} with {profile['backend']}: profile {profiles.tag(profile)}, {profile['effort']}, "
        f"{profile['made']}, took {profile['seconds']:.0f} s"
    ]
    if hardware:
        lines += [f"STALE: {reason}" for reason in profiles.stale(profile, hardware)]
        if profile["train"] != profiles.baseline():
            lines.append(
                "measured with a different train.py. This is normal while experiments edit it; calibrate again "
                "before a session that starts from the present one"
            )
    lines += [f"WARNING: {warning}" for warning in profile.get("warnings", [])]
    lines += ["", "machine"] + [
        f"  {name.replace('_', ' ')}: {_fact(name, value)}" for name, value in machine.items() if name != "unknown"
    ]
    lines += [f"  not known: {reason}" for reason in machine["unknown"]]
    lines += [f"  versions: {', '.join(f'{name} {version}' for name, version in profile['versions'].items())}"]

    products = profile["products"]
    lines += ["", f"matrix products (median, ± half the range of repeats; {products['square']} x {products['square']})"]
    lines += [f"  {name}: {_rate(rate, 1e12, 'TFLOP/s')}" for name, rate in products["rates"].items()]
    lines += [
        f"  {settings['precision']}, {' x '.join(map(str, row['shape']))}: {_rate(row['rate'], 1e12, 'TFLOP/s')}"
        for row in profile["model_products"]
    ]
    lines += [f"memory bandwidth: {_rate(profile['bandwidth'], 1e9, 'GB/s')}"]

    for kind, by_name in profile["attention"].items():
        lines += [
            "",
            f"attention, {'whole rows' if kind == 'full' else 'windows of half a row'}: "
            "milliseconds forward, and with its gradient",
        ]
        for name, times in by_name.items():
            mark = "*" if settings["attention"][kind] == name else " "
            if not isinstance(times, str):
                times = f"{_rate(times['forward'], 1e-3, '')}, {_rate(times['both'], 1e-3, '')}"
            elif error := re.match(r"(\w+Error): ", times):  # its message may be long, and is no news here
                times = f"does not run here ({error[1]}; --json has the message)"
            lines.append(f" {mark} {name}: {times}")
    if profile.get("attention_provider"):
        lines.append(f"  fa3 is from {profile['attention_provider']}")
    if profile.get("kernels"):
        lines += ["", f"kernels of this project: {', '.join(profile['kernels'])}"]
    lines += ["", "train.py for a few seconds", "  depth  rows  tokens/s                peak       D/N"]
    for trial in sorted(profiles.trials(profile), key=lambda t: (t.depth, t.rows)):
        if isinstance(trial, Completed):
            rate = _rate(trial.tokens_per_second, 1, "")
            result = f"{rate:22s}  {trial.peak_memory / 1e9:5.2f} GB  {trial.ratio:8.3g}"
        else:
            result = trial.failed
        lines.append(f"  {trial.depth:5d} {trial.rows:5d}  {result}")
    if profile.get("cut_short"):
        lines.append(f"  {profile['cut_short']}")
    lines += ["", "defaults"] + [f"  {name}: {value}" for name, value in settings.items()]
    lines += ["because"] + [f"  {reason}" for reason in profile["reasons"]]
    return "\n".join(lines)


def _fact(name: str, value) -> str:
    return f"{value / 2**30:.1f} GiB" if name.endswith("memory") else str(value)


def _rate(spread: Spread | str, unit: float, name: str) -> str:
    """A measurement in that unit; or, where there is none, the reason."""
    if isinstance(spread, str):
        return spread
    median = spread["median"] / unit
    digits = f"{median:,.0f}" if median >= 1000 else f"{median:.3g}"
    return f"{digits} {name}".rstrip() + f" ± {scatter(spread):.0%}"
