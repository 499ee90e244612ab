"""The repository: commits beside the branch, and what is restored."""

import subprocess
import threading

import pytest

from lab.errors import LabError
from lab.session.repository import Repository

FIRST = b"LR = 1\nDEPTH = 2\n\n\n\n\n\nEND = True\n"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.delenv(f"GIT_{name}", raising=False)
    for name in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", "/dev/null")
    path = tmp_path / "project"
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    (path / "train.py").write_bytes(FIRST)
    (path / "notes.md").write_text("notes")
    git(path, "add", ".")
    git(path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return Repository(path)


def git(path, *arguments):
    return subprocess.run(["git", "-C", path, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_changes_train_and_nothing_of_the_users(tree):
    head = tree.commit_of("HEAD")
    (tree.path / "notes.md").write_text("edited")
    commit = tree.commit(head, tree.store(b"LR = 2\n"), "twice\nthe rate")
    assert git(tree.path, "show", f"{commit}:train.py") == "LR = 2"
    assert git(tree.path, "show", f"{commit}:notes.md") == "notes"
    assert git(tree.path, "log", "-1", "--format=%B", commit) == "twice\nthe rate"
    assert tree.commit_of("HEAD") == head and tree.train() == FIRST
    assert tree.changed() == ["notes.md"]


def test_a_commit_needs_no_identity(tree):
    commit = tree.commit(tree.commit_of("HEAD"), tree.store(b"x = 1\n"), "text")
    assert git(tree.path, "log", "-1", "--format=%an", commit) == "autoresearch"


def test_an_executable_train_stays_one(tree):
    git(tree.path, "update-index", "--chmod=+x", "train.py")
    git(tree.path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    commit = tree.commit(tree.commit_of("HEAD"), tree.store(b"x = 1\n"), "text")
    assert git(tree.path, "ls-tree", commit, "train.py").startswith("100755")


def test_content_comes_back_byte_for_byte(tree):
    for content in (b"x = 1", b"", b"x = 1\n", "x = 'ä'\n".encode()):
        assert tree.content(tree.store(content)) == content


def test_line_ends_of_an_editor_are_no_edit(tree):
    assert tree.store(FIRST.replace(b"\n", b"\r\n")) == tree.store(FIRST)
    (tree.path / "train.py").write_bytes(FIRST.replace(b"\n", b"\r\n"))
    assert tree.edited_blob() == tree.blob_of("HEAD")


def test_a_train_that_was_committed_with_other_line_ends_keeps_them(tree):
    crlf = FIRST.replace(b"\n", b"\r\n")
    (tree.path / "train.py").write_bytes(crlf)
    git(tree.path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "as on Windows")
    again = Repository(tree.path)
    assert again.edited_blob() == again.blob_of("HEAD") and again.content(again.store(crlf)) == crlf


def test_contents_of_many(tree):
    blobs = {tree.store(content): content for content in (FIRST, b"", b"no end", b"\n\nblob 3\n\xff\x00")}
    assert tree.contents([*blobs, "0" * 40, *blobs]) == blobs
    assert tree.contents([]) == {}


def test_settle_restores_what_was_tested(tree):
    (tree.path / "train.py").write_bytes(b"tested = 1\n")
    git(tree.path, "add", "train.py")  # staged by somebody
    assert tree.settle("main", tree.store(b"tested = 1\n"), tree.store(FIRST)) is None
    assert tree.train() == FIRST and git(tree.path, "status", "--porcelain") == ""


def test_settle_leaves_an_edit_made_meanwhile(tree):
    (tree.path / "train.py").write_bytes(b"newer = 1\n")
    assert tree.settle("main", tree.store(b"tested = 1\n"), tree.store(FIRST)).code == "edited_meanwhile"
    assert tree.train() == b"newer = 1\n"


def test_settle_on_another_branch_lets_one_go_back(tree):
    git(tree.path, "switch", "-qc", "elsewhere")
    (tree.path / "train.py").write_bytes(b"tested = 1\n")
    assert "git switch main" in str(tree.settle("main", tree.store(b"tested = 1\n"), tree.store(FIRST)))
    assert tree.train() == FIRST and git(tree.path, "status", "--porcelain") == ""
    git(tree.path, "switch", "-q", "main")


def test_settle_keeps_the_mode_and_follows_a_link(tree):
    (tree.path / "real.py").write_bytes(b"tested = 1\n")
    (tree.path / "real.py").chmod(0o755)
    (tree.path / "train.py").unlink()
    (tree.path / "train.py").symlink_to("real.py")
    tree.settle("main", tree.store(b"tested = 1\n"), tree.store(FIRST))
    assert (tree.path / "train.py").is_symlink() and (tree.path / "real.py").read_bytes() == FIRST
    assert (tree.path / "real.py").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_settle_knows_its_own_file_whatever_ends_its_lines(tree, ends):
    git(tree.path, "config", "core.autocrlf", "true")
    tested = b"tested = 1" + ends
    (tree.path / "train.py").write_bytes(tested)
    assert tree.settle("main", tree.store(tested), tree.store(FIRST)) is None
    assert git(tree.path, "status", "--porcelain") == ""


def test_what_a_killed_settle_left_is_swept_up(tree):
    (tree.path / "train.py.123.tmp").touch()
    (tree.path / "train.py.mine.tmp").touch()
    assert tree.unlock("main") == []
    assert tree.changed() == ["train.py.mine.tmp"]


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tree):
    lock = tree.path / ".git" / "index.lock"
    lock.touch()
    threading.Timer(0.5, lock.unlink).start()
    tree.settle("main", tree.store(b"x = 1\n"), tree.store(FIRST))
    assert not lock.exists()


def test_a_lock_that_stays_is_an_error_of_one_line(tree, monkeypatch):
    monkeypatch.setattr("lab.session.repository.LOCK_PATIENCE", 0.2)
    (tree.path / ".git" / "index.lock").touch()
    with pytest.raises(LabError, match="index.lock") as refusal:
        tree.settle("main", tree.store(b"x = 1\n"), tree.store(FIRST))
    assert "\n" not in str(refusal.value)


def test_after_the_branch_moved_the_tree_is_clean(tree):
    head = tree.commit_of("HEAD")
    (tree.path / "train.py").write_bytes(b"better = 1\n")
    tree.move("refs/heads/main", tree.commit(head, tree.store(b"better = 1\n"), "better"), head)
    assert tree.settle("main", tree.store(b"better = 1\n"), tree.store(FIRST)) is None
    assert git(tree.path, "status", "--porcelain") == "" and tree.train() == b"better = 1\n"


def test_a_ref_that_somebody_moved_is_not_moved(tree):
    head = tree.commit_of("HEAD")
    commit = tree.commit(head, tree.store(b"x = 1\n"), "x")
    tree.move("refs/heads/main", commit, head)
    with pytest.raises(LabError, match="update-ref"):
        tree.move("refs/heads/main", head, head)


def test_locks_of_a_dead_git_are_removed(tree):
    lock = tree.path / ".git" / "index.lock"
    ref = tree.path / ".git" / "refs" / "heads" / "main.lock"
    lock.touch()
    ref.touch()
    assert sorted(tree.unlock("main")) == sorted(map(str, (lock, ref)))
    tree.move("refs/heads/main", tree.commit(tree.commit_of("HEAD"), tree.store(b"x = 1\n"), "x"))
    assert tree.unlock("main") == []


def test_outside_a_repository_it_says_so(tmp_path):
    with pytest.raises(LabError, match="downloaded as ZIP.*git init && git add"):
        Repository(tmp_path)


def test_a_repository_without_train_is_refused(tree):
    git(tree.path, "rm", "-q", "train.py")
    with pytest.raises(LabError, match="no train.py"):
        Repository(tree.path)


def test_a_train_that_was_deleted_can_be_got_back(tree):
    (tree.path / "train.py").unlink()
    with pytest.raises(LabError, match="git checkout HEAD -- train.py"):
        Repository(tree.path)


def test_a_detached_head_has_no_branch(tree):
    assert tree.branch() == "main"
    git(tree.path, "checkout", "-q", "--detach")
    assert tree.branch() is None
