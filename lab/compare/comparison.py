"""What several sessions say together: the facts of each, the changes that they share, and how far their devices agree.

Effects are val_bpb of a change minus its parent's, in bits per byte: below 0 is better. What is compared with what is a
place: a device, its backend, the seconds of training and the tag of what it was measured by. Sessions of one place
are taken together; effects are compared across places, and absolute scores are not.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import NamedTuple

from lab.compare import agreement, classify, effects, words
from lab.compare.analysis import Analysis, kind_of, sort_of
from lab.compare.effects import Effect
from lab.errors import LabError
from lab.genome import kinds
from lab.session.events import Interval
from lab.session.record import Record
from lab.session.state import Experiment
from lab.untrusted import one_line

SOURCE = "source"
CHANGE, FAMILY, WORDS = JOINED = "change", "family", "words"  # by what changes are taken for one, the surest first


@dataclass
class Cell:
    """A change in one place.

    Attributes:
        tried: "DEVICE/TAG #NUMBER STATUS" of each experiment with it there. sessions: their names.
        verdict: "source" where it comes from; elsewhere "holds", "fades", "reverses" or "can't be told"; "" if nothing
            is known of its source, or it has no score here.
        why: a sentence.
        more: further runs, of the change and of its parent each, that would probably tell: {"here": 3, "source": 0};
            None if nothing is missing, or nothing that can be run would tell.
        due: "more tokens", "fewer tokens, better per token" and the like; "" where it is not known.
        description: the first one's here.
    """

    effect: Effect | None
    tried: list[str]
    sessions: list[str]
    verdict: str = ""
    why: str = ""
    more: dict[str, int] | None = None
    due: str = ""
    description: str = ""


@dataclass
class Shared:
    """A change, and what it did in each place.

    Attributes:
        key: its id, or the first one's where less joined them; "" if none is known.
        joined: "change" by its id or by what it repeats; "family" if it is probably the same, its lines in the same
            definition beside other neighbours; "words" if only its description says so.
        source: the place that it comes from; "" if that is not among the sessions, or not sure.
        cells: by place.
    """

    key: str
    description: str
    kind: str
    joined: str
    source: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Agreement:
    """How far two places agree on the changes that both measured.

    Attributes:
        same: of `n` changes have effects of the same sign; share, with its 90 % interval (Wilson).
        rho: Spearman's, with its 90 % interval; None with fewer than 4 changes.
        flattered: how many of the effects rest on runs that the change was chosen for.
        joined: as of the changes.
    """

    one: str
    other: str
    n: int
    same: int
    share: Interval
    rho: Interval | None
    flattered: int
    joined: str


@dataclass(frozen=True)
class Paid:
    """What changes of a kind came to on a sort of device. What touches several kinds counts for that which it is most.

    Attributes:
        tried: with a verdict, those that crashed too; kept, crashed: of them.
        median: of the steps from the parent as the session saw them (what was kept flatters itself), in per cent of its
            val_bpb; None without scores.
    """

    kind: str
    sort: str
    tried: int
    kept: int
    crashed: int
    median: float | None


@dataclass
class Comparison:
    """All of it. `places`: label by label what tells them apart; `changes`: those of several places first."""

    places: list[str]
    sessions: list[Analysis]
    changes: list[Shared]
    agreements: list[Agreement]
    kinds: list[Paid]
    notes: list[str] = field(default_factory=list)

    @property
    def shared(self) -> list[Shared]:
        """The changes that more than one place has tried."""
        return [change for change in self.changes if len(change.cells) > 1]

    def facts(self) -> dict:
        """For machines (JSON)."""
        lists = {name: [asdict(part) for part in getattr(self, name)] for name in ("changes", "agreements", "kinds")}
        sessions = [analysis.facts() for analysis in self.sessions]
        return {"places": self.places, "sessions": sessions, **lists, "notes": self.notes}


class Attempt(NamedTuple):
    """An experiment with a change."""

    session: Analysis
    experiment: Experiment

    @property
    def place(self) -> str:
        return self.session.place


def tally(changes: list[Shared]) -> dict[tuple[str, str], Counter]:
    """(source, place) -> how often each class was found there."""
    counts: dict[tuple[str, str], Counter] = {}
    for change in changes:
        for place, cell in change.cells.items():
            if change.source and cell.verdict in classify.CLASSES:
                counts.setdefault((change.source, place), Counter())[cell.verdict] += 1
    return counts


def compare(records: list[Record]) -> Comparison:
    """What the sessions say together.

    Raises:
        LabError: there is none, or the same one twice.
    """
    return of_analyses([Analysis(record) for record in records])


def of_analyses(analyses: list[Analysis]) -> Comparison:
    """As `compare`."""
    if not analyses:
        raise LabError("name at least one session to compare")
    if twice := [name for name, n in Counter(analysis.name for analysis in analyses).items() if n > 1]:
        raise LabError(f"{twice[0]} is there twice: leave one of them out, or rename a bare ledger's file")
    _name_places(analyses)
    attempts = [Attempt(analysis, experiment) for analysis in analyses for experiment in analysis.tried]
    changes = _by_id(attempts) + _by_family(attempts) + _by_words(analyses, attempts)
    changes.sort(key=lambda change: len(change.cells) < 2)
    labels = list(dict.fromkeys(analysis.place for analysis in analyses))
    return Comparison(
        labels,
        analyses,
        changes,
        [
            agreed
            for joined in JOINED
            for pair in combinations(labels, 2)
            if (agreed := _agreement(*pair, [c for c in changes if c.joined == joined], joined))
        ],
        paid(analyses),
        _notes(analyses),
    )


# --- Places ---


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
        notes.append("they did not all train for the same time: what helps in one may take longer to help in another")
    return notes


# --- Changes ---


def _by_id(attempts: list[Attempt]) -> list[Shared]:
    """Those whose id is known, joined by it."""
    changes = []
    for key, same in _grouped(attempts, lambda attempt: attempt.experiment.key).items():
        source = _source(same)
        change = _shared(key, CHANGE, same, source or same[0])
        if source:
            change.source = source.place
            _judge(change.cells, source.place)
        changes.append(change)
    return changes


def _by_family(attempts: list[Attempt]) -> list[Shared]:
    """Those with one family in places where no one id joins them."""
    changes = []
    for same in _grouped(attempts, lambda attempt: attempt.experiment.family).values():
        keys: dict[str, set[str]] = {}
        for attempt in same:
            keys.setdefault(attempt.place, set()).add(attempt.experiment.key)
        if any(not keys[one] & keys[other] for one, other in combinations(keys, 2)):
            changes.append(_shared(same[0].experiment.key, FAMILY, same, same[0]))
    return changes


def _by_words(analyses: list[Analysis], attempts: list[Attempt]) -> list[Shared]:
    """Pairs of changes that are probably one, as far as words tell: where one of two sessions has nothing else."""
    by_session = _grouped(attempts, lambda attempt: attempt.session.name)
    changes = []
    for one, other in combinations([by_session.get(analysis.name, []) for analysis in analyses], 2):
        if not one or not other or one[0].place == other[0].place:
            continue
        if all(attempt.experiment.key for attempt in (*one, *other)):
            continue
        descriptions = ([attempt.experiment.description for attempt in side] for side in (one, other))
        for i, j in words.matches(*descriptions):
            pair, ids = [one[i], other[j]], [one[i].experiment.key, other[j].experiment.key]
            if not all(ids):
                changes.append(_shared(ids[0] or ids[1], WORDS, pair, pair[0]))
    return changes


def _grouped(attempts: list[Attempt], key: Callable[[Attempt], str]) -> dict[str, list[Attempt]]:
    """Attempts by a text, those without one left out."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        if text := key(attempt):
            groups.setdefault(text, []).append(attempt)
    return groups


def _shared(key: str, joined: str, attempts: list[Attempt], named: Attempt) -> Shared:
    """A change from all experiments with it, called as in one of them."""
    cells = {place: _cell(tried) for place, tried in _grouped(attempts, lambda attempt: attempt.place).items()}
    return Shared(key, named.experiment.description, kind_of(named.experiment), joined, "", cells)


def _source(attempts: list[Attempt]) -> Attempt | None:
    """Where a change comes from: what its replays name; without any, the first session that kept it, or tried it."""
    own = [attempt for attempt in attempts if not attempt.experiment.origin]
    named = {a.experiment.origin.rpartition("/")[0] for a in attempts if a.experiment.origin}
    if named:
        there = [attempt for attempt in own if attempt.session.name in named]
        # Where its session is not given, a replay on the very device it is from stands for it.
        devices = {name.partition("/")[0] for name in named}
        return next(iter(there), None) or next((a for a in attempts if a.session.started.device in devices), None)
    return next((attempt for attempt in own if attempt.experiment.status == "keep"), own[0])


def _cell(attempts: list[Attempt]) -> Cell:
    known = [effect for session, experiment in attempts if (effect := session.effect(experiment))]
    effect = effects.together(known)
    return Cell(
        effect,
        [f"{session.name} #{experiment.number} {experiment.status}" for session, experiment in attempts],
        [session.name for session, _ in attempts],
        due=effects.due(effect) if effect else "",
        description=attempts[0].experiment.description,
    )


def _judge(cells: dict[str, Cell], source: str) -> None:
    """Says of each place whether it holds there."""
    cells[source].verdict = SOURCE
    effect = cells[source].effect
    if effect is None:
        return
    for place, cell in cells.items():
        if place != source and cell.effect is not None:
            cell.verdict, cell.why, cell.more = classify.classify(effect, cell.effect)


# --- Agreement, kinds, scores ---


def _agreement(one: str, other: str, changes: list[Shared], joined: str) -> Agreement | None:
    pairs = []
    for change in changes:
        if one in change.cells and other in change.cells:
            effect, elsewhere = change.cells[one].effect, change.cells[other].effect
            if effect and elsewhere:
                pairs.append((effect, elsewhere))
    if not pairs:
        return None
    same = sum((a.value < 0) == (b.value < 0) for a, b in pairs)
    rho = agreement.spearman([effect.value for effect, _ in pairs], [effect.value for _, effect in pairs])
    flattered = sum(effect.flattered for pair in pairs for effect in pair)
    share = (same / len(pairs), *agreement.wilson(same, len(pairs)))
    return Agreement(one, other, len(pairs), same, share, rho, flattered, joined)


def paid(analyses: list[Analysis]) -> list[Paid]:
    """What each kind of change came to on each sort of device."""
    groups: dict[tuple[str, str], list[tuple[str, float | None]]] = {}
    for analysis in analyses:
        for experiment in analysis.tried:
            group = groups.setdefault((kind_of(experiment) or "other", sort_of(analysis.started.device)), [])
            group.append((experiment.status, analysis.step(experiment, relative=True)))
    summaries = []
    for (kind, sort), group in groups.items():
        statuses = [status for status, _ in group]
        known = [100 * step for _, step in group if step is not None]
        median = statistics.median(known) if known else None
        summaries.append(Paid(kind, sort, len(group), statuses.count("keep"), statuses.count("crash"), median))
    return sorted(summaries, key=lambda summary: kinds.KINDS.index(summary.kind))
