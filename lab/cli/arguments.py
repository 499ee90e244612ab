"""What `python -m lab` takes on its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

WAIT = 100.0  # seconds: shells of agents have time limits
TURN = 600.0  # seconds


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m lab",
        description="Experiments on train.py: run, judged, kept or reverted, recorded. Used in the repository.",
    )
    whole.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, wait=False, json=True):
        """Adds a command, and gives what adds options to it: option("--name", help, ...)."""
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

        def option(names, help, metavar=None, **more):
            metavar = {"metavar": metavar} if metavar else {}
            sub.add_argument(*names.split(), help=help, **metavar, **more)

        if wait:
            text = f"how long to wait before saying how long is left (default {WAIT:g}); the run goes on regardless"
            option("--wait", text, "SECONDS", type=float, default=WAIT)
        if json:
            option("--json", "the same for machines", action="store_true")
        return option

    seeds = {"metavar": "N", "type": int}
    unsandboxed = ("--unsandboxed", "where the system offers no sandbox: go on without")
    of_ledger = "of an untagged results.tsv, such as nvidia-h100-80gb"

    start = command("start", "begin a session: branch, judge, baseline", wait=True)
    start("tag", "its name, the date say", "TAG")
    start(*unsandboxed, action="store_true")
    start("--baseline-runs", "seeds of the baseline (default 3)", default=3, **seeds)

    run = command("run", "take train.py, run it, decide, keep or revert, record", wait=True)
    run("-m --message", "what was changed, and why", "TEXT")
    run("--near-misses", "not train.py, but the promising near misses together", action="store_true")
    run("--again", "also if an equal train.py was decided on before", action="store_true")

    command("check", "try train.py: what it uses and a few tiny steps, within seconds and without a score")
    command("wait", "go on waiting for what runs, or resume what was interrupted", wait=True)
    pause = command("pause", "end what runs, to be done again later, and run nothing until resume", json=False)
    pause("--after-run", "let the run under way come to its end first", action="store_true")
    command("resume", "go on after a pause", json=False)
    command("status", "best so far, noise, recent experiments, near misses")
    command("log", "the experiments so far, or one of them")("number", None, "N", nargs="?", type=int)

    confirm = command("confirm", "the best against the baseline: new seeds, held-out rows", wait=True)
    confirm("--pairs", "of runs, best and baseline (default 3)", default=3, **seeds)
    confirm("--times", "the session's budget (4: does it last?)", "X", type=float, default=1)

    command("mcp", "serve status, log, check, propose and wait to an agent over MCP (pip install .[mcp])", json=False)
    export = command("export", "write the session as a folder, or as a .tar.gz", json=False)
    export("target", None, type=Path, nargs="?")
    export("--publish", "a branch exp/<device>/<tag>: the kept steps, and the export in session/", action="store_true")
    export("--replace", "the branch of that name that is there", action="store_true")
    bring = command("import", "read an exported session, or the original's results.tsv", json=False)
    bring("source", "a folder, an archive, a results.tsv or a published branch", "SOURCE")
    bring("--device", of_ledger, "TAG")

    compare = command("compare", "sessions side by side: what each found, and which of it holds where")
    named = "DEVICE/TAG, a session's folder, an export, a branch, or the original's results.tsv"
    compare("sources", named, "SESSION", nargs="+")
    compare("--device", f"{of_ledger}; one for each of them, in order", "TAG", action="append", default=[])
    report = command("report", "a session as one HTML file: what was tried, kept, and how sure it is", json=False)
    report("sources", "as of compare (default: the session whose branch is checked out)", "SESSION", nargs="*")
    report("--device", "as of compare", "TAG", action="append", default=[])
    report("--out", "(default report.html)", "FILE", type=Path, default=Path("report.html"))
    report("--png", "a picture of the progress, for sharing", "FILE", type=Path)

    replay = command("replay", "try another machine's kept changes here, one experiment each")
    replay("source", "a folder or archive from lab export, DEVICE/TAG, or a published branch", "SESSION")
    replay("--all", "its near misses, too", action="store_true")
    replay("--each", "on the baseline; the branch stays where it is (the default)", action="store_true")
    replay("--stack", "in order, on the best so far; what is kept moves the branch", action="store_true")
    replay("--runs", "of change and baseline each, at least (default 1); again with more adds some", default=1, **seeds)
    replay("--dry-run", "only tell what would be run, and what does not apply", action="store_true")

    night = command("night", "one experiment after another, by an agent or by search, until it is stopped", json=False)
    night("--agent", "asked once for each experiment: gets a prompt on its input, and edits train.py", "COMMAND")
    night("--proposer", "no agent: the built-in search (the default)", action="store_true")
    night("--turn-seconds", f"for the agent, each time (default {TURN:g})", "S", type=float, default=TURN)
    night("--hours", "stop after so long", "H", type=float)
    night("--until", "stop at this time of day", "HH:MM")
    night("--max-experiments", "stop after so many", **seeds)
    night("--notify", "gets a line on its input, and as $LAB_MESSAGE, at a new best and at trouble", "COMMAND")
    night("--tag", "of the session that is begun if there is none (default: the date)")
    night("--dataset", "for it (default: the one prepared last, or climbmix)", "NAME")
    night("--baseline-runs", "seeds of its baseline (default 3)", default=3, **seeds)
    night(*unsandboxed, action="store_true")
    night("--plan", "only tell what it will take", action="store_true")
    night("--planned", argparse.SUPPRESS, "DEADLINE", type=float)
    commands.add_parser("supervise")
    return whole


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the process for those that don't go together."""
    whole = parser()
    options = whole.parse_args(arguments)
    for both in (("each", "stack"), ("agent", "proposer")):
        if all(getattr(options, name, None) for name in both):
            whole.error(f"--{both[0]} and --{both[1]} don't go together: give one of them")
    return options
