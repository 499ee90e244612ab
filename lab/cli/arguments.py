"""What `python -m lab` takes on its command line."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

WAIT = 100.0  # seconds: shells of agents have time limits
TURN = 600.0  # seconds
EXCLUSIVE = [  # of two one would be ignored
    ("--each", "--stack"),
    ("--agent", "--proposer"),
    ("--scale", "--file"),
    ("--scale", "--times"),
    ("--publish", "target"),
    ("--describe", "invitation"),
    ("--describe", "--devices"),
    ("--describe", "--name"),
    ("--none", "target"),
    ("--none", "--address"),
    ("--none", "--listen"),
]
RANGES = [
    ("wait", 0, math.inf),
    ("pairs", 2, 100),
    ("times", 0.01, 100),
    ("depth", 0.01, 100),
    ("agents", 0, math.inf),
    ("turn_seconds", 0.1, math.inf),
    ("offers", 0, 1),
    ("baseline_runs", 1, math.inf),
    ("max_experiments", 1, math.inf),
    ("page", 0, 65535),
]


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m lab",
        description="Runs experiments on train.py, judges them, keeps or reverts them, and records them.",
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
            text = f"return after so many seconds, with the time left (default {WAIT:g}); the experiment continues"
            option("--wait", text, "SECONDS", type=float, default=WAIT)
        if json:
            option("--json", "print JSON", action="store_true")
        return option

    seeds = {"metavar": "N", "type": int}
    unsandboxed = ("--unsandboxed", "run without a sandbox if the system offers none")
    of_ledger = "the device of a results.tsv that does not name it, such as nvidia-h100-80gb"

    start = command("start", "begin a session: make its branch, pin the judge, run the baseline", wait=True)
    start("tag", "name of the session, for example the date", "TAG")
    start(*unsandboxed, action="store_true")
    start("--baseline-runs", "runs of the baseline (default 3)", default=3, **seeds)
    text = "for the device of another machine that lab join --describe FILE describes"
    start("--for", text, "FILE", type=Path, dest="of")

    run = command("run", "run train.py as an experiment: judge it, keep or revert it, record it", wait=True)
    run("-m --message", "what was changed, and why", "TEXT")
    run("--near-misses", "instead of train.py, try the promising near misses as one change", action="store_true")
    run("--again", "run it even if an equal train.py was judged before", action="store_true")

    command("check", "try a few tiny steps of train.py, within seconds and without a score")
    command("wait", "wait for the experiment that is running, or continue an interrupted one", wait=True)
    pause = command("pause", "end the current run, and start none until lab resume, which repeats it", json=False)
    pause("--after-run", "let the current run finish first", action="store_true")
    command("resume", "continue after a pause", json=False)
    command("status", "show the best so far, the noise, recent experiments and near misses")
    command("log", "list the experiments, or show one of them")("number", None, "N", nargs="?", type=int)

    sample = command("sample", "let the best and the baseline continue a prompt")
    sample("--prompt", "the text to continue (default: the beginning of the held-out rows)", "TEXT")
    sample("--tokens", "tokens that each model writes (default 96)", type=int, default=96, metavar="N")

    confirm = command("confirm", "test the best against the baseline on new seeds and held-out rows", wait=True)
    confirm("--pairs", "pairs of runs, best and baseline (default 3)", default=3, **seeds)
    confirm("--times", "multiply the budget by this (4: does the gain last?)", "X", type=float)
    text = "instead, run the baseline for a quarter, half and twice the budget, to see effects as factors of time"
    confirm("--scale", text, action="store_true")
    confirm("--file", "instead of the best, test this train.py", "FILE", type=Path)

    transfer = command("transfer", "test whether the best still beats the baseline in a larger model", wait=True)
    transfer("--depth", "multiply the depth by this (default 2; width follows)", "X", type=float, default=2)
    transfer("--times", "multiply the budget by this (default 1)", "X", type=float, default=1)
    transfer("--pairs", "pairs of runs, best and baseline (default 3)", default=3, **seeds)
    each = "instead of the best, each kept change against what it was made on; lab status lists which carry"
    transfer("--each", each, action="store_true")

    again = command("reproduce", "test in a clean clone whether a change beats its parent")
    again("number", "number of the experiment", "N", type=int)
    again("--of", "its session, named as for compare (default: the one whose branch is checked out)", "SESSION")
    again("--pairs", "pairs of runs, the change and its parent (default 3)", default=3, **seeds)

    command("mcp", "serve status, log, check, propose and wait to an agent over MCP (pip install .[mcp])", json=False)
    export = command("export", "write the session as a folder, or as a .tar.gz", json=False)
    export("target", None, type=Path, nargs="?")
    text = "make a branch exp/<device>/<tag> with the kept changes, and the export in session/"
    export("--publish", text, action="store_true")
    export("--replace", "replace the branch of that name", action="store_true")
    bring = command("import", "read an exported session, or the original's results.tsv", json=False)
    bring("source", "a folder, an archive, a results.tsv or a published branch", "SOURCE")
    bring("--device", of_ledger, "TAG")

    compare = command("compare", "compare sessions: what each found, and which findings hold where")
    named = "DEVICE/TAG, a session's folder, an export, a branch, or the original's results.tsv"
    compare("sources", named, "SESSION", nargs="+")
    compare("--device", f"{of_ledger}; one for each of them, in order", "TAG", action="append", default=[])
    compare("--kinds", "only show which kinds of change paid, by sort of device", action="store_true")
    compare("--svg", "also draw that, as a picture", "FILE", type=Path)
    report = command("report", "write one HTML page: what was tried, what was kept, and how sure that is", json=False)
    report("sources", "named as for compare (default: the session whose branch is checked out)", "SESSION", nargs="*")
    report("--device", "as for compare", "TAG", action="append", default=[])
    report("--out", "where to write it (default report.html)", "FILE", type=Path, default=Path("report.html"))
    report("--price", "price of a kWh, to show what training cost where its energy was measured", "X", type=float)
    report("--png", "also write a picture of the progress", "FILE", type=Path)

    replay = command("replay", "try another machine's kept changes here, or published ones, one experiment each")
    text = "a folder or archive from lab export, DEVICE/TAG, a published branch; or a finding, by its name or file, or "
    replay("source", f"{text}findings for all of them", "SESSION")
    replay("--all", "try the session's near misses, too", action="store_true")
    replay("--each", "try each on the baseline, without moving the branch (the default)", action="store_true")
    replay("--stack", "try them in order on the best so far; a kept one moves the branch", action="store_true")
    text = "at least this many runs of change and baseline each (default 1); a later call with more adds runs"
    replay("--runs", text, default=1, **seeds)
    replay("--dry-run", "only show what would be run, and what does not apply here", action="store_true")

    command("findings", "list published findings: the evidence elsewhere, the verdict here")

    text = "run one experiment after another, by an agent or by search, until it is stopped"
    night = command("night", text, json=False)
    night("--agent", "command, called once for each experiment: gets a prompt on its input, edits train.py", "COMMAND")
    text = "run N turns of the agent at once, also while experiments run (default: one, in between)"
    night("--agents", text, default=0, **seeds)
    night("--proposer", "use the built-in search instead of an agent (the default)", action="store_true")
    text = "first try the findings that lab findings lists, and later, too (the default without an agent)"
    night("--findings", text, action=argparse.BooleanOptionalAction)
    night("--turn-seconds", f"time limit of one turn of the agent (default {TURN:g})", "S", type=float, default=TURN)
    night("--hours", "stop after this many hours", "H", type=float)
    night("--until", "stop at this time of day", "HH:MM")
    night("--max-experiments", "stop after this many experiments", **seeds)
    scale = "at the end, run the baseline with other training times, as lab confirm --scale does; reserves time for it"
    night("--scale", scale, action="store_true")
    text = "command, called at a new best, at trouble, at the end: gets a line on its input and in $LAB_MESSAGE"
    night("--notify", text, "COMMAND")
    text = "serve the report, read-only, in the local network; the address is shown at the start"
    night("--page", text, "PORT", type=int, nargs="?", const=0)
    night("--tag", "name of the new session, if there is none yet (default: the date)")
    night("--dataset", "dataset of the new session (default: the one prepared last, or climbmix)", "NAME")
    night("--baseline-runs", "runs of its baseline (default 3)", default=3, **seeds)
    night(*unsandboxed, action="store_true")
    which = "all, GPU numbers such as 0,1, or a list such as cpu,cpu"
    night("--devices", f"use several devices of this machine: {which}", "LIST")
    offered = "share of the runs for changes that other sessions under the same AUTORESEARCH_HOME keep (default 0.1)"
    night("--offers", offered, "SHARE", type=float, default=0.1)
    night("--plan", "only show what the night will take", action="store_true")
    night("--planned", argparse.SUPPRESS, "DEADLINE", type=float)

    invite = command("invite", "write an invitation for another machine's devices to work for this session", json=False)
    invite("target", "where to write it; whoever has this file can join", "FILE", type=Path, nargs="?")
    invite("--address", "HOST:PORT at which other machines reach this one")
    invite("--listen", "where to listen, if not at that address (default: all addresses, the same port)", "HOST:PORT")
    invite("--days", "how long it can be used (default 30)", type=float, default=30.0)
    invite("--none", "write none: nights don't wait for other machines' devices any more", action="store_true")
    join = command("join", "let this machine's devices work for the session that an invitation names", json=False)
    join("invitation", "invitation, written by lab invite on the head", "FILE", type=Path, nargs="?")
    join("--describe", "only write a description of this device, for lab start --for on the head", "FILE", type=Path)
    join("--devices", f"{which} (default all)", "LIST")
    join("--name", "name of this machine in the fleet (default: four letters)")
    join("--local", argparse.SUPPRESS, action="store_true")
    command("leave", "give this machine's devices back: end their work for sessions of other machines", json=False)
    command("fleet", "show the devices that work on this session, and what each does")
    commands.add_parser("supervise")
    return whole


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the process for those that don't go together."""
    whole = parser()
    options = whole.parse_args(arguments)
    for both in EXCLUSIVE:
        if all(getattr(options, name.lstrip("-"), None) for name in both):
            whole.error(f"{' and '.join(both)} don't go together: give one of them")
    if options.command == "export" and options.replace and not options.publish:
        whole.error("--replace is for a branch: give --publish, too")
    if options.command == "invite" and not options.none and not (options.target and options.address):
        whole.error("give FILE and --address HOST:PORT, or --none to invite nobody any more")
    for name, low, high in RANGES:
        if (value := getattr(options, name, None)) is not None and not low <= value <= high:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            whole.error(f"--{name.replace('_', '-')} has to be {limit}, not {value:g}")
    if options.command == "night":
        if options.agent is not None and not options.agent.strip():
            whole.error("--agent needs a command")
        for name, given in (("agents", options.agents), ("turn-seconds", options.turn_seconds != TURN)):
            if given and not options.agent:
                whole.error(f"--{name} is for an agent: give --agent COMMAND, too")
        options.findings = options.agent is None if options.findings is None else options.findings
    return options
