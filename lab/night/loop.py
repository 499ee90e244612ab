"""The loop that never stops: change after change is proposed, run and judged, until a limit, a person or the machine
says otherwise. Nobody has to obey "don't stop": an agent is called once for each experiment, or none at all.

What happened is in the session's journal, and what was proposed by whom in night.jsonl beside it. A night that was
killed goes on from there: what was being proposed is proposed again, what was being run is run.
"""

from __future__ import annotations

import signal
import statistics
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

import filelock

import storage
from lab.errors import LabError
from lab.fleet import here, settings, spread
from lab.genome.syntax import TRAIN
from lab.night import agent, findings, limits, notify, offers, prompt, proposer, serve, user
from lab.night.plan import SCALE_RUNS, scale_takes
from lab.night.turns import Turns
from lab.night.view import Now, View
from lab.session.events import NIGHT_EVENTS, NightBegan, NightEnded, TurnTaken
from lab.session.journal import Journal
from lab.session.session import Session
from lab.session.state import APART, BESIDE, Experiment
from lab.share import replay
from lab.untrusted import counted, one_line
from lab.verdict import blocks, executor, near_misses, sample, shared
from lab.verdict.opening import best_of, exclusive, last_words, on_best, open_change, open_scale, sound_baseline
from lab.verdict.plan import noise_of, orders

POLL = 0.25  # seconds
LOOK_EVERY = 10.0  # seconds between looks at battery, disk and heat, and at what to do while agents think
LOOK_AGAIN = 2.0  # ... while they are waited for; what is gone by then was the last run's own
LONGEST_WAIT = 1200.0  # seconds for a device that is too hot
AGAIN_AFTER = (2.0, 15.0, 60.0)  # seconds, after which what failed is tried again: a supervisor, a proposal
LAST_MOMENT = 1.2  # of a run's time has to be left for an experiment to begin
GUESSED_TURN = 120.0  # seconds of an agent's
FRUITLESS = 10  # experiments in a row that crashed or could not be judged, after which something is wrong here
SHORTEST_BLOCK, FEWEST_SHARED = 40, 8  # runs beside those of its test, and findings to share them
PATIENCE = 30.0  # seconds for a supervisor to end, and for another command to be done with the session
THINKING = "the agent thinks"


class Over(Exception):
    """The night ends; the message says why."""


class Enough(Over):
    """It ends because no other experiment is wanted, or there is no time for one."""


class Moved(Exception):
    """Another change was kept while something was chosen to be opened, or that is not in git yet: it is chosen anew."""


class Night:
    """One night of a session.

    Args:
        options: agent (a command, or None), agents (turns of it at once, beside what runs; 0 for one in between),
            findings (whether to try those first), offers (the share of runs for replays), turn_seconds, hours, until,
            max_experiments, notify, scale (whether to run the baseline for other times at the end); planned (the
            deadline that was told, 0 for none; None if none was).
        view: shows the progress.

    Attributes:
        now: what the view shows. turns: those of all nights. stopping: why a person or the system ends it, or None.
    """

    def __init__(self, session: Session, options, view: View):
        self.session, self.options, self.view = session, options, view
        self.journal = Journal(session.folder / "night.jsonl", NIGHT_EVENTS)
        self.turns = [event for event in self.journal.events if isinstance(event, TurnTaken)]
        last = self.turns[-1] if self.turns else None
        # The turn whose experiment is to be opened.
        self._unopened = last if last and last.experiment == session.state.last.number + 1 else None
        self.stopping: str | None = None
        self._told: set[str] = set()  # kinds of what is said once
        self._looked, self._blind = 0.0, False
        self._failures = self._events = 0  # in a row, and how many events there were at the last
        began = limits.interrupted(self.journal.events, options, time.time())
        if began is None:
            first, deadline = session.state.last.number + 1, options.planned or None
            if options.planned is None:
                deadline = limits.deadline(options.hours, options.until, datetime.now())
            began = NightBegan(time=time.time(), first=first, deadline=deadline, asked=limits.asked(options))
            self.journal.append(began)
        self._turns = Turns(session, options.agents)
        self._skipped: set[str] = set()  # offers that don't apply here
        self._process = None  # that runs the experiments
        self._heard = len(session.state.done)  # verdicts that were told
        self._apart: set[int] = set()  # experiments that can't be made again, or tested, on the best
        self.now = Now(began.time, began.first, began.deadline, options.max_experiments)
        if last:
            self.now.by = last.by

    # --- The loop ---

    def run(self) -> str:
        """Goes on until it is over; why it is."""
        if text := agent.recover(self.session, self._turn_log()):  # a night was killed during its turn
            self.view.say(f"the agent {text}")
            self._journal(TurnTaken(by="agent", outcome="interrupted", said=text))
        self._turns.discard()
        try:
            try:
                while True:
                    self._between()
                    self._go_on()
            except Enough:
                self._scale()
                raise
        except (Over, storage.Stop, Exception) as error:
            why = str(error) if isinstance(error, Over) else self.stopping or one_line(f"trouble: {error}")
            self._end_what_runs()
            self.journal.append(NightEnded(why=why))
            self._tell(f"{why}. {self._summary()}", "in the morning")
            if not isinstance(error, Over) and not self.stopping:
                raise
            return why

    def _between(self) -> None:
        """Before anything is begun: waits until the device is free and not too hot, say. Raises Over."""
        begun, told, hot_since = time.time(), set(), None
        self._looked = 0.0  # what training made hot may be so no more
        while True:
            self.session.refresh()
            self._check(LOOK_AGAIN)
            if (obstacle := self._in_the_way()) is None:
                return
            kind, text = obstacle
            hot_since = (hot_since or time.time()) if kind == "hot" else None
            if hot_since and time.time() > hot_since + LONGEST_WAIT:
                raise Over(next(f"the device stays too hot: {t.text}" for t in self.now.troubles if t.kind == kind))
            if kind in ("paused", "elsewhere") or time.time() > begun + 1.5 * LOOK_AGAIN:  # it was seen twice
                if kind not in told and kind != "ending":
                    told.add(kind)
                    self._tell(text, "trouble")
                self._show(text)
            time.sleep(POLL)

    def _in_the_way(self) -> tuple[str, str] | None:
        """(kind, text) of what nothing can be begun for now."""
        session = self.session
        if held := session.held:
            if held["why"] == "paused":
                return "paused", "paused; to continue: python -m lab resume"
            if session.supervised:
                return "ending", "waiting for the current run"
            session.release("stopped")
        if session.repository.branch() != session.branch:  # its train.py is no edit
            return "elsewhere", f"waiting: {session.branch} is not checked out; git switch {session.branch}"
        for trouble in self.now.troubles:
            if trouble.action == "wait":
                return trouble.kind, f"waiting: {trouble.text}"
        return None

    def _check(self, every: float = LOOK_EVERY) -> None:
        """Raises Over if a limit is reached or a trouble says stop; looks for troubles every so many seconds."""
        now = self.now
        if self.stopping:
            raise Over(self.stopping)
        if now.deadline and time.time() >= now.deadline:
            raise Over("the time is up")
        if time.monotonic() >= self._looked + every:
            self._looked, now.troubles = time.monotonic(), limits.troubles(self.session)
        for trouble in now.troubles:
            if trouble.action == "say" and trouble.kind not in self._told:
                self._told.add(trouble.kind)
                self.view.say(f"{trouble.text}: runs take longer, but train as much")
        if stop := next((trouble for trouble in now.troubles if trouble.action == "stop"), None):
            raise Over(stop.text)
        if not self.session.state.open and (why := self._enough()):
            raise Enough(why)

    def _enough(self, turn: bool = False) -> str:
        """Why no more is begun, or no turn of an agent before it; "" if something may be."""
        now, most = self.now, self.now.most
        if most is not None and self.session.state.last.number - now.first + 1 >= most:
            return f"{counted(most, 'experiment')}, as many as --max-experiments allows"
        if now.deadline and time.time() + self._needed(turn) > now.deadline:
            return "the time that is left is not enough for another experiment"
        return ""

    def _room(self) -> bool:
        """Whether another experiment is to be opened: on one device once none is open, on several so that none of them
        waits."""
        state, fleet = self.session.state, self.session.fleet
        if not state.open:
            return True
        if fleet is None or not state.baseline.applied or not (state.best and state.best.applied) or self._enough():
            return False
        busy = {run.worker for experiment in state.open for run in experiment.runs if run.ended is None}
        present = [device["name"] for device in settings.status(self.session) if device["usable"]]
        return bool(present) and not spread.supplied(orders(state), state, busy, present)

    def _needed(self, turn: bool) -> float:
        """Seconds for an experiment of one run, and for the turn before it unless that is under way: a `turn` that is
        to begin never is."""
        needed = self._run_takes()
        under_way = self._turns.under_way if self._turns.count else self.now.phase == THINKING
        if (turn or not under_way) and self.options.agent and self._agent_is_due():
            turns = [turn.seconds for turn in self.turns if turn.seconds]
            needed += min(statistics.median(turns) if turns else GUESSED_TURN, self.options.turn_seconds)
        return needed + self._scale_takes()

    def _run_takes(self) -> float:
        """Seconds from the begin of a run to its verdict."""
        took = self.session.state.took()
        return LAST_MOMENT * (statistics.median(took) if took else self.session.budget)

    def _scale_takes(self) -> float:
        """Seconds to be left for the baseline's runs for other times, if they are wanted and were not made yet."""
        return LAST_MOMENT * scale_takes(self.session) if self.options.scale else 0.0

    def _scale(self) -> None:
        """Runs the baseline for other times, so that effects can be told as factors of time; if there is time."""
        takes, state = self._scale_takes(), self.session.state
        if not takes or state.baseline.status != "keep":
            return
        if self.now.deadline and time.time() + takes > self.now.deadline:
            return self.view.say("no time is left for --scale: python -m lab confirm --scale runs it")
        self._turns.end()
        with self._alone():
            open_scale(self.session, SCALE_RUNS)
        while state.open:  # not _follow(): on several devices there is room for more
            self._attend("training")

    # --- An experiment, from the proposal to the verdict ---

    def _go_on(self) -> None:
        """Brings what is open to its verdict, or opens something. What can't be done now is tried again a few times:
        git may be in use, say."""
        session, experiment = self.session, None if self._room() else self.session.state.oldest_open
        if experiment is None:
            sound_baseline(session)
        try:
            return self._follow() if experiment else self._propose()
        except Moved:
            return
        except Over:
            raise
        except (storage.Stop, Exception) as error:
            events, ended = len(session.journal.events), [run for run in session.state.runs.values() if run.ended]
            last = ended[-1].reason if ended else None
            stuck = events == self._events or last is not None and last.code in ("disk_full", "not_begun")
            self._failures, self._events = self._failures if stuck else 0, events
            if self.stopping or self._failures == len(AGAIN_AFTER):
                raise
            what = f"experiment {experiment.number} was not carried out" if experiment else "no experiment was begun"
            self._tell(f"{what}; it is tried again: {one_line(str(error))}", "trouble")
        until = time.monotonic() + AGAIN_AFTER[self._failures]
        self._failures += 1
        if self._failures == len(AGAIN_AFTER):  # the last attempt is made without the edit, which may be the cause
            self._unopened = None
        while time.monotonic() < until:
            self._check()
            self._show("trying again soon")
            time.sleep(POLL)

    def _propose(self) -> None:
        """Opens an experiment: with what a killed night had not opened, what a person has edited, near misses, what was
        found elsewhere, or what the agent or the proposer makes in its turn, if anything."""
        if self._unopened is None:
            if self._rebase() or self._offer():
                return
            if (content := self._edit_of_a_person()) is not None:
                self.now.by = "user"
                self._open(f"the edit that {TRAIN} had already", content)
                return
            if near_misses.ready(self.session):
                self._open(None)
                return
            if self.options.findings and self._open_block():
                return
            if not (self.options.findings and self._take_finding()):
                due = self.options.agent and (self._agent_is_due() or self._turns.ended)
                if due or not self._ask_proposer():
                    if not self._turns.count:
                        self._ask_agent()
                    elif not self._take_turn(resting=not due):
                        return
        if turn := self._unopened:
            if content := on_best(self.session, turn.blob, turn.parent):
                self._open(turn.description, content, {"origin": turn.origin})
            else:
                self.view.say(f"not run, as it can't be merged with the best, or is part of it: {turn.description}")
            self._unopened = None  # where that failed it is tried again

    def _rebase(self) -> bool:
        """Makes a superseded change again on the best. Returns whether there was one. It is dropped if both changed
        the same lines, or it is part of the best."""
        state, kept = self.session.state, "kind members origin pairs patches".split()
        again = {experiment.rebased for experiment in state.experiments.values()} | self._apart
        for old in [e for e in state.decided if e.status == "superseded" and e.number not in again]:
            said = f"experiment {old.number} was made on an earlier best, and can't be merged with the best"
            if content := on_best(self.session, old.blob, old.parent or ""):
                more = {"rebased": old.number} | {name: getattr(old, name) for name in kept}
                if (equal := self._open(old.description, content, more)) is None:
                    return True
                said = f"experiment {old.number} would be equal to experiment {equal.number} now"
            self._apart.add(old.number)
            self.view.say(f"{said}: it is not made again")
        return False

    def _offer(self) -> bool:
        """Opens what a session on another device has kept, while that has had less than its share of the runs."""
        session = self.session
        if not offers.room(session.state, self.options.offers):
            return False
        if (offer := offers.next_offer(session, self._skipped)) is None:
            return False
        with self._alone():
            replay.opened(session, offer, session.state.baseline, offers.RUNS)
        return True

    def _edit_of_a_person(self) -> bytes | None:
        """What is in the user's train.py, if it is to be run."""
        edit = user.edit(self.session, self._turn_log().with_suffix(".yours.py"))
        if edit.told and edit.content:
            self.view.say(edit.told)
        elif edit.told:
            self._tell(edit.told, "trouble")
        return edit.content

    def _open_block(self) -> bool:
        """On a noisy device: a block of shared runs of findings, or the test of what the last one chose. False where
        there is none to open."""
        session, runs = self.session, shared.BLOCK
        block = blocks.untested(session.state)
        if block and block.number not in self._apart:
            with self._alone():
                if blocks.open_joint(session, block):
                    return True
            self._apart.add(block.number)
            chosen = f"the findings that the shared runs of experiment {block.number} chose"
            self.view.say(f"none of {chosen} applies to the best any more")
        if not blocks.suit(session.state) or findings.plainly_good(session):
            return False
        if (most := self.now.most) is not None:  # who wants few experiments wants no more runs
            runs = min(runs, self.now.first + most - 1 - session.state.last.number)
        if self.now.deadline:
            left = self.now.deadline - time.time() - self._scale_takes()
            devices = sum(device["usable"] for device in settings.status(session)) or 1
            runs = min(runs, int(left / self._run_takes()) * devices)
        long_enough = runs >= SHORTEST_BLOCK + 2 * shared.tested(noise_of(session.state).sd)
        patches = findings.patches(session) if long_enough else []
        if len(patches) < FEWEST_SHARED:
            return False
        with self._alone():
            blocks.open_block(session, patches, runs)
        return True

    def _take_finding(self) -> bool:
        """False where nothing is left of what was found elsewhere and promises something here."""
        self.now.by = "findings"
        self._show("looking for a change")
        session = self.session
        idea = findings.plainly_good(session) or next(findings.ideas(session, findings.alone(session)), None)
        if idea is None:
            if "findings" not in self._told and next(findings.ideas(session), None):
                self._told.add("findings")
                self.view.say(
                    "the noise of single experiments hides what the other published findings promise: a longer "
                    "night has time to share runs among them (docs/findings.md)"
                )
            return False
        turn = TurnTaken(by="findings", outcome="edited", description=idea.description, origin=idea.origin)
        turn.blob = session.repository.store(idea.content)
        self._journal(turn)
        return True

    def _ask_proposer(self) -> bool:
        """False where it has nothing left, and the agent is to be asked instead."""
        self.now.by = "proposer"
        self._show("looking for a change")
        try:
            proposal = proposer.propose(self.session, self.options.findings)
        except LabError:
            if not self.options.agent:
                raise
            return False
        blob = self.session.repository.store(proposal.content)
        facts = {"description": proposal.description, "origin": proposal.origin, "blob": blob}
        self._journal(TurnTaken(by="proposer", outcome="edited", **facts))  # pyright: ignore[reportArgumentType]
        return True

    def _agent_is_due(self) -> bool:
        return agent.due(self.turns, {e.number for e in self.session.state.decided if fruitless(e)})

    def _prompt(self) -> str:
        program = ""
        with suppress(OSError):  # it is gone: the agent is told the rest
            program = (self.session.repository.path / "program.md").read_text(encoding="utf-8", errors="replace")
        return prompt.write(self.session, program, self.turns, self.options.turn_seconds)

    def _think(self, resting: bool = False) -> None:
        """Has agents begin turns beside what runs, as many at once as were asked for, unless their edits could not be
        run any more; also if the agent is `resting`, where nothing else is left."""
        turns, state = self._turns, self.session.state
        while state.best and state.best.applied and (slot := turns.free()) and (resting or self._agent_is_due()):
            if self._enough(turn=True):
                break
            log = self._turn_log()
            log = log.with_name(f"{log.stem}-{turns.begun + 1}.log")
            turns.begin(slot, self.options.agent, self._prompt(), log, self.options.turn_seconds)

    def _take_turn(self, resting: bool) -> bool:
        """Takes what an agent has made, once a turn is over; False if before that there may be something else to do:
        something was journalled, or it is time to look around again."""
        self.now.by = "agent"
        self._think(resting)
        events = len(self.session.journal.events)
        while not (self._turns.ended or self._turns.troubles):
            if self.session.state.open:
                self._attend(THINKING)
            else:
                self._check()
                self._show(THINKING)
                time.sleep(POLL)
            if len(self.session.journal.events) > events or time.monotonic() >= self._looked + LOOK_EVERY:
                return False
        if self._turns.troubles:
            raise self._turns.troubles.pop()
        self._took(self._turns.ended.pop(0))
        self._think()
        return True

    def _ask_agent(self) -> None:
        session, seconds, text = self.session, self.options.turn_seconds, self._prompt()
        self.now.by = "agent"
        self._show(THINKING)

        def stop() -> bool:
            with suppress(Over):
                self._check()
                self._show(THINKING)
                return session.ending() is not None
            return True

        turn = agent.take_turn(session, self.options.agent, text, self._turn_log(), seconds, stop=stop)
        self._took(turn)
        agent.discard(session)

    def _took(self, turn: TurnTaken) -> None:
        self._journal(turn)
        if turn.outcome != "edited" or turn.reproached or turn.left:
            self.view.say(f"the agent {agent.told(turn)}")
        if turn.outcome != "edited" and not self._agent_is_due():
            what = f"the agent {turn.said}" if turn.outcome == agent.UNSERVED else "the agent fails again and again"
            self._tell(f"{what}: the proposer steps in until it recovers", "trouble")

    def _turn_log(self) -> Path:
        """The log of the next turn."""
        folder = self.session.folder / "turns"
        folder.mkdir(exist_ok=True)
        return folder / f"{len(self.turns) + 1:04d}.log"

    def _journal(self, turn: TurnTaken) -> None:
        if turn.blob:
            turn.parent = turn.parent or best_of(self.session).blob  # nobody has refreshed since it was begun
            turn.experiment, self._unopened = self.session.state.last.number + 1, turn
        self.journal.append(turn)
        self.turns.append(turn)

    def _open(
        self, description: str | None, content: bytes | None = None, more: dict | None = None
    ) -> Experiment | None:
        """Journals a train.py as an experiment, or without one the near misses together; `_follow` runs it. Returns
        what it is equal to, if it is not run therefore."""
        session, together = self.session, content is None
        with self._alone():
            equal = open_change(session, description, near_misses_together=together, content=content, more=more)
        if equal:
            self.view.say(f"not run: it is equal to experiment {equal.number}, which {equal.became}")
        return equal

    @contextmanager
    def _alone(self):
        """The session to oneself; with several devices beside what runs, as only a night opens experiments then. Raises
        Moved where the best is not what was known: what was made on that would undo what was kept since."""
        best = best_of(self.session)
        with exclusive(self.session, PATIENCE, self.view.say) if self.session.fleet is None else nullcontext():
            self.session.refresh()
            if best_of(self.session) is not best or not best.applied:
                raise Moved
            yield

    def _follow(self) -> None:
        """Sees to it that open experiments come to their verdicts, until there is room for another. LabError if what
        runs them ends before."""
        while not self._room():
            self._attend("training")
        self._tell_verdicts()

    def _attend(self, phase: str) -> None:
        """Looks after what is open, for a moment."""
        session = self.session
        self._check()
        hot = session.fleet is None and any(trouble.kind == "hot" for trouble in self.now.troubles)
        if hot and not session.state.open[0].decided and not session.held:  # waited for, after the run under way
            session.hold("stopped", now=False)
        if session.held:
            return self._between()
        process = self._process
        if process is not None and process.poll() not in (None, 0):
            self._process = None
            raise LabError(f"the process that runs the experiments has ended: {last_words(session)}")
        if process is None or process.poll() is not None:
            session.refresh()
            if session.state.open and not session.supervised:
                self._process = executor.launch(session)
        if self._turns.count:
            self._think()
        self._show(phase)
        time.sleep(POLL)
        session.refresh()
        self._tell_verdicts()

    # --- Telling ---

    def _tell_verdicts(self) -> None:
        while self._heard < len(done := self.session.state.done):
            self._heard += 1
            self._tell_verdict(done[self._heard - 1])

    def _tell_verdict(self, experiment: Experiment) -> None:
        verdict, what = experiment.verdict, one_line(experiment.description)
        score = f" {verdict.mean:.6f}" if verdict.mean is not None else ""
        if verdict.mean is not None and verdict.parent_mean is not None:
            score += f" ({verdict.mean - verdict.parent_mean:+.6f})"
        line = f"{experiment.number:4d}  {verdict.status:<8}{score}  {what}"
        plain = verdict.status in ("keep", "discard") and experiment.kind not in ("shared", *APART)
        self.view.say(line if plain else f"{line}: {verdict.said}")
        if verdict.status == "keep" and experiment.kind not in BESIDE:
            self._notify(f"new best{score}: {what}")
        decided = [e for e in self.session.state.decided if e.number >= self.now.first]
        row = next((i for i, e in enumerate(reversed(decided)) if not fruitless(e)), len(decided))
        if row in (agent.TIRES, FRUITLESS):
            self._tell(f"the last {row} experiments crashed or could not be judged: {verdict.said}", "trouble")
        if row >= FRUITLESS:
            raise Over(f"{row} experiments in a row had no result; something may be wrong with this machine")

    def _show(self, phase: str) -> None:
        if phase != self.now.phase:
            self.now.phase, self.now.since = phase, time.time()
        try:
            if not self._blind:
                self.view.update(self.now)
        except Exception as error:  # costs the picture, and not the night
            self._blind = True
            self.view.say(f"the display has failed ({type(error).__name__}: {error}); the night continues without it")

    def _tell(self, text: str, when: str) -> None:
        self.view.say(text)
        self._notify(f"{when}: {text}")

    def _notify(self, text: str) -> None:
        if self.options.notify:
            notify.send(self.options.notify, f"{self.session.name}: {text}", self.view.say)

    def _summary(self) -> str:
        state = self.session.state
        tried, kept = self.now.counts(state)
        text = f"{counted(tried, 'experiment')}, {kept} kept"
        if state.best and (mean := state.mean(state.best)) is not None:
            text += f"; best {mean:.6f}, baseline {state.mean(state.baseline):.6f}"
        return text

    def _end_what_runs(self) -> None:
        """What was paused stays paused; else the next night takes the hold away."""
        self._turns.end()
        session, deadline = self.session, time.monotonic() + PATIENCE
        session.hold("stopped", now=True)
        while session.supervised and time.monotonic() < deadline:
            self._show("ending the current run")
            time.sleep(POLL)
        if not session.supervised:
            session.release("stopped")


def fruitless(experiment: Experiment) -> bool:
    """Whether nothing can be learnt from it."""
    return experiment.unjudged or experiment.status == "crash"


@contextmanager
def signals(night: Night):
    """Ctrl-C and SIGTERM end the night cleanly; a second Ctrl-C at once. What nohup has it ignore stays so."""

    def asked(number, _):
        if night.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        night.stopping = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, asked) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def go(session: Session, options) -> int:
    """Runs a night of this session; options as of Night. LabError if one is running already."""
    try:
        lock = session.night_lock.acquire(timeout=1)  # on Windows, who looks whether it is held has it for a moment
    except filelock.Timeout:
        raise LabError("a night of this session is running already; python -m lab status shows it") from None
    kind = session.profile.get("machine", {}).get("kind", "")
    settings.choose(session, here.devices(options.devices, kind) if options.devices else [])
    with lock, limits.awake(), View(session) as view, serve.served(session, options.page, view.say):
        night = Night(session, options, view)
        with signals(night):
            try:
                night.run()
                sample.after_night(session)
            except KeyboardInterrupt:
                view.say("ended at once")
    confirm = " To test the best against the baseline: python -m lab confirm"
    improved = session.state.best not in (None, session.state.baseline)
    print("To continue: python -m lab night." + confirm * improved)
    return 0
