"""An agent for tests: takes the arguments that a real one documents, reads its prompt, edits train.py, or misbehaves.

    stub_agent.py stub [WORD]              as an agent without arguments of its own
    stub_agent.py claude -p ...            as Claude Code would be called; so codex, gemini, aider, opencode

What it does is a WORD of DEEDS. Without one it is the first line of the file that STUB_AGENT names, which is taken
away; and once there is none, it edits. `install` puts it on a PATH under the names of the real ones.
"""

import argparse
import hashlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path("train.py")
NAMES = ("claude", "codex", "gemini", "aider", "opencode")


def install(folder: Path) -> Path:
    """Makes each of NAMES a program in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        program = folder / name
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(os.path.abspath(__file__))} {name} "$@"\n'
        )
        program.chmod(0o755)
    return folder


# --- How the real ones are called: (prompt, may it edit, does it commit); unknown arguments exit with 2 ---


def claude(arguments):
    one = argparse.ArgumentParser("claude", allow_abbrev=False)
    one.add_argument("-p", "--print", action="store_true")
    one.add_argument(
        "--permission-mode",
        default="default",
        choices=["default", "acceptEdits", "plan", "auto", "dontAsk", "bypassPermissions"],
    )
    one.add_argument("--dangerously-skip-permissions", action="store_true")
    one.add_argument("--output-format", default="text", choices=["text", "json", "stream-json"])
    one.add_argument("--allowedTools", "--allowed-tools", nargs="+", default=[])
    for name in ("--model", "--max-turns", "--max-budget-usd", "--append-system-prompt"):
        one.add_argument(name)
    one.add_argument("prompt", nargs="?", default="")
    asked = one.parse_args(arguments)
    if not asked.print:
        sys.exit("an interactive session needs a terminal")
    may = asked.dangerously_skip_permissions or asked.permission_mode in ("acceptEdits", "bypassPermissions")
    return f"{asked.prompt}\n{sys.stdin.read()}", may or bool({"Edit", "Write"} & set(asked.allowedTools)), False


def codex(arguments):
    one = argparse.ArgumentParser("codex exec", allow_abbrev=False)
    one.add_argument(
        "-s", "--sandbox", default="read-only", choices=["read-only", "workspace-write", "danger-full-access"]
    )
    one.add_argument("-c", "--config", action="append")
    for name in ("--oss", "--skip-git-repo-check", "--ephemeral", "--json"):
        one.add_argument(name, action="store_true")
    for name in (("-m", "--model"), ("--local-provider",), ("-C", "--cd"), ("-o", "--output-last-message")):
        one.add_argument(*name)
    one.add_argument("prompt", nargs="?", default="-")
    if arguments[:1] not in (["exec"], ["e"]):
        sys.exit("stdin is not a terminal")
    asked = one.parse_args(arguments[1:])
    prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
    print(f"user\n{prompt}", file=sys.stderr)  # it echoes
    return prompt, asked.sandbox != "read-only", False


def gemini(arguments):
    one = argparse.ArgumentParser("gemini", allow_abbrev=False)
    one.add_argument("--approval-mode", choices=["default", "auto_edit", "yolo", "plan"])
    for name in (("-y", "--yolo"), ("-d", "--debug"), ("-s", "--sandbox"), ("--skip-trust",)):
        one.add_argument(*name, action="store_true")
    for name in (("-m", "--model"), ("-p", "--prompt"), ("-o", "--output-format"), ("-e", "--extensions")):
        one.add_argument(*name)
    one.add_argument("query", nargs="*")
    asked = one.parse_args(arguments)
    if asked.yolo and asked.approval_mode:
        one.error("cannot use both --yolo and --approval-mode")
    return sys.stdin.read() + (asked.prompt or ""), asked.yolo or asked.approval_mode in ("auto_edit", "yolo"), False


def aider(arguments):
    one = argparse.ArgumentParser("aider", allow_abbrev=False)
    for name in (
        "auto-commits",
        "dirty-commits",
        "gitignore",
        "pretty",
        "stream",
        "check-update",
        "analytics",
        "show-model-warnings",
        "detect-urls",
        "suggest-shell-commands",
        "git",
    ):
        one.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    one.add_argument("--yes-always", action="store_true")
    one.add_argument("--message-file", "-f")
    for name in ("--message", "--model", "--edit-format", "--openai-api-base", "--map-tokens", "--read", "--timeout"):
        one.add_argument(name)
    one.add_argument("files", nargs="*")
    asked = one.parse_args(arguments)
    if not (asked.message or asked.message_file):
        sys.exit("Input is not a terminal")
    return asked.message or Path(asked.message_file).read_text(), "train.py" in asked.files, asked.auto_commits


def opencode(arguments):
    one = argparse.ArgumentParser("opencode run", allow_abbrev=False)
    for name in (("-m", "--model"), ("--agent",), ("--format",), ("-f", "--file"), ("-s", "--session")):
        one.add_argument(*name)
    one.add_argument("--standalone", action="store_true")
    one.add_argument("message", nargs="+")
    if arguments[:1] != ["run"]:
        sys.exit("a terminal is needed")
    asked = one.parse_args(arguments[1:])
    return " ".join(asked.message), True, False


def stub(arguments):
    word = arguments[0] if arguments else ""
    return "" if word.startswith("deaf") else sys.stdin.read(), True, False


# --- What it does ---


def edit(prompt, say=True):
    """Another value for one of the rates in train.py, as the prompt has it: the same prompt gives the same edit."""
    source = TRAIN.read_text()
    places = list(re.finditer(r"^([A-Z0-9_]*(?:_LR|LEARNING|LOSS|_DECAY))( *= *)(\d+\.?\d*)", source, re.M))
    chance = random.Random(hashlib.sha256(prompt.encode()).digest())
    name, equals, value = (place := chance.choice(places)).groups()
    new = f"{float(value) * chance.uniform(0.9, 1.1):.6g}"
    TRAIN.write_text(source[: place.start()] + name + equals + new + source[place.end() :])
    if say:
        print(f"I thought about it.\n\n**CHANGE:** {name} from {value} to {new}, a guess")


def bold(prompt):
    """One rate three times as high: an idea that helps where runs are short."""
    source = TRAIN.read_text()
    old = re.search(r"^MATRIX_LR *= *(\d+\.?\d*)", source, re.M)
    TRAIN.write_text(f"{source[: old.start(1)]}{3 * float(old[1]):.6g}{source[old.end(1) :]}")
    print(f"CHANGE: MATRIX_LR from {old[1]} to three times that: there is little time")


def git(*arguments):
    subprocess.run(
        ["git", "-c", "user.name=agent", "-c", "user.email=a@b", *arguments],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def child(code, **options):
    subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, **options)


def forever(prompt=None):
    while True:
        time.sleep(0.5)


def flood(prompt):
    while True:
        print("x" * 1000)


def elsewhere(prompt):
    Path("notes.txt").write_text("mine")
    with open("prepare.py", "a") as file:
        file.write("BUDGET = 3000\n")


def stubborn(prompt):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    forever()


def checkout(where):
    def deed(prompt):
        git("checkout", "-q", *where)

    return deed


def steps(*deeds):
    def deed(prompt):
        for one in deeds:
            one(prompt)

    return deed


def leave(code):
    def deed(prompt):
        sys.stdout.flush()
        sys.exit(code)

    return deed


def nopython(prompt):
    TRAIN.write_text("def broken(:\n")


def commit(prompt):
    git("add", "-A")
    git("commit", "-qm", "mine")


SLEEPS = "import time; time.sleep(600)"
DEEDS = {
    "edit": edit,
    "bold": bold,
    "silent": lambda prompt: edit(prompt, say=False),
    "nothing": lambda prompt: print("I read the code, and all is well."),
    "ask": lambda prompt: print("I could change the rate.\nShall I **go on?**"),
    "comments": lambda prompt: TRAIN.write_text(TRAIN.read_text() + "# a remark\n"),
    "fail": steps(lambda prompt: print("Error: no credit left"), leave(1)),
    "edit-fail": steps(edit, leave(3)),
    "hang": forever,
    "edit-hang": steps(edit, forever),
    "nopython-hang": steps(nopython, forever),
    "stubborn": stubborn,
    "flood": flood,
    "elsewhere": elsewhere,
    "edit-elsewhere": steps(edit, elsewhere),
    "nopython": nopython,
    "delete": lambda prompt: TRAIN.unlink(),
    "folder": steps(lambda prompt: TRAIN.unlink(), lambda prompt: TRAIN.mkdir()),
    "link": steps(lambda prompt: TRAIN.unlink(), lambda prompt: TRAIN.symlink_to("prepare.py")),
    "commit": steps(edit, commit),
    "commit-elsewhere": steps(elsewhere, commit),
    "amend": steps(edit, lambda prompt: git("commit", "-qam", "mine", "--amend")),
    "branch": steps(checkout(["-b", "agents"]), edit, commit),
    "checkout": checkout(["main"]),
    "checkout-edit": steps(checkout(["main"]), edit),
    "detach": checkout(["--detach"]),
    "reset": lambda prompt: git("reset", "-q", "--hard", "HEAD^"),
    "unborn": lambda prompt: git("checkout", "-q", "--orphan", "new"),
    "lose-branch": lambda prompt: git("update-ref", "-d", "HEAD"),
    "stash": steps(edit, lambda prompt: git("stash", "-q")),
    "lock": steps(edit, lambda prompt: Path(".git/index.lock").touch()),
    "child": steps(edit, lambda prompt: child(SLEEPS)),
    "orphan": steps(edit, lambda prompt: child(SLEEPS, start_new_session=True, stdout=subprocess.DEVNULL)),
    "deaf": lambda prompt: edit("deaf"),
    "run": steps(edit, lambda prompt: subprocess.run([sys.executable, "-m", "lab", "run", "-m", "mine"], check=False)),
}


def next_word() -> str:
    path = Path(os.environ.get("STUB_AGENT", "/dev/null"))
    words = path.read_text().split() if path.is_file() else []
    if words:
        path.write_text("\n".join(words[1:]))
    return words[0] if words else "edit"


def main(name, *arguments):
    prompt, may_edit, commits = globals()[name](list(arguments))
    word = arguments[0] if name == "stub" and arguments else next_word()
    if not prompt.strip() and word != "deaf":
        sys.exit("an empty prompt")
    if not may_edit:
        print("I need your permission to edit train.py. May I?")
        return
    DEEDS[word](prompt)
    if commits:
        commit(prompt)


if __name__ == "__main__":
    main(*sys.argv[1:])
