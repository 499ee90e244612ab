"""What a change of train.py is: its lines, and two ids that mean the same on every machine.

The **exact** id is that of the definitions that it touches, each by name, before and after: equal ids, equal changes
of equal functions. By it claims are joined. The **family** is that of the lines removed and added, with their
indentation, in the definition that they stand in: it stays the same when a neighbouring line is another one, and is
shown as "probably the same". Neither depends on the Python version, on git's settings or on line ends.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lab.errors import LabError
from lab.genome.syntax import MODULE, TRAIN, Definition, definitions, normalised

ID = 16  # hexadecimal digits of an id
HUNK = re.compile(r"@@ -([0-9]{1,7})(?:,([0-9]{1,7}))? \+([0-9]{1,7})(?:,([0-9]{1,7}))? @@.*")
HEAD = re.compile(
    r"(diff --git a/train\.py b/train\.py\n)?(index [0-9a-f]{4,64}\.\.[0-9a-f]{4,64}( 100(644|755))?\n)?"
    r"--- a/train\.py\n\+\+\+ b/train\.py\n"
)
CONTEXT = 3  # lines of context in a diff
NO_NEWLINE = "\\ No newline at end of file\n"


@dataclass(frozen=True)
class Change:
    """The ids of a change: `exact` and `family`, both "" where nothing but comments or layout differs."""

    exact: str
    family: str


def identify(before: bytes, after: bytes) -> Change:
    """The ids of the change from one train.py to another. SyntaxError if one of them is no Python."""
    before, after = normalised(before), normalised(after)
    old, new = definitions(before), definitions(after)
    touched = sorted(
        (name, *(_digest(side[name].canonical) if name in side else "" for side in (old, new)))
        for name in {*old, *new}
        if name not in old or name not in new or old[name].canonical != new[name].canonical
    )
    if not touched:
        return Change("", "")
    return Change(_digest(repr(touched)), _digest(repr(_lines_by_definition(before, after, old, new))))


def _lines_by_definition(before: bytes, after: bytes, old: dict, new: dict) -> list[tuple]:
    """(definition, lines removed, lines added) of each run of changed lines, comments and blank lines left out."""
    here, there = lines_of(before), lines_of(after)
    places = {}
    for first, end, start, stop in changed_lines(here, there):
        for mark, lines, at, known in (("-", here, range(first, end), old), ("+", there, range(start, stop), new)):
            for number in at:
                text = lines[number].decode(errors="replace").rstrip()
                if text and not text.lstrip().startswith("#"):
                    places.setdefault(_enclosing(number + 1, known), []).append(f"{mark}{text}")
    return sorted((name, sorted(lines)) for name, lines in places.items())


def _enclosing(line: int, known: dict[str, Definition]) -> str:
    return next((name for name, definition in known.items() if line in definition.lines), MODULE)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:ID]


# --- Lines ---


def lines_of(content: bytes) -> list[bytes]:
    """The lines of a text with their ends."""
    return content.splitlines(keepends=True) if b"\r" not in content else re.findall(rb"[^\n]*\n|[^\n]+", content)


def changed_lines(before: Sequence[bytes], after: Sequence[bytes]) -> list[tuple[int, int, int, int]]:
    """(first and end of the lines before, first and end of those after) of each place that differs."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [(first, end, start, stop) for tag, first, end, start, stop in matcher.get_opcodes() if tag != "equal"]


def diff(before: bytes, after: bytes) -> str:
    """A unified diff of train.py; "" if nothing differs."""
    sides = [[line.decode(errors="surrogateescape") for line in lines_of(normalised(side))] for side in (before, after)]
    rows = difflib.unified_diff(sides[0], sides[1], f"a/{TRAIN}", f"b/{TRAIN}", n=CONTEXT)
    return "".join(row if row.endswith("\n") else f"{row}\n{NO_NEWLINE}" for row in rows)


def patched(content: bytes, patch: str) -> bytes:
    """A text after a unified diff that was made on just this text.

    Raises:
        LabError: it was made on another one, or is no diff.
    """
    if not (head := HEAD.match(patch)):
        raise LabError(f"its patch does not begin as one of {TRAIN}, and of nothing else")
    lines, rows = lines_of(content), [row + "\n" for row in patch[head.end() :].split("\n")[:-1]]
    result: list[bytes] = []
    at = row = 0
    while row < len(rows):
        if not (hunk := HUNK.match(rows[row])):
            raise LabError(f"its patch has more than hunks of {TRAIN}: {rows[row][:80]!r}")
        start, length, new_length = int(hunk[1]), int(hunk[2] or 1), int(hunk[4] or 1)
        start -= length > 0  # a hunk without old lines names the line before it
        old: list[bytes] = []
        new: list[bytes] = []
        last: list[list[bytes]] = []
        row += 1
        while row < len(rows) and (len(old) < length or len(new) < new_length or rows[row].startswith("\\")):
            mark, text = rows[row][:1], rows[row][1:].encode(errors="surrogateescape")
            if mark not in (" ", "-", "+", "\\"):
                raise LabError("its patch is cut short: a hunk lacks lines")
            if mark == "\\":
                for side in last:
                    side[-1] = side[-1].removesuffix(b"\n")
            else:
                last = [side for side, marks in ((old, " -"), (new, " +")) if mark in marks]
                for side in last:
                    side.append(text)
            row += 1
        if (len(old), len(new)) != (length, new_length):
            raise LabError("its patch is cut short: a hunk lacks lines")
        if start < at or lines[start : start + length] != old:
            raise LabError(f"its patch does not fit the {TRAIN} that it was made on, at line {start + 1}")
        result += lines[at:start] + new
        at = start + length
    return b"".join(result + lines[at:])
