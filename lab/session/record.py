"""A session wherever it was run: what its journal says, and what is kept beside it. Comparison, report and replay read
sessions in this form, whether they are this machine's own, imported, on a branch, or a ledger of somebody."""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.errors import LabError
from lab.genome.change import patched
from lab.genome.syntax import normalised
from lab.session.events import SessionStarted
from lab.session.state import BASELINE, State


@dataclass
class Record:
    """A session.

    Attributes:
        state: what its journal adds up to.
        base: the train.py that it began with; None where only a ledger is known.
    """

    state: State
    base: bytes | None = None
    _trains: dict[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def started(self) -> SessionStarted:
        return self.state.started

    @property
    def name(self) -> str:
        """DEVICE/TAG."""
        return self.state.name

    def train(self, number: int) -> bytes:
        """The train.py of an experiment, made of the first one by the diffs that lead to it.

        Raises:
            LabError: it is not known.
        """
        if number not in self._trains:
            experiment = self.state.experiments.get(number)
            if experiment is None or self.base is None:
                raise LabError(f"the train.py of experiment {number} of {self.name} is not known")
            first = next(e.number for e in self.state.experiments.values() if e.blob == experiment.blob)
            if number == BASELINE or experiment.onto is None:
                self._trains[number] = normalised(self.base)
            elif experiment.diff:
                self._trains[number] = patched(self.train(experiment.onto), experiment.diff)
            elif first == number:
                raise LabError(f"the diff of experiment {number} of {self.name} is not known")
            else:  # further runs of one, such as a confirmation's
                self._trains[number] = self.train(first)
        return self._trains[number]
