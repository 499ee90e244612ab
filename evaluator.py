"""What a model is asked before it is scored, and what its answers have to be like, whatever framework it is of."""

from __future__ import annotations

import math

import numpy as np

from dataset import inputs_and_targets
from results import Invalid
from storage import DataError

PROBED = 0.05  # part of the scored batches that is asked again with another ending
PROBED_ROWS = 16  # are asked so at least: of one or two, chance could ask all for random tokens
MASS_ROWS, MASS_TOKENS = 4, 512  # whose whole distributions are looked at


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> float:
    """Bits per byte from nats and bytes of each row. DataError if there is no text."""
    if sizes.sum() == 0:
        raise DataError("the rows hold no text, only special tokens; prepare another dataset")
    return float(nats.sum() / sizes.sum() / math.log(2))


def examine(
    asked,
    rows: np.ndarray,
    token_bytes: np.ndarray,
    batch_size: int,
    share: float = PROBED,
    said: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores rows, and refuses a model whose losses are not those of a causal language model, each row by itself.

    All batches, and some of them again, are asked in random order: so no question tells what it is for.

    - Rows of `share` of the batches (at least 16 rows) are cut at random and go on differently. Losses up to the cut
      have to stay: the place at the cut must not see its own target. Of n such rows three quarters ask for that target,
      so a look-ahead at a part f of all places is missed with a probability of (1 - 3f/4)^n.
    - In the other rows random tokens are asked for instead: at the cut, where that token follows, and before.
      They have to be improbable. That finds a model that knows its targets, or gives again what it has said before.
    - One batch is asked again with its rows moved and half of them replaced, and of some rows whole distributions are
      asked for, which have to fit the losses of their targets and of other tokens.

    Args:
        asked: has the methods of `Answers`. rows: (N, 2049). token_bytes: (V,), bytes of text in each token.
        said: float32 (N, 2048), to be filled with the nats of each target.

    Returns:
        Nats and bytes of the targets of each row, float64 (N,) both. Special tokens count in neither.
    """
    rng, vocab_size, batches = np.random.default_rng(), len(token_bytes), -(-len(rows) // batch_size)
    moved, whole, *cut = rng.permutation(
        np.resize(rng.permutation(batches), 2 + max(-(-PROBED_ROWS // batch_size), round(share * batches)))
    ).tolist()
    questions = [("score", i) for i in range(batches)] + [("moved", moved), ("whole", whole)]
    questions += [("cut", i) for i in cut]
    nats, sizes, compared = np.zeros(len(rows)), np.zeros(len(rows)), set([moved, *cut])
    values: dict[int, np.ndarray] = {}  # of batches that are asked twice
    repeated, ends, masses = np.zeros(1), [], np.ones(1)

    def ask(tokens, targets):
        told = asked.losses(tokens, targets)
        require_finite(told)
        return told

    for number in rng.permutation(len(questions)):
        what, i = questions[number]
        of = slice(i * batch_size, (i + 1) * batch_size)
        tokens, targets = inputs_and_targets(rows[of])
        B, T = tokens.shape
        row, place = np.arange(B)[:, None], np.arange(T)
        noise = rng.integers(0, vocab_size, (B, T), dtype=np.int32)
        if what == "score":
            told, counted = ask(tokens, targets), token_bytes[targets]
            nats[of] = told.sum(axis=1, where=counted > 0, dtype=np.float64)
            sizes[of] = counted.sum(axis=1, dtype=np.int64)
            if i in compared:
                values[i] = told
            if said is not None:
                said[of] = told
        elif what == "moved" and B > 1:
            neighbours = np.where(row % 2, np.roll(tokens, 1, axis=0), noise)
            repeated = ask(neighbours, np.roll(targets, 1, axis=0))[1::2]
        elif what == "moved":
            repeated = ask(tokens, targets)
        elif what == "whole":
            tokens, targets = tokens[:MASS_ROWS], targets[:MASS_ROWS]
            # Half of what is asked for is text from elsewhere, whose loss a model that sees its targets can't know.
            elsewhere = rows[rng.integers(0, len(rows), targets.shape), rng.integers(0, T + 1, targets.shape)]
            targets = np.where(rng.random(targets.shape) < 0.5, elsewhere, targets).astype(np.int32)
            places = np.sort(rng.choice(T, min(T, MASS_TOKENS), replace=False))
            logits, told = asked.logits(tokens, places), ask(tokens, targets)
            if logits.shape[2] != vocab_size:
                raise Invalid("logits_shape", shape=f"{logits.shape}", expected=f"{(len(tokens), T, vocab_size)}")
            masses = np.stack(
                [probability_mass(*of_row) for of_row in zip(logits, targets[:, places], told[:, places])]
            )
        elif what == "cut":
            cuts = rng.integers(0, T - 1, (B, 1))
            changed, after = cut_rows(rng, rows, np.arange(len(rows))[of], cuts, vocab_size)
            asked_for = np.where(place <= cuts, targets, np.roll(changed, -1, axis=1))
            wrong = (rng.random((B, 1)) < 0.25) & (place <= cuts) & ((rng.random((B, T)) < 1 / 32) | (place == cuts))
            asked_for[wrong] = np.where(place == cuts, after, noise)[wrong]
            told = ask(changed, asked_for)
            ends.append((i, told, (place <= cuts) & ~wrong, wrong & (asked_for != targets)))

    first, mixed = values[moved][:-1:2] if len(values[moved]) > 1 else values[moved], None
    try:
        require_equal(first, repeated, "mixes_rows")
    except Invalid as error:  # unless it differs from call to call, which explains all else
        first, mixed = values[moved], error
        repeated = ask(*inputs_and_targets(rows[moved * batch_size : (moved + 1) * batch_size]))
        require_equal(first, repeated, "not_repeatable")
    # What later tokens are masked out of repeats to the bit, or as well as two equal calls do.
    repeatable = 2e-3 + 10 * float(np.abs(first - repeated).max())
    for i, told, kept, _ in ends:
        if kept.any():  # a row cut at its first place may have been asked for a random token there
            require_equal(values[i][kept], told[kept], "looks_ahead", worst_allowed=repeatable)
    guessed = np.concatenate([np.exp(-told[wrong].astype(np.float64)) for _, told, _, wrong in ends])
    if guessed.sum() > 3 + 20 * len(guessed) / vocab_size:
        raise Invalid("sees_targets", mean=float(guessed.mean()), chance=1 / vocab_size)
    if mixed:
        raise mixed
    # Rounding in the matrix product scatters single tokens, not their mean.
    mean, worst = float(masses.mean()), float(np.abs(masses - 1).max())
    if not (abs(mean - 1) <= 1e-3 and worst <= 0.1):
        raise Invalid("not_normalised", mean=mean, worst=worst)
    return nats, sizes


def cut_rows(
    rng: np.random.Generator, rows: np.ndarray, which: np.ndarray, cuts: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of rows `which` (B,) up to their cuts (B, 1), int32 (B, T): then a token that does not follow in the
    row, which is returned too, (B, 1), and what follows in another row."""
    tokens, _ = inputs_and_targets(rows[which])
    (B, T), row = tokens.shape, np.arange(len(which))[:, None]
    if len(rows) == 1:
        others = rng.integers(0, vocab_size, (B, T))
    else:
        others = rows[(rng.integers(1, len(rows), B) + which) % len(rows), :-1]
    after = (tokens[row, cuts + 1] + rng.integers(1, vocab_size, (B, 1))) % vocab_size
    changed = np.where(np.arange(T) <= cuts, tokens, others.astype(np.int32))
    changed[row, cuts + 1] = after
    return changed, after


def compare_apart(
    asked, rows: np.ndarray, vocab_size: int, batch_size: int, places: np.ndarray, said: np.ndarray
) -> None:
    """Refuses a model whose losses `said` (N,) at `places` (N,) of the rows, in another process and before what follows
    them in text, are not those that it tells here before something else. Here these rows have not been seen yet: a
    model that looks ahead, and gives again what it has said so that nobody finds it, has nothing to give."""
    rng = np.random.default_rng()
    chosen = rng.permutation(len(rows))[: max(batch_size, round(PROBED * len(rows)))]
    told = []
    for which in np.split(chosen, range(batch_size, len(chosen), batch_size)):
        cuts, row = places[which][:, None], np.arange(len(which))[:, None]
        tokens, _ = cut_rows(rng, rows, which, cuts, vocab_size)
        targets = np.roll(tokens, -1, axis=1)
        targets[row, cuts] = rows[which[:, None], cuts + 1]
        told.append(asked.losses(tokens, targets)[row, cuts][:, 0])
    told = np.concatenate(told)
    require_finite(told)
    # Another process may compile other kernels, and ask for other batches at once: single tokens scatter.
    require_equal(said[chosen], told, "answers_apart", mean_allowed=0.02, worst_allowed=0.5)


def require_untrained(values: np.ndarray, vocab_size: int) -> None:
    """Refuses losses of a model that knows more than chance before it was trained."""
    require_finite(values)
    untrained, chance = float(values.mean(dtype=np.float64)), math.log(vocab_size)
    if untrained < 0.95 * chance:
        raise Invalid("warm_start", loss=untrained, chance=chance)


def require_finite(values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise Invalid("not_finite", count=int((~finite).sum()), total=values.size)


def require_equal(expected, actual, code: str, mean_allowed: float = 2e-3, worst_allowed: float = 0.1) -> None:
    """Refuses losses that should be equal and are not, in nats. By default they may be as far apart as of a kernel
    that sums in another order from call to call; less can't have won more than 2e-3 nats a token, 1e-3 bits a byte."""
    difference = np.abs(actual.astype(np.float64) - expected)
    mean, worst = float(difference.mean()), float(difference.max())
    if not (mean <= mean_allowed and worst <= worst_allowed):
        raise Invalid(code, worst=worst, mean=mean)


def probability_mass(logits: np.ndarray, targets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What the probabilities behind reported losses (T,) sum to if their ratios are those of the logits (T, V)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    logsumexp = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return np.exp(logsumexp - (logits[np.arange(len(targets)), targets] + values))
