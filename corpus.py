"""How a dataset is made, once: from a source of text to the files that prepare.py opens.

    python prepare.py                                   climbmix: 10 training shards and the pinned validation shard
    python prepare.py --dataset tinystories             smaller text for smaller hardware
    python prepare.py --dataset stdlib                  offline: the Python standard library's own source
    python prepare.py --dataset ~/notes --suffixes .md  your own: folders of text, or parquet files

A dataset is the folder `AUTORESEARCH_HOME`/data/NAME. In it lie:

    manifest.json        size and sha256 of the other files, the tags, and the command that makes them again
    tokenizer.json       the bytes of each token
    validation.npy       packed rows that score a run, uint16 (N, 2049)
    held_out.npy         the same from other documents; they confirm what is about to be kept
    train_*.tokens.npy   one training shard, flat uint16; each document begins with BOS
    train_*.lengths.npy  tokens of each document, BOS included, uint32
    train_*.batches.npy  documents in each refill of the packing buffer, uint32

A `Source` (sources.py) names the text of each part; `build` makes the parts that are missing, damaged or outdated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import sources
from dataset import (
    FORMAT,
    ROW,
    SPECIALS,
    SPLIT_PATTERN,
    VOCAB_SIZE,
    damage,
    load_tokenizer,
    pack,
    read_manifest,
    read_tokens,
    tags,
)
from sources import Documents, Source
from storage import DataError, atomic, digest_of, home, sha256, write_json

ARTIFACT = re.compile(r"(tokenizer\.json|(validation|held_out|train_\d+\.(tokens|lengths|batches))\.npy)(\..*tmp)?")
STORED_ROWS = 10_240  # of validation, and of held-out: 40 * 2^19 tokens, what the original's figures were made with
EXCERPT_CHARS = 10_000  # of each document, what the tokenizer learns from
SEGMENT_CHARS = 50_000  # what the regex engine gets at once: a blank ten times as long overflows its stack
PROGRESS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(24),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


# ---- Tokens ----


def train_tokenizer(path: Path, batches: Iterable[list[str]], max_chars: int) -> None:
    """Learns `VOCAB_SIZE` byte-pair tokens (fewer if the text has no more) and writes tokenizer.json.

    rustbpe breaks ties by token, not by order of arrival, so the same text gives the same merges on any machine.
    """
    import rustbpe

    def excerpts() -> Iterator[str]:
        chars = 0
        for text in itertools.chain.from_iterable(batches):
            excerpt = text[:EXCERPT_CHARS]
            yield excerpt
            chars += len(excerpt)
            if chars >= max_chars:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(excerpts(), VOCAB_SIZE - len(SPECIALS), pattern=SPLIT_PATTERN)
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokens = [bytes(token).hex() for token, _ in ranked]
    write_json(path, {"pattern": SPLIT_PATTERN, "specials": SPECIALS, "tokens": tokens})


def segments(text: str) -> Iterator[str]:
    """Cuts a giant document so that the regex engine's stack and the time per character stay bounded.

    A cut comes before a space that follows something else than whitespace. No pattern reaches across that place, so
    the tokens are those of the whole text; only a word or a blank longer than a segment is cut inside.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        end = start + SEGMENT_CHARS
        cut = text.rfind(" ", start + 1, end)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.rfind(" ", start + 1, cut)
        if cut < 0:
            cut = end
        yield text[start:cut]
        start = cut
    yield text[start:]


def encode(tokenizer, documents: list[str]) -> tuple[np.ndarray, list[int]]:
    """Tokens of all documents end to end, each beginning with BOS (uint16), and their lengths."""
    bos = np.array([tokenizer.n_vocab - len(SPECIALS)], np.uint32)
    found, lengths = [], []
    for text in documents:
        # Specials that occur in a text are ordinary characters there. This call lets other threads work and makes no
        # Python integers: 2.0 times as fast on two threads as on one, where `encode_ordinary` is 1.6 times.
        tokens = [tokenizer.encode_to_numpy(segment, disallowed_special=()) for segment in segments(text)]
        found += [bos, *tokens]
        lengths.append(1 + sum(map(len, tokens)))
    return np.concatenate(found).astype(np.uint16), lengths


def in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`map` over a thread pool that takes in at most `ahead` items before their results are used."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- The files of a dataset ----


def artifacts(stem: str) -> list[str]:
    """The files of a part: "tokenizer", "validation", "held_out" or "train_00000" and so on."""
    if stem == "tokenizer":
        return ["tokenizer.json"]
    if stem.startswith("train_"):
        return [f"{stem}.{kind}.npy" for kind in ("tokens", "lengths", "batches")]
    return [f"{stem}.npy"]


def write_rows(folder: Path, stem: str, encoded: Iterable[tuple[np.ndarray, list[int]]]) -> dict:
    """Packs the first `STORED_ROWS` rows and writes them; returns how many there are."""
    rows = list(itertools.islice(pack(encoded), STORED_ROWS))
    if not rows:
        raise DataError(f"too small: the {stem} documents don't fill one row of {ROW} tokens; use more text")
    with atomic(folder / f"{stem}.npy") as file:
        np.save(file, np.stack(rows))
    return {"rows": len(rows)}


def write_documents(folder: Path, stem: str, encoded: Iterable[tuple[np.ndarray, list[int]]]) -> dict:
    """Writes a shard's tokens as they come, then what is known about them; returns the counts."""
    lengths, batches = [np.empty(0, np.uint32)], []
    header = {"descr": "<u2", "fortran_order": False, "shape": (0,)}
    with atomic(folder / f"{stem}.tokens.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for tokens, sizes in encoded:
            file.write(tokens.astype("<u2", copy=False))
            lengths.append(np.array(sizes, np.uint32))
            batches.append(len(sizes))
        lengths = np.concatenate(lengths)
        total = int(lengths.sum(dtype=np.int64))
        file.seek(0)  # numpy pads the header to a length that stays the same while the first axis grows
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (total,)})
    with atomic(folder / f"{stem}.lengths.npy") as file:
        np.save(file, lengths)
    with atomic(folder / f"{stem}.batches.npy") as file:
        np.save(file, np.array(batches, np.uint32))
    return {"documents": len(lengths), "tokens": total}


def write_part(folder: Path, stem: str, source: Source, documents: Documents, pool, workers: int) -> dict:
    """Writes the files of one part; returns its counts."""
    if stem == "tokenizer":
        train_tokenizer(folder / "tokenizer.json", documents.batches(), source.tokenizer_chars)
        return {"vocabulary": len(read_tokens(folder)) + len(SPECIALS)}
    encoded = in_order(pool, partial(encode, load_tokenizer(folder)), documents.batches(), ahead=4 * workers)
    if stem.startswith("train_"):
        return write_documents(folder, stem, encoded)
    return write_rows(folder, stem, encoded)


# ---- Building a dataset ----


def build(source: Source, full: bool = False, workers: int | None = None, command: str = "") -> dict:
    """Makes what is missing, damaged or outdated of a dataset, makes it the current one and returns its manifest.

    The manifest is written before each part, without tags until the last is there: an interrupted run goes on where it
    was, and what it left is never taken for a whole dataset. With `full`, a score uses all rows that are stored.
    """
    folder = home() / "data" / source.name
    workers = max(1, workers or os.cpu_count() or 1)
    wanted = {"tokenizer": source.tokenizer, "validation": source.validation, "held_out": source.held_out}
    wanted |= {f"train_{i:05d}": documents for i, documents in enumerate(source.train)}
    settings = [VOCAB_SIZE, SPLIT_PATTERN, SPECIALS, SEGMENT_CHARS, source.tokenizer_chars, source.tokenizer.key]
    keys = {stem: digest_of(settings, documents.key) for stem, documents in wanted.items()}
    with ThreadPoolExecutor(workers) as pool:
        parts = intact_parts(folder, source, keys, pool)
        missing = [stem for stem in wanted if stem not in parts]
        manifest = {"format": FORMAT, "name": source.name, "origin": source.origin, "command": command, "parts": parts}
        downloads = {wanted[stem].download for stem in missing} - {None}
        # The hub's library shows its progress.
        list(pool.map(lambda download: sources.fetch(*download), sorted(downloads)))
        with Progress(*PROGRESS, transient=True, disable=not missing or not sys.stdout.isatty()) as bar:
            task = bar.add_task("", total=len(missing))
            for stem in missing:
                bar.update(task, description=f"making {stem}")
                write_json(folder / "manifest.json", manifest)
                started = time.time()
                counts = write_part(folder, stem, source, wanted[stem], pool, workers)
                text = ", ".join(f"{number:,} {unit}" for unit, number in counts.items())
                print(f"{stem}: {text} in {time.time() - started:.1f} s", flush=True)
                paths = [folder / name for name in artifacts(stem)]
                files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
                parts[stem] = {"key": keys[stem], "files": files, **counts}
                bar.advance(task)
    finish(folder, manifest, source.eval_rows, full)
    print(f"{source.name}: {'ready' if missing else 'all files are complete and intact'}")
    return manifest


def intact_parts(folder: Path, source: Source, keys: dict[str, str], pool: ThreadPoolExecutor) -> dict[str, dict]:
    """The parts that were made before from the same text in the same way, and whose files are whole."""
    try:
        old = read_manifest(folder)
    except DataError:
        return {}
    if old["origin"] != source.origin:
        raise DataError(f"{source.name} was prepared from {old['origin']}; choose another name with --name")
    try:
        if any(stem in keys and part["key"] != keys[stem] for stem, part in old["parts"].items()):
            refuse_if_used(old)
        parts = {stem: part for stem, part in old["parts"].items() if part["key"] == keys.get(stem)}
        stems, paths, known = [], [], []
        for stem, part in parts.items():
            for name, facts in part["files"].items():
                stems.append(stem)
                paths.append(folder / name)
                known.append(facts)
        for stem, problem in zip(stems, pool.map(damage, paths, known), strict=True):
            if problem:
                print(f"{problem}; it is made again")
                parts.pop(stem, None)
    except (KeyError, TypeError, AttributeError):  # as `dataset.opened` has it, which says to run this
        print(f"{folder / 'manifest.json'} is damaged; all is made again")
        return {}
    return parts if "tokenizer" in parts else {}  # its tokens are in all other parts


def refuse_if_used(manifest: dict) -> None:
    """DataError if a session of this home rests on a dataset, which would be replaced by what its folders hold now."""
    used = []
    for journal in sorted(home().glob("sessions/*/*/journal.jsonl")):
        with suppress(OSError, ValueError), open(journal, encoding="utf-8") as file:
            begun = json.loads(file.readline())
            if (begun.get("dataset"), begun.get("eval")) == (manifest["name"], manifest.get("eval_tag")):
                used.append("/".join(journal.parts[-3:-1]))
    if used:
        raise DataError(
            f"{manifest['name']} was prepared from other text than there is now, and this rests on it: "
            f"{', '.join(used[:3])}{', ...' * (len(used) > 3)}. Choose another name with --name; to replace it all the "
            f"same, after which these sessions can't go on, first remove {home() / 'data' / manifest['name']}"
        )


def finish(folder: Path, manifest: dict, eval_rows: tuple[int, ...], full: bool) -> None:
    """Gives a dataset whose parts are all there its tags, removes other files and makes it the current one."""
    parts = manifest["parts"]
    if not sum(part.get("tokens", 0) for part in parts.values()):
        raise DataError(
            "too small: no documents are left for training beside the validation and held-out rows; use more text"
        )
    rows = min(parts["validation"]["rows"], parts["held_out"]["rows"])
    manifest["eval_rows"] = rows if full else next((count for count in eval_rows if count <= rows), rows)
    manifest |= tags(manifest)
    write_json(folder / "manifest.json", manifest)
    listed = {name for part in parts.values() for name in part["files"]}
    for path in folder.iterdir():
        if path.name not in listed and ARTIFACT.fullmatch(path.name):
            path.unlink()
    with atomic(home() / "data" / "current") as file:
        file.write(manifest["name"].encode())


# ---- Command ----


def main(arguments: list[str]) -> int:
    """python prepare.py ARGUMENTS; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Prepares the data and the tokenizer. If it is run again, it repairs what is damaged.",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=["climbmix"],
        metavar="NAME_OR_PATH",
        help="climbmix (default), tinystories, stdlib, or your own files and folders",
    )
    parser.add_argument(
        "--num-shards", type=int, default=10, help="for climbmix: number of training shards (default 10)"
    )
    parser.add_argument(
        "--suffixes", nargs="+", default=sources.SUFFIXES, help="for folders: which files to read, e.g. .py .md"
    )
    parser.add_argument("--name", help="name of your own dataset (default: the name of the first path)")
    parser.add_argument("--full", action="store_true", help=f"score all stored validation rows, up to {STORED_ROWS:,}")
    parser.add_argument("--workers", type=int, help="number of threads (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        if options.dataset == ["climbmix"]:
            source = sources.climbmix(options.num_shards)
        elif options.dataset == ["tinystories"]:
            source = sources.tinystories()
        elif options.dataset == ["stdlib"]:
            source = sources.stdlib()
        else:
            source = sources.own_files(options.dataset, options.suffixes, options.name)
        command = shlex.join(["python", "prepare.py", *arguments])
        manifest = build(source, options.full, options.workers, command)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parts = manifest["parts"].values()
    documents = sum(part.get("documents", 0) for part in parts)
    tokens = sum(part.get("tokens", 0) for part in parts)
    print(f"training: {documents:,} documents, {tokens:,} tokens; a score uses {manifest['eval_rows']:,} rows")
    print(f"eval: {manifest['eval_tag']}  data: {manifest['data_tag']}  in {home() / 'data' / source.name}")
    return 0
