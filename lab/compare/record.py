"""A session as comparison and report see it, wherever it was run: its changes, and every run of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from lab.verdict.gate import Noise


@dataclass(frozen=True)
class Trial:
    """One run of one train.py that ended with a score.

    Attributes:
        run: its number in the session; None in a ledger that has none. seed: None if unknown.
        bpb: val_bpb. eval: tag of what it was measured by; budget: seconds of training.
        tokens: it was trained on. flops: the model's, for all of them. mfu: percent. Each None if unknown.
        memory: GB at the peak. seconds: all that the run took.
        confirms: it is part of a confirmation.
        beside: number of the experiment that it was run for: the change's own, or a later one, or a confirmation. Up to
            there it may have had a part in a verdict.
    """

    run: int | None
    seed: int | None
    bpb: float
    eval: str = ""
    budget: float | None = None
    tokens: float | None = None
    flops: float | None = None
    mfu: float | None = None
    memory: float | None = None
    seconds: float | None = None
    confirms: bool = False
    beside: int = 0


@dataclass(frozen=True)
class Change:
    """An experiment: one train.py, against the one that it was made from.

    Attributes:
        number: in its session; 0 is the baseline. parent: the number of what it was made from; None for the baseline.
        status: "keep", "discard", "crash" or "invalid". kind: "baseline", "change", "near misses", "replay".
        patch: stable id of the change, "" if unknown. origin: "DEVICE/TAG/PATCH" of the change that this one repeats.
        kinds: of lab.kinds.KINDS, what it is about. text: a unified diff, None if unknown.
        trials: all runs of its train.py, those beside later experiments and of confirmations too.
        commit, description, reason: as in the ledger. near_miss: better, but not told from chance.
        started: when, as in the ledger.
    """

    number: int
    parent: int | None
    status: str
    kind: str
    description: str
    patch: str = ""
    origin: str = ""
    kinds: tuple[str, ...] = ()
    text: str | None = None
    trials: tuple[Trial, ...] = ()
    commit: str = ""
    reason: str = ""
    near_miss: bool = False
    started: str = ""

    @property
    def key(self) -> str:
        """Equal for the same change on every machine; "" if only its words are known."""
        return self.origin.rpartition("/")[2] or self.patch


@dataclass
class Record:
    """A session.

    Attributes:
        changes: by number, the baseline first.
        noise: of val_bpb between seeds, as the session estimated it; None where nothing was repeated.
        budget: seconds of training; None if unknown. hours: from its first run to the end of its last.
        rows: of its ledger.
        tagged: whether its rows name what they were measured under. A ledger of five columns does not.
        confirmation: what the last one said.
        notes: what a reader should know: lines that were set aside, rows of another budget.
        facts: as session.json has them (see bundle.TEXTS), "" where unknown.
    """

    device: str
    tag: str
    changes: dict[int, Change]
    backend: str = ""
    noise: Noise | None = None
    budget: float | None = None
    hours: float | None = None
    rows: int = 0
    tagged: bool = True
    confirmation: str = ""
    notes: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    profile: dict | None = None

    @property
    def name(self) -> str:
        return f"{self.device}/{self.tag}"

    @cached_property
    def eval(self) -> str:
        """The tag of what most of its runs were measured by; "" if that is unknown."""
        tags = Counter(t.eval for change in self.changes.values() for t in change.trials if self.usual(t))
        return tags.most_common(1)[0][0] if tags else self.facts.get("eval", "")

    def usual(self, trial: Trial) -> bool:
        """Whether a run was as long as the session's are."""
        return None in (trial.budget, self.budget) or trial.budget == self.budget
