"""Where the text of a dataset comes from: two public ones, the Python standard library, or a user's own files.

A `Source` names the documents of each part, which corpus.py makes the files of a dataset of. Nothing is downloaded
before a part is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from storage import DataError, digest_of, disk_full, home, require_writable, sha256

REFILL_DOCUMENTS = 128  # what the packing buffer takes in at once
DOCUMENT_CHARS = 6_000  # a text file is cut at the first line end after as many: short documents pack without waste
MOST_CHARS = 12_000  # a longer line is cut, too: of a document longer than a row the packer drops the rest
SUFFIXES = [".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"]
CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # the last shard is for validation
TINYSTORIES = "karpathy/tinystories-gpt4-clean"
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"


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
    tokenizer: Documents  # what the tokenizer learns from
    eval_rows: tuple[int, ...]  # how many rows a score uses: the first number that both sets can fill
    tokenizer_chars: int = 250_000_000  # of `tokenizer`, at most


def climbmix(num_shards: int) -> Source:
    """The original's data. The tokenizer learns from the first shard alone, so that neither it nor the eval tag depends
    on `num_shards`; validation rows come from the first half of the pinned shard, held-out rows from the second."""
    if not 1 <= num_shards <= CLIMBMIX_LAST:
        raise DataError(f"--num-shards must be from 1 to {CLIMBMIX_LAST}, not {num_shards}")
    train = [on_hub(CLIMBMIX, f"shard_{i:05d}.parquet") for i in range(num_shards)]
    pinned = f"shard_{CLIMBMIX_LAST:05d}.parquet"
    validation = on_hub(CLIMBMIX, pinned, lambda rows: (0, rows // 2), "first half")
    held_out = on_hub(CLIMBMIX, pinned, lambda rows: (rows // 2, rows), "second half")
    rows, chars = (768,), 1_000_000_000
    return Source("climbmix", CLIMBMIX, train, validation, held_out, train[0], eval_rows=rows, tokenizer_chars=chars)


def tinystories() -> Source:
    """Short stories in random order; their publisher recommends these ranges as training, validation and test sets."""

    def part(start: int, stop: int) -> Documents:
        return on_hub(TINYSTORIES, TINYSTORIES_FILE, lambda rows: (start, stop), str((start, stop)))

    train, validation, held_out = part(20_000, 10**9), part(10_000, 20_000), part(0, 10_000)
    return Source("tinystories", TINYSTORIES, [train], validation, held_out, train, eval_rows=(768,))


def stdlib() -> Source:
    """The source of this Python's standard library: about 30 MB of real text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    excluded = ("site-packages", "dist-packages", "__pycache__")
    return text_source("stdlib", "stdlib", [folder], [".py"], excluded, eval_rows=(128,))


def own_files(paths: list[str], suffixes: list[str], name: str | None) -> Source:
    """A dataset of the user's: parquet files, or folders of text (and single text files).

    Raises DataError if a path is missing, files don't suit, or `name` (by default the first path's) can't be used.
    """
    found = [Path(os.path.expanduser(path)).resolve() for path in paths]
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such path; --dataset takes climbmix, tinystories, stdlib or paths")
    if not name:
        name = re.sub(r"\W+", "-", found[0].stem).strip("-")
        if len(found) > 1:
            name += f"-and-{len(found) - 1}"
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("current", "climbmix", "tinystories", "stdlib"):
        raise DataError(f"{name!r} can't be the name of a dataset; choose another with --name")
    folder = (home() / "data" / name).resolve()
    if any(folder in (path, *path.parents) for path in found):
        raise DataError(f"{folder} is where the dataset {name} itself is kept; choose another name with --name")
    origin = " ".join(map(str, found))
    parquet = [path.is_file() and path.suffix == ".parquet" for path in found]
    if all(parquet):
        return parquet_source(name, origin, found)
    if any(parquet):
        raise DataError("give either parquet files or text, not both in one dataset")
    return text_source(name, origin, found, suffixes, excluded=("__pycache__",), eval_rows=(768, 128))


def parquet_source(name: str, origin: str, paths: list[Path]) -> Source:
    """Parquet files. A hash of each document decides: 5 % are validation, 5 % held-out, so copies stay together. The
    tokenizer learns from all files, as the first may be tiny."""
    try:
        broken = [str(path) for path in paths if not is_parquet(path)]
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror}); let this user read it") from error
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

    train, validation, held_out = (documents(paths, *ends) for ends in ((26, 256), (0, 13), (13, 26)))
    shards = [documents([path], 26, 256) for path in paths]
    return Source(name, origin, shards, validation, held_out, train, eval_rows=(768, 128))


def text_source(name: str, origin: str, roots: list[Path], suffixes, excluded, eval_rows) -> Source:
    """Text files in the order of their hashes, wherever they lie; exact duplicates and empty files dropped.

    The first files are validation, the next held-out, the rest training (`shares` says how many). DataError if one
    large file leaves little for training.
    """
    found = {}  # sha256 -> (path, characters)
    skipped = []
    for path in text_files(roots, suffixes, excluded):
        try:
            digest, text = read_text(path)
        except (UnicodeDecodeError, OSError) as error:
            skipped.append(f"{path.name} ({getattr(error, 'strerror', 'not UTF-8 text')})")
            continue
        if text:
            found[digest] = path, len(text)
    if skipped:
        print(f"skipped {len(skipped)} files: {', '.join(sorted(skipped)[:3])}{', ...' if len(skipped) > 3 else ''}")
    ordered = sorted(found)
    lengths = [found[digest][1] for digest in ordered]
    first, second = shares(lengths)
    if sum(lengths[second:]) < sum(lengths) / 4 and max(lengths) > sum(lengths) / 2:
        path, length = max(found.values(), key=lambda file: file[1])
        raise DataError(
            f"too few files: {path} alone is {length / sum(lengths):.0%} of the text: a file is never divided "
            "among training, validation and held-out rows; cut it into twenty files or more"
        )
    if second >= len(ordered):
        raise DataError(
            f"too small: {len(ordered)} different files ending in {' '.join(suffixes)} under {origin} are not enough "
            "for training, validation and held-out rows; add text, or give other endings with --suffixes"
        )

    def read(chosen: list[str]) -> Iterator[list[str]]:
        for digest in chosen:
            path = found[digest][0]
            now, text = "", ""
            with suppress(UnicodeDecodeError, OSError):
                now, text = read_text(path)
            if now != digest:
                raise DataError(f"{path} changed while it was being read; run the same command again")
            yield from refills(list(pieces(text)))

    def documents(chosen: list[str]) -> Documents:
        return Documents(digest_of(DOCUMENT_CHARS, MOST_CHARS, chosen), partial(read, chosen))

    validation, held_out, train = map(documents, (ordered[:first], ordered[first:second], ordered[second:]))
    return Source(name, origin, [train], validation, held_out, train, eval_rows)


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
    """Files with one of the suffixes under the folders; hidden and excluded folders, and links to folders, left out."""
    for root in roots:
        if root.is_file():
            yield root
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in excluded and not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if name.endswith(tuple(suffixes)) and path.is_file():
                    yield path


def read_text(path: Path) -> tuple[str, str]:
    """sha256 and text of a file. UnicodeDecodeError if it is not UTF-8, OSError if it can't be read."""
    raw = path.read_bytes()
    return hashlib.sha256(raw).hexdigest(), raw.decode("utf-8")


def pieces(text: str) -> Iterator[str]:
    """A text file cut into documents, each at the first line end after `DOCUMENT_CHARS` characters; if none comes
    before `MOST_CHARS`, at the first blank after as many, or there."""
    start = 0
    while start < len(text):
        first, last = start + DOCUMENT_CHARS, start + MOST_CHARS
        end = text.find("\n", first, last) + 1
        if not end:
            end = len(text) if len(text) <= last else text.find(" ", first, last) + 1 or first
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
        require_writable(path)  # that it is not is no fault of the hub's
        download = partial(hf_hub_download, repository, name, repo_type="dataset", local_dir=path.parent)
        with_or_without_token(download, what)
    if not is_parquet(path) or expected not in (None, sha256(path)):
        path.unlink()
        raise DataError(
            f"the download of {what} is not a complete parquet file with the expected sha256; it was "
            "deleted: run the command again"
        )
