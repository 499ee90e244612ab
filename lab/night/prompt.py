"""What the agent is told, once for each experiment: program.md, how this turn goes, where the session stands, what was
tried, what became of its own last turns, and what to try. What runs printed stands between fences only.
"""

from __future__ import annotations

from lab import untrusted
from lab.cli import render as show
from lab.night import agent, ideas
from lab.session.session import Session
from lab.session.state import CONFIRM, REPEAT, REPLAY, Experiment

LATEST = 20  # experiments that are told of
KEPT = 15  # of those that were kept, the last
TURNS = 5  # of the agent's own that gave nothing, since the last that did
WIDTH = 160  # characters of a description
TRACEBACK = 20  # lines


def write(session: Session, program: str, turns: list[dict], seconds: float | None = None) -> str:
    """The prompt: program.md as it is, and at most some 20,000 characters.

    Args:
        program: what program.md says now.
        turns: events "turn" of the night, in order. seconds: the time limit of the turn.
    """
    parts = [
        program.rstrip(),
        _this_turn(session, seconds),
        _standing(session),
        _tried(session),
        _crash(session),
        _own_turns(turns),
        _requests(session),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _this_turn(session: Session, seconds: float | None) -> str:
    limit = f" The turn ends after {seconds / 60:.3g} minutes; what is no Python by then is lost." if seconds else ""
    return f"""# This turn

The harness runs the loop tonight: where the text above says otherwise about starting, running or waiting, this holds.
You are called once for each experiment, and this is one call. `train.py` is the best so far.

- Make one edit of `train.py`: one change that you can explain. Then end your turn. The edit is run, judged, and kept or
  put back after that; your next turn tells what became of it.{limit}
- Don't run the lab (`python -m lab run`, `wait`, `confirm`, ...), `train.py` or anything else that trains: the device
  is needed, and the lab refuses. To read is fine: `python -m lab log N`, `python -m backends.surface train.py`, and
  `git show refs/autoresearch/{session.name}/N`, the change of experiment N.
- Don't commit, switch branches, reset or stash. Don't edit other files: that has no effect on how you are judged.
- Don't ask: nobody is there. Decide, and say why.
- End your answer with one line, which goes into the ledger, of the form `CHANGE: what was changed, and why`."""


def _standing(session: Session) -> str:
    found = show.status_facts(session)
    lines = [
        f"session {found['session']}: {show.counted(found['experiments'], 'experiment')} so far, {found['keep']} "
        f"kept, {found['discard']} discarded, {found['crash']} crashed, {found['invalid']} invalid; each trains "
        f"{found['budget_seconds']:g} s"
    ]
    if best := found.get("best"):
        lines += [
            f"best val_bpb {best['val_bpb']:.6f} (experiment {best['experiment']}); baseline {found['baseline']:.6f}",
            "noise " + show.told_noise(found["noise"], found["smallest_detectable"]),
        ]
    if found["crashes_in_a_row"] > 1:
        lines.append(f"the last {found['crashes_in_a_row']} experiments crashed: make the next one safe")
    return "# Where the session stands\n\n" + "\n".join(f"- {line}" for line in lines)


def _tried(session: Session) -> str:
    """Experiments, the kept and the named ones among them, as data: descriptions are an agent's words."""
    all_of_them = [e for e in session.state.decided if e.kind not in (CONFIRM, REPEAT)]
    kept = [e for e in all_of_them if e.status == "keep"][-KEPT:]
    named = set(ideas.named(session)[-KEPT:]) | {e.number for e in [*kept, *all_of_them[-LATEST:]]}
    rows = [_row(e) for e in all_of_them if e.number in named]
    left_out = len(all_of_them) - len(rows)
    text = "number, verdict, gain in bits per byte (standard errors), what" + (
        f"; {left_out} older ones are left out" if left_out else ""
    )
    return f"# What was tried, and how it went\n\n{text}\n\n" + untrusted.fenced(
        "\n".join(rows), "Said by who made the changes, or by their runs"
    )


def _row(experiment: Experiment) -> str:
    found = experiment.verdict.get("gate", {})
    gain = f"{found['gain']:+.6f} ({found['gain'] / found['error']:+.1f})" if found.get("error") else ""
    what = "(on the baseline, to see if it helps here) " * (experiment.kind == REPLAY)
    what += untrusted.one_line(experiment.description, WIDTH)
    if not found and experiment.kind != "baseline" and experiment.verdict.get("reason"):
        what += f" | {untrusted.one_line(experiment.verdict['reason'], WIDTH)}"
    return f"{experiment.number:4d}  {experiment.status:<8} {gain:<18} {what}"


def _crash(session: Session) -> str:
    """The end of the last experiment's traceback, if it crashed."""
    last = session.state.decided[-1] if session.state.decided else None
    trace = next((run.traceback for run in reversed(last.runs) if run.traceback), "") if last else ""
    if not trace or last.status != "crash":
        return ""
    return f"Experiment {last.number} crashed:\n\n" + untrusted.fenced(untrusted.clean(trace, TRACEBACK, WIDTH))


def _own_turns(turns: list[dict]) -> str:
    """What came of the agent's turns since the last that gave an experiment, or what was wrong with that one."""
    own = [turn for turn in turns if turn["by"] == "agent" and turn["outcome"] not in agent.NEUTRAL]
    after = next((i for i, turn in enumerate(reversed(own)) if turn["outcome"] == "edited"), len(own))
    told, said = own[len(own) - after :][-TURNS:], "They gave nothing to run; do otherwise this time."
    if not told and own and own[-1].get("righted"):
        told, said = own[-1:], "The last one gave an experiment; what it did besides had no effect."
    if not told:
        return ""
    rows = "\n".join(f"{turn['outcome']}: {untrusted.one_line(turn['said'], 3 * WIDTH)}" for turn in told)
    return f"# Your last turns\n\n{said} What the harness saw you do:\n\n" + untrusted.fenced(
        rows, "Partly said by the agent"
    )


def _requests(session: Session) -> str:
    lines = ideas.asked(session)
    return "# What to try\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
