"""Sessions that travel: what was exported is what arrives, and every view can be made of the journal again."""

import os
import shutil
import time
from pathlib import Path

import pytest
import sessions
from exports import (
    BASE,
    begun,
    confirm,
    contents,
    events_in,
    imported,
    refused,
    replayed,
    tampered,
    with_,
    with_events,
)
from sessions import DEVICE, TAG

import storage
from lab.errors import LabError
from lab.reasons import because
from lab.session import events, ledger
from lab.session.journal import Journal
from lab.session.record import Record
from lab.session.session import Session
from lab.session.state import State
from lab.share import archive, export, sources
from lab.share.export import export_session
from lab.share.summary import LISTED, summary
from lab.share.verify import verified
from lab.verdict import executor, opening

# --- There and back ---


@pytest.mark.parametrize("ending", ["", ".tar.gz", ".tgz"])
def test_a_session_arrives_as_it_was_exported(session, sent, tmp_path, ending):
    again = export_session(session, tmp_path / f"again{ending}")
    there = imported(again, tmp_path / "elsewhere")
    assert there == tmp_path / "elsewhere" / "imported" / DEVICE / TAG
    assert contents(there) == contents(sent) and not list(there.parent.glob(".*"))


def test_what_arrives_is_what_was_there(session, sent):
    there, here = sources.read(sent), sources.read(session.name)
    assert there.name == f"{DEVICE}/{TAG}" and there.base == here.base == BASE
    assert [(e.number, e.kind, e.status, e.onto) for e in there.state.experiments.values()] == [
        (0, "baseline", "keep", None),
        (1, "change", "keep", 0),
        (2, "change", "discard", 1),
        (3, "change", "crash", 1),
        (4, "change", "keep", 1),
    ]
    for number, experiment in session.state.experiments.items():
        assert there.train(number) == session.repository.content(experiment.blob)
        assert there.state.experiments[number].change == experiment.change
    assert there.state.runs == here.state.runs and there.state.best.number == 4
    assert sorted(name for name in contents(sent) if name.startswith("rows/")) == [
        f"rows/{run.number:04d}.npz" for run in session.state.runs.values() if run.scored
    ]


def test_every_view_is_made_of_the_journal_alone(session, sent, tmp_path, monkeypatch, capsys):
    """Over a session with every kind of event."""
    other = begun(tmp_path / "other", tag="other")
    replayed(other, sent, capsys, runs=3)  # judged, and further runs made
    replayed(other, sent, capsys, runs=5)  # repeats
    sessions.attempt(other, with_(BASE, A=0.0005))
    sessions.attempt(other, with_(BASE, C=0.2), message="better\tby far")
    confirm(other)
    best = other.state.best
    with opening.exclusive(other):
        facts = opening.facts_of_change(other, best, with_(BASE, C=0.2, FAILS="crash"))
        odd = other.open_experiment(kind="change", commit=best.here, **facts)
        run = other.start_run(odd, odd.blob, 42, 300.0)
        other.log(events.StakeReserved(experiment=odd.number, stake=0.001))
        other.log(events.HarnessFailed(experiment=odd.number))
        other.log(events.RunEnded(run=run.number, status="lost", reason=because("killed")))
    executor.supervise(other)
    sessions.attempt(other, with_(BASE, C=0.2) + b"ATTENTION = 'elsewhere'\n", message="slow")
    other.log(events.Sampled(experiment=other.state.best.number, prompt="p", baseline="b", best="c"))
    kinds = {type(event) for event in other.journal.events}
    assert kinds == set(events.AnyEvent.__args__)
    assert {e.kind for e in other.state.experiments.values()} >= {"baseline", "change", "replay", "repeat", "confirm"}
    assert {run.status for run in other.state.runs.values()} >= {"ok", "crash", "lost", "invalid"}

    there = export_session(other, tmp_path / "all")
    record = sources.read(there)
    assert contents(there)["results.tsv"] == other.ledger.read_bytes() == ledger.dumps(ledger.rows_of(record.state))
    assert vars(record.state) == vars(other.state)
    alone = State(Journal(there / "journal.jsonl").events)
    assert summary(Record(alone, BASE)).encode() == (there / "SUMMARY.md").read_bytes()
    for number, experiment in other.state.experiments.items():
        assert record.train(number) == other.repository.content(experiment.blob)
    assert contents(imported(there, tmp_path / "elsewhere")) == contents(there)
    assert "confirmation: on held-out rows and 2 new seeds" in summary(record)


def test_two_thousand_runs_travel_within_five_seconds_of_the_processor(session, tmp_path):
    state, best = session.state, session.state.best
    path, number, run = session.folder / "journal.jsonl", state.last.number, max(state.runs)
    lines = []
    last = state.experiments[2]
    while run < 2000:
        number, run = number + 1, run + 1
        content = with_(BASE, A=0.1, C=0.05, B=-0.0001 * number)
        facts = opening.facts_of_change(session, best, content) if number < 40 else facts  # noqa: F821
        ended = events.RunEnded(run=run, status="ok", result=last.runs[0].result, seconds=320.0)
        lines += [
            events.ExperimentOpened(number=number, kind="change", commit=best.commit, description="more", **facts),
            events.RunStarted(number=run, experiment=number, blob=facts["blob"], seed=42, budget=300.0),
            ended,
            events.ExperimentDecided(experiment=number, verdict=last.verdict),
            events.ExperimentApplied(experiment=number, commit=best.commit),
        ]
    with open(path, "ab") as file:
        file.write(b"".join(events.msgspec.json.encode(line) + b"\n" for line in lines))
    session = Session(session.folder)
    start = time.process_time()
    exported = export_session(session, tmp_path / "long.tar.gz")
    middle = time.process_time()
    imported(exported, tmp_path / "elsewhere")
    took = middle - start, time.process_time() - middle
    print(f"2,000 runs: exported in {took[0]:.2f} s, imported in {took[1]:.2f} s")
    assert sum(took) < 5
    text = summary(sources.read(exported))
    assert f"- and {1994 + 1 - LISTED} more, in journal.jsonl" in text and len(text) < 20_000


# --- What goes along, and what does not ---


def test_equal_sessions_give_equal_files(session, tmp_path):
    one, other = (export_session(session, tmp_path / f"{name}.tar.gz") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_nothing_of_the_machine_goes_along(session, tmp_path, isolated_home):
    session.log(events.HarnessFailed(experiment=4))
    run = session.state.runs[1]
    session.journal.events[3].traceback = f'File "/home/jane/x.py", /usr/lib/python3/zip.py: {run.number}'
    there = export_session(session, tmp_path / "there")
    text = b"\n".join(data for name, data in contents(there).items() if not name.endswith(".npz")).decode()
    for private in (str(isolated_home), str(tmp_path), str(Path.home()) + "/", "jane", "/usr/lib", "my project"):
        assert private not in text, private
    assert "see .../notes.txt" in text and r"File \".../x.py\", .../zip.py: 1" in text


def test_control_characters_stay_here(session, tmp_path):
    odd = sessions.attempt(session, with_(BASE, A=0.1, C=0.05) + b"ODD = '\x01'\n", message="\x1b[2Jodd")
    there = sources.read(export_session(session, tmp_path / "there"))
    assert there.state.experiments[odd.number].description == "odd"
    assert there.train(odd.number).endswith(b"ODD = '\x01'\n")  # what was run stays what it was


@pytest.mark.parametrize(
    "text, cut",
    [
        ("/home/jane/x.py failed", ".../x.py failed"),
        ("C:\\Users\\jane\\x.py failed", ".../x.py failed"),
        ("in /data/my files/lab/run.log.", "in .../run.log."),
        ("in /data/my files", "in ..."),
        ("=/usr/include", "=.../include"),
        ("and/or 1/2/4 a/b/c", "and/or 1/2/4 a/b/c"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("\\alpha\\beta lr/2 ~/x/y ../a/b", "\\alpha\\beta lr/2 ~/x/y ../a/b"),
        ("a /data/my files2", "a .../my files2"),
        ("at \\DATA\\My Files\\x.py", "at .../x.py"),
        ("file:///home/jane/secret/x.py", ".../x.py"),
        ("/Users/Jane Doe/x.py", ".../x.py"),
        ("C:/Users/Jane Doe/auto/x.py and c:\\users\\jane doe\\x.py", ".../x.py and .../x.py"),
        ("\\\\server\\jane\\share\\x.py", ".../x.py"),
        ("a /x/y then and/or z", "a .../y then and/or z"),
    ],
)
def test_paths_are_cut_down_to_names(text, cut):
    assert export._cleaner(Path("/data/my files"))({"a": [text, 1, None]}) == {"a": [cut, 1, None]}


def test_the_summary_says_what_was_found(session, sent):
    text = (sent / "SUMMARY.md").read_text()
    assert "changes tried: 4; better: 2; not better: 1; crashed: 1; could not be judged: 0" in text
    assert "val\\_bpb: baseline 1.0" in text or "val_bpb: baseline 1.0" in text or "val_bpb: baseline 0.99" in text
    assert r"| 4 | C \<b\>more\</b\> | other | -0.0" in text and r"- 2: B \| less: +0." in text
    assert "- 3: fails: crash (exit status crash)" in text and "confirmation: none was made" in text
    assert "python -m lab replay SESSION --stack" in text and "exp/DEVICE/TAG" in text
    assert "runs: 7: 6 ok, 1 crash" in text


def test_only_the_sessions_own_runs_are_told_as_its_scores(session, tmp_path):
    before = [line for line in summary(sources.read(session.name)).split("\n") if "val_bpb: baseline" in line]
    confirm(session, budget=1200.0)
    text = summary(sources.read(session.name))
    assert before[0] in text.split("\n") and "confirmation: in runs of 1200 s, on held-out rows and 2 new seeds" in text


def test_near_misses_are_told_as_such(session, sent):
    def change(lines):
        verdict = next(e for e in lines if e["event"] == "decided" and e["experiment"] == 2)["verdict"]
        verdict["evidence"]["near_miss"] = True

    assert "## Near misses" in (with_events(sent, change) / "SUMMARY.md").read_text()


# --- Whole or not at all ---


def test_a_target_that_exists_is_left_alone(session, sent, tmp_path):
    before = contents(sent)
    with pytest.raises(LabError, match="exists; remove it"):
        export_session(session, sent)
    assert contents(sent) == before
    (tmp_path / "link.tar.gz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LabError, match="exists"):
        export_session(session, tmp_path / "link.tar.gz")


@pytest.mark.parametrize("ending", ["", ".tar.gz"])
def test_an_export_that_fails_leaves_nothing(session, tmp_path, monkeypatch, ending):
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > (4 if not ending else 0):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.DataError, match="free some space"):
        export_session(session, tmp_path / "out" / f"x{ending}")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda folder: (folder / "runs/0003/rows.npz").write_bytes(b"x"), "rows/0003.npz is not what the journal"),
        (lambda folder: (folder / "profile.json").write_text("{}"), "profile.json is of format None"),
        (lambda folder: (folder / "profile.json").write_text("{"), "can't be exported"),
        (
            lambda folder: (folder / "judge" / "train.py").write_text("A = 1\n"),
            "train.py is not what the session began",
        ),
        (lambda folder: (folder / "judge" / "train.py").unlink(), "can't be exported"),
    ],
)
def test_a_damaged_session_is_not_exported(session, tmp_path, damage, match):
    damage(session.folder)
    with pytest.raises(LabError, match=match):
        export_session(session, tmp_path / "sent")
    assert not (tmp_path / "sent").exists()


def test_losses_that_were_tidied_up_are_left_out_and_told(session, tmp_path, capsys):
    export_session(session, tmp_path / "whole")
    assert capsys.readouterr().err == ""
    scored = [f"{run.number}" for run in session.state.runs.values() if run.scored]
    shutil.rmtree(session.folder / "runs")
    there = export_session(session, tmp_path / "there")
    assert f"lacks the losses by row of runs {', '.join(scored)}: rows.npz is missing" in capsys.readouterr().err
    assert not any(name.startswith("rows/") for name in contents(there))
    assert contents(imported(there, tmp_path / "elsewhere")) == contents(there)


# --- Importing again ---


def test_importing_again_changes_nothing_and_another_is_refused(session, sent, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    there = imported(sent, elsewhere)
    assert imported(sent, elsewhere) == there
    assert capsys.readouterr().err == f"{DEVICE}/{TAG} is imported already\n"
    (session.folder / "runs" / "0004" / "rows.npz").unlink()
    other = export_session(session, tmp_path / "other")
    refused(other, elsewhere, "holds another session of that name. Remove it")
    (there / "SUMMARY.md").unlink()
    refused(sent, elsewhere, "holds another session")


@pytest.mark.parametrize("ending", ["", ".tar.gz"])
def test_a_session_that_has_gone_on_takes_the_place_of_what_was_imported(session, sent, tmp_path, capsys, ending):
    elsewhere = tmp_path / "elsewhere"
    there = imported(sent, elsewhere)
    sessions.attempt(session, with_(BASE, A=0.1, B=0.2, C=0.05), message="B more")
    later = export_session(session, tmp_path / f"later{ending}")
    assert imported(later, elsewhere) == there
    assert capsys.readouterr().err == f"{DEVICE}/{TAG} was imported when it was shorter; now it is as in {later}\n"
    assert sources.read(there).state.last.number == 5 and list(there.parent.iterdir()) == [there]
    assert contents(there) == contents(export_session(session, tmp_path / "again"))
    refused(sent, elsewhere, "holds another session")  # which would be a step back


def test_an_import_that_fails_leaves_what_was_imported(session, sent, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    there = imported(sent, elsewhere)
    sessions.attempt(session, with_(BASE, A=0.1, B=0.2, C=0.05), message="B more")
    later, rename = export_session(session, tmp_path / "later"), os.rename

    def full(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(storage.DataError, match="free some space"):
        imported(later, elsewhere)
    assert contents(there) == contents(sent) and list(there.parent.iterdir()) == [there]


def test_only_a_bare_ledger_takes_a_device(sent, tmp_path):
    refused(sent, tmp_path / "elsewhere", "leave --device out", device="other-1gb")


@pytest.mark.parametrize("name", ["results.tsv", "SUMMARY.md"])
@pytest.mark.parametrize("content", [b"commit\tother\nabc\t1.0\n", b"\x1b[2J", b"\xff", None])
def test_views_are_made_again_and_not_believed(sent, tmp_path, name, content):
    """Also those of a version with other columns, or other sentences."""
    before = contents(sent)
    assert contents(imported(tampered(sent, **{name: content}), tmp_path / "elsewhere")) == before


def test_the_files_of_an_export_verify_by_themselves(sent):
    assert verified(archive.read(sent)).state.best.number == 4
    assert {event["event"] for event in events_in(sent)} >= {"session", "experiment", "run", "ran", "scored", "decided"}
