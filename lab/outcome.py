"""What came of a guarded run: its result, believed only as far as it can be true."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import prepare
from lab import untrusted

LARGEST = 2**20  # bytes of a result
# What prepare.report writes, by type.
TYPES = {name: {"s": str, "d": int}.get(form[-1], float) for name, form in prepare.SUMMARY.items()}
TYPES |= {"budget_seconds": float, "tokens_per_second_last_quarter": float, "flops_per_token": float, "dataset": str}
UNKNOWN_ALLOWED = ("mfu_percent", "speed")  # null where nothing was calibrated
# Without these a run that ended well can't be judged or recorded.
NEEDED = ("val_bpb", "val_rows", "training_seconds", "total_seconds", "budget_seconds", "peak_vram_mb", "num_steps",
          "total_tokens_M", "tokens_per_second", "device", "backend", "eval", "data")
TEARDOWN = 30.0  # seconds between prepare.report and the end of the process
CLOCKS_APART = 3.0  # seconds: Linux tells to the second only when it was started, and so when a process was


@dataclass
class Outcome:
    """Of a run.

    Attributes:
        status: "ok", "crash" or "invalid". reason: why not "ok", a line.
        result: what prepare.report measured; known names only, of the right type and finite; `mfu_percent` and `speed`
            may be None. Of a run that is not "ok" it has no val_bpb, may lack others, or be None.
        seconds: from start to end, as seen from outside.
        traceback: at most 40 lines, cleaned; "" if there is none.
    """

    status: str
    reason: str = ""
    result: dict | None = None
    seconds: float = 0.0
    traceback: str = ""


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
        if kind is str:
            if isinstance(value, str):
                facts[name] = untrusted.one_line(value, 100)
        elif value is None and name in found and name in UNKNOWN_ALLOWED:
            facts[name] = None
        elif isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value):
            facts[name] = kind(value)
    return facts


def problem(facts: dict, budget: float, elapsed: float, ceiling: int | None, weights: Path) -> str | None:
    """Why a result that says "ok" is not believed.

    Args:
        elapsed: seconds that the process took, by the wall clock.
        ceiling: bytes of memory that a run may use.
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
    if not max(training, elapsed - TEARDOWN - 0.02 * elapsed) - CLOCKS_APART <= total <= elapsed + CLOCKS_APART:
        return f"it claims to have taken {total:.1f} s; it took {elapsed:.1f} s"
    if ceiling is not None and facts["peak_vram_mb"] * 2**20 > ceiling:
        return f"memory: it used {facts['peak_vram_mb']:,.0f} MB; at most {ceiling / 2**20:,.0f} MB are allowed"
    if not (weights.is_file() and weights.stat().st_size):
        return "it left no weights"
    return None
