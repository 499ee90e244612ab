"""Published findings, as files of findings/, and whether they hold where they were tried.

A file says what a change does and why, what is expected of it with time, its evidence, and an edit of train.py by
definition and name (lab/genome/edits.py), which applies to a changed file, too:

    Half the total batch: twice the steps in the same time.
    time: fades, a longer run has steps enough
    evidence: nvidia-h100-80gb | 300 | -0.011859 bpb | halve batch 524K to 262K | https://...

    TOTAL_BATCH_SIZE: defaults.total_batch_size -> defaults.total_batch_size // 2

A line of evidence: the device, its seconds of training ("-" if unknown), the effect (below 0 is better) with its unit
or a word of WORDS, what was said, and the source.
"""

from __future__ import annotations

import functools
import os
import hashlib
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from lab.compare import classify
from lab.compare.analysis import sort_of
from lab.compare.effects import Effect
from lab.errors import LabError
from lab.genome import block, edits
from lab.genome.change import ID
from lab.genome.syntax import text_of, with_ends_of
from lab.untrusted import one_line
from lab.verdict.gate import t_tail

FOLDER = Path(__file__).resolve().parents[2] / "findings"
PUBLISHED = "published"  # in place of a device, in the origin of an experiment
NAME, LONGEST_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*"), 60
TIMES = ("fades", "holds", "grows")  # the effect, with the seconds of training
UNITS = {"bpb": 1.0, "nats": 0.3, "% time": 0.001}  # bits per byte for each: val_bpb is 0.3 of a loss in nats by token
WORDS = {"better": -0.0002, "worse": 0.0003}
EFFECT = re.compile(rf"(?P<size>[-+]\d+(\.\d+)?) (?P<unit>{'|'.join(UNITS)})")
MOST = 0.02  # bits per byte that any evidence counts for: larger ones are of a default that did not fit its device
ALIKE, APART, DOUBT = 3.0, 1.0, 1.0  # weights: evidence of this sort of device, of another, and of nothing (effect 0)


@dataclass(frozen=True)
class Evidence:
    """What a change did in one place. `effect`: as written; `measured` and `size`: in bits per byte, about."""

    device: str
    budget: float | None
    effect: str
    said: str
    source: str

    @property
    def measured(self) -> float | None:
        """The effect, if it was told as a number."""
        found = EFFECT.fullmatch(self.effect)
        return float(found["size"]) * UNITS[found["unit"]] if found else None

    @property
    def size(self) -> float:
        """The effect; for a word a guess, for ranking alone."""
        measured = self.measured
        return WORDS[self.effect] if measured is None else measured


@dataclass(frozen=True)
class Finding:
    """A published change. `time`: one of TIMES."""

    name: str
    why: str
    time: str
    evidence: tuple[Evidence, ...]
    edit: edits.Edit

    @property
    def origin(self) -> str:
        """The origin of its experiments: equal wherever it is tried, whatever else the file holds."""
        return f"{PUBLISHED}/{self.name}/{hashlib.sha256(self.edit.text.encode()).hexdigest()[:ID]}"

    @property
    def key(self) -> str:
        """What the origin ends with."""
        return self.origin.rpartition("/")[2]

    @property
    def title(self) -> str:
        return f"{self.name.replace('-', ' ')}: {self.why}"

    def apply(self, content: bytes, calibrated: dict) -> bytes:
        """A train.py with it, its line ends as they were. edits.NotHere where it does not apply, or leaves nothing to
        train or changes nothing where these are `defaults`."""
        text = text_of(content)
        edited = self.edit.apply(text, calibrated)
        names = {part.name if isinstance(part, edits.Step) else part.definition for part in self.edit.parts}
        unused = {variable.name for variable in block.read(text)} - block.effective(text, calibrated).keys()
        if names <= unused or block.model(text, calibrated) == block.model(edited, calibrated):
            raise edits.NotHere("it changes nothing on this device")
        if name := block.too_small(edited, calibrated):
            raise edits.NotHere(f"{name} would be too small on this device")
        return with_ends_of(content, edited.encode())

    def expected(self, device: str, budget: float) -> float:
        """The expected gain in bits per byte on a device after so many seconds: for ranking, not a forecast."""
        total, weight = 0.0, DOUBT
        for told in self._sessions():
            gain = min(max(-sum(one.size for one in told), -MOST), MOST)
            shorter = told[0].budget and budget < told[0].budget / 2
            alike = ALIKE if sort_of(told[0].device) == sort_of(device) else APART
            total += alike * gain * ({"fades": 1.5, "grows": 0.5}.get(self.time, 1.0) if shorter else 1.0)
            weight += alike
        return total / weight

    def effect(self, device: str = "") -> float | None:
        """Its effect as published, in bits per byte: the mean over sessions, of such a device if there are any. None
        where none of them told a number."""
        sessions = [told for told in self._sessions() if all(one.measured is not None for one in told)]
        alike = [told for told in sessions if sort_of(told[0].device) == sort_of(device)]
        return statistics.fmean(sum(one.size for one in told) for told in alike or sessions) if sessions else None

    def _sessions(self) -> list[list[Evidence]]:
        """Its evidence by session: what was kept there step by step adds up."""
        sessions: dict[tuple[str, str], list[Evidence]] = {}
        for one in self.evidence:
            sessions.setdefault((one.device, one.source), []).append(one)
        return list(sessions.values())


@functools.lru_cache(maxsize=8)
def library(folder: Path = FOLDER) -> tuple[Finding, ...]:
    """All findings of a folder, by name. LabError, with the file, for one that can't be read."""
    return tuple(map(_of_file, sorted(folder.glob("[!.]*.txt"))))  # a Mac leaves files with a dot on some disks


def _of_file(path: Path) -> Finding:
    try:
        return read(path.stem, path.read_text(encoding="utf-8-sig"))
    except (LabError, UnicodeDecodeError, OSError) as error:
        raise LabError(f"{path}: {error}") from None


def named(what: str) -> list[Finding] | None:
    """The finding of this name, or of this file, or all of a folder named as FOLDER is; None if it is none of these.
    LabError for one that can't be read."""
    given = Path(os.path.expanduser(what))
    for folder in (FOLDER, Path(FOLDER.name)):  # the session's, and of a file that was added since
        if NAME.fullmatch(what) and (folder / f"{what}.txt").is_file():
            given = folder / f"{what}.txt"
            break
    if given.suffix == ".txt" and given.is_file():
        return [_of_file(given)]
    return list(library(given)) if given.is_dir() and given.resolve().name == FOLDER.name else None


def read(name: str, text: str) -> Finding:
    """A finding from the text of its file. LabError says what is wrong."""
    head, _, edit = text.partition("\n\n")
    why, *facts = head.split("\n")
    time, evidence = "", []
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise LabError(f"the name of a finding has to be small letters, digits and dashes, {LONGEST_NAME} at most")
    if not why.strip():
        raise LabError("the first line of a finding has to say what it does")
    for line in facts:
        key, _, value = line.partition(": ")
        if key == "time":
            time = value.split(",")[0]
        elif key == "evidence":
            evidence.append(_evidence(value))
        else:
            raise LabError(f"{one_line(line, 100)!r} is neither 'time: ...' nor 'evidence: ...' (docs/findings.md)")
    if time not in TIMES:
        raise LabError(f"'time:' has to be one of {', '.join(TIMES)}: what is expected of the effect in longer runs")
    if not evidence:
        raise LabError("it has no evidence: 'evidence: DEVICE | SECONDS | EFFECT | WHAT WAS SAID | SOURCE'")
    return Finding(name, why.strip(), time, tuple(evidence), edits.read(edit.rstrip("\n")))


def _evidence(text: str) -> Evidence:
    parts = [part.strip() for part in text.split(" | ")]
    if len(parts) != 5 or not all(parts):
        raise LabError(f"evidence has to be DEVICE | SECONDS | EFFECT | WHAT WAS SAID | SOURCE, and not {text!r}")
    device, budget, effect, said, source = parts
    if not re.fullmatch(r"-|[1-9]\d*", budget):
        raise LabError(f"the seconds of training have to be a whole number, or '-' if unknown, and not {budget!r}")
    if not EFFECT.fullmatch(effect) and effect not in WORDS:
        units = ", ".join(f"-0.01 {unit}" for unit in UNITS)
        raise LabError(f"an effect has to be a number with sign and unit ({units}) or {' or '.join(WORDS)}: {effect!r}")
    return Evidence(device, None if budget == "-" else float(budget), effect, said, source)


def verdict(published: float | None, here: Effect | None) -> tuple[str, str]:
    """(one of classify.CLASSES, why) of a finding's effect here, as classify.classify has them; the published one is
    taken for exact. That a parent was chosen for its scores makes a change look worse, and so does the prior of shared
    runs: only "holds" stands then."""
    if here is None or here.error is None:
        return classify.OPEN, "nothing was repeated here"
    if published is None:
        return classify.OPEN, "no number was published"
    if here.biased and here.picked:
        return classify.OPEN, "biased by selection: it was chosen here for its scores"
    gain, size = -here.value, -published
    if size <= 0:
        return classify.OPEN, "it was no gain where it was tried"
    share = f"{gain / size:+.0%} of the published effect"
    if abs(gain) > 10 * size:
        share = f"more than ten times the published effect{'' if gain > 0 else ', the other way'}"
    same = t_tail(gain / here.error, here.df) <= classify.LEVEL / 2
    if same and gain >= classify.HALF * size:
        return classify.HOLDS, share
    if here.biased:
        return classify.OPEN, "its parent here is biased by selection"
    if here.shrunk:
        return classify.OPEN, "an estimate from shared runs, which their prior pulls to 0"
    if t_tail(-gain / here.error, here.df) <= classify.LEVEL / 2:
        return classify.REVERSES, share
    if t_tail((classify.HALF * size - gain) / here.error, here.df) <= classify.LEVEL:
        return (classify.FADES, share) if gain >= -classify.HALF * size else (classify.OPEN, "it fades or reverses")
    return classify.OPEN, "the same direction, size unknown" if same else "may be chance here"
