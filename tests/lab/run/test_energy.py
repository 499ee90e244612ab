"""Energy by counters that are files or fakes, as the systems have them."""

import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from lab.run import energy
from lab.run.energy import EnergyMeter


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    """Time that goes on as it is told to, and a system without any counter."""
    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(energy, "time", SimpleNamespace(monotonic=lambda: now.at))
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "HWMON", tmp_path / "hwmon")
    return now


def package(tmp_path, number=0, name="package-0", most=1_000_000_000):
    folder = tmp_path / "powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text("0\n")
    return folder / "energy_uj"


def readings(meter, clock, counter, values, seconds=1.0):
    """Sets a counter in microjoules again and again, and looks each time."""
    for value in values:
        clock.at += seconds
        counter.write_text(f"{value}\n")
        meter.look()


def test_packages_are_added_and_times_between_readings_interpolated(tmp_path, clock):
    first, second = package(tmp_path), package(tmp_path, 1, "package-1")
    package(tmp_path, 2, "psys")
    with EnergyMeter() as meter:
        for step in range(1, 5):
            clock.at += 1
            first.write_text(f"{30_000_000 * step}")
            second.write_text(f"{20_000_000 * step}")
            meter.look()
    assert meter.joules(100.5, 103.5) == pytest.approx(150.0)


def test_a_counter_that_wraps_goes_on(tmp_path, clock):
    counter = package(tmp_path, most=100_000_000)
    counter.write_text("90000000")
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [95_000_000, 3_000_000, 10_000_000])
    assert meter.joules(100.0, 103.0) == pytest.approx(20.0)


def test_a_counter_that_is_reset_tells_nothing(tmp_path, clock):
    counter = package(tmp_path, most=0)
    counter.write_text("90000000")
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [95_000_000, 3_000_000, 10_000_000])
    assert meter.broken and meter.joules(102.0, 103.0) is None


def test_a_counter_that_is_reset_near_its_end_has_not_wrapped(tmp_path, clock):
    counter = package(tmp_path, most=262_143_328_850)
    counter.write_text("250000000000")
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [250_100_000_000, 5_000_000, 105_000_000])
    assert meter.broken and meter.joules(100.0, 103.0) is None


def test_a_counter_that_leaps_tells_nothing(tmp_path, clock):
    counter = package(tmp_path)
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [10_000_000, 10**15])
    assert meter.joules(100.0, 101.0) is None


def test_a_counter_that_is_gone_tells_nothing(tmp_path, clock):
    counter = package(tmp_path)
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [10_000_000])
        counter.unlink()
        clock.at += 1
        meter.look()
    assert meter.joules(100.0, 101.0) is None


def test_where_there_is_no_meter_the_energy_is_unknown_and_not_zero(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for gpu in (None, "GPU-abc"):
        with EnergyMeter(gpu) as meter:
            clock.at += 10
            meter.look()
        assert meter.joules(100.0, 110.0) is None


def test_a_counter_that_stands_still_is_unknown_too(tmp_path, clock):
    counter = package(tmp_path)
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [0, 0, 0])
    assert meter.joules(100.0, 103.0) is None


def test_over_a_gap_without_readings_and_outside_of_them_nothing_is_told(tmp_path, clock):
    counter = package(tmp_path)
    with EnergyMeter() as meter:
        readings(meter, clock, counter, [10_000_000, 20_000_000])
        readings(meter, clock, counter, [400_000_000], seconds=60.0)
    assert meter.joules(100.5, 101.5) == pytest.approx(10.0)
    assert meter.joules(101.0, 130.0) is None and meter.joules(90.0, 101.0) is None
    assert meter.joules(None, 101.0) is None and meter.joules(101.0, None) is None


class Card:
    """A pynvml with one GPU."""

    def __init__(self, millijoules, works=True):
        self.millijoules, self.works = millijoules, works

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.works:
            raise RuntimeError("not supported")
        return self.millijoules


def on_a_gpu(monkeypatch, card):
    @contextmanager
    def nvml():
        yield card

    monkeypatch.setattr(energy.machine, "nvml", nvml)
    monkeypatch.setattr(energy.machine, "nvidia_handle", lambda library, name: name)


def test_a_gpus_own_counter_and_not_the_cpus(tmp_path, clock, monkeypatch):
    package(tmp_path)
    card = Card(5_000_000)
    on_a_gpu(monkeypatch, card)
    with EnergyMeter("GPU-abc") as meter:
        for _ in range(4):
            clock.at += 1
            card.millijoules += 350_000
            meter.look()
    assert meter.joules(100.0, 104.0) == pytest.approx(1400.0)


def test_a_card_without_a_counter_tells_nothing(tmp_path, clock, monkeypatch):
    package(tmp_path)
    on_a_gpu(monkeypatch, Card(0, works=False))
    with EnergyMeter("MIG-abc") as meter:
        clock.at += 1
    assert meter.joules(100.0, 101.0) is None and not meter.readings


def test_a_jetsons_board_power_is_integrated(tmp_path, clock, monkeypatch):
    on_a_gpu(monkeypatch, Card(0, works=False))
    rails = tmp_path / "hwmon" / "hwmon3"
    rails.mkdir(parents=True)
    for name, text in {
        "in1_label": "VDD_IN",
        "in1_input": "5000",
        "curr1_input": "2000",
        "in2_label": "VDD_CPU",
    }.items():
        (rails / name).write_text(text)
    with EnergyMeter("orin") as meter:
        clock.at += 1
        meter.look()
        (rails / "curr1_input").write_text("4000")
        clock.at += 1
        meter.look()
    assert meter.joules(100.0, 102.0) == pytest.approx(10.0 + 15.0)


def test_a_look_costs_little(tmp_path, monkeypatch):
    package(tmp_path)
    with EnergyMeter() as meter:
        begun = time.perf_counter()
        for _ in range(100):
            meter.look()
    assert (time.perf_counter() - begun) / 100 < 0.01
