"""What the report says of a session, worked out from its Record: scores, the way of the best, time, kinds of change."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from lab.compare import comparison, effects
from lab.compare.record import Change, Record, Trial
from lab.report.html import cleaned
from lab.session.state import REPLAY

ABOVE_ZERO = re.compile(r"90 % interval ([+-][0-9.]+) to ([+-][0-9.]+)\)")
SHORT = 200  # characters of a description


@dataclass
class Spent:
    """Seconds of an experiment's runs: training of its own train.py and of others' beside it, and what runs took apart
    from training (start, compilation, evaluation)."""

    own: float = 0.0
    beside: float = 0.0
    around: float = 0.0

    @property
    def total(self) -> float:
        return self.own + self.beside + self.around


class View:
    """A session as the report tells it."""

    def __init__(self, record: Record):
        self.record = record
        self.changes = list(record.changes.values())
        self.facts = comparison.facts_of(record)

    @property
    def name(self) -> str:
        return cleaned(self.record.name)

    @cached_property
    def judged(self) -> dict[int, list[Trial]]:
        """By experiment, the runs that its score is the mean of: confirmations left out."""
        return {c.number: [t for t in effects.counted(self.record, c) if not t.confirms] for c in self.changes}

    @cached_property
    def scores(self) -> dict[int, float]:
        """Mean val_bpb by experiment, of those that have one."""
        return {number: statistics.fmean(t.bpb for t in trials) for number, trials in self.judged.items() if trials}

    @cached_property
    def steps(self) -> list[Change]:
        """The baseline, and what was kept on top of it, in order. A replay that helped is not among them: it was
        judged against the baseline, and the best stays where it is."""
        return [c for c in self.changes if c.status == "keep" and c.kind != REPLAY and c.number in self.scores]

    @property
    def baseline(self) -> Change | None:
        return self.steps[0] if self.steps and self.steps[0].number == 0 else None

    @property
    def best(self) -> Change | None:
        return self.steps[-1] if self.steps else None

    @property
    def gain(self) -> float | None:
        """Bits per byte that the best is below the baseline."""
        return self.facts.gain

    @property
    def relative(self) -> float | None:
        """The gain as a share of the baseline."""
        return self.facts.relative

    def effect(self, change: Change) -> float | None:
        """val_bpb minus the parent's: below 0 is better."""
        if change.number not in self.scores or change.parent not in self.scores:
            return None
        return self.scores[change.number] - self.scores[change.parent]

    @cached_property
    def counts(self) -> Counter:
        """By status, without the baseline."""
        return Counter(c.status for c in self.changes if c.number)

    @property
    def replays(self) -> bool:
        """Whether all that it tried were others' changes, on its baseline."""
        return self.tried > 0 and all(c.kind == REPLAY for c in self.changes if c.number)

    @property
    def tried(self) -> int:
        return self.facts.experiments

    @property
    def confirmed(self) -> bool | None:
        """What the last confirmation came to; None if there was none."""
        found = ABOVE_ZERO.search(self.record.confirmation)
        return float(found[1]) > 0 if found else None

    @property
    def confirmed_before(self) -> bool:
        """Whether something was kept after the last confirmation."""
        last = [c.number for c in self.steps if c.number and any(t.confirms for t in c.trials)]
        return bool(self.record.confirmation) and self.best is not None and last[-1:] != [self.best.number]

    # --- Time ---

    @cached_property
    def spent(self) -> dict[int, Spent]:
        """By the experiment that runs were made for, confirmations too."""
        found: dict[int, Spent] = {}
        for change in self.changes:
            for trial in change.trials:
                if trial.seconds is None or trial.budget is None:
                    continue
                spent = found.setdefault(trial.beside, Spent())
                trained = min(trial.budget, trial.seconds)
                spent.around += trial.seconds - trained
                if trial.beside == change.number:
                    spent.own += trained
                else:
                    spent.beside += trained
        return dict(sorted(found.items()))

    @property
    def shares(self) -> list[tuple[str, float]]:
        """(what, hours): where the session's time went."""
        confirms = [t for c in self.changes for t in c.trials if t.confirms]
        confirming = sum(t.seconds or 0.0 for t in confirms)
        judging = self.spent.keys() - {t.beside for t in confirms}
        rest = (self.record.hours or 0.0) * 3600 - sum(spent.total for spent in self.spent.values())
        return [
            (what, seconds / 3600)
            for what, seconds in (
                ("training the changes", sum(self.spent[number].own for number in judging)),
                (
                    "training again: parents beside them, further runs",
                    sum(self.spent[number].beside for number in judging),
                ),
                ("start, compilation and evaluation of runs", sum(self.spent[number].around for number in judging)),
                ("confirmations", confirming),
                ("between runs, crashed runs, thinking", max(0.0, rest)),
            )
            if seconds > 0
        ]

    # --- Kinds ---

    @property
    def kinds(self) -> list[tuple[str, int, int, int, float | None]]:
        """(kind, tried, kept, crashed, median effect), by how often it was tried; of the kind that most of a change
        is of."""
        groups: dict[str, list[Change]] = {}
        for change in self.changes:
            if change.number and change.kinds:
                groups.setdefault(change.kinds[0], []).append(change)
        found = []
        for kind, changes in groups.items():
            effects = [effect for effect in map(self.effect, changes) if effect is not None]
            found.append(
                (
                    kind,
                    len(changes),
                    sum(c.status == "keep" for c in changes),
                    sum(c.status == "crash" for c in changes),
                    statistics.median(effects) if effects else None,
                )
            )
        return sorted(found, key=lambda one: -one[1])

    def mean(self, change: Change, name: str) -> float | None:
        """Of a figure of its runs, "tokens" say."""
        values = [value for t in self.judged[change.number] if (value := getattr(t, name)) is not None]
        return statistics.fmean(values) if values else None


def words(change: Change, width: int = SHORT) -> str:
    """What it says it is about, cleaned."""
    return cleaned(change.description, width) or "(not described)"


def in_short(view: View) -> tuple[str, str]:
    """(the headline, a sentence)."""
    best, gain = view.best, view.gain
    if best is None:
        return "No score yet", "No run has ended with a score."
    score = view.scores[best.number]
    if gain is None:
        return f"{score:.6f}", "val_bpb of what was kept last. The ledger has no baseline to compare with."
    if view.replays:
        return (
            f"{view.counts['keep']} of {view.tried} replayed changes help here",
            f"Each of them was judged against the baseline, whose val_bpb is {score:.6f}.",
        )
    if best.number == 0:
        return "Nothing kept yet", f"The baseline's val_bpb is {score:.6f}, and no experiment of {view.tried} beat it."
    better, less = ("better", "less") if gain > 0 else ("worse", "more")  # a simplification may cost a little
    return (
        f"{100 * abs(view.relative):.2f} % {better} than the baseline",
        f"val_bpb {score:.6f} instead of {view.scores[0]:.6f}: {abs(gain):.6f} bits per byte {less}, after "
        f"{view.tried} experiments.",
    )
