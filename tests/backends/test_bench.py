"""Timing, the trials on each backend, and what is chosen from them."""

from __future__ import annotations

import math

import pytest

import backends
from backends import bench
from backends.interface import BackendError, Calibrated
from tests.backends.support import opened

GIB = 2**30


class Ticks:
    """A clock that a call of `work` moves on by so many seconds, and that jumps now and then."""

    def __init__(self, each, jumps=()):
        self.now, self.each, self.jumps, self.calls = 100.0, each, list(jumps), []

    def __call__(self):
        return self.now

    def work(self, calls):
        self.calls.append(calls)
        self.now += calls * self.each + (self.jumps.pop(0) if self.jumps else 0)


def test_repeats_are_seconds_of_one_call():
    ticks = Ticks(0.01)
    assert bench.seconds(ticks.work, repeats=5, clock=ticks) == pytest.approx([0.01] * 5)


def test_short_calls_are_timed_together():
    ticks = Ticks(1e-5)
    assert bench.seconds(ticks.work, repeats=3, at_least=0.004, clock=ticks) == pytest.approx([1e-5] * 3)
    assert ticks.calls[-1] == 400 and ticks.calls[0] == 1  # the first one may compile


def test_a_slow_call_is_timed_once_or_twice():
    for each, times in ((0.4, 3), (2.0, 1)):
        ticks = Ticks(each)
        assert len(bench.seconds(ticks.work, repeats=7, enough=1.0, clock=ticks)) == times


def test_a_clock_that_jumps_back_is_left_out_and_one_that_jumps_ahead_does_not_move_the_median():
    ticks = Ticks(0.01, jumps=[0, -5.0, 0, 3600.0, 0, 0, 0])
    times = sorted(bench.seconds(ticks.work, repeats=5, enough=math.inf, clock=ticks))
    assert len(times) == 5 and times[2] == pytest.approx(0.01) and min(times) > 0


def test_a_clock_that_stands_still_is_an_error():
    with pytest.raises(RuntimeError, match="clock can't be used for timing"):
        bench.seconds(lambda calls: None, clock=lambda: 1.0)


@pytest.mark.parametrize(
    "rates, wanted",
    [
        ({"float32": 1.0, "bfloat16": 1.05, "float16": 1.05}, "float32"),  # nothing gained
        ({"float32": 1.0, "bfloat16": 1.9, "float16": 2.0}, "bfloat16"),
        ({"float32": 1.0, "bfloat16": 0.2, "float16": 1.8}, "float16"),  # no bfloat16 in hardware
        ({"bfloat16": 1.0}, "bfloat16"),
    ],
)
def test_precision_goes_to_digits_and_range_unless_clearly_slower(rates, wanted):
    tried = {"float32": "wrong: relative error 1"} | {name: {"mlp": rate, "product": 9} for name, rate in rates.items()}
    assert bench.choose_precision(tried) == wanted


def test_no_right_precision_is_an_error():
    with pytest.raises(BackendError, match="no precision"):
        bench.choose_precision({"float32": "wrong: relative error 1"})


def found(seconds, size=None):
    return {"both": [seconds], "rows": 1, "bytes": size}


def test_without_a_compiler_flex_is_not_chosen():
    tried = {"window": {"flex": found(1.0), "sdpa_mask": found(2.0), "varlen": "wrong: relative error 1"}}
    assert bench.choose_attention(tried, GIB) == {"window": "flex"}
    assert bench.choose_attention(tried, GIB, compiled=False) == {"window": "sdpa_mask"}


@pytest.mark.parametrize("memory, wanted", [(8 * GIB, "recomputed"), (64 * GIB, "blocks")])
def test_probabilities_are_kept_only_where_memory_is_plenty(memory, wanted):
    tried = {"fused": found(9.0, 900 * 2**20), "recomputed": found(5.0, 100 * 2**20), "blocks": found(4.0, 400 * 2**20)}
    assert bench.choose_attention({"full": tried}, memory) == {"full": wanted}


def test_attention_that_keeps_more_has_to_be_clearly_faster():
    tried = {"recomputed": found(5.0, 100), "blocks": found(4.8, 400)}
    assert bench.choose_attention({"full": tried}, 64 * GIB) == {"full": "recomputed"}


def test_of_attention_that_is_equally_fast_the_first_is_chosen():
    repeats = {"first": [4.1, 9.0, 8.0], "second": [4.0, 4.0, 4.0], "third": [3.0, 9.0, 9.0]}
    tried = {name: {"both": seconds, "rows": 1, "bytes": None} for name, seconds in repeats.items()}
    assert bench.choose_attention({"full": tried}, GIB) == {"full": "third"}
    del tried["third"]
    assert bench.choose_attention({"full": tried}, GIB) == {"full": "first"}


def test_no_right_attention_is_an_error():
    with pytest.raises(BackendError, match="no attention"):
        bench.choose_attention({"full": {"fused": "wrong: relative error 1.0e+00"}}, 8 * GIB)


@pytest.fixture(params=backends.NAMES)
def backend(request, monkeypatch):
    """Each backend present, with attention of small rows."""
    backend = opened(request.param, "float32")
    monkeypatch.setattr(type(backend.bench), "attention_shape", (64, 2, 16))
    monkeypatch.setattr(backend.bench, "attention_shape", (64, 2, 16), raising=False)
    backend.bench.forget()
    yield backend
    backend.bench.forget()


def test_a_device_measures_itself(backend):
    tried = bench.try_precisions(backend.bench, repeats=2)
    assert tried["float32"]["product"] > 1e8 and tried["float32"]["mlp"] > 1e7
    assert all(rate > 1e8 for rate in bench.product_rates(backend.bench, "float32", 256, repeats=2))
    assert min(bench.seconds(backend.bench.copy(2**20), 2)) > 0
    assert 2**26 < backend.free_memory() <= backend.device.memory


def test_attention_is_tried_forward_and_backward_for_both_windows(backend):
    tried = bench.try_attention(backend.bench, "float32", repeats=2, forward=True)
    for kind in bench.KINDS:
        name = bench.choose_attention(tried, backend.device.memory)[kind]
        assert min(tried[kind][name]["forward"]) > 0 and min(tried[kind][name]["both"]) > 0
    assert bench.choose_attention(tried, backend.device.memory).keys() == bench.KINDS.keys()


def test_short_calls_are_made_on_more_rows_within_the_memory(backend, monkeypatch):
    asked = []

    def recorded(self, name, window, rows, backward):
        asked.append(rows)
        return rows

    monkeypatch.setattr(type(backend.bench), "attention", recorded)
    monkeypatch.setattr(bench, "seconds", lambda rows, *_, **__: [0.0005 * rows])
    monkeypatch.setattr(backend.bench, "memory", 2**40)
    tried = bench.try_attention(backend.bench, "float32")
    assert max(asked) == 8  # 4 ms
    assert {found["rows"] for found in tried["full"].values() if not isinstance(found, str)} == {8}
    asked.clear()
    monkeypatch.setattr(backend.bench, "memory", 8 * 2 * 64**2 * 4 * 3)  # room for 3 rows' scores
    bench.try_attention(backend.bench, "float32")
    assert max(asked) == 2


def test_what_lacks_memory_is_named_and_does_not_last(backend, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(type(backend.bench), "product_error", full)
    tried = bench.try_precisions(backend.bench)
    assert set(tried.values()) == {"out of memory"} and not bench.lasts(tried)
    assert bench.lasts({"float32": {"product": 1.0}})


def test_a_driver_that_failed_may_be_well_again():
    broken, works = (
        dict.fromkeys(bench.PRECISIONS, "RuntimeError: unspecified launch failure"),
        {"flex": {"both": [1.0]}},
    )
    assert not bench.lasts(broken) and bench.lasts(broken | {"float32": {"product": 1.0}})
    assert bench.lasts(works, works) and not bench.lasts(works, {"flex": "wrong: relative error 1"})


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_calibrated_backend_tries_nothing(name, isolated_home, monkeypatch):
    plain = opened(name, "float32")
    chosen = bench.choose_attention(bench.try_attention(_small(plain, monkeypatch), "float32"), GIB, compiled=False)
    monkeypatch.setattr(bench, "try_precisions", None)
    monkeypatch.setattr(bench, "try_attention", None)
    rate = max(bench.product_rates(plain.bench, "float32", 256))
    backend = backends.load(name, compiled=False, calibrated=Calibrated("abc", "float32", chosen, rate / 2, 256))
    assert backend.device.precision == "float32" and backend.device.profile == "abc"
    assert backend.device.peak_flops == rate / 2 and 0.2 < backend.device.speed < 20
    assert not (isolated_home / "trials.json").exists() or "products" not in (isolated_home / "trials.json").read_text()


def _small(backend, monkeypatch):
    monkeypatch.setattr(backend.bench, "attention_shape", (64, 2, 16), raising=False)
    backend.bench.forget()
    return backend.bench
