"""The command: `python -m lab ...`. Once a session exists, its judge's copy of this file carries the command out."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(HERE):
    sys.path[0] = str(HERE)  # run by its path: as a judge's is

ELSEWHERE = ("start", "import", "compare", "report")  # what no session's judge is asked for
READING = ("status", "log", "export", "compare", "report")  # what an agent may ask for in its turn
WAIT = 100.0  # seconds: shells of agents have time limits
TURN = 600.0  # seconds


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m lab",
        description=(
            "Experiments on train.py: run, judged, kept or reverted, and recorded. Used in the repository's folder."
        ),
    )
    whole.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, wait=False, json=True):
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if wait:
            one.add_argument(
                "--wait",
                type=float,
                default=WAIT,
                metavar="SECONDS",
                help=(
                    f"how long to wait before saying how long is left (default {WAIT:g}); the run goes on regardless"
                ),
            )
        if json:
            one.add_argument("--json", action="store_true", help="the same for machines")
        return one

    start = command("start", "begin a session: branch, judge, baseline", wait=True)
    start.add_argument("tag", metavar="TAG", help="its name, the date say")
    start.add_argument("--unsandboxed", action="store_true", help="where the system offers no sandbox: go on without")
    start.add_argument("--baseline-runs", type=int, metavar="N", help="seeds of the baseline (default 3)")
    run = command("run", "take train.py, run it, decide, keep or revert, record", wait=True)
    run.add_argument("-m", "--message", metavar="TEXT", help="what was changed, and why")
    run.add_argument("--near-misses", action="store_true", help="not train.py, but the promising near misses together")
    run.add_argument("--again", action="store_true", help="also if an equal train.py was decided on before")
    command("wait", "go on waiting for what runs, or resume what was interrupted", wait=True)
    pause = command("pause", "end what runs, to be done again later, and run nothing until resume", json=False)
    pause.add_argument("--after-run", action="store_true", help="let the run under way come to its end first")
    command("resume", "go on after a pause", json=False)
    command("status", "best so far, noise, recent experiments, near misses")
    log = command("log", "the experiments so far, or one of them")
    log.add_argument("number", nargs="?", type=int, metavar="N")
    confirm = command("confirm", "the best against the baseline: new seeds, held-out rows", wait=True)
    confirm.add_argument("--pairs", type=int, default=3, metavar="N", help="of runs, best and baseline (default 3)")
    confirm.add_argument("--times", type=float, default=1, metavar="X", help="the session's budget (4: does it last?)")
    export = command("export", "write the session as a folder, or as a .tar.gz", json=False)
    export.add_argument("target", type=Path, nargs="?")
    export.add_argument(
        "--publish",
        action="store_true",
        help=(
            "no file, but a branch exp/<device>/<tag> here: the kept steps, the best train.py, the export in session/"
        ),
    )
    export.add_argument("--replace", action="store_true", help="the branch of that name that is there")
    bring = command("import", "read an exported session, or the original's results.tsv", json=False)
    bring.add_argument("source", metavar="SOURCE", help="a folder, an archive, a results.tsv or a published branch")
    bring.add_argument("--device", metavar="TAG", help="of an untagged results.tsv, such as nvidia-h100-80gb")
    compare = command("compare", "sessions side by side: what each found, and which of it holds where")
    compare.add_argument(
        "sources",
        nargs="+",
        metavar="SESSION",
        help=("DEVICE/TAG, a session's folder, an export, a branch, or the original's results.tsv"),
    )
    compare.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="TAG",
        help=("of an untagged results.tsv, such as nvidia-h100-80gb; one for each of them, in order"),
    )
    report = command("report", "a session as one HTML file: what was tried, kept, and how sure it is", json=False)
    report.add_argument(
        "sources",
        nargs="*",
        metavar="SESSION",
        help=("as of compare; several: what holds where, too (default: the session whose branch is checked out)"),
    )
    report.add_argument("--device", action="append", default=[], metavar="TAG", help="as of compare")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(default report.html)")
    report.add_argument("--png", type=Path, metavar="FILE", help="a picture of the progress, for sharing")
    replay = command("replay", "try another machine's kept changes here, one experiment each")
    replay.add_argument(
        "source",
        metavar="SESSION",
        help=("a folder or archive from lab export, DEVICE/TAG (imported, or of this machine), or a published branch"),
    )
    replay.add_argument("--all", action="store_true", help="its near misses, too")
    how = replay.add_mutually_exclusive_group()
    how.add_argument("--each", action="store_true", help="on the baseline; the branch stays where it is (the default)")
    how.add_argument("--stack", action="store_true", help="in order, on the best so far; what is kept moves the branch")
    replay.add_argument(
        "--runs",
        type=int,
        default=1,
        metavar="N",
        help=(
            "of change and baseline each, at least, to tell small effects (default 1); a later call with more adds some"
        ),
    )
    replay.add_argument("--limit", type=int, metavar="N", help="experiments, at most; a later call goes on")
    replay.add_argument("--dry-run", action="store_true", help="only tell what would be run, and what does not apply")
    night = command("night", "one experiment after another, by an agent or by search, until it is stopped", json=False)
    who = night.add_mutually_exclusive_group()
    who.add_argument(
        "--agent",
        metavar="COMMAND",
        help=("asked once for each experiment: gets a prompt on its standard input, and edits train.py"),
    )
    who.add_argument("--proposer", action="store_true", help="no agent: the built-in search (the default)")
    night.add_argument(
        "--turn-seconds", type=float, default=TURN, metavar="S", help=(f"for the agent, each time (default {TURN:g})")
    )
    night.add_argument("--hours", type=float, metavar="H", help="stop after so long")
    night.add_argument("--until", metavar="HH:MM", help="stop at this time of day")
    night.add_argument("--max-experiments", type=int, metavar="N")
    night.add_argument(
        "--notify",
        metavar="COMMAND",
        help=("gets a line on its standard input, and as $LAB_MESSAGE, at a new best, at trouble, and in the morning"),
    )
    night.add_argument("--tag", help="of the session that is begun if there is none (default: the date)")
    night.add_argument("--dataset", metavar="NAME", help="for it (default: the one prepared last, or climbmix)")
    night.add_argument("--baseline-runs", type=int, metavar="N", help="seeds of its baseline (default 3)")
    night.add_argument("--unsandboxed", action="store_true", help="where the system offers no sandbox: go on without")
    night.add_argument("--plan", action="store_true", help="only tell what it will take")
    night.add_argument("--planned", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    commands.add_parser("supervise")
    return whole


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if os.environ.get("LAB_TURN") and options.command not in READING:
        print("a night runs the experiments: edit train.py and end your turn, and it is run then", file=sys.stderr)
        return 1
    if options.command not in ELSEWHERE and not options.session and (program := judges()):
        return hand_over(program, arguments)
    from lab.cli import commands
    from lab.session.session import Session, at
    from storage import Stop

    try:
        if options.command in ELSEWHERE:
            return getattr(commands, f"do_{options.command}")(options)
        if options.command == "night" and not options.session:
            if not commands.before_night(options):
                return 0
            if program := judges():  # of the session that was begun just now
                return hand_over(program, [*arguments, f"--planned={options.planned}"])
        session = Session(options.session) if options.session else at(Path.cwd())
        return getattr(commands, f"do_{options.command}")(session, options)
    except (Stop, OSError) as error:  # a full disk is one
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what runs goes on: python -m lab wait", file=sys.stderr)
        return 130


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
    home = Path(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch").expanduser()
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
    sys.exit(main())
