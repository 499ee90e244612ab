"""What is said of a train.py without running it."""

import pytest

from lab.genome import syntax as source
from lab.errors import LabError

PLAIN = b'"""Doc."""\nimport math\n\ndef f(x):\n    """Says."""\n    return math.sqrt(x)  # root\n'


def test_comments_layout_and_docstrings_do_not_matter():
    other = b"import math\ndef f(x):\n\n    return (math.sqrt(x))\n"
    assert source.describe(PLAIN).digest == source.describe(other).digest
    assert source.describe(PLAIN).complexity == source.describe(other).complexity


def test_a_value_does():
    assert source.describe(b"LR = 0.04\n").digest != source.describe(b"LR = 0.05\n").digest


def test_less_code_is_less_complex():
    assert source.describe(b"x = 1\n").complexity < source.describe(b"x = 1 + 0\n").complexity


def test_a_string_that_is_no_docstring_counts():
    assert source.describe(b"x = 1\n'text'\n").complexity > source.describe(b"x = 1\n").complexity


def test_a_function_of_a_docstring_alone_stays_one():
    assert (
        source.describe(b'def f():\n    """Doc."""\n').complexity == source.describe(b"def f():\n    pass\n").complexity
    )


def test_a_framework_makes_it_not_portable():
    assert source.describe(PLAIN).portable
    assert not source.describe(b"import torch\n").portable


@pytest.mark.parametrize(
    "content, said",
    [
        (b"def f(:\n", "line 1"),
        (b"x = 1\n  y = 2\n", "line 2"),
        (b"\xff\xfe", "UTF-8"),
        (b"x = 1\0", "null"),
        (b"x = 0x" + b"f" * 6000, "4300 digits"),
        (b"x = '" + b"x" * 2**19 + b"'\n", "may have 524,288"),
    ],
)
def test_what_can_be_no_train_py_is_refused_with_the_reason(content, said):
    assert not source.is_python(content)
    with pytest.raises(LabError, match=said):
        source.describe(content)


def test_a_byte_order_mark_is_no_error():
    assert source.describe(b"\xef\xbb\xbfx = 1\n").digest == source.describe(b"x = 1\n").digest
