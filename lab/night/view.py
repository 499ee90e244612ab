"""The night as it is seen: a live view at the foot of a terminal, plain lines anywhere else.

What a run or an agent wrote is shown as cleaned words; of a run's log, numbers alone.
"""

from __future__ import annotations

import math
import re
import stat
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.text import Text

from lab import untrusted
from lab.cli import render as show
from lab.session.session import Session
from lab.session.state import Experiment, Run

DRAW_EVERY = 0.5  # seconds
TELL_EVERY = 60.0  # seconds between lines of progress where there is no terminal
TAIL = 256 * 1024  # bytes of a log that are read: more than a run of five minutes prints
LONGEST = 300  # characters of a line of progress
MOST_SAID = 100  # lines that are shown again after the terminal was resized
SETTLED = 0.1  # of a run: what the loss falls by before would leave no room for the rest of its curve
CURVE = (3, 12)  # rows, at least and at most
ROOMY = 110  # columns, from which on reasons are shown beside what was tried
COLOURS = {"keep": "bold green", "discard": "dim", "crash": "red", "invalid": "magenta", "running": "cyan"}
PROPOSERS = ("agent", "proposer")
BLOCKS, BLOCKS_ASCII = " ▁▂▃▄▅▆▇█", " ..::||##"
PLAINER = str.maketrans("─…", "-.")
# Of train.py's line of progress; an edited one may have other words in between.
PROGRESS = {
    "step": re.compile(r"\bstep[ :=]+(\d{1,9})\b"),
    "loss": re.compile(r"\bloss[ :=]+(\d{1,9}(?:\.\d{1,9})?)"),
    "percent": re.compile(r"\b(\d{1,3}(?:\.\d{1,6})?) ?%"),
    "tok_per_s": re.compile(r"\b(\d[\d,]{0,14}) ?tok(?:ens)?/s"),
}


@dataclass
class Now:
    """What the loop is at.

    Attributes:
        phase: in words. since: when it began. by: who proposes ("agent", "proposer"). troubles: in words.
        deadline: of the night, or None. most: experiments of this night, or None.
        begun: when the night began. first: number of its first experiment.
        (Times are those of time.time(), in seconds.)
    """

    phase: str
    since: float
    by: str
    deadline: float | None
    most: int | None
    begun: float
    first: int
    troubles: list[str]


def run_facts(log: Path, budget: float | None = None) -> dict:
    """What the log of a run under way tells: step, percent (of its training), loss, losses [(percent, loss)],
    tok_per_s, seconds_left (of its training, where the `budget` is given); less where it says less.

    A run may have printed anything: only lines that look like progress count, and of them only numbers.
    """
    found, losses = {}, []
    for line in tail(log).split("\n"):
        line = line[:LONGEST]
        values = {
            name: float(match[1].replace(",", ""))
            for name, pattern in PROGRESS.items()
            if (match := pattern.search(line))
        }
        if "step" in values and "loss" in values and values.get("percent", 0) <= 100:
            found = values | {"step": int(values["step"])}
            if "percent" in values:
                losses.append((values["percent"], values["loss"]))
    if found:
        found["losses"] = losses
        if budget is not None and "percent" in found:
            found["seconds_left"] = budget * (1 - found["percent"] / 100)
    return found


def tail(path: Path) -> str:
    """The end of a file, from the beginning of a line; nothing of what is no file: a pipe would be waited for."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, status.st_size - TAIL))
            text = file.read(TAIL)
    except OSError:
        return ""
    return (text.partition(b"\n")[2] if status.st_size > TAIL else text).decode("utf-8", errors="replace")


class View:
    """Shows a night of this session, inside a `with`.

    Args:
        console: where; by default standard output.
    """

    def __init__(self, session: Session, console: Console | None = None):
        self.session, self.console = session, console or Console(highlight=False)
        self.live: Live | None = None
        self._said, self._size = deque(maxlen=MOST_SAID), self.console.size
        self._facts, self._seen = {}, 0  # of the session; how many events they are made of
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
        line = Text(self._sound(f"{clock(time.time())}  {untrusted.cut(text, 1000)}"))
        self._said.append(line)
        with suppress(OSError):  # the terminal is gone; the night goes on
            self.console.print(line, soft_wrap=True)

    def update(self, now: Now) -> None:
        """Shows how things stand. May be called as often as one likes."""
        pending = self.session.state.pending
        run = under_way(pending)
        key = (tuple(map(wordless, now.troubles)), wordless(now.phase), run and run.number, pending and pending.number)
        changed = key != self._key
        if not changed and time.monotonic() < self._drawn + (DRAW_EVERY if self.live else TELL_EVERY):
            return
        before, self._key, self._drawn = self._key, key, time.monotonic()
        if not self.live:
            self._tell(now, run, before)
            return
        with suppress(OSError):
            width, height = self._size_now()
            # The last column stays free: many terminals begin a new line once it is written to.
            lines = self.lines(now, width - 1, height - max(1, height // 6))
            self.live.update(Text("\n").join(lines), refresh=True)

    # --- On a terminal ---

    def _size_now(self) -> tuple[int, int]:
        """Columns and rows. After a change of them nobody knows where on the screen the last picture is: the screen is
        cleared, and what was said is said again."""
        if self.console.size != self._size:
            self._size = self.console.size
            self.console.control(Control.clear(), Control.home())
            self.live.update(Text(""), refresh=True)
            for line in list(self._said)[-self._size.height :]:
                self.console.print(line, soft_wrap=True)
        return self._size

    def lines(self, now: Now, width: int, height: int) -> list[Text]:
        """The picture: at most `height` lines of at most `width` columns."""
        found, state = self._status(), self.session.state
        pending = state.pending
        run = under_way(pending)
        lines = [self._line(text, width) for text in wrapped(self._heading(now, found), width)]
        lines += [self._line(text, width, "yellow") for text in now.troubles if text not in now.phase]
        below = self._standing(found, width)
        by = f", proposed by the {now.by}" if now.by in PROPOSERS and pending and pending.kind == "change" else ""
        lines.append(self._rule(f"experiment {pending.number}{by}" if pending else "", width))
        if pending:
            lines.append(self._line(untrusted.one_line(pending.description), width, "bold"))
        if run:
            facts = run_facts(self.session.run_folder(run.number) / "run.log", run.budget)
            lines += [self._line(text, width) for text in wrapped(self._of_run(pending, run, facts), width)]
            rest = height - len(lines) - len(below) - 2
            if facts.get("losses") and (rows := min(max(CURVE[0], rest // 3), CURVE[1])) <= rest:
                lines += [
                    Text(line, "cyan", no_wrap=True)
                    for line in curve(facts["losses"], width, rows, BLOCKS if self._fancy else BLOCKS_ASCII)
                ]
        else:
            lines.append(self._line(f"{now.phase}, for {lasting(time.time() - now.since)}", width, "cyan"))
        lines += below
        room = height - len(lines) - 1
        if room > 0:
            lines.append(self._line(f"{'#':>4}  {'verdict':<8} {'val_bpb':>9}  vs parent  what", width, "dim"))
            lines += [self._row(e, width) for e in list(state.experiments.values())[-room:]]
        return lines[:height]

    def _heading(self, now: Now, found: dict) -> list[str]:
        hours = (time.time() - now.begun) / 3600
        tried, kept = show.of_night(self.session.state, now.first)
        return [
            f"night of {found['session']}",
            lasting(3600 * hours),
            show.counted(tried, "experiment"),
            f"{kept} kept",
            *estimate(now, tried, hours),
        ]

    def _standing(self, found: dict, width: int) -> list[Text]:
        """Best against baseline, and the noise; nothing before there is a best one."""
        if "best" not in found:
            return []
        best, base = found["best"], found["baseline"]
        below = (
            "it is the baseline"
            if best["experiment"] == 0
            else f"{100 * (base - best['val_bpb']) / base:.2f} % below the baseline's {base:.6f}"
        )
        parts = [
            below,
            f"noise {found['noise']['sd']:.6f}",
            f"gains of {found['smallest_detectable']:.6f} are likely to be seen",
        ]
        title = f"best {best['val_bpb']:.6f}: experiment {best['experiment']}, commit {best['commit']}"
        return [self._rule(title, width), *(self._line(text, width) for text in wrapped(parts, width))]

    def _of_run(self, experiment: Experiment, run: Run, facts: dict) -> list[str]:
        """A run under way in numbers."""
        least = facts.get("seconds_left", 0) if facts else run.budget  # however long the start took
        left = max(least, show.progress_facts(self.session, experiment).get("seconds_left", 0))
        parts = [
            f"run {run.number} ({'of the change' if run.blob == experiment.blob else 'of its parent'}, seed {run.seed})"
            if experiment.kind != "baseline"
            else f"run {run.number} (seed {run.seed})"
        ]
        if "percent" in facts:
            parts.append(f"{facts['percent']:.0f} %" if facts["percent"] < 100 else "is scored")
        elif "step" in facts:
            parts.append(f"step {facts['step']}")
        else:
            parts.append("starts")
        parts.append(f"{lasting(left)} left")
        parts += [f"loss {facts['loss']:.4g}"] if "loss" in facts else []
        parts += [f"{facts['tok_per_s']:,.0f} tokens/s"] if facts.get("tok_per_s") else []
        ended = [one for one in self.session.state.runs.values() if one.status == "ok"]
        known = next((one for one in reversed(ended) if one.blob == run.blob), ended[-1] if ended else None)
        if known and known.result.get("peak_vram_mb"):
            whose = "" if known.blob == run.blob else f" (run {known.number})"
            parts.append(f"{known.result['peak_vram_mb'] / 1024:.1f} GB{whose}")
        return parts

    def _row(self, e: Experiment, width: int) -> Text:
        verdict = e.verdict or {}
        mean, parent = verdict.get("mean"), verdict.get("parent_mean")
        score = f"{mean:.6f}" if mean is not None else "-"
        beside = f"{mean - parent:+.6f}" if mean is not None and parent is not None else ""
        what = untrusted.one_line(e.description)
        if width >= ROOMY and verdict.get("reason"):
            what = f"{cut(what, width // 3)}: {untrusted.one_line(verdict['reason'])}"
        return self._line(
            f"{e.number:4d}  {e.status:<8} {score:>9}  {beside:>9}  {what}", width, COLOURS.get(e.status, "")
        )

    def _line(self, text: str, width: int, style: str = "") -> Text:
        return Text(self._sound(cut(untrusted.plain(text).replace("\n", " "), width)), style, no_wrap=True)

    def _rule(self, title: str, width: int) -> Text:
        text = f"── {title} " if title else ""
        return self._line(text + "─" * max(0, width - len(text)), width, "blue")

    # --- Elsewhere ---

    def _tell(self, now: Now, run, before: tuple | None) -> None:
        """What is new, in a line each, or how the run is getting on."""
        pending = self.session.state.pending
        known, phase, number, _ = before or ((), "", None, ())
        if run and run.number != number:
            self.say(
                f"experiment {pending.number}: {untrusted.one_line(pending.description, 100)}: "
                f"{', '.join(self._of_run(pending, run, {}))}"
            )
        elif self._key[1] != phase:
            self._mention(now.phase)
        elif run and self._key == before:
            facts = run_facts(self.session.run_folder(run.number) / "run.log", run.budget)
            self.say(f"experiment {pending.number}: {', '.join(self._of_run(pending, run, facts))}")
        for text in now.troubles:
            if wordless(text) not in known:
                self._mention(text)

    def _mention(self, text: str) -> None:
        """Says it, unless the loop has just said so itself."""
        if not any(text in line.plain for line in list(self._said)[-3:]):
            self.say(text)

    def _status(self) -> dict:
        """The session's facts, made anew when something was journalled: near misses take a while to put together."""
        if self._seen != len(self.session.journal.events):
            self._facts, self._seen = show.status_facts(self.session), len(self.session.journal.events)
        return self._facts

    @cached_property
    def _fancy(self) -> bool:
        """Whether the output's encoding has what curves are drawn with."""
        return encodable(BLOCKS + "─…", self.console.encoding)

    def _sound(self, text: str) -> str:
        """As the output's encoding can show it."""
        if not self._fancy:
            text = text.translate(PLAINER)
        return text.encode(self.console.encoding, "replace").decode(self.console.encoding)


def under_way(experiment: Experiment | None) -> Run | None:
    """The run that is on now."""
    return next((run for run in reversed(experiment.runs) if run.status is None), None) if experiment else None


def estimate(now: Now, done: int, hours: float) -> list[str]:
    """Experiments per hour, and when and with how many more the night is likely to end."""
    at, rate = time.time(), done / hours if hours > 0 else 0.0
    parts = [f"{rate:.1f} an hour"] if rate else []
    fit = [] if now.most is None else [max(0, now.most - done)]
    if now.deadline:
        parts.append(f"until {clock(now.deadline, at)} (in {lasting(now.deadline - at)})")
        fit += [math.floor(rate * max(0.0, now.deadline - at) / 3600)] if rate else []
    if fit:
        parts.append(f"{'about ' if rate and now.deadline else ''}{min(fit)} more to come")
        if rate and now.most is not None and min(fit) == now.most - done:
            parts.append(f"done about {clock(at + 3600 * min(fit) / rate, at)}")
    elif not now.deadline:
        parts.append("until it is stopped (Ctrl-C)")
    return parts


def wrapped(parts: Sequence[str], width: int) -> list[str]:
    """The parts with commas between them, in as many lines as it takes to leave them whole."""
    lines = [parts[0]]
    for part in parts[1:]:
        if cell_len(lines[-1]) + cell_len(part) + 3 <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def curve(losses: Sequence[tuple[float, float]], width: int, rows: int, blocks: str = BLOCKS) -> list[str]:
    """Losses over the whole of a run, as bars in `rows` lines of at most `width` characters.

    Args:
        losses: (percent of the run, loss), in order.
        blocks: nine characters, from empty to full.
    """
    last, high, low = losses[-1][0], *(f(loss for _, loss in losses) for f in (max, min))
    # The top is where the curve is after its first steep part; bars that would be higher are full.
    high = max((loss for percent, loss in losses if percent >= SETTLED * last), default=high)
    labels = [f"{value:.3f}" for value in (high, low)]
    margin = max(map(len, labels)) + 1
    columns = width - margin
    if columns < 1:
        return []
    heights, at = [], 0
    for column in range(math.ceil(columns * last / 100)):
        while at + 1 < len(losses) and losses[at + 1][0] <= 100 * (column + 1) / columns:
            at += 1
        share = min(1.0, (losses[at][1] - low) / (high - low)) if high > low else 0.0
        heights.append(1 + round(share * (8 * rows - 1)))
    lines = [
        "".join(blocks[min(8, max(0, height - 8 * row))] for height in heights[:columns])
        for row in reversed(range(rows))
    ]
    margins = [labels[0], *[""] * (rows - 2), labels[1]] if rows > 1 else labels[:1]
    return [f"{text:>{margin - 1}} {line}" for text, line in zip(margins, lines)]


def cut(text: str, width: int) -> str:
    """At most so many columns of a terminal: a Chinese character takes two."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def wordless(text: str) -> str:
    """Without numbers: what says the same again with another temperature is not new."""
    return re.sub(r"\d+", "", text)


def lasting(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def clock(at: float, now: float | None = None) -> str:
    """The time of day; to the minute, and with the weekday if it is not today's, as seen from `now`."""
    if now is None:
        return time.strftime("%H:%M:%S", time.localtime(at))
    today = time.localtime(at)[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M" if today else "%a %H:%M", time.localtime(at))
