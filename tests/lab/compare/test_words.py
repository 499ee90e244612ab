"""Changes that are probably the same, by their descriptions."""

import pytest

from lab.compare.words import likeness, matches, said


@pytest.mark.parametrize(
    "one, other",
    [
        ("embedding LR 0.6 to 0.8", "EMBEDDING_LR 0.6 -> 0.8"),
        ("learning rate of the embedding to 0.8", "embed LR = 0.8"),
        ("weight decay 0.2 to 0.1", "lower WD to 0.1"),
        ("halve total batch size to 2^16", "halve batch 131K to 65536"),
        ("warmdown 0.5 to 0.7", "longer cooldown: 0.7"),
        ("add 5% warmup", "add warmup 0.05 (hurts)"),
        ("halve batch 524K to 262K (more steps)", "batch size 2**19 to 2**18"),
    ],
)
def test_the_same_in_other_words(one, other):
    assert likeness(said(one), said(other)) >= 0.8


@pytest.mark.parametrize(
    "one, other",
    [
        ("embedding LR 0.6 to 0.8", "embedding LR 0.8 to 0.6"),
        ("increase depth to 10", "reduce depth to 6"),
        ("add QK norm", "remove QK norm"),
        ("enable softcap on logits", "no softcap on logits"),
        ("embedding LR 0.6 to 0.8", "warmdown 0.6 to 0.8"),
        ("", ""),
        ("softcap 15 to 20", "matrix LR 15 to 20"),
    ],
)
def test_something_else(one, other):
    assert likeness(said(one), said(other)) < 0.6


def test_another_value_is_less_alike():
    same, other, unsaid = (
        likeness(said("matrix LR 0.04 to 0.05"), said(text))
        for text in ("matrix LR to 0.05", "matrix LR to 0.08", "matrix LR up")
    )
    assert same > unsaid > other


def test_each_is_matched_once_with_its_best():
    ours = ["matrix LR 0.04 to 0.05", "matrix LR 0.04 to 0.06", "add GQA"]
    theirs = ["MATRIX_LR 0.04 to 0.06", "depth 8 to 4"]
    assert matches(ours, theirs) == [(1, 0)]
    assert matches(ours, []) == matches([], theirs) == []


def test_numbers_that_are_no_powers_of_two_stay():
    assert said("RoPE base 10K to 200K").value == 200_000
    assert said("batch 524K to 262K").value == 262_144


@pytest.mark.parametrize(
    "text", ["batch 10000000000^63", "batch 1e999k", "batch 1e999", "batch 1e307k", "batch 1.79e305k"]
)
def test_numbers_that_are_too_large_are_none(text):
    assert said(text).value is None and "batch" in said(text).words
