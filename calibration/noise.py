"""How far two runs of one train.py are apart when only the seed differs: a first guess, before a session repeats any.

Whole runs (benchmarks/README.md): on a 2-core CPU, 1.7 to 6.9 M tokens each, ten runs of five configurations have a
pooled standard deviation of 5.3 % of val_bpb; on an H200, 280 M tokens each, four runs 0.43 %. A power law goes through
both: fewer tokens are fewer steps, and chance weighs more. A session trusts it as it would four degrees of freedom.
"""

from __future__ import annotations

AT_TOKENS, THERE, EXPONENT = 2.8e8, 0.0043, 0.62
MOST = 0.06  # fewer tokens than on that CPU were not measured


def expected(tokens: float) -> float:
    """Standard deviation of val_bpb between seeds, as a share of val_bpb, for a run that reads so many tokens."""
    return min(MOST, THERE * (AT_TOKENS / max(tokens, 1.0)) ** EXPONENT)
