"""Several turns of the agent at once, while runs are made: each in a clone of its own, and a thread waits for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError
from lab.night import agent
from lab.session.events import TurnTaken
from lab.session.session import Session
from lab.verdict.opening import best_of

BESIDE = (
    "\n# Beside you\n\nOther turns like this one run at the same time, on the same train.py. Don't take the most "
    "obvious idea; this is number {slot} of {count}.\n"
)


@dataclass
class Turns:
    """Attributes:
    ended: turns that are over and were not taken yet, the oldest first. troubles: why some could not be begun.
    begun: how many were.
    """

    session: Session
    count: int
    ended: list[TurnTaken] = field(default_factory=list)
    troubles: list[LabError] = field(default_factory=list)
    begun: int = 0
    _going: dict[int, threading.Thread] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def at(self, clone: Path) -> Session:
        """The session, with the clone of one of the turns as its own."""
        there = Session(self.session.folder)
        there.turn = clone
        return there

    @property
    def under_way(self) -> bool:
        """Whether a turn goes on, or one that is over was not taken yet."""
        return bool(self.ended) or any(thread.is_alive() for thread in self._going.values())

    def free(self) -> int | None:
        """A slot in which a turn may begin: running turns and finished ones that wait to be run each hold a slot."""
        self._going = {slot: thread for slot, thread in self._going.items() if thread.is_alive()}
        if len(self._going) + len(self.ended) >= self.count:
            return None
        return next(slot for slot in range(1, self.count + 1) if slot not in self._going)

    def begin(self, slot: int, command: str, prompt: str, log: Path, seconds: float) -> None:
        folder = self.session.folder  # the first clone is where that of a single turn is
        self.begun, there = self.begun + 1, self.at(folder / ("turn" if slot == 1 else f"turn-{slot}"))
        parent = best_of(there).blob
        text = prompt + (BESIDE.format(slot=slot, count=self.count) if self.count > 1 else "")

        def stop() -> bool:
            return self._over.is_set() or there.ending() is not None

        def work() -> None:
            try:
                turn = agent.take_turn(there, command, text, log, seconds, stop=stop)
                turn.parent = parent
                self.ended.append(turn)
                agent.discard(there)
            except LabError as error:
                self.troubles.append(error)
            except Exception as error:
                self.troubles.append(LabError(f"{type(error).__name__}: {error}"))

        self._going[slot] = threading.Thread(target=work, daemon=True)
        self._going[slot].start()

    def discard(self) -> None:
        """Ends what is left of turns, also of those of a killed night, and deletes their clones."""
        for clone in (self.session.turn, *self.session.folder.glob("turn-*")):
            agent.discard(self.at(clone))

    def end(self) -> None:
        """Ends running turns, whose edits are lost. No other one begins."""
        self._over.set()
        for thread in self._going.values():
            thread.join(agent.GRACE * 2)
        if self.count:  # the clone of a single turn is the next night's to look at, if an error left it
            self.discard()
        self.count = 0
