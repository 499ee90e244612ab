"""What several sessions say together: the facts of each, the changes that they share, and how far their devices agree.

Effects are val_bpb of a change minus its parent's, in bits per byte: below 0 is better. What is compared with what is a
place: a device, its backend, the seconds of training and the tag of what it was measured by. Sessions of one place
are taken together; effects are compared across places, and absolute scores are not.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import combinations

from lab.genome import kinds
from lab.compare import agreement, classify, effects, words
from lab.compare.effects import Effect
from lab.compare.record import Change, Record
from lab.errors import LabError
from lab.session.state import REPLAY

DATACENTRE = r"g[bh]\d{3}|[ahbvlptkm]\d{1,3}[gs]?"  # A100, A10G, H200, GB200, GH200, L40S, V100, T4, M60
SOURCE = "source"


@dataclass
class Cell:
    """A change in one place.

    Attributes:
        tried: "DEVICE/TAG #NUMBER STATUS" of each experiment with it there.
        verdict: "source" where it comes from; elsewhere "holds", "fades", "reverses" or "can't be told"; "" if nothing
            is known of its source, or it has no score here.
        why: a sentence.
        more: further runs, of the change and of its parent each, that would probably tell: {"here": 3, "source": 0};
            None if nothing is missing, or nothing that can be run would tell.
        due: "more tokens", "fewer tokens, better per token" and the like; "" where it is not known.
    """

    effect: Effect | None
    tried: list[str] = field(default_factory=list)
    verdict: str = ""
    why: str = ""
    more: dict | None = None
    due: str = ""


@dataclass
class Shared:
    """A change, and what it did in each place.

    Attributes:
        key: the stable id of its patch, or of the first one's where only words joined them; "" if none is known.
        by_words: it is taken for one change because of how it is described, and may not be.
        source: the place that it comes from; "" if that is not among the sessions.
        cells: by place. texts: its descriptions, by place.
    """

    key: str
    description: str
    kinds: tuple[str, ...]
    by_words: bool
    source: str
    cells: dict[str, Cell]
    texts: dict[str, str] = field(default_factory=dict)


@dataclass
class Facts:
    """A session in numbers.

    Attributes:
        place: as in Comparison. sort: of the device, see `sort_of`.
        baseline, best: mean val_bpb, as the session saw it: the best flatters itself. gain: baseline's minus best's;
            relative: to the baseline's. None without scores. best_number: of the experiment.
        confirmed: the best against the baseline, on runs of confirmations alone; None without any.
        experiments: without the baseline and confirmations; and of them so many kept, discarded, crashed, invalid.
        keep_rate, crash_rate: of the experiments. per_hour: experiments.
        tokens, flops, mfu: of a run of the baseline, and of the best: means; the model's, mfu in percent; or None.
        noise, df: of val_bpb between seeds; None where nothing was repeated. rows: of the ledger.
    """

    name: str
    place: str
    device: str
    sort: str
    backend: str
    budget: float | None
    eval: str
    tagged: bool
    baseline: float | None
    best: float | None
    best_number: int | None
    gain: float | None
    relative: float | None
    confirmed: Effect | None
    confirmation: str
    experiments: int
    kept: int
    discarded: int
    crashed: int
    invalid: int
    keep_rate: float | None
    crash_rate: float | None
    per_hour: float | None
    hours: float | None
    tokens: tuple[float | None, float | None]
    flops: tuple[float | None, float | None]
    mfu: tuple[float | None, float | None]
    noise: float | None
    df: int | None
    rows: int
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> tuple:
        """Equal for sessions whose scores compare; what an unknown evaluator measured compares with nothing."""
        return self.eval, self.budget or 0.0, "" if self.eval else self.name

    @property
    def measured_by(self) -> str:
        """The same in words."""
        if not self.eval:
            return "Measured by what is not known: these scores compare with no others"
        return f"Measured by evaluator {self.eval}" + (f", after {self.budget:g} s of training" if self.budget else "")


@dataclass(frozen=True)
class Agreement:
    """How far two places agree on the changes that both measured.

    Attributes:
        same: of `n` changes have effects of the same sign; share, with its 90 % interval (Wilson).
        rho: Spearman's, with its 90 % interval; None with fewer than 4 changes.
        flattered: how many of the effects rest on runs that the change was chosen for.
        by_words: for changes that are joined by their words.
    """

    one: str
    other: str
    n: int
    same: int
    share: float
    share_low: float
    share_high: float
    rho: float | None
    rho_low: float | None
    rho_high: float | None
    flattered: int
    by_words: bool


@dataclass(frozen=True)
class Paid:
    """What changes of a kind came to on a sort of device. What touches several kinds counts for that which it is most.

    Attributes:
        tried: with a verdict, those that crashed too; kept: of them.
        median: of the effects (effects.py; of what was kept mostly flattered), in per cent of the parent's val_bpb;
            None without scores.
    """

    kind: str
    sort: str
    tried: int
    kept: int
    median: float | None


@dataclass(frozen=True)
class Point:
    """A train.py in the table of val_bpb against tokens and FLOPs: means over its runs. `what`: its description."""

    session: str
    place: str
    number: int
    status: str
    what: str
    bpb: float
    tokens: float | None
    flops: float | None
    eval: str
    budget: float | None


@dataclass
class Comparison:
    """All of it. `places`: label by label what tells them apart; `changes`: those of several places first."""

    places: list[str]
    sessions: list[Facts]
    changes: list[Shared]
    agreements: list[Agreement]
    kinds: list[Paid]
    points: list[Point]
    notes: list[str] = field(default_factory=list)

    @property
    def shared(self) -> list[Shared]:
        """The changes that more than one place has tried."""
        return [change for change in self.changes if len(change.cells) > 1]

    def facts(self) -> dict:
        """For machines (JSON)."""
        return asdict(self)


def tally(changes: list[Shared]) -> dict[tuple[str, str], Counter]:
    """(source, place) -> how often each class was found there."""
    found: dict[tuple[str, str], Counter] = {}
    for change in changes:
        for place, cell in change.cells.items():
            if change.source and cell.verdict in classify.CLASSES:
                found.setdefault((change.source, place), Counter())[cell.verdict] += 1
    return found


def compare(records: list[Record]) -> Comparison:
    """What the sessions say together.

    Raises:
        LabError: there is none, or the same one twice.
    """
    if not records:
        raise LabError("name at least one session to compare")
    if twice := [name for name, n in Counter(record.name for record in records).items() if n > 1]:
        raise LabError(f"{twice[0]} is there twice: leave one of them out, or rename a bare ledger's file")
    places = _places(records)
    labels = list(dict.fromkeys(places))
    changes = _by_patch(records, places) + _by_words(records, places)
    changes.sort(key=lambda change: len(change.cells) < 2)
    return Comparison(
        labels,
        [facts_of(record, place) for record, place in zip(records, places)],
        changes,
        [
            one
            for by_words in (False, True)
            for pair in combinations(labels, 2)
            if (one := _agreement(*pair, [c for c in changes if c.by_words == by_words], by_words))
        ],
        _paid(records),
        [point for record, place in zip(records, places) for point in _points(record, place)],
        _notes(records, places),
    )


# --- Places ---


def _places(records: list[Record]) -> list[str]:
    """The label of each session's place: the device, and what else it takes to tell places apart."""
    found = [(record.device, record.backend, record.budget, record.eval) for record in records]
    labels = []
    for device, backend, budget, tag in found:
        alike = {one for one in found if one[0] == device}
        more = [backend or "backend unknown"] * (len({one[1] for one in alike}) > 1)
        more += [f"{budget:g} s" if budget else "time unknown"] * (len({one[2] for one in alike}) > 1)
        more += [f"eval {tag[:6]}" if tag else "eval unknown"] * (len({one[3] for one in alike}) > 1)
        labels.append(device + f" ({', '.join(more)})" * bool(more))
    return labels


def sort_of(device: str) -> str:
    """What sort of device a tag names: "cpu", "apple", "jetson", "nvidia datacentre", "nvidia desktop", "amd", "intel"
    or "other"."""
    parts = device.lower().split("-")
    if parts[0] in ("cpu", "apple", "amd", "intel"):
        return parts[0]
    if {"jetson", "orin", "xavier", "thor"} & set(parts):
        return "jetson"
    if parts[0] != "nvidia":
        return "other"
    desktop = {"rtx", "gtx", "titan", "quadro"} & set(parts)
    return (
        "nvidia datacentre"
        if not desktop and any(re.fullmatch(DATACENTRE, part) for part in parts)
        else ("nvidia desktop")
    )


def _notes(records: list[Record], places: list[str]) -> list[str]:
    notes = [f"{record.name}: {note}" for record in records for note in record.notes]
    by_place = {place: (record.budget, record.eval) for record, place in zip(records, places)}
    if len({tag for _, tag in by_place.values()}) > 1:
        notes.append("these sessions were not all measured by the same evaluator: effects are compared, scores are not")
    if len({budget for budget, _ in by_place.values()}) > 1:
        notes.append("they did not all train for the same time: what helps in one may take longer to help in another")
    return notes


# --- Changes ---


def _by_patch(records: list[Record], places: list[str]) -> list[Shared]:
    """Those whose patch is known, joined by it."""
    found: dict[str, list[tuple[Record, str, Change]]] = {}
    for record, place in zip(records, places):
        for change in record.changes.values():
            if change.number and change.key:
                found.setdefault(change.key, []).append((record, place, change))
    return [_shared(key, its) for key, its in found.items()]


def _shared(key: str, its: list[tuple[Record, str, Change]]) -> Shared:
    """A change from all experiments with it."""
    first = _source(its)
    by_place: dict[str, list[tuple[Record, Change]]] = {}
    for record, place, change in its:
        by_place.setdefault(place, []).append((record, change))
    cells = {place: _cell(tried) for place, tried in by_place.items()}
    source = first[1] if first else ""
    _judge(cells, source)
    told = (first or its[0])[2]
    return Shared(
        key,
        told.description,
        told.kinds,
        False,
        source,
        cells,
        {place: tried[0][1].description for place, tried in by_place.items()},
    )


def _source(its: list[tuple[Record, str, Change]]) -> tuple[Record, str, Change] | None:
    """Where a change comes from: what its replays name; without any, the first session that kept it, or tried it."""
    own = [one for one in its if not one[2].origin]
    named = {one[2].origin.rpartition("/")[0] for one in its if one[2].origin}
    if named:
        there = [one for one in own if one[0].name in named]
        # Where its session is not given, a replay on the very device it is from stands for it.
        return next(iter(there), None) or next(
            (one for one in its if one[0].device in {name.partition("/")[0] for name in named}), None
        )
    return next((one for one in own if one[2].status == "keep"), own[0])


def _cell(tried: list[tuple[Record, Change]]) -> Cell:
    known = [one for record, change in tried if (one := effects.effect(record, change))]
    effect = effects.together(known)
    return Cell(
        effect,
        [f"{record.name} #{change.number} {change.status}" for record, change in tried],
        due=effects.due(effect) if effect else "",
    )


def _judge(cells: dict[str, Cell], source: str) -> None:
    """Says of each place whether it holds there."""
    if not source:
        return
    cells[source].verdict = SOURCE
    if (its := cells[source].effect) is None:
        return
    for place, cell in cells.items():
        if place != source and cell.effect is not None:
            cell.verdict, cell.why, cell.more = classify.classify(its, cell.effect)


def _by_words(records: list[Record], places: list[str]) -> list[Shared]:
    """Pairs of changes that are probably one, as far as words tell: where one of two sessions has nothing else."""
    found = []
    for (one, here), (other, there) in combinations(zip(records, places), 2):
        if here == there:
            continue
        ours, theirs = ([change for change in record.changes.values() if change.number] for record in (one, other))
        if all(change.key for change in ours) and all(change.key for change in theirs):
            continue
        for i, j in words.matches([c.description for c in ours], [c.description for c in theirs]):
            a, b = ours[i], theirs[j]
            if not (a.key and b.key):
                found.append(
                    Shared(
                        a.key or b.key,
                        a.description,
                        a.kinds,
                        True,
                        "",
                        {here: _cell([(one, a)]), there: _cell([(other, b)])},
                        {here: a.description, there: b.description},
                    )
                )
    return found


# --- Agreement, kinds, scores ---


def _agreement(one: str, other: str, changes: list[Shared], by_words: bool) -> Agreement | None:
    pairs = [
        (change.cells[one].effect, change.cells[other].effect)
        for change in changes
        if one in change.cells and other in change.cells
    ]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return None
    same = sum((a.value < 0) == (b.value < 0) for a, b in pairs)
    low, high = agreement.wilson(same, len(pairs))
    rho = agreement.spearman(*([effect.value for effect in side] for side in zip(*pairs))) or (None, None, None)
    return Agreement(
        one,
        other,
        len(pairs),
        same,
        same / len(pairs),
        low,
        high,
        *rho,
        sum(effect.flattered for pair in pairs for effect in pair),
        by_words,
    )


def _paid(records: list[Record]) -> list[Paid]:
    found: dict[tuple[str, str], list[tuple[str, float | None]]] = {}
    for record in records:
        for change in record.changes.values():
            if change.number:
                effect = effects.effect(record, change)
                kind = change.kinds[0] if change.kinds else "other"
                found.setdefault((kind, sort_of(record.device)), []).append(
                    (change.status, effect and 100 * effect.relative)
                )
    sorts = list(dict.fromkeys(sort_of(record.device) for record in records))
    return [
        Paid(
            kind,
            sort,
            len(its),
            sum(status == "keep" for status, _ in its),
            statistics.median(known) if (known := [value for _, value in its if value is not None]) else None,
        )
        for kind in kinds.KINDS
        for sort in sorts
        if (its := found.get((kind, sort)))
    ]


def _points(record: Record, place: str) -> list[Point]:
    return [
        Point(
            record.name,
            place,
            change.number,
            change.status,
            change.description,
            score,
            _mean(record, change, "tokens"),
            _mean(record, change, "flops"),
            record.eval,
            record.budget,
        )
        for change in record.changes.values()
        if (score := effects.mean(record, change)) is not None
    ]


def _mean(record: Record, change: Change | None, name: str) -> float | None:
    known = [getattr(t, name) for t in effects.counted(record, change)] if change else []
    known = [value for value in known if value is not None]
    return statistics.fmean(known) if known else None


def facts_of(record: Record, place: str = "") -> Facts:
    """A session by itself."""
    baseline = record.changes.get(0)
    kept = [change for change in record.changes.values() if change.status == "keep" and change.kind != REPLAY]
    best = max(kept, key=lambda change: change.number, default=None)
    scores = [effects.mean(record, change) if change else None for change in (baseline, best)]
    tried = [change.status for change in record.changes.values() if change.number]
    count = {status: tried.count(status) for status in ("keep", "discard", "crash", "invalid")}
    gain = scores[0] - scores[1] if None not in scores else None
    pairs = [[t for t in effects.counted(record, c) if t.confirms] if c else [] for c in (best, baseline)]
    both = {name: tuple(_mean(record, c, name) for c in (baseline, best)) for name in ("tokens", "flops", "mfu")}
    return Facts(
        name=record.name,
        place=place,
        device=record.device,
        sort=sort_of(record.device),
        backend=record.backend,
        budget=record.budget,
        eval=record.eval,
        tagged=record.tagged,
        baseline=scores[0],
        best=scores[1],
        best_number=best.number if best else None,
        gain=gain,
        relative=gain / scores[0] if gain is not None else None,
        confirmed=effects.between(*pairs, record.noise) if best is not baseline and all(pairs) else None,
        confirmation=record.confirmation,
        experiments=len(tried),
        kept=count["keep"],
        discarded=count["discard"],
        crashed=count["crash"],
        invalid=count["invalid"],
        keep_rate=count["keep"] / len(tried) if tried else None,
        crash_rate=count["crash"] / len(tried) if tried else None,
        per_hour=len(tried) / record.hours if record.hours else None,
        hours=record.hours,
        **both,
        noise=record.noise.sd if record.noise else None,
        df=record.noise.df if record.noise else None,
        rows=record.rows,
        notes=list(record.notes),
    )
