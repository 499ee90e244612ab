"""The same train.py with another size of model."""

import pytest
from sessions import ROOT

from lab.errors import LabError
from lab.genome.resize import resized

SMALL = (
    b"DEPTH = 4  # layers\nTOTAL_BATCH_SIZE = 2**17\nDEVICE_BATCH_SIZE = min(\n    16, TOTAL_BATCH_SIZE // 2048\n)\n"
)


def sizes(content: bytes) -> tuple[int, int, int]:
    names = {"prepare": type("prepare", (), {"MAX_SEQ_LEN": 2048})}
    exec(content, names)
    return names["DEPTH"], names["TOTAL_BATCH_SIZE"], names["DEVICE_BATCH_SIZE"]


def test_twice_the_depth_has_a_batch_of_fewer_tokens_and_a_quarter_of_the_rows():
    assert sizes(resized(SMALL, 2, 3e8)) == (8, 2**16, 4)
    assert sizes(resized(SMALL, 0.5, 3e8))[0] == 2 and sizes(resized(SMALL, 0.1, 3e8))[0] == 1
    assert b"# layers" in resized(SMALL, 2, 3e8)


def test_more_time_alone_changes_the_batch_alone():
    assert sizes(resized(SMALL, 1, 3e8, times=4)) == (4, 2**18, 16)
    assert resized(SMALL, 1, 3e8) == SMALL


@pytest.mark.parametrize("depth", [1.25, 1.5, 3])
def test_rows_divide_the_total_batch_at_any_depth(depth):
    deeper, total, rows = sizes(resized(SMALL, depth, 3e8))
    assert deeper == 4 * depth and total % (rows * 2048) == 0 and rows <= 16 / depth**2


def test_sizes_on_one_line_keep_their_places():
    one_line = b"DEPTH = 4; DEVICE_BATCH_SIZE = 16; TOTAL_BATCH_SIZE = 2**17\n"
    assert sizes(resized(one_line, 2, 3e8)) == sizes(resized(SMALL, 2, 3e8))


def test_the_projects_own_train_py_can_be_resized():
    content = resized((ROOT / "train.py").read_bytes(), 2, 1e7)
    assert b"DEPTH = max(1, round(2 * (defaults.depth)))" in content
    compile(content, "train.py", "exec")


@pytest.mark.parametrize(
    "content", [b"X = 1\n", SMALL + b"DEPTH = 5\n", SMALL + b"DEPTH += 5\n", SMALL + b"X = DEPTH = 5\n"]
)
def test_a_train_py_that_does_not_set_its_sizes_once_is_refused(content):
    with pytest.raises(LabError, match="DEPTH"):
        resized(content, 2, 3e8)
