"""The loader gives the original algorithm's rows, from a thread that hides its work and not its errors."""

import os
import random
import threading
import time

import numpy as np
import pytest

import dataset
import prepare
import storage
from calibration.measure import QUICK, Measurement
from prepare import Clock, Invalid, Loader

BOS = 9


class FakeClock:
    """Admits everything."""

    started = stopped = None
    elapsed, seconds, longest, steps, took = 0.0, 1e9, 0.0, 0, []
    in_step = False

    def start(self):
        pass


class FakeData:
    """Documents in memory. `groups` are the row groups of a parquet file."""

    def __init__(self, groups):
        self.groups = groups

    def packed(self):
        return dataset.endless(self.batches)

    def batches(self):
        for group in self.groups:
            for i in range(0, len(group), 128):
                batch = group[i : i + 128]
                yield np.array([t for document in batch for t in document], np.uint16), [len(d) for d in batch]


def documents(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(10, 60_000, size - 1).tolist()] for size in sizes]


def reference_rows(groups, capacity=2049, endless=True):
    """The original algorithm told plainly: one list in order of arrival, searched from its start for each choice."""

    def arrivals():
        epoch = 1
        while True:
            for group in groups:
                for i in range(0, len(group), 128):
                    yield group[i : i + 128], epoch
            epoch += 1
            if not endless:
                return

    source, waiting, epoch = arrivals(), [], 1
    while True:
        row = []
        while len(row) < capacity:
            while len(waiting) < 1000:
                batch, epoch = next(source, (None, epoch))
                if batch is None:
                    break
                waiting += batch
            if not waiting:
                return
            room = capacity - len(row)
            fitting = [document for document in waiting if len(document) <= room]
            if fitting:
                longest = max(map(len, fitting))
                chosen = next(i for i, document in enumerate(waiting) if len(document) == longest)
            else:
                shortest = min(map(len, waiting))
                chosen = next(i for i, document in enumerate(waiting) if len(document) == shortest)
            row += waiting.pop(chosen)[:room]
        yield row, epoch


def sizes(kind, count, seed=1):
    rng = random.Random(seed)
    return {
        "short": lambda: [rng.randint(1, 60) for _ in range(count)],
        "ties": lambda: [rng.choice([100, 200, 300]) for _ in range(count)],
        "long": lambda: [rng.randint(2000, 5000) for _ in range(count)],
        "exact": lambda: [2049] * count,
        "bos only": lambda: [1] * count,
        "mixed": lambda: [int(rng.lognormvariate(5.5, 1.3)) + 1 for _ in range(count)],
    }[kind]()


def grouped(items, *group_sizes):
    groups, start = [], 0
    while start < len(items):
        size = group_sizes[len(groups) % len(group_sizes)]
        groups.append(items[start : start + size])
        start += size
    return groups


@pytest.mark.parametrize("kind", ["short", "ties", "long", "exact", "bos only", "mixed"])
@pytest.mark.parametrize("group_sizes", [(1, 127, 128, 129, 300), (5000,)])
def test_rows_are_the_original_algorithms(kind, group_sizes):
    data = FakeData(grouped(documents(sizes(kind, 1300)), *group_sizes))
    reference = reference_rows(data.groups)
    with Loader(data, 3) as loader:
        loader.clock = FakeClock()
        for _ in range(2 if kind == "bos only" else 30):  # 2049 documents a row are slow to search
            x, y = next(loader)
            for inputs, targets in zip(x, y, strict=True):
                row, epoch = next(reference)
                assert inputs.tolist() == row[:-1] and targets.tolist() == row[1:]
            assert loader.epoch == epoch


def test_fewer_documents_than_the_buffer_holds():
    data = FakeData([documents(sizes("mixed", 30))])
    reference = reference_rows(data.groups)
    with Loader(data, 2) as loader:
        loader.clock = FakeClock()
        for _ in range(50):
            x, _ = next(loader)
            assert x.tolist() == [next(reference)[0][:-1] for _ in range(2)]
        assert loader.epoch > 10


@pytest.mark.parametrize("kind", ["mixed", "long", "ties"])
def test_stored_rows_drain_the_buffer_and_never_wrap(kind):
    data = FakeData(grouped(documents(sizes(kind, 1300)), 77, 300))
    rows = [row.tolist() for row in dataset.pack(data.batches())]
    assert rows == [row for row, _ in reference_rows(data.groups, endless=False)] and rows


def test_batches_and_counters(tiny_data):
    with Loader(tiny_data, 4) as loader:
        loader.clock = FakeClock()
        seen = [next(loader) for _ in range(6)]
        assert (loader.batches, loader.rows, loader.tokens) == (6, 24, 24 * 2048) and loader.waited >= 0
    for x, y in seen:
        for array in (x, y):
            assert array.dtype == np.int32 and array.shape == (4, 2048) and array.flags.c_contiguous
        assert (x[:, 1:] == y[:, :-1]).all() and (x[:, 0] == tiny_data.bos).all()
    assert not np.shares_memory(seen[0][0], seen[1][0])


def test_what_was_handed_out_is_counted_if_the_batch_size_changes(tiny_data):
    with Loader(tiny_data, 2) as loader:
        loader.clock, handed = FakeClock(), 0
        for batch_size in (2, 4, 1, 1):
            loader.batch_size = batch_size
            handed += len(next(loader)[0])
        assert loader.rows == handed and loader.tokens == handed * prepare.MAX_SEQ_LEN


def test_same_rows_whatever_the_batch_size(tiny_data):
    def rows(batch_size):
        with Loader(tiny_data, batch_size) as loader:
            loader.clock = FakeClock()
            return np.concatenate([next(loader)[0] for _ in range(24 // batch_size)])

    assert (rows(1) == rows(8)).all() and (rows(1) == rows(24)).all()


def test_epochs_are_counted():
    """A pass of 1280 documents of a row each: its last refill is taken in when 280 left the buffer of 1000."""
    data = FakeData([])
    data.batches = lambda: ((np.full(128 * 2049, BOS, np.uint16), [2049] * 128) for _ in range(10))
    with Loader(data, 1) as loader:
        loader.clock = FakeClock()
        epochs = [next(loader) and loader.epoch for _ in range(283)]
    assert epochs == [1] * 281 + [2] * 2


def test_no_training_batch_without_a_clock(tiny_data):
    with Loader(tiny_data, 2) as loader, pytest.raises(Invalid, match="before a Clock checked"):
        next(loader)


def test_error_in_the_thread_reaches_the_caller():
    data = FakeData([documents([50] * 2000)])
    error = OSError("the disk is gone")

    def failing():
        yield np.full(128 * 50, BOS, np.uint16), [50] * 128
        raise error

    data.batches = failing
    with Loader(data, 1) as loader:
        loader.clock = FakeClock()
        with pytest.raises(RuntimeError, match="the disk is gone") as caught:
            while True:
                next(loader)
        assert caught.value.__cause__ is error
        with pytest.raises(RuntimeError):
            next(loader)


def test_close_ends_the_thread_and_the_process(tiny_data):
    before, loader = threading.active_count(), Loader(tiny_data, 2)
    loader.clock = FakeClock()
    next(loader)
    process = loader._source._process
    assert threading.active_count() == before + 1 and process.poll() is None
    loader.close()
    loader.close()
    assert threading.active_count() == before and process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_rows_of_another_process_are_those_of_this_one(tiny_data):
    """And none but the first ones comes before a batch is asked for; those are the first batch's."""
    reference = dataset.endless(tiny_data.batches)
    with Loader(tiny_data, 3) as loader:
        loader.clock = FakeClock()
        first = loader.first_rows()
        assert first.shape == (dataset.FIRST_ROWS, 2049) and (loader.first_rows() == first).all()
        os.set_blocking(loader._source._rows.fileno(), False)
        time.sleep(0.3)
        assert not loader._source._rows.peek()
        os.set_blocking(loader._source._rows.fileno(), True)
        for batch in range(40):
            x, y = next(loader)
            for inputs, targets in zip(x, y, strict=True):
                row, epoch = next(reference)
                assert (inputs == row[:-1]).all() and (targets == row[1:]).all()
                assert batch or (row == first[0]).all() or (inputs != first[0][:-1]).any()
            assert loader.epoch == epoch


def test_a_process_that_fails_is_told(tiny_data, copy):
    (copy / "train_00000.lengths.npy").unlink()
    data = dataset.Data(copy, dataset.read_manifest(copy))
    with Loader(data, 2) as loader, pytest.raises(RuntimeError, match="ended"):
        loader.first_rows()


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_that_is_not_positive(tiny_data, batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Loader(tiny_data, batch_size)


def test_clock_refuses_a_late_batch(tiny_data):
    from fakes import Backend, Bigram

    def later(seconds):
        clock.started, clock.ticked = clock.started - seconds, clock.ticked - seconds

    with Loader(tiny_data, 2) as loader:
        clock = Clock(Backend(), Bigram(tiny_data), loader, seconds=0.01)
        next(loader)
        later(200)  # a slow first step that takes several batches
        next(loader)
        clock.tick(5.0)
        next(loader)  # as a loop that takes its next batch before it looks at the clock
        clock.tick(5.0)
        later(clock.longest + 1)
        with pytest.raises(Invalid, match="training went on for"):
            next(loader)


def test_clock_refuses_a_step_without_end(tiny_data):
    from fakes import Backend, Bigram

    with Loader(tiny_data, 2) as loader:
        clock = Clock(Backend(), Bigram(tiny_data), loader, seconds=1000)
        next(loader)
        clock.started = clock.ticked = clock.started - 990
        next(loader)
        clock.started = clock.ticked = clock.started - 12
        with pytest.raises(Invalid, match="training went on for 1002"):
            next(loader)


@pytest.mark.parametrize(
    "begin",
    [lambda: Loader(FakeData([]), 4), lambda: Clock(None, None, None), lambda: Measurement(QUICK)],
    ids=["loader", "clock", "calibration"],
)
def test_nobody_trains_or_measures_in_an_agents_turn(monkeypatch, begin):
    monkeypatch.setenv(prepare.TURN, "a turn")
    with pytest.raises(storage.Stop, match="python -m lab check"):
        begin()
