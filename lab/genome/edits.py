"""Edits of train.py by definition and name, so that one applies to a file that was changed elsewhere, too.

    MATRIX_LR: 0.04 -> 0.03                    a variable of the block (block.py)
    @ Attention.forward                        a definition; below it, as in a diff, what is replaced in it
    -ops.attention(q, k, v, self.window)
    +ops.attention(gain * q, k, v, self.window)

A variable that has the first value, or one on the way to the second one, gets the second one. If it is there already or
beyond, nothing is done. From a value on the other side it makes the same step, on its scale, unless that leaves bounds
that a comment states. A pattern of windows gets the second one, unless its share of long ones is beyond that already.
The text that is replaced has to stand in its definition once, and may be a part of a line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from lab.errors import LabError
from lab.genome import block
from lab.genome.syntax import comments, definitions

STEP = re.compile(r"(?P<name>(?P<base>[A-Z][A-Z0-9_]*)(?:\[\d\])?): (?P<old>.+) -> (?P<new>.+)")
BEGINNINGS = ("def ", "async def ", "class ")
WIDER = 30  # times, at most, that bounds are widened for a step: they are where a search begins


class NotHere(LabError):
    """An edit does not apply to a train.py."""


class Already(NotHere):
    """What an edit does was done there before."""


@dataclass(frozen=True)
class Step:
    """A value of a variable of the block: `name`, and before and after as source text."""

    name: str
    old: str
    new: str

    def apply(self, source: str, calibrated: Mapping) -> str:
        here = {variable.name: variable for variable in block.read(source)}.get(self.name)
        if here is None:
            there = re.search(rf"^{self.name.partition('[')[0]} *=", source, re.M)
            raise NotHere(f"{self.name} can't be read" if there else f"there is no hyperparameter {self.name}")
        old, new = (_variable(self.name, text) for text in (self.old, self.new))
        if here.kind == "choice":
            if new.kind != "choice":
                raise NotHere(f"{self.name} is written differently here: {here.written(here.value)}")
            if new.value == here.value or _beyond(*(block.resolved(one, calibrated) for one in (old, new, here))):
                raise Already(f"{self.name} is {block.resolved(here, calibrated)}")
            return block.write(source, {self.name: new.value})
        kinds = {variable.kind for variable in (old, new, here)} if here.text else set()
        if "choice" in (old.kind, new.kind) or {old.text, new.text} != {here.text} or len(kinds) > 1:
            raise NotHere(f"{self.name} is written differently here: {here.written(here.value)}")
        before, after, now = (float(variable.value) for variable in (old, new, here))
        if (now - after) * (after - before) >= 0:
            raise Already(f"{self.name} is {here.written(here.value)}")
        value = new.value
        if (before - now) * (after - before) > 0:
            if here.scale == "log" and here.kind != "decay" and min(before, after) <= 0:
                raise NotHere(f"{self.name} has a logarithmic range here, where zero has no place")
            for _ in range(WIDER):
                place = here.place(here.value) + here.place(new.value) - here.place(old.value)
                if abs(place - 0.5) <= 0.5 + 1e-9:
                    break
                if here.stated:
                    raise NotHere(f"{self.name} would leave the bounds that its comment states")
                here = here.wider()
            value = here.at(place)
            if value == here.value:
                raise NotHere(f"{self.name} is {here.written(value)} after this step, too")
        return block.write(source, {self.name: value})

    def meets(self, other: Step | Swap) -> bool:
        """Whether both write one variable."""
        if isinstance(other, Swap):
            return other.definition == self.name.partition("[")[0]
        return other.name == self.name


@dataclass(frozen=True)
class Swap:
    """A text within a definition, `old`, that becomes another, `new`."""

    definition: str
    old: str
    new: str

    def apply(self, source: str, calibrated: Mapping) -> str:
        known = definitions(source.encode()).get(self.definition)
        if known is None:
            raise NotHere(f"there is no {self.definition}")
        lines = source.split("\n")
        lines[:-1] = [line + "\n" for line in lines[:-1]]  # as ast counts them: str.splitlines knows more ends
        first, last = min(known.lines) - 1, max(known.lines)
        text = "".join(lines[first:last])
        if self.new in text if self.old in self.new else self.new and f"\n{self.new}\n" in f"\n{text}":
            raise Already(f"{self.definition} has it")
        begins, head = len("".join(lines[:first])), self.old.strip().split("\n")[0]
        places = [begins + found.start() for found in re.finditer(re.escape(self.old), text)]
        if places and not head.startswith(("#", '"""')):
            unread = comments(source)
            places = [place for place in places if not any(low <= place < high for low, high in unread)]
        if len(places) != 1:
            where = f"is {len(places)} times in" if places else "is not in the code of"
            raise NotHere(f"{head!r} {where} {self.definition}")
        if text.lstrip().startswith("@") and head.startswith(BEGINNINGS) and not self.new.strip().startswith(head):
            raise NotHere(f"{self.definition} has a decorator here, which would be another's")
        return source[: places[0]] + self.new + source[places[0] + len(self.old) :]

    def meets(self, other: Step | Swap) -> bool:
        """Whether one removes what the other needs."""
        if isinstance(other, Step):
            return other.meets(self)
        if other.definition != self.definition:
            return False
        return any(
            gone in line or line in gone
            for one, two in ((self, other), (other, self))
            for gone in one._removed()
            for line in two.old.split("\n")
        )

    def added(self) -> list[str]:
        """The lines that it adds, or the parts of lines, without the blanks around them."""
        before = self.old.split("\n")
        return [line.strip() for line in self.new.split("\n") if line.strip() and line not in before]

    def _removed(self) -> list[str]:
        kept = self.new.split("\n")
        return [line for line in self.old.split("\n") if line not in kept]


@dataclass(frozen=True)
class Edit:
    """Steps and swaps, in order. `text` is what it was read from."""

    parts: tuple[Step | Swap, ...]
    text: str

    def apply(self, source: str, calibrated: Mapping | None = None) -> str:
        """The edited source.

        Args:
            calibrated: what `defaults` are on the device, as far as that is known.

        Raises:
            Already: it was done there before. NotHere: it does not apply; the reason names the place.
        """
        from backends import surface  # here, because all the rest needs nothing but Python

        already, added = [], [line for part in self.parts if isinstance(part, Swap) for line in part.added()]
        lines = {line.strip() for line in source.split("\n")}
        there = bool(added) and lines.issuperset(added)  # if with others in between
        try:
            for part in self.parts:
                try:
                    if there and isinstance(part, Swap):
                        raise Already(f"{part.definition} has it")
                    source = part.apply(source, calibrated or {})
                except Already as error:
                    already.append(error)
            if len(already) == len(self.parts):
                raise already[0]
            if already:
                raise NotHere(f"a part of it is in the file already: {already[0]}")
            if found := surface.check(source):
                raise NotHere(f"it uses {found[0].found}, which not every backend has")
        except SyntaxError as error:
            raise NotHere(f"the result is not valid Python: {error.msg}") from None
        return source

    def meets(self, other: Edit) -> bool:
        """Whether two can't be made in one file: they set one variable, or replace the same text."""
        return any(one.meets(two) for one in self.parts for two in other.parts)


def read(text: str) -> Edit:
    """An edit from its text. LabError, with the line, if the text is not an edit."""
    parts: list[Step | Swap] = []
    places = re.split(r"^@ *", text.strip("\n"), flags=re.M)
    for line in filter(None, places[0].split("\n")):
        if not (found := STEP.fullmatch(line)):
            raise LabError(f"{line!r} is neither 'NAME: VALUE -> VALUE' nor '@ DEFINITION'")
        kinds = {_variable(found["name"], found[side]).kind == "choice" for side in ("old", "new")}
        if len(kinds) > 1:
            raise LabError(f"{line!r}: both values have to be numbers, or both a choice")
        parts.append(Step(found["name"], found["old"], found["new"]))
    for place in places[1:]:
        definition, *lines = place.strip("\n").split("\n")
        if wrong := [line for line in lines if line[:1] not in ("-", "+", " ")]:
            raise LabError(f"{wrong[0]!r} begins with none of '-', '+' and ' '")
        sides = ("\n".join(line[1:] for line in lines if line[0] in (sign, " ")) for sign in "-+")
        parts.append(swap := Swap(definition.strip(), *sides))
        if not swap.old.strip() or swap.old == swap.new:
            raise LabError(f"nothing is replaced in {swap.definition!r}")
    if not parts:
        raise LabError("it changes nothing")
    return Edit(tuple(parts), text)


def _beyond(before, after, now) -> bool:
    """Whether a pattern of windows, `now`, goes as far as an edit would, by its share of long ones; not if one of them
    is not known."""
    if not (before and after and now):
        return False
    first, second, here = (pattern.count("L") / len(pattern) for pattern in (before, after, now))
    return first != second and (here - second) * (second - first) >= 0


def _variable(name: str, text: str) -> block.Variable:
    """What a value of a variable is, read as the block would read it."""
    base = name.partition("[")[0]
    with suppress(SyntaxError, ValueError):  # the latter of what no file may hold
        ast.parse(text, mode="eval")
        for variable in block.read(f"{base} = {text}\n"):
            if variable.name == base:
                return variable
    raise LabError(f"{name} can't be set to {text!r}")
