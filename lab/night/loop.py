"""The loop that never stops: change after change is proposed, run and judged, until a limit, a person or the machine
says otherwise. Nobody has to obey "don't stop": an agent is called once for each experiment, or none at all.

What happened is in the session's journal, and what was proposed by whom in night.jsonl beside it. A night that was
killed goes on from there: what was being proposed is proposed again, what was being run is run.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import filelock

import prepare
from lab import near, show, source, untrusted
from lab.commands import begin_change, last_words, sound_baseline
from lab.errors import LabError
from lab.journal import Journal
from lab.night import agent, limits, notify, prompt, proposer
from lab.night.view import Now, View
from lab.session import Session
from lab.state import CONFIRM, Experiment
from lab.tree import TRAIN

POLL = 0.25  # seconds
LOOK_EVERY = 10.0  # seconds between looks at battery, disk and heat
LOOK_AGAIN = 2.0  # ... while they are waited for; what is gone by then was the last run's own
LONGEST_WAIT = 1200.0  # seconds for a device that is hot, throttled or busy: `speed` marks what runs on it then
AGAIN_AFTER = (2.0, 15.0, 60.0)  # seconds, after which a supervisor that failed is started again
LAST_MOMENT = 1.2  # of a run's time has to be left for an experiment to begin
MOST_PRINTED = 16 * 2**20  # bytes, of an agent in one turn
KEPT_ON = 30.0  # seconds that a supervisor is given to end


class Over(Exception):
    """The night ends; the message says why."""


class Night:
    """One night of a session.

    Args:
        options: agent (a command, or None), turn_seconds, hours, until, max_experiments, notify.
        view: shows what goes on.
    """

    def __init__(self, session: Session, options, view: View):
        self.session, self.options, self.view = session, options, view
        self.journal = Journal(session.folder / "night.jsonl")
        self.stopping: str | None = None
        self.troubles: list[limits.Trouble] = []
        self._looked, self._phase, self._since = 0.0, "", time.time()
        self.begun, self.first, self.deadline = self._began()

    def _began(self) -> tuple[float, int, float | None]:
        """When this night began, with which experiment, and when it ends: one that was killed goes on as it was."""
        asked = {name: getattr(self.options, name) for name in ("hours", "until", "max_experiments")}
        for event in reversed(self.journal.events):
            if event["event"] == "ended":
                break
            if event["event"] == "began":
                if event["asked"] == asked and (event["deadline"] or time.time() + 1) > time.time():
                    return event["time"], event["first"], event["deadline"]
                break
        now = time.time()
        deadline = limits.deadline(self.options.hours, self.options.until, datetime.now())
        self.journal.append("began", time=now, first=self.session.state.last.number + 1, deadline=deadline, asked=asked)
        return now, self.session.state.last.number + 1, deadline

    # --- The loop ---

    def run(self) -> str:
        """Goes on until it is over; why it is."""
        for text in agent.recover(self.session):  # a night was killed during its turn
            self.view.say(f"the agent {text}")
            self._journal_turn("agent", "interrupted", text)
        try:
            while True:
                self._between()
                if pending := self.session.state.pending:
                    self._follow(pending)
                else:
                    sound_baseline(self.session)
                    self._propose()
        except Over as over:
            self._hold()
            self.journal.append("ended", time=time.time(), why=str(over))
            self._tell(f"{over}. {self._summary()}", "in the morning")
            return str(over)
        except prepare.Stop as error:  # which says what to do
            self._hold()
            self._notify(f"trouble, and the night ends: {untrusted.one_line(str(error))}")
            raise

    def _between(self) -> None:
        """Before anything is begun: waits while the night is paused or the device is not itself. Raises Over."""
        waited, told, self._looked = time.time(), set(), 0.0  # what training made hot may be so no more
        while True:
            self.session.refresh()
            self._check(LOOK_AGAIN)
            if held := self.session.held:
                if held["why"] != "paused":
                    self.session.release()
                    continue
                self._show("paused; python -m lab resume goes on")
                waited = time.time()
            elif elsewhere := self._elsewhere():
                if elsewhere not in told:
                    told.add(elsewhere)
                    self._tell(f"waiting: {elsewhere}", "trouble")
                self._show(f"waiting: {elsewhere}")
                waited = time.time()
            elif not (waits := [one for one in self.troubles if one.action == "wait"]):
                return
            elif time.time() > waited + LONGEST_WAIT:
                if hot := next((one for one in waits if one.kind == "hot"), None):
                    raise Over(f"the device stays too hot: {hot.text}")
                return
            elif time.time() > waited + LOOK_AGAIN:
                for one in waits:
                    if one.kind not in told:
                        told.add(one.kind)
                        self._tell(f"waiting: {one.text}", "trouble")
                self._show(f"waiting: {waits[0].text}")
            time.sleep(POLL)

    def _elsewhere(self) -> str | None:
        """That train.py is another branch's, which is no edit."""
        branch = self.session.branch
        return None if self.session.tree.branch() == branch else (
            f"{branch} is not checked out; git switch {branch} goes on")

    def _check(self, every: float = LOOK_EVERY) -> None:
        """Raises Over where a limit is reached or something says stop; looks for troubles every so many seconds."""
        if self.stopping:
            raise Over(self.stopping)
        if self.deadline and time.time() >= self.deadline:
            raise Over("the time is up")
        if time.monotonic() >= self._looked + every:
            self._looked = time.monotonic()
            self.troubles = limits.troubles(self.session)
        if stop := next((one for one in self.troubles if one.action == "stop"), None):
            raise Over(stop.text)
        if self.session.state.pending or self.session.held:
            return
        most = self.options.max_experiments
        if most is not None and self.session.state.last.number - self.first + 1 >= most:
            raise Over(f"{show.counted(most, 'experiment')}, as many as were wanted")
        needed = LAST_MOMENT * (self.session.budget + (self.session.overhead() or 0))
        if self.deadline and time.time() + needed > self.deadline:
            raise Over("the time that is left is not enough for another experiment")

    # --- An experiment, from the proposal to the verdict ---

    def _propose(self) -> None:
        """Has a change made and begins an experiment with it, if it is one."""
        session, tree = self.session, self.session.tree
        if (edit := self._edit_that_is_there()) is not None:
            return self._begin("what was in train.py already" if edit == "" else edit)
        if near.ready(session):
            return self._begin(None, near_misses=True)
        if self.options.agent and agent.due(self.turns):
            self._ask_agent()
            return
        self._show("looking for a change", by="proposer")
        proposal = proposer.propose(session)
        self._journal_turn("proposer", "edited", "", proposal.description, proposal.content)
        with prepare.whole(tree.path / TRAIN) as file:
            file.write(proposal.content)
        self._begin(proposal.description)

    def _edit_that_is_there(self) -> str | None:
        """The description of an edit that a killed night, or a person, left in train.py; "" where nobody gave one."""
        try:
            digest = source.describe(self.session.tree.train()).digest
        except LabError as error:
            kept = agent.put_back(self.session, self._turns_folder() / f"broken-{int(time.time())}.py")
            self._tell(f"{error}. It was put back; what was there is in {kept}", "trouble")
            return None
        if digest == self.session.state.best.digest:
            return None
        return self.turns[-1]["description"] if self.turns and self.turns[-1]["digest"] == digest else ""

    def _ask_agent(self) -> None:
        session, options = self.session, self.options
        log = self._turns_folder() / f"{len(self.turns) + 1:04d}.log"
        try:
            program = (session.tree.path / "program.md").read_text(errors="replace")
        except OSError as error:
            program = ""
            self.view.say(f"program.md can't be read ({error}): the agent is told the rest")
        text = prompt.write(session, program, self.turns, seconds=options.turn_seconds)
        self._show("the agent thinks", by="agent")

        def stop():
            with suppress(Over):
                self._check()
                self._show("the agent thinks", by="agent")
                return (self.session.held or {}).get("now", False)
            return True

        turn = agent.take_turn(session, options.agent, text, log, options.turn_seconds, MOST_PRINTED, stop=stop)
        if turn.outcome == "edited":
            if same := session.state.same(source.describe(session.tree.train()).digest):
                agent.put_back(session)
                turn = replace(turn, outcome="again", said=f"made what is equal to experiment {same.number}, "
                               f"{untrusted.one_line(same.description)}, which was a {same.status}")
        if turn.outcome == "edited":
            if turn.others:
                self.view.say(f"the agent {turn.said}")
            self._journal_turn("agent", "edited", turn.said, turn.description, session.tree.train(), turn.others)
            return self._begin(turn.description)
        self._journal_turn("agent", turn.outcome, turn.said, others=turn.others)
        self.view.say(f"the agent {turn.said}")
        if not agent.due(self.turns):
            self._tell("the agent fails again and again: the proposer steps in until it recovers", "trouble")

    def _turns_folder(self) -> Path:
        folder = self.session.folder / "turns"
        folder.mkdir(exist_ok=True)
        return folder

    def _journal_turn(self, by, outcome, said, description="", content=None, others=()) -> None:
        digest = source.describe(content).digest if content else None
        number = self.session.state.last.number + 1 if outcome == "edited" else None
        self.journal.append("turn", time=time.time(), by=by, outcome=outcome, said=said, description=description,
                            digest=digest, experiment=number, others=list(others))

    def _begin(self, description: str | None, near_misses: bool = False) -> None:
        """Journals what is in train.py as an experiment; `_follow` runs it."""
        session = self.session
        with self._exclusive():
            answer = begin_change(session, SimpleNamespace(message=description, near_misses=near_misses, again=False))
        if answer:
            self.view.say(f"not run: it is equal to experiment {answer.number}, which was a {answer.status}")

    @contextmanager
    def _exclusive(self):
        try:
            with self.session.lock.acquire(timeout=KEPT_ON):
                for text in self.session.recover():
                    self.view.say(text)
                yield
        except filelock.Timeout:
            raise LabError("another process has been at work on this session for long: python -m lab wait") from None

    def _follow(self, experiment: Experiment) -> None:
        """Sees to it that the pending experiment comes to its verdict."""
        session, failures, process, again_at = self.session, 0, None, 0.0
        while not experiment.applied:
            self._check()
            if session.held:
                self._between()
                continue
            if process is not None and process.poll() not in (None, 0):
                words, process = untrusted.one_line(last_words(session)), None
                if failures == len(AGAIN_AFTER):
                    raise Over(f"experiment {experiment.number} can't be carried out: {words}")
                again_at = time.monotonic() + AGAIN_AFTER[failures]
                failures += 1
                self._tell(f"what runs the experiments has ended ({words}); it is started again", "trouble")
            if (process is None or process.poll() is not None) and time.monotonic() >= again_at:
                session.refresh()
                if not experiment.applied and not session.supervised:
                    process = session.launch()
            self._show("training")
            time.sleep(POLL)
            session.refresh()
        self._told(experiment)

    def _told(self, experiment: Experiment) -> None:
        found = show.facts(self.session, experiment)
        score = f" {found['val_bpb']:.6f}" if found["val_bpb"] is not None else ""
        gain = (f" ({found['val_bpb'] - found['parent_val_bpb']:+.6f})"
                if found["val_bpb"] is not None and found["parent_val_bpb"] is not None else "")
        line = f"{experiment.number:4d}  {found['status']:<8}{score}{gain}  {found['description']}"
        self.view.say(line if found["status"] in ("keep", "discard") else f"{line}: {found['reason']}")
        if found["status"] == "keep" and experiment.kind not in ("baseline", CONFIRM):
            self._notify(f"new best {found['val_bpb']:.6f}{gain}: {found['description']}")

    # --- Telling ---

    @property
    def turns(self) -> list[dict]:
        return [event for event in self.journal.events if event["event"] == "turn"]

    def _by(self) -> str:
        return self.turns[-1]["by"] if self.turns else "person"

    def _show(self, phase: str, by: str | None = None) -> None:
        if phase != self._phase:
            self._phase, self._since = phase, time.time()
        self.view.update(Now(phase=phase, since=self._since, by=by or self._by(), deadline=self.deadline,
                             most=self.options.max_experiments, begun=self.begun, first=self.first,
                             troubles=[one.text for one in self.troubles]))

    def _tell(self, text: str, when: str) -> None:
        self.view.say(text)
        self._notify(f"{when}: {text}")

    def _notify(self, text: str) -> None:
        if self.options.notify:
            notify.send(self.options.notify, f"{self.session.name}: {text}", self.view.say)

    def _summary(self) -> str:
        state = self.session.state
        tried = [e for e in state.decided if e.number >= max(1, self.first)]
        kept = sum(e.status == "keep" and e.kind != CONFIRM for e in tried)
        text = f"{show.counted(len(tried), 'experiment')}, {kept} kept"
        if state.best and state.mean(state.best) is not None:
            text += f"; best {state.mean(state.best):.6f}, baseline {state.mean(state.baseline):.6f}"
        return text

    def _hold(self) -> None:
        """Ends what runs. Paused stays paused; else the next night takes the hold away."""
        session = self.session
        session.hold((session.held or {"why": "stopped"})["why"], now=True)
        deadline = time.monotonic() + KEPT_ON
        while session.supervised and time.monotonic() < deadline:
            self._show("ending what runs")
            time.sleep(POLL)
        if not session.supervised and (session.held or {}).get("why") == "stopped":
            session.release()


@contextmanager
def signals(night: Night):
    """Ctrl-C and SIGTERM end the night cleanly; a second Ctrl-C at once."""
    def asked(number, _):
        if night.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        night.stopping = "stopped by Ctrl-C" if number == signal.SIGINT else (
            f"stopped by {signal.Signals(number).name}")

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), asked) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def go(session: Session, options) -> int:
    """A night of this session."""
    try:
        lock = session.night_lock.acquire(timeout=1)  # who asks for the status has it for a moment
    except filelock.Timeout:
        raise LabError("a night of this session goes on already; python -m lab status tells how it stands") from None
    with lock, limits.awake(), View(session) as view:
        night = Night(session, options, view)
        with signals(night):
            night.run()
    print("python -m lab night goes on with it; python -m lab confirm: is the best really better than the baseline?")
    return 0
