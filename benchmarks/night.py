"""What a night came to, from its session's folder: verdicts, the best, and the time that the loop took for itself.

    python benchmarks/night.py ~/.cache/autoresearch/sessions/DEVICE/TAG

The loop's own time is from the end of an experiment's last process to the start of the next experiment's first run:
verdict, commit, ledger, proposal, start of the next supervisor. An agent's turn is in it, if there is one; waiting for
a busy device is, too.
"""

import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.session.events import NIGHT_EVENTS, TurnTaken  # noqa: E402
from lab.session.journal import Journal  # noqa: E402
from lab.session.session import Session  # noqa: E402
from lab.verdict.plan import noise_of  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the session")
    folder = parser.parse_args().folder.expanduser()
    session = Session(folder)
    if session.state.best is None:
        raise SystemExit(f"{folder} has no baseline yet: python -m lab wait")
    state, night = session.state, Journal(folder / "night.jsonl", NIGHT_EVENTS)
    tried = [e for e in state.decided if e.number and e.kind != "confirm"]
    print(
        f"{len(tried)} experiments, {sum(len(e.runs) for e in tried)} runs of {session.budget:g} s: "
        + ", ".join(f"{count} {status}" for status, count in Counter(e.status for e in tried).most_common())
    )
    turns = [event for event in night.events if isinstance(event, TurnTaken)]
    print(
        "turns: "
        + ", ".join(
            f"{count} {by} {outcome}"
            for (by, outcome), count in Counter((turn.by, turn.outcome) for turn in turns).most_common()
        )
    )
    best, baseline = state.mean(state.best), state.mean(state.baseline)
    print(f"best {best:.6f}, experiment {state.best.number}; baseline {baseline:.6f}; noise {noise_of(state).sd:.6f}")
    for confirmation in (e for e in state.decided if e.kind == "confirm"):
        print(f"confirmation: {confirmation.verdict.said}")
    ends = {e.number: max(run.time + run.seconds for run in e.runs) for e in tried if e.runs}
    gaps = [e.runs[0].time - ends[e.number - 1] for e in tried if e.runs and e.number - 1 in ends]
    if gaps:
        print(f"between experiments: median {statistics.median(gaps):.1f} s, longest {max(gaps):.1f} s")
    beside = [run.seconds - run.result["training_seconds"] for run in state.runs.values() if run.ok]
    print(f"a run beside its training: median {statistics.median(beside):.1f} s")


if __name__ == "__main__":
    main()
