"""The loop that never stops: change after change is proposed, run and judged, until a limit, a person or the machine
says otherwise. Nobody has to obey "don't stop": an agent is called once for each experiment, or none at all.

What happened is in the session's journal, and what was proposed by whom in night.jsonl beside it. A night that was
killed goes on from there: what was being proposed is proposed again, what was being run is run.
"""

from __future__ import annotations

import signal
import statistics
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import filelock

import storage
from lab import untrusted
from lab.cli import render as show
from lab.genome import syntax as source
from lab.verdict import near_misses as near
from lab.session.begin import begin_change, last_words, sound_baseline
from lab.errors import LabError
from lab.session.journal import Journal
from lab.night import agent, limits, notify, prompt, proposer
from lab.night.view import Now, View
from lab.session.session import Session
from lab.session.state import BESIDE, Experiment
from lab.session.repository import TRAIN

POLL = 0.25  # seconds
LOOK_EVERY = 10.0  # seconds between looks at battery, disk and heat
LOOK_AGAIN = 2.0  # ... while they are waited for; what is gone by then was the last run's own
LONGEST_WAIT = 1200.0  # seconds for a device that is hot, throttled or busy: `speed` marks what runs on it then
AGAIN_AFTER = (2.0, 15.0, 60.0)  # seconds, after which what failed is tried again: a supervisor, a proposal
REST = (0.2, 1.0)  # of a run's time, after the first run of an experiment on a device that was not itself, after more
LAST_MOMENT = 1.2  # of a run's time has to be left for an experiment to begin
GUESSED_TURN = 120.0  # seconds of an agent's
FRUITLESS = 10  # experiments in a row that crashed or could not be judged, after which something is wrong here
PATIENCE = 30.0  # seconds for a supervisor to end, and for another command to be done with the session
THINKING = "the agent thinks"


class Over(Exception):
    """The night ends; the message says why."""


class Night:
    """One night of a session.

    Args:
        options: agent (a command, or None), turn_seconds, hours, until, max_experiments, notify; planned (the deadline
            that was told, 0 for none; None if none was).
        view: shows what goes on.
    """

    def __init__(self, session: Session, options, view: View):
        self.session, self.options, self.view = session, options, view
        self.journal = Journal(session.folder / "night.jsonl")
        self.turns = [event for event in self.journal.events if event["event"] == "turn"]
        self.stopping: str | None = None
        self.troubles: list[limits.Trouble] = []
        self.blind = False
        self._began_at: dict[str, float] = {}  # troubles by kind
        self._rested: set[int] = set()  # runs after which the device was waited for
        self._rests_until = 0.0
        self._looked, self._phase, self._since = 0.0, "", time.time()
        self.begun, self.first, self.deadline = self._began()

    def _began(self) -> tuple[float, int, float | None]:
        """When this night began, with which experiment, and when it ends: one that was killed goes on as it was."""
        asked, now = limits.asked(self.options), time.time()
        if event := limits.interrupted(self.journal.events, asked, now):
            return event["time"], event["first"], event["deadline"]
        first = self.session.state.last.number + 1
        deadline = (
            limits.deadline(self.options.hours, self.options.until, datetime.now())
            if self.options.planned is None
            else self.options.planned or None
        )
        self.journal.append("began", time=now, first=first, deadline=deadline, asked=asked)
        return now, first, deadline

    # --- The loop ---

    def run(self) -> str:
        """Goes on until it is over; why it is."""
        for text in agent.recover(self.session):  # a night was killed during its turn
            self.view.say(f"the agent {text}")
            self._journal_turn("agent", "interrupted", text)
        if found := agent.finished(self.session):  # or just after it
            self._settle(*found)
        try:
            while True:
                self._between()
                if pending := self.session.state.pending:
                    self._follow(pending)
                else:
                    sound_baseline(self.session)
                    self._propose_somehow()
        except (Over, storage.Stop, Exception) as error:
            why = str(error) if isinstance(error, Over) else self.stopping or untrusted.one_line(f"trouble: {error}")
            self._hold()
            self.journal.append("ended", time=time.time(), why=why)
            self._tell(f"{why}. {self._summary()}", "in the morning")
            if not isinstance(error, Over) and not self.stopping:
                raise
            return why

    def _between(self) -> None:
        """Before anything is begun: waits for what is in the way. Raises Over."""
        begun, told, self._looked = time.time(), set(), 0.0  # what training made hot may be so no more
        while True:
            self.session.refresh()
            self._check(LOOK_AGAIN)
            if (found := self._in_the_way()) is None:
                return
            kind, text = found
            if kind == "hot" and self._waited(kind) > LONGEST_WAIT:
                raise Over(f"the device stays too hot: {text}")
            if kind in ("paused", "elsewhere") or time.time() > begun + 1.5 * LOOK_AGAIN:  # it was seen twice
                if kind not in told and kind not in ("ending", "resting"):
                    told.add(kind)
                    self._tell(text, "trouble")
                self._show(text)
            time.sleep(POLL)

    def _in_the_way(self) -> tuple[str, str] | None:
        """(its kind, in words) of what nothing can be begun for now."""
        session = self.session
        if held := session.held:
            if held["why"] == "paused":
                return "paused", "paused; python -m lab resume goes on"
            if session.supervised:
                return "ending", "waiting for the run under way"
            if time.time() < self._rests_until:
                return "resting", "waiting: the device was not itself in the last run"
            session.release()
        if session.tree.branch() != session.branch:  # its train.py is no edit
            return "elsewhere", f"waiting: {session.branch} is not checked out; git switch {session.branch} goes on"
        for one in self.troubles:
            if one.action == "wait" and (one.kind in ("taken", "hot") or self._waited(one.kind) <= LONGEST_WAIT):
                return one.kind, f"waiting: {one.text}"
        return None

    def _waited(self, kind: str) -> float:
        """Seconds since a trouble began that is there still."""
        return time.time() - self._began_at.get(kind, time.time())

    def _check(self, every: float = LOOK_EVERY) -> None:
        """Raises Over where a limit is reached or something says stop; looks for troubles every so many seconds."""
        if self.stopping:
            raise Over(self.stopping)
        if self.deadline and time.time() >= self.deadline:
            raise Over("the time is up")
        if time.monotonic() >= self._looked + every:
            self._looked, self.troubles = time.monotonic(), limits.troubles(self.session)
            still = self._began_at if self.session.supervised else {}  # what can't be seen now may be there still
            self._began_at = still | {one.kind: self._began_at.get(one.kind, time.time()) for one in self.troubles}
        if stop := next((one for one in self.troubles if one.action == "stop"), None):
            raise Over(stop.text)
        state, most = self.session.state, self.options.max_experiments
        if state.pending or self.session.held:
            return
        if most is not None and state.last.number - self.first + 1 >= most:
            raise Over(f"{show.counted(most, 'experiment')}, as many as were wanted")
        if self.deadline and time.time() + self._needed() > self.deadline:
            raise Over("the time that is left is not enough for another experiment")

    def _needed(self) -> float:
        """Seconds for an experiment of one run, and for the turn before it unless that is under way."""
        took = [
            run.seconds
            for run in self.session.state.runs.values()
            if run.status == "ok" and run.budget == self.session.budget
        ]
        needed = LAST_MOMENT * (statistics.median(took) if took else self.session.budget)
        if self._phase != THINKING and self.options.agent and self._agent_is_due():
            turns = [turn["seconds"] for turn in self.turns if turn.get("seconds")]
            needed += min(statistics.median(turns) if turns else GUESSED_TURN, self.options.turn_seconds)
        return needed

    # --- An experiment, from the proposal to the verdict ---

    def _propose_somehow(self) -> None:
        """`_propose`, but what can't be done now is tried again a few times: git may be in use, say."""
        for pause in (*AGAIN_AFTER, None):
            try:
                return self._propose()
            except Over:
                raise
            except (storage.Stop, Exception) as error:
                if self.stopping or pause is None:
                    raise
                self._tell(f"no experiment could be begun: {untrusted.one_line(str(error))}", "trouble")
            until = time.monotonic() + pause
            while time.monotonic() < until:
                self._check()
                self._show("trying again soon")
                time.sleep(POLL)

    def _propose(self) -> None:
        """Has a change made and begins an experiment with it, if it is one."""
        session, tree = self.session, self.session.tree
        if (edit := self._edit_that_is_there()) is not None:
            return self._begin("what was in train.py already" if edit == "" else edit)
        if near.ready(session):
            return self._begin(None, near_misses=True)
        if self.options.agent and self._agent_is_due():
            return self._ask_agent()
        self._show("looking for a change", by="proposer")
        try:
            proposal = proposer.propose(session)
        except LabError:  # nothing is left
            if not self.options.agent:
                raise
            return self._ask_agent()
        if kept := agent.put_back(session, self._turns_folder() / f"before-{session.state.last.number + 1}.py"):
            self.view.say(f"{TRAIN} had other remarks than the best; it is in {kept}")
        self._journal_turn("proposer", "edited", "", proposal.description, proposal.content)
        with storage.atomic(tree.path / TRAIN) as file:
            file.write(proposal.content)
        self._begin(proposal.description)

    def _agent_is_due(self) -> bool:
        return agent.due(self.turns, {e.number for e in self.session.state.decided if fruitless(e)})

    def _edit_that_is_there(self) -> str | None:
        """The description of an edit that a killed night, or a person, left in train.py; "" where nobody gave one."""
        try:
            digest = source.describe(self.session.tree.train()).digest
        except LabError as error:
            kept = agent.put_back(self.session, self._turns_folder() / f"broken-{int(time.time())}.py")
            self._tell(f"{error}. It was put back" + (f"; what was there is in {kept}" if kept else ""), "trouble")
            return None
        if digest == self.session.state.best.digest:
            return None
        return self.turns[-1]["description"] if self.turns and self.turns[-1]["digest"] == digest else ""

    def _ask_agent(self) -> None:
        session, options = self.session, self.options
        log = self._turns_folder() / f"{len(self.turns) + 1:04d}.log"
        try:
            program = (session.tree.path / "program.md").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            program = ""
            self.view.say(f"program.md can't be read ({error}): the agent is told the rest")
        text = prompt.write(session, program, self.turns, seconds=options.turn_seconds)
        self._show(THINKING, by="agent")

        def stop():
            with suppress(Over):
                self._check()
                self._show(THINKING, by="agent")
                return (self.session.held or {}).get("now", False)
            return True

        turn = agent.take_turn(session, options.agent, text, log, options.turn_seconds, agent.PRINTED, stop)
        turn = self._settle(turn, str(log))
        if turn.outcome != "edited" or turn.righted:
            self.view.say(f"the agent {turn.said}")
        if turn.outcome == "edited":
            return self._begin(turn.description)
        if not self._agent_is_due():
            self._tell("the agent fails again and again: the proposer steps in until it recovers", "trouble")

    def _settle(self, turn: agent.Turn, log: str) -> agent.Turn:
        """Journals a turn, once; what was tried before is no edit."""
        session = self.session
        if not any(one.get("log") == log for one in self.turns):
            content = session.tree.train() if turn.outcome == "edited" else None
            if content and (same := session.state.same(source.describe(content).digest)):
                agent.put_back(session)
                turn, content = (
                    replace(
                        turn,
                        outcome="again",
                        said=(
                            f"made what is equal to experiment {same.number}, "
                            f"{untrusted.one_line(same.description)}, which was a {same.status}"
                        ),
                    ),
                    None,
                )
            self._journal_turn(
                "agent",
                turn.outcome,
                turn.said,
                turn.description,
                content,
                log=log,
                others=turn.others,
                seconds=turn.seconds,
                righted=turn.righted,
            )
        agent.settle(session)
        return turn

    def _turns_folder(self) -> Path:
        folder = self.session.folder / "turns"
        folder.mkdir(exist_ok=True)
        return folder

    def _journal_turn(self, by: str, outcome: str, said: str, description="", content: bytes | None = None, **more):
        digest = source.describe(content).digest if content else None
        number = self.session.state.last.number + 1 if outcome == "edited" else None
        self.turns.append(
            self.journal.append(
                "turn",
                time=time.time(),
                by=by,
                outcome=outcome,
                said=said,
                description=description,
                digest=digest,
                experiment=number,
                **more,
            )
        )

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
            with self.session.lock.acquire(timeout=PATIENCE):
                for text in self.session.recover():
                    self.view.say(text)
                yield
        except filelock.Timeout:
            raise LabError("another process has been at work on this session for long: python -m lab wait") from None

    def _follow(self, experiment: Experiment) -> None:
        """Sees to it that the pending experiment comes to its verdict."""
        session, failures, process, again_at, seen = self.session, 0, None, 0.0, 0
        while not experiment.applied:
            self._check()
            if self._should_rest(experiment):  # after the run under way
                session.hold("stopped", now=False)
            if session.held:
                self._between()
                continue
            if process is not None and process.poll() not in (None, 0):
                words, process = untrusted.one_line(last_words(session)), None
                failures, seen = 0 if len(session.journal.events) > seen else failures, len(session.journal.events)
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

    def _should_rest(self, experiment: Experiment) -> bool:
        """Whether the device is to be waited for before the next run: it is hot, or was not itself in the last one."""
        done = [run for run in experiment.runs if run.status is not None]
        disturbed = bool(done) and done[-1].status == "disturbed" and done[-1].number not in self._rested
        if disturbed:
            self._rested.add(done[-1].number)
            times = sum(run.status == "disturbed" for run in done)
            self._rests_until = time.time() + REST[min(times, len(REST)) - 1] * self.session.budget
            self.view.say(f"run {done[-1].number} is made again, once the device had a rest: {done[-1].reason}")
        hot = any(one.kind == "hot" for one in self.troubles)
        return not experiment.verdict and not self.session.held and (disturbed or hot)

    def _told(self, experiment: Experiment) -> None:
        found = show.facts(self.session, experiment)
        score = f" {found['val_bpb']:.6f}" if found["val_bpb"] is not None else ""
        gain = (
            f" ({found['val_bpb'] - found['parent_val_bpb']:+.6f})"
            if found["val_bpb"] is not None and found["parent_val_bpb"] is not None
            else ""
        )
        line = f"{experiment.number:4d}  {found['status']:<8}{score}{gain}  {found['description']}"
        self.view.say(line if found["status"] in ("keep", "discard") else f"{line}: {found['reason']}")
        if found["status"] == "keep" and experiment.kind not in BESIDE:
            self._notify(f"new best {found['val_bpb']:.6f}{gain}: {found['description']}")
        decided = self.session.state.decided
        row = next((i for i, e in enumerate(reversed(decided)) if not fruitless(e)), len(decided))
        if row in (agent.TIRES, FRUITLESS):
            self._tell(f"the last {row} experiments crashed or could not be judged: {found['reason']}", "trouble")
        if row >= FRUITLESS:
            raise Over(f"{row} experiments in a row came to nothing; something may be wrong with this machine")

    # --- Telling ---

    def _show(self, phase: str, by: str | None = None) -> None:
        if phase != self._phase:
            self._phase, self._since = phase, time.time()
        if self.blind:
            return
        now = Now(
            phase=phase,
            since=self._since,
            by=by or (self.turns[-1]["by"] if self.turns else "proposer"),
            deadline=self.deadline,
            most=self.options.max_experiments,
            begun=self.begun,
            first=self.first,
            troubles=[one.text for one in self.troubles],
        )
        try:
            self.view.update(now)
        except Exception as error:  # costs the picture, and not the night
            self.blind = True
            self.view.say(f"the view has failed ({type(error).__name__}: {error}); the night goes on without")

    def _tell(self, text: str, when: str) -> None:
        self.view.say(text)
        self._notify(f"{when}: {text}")

    def _notify(self, text: str) -> None:
        if self.options.notify:
            notify.send(self.options.notify, f"{self.session.name}: {text}", self.view.say)

    def _summary(self) -> str:
        state = self.session.state
        tried, kept = show.of_night(state, self.first)
        text = f"{show.counted(tried, 'experiment')}, {kept} kept"
        if state.best and state.mean(state.best) is not None:
            text += f"; best {state.mean(state.best):.6f}, baseline {state.mean(state.baseline):.6f}"
        return text

    def _hold(self) -> None:
        """Ends what runs. Paused stays paused; else the next night takes the hold away."""
        session = self.session
        session.hold((session.held or {"why": "stopped"})["why"], now=True)
        deadline = time.monotonic() + PATIENCE
        while session.supervised and time.monotonic() < deadline:
            self._show("ending what runs")
            time.sleep(POLL)
        if not session.supervised and (session.held or {}).get("why") == "stopped":
            session.release()


def fruitless(experiment: Experiment) -> bool:
    """Whether nothing can be learnt from it."""
    return experiment.status == "crash" or bool(experiment.verdict and experiment.verdict.get("unjudged"))


@contextmanager
def signals(night: Night):
    """Ctrl-C and SIGTERM end the night cleanly; a second Ctrl-C at once. What nohup has it ignore stays so."""

    def asked(number, _):
        if night.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        night.stopping = (
            "stopped by Ctrl-C" if number == signal.SIGINT else (f"stopped by {signal.Signals(number).name}")
        )

    names = [
        name
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    ]
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
            try:
                night.run()
            except KeyboardInterrupt:
                view.say("ended at once")
    print("python -m lab night goes on with it; python -m lab confirm: is the best really better than the baseline?")
    return 0
