"""What a device can do, found by trying: the same trials, and the same choices from them, on every framework.

A backend provides the work (`Bench`); here it is timed and, where that is left open, chosen from. Calibration makes the
same trials with more repeats and writes them down; without a calibration a backend makes them when it is first loaded.
"""

from __future__ import annotations

import abc
import math
import statistics
import time
from collections.abc import Callable

from backends.interface import BackendError

Work = Callable[[int], None]  # makes so many calls and returns once the device has done them

# In order of preference: one that comes later has to be clearly faster, because it keeps fewer digits or, float16, a
# smaller range. The number is the relative error of a product that rounding explains.
PRECISIONS = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
# The same for attention, |out - reference| / |reference|, forward and backward.
ATTENTION_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
CLEARLY = 1.1
CLOSE = 1.05  # so much longer is no difference: other programs that wait for the same device or host come and go
ATTENTION_SHAPE = 2048, 4, 128  # T, H, D of one row
KINDS = {"full": None, "window": 0.5}  # of attention: the window as a share of the row
ROWS, LAYERS = 8, 8  # of the model for which attention's memory is reckoned
# A shorter call is mostly the host's work, which tells nothing of the kernel; more rows make it longer.
SHORTEST, MOST_ROWS, MOST_CALLS = 0.004, 128, 1000


class Bench(abc.ABC):
    """Work to measure a device with. Each method raises, whatever its framework does, where the device can't do it.

    Attributes:
        size: n of the products that tell precisions apart: long enough on this kind of device to see through another
            program's turns on it.
        attentions: names of the implementations.
        attention_provider: where one that is no part of the framework comes from; None without one.
        memory: bytes of the device.
    """

    size: int
    attentions: tuple[str, ...]
    attention_provider: str | None = None
    memory: int
    attention_shape: tuple[int, int, int] = ATTENTION_SHAPE

    @abc.abstractmethod
    def product_error(self, precision: str) -> float:
        """Relative error of a product against float32 or better on the host."""

    @abc.abstractmethod
    def product(self, precision: str, m: int, k: int, n: int) -> Work:
        """(m, k) by (k, n)."""

    @abc.abstractmethod
    def mlp(self, precision: str, n: int) -> Work:
        """Two (n, n) products with a squared ReLU and an RMS norm between them: moves activations, as a model does."""

    @abc.abstractmethod
    def copy(self, size: int) -> Work:
        """Reads `size` bytes and writes as many."""

    @abc.abstractmethod
    def attention_error(self, name: str, window: int | None) -> float:
        """The error of one row in the compute precision: the worst of the output and three gradients."""

    @abc.abstractmethod
    def attention(self, name: str, window: int | None, rows: int, backward: bool) -> Work:
        """One layer's attention, with its gradients where `backward`, over random rows of `attention_shape`."""

    def attention_bytes(self, name: str, window: int | None) -> int | None:
        """What one row takes at the peak of LAYERS layers, where implementations differ in it."""
        return None

    @abc.abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool: ...

    def forget(self) -> None:
        """Gives back what the trials took."""


def seconds(
    work: Work,
    repeats: int = 7,
    at_least: float = SHORTEST,
    enough: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of one call, once for each repeat, after a first one that may compile.

    Args:
        at_least: a repeat makes as many calls as take about this long.
        enough: no further repeat begins after so many seconds in all; there are at least two, but for a call that alone
            takes longer.
        clock: must not run backwards: a repeat that took no time or less is left out.

    Raises:
        RuntimeError: the clock stands still.
    """
    work(1)
    times, calls = [], 1
    begin = clock()
    for _ in range(repeats + 8):
        start = clock()
        work(calls)
        took = (clock() - start) / calls
        if not 0 < took < math.inf:
            continue  # the clock jumped
        if not times and took * calls < at_least and calls < MOST_CALLS:
            calls = min(MOST_CALLS, max(2 * calls, math.ceil(at_least / took)))
            continue  # too short to be believed
        times.append(took)
        spent = sum(times) * calls
        if len(times) >= repeats or spent > enough and (len(times) > 1 or took > enough / 2):
            break
    if not times:
        raise RuntimeError(
            f"this machine's clock can't be used for timing: {clock() - begin:g} s for {repeats + 8} repeats"
        )
    return times


# --- Precision -------------------------------------------------------------------------------------------------------


def try_precisions(bench: Bench, repeats: int = 7) -> dict[str, dict[str, float] | str]:
    """By precision: FLOP/s of square products and of an MLP (`bench.size`), the best of some repeats, because what else
    the machine does only makes them longer; or why it can't be used."""
    n, results = bench.size, {}
    for name, tolerance in PRECISIONS.items():
        try:
            error = bench.product_error(name)
            if not error <= tolerance:  # so written that NaN is refused
                results[name] = f"wrong: relative error {error:.1e}"
                continue
            results[name] = {
                kind: 2 * products * n**3 / min(seconds(work, repeats))
                for kind, products, work in (
                    ("product", 1, bench.product(name, n, n, n)),
                    ("mlp", 2, bench.mlp(name, n)),
                )
            }
        except Exception as error:  # whatever a driver raises, this precision is not for this device
            results[name] = reason(bench, error)
    return results


def products(tried: dict[str, dict[str, float] | str]) -> dict[str, float | str]:
    """The rates of products alone."""
    return {name: found if isinstance(found, str) else found["product"] for name, found in tried.items()}


def choose_precision(tried: dict[str, dict[str, float] | str]) -> str:
    """The fastest, by its MLP (half precision pays there even where its products are no faster); see PRECISIONS."""
    best, fastest = None, 0.0
    for name in PRECISIONS:
        found = tried.get(name, "not tried")
        if not isinstance(found, str) and (best is None or found["mlp"] > CLEARLY * fastest):
            best, fastest = name, found["mlp"]
    if best is None:
        raise BackendError(f"no precision gives correct matrix products on this device: {tried}")
    return best


# --- Attention -------------------------------------------------------------------------------------------------------


def try_attention(
    bench: Bench, precision: str, repeats: int = 5, forward: bool = False, rows: int | None = None
) -> dict:
    """Every implementation, forward and backward, for a full and a half window.

    Each is compared with the reference on one row, and timed on as many as the device takes a few milliseconds for.

    Args:
        forward: time that alone, too.
        rows: of the timing, to compare with an earlier one.

    Returns:
        By kind of window (KINDS), by name: {"both": seconds of each repeat, forward and backward, "rows": how many at
        once, "bytes": `attention_bytes`, and with `forward` also that: seconds}, or why it can't be used.
    """
    length, heads, _ = bench.attention_shape
    # T x T scores in float32 may take an eighth of the memory.
    most = max(1, min(MOST_ROWS, bench.memory // 8 // (heads * length**2 * 4)))
    most = 0 if rows else most
    rows, results = rows or 1, {kind: {} for kind in KINDS}
    for kind, share in KINDS.items():
        window = share and int(share * length)
        for name in bench.attentions:
            try:
                if problem := wrong_attention(bench, name, window, precision):
                    results[kind][name] = problem
                    continue
                while (
                    kind == "full"
                    and 2 * rows <= most
                    and min(seconds(bench.attention(name, window, rows, True), 2, at_least=0)) < SHORTEST
                ):
                    rows *= 2  # as many as the fastest needs
                results[kind][name] = {"bytes": bench.attention_bytes(name, window)}
            except Exception as error:  # a candidate may fail in any way its kernel can; it is then no candidate
                results[kind][name] = reason(bench, error)
    for kind, share in KINDS.items():
        window = share and int(share * length)
        for name, found in results[kind].items():
            if isinstance(found, str):
                continue
            try:
                for part in ("forward", "both") if forward else ("both",):
                    work = bench.attention(name, window, rows, part == "both")
                    found |= {part: seconds(work, repeats, at_least=0, enough=0.3), "rows": rows}
            except Exception as error:
                results[kind][name] = reason(bench, error)
    return results


def wrong_attention(bench: Bench, name: str, window: int | None, precision: str) -> str | None:
    """How an implementation differs from the reference by more than rounding, or None."""
    return beyond(bench.attention_error(name, window), ATTENTION_TOLERANCE[precision])


def beyond(error: float, tolerance: float) -> str | None:
    """A sentence about an error that rounding does not explain, NaN included; None for any other."""
    return None if error < tolerance else f"wrong: relative error {error:.1e}"


def choose_attention(tried: dict, memory: int, compiled: bool = True) -> dict[str, str]:
    """By kind of window the fastest by its best repeat, because what else the machine does only makes them longer; of
    those that are close to it the first. One that keeps more for the backward pass has to be clearly faster, and memory
    not short: ROWS rows and LAYERS layers of it may take an eighth. Without a compiler, `flex` is left out."""
    chosen = {}
    for kind, by_name in tried.items():
        right = {
            name: found
            for name, found in by_name.items()
            if not isinstance(found, str) and (compiled or name != "flex")
        }
        if not right:
            raise BackendError(f"no attention implementation is correct on this device: {by_name}")
        needs = {name: found.get("bytes") or 0 for name, found in right.items()}
        least = min(needs.values())
        lean = {
            name: min(found["both"]) * (CLEARLY if needs[name] > least else 1)
            for name, found in right.items()
            if needs[name] <= least or ROWS * needs[name] <= memory / 8
        }
        chosen[kind] = next(name for name, took in lean.items() if took <= CLOSE * min(lean.values()))
    return chosen


def reason(bench: Bench, error: Exception) -> str:
    """Why something can't be used: the first line of what was raised."""
    if bench.is_out_of_memory(error):
        return "out of memory"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message, for a note or a log."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def lasts(*trials: dict) -> bool:
    """Whether trials of one kind or more found what will hold: not that something else had filled the memory, nor that
    nothing of a kind works at all, as where a driver has failed."""
    works = (any(not isinstance(found, str) for found in tried.values()) for tried in trials)
    return "'out of memory'" not in str(trials) and all(works)


def product_rates(bench: Bench, precision: str, n: int, repeats: int = 9) -> list[float]:
    """FLOP/s of (n, n) products, once for each repeat."""
    return [2 * n**3 / took for took in seconds(bench.product(precision, n, n, n), repeats)]


def speed(bench: Bench, calibrated) -> float | None:
    """How fast products are now, relative to when the device was calibrated: less when it is throttled or busy. None
    where they can't be tried, as in a memory that is nearly full: the run goes on all the same."""
    try:
        rates = product_rates(bench, calibrated.precision, calibrated.square)
    except Exception:
        return None
    return statistics.median(rates) / calibrated.product_rate


def rate(flops: float | str) -> str:
    """FLOP/s for people to read, or why there are none."""
    return flops if isinstance(flops, str) else f"{flops / 1e12:.3g} TFLOP/s"
