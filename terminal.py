"""Output for any terminal and pipe: characters that an encoding lacks are spelt, and a long step shows its progress."""

from __future__ import annotations

import codecs
import io
import os
import shlex
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

LAST_LINES = 15  # of a log, which are shown after a failure

SPELT = {
    "±": "+-",
    "×": "x",
    "°": " deg ",
    "→": "->",
    "–": "-",
    "−": "-",
    "─": "-",
    "…": "...",
    "·": ".",
    "●": "o",
    "µ": "u",
}


def spell(error: UnicodeError) -> tuple[str, int]:
    """A handler of encoding errors (`codecs.register_error`): letters lose their accents, all else becomes "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    spelt = []
    for character in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        spelt.append(SPELT.get(character) or (plain if plain.isalpha() else "?"))
    return "".join(spelt), error.end


def spell_what_is_missing() -> None:
    """Has standard output and errors use `spell`, whatever their encoding is."""
    codecs.register_error("spell", spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook stands in for it
            stream.reconfigure(errors="spell")


def printed(main: Callable[[], int | None]) -> int | None:
    """The exit status of a command. Whoever reads its output, such as head, may have read enough before its end; or
    ends the command with Ctrl-C."""
    try:
        status = main()
        if sys.stdout:  # else it was closed from the start
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def step(title: str, command: list[str], log: Path, expected: float, **settings) -> int:
    """Runs a command, and shows its title and how long it has taken.

    Args:
        log: a file that gets the command and what it prints, at its end.
        expected: seconds; the bar is nearly full when they have passed.
        settings: for subprocess.Popen.

    Returns:
        The command's exit status. After a failure the last lines of the log were printed.
    """
    from rich.console import Console  # here: everything else in this file is for commands that start in no time
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False)
    columns = TextColumn("  {task.description}"), BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[about]}")
    began = time.monotonic()
    if not console.is_terminal:
        console.print(f"  {title} (about {expected:.0f} s)", markup=False, soft_wrap=True)
    with open(log, "ab") as output, Progress(*columns, console=console, transient=True) as bar:
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        output.flush()
        task = bar.add_task(title, total=expected, about=f"of about {expected:.0f} s")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **settings)
        try:
            while process.poll() is None:
                took = time.monotonic() - began
                late = "slower than usual: is the machine busy?" if took > 1.5 * expected else None
                bar.update(task, completed=min(took, 0.99 * expected), about=late or f"of about {expected:.0f} s")
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    said = "done in" if process.returncode == 0 else "FAILED after"
    console.print(f"  {title}: {said} {time.monotonic() - began:.0f} s", markup=False, soft_wrap=True)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        console.print(*lines, f"The whole log: {log}", sep="\n", markup=False, soft_wrap=True)
    return process.returncode


if __name__ == "__main__":  # python terminal.py TITLE SECONDS LOG COMMAND...
    spell_what_is_missing()
    sys.exit(step(sys.argv[1], sys.argv[4:], Path(sys.argv[3]), float(sys.argv[2])))
