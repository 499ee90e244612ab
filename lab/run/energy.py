"""Energy of a run, measured outside of it: the counters that a device has, read while it lasts.

An NVIDIA GPU counts its own millijoules (NVML, since Volta); Linux counts those of the CPU's packages, DRAM left out,
where the user may read them (RAPL, /sys/class/powercap; mostly root alone); a Jetson tells its board's power (INA3221).
On a Mac nothing is read: powermetrics takes root, and IOReport is no public interface. A run on a GPU is told the GPU's
energy, any other the packages'. It is that of all that the device did meanwhile, idle power and other programs too.
What can't be read is unknown, never zero.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from backends import machine

POWERCAP, HWMON = Path("/sys/class/powercap"), Path("/sys/class/hwmon")
GAP = 5.0  # seconds without a reading, over which nothing is told
MOST = 3000.0  # watts of a GPU or a CPU's package: more is no reading, and a counter that seems to wrap was reset
UPDATE = 0.2  # seconds, within which a counter tells what it counted
Read = Callable[[], float]  # joules, or watts


class EnergyMeter:
    """Reads a counter again and again. To be used as a context.

    Args:
        gpu: name of the NVIDIA GPU that a run is on; None if it is on another device.

    Attributes:
        readings: (time by time.monotonic, joules since the first one).
        broken: a counter went backwards, or was not there any more: what was read before and after is not compared.
    """

    def __init__(self, gpu: str | None = None):
        self.gpu, self.readings, self.broken = gpu, [], False
        self._last: list[float] = []
        self._counters: list[tuple[Read, float]] = []  # with where each begins again at zero; 0 if it never does
        self._powers: list[Read] = []
        self._stack = ExitStack()

    def __enter__(self) -> EnergyMeter:
        with suppress(Exception):  # a meter is no reason to fail
            self._find()
            self.look()
        return self

    def __exit__(self, *_) -> None:
        self.look()
        self._stack.close()

    def _find(self) -> None:
        if self.gpu is not None:
            library = self._stack.enter_context(machine.nvml())
            handle = machine.nvidia_handle(library, self.gpu) if library else None
            if library and handle is not None:
                with suppress(Exception):  # a card, or a slice of one, without a counter
                    library.nvmlDeviceGetTotalEnergyConsumption(handle)
                    self._counters = [(lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)]
        else:
            packages = map(_package, sorted(POWERCAP.glob("intel-rapl:*")))
            self._counters = [counter for counter in packages if counter is not None]
        if not self._counters:
            self._powers = _rails()

    def look(self) -> None:
        if self.broken or not (self._counters or self._powers):
            return
        now = time.monotonic()
        try:
            values = [read() for read, _ in self._counters] or [sum(read() for read in self._powers)]
        except Exception:  # NVML raises by card, driver and permission; a file may be gone
            self.broken = True
            return
        if not self.readings:
            self.readings = [(now, 0.0)]
        else:
            before, joules = self.readings[-1]
            if self._counters:
                steps = [value - last for value, last in zip(values, self._last)]
                steps = [step + wraps if step < 0 else step for step, (_, wraps) in zip(steps, self._counters)]
            else:
                steps = [(now - before) * (values[0] + self._last[0]) / 2]
            if min(steps) < 0 or max(steps) > MOST * (now - before + UPDATE):
                self.broken = True
                return
            self.readings.append((now, joules + sum(steps)))
        self._last = values

    def joules(self, begun: float | None, ended: float | None) -> float | None:
        """Joules between two times by time.monotonic; None if that was not measured."""
        if self.broken or begun is None or ended is None or ended <= begun:
            return None
        before, after = self._at(begun), self._at(ended)
        return after - before if before is not None and after is not None and after > before else None

    def _at(self, moment: float) -> float | None:
        """The joules until then, by linear interpolation."""
        for (before, low), (after, high) in zip(self.readings, self.readings[1:]):
            if before <= moment <= after:
                return None if after - before > GAP else low + (high - low) * (moment - before) / (after - before)
        return None


def _package(folder: Path) -> tuple[Read, float] | None:
    """The counter of a CPU's package; None for a part of one, which its package counts, and what can't be read."""
    name = machine.told(folder / "name") or ""
    if not re.fullmatch(r"intel-rapl:\d+", folder.name) or not name.startswith("package"):
        return None
    counter, most = folder / "energy_uj", machine.told(folder / "max_energy_range_uj")
    if machine.told(counter) is None:
        return None
    return (lambda: int(counter.read_text()) / 1e6), (int(most) / 1e6 if most else 0.0)


def _rails() -> list[Read]:
    """The power of a Jetson's board, in watts: the one rail that all others hang on."""
    for label in HWMON.glob("hwmon*/in*_label"):
        if machine.told(label) in ("VDD_IN", "POM_5V_IN", "SYS5V"):
            volts, number = label.with_name(label.name.replace("label", "input")), label.name[2:-6]
            amperes = label.with_name(f"curr{number}_input")
            if machine.told(volts) and machine.told(amperes):
                return [lambda: int(volts.read_text()) * int(amperes.read_text()) / 1e6]  # mV and mA
    return []
