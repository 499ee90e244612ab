"""What a change of train.py is: its lines, and two ids that mean the same on every machine.

The **exact** id is that of the definitions that it touches, each by name, before and after: equal ids, equal changes
of equal functions. By it claims are joined. The **family** is that of the lines removed and added, with their
indentation, in the definition that they stand in: it stays the same when a neighbouring line is another one, and is
shown as "probably the same". Neither depends on the Python version, on git's settings or on line ends.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from lab.errors import LabError
from lab.genome.syntax import MODULE, TRAIN, changed, definitions, normalised

ID = 16  # hexadecimal digits of an id
HUNK = re.compile(r"@@ -([0-9]{1,7})(?:,([0-9]{1,7}))? \+([0-9]{1,7})(?:,([0-9]{1,7}))? @@.*")
HEAD = re.compile(
    r"(diff --git a/train\.py b/train\.py\n)?(index [0-9a-f]{4,64}\.\.[0-9a-f]{4,64}( 100(644|755))?\n)?"
    r"--- a/train\.py\n\+\+\+ b/train\.py\n"
)
CONTEXT = 3  # lines of context in a diff
NO_NEWLINE = "\\ No newline at end of file\n"


class Change(NamedTuple):
    """The ids of a change, both "" where nothing but comments or layout differs."""

    exact: str
    family: str


def identify(before: bytes, after: bytes) -> Change:
    """The ids of the change from one train.py to another. SyntaxError if one of them is not valid Python."""
    before, after = normalised(before), normalised(after)
    touched = sorted(
        (name, *(_digest(side.canonical) if side else "" for side in (old, new)))
        for name, old, new in changed(before, after)
    )
    if not touched:
        return Change("", "")
    return Change(_digest(repr(touched)), _digest(repr(_lines_by_definition(before, after))))


def _lines_by_definition(before: bytes, after: bytes) -> list[tuple[str, list[str]]]:
    """(definition, lines removed and added) of each that has some, comments and blank lines left out."""
    old, new = lines_of(before), lines_of(after)
    places: dict[str, list[str]] = {}
    for tag, first, end, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for mark, content, lines, at in (("-", before, old, range(first, end)), ("+", after, new, range(start, stop))):
            for number in at if tag != "equal" else ():
                text = lines[number].decode(errors="replace").rstrip()
                if text and not text.lstrip().startswith("#"):
                    owners = (name for name, known in definitions(content).items() if number + 1 in known.lines)
                    places.setdefault(next(owners, MODULE), []).append(f"{mark}{text}")
    return sorted((name, sorted(lines)) for name, lines in places.items())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:ID]


# --- Lines ---


def lines_of(content: bytes) -> list[bytes]:
    """The lines of a text with their ends."""
    return io.BytesIO(content).readlines()


def diff(before: bytes, after: bytes) -> str:
    """A unified diff of train.py; "" if nothing differs."""
    sides = [[line.decode(errors="surrogateescape") for line in lines_of(normalised(side))] for side in (before, after)]
    rows = difflib.unified_diff(sides[0], sides[1], f"a/{TRAIN}", f"b/{TRAIN}", n=CONTEXT)
    return "".join(row if row.endswith("\n") else f"{row}\n{NO_NEWLINE}" for row in rows)


def patched(content: bytes, patch: str) -> bytes:
    """A text after a unified diff that was made on just this text.

    Raises:
        LabError: it was made on another text, or is not a diff.
    """
    lines, result, at = lines_of(content), [], 0
    for start, rows in _hunks(patch):
        old, new = ([line for mark, line in rows if mark in (" ", side)] for side in "-+")
        if start < at or lines[start : start + len(old)] != old:
            raise LabError(f"its patch does not fit the {TRAIN} that it was made on, at line {start + 1}")
        result += lines[at:start] + new
        at = start + len(old)
    return b"".join(result + lines[at:])


def replaced(patch: str) -> list[tuple[int, int, list[bytes]]]:
    """(first and end of the lines, from 0, and what stands in their place) of each place that a unified diff changes.
    LabError if it is not a diff."""
    places = []
    for start, rows in _hunks(patch):
        for is_context, group in itertools.groupby(rows, lambda row: row[0] == " "):
            group = list(group)
            end = start + sum(mark != "+" for mark, _ in group)
            if not is_context:
                places.append((start, end, [line for mark, line in group if mark == "+"]))
            start = end
    return places


def _hunks(patch: str) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
    """(its first line, from 0; its rows, each a mark and a line) of each hunk of a unified diff."""
    if not (head := HEAD.match(patch)):
        raise LabError(f"its patch has to change {TRAIN} and nothing else")
    left = deque(f"{row}\n" for row in patch[head.end() :].split("\n")[:-1])
    while left:
        if not (hunk := HUNK.match(left[0])):
            raise LabError(f"its patch holds more than changes of {TRAIN}: {left[0][:80]!r}")
        left.popleft()
        start, lengths = int(hunk[1]), [int(hunk[2] or 1), int(hunk[4] or 1)]
        rows, missing = [], list(lengths)
        while left and (max(missing) > 0 or left[0].startswith("\\")):
            mark, line = left[0][0], left[0][1:].encode(errors="surrogateescape")
            if mark == "\\" and rows:  # the line before has no end
                rows[-1] = rows[-1][0], rows[-1][1].removesuffix(b"\n")
            elif mark in " -+":
                rows.append((mark, line))
                missing = [missing[0] - (mark != "+"), missing[1] - (mark != "-")]
            else:
                break
            left.popleft()
        if any(missing):
            raise LabError("its patch is cut short: a hunk lacks lines")
        yield start - (lengths[0] > 0), rows  # a hunk without old lines names the line before it
