"""The first guess of the noise: what was measured, and nothing wild beyond."""

import statistics

import pytest

from calibration import noise

CPU = [(1.295997, 1.406228), (1.468043, 1.421168), (1.598899, 1.599246), (1.409094, 1.568586), (1.240109, 1.364797)]
H200 = [0.491579, 0.495459, 0.495623, 0.496301]


def test_it_goes_through_what_was_measured():
    shares = [statistics.stdev(pair) / statistics.fmean(pair) for pair in CPU]
    assert noise.expected(5e6) == pytest.approx(statistics.fmean(s**2 for s in shares) ** 0.5, rel=0.1)
    assert noise.expected(2.8e8) == pytest.approx(statistics.stdev(H200) / statistics.fmean(H200), rel=0.05)


def test_it_falls_with_tokens_and_has_a_limit():
    values = [noise.expected(tokens) for tokens in (0, 1, 1e5, 1e7, 1e8, 1e9)]
    assert values == sorted(values, reverse=True) and values[0] == values[1] == noise.MOST and values[-1] > 0
