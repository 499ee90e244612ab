"""What several sessions say together: the facts of each, the changes that they share, and how far their devices agree.

Effects are val_bpb of a change minus its parent's, in bits per byte: below 0 is better. What is compared with what is a
place: a device, its backend, the seconds of training and the tag of what it was measured by. Sessions of one place
are taken together; effects are compared across places, and absolute scores are not.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

from lab.compare import classify, effects, published, words
from lab.compare.analysis import Analysis, kind_of, sort_of
from lab.compare.effects import Effect
from lab.compare.multiplier import Curve, Times
from lab.compare.published import Finding
from lab.errors import LabError
from lab.genome.kinds import KINDS
from lab.session.events import Interval
from lab.session.state import Experiment
from lab.untrusted import one_line

SOURCE = "source"
LISTS = "changes", "agreements", "kinds", "across"  # of a Comparison's facts
# By what changes are taken for one, the surest first: by id or by what it repeats; probably the same, its lines in the
# same definition beside other neighbours; or only its description says so.
CHANGE, FAMILY, WORDS = JOINED = "change", "family", "words"


@dataclass
class Cell:
    """A change in one place."""

    effect: Effect | None  # None if it has no score here
    tried: list[str]  # "DEVICE/TAG #NUMBER STATUS" of each experiment with it there
    session: str  # of the first one, as is the description
    description: str
    verdict: str = ""  # "source" where it comes from; else one of classify.CLASSES, "" if its source is not known
    why: str = ""  # a sentence
    more: dict[str, int] | None = None  # further runs that would probably tell: {"here": 3, "source": 0}; see classify
    due: str = ""  # see effects.due
    times: Times | None = None  # the effect as a factor of time; None where the baseline was run for one time alone
    verdict_in_time: str = ""  # as verdict, with effects in log time


@dataclass
class Shared:
    """A change, and what it did in each place."""

    key: str  # its id, or the first one's where less joined them; "" if none is known
    description: str
    kind: str
    joined: str  # one of JOINED
    source: str  # the place that it comes from; "" if that is not among the sessions, or not sure
    cells: dict[str, Cell]  # by place


@dataclass(frozen=True)
class Published:
    """A published finding, and what it did where it was tried."""

    finding: Finding
    change: Shared

    def effect(self, place: str) -> float | None:
        """The published effect for the device of a place; below 0 is better. None where no number was published."""
        return self.finding.effect(place.partition(" ")[0])


@dataclass(frozen=True)
class Agreement:
    """How far two places agree on the changes that both measured. Noise lowers both figures: between two identical
    devices with one run each, a quarter of what is kept seems to reverse (benchmarks/compare.py). The intervals say how
    few changes there are, not how noisy each one is."""

    one: str
    other: str
    n: int  # changes
    same: int  # of them have effects of the same sign
    share: Interval  # they are, with its 90 % interval
    rho: Interval | None  # Spearman's, with its 90 % interval; None with too few changes
    biased: int  # of the effects rest on runs that the change was chosen for
    joined: str  # as of the changes


@dataclass(frozen=True)
class Paid:
    """What changes of a kind came to on a sort of device. What touches several kinds counts for the most of it."""

    kind: str
    sort: str
    tried: int  # with a verdict, those that crashed too
    kept: int
    crashed: int
    # The median step from the parent in per cent of its val_bpb, as its session saw it (kept ones are biased).
    median: float | None
    # Kept of those tried, drawn towards the rate of all kinds on that sort of device; see effects.shrunken.
    rate: Interval = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Across:
    """Whether changes of a kind were kept more often than the other changes of the same sessions: the ratio of the odds
    of being kept, with its 90 % interval, on each sort of device and on all; None where it can't be told."""

    kind: str
    by_sort: dict[str, Interval | None]
    overall: Interval | None

    @property
    def told(self) -> str:
        """One of "more often", "less often", "differs", "can't be told". The first two need an interval over all that
        leaves out 1, the same way on each sort where it is known, and two of these."""
        known = [ratio for ratio in self.by_sort.values() if ratio]
        if any(low > 1 for _, low, _ in known) and any(high < 1 for *_, high in known):
            return "differs"
        ways = {ratio > 1 for ratio, *_ in known}
        if self.overall is None or len(known) < 2 or len(ways) > 1 or self.overall[1] <= 1 <= self.overall[2]:
            return "can't be told"
        return "more often" if ways == {True} else "less often"


@dataclass
class Comparison:
    """All of it."""

    places: list[str]  # label by label what tells them apart
    sessions: list[Analysis]
    changes: list[Shared]  # those of several places first
    agreements: list[Agreement]
    kinds: list[Paid]
    across: list[Across]
    notes: list[str]

    @property
    def shared(self) -> list[Shared]:
        """The changes that more than one place has tried, published findings left out, but not what only resembles
        one."""
        known = {one.change.key for one in self.published}
        several = (change for change in self.changes if len(change.cells) > 1)
        return [change for change in several if change.joined != CHANGE or change.key not in known]

    @cached_property
    def published(self) -> list[Published]:
        """The published findings that some place has tried, with a verdict in each cell."""
        known = {finding.key: finding for finding in published.library()}
        found = {c.key: Published(known[c.key], c) for c in self.changes if c.key in known and c.joined == CHANGE}
        for analysis in self.sessions:
            for number, origin, effect in analysis.screened:
                key = origin.rpartition("/")[2]
                cell = Cell(effect, [f"{analysis.name} #{number} in shared runs"], analysis.name, "")
                if key in known and key not in found:
                    title = known[key].title
                    found[key] = Published(known[key], Shared(key, title, "", CHANGE, "", {analysis.place: cell}))
                elif key in found:
                    found[key].change.cells.setdefault(analysis.place, cell)
        for one in found.values():
            for place, cell in one.change.cells.items():
                cell.verdict, cell.why = published.verdict(one.effect(place), cell.effect)
        return list(found.values())

    def facts(self) -> dict:
        """The comparison as JSON."""
        _ = self.published  # fills in their verdicts
        lists = {name: [asdict(part) for part in getattr(self, name)] for name in LISTS}
        sessions = [analysis.facts() for analysis in self.sessions]
        found = [
            {"name": one.finding.name, "change": one.change.key, "effects": {p: one.effect(p) for p in self.places}}
            for one in self.published
        ]
        return {"places": self.places, "sessions": sessions, **lists, "published": found, "notes": self.notes}


class Attempt(NamedTuple):
    """An experiment with a change."""

    session: Analysis
    experiment: Experiment

    @property
    def place(self) -> str:
        return self.session.place


def compare(analyses: list[Analysis]) -> Comparison:
    """What the sessions say together.

    Raises:
        LabError: there is none, or the same one twice.
    """
    if not analyses:
        raise LabError("name at least one session to compare")
    if twice := [name for name, n in Counter(analysis.name for analysis in analyses).items() if n > 1]:
        raise LabError(f"{twice[0]} is named twice: leave one of them out. If they are two ledgers, rename one file")
    _name_places(analyses)
    attempts = [Attempt(analysis, experiment) for analysis in analyses for experiment in analysis.tried]
    changes = _by_id(attempts) + _by_family(attempts) + _by_words(attempts)
    changes.sort(key=lambda change: len(change.cells) < 2)
    _tell_in_time(changes, analyses)
    places = list(dict.fromkeys(analysis.place for analysis in analyses))
    pairs = [(*pair, joined) for joined in JOINED for pair in combinations(places, 2)]
    agreements = [agreed for pair in pairs if (agreed := _agreement(changes, *pair))]
    return Comparison(places, analyses, changes, agreements, paid(analyses), across(analyses), _notes(analyses))


def _name_places(analyses: list[Analysis]) -> None:
    """Names the place of each session: the device, and what else it takes to tell places apart."""
    facts = [(a.started.device, a.started.backend, a.budget, a.eval) for a in analyses]
    for analysis, (device, backend, budget, tag) in zip(analyses, facts):
        _, backends, budgets, tags = map(set, zip(*(place for place in facts if place[0] == device)))
        more = [one_line(backend, 40) or "backend unknown"] * (len(backends) > 1)
        more += [f"{budget:g} s" if budget else "time unknown"] * (len(budgets) > 1)
        more += [f"eval {tag[:6]}" if tag else "eval unknown"] * (len(tags) > 1)
        analysis.place = device + f" ({', '.join(more)})" * bool(more)


def _notes(analyses: list[Analysis]) -> list[str]:
    notes = [f"{analysis.name}: {note}" for analysis in analyses for note in analysis.notes]
    if len({analysis.eval for analysis in analyses}) > 1:
        notes.append("these sessions were not all measured by the same evaluator: effects are compared, scores are not")
    if len({analysis.budget for analysis in analyses}) > 1:
        notes.append("these sessions did not all train for the same time: a change may need a longer run to help")
    for a, b in combinations(analyses, 2):
        scores, others = ([run.bpb for run in each.state.runs.values() if run.ok] for each in (a, b))
        if len(scores) > 1 and scores == others:
            notes.append(f"{a.name} and {b.name} hold the same scores: one may be a copy of the other")
    return notes


# --- Changes ---


def _by_id(attempts: list[Attempt]) -> list[Shared]:
    """Changes with a known id, joined by it; classified if their origin is known."""
    changes = []
    for same in _grouped(attempts, lambda attempt: attempt.experiment.key).values():
        source = _source(same)
        change = _shared(CHANGE, same, source or same[0])
        changes.append(change)
        if source is None:
            continue
        change.source = source.place
        change.cells[source.place].verdict, effect = SOURCE, change.cells[source.place].effect
        for place, cell in change.cells.items():
            if place != source.place and cell.effect and effect:
                cell.verdict, cell.why, cell.more = classify.classify(effect, cell.effect)
    return changes


def _tell_in_time(changes: list[Shared], analyses: list[Analysis]) -> None:
    """Tells effects as factors of time, too, where the place has a curve of its baseline, and judges them so."""
    curves: dict[str, Curve] = {}
    for analysis in analyses:
        if analysis.curve and not analysis.curve.why_not:
            curves.setdefault(analysis.place, analysis.curve)
    for change in changes:
        for place, cell in change.cells.items():
            if place in curves and cell.effect:
                cell.times = curves[place].told(cell.effect)
        source = change.cells[change.source].times if change.source else None
        for place, cell in change.cells.items():
            if place != change.source and source and source.effect and cell.times and cell.times.effect:
                cell.verdict_in_time, _, _ = classify.classify(source.effect, cell.times.effect)


def _by_family(attempts: list[Attempt]) -> list[Shared]:
    """Changes of one family, in places where no id joins them."""
    changes = []
    for same in _grouped(attempts, lambda attempt: attempt.experiment.family).values():
        places = _grouped(same, lambda attempt: attempt.place).values()
        keys = [{attempt.experiment.key for attempt in there} for there in places]
        if any(one.isdisjoint(other) for one, other in combinations(keys, 2)):
            changes.append(_shared(FAMILY, same, same[0]))
    return changes


def _by_words(attempts: list[Attempt]) -> list[Shared]:
    """Pairs of changes that are probably one, as far as words tell: where one of two sessions has nothing else."""
    changes = []
    for one, other in combinations(_grouped(attempts, lambda attempt: attempt.session.name).values(), 2):
        if one[0].place == other[0].place or all(attempt.experiment.key for attempt in (*one, *other)):
            continue
        descriptions = ([attempt.experiment.description for attempt in side] for side in (one, other))
        pairs = [(one[i], other[j]) for i, j in words.matches(*descriptions)]
        changes += [_shared(WORDS, [*pair], pair[0]) for pair in pairs if not all(a.experiment.key for a in pair)]
    return changes


def _grouped(attempts: list[Attempt], key: Callable[[Attempt], str]) -> dict[str, list[Attempt]]:
    """Attempts by a text, those without one left out."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        if text := key(attempt):
            groups.setdefault(text, []).append(attempt)
    return groups


def _shared(joined: str, attempts: list[Attempt], named: Attempt) -> Shared:
    """A change from all experiments with it, called as in one of them."""
    cells = {place: _cell(tried) for place, tried in _grouped(attempts, lambda attempt: attempt.place).items()}
    key = next((attempt.experiment.key for attempt in attempts if attempt.experiment.key), "")
    return Shared(key, named.experiment.description, kind_of(named.experiment), joined, "", cells)


def _source(attempts: list[Attempt]) -> Attempt | None:
    """The session that a change comes from: the one that its replays name; else the first that kept it, or tried it."""
    own = [attempt for attempt in attempts if not attempt.experiment.origin]
    named = {a.experiment.origin.rpartition("/")[0] for a in attempts if a.experiment.origin}
    if named:
        there = [attempt for attempt in own if attempt.session.name in named]
        # Where its session is not given, a replay on the very device it is from stands for it.
        devices = {name.partition("/")[0] for name in named}
        return next(iter(there), None) or next((a for a in attempts if a.session.started.device in devices), None)
    return next((attempt for attempt in own if attempt.experiment.status == "keep"), own[0])


def _cell(attempts: list[Attempt]) -> Cell:
    effect = effects.together([effect for session, tried in attempts if (effect := session.effect(tried))])
    told = [f"{session.name} #{experiment.number} {experiment.status}" for session, experiment in attempts]
    session, experiment = attempts[0]
    return Cell(effect, told, session.name, experiment.description, due=effects.due(effect) if effect else "")


# --- Agreement, kinds ---


def _agreement(changes: list[Shared], one: str, other: str, joined: str) -> Agreement | None:
    """Over the changes that were joined in one way."""
    there = [change.cells for change in changes if change.joined == joined and {one, other} <= change.cells.keys()]
    pairs = [(a, b) for cells in there if (a := cells[one].effect) and (b := cells[other].effect)]
    if not pairs:
        return None
    same, n = sum((a.value < 0) == (b.value < 0) for a, b in pairs), len(pairs)
    rho = effects.spearman([a.value for a, _ in pairs], [b.value for _, b in pairs])
    biased = sum(effect.biased for pair in pairs for effect in pair)
    return Agreement(one, other, n, same, (same / n, *effects.wilson(same, n)), rho, biased, joined)


def paid(analyses: list[Analysis]) -> list[Paid]:
    """What each kind of change came to on each sort of device. Sessions without any score say nothing of it."""
    groups: dict[tuple[str, str], list[Attempt]] = {}
    for analysis in (analysis for analysis in analyses if analysis.scores):
        for experiment in analysis.tried:
            group = kind_of(experiment), sort_of(analysis.started.device)
            groups.setdefault(group, []).append(Attempt(analysis, experiment))
    summaries = []
    for group, attempts in groups.items():
        counts = Counter(experiment.status for _, experiment in attempts)
        steps = [step for session, tried in attempts if (step := session.step(tried)) is not None]
        median = 100 * statistics.median(steps) if steps else None
        summaries.append(Paid(*group, len(attempts), counts["keep"], counts["crash"], median))
    for sort in {summary.sort for summary in summaries}:
        of_sort = [i for i, summary in enumerate(summaries) if summary.sort == sort]
        rates = effects.shrunken([(summaries[i].kept, summaries[i].tried) for i in of_sort])
        for i, rate in zip(of_sort, rates):
            summaries[i] = replace(summaries[i], rate=rate)
    return sorted(summaries, key=lambda summary: KINDS.index(summary.kind))


def across(analyses: list[Analysis]) -> list[Across]:
    """How often each kind was kept relative to the others, session by session; empty for one sort of device."""
    told: dict[str, dict[str, list[tuple[int, int, int, int]]]] = {}
    scored = [analysis for analysis in analyses if analysis.scores]
    for analysis in scored:
        tried = Counter(kind_of(experiment) for experiment in analysis.tried)
        kept = Counter(kind_of(experiment) for experiment in analysis.tried if experiment.status == "keep")
        for kind, n in tried.items():
            group = kept[kind], n, kept.total() - kept[kind], tried.total() - n
            told.setdefault(kind, {}).setdefault(sort_of(analysis.started.device), []).append(group)
    if len({sort_of(analysis.started.device) for analysis in scored}) < 2:
        return []
    return [
        Across(
            kind,
            {sort: effects.odds_ratio(groups) for sort, groups in told[kind].items()},
            effects.odds_ratio([group for groups in told[kind].values() for group in groups]),
        )
        for kind in KINDS
        if kind in told
    ]
