"""Why something was decided: a code with its facts. Sentences are made of them here, and nowhere else.

What is recorded and compared is the code and the facts. A sentence may be reworded at any time.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from results import REFUSALS

Fact = bool | int | float | str | None


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """A code of TEXTS, and the facts that its sentence names."""

    code: str
    facts: dict[str, Fact] = {}

    def __str__(self) -> str:
        return sentence(self)


def because(code: str, **facts: Fact) -> Reason:
    """A reason. KeyError for a code that has no sentence."""
    TEXTS[code]
    return Reason(code, facts)


TEXTS: dict[str, str] = {
    **REFUSALS,
}


class _Missing(dict):
    def __missing__(self, name):
        return Unknown()


class Unknown:
    """In place of a fact that a record lacks."""

    def __format__(self, form: str) -> str:
        return "?"


def sentence(reason: Reason | None) -> str:
    """A reason in words; "" for none. A code that this version does not know is shown as it is."""
    if reason is None:
        return ""
    facts: Mapping = reason.facts
    text = TEXTS.get(reason.code)
    if text is None:
        return f"{reason.code} ({', '.join(f'{name} {value}' for name, value in facts.items())})"
    return text.format_map(_Missing({name: Unknown() if value is None else value for name, value in facts.items()}))
