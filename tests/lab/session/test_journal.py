"""The journal: what was appended is there, what a power failure cut short is not, and nothing is taken for an event."""

import errno
import multiprocessing
import os
import signal

import pytest
import sessions

from lab.errors import LabError
from lab.session.events import ExperimentOpened, HarnessFailed, RunEnded, RunStarted, SessionStarted
from lab.session.journal import Journal
from lab.session.session import Session
from lab.session.state import State
from lab.verdict import executor

START = SessionStarted(tag="night", device="fake-1gb", time=1.0)
OPENED = ExperimentOpened(number=0, kind="baseline", blob="ab", description="tab\tline\nend", time=2.0)


def failed(number):
    return HarnessFailed(experiment=number)


def numbers(journal):
    return [event.experiment for event in journal.events]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_events_come_back_in_order(path):
    journal = Journal(path)
    assert journal.append(START) == [START] and journal.append(OPENED) == [OPENED]
    assert Journal(path).events == journal.events == [START, OPENED]


def test_a_reader_sees_what_another_appends(path):
    writer, reader = Journal(path), Journal(path)
    writer.append(START)
    assert reader.refresh() == [START]
    assert reader.refresh() == []


def test_a_writer_takes_in_what_another_wrote_before_it(path):
    here, there = Journal(path), Journal(path)
    here.append(failed(1))
    there.append(failed(2))
    assert numbers(there) == [1, 2]


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_cut_short_at_any_byte_is_dropped_and_written_over(path, cut):
    journal = Journal(path)
    journal.append(failed(1))
    journal.append(failed(2))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    again = Journal(path)
    assert numbers(again) == [1]
    again.append(failed(3))
    assert numbers(Journal(path)) == [1, 3]


def test_zeros_where_the_disk_lost_a_block_are_no_event(path):
    Journal(path).append(failed(1))
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    again = Journal(path)
    again.append(failed(2))
    assert numbers(Journal(path)) == [1, 2]


def test_a_line_that_is_damaged_in_the_middle_is_an_error_that_names_it(path):
    for number in (1, 2, 3):
        Journal(path).append(failed(number))
    path.write_bytes(path.read_bytes().replace(b'"experiment":2', b'"experiment":?'))
    with pytest.raises(LabError, match="line 2 is damaged .* put back a copy"):
        Journal(path)


def test_an_event_of_an_unknown_kind_is_an_error_that_names_it(path):
    Journal(path).append(failed(1))
    with open(path, "ab") as file:
        file.write(b'{"event":"teleported","experiment":1}\n')
    with pytest.raises(LabError, match="line 2: an event of the unknown kind 'teleported'; another version"):
        Journal(path)


def test_fields_that_are_not_known_are_left_out_and_fewer_are_accepted(path):
    path.write_bytes(
        b'{"event":"run","number":1,"experiment":0,"blob":"ab","wattage":3}\n{"event":"failed","experiment":1}\n'
    )
    assert Journal(path).events == [RunStarted(number=1, experiment=0, blob="ab"), HarnessFailed(experiment=1)]


def test_an_event_is_flushed_before_append_returns(path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), fsync(fd)))
    Journal(path).append(failed(1))
    assert path.stat().st_size in flushed


# --- What contradicts itself ---


def test_an_event_twice_changes_nothing_and_another_in_its_place_is_an_error():
    run = RunStarted(number=1, experiment=0, blob="ab", seed=1)
    ended = RunEnded(run=1, status="ok", result={"val_bpb": 1.0})
    state = State([START, OPENED, run, ended, START, OPENED, run, ended])
    assert len(state.experiments) == len(state.runs) == 1 and state.runs_of("ab")[0].bpb == 1.0
    for other in (
        SessionStarted(tag="other", device="fake-1gb"),
        ExperimentOpened(number=0, kind="baseline", blob="cd"),
        RunStarted(number=1, experiment=0, blob="ab", seed=2),
        RunEnded(run=1, status="crash"),
    ):
        with pytest.raises(LabError, match="contradicts itself|twice"):
            state.take(other)
    for unknown in (RunEnded(run=2, status="ok"), failed(7)):
        with pytest.raises(LabError, match="which it never"):
            state.take(unknown)


def test_two_sessions_of_one_folder_write_one_history(tmp_path, runner):
    here = sessions.make(tmp_path / "project")
    there = Session(here.folder)
    here.log(failed(0))
    there.log(failed(0))
    here.log(failed(0))
    assert there.state.baseline.failures == 2 and here.state.baseline.failures == 3
    there.refresh()
    assert there.state.baseline.failures == 3
    executor.supervise(there)


# --- Two writers ---


def write_events(path, first, count, ready):
    ready.wait()
    for number in range(first, first + count):
        Journal(path).append(failed(number))


def write_for_ever(path, sent):
    journal = Journal(path)
    for number in range(10**6):
        journal.append(failed(number))
        sent.send(number)


def test_two_writers_at_once_lose_and_mix_nothing(path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writers = [context.Process(target=write_events, args=(path, first, 60, ready)) for first in (0, 1000)]
    for writer in writers:
        writer.start()
    ready.set()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    written = numbers(Journal(path))
    assert sorted(written) == [*range(60), *range(1000, 1060)]
    assert [number for number in written if number < 1000] == list(range(60))


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_writer_that_is_killed_holds_nothing_and_what_it_told_is_there(path):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    writer = context.Process(target=write_for_ever, args=(path, send))
    writer.start()
    send.close()
    while receive.recv() < 20:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    last = 20
    while receive.poll():
        try:
            last = receive.recv()
        except EOFError:
            break
    assert numbers(Journal(path))[: last + 1] == list(range(last + 1))
    Journal(path).append(failed(10**6))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_what_could_not_be_read_again_is_not_written(path, seconds):
    """A worker's report may say anything."""
    journal = Journal(path)
    journal.append(START)
    with pytest.raises(LabError, match="does not fit the journal"):
        journal.append(RunEnded(run=1, status="lost", seconds=seconds))
    assert journal.append(OPENED) == [OPENED] and Journal(path).events == [START, OPENED]


def test_a_journal_that_became_shorter_is_left_as_it_is(path):
    journal = Journal(path)
    journal.append(START)
    copy = path.read_bytes()
    journal.append(OPENED)
    path.write_bytes(copy)
    with pytest.raises(LabError, match="shorter than it was"):
        journal.append(failed(1))
    assert path.read_bytes() == copy


def test_what_others_wrote_counts_also_where_writing_fails(tmp_path, monkeypatch):
    session = sessions.make(tmp_path / "project")
    Session(session.folder).log(failed(0))

    def full(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("lab.session.journal.sync", full)
    with pytest.raises(OSError, match="full"):
        session.log(failed(0))
    assert session.state.experiments[0].failures == 1
