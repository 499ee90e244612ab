"""The first guess of the noise: near what was measured, and nothing wild beyond."""

import pytest

from calibration import noise

# Tokens, and the standard deviation between seeds over val_bpb: benchmarks/README.md, "How far seeds are apart".
MEASURED = [(2.8e8, 0.0033), (2.8e8, 0.0043), (1.05e8, 0.0047), (7.3e7, 0.0045), (2.83e7, 0.0074), (1.31e7, 0.0112)]
ON_CPUS = [(9e4, 0.0033), (8e4, 0.0023), (3e4, 0.0045), (3e4, 0.0065)]


@pytest.mark.parametrize("tokens, share", MEASURED + ON_CPUS)
def test_it_is_near_what_was_measured(tokens, share):
    assert share / 3 < noise.expected(tokens) < 3 * share


def test_it_falls_with_tokens_and_has_a_limit():
    values = [noise.expected(tokens) for tokens in (0, 1, 1e5, 1e7, 1e8, 1e9)]
    assert values == sorted(values, reverse=True) and values[0] == values[1] == noise.MOST and values[-1] > 0
