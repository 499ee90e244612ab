"""The night as it is seen: a live view at the foot of a terminal, plain lines anywhere else.

What a run or an agent wrote is shown as cleaned words; of a run's log, numbers alone.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.segment import Segment, SegmentLines
from rich.table import Table
from rich.text import Text

from lab import untrusted
from lab.fleet import settings
from lab.night.limits import Trouble
from lab.run import log as logs
from lab.session.session import Session
from lab.session.state import BESIDE, Experiment, Run, State
from lab.untrusted import counted, one_line
from lab.verdict.gate import smallest_detectable
from lab.verdict.plan import account_of, noise_of

DRAW_EVERY, TELL_EVERY = 0.5, 60.0  # seconds, on a terminal, and between lines of progress elsewhere
TAIL = 256 * 1024  # bytes of a log that are read: more than a run of five minutes prints
LONGEST = 300  # characters of a line of progress
MOST_SAID = 100  # lines that are shown again after the terminal was resized
ROOMY = 110  # columns, from which on reasons are shown beside what was tried
COLOURS = {"keep": "bold green", "discard": "dim", "crash": "red", "invalid": "magenta", "running": "cyan"}
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "._-=+*%#"  # from low to high
# Of train.py's line of progress; an edited one may have other words in between.
PROGRESS = {
    "step": re.compile(r"\bstep[ :=]+(\d{1,9})\b"),
    "loss": re.compile(r"\bloss[ :=]+(\d{1,9}(?:\.\d{1,9})?)"),
    "percent": re.compile(r"\b(\d{1,3}(?:\.\d{1,6})?) ?%"),
    "tok_per_s": re.compile(r"\b(\d[\d,]{0,14}) ?tok(?:ens)?/s"),
}


@dataclass
class Now:
    """What the loop is at. Times are those of time.time(), in seconds.

    Attributes:
        begun: when the night began. first: number of its first experiment.
        deadline: of the night, or None. most: experiments of this night, or None.
        phase: in words. since: when that began. by: who proposes, "agent", "findings", "proposer" or "user".
        troubles: that there are.
    """

    begun: float
    first: int
    deadline: float | None = None
    most: int | None = None
    phase: str = ""
    since: float = field(default_factory=time.time)
    by: str = "proposer"
    troubles: list[Trouble] = field(default_factory=list)

    def counts(self, state: State) -> tuple[int, int]:
        """(experiments that were decided on in this night, how many of them were kept)."""
        tried = [e for e in state.decided if e.number >= max(1, self.first)]
        return len(tried), sum(e.status == "keep" and e.kind not in BESIDE for e in tried)

    def estimate(self, done: int) -> list[str]:
        """Experiments per hour, and when and with how many more the night is likely to end."""
        at, hours = time.time(), (time.time() - self.begun) / 3600
        rate, left = done / hours if hours > 0 else 0.0, [] if self.most is None else [max(0, self.most - done)]
        parts = [f"{rate:.1f} an hour"] * bool(rate)
        if self.deadline:
            parts.append(f"until {clock(self.deadline)} (in {lasting(self.deadline - at)})")
            left += [math.floor(rate * max(0.0, self.deadline - at) / 3600)] * bool(rate)
        if left:
            parts.append(f"experiments left: {'about ' if self.deadline else ''}{min(left)}")
        return parts if left or self.deadline else [*parts, "until it is stopped (Ctrl-C)"]


def progress_of(log: Path) -> dict:
    """What the log of a run under way tells: step, percent (of its training), loss, losses and tok_per_s; less where
    it says less.

    A run may have printed anything: only lines that look like progress count, and of them only numbers.
    """
    last, losses = {}, []
    for line in logs.tail(log, TAIL).decode("utf-8", errors="replace").split("\n"):
        matches = {name: pattern.search(line[:LONGEST]) for name, pattern in PROGRESS.items()}
        values = {name: float(match[1].replace(",", "")) for name, match in matches.items() if match}
        if "step" in values and "loss" in values and values.get("percent", 0) <= 100:
            last = values
            losses.append(values["loss"])
    return last | {"losses": losses} if last else {}


class View:
    """Shows a night of this session, inside a `with`.

    Args:
        console: where; by default standard output.
    """

    def __init__(self, session: Session, console: Console | None = None):
        self.session, self.console = session, console or Console(highlight=False)
        self.live: Live | None = None
        self._ascii = not self.console.encoding.lower().startswith("utf")
        self._said: deque[Text] = deque(maxlen=MOST_SAID)
        self._size, self._noise, self._seen = self.console.size, "", 0
        self._key, self._drawn = None, 0.0  # what was shown last, and when

    def __enter__(self) -> View:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self.live.start()
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """A line that stays, with the time of day."""
        text = " ".join(untrusted.plain(text).split("\n"))  # blanks stay, for columns
        line = Text(self._encodable(f"{time.strftime('%H:%M:%S')}  {untrusted.cut(text, 1000)}"))
        self._said.append(line)
        with suppress(OSError):  # the terminal is gone; the night goes on
            self.console.print(line, soft_wrap=True)

    def update(self, now: Now) -> None:
        """Shows how things stand. May be called as often as one likes."""
        experiment = self.session.state.oldest_open
        run = experiment.run_under_way if experiment else None
        troubles = tuple(trouble.kind for trouble in now.troubles)
        key = (troubles, numberless(now.phase), run and run.number, experiment and experiment.number)
        if key == self._key and time.monotonic() < self._drawn + (DRAW_EVERY if self.live else TELL_EVERY):
            return
        before, self._key, self._drawn = self._key, key, time.monotonic()
        if not self.live:
            return self._tell(now, experiment, run, before)
        with suppress(OSError):
            if self.console.size != self._size:
                self._start_over(self.live)
            # The last column stays free: many terminals begin a new line once it is written to.
            lines = self.lines(now, self._size.width - 1, self._size.height - max(1, self._size.height // 6))
            self.live.update(SegmentLines(lines, new_lines=True), refresh=True)

    # --- On a terminal ---

    def _start_over(self, live: Live) -> None:
        """After a change of size nobody knows where on the screen the last picture is: it is cleared, and what was said
        is said again."""
        self._size = self.console.size
        self.console.control(Control.clear(), Control.home())
        live.update(Text(""), refresh=True)
        for line in list(self._said)[-self._size.height :]:
            self.console.print(line, soft_wrap=True)

    def lines(self, now: Now, width: int, height: int) -> list[list[Segment]]:
        """The picture: at most `height` lines of at most `width` columns."""
        options = self.console.options.update(width=width, height=None)

        def drawn(*parts: RenderableType) -> list[list[Segment]]:
            return self.console.render_lines(Group(*parts), options, pad=False)

        lines = drawn(*self._night(now), *self._experiment(now, width), *self._best())
        if (room := height - len(lines) - 1) > 0:
            lines += drawn(self._table(list(self.session.state.experiments.values())[-room:], width))
        return [[Segment(self._encodable(text), style) for text, style, _ in line] for line in lines[:height]]

    def _night(self, now: Now) -> list[Text]:
        tried, kept = now.counts(self.session.state)
        parts = [f"night of {self.session.name}", lasting(time.time() - now.begun), counted(tried, "experiment")]
        troubles = [trouble.text for trouble in now.troubles if trouble.text not in now.phase]
        heading = Text(", ".join([*parts, f"{kept} kept", *now.estimate(tried)]))
        devices = settings.status(self.session) if self.session.fleet else []
        lines = [_line(f"{device['name']}: {device['doing']}", "cyan") for device in devices]
        return [heading, *(_line(text, "yellow") for text in troubles), *lines]

    def _experiment(self, now: Now, width: int) -> list[RenderableType]:
        experiment = self.session.state.oldest_open
        phase = _line(f"{now.phase}, for {lasting(time.time() - now.since)}", "cyan")
        if experiment is None:
            return [_rule(""), phase]
        by = f", proposed by the {now.by}" if experiment.kind == "change" else ""
        by = ", found elsewhere" if experiment.origin else by
        parts = [_rule(f"experiment {experiment.number}{by}"), _line(experiment.description, "bold")]
        if (run := experiment.run_under_way) is None:
            return [*parts, phase]
        progress = progress_of(self.session.run_folder(run.number) / "run.log")
        parts.append(Text(", ".join(self._of_run(experiment, run, progress))))
        if "percent" in progress:  # a bar has no line end of its own
            parts.append(Padding(ProgressBar(100, progress["percent"], width=width), 0))
        if progress:
            parts.append(sparkline(progress["losses"], width, ASCII_BLOCKS if self._ascii else BLOCKS))
        return parts

    def _best(self) -> list[RenderableType]:
        """Best against baseline, and the noise; nothing before there is a best one."""
        state, best = self.session.state, self.session.state.best
        if best is None:
            return []
        mean, first = state.mean(best) or math.nan, state.mean(state.baseline) or math.nan
        if self._seen != len(self.session.journal.events):  # it takes a moment
            self._seen, noise = len(self.session.journal.events), noise_of(state)
            smallest = smallest_detectable(noise, account_of(state))
            self._noise = f"noise {noise.sd:.6f}; a gain of {smallest:.6f} is likely to be kept"
        below = f"{100 * (first - mean) / first:.2f} % below the baseline's {first:.6f}"
        text = below if best is not state.baseline else "it is the baseline"
        return [
            _rule(f"best {mean:.6f}: experiment {best.number}, commit {best.here[:7]}"),
            Text(f"{text}, {self._noise}"),
        ]

    def _of_run(self, experiment: Experiment, run: Run, progress: dict) -> list[str]:
        """A run under way in numbers."""
        budget, percent = run.budget or self.session.budget, progress.get("percent", 0.0)
        whose = "" if experiment.kind == "baseline" else "of its parent, "
        whose = "of the change, " if whose and run in experiment.own_runs else whose
        if experiment.kind == "shared":
            whose = f"with {counted(len(run.patches), 'finding')}, "
        stands = "is scored" if percent >= 100 else f"{percent:.0f} %" if percent else "starts"
        if progress and not percent:
            stands = f"step {progress['step']:.0f}"
        # The start may take as long as it likes.
        left = max(budget * (1 - percent / 100), self.session.state.end_of(run) - time.time())
        parts = [f"run {run.number} ({whose}seed {run.seed})", stands, f"{lasting(left)} left"]
        parts += [f"loss {progress['loss']:.4g}"] if progress else []
        parts += [f"{progress['tok_per_s']:,.0f} tokens/s"] if progress.get("tok_per_s") else []
        if ended := [other for other in self.session.state.runs.values() if other.result.get("peak_vram_mb")]:
            known = next((other for other in reversed(ended) if other.blob == run.blob), ended[-1])
            source = "" if known.blob == run.blob else f" (run {known.number})"
            parts.append(f"{known.result['peak_vram_mb'] / 1024:.1f} GB{source}")
        return parts

    def _table(self, experiments: list[Experiment], width: int) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        columns = {"#": 4, "verdict": 8, "val_bpb": 9, "vs parent": 9}
        for name, least in columns.items():
            table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True, min_width=least)
        table.add_column("what", no_wrap=True)
        for e in experiments:
            mean, parent = (e.decided.mean, e.decided.parent_mean) if e.decided else (None, None)
            what = one_line(e.description)
            if width >= ROOMY and e.decided:
                what = f"{untrusted.cut(what, width // 3)}: {one_line(e.decided.said)}"
            what = Text(what)
            what.truncate(max(1, width - sum(columns.values()) - 2 * len(columns)), overflow="ellipsis")
            score = f"{mean:.6f}" if mean is not None else "-"
            beside = f"{mean - parent:+.6f}" if mean is not None and parent is not None else ""
            table.add_row(str(e.number), e.status, score, beside, what, style=COLOURS.get(e.status, ""))
        return table

    # --- Elsewhere ---

    def _tell(self, now: Now, experiment: Experiment | None, run: Run | None, before: tuple | None) -> None:
        """What is new, in a line each, or how the run is getting on."""
        known, phase, number, _ = before or ((), "", None, None)
        news = [trouble.text for trouble in now.troubles if trouble.kind not in known]
        if experiment and run and run.number != number:
            what = one_line(experiment.description, 100)
            self.say(f"experiment {experiment.number}: {what}: {', '.join(self._of_run(experiment, run, {}))}")
        elif numberless(now.phase) != phase:
            news.insert(0, now.phase)
        elif experiment and run and self._key == before:
            progress = progress_of(self.session.run_folder(run.number) / "run.log")
            self.say(f"experiment {experiment.number}: {', '.join(self._of_run(experiment, run, progress))}")
        for text in news:
            if not any(text in line.plain for line in list(self._said)[-3:]):  # unless the loop has just said so
                self.say(text)

    def _encodable(self, text: str) -> str:
        """The text as the output's encoding can show it."""
        encoding = self.console.encoding
        text = text.replace("…", ".").replace("─", "-") if self._ascii else text
        return text.encode(encoding, "replace").decode(encoding)


def _line(text: str, style: str = "") -> Text:
    return Text(one_line(text), style, no_wrap=True, overflow="ellipsis")


def _rule(title: str) -> Rule:
    return Rule(Text(title), align="left", style="blue")


def sparkline(losses: Sequence[float], width: int, blocks: str = BLOCKS) -> Text:
    """Losses on one line, with the first and the last that are shown as numbers."""
    settled = losses[len(losses) // 10 :]  # the first steep part would flatten the rest
    first, last = f"{settled[0]:.3f} ", f" {settled[-1]:.3f}"
    columns = max(1, min(width - len(first + last), len(settled)))
    shown = [settled[i * len(settled) // columns] for i in range(columns)]
    low, span = min(shown), max(shown) - min(shown) or 1.0
    bars = "".join(blocks[int((loss - low) / span * (len(blocks) - 1))] for loss in shown)
    return Text(first + bars + last, "cyan", no_wrap=True, overflow="crop")


def numberless(text: str) -> str:
    """What says the same again with another temperature is not new."""
    return re.sub(r"\d+", "", text)


def lasting(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def clock(at: float) -> str:
    """The time of day, and the weekday if it is not today."""
    today = time.localtime(at)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%a %H:%M", time.localtime(at))
