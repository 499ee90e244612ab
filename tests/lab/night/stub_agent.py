"""An agent for tests: reads its prompt, edits train.py, or misbehaves. Real ones are tried by tests/agents/trial.py.

    stub_agent.py [WORD]

What it does is a WORD of DEEDS. Without one it is the first line of the file that STUB_AGENT names, which is taken
away; and once there is none, it edits.
"""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path("train.py")


# --- What it does ---


def edit(prompt, say=True):
    """Another value for one of the rates in train.py, as the prompt has it. The same prompt, but for the speed that it
    tells of, gives the same edit."""
    source = TRAIN.read_text()
    places = list(re.finditer(r"^([A-Z0-9_]*(?:_LR|LEARNING|LOSS|_DECAY))( *= *)(\d+\.?\d*)", source, re.M))
    without_speed = re.sub("^- a run of the best: .*", "", prompt, flags=re.MULTILINE)
    chance = random.Random(hashlib.sha256(without_speed.encode()).digest())
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


def flush(prompt):
    sys.stdout.flush()


def bytes_and_a_change(prompt):
    sys.stdout.buffer.write(bytes(range(256)) * 2000 + b"\nCHANGE: among bytes\n")


def leave(code):
    def deed(prompt):
        flush(prompt)
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
    "unknown": steps(lambda prompt: print("error: unknown option --yolo", file=sys.stderr), leave(2)),
    "late": steps(edit, lambda prompt: print("API Error: 429 rate limited"), leave(1)),
    "binary": steps(edit, flush, bytes_and_a_change),
    "idle-limit": lambda prompt: print("You've hit your usage limit. Try again at 3 am."),
    "ask": lambda prompt: print("I could change the rate.\nShall I **go on?**"),
    "comments": lambda prompt: TRAIN.write_text(TRAIN.read_text() + "# a remark\n"),
    "fail": steps(lambda prompt: print("Error: no credit left"), leave(1)),
    "edit-fail": steps(edit, leave(3)),
    "hang": forever,
    "edit-hang": steps(edit, forever),
    "edit-lock-away": steps(edit, lambda prompt: TRAIN.chmod(0)),
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


def main(word=""):
    prompt = "" if word.startswith("deaf") else sys.stdin.read()
    if not prompt.strip() and word != "deaf":
        sys.exit("an empty prompt")
    DEEDS[word or next_word()](prompt)


if __name__ == "__main__":
    main(*sys.argv[1:])
