"""A prepared dataset: its files, the manifest that knows them, and the documents packed into rows.

A dataset is a folder under `AUTORESEARCH_HOME`/data, and data/current names the one prepared last. corpus.py makes
it, and says there what it consists of; prepare.py trains and scores with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from subprocess import PIPE, Popen
from typing import BinaryIO, TextIO

import numpy as np

from storage import DataError, digest_of, home, sha256

MAX_SEQ_LEN = 2048  # tokens a row trains on
ROW = MAX_SEQ_LEN + 1  # tokens of a stored row: targets are the inputs shifted by one
VOCAB_SIZE = 8192
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = [f"<|reserved_{i}|>" for i in range(4)]  # the first is BOS; their ids follow the other tokens'
BUFFER_DOCUMENTS = 1000  # what the packer chooses from
FIRST_ROWS = 4  # that a run gets before its time begins: its untrained model is examined with them
READ_AHEAD = 2**20  # bytes of rows that are buffered
BATCHES = "AUTORESEARCH_BATCHES"
_taken: list[PackedElsewhere] = []  # the one of a guarded run
EVALUATOR_VERSION = 1  # raise it whenever the same weights would score differently
FORMAT = 1  # of the files on disk

# ---- The manifest of a dataset ----


def damage(path: Path, known: dict) -> str | None:
    """What is wrong with a file whose size and sha256 are known, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != known["size"]:
        return f"{path} has {path.stat().st_size:,} bytes instead of {known['size']:,}"
    return None if sha256(path) == known["sha256"] else f"{path} is damaged: its sha256 is not the manifest's"


def read_manifest(folder: Path) -> dict:
    """The manifest of a dataset. DataError if it is missing, unreadable or another dataset's."""
    path, again = folder / "manifest.json", f"run: python prepare.py --dataset {folder.name}"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no dataset {folder.name} in {folder.parent}; {again}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} can't be read ({error}); {again}") from error
    if not isinstance(manifest, dict) or not {"name", "format", "origin", "command", "parts"} <= manifest.keys():
        raise DataError(f"{path} is not a dataset's manifest; {again}")
    name, version, again = manifest["name"], manifest["format"], f"run: {manifest['command']}"
    if (name, version) != (folder.name, FORMAT):
        raise DataError(f"{folder} holds another dataset's manifest: {name}, format {version}; {again}")
    return manifest


def known_files(manifest: dict) -> dict[str, dict]:
    """Size and sha256 of each file by its name."""
    return {name: known for part in manifest["parts"].values() for name, known in part["files"].items()}


def tags(manifest: dict) -> dict:
    """Eval tag: tokenizer, validation rows, how many of them are scored, evaluator. Data tag: training documents."""
    digests = {name: known["sha256"] for name, known in known_files(manifest).items()}
    tokenizer, validation = digests["tokenizer.json"], digests["validation.npy"]
    train = [digests[name] for name in sorted(digests) if name.startswith("train_")]
    eval_digest = digest_of(tokenizer, validation, manifest["eval_rows"], EVALUATOR_VERSION)
    return {"eval_tag": eval_digest[:12], "data_tag": digest_of(tokenizer, train)[:12]}


# ---- Data ----


def read_tokens(folder: Path) -> list[bytes]:
    """The bytes of each token in order of rank, specials left out."""
    return [bytes.fromhex(token) for token in json.loads((folder / "tokenizer.json").read_bytes())["tokens"]]


def load_tokenizer(folder: Path):
    """The tiktoken Encoding of a prepared dataset."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(read_tokens(folder))}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


class Data:
    """A prepared dataset, opened with `open_data`.

    Attributes:
        vocab_size, bos: number of tokens; the token each document begins with.
        token_bytes: int32 (vocab_size,), bytes of text in each token, 0 for specials.
        eval_tag, data_tag: scores compare within one eval tag; equal data tags, equal training documents.
        validation_rows, held_out_rows: uint16 (N, 2049), memory-mapped; a score uses the first `eval_rows`.
        train: per shard (tokens, lengths, batches), flat arrays (see corpus.py).
        train_tokens: in one pass over the documents.

    Rows and shards are announced when they are read (`sys.audit`): a guarded run reads them through this file only.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.name, self.eval_rows = folder, manifest["name"], manifest["eval_rows"]
        self.eval_tag, self.data_tag = manifest["eval_tag"], manifest["data_tag"]
        tokens = read_tokens(folder)
        self.bos, self.vocab_size = len(tokens), len(tokens) + len(SPECIALS)
        self.token_bytes = np.array([len(token) for token in tokens] + [0] * len(SPECIALS), np.int32)
        self.train_tokens = sum(part.get("tokens", 0) for part in manifest["parts"].values())
        self._shards = sorted(stem for stem in manifest["parts"] if stem.startswith("train_"))

    def _array(self, name: str) -> np.ndarray:
        """A plain view of a mapped file: slicing np.memmap itself takes several times as long."""
        return np.asarray(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))

    @property
    def validation_rows(self) -> np.ndarray:
        sys.audit("autoresearch.rows", "validation")
        return self._array("validation.npy")

    @property
    def held_out_rows(self) -> np.ndarray:
        sys.audit("autoresearch.rows", "held_out")
        return self._array("held_out.npy")

    @property
    def train(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        sys.audit("autoresearch.rows", "train")
        return [
            (
                self._array(f"{shard}.tokens.npy"),
                self._array(f"{shard}.lengths.npy"),
                self._array(f"{shard}.batches.npy"),
            )
            for shard in self._shards
        ]

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
                document += count
                token += sum(sizes)

    def packed(self) -> PackedElsewhere:
        """The training rows, packed by a separate process."""
        return PackedElsewhere(self.folder)


def open_data(name: str | None = None) -> Data:
    """Opens a prepared dataset: `name`, else `AUTORESEARCH_DATA`, else the one prepared last.

    Raises DataError if the dataset is missing, or a file not as the manifest says; the message has what to run."""
    return opened(folder_of(home(), name or os.environ.get("AUTORESEARCH_DATA")))


def folder_of(root: Path, name: str | None) -> Path:
    """The folder of a dataset: by default of the one prepared last. DataError if there is none."""
    current = root / "data" / "current"
    try:
        name = name or current.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{current} can't be read ({error}); set AUTORESEARCH_HOME to a folder of yours") from error
    if not name:
        raise DataError("no dataset is prepared yet; run: python prepare.py (offline: --dataset stdlib)")
    return root / "data" / name


def opened(folder: Path) -> Data:
    """The dataset in a folder; see `open_data`. In a guarded run the harness has documents and rows, and has
    checked them."""
    manifest = read_manifest(folder)
    again = f"run: {manifest['command']}"
    if "eval_tag" not in manifest:
        raise DataError(f"preparing {folder.name} was interrupted; {again}")
    try:
        if not tags(manifest).items() <= manifest.items():
            raise DataError(f"the tags in {folder / 'manifest.json'} are not those of its files; {again}")
        files = known_files(manifest)
        if BATCHES in os.environ:
            files = {"tokenizer.json": files["tokenizer.json"]}
        with ThreadPoolExecutor() as pool:
            problems = [text for text in pool.map(damage, map(folder.joinpath, files), files.values()) if text]
        if problems:
            raise DataError(f"{'; '.join(problems)}; {again}")
        return Data(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'manifest.json'} is damaged ({type(error).__name__}: {error}); {again}") from error


def inputs_and_targets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, 2049) as inputs and targets, int32 (B, 2048) each: targets are the inputs shifted by one."""
    return rows[:, :-1].astype(np.int32, order="C"), rows[:, 1:].astype(np.int32, order="C")


# ---- Packing ----


def pack(batches: Iterable[tuple[np.ndarray, list[int]]]) -> Iterator[np.ndarray]:
    """Packs batches (documents end to end, each with its BOS; their lengths) into full rows, uint16 (2049,).

    A row takes the longest buffered document that fits, the earliest on ties; if none fits, the shortest, cropped. The
    buffer is refilled by whole batches before each choice. These are the rows of the original's `make_dataloader`
    (karpathy/autoresearch) in its order; it scans a list where here documents stand on a shelf by length. When batches
    run out, the buffer drains and an unfinished last row is dropped.
    """
    batches = iter(batches)
    shelf = defaultdict(deque)  # length -> (tokens, start) of the documents that wait, the earliest first
    lengths, waiting = [], 0  # lengths on the shelf, ascending; documents on it
    while True:
        row, filled = np.empty(ROW, np.uint16), 0
        while filled < ROW:
            while waiting < BUFFER_DOCUMENTS and (batch := next(batches, None)) is not None:
                (tokens, sizes), start = batch, 0
                for length in sizes:
                    if length not in shelf:
                        insort(lengths, length)
                    shelf[length].append((tokens, start))
                    start += length
                waiting += len(sizes)
            if waiting == 0:
                return
            room = ROW - filled
            index = max(bisect_right(lengths, room) - 1, 0)  # the longest that fits, else the shortest
            length = lengths[index]
            tokens, start = shelf[length].popleft()
            if not shelf[length]:
                del shelf[length], lengths[index]
            waiting -= 1
            taken = min(length, room)
            row[filled : filled + taken] = tokens[start : start + taken]
            filled += taken
        yield row


def endless(batches: Callable[[], Iterable[tuple[np.ndarray, list[int]]]]) -> Iterator[tuple[np.ndarray, int]]:
    """Rows packed from pass after pass over `batches()`, each with the pass that packing it had reached, from 1."""
    passes = 0

    def documents():
        nonlocal passes
        while True:
            passes += 1
            yield from batches()

    for row in pack(documents()):
        yield row, passes


class PackedElsewhere(Iterator):
    """The endless rows of a dataset from another process: python dataset.py FOLDER. So a busy training process is not
    held up by packing, and a run can't take rows ahead: beyond the first FIRST_ROWS they are sent when `release` is
    called. In a guarded run it is the harness's process; `AUTORESEARCH_BATCHES` is the descriptor of a socket to it."""

    def __init__(self, folder: Path):
        self._process = None
        if descriptor := os.environ.get(BATCHES):
            if _taken:
                raise RuntimeError("a second Loader: a guarded run has one, whose batches can be cut and joined")
            _taken.append(self)
            self._rows, self._release = open(int(descriptor), "rb", READ_AHEAD), open(os.dup(int(descriptor)), "wb", 0)
        else:
            self._process = Popen([sys.executable, __file__, str(folder)], READ_AHEAD, stdin=PIPE, stdout=PIPE)
            if self._process.stdout is None or self._process.stdin is None:
                raise RuntimeError("the process that packs rows has no pipes")
            self._rows, self._release = self._process.stdout, self._process.stdin

    def release(self) -> None:
        self._release.write(b"\n")
        self._release.flush()

    def __next__(self) -> tuple[np.ndarray, int]:
        record = self._rows.read(2 * ROW + 4)
        if len(record) < 2 * ROW + 4:
            raise RuntimeError("the process that packs rows has ended; its message is above")
        return np.frombuffer(record, "<u2", ROW, 4), int.from_bytes(record[:4], "little")

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        for file in (self._rows, self._release):
            file.close()


def send_rows(folder: Path, told: BinaryIO, into: BinaryIO, note: TextIO | None = None) -> None:
    """Writes rows for `PackedElsewhere`: the first ones, and after a line was read from `told`, all others. The time of
    that (`time.monotonic`) is written to `note`."""
    for count, (row, passes) in enumerate(endless(Data(folder, read_manifest(folder)).batches)):
        if count == FIRST_ROWS:
            into.flush()
            if not told.readline():
                return
            if note:
                print(time.monotonic(), file=note, flush=True)
        into.write(passes.to_bytes(4, "little") + row.astype("<u2", copy=False).tobytes())


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        send_rows(Path(sys.argv[1]), sys.stdin.buffer, open(1, "wb", 2**18), sys.stderr if sys.argv[2:] else None)
    os._exit(0)  # nobody reads what is left to be written
