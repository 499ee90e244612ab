"""Records of sessions that never were."""

from lab.compare.record import Change, Record, Trial
from lab.verdict.gate import Noise

BUDGET = 300.0


def trials(scores, beside=0, first=1, eval="e" * 12, tokens=None, confirms=False, budget=BUDGET):
    """Runs with these scores, numbered from `first`."""
    return tuple(
        Trial(first + i, 42 + i, score, eval, budget, tokens, tokens and tokens * 1e6, confirms=confirms, beside=beside)
        for i, score in enumerate(scores)
    )


def change(number, scores, status="discard", parent=0, patch=None, description=None, after=(), **facts):
    """A change with own runs, and those that were made later: `after` is of trials()."""
    patch = f"{number:016x}" if patch is None else patch
    return Change(
        number,
        parent,
        status,
        facts.pop("kind", "change"),
        description or f"change {number}",
        patch,
        trials=trials(scores, beside=number, tokens=facts.pop("tokens", None)) + tuple(after),
        **facts,
    )


def record(device, tag, *changes, base=(1.0, 1.0, 1.0), noise=0.001, df=10, after=(), tokens=None, **facts):
    """A session with a baseline of these scores. noise: None where nothing was repeated."""
    baseline = Change(0, None, "keep", "baseline", "baseline", trials=trials(base, tokens=tokens) + tuple(after))
    return Record(
        device,
        tag,
        {one.number: one for one in (baseline, *changes)},
        facts.pop("backend", "sdpa"),
        noise and Noise(noise, df),
        facts.pop("budget", BUDGET),
        **facts,
    )


def replay(number, scores, of, status="discard", **facts):
    """A change that another session found: `of` is DEVICE/TAG/PATCH."""
    return change(number, scores, status, patch="f" * 16, origin=of, kind="replay", **facts)
