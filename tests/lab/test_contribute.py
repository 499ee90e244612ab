"""What a machine gives: what stands in the archive, and the table that is made from it."""

import json
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import exports
import pytest
import sessions
from sessions import ROOT

import backends
import contribute
import demo
import storage
from backends.interface import Hardware
from calibration import profile as profiles
from lab.share import sources

HARDWARE = Hardware("sdpa", "AMD EPYC", "fake-1gb", "cpu", 2**30, exports.PROFILE["versions"])


@pytest.fixture
def made(tmp_path, runner, monkeypatch):
    """Contributes a session that is there already; gives what was written, and which commands were run for it."""
    session = exports.worked(tmp_path / "my project")
    commands = []
    monkeypatch.setattr(backends, "identify", lambda: HARDWARE)
    monkeypatch.setattr(contribute, "_session", lambda clone, budget, quick: session)
    monkeypatch.setattr(contribute, "_command", lambda folder, *arguments, **_: commands.append(arguments))
    monkeypatch.chdir(tmp_path)

    def make(*options):
        assert contribute.main([*options]) == 0
        return Path("fake-1gb-sdpa.tar.gz"), commands

    return make


def test_it_holds_the_session_and_what_the_machine_is(made, tmp_path, capsys):
    path, commands = made()
    assert commands == [("prepare.py", "--dataset", "stdlib"), ("-m", "calibration")]
    with tarfile.open(path) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(tmp_path / "there", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    folder = tmp_path / "there" / "fake-1gb-sdpa"
    record = sources.read(folder / "session")  # it can be imported as any session
    facts = json.loads((folder / "tried.json").read_text())
    assert facts["session"]["runs"] == len(record.state.runs) and facts["session"]["failed"]
    assert facts["packages"]["numpy"] and facts["precision"] == exports.PROFILE["settings"]["precision"]
    said = (folder / "README.md").read_text()
    assert said in capsys.readouterr().out and "| sandbox | " in said and "A run failed: " in said
    assert not [name for name in (said, json.dumps(facts)) if str(tmp_path) in name or str(Path.home()) in name]


@pytest.mark.parametrize("before", [None, "climbmix"])
def test_the_dataset_that_is_taken_by_default_stays(made, monkeypatch, before):
    current = storage.home() / "data" / "current"
    current.parent.mkdir(parents=True, exist_ok=True)
    if before:
        current.write_text(before)
    prepares = {"prepare.py": lambda: current.write_text("stdlib")}
    monkeypatch.setattr(contribute, "_command", lambda _, first, *rest, **__: prepares.get(first, int)())
    made()
    assert (current.read_text() if current.exists() else None) == before


def test_a_current_calibration_is_used(made):
    content = exports.PROFILE | {"device": HARDWARE.slug}
    storage.write_json(profiles.path_of(HARDWARE), content)
    assert made("--quick")[1] == [("prepare.py", "--dataset", "stdlib")]


def test_a_stale_calibration_is_made_again(made, monkeypatch):
    content = exports.PROFILE | {"device": HARDWARE.slug}
    storage.write_json(profiles.path_of(HARDWARE), content)
    newer = replace(HARDWARE, versions=HARDWARE.versions | {"torch": "9.9"})
    monkeypatch.setattr(backends, "identify", lambda: newer)
    assert made("--quick")[1][-1] == ("-m", "calibration", "--quick")


def test_an_archive_that_is_there_is_not_written_over(made, capsys):
    path, _ = made()
    before = path.read_bytes()
    assert contribute.main([]) == 1 and "exists; remove it" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("given, said", [
    ("quick", "quick has to end in .tar.gz"),
    ("--budget 0", "above 0, not 0"),
    ("--budget nan", "above 0, not nan"),
    ("--table --quick", "--table goes alone"),
    ("file/x.tar.gz", "could not write file/x.tar.gz"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_before_the_work(made, monkeypatch, capsys, given, said):
    monkeypatch.setattr(contribute, "_command", None)  # would be a TypeError
    Path("file").touch()
    with suppress(SystemExit):
        assert contribute.main(given.split()) == 1
    assert said in capsys.readouterr().err


def test_its_session_makes_the_change_of_the_demo(tmp_path, monkeypatch):
    sessions.repository(tmp_path / "project", (ROOT / "train.py").read_bytes())
    monkeypatch.setattr(contribute, "ROOT", tmp_path / "project")
    monkeypatch.setattr(contribute, "_command", lambda *_, **__: None)
    monkeypatch.setattr(contribute, "Session", Path)
    monkeypatch.setattr(demo, "AFTER", "WARMDOWN_RATIO = 0.9")
    contribute._session(tmp_path / "clone", 1.0, True)
    assert b"\nWARMDOWN_RATIO = 0.9\n" in (tmp_path / "clone" / "train.py").read_bytes()
    monkeypatch.setattr(demo, "BEFORE", "no such line")
    with pytest.raises(storage.DataError, match="nothing was written"):
        contribute._session(tmp_path / "again", 1.0, True)


def test_a_step_that_fails_leaves_no_archive(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "identify", lambda: HARDWARE)
    monkeypatch.setattr(contribute, "ROOT", tmp_path)  # where there is no prepare.py
    monkeypatch.chdir(tmp_path)
    assert contribute.main([]) == 1
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.glob("*.tar.gz"))


def test_the_readme_has_the_table():
    assert f"\n\n{contribute.table()}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    given = {path.name for path in contribute.TRIED.glob("*.json")}
    assert given <= {path.name for path in contribute.PROFILES.glob("*.json")}


def test_a_batch_that_was_not_tried_itself_has_the_speed_of_its_depth():
    settings = exports.PROFILE["settings"]
    other = exports.PROFILE | {"settings": settings | {"device_batch_size": 7 * settings["device_batch_size"]}}
    rates = [trial.rate for trial in profiles.completed(other) if trial.depth == settings["depth"]]
    assert contribute.tried(other)["tokens_per_second"] == round(max(rates)) > 0
