"""What came of a guarded run: its result, believed only as far as it can be true."""

from __future__ import annotations

import ast
import json
import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import prepare
from lab import untrusted
from lab.run import guard

LARGEST = 2**20  # bytes of a result
MOST_OF_A_REASON = 160  # characters
# What prepare.report writes, by type.
TYPES = {name: {"s": str, "d": int}.get(form[-1], float) for name, form in prepare.SUMMARY.items()}
TYPES |= {
    "budget_seconds": float,
    "tokens_per_second_last_quarter": float,
    "flops_per_token": float,
    "dataset": str,
    "initial_weights": str,
    "attention_provider": str,
}
UNKNOWN_ALLOWED = ("mfu_percent", "speed", "attention_provider")  # null where nothing was calibrated, or there is none
# Without these a run that ended well can't be judged or recorded.
NEEDED = (
    "val_bpb",
    "val_rows",
    "training_seconds",
    "total_seconds",
    "budget_seconds",
    "peak_vram_mb",
    "num_steps",
    "total_tokens_M",
    "tokens_per_second",
    "device",
    "backend",
    "eval",
    "data",
)
TEARDOWN = 30.0  # seconds between prepare.report and the end of the process
HOLE = r"((?s:.{1,120}))"  # in a text, where code fills something in
FILLING = re.compile(r"[\w.,+-]{1,64}|\([0-9, ]*\)", re.ASCII)  # a name, a number, an array's shape
CLOCKS_APART = 3.0  # seconds: Linux tells to the second only when it was started, and so when a process was


@dataclass
class Outcome:
    """Of a run.

    Attributes:
        status: "ok", "crash" or "invalid". reason: why not "ok", a line.
        result: what prepare.report measured; known names only, of the right type and finite; those of
            UNKNOWN_ALLOWED may be None. Of a run that is not "ok" it has no val_bpb, may lack others, or be None.
        seconds: from start to end, as seen from outside.
        traceback: at most 40 lines, cleaned; "" if there is none.
    """

    status: str
    reason: str = ""
    result: dict | None = None
    seconds: float = 0.0
    traceback: str = ""


@dataclass
class Ended:
    """How a process ended: exit status, negative for a signal; seconds; how many more of them the system's time went
    on by; why it was ended, if it was."""

    code: int
    seconds: float
    set_by: float
    problem: str | None


def judged(request, ended: Ended, found, facts, mark, log, known) -> tuple[str, str]:
    """Status and reason."""
    if ended.problem:
        return "invalid", ended.problem
    if (request.folder / guard.MARK).exists():
        return ("crash" if mark.get("status") == "crash" else "invalid"), told(mark.get("reason"), known)
    if found is None:
        return (
            crash(ended, log) if ended.code else ("invalid", "it ended without a result: prepare.report was not called")
        )
    if found.get("status") != "ok":
        return "crash" if found.get("status") == "crash" else "invalid", told(found.get("reason"), known)
    wrong = problem(
        facts,
        request.budget,
        ended.seconds,
        request.memory_ceiling,
        request.folder / "result.safetensors",
        ended.set_by,
    )
    return ("invalid", wrong) if wrong else ("ok", "")


def crash(ended: Ended, log: str) -> tuple[str, str]:
    """Status and reason of a run that ended with an error. Of what it printed only the error's name is taken: a reason
    is shown and recorded without a fence."""
    if ended.code < 0:
        name = signal.Signals(-ended.code).name if -ended.code in set(signal.Signals) else f"signal {-ended.code}"
        return "crash", f"killed by {name}" + (": most likely out of memory" if ended.code == -9 else "")
    header, *lines = untrusted.clean(log).splitlines() or [""]
    error = next((line for line in lines if line and not line.startswith(" ")), "")
    named = header == untrusted.HEADER and re.match(r"[A-Za-z_][\w.]{0,60}(?=:|$)", error, re.ASCII)
    return "crash", named[0] if named else f"exit status {ended.code}"


def unscored(request, ended: Ended, found, log, known) -> str | None:
    """Why there are no scores. Of an error only the name is taken."""
    if ended.problem:
        return ended.problem
    if (mark := request.folder / guard.MARK).exists():
        return told((read(mark) or {}).get("reason"), known)
    if not found:
        return crash(ended, log)[1] if ended.code else "train.py made no Clock"
    if "problem" in found:
        named = re.fullmatch(r"[A-Za-z_]\w{0,39}", str(found["problem"]), re.ASCII)
        return f"{named[0] if named else 'an error'}: score.log in the run's folder says more"
    values = found.get("val_bpb"), found.get("held_out_bpb")
    if not all(isinstance(value, float) and 0 < value < 1e9 for value in values):
        return "its scores are no positive numbers"
    return None


# --- What was left behind ---


def read(path: Path) -> dict | None:
    """A JSON object, or None."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def sound(found: dict) -> dict:
    """The known facts of a result that are of their type; numbers finite, text cleaned."""
    facts = {}
    for name, kind in TYPES.items():
        value = found.get(name)
        if value is None and name in found and name in UNKNOWN_ALLOWED:
            facts[name] = None
        elif kind is str:
            if isinstance(value, str):
                facts[name] = untrusted.one_line(value, 100)
        elif isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value):
            facts[name] = kind(value)
    return facts


def sentences(*sources: str) -> list[re.Pattern]:
    """The texts that code (paths) can make: its strings, with holes where it fills something in."""
    found = set()
    for source in sources:
        nodes = list(ast.walk(ast.parse(Path(source).read_bytes())))
        pieces = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in (node for node in nodes if id(node) not in pieces):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "" for part in parts]
            if all(isinstance(text, str) for text in texts) and len("".join(texts).split()) > 1:
                found.add("".join(re.escape(text) or HOLE for text in texts))
    return [re.compile(text) for text in sorted(found)]


def reasons() -> list[re.Pattern]:
    """The reasons that the judge gives from within a run."""
    return sentences(prepare.__file__, guard.__file__)


def told(reason, known: list[re.Pattern]) -> str:
    """A reason that a run left behind, if it is a sentence of the judge's. It is shown and recorded without a fence,
    and train.py shared the process that wrote it: what it chose may be names in such a sentence, and no more."""
    if isinstance(reason, str) and len(reason) <= MOST_OF_A_REASON and _made_of(reason, known):
        return reason
    return "it was refused; the reason that it gives is not the judge's"


def _made_of(reason: str, known: list[re.Pattern], depth: int = 1) -> bool:
    def fills(part):
        return FILLING.fullmatch(part) or depth and _made_of(part, known, depth - 1)

    return any(all(map(fills, found.groups())) for pattern in known if (found := pattern.fullmatch(reason)))


def problem(
    facts: dict, budget: float, elapsed: float, ceiling: int | None, weights: Path, set_by: float = 0.0
) -> str | None:
    """Why a result that says "ok" is not believed.

    Args:
        elapsed: seconds that the process took. ceiling: bytes of memory that a run may use.
        set_by: seconds by which the system's time went another way meanwhile: it was set, or the machine slept. The
            total that a run tells is by that, and may hold it or not; its training time does not.
    """
    if missing := [name for name in NEEDED if name not in facts]:
        return f"its result lacks {', '.join(missing)}, or they are of the wrong kind"
    if not facts["val_bpb"] > 0:
        return f"val_bpb is {facts['val_bpb']}"
    if facts["budget_seconds"] != budget:
        return f"it trained with a budget of {facts['budget_seconds']:g} s instead of {budget:g} s"
    training, total = facts["training_seconds"], facts["total_seconds"]
    longest = budget + max(budget, prepare.TIME_BUDGET) + 2  # the longest step that prepare allows, begun in time
    if not 0 <= training <= min(longest, elapsed + CLOCKS_APART):
        return f"it claims {training:.1f} s of training, in {elapsed:.1f} s and with a budget of {budget:g} s"
    apart = CLOCKS_APART + abs(set_by)
    if not max(training, elapsed - TEARDOWN - 0.02 * elapsed) - apart <= total <= elapsed + apart:
        return f"it claims to have taken {total:.1f} s; it took {elapsed:.1f} s"
    if ceiling is not None and facts["peak_vram_mb"] * 2**20 > ceiling:
        return f"memory: it used {facts['peak_vram_mb']:,.0f} MB; at most {ceiling / 2**20:,.0f} MB are allowed"
    if not (weights.is_file() and weights.stat().st_size):
        return "it left no weights"
    return None
