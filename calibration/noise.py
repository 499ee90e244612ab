"""How far two runs of one train.py are apart when only the seed differs: a first guess, before a session repeats any.

As a share of val_bpb (benchmarks/README.md, "How far seeds are apart"): on H200s 1.1 % for 13 M tokens, 0.74 % for
28 M, 0.45 % for 70 M, 0.3 to 0.5 % for 200 M and more; on CPUs, 20 steps of 0.1 M tokens in all, 0.2 to 0.7 %, what
other programs do included. A session trusts it as it would four degrees of freedom.
"""

from __future__ import annotations

AT_TOKENS, THERE, EXPONENT = 2.8e8, 0.0036, 0.25
MOST = 0.006  # in shorter runs it grows no further, as little was learnt by then


def expected(tokens: float) -> float:
    """Standard deviation of val_bpb between seeds, as a share of val_bpb, for a run that reads so many tokens."""
    return min(MOST, THERE * (AT_TOKENS / max(tokens, 1.0)) ** EXPONENT)
