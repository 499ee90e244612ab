"""A session as a branch: its history the kept steps, its train.py the best, the export in a folder; and back again."""

import argparse
import json

import pytest
import sessions
from exports import contents
from sessions import DEVICE, TAG, git
from test_experiment import attempt, status_of
from test_replay import BASE, of, replayed, with_

from lab.cli import commands
from lab.share import bundle, exchange, packing, publish, summary
from lab.verdict import executor as experiment
from lab.errors import LabError
from lab.session.session import Session

BRANCH = f"exp/{DEVICE}/{TAG}"


@pytest.fixture
def session(tmp_path, runner, monkeypatch):
    """One that kept two changes, discarded one, and saw one crash."""
    session = sessions.make(tmp_path / "my project", BASE)
    (session.folder / "profile.json").unlink()
    monkeypatch.setattr(Session, "profile", sessions.PROFILE)
    experiment.supervise(session)
    attempt(session, with_(BASE, A=0.1), message=f"A is a tenth, see {tmp_path}/notes.txt")
    attempt(session, with_(BASE, A=0.1, B=-0.3), message="B | less")
    attempt(session, with_(BASE, A=0.1, FAILS="crash"), message="fails")
    attempt(session, with_(BASE, A=0.1, C=0.05), message="C <b>more</b>")
    monkeypatch.setattr(Session, "launch", lambda session: experiment.supervise(Session(session.folder)))
    monkeypatch.chdir(session.tree.path)
    return session


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    """Sessions here have no device that could be calibrated."""
    made = exchange._of_session

    def of_session(folder, kept, changes):
        (folder / "profile.json").write_text("{}")
        found = made(folder, kept, changes)
        found.profile = None
        return found

    monkeypatch.setattr(exchange, "_of_session", of_session)


def show(session, name):
    return git(session.tree.path, "show", f"{BRANCH}:{name}")


def everything(session):
    """Whatever publishing must not touch."""
    path = session.tree.path
    files = {name: data for name, data in contents(path).items() if not name.startswith(".git/")}
    return (
        git(path, "rev-parse", "HEAD"),
        git(path, "symbolic-ref", "HEAD"),
        git(path, "ls-files", "-s"),
        status_of(session),
        files,
    )


# --- What changes.json tells ---


def test_every_decided_change_is_told(session):
    changes = publish.changes_of(session)
    assert [(one["number"], one["kind"], one["status"], one["parent"]) for one in changes] == [
        (0, "baseline", "keep", None),
        (1, "change", "keep", 0),
        (2, "change", "discard", 1),
        (3, "change", "crash", 1),
        (4, "change", "keep", 1),
    ]
    assert all(bundle.check_patch("p", one["patch_text"].encode()) for one in changes[1:])
    assert [one["patch"] for one in changes] == [e.patch for e in session.state.experiments.values()]
    assert changes[1]["low"] < changes[1]["gain"] < changes[1]["high"]
    assert changes[1]["gain"] == pytest.approx(0.1, abs=0.01)
    assert changes[3]["gain"] is None and changes[1]["kinds"] == ["other"]
    rows = {row["commit"] for row in exchange.read_bundle(write(session)).rows}
    assert {one["commit"] for one in changes} == rows


def write(session):
    target = session.folder.parent / "sent"
    return exchange.export_session(session.folder, publish.kept_of(session), target, publish.changes_of(session))


def test_changes_travel(session):
    found = exchange.read_bundle(write(session))
    told = publish.changes_of(session)
    told[1]["description"] = "A is a tenth, see .../notes.txt"
    assert found.changes == told
    assert packing.files_of(found) == exchange.read_files(session.folder.parent / "sent")


def test_what_is_no_text_does_not_keep_the_rest_from_travelling(session):
    odd = attempt(session, with_(BASE, A=0.1, C=0.05) + b"ODD = '\x01'\n")
    assert publish.changes_of(session)[odd.number]["patch_text"] == ""
    assert exchange.read_bundle(write(session)).changes[odd.number]["status"] == odd.status


def test_replays_and_confirmations_are_told_as_such(session, tmp_path, capsys):
    with session.lock:
        state = session.state
        session.begin(
            kind="confirm",
            blob=state.best.blob,
            parent=state.baseline.blob,
            onto=0,
            pairs=2,
            budget=300.0,
            commit=state.best.applied["commit"],
            description="best",
        )
    experiment.supervise(session)
    confirmed = publish.changes_of(session)[-1]
    assert (confirmed["kind"], confirmed["patch_text"], confirmed["gain"]) == ("confirm", "", None)
    assert "on held-out rows and 2 new seeds" in summary.summary(exchange.read_bundle(write(session)))


# --- Hostile changes.json ---


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda told: told[1].update(patch_text=told[1]["patch_text"].replace("train.py", "prepare.py")),
            "nothing else",
        ),
        (lambda told: told[2].update(patch_text=told[2]["patch_text"] + told[2]["patch_text"]), "more than hunks"),
        (lambda told: told[2].update(patch_text="x" * 2**21), "at most"),
        (lambda told: told[2].pop("kinds"), "a change"),
        (lambda told: told[2].update(more=1), "has a change"),
        (lambda told: told[2].update(number="2"), "has a change"),
        (lambda told: told[2].update(number=1), "out of order"),
        (lambda told: told[2].update(number=-1), "out of order"),
        (lambda told: told[2].update(number=10**12), "out of order"),
        (lambda told: told.append(7), "has a change 7"),
        (lambda told: told[2].update(parent=2), "not before it"),
        (lambda told: told[2].update(parent=None), "not before"),
        (lambda told: told[2].update(parent=True), "not before it"),
        (lambda told: told[0].update(parent=0), "not before"),
        (lambda told: told[2].update(kind="x"), "is a 'x'"),
        (lambda told: told[2].update(status="?"), "was '?'"),
        (lambda told: told[2].update(kinds=["x"]), "is about"),
        (lambda told: told[2].update(kinds="other"), "is about"),
        (lambda told: told[2].update(patch="../x"), "patch, commit or origin"),
        (lambda told: told[2].update(commit="--all"), "patch, commit or origin"),
        (lambda told: told[2].update(origin="../../etc/passwd"), "patch, commit or origin"),
        (lambda told: told[2].update(origin="a/b"), "patch, commit or origin"),
        (lambda told: told[2].update(origin="a/b/c\n"), "patch, commit or origin"),
        (lambda told: told[2].update(gain="x"), "has a gain"),
        (lambda told: told[2].update(gain=None), "has a gain"),
        (lambda told: told[2].update(gain=1e308 * 10), "no number"),
        (lambda told: told[2].update(low=True), "has a gain"),
        (lambda told: told[1].update(status="discard"), "of change 1 what patches/ has"),
        (lambda told: told[4].update(patch_text=told[2]["patch_text"]), "of change 4 what patches/ has"),
        (lambda told: told.pop(), "of change 4 what patches/ has"),
        (lambda told: told[1].update(near_miss=1), "has a change"),
    ],
)
def test_changes_that_can_not_be_are_refused(session, tmp_path, change, match):
    exported = write(session)
    content = json.loads((exported / "changes.json").read_text())
    change(content["changes"])
    files = exchange.read_files(exported) | {"changes.json": json.dumps(content).encode()}
    sent = exchange.write(packing.sealed(files), tmp_path / "sent")
    with pytest.raises(LabError, match=match):
        exchange.import_session(sent, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("changes.json", b"[" * 100_000, "is no JSON"),
        ("changes.json", b'{"format": 1, "changes": []}', "format 1"),
        ("changes.json", b'{"format": 2, "changes": {}}', "lists no changes"),
        (".gitattributes", b"* filter=evil\n", ".gitattributes says something else"),
        ("SUMMARY.md", b"\x1b[2J", "control"),
    ],
)
def test_other_files_that_can_not_be_are_refused(session, tmp_path, name, data, match):
    files = exchange.read_files(write(session)) | {name: data}
    with pytest.raises(LabError, match=match):
        exchange.read_bundle(exchange.write(packing.sealed(files), tmp_path / "sent"))


def test_more_json_than_a_session_needs_is_refused(session, monkeypatch):
    exported = write(session)
    monkeypatch.setattr(bundle, "MOST_OF_JSON", 1000)
    with pytest.raises(LabError, match=r"\.json has .* bytes; it has at most 1,000"):
        exchange.read_bundle(exported)


# --- The branch ---


def test_the_branch_is_the_kept_steps_and_the_export(session, capsys):
    before = everything(session)
    assert commands.do_export(session, argparse.Namespace(publish=True, replace=False, target=None)) == 0
    assert f"git push REMOTE {BRANCH}" in capsys.readouterr().out
    assert everything(session) == before
    path, first = session.tree.path, session.facts["commit"]
    assert git(path, "log", "--format=%s", "--reverse", f"{first}..{BRANCH}").split("\n") == [
        "A is a tenth, see .../notes.txt",
        "C <b>more</b>",
        f"session {DEVICE}/{TAG}: its export",
    ]
    assert git(path, "diff", "--name-only", first, f"{BRANCH}^") == "train.py"
    assert show(session, "train.py").encode() + b"\n" == session.tree.content(session.state.best.blob)
    assert git(path, "diff", "--name-only", f"{BRANCH}^", BRANCH).split("\n") == sorted(
        f"session/{name}" for name in exchange.read_files(write(session))
    )
    assert show(session, "session/.gitattributes") == "* -text"


def test_nothing_of_the_machine_is_published(session, tmp_path, isolated_home):
    publish.publish(session)
    text = git(session.tree.path, "log", "-p", "--format=%B", f"{session.facts['commit']}..{BRANCH}")
    for private in (str(tmp_path), str(isolated_home), "my project"):
        assert private not in text, private


def test_publishing_again_is_the_same_or_asks(session):
    branch, commit = publish.publish(session)
    assert publish.publish(session) == (branch, commit)
    attempt(session, with_(BASE, A=0.1, B=0.2, C=0.05), message="B more")
    with pytest.raises(LabError, match=f"exists, at {commit[:7]}.*--replace"):
        publish.publish(session)
    assert session.tree.commit_of(BRANCH) == commit
    _, later = publish.publish(session, replace=True)
    assert session.tree.commit_of(BRANCH) == later != commit
    assert session.tree.commit_of(f"{later}~2") == session.tree.commit_of(f"{commit}^")  # the same steps are the same


def test_a_branch_of_somebody_else_is_not_replaced_unasked(session):
    git(session.tree.path, "branch", BRANCH, session.facts["commit"])
    with pytest.raises(LabError, match="holds something else"):
        publish.publish(session)
    assert session.tree.commit_of(BRANCH) == session.facts["commit"]


def test_what_was_built_on_a_published_branch_holds_its_own_session_alone(session, tmp_path):
    publish.publish(session)
    first = session.tree.commit_of(BRANCH)
    session.facts["commit"] = first  # a session that began there
    commit = session.tree.commit_files(first, "session/", {"session/README.md": b"new\n"}, "again")
    assert git(session.tree.path, "ls-tree", "-r", "--name-only", commit, "session/") == "session/README.md"
    assert git(session.tree.path, "show", f"{commit}:session/README.md") == "new"


def test_where_to_has_to_be_said(session):
    with pytest.raises(LabError, match="say where to"):
        commands.do_export(session, argparse.Namespace(publish=False, replace=False, target=None))


# --- And back ---


def imported(session, capsys, source):
    capsys.readouterr()
    assert commands.do_import(argparse.Namespace(source=source, device=None)) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", [BRANCH, f"origin/{BRANCH}"])
def test_a_published_branch_is_imported(session, isolated_home, capsys, name):
    publish.publish(session)
    if name.startswith("origin/"):
        session.tree.git("update-ref", f"refs/remotes/{name}", BRANCH)
        git(session.tree.path, "branch", "-D", BRANCH)
    assert imported(session, capsys, name) == str(isolated_home / "imported" / DEVICE / TAG)
    assert contents(isolated_home / "imported" / DEVICE / TAG) == exchange.read_files(write(session))
    assert publish.find(name).changes == publish.find(str(isolated_home / "imported" / DEVICE / TAG)).changes


def test_a_published_branch_is_replayed(session, tmp_path, capsys, monkeypatch):
    publish.publish(session)
    monkeypatch.setattr(sessions, "TAG", "other")
    git(session.tree.path, "checkout", "-q", "main")
    other = sessions.make(tmp_path / "other", BASE)
    experiment.supervise(other)
    git(other.tree.path, "fetch", "-q", str(session.tree.path), f"{BRANCH}:{BRANCH}")
    monkeypatch.chdir(other.tree.path)
    replayed(other, BRANCH, capsys)
    assert [e.status for e in of(other)] == ["keep", "keep"]
    assert [e.origin for e in of(other)] == [f"{DEVICE}/{TAG}/{e.patch}" for e in session.state.kept[1:]]
    assert [e.patch for e in of(other)] == [e.patch for e in session.state.kept[1:]]
    told = publish.changes_of(other)
    assert [(one["kind"], one["parent"]) for one in told] == [("baseline", None), ("replay", 0), ("replay", 0)]


@pytest.mark.parametrize(
    "entries, match",
    [
        ({"session/README.md": ("120000", b"/etc/passwd")}, "README.md' is not a plain file"),
        ({"session/run.sh": ("100755", b"#!/bin/sh\n")}, "no part of an exported session"),
        ({"session/deep/er.json": ("100644", b"{}")}, "no part of an exported session"),
        ({"session/README.md": ("100644", b"changed")}, "README.md is damaged"),
        ({"session/MANIFEST.json": ("100644", b"{}")}, "format None"),
    ],
)
def test_a_hostile_branch_is_refused(session, tmp_path, isolated_home, capsys, entries, match):
    publish.publish(session)
    tree = session.tree
    index = tmp_path / "index"
    tree.git("read-tree", BRANCH, index=index)
    for name, (mode, data) in entries.items():
        blob = tree.git("hash-object", "-w", "--stdin", content=data)
        tree.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{name}", index=index)
    commit = tree.git("commit-tree", tree.git("write-tree", index=index), "-m", "evil")
    tree.git("update-ref", "refs/heads/exp/evil/one", commit)
    for find in (lambda: imported(session, capsys, "exp/evil/one"), lambda: publish.find("exp/evil/one")):
        with pytest.raises(LabError, match=match):
            find()
    assert not (isolated_home / "imported").exists()


def test_a_branch_without_a_session_is_refused(session, capsys):
    with pytest.raises(LabError, match="has no folder session/"):
        imported(session, capsys, "main")
    with pytest.raises(LabError, match="there is no folder or file"):
        imported(session, capsys, "exp/nobody/nothing")
    for name in ("exp/nobody/nothing", "--all", "HEAD", "refs/heads/main"):
        with pytest.raises(LabError, match="there is no session|has no folder"):
            publish.find(name)


def test_a_branch_too_large_is_refused_before_it_is_read(session, monkeypatch):
    publish.publish(session)
    monkeypatch.setattr(exchange, "MOST_BYTES", 1000)
    with pytest.raises(LabError, match="more than 1,000 bytes"):
        publish.find(BRANCH)


# --- In words ---


def test_the_summary_says_what_was_found(session):
    text = summary.summary(exchange.read_bundle(write(session)))
    assert "changes tried: 4; better: 2; not better: 1; crashed: 1; could not be judged: 0" in text
    assert "val_bpb: baseline 1.0" in text or "val_bpb: baseline 0.99" in text
    assert r"| 4 | C \<b\>more\</b\> | other | -0.0" in text and r"- 2: B \| less: +0." in text
    assert "- 3: fails: crash (it crashed)" in text and "confirmation: none was made" in text
    assert "python -m lab replay SESSION --stack" in text and BRANCH in text


def test_a_long_night_is_summed_up(session):
    found = exchange.read_bundle(write(session))
    many = [found.changes[2] | {"number": number} for number in range(5, 505)]
    found.changes += many
    text = summary.summary(found)
    assert f"- and {501 + 1 - summary.LISTED} more, in changes.json" in text and len(text) < 20_000
