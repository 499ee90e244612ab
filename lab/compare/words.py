"""Which changes are probably the same, by how they are described: where a ledger has words and nothing else.

A description becomes the words that name what is changed ("learning rate" and LR alike), the way it goes (up, down),
and the value that it ends at ("2^16", 65K and 65536 alike). Remarks in parentheses are left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LEAST = 0.6  # of likeness
OTHER_VALUE, NO_VALUE = 0.7, 0.85  # likeness is so much less where they end at different values, or one says none

PHRASES = dict(  # in a description: the word for it
    re.split(" *: *", phrase)
    for phrase in (
        "learning rate: lr, weight decay: wd, warm down: warmdown, cool down: warmdown, warm up: warmup, "
        "batch size: batch, lm head: unembedding, value embeddings?: ve, key value heads: kv heads, n kv head: kv heads"
    ).split(", ")
)
SYNONYMS = {
    word: words.split()[0]
    for words in (
        "batch batchsize, warmdown cooldown, embedding embed embeddings emb wte, unembedding unembed lmhead, "
        "attention attn, depth layers layer, window windows, beta betas, lr lrs, head heads, "
        "frac fraction ratio, init initialisation initialization, clip clipping"
    ).split(", ")
    for word in words.split()
}
UP = set(
    "increase increased raise raised higher more larger bigger longer wider deeper double doubled twice up "
    "add added enable enabled".split()
)
DOWN = set(
    "decrease decreased reduce reduced lower lowered less fewer smaller shorter narrower shallower halve halved half "
    "shrink cut down remove removed no without disable disabled drop dropped delete deleted".split()
)
EMPTY = set(
    "to from the a an of in with and by at for on is set use try change instead total size steps x than it as "
    "only".split()
)
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?(?:e-?\d+)?)(?:\s?(?:\^|\*\*)\s?(\d+))?(%|[kKmM](?!\w))?(?:x(?!\w))?")


@dataclass(frozen=True)
class Said:
    """What a description says: what is changed; the way, 1 up or -1 down or 0; the value it ends at, or None."""

    words: frozenset[str]
    way: int
    value: float | None


def said(text: str) -> Said:
    text = re.sub(r"\([^()]*\)", " ", text)
    numbers = [number for match in NUMBER.finditer(text) if (number := _number(match)) is not None]
    text = re.sub(r"[^a-z0-9]+", " ", NUMBER.sub(" ", text).lower()).strip()
    for phrase, word in PHRASES.items():
        text = re.sub(rf"\b{phrase}\b", word, text)
    words = [SYNONYMS.get(word, word) for word in text.split()]
    way = 1 if UP & set(words) else -1 if DOWN & set(words) else 0
    if way == 0 and len(numbers) == 2 and numbers[0] != numbers[1]:
        way = 1 if numbers[1] > numbers[0] else -1
    return Said(frozenset(words) - UP - DOWN - EMPTY, way, numbers[-1] if numbers else None)


def _number(match: re.Match) -> float | None:
    """None if it is too large for a float."""
    unit = (match[3] or "").lower()
    try:
        value = float(match[1]) ** int(match[2]) if match[2] and int(match[2]) < 64 else float(match[1])
        value *= {"%": 0.01, "k": 1e3, "m": 1e6}.get(unit, 1)
        if unit in ("k", "m"):  # 524K is 2^19
            power = 2.0 ** round(math.log2(value)) if value else 0.0
            if abs(power - value) <= 0.05 * value and value >= 2**15:
                return power
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def likeness(one: Said, other: Said) -> float:
    """The similarity of two descriptions, from 0 to 1; 0 for opposite directions."""
    if one.way * other.way < 0 or not one.words or not other.words:
        return 0.0
    shared = 2 * len(one.words & other.words) / (len(one.words) + len(other.words))
    if one.value is None and other.value is None:
        return shared
    if one.value is None or other.value is None:
        return shared * NO_VALUE
    return shared * (1 if math.isclose(one.value, other.value, rel_tol=0.02) else OTHER_VALUE)


def matches(ones: list[str], others: list[str]) -> list[tuple[int, int]]:
    """(place in one list, place in the other) of the descriptions that are each other's best match, and alike enough.
    Of several equally good ones the first."""
    left, right = [said(text) for text in ones], [said(text) for text in others]
    table = [[likeness(a, b) for b in right] for a in left]
    pairs = []
    for i, row in enumerate(table if others else []):
        j = max(range(len(row)), key=row.__getitem__)
        if row[j] >= LEAST and max(range(len(table)), key=lambda k: table[k][j]) == i:
            pairs.append((i, j))
    return pairs
