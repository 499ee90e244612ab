"""What came of a guarded run: its result, believed only as far as it can be true."""

from __future__ import annotations

import os
import re
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Annotated

import msgspec
from msgspec import Meta

import prepare
import storage
from lab import untrusted
from lab.reasons import Reason, because
from lab.run import child, guard, log
from lab.run.exam import Exam
from results import BY_NAME, MEASURES, REFUSALS, RunStatus

LARGEST = 2**20  # bytes of a result
LARGEST_NUMBER = 1e40
LARGEST_INTEGER = 2**63 - 1  # MessagePack holds no more, in which a worker reports it
NUMBERS = {int: (int,), float: (int, float)}  # types that a measure of a type may have
LEAST_FREE = 2 * 10**9  # bytes of disk that a run needs
MOST_EXTRA = 32  # facts that train.py added of its own
NAME = re.compile(r"[A-Za-z_]\w{0,39}", re.ASCII)
WORD = re.compile(r"[\w.,+-]{1,64}|\([0-9, ]*\)", re.ASCII)  # a name, a number, an array's shape


@dataclass
class Outcome:
    """The outcome of a run, also as a worker reports it: values of other types are refused then.

    Attributes:
        status: "ok", "crash" or "invalid"; "lost" if it says nothing of train.py. reason: why not "ok".
        result: what prepare.report measured, as far as it is of the type that results.MEASURES names and finite, and
            what train.py added to it that is a number or a word. Of a run that is not "ok" it has no val_bpb, may lack
            others, or be None.
        seconds: from start to end, as seen from outside.
        traceback: at most 40 lines, cleaned; "" if there is none.
    """

    status: RunStatus
    reason: Reason | None = None
    result: dict | None = None
    seconds: Annotated[float, Meta(ge=0, lt=1e9)] = 0.0
    traceback: Annotated[str, Meta(max_length=20_000)] = ""


@dataclass
class Ended:
    """How a process ended: exit status, negative for a signal; seconds; why it was ended, if it was; seconds in which
    the run, or the whole machine, stood still."""

    code: int
    seconds: float
    problem: Reason | None
    paused: float = 0.0


def of_run(request, ended: Ended, exam: Exam) -> Outcome:
    """What came of a run, from what it left in its folder."""
    printed, told = log.read(request.folder / "run.log"), read(request.folder / "result.json")
    facts = None if told is None else sound(told)
    status, reason = _judged(request, ended, told, facts, printed, exam)
    if facts and status != "ok":
        facts.pop("val_bpb", None)
    if facts:  # the run tells it by the system's clock, which may have been set
        facts["total_seconds"] = ended.seconds
    return Outcome(status, reason, facts, ended.seconds, untrusted.clean(printed) if status == "crash" else "")


def _judged(
    request, ended: Ended, told: dict | None, facts, printed: str, exam: Exam
) -> tuple[RunStatus, Reason | None]:
    """Status and reason."""
    if ended.problem:
        return "invalid", ended.problem
    if (mark := request.folder / guard.MARK).exists():
        told = {"status": "invalid"} | (read(mark) or {})
    if exam.reason:
        return "invalid", believed(exam.reason)
    if told is None:
        if full(request.folder, ended):
            return "lost", because("disk_full")
        return ("crash", crash(ended, printed)) if ended.code else ("invalid", because("no_result"))
    if told.get("status") != "ok":
        return ("crash" if told.get("status") == "crash" else "invalid"), believed(told.get("reason"))
    weights = request.folder / "result.safetensors"
    wrong = problem(facts, request.budget, ended.seconds, request.memory_ceiling, weights)
    wrong = wrong or exam.problem(facts, ended.paused)
    if not wrong and facts["val_bpb"] != exam.scores["val_bpb"]:
        wrong = because("reports_other_score")
    return "invalid" if wrong else "ok", wrong


def full(folder: Path, ended: Ended) -> bool:
    """Whether a run ended as the disk is full, and not of what it wrote itself: then it says nothing of train.py."""
    if ended.code != child.FULL:
        return False
    own = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                own += 512 * os.lstat(os.path.join(place, name)).st_blocks
    return shutil.disk_usage(folder).free + own < LEAST_FREE


def crash(ended: Ended, printed: str) -> Reason:
    """Why a run ended with an error. Of what it printed only the error's name is taken: a reason is shown and recorded
    without a fence."""
    if ended.code < 0:
        name = signal.Signals(-ended.code).name if -ended.code in set(signal.Signals) else f"signal {-ended.code}"
        return because("killed_for_memory" if ended.code == -9 else "killed_by_signal", signal=name)
    header, *lines = untrusted.clean(printed).splitlines() or [""]
    error = next((line for line in lines if line and not line.startswith(" ")), "")
    name = header == untrusted.HEADER and re.match(r"[A-Za-z_][\w.]{0,60}(?=:|$)", error, re.ASCII)
    return because("raised", error=name[0]) if name else because("exit_status", status=ended.code)


def unscored(request, ended: Ended, exam: Exam) -> Reason | None:
    """Why there are no scores of saved weights. Of an error only the name is taken."""
    if ended.problem:
        return ended.problem
    if (mark := request.folder / guard.MARK).exists():
        return believed((read(mark) or {}).get("reason"))
    if exam.reason:
        return believed(exam.reason)
    if error := (read(request.folder / "score.json") or {}).get("problem"):
        return because("scoring_raised", error=error if NAME.fullmatch(str(error)) else "an error")
    if len(exam.scores) < len(exam.parts):
        return crash(ended, log.read(request.folder / "score.log")) if ended.code else because("no_clock")
    return None if all(0 < bpb < 1e9 for bpb in exam.scores.values()) else because("no_scores")


# --- What was left behind ---


def read(path: Path) -> dict | None:
    """A JSON object, or None."""
    with suppress(OSError, RecursionError):
        if path.stat().st_size <= LARGEST:
            return storage.read_json(path)
    return None


def believed(left) -> Reason:
    """A reason that a run left behind, if it is one of the judge's. It is shown and recorded without a fence, and
    train.py shared the process that wrote it: what it chose may be numbers and words in such a reason, and no more."""
    try:
        reason = msgspec.convert(left, Reason)
    except msgspec.ValidationError:
        return because("not_believed")
    names = {name for _, name, _, _ in Formatter().parse(REFUSALS.get(reason.code, "")) if name}
    if reason.code not in REFUSALS or reason.facts.keys() != names or not all(map(plain, reason.facts.values())):
        return because("not_believed")
    return reason


def plain(fact) -> bool:
    """Whether a fact that train.py may have chosen is a finite number or a word: it can give no orders."""
    if isinstance(fact, str):
        return bool(WORD.fullmatch(fact))
    most = LARGEST_INTEGER if isinstance(fact, int) else LARGEST_NUMBER
    return isinstance(fact, (int, float)) and abs(fact) <= most


def positive(name: str, value) -> bool:
    """Whether this is a word with a number above 0."""
    return plain(name) and type(value) in NUMBERS[float] and plain(value) and value > 0


def sound(told: dict) -> dict:
    """The facts of a result that are of their type: numbers finite, text cleaned; and those that it adds, if they are
    plain."""
    facts, added = {}, {}
    for name, value in told.items():
        if measure := BY_NAME.get(name):
            if value is None and measure.nullable or measure.type is bool and isinstance(value, bool):
                facts[name] = value
            elif measure.type is str and isinstance(value, str):
                facts[name] = untrusted.one_line(value, 100)
            elif type(value) in NUMBERS.get(measure.type, ()) and plain(value):
                facts[name] = measure.type(value)
            elif measure.type is dict and isinstance(value, dict) and all(map(positive, value, value.values())):
                facts[name] = dict(list(value.items())[:MOST_EXTRA])
        elif name not in ("status", "reason") and NAME.fullmatch(name) and plain(value):
            added[name] = value
    return facts | dict(list(added.items())[:MOST_EXTRA])


def problem(facts: dict, budget: float, elapsed: float, ceiling: int | None, weights: Path) -> Reason | None:
    """Why a result that says "ok" is not believed.

    Args:
        elapsed: seconds that the process took. ceiling: bytes of memory that a run may use.
    """
    if missing := [measure.name for measure in MEASURES if measure.needed and measure.name not in facts]:
        return because("result_lacks", names=", ".join(missing))
    if not facts["val_bpb"] > 0:
        return because("bpb_not_positive", val_bpb=facts["val_bpb"])
    if facts["budget_seconds"] != budget:
        return because("trained_with_other_budget", told=facts["budget_seconds"], budget=budget)
    training = facts["training_seconds"]
    longest = budget + max(budget, prepare.TIME_BUDGET) + 2  # the longest step that prepare allows, begun in time
    if not 0 <= training <= longest:  # a device that is faster than in the baseline trains for longer than by the wall
        return because("claims_training", told=training, seconds=elapsed, budget=budget)
    if ceiling is not None and facts["peak_vram_mb"] * 2**20 > ceiling:
        return because("memory", used_mb=facts["peak_vram_mb"], most_mb=ceiling / 2**20)
    if not (weights.is_file() and weights.stat().st_size):
        return because("no_weights")
    return None
