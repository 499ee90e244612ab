"""How far two devices agree on what helps: whether effects have the same sign, and the same order.

Noise lowers both: between two identical devices with one run each, a quarter of what is kept seems to reverse, and half
of it where no change does anything (benchmarks/compare.py). The intervals say how few changes there are, not how noisy
each one is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.6449  # of a 90 % interval
FEWEST = 4  # pairs: Fisher's interval needs n - 3 of them


def wilson(same: int, n: int) -> tuple[float, float]:
    """90 % interval of a share, n above 0 (Wilson, JASA 1927): it stays within 0 and 1, and is not empty at either."""
    share, spread = same / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float] | None:
    """(rho, low, high): correlation of ranks, tied ones sharing their mean, and its 90 % interval by Fisher's z with
    the variance (1 + rho^2/2)/(n - 3) of Bonett & Wright, Psychometrika 2000. None with fewer than FEWEST pairs, or
    where one side has but one value."""
    if len(xs) < FEWEST:
        return None
    a, b = ranks(xs), ranks(ys)
    middle = (len(xs) + 1) / 2
    spread = math.sqrt(math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b))
    if spread == 0:
        return None
    rho = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b)) / spread
    most = 1 - 1 / len(xs)  # Fisher's z of 1 is infinite
    z, half = math.atanh(max(-most, min(most, rho))), Z * math.sqrt((1 + rho * rho / 2) / (len(xs) - 3))
    return rho, min(rho, math.tanh(z - half)), max(rho, math.tanh(z + half))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values have the mean of their places."""
    order = sorted(range(len(values)), key=values.__getitem__)
    shared, at = [0.0] * len(values), 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for i in order[at : end + 1]:
            shared[i] = (at + end) / 2 + 1
        at = end + 1
    return shared
