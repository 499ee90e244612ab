"""What the agent is told, once for each experiment: program.md, how this turn goes, where the session stands, what was
tried, what became of its own last turns, and what to try. What runs printed stands between fences only.
"""

from __future__ import annotations

from collections import Counter

from lab import untrusted
from lab.night import agent, ideas
from lab.session.events import TurnTaken
from lab.session.session import Session
from lab.session.state import MEASURING, Experiment, State
from lab.untrusted import counted, fenced, one_line
from lab.verdict.plan import said_of_noise

LATEST = 20  # experiments that are told of
KEPT = 15  # of those that were kept, the last
TURNS = 5  # of the agent's own that gave nothing, since the last that did
WIDTH = 160  # characters of a description
TRACEBACK = 20  # lines


def write(session: Session, program: str, turns: list[TurnTaken], seconds: float | None = None) -> str:
    """The prompt: program.md as it is, and at most some 20,000 characters.

    Args:
        program: what program.md says now.
        turns: of the night, in order. seconds: the time limit of the turn.
    """
    state = session.state
    parts = [program.rstrip(), _this_turn(session, seconds), _standing(session), _tried(state), _last(state)]
    parts.append(_own_turns(turns))
    if lines := ideas.requests(state):
        parts.append("# What to try\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _this_turn(session: Session, seconds: float | None) -> str:
    limit = f" The turn ends after {seconds / 60:.3g} minutes; what is no Python by then is lost." if seconds else ""
    return f"""# This turn

The harness runs the loop tonight: where the text above says otherwise about starting, running or waiting, this holds.
You are called once for each experiment, and this is one call. You are in a clone of the repository that is made for
this turn and deleted after it: what `train.py` holds at the end is taken, and nothing else. `train.py` is the best so
far.

- Make one edit of `train.py`: one change that you can explain. Then end your turn. The edit is run, judged, and kept or
  put back after that; your next turn tells what became of it.{limit}
- Don't run the lab (`python -m lab run`, `wait`, `confirm`, ...), `train.py` or anything else that trains: the device
  is needed, and the lab refuses. To read is fine: `python -m lab log N`, `python -m backends.surface train.py`, and
  `git show refs/autoresearch/{session.name}/N`, the change of experiment N.
- Don't commit, switch branches, reset or stash. Don't edit other files. None of that has any effect.
- Don't ask: nobody is there. Decide, and say why.
- End your answer with one line, which goes into the ledger, of the form `CHANGE: what was changed, and why`."""


def _standing(session: Session) -> str:
    state, best = session.state, session.state.best
    times = Counter(e.status for e in ideas.changes(state))
    crashes = next((i for i, e in enumerate(reversed(state.decided)) if e.status != "crash"), len(state.decided))
    lines = [
        f"session {session.name}: {counted(len(state.experiments) - 1, 'experiment')} so far, {times['keep']} kept, "
        f"{times['discard']} discarded, {times['crash']} crashed, {times['invalid']} invalid; each trains "
        f"{session.budget:g} s"
    ]
    if best:
        lines += [
            f"best val_bpb {state.mean(best):.6f} (experiment {best.number}); baseline "
            f"{state.mean(state.baseline):.6f}",
            f"noise {said_of_noise(state)}",
        ]
    if crashes > 1:
        lines.append(f"the last {crashes} experiments crashed: make the next one safe")
    return "# Where the session stands\n\n" + "\n".join(f"- {line}" for line in lines)


def _tried(state: State) -> str:
    """Experiments, the kept and the named ones among them, as data: descriptions are an agent's words."""
    tried = [e for e in state.decided if e.kind not in MEASURING]
    kept = [e for e in tried if e.status == "keep"][-KEPT:]
    told = set(ideas.named(state)[-KEPT:]) | {e.number for e in [*kept, *tried[-LATEST:]]}
    rows = [_row(e, state) for e in tried if e.number in told]
    text = "number, verdict, gain in bits per byte (standard errors), what"
    if left_out := len(tried) - len(rows):
        text += f"; {left_out} older ones are left out"
    data = fenced("\n".join(rows), "Said by who made the changes, or by their runs")
    return f"# What was tried, and how it went\n\n{text}\n\n{data}"


def _row(experiment: Experiment, state: State) -> str:
    verdict, evidence = experiment.verdict, experiment.verdict.evidence
    gain = f"{evidence.gain:+.6f} ({experiment.t:+.1f})" if evidence and experiment.t is not None else ""
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


def _last(state: State) -> str:
    """Why the last experiment crashed, or was slow."""
    for last in state.decided[-1:]:
        trace = next((run.ended.traceback for run in reversed(last.runs) if run.ended and run.ended.traceback), "")
        if trace and last.status == "crash":
            return f"Experiment {last.number} crashed:\n\n" + fenced(untrusted.clean(trace, TRACEBACK, WIDTH))
        if last is not state.baseline and (reasons := slowed(last, state)):
            return f"Experiment {last.number} trained slower than it could: {', and '.join(reasons)}."
    return ""


def _own_turns(turns: list[TurnTaken]) -> str:
    """What came of the agent's turns since the last that gave an experiment, or what was wrong with that one."""
    own = [turn for turn in turns if turn.by == "agent" and turn.outcome not in agent.NEUTRAL]
    after = next((i for i, turn in enumerate(reversed(own)) if turn.outcome == "edited"), len(own))
    told, said = own[len(own) - after :][-TURNS:], "They gave nothing to run; do otherwise this time."
    if not told and own and own[-1].reproached:
        told, said = own[-1:], "The last one gave an experiment; what it did besides had no effect."
    if not told:
        return ""
    rows = "\n".join(f"{turn.outcome}: {one_line(turn.said, 3 * WIDTH)}" for turn in told)
    return f"# Your last turns\n\n{said} What the harness saw you do:\n\n" + fenced(rows, "Partly said by the agent")
