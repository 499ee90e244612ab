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

A `Source` names the text of each part; `build` makes the parts that are missing, damaged or outdated.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
import shlex
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
from storage import DataError, atomic, digest_of, disk_full, home, sha256, write_json

STORED_ROWS = 10_240  # of validation, and of held-out: 40 * 2^19 tokens, what the original's figures were made with
REFILL_DOCUMENTS = 128  # what the packing buffer takes in at once
EXCERPT_CHARS = 10_000  # of each document, what the tokenizer learns from
SEGMENT_CHARS = 50_000  # what the regex engine gets at once: a blank ten times as long overflows its stack
DOCUMENT_CHARS = 6_000  # a text file is cut at the first line end after as many: short documents pack without waste
SUFFIXES = [".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"]
CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # the last shard is for validation
TINYSTORIES = "karpathy/tinystories-gpt4-clean"
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
PROGRESS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(24),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


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


def climbmix(num_shards: int) -> Source:
    """The original's data. The tokenizer learns from the first shard alone, so that neither it nor the eval tag depends
    on `num_shards`; validation rows come from the first half of the pinned shard, held-out rows from the second."""
    if not 1 <= num_shards <= CLIMBMIX_LAST:
        raise DataError(f"--num-shards must be from 1 to {CLIMBMIX_LAST}, not {num_shards}")
    train = [on_hub(CLIMBMIX, f"shard_{i:05d}.parquet") for i in range(num_shards)]
    pinned = f"shard_{CLIMBMIX_LAST:05d}.parquet"
    validation = on_hub(CLIMBMIX, pinned, lambda rows: (0, rows // 2), "first half")
    held_out = on_hub(CLIMBMIX, pinned, lambda rows: (rows // 2, rows), "second half")
    return Source("climbmix", CLIMBMIX, train, validation, held_out, eval_rows=(768,), tokenizer_chars=1_000_000_000)


def tinystories() -> Source:
    """Short stories in random order; their publisher recommends these ranges as training, validation and test sets."""

    def part(start: int, stop: int) -> Documents:
        return on_hub(TINYSTORIES, TINYSTORIES_FILE, lambda rows: (start, stop), str((start, stop)))

    train, validation, held_out = part(20_000, 10**9), part(10_000, 20_000), part(0, 10_000)
    return Source("tinystories", TINYSTORIES, [train], validation, held_out, eval_rows=(768,))


def stdlib() -> Source:
    """The source of this Python's standard library: about 30 MB of real text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    excluded = ("site-packages", "dist-packages", "__pycache__")
    return text_source("stdlib", "stdlib", [folder], [".py"], excluded, eval_rows=(128,))


def own_files(paths: list[str], suffixes: list[str], name: str | None) -> Source:
    """A dataset of the user's: parquet files, or folders of text (and single text files).

    Raises DataError if a path is missing, files don't suit, or `name` (by default the first path's) can't be used.
    """
    found = [Path(path).expanduser().resolve() for path in paths]
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such path; --dataset takes climbmix, tinystories, stdlib or paths")
    if not name:
        name = re.sub(r"\W+", "-", found[0].stem).strip("-")
        if len(found) > 1:
            name += f"-and-{len(found) - 1}"
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("current", "climbmix", "tinystories", "stdlib"):
        raise DataError(f"{name!r} can't be the name of a dataset; choose another with --name")
    origin = " ".join(map(str, found))
    parquet = [path.is_file() and path.suffix == ".parquet" for path in found]
    if all(parquet):
        return parquet_source(name, origin, found)
    if any(parquet):
        raise DataError("give either parquet files or text, not both in one dataset")
    return text_source(name, origin, found, suffixes, excluded=("__pycache__",), eval_rows=(768, 128))


def parquet_source(name: str, origin: str, paths: list[Path]) -> Source:
    """Parquet files. A hash of each document decides: 5 % are validation, 5 % held-out, so copies stay together."""
    broken = [str(path) for path in paths if not is_parquet(path)]
    if broken:
        raise DataError(f"{', '.join(broken)}: not a complete parquet file (an interrupted download?); fetch it again")
    digests = {path: sha256(path) for path in paths}

    def documents(chosen: list[Path], low: int, high: int) -> Documents:
        """Those whose hash begins with a byte from `low` to below `high`."""

        def keep(text: str) -> bool:
            return low <= hashlib.sha256(text.encode()).digest()[0] < high

        def read() -> Iterator[list[str]]:
            for path in chosen:
                yield from read_parquet(path, keep=keep)

        return Documents(digest_of(low, high, [digests[path] for path in chosen]), read)

    train = [documents([path], 26, 256) for path in paths]
    return Source(name, origin, train, documents(paths, 0, 13), documents(paths, 13, 26), eval_rows=(768, 128))


def text_source(name: str, origin: str, roots: list[Path], suffixes, excluded, eval_rows) -> Source:
    """Text files in the order of their hashes, wherever they lie; exact duplicates and empty files dropped.

    The first files are validation, the next held-out, the rest training (`shares` says how many).
    """
    found = {}  # sha256 -> (path, characters)
    skipped = []
    for path in text_files(roots, suffixes, excluded):
        digest, text = read_text(path)
        if text is None:
            skipped.append(path.name)
        elif text:
            found[digest] = path, len(text)
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8 text: {', '.join(sorted(skipped)[:3])} ...")
    ordered = sorted(found)
    first, second = shares([found[digest][1] for digest in ordered])
    if second >= len(ordered):
        raise DataError(
            f"too small: {len(ordered)} different files ending in {' '.join(suffixes)} under {origin} are not enough "
            "for training, validation and held-out rows; add text, or give other endings with --suffixes"
        )

    def read(chosen: list[str]) -> Iterator[list[str]]:
        for digest in chosen:
            path = found[digest][0]
            now, text = read_text(path)
            if now != digest:
                raise DataError(f"{path} changed while it was being read; run the same command again")
            yield from refills(list(pieces(text)))

    def documents(chosen: list[str]) -> Documents:
        return Documents(digest_of(DOCUMENT_CHARS, chosen), partial(read, chosen))

    validation, held_out, train = ordered[:first], ordered[first:second], ordered[second:]
    return Source(name, origin, [documents(train)], documents(validation), documents(held_out), eval_rows)


def shares(lengths: list[int]) -> tuple[int, int]:
    """Where files of these lengths are divided: before the first index validation, before the second held-out.

    Each takes whole files until it has 5 % of the text; of small sets 50 kB, if that is at most 20 %.
    """
    total = sum(lengths)
    share = min(max(0.05 * total, 50_000), 0.2 * total)
    ends, size = [], 0
    for i, length in enumerate(lengths, start=1):
        size += length
        if size >= share:
            ends.append(i)
            size = 0
        if len(ends) == 2:
            return ends[0], ends[1]
    return len(lengths), len(lengths)


# ---- Reading ----


def refills(documents: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(documents), REFILL_DOCUMENTS):
        yield documents[start : start + REFILL_DOCUMENTS]


def all_rows(rows: int) -> tuple[int, int]:
    return 0, rows


def read_parquet(path: Path, span=all_rows, keep: Callable[[str], bool] | None = None) -> Iterator[list[str]]:
    """Documents of the `text` column in batches that never cross row groups.

    `span` gives the first row and the end from the number of rows; of these, documents that `keep` refuses are left
    out. Raises DataError if the file is damaged or has no such column.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        start, stop = span(file.metadata.num_rows)
        first = 0  # row of the file that the group begins with
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, rows)
            first += rows
            if low < high:
                column = file.read_row_group(group, columns=["text"]).column("text").slice(low, high - low)
                yield from refills([text for text in strings(column) if keep is None or keep(text)])
    except (pyarrow.ArrowException, OSError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged, or has no column of strings named `text` ({error})") from error


def strings(column) -> list[str]:
    """A parquet column as Python strings: what is not UTF-8 (lone surrogates too) is replaced, null is empty."""
    try:
        texts = [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        return [(raw or b"").decode("utf-8", "replace") for raw in column.cast("binary").to_pylist()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"it holds {column.type}")
    return texts


def is_parquet(path: Path) -> bool:
    """Whether a file has parquet's mark at both ends; one that was cut short has lost the second."""
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, path.stat().st_size - 4))
        tail = file.read()
    return len(head) == 8 and head[:4] == tail == b"PAR1"


def text_files(roots: list[Path], suffixes: list[str], excluded: tuple[str, ...]) -> Iterator[Path]:
    """Files with one of the suffixes under the folders; hidden and excluded folders left out, links not followed."""
    for root in roots:
        if root.is_file():
            yield root
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in excluded and not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if name.endswith(tuple(suffixes)) and path.is_file():
                    yield path


def read_text(path: Path) -> tuple[str, str | None]:
    """sha256 and text of a file; the text is None if it can't be read as UTF-8."""
    try:
        raw = path.read_bytes()
        return hashlib.sha256(raw).hexdigest(), raw.decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return "", None


def pieces(text: str) -> Iterator[str]:
    """A text file cut into documents, each at the first line end after `DOCUMENT_CHARS` characters."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + DOCUMENT_CHARS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


# ---- Downloads ----


def downloaded(repository: str, name: str) -> Path:
    return home() / "downloads" / repository.replace("/", "--") / name


def on_hub(repository: str, name: str, span=all_rows, key: str = "all") -> Documents:
    """A span of rows, named by `key`, of a parquet file in a dataset repository."""
    read = partial(read_parquet, downloaded(repository, name), span)
    return Documents(f"{repository}/{name} {key}", read, (repository, name))


class Refused(DataError):
    """The hub knows who asks, and says no."""


def retrying(action: Callable, what: str, attempts: int = 5):
    """Calls the hub, again after 1, 2, 4, 8 s when it is busy or the connection breaks; a full disk ends it at once."""
    for attempt in range(attempts):
        try:
            return action()
        except Exception as error:  # its HTTP library, and with it the exceptions, differ between versions
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", 500)
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            if disk_full(error) or disk_full(error.__cause__):
                raise DataError(
                    f"there is no space for {what} under {home()} ({reason}); free some space on that disk"
                ) from error
            if status in (401, 403):
                raise Refused(
                    f"Hugging Face refuses {what} ({status}). Has the token of hf auth login or HF_TOKEN expired? "
                    "Renew it with hf auth login, or remove it: climbmix and tinystories need no token"
                ) from error
            if status < 500 and status not in (408, 429):
                raise DataError(
                    f"Hugging Face does not offer {what}: {reason}; check the name and HF_ENDPOINT"
                ) from error
        if attempt + 1 < attempts:
            print(f"{what}: {reason}; trying again")
            time.sleep(2**attempt)
    raise DataError(
        f"could not download {what}: {reason}. Run the same command again later, set HF_ENDPOINT to a mirror, or "
        "work offline with: python prepare.py --dataset stdlib"
    )


def with_or_without_token(action: Callable, what: str, attempts: int = 5):
    """`retrying` with the user's token and, where the hub refuses that one, without."""
    from huggingface_hub import get_token

    try:
        return retrying(partial(action, token=None), what, attempts)  # None: the one that is set or stored
    except Refused as refusal:
        if not get_token():
            raise
        print(f"{refusal}. Continuing without the token")
        return retrying(partial(action, token=False), what, attempts)


def fetch(repository: str, name: str) -> None:
    """Brings a parquet file of a dataset repository to `downloaded(repository, name)`, whole and checked.

    A file already there stays if it is what the hub has or, while the hub can't be asked, if it is whole.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    path, what = downloaded(repository, name), f"{repository}/{name}"
    url = hf_hub_url(repository, name, repo_type="dataset")
    there = path.is_file() and is_parquet(path)
    try:
        etag = with_or_without_token(partial(get_hf_file_metadata, url), what, attempts=1 if there else 5).etag or ""
    except DataError as error:
        if not there:
            raise
        print(f"using {path} as it is: {error}")
        return
    expected = etag if re.fullmatch("[0-9a-f]{64}", etag) else None  # of large files, the sha256
    if path.exists() and not (there and expected in (None, sha256(path))):
        print(f"{path} differs from the file on Hugging Face; downloading it again")
        path.unlink()
    if not path.exists():
        download = partial(hf_hub_download, repository, name, repo_type="dataset", local_dir=path.parent)
        with_or_without_token(download, what)
    if not is_parquet(path) or expected not in (None, sha256(path)):
        path.unlink()
        raise DataError(
            f"the download of {what} is not a complete parquet file with the expected sha256; it was "
            "deleted: run the command again"
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
    workers = workers or os.cpu_count() or 1
    wanted = {"tokenizer": source.train[0], "validation": source.validation, "held_out": source.held_out}
    wanted |= {f"train_{i:05d}": documents for i, documents in enumerate(source.train)}
    settings = [VOCAB_SIZE, SPLIT_PATTERN, SPECIALS, SEGMENT_CHARS, source.tokenizer_chars, source.train[0].key]
    keys = {stem: digest_of(settings, documents.key) for stem, documents in wanted.items()}
    with ThreadPoolExecutor(workers) as pool:
        parts = intact_parts(folder, source, keys, pool)
        missing = [stem for stem in wanted if stem not in parts]
        manifest = {"format": FORMAT, "name": source.name, "origin": source.origin, "command": command, "parts": parts}
        downloads = {wanted[stem].download for stem in missing} - {None}
        list(pool.map(lambda download: fetch(*download), sorted(downloads)))  # the hub's library shows its progress
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
    return parts if "tokenizer" in parts else {}  # its tokens are in all other parts


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
    listed = {"manifest.json"} | {name for part in parts.values() for name in part["files"]}
    for path in folder.iterdir():
        if path.is_file() and path.name not in listed:
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
        "--suffixes", nargs="+", default=SUFFIXES, help="for folders: which files to read, e.g. .py .md"
    )
    parser.add_argument("--name", help="name of your own dataset (default: the name of the first path)")
    parser.add_argument("--full", action="store_true", help=f"score all stored validation rows, up to {STORED_ROWS:,}")
    parser.add_argument("--workers", type=int, help="number of threads (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        if options.dataset == ["climbmix"]:
            source = climbmix(options.num_shards)
        elif options.dataset == ["tinystories"]:
            source = tinystories()
        elif options.dataset == ["stdlib"]:
            source = stdlib()
        else:
            source = own_files(options.dataset, options.suffixes, options.name)
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
