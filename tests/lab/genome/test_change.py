"""The ids of a change: exact by definition, family by lines, the same on every machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.genome import change
from lab.genome.change import Change, diff, identify, patched
from lab.genome.syntax import describe

ROOT = Path(__file__).resolve().parents[3]
BASE = b'''import math

LR = 0.04
DEPTH = 8  # layers


class MLP:
    def forward(self, x):
        y = self.c_fc(x)
        return self.c_proj(y)


class Attention:
    def forward(self, x):
        y = self.c_q(x)
        return y


class GPT:
    """A model."""

    size = 3

    def hidden(self, x):
        for block in self.blocks:
            x = block(x)
            x = x + 1
        return x
'''
NORM = b"x = ops.rms_norm(x)\n"
PLACES = {
    "in the layer loop": (b"            x = x + 1\n", b"            " + NORM + b"            x = x + 1\n"),
    "later in the layer loop": (b"            x = x + 1\n", b"            x = x + 1\n            " + NORM),
    "after it": (b"        return x\n", b"        " + NORM + b"        return x\n"),
    "in the MLP": (b"        y = self.c_fc(x)\n", b"        " + NORM + b"        y = self.c_fc(x)\n"),
    "in the attention": (b"        y = self.c_q(x)\n", b"        " + NORM + b"        y = self.c_q(x)\n"),
}


def edit(old: bytes, new: bytes, base: bytes = BASE) -> bytes:
    assert base.count(old) == 1, old
    return base.replace(old, new)


def test_each_placement_of_a_line_has_an_exact_id_of_its_own():
    ids = {place: identify(BASE, edit(*swap)) for place, swap in PLACES.items()}
    assert len({one.exact for one in ids.values()}) == len(PLACES)
    assert ids["in the layer loop"].family == ids["later in the layer loop"].family
    assert len({one.family for one in ids.values()}) == len(PLACES) - 1


def test_a_neighbouring_line_that_differs_changes_the_exact_id_and_not_the_family():
    swap = PLACES["in the MLP"]
    other = edit(b"        return self.c_proj(y)\n", b"        return 2 * self.c_proj(y)\n")
    here, there = identify(BASE, edit(*swap)), identify(other, edit(*swap, base=other))
    assert here.family == there.family and here.exact != there.exact


def test_another_definition_that_differs_changes_neither():
    swap = (b"LR = 0.04", b"LR = 0.05")
    other = edit(b"DEPTH = 8", b"DEPTH = 12")
    assert identify(BASE, edit(*swap)) == identify(other, edit(*swap, base=other))


def test_line_ends_comments_and_layout_change_no_id():
    swap, crlf = PLACES["after it"], BASE.replace(b"\n", b"\r\n")
    expected = identify(BASE, edit(*swap))
    assert identify(crlf, edit(*swap).replace(b"\n", b"\r\n")) == identify(BASE, edit(*swap).replace(b"\n", b"\r\n"))
    assert identify(crlf, edit(*swap).replace(b"\n", b"\r\n")) == expected
    assert identify(BASE, edit(b"DEPTH = 8  # layers", b"DEPTH = 8  # of them")) == Change("", "")
    spaced, plain = (identify(BASE, edit(b"LR = 0.04", new)) for new in (b"# a remark\nLR  =  0.05", b"LR = 0.05"))
    assert spaced.exact == plain.exact


def test_ids_and_digests_are_those_of_every_python_version():
    """Written down once: `ast.dump` changed with Python 3.13."""
    assert identify(BASE, edit(*PLACES["after it"])) == Change("078cb094673c90ae", "f9b00e50d52bacde")
    assert describe(BASE).digest == "7bbaac9a86c675f8"


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13", "3.14"])
def test_another_python_agrees(version):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from lab.genome.syntax import canonical, parsed\nprint(len(canonical(parsed({BASE.decode()!r}))))"
    )
    try:
        done = subprocess.run([f"python{version}", "-c", code], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"there is no Python {version} here")
    if done.returncode:
        pytest.skip(f"Python {version} lacks what the project needs: {done.stderr.strip().splitlines()[-1]}")
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == here.stdout


@pytest.mark.parametrize("after", [*(edit(*swap) for swap in PLACES.values()), b"", BASE[:-1], BASE + b"x = 1"])
def test_a_diff_makes_the_change_again(after):
    assert patched(BASE, diff(BASE, after)) == after


def test_a_diff_of_another_file_is_refused():
    text = diff(BASE, edit(*PLACES["after it"]))
    with pytest.raises(LabError, match="does not fit"):
        patched(BASE.replace(b"return x\n", b"return -x\n"), text)
    with pytest.raises(LabError, match="cut short|more than"):
        patched(BASE, text[: text.rindex("\n", 0, -1) - 8])
    with pytest.raises(LabError, match="more than changes"):
        patched(BASE, text + "rename to x\n")


def test_a_number_in_place_of_a_default_is_not_simpler():
    for value in (b"defaults.depth", b"defaults.depth + 1", b"min(defaults.depth, 2 * WIDTH // 64)"):
        plain = BASE.replace(b"DEPTH = 8", b"DEPTH = " + value)
        assert plain != BASE and describe(plain).complexity == describe(BASE).complexity
    assert describe(BASE.replace(b"DEPTH = 8", b"DEPTH = 4 + 4")).complexity > describe(BASE).complexity
    assert change.CONTEXT == 3
