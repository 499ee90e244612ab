"""The published findings: each can be read, applies to train.py once, trains, and trains alike on every backend."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import test_edits as harness
from test_edits import apart, executed, initialised, shrunk

import backends
from backends import surface
from lab.errors import LabError
from lab.genome import block, edits
from lab.genome.edits import Already, NotHere, Step, Swap
from lab.compare import published
from tests.backends.support import opened

CALIBRATED = {"window_pattern": "L"}
TRAIN = (harness.ROOT / "train.py").read_text(encoding="utf-8")
LIBRARY = {finding.name: finding for finding in published.library()}
STRUCTURAL = [name for name, one in LIBRARY.items() if any(isinstance(part, Swap) for part in one.edit.parts)]
SIZES = ["half-batch", "quarter-batch", "one-layer-more", "fewer-layers", "narrower", "longer-short-window"]
# These change how training goes on, and not how it begins; their effect on the schedule is tested.
LATER = ["square-root-cooldown", "momentum-cooldown", "steady-decay", "split-cooldown"]
rows, trained = harness.rows, harness.trained  # fixtures
BACKENDS = pytest.mark.parametrize("backend", backends.NAMES)
NAMES = pytest.mark.parametrize("name", LIBRARY)


def bundles() -> dict[str, list[str]]:
    """The findings that are values, several to a train.py: those that go together."""
    packed: list[list[str]] = []
    for name in LIBRARY:
        if name not in STRUCTURAL and name not in SIZES:
            for names in packed:
                if not any(LIBRARY[name].edit.meets(LIBRARY[other].edit) for other in names):
                    names.append(name)
                    break
            else:
                packed.append([name])
    return {f"values {i}": names for i, names in enumerate(packed)}


BUNDLES = bundles()
TRAINED = [*(name for name in STRUCTURAL if name not in SIZES), *BUNDLES]
TRIED = pytest.mark.parametrize("name", TRAINED)


def edited(name):
    """train.py with a finding or a bundle of them."""
    source = TRAIN
    for one in BUNDLES.get(name, [name] if name else []):
        source = LIBRARY[one].edit.apply(source)
    return source


@pytest.fixture(scope="module", autouse=True)
def ours():
    """The harness takes findings by name."""
    with mock.patch.object(harness, "source_of", edited):
        yield


# --- Each of them ---


def test_there_are_findings():
    assert len(LIBRARY) >= 60 and len(STRUCTURAL) >= 25
    assert len({finding.origin for finding in LIBRARY.values()}) == len(LIBRARY)
    kept = [one for finding in LIBRARY.values() for one in finding.evidence if "session of March 8" in one.source]
    assert sum(one.size < 0 for one in kept) == 22  # all that this session kept


@NAMES
def test_applies_once(name):
    source = edited(name)
    assert source != TRAIN and surface.check(source) == [] and max(map(len, source.splitlines())) <= 120
    assert {one.name for one in block.read(TRAIN)} <= {one.name for one in block.read(source)} | {"SHORT_WINDOW"}
    with pytest.raises(NotHere):
        LIBRARY[name].edit.apply(source)


@NAMES
def test_does_not_apply_where_its_place_has_gone(name):
    for part in LIBRARY[name].edit.parts:
        gone = TRAIN.replace(part.old, "0" * 0) if isinstance(part, Swap) else TRAIN.replace(part.name[:6], "OTHER_")
        with pytest.raises(NotHere):
            LIBRARY[name].edit.apply(gone)


@pytest.mark.parametrize(
    "one, other", [("smear", "qk-gain"), ("backout", "output-smear"), ("qk-gain", "exclusive-attention")]
)
def test_many_go_together(one, other):
    both = [LIBRARY[other].edit.apply(LIBRARY[one].edit.apply(TRAIN)), LIBRARY[one].edit.apply(edited(other))]
    assert all(surface.check(source) == [] for source in both) and not LIBRARY[one].edit.meets(LIBRARY[other].edit)


@pytest.mark.parametrize(
    "one, other",
    [
        ("half-batch", "quarter-batch"),
        ("gelu", "swiglu"),
        ("parallel", "mlp-scale"),
        ("short-window", "longer-short-window"),
    ],
)
def test_two_in_conflict(one, other):
    assert LIBRARY[one].edit.meets(LIBRARY[other].edit) and LIBRARY[other].edit.meets(LIBRARY[one].edit)


# --- Trained ---


@BACKENDS
@TRIED
def test_learns_and_looks_only_back(trained, name, backend):
    run, before = trained(name, backend), trained(None, backend)
    assert np.isfinite(run.losses).all() and run.losses[-1] < 0.8 * run.losses[0]
    for length in harness.PREFIXES:
        np.testing.assert_allclose(run.logits[length], run.logits[harness.LENGTH][:, :length], atol=1e-4)
    if name not in LATER:
        differ = np.abs(run.logits[harness.LENGTH] - before.logits[harness.LENGTH]).max()
        assert apart(run.losses, before.losses) > 1e-5 or differ > 1e-4


@BACKENDS
@pytest.mark.parametrize("name", LATER)
def test_changes_the_schedule(name, backend, rows):
    def hypers(source):
        train = executed(shrunk(source), opened(backend, "float32"))
        groups = train.optimizer_groups({key: weight.shape for key, weight in initialised(train, rows[2])[1].items()})
        return [train.schedule(groups, progress, 1000) for progress in (0.0, 0.75, 1.0)]

    (first, later, last), (was_first, was_later, _) = hypers(edited(name)), hypers(TRAIN)
    assert first == was_first and later != was_later
    assert all(np.isfinite(list(hyper.values())).all() for hyper in [*later, *last])


@pytest.mark.parametrize("one, other", list(itertools.combinations(backends.NAMES, 2)))
@TRIED
def test_backends_agree(trained, name, one, other):
    harness.test_backends_agree(trained, name, one, other)


@BACKENDS
@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_start_as_they_should(rows, name, backend):
    x, y, vocab_size = rows
    train, before = (executed(source, opened(backend, "float32")) for source in (edited(name), TRAIN))
    model, _ = initialised(train, vocab_size)
    with harness.one_thread():
        losses = train.backend.losses(model, x[:1], y[:1])
    assert losses.mean() == pytest.approx(math.log(vocab_size), rel=0.02)
    sizes = "DEPTH", "ASPECT_RATIO", "TOTAL_BATCH_SIZE", "SHORT_WINDOW"
    assert [getattr(train, name) for name in sizes] != [getattr(before, name) for name in sizes]


# --- Steps ---


@pytest.mark.parametrize(
    "line, here, there",
    [
        ("MATRIX_LR: 0.04 -> 0.03", "MATRIX_LR = 0.04", "MATRIX_LR = 0.03"),
        ("MATRIX_LR: 0.04 -> 0.03", "MATRIX_LR = 0.08", "MATRIX_LR = 0.06"),
        ("DEPTH: defaults.depth -> defaults.depth + 1", "DEPTH = defaults.depth + 2", Already),
        ("DEPTH: defaults.depth -> defaults.depth - 2", "DEPTH = defaults.depth + 2", "DEPTH = defaults.depth"),
        ("ADAM_BETAS[1]: 0.95 -> 0.98", "ADAM_BETAS = (0.8, 0.9)", "ADAM_BETAS = (0.8, 0.96)"),
        ("MATRIX_LR: 0.04 -> 0.03", "MATRIX_LR = 0.02", Already),
        ("MATRIX_LR: 0.04 -> 0.03", "MATRIX_LR = 0.04 * 2", NotHere),
        ("DEPTH: defaults.depth -> defaults.depth + 1", "DEPTH = 8", NotHere),
        ("MATRIX_LR: 0.04 -> 0.03", "OTHER = 1", NotHere),
        ("DEPTH: defaults.depth -> defaults.depth - 2", "DEPTH = defaults.depth * 2", NotHere),
        ("BATCH: defaults.batch -> defaults.batch // 2", "BATCH = defaults.batch + 1024", NotHere),
        (
            "WARM_RATIO: 0.0 -> 0.1",
            "WARM_RATIO = 0.01  # [0.001 .. 0.5, log]",
            "WARM_RATIO = 0.1   # [0.001 .. 0.5, log]",
        ),
        ("WARM_RATIO: 0.1 -> 0.0", "WARM_RATIO = 0.2  # [0.001 .. 0.5, log]", NotHere),
        ("SOFTCAP: 15 -> 20", "SOFTCAP = 12", "SOFTCAP = 17"),  # beyond where a search begins
        ("ROPE_BASE: 10000 -> 200000", "ROPE_BASE = 20000", "ROPE_BASE = 200000"),  # on the way
        ("ROPE_BASE: 10000 -> 200000", "ROPE_BASE = 5000", "ROPE_BASE = 100000"),
        ("BATCH: defaults.batch -> defaults.batch // 4", "BATCH = defaults.batch // 2", "BATCH = defaults.batch // 4"),
        ("MUON_BETA2: 0.95 -> 0.98", "MUON_BETA2 = 0.3", "MUON_BETA2 = 0.72"),
        ("WARM_RATIO: 0.2 -> 0.5", "WARM_RATIO = 0.4", "WARM_RATIO = 0.5"),
        ("WARM_RATIO: 0.2 -> 0.5", "WARM_RATIO = 0.1", "WARM_RATIO = 0.4"),
        ("DOWN_RATIO: 0.8 -> 0.1", "DOWN_RATIO = 0.9", "DOWN_RATIO = 0.2"),
        (
            "W: prepare.MAX_SEQ_LEN // 8 -> prepare.MAX_SEQ_LEN",
            "W = prepare.MAX_SEQ_LEN // 2",
            "W = prepare.MAX_SEQ_LEN",
        ),
        ("LAYERS: 12 -> 3", "LAYERS = 5", "LAYERS = 3"),
        ("LAYERS: 12 -> 3", "LAYERS = 16", "LAYERS = 4"),
        ("LR: 0.04 -> 0.02", "LR = 0.05  # [0.045 .. 0.3, log]", NotHere),
        ("LR: 0.04 -> 0.02", "LR = 0.05  # [0.025 .. 0.3, log]", "LR = 0.025  # [0.025 .. 0.3, log]"),
        ('PATTERN: defaults.window_pattern -> "L"', 'PATTERN = "L"', Already),
        ('PATTERN: defaults.window_pattern -> "L"', 'PATTERN = "SL"', 'PATTERN = "L"'),
        ('PATTERN: "SSSL" -> "SSLL"', 'PATTERN = "SL"', Already),
        ('PATTERN: "SSSL" -> "SSLL"', "PATTERN = defaults.window_pattern", Already),
        ('PATTERN: "SSSL" -> "SSSSL"', 'PATTERN = "SL"', 'PATTERN = "SSSSL"'),
    ],
)
def test_a_step_from_another_value(line, here, there):
    edit = edits.read(line)
    if isinstance(there, str):
        assert edit.apply(f"{here}\n", CALIBRATED) == f"{there}\n"
    else:
        with pytest.raises(there) as caught:
            edit.apply(f"{here}\n", CALIBRATED)
        assert (caught.type is Already) == (there is Already)


def test_a_swap_that_fits_twice_is_refused():
    edit = edits.read("@ f\n-x + 1\n+x + 2")
    assert edit.apply("def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x + 1\n").count("x + 2") == 1
    with pytest.raises(NotHere, match="is 2 times in f"):
        edit.apply("def f(x):\n    y = x + 1\n    return x + 1\n")
    with pytest.raises(NotHere, match="there is no f"):
        edit.apply("def g(x):\n    return x + 1\n")
    with pytest.raises(NotHere, match="not valid Python"):
        edits.read("@ f\n-x + 1\n+x +").apply("def f(x):\n    return x + 1\n")


def test_a_swap_that_only_takes_away_and_lines_that_python_does_not_see():
    edit = edits.read("@ f\n-    x += 1\n-")
    with_blank = "def f(x):\n    x += 1\n\n    return x\n"
    assert "x += 1" not in edit.apply(with_blank)
    swap = edits.read("@ f\n-return 2\n+return 3")
    assert "return 3" in swap.apply("def g():\n    return '\x0c'\n\n\ndef f():\n    return 2\n")


@pytest.mark.parametrize(
    "before",
    [
        "def f(x):\n    # before: return x + 1\n    return x + 3\n",
        "def f(x):\n    return x + 3  # not x + 1\n",
        'def f(x):\n    """Returns x + 1."""\n    return x + 3\n',
    ],
)
def test_an_edit_of_a_comment_is_none(before):
    with pytest.raises(NotHere, match="'x \\+ 1' is not in the code of f"):
        edits.read("@ f\n-x + 1\n+x + 2").apply(before)
    after = edits.read("@ f\n-x + 1\n+x + 2").apply(before.replace("x + 3", "x + 1"))
    assert after == before.replace("x + 3", "x + 2")


def test_what_is_put_before_a_definition_takes_no_decorator_of_it():
    edit = edits.read("@ f\n+def g():\n+    return 2\n+\n+\n def f(x):")
    assert edit.apply("def f(x):\n    return x\n").startswith("def g():\n    return 2\n\n\ndef f(x):")
    with pytest.raises(NotHere, match="f has a decorator here"):
        edit.apply("@cache\ndef f(x):\n    return x\n")


@pytest.mark.parametrize(
    "first, second",
    [
        *itertools.permutations(("attention-gate", "exclusive-attention")),
        *itertools.permutations(("output-smear", "backout")),
        *itertools.permutations(("embedding-decay", "head-decay")),
        *((decay, other) for decay in ("embedding-decay", "head-decay") for other in ("value-decay", "split-cooldown")),
    ],
)
def test_no_finding_is_applied_again_after_another_at_its_place(first, second):
    both = LIBRARY[second].edit.apply(LIBRARY[first].edit.apply(TRAIN))
    with pytest.raises(NotHere):
        LIBRARY[first].edit.apply(both)


def test_what_is_there_already_is_told_from_what_does_not_apply():
    edit = edits.read("LR: 1.0 -> 2.0\n@ f\n+    y = 2\n     return")
    before = "LR = 1.0\n\n\ndef f(x):\n    return x\n"
    after = edit.apply(before)
    with pytest.raises(Already):
        edit.apply(after)
    with pytest.raises(NotHere, match="a part of it is in the file already") as caught:
        edit.apply(after.replace("2.0", "1.0"))
    assert caught.type is NotHere
    assert Step("LR", "1.0", "2.0") in edit.parts


# --- Files ---

GOOD = "What it does.\ntime: holds\nevidence: cpu | 300 | -0.01 bpb | said | https://somewhere\n\nLR: 1.0 -> 2.0\n"


def test_a_finding_that_was_added_is_found_by_its_name(tmp_path, monkeypatch):
    """In the checkout, where the session's own copy of the project does not have it."""
    monkeypatch.chdir(tmp_path)
    assert published.named("a-name") is None and published.named("~nobody-of-that-name/a.tar.gz") is None
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings" / "a-name.txt").write_text(GOOD)
    (tmp_path / "findings" / "._a-name.txt").write_bytes(b"\0\5\x16\7")
    found = published.named("a-name")
    assert found and found[0].name == "a-name"
    assert published.library(tmp_path / "findings") == tuple(found)


@pytest.mark.parametrize(
    "edit, match",
    [
        ('WINDOW_PATTERN: "SSSL" -> 5', "both values have to be numbers"),
        ("MATRIX_LR: 0.04 -> (0.03, 0.02)", "can't be set to"),
        ("MATRIX_LR: 0.04 -> 0.03; import os", "can't be set to"),
    ],
)
def test_a_value_that_is_no_value_is_refused(edit, match):
    with pytest.raises(LabError, match=match):
        edits.read(edit)


def test_a_file_is_read():
    finding = published.read("a-name", GOOD)
    assert (finding.title, finding.time) == ("a name: What it does.", "holds")
    assert finding.evidence == (published.Evidence("cpu", 300.0, "-0.01 bpb", "said", "https://somewhere"),)


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("evidence: cpu | 300 | -0.01 bpb | said | https://somewhere\n", "", "no evidence"),
        (" | https://somewhere", "", "evidence has to be DEVICE"),
        ("-0.01 bpb", "0.01", "an effect has to be a number with sign and unit"),
        ("-0.01 bpb", "-0,01 bpb", "an effect has to be a number"),
        ("| 300 |", "| soon |", "seconds of training"),
        ("time: holds", "time: maybe", "'time:' has to be one of"),
        ("time: holds", "effect: large", "is neither 'time"),
        ("LR: 1.0 -> 2.0\n", "", "changes nothing"),
        ("LR: 1.0 -> 2.0", "LR: 1.0", "neither 'NAME: VALUE -> VALUE'"),
        ("LR: 1.0 -> 2.0", "LR: f(x) -> 2.0", "can't be set"),
        ("LR: 1.0 -> 2.0", "@ f\nx", "begins with none of"),
        ("LR: 1.0 -> 2.0", "@ f\n x", "nothing is replaced"),
    ],
)
def test_a_file_that_lacks_something_is_refused(tmp_path, old, new, match):
    (tmp_path / "a-name.txt").write_text(GOOD.replace(old, new))
    with pytest.raises(LabError, match=rf"a-name.txt: .*{match}"):
        published.library(tmp_path)


def test_evidence_of_such_a_device_counts_for_more():
    finding = published.read("a-name", GOOD.replace("cpu", "nvidia-h100-80gb"))
    near, far = finding.expected("nvidia-h200-140gb", 300), finding.expected("apple-m4", 300)
    assert near > far > 0
    fading = published.read("a-name", GOOD.replace("holds", "fades"))
    assert fading.expected("cpu", 20) > fading.expected("cpu", 300) == finding.expected("nvidia-h100-80gb", 300)
