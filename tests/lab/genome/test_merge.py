"""A change made on another text: what does not touch the same lines goes together, and nothing is forced."""

import itertools
import random
import subprocess

import pytest

from lab.errors import LabError
from lab.genome.change import diff, lines_of, patched
from lab.genome.merge import merged, merged_patch

BASE = b"".join(b"line %d\n" % i for i in range(12))


def patch_of(before, after, folder):
    """As git makes it of the two files."""
    (folder / "a").mkdir(exist_ok=True)
    (folder / "b").mkdir(exist_ok=True)
    for side, text in (("a", before), ("b", after)):
        (folder / side / "train.py").write_bytes(text.encode())
    command = ["git", "diff", "--no-index", "--no-prefix", "a/train.py", "b/train.py"]
    text = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout.decode()
    assert text.startswith("diff --git a/train.py b/train.py")
    return text


def edit(content, *changes):
    for old, new in changes:
        assert old in content
        content = content.replace(old, new)
    return content


@pytest.mark.parametrize(
    "after",
    [
        BASE.replace(b"line 3\n", b"3\n"),
        BASE.replace(b"line 0\n", b""),
        b"new\n" + BASE,
        BASE + b"new\n",
        BASE[:-1],
        BASE.replace(b"line 1\n", b"").replace(b"line 9\n", b"9\n10\n\n\n"),
        BASE.replace(b"line 11\n", b"end"),
        b"x",
        b"",
    ],
)
def test_patches_of_git_are_applied(tmp_path, after):
    for one, other in ((BASE, after), (after, BASE)):
        if one and other:  # git's patches of empty files name no file
            assert patched(one, patch_of(one.decode(), other.decode(), tmp_path)) == other


def test_a_text_without_an_end_of_line_is_patched(tmp_path):
    one, other = "a\nb\nb", "a\nb"
    for before, after in ((one, other), (other, one), (one, one + "\n"), (one + "\n", one)):
        assert patched(before.encode(), patch_of(before, after, tmp_path)) == after.encode()


def test_random_patches_are_applied(tmp_path):
    rng = random.Random(1)
    for _ in range(30):
        before, after = ("".join(f"{rng.randrange(6)}\n" for _ in range(rng.randrange(1, 30))) for _ in range(2))
        if before != after:
            assert patched(before.encode(), patch_of(before, after, tmp_path)) == after.encode()


def test_a_patch_of_another_text_is_refused(tmp_path):
    patch = patch_of(BASE.decode(), BASE.replace(b"line 3\n", b"3\n").decode(), tmp_path)
    for other in (BASE.replace(b"line 2\n", b"2\n"), b"more\n" + BASE, b""):
        with pytest.raises(LabError, match="does not fit .* at line 1$"):
            patched(other, patch)


@pytest.mark.parametrize(
    "here, after",
    [
        ((b"line 2\n", b"TWO\n"), (b"line 3\n", b"THREE\n")),
        ((b"line 3\n", b"THREE\n"), (b"line 2\n", b"TWO\n")),
        ((b"line 2\n", b""), (b"line 3\n", b"THREE\n")),
        ((b"line 2\n", b"a\nb\nc\n"), (b"line 3\n", b"3\n")),
        ((b"line 2\n", b"line 2\nmore\n"), (b"line 3\n", b"")),
        ((b"line 0\n", b""), (b"line 11\n", b"11")),
        ((b"line 9\n", b"9\n9\n"), (b"line 4\nline 5\n", b"")),
    ],
)
def test_changes_of_other_lines_go_together(here, after):
    both = merged(edit(BASE, here), BASE, edit(BASE, after))
    assert both == merged_patch(edit(BASE, here), BASE, diff(BASE, edit(BASE, after))) == (edit(BASE, here, after), [])


def test_changes_of_the_same_lines_do_not():
    here, after = BASE.replace(b"line 3\n", b"mine\n"), BASE.replace(b"line 3\n", b"yours\n").replace(b"line 8", b"8")
    found, (conflict,) = both = merged(here, BASE, after)
    assert both == merged_patch(here, BASE, diff(BASE, after))
    assert (conflict.line, conflict.here, conflict.before, conflict.after) == (
        4,
        [b"mine\n"],
        [b"line 3\n"],
        [b"yours\n"],
    )
    assert found == here.replace(b"line 8", b"8")


@pytest.mark.parametrize(
    "here, after",
    [
        (BASE.replace(b"line 3\nline 4\n", b""), BASE.replace(b"line 4\n", b"4\n")),
        (BASE.replace(b"line 3\n", b""), BASE.replace(b"line 3\n", b"3\n")),
        (BASE.replace(b"line 3\n", b"line 3\na\n"), BASE.replace(b"line 3\n", b"line 3\nb\n")),
        (BASE.replace(b"line 3\n", b"line 3\na\n"), BASE.replace(b"line 3\nline 4\n", b"")),
    ],
)
def test_what_can_not_be_told_is_a_conflict(here, after):
    assert len(merged(here, BASE, after)[1]) == 1


def test_what_is_there_already_changes_nothing():
    after = BASE.replace(b"line 3\n", b"3\n").replace(b"line 7\n", b"7\n")
    assert merged(after, BASE, after) == (after, [])
    assert merged(BASE.replace(b"line 3\n", b"3\n"), BASE, after) == (after, [])


def test_where_git_merges_this_merges_the_same(tmp_path):
    rng, compared = random.Random(2), 0
    for _ in range(200):
        versions = []
        for _ in range(2):
            lines = lines_of(BASE * 3)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(lines))
                lines[at : at + rng.randrange(3)] = [b"%d\n" % rng.randrange(9)] * rng.randrange(3)
            versions.append(b"".join(lines))
        paths = [tmp_path / name for name in ("here", "before", "after")]
        for path, content in zip(paths, (versions[0], BASE * 3, versions[1])):
            path.write_bytes(content)
        git = subprocess.run(["git", "merge-file", "-p", *map(str, paths)], capture_output=True, check=False)
        found, conflicts = merged(versions[0], BASE * 3, versions[1])
        if git.returncode == 0 and not conflicts:
            compared += 1
            assert found == git.stdout
    assert compared > 50


def test_a_patch_is_merged_as_what_it_makes_of_its_text():
    rng, fresh = random.Random(3), itertools.count()
    before = b"".join(b"line %d\n" % i for i in range(36))
    for _ in range(100):
        here, after = lines_of(before), lines_of(before)
        for lines in (here, after):
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(lines))
                lines[at : at + rng.randrange(3)] = [b"new %d\n" % next(fresh) for _ in range(rng.randrange(1, 3))]
        here, after = b"".join(here), b"".join(after)
        assert merged_patch(here, before, diff(before, after)) == merged(here, before, after)


def test_a_last_line_without_an_end_is_not_glued_to_what_comes_after_it():
    made, conflicts = merged(b"a = 1\nb = 2", b"a = 1\nb = 2\n", b"a = 1\nb = 2\nc = 3\n")
    assert made == b"a = 1\nb = 2\nc = 3\n" and not conflicts
