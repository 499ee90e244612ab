"""A profile as a person wants to read it."""

from __future__ import annotations

from calibration import profile
from calibration.measure import scatter


def text(found: dict, hardware=None) -> str:
    """
    Args:
        hardware: this machine, to say whether the profile is stale here; None for another machine's profile.
    """
    machine, settings = found["machine"], found["settings"]
    lines = [
        f"{found['device']} with {found['backend']}: profile {profile.tag(found)}, {found['effort']}, "
        f"{found['made']}, took {found['seconds']:.0f} s"
    ]
    if hardware:
        lines += [f"STALE: {reason}" for reason in profile.stale(found, hardware)]
        if found["train"] != profile.baseline():
            lines.append(
                "measured with another train.py than is here now: no matter while experiments edit it; before "
                "a session that starts from this one, calibrate again"
            )
    lines += [f"WARNING: {warning}" for warning in found.get("warnings", [])]
    lines += ["", "machine"] + [
        f"  {name.replace('_', ' ')}: {_fact(name, value)}" for name, value in machine.items() if name != "unknown"
    ]
    lines += [f"  not known: {reason}" for reason in machine["unknown"]]
    lines += [f"  versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}"]

    products = found["products"]
    lines += ["", f"matrix products (median, ± half the range of repeats; {products['square']} x {products['square']})"]
    lines += [f"  {name}: {_rate(rate, 1e12, 'TFLOP/s')}" for name, rate in products["rates"].items()]
    lines += [
        f"  {settings['precision']}, {' x '.join(map(str, one['shape']))}: {_rate(one['rate'], 1e12, 'TFLOP/s')}"
        for one in found["model_products"]
    ]
    lines += [f"memory bandwidth: {_rate(found['bandwidth'], 1e9, 'GB/s')}"]

    for kind, by_name in found["attention"].items():
        lines += [
            "",
            f"attention, {'whole rows' if kind == 'full' else 'windows of half a row'}: "
            "milliseconds forward, and with its gradient",
        ]
        for name, one in by_name.items():
            mark = "*" if settings["attention"][kind] == name else " "
            lines.append(
                f" {mark} {name}: "
                + (
                    one
                    if isinstance(one, str)
                    else f"{_rate(one['forward'], 1e-3, '')}, {_rate(one['both'], 1e-3, '')}"
                )
            )
    if found.get("attention_provider"):
        lines.append(f"  fa3 is from {found['attention_provider']}")
    if found.get("kernels"):
        lines += ["", f"kernels of our own: {', '.join(found['kernels'])}"]
    lines += ["", "train.py for a few seconds", "  depth  rows  tokens/s                peak       D/N"]
    for trial in sorted(profile.trials(found), key=lambda t: (t.depth, t.rows)):
        row = f"  {trial.depth:5d} {trial.rows:5d}  "
        lines.append(
            row
            + (
                trial.failed
                if trial.failed
                else f"{_rate(trial.tokens_per_second, 1, ''):22s}  {trial.peak_memory / 1e9:5.2f} GB  "
                f"{trial.ratio:8.3g}"
            )
        )
    if found.get("cut_short"):
        lines.append(f"  {found['cut_short']}")
    lines += ["", "defaults"] + [f"  {name}: {value}" for name, value in settings.items()]
    lines += ["because"] + [f"  {reason}" for reason in found["reasons"]]
    return "\n".join(lines)


def _fact(name: str, value) -> str:
    return f"{value / 2**30:.1f} GiB" if name.endswith("memory") else str(value)


def _rate(one: dict | str, unit: float, name: str) -> str:
    if isinstance(one, str):
        return one
    digits = f"{one['median'] / unit:,.0f}" if one["median"] / unit >= 1000 else f"{one['median'] / unit:.3g}"
    return f"{digits} {name}".rstrip() + f" ± {scatter(one):.0%}"
