"""Generated text for tests, and datasets made from it."""

import random

import corpus
import prepare

WORDS = """the of model data loss step token learn rate gradient weight layer head query key value batch row night
small large train score keep seed noise agent clock budget device memory kernel matrix vector sum mean norm
sign root""".split()


def sentences(seed: int, count: int) -> str:
    """Text with structure to learn: some words follow others more often."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        start = rng.randrange(len(WORDS))
        words = [WORDS[(start + i * rng.choice((1, 1, 1, 2, 5))) % len(WORDS)] for i in range(rng.randint(4, 14))]
        lines.append(" ".join(words).capitalize() + f" {rng.randrange(100)}.\n")
    return "".join(lines)


def write_files(folder, texts, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}{suffix}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def prepared(*arguments) -> prepare.Data:
    """Runs prepare.py with these arguments and opens what it made."""
    assert corpus.main([str(argument) for argument in arguments]) == 0
    return prepare.open_data()
