"""Training time in seconds of the undisturbed device: what else a machine does makes a run longer, not worse.

A `Witness` watches the device beside the run, and a `Meter` charges each window of training less than it took by the
wall where two witnesses agree that something else slowed it:

1. **The device.** On a CPU the system tells how much processor time the run got, and how long its threads were ready to
   run and did not; on a GPU small products of fixed size are timed between steps. Work that a file does for its own
   reasons leaves both as they are. Probes made after a window tell of it, too: its charge may be corrected later.
   Where a GPU tells its clock rate and no other program is seen, a probe counts as if made at the usual rate: a lower
   one may be the file's own heat.
2. **The steps.** Steps with the same calls and shapes cost what they cost in earlier runs of the same file, or by this
   run's own word: on a CPU in its quietest quarter, on a GPU, of which a probe sees moments, on average. Only what
   earlier runs told shows a lower clock rate to be none of the file's doing.

A window is charged its time over the smaller of the two slowdowns. A slowdown that only one of them sees is charged in
full; so are steps of which nothing is known yet, and those that only make up for others that took less than they cost
on average. No run takes more than MOST times as long. A second or more in which nothing of it ran at all (a closed lid,
a paused virtual machine) is a pause, and no training time.

A file with threads of its own could keep a GPU busy while it is probed, at its own cost: it is charged in full. What
this can't tell is work that a file's compiled code gives a GPU all the time, without a thread of Python's. On Linux
processor time of the run's own threads never counts as somebody else's.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

WINDOW = 0.5, 2.0  # seconds of training, at least and at most, that are charged together
WINDOWS = 150  # of a run that is long enough
KNOWN = 3  # windows with steps of a kind, after which their cost is known
SLACK = 1.5  # of what the device was slowed by, as far as its witness is wrong
SAMPLED_SLACK = 2.0  # the same where it sees moments
MOST = 2.1  # times as long as undisturbed: two programs that share a GPU in turns take 2.05 times as long each
BAND = 0.05  # of the probe, that is chance
WORD = 0.05, 0.5  # how far a run's word on its steps may be off, in factors of e: undisturbed; and of its correction
PROBES = 20  # around a window, that are looked at together
TRIES = 3  # of the work that is a probe, on a CPU
PROBE = 1e-3  # seconds that a product on a GPU takes, about
PRODUCTS = 2  # of a probe: as long as some turns, where programs take turns. A shorter one sees less than is lost
ASLEEP = 0.5  # of the usual clock rate: a GPU that had nothing to do, and woke up for the probe
PULSE, PAUSE = 0.05, 1.0  # seconds between the pulse's beats; without one, it is a pause
REFERENCE = json.loads(os.environ.get("AUTORESEARCH_REFERENCE") or "{}")  # read before train.py could change it
TASKS = Path("/proc/self/task")


def window(budget: float) -> float:
    """Seconds of training, at least, that are charged together in a run of `budget` seconds. At the end of each the
    device is waited for and idle until it has the next step, so a long run has longer ones."""
    return min(max(budget / WINDOWS, WINDOW[0]), WINDOW[1])


def reference(
    baseline: Sequence[Mapping], own: Iterable[Mapping], calibrated: Mapping[str, float] | None = None
) -> dict:
    """What the clock of a run compares with, for AUTORESEARCH_REFERENCE: medians, as how disturbed a single run was may
    have been misjudged either way. But a probe takes a GPU as many cycles as ever, and another program only adds to
    them: where fewer are known they count, lest a baseline that was disturbed all the time passes for undisturbed.

    Args:
        baseline: results of the session's baseline, which tell of the device. own: of the same train.py, which tell of
            its steps. calibrated: "probe" and "clock_rate", as below, by the device's calibration.
    """
    costs = _costs(own)
    found: dict = {"steps": costs} if costs else {}
    for name, measure in (("probe", "probe_seconds"), ("clock_rate", "clock_rate")):
        if told := [result[measure] for result in baseline if result.get(measure)]:
            found[name] = statistics.median(told)
    if calibrated and "probe" not in found:
        return found | {name: calibrated[name] for name in ("probe", "clock_rate")}
    if "probe" in found and (rate := found.get("clock_rate")):
        told = [(result.get("probe_seconds"), result.get("clock_rate")) for result in baseline]
        told += [(calibrated["probe"], calibrated["clock_rate"])] if calibrated else []
        least = min((probe * its_rate / rate for probe, its_rate in told if probe and its_rate), default=math.inf)
        if least < (1 - BAND) * found["probe"]:
            found["probe"] = least
    return found


def _costs(runs: Iterable[Mapping]) -> dict[str, float]:
    """Seconds that steps of each kind take undisturbed: the weighted median of what runs of one train.py told. The more
    a run corrected what its steps took, the less its word counts, as WORD says. Of one with several kinds of steps it
    is what the run was charged that tells how much."""
    told: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        costs = run.get("step_seconds") or {}
        steps, trained = run.get("num_steps") or 0, run.get("training_seconds") or 0.0
        slower = 1 + max(0.0, run.get("disturbance") or 0.0)
        if len(costs) == 1 and min(steps, trained) > 0:  # by its own word, which may not be what it was charged by
            slower *= trained / (steps * sum(costs.values()))
        weight = 1 / (WORD[0] ** 2 + (WORD[1] * math.log(slower)) ** 2)
        for kind, cost in costs.items():
            told.setdefault(kind, []).append((cost, weight))
    found = {}
    for kind, words in told.items():
        seconds, weights = np.array(sorted(words)).T
        found[kind] = float(np.interp(weights.sum() / 2, np.cumsum(weights) - weights / 2, seconds))
    return found


class Slowdown(NamedTuple):
    """How many times as long as undisturbed a device took: in a window, at most; on average, in the windows around it.
    sampled: a probe saw moments of it, and nothing measured the rest. heat: how many times as long as that it took
    because its clock rate was low, whoever heated it."""

    most: float
    mean: float
    sampled: bool = False
    heat: float = 1.0


Steps = dict[str, tuple[int, float]]  # of a window: how many of each kind, and their seconds


class Meter:
    """Adds up training time.

    Args:
        steps: seconds that a step of each kind takes undisturbed, as earlier runs of the same file told.

    Attributes:
        seconds: by the wall, without pauses. slowdown: of the last window.
    """

    def __init__(self, steps: Mapping[str, float] | None = None):
        self.given = dict(steps or {})
        self.seconds, self.slowdown, self._charged, self._elapsed = 0.0, 1.0, 0.0, 0.0
        self._open: Steps = {}
        self._closed: list[tuple[Slowdown, Steps]] = []

    def add(self, kind: str, seconds: float, witnessed: Sequence[Slowdown] | None = None) -> None:
        """A step. Where it ends a window: how many times as long as undisturbed the device took in each so far."""
        self.seconds += seconds
        number, before = self._open.get(kind, (0, 0.0))
        self._open[kind] = number + 1, before + seconds
        if witnessed is not None:
            windows = [steps for _, steps in self._closed] + [self._open]
            # Of as many as this knows: if train.py has begun it anew, it is the guard's that finds out.
            self._closed, self._open = list(zip(witnessed[-len(windows) :], windows)), {}
            costs = self.costs | self.given
            charges = [self._charge(*window, costs) for window in self._closed]
            # A file whose steps take longer in one part of the run, and less in another, slows itself down there.
            took, cost = sum(map(_seconds, windows)), sum(_cost(steps, costs) for steps in windows)
            self._charged = max(sum(charges), min(took, cost))
            self.slowdown = _seconds(windows[-1]) / max(charges[-1], 1e-9)

    def paused(self, kind: str, seconds: float, paused: float) -> float:
        """What a step counts that took so many seconds besides a pause, on a GPU, which goes on with what it was given:
        at least what its kind costs. Of a kind like no other of this run it is not known how much that was."""
        costs = self.costs | self.given
        return max(seconds, costs[kind]) if kind in costs else seconds + (paused if costs else 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds of the undisturbed device. It never goes back, when more is known of the steps before."""
        self._elapsed = max(self._elapsed, self._undisturbed, self.seconds / MOST)
        return self._elapsed

    @property
    def _undisturbed(self) -> float:
        return self._charged + _seconds(self._open) / self.slowdown

    @property
    def disturbance(self) -> float:
        """How much longer all of it took than undisturbed, as a share; beyond MOST - 1 training was lost."""
        return max(0.0, self.seconds / self._undisturbed - 1) if self.seconds else 0.0

    @property
    def costs(self) -> dict[str, float]:
        """Seconds that a step takes undisturbed, by kind, as this run tells: of those that it knows."""
        found: dict[str, list[tuple[Slowdown, int, float]]] = {}
        for slowdown, steps in self._closed:
            for kind, (number, seconds) in steps.items():
                found.setdefault(kind, []).append((slowdown, number, seconds))
        costs = {}
        for kind, windows in found.items():
            if len(windows) >= KNOWN:
                if not windows[0][0].sampled:
                    windows = sorted(windows, key=lambda window: window[0])[: max(KNOWN, len(windows) // 4)]
                total = sum(seconds / slowdown.mean for slowdown, _, seconds in windows)
                costs[kind] = total / sum(number for _, number, _ in windows)
        return costs

    def _charge(self, witnessed: Slowdown, steps: Steps, costs: Mapping[str, float]) -> float:
        seconds = _seconds(steps)
        slower = seconds / _cost(steps, costs)
        most = witnessed.most * (witnessed.heat if steps.keys() <= self.given.keys() else 1.0)
        slack = SAMPLED_SLACK if witnessed.sampled else SLACK
        limits = sorted((1.0, 1 + slack * (most - 1)))  # a device may be faster than it was, too
        return seconds / min(max(slower, limits[0]), limits[1])


def _seconds(steps: Steps) -> float:
    return sum(seconds for _, seconds in steps.values())


def _cost(steps: Steps, costs: Mapping[str, float]) -> float:
    """Seconds that these steps take undisturbed; those that they took where that is not known of all kinds."""
    if not steps.keys() <= costs.keys():
        return _seconds(steps)
    return sum(number * costs[kind] for kind, (number, _) in steps.items())


class Witness:
    """Watches what else the device does, from `start` to `stop`.

    Args:
        backend: whose device it is. probe, clock_rate: seconds that a probe takes undisturbed, and the rate in Hz that
            goes with it, as earlier runs told.

    Attributes:
        probes: seconds of each, one before the first window and one after each; None if it failed.
        clock_rates: at each, of a GPU that tells it.
        paused: seconds in which nothing of this process ran.
    """

    def __init__(self, backend, probe: float | None = None, clock_rate: float | None = None):
        self.is_cpu = backend.device.kind == "cpu"
        self.given, self.given_clock_rate, self.paused = probe, clock_rate, 0.0
        self.probes: list[float | None] = []
        self.clock_rates: list[float | None] = []
        self._synchronize, self._clock_rate, self._work = backend.synchronize, backend.clock_rate, None
        if not self.is_cpu:
            with suppress(Exception):  # as there is no memory left for it: then nothing is witnessed
                self._work = _device_work(backend)
        self._before = np.full(4, np.nan)
        from backends import machine  # here, as prepare.py is imported without a backend, too

        self._cores = machine.cores()
        self._waited: list[float] = []  # slowdown of each window by other programs on the same processors
        self._own_threads = False  # whether the file ever had some beside a probe of a GPU
        self._beating, self._ended = threading.Lock(), threading.Event()
        self._beat: float | None = None  # when it was last known to run
        self._used = 0.0  # processor time that it had had by then

    def start(self) -> None:
        """Begins to measure."""
        self._beat, self._used = time.perf_counter(), time.process_time()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        self._probe()

    def now(self) -> float:
        """Seconds on a clock that stands still in a pause: a gap between two beats without processor time. Work that
        holds Python's lock leaves some. Before `start` there are no pauses."""
        with self._beating:
            now, used = time.perf_counter(), time.process_time()
            if self._beat is not None:
                gap = now - self._beat - PULSE
                if gap > PAUSE and used - self._used < 0.1 * gap:
                    self.paused += gap
                self._beat, self._used = now, used
            return now - self.paused

    def read(self) -> list[Slowdown]:
        """Ends a window: what the device was slowed by in each since `start`. Takes a probe; what that takes is no
        training time."""
        self._waited.append(self._scheduled(self._counters() - self._before) if self.is_cpu else 1.0)
        self._probe()
        if self._own_threads:
            return [Slowdown(1.0, 1.0, True)] * len(self._waited)
        usual, rate, told = self.given or self.usual_probe, self.given_clock_rate or self.usual_clock_rate, []
        heats = [_by_clock_rate(probe, now, usual, rate) for probe, now in zip(self.probes, self.clock_rates)]
        probes = [probe and probe / heat for probe, heat in zip(self.probes, heats)]
        for window, waited in enumerate(self._waited):
            mean = most = waited * _slower(_around(probes, window), usual)
            heat, ends = statistics.fmean(heats[window : window + 2]), probes[window : window + 2]
            if not self.is_cpu:  # those at its two ends, too: they scatter little
                most = max(mean, _slower(ends, usual, statistics.fmean))
            if mean > 1:  # another program, whose heat it may be
                most, mean, heat = most * heat, mean * heat, 1.0
            told.append(Slowdown(most, mean, not self.is_cpu, heat))
        return told

    @property
    def usual_probe(self) -> float | None:
        """Seconds of a probe in the quietest quarter of this run, at the usual clock rate of a GPU that tells it."""
        usual, probes = self.usual_clock_rate, []
        least = min(filter(None, self.probes), default=0.0)  # a low rate that made none longer is not believed
        for probe, rate in zip(self.probes, self.clock_rates):
            faster = rate / usual if rate and usual and rate > ASLEEP * usual else 1.0
            probes += [max(probe * faster, least)] if probe else []
        probes.sort()
        return statistics.fmean(probes[: max(1, len(probes) // 4)]) if probes else None

    @property
    def usual_clock_rate(self) -> float | None:
        """Hz of a GPU, the median of this run; None where nothing tells."""
        rates = [rate for rate in self.clock_rates if rate]
        return statistics.median(rates) if rates else None

    def _probe(self) -> None:
        probe = None
        with suppress(Exception):  # a device that fails here will fail in a step, and be told of there
            probe = self._cpu_probe() if self.is_cpu else self._device_probe()
        self.probes.append(probe)
        self.clock_rates.append(self._clock_rate())
        self._before = self._counters()

    def stop(self) -> None:
        """Ends the pulse."""
        self._ended.set()

    def _pulse(self) -> None:
        while not self._ended.wait(PULSE):
            self.now()

    # --- A CPU: processor time that the run's threads did not get ---

    def _scheduled(self, since: np.ndarray) -> float:
        """Slowdown by other programs on the same processors.

        It is what the cores could have done for the run, over what they did: a run that keeps them busy itself is not
        disturbed, whatever its threads wait for. Nor is one that leaves them idle by itself: the slowdown is at most
        what its threads were queued for, each of which may have held up all others that were to run. Without the queues
        (only Linux tells them) other programs' processor time is the bound.
        """
        wall, own, queued, other = since
        if not (wall > 0 and own > 0):
            return 1.0
        by_cores = self._cores * wall / own
        if math.isnan(queued):
            bound = 1 / max(1 - other / (self._cores * wall), 0.05)
        else:
            threads = (own + queued) / wall  # that were to run: at work or queued, on average
            bound = 1 + max(1.0, threads) * queued / own
        return max(1.0, min(by_cores, bound))

    def _counters(self) -> np.ndarray:
        """Seconds: of the wall; of processors in this process and below; that its threads were queued, nan where the
        system does not tell; of processors in all others."""
        now = time.perf_counter()
        if not self.is_cpu:
            return np.array([now, 0.0, 0.0, 0.0])
        own, queued = time.process_time() + _of_children(TASKS), _queued()
        return np.array([now, own, queued, others() if math.isnan(queued) else 0.0])

    @staticmethod
    def _cpu_probe() -> float:
        """Processor seconds of fixed work: more where heat or a neighbour on the same core slows the clock. Waiting for
        a processor is no part of it. A virtual machine counts what its host takes away meanwhile, milliseconds at a
        time, as time at work: so the least of some is told, as such a stop meets one of them."""
        took = []
        for _ in range(TRIES):
            begun = time.thread_time()
            for _ in range(8):
                np.tanh(FIXED)
            took.append(time.thread_time() - begun)
        return min(took)

    # --- A GPU ---

    def _device_probe(self) -> float:
        self._own_threads |= _has_own_threads()
        self._synchronize()
        begun = time.perf_counter()
        assert self._work
        self._work(PRODUCTS)
        took = time.perf_counter() - begun
        self._own_threads |= _has_own_threads()
        return took


FIXED = np.linspace(-1, 1, 2**14, dtype=np.float32)  # stays in a core's own cache


def product_size(peak_flops: float | None) -> int:
    """Of the matrices of a probe: a power of two, so that devices of one kind have the same."""
    return 2 ** min(max(round(math.log2((PROBE * (peak_flops or 1e13) / 2) ** (1 / 3))), 8), 13)


def _device_work(backend):
    """A product of the same size in each run on a device, however busy it is now."""
    size = product_size(backend.device.peak_flops)
    work = backend.bench.product(backend.device.precision, size, size, size)
    work(2)
    return work


def _around(probes: Sequence[float | None], window: int) -> Sequence[float | None]:
    first = max(0, min(window + 1 - PROBES // 2, len(probes) - PROBES))
    return probes[first : first + PROBES]


def _at_mean_speed(probes: Sequence[float]) -> float:
    return 1 / statistics.fmean(1 / probe for probe in probes)


def _slower(probes: Sequence[float | None], usual: float | None, mean: Callable = _at_mean_speed) -> float:
    """What probes say together, as times of one undisturbed. Those that failed say nothing; of more than two the
    longest counts as the next one: it may have met a stop of the host."""
    told = sorted(probe for probe in probes if probe)
    if len(told) > 2:
        told[-1] = told[-2]
    slower = mean(told) / usual if told and usual else 1.0
    return 1.0 if abs(slower - 1) < BAND else slower


def _by_clock_rate(probe: float | None, now: float | None, usual: float | None, usual_rate: float | None) -> float:
    """How many times as long as usual a probe took by a lower clock rate: never more than it did take."""
    if not (probe and now and usual and usual_rate):
        return 1.0
    return max(1.0, min(usual_rate / now, probe / usual))


def _has_own_threads() -> bool:
    """Whether a thread of Python's, other than the one that asks, is in code of train.py: of no imported module."""
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != threading.get_ident():
            name = frame.f_globals.get("__name__")
            module = sys.modules.get(name) if isinstance(name, str) else None
            if name == "__main__" or getattr(module, "__dict__", None) is not frame.f_globals:
                return True
            frame = frame.f_back
    return False


def others() -> float:
    """Seconds of processors in other programs than this one and those it waited for, since the machine was started."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    for inside in ("guest", "guest_nice"):  # are parts of the user's
        busy -= getattr(times, inside, 0.0)
    return busy - sum(os.times()[:4])


def _queued() -> float:
    """Seconds that threads of this process, those that still are, were ready to run and did not; nan where the system
    does not tell: it has no such file, or tells of this thread that it never ran."""
    try:
        ran = (TASKS / str(threading.get_native_id()) / "schedstat").read_text().split()[0]
        return sum(map(_waited, os.listdir(TASKS))) if int(ran) else math.nan
    except OSError:
        return math.nan


def _of_children(tasks: Path) -> float:
    """Seconds of processors in processes below one, those that still are, where Linux lists them."""
    total = 0.0
    with suppress(OSError):
        for task in os.listdir(tasks):
            for pid in (tasks / task / "children").read_text().split():
                with suppress(psutil.Error):
                    times = psutil.Process(int(pid)).cpu_times()
                    total += times.user + times.system + _of_children(Path("/proc") / pid / "task")
    return total


def _waited(task: str) -> float:
    try:
        return int((TASKS / task / "schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0
