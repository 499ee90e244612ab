"""Training time in seconds of the undisturbed device: what is charged, and what two witnesses have to agree on."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import disturbance
from backends import machine
from lab.run import processes
from disturbance import KNOWN, MOST, SLACK, Meter, Slowdown, Witness


def metered(windows, steps=None) -> Meter:
    """After windows of one step each: (seconds, slowdown of the device, kind)."""
    return more(Meter(steps), *windows)


def more(meter, *windows) -> Meter:
    for seconds, slowdown, *kind in windows:
        told = [slowdown for slowdown, _ in meter._closed]
        meter.add(kind[0] if kind else "a", seconds, [*told, Slowdown(slowdown, slowdown)])
    return meter


QUIET = [(1.0, 1.0)] * 5


# --- The meter ---


def test_quiet_time_is_the_walls():
    meter = metered([(1.0, 1.0), (1.3, 1.0), (0.8, 1.0)] * 3)
    assert meter.elapsed == meter.seconds == pytest.approx(9.3) and meter.slowdown == 1


def test_what_both_witnesses_see_is_taken_off():
    meter = metered([*QUIET, (1.5, 1.5), (1.8, 1.8)])
    assert meter.elapsed == pytest.approx(7) and meter.disturbance == pytest.approx(1.3 / 7)


def test_disturbed_all_the_time_the_devices_word_alone_counts():
    assert metered([(1.5, 1.5)] * 10).elapsed == pytest.approx(10)


@pytest.mark.parametrize("seconds, slowdown, charged", [
    (1.5, 1.0, 1.5),  # its own doing: the device is as it was
    (1.0, 1.9, 1.0),  # its probe was loaded, its steps were not slower
    (3.0, 1.2, 3.0 / (1 + SLACK * 0.2)), (0.5, 1.0, 0.5), (1.2, 1.5, 1.0),
], ids=["slow steps", "slow device", "very slow steps", "faster steps", "rough word"])  # fmt: skip
def test_the_smaller_slowdown_is_taken_off(seconds, slowdown, charged):
    assert metered([*QUIET * 4, (seconds, slowdown)]).elapsed == pytest.approx(20 + charged)


def test_an_earlier_run_of_the_same_file_tells_what_steps_cost():
    assert metered([(1.9, 1.6)] * 10, {"a": 1.0}).elapsed == pytest.approx(10)
    assert metered([(1.9, 1.0)] * 10, {"a": 1.0}).elapsed == pytest.approx(19)


def test_a_device_that_is_faster_than_it_was_is_charged_more():
    assert metered([(0.5, 0.5)] * 10, {"a": 1.0}).elapsed == pytest.approx(10)
    assert metered([(0.5, 1.0)] * 10, {"a": 1.0}).elapsed == pytest.approx(5)


def test_new_kinds_are_charged_in_full_until_they_are_known():
    meter = metered([*QUIET * 2, (3.0, 1.5, "b"), (3.0, 1.5, "b")])
    assert meter.elapsed == pytest.approx(16) and meter.costs == {"a": 1.0}
    more(meter, (3.0, 1.5, "b"))
    assert KNOWN == 3 and meter.costs == {"a": 1.0, "b": pytest.approx(2)}
    assert meter.elapsed == pytest.approx(16)  # never back
    more(meter, *[(3.0, 1.5, "b")] * 2)
    assert meter.elapsed == pytest.approx(20)


def test_a_new_kind_in_a_known_window_is_charged_in_full():
    meter = metered(QUIET)
    meter.add("a", 1.5)
    more(meter, (1.5, 1.5, "b"))
    assert meter.elapsed == pytest.approx(8)


def test_steps_that_skip_the_update_have_a_price_of_their_own():
    meter = metered([(1.0, 1.0, "a"), (0.6, 1.0, "b")] * 5)
    assert meter.costs == {"a": 1.0, "b": pytest.approx(0.6)} and meter.elapsed == pytest.approx(8)
    more(meter, (1.2, 2.0, "b"))
    assert meter.elapsed == pytest.approx(8.6)


def test_a_file_that_takes_less_at_first_and_more_later_slows_itself_down():
    """Its average is known. In the later part it heats the device, say, so that the probes take longer, too."""
    meter = metered([*[(1.0, 1.0)] * 6, *[(1.25, 1.2)] * 9], {"a": 1.15})
    assert meter.elapsed == meter.seconds == pytest.approx(6 + 9 * 1.25)
    more(meter, *[(1.8, 1.8)] * 5)  # and here another program does it
    assert meter.elapsed == pytest.approx(20 * 1.15)


def test_a_run_takes_at_most_so_many_times_as_long():
    meter = metered([(10.0, 10.0)] * 10, {"a": 1.0})
    assert meter.elapsed == pytest.approx(100 / MOST) and meter.disturbance == pytest.approx(9)


def test_what_is_learnt_later_of_a_window_counts():
    meter = metered([(1.5, 1.0)] * 2, {"a": 1.0})
    assert meter.elapsed == pytest.approx(3)
    for number in range(3, 7):
        meter.add("a", 1.5, [Slowdown(1.5, 1.5)] * number)
    assert meter.elapsed == pytest.approx(6) and meter.slowdown == pytest.approx(1.5)


def test_within_a_window_time_goes_on_as_in_the_last():
    meter = metered([*QUIET, (2.0, 2.0)])
    meter.add("a", 1.0)
    assert meter.slowdown == 2 and meter.elapsed == pytest.approx(6.5)


@pytest.mark.parametrize("steps", [{}, {"a": 1.0}], ids=["by itself", "with an earlier run"])
def test_simulated_disturbance_changes_the_training_by_little(steps):
    """Steps that scatter by 5 %, a witness that is wrong by 15 %, half of the time disturbed."""
    rng, done = np.random.default_rng(0), []
    for disturbed in (False, True):
        meter, count = Meter(steps), 0
        while meter.elapsed < 100:
            slowdown = 1.6 if disturbed and count % 20 >= 10 else 1.0
            word = 1 + (slowdown - 1) * rng.uniform(0.85, 1.15)
            more(meter, (slowdown * rng.normal(1, 0.05), word))
            count += 1
        done.append(count)
    assert done[1] == pytest.approx(done[0], rel=0.02)


@pytest.mark.parametrize("budget, seconds", [(5.0, 0.5), (150.0, 1.0), (300.0, 2.0), (3600.0, 2.0)])
def test_long_runs_have_longer_windows(budget, seconds):
    assert disturbance.window(budget) == seconds


def test_runs_are_compared_with_the_median_of_those_before():
    runs = [{"probe_seconds": probe, "step_seconds": {"a": step, "b": 1.0}} for step, probe in ((3, 1), (2, 5), (9, 2))]
    assert disturbance.reference(runs, runs) == {"probe": 2, "steps": {"a": 3, "b": 1.0}}
    for run, disturbed in zip(runs, (0.5, 0.5, 0.0), strict=True):
        run["disturbance"] = disturbed
    assert 8 < disturbance.reference([], runs)["steps"]["a"] < 9  # the word of the undisturbed counts most
    assert disturbance.reference(runs[1:2], [{}]) == {"probe": 5}
    assert disturbance.reference([{"probe_seconds": None}], [{"step_seconds": None}]) == {}
    odd = {"step_seconds": {"a": 1.0}, "num_steps": 3}
    for more in ({}, {"training_seconds": None}, {"training_seconds": 0.0}, {"training_seconds": 9.0, "num_steps": 0}):
        assert disturbance.reference([], [{**odd, **more}]) == {"steps": {"a": 1.0}}


def test_the_more_a_run_corrected_its_steps_the_less_it_says_of_them():
    """Runs of one file on an H200 on which others began all the time. The last found that it had been slowed by 1.74,
    which its neighbours' word did not bear out; another was charged by the mean of that word and the quiet run's."""
    told = [(275, 0.193, 18.33), (273, 0.203, 16.21), (285, 0.0, 17.55), (277, 0.111, 11.53)]
    runs = [
        {"training_seconds": 5.0, "num_steps": steps, "disturbance": disturbed, "step_seconds": {"step": cost / 1e3}}
        for steps, disturbed, cost in told
    ]
    alone = 0.01767  # 283 steps of the same file on the same GPU, with nothing else on it
    assert disturbance.reference([], runs)["steps"]["step"] == pytest.approx(alone, rel=0.03)


def test_a_probe_of_fewer_cycles_than_the_baselines_is_that_of_the_undisturbed_gpu():
    beside = [{"probe_seconds": 0.006, "clock_rate": 2e9}]
    quiet = [{"probe_seconds": 0.0031, "clock_rate": 2e9}, {"probe_seconds": 0.0034, "clock_rate": 1.8e9}]
    calibrated = {"probe": 0.0030, "clock_rate": 2e9}
    assert disturbance.reference([], [], calibrated) == {"probe": 0.0030, "clock_rate": 2e9}
    assert disturbance.reference(beside, [], calibrated) == {"probe": pytest.approx(0.0030), "clock_rate": 2e9}
    assert disturbance.reference(beside, []) == {"probe": 0.006, "clock_rate": 2e9}  # the only word there is
    assert disturbance.reference(beside * 2 + quiet, []) == {"probe": pytest.approx(0.00306), "clock_rate": 2e9}
    assert disturbance.reference(quiet, [], calibrated) == {
        "probe": 0.00325,
        "clock_rate": 1.9e9,
    }  # a hot one, as cycles
    untold = [{"probe_seconds": 0.006, "clock_rate": None}]  # a GPU that tells no rate: its sustained state counts
    assert disturbance.reference(untold, []) == {"probe": 0.006} == disturbance.reference(untold, [], calibrated)
    assert disturbance.reference([{"probe_seconds": None, "clock_rate": 2e9}], []) == {"clock_rate": 2e9}


# --- The witness ---


def backend(kind="cpu", seconds=(), clock_rates=()):
    """A device whose probes take these seconds, one after the other, by a time of its own."""
    seconds, now = itertools.chain([0.0], seconds), [0.0]  # the first call warms up

    def work(calls):
        now[0] += next(seconds)

    device = SimpleNamespace(kind=kind, precision="float32", peak_flops=1e12)
    bench = SimpleNamespace(product=lambda *_: work)
    rates = iter(clock_rates)
    return SimpleNamespace(
        device=device,
        bench=bench,
        synchronize=lambda: None,
        clock_rate=lambda: next(rates, None),
        perf_counter=lambda: now[0],
    )


@pytest.fixture
def witness():
    made = []

    def make(*arguments, **facts):
        made.append(Witness(*arguments, **facts))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def told(monkeypatch, *counters):
    values = iter(counters)
    monkeypatch.setattr(Witness, "_counters", lambda self: next(values))
    monkeypatch.setattr(Witness, "_cpu_probe", lambda self: 1e-4)
    monkeypatch.setattr(machine, "cores", lambda: 2)


# Wall, own processor time, queued, processor time of all others: since the last reading.
@pytest.mark.parametrize("wall, own, queued, others, slowdown", [
    (10, 19.6, 0.1, 0, 1 + 0.1 / 19.6 * 2),  # alone
    (10, 13.3, 6.6, 0, 2 / 1.33),  # a program beside it: each has a fair share
    (10, 8, 12, 0, 2.5),  # three
    (10, 7, 3, 0, 1 / 0.7),  # its only thread takes turns with another program
    (10, 10, 0, 0, 1),  # one of its threads works, beside another program or not: it is not held up
    (10, 5, 0, 0, 1),  # it sleeps
    (10, 20, 20, 0, 1),  # it has more threads than there are cores
    (10, 13.3, math.nan, 6.7, 2 / 1.33), (10, 10, math.nan, 0, 1), (10, 0, math.nan, 20, 1),
], ids="alone one three turns thread asleep many told nobody never".split())  # fmt: skip
def test_a_cpu_is_shared(witness, monkeypatch, wall, own, queued, others, slowdown):
    told(monkeypatch, np.zeros(4), np.array([wall, own, queued, others]), np.zeros(4))
    one = witness(backend())
    one.start()
    assert [told.most for told in one.read()] == [pytest.approx(slowdown, rel=0.01)]


def test_a_run_that_its_container_holds_up_is_not_disturbed(witness, monkeypatch):
    """64 threads in the time of four processors: the system counts them as queued while the container's time is up."""
    counters = [np.array([i, 4.0 * i, 60.0 * i, 0.0]) for i in range(3)]
    told(monkeypatch, *counters)
    monkeypatch.setattr(machine, "cores", lambda: 4.0)
    one = witness(backend())
    one.start()
    assert one.read()[0].most == 1


@pytest.mark.parametrize("before, now, slowdown", [(1e-4, 1.5e-4, 1.5), (1e-4, 1.03e-4, 1.0), (2e-4, 1e-4, 0.5)])
def test_a_cpu_that_clocks_lower_is_slower(witness, monkeypatch, before, now, slowdown):
    told(monkeypatch, *[np.array([i, 2.0 * i, 0.0, 0.0]) for i in range(9)])
    monkeypatch.setattr(Witness, "_cpu_probe", lambda self: now)
    one = witness(backend(), before)
    one.start()
    assert one.read()[0].mean == pytest.approx(slowdown, rel=0.01) and one.usual_probe == pytest.approx(now)


def test_what_a_host_takes_from_a_virtual_machine_is_no_slower_clock(monkeypatch):
    now, works = [0.0], itertools.count()

    def work(_):
        now[0] += 4e-3 if next(works) == 8 * disturbance.TRIES else 1e-5  # in the second probe a stop of 4 ms

    monkeypatch.setattr(disturbance, "np", SimpleNamespace(**{**vars(np), "tanh": work}))
    monkeypatch.setattr(disturbance.time, "thread_time", lambda: now[0])
    assert [Witness._cpu_probe() for _ in range(9)] == [pytest.approx(8e-5)] * 9


def read(one: Witness, windows: int) -> list[Slowdown]:
    one.start()
    return [one.read() for _ in range(windows)][-1]


@pytest.fixture
def gpu(witness, monkeypatch):
    """A witness of a GPU whose probes take these seconds."""

    def make(seconds, *usual, clock_rates=()):
        device = backend("cuda", seconds, clock_rates)
        monkeypatch.setattr(disturbance.time, "perf_counter", device.perf_counter)
        return witness(device, *usual)

    return make


def test_a_gpu_is_probed(gpu):
    one = gpu([0.002] * 9 + [0.01] * 20)
    one.start()
    assert [one.read()[-1] for _ in range(8)] == [pytest.approx(Slowdown(1, 1, True))] * 8
    slower = [one.read() for _ in range(20)][-1]
    assert slower[-10:] == [pytest.approx(Slowdown(5, 5, True))] * 10 and one.usual_probe == pytest.approx(0.002)


def test_a_low_clock_rate_that_made_no_probe_longer_makes_no_other_one_slow(gpu):
    """A wrong one, of another card, say."""
    one = gpu([0.002] * 40, clock_rates=[1.7e9, 1.7e9, 1e9, 1.7e9] * 10)
    one.start()
    assert [one.read() for _ in range(30)][-1] == [pytest.approx(Slowdown(1, 1, True))] * 30
    assert one.usual_probe == pytest.approx(0.002)


def test_one_slow_probe_of_a_gpu_counts_only_beside_it(gpu):
    slower = [told.most for told in read(gpu([0.002, 0.002, 0.05] + [0.002] * 20, 0.002), 22)]
    assert [index for index, told in enumerate(slower) if told != pytest.approx(1)] == [1, 2] and min(slower[1:3]) > 5


@pytest.mark.parametrize("steps", [{}, {"a": 0.1}], ids=["a new file", "known steps"])
@pytest.mark.parametrize("period", [0.02, 5, 60], ids="many times in a window, for some, for many windows".split(", "))
def test_what_takes_half_of_a_gpus_time_changes_the_training_by_little(gpu, period, steps):
    """A step takes 0.1 s and twice that beside another program, a probe 1 and 2 ms. A probe sees one moment."""
    rng, time, probed, done = np.random.default_rng(0), 0.0, 0.0, 0

    def slower() -> float:
        return 1 + (rng.random() < 0.5 if period < 0.1 else time % period >= period / 2)

    one, meter = gpu((0.001 * slower() for _ in itertools.count()), 0.001), Meter(steps)
    one.start()
    while time < 200:
        takes = 0.1 / 0.75 if period < 0.1 else 0.1 * slower()
        time, done = time + takes, done + 1
        meter.add("a", takes, one.read() if time - probed >= 1 else None)
        probed = time if time - probed >= 1 else probed
    assert meter.elapsed == pytest.approx(0.1 * done, rel=0.06) and meter.disturbance > 0.25


def test_a_session_that_begins_beside_another_program_trains_as_much_as_later_ones(gpu):
    """Its first run: nothing is known but what the calibration's probe took."""
    known = disturbance.reference([], [], {"probe": 0.002, "clock_rate": 2e9})
    for given, took in ((known, 60.0), ({}, 30.0)):
        device = gpu([0.004] * 80, given.get("probe"), given.get("clock_rate"), clock_rates=[2e9] * 80)
        device.start()
        meter = Meter()
        while meter.elapsed < 30:
            meter.add("a", 1.0, device.read())
        assert meter.seconds == pytest.approx(took, abs=2)


def test_a_probe_is_told_at_the_usual_clock_rate(gpu):
    """A quiet GPU that heats up: the quickest of its probes belong to the cool minutes, its usual rate doesn't."""
    rates = [2e9] * 12 + [1.6e9] * 28
    one = gpu([4e6 / rate for rate in rates], clock_rates=rates)
    read(one, 39)
    assert one.usual_clock_rate == 1.6e9 and one.usual_probe == pytest.approx(4e6 / 1.6e9)
    asleep = gpu([0.002] * 40, clock_rates=[3e8] * 12 + [2e9] * 28)  # at rest when asked, not when at work
    read(asleep, 39)
    assert asleep.usual_probe == pytest.approx(0.002)


def test_a_gpu_that_clocks_lower_is_no_slower_for_a_file_that_may_have_heated_it(gpu):
    rates = [2e9] * 30 + [1.6e9] * 30
    told = read(gpu([0.002 * 2e9 / rate for rate in rates], 0.002, 2e9, clock_rates=rates), 59)
    assert told[10] == pytest.approx((1, 1, True, 1)) and told[-1] == pytest.approx((1, 1, True, 1.25))
    # Steps that take longer from then on, by the power that they use themselves or in a hotter room.
    hungry, known = Meter(), Meter({"a": 1.0})
    for meter in (hungry, known):
        for number, window in enumerate(told, 1):
            meter.add("a", 1.25 if window.heat > 1 else 1.0, told[:number])
    assert hungry.elapsed == pytest.approx(hungry.seconds) and known.elapsed == pytest.approx(59, abs=0.5)


def test_heat_beside_another_program_may_be_the_others(gpu):
    told = read(gpu([0.005] * 40, 0.002, 2e9, clock_rates=[1.6e9] * 40), 39)
    assert told[20] == pytest.approx((2.5, 2.5, True, 1))


def test_a_gpu_that_was_asleep_has_a_low_clock_rate_and_is_no_faster(gpu):
    told = read(gpu([0.002] * 40, 0.002, 2e9, clock_rates=[3e8] * 3 + [2e9] * 40), 39)
    assert told == [(1, 1, True, 1)] * 39


@pytest.mark.parametrize("given", [(), (0.002, 2e9)], ids=["a first run", "a later one"])
def test_a_gpu_that_clocks_higher_is_no_faster(gpu, given):
    told = read(gpu([0.002] * 40, *given, clock_rates=[2e9] * 20 + [2.1e9] * 20), 39)
    assert told == [pytest.approx((1, 1, True, 1), rel=0.06)] * 39 and max(one.most for one in told) == 1


def test_a_probe_that_fails_tells_nothing(gpu):
    one = gpu([])  # its work is used up: StopIteration
    assert read(one, 1) == [(1, 1, True, 1)] and one.usual_probe is None and one.probes == [None, None]


def test_a_file_with_threads_of_its_own_is_charged_in_full_on_a_gpu(gpu):
    """They could keep it busy whenever it is probed. Threads of libraries and of this project are none."""
    started, done = threading.Event(), threading.Event()
    watched, other_end = os.pipe()
    for target, *arguments in ((done.wait,), (processes.follow, watched, None)):
        threading.Thread(target=target, args=arguments, daemon=True).start()
    assert read(gpu([0.001] * 3 + [0.002] * 10), 12)[-1].most > 1.5
    code = "def work(started, done): started.set(), done.wait()"
    exec(code, own := {"__name__": "__main__"})
    threading.Thread(target=own["work"], args=(started, done), daemon=True).start()
    assert started.wait(5)
    assert read(gpu([0.001] * 3 + [0.002] * 10), 12) == [(1, 1, True, 1)] * 12
    done.set()


@pytest.mark.parametrize("told", [None, "0 0 0\n"], ids=["no file", "switched off"])
def test_a_linux_that_does_not_tell_who_waited(tmp_path, monkeypatch, told):
    """Then others' processor time is the bound, as on other systems."""
    (own := tmp_path / str(threading.get_native_id())).mkdir()
    if told:
        (own / "schedstat").write_text(told)
    monkeypatch.setattr(disturbance, "TASKS", tmp_path)
    assert math.isnan(disturbance._queued())
    (own / "schedstat").write_text("5 2000000000 1\n")
    (tmp_path / "1").mkdir()  # has ended since it was listed
    assert disturbance._queued() == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists them cheaply")
def test_what_a_run_starts_is_its_own(witness):
    before = disturbance._of_children(disturbance.TASKS)
    spin = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        for _ in range(300):
            time.sleep(0.1)
            if (used := disturbance._of_children(disturbance.TASKS) - before) > 0.2:
                break
        process.kill()
    assert used > 0.2


def test_this_system_tells_what_it_can(witness):
    one = witness(backend())
    one.start()
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    assert 1 <= one.read()[0].most < 50 and 0 < one.usual_probe < 1


PAUSED = """
import sys, time
from types import SimpleNamespace
import disturbance
device = SimpleNamespace(kind="cpu")
one = disturbance.Witness(SimpleNamespace(device=device, synchronize=None, clock_rate=lambda: None))
one.start()
print("begun", flush=True)
end = time.perf_counter() + {seconds}
while time.perf_counter() < end:
    {work}
print(one.paused, flush=True)
"""


def test_standing_still_is_a_pause(tmp_path):
    code = PAUSED.format(seconds=3, work="sum(range(1000))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(process.pid, signal.SIGCONT)
        assert float(process.stdout.readline()) == pytest.approx(2.5, abs=0.7)


def test_a_pause_is_taken_off_the_step_that_it_ended_in(witness, monkeypatch):
    """By whoever looks first: the pulse may come only after the step's end."""
    monkeypatch.setattr(disturbance.Witness, "_pulse", lambda self: None)
    clock, stood_still = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + stood_still[0])
    one = witness(backend())
    one.start()
    begun = one.now()
    stood_still[0] = 100.0
    ended = one.now()
    assert 0 <= ended - begun <= disturbance.PULSE + 1 and one.paused == pytest.approx(100, abs=1)
    assert 0 <= one.now() - ended < 1


def test_work_that_holds_pythons_lock_is_no_pause():
    code = PAUSED.format(seconds=2, work="sorted(range(20_000_000))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[1]) == 0
