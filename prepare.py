"""Data, loader, training clock and evaluator: the fixed part of an experiment, the same for every framework.

    python prepare.py                                   climbmix: 10 training shards and the pinned validation shard
    python prepare.py --dataset tinystories             smaller text for smaller hardware
    python prepare.py --dataset stdlib                  offline: the Python standard library's own source
    python prepare.py --dataset ~/notes --suffixes .md  your own: folders of text, or parquet files

Under `AUTORESEARCH_HOME`/data/NAME lie manifest.json (size and sha256 of the others), tokenizer.json, the packed rows
validation.npy (they score a run) and held_out.npy (they confirm a keep), uint16 (N, 2049), and for each training shard
train_*.tokens.npy (flat uint16, each document begins with BOS), .lengths.npy (of documents, BOS included) and
.batches.npy (documents per refill of the packing buffer). data/current names the dataset prepared last.

    data = open_data(); loader = Loader(data, batch_size); clock = Clock(backend, model, loader)
    while not clock.finished:
        x, y = next(loader); ...; clock.tick(float(loss))
    evaluate_bpb(backend, model, data, clock=clock); report(clock, num_params=..., flops_per_token=..., depth=...)
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import sys
import sysconfig
import threading
import time
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

MAX_SEQ_LEN = 2048  # tokens a row trains on; stored rows have one more, because targets are shifted by one
TIME_BUDGET = 300  # seconds of training
VOCAB_SIZE = 8192
EVALUATOR_VERSION = 1  # raise it whenever the same weights would score differently
FORMAT = 1  # of the files on disk
ROW = MAX_SEQ_LEN + 1
BUFFER_DOCUMENTS, REFILL_DOCUMENTS = 1000, 128  # what the packer chooses from; what it takes in at once
STORED_ROWS = 10_240  # of validation, and of held-out: 40 * 2^19 tokens, what the original's figures were made with
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = [f"<|reserved_{i}|>" for i in range(4)]  # the first is BOS; their ids follow the merges'
EXCERPT_CHARS = 10_000  # of each document, what the tokenizer learns from
SEGMENT_CHARS = 50_000  # what the regex engine gets at once: a blank ten times as long overflows its stack
DOCUMENT_CHARS = 6_000  # a text file is cut at the first line end after as many: short documents pack without waste
SUFFIXES = [".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"]
CLIMBMIX, CLIMBMIX_LAST = "karpathy/climbmix-400b-shuffle", 6542  # the last shard is for validation
TINYSTORIES, TINYSTORIES_FILE = "karpathy/tinystories-gpt4-clean", "tinystories_gpt4_clean.parquet"
PROBE_ROWS = 4  # rows the model is examined with before it is scored


class DataError(Exception):
    """Data are missing, damaged or too small; the message says what to do next."""


class Invalid(Exception):
    """The clock or the evaluator refuses to score this run; the message is the reason."""


class Diverged(Exception):
    """The training loss is not finite, or exploded."""


def home() -> Path:
    """The folder that everything is kept under: `AUTORESEARCH_HOME`, else ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch").expanduser()


def budget() -> float:
    """Seconds of training: `AUTORESEARCH_BUDGET` (for trials), else `TIME_BUDGET`. ValueError if not positive."""
    text = os.environ.get("AUTORESEARCH_BUDGET") or str(TIME_BUDGET)
    if not re.fullmatch(r"\d*\.?\d+", text.strip()) or not float(text):
        raise ValueError(f"AUTORESEARCH_BUDGET must be a positive number of seconds, not {text!r}")
    return float(text)


# ---- Files: written whole or not at all, known by their sha256 ----

@contextmanager
def whole(path: Path):
    """A binary file to write that appears at `path` complete or, on any failure, not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"could not write {path} ({error}); make room on that disk and run the same again") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with whole(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def digest_of(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def damage(path: Path, known: dict) -> str | None:
    """What is wrong with a file whose size and sha256 are known, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != known["size"]:
        return f"{path} has {path.stat().st_size:,} bytes instead of {known['size']:,}"
    return None if sha256(path) == known["sha256"] else f"{path} is damaged: its sha256 is not the manifest's"


# ---- Tokenizer ----

def train_tokenizer(path: Path, batches: Iterable[list[str]], max_chars: int) -> None:
    """Learns `VOCAB_SIZE` byte-pair tokens (fewer if the text has no more) and writes tokenizer.json.

    rustbpe breaks ties by token, not by order of arrival, so the same text gives the same merges on any machine.
    """
    import rustbpe

    def excerpts():
        chars = 0
        for text in itertools.chain.from_iterable(batches):
            yield text[:EXCERPT_CHARS]
            chars += min(len(text), EXCERPT_CHARS)
            if chars >= max_chars:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(excerpts(), VOCAB_SIZE - len(SPECIALS), pattern=SPLIT_PATTERN)
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokens = [bytes(token).hex() for token, _ in ranked]
    write_json(path, {"pattern": SPLIT_PATTERN, "specials": SPECIALS, "tokens": tokens})


def read_tokens(folder: Path) -> list[bytes]:
    """The bytes of each token in order of rank, specials left out."""
    return [bytes.fromhex(token) for token in json.loads((folder / "tokenizer.json").read_text())["tokens"]]


def load_tokenizer(folder: Path):
    """The tiktoken Encoding of a prepared dataset."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(read_tokens(folder))}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def segments(text: str) -> Iterator[str]:
    """Cuts a giant document so that the regex engine's stack and the time per character stay bounded.

    A cut comes before a space that follows something else than whitespace. No pattern reaches across that place, so
    the tokens are those of the whole text; only a word or a blank longer than a segment is cut inside.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        end = cut = start + SEGMENT_CHARS
        while (cut := text.rfind(" ", start + 1, cut)) > 0 and text[cut - 1].isspace():
            pass
        yield text[start : (start := cut if cut > 0 else end)]
    yield text[start:]


def encode(tokenizer, documents: list[str]) -> tuple[np.ndarray, list[int]]:
    """Tokens of all documents end to end, each beginning with BOS (uint16), and their lengths."""
    bos, found, lengths = np.array([tokenizer.n_vocab - len(SPECIALS)], np.uint32), [], []
    for text in documents:
        # Specials that occur in a text are ordinary characters there. This call lets other threads work and makes no
        # Python integers: 2.0 times as fast on two threads as on one, where `encode_ordinary` is 1.6 times.
        tokens = [tokenizer.encode_to_numpy(segment, disallowed_special=()) for segment in segments(text)]
        found += [bos, *tokens]
        lengths.append(1 + sum(map(len, tokens)))
    return np.concatenate(found).astype(np.uint16), lengths


def in_order(pool, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`map` over a thread pool that takes in at most `ahead` items before their results are used."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- Packing ----

def pack(batches: Iterable[tuple[np.ndarray, list[int]]]) -> Iterator[np.ndarray]:
    """Packs batches (documents end to end, each with its BOS; their lengths) into full rows, uint16 (2049,).

    A row takes the longest buffered document that fits, the earliest on ties; if none fits, the shortest, cropped. The
    buffer is refilled by whole batches before each choice. These are the rows of the original's `make_dataloader`
    (karpathy/autoresearch) in its order; it scans a list where here documents stand on a shelf by length. When batches
    run out, the buffer drains and an unfinished last row is dropped.
    """
    batches, stored = iter(batches), 0
    shelf, lengths = defaultdict(deque), []  # length -> documents, the earliest first; the shelf's lengths, ascending
    while True:
        row, filled = np.empty(ROW, np.uint16), 0
        while filled < ROW:
            while stored < BUFFER_DOCUMENTS and (batch := next(batches, None)) is not None:
                tokens, start = batch[0], 0
                for length in batch[1]:
                    if length not in shelf:
                        insort(lengths, length)
                    shelf[length].append((tokens, start))
                    start += length
                stored += len(batch[1])
            if not stored:
                return
            room = ROW - filled
            index = max(bisect_right(lengths, room) - 1, 0)  # 0, the shortest, also when none fits
            length = lengths[index]
            tokens, start = shelf[length].popleft()
            if not shelf[length]:
                del shelf[length], lengths[index]
            stored -= 1
            taken = min(length, room)
            row[filled : filled + taken] = tokens[start : start + taken]
            filled += taken
        yield row


# ---- Sources of text ----

class Documents(NamedTuple):
    """Text that can be read again."""

    key: str  # names the content: equal keys, equal documents
    batches: Callable[[], Iterator[list[str]]]  # starts reading; lists of at most REFILL_DOCUMENTS documents
    download: tuple[str, str] | None = None  # (repository, file) that must be there first


class Source(NamedTuple):
    """A dataset before it is prepared."""

    name: str
    origin: str  # tells two datasets of the same name apart
    train: list[Documents]
    validation: Documents
    held_out: Documents
    eval_rows: tuple[int, ...]  # how many rows a score uses: the first number that both sets can fill
    tokenizer_chars: int = 250_000_000  # of train[0], what the tokenizer learns from


def refills(documents: list[str]) -> Iterator[list[str]]:
    return (documents[i : i + REFILL_DOCUMENTS] for i in range(0, len(documents), REFILL_DOCUMENTS))


def read_parquet(path: Path, span=lambda rows: (0, rows), keep=lambda text: True) -> Iterator[list[str]]:
    """Documents of the `text` column in batches that never cross row groups; those of a span, those to keep."""
    import pyarrow.parquet

    try:
        file, first = pyarrow.parquet.ParquetFile(path), 0
        start, stop = span(file.metadata.num_rows)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, rows)
            first += rows
            if low < high:
                column = file.read_row_group(group, columns=["text"]).column("text").slice(low, high - low)
                yield from refills([text for text in strings(column) if keep(text)])
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} is damaged, or has no column of strings named `text` ({error})") from error


def strings(column) -> list[str]:
    """A parquet column as Python strings: what is not UTF-8 (lone surrogates too) is replaced, null is empty."""
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        return [(raw or b"").decode("utf-8", "replace") for raw in column.cast("binary").to_pylist()]


def is_parquet(path: Path) -> bool:
    """Whether a file has parquet's mark at both ends; one that was cut short has lost the second."""
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, path.stat().st_size - 4))
        return len(head) == 8 and head[:4] == file.read() == b"PAR1"


def downloaded(repository: str, name: str) -> Path:
    return home() / "downloads" / repository.replace("/", "--") / name


def on_hub(repository: str, name: str, span=lambda rows: (0, rows), key: str = "all") -> Documents:
    read = partial(read_parquet, downloaded(repository, name), span)
    return Documents(f"{repository}/{name} {key}", read, (repository, name))


def climbmix(num_shards: int) -> Source:
    """The original's data. The tokenizer learns from the first shard alone, so that neither it nor the eval tag depends
    on `num_shards`; validation rows come from the first half of the pinned shard, held-out rows from the second."""
    if not 1 <= num_shards <= CLIMBMIX_LAST:
        raise DataError(f"--num-shards must be from 1 to {CLIMBMIX_LAST}, not {num_shards}")
    train = [on_hub(CLIMBMIX, f"shard_{i:05d}.parquet") for i in range(num_shards)]
    pinned = partial(on_hub, CLIMBMIX, f"shard_{CLIMBMIX_LAST:05d}.parquet")
    halves = pinned(lambda rows: (0, rows // 2), "first half"), pinned(lambda rows: (rows // 2, rows), "second half")
    return Source("climbmix", CLIMBMIX, train, *halves, (768,), 1_000_000_000)


def tinystories() -> Source:
    """Short stories in random order; their publisher recommends these ranges as training, validation and test sets."""
    part = partial(on_hub, TINYSTORIES, TINYSTORIES_FILE)
    ranges = [(20_000, 10**9), (10_000, 20_000), (0, 10_000)]
    train, validation, held_out = (part(lambda rows, span=span: span, str(span)) for span in ranges)
    return Source("tinystories", TINYSTORIES, [train], validation, held_out, (768,))


def stdlib() -> Source:
    """The source of this Python's standard library: about 30 MB of real text that every machine has."""
    excluded = ("site-packages", "dist-packages", "__pycache__")
    return text_source("stdlib", "stdlib", [Path(sysconfig.get_paths()["stdlib"])], [".py"], excluded, (128,))


def own_files(paths: list[str], suffixes: list[str], name: str | None) -> Source:
    """A dataset of the user's: parquet files, or folders of text (and single text files)."""
    found = [Path(path).expanduser().resolve() for path in paths]
    if missing := [str(path) for path in found if not path.exists()]:
        raise DataError(f"{', '.join(missing)}: no such path; --dataset takes climbmix, tinystories, stdlib or paths")
    more = f"-and-{len(found) - 1}" if len(found) > 1 else ""
    name = name or re.sub(r"\W+", "-", found[0].stem).strip("-") + more
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("current", "climbmix", "tinystories", "stdlib"):
        raise DataError(f"{name!r} can't be its name; choose another with --name")
    origin, parquet = " ".join(map(str, found)), [path.is_file() and path.suffix == ".parquet" for path in found]
    if any(parquet) and not all(parquet):
        raise DataError("give either parquet files or text, not both in one dataset")
    if any(parquet):
        return parquet_source(name, origin, found)
    return text_source(name, origin, found, suffixes, ("__pycache__",), (768, 128))


def parquet_source(name: str, origin: str, paths: list[Path]) -> Source:
    """Parquet files. A hash of each document decides: 5 % are validation, 5 % held-out, so copies stay together."""
    if broken := [str(path) for path in paths if not is_parquet(path)]:
        raise DataError(f"{', '.join(broken)}: not a whole parquet file (half-downloaded?); fetch it again")

    def documents(chosen: list[Path], low: int, high: int) -> Documents:
        keep = lambda text: low <= hashlib.sha256(text.encode()).digest()[0] < high  # noqa: E731
        read = lambda: itertools.chain.from_iterable(read_parquet(path, keep=keep) for path in chosen)  # noqa: E731
        return Documents(digest_of(low, high, [sha256(path) for path in chosen]), read)

    train = [documents([path], 26, 256) for path in paths]
    return Source(name, origin, train, documents(paths, 0, 13), documents(paths, 13, 26), (768, 128))


def text_files(roots: list[Path], suffixes: list[str], excluded: tuple[str, ...]) -> Iterator[Path]:
    """Files with one of the suffixes under the folders; hidden and excluded folders left out, links not followed."""
    yield from (root for root in roots if root.is_file())
    for folder, below, names in itertools.chain.from_iterable(map(os.walk, roots)):
        below[:] = [name for name in below if name not in excluded and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if name.endswith(tuple(suffixes)))
        yield from (path for path in paths if path.is_file())


def read_text(path: Path) -> tuple[str, str | None]:
    """sha256 and text of a file; the text is None if it can't be read as UTF-8."""
    try:
        raw = path.read_bytes()
        return hashlib.sha256(raw).hexdigest(), raw.decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return "", None


def text_source(name: str, origin: str, roots, suffixes, excluded, eval_rows) -> Source:
    """Text files in the order of their hashes, wherever they lie; exact duplicates and empty files dropped.

    The first files are validation, the next held-out, each 5 % of the text: small sets 50 kB if that is at most 20 %.
    """
    found, skipped = {}, []
    for path in text_files(roots, suffixes, excluded):
        digest, text = read_text(path)
        if text is None:
            skipped.append(path.name)
        elif text:
            found[digest] = path, len(text)
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8 text: {', '.join(sorted(skipped)[:3])} ...")
    ordered = sorted(found)
    ends = np.cumsum([found[digest][1] for digest in ordered])
    share = min(max(0.05 * ends[-1], 50_000), 0.2 * ends[-1]) if found else 0
    first = 1 + int(np.searchsorted(ends, share))
    second = 1 + first + int(np.searchsorted(ends[first:] - ends[first - 1], share)) if first < len(ends) else first
    if second >= len(ends):
        raise DataError(
            f"too small: {len(ends)} different files ending in {' '.join(suffixes)} under {origin} don't suffice for "
            "training, validation and held-out rows; add text, or other endings with --suffixes"
        )

    def read(chosen: list[str]) -> Iterator[list[str]]:
        for digest in chosen:
            now, text = read_text(found[digest][0])
            if now != digest:
                raise DataError(f"{found[digest][0]} changed while it was being read; run the same again")
            yield from refills(list(pieces(text)))

    parts = ordered[second:], ordered[:first], ordered[first:second]
    train, validation, held_out = (Documents(digest_of(DOCUMENT_CHARS, part), partial(read, part)) for part in parts)
    return Source(name, origin, [train], validation, held_out, eval_rows)


def pieces(text: str) -> Iterator[str]:
    """A text file cut into documents, each at the first line end after `DOCUMENT_CHARS` characters."""
    start = 0
    while start < len(text):
        yield text[start : (start := text.find("\n", start + DOCUMENT_CHARS) + 1 or len(text))]


# ---- Downloads ----

def retrying(action: Callable, what: str, attempts: int = 5):
    """Calls the hub, again after 1, 2, 4, 8 s when it is busy or the connection breaks."""
    for attempt in range(attempts):
        try:
            return action()
        except Exception as error:  # its HTTP library, and with it the exceptions, differ between versions
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", 500)
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            if status < 500 and status not in (408, 429):
                raise DataError(f"the hub has no {what} for us: {reason}; check the name and HF_ENDPOINT") from error
        if attempt + 1 < attempts:
            print(f"{what}: {reason}; trying again")
            time.sleep(2**attempt)
    raise DataError(
        f"could not download {what}: {reason}. Run the same again later, set HF_ENDPOINT to a mirror, "
        "or work offline with: python prepare.py --dataset stdlib"
    )


def fetch(repository: str, name: str) -> None:
    """Brings a parquet file of a dataset repository to `downloaded(repository, name)`, whole and checked.

    A file already there stays if it is what the hub has or, while the hub can't be asked, if it is whole.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    path, what = downloaded(repository, name), f"{repository}/{name}"
    url = hf_hub_url(repository, name, repo_type="dataset")
    there = path.is_file() and is_parquet(path)
    try:
        etag = retrying(lambda: get_hf_file_metadata(url), what, attempts=1 if there else 5).etag or ""
    except DataError as error:
        if not there:
            raise
        return print(f"using {path} as it is: {error}")
    expected = etag if re.fullmatch("[0-9a-f]{64}", etag) else None  # of large files, the sha256
    if path.exists() and not (there and expected in (None, sha256(path))):
        print(f"{path} is not what the hub has; downloading it again")
        path.unlink()
    if not path.exists():
        retrying(partial(hf_hub_download, repository, name, repo_type="dataset", local_dir=path.parent), what)
    if not is_parquet(path) or expected not in (None, sha256(path)):
        path.unlink()
        raise DataError(f"what came as {what} is not a whole parquet file of the hub's sha256; deleted: run it again")


# ---- Preparing a dataset ----

def read_manifest(folder: Path) -> dict:
    """The manifest of a dataset. DataError if it is missing, unreadable or another dataset's."""
    again = f"run: python prepare.py --dataset {folder.name}"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        name, version, again = manifest["name"], manifest["format"], f"run: {manifest['command']}"
        manifest["origin"], manifest["parts"]  # noqa: B018 (there, or it is no manifest)
    except FileNotFoundError:
        raise DataError(f"there is no dataset {folder.name} in {folder.parent}; {again}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / 'manifest.json'} can't be read ({error!r}); {again}") from error
    if (name, version) != (folder.name, FORMAT):
        raise DataError(f"{folder} holds another dataset's manifest: {name}, format {version}; {again}")
    return manifest


def write_part(folder: Path, stem: str, encoded: Iterable[tuple[np.ndarray, list[int]]]) -> dict:
    """Writes training tokens as they come, or packed rows; returns the counts."""
    if not stem.startswith("train_"):
        rows = list(itertools.islice(pack(encoded), STORED_ROWS))
        if not rows:
            raise DataError(f"too small: the {stem} documents don't fill one row of {ROW} tokens; use more text")
        with whole(folder / f"{stem}.npy") as file:
            np.save(file, np.stack(rows))
        return {"rows": len(rows)}

    lengths, batches, header = [np.empty(0, np.uint32)], [], {"descr": "<u2", "fortran_order": False, "shape": (0,)}
    with whole(folder / f"{stem}.tokens.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for tokens, counts in encoded:
            file.write(tokens.astype("<u2", copy=False))
            lengths.append(np.array(counts, np.uint32))
            batches.append(len(counts))
        lengths = np.concatenate(lengths)
        total = int(lengths.sum(dtype=np.int64))
        file.seek(0)  # numpy pads the header to a length that stays the same while the first axis grows
        np.lib.format.write_array_header_1_0(file, header | {"shape": (total,)})
    for kind, array in (("lengths", lengths), ("batches", np.array(batches, np.uint32))):
        with whole(folder / f"{stem}.{kind}.npy") as file:
            np.save(file, array)
    return {"documents": len(lengths), "tokens": total}


def artifacts(stem: str) -> list[str]:
    if stem.startswith("train_"):
        return [f"{stem}.{kind}.npy" for kind in ("tokens", "lengths", "batches")]
    return ["tokenizer.json" if stem == "tokenizer" else f"{stem}.npy"]


def prepare(source: Source, full: bool = False, workers: int | None = None, command: str = "") -> dict:
    """Builds what is missing, damaged or outdated of a dataset, makes it the current one and returns its manifest.

    The manifest is written after each part, without tags until the last: an interrupted run goes on where it was, and
    what it left is never taken for a whole dataset.
    """
    folder, workers = home() / "data" / source.name, workers or os.cpu_count() or 1
    try:
        old = read_manifest(folder)
    except DataError:
        old = {"origin": source.origin, "parts": {}}
    if old["origin"] != source.origin:
        raise DataError(f"{source.name} was prepared from {old['origin']}; choose another name with --name")
    wanted = {"tokenizer": source.train[0], "validation": source.validation, "held_out": source.held_out}
    wanted |= {f"train_{i:05d}": documents for i, documents in enumerate(source.train)}
    settings = [VOCAB_SIZE, SPLIT_PATTERN, SPECIALS, SEGMENT_CHARS, source.tokenizer_chars, source.train[0].key]
    keys = {stem: digest_of(settings, documents.key) for stem, documents in wanted.items()}
    manifest = {"format": FORMAT, "name": source.name, "origin": source.origin, "command": command, "parts": {}}
    with ThreadPoolExecutor(workers) as pool:
        good = {stem: part for stem, part in old["parts"].items() if part["key"] == keys.get(stem)}
        checks = [(stem, folder / name, known) for stem in good for name, known in good[stem]["files"].items()]
        for stem, problem in pool.map(lambda check: (check[0], damage(*check[1:])), checks):
            if problem:
                print(f"{problem}; making it again")
                good.pop(stem, None)
        good = good if "tokenizer" in good else {}  # its tokens are in all other parts
        needed = {documents.download for stem, documents in wanted.items() if stem not in good} - {None}
        list(pool.map(lambda download: fetch(*download), sorted(needed)))
        for stem, documents in wanted.items():
            if stem not in good:
                write_json(folder / "manifest.json", manifest)
                started = time.time()
                if stem == "tokenizer":
                    train_tokenizer(folder / "tokenizer.json", documents.batches(), source.tokenizer_chars)
                    counts = {"vocabulary": len(read_tokens(folder)) + len(SPECIALS)}
                else:
                    run = partial(encode, load_tokenizer(folder))
                    counts = write_part(folder, stem, in_order(pool, run, documents.batches(), 4 * workers))
                print(f"{stem}: {counts} in {time.time() - started:.1f} s", flush=True)
                paths = [folder / name for name in artifacts(stem)]
                files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
                manifest["parts"][stem] = {"key": keys[stem], "files": files, **counts}
            else:
                manifest["parts"][stem] = good[stem]
    if not sum(part.get("tokens", 0) for part in manifest["parts"].values()):
        raise DataError("too small: no training documents are left beside validation and held-out; use more text")
    rows = min(manifest["parts"][stem]["rows"] for stem in ("validation", "held_out"))
    manifest["eval_rows"] = rows if full else next((count for count in source.eval_rows if count <= rows), rows)
    manifest |= tags(manifest)
    write_json(folder / "manifest.json", manifest)
    listed = {"manifest.json"} | {name for stem in wanted for name in artifacts(stem)}
    for path in folder.iterdir():
        if path.name not in listed:
            path.unlink()
    with whole(home() / "data" / "current") as file:
        file.write(source.name.encode())
    print(f"{source.name}: {'ready' if len(good) < len(wanted) else 'all was there and whole'}")
    return manifest


def tags(manifest: dict) -> dict:
    """Eval tag: tokenizer, validation rows, how many of them are scored, evaluator. Data tag: training documents."""
    digests = {name: known["sha256"] for part in manifest["parts"].values() for name, known in part["files"].items()}
    scored = digests["tokenizer.json"], digests["validation.npy"], manifest["eval_rows"], EVALUATOR_VERSION
    trained = digests["tokenizer.json"], [digests[name] for name in sorted(digests) if name.startswith("train_")]
    return {"eval_tag": digest_of(*scored)[:12], "data_tag": digest_of(*trained)[:12]}


# ---- Data and loader ----

class Data:
    """A prepared dataset, opened with `open_data`.

    Attributes:
        vocab_size, bos: number of tokens; the token each document begins with.
        token_bytes: int32 (vocab_size,), bytes of text in each token, 0 for specials.
        eval_tag, data_tag: scores compare within one eval tag; equal data tags, equal training documents.
        eval_rows: rows that a score uses, the first of those stored.
        validation_rows, held_out_rows: uint16 (N, 2049), memory-mapped.
        train: per shard (tokens, lengths, batches), flat arrays as at the head of this file.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.name, self.eval_rows = folder, manifest["name"], manifest["eval_rows"]
        self.eval_tag, self.data_tag = manifest["eval_tag"], manifest["data_tag"]
        tokens = read_tokens(folder)
        self.bos, self.vocab_size = len(tokens), len(tokens) + len(SPECIALS)
        self.token_bytes = np.array([*map(len, tokens), *(0 for _ in SPECIALS)], np.int32)

        def array(name):  # a plain view of the mapped file: slicing np.memmap itself takes several times as long
            return np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))

        self.validation_rows, self.held_out_rows = array("validation.npy"), array("held_out.npy")
        stems = sorted(stem for stem in manifest["parts"] if stem.startswith("train_"))
        self.train = [tuple(map(array, artifacts(stem))) for stem in stems]

    @cached_property
    def tokenizer(self):
        """The tiktoken Encoding, built when first asked for."""
        return load_tokenizer(self.folder)

    def batches(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """The training documents once, in order, as `pack` takes them."""
        for tokens, lengths, batches in self.train:
            document = token = 0
            for count in batches.tolist():
                sizes = lengths[document : document + count].tolist()
                yield tokens[token : token + sum(sizes)], sizes
                document, token = document + count, token + sum(sizes)


def open_data(name: str | None = None) -> Data:
    """Opens a prepared dataset: `name`, else `AUTORESEARCH_DATA`, else the one prepared last.

    Raises:
        DataError: it is missing, or a file is not as the manifest says; the message has the command to run.
    """
    current = home() / "data" / "current"
    name = name or os.environ.get("AUTORESEARCH_DATA") or (current.read_text().strip() if current.is_file() else None)
    if not name:
        raise DataError("no dataset is prepared yet; run: python prepare.py (offline: --dataset stdlib)")
    folder = home() / "data" / name
    manifest = read_manifest(folder)
    again = f"run: {manifest['command']}"
    if "eval_tag" not in manifest:
        raise DataError(f"preparing {name} was interrupted; {again}")
    if not tags(manifest).items() <= manifest.items():
        raise DataError(f"the tags in {folder / 'manifest.json'} are not those of its files; {again}")
    files = [(folder / name, known) for part in manifest["parts"].values() for name, known in part["files"].items()]
    with ThreadPoolExecutor() as pool:
        if problems := [problem for problem in pool.map(lambda file: damage(*file), files) if problem]:
            raise DataError(f"{'; '.join(problems)}; {again}")
    return Data(folder, manifest)


def inputs_and_targets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, 2049) as inputs and targets, int32 (B, 2048) each: targets are the inputs shifted by one."""
    return rows[:, :-1].astype(np.int32, order="C"), rows[:, 1:].astype(np.int32, order="C")


class Loader:
    """Endless iterator over batches (x, y), fresh int32 arrays (batch_size, 2048), packed ahead on a thread.

    With split "train" the first batch needs a `Clock`, which also ends the supply; "validation" and "held_out" give
    the stored rows over and over.

    Attributes:
        batches, rows, tokens: handed out so far.
        epoch: pass over the documents, from 1, that packing the last batch had reached.
        waited: seconds the caller waited for batches.
    """

    AHEAD = 4  # batches ready before they are asked for

    def __init__(self, data: Data, batch_size: int, split: str = "train"):
        if batch_size < 1 or split not in ("train", "validation", "held_out"):
            raise ValueError(f"batch_size {batch_size}, split {split!r}: at least 1; train, validation or held_out")
        self.data, self.batch_size, self.split = data, batch_size, split
        self.batches, self.epoch, self.waited, self.clock = 0, 1, 0.0, None
        self._packing_epoch, self._closed, self._queue = 1, threading.Event(), queue.Queue(self.AHEAD)
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    rows = property(lambda self: self.batches * self.batch_size)
    tokens = property(lambda self: self.rows * MAX_SEQ_LEN)

    def _endless(self, one_pass: Callable[[], Iterable]) -> Iterator:
        for self._packing_epoch in itertools.count(1):
            yield from one_pass()

    def _work(self) -> None:
        try:
            stored = getattr(self.data, f"{self.split}_rows", None)
            rows = pack(self._endless(self.data.batches)) if stored is None else self._endless(lambda: stored)
            while not self._closed.is_set():
                batch = np.stack(list(itertools.islice(rows, self.batch_size)))
                self._put((*inputs_and_targets(batch), self._packing_epoch))
        except BaseException as error:  # for the caller, who would wait for ever
            self._put(error)

    def _put(self, item) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if self._closed.is_set():
            raise RuntimeError("the loader is closed")
        if self.split == "train":
            admit(self.clock)
        asked = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - asked
        if isinstance(item, BaseException):
            self._closed.set()
            raise RuntimeError(f"the loader's thread failed: {item!r}") from item
        x, y, self.epoch = item
        self.batches += 1
        if self.clock:
            self.clock.start()
        return x, y

    def close(self) -> None:
        """Stops the thread; no batches after this."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---- Clock ----

class Clock:
    """Training time: from the first batch that the loader hands out to `stop`, which `evaluate_bpb` calls.

    Making it scores the untrained model, which must know nothing yet: Invalid if it does (a warm start).

    Attributes:
        seconds: of training allowed, `budget()` by default.
        steps: number of `tick` calls; longest: seconds that the longest took.
        val_bpb, val_rows: the score, once there is one.
    """

    def __init__(self, backend, model, loader: Loader, seconds: float | None = None):
        self.backend, self.loader, self.seconds = backend, loader, budget() if seconds is None else seconds
        self.steps, self.longest, self.evaluated = 0, 0.0, False
        self.val_bpb = self.val_rows = self.started = self.stopped = self.ticked = None
        chance, rows = math.log(loader.data.vocab_size), loader.data.validation_rows[:PROBE_ROWS]
        with recorded(self):
            untrained = float(losses(backend, model, *inputs_and_targets(rows)).mean(dtype=np.float64))
            if untrained < 0.95 * chance:
                raise Invalid(f"warm start: the untrained model's loss is {untrained:.3f} nats, chance {chance:.3f}")
        loader.clock = self

    def start(self) -> None:
        """Called by the loader with each batch; the first one starts the clock."""
        if self.started is None:
            self.started = self.ticked = time.perf_counter()

    def tick(self, loss: float) -> float:
        """Ends a step: waits for the device and returns the seconds since the last tick (or the start).

        Raises:
            Diverged: `loss` is not finite, or above 100.
        """
        if self.started is None:
            raise RuntimeError("clock.tick() before the first batch: take it from the loader, train, then tick")
        self.backend.synchronize()
        now = time.perf_counter()
        seconds, self.ticked = now - self.ticked, now
        self.steps, self.longest = self.steps + 1, max(self.longest, seconds)
        with recorded(self):
            if not math.isfinite(loss) or loss > 100:
                raise Diverged(f"the loss is {loss} at step {self.steps}")
        return seconds

    @property
    def elapsed(self) -> float:
        """Seconds of training so far: 0 before the first batch, fixed after `stop`."""
        if self.started is None:
            return 0.0
        return (time.perf_counter() if self.stopped is None else self.stopped) - self.started

    progress = property(lambda self: min(1.0, self.elapsed / self.seconds))
    finished = property(lambda self: self.elapsed >= self.seconds)

    def stop(self) -> None:
        """Waits for the device and ends the training time; again, it changes nothing."""
        if self.stopped is None:
            self.backend.synchronize()
            admit(self)
            self.stopped = time.perf_counter()


def admit(clock: Clock | None) -> None:
    """Refuses training before a clock checked the model, after the evaluation, or far beyond the budget."""
    with recorded(clock):
        if clock is None:
            raise Invalid("a training batch was asked for before a Clock checked the untrained model")
        if clock.stopped is not None:
            raise Invalid("a training batch was asked for after the evaluation")
        # A step that begins in time may end late; whoever goes on after that has stopped looking at the clock.
        if (elapsed := clock.elapsed) > (limit := clock.seconds + 2 * clock.longest + 1):
            raise Invalid(f"training went on for {elapsed:.1f} s; a budget of {clock.seconds:g} s allows {limit:.1f}")


# ---- Evaluator ----

def losses(backend, model, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The model's nats for each target (B, T); Invalid if they are not finite."""
    values = np.asarray(backend.losses(model, tokens, targets))
    if values.shape != targets.shape:
        raise Invalid(f"losses have shape {values.shape}, the targets {targets.shape}")
    if bad := int(values.size - np.isfinite(values).sum()):
        raise Invalid(f"not finite: {bad} of {values.size} losses are NaN or infinite")
    return values


def evaluate_bpb(backend, model, data: Data, rows="validation", count=None, batch_size=8, clock=None) -> float:
    """Bits per byte of stored rows ("validation" or "held_out"): nats over bytes of the targets over ln 2, in float64.

    Special tokens count in neither sum. The first `count` rows are scored, `data.eval_rows` by default, `batch_size` at
    once or fewer if they don't fit; the score does not depend on it. With the `clock` of a training run, the run ends
    here: its time stops, and the weights are saved before anything can go wrong, beside `AUTORESEARCH_RESULT` with
    suffix .safetensors, else as last/weights.safetensors.

    Raises:
        Invalid: the model must not be scored (see `probe`), or this run was before.
        DataError: fewer rows are stored than asked for.
    """
    with recorded(clock):
        if clock is not None:
            if clock.evaluated:
                raise Invalid("this run was evaluated before; a run is scored once")
            clock.stop()
            clock.evaluated = True
            path = (result_path() or home() / "last" / "weights").with_suffix(".safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            backend.save(model, path)
        stored = {"validation": data.validation_rows, "held_out": data.held_out_rows}[rows]
        count = data.eval_rows if count is None else count
        if not 1 <= count <= len(stored):
            raise DataError(f"{count} {rows} rows asked for, {len(stored)} are stored; prepare more text")
        bpb = score(backend, model, data, stored[:count], batch_size)
    if clock is not None and rows == "validation":
        clock.val_bpb, clock.val_rows = bpb, count
    return bpb


def score(backend, model, data: Data, rows: np.ndarray, batch_size: int) -> float:
    """Probes the model, then sums over all rows; a batch that runs out of memory is halved."""
    nats, size, done, probed = 0.0, 0, 0, False
    while done < len(rows):
        tokens, targets = inputs_and_targets(rows[done : done + batch_size])
        try:
            if not probed:
                probe(backend, model, tokens[:PROBE_ROWS], targets[:PROBE_ROWS], data.vocab_size)
                probed = True
            values = losses(backend, model, tokens, targets)
        except Exception as error:
            if batch_size == 1 or not backend.is_out_of_memory(error):
                raise
            batch_size //= 2
            continue  # the traceback, and with it the arrays that did not fit, is gone by the next try
        sizes = data.token_bytes[targets]
        nats += float(values.sum(where=sizes > 0, dtype=np.float64))
        size += int(sizes.sum(dtype=np.int64))
        done += len(tokens)
    if not size:
        raise DataError("the rows hold no text, only special tokens; prepare another dataset")
    return nats / size / math.log(2)


def probe(backend, model, tokens: np.ndarray, targets: np.ndarray, vocab_size: int) -> None:
    """Refuses a model whose losses are not those of a causal language model, each row by itself.

    All calls have the same shape (B, T), so that the same kernels run.
    """
    values = losses(backend, model, tokens, targets)
    same(values, losses(backend, model, tokens, targets), "two calls on the same rows differ")
    noise = np.random.default_rng(0).integers(0, vocab_size, tokens.shape, dtype=np.int32)
    place = np.arange(len(tokens))[:, None]

    # Inputs change after the cut, another in each row. Targets stay: the position at the cut must not see its own.
    before = np.arange(tokens.shape[1]) <= (place + 1) * tokens.shape[1] // (len(tokens) + 1) + place
    changed = losses(backend, model, np.where(before, tokens, noise), targets)
    same(values[before], changed[before], "the model looks ahead: losses change with later tokens")

    if len(tokens) > 1:  # each row moves by one place, then every second one becomes noise
        moved = losses(backend, model, np.where(place % 2, np.roll(tokens, 1, 0), noise), np.roll(targets, 1, 0))
        same(values[:-1:2], moved[1::2], "a row's losses depend on its neighbours in the batch")

    logits = np.asarray(backend.logits(model, tokens))
    if logits.shape != (*tokens.shape, vocab_size):
        raise Invalid(f"logits have shape {logits.shape}, not {(*tokens.shape, vocab_size)}")
    mass = np.stack([probability_mass(logits[i], targets[i], values[i]) for i in range(len(tokens))])
    # Rounding in the matrix product scatters single tokens, not their mean.
    mean, worst = mass.mean(), np.abs(mass - 1).max()
    if not (abs(mean - 1) <= 1e-3 and worst <= 0.1):
        raise Invalid(f"not normalised: probabilities sum to {mean:.4f} on average, up to {worst:.4f} off 1")


def probability_mass(logits: np.ndarray, targets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What the probabilities behind reported losses (T,) sum to if their ratios are those of the logits (T, V)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    logsumexp = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return np.exp(logsumexp - (logits[np.arange(len(targets)), targets] + values))


def same(expected: np.ndarray, actual: np.ndarray, complaint: str) -> None:
    """Refuses losses that should be equal and are not.

    At equal shape most kernels give the same bits; some, in bf16, move losses by about 1e-3, single ones by more. A
    leak moves at least one loss by tenths of a nat, and what stays below both limits can't have won more than 2e-3
    nats per token, which is below 1e-3 bits per byte.
    """
    difference = np.abs(actual.astype(np.float64) - expected)
    mean, worst = difference.mean(), difference.max()
    if not (mean <= 2e-3 and worst <= 0.1):
        raise Invalid(f"{complaint} (by up to {worst:.4f} nats, {mean:.4f} on average)")


# ---- Result ----

def result_path() -> Path | None:
    return Path(os.environ["AUTORESEARCH_RESULT"]) if os.environ.get("AUTORESEARCH_RESULT") else None


@contextmanager
def recorded(clock: Clock | None):
    """Writes down why a run ends without a score, where `AUTORESEARCH_RESULT` points, before the error goes on."""
    try:
        yield
    except (Invalid, Diverged) as error:
        status = "invalid" if isinstance(error, Invalid) else "crash"
        if path := result_path():
            write_json(path, {"status": status, "reason": str(error), **(measured(clock) if clock else {})})
        raise


def measured(clock: Clock) -> dict:
    """What the clock and its loader know about a run, finished or not."""
    loader, data, backend, seconds = clock.loader, clock.loader.data, clock.backend, clock.elapsed
    total_seconds = time.time() - psutil.Process().create_time()
    facts = {"training_seconds": seconds, "total_seconds": total_seconds, "peak_vram_mb": backend.peak_memory() / 2**20}
    facts |= {"total_tokens_M": loader.tokens / 1e6, "num_steps": clock.steps, "epochs": loader.epoch}
    facts |= {"tokens_per_second": loader.tokens / seconds if seconds else 0.0, "budget_seconds": clock.seconds}
    facts |= {"device": backend.device.slug, "backend": backend.name}
    return facts | {"dataset": data.name, "eval": data.eval_tag, "data": data.data_tag}


def report(clock: Clock, *, num_params: int, flops_per_token: float, depth: int, **extra) -> dict:
    """Prints the summary block, the original's lines first, and writes it as JSON where `AUTORESEARCH_RESULT` points.

    `mfu_percent` is relative to the rate of matrix products measured on this device; nan (JSON: null) where unknown.
    `extra` follows in both. A budget other than `TIME_BUDGET` is marked as a trial.
    """
    if clock.val_bpb is None:
        raise RuntimeError("nothing to report yet: call evaluate_bpb(..., clock=clock) on the validation rows first")
    facts, peak, trial = measured(clock), clock.backend.device.peak_flops, clock.seconds != TIME_BUDGET
    mfu = 100 * flops_per_token * facts["tokens_per_second"] / peak if peak else math.nan
    facts |= {"val_bpb": clock.val_bpb, "mfu_percent": mfu, "num_params_M": num_params / 1e6, "depth": depth}
    facts |= {"val_rows": clock.val_rows, **extra}
    lines = "val_bpb .6f, training_seconds .1f, total_seconds .1f, peak_vram_mb .1f, mfu_percent .2f"
    lines += ", total_tokens_M .1f, num_steps d, num_params_M .1f, depth d, device s, backend s, eval s, data s"
    lines += ", tokens_per_second .0f, val_rows d, epochs d" + (", budget_seconds g" if trial else "")
    print("---")
    for key, form in [line.split() for line in lines.split(", ")] + [(key, "") for key in extra]:
        print(f"{key + ':':<17} {facts[key]:{form}}" if form else f"{key + ':':<17} {facts[key]}")
    if trial:
        print(f"note: a trial of {clock.seconds:g} s, never to be compared with a run of {TIME_BUDGET} s")
    if path := result_path():
        write_json(path, {"status": "ok", **facts, "mfu_percent": mfu if peak else None})
    return facts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Prepares data and tokenizer; run again, it repairs what is damaged.")
    option = parser.add_argument
    option("--dataset", nargs="+", default=["climbmix"], help="climbmix (default), tinystories, stdlib, or paths")
    option("--num-shards", type=int, default=10, help="climbmix: training shards (default 10)")
    option("--suffixes", nargs="+", default=SUFFIXES, help="folders: files to take, e.g. .py .md")
    option("--name", help="name of your own data, by default that of the first path")
    option("--full", action="store_true", help=f"score all stored rows, up to {STORED_ROWS:,}")
    option("--workers", type=int, help="threads, by default one per core")
    options = parser.parse_args(arguments)
    named = {"climbmix": partial(climbmix, options.num_shards), "tinystories": tinystories, "stdlib": stdlib}
    own = partial(own_files, options.dataset, options.suffixes, options.name)
    try:
        source = named.get(" ".join(options.dataset), own)()
        manifest = prepare(source, options.full, options.workers, shlex.join(["python", "prepare.py", *arguments]))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parts = manifest["parts"].values()
    documents, tokens = (sum(part.get(unit, 0) for part in parts) for unit in ("documents", "tokens"))
    print(f"training: {documents:,} documents, {tokens:,} tokens; a score uses {manifest['eval_rows']:,} rows")
    print(f"eval: {manifest['eval_tag']}  data: {manifest['data_tag']}  in {home() / 'data' / source.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
