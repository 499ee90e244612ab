"""Output for any terminal and pipe: what its encoding lacks is spelt, and ends no command with an error."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

SPELT = {"±": "+-", "×": "x", "°": " deg ", "→": "->", "–": "-", "−": "-", "─": "-", "…": "...", "�": "?"}


def spell(error: UnicodeError) -> tuple[str, int]:
    """A handler of encoding errors (`codecs.register_error`): letters lose their accents, all else becomes "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    spelt = []
    for character in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        spelt.append(SPELT.get(character) or plain or "?")
    return "".join(spelt), error.end


def spell_what_is_missing() -> None:
    """Has standard output and errors use `spell`, whatever their encoding is."""
    codecs.register_error("spell", spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook stands in for it
            stream.reconfigure(errors="spell")
