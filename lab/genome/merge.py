"""Makes a change on another text than the one it was made on: three ways, line by line.

`git merge-file` calls changes of two neighbouring lines a conflict, and the hyperparameters of train.py are neighbours.
Here only changes of the same lines are one.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lab.genome.change import HUNK, lines_of, replaced

# Whatever the user has set for diffs.
DIFF = ("diff", "--no-index", "--no-color", "--no-ext-diff", "--no-textconv", "--diff-algorithm=myers", "--text", "-U0")

Lines = tuple[int, int]  # first and end


@dataclass(frozen=True)
class Conflict:
    """Lines that are not here what they were where the change was made."""

    line: int  # where they are here, from 1
    here: list[bytes]
    before: list[bytes]
    after: list[bytes]  # what the change makes of `before`


def merged(here: bytes, before: bytes, after: bytes) -> tuple[bytes, list[Conflict]]:
    """The change from `before` to `after` made on `here`, and where that could not be done: there it is left out. What
    is here already counts as done."""
    changed = lines_of(after)
    places = _changed_lines(before, after)
    return _made(here, before, [(first, end, changed[start:stop]) for first, end, start, stop in places])


def merged_patch(here: bytes, before: bytes, patch: str) -> tuple[bytes, list[Conflict]]:
    """As `merged`, with a change of `before` told by its unified diff: many of one text's are merged faster so."""
    return _made(here, before, replaced(patch))


def _made(here: bytes, before: bytes, changes: Iterable[tuple[int, int, list[bytes]]]) -> tuple[bytes, list[Conflict]]:
    lines, base, ours = lines_of(here), lines_of(before), _changed_lines(before, here)
    conflicts, edits = [], []
    for first, end, new in changes:
        # Lines of `here` are those of `before`, moved by what was changed above.
        against = [own for own in ours if _meet((first, end), own[:2])]
        if any((first, end, new) == (own[0], own[1], lines[own[2] : own[3]]) for own in against):
            continue
        moved = sum((own[3] - own[2]) - (own[1] - own[0]) for own in ours if own[1] <= first and own not in against)
        if against:
            low, high = min(own[2] for own in against), max(own[3] for own in against)
            conflicts.append(Conflict(low + 1, lines[low:high], base[first:end], new))
        else:
            edits.append((first + moved, end + moved, new))
    for start, stop, new in reversed(edits):
        if start and new and not lines[start - 1].endswith(b"\n"):  # the file's last line has no end here
            lines[start - 1] += b"\n"
        lines[start:stop] = new
    return b"".join(lines), conflicts


def _meet(these: Lines, those: Lines) -> bool:
    """Whether two ranges of lines share one; or one is an insertion within the other, or both are at one place."""
    if these[0] == these[1] and those[0] == those[1]:
        return these[0] == those[0]
    return (
        max(these[0], those[0]) < min(these[1], those[1])
        or (these[0] == these[1] and those[0] < these[0] < those[1])
        or (those[0] == those[1] and these[0] < those[0] < these[1])
    )


@lru_cache(maxsize=64)  # near misses are merged one by one into the best, and most were made on the same text
def _changed_lines(before: bytes, after: bytes) -> tuple[tuple[int, int, int, int], ...]:
    """(first and end of the lines before, first and end of those after) of each place that differs, as git sees it: it
    aligns repeated lines better than difflib."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "before").write_bytes(before)
        Path(folder, "after").write_bytes(after)
        done = subprocess.run(
            ["git", *DIFF, "before", "after"], cwd=folder, capture_output=True, check=False, start_new_session=True
        )
    changes = []
    for row in done.stdout.decode(errors="replace").split("\n"):
        if head := HUNK.match(row):
            at, length, new_at, new_length = (1 if number is None else int(number) for number in head.groups())
            at, new_at = at - (length > 0), new_at - (new_length > 0)
            changes.append((at, at + length, new_at, new_at + new_length))
    return tuple(changes)
