"""A session as a branch: its history the kept steps, its train.py the best, the export in a folder; and back again."""

import pytest
from exports import BASE, begun, contents, replayed, with_
from sessions import DEVICE, TAG, attempt, git

from lab.errors import LabError
from lab.share import archive, export, sources
from lab.share.export import files_of

BRANCH = f"exp/{DEVICE}/{TAG}"


def show(session, name):
    return git(session.repository.path, "show", f"{BRANCH}:{name}")


def everything(session):
    """Whatever publishing must not touch."""
    path = session.repository.path
    files = {name: data for name, data in contents(path).items() if not name.startswith(".git/")}
    facts = ("rev-parse", "HEAD"), ("symbolic-ref", "HEAD"), ("ls-files", "-s"), ("status", "--porcelain")
    return *(git(path, *command) for command in facts), files


# --- The branch ---


def test_the_branch_is_the_kept_steps_and_the_export(session):
    before = everything(session)
    branch, commit = export.publish(session)
    assert (branch, commit) == (BRANCH, session.repository.commit_of(BRANCH)) and everything(session) == before
    path, first = session.repository.path, session.started.commit
    assert git(path, "log", "--format=%s", "--reverse", f"{first}..{BRANCH}").split("\n") == [
        "A is a tenth, see .../notes.txt",
        "C <b>more</b>",
        f"session {DEVICE}/{TAG}: its export",
    ]
    assert git(path, "diff", "--name-only", first, f"{BRANCH}^") == "train.py"
    assert show(session, "train.py").encode() + b"\n" == session.repository.content(session.state.best.blob)
    assert git(path, "diff", "--name-only", f"{BRANCH}^", BRANCH).split("\n") == sorted(
        f"session/{name}" for name in (*files_of(session), "MANIFEST.json", ".gitattributes")
    )
    assert show(session, "session/.gitattributes") == "* -text"


def test_nothing_of_the_machine_is_published(session, tmp_path, isolated_home):
    export.publish(session)
    text = git(session.repository.path, "log", "-p", "--format=%B", f"{session.started.commit}..{BRANCH}")
    for private in (str(tmp_path), str(isolated_home), "my project"):
        assert private not in text, private


def test_publishing_again_is_the_same_or_asks(session):
    branch, commit = export.publish(session)
    assert export.publish(session) == (branch, commit)
    attempt(session, with_(BASE, A=0.1, B=0.2, C=0.05), message="B more")
    with pytest.raises(LabError, match=f"exists, at {commit[:7]}.*--replace"):
        export.publish(session)
    assert session.repository.commit_of(BRANCH) == commit
    _, later = export.publish(session, replace=True)
    assert session.repository.commit_of(BRANCH) == later != commit
    assert session.repository.commit_of(f"{later}~2") == session.repository.commit_of(
        f"{commit}^"
    )  # the same steps are the same


def test_a_branch_of_somebody_else_is_not_replaced_unasked(session):
    git(session.repository.path, "branch", BRANCH, session.started.commit)
    with pytest.raises(LabError, match="differs from this session"):
        export.publish(session)
    assert session.repository.commit_of(BRANCH) == session.started.commit


def test_what_was_built_on_a_published_branch_holds_its_own_session_alone(session, tmp_path):
    export.publish(session)
    first = session.repository.commit_of(BRANCH)
    session.started.commit = first  # a session that began there
    commit = session.repository.commit_files(first, "session/", {"session/SUMMARY.md": b"new\n"}, "again")
    assert git(session.repository.path, "ls-tree", "-r", "--name-only", commit, "session/") == "session/SUMMARY.md"
    assert git(session.repository.path, "show", f"{commit}:session/SUMMARY.md") == "new"


# --- And back ---


@pytest.mark.parametrize("name", [BRANCH, f"origin/{BRANCH}"])
def test_a_published_branch_is_imported(session, isolated_home, name):
    export.publish(session)
    if name.startswith("origin/"):
        session.repository.git("update-ref", f"refs/remotes/{name}", BRANCH)
        git(session.repository.path, "branch", "-D", BRANCH)
    there = sources.import_session(name)
    assert there == isolated_home / "imported" / DEVICE / TAG
    assert contents(there) == archive.sealed(files_of(session))  # as an archive of it is imported
    assert vars(sources.read(name).state) == vars(sources.read(there).state)


def test_a_published_branch_is_read_without_being_checked_out(session):
    export.publish(session)
    before = everything(session)
    assert vars(sources.read(BRANCH).state).keys() == vars(session.state).keys()
    assert sources.read(BRANCH).train(4) == with_(BASE, A=0.1, C=0.05) and everything(session) == before


def test_a_published_branch_is_replayed(session, tmp_path, capsys, monkeypatch):
    export.publish(session)
    other = begun(tmp_path / "other", tag="other")
    git(other.repository.path, "fetch", "-q", str(session.repository.path), f"{BRANCH}:{BRANCH}")
    monkeypatch.chdir(other.repository.path)
    replayed(other, BRANCH, capsys)
    replays = [e for e in other.state.experiments.values() if e.kind == "replay"]
    assert [e.status for e in replays] == ["keep", "keep"]
    assert [e.origin for e in replays] == [f"{DEVICE}/{TAG}/{e.change}" for e in session.state.kept[1:]]
    assert [e.change for e in replays] == [e.change for e in session.state.kept[1:]]
    assert [e.onto for e in replays] == [0, 0]


@pytest.mark.parametrize(
    "entries, match",
    [
        ({"session/SUMMARY.md": ("120000", b"/etc/passwd")}, "SUMMARY.md' is not a plain file"),
        ({"session/run.sh": ("100755", b"#!/bin/sh\n")}, "does not belong in an exported session"),
        ({"session/deep/er.json": ("100644", b"{}")}, "does not belong in an exported session"),
        ({"session/SUMMARY.md": ("100644", b"changed")}, "SUMMARY.md is damaged"),
        ({"session/MANIFEST.json": ("100644", b"{}")}, "is not in MANIFEST"),
        ({"session/.gitattributes": ("100644", b"* filter=evil")}, ".gitattributes says something else"),
    ],
)
def test_a_hostile_branch_is_refused(session, tmp_path, isolated_home, entries, match):
    export.publish(session)
    repository = session.repository
    index = tmp_path / "index"
    repository.git("read-tree", BRANCH, GIT_INDEX_FILE=index)
    for name, (mode, data) in entries.items():
        blob = repository.git("hash-object", "-w", "--stdin", content=data)
        repository.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{name}", GIT_INDEX_FILE=index)
    commit = repository.git("commit-tree", repository.git("write-tree", GIT_INDEX_FILE=index), "-m", "evil")
    repository.git("update-ref", "refs/heads/exp/evil/one", commit)
    for take in (sources.import_session, sources.read):
        with pytest.raises(LabError, match=match):
            take("exp/evil/one")
    assert not (isolated_home / "imported").exists()


def test_a_branch_without_a_session_is_refused(session):
    with pytest.raises(LabError, match="has no folder session/"):
        sources.import_session("main")
    for name in ("exp/nobody/nothing", "--all", "HEAD", "refs/heads/main"):
        for take in (sources.import_session, sources.read):
            with pytest.raises(LabError, match="there is no session"):
                take(name)


def test_a_branch_too_large_is_refused_before_it_is_read(session, monkeypatch):
    export.publish(session)
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    with pytest.raises(LabError, match="more than 1,000 bytes"):
        sources.read(BRANCH)
