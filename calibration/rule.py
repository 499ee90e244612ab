"""Chooses the defaults of `train.py` from the measurements of a device.

The reasoning, in the order in which it is applied.

**Precision** is what an MLP ran fastest in; half precision has to be clearly faster. **Attention** is the fastest
implementation that matched the reference; one that keeps more in memory has to be clearly faster.

**Window**: a short window attends to less, so it has to save time. It is used (`SSSL`) only where attention to half the
row takes at most 0.8 of the time of full attention; else every layer is full (`L`). On an H200 without Flash Attention
3 it takes longer, and `L` was better by 0.002 bits per byte.

**Depth** (width follows) decides how many tokens the time budget can buy. A model too large sees too few of them, one
too small can't use them. What is held against the tokens D is FLOPs per token, as N = FLOPs / 6: the parameters that a
token passes through, attention's work included. A depth's D / N falls steeply with depth, and the depth whose D / N is
nearest to TOKENS_PER_PARAMETER, on a logarithmic scale, is taken. That number was found by full runs at the two ends of
the range: it lies between the ratios of depth 2 on a 2-core CPU and depth 10 on an H200, both better than half and
twice as deep (benchmarks/README.md). Hoffmann et al. 2022 (arXiv:2203.15556) found 20 for models a thousand times as
large, tuned at each size; here N also counts attention and a head that is a third of a small model.

**Total batch**: learning rates are the same everywhere, so the batch sets the noise of a step. The best ones measured
are 2^14 tokens where a run reads 6.5 M tokens and 2^17 where it reads 300 M: the root of the tokens, rounded to a power
of two, and never so much that the schedule has fewer than LEAST_STEPS steps.

**Device batch**: the fewest rows that reach 97 % of the best tokens/s, so that memory is left for what an experiment
may add. A batch **fits** when its peak is at most 80 % of the memory that was free and its tokens/s are not below a
smaller batch's: memory that the system shares is swapped before it runs out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from prepare import MAX_SEQ_LEN, TIME_BUDGET

LADDER = (*range(1, 11), 12, 14, 16, 20, 24, 32)  # depths that are considered
TOKENS_PER_PARAMETER = 2.5
BATCH_AT, BATCH_TOKENS, BATCH_EXPONENT = 3e8, 2**17, 0.5  # tokens of a run, its best batch, and how that grows
LEAST_STEPS = 300
WINDOW_SAVES = 0.8
ENOUGH_SPEED = 0.97
SHARE_OF_MEMORY = 0.8
SLOWER = 0.95  # below this share of a smaller batch's tokens/s, memory is being swapped


@dataclass(frozen=True)
class Sizes:
    """Sizes that `train.py` takes from the calibration.

    Attributes:
        depth, window_pattern: of the model.
        device_batch_size: rows per pass. total_batch_size: tokens per optimizer step.
    """

    depth: int
    device_batch_size: int
    total_batch_size: int
    window_pattern: str


@dataclass(frozen=True)
class Settings(Sizes):
    """What a calibration chose: sizes, the precision to compute in, and the attention by kind of window."""

    precision: str
    attention: dict[str, str]


# Without measurements: small enough for any device that is of use here.
SAFE = Sizes(depth=2, device_batch_size=2, total_batch_size=2**13, window_pattern="L")


class Spread(TypedDict):
    """Repeats of a measurement: their median, lowest and highest value, and their number."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Trial:
    """What a short run of `train.py` is asked for: `rows` are of a pass, `total_batch_size` is tokens per step."""

    depth: int
    rows: int
    total_batch_size: int
    window_pattern: str
    precision: str


@dataclass(frozen=True)
class Completed(Trial):
    """A trial that ran to its end.

    Attributes:
        tokens_per_second: over steps.
        peak_memory, free_memory: bytes at its peak, and before it started.
        flops_per_token, num_params: as `train.py` reports them.
    """

    tokens_per_second: Spread
    peak_memory: int
    free_memory: int
    flops_per_token: float
    num_params: int

    @property
    def rate(self) -> float:
        return self.tokens_per_second["median"]

    @property
    def ratio(self) -> float:
        """Tokens that the budget buys for each parameter a token passes through."""
        return self.rate * TIME_BUDGET / (self.flops_per_token / 6)


@dataclass(frozen=True)
class Failed(Trial):
    """A trial that did not run to its end; `failed` is the reason."""

    free_memory: int
    failed: str


Outcome = Completed | Failed


def window_pattern(attention: dict, chosen: dict[str, str]) -> tuple[str, str]:
    """("SSSL" or "L", why), from what `bench.try_attention` measured, as spreads."""
    full, window = (attention[kind][chosen[kind]]["both"]["median"] for kind in ("full", "window"))
    saves = window / full <= WINDOW_SAVES
    return (
        "SSSL" if saves else "L",
        f"half a row takes {window / full:.2f} of the time of a whole one ({WINDOW_SAVES} or less would pay)",
    )


def fitting(trials: Sequence[Outcome]) -> list[Completed]:
    """The trials of one depth whose batch fits, in the order of their rows."""
    fit = []
    for trial in sorted((t for t in trials if isinstance(t, Completed)), key=lambda t: t.rows):
        in_memory = trial.peak_memory <= SHARE_OF_MEMORY * trial.free_memory
        if in_memory and all(trial.rate >= SLOWER * smaller.rate for smaller in fit):
            fit.append(trial)
    return fit


def at(trials: Sequence[Outcome], depth: int) -> list[Outcome]:
    return [trial for trial in trials if trial.depth == depth]


def best_rows(trials: Sequence[Outcome]) -> Completed | None:
    """The trial with the fewest rows that is nearly as fast as any, among one depth's trials that fit."""
    fit = fitting(trials)
    enough = ENOUGH_SPEED * max((trial.rate for trial in fit), default=0)
    return next((trial for trial in fit if trial.rate >= enough), None)


def best_depth(trials: Sequence[Outcome]) -> Completed | None:
    """The trial at the depth that the rule takes, with its best rows."""
    candidates = [best for depth in LADDER if (best := best_rows(at(trials, depth)))]
    return min(candidates, key=lambda t: abs(math.log(t.ratio / TOKENS_PER_PARAMETER)), default=None)


def total_batch(tokens: float) -> int:
    """Tokens per optimizer step, for a run that reads `tokens` in all."""
    best = BATCH_TOKENS * (tokens / BATCH_AT) ** BATCH_EXPONENT
    most = math.floor(math.log2(max(1, tokens / LEAST_STEPS)))
    return 2 ** max(int(math.log2(MAX_SEQ_LEN)), min(round(math.log2(best)), most))


def scale(trials: Sequence[Outcome], measured: dict, attention: dict[str, str]) -> tuple[Settings, list[str]]:
    """The defaults, and why.

    Args:
        measured: as `bench.try_attention` returns it, but with spreads for lists of seconds.
        attention: what the trials computed it with, by kind of window.

    Raises:
        ValueError: no trial fits: the message says what the smallest one needed.
    """
    best = best_depth(trials)
    if best is None:
        raise ValueError(nothing_fits(trials))
    _, why = window_pattern(measured, attention)
    tokens = best.rate * TIME_BUDGET
    total = total_batch(tokens)
    rows = min(best.rows, total // MAX_SEQ_LEN)
    neighbours = ", ".join(f"{t.depth}: {t.ratio:.3g}" for depth in LADDER if (t := best_rows(at(trials, depth))))
    reasons = [
        f"precision {best.precision}: the fastest that computes correctly",
        f"window {best.window_pattern}: attention to {why}",
        f"depth {best.depth}: {tokens / 1e6:.3g} M tokens in {TIME_BUDGET} s are {best.ratio:.3g} for each of "
        f"{best.flops_per_token / 6e6:.3g} M parameters that a token passes through, nearest to "
        f"{TOKENS_PER_PARAMETER:g} (by depth: {neighbours})",
        f"total batch {total}: {tokens / total:.0f} steps",
        f"device batch {rows}: {best.rate:,.0f} tokens/s with {best.peak_memory / 1e9:.2f} GB at the peak, of "
        f"{best.free_memory / 1e9:.2f} GB that were free",
    ]
    return Settings(best.depth, rows, total, best.window_pattern, best.precision, attention), reasons


def nothing_fits(trials: Sequence[Outcome]) -> str:
    smallest = min(trials, key=lambda t: (t.depth, t.rows), default=None)
    if smallest is None:
        return "nothing has been tried yet"
    if isinstance(smallest, Failed):
        problem = smallest.failed
    else:
        problem = (
            f"it needs {smallest.peak_memory / 1e9:.2f} GB of the {smallest.free_memory / 1e9:.2f} GB that are free, "
            f"more than {SHARE_OF_MEMORY:.0%}"
        )
    return (
        f"not even depth {smallest.depth} with {smallest.rows} rows of {MAX_SEQ_LEN} tokens runs on this device: "
        f"{problem}. Close what else uses its memory and calibrate again; or lower MAX_SEQ_LEN in prepare.py"
    )


def bests(tried: dict) -> dict:
    """What `bench.choose_attention` reads, from times with their spread: the best repeat of each."""
    return {
        kind: {
            name: times if isinstance(times, str) else times | {"both": [times["both"]["low"]]}
            for name, times in by_name.items()
        }
        for kind, by_name in tried.items()
    }


# --- What to try next ------------------------------------------------------------------------------------------------


def start(product_rate: float, free: int) -> tuple[int, int, int]:
    """(depth, rows, total batch) of the first trial: small for what the device seems to be."""
    steps = ((2e12, (2, 2, 2**14)), (5e13, (4, 4, 2**15)), (3e14, (8, 16, 2**17)), (math.inf, (8, 64, 2**17)))
    depth, rows, total = next(sizes for below, sizes in steps if product_rate < below)
    affordable = max(1, int(12 * free / 2**30 / depth))  # rows of depth 8 take a third of a GiB uncompiled
    return depth, 2 ** int(math.log2(min(rows, affordable))), total


def wanted(trials: Sequence[Outcome], first: tuple[int, int, int]) -> tuple[int, int] | None:
    """(depth, rows) of the trial that the decision most needs, or None when it is made: first depths, until the ratio
    is bracketed; then more rows, while they fit and help."""
    if not trials:
        return first[:2]
    best, tried = best_depth(trials), {trial.depth for trial in trials}
    if best is None:  # smaller, until something runs
        smallest = min(trials, key=lambda t: (t.depth, t.rows))
        if smallest.rows > 1:
            return smallest.depth, smallest.rows // 2
        below = [depth for depth in LADDER if depth < smallest.depth]
        return (below[-1], 1) if below else None
    usable = {depth for depth in tried if fitting(at(trials, depth))}
    for depth in tried - usable:  # a neighbour that had too many rows is worth another try
        fewest = min(trial.rows for trial in at(trials, depth))
        if fewest > 1 and abs(LADDER.index(depth) - LADDER.index(best.depth)) == 1:
            return depth, fewest // 2
    if (step := _step(best, tried)) is not None:
        return step, min(best.rows, _rows_predicted(best, step)) if step > best.depth else best.rows
    return _more_rows(at(trials, best.depth))


def _step(best: Completed, tried: set[int]) -> int | None:
    """The depth to try beside the best: towards the wanted ratio, by leaps while that is far; None when both
    neighbours on the ladder are known, or can't be better."""
    here = LADDER.index(best.depth)
    aim = best.depth * (best.ratio / TOKENS_PER_PARAMETER) ** 0.2  # D / N falls with the fifth power of depth, or so
    if best.ratio > TOKENS_PER_PARAMETER:
        above = LADDER[here + 1 :]
        beyond = [d for d in above if d in tried]
        if beyond and beyond[0] == above[0]:
            return None
        choices = [d for d in above if (not beyond or d < beyond[0]) and _rows_predicted(best, d)]
    else:
        below = LADDER[:here]
        beyond = [d for d in below if d in tried]
        if beyond and beyond[-1] == below[-1]:
            return None
        choices = [d for d in below if not beyond or d > beyond[-1]]
    return min(choices, key=lambda d: abs(math.log(d / aim)), default=None)


BYTES_PER_PARAMETER = 20  # weights, gradients, the optimizer's state, and copies of them during a step


def _fixed(trial: Completed) -> float:
    """Bytes of a trial's peak that more rows do not add to."""
    return min(BYTES_PER_PARAMETER * trial.num_params, trial.peak_memory / 2)


def _rows_predicted(trial: Completed, depth: int) -> int:
    """Rows of a deeper model that should fit, a power of two or 0: what a row takes grows with depth and width, so with
    depth squared, and parameters with its third power."""
    growth, fixed = depth / trial.depth, _fixed(trial)
    row = (trial.peak_memory - fixed) / trial.rows * growth**2
    fits = (SHARE_OF_MEMORY * trial.free_memory - fixed * growth**3) / row
    return 2 ** int(math.log2(fits)) if fits >= 1 else 0


def _more_rows(trials: Sequence[Outcome]) -> tuple[int, int] | None:
    """Twice the most rows that fit, if they are not known to be too many, should fit and could be used, and the last
    doubling helped."""
    fit = fitting(trials)
    last, rows = fit[-1], 2 * fit[-1].rows
    helped = len(fit) == 1 or last.rate * ENOUGH_SPEED >= fit[-2].rate
    used = rows * MAX_SEQ_LEN <= total_batch(last.rate * TIME_BUDGET)
    fits = predicted_peak(fit, rows) <= SHARE_OF_MEMORY * last.free_memory
    new = rows not in [trial.rows for trial in trials]
    return (last.depth, rows) if helped and used and fits and new else None


def predicted_peak(trials: Sequence[Completed], rows: int) -> float:
    """Bytes, by the line through the last two trials of a depth; from one alone, with the fixed part as parameters."""
    last = trials[-1]
    if len(trials) == 1:
        return _fixed(last) + (last.peak_memory - _fixed(last)) * rows / last.rows
    before = trials[-2]
    slope = max(0, (last.peak_memory - before.peak_memory) / (last.rows - before.rows))
    return last.peak_memory + slope * (rows - last.rows)
