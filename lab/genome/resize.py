"""The same train.py with another size of model, for the question of whether a change carries to it.

The sizes are wrapped where train.py sets them, so that it is the change's own depth that is doubled, also where that is
no default. Width follows depth there. The batches go by the rules of calibration/rule.py: the total batch by the root
of the tokens that the time buys, the rows of a pass by the memory that a row takes.
"""

from __future__ import annotations

import ast
import math

from calibration import rule
from lab.errors import LabError

LEAST = {"DEPTH": "1", "TOTAL_BATCH_SIZE": "prepare.MAX_SEQ_LEN", "DEVICE_BATCH_SIZE": "1"}


def resized(content: bytes, depth: float, tokens: float, times: float = 1.0) -> bytes:
    """A train.py with `depth` times the layers, to be trained for `times` the budget.

    Args:
        tokens: that a run reads as it is. FLOPs per token are taken to grow with the cube of depth, and a row's memory
            with its square, as width follows depth.

    Raises:
        LabError: it does not set these sizes once each, at its top level.
    """
    batch = rule.total_batch(tokens * times / depth**3) / rule.total_batch(tokens)
    rows = 2.0 ** math.floor(min(0.0, -2 * math.log2(depth)))  # a power of two still divides the total batch
    factors = {"DEPTH": depth, "TOTAL_BATCH_SIZE": batch, "DEVICE_BATCH_SIZE": rows}
    lines, found = content.splitlines(keepends=True), {name: [] for name in factors}
    for node in ast.parse(content).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (target.id for target in targets if isinstance(target, ast.Name) and target.id in factors):
            found[name].append(getattr(node, "value", None))
    for name, values in found.items():
        if len(values) != 1:
            raise LabError(f"train.py sets {name} {len(values)} times at its top level: its size can't be changed")
    edits = [(values[0], name) for name, values in found.items()]
    for value, name in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        if factors[name] == 1:
            continue
        first, last = value.lineno - 1, (value.end_lineno or value.lineno) - 1
        text = b"".join(lines[first : last + 1])
        start = value.col_offset
        end = len(text) - len(lines[last]) + (value.end_col_offset or 0)
        whole = f"max({LEAST[name]}, round({factors[name]:g} * ({text[start:end].decode()})))".encode()
        lines[first : last + 1] = [text[:start] + whole + text[end:]]
    return b"".join(lines)
