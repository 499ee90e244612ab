"""The block of hyperparameters: read from the text of a train.py, and written back into it."""

import ast
import random
import re
from pathlib import Path

import pytest

from lab.genome import block

TRAIN = (Path(__file__).resolve().parents[3] / "train.py").read_text(encoding="utf-8")


def only(source):
    """The one variable in there."""
    [variable] = block.read(source)
    return variable


def test_reads_ours():
    found = {one.name: one for one in block.read(TRAIN)}
    assert {
        "DEPTH",
        "WINDOW_PATTERN",
        "TOTAL_BATCH_SIZE",
        "MATRIX_LR",
        "ADAM_BETAS[1]",
        "MOMENTUM[0]",
        "MUON_STEPS",
        "WARMUP_RATIO",
    } <= set(found)
    assert not {"SEED", "DEVICE_BATCH_SIZE", "POLAR_EXPRESS"} & set(found)
    kinds = {
        "DEPTH": "more",
        "HEAD_DIM": "size",
        "SOFTCAP": "whole",
        "WINDOW_PATTERN": "choice",
        "MATRIX_LR": "number",
        "ADAM_BETAS[1]": "decay",
        "WARMDOWN_RATIO": "part",
        "TOTAL_BATCH_SIZE": "times",
    }
    assert {name: found[name].kind for name in kinds} == kinds
    assert found["MUON_STEPS"].high == 5  # as its comment has it
    for one in found.values():
        assert one.at(one.place(one.value)) == one.value and TRAIN.encode()[one.start : one.end].decode() == (
            one.written(one.value)
        )


def test_a_zero_has_no_place_on_a_logarithmic_scale():
    here, zero = only("DECAY_RATE = 0.2\n"), only("DECAY_RATE = 0.0\n")
    assert here.scale == "log" and not here.fits(zero) and here.fits(only("DECAY_RATE = 0.7\n"))
    assert block.read("ADAM_BETAS = (0.9, 0.99999)\n") == block.read("ADAM_BETAS = (0.9, 1.0)\n")[:1]


@pytest.mark.parametrize("line", ["WARM_RATIO = 0.0  # [0.001 .. 0.5, log]", f"BIG = {10**400}", "BIG = -1e15"])
def test_what_has_no_place_is_no_variable(line):
    assert block.read(f"{line}\n") == ()


def test_what_is_written_can_be_read_again():
    size, decay = only("HEAD_DIM = 128  # [0 .. 256, linear]\n"), only("MOMENTUM = 0.95  # [0.5 .. 1.0]\n")
    assert size.at(0.0) == 1
    assert block.read(f"MOMENTUM = {decay.at(1.0)}  # [0.5 .. 1.0]\n")


@pytest.mark.parametrize(
    "line, low, high, scale",
    [
        ("LR = 0.04", 0.004, 0.4, "log"),
        ("LR = 4e-05", 4e-6, 4e-4, "log"),
        ("LR = 0.04  # Muon [0.01 .. 0.1, linear]", 0.01, 0.1, "linear"),
        ("LR = 0.04  # [1e-3..2e-1]", 0.001, 0.2, "log"),
        ("WARM_RATIO = 0.0", 0.0, 0.5, "linear"),
        ("STEPS = 5  # at most 5", 3, 5, "linear"),
        ("STEPS = 3  # [1 .. 9]", 1, 9, "linear"),
        ("EVERY = 1", 1, 3, "linear"),
        ("OFFSET = -2.0", -4.0, 0.0, "linear"),
        ("ROPE_BASE = 10000", 1000, 100000, "log"),
        ("HEAD_DIM = 64", 16, 256, "log"),
        ("WARM_RATIO = 0", 0.0, 0.5, "linear"),
        ("WARMDOWN_RATIO = 1", 0.0, 1.0, "linear"),
        ("EMBEDDING_LR = 1", 0.1, 10.0, "log"),
        ("KV_RATIO = 1", 1, 3, "linear"),
        ("AVERAGE_DECAY = 0.99", 0.9, 0.999, "log"),
        ("TOTAL_BATCH_SIZE = 2**18", 2**16, 2**20, "log"),
    ],
)
def test_bounds(line, low, high, scale):
    one = only(line)
    assert (one.low, one.high, one.scale) == (pytest.approx(low), pytest.approx(high), scale)
    for place in (0.0, 0.37, 1.0):
        assert low <= one.at(place) <= high


@pytest.mark.parametrize(
    "line, first, last",
    [
        ("STEPS = 100  # at most 128", 10, 128),
        ("SCALE = 100.0  # at most 128", 10.0, 128.0),
        ("STEPS = 120  # [104 .. 1260, log]", 104, 1260),
        ("HEAD_DIM = 64  # [48 .. 100]", 64, 64),
        ("MLP_RATIO = 4  # [1.5 .. 5.5]", 2, 5),
        ("MATRIX_LR = 0.04  # [0.0044 .. 0.126, log]", 0.0044, 0.126),
        ("MATRIX_LR = 0.04  # [0.00444 .. 0.4, log]", 0.00444, 0.4),
        ("BETA = 0.95  # [0.884 .. 0.9556]", 0.884, 0.9556),
    ],
)
def test_stated_bounds_hold_for_rounded_values(line, first, last):
    one = only(line)
    assert (repr(one.at(0.0)), repr(one.at(1.0))) == (repr(first), repr(last))


def test_decays_are_searched_near_one():
    first, second = block.read("ADAM_BETAS = (0.8, 0.95)\n")
    assert (first.name, second.name) == ("ADAM_BETAS[0]", "ADAM_BETAS[1]")
    assert second.high == pytest.approx(0.995) and second.at(1.0) == 0.995
    assert second.place(0.99) - second.place(0.98) == pytest.approx(second.place(0.98) - second.place(0.96))


@pytest.mark.parametrize(
    "line, kind", [("BETAS = (0.9, 0.5)", "decay"), ("MOMENTUM = 0.8", "decay"), ("HEAD_DIM = 8", "size")]
)
def test_a_variable_stays_what_it_is_wherever_the_search_takes_it(line, kind):
    for _ in range(4):
        one = block.read(f"{line}\n")[-1]
        assert one.kind == kind and one.low <= one.value < one.high and (kind == "size" or one.high < 1)
        line = block.write(line, {one.name: one.wider().at(0.0)})


def test_a_section_in_fractions():
    source = "# Schedule, in fractions of the time\nWARM = 0.1\nDOWN = 0.5\n\n# Others\nGAIN = 0.5\n"
    assert [one.kind for one in block.read(source)] == ["part", "part", "number"]


@pytest.mark.parametrize(
    "line",
    [
        "A = f(3)",
        "A = True",
        "A = None",
        "A = [1, 2]",
        "A = 'text'",
        "A = 1e999",
        "A = b * 2",
        "a = 3",
        "A, B = 1, 2",
        "A: int = 3",
        "A = defaults.batch // 3",
        "A = defaults.x ** 2",
        "SEED = 4",
        "A = 2 ** 17",
        "A = 1  # [3 .. 1]",
        "A = 0.1  # [1.2.3 .. 4]",
        "A = '''S\nL'''",
        "A = (",
        "def f():\n    B = 3",
        "DEVICE_BATCH_SIZE = 8",
    ],
)
def test_leaves_alone_what_it_cannot_read(line):
    assert block.read(line + "\n") == ()


def test_words_that_look_like_a_definition_end_nothing():
    source = '"""What it does, by\nclass and by name."""\n\nLR = 1.0\n\n\n@cached\ndef f():\n    pass\n\n\nB = 2.0\n'
    assert [one.name for one in block.read(source)] == ["LR"]


@pytest.mark.parametrize("old, new, depth, pattern, idle", [
    ("ASPECT_RATIO = 64", "ASPECT_RATIO = 40", 2, "SSSL", True),  # 128 wide either way
    ("ASPECT_RATIO = 64", "ASPECT_RATIO = 40", 8, "SSSL", False),
    ("KV_RATIO = 1", "KV_RATIO = 2", 2, "SSSL", True),  # one head either way
    ("KV_RATIO = 1", "KV_RATIO = 2", 4, "SSSL", False),
    ("width // HEAD_DIM // KV_RATIO", "width // KV_RATIO // HEAD_DIM", 2, "SSSL", False),
    ("SHORT_WINDOW = prepare.MAX_SEQ_LEN // 2", "SHORT_WINDOW = prepare.MAX_SEQ_LEN // 8", 8, "L", True),
    ("SHORT_WINDOW = prepare.MAX_SEQ_LEN // 2", "SHORT_WINDOW = prepare.MAX_SEQ_LEN // 8", 8, "SSSL", False),
    ("WINDOW_PATTERN = defaults.window_pattern", 'WINDOW_PATTERN = "SSSL"', 8, "SSSL", True),
    ("WINDOW_PATTERN = defaults.window_pattern", 'WINDOW_PATTERN = "SL"', 2, "SSSL", True),  # the last is long anyway
    ("WINDOW_PATTERN = defaults.window_pattern", 'WINDOW_PATTERN = "SL"', 3, "SSSL", False),
    ("MATRIX_LR = 0.04", "MATRIX_LR = 0.05", 2, "L", False),
    ("return sizes[:-1] + [None]", "return sizes", 2, "L", False),
])  # fmt: skip
def test_what_changes_nothing_on_a_device(old, new, depth, pattern, idle):
    calibrated = {"depth": depth, "window_pattern": pattern, "total_batch_size": 2**16}
    assert TRAIN.count(old) == 1
    assert (block.model(TRAIN, calibrated) == block.model(TRAIN.replace(old, new), calibrated)) == idle


def test_a_file_is_parsed_once(monkeypatch):
    seen, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda *text, **how: seen.append(text) or parse(*text, **how))
    assert block.read("LR = 0.01  # parsed once\n\n\ndef f():\n    pass\n\n\nRATE = 0.02\n")[0].name == "LR"
    assert len(seen) == 1


def test_only_the_block():
    rule = "# " + "-" * 60
    source = f"BEFORE = 1.0\n{rule}\n# Hyperparameters: edit\n{rule}\nLR = 1.0\n{rule}\n# Model\n{rule}\nAFTER = 1.0\n"
    assert only(source).name == "LR"
    assert only("LR = 1.0\n\n\nclass A:\n    pass\n\n\nAFTER = 1.0\n").name == "LR"


@pytest.mark.parametrize("value, text", [(0, "defaults.depth"), (2, "defaults.depth + 2"), (-1, "defaults.depth - 1")])
def test_stays_relative_to_the_depth(value, text):
    for source in ("DEPTH = defaults.depth\n", "DEPTH = defaults.depth + 1\n", "DEPTH = defaults.depth - 2\n"):
        assert block.write(source, {"DEPTH": value}) == f"DEPTH = {text}\n"


@pytest.mark.parametrize("value, text", [(0, "a.total"), (2, "a.total * 4"), (-1, "a.total // 2")])
def test_stays_relative_to_the_batch(value, text):
    for source in ("BATCH = a.total\n", "BATCH = a.total * 2\n", "BATCH = a.total // 4\n"):
        assert block.write(source, {"BATCH": value}) == f"BATCH = {text}\n"


def test_a_window_is_not_longer_than_a_row():
    one = only("SHORT_WINDOW = prepare.MAX_SEQ_LEN // 2\n")
    assert one.written(one.at(1.0)) == "prepare.MAX_SEQ_LEN"


def test_writes_only_the_values():
    before = (
        "# ± é\nLR = 0.04            # Muon ±\nBETAS = (0.8, 0.95)  # Adam\nPATTERN = 'SSSL'  # a pattern\n"
        "A_SIZE = 16#\n"
    )
    after = block.write(before, {"LR": 0.0375, "BETAS[1]": 0.9875, "PATTERN": '"L"', "A_SIZE": 64})
    assert after == (
        "# ± é\nLR = 0.0375          # Muon ±\nBETAS = (0.8, 0.9875)  # Adam\n"
        'PATTERN = "L"     # a pattern\nA_SIZE = 64#\n'
    )
    assert block.structure(before) == block.structure(after)
    assert block.structure(before) != block.structure(before.replace("Adam", "Adan"))


def test_whatever_it_writes_it_reads_again():
    rng = random.Random(1)
    for _ in range(50):
        text, wanted = TRAIN, {}
        for one in block.read(TRAIN):
            one = one.wider() if rng.random() < 0.5 else one
            wanted[one.name] = one.at(rng.randrange(len(one.choices)) if one.kind == "choice" else rng.random())
        text = block.write(TRAIN, wanted)
        assert {one.name: one.value for one in block.read(text)} == wanted
        assert block.structure(text) == block.structure(TRAIN)
        ast.parse(text)
        assert re.sub(r"(?s)^.*?# Optimizer: pure", "", text) == re.sub(r"(?s)^.*?# Optimizer: pure", "", TRAIN)


def test_wider_bounds():
    for one in block.read(TRAIN):
        wider = one.wider()
        fixed = one.kind == "choice" or one.stated or (one.kind, one.high) == ("part", 1.0)
        assert fixed == ((wider.low, wider.high) == (one.low, one.high)), one.name
        assert wider.low <= one.low and one.high <= wider.high and wider.at(wider.place(one.value)) == one.value
    stated = only("LR = 0.1  # [0.05 .. 0.2]")
    assert stated.wider() == stated
    assert only("LR = 0.1").wider(3.0).high == 3.0


def test_signs_that_only_pythons_strings_take_for_line_ends_shift_nothing():
    source = "A_LR = 0.1  # a\u2028b\x0c\n# ü\x0b\nB_LR = 0.2  # é\n"
    assert block.write(source, {"B_LR": 0.3}) == source.replace("0.2", "0.3")


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("x", "x", ""),
        ("DEPTH = defaults.depth", "DEPTH = defaults.depth - 1", ""),
        ("DEPTH = defaults.depth", "DEPTH = defaults.depth - 2", "DEPTH"),
        ("DEPTH = defaults.depth", "DEPTH = 0", "DEPTH"),
        ("= defaults.total_batch_size", "= defaults.total_batch_size // 2", ""),
        ("= defaults.total_batch_size", "= defaults.total_batch_size // 4", "TOTAL_BATCH_SIZE"),
        ("= defaults.total_batch_size", "= 1024", "TOTAL_BATCH_SIZE"),
        ("= defaults.total_batch_size", "= 2**10", "TOTAL_BATCH_SIZE"),
        ("= defaults.total_batch_size", "= prepare.MAX_SEQ_LEN // 2", "TOTAL_BATCH_SIZE"),
        ("= defaults.total_batch_size", "= defaults.other // 2", ""),  # it may be anything
    ],
)
def test_sizes_that_leave_nothing_to_train(old, new, name):
    assert block.too_small(TRAIN.replace(old, new), {"depth": 2, "total_batch_size": 4096}) == name
