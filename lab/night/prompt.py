"""What the agent is told, once for each experiment, and all that it needs: the rules of program.md, how this turn goes,
train.py, where the session stands, what was tried, what became of its own last turns, what it may compute with, and
what to try. What others said, runs printed or agents wrote stands between fences only. No path leads out of the
repository: some agents may not go there.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice

from backends.operations import MODULES, OPERATIONS, TABLE
from lab import untrusted
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.night import agent, findings, ideas
from lab.session.events import TurnTaken
from lab.session.session import Session
from lab.session.state import MEASURING, Experiment, State
from lab.untrusted import counted, fenced, one_line
from lab.verdict.opening import best_of
from lab.verdict.plan import said_of_noise

MOST = 12_000  # bytes, beside train.py
MOST_RULES = 3500  # bytes
LONGEST_TRAIN = 65_536  # bytes of a train.py that is told
LATEST = 20  # experiments that are told of
KEPT = 15  # of those that were kept, the last
TURNS = 3  # of the agent's own that gave nothing, since the last that did
RUNNING = 8  # experiments that are being run
WIDTH = 120  # characters of a description
TRACEBACK = 12  # lines
DIFFS, DIFF_LINES = 6, 14  # changes whose lines are told, and how many of each
MOST_FINDINGS = 8  # published ones that are told
VALUES = 8  # of a variable, the best
RULES = re.compile(r"^#+ *rules\b.*?$\n(.*?)(?=^#+ |\Z)", re.I | re.M | re.S)
ASSIGNED = re.compile(r"^([+-])([A-Z][A-Z0-9_]*) = (.*?)(?:  #.*)?$", re.M)
HEADINGS = re.compile(r"(# .*)|(\w+)\(")
KEYS = """attention(...): q (B, T, H, D), k and v (B, T, H_kv, D); causal; `window` tokens back, None for all; bias
(H, N) by distance; documents (B, T) integers. rope(x (B, T, H, D), base). key=(SEED, place): each draw its own place.
mean_loss(head, loss, hidden, targets): head makes float32 logits of some tokens, loss each token's nats."""


def write(session: Session, program: str, turns: list[TurnTaken], seconds: float | None = None) -> str:
    """The prompt: train.py, and at most MOST bytes more.

    Args:
        program: what program.md says now, "" if it is gone.
        turns: of all nights, in order. seconds: the time limit of the turn.
    """
    state = session.state
    fixed = {
        "rules": _rules(program),
        "turn": _this_turn(session, seconds),
        "standing": _standing(session),
        "running": _running(state),
        "last": _last(session),
        "own": _own_turns(turns),
        "surface": _surface(),
        "requests": _section("What to try", "\n".join(f"- {line}" for line in ideas.requests(state))),
    }
    # What can be told at greater or smaller length, the most useful first: each gets its share of what is left, and
    # what those before it left over.
    flexible: list[tuple[str, float, Callable[[int], str]]] = [
        ("tried", 0.4, lambda most: _tried(state, most)),
        ("diffs", 0.5, lambda most: _diffs(state, most)),
        ("values", 0.6, lambda most: _values(state, most)),
        ("published", 0.5, lambda most: _published(session, most)),
        ("kept", 1.0, lambda most: _kept_elsewhere(session, most)),
    ]
    parts, left = dict(fixed), MOST - sum(_size(text) + 2 for text in fixed.values())
    for name, share, told in flexible:
        parts[name] = told(int(share * left))
        left -= _size(parts[name]) + 2
    order = "rules turn standing running tried values diffs last own kept published requests surface".split()
    return "\n\n".join(parts[name] for name in order if parts[name]) + f"\n\n{_train(session)}\n"


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


def _section(title: str, text: str) -> str:
    return f"# {title}\n\n{text}" if text else ""


def _fitting(lines: Iterable[str], most: int) -> list[str]:
    """The first lines of a text, as many as fit into so many bytes."""
    kept, left = [], most
    for line in lines:
        left -= _size(line) + 1
        if left < 0:
            break
        kept.append(line)
    return kept


def _rules(program: str) -> str:
    """The section of program.md that is headed "Rules"; all of it, if there is none."""
    found = RULES.search(program)
    text = (found[1] if found else program).strip()
    if _size(text) > MOST_RULES:
        text = "\n".join([*_fitting(text.split("\n"), MOST_RULES - 50), "(the rest is in program.md)"])
    task = (
        "You improve a small language model: val_bpb (validation bits per byte) after a fixed time of training, lower "
    )
    return f"{task}is better.\n\n{_section('Rules', text)}".rstrip()


def _this_turn(session: Session, seconds: float | None) -> str:
    most = f"{agent.PRINTED / 2**20:g} MB of output"
    ends = f"{seconds / 60:.3g} minutes, or {most}" if seconds else most
    limit = f" The turn ends after {ends}; an edit that is not valid Python by then is lost."
    return f"""# This turn

You are called once for each experiment, and this is one call, in a clone of the repository that is made for it and
deleted after it. What `{TRAIN}` holds at the end is taken, and nothing else.

- Make one change of `{TRAIN}`, the best so far, that you can explain. Then end your turn. The edit is run for
  {session.budget:g} s of training, judged, and kept or put back; your next prompt says what became of it.{limit}
- All that is needed is in this text. If you have a shell, `python -m lab check` tries an edit within seconds, without
  a score; `python -m lab log N` shows experiment N. `python` is `{sys.executable}`.
- Train nothing, and run no experiment: {TRAIN} and the lab refuse it within a turn.
- Don't commit, switch branches, reset or stash. Don't edit other files. None of that has any effect.
- Don't ask: nobody is there. Decide, and say why.
- End your answer with one line, which goes into the ledger, of the form `CHANGE: what was changed, and why`."""


def _train(session: Session) -> str:
    """train.py as it is, unless it is too long for that."""
    content = session.repository.content(best_of(session).blob)
    if len(content) > LONGEST_TRAIN:
        return _section(TRAIN, f"It has {len(content):,} bytes, too many for this prompt: read it in parts.")
    text = untrusted.visible(content.decode("utf-8-sig", errors="replace"))
    return _section(TRAIN, fenced(text.rstrip("\n"), f"{TRAIN} as it is now, the best so far"))


# --- Where the session stands ---


def _standing(session: Session) -> str:
    state, best = session.state, session.state.best
    times = Counter(e.status for e in ideas.changes(state))
    crashes = next((i for i, e in enumerate(reversed(state.decided)) if e.status != "crash"), len(state.decided))
    lines = [
        f"{counted(len(state.experiments) - 1, 'experiment')} so far, {times['keep']} kept, {times['discard']} "
        f"discarded, {times['crash']} crashed, {times['invalid']} invalid"
    ]
    if best:
        lines += [
            f"best val_bpb {state.mean(best):.6f} (experiment {best.number}); baseline "
            f"{state.mean(state.baseline):.6f}",
            f"noise {said_of_noise(state)}",
        ]
        if (share := of_throughput(state)) is not None:
            lines.append(f"{share:.0%} of that noise comes from the number of tokens that a run trained on")
        lines += _device(session, best)
    if crashes > 1:
        lines.append(f"the last {crashes} experiments crashed: make the next one safe")
    return _section("Where the session stands", "\n".join(f"- {line}" for line in lines))


def _running(state: State) -> str:
    """What is open on several devices, and so must not be proposed again."""
    lines = [f"{e.number:4d}  {one_line(e.description, WIDTH)}" for e in state.open if e.decided is None][-RUNNING:]
    return _section("Running now", fenced("\n".join(lines), "not decided yet: propose something else") if lines else "")


def of_throughput(state: State) -> float | None:
    """The part of the variance of val_bpb between runs of the same train.py that goes with log(tokens): the squared
    correlation within them, pooled. None with fewer than 4 degrees of freedom."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for run in state.runs.values():
        if run.ok and run.budget == state.started.budget and (tokens := run.measured("total_tokens_M")):
            groups.setdefault(run.blob, []).append((math.log(tokens), run.bpb))
    centred = [
        (x - statistics.fmean(a for a, _ in group), y - statistics.fmean(b for _, b in group))
        for group in groups.values()
        for x, y in group
    ]
    xx, yy, xy = (
        sum(f(x, y) for x, y in centred) for f in (lambda x, _: x * x, lambda _, y: y * y, lambda x, y: x * y)
    )
    if len(centred) - len(groups) < 4 or not yy:
        return None
    return xy**2 / (xx * yy) if xx else 0.0


def _device(session: Session, best: Experiment) -> list[str]:
    """What it runs on, and what the best's runs were like there: medians."""
    started = session.started
    precision = session.profile.get("settings", {}).get("precision")
    lines = [f"device {started.device}, backend {started.backend}" + (f", {precision}" if precision else "")]
    results = [run.result for run in session.state.runs_of(best.blob) if run.ok]

    def median(name: str) -> float | None:
        values = [result[name] for result in results if result.get(name)]
        return statistics.median(values) if values else None

    shown = {
        "depth": "depth {:.0f}",
        "num_params_M": "{:.1f} M parameters",
        "num_steps": "{:,.0f} steps",
        "total_tokens_M": "{:.3g} M tokens",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu_percent": "{:.0f} % of the measured matmul peak",
    }
    facts = [text.format(value) for name, text in shown.items() if (value := median(name)) is not None]
    if memory := median("peak_vram_mb"):
        most = session.local.memory_ceiling
        facts.append(
            f"{memory / 1024:.1f} GB of memory" + (f", where {most / 2**30:.1f} GB may be used" if most else "")
        )
    return [*lines, f"a run of the best: {', '.join(facts)}"] if facts else lines


# --- What was tried ---


def _tried(state: State, most: int) -> str:
    """Experiments, the kept and the named ones among them, as data: descriptions are an agent's words. The last ones go
    before the others where there is no room for all."""
    tried = [e for e in state.decided if e.kind not in MEASURING]
    kept = [e.number for e in tried if e.status == "keep"][-KEPT:]
    named, latest = ideas.named(state)[-KEPT:], [e.number for e in tried[-LATEST:]]
    by_value = list(dict.fromkeys([*latest[::-1], *named[::-1], *kept[::-1]]))
    rows = {e.number: _row(e, state) for e in tried if e.number in by_value}
    told = _fitting((rows[number] for number in by_value if number in rows), most - 350)
    rows = [row for row in rows.values() if row in told]
    text = "number, verdict, gain in bits per byte (standard errors), what"
    if left_out := len(tried) - len(rows):
        text += f"; {left_out} older ones are left out (`python -m lab log`)"
    data = fenced("\n".join(rows), "Descriptions by the authors of the changes, and output of their runs")
    return _section("What was tried, and how it went", f"{text}\n\n{data}")


def _row(experiment: Experiment, state: State) -> str:
    verdict, evidence = experiment.verdict, experiment.verdict.evidence
    gain = "" if experiment.gain is None else f"{experiment.gain:+.6f} ({experiment.t:+.1f})"
    what = "(on the baseline, to see if it helps here) " * (experiment.kind == "replay")
    parts = [what + one_line(experiment.description, WIDTH)]
    if evidence is None and experiment.kind != "baseline":
        parts.append(one_line(verdict.said, WIDTH))
    parts += slowed(experiment, state)
    return f"{experiment.number:4d}  {experiment.status:<8} {gain:<18} {' | '.join(filter(None, parts))}"


def slowed(experiment: Experiment, state: State) -> list[str]:
    """What made the last run of an experiment slow, where that was not so in the baseline's."""
    result = next((run.result for run in reversed(experiment.own_runs) if run.result), {})
    first = [] if experiment is state.baseline else state.baseline.runs
    usual = next((run.result for run in first if run.result), {})
    reasons = []
    if result.get("compiled") is False and usual.get("compiled") is not False:
        reasons.append("the step was not compiled")
    elif result.get("captured") is False and usual.get("captured") is not False:
        reasons.append("its kernels were launched one at a time, not as CUDA graphs")
    if (rows := result.get("rows_at_once")) and rows != usual.get("rows_at_once"):
        reasons.append(
            f"its batches went through in parts, {counted(rows, 'row')} at a time: no more fitted into memory"
        )
    return reasons


def _values(state: State, most: int) -> str:
    """The values that were tried of each variable of the block, and what each gained: the most tried variable first,
    and of each the values that came closest, the best first."""
    tried: dict[str, dict[str, str]] = {}
    for e in sorted(ideas.changes(state), key=lambda e: -math.inf if e.gain is None else e.gain):
        new = {name: value for mark, name, value in ASSIGNED.findall(e.diff) if mark == "+"}
        gain = e.status if e.gain is None else f"{e.gain:+.4f}"
        for name, value in new.items():
            known = tried.setdefault(name, {})
            value = one_line(value, 60)
            known.pop(value, None)
            known[value] = gain + " kept" * (e.status == "keep") + " with others" * (len(new) > 1)
    lines = []
    for name, values in sorted(tried.items(), key=lambda item: -len(item[1])):
        told = list(values.items())[: -VALUES - 1 : -1]
        lines.append(f"{name}: " + ", ".join(f"{value} ({gain})" for value, gain in told))
    if not (lines := _fitting(lines, most - 250)):
        return ""
    return _section("Values tried, with their gains", fenced("\n".join(lines), "Of the changes above"))


def _diffs(state: State, most: int) -> str:
    """The lines of what was kept, of near misses, and of the last if it crashed; the last first."""
    tried = ideas.changes(state)
    crashed = [e for e in tried[-1:] if e.status == "crash"]
    wanted = [e for e in reversed(tried) if (e.status == "keep" or e.near_miss or e in crashed) and e.diff]
    told = _fitting((_lines_of(e) for e in wanted[:DIFFS]), most - 250)
    if not told:
        return ""
    return _section("Diffs of kept changes and near misses", fenced("\n".join(told), "Written by agents"))


def _lines_of(experiment: Experiment) -> str:
    what = {"keep": "kept", "crash": "crashed"}.get(experiment.status, "near miss")
    return f"experiment {experiment.number}, {what}\n" + _changed_lines(experiment.diff, DIFF_LINES)


def _changed_lines(diff: str, most: int) -> str:
    rows = [row for row in diff.split("\n") if row[:1] in ("+", "-") and row[:3] not in ("+++", "---")]
    shown = [untrusted.cut(untrusted.plain(row), WIDTH) for row in rows[:most]]
    return "\n".join(shown + [f"... {len(rows) - most} more lines"] * (len(rows) > most))


def _published(session: Session, most: int) -> str:
    """Published findings that apply to the best, promise something on this device and were not tried, a line each."""
    lines = []
    with suppress(LabError, OSError):
        for idea in islice((idea for idea in findings.ideas(session) if idea.name), MOST_FINDINGS):
            lines.append(f"- {one_line(idea.description, WIDTH)} (findings/{idea.name}.txt, {idea.gain:+.4f})")
    lines = _fitting(lines, most - 200)
    text = "The edit and the evidence of each are in its file; behind it, the gain that is expected here."
    return _section("Published elsewhere, not tried here", "\n".join([text, "", *lines])) if lines else ""


def _kept_elsewhere(session: Session, most: int) -> str:
    """What other sessions kept and was not tried here, with its lines."""
    try:
        found = findings.untried(session)
    except (LabError, OSError):
        return ""
    texts = []
    for one in found:
        gain, where = one.change.gain or 0.0, one.origin.split("/")[0]
        texts.append(
            f"on {where}, {gain:+.4f}: {one_line(one.description, WIDTH)}\n{_changed_lines(one.change.diff, 8)}"
        )
    if not (texts := _fitting(texts, most - 250)):
        return ""
    return _section(
        "Kept in other sessions, not tried here; each applies as it is", fenced("\n".join(texts), "From other sessions")
    )


def _last(session: Session) -> str:
    """Why the last experiment crashed, or was slow."""
    state = session.state
    for last in state.decided[-1:]:
        run = next((run for run in reversed(last.runs) if run.ended and run.ended.traceback), None)
        if run and run.ended and last.status == "crash":
            trace = untrusted.clean(within(run.ended.traceback), TRACEBACK, WIDTH)
            return f"Experiment {last.number} crashed:\n\n" + fenced(trace)
        if last is not state.baseline and (reasons := slowed(last, state)):
            return f"Experiment {last.number} trained slower than it could: {', and '.join(reasons)}."
    return ""


def within(text: str) -> str:
    """A text whose paths are relative to the repository, or cut to their last part: a run's own folder is not shown."""
    text = re.sub(r"(?:/[^\s\"':]+)?/(?:runs/\d+|judge|site-packages)/", "", text)
    return re.sub(r"(?<![\w.])/(?:[^\s\"':/]+/)+([^\s\"':/]+/[^\s\"':/]+)", r".../\1", text)


def _own_turns(turns: list[TurnTaken]) -> str:
    """What came of the agent's turns since the last that gave an experiment, or what was wrong with that one. What a
    service failed at is left out."""
    own = [turn for turn in turns if turn.by == "agent" and turn.outcome not in agent.NEUTRAL]
    after = next((i for i, turn in enumerate(reversed(own)) if turn.outcome == "edited"), len(own))
    told, said = own[len(own) - after :][-TURNS:], "They gave nothing to run; act differently this time."
    if not told and own and own[-1].reproached:
        told, said = own[-1:], "The last one gave an experiment; its other actions had no effect."
    if not told:
        return ""
    rows = "\n".join(f"{turn.outcome}: {within(one_line(turn.said, 2 * WIDTH))}" for turn in told)
    text = f"{said} What the harness saw you do:\n\n" + fenced(rows, "Partly said by the agent")
    return _section("Your last turns", text)


def _surface() -> str:
    """What a train.py may compute with, in short: names, and arguments where it is not one array."""
    lines: list[str] = []
    for heading, name in HEADINGS.findall("\n".join(row.split("  ")[0] for row in TABLE.split("\n"))):
        if heading:
            lines.append(heading[2:].split(";")[0].split(",")[0] + ":")
        elif name in OPERATIONS:
            call = re.sub(r"/, |, /|\*, ", "", str(OPERATIONS[name]))
            lines[-1] += f" {name}" if call == f"{name}(x)" else f" {call}"
    modules = " ".join(row.split("  ")[0] for row in MODULES.strip().split("\n"))
    return _section(
        "What train.py may compute with",
        f"nn: {modules}\n\nops, of one array x unless it says otherwise; axis, key and what has a default go by name:\n"
        + "\n".join(lines)
        + f"\n\n{KEYS}\n"
        "`python -m backends.surface` says more.",
    )
