"""Our loader against the original's `make_dataloader`: the same rows, and tokens per second of both.

    python benchmarks/loader.py PATH_TO_THE_ORIGINAL_PREPARE_PY

The text is this Python's standard library, written as parquet shards with row groups of odd sizes. The original runs on
the CPU: its two CUDA buffers become ordinary ones, and it gets our tokenizer in place of its pickle. It tokenizes
while it packs, on as many threads as it asks for; ours reads tokens that were prepared before. Runs alternate.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpus  # noqa: E402
import prepare  # noqa: E402
import sources  # noqa: E402

SHARDS, BATCH = 3, 16


def write_shards(folder: Path) -> None:
    documents = list(chain.from_iterable(sources.stdlib().train[0].batches()))
    folder.mkdir(parents=True)
    held, rest = documents[:600], documents[600:]
    parts = [rest[i::SHARDS] for i in range(SHARDS)]
    names = [*range(SHARDS), sources.CLIMBMIX_LAST]
    for name, part, group in zip(names, [*parts, held], (1000, 333, 1024, 200), strict=True):
        table = pyarrow.table({"text": part})
        pyarrow.parquet.write_table(table, folder / f"shard_{name:05d}.parquet", row_group_size=group)


def local(source: sources.Source) -> sources.Source:
    """The source without its downloads: the files are there."""
    here = lambda documents: documents._replace(download=None)  # noqa: E731
    train, validation = list(map(here, source.train)), here(source.validation)
    return source._replace(train=train, validation=validation, held_out=here(source.held_out))


def original_batches(path: Path, folder: Path, tokenizer):
    """The original's (inputs, targets, epoch) on the CPU."""
    spec = importlib.util.spec_from_file_location("original_prepare", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch = module.torch
    plain = lambda *args, pin_memory=False, device="cpu", **kw: torch.empty(*args, **kw)  # noqa: E731
    module.torch = SimpleNamespace(empty=plain, tensor=torch.tensor, long=torch.long)
    module.DATA_DIR = str(folder)
    return module.make_dataloader(module.Tokenizer(tokenizer), BATCH, prepare.MAX_SEQ_LEN, "train")


def our_batches(data, batch_size=BATCH):
    loader = prepare.Loader(data, batch_size)
    # Stands for a clock that admits everything: this measures the loader alone.
    clock: Any = SimpleNamespace(
        stopped=None, in_step=False, elapsed=0.0, seconds=1e9, took=[], started=None, start=lambda: None
    )
    loader.clock = clock
    return loader


def rate(batches, count: int) -> float:
    """Tokens per second over `count` batches."""
    started = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return count * BATCH * prepare.MAX_SEQ_LEN / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="the original's prepare.py")
    parser.add_argument("--batches", type=int, default=250, help=f"batches of {BATCH} rows to compare")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["AUTORESEARCH_HOME"] = home
        folder = sources.downloaded(sources.CLIMBMIX, "any").parent
        write_shards(folder)
        corpus.build(local(sources.climbmix(SHARDS)))
        data = prepare.open_data()
        theirs, ours = original_batches(options.original, folder, data.tokenizer), our_batches(data)
        for i in range(options.batches):
            (x, y), (their_x, their_y, epoch) = next(ours), next(theirs)
            if not (np.array_equal(x, their_x) and np.array_equal(y, their_y) and ours.epoch == epoch):
                raise SystemExit(f"batch {i} differs")
        print(f"{options.batches * BATCH} rows are identical, up to epoch {ours.epoch}")
        rates = [(rate(theirs, 40), rate(ours, 2000)) for _ in range(options.rounds)]
        ours.close()
    original, loader = (statistics.median(values) for values in zip(*rates, strict=True))
    print(f"M tokens/s: original {original / 1e6:.2f}, ours {loader / 1e6:.1f}, {loader / original:.0f} times as many")


if __name__ == "__main__":
    main()
