"""The journal: what was appended is there, what a power failure cut short is not."""

import json
import os

import pytest

from lab.session.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_events_come_back_in_order(path):
    journal = Journal(path)
    journal.append("one", value=1, text="tab\tline\nend")
    journal.append("two")
    assert Journal(path).events == journal.events
    assert Journal(path).events == [{"event": "one", "value": 1, "text": "tab\tline\nend"}, {"event": "two"}]


def test_a_reader_sees_what_another_appends(path):
    writer, reader = Journal(path), Journal(path)
    writer.append("one")
    assert reader.refresh() == [{"event": "one"}]
    assert reader.refresh() == []


def test_a_writer_takes_in_what_another_wrote_before_it(path):
    one, other = Journal(path), Journal(path)
    one.append("first")
    other.append("second")
    assert [event["event"] for event in other.events] == ["first", "second"]


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_cut_short_at_any_byte_is_dropped_and_written_over(path, cut):
    journal = Journal(path)
    journal.append("kept")
    journal.append("lost", value=1)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    again = Journal(path)
    assert [event["event"] for event in again.events] == ["kept"]
    again.append("next")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["kept", "next"]


def test_zeros_where_the_disk_lost_a_block_are_no_event(path):
    Journal(path).append("kept")
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    again = Journal(path)
    again.append("next")
    assert [event["event"] for event in Journal(path).events] == ["kept", "next"]


def test_an_event_is_flushed_before_append_returns(path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), fsync(fd)))
    Journal(path).append("one")
    assert path.stat().st_size in flushed
