"""The console command `autoresearch`: `python -m lab` of the checkout that the current folder is in."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"autoresearch {version('autoresearch')}")
        return 0
    here = Path.cwd()
    for folder in (here, *here.parents):
        program = folder / "lab" / "__main__.py"
        if program.is_file() and (folder / "train.py").is_file():
            command = [sys.executable, str(program), *arguments]
            if os.name == "nt":  # where exec would return to the shell at once
                return subprocess.call(command)
            os.execv(sys.executable, command)
    print(
        f"{here} is not in a checkout of autoresearch: change to its folder, and run the command again", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
