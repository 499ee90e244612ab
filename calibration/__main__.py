"""The command: `python -m calibration [--quick] [--fresh] | show [--json] [PROFILE]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import backends
import terminal
from backends.interface import BackendError
from calibration import measure, profile as profiles, show


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m calibration",
        description=(
            "Measures this device, and scales train.py's defaults to it. This takes up to ten minutes. After an "
            "interruption the same command continues."
        ),
    )
    parser.add_argument("--quick", action="store_true", help="take one minute instead of ten, for a rougher profile")
    parser.add_argument("--fresh", action="store_true", help="discard the measurements of an interrupted calibration")
    commands = parser.add_subparsers(dest="command")
    shown = commands.add_parser("show", help="print the profile of this device")
    shown.add_argument("--json", action="store_true", help="print the profile as JSON")
    shown.add_argument(
        "profile",
        nargs="?",
        type=Path,
        help="a profile file, such as one in calibration/profiles (default: the profile of this device)",
    )
    options = parser.parse_args(arguments)
    terminal.spell_what_is_missing()
    try:
        return show_profile(options) if options.command else calibrate(options)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "without --fresh the command" if options.fresh else "the same command"
        print("\ninterrupted" if options.command else f"\ninterrupted; {again} continues from here", file=sys.stderr)
        return 130


def calibrate(options: argparse.Namespace) -> int:
    effort = measure.QUICK if options.quick else measure.FULL
    console = Console()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", left="")

        def progress(text: str, left: float) -> None:
            minutes = f"about {max(left, 5) / 60:.1f} min left"
            bar.update(task, description=text, left=minutes)
            if not console.is_terminal:
                console.print(f"{text} ({minutes})", highlight=False, markup=False)

        measurement = measure.Measurement(effort, progress, options.fresh)
        if measurement.results.keys() - measurement.header.keys():
            console.print("continuing an interrupted calibration (--fresh starts again)")
        profile = measurement.run()
    print(show.summary(profile))
    print(
        f"The profile is written to {measurement.path}. To see all measurements, and the reasons: python -m "
        "calibration show"
    )
    return 0


def show_profile(options: argparse.Namespace) -> int:
    if options.profile:
        path, hardware = options.profile, None
    else:
        hardware = backends.identify()
        path = profiles.chosen_path(hardware)
        if path is None:
            raise profiles.ProfileError(f"{hardware.slug} with {hardware.backend} is not calibrated; {profiles.AGAIN}")
    profile = profiles.read(path, hardware)
    try:
        print(json.dumps(profile, indent=1) if options.json else show.text(profile, hardware))
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # a run needs less of it
        raise profiles.ProfileError(f"{path} is not complete ({type(error).__name__}: {error})") from error
    return 0


if __name__ == "__main__":
    sys.exit(terminal.printed(main))
