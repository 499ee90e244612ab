"""The command: `python -m lab ...`. Once a session exists, its judge's copy of this file carries the command out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(HERE):
    sys.path[0] = str(HERE)  # run by its path: as a judge's is

# What no session's judge is asked for, and what an agent may ask for in its turn.
ELSEWHERE = ("start", "import", "compare", "report", "reproduce", "mcp", "join", "leave")
READING = ("check", "mcp", "status", "log", "export", "compare", "report", "findings")
IN_TURN = (
    "this command does not run in an agent's turn: the night runs the experiments. Edit train.py and end your turn; "
    "then the edit is run. To try an edit within seconds, without a score: python -m lab check"
)


def main(arguments: list[str] | None = None) -> int:
    import terminal
    from lab.cli.arguments import parsed

    terminal.spell_what_is_missing()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    if os.environ.get("LAB_TURN") and options.command not in READING:
        print(IN_TURN, file=sys.stderr)
        return 1
    if options.command not in ELSEWHERE and not options.session and (program := judges()):
        return hand_over(program, arguments)
    from lab.cli import commands
    from lab.session.session import Session, at
    from storage import Stop

    do = getattr(commands, f"do_{options.command}")
    try:
        if options.command in ELSEWHERE:
            return do(options)
        if options.command == "night" and not options.session:
            if not commands.before_night(options):
                return 0
            if program := judges():  # of the session that was begun just now
                return hand_over(program, [*arguments, f"--planned={options.planned}"])
        if options.command in ("check", "findings"):  # need no session
            return do(options)
        session = Session(options.session) if options.session else at(Path.cwd())
        return do(session, options)
    except BrokenPipeError:  # no error: see `terminal.printed`
        raise
    except (Stop, OSError) as error:  # a full disk is one
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the experiment itself continues. To follow it: python -m lab wait" * experimenting()
        print(f"\ninterrupted{goes_on}", file=sys.stderr)
        return 130


def experimenting() -> bool:
    """Whether an experiment of the session here is under way."""
    from lab.session.session import at
    from storage import Stop

    try:
        return at(Path.cwd()).supervised
    except (Stop, OSError):  # there is no session
        return False


def judges() -> Path | None:
    """This file in the judge of the session whose branch is checked out here, unless it is this very one. Found without
    importing anything: whether all is well with the session is for the judge to say."""
    try:
        asked = subprocess.run(
            ["git", "symbolic-ref", "--quiet", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # said later, with what to do
        return None
    prefix, _, name = asked.stdout.strip().partition("/")
    if prefix != "autoresearch" or not name:
        return None
    home = Path(os.path.expanduser(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch"))
    program = home / "sessions" / name / "judge" / "lab" / "__main__.py"
    return program if program.exists() and not program.samefile(__file__) else None


def hand_over(program: Path, arguments: list[str]) -> int:
    """Lets the judge carry the command out."""
    command = [sys.executable, str(program), *arguments]
    sys.stdout.flush()
    if os.name == "nt":  # where exec would return to the shell at once
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the judge
        return subprocess.call(command)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    import terminal

    sys.exit(terminal.printed(main))
