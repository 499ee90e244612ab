"""The repository: commits beside the branch, and what is restored."""

import subprocess

import pytest

from lab.errors import LabError
from lab.tree import Tree

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
    return Tree(path)


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
    for content in (b"x = 1", b"", b"x = 1\r\n", "x = 'ä'\n".encode()):
        assert tree.content(tree.store(content)) == content


def test_the_patch_id_is_the_same_wherever_the_change_is_made(tree):
    one = tree.patch(tree.store(FIRST), tree.store(FIRST.replace(b"LR = 1", b"LR = 3")))
    moved = FIRST.replace(b"DEPTH = 2", b"DEPTH = 5")
    other = tree.patch(tree.store(moved), tree.store(moved.replace(b"LR = 1", b"LR = 3")))
    assert one[1] == other[1] and len(one[1]) == 16
    assert one[1] != tree.patch(tree.store(FIRST), tree.store(FIRST.replace(b"LR = 1", b"LR = 4")))[1]


def test_settings_for_diffs_change_nothing(tree):
    before, after = tree.store(FIRST), tree.store(FIRST.replace(b"LR = 1", b"LR = 3"))
    plain = tree.patch(before, after)
    for setting in ("color.ui=always", "diff.noprefix=true", "diff.mnemonicPrefix=true", "diff.context=9",
                    "diff.external=false", "diff.algorithm=patience", "diff.interHunkContext=5"):
        git(tree.path, "config", *setting.split("="))
    assert tree.patch(before, after) == plain


def test_the_patch_applies(tree):
    wanted = FIRST.replace(b"LR = 1", b"LR = 3")
    text, _ = tree.patch(tree.store(FIRST), tree.store(wanted))
    subprocess.run(["git", "-C", tree.path, "apply"], input=text.encode(), check=True)
    assert tree.train() == wanted


def test_settle_restores_what_was_tested(tree):
    (tree.path / "train.py").write_bytes(b"tested = 1\n")
    git(tree.path, "add", "train.py")  # staged by somebody
    assert tree.settle("main", b"tested = 1\n")
    assert tree.train() == FIRST and git(tree.path, "status", "--porcelain") == ""


def test_settle_leaves_an_edit_made_meanwhile(tree):
    (tree.path / "train.py").write_bytes(b"newer = 1\n")
    assert not tree.settle("main", b"tested = 1\n")
    assert tree.train() == b"newer = 1\n"


def test_settle_leaves_another_branch_alone(tree):
    git(tree.path, "switch", "-qc", "elsewhere")
    (tree.path / "train.py").write_bytes(b"tested = 1\n")
    assert not tree.settle("main", b"tested = 1\n")
    assert tree.train() == b"tested = 1\n"


def test_after_the_branch_moved_the_tree_is_clean(tree):
    head = tree.commit_of("HEAD")
    (tree.path / "train.py").write_bytes(b"better = 1\n")
    tree.move("refs/heads/main", tree.commit(head, tree.store(b"better = 1\n"), "better"), head)
    assert tree.settle("main", b"better = 1\n")
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
    with pytest.raises(LabError, match="not a git repository"):
        Tree(tmp_path)


def test_a_repository_without_train_is_refused(tree):
    git(tree.path, "rm", "-q", "train.py")
    with pytest.raises(LabError, match="no train.py"):
        Tree(tree.path)


def test_a_train_that_was_deleted_can_be_got_back(tree):
    (tree.path / "train.py").unlink()
    with pytest.raises(LabError, match="git checkout HEAD -- train.py"):
        Tree(tree.path)


def test_a_detached_head_has_no_branch(tree):
    assert tree.branch() == "main"
    git(tree.path, "checkout", "-q", "--detach")
    assert tree.branch() is None
