"""Changes of a text on top of another text: applies a patch exactly, and merges three ways, line by line.

`git merge-file` calls changes of two neighbouring lines a conflict, and the hyperparameters of train.py are neighbours.
Here only changes of the same lines are one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.session.repository import DIFF

HUNK = re.compile(r"@@ -([0-9]+)(?:,([0-9]+))? \+([0-9]+)(?:,([0-9]+))? @@")


@dataclass(frozen=True)
class Conflict:
    """Lines that are not here what they were where the change was made.

    Attributes:
        line: where it is here, from 1. here, before, after: the lines; `after` is what the change makes of `before`.
    """

    line: int
    here: list[bytes]
    before: list[bytes]
    after: list[bytes]


def patched(content: bytes, patch: str) -> bytes:
    """A text after a unified diff (see bundle.check_patch) that was made on just this text.

    Raises:
        LabError: it was made on another one.
    """
    lines, rows = lines_of(content), patch.split("\n")[:-1]
    found, at, row = [], 0, next((i for i, text in enumerate(rows) if text.startswith("@@")), len(rows))
    while row < len(rows):
        head = HUNK.match(rows[row])
        start, length, new_length = int(head[1]), int(head[2] or 1), int(head[4] or 1)
        start -= length > 0  # a hunk without old lines names the line before it
        old, new, last, row = [], [], [], row + 1
        while row < len(rows) and (len(old) < length or len(new) < new_length or rows[row].startswith("\\")):
            mark, text = rows[row][:1] or " ", (rows[row][1:] + "\n").encode()
            if mark == "\\":  # No newline at end of file
                for side in last:
                    side[-1] = side[-1].removesuffix(b"\n")
            last = [side for side, marks in ((old, " -"), (new, " +")) if mark in marks]
            for side in last:
                side.append(text)
            row += 1
        if start < at or lines[start : start + length] != old:
            raise LabError(f"its patch does not fit the train.py that it was made on, at line {start + 1}")
        found += lines[at:start] + new
        at = start + length
    return b"".join(found + lines[at:])


def merged(here: bytes, before: bytes, after: bytes) -> tuple[bytes, list[Conflict]]:
    """The change from `before` to `after` made on `here`, and where that could not be done: there it is left out. What
    is here already counts as done."""
    lines, base, changed = map(lines_of, (here, before, after))
    ours, theirs = _changes(base, lines), _changes(base, changed)
    conflicts, edits = [], []
    for first, end, one, other in theirs:
        # Lines of `here` are those of `before`, moved by what was changed above.
        against = [own for own in ours if _meet((first, end), own[:2])]
        if any((first, end, changed[one:other]) == (own[0], own[1], lines[own[2] : own[3]]) for own in against):
            continue
        moved = sum((own[3] - own[2]) - (own[1] - own[0]) for own in ours if own[1] <= first and own not in against)
        if against:
            low, high = min(own[2] for own in against), max(own[3] for own in against)
            conflicts.append(Conflict(low + 1, lines[low:high], base[first:end], changed[one:other]))
        else:
            edits.append((first + moved, end + moved, changed[one:other]))
    for start, stop, new in reversed(edits):
        lines[start:stop] = new
    return b"".join(lines), conflicts


def lines_of(content: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def _changes(before: list[bytes], after: list[bytes]) -> list[tuple[int, int, int, int]]:
    """(first and end of the lines before, first and end of those after) of what differs, as git sees it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in (("before", before), ("after", after)):
            Path(folder, name).write_bytes(b"".join(lines))
        done = subprocess.run(
            ["git", *DIFF, "-U0", "--no-index", "before", "after"],
            cwd=folder,
            capture_output=True,
            check=False,
            start_new_session=True,
        )
    found = []
    for row in done.stdout.decode(errors="replace").split("\n"):
        if head := HUNK.match(row):
            at, length, new_at, new_length = (1 if number is None else int(number) for number in head.groups())
            at, new_at = at - (length > 0), new_at - (new_length > 0)
            found.append((at, at + length, new_at, new_at + new_length))
    return found


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges of lines share one; or one is an insertion within the other, or both are at one place."""
    if one[0] == one[1] and other[0] == other[1]:
        return one[0] == other[0]
    return (
        max(one[0], other[0]) < min(one[1], other[1])
        or (one[0] == one[1] and other[0] < one[0] < other[1])
        or (other[0] == other[1] and one[0] < other[0] < one[1])
    )
