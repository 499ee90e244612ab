"""What was found elsewhere is tried where it was not tried here and applies; what became of it is told."""

import json
from types import SimpleNamespace

import exports
import pytest
import sessions
from test_loop import Seen, options
from test_prompt import PROGRAM

import storage
from lab.cli import commands
from lab.compare import comparison, published, tables
from lab.compare.analysis import Analysis
from lab.genome.edits import NotHere
from lab.fleet import settings
from lab.night import findings, loop, prompt, proposer
from lab.session.events import HarnessFailed
from lab.session.session import Session
from lab.share import sources
from lab.share.replay import Kept
from lab.verdict import blocks, executor, opening, plan
from lab.verdict.executor import supervise

FILE = "What {0} does.\ntime: holds\nevidence: {1} | 300 | {2} bpb | said | https://somewhere\n\n{3}\n"
FILES = {
    "lower-loss": ("fake-2gb", "-0.02", "LOSS: 1.0 -> 0.9"),
    "warm-up": ("fake-2gb", "-0.01", "WARMUP_RATIO: 0.0 -> 0.1"),
    "not-here": ("fake-2gb", "-0.01", "OTHER: 1.0 -> 2.0"),
    "no-gain": ("fake-2gb", "+0.01", "DEPTH: 4 -> 5"),
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Four published findings."""
    folder = tmp_path / "findings"
    folder.mkdir()
    for name, facts in FILES.items():
        (folder / f"{name}.txt").write_text(FILE.format(name, *facts))
    found = published.library(folder)
    monkeypatch.setattr(published, "library", lambda: found)
    return {one.name: one for one in found}


def other(tmp_path, train, tag, **edits):
    """Another session of this home, which kept something."""
    one = sessions.make(tmp_path / tag, train=train, tag=tag)
    supervise(one)
    content = one.repository.train()
    for name, (old, new) in edits.items():
        content = content.replace(f"{name} = {old}".encode(), f"{name} = {new}".encode())
    sessions.attempt(one, content, f"from {tag}")
    assert one.state.best.number == 1
    return one


def test_what_was_kept_elsewhere(searched, tried, tmp_path):
    train = searched.repository.train()
    assert findings.untried(searched) == []
    other(tmp_path, train, "better", LOSS=(1.0, 0.8), WARMUP_RATIO=(0.0, 0.1))
    other(tmp_path, train, "here", LOSS=(1.0, 0.9))
    (storage.home() / "imported" / "gpu" / "broken").mkdir(parents=True)
    (storage.home() / "imported" / "gpu" / "broken" / "journal.jsonl").write_text("no journal\n")
    found = findings.untried(searched)
    assert sorted(one.description for one in found) == ["from better", "from here"]
    text = prompt.write(searched, PROGRAM, [])
    assert "# Kept in other sessions, not tried here" in text and "-WARMUP_RATIO = 0.0\n+WARMUP_RATIO = 0.1" in text
    tried("LOSS = 1.0", "LOSS = 0.9")  # now it was tried here
    assert [one.description for one in findings.untried(searched)] == ["from better"]
    tried("WARMUP_RATIO = 0.0", "WARMUP_RATIO = 0.2", "keep")  # and now that no longer applies
    assert findings.untried(searched) == []


def test_what_was_kept_elsewhere_has_to_promise_as_much_and_not_to_be_screened(
    searched, library, tmp_path, monkeypatch
):
    one = sessions.make(tmp_path / "one", train=searched.repository.train(), tag="one")
    supervise(one)
    run(one, library, "lower-loss")
    assert one.state.best.origin == library["lower-loss"].origin
    ideas = {idea.origin: idea.gain for idea in findings.ideas(searched)}
    assert ideas[one.state.best.origin] == one.state.best.gain
    assert one.state.best.origin not in {idea.origin for idea in findings.ideas(searched, 1.1 * one.state.best.gain)}
    monkeypatch.setattr(blocks, "screened", lambda state: {one.state.best.origin})
    assert [idea.name for idea in findings.ideas(searched)] == ["warm-up"]


# --- Published findings ---


def test_the_most_promising_come_first(searched, library, tried):
    assert [idea.description.partition(":")[0] for idea in findings.ideas(searched)] == ["lower loss", "warm up"]
    tried("LOSS = 1.0", "LOSS = 0.9")  # whoever tried it: an equal file was decided on
    assert [idea.description.partition(":")[0] for idea in findings.ideas(searched)] == ["warm up"]


def test_a_night_tries_them_first(searched, library, monkeypatch):
    monkeypatch.setattr(loop.executor, "launch", lambda session: supervise(session))
    monkeypatch.setattr(loop.proposer, "propose", lambda *_: pytest.fail("a finding is left"))
    night = loop.Night(searched, options(findings=True, max_experiments=2), Seen())
    night.run()
    tried = [e for e in Session(searched.folder).state.experiments.values() if e.number]
    assert [e.origin for e in tried] == [library["lower-loss"].origin, library["warm-up"].origin]
    assert tried[0].status == "keep" and b"LOSS = 0.9" in searched.repository.train()
    assert [turn.by for turn in night.turns] == ["findings", "findings"]
    assert list(findings.ideas(searched)) == []


def test_what_noise_hides_is_no_experiment_of_its_own(searched, library, monkeypatch):
    gains = [idea.gain for idea in findings.ideas(searched)]
    for noise, tried in ((0.0019, 2), (2 * gains[0], 1), (2.1 * gains[0], 0)):
        for module in (findings, blocks):
            monkeypatch.setattr(module, "noise_of", lambda state, noise=noise: SimpleNamespace(sd=noise))
        assert len(list(findings.ideas(searched, findings.alone(searched)))) == tried, noise
    assert len(list(findings.ideas(searched))) == 2  # for shared runs, and for agents
    night = loop.Night(searched, options(findings=True), seen := Seen())
    assert not night._take_finding() and not night._take_finding()
    assert len(seen.lines) == 1 and "a longer night has time to share runs" in seen.lines[0]
    for arm in ("finding", "step"):
        monkeypatch.setattr(proposer, "_arms", lambda *_, arm=arm: [arm, "step"])
        assert not proposer.propose(searched).origin


def test_a_killed_night_keeps_the_origin(searched, library, monkeypatch):
    monkeypatch.setattr(loop.executor, "launch", lambda session: supervise(session))
    night = loop.Night(searched, options(findings=True), Seen())
    night._take_finding()  # and then it was killed
    loop.Night(Session(searched.folder), options(findings=True, max_experiments=1), Seen()).run()
    assert Session(searched.folder).state.last.origin == library["lower-loss"].origin


def run(session, library, name, status_runs=4):
    """A finding, tried to its verdict."""
    finding = library[name]
    content = finding.apply(session.repository.content(session.state.best.blob), session.profile["settings"])
    return sessions.attempt(session, content, finding.title, more={"origin": finding.origin})


def test_a_replay_that_helps_is_still_tried_on_the_best(searched, library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(executor, "launch", lambda session: supervise(session))
    for name, status in (("lower-loss", "KEEP"), ("warm-up", "DISCARD")):
        assert status in exports.replayed(searched, tmp_path / "findings" / f"{name}.txt", capsys)
        ideas = {idea.origin for idea in findings.ideas(searched, -1.0)}
        assert (library[name].origin in ideas) == (status == "KEEP")


def test_what_was_not_judged_is_tried_once_more(searched, library, tmp_path):
    other(tmp_path, searched.repository.train(), "other", LOSS=(1.0, 0.8))
    for times in (0, 1, 2):
        ideas = {idea.description.partition(":")[0]: idea for idea in findings.ideas(searched, -1.0)}
        assert ("lower loss" in ideas) == ("from other" in ideas) == (times < 2)
        for idea in ("lower loss", "from other") if times < 2 else ():
            idea = ideas[idea]
            with opening.exclusive(searched):
                opening.open_change(searched, idea.description, content=idea.content, more={"origin": idea.origin})
            for _ in range(plan.TRIES):
                searched.log(HarnessFailed(experiment=searched.state.last.number))
            supervise(searched)
            assert searched.state.last.verdict.reason.code == "harness_failed"


def test_the_list_says_what_became_of_them(searched, library, monkeypatch, capsys):
    run(searched, library, "lower-loss")
    monkeypatch.setattr(commands, "_session_here", lambda: searched)
    rows = {row["name"]: row for row in json.loads(said_by(capsys, json=True))}
    assert rows["lower-loss"]["here"].startswith("experiment 1, keep: holds") and rows["lower-loss"]["effect"][0] < 0
    assert rows["warm-up"]["here"] == "not tried"
    assert rows["not-here"]["here"] == "does not apply: there is no hyperparameter OTHER"
    text = said_by(capsys)
    assert "elsewhere: -0.02 bpb on fake-2gb" in text and "below 0 is better" in text
    monkeypatch.setattr(commands, "_session_here", lambda: None)
    assert [row["here"] for row in json.loads(said_by(capsys, json=True))] == [""] * 4


def said_by(capsys, **values):
    capsys.readouterr()
    assert commands.do_findings(sessions.options(**values)) == 0
    return capsys.readouterr().out


def test_a_comparison_tells_which_hold(searched, library):
    run(searched, library, "lower-loss")
    compared = comparison.compare([Analysis(sources.of_session(searched))])
    (one,) = compared.published
    (cell,) = one.change.cells.values()
    assert one.finding.name == "lower-loss" and cell.verdict == "holds"
    text = tables.text(compared)
    assert "Published findings" in text and "holds" in text and "published -0.02000" in text
    assert compared.facts()["published"][0]["name"] == "lower-loss"


@pytest.mark.parametrize(
    "effect, runs, verdict",
    [(-0.02, 8, "holds"), (-0.004, 8, "fades"), (0.01, 8, "reverses"), (-0.002, 1, "can't be told")],
)
def test_the_classes(effect, runs, verdict):
    from lab.compare.effects import Effect

    error = 0.01 if runs == 1 else 0.001
    assert published.verdict(-0.02, Effect(effect, 0.0, error, 20))[0] == verdict
    assert published.verdict(-0.02, Effect(effect, 0.0, error, 20, biased=True))[0] in ("holds", "can't be told")
    assert published.verdict(-0.02, None)[0] == "can't be told"
    assert published.verdict(None, Effect(effect, 0.0, error, 20)) == ("can't be told", "no number was published")


@pytest.mark.parametrize(
    "effect, said", [(-0.01, "+50% of the"), (0.3, "ten times the published effect, the other way")]
)
def test_an_effect_is_told_as_a_share_of_the_published_one(effect, said):
    from lab.compare.effects import Effect

    assert said in published.verdict(-0.02, Effect(effect, 0.0, 0.0001, 20))[1]


def test_the_prompt_names_those_that_suit(searched, library):
    text = prompt.write(searched, PROGRAM, [])
    assert "# Published elsewhere, not tried here" in text and "(findings/warm-up.txt, +0.00" in text
    assert "not-here" not in text and "no-gain" not in text
    run(searched, library, "warm-up")
    assert "warm-up.txt" not in prompt.write(searched, PROGRAM, [])


# --- Shared runs ---


@pytest.fixture
def many(tmp_path, monkeypatch, runner):
    """A noisy session, and ten findings, of which two help."""
    names = [f"V{i}" for i in range(10)]
    folder = tmp_path / "findings"
    folder.mkdir()
    for name in names:
        (folder / f"{name.lower()}.txt").write_text(FILE.format(name, "fake-2gb", "-0.01", f"{name}: 1.0 -> 0.5"))
    found = published.library(folder)
    monkeypatch.setattr(published, "library", lambda: found)
    values = "".join(f"{name} = 1.0\n" for name in names)
    train = f"{values}NOISE, FAILS, LEAK = 0.01, None, 0.0\nLOSS = 1.0 - 0.03 * (V1 != 1.0) - 0.03 * (V2 != 1.0)\n"
    session = sessions.make(tmp_path / "project", train=train.encode())
    supervise(session)
    monkeypatch.setattr(loop.executor, "launch", lambda session: supervise(session))
    monkeypatch.setattr(loop.shared, "BLOCK", 72)
    return session


def test_on_a_noisy_device_findings_share_runs(many, monkeypatch):
    def over(night):
        raise loop.Over("seen")

    monkeypatch.setattr(loop.Night, "_ask_proposer", over)
    loop.Night(many, options(findings=True, max_experiments=200), Seen()).run()
    first, joint = list(Session(many.folder).state.experiments.values())[1:]
    assert (first.kind, joint.kind, len(first.patches)) == ("shared", "joint", 10)
    assert joint.status == "keep" and {"v1", "v2"} <= {patch.origin.split("/")[1] for patch in joint.patches}
    assert findings.patches(many) == [] == list(findings.ideas(many))  # a block tells once


def test_a_block_is_opened_beside_what_several_devices_run(many):
    settings.choose(many, ["a", "b"])
    night = loop.Night(Session(many.folder), options(findings=True, max_experiments=200), Seen())
    with many.lock:  # the supervisor's, as long as the night lasts
        assert night._open_block()
    assert night.session.state.last.kind == "shared"


@pytest.mark.parametrize("most, needed", [(1, 1000), (200, 20)], ids=["few experiments", "a short night"])
def test_without_the_runs_for_a_block_they_come_one_by_one(many, monkeypatch, most, needed):
    night = loop.Night(many, options(findings=True, max_experiments=most), Seen())
    night.now.deadline = loop.time.time() + needed * night._run_takes()
    monkeypatch.setattr(loop.Night, "_enough", lambda self: "seen" if self.session.state.last.number else "")
    night.run()
    assert [e.kind for e in Session(many.folder).state.experiments.values()] == ["baseline", "change"]


@pytest.mark.parametrize("usable, each", [([], 120), ([False], 120), ([True], 120), ([True, False, True], 60)])
def test_a_block_takes_the_time_that_is_left_after_what_is_reserved(many, monkeypatch, usable, each):
    monkeypatch.setattr(loop.settings, "status", lambda session: [{"usable": one} for one in usable])
    night = loop.Night(many, options(findings=True, max_experiments=500), Seen())
    monkeypatch.setattr(loop.shared, "BLOCK", 150)
    monkeypatch.setattr(night, "_scale_takes", lambda: 1000.0)
    monkeypatch.setattr(night, "_run_takes", lambda: 100.0)
    night.now.deadline = loop.time.time() + 1000.0 + (each + 0.5) * 100.0
    assert night._open_block() and night.session.state.last.pairs == 120


def test_those_that_conflict_hide_no_others(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "library", lambda: ())
    best = searched.repository.content(searched.state.best.blob)
    _, *rest = best.splitlines(keepends=True)

    def candidate(name, before, after, t):
        change = SimpleNamespace(t=t, key=name, gain=None)
        return Kept(name, f"cpu/x/{name}", before, after, change=change)

    other = b"# other\n" + b"".join(rest)
    conflicts = [candidate(f"c{i}", other, b"# %d\n" % i + b"".join(rest), 9.0) for i in range(40)]
    applies = candidate("applies", best, best + b"LATER = 1\n", 1.0)
    monkeypatch.setattr(findings, "_kept", lambda *_: ("sdpa", [*conflicts, applies]))
    monkeypatch.setattr(findings.storage, "home", lambda: tmp_path / "home")
    journal = tmp_path / "home" / "sessions" / "cpu" / "x" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    assert [one.change.key for one in findings.untried(searched, 20)] == ["applies"]
    windows = best.replace(b"\n", b"\r\n")
    monkeypatch.setattr(type(searched.repository), "content", lambda *_: windows)
    assert [one.change.key for one in findings.untried(searched, 20)] == ["applies"]
    assert [idea.content for idea in findings.ideas(searched, -1.0)] == [windows + b"LATER = 1\r\n"]


def test_a_finding_that_changes_nothing_here_is_no_idea():
    content = (sessions.ROOT / "train.py").read_bytes()
    known = {one.name: one for one in published.library()}
    for name in "narrower", "short-window", "longer-short-window":
        assert known[name].apply(content, {"depth": 8, "window_pattern": "SSSL"}) != content
        with pytest.raises(NotHere, match="it changes nothing on this device"):
            known[name].apply(content, {"depth": 2, "window_pattern": "L"})


def test_what_was_discarded_on_the_best_is_not_tried_there_again(
    searched, library, at_once, monkeypatch, tmp_path, capsys
):
    """Though it helped on the baseline later, beside it."""
    monkeypatch.setattr(executor, "launch", exports.AtOnce)
    bpb = sessions.Runner._bpb

    def helps_alone(content, facts, seed):
        better = -0.01 if facts["LOSS"] == 1.0 else 0.01
        return bpb(content, facts, seed) + better * (facts["WARMUP_RATIO"] == 0.1)

    monkeypatch.setattr(sessions.Runner, "_bpb", staticmethod(helps_alone))
    train = searched.repository.train()
    sessions.attempt(searched, train.replace(b"LOSS = 1.0", b"LOSS = 0.9"), "own")
    assert run(searched, library, "warm-up").status == "discard"
    sessions.attempt(searched, searched.repository.train().replace(b"LOSS = 0.9", b"LOSS = 0.8"), "own")
    assert not [idea for idea in findings.ideas(searched) if idea.name == "warm-up"]
    exports.replayed(searched, tmp_path / "findings" / "warm-up.txt", capsys)
    searched.refresh()
    assert searched.state.last.kept_beside
    assert not [idea for idea in findings.ideas(searched) if idea.name == "warm-up"]


def test_a_replay_on_a_best_that_was_chosen_reverses_nothing(searched, library, at_once, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(executor, "launch", exports.AtOnce)
    bpb = sessions.Runner._bpb
    worse = staticmethod(lambda content, facts, seed: bpb(content, facts, seed) + 0.01 * (facts["WARMUP_RATIO"] == 0.1))
    monkeypatch.setattr(sessions.Runner, "_bpb", worse)
    train = searched.repository.train()
    sessions.attempt(searched, train.replace(b"LOSS = 1.0", b"LOSS = 0.9"), "own")
    said = exports.replayed(searched, tmp_path / "findings" / "warm-up.txt", capsys, stack=True)
    assert "can't be told, its parent here is biased by selection" in said
    searched.refresh()
    (row,) = [row for row in findings.rows(searched) if row.name == "warm-up"]
    assert "can't be told, its parent here is biased by selection" in row.here


def test_a_finding_that_leaves_nothing_to_train_is_no_idea(searched):
    finding = next(one for one in published.library() if one.name == "fewer-layers")
    content = (sessions.ROOT / "train.py").read_bytes()
    assert b"DEPTH = defaults.depth - 1" in finding.apply(content, {"depth": 2})
    with pytest.raises(NotHere, match="DEPTH would be too small on this device"):
        finding.apply(content, {"depth": 1})
