"""The library of structural edits: each trains, alike on every backend, and applies only where it can."""

import itertools
from unittest import mock

import numpy as np
import pytest
import test_edits as harness
from test_edits import OTHER_LOSS, apart, executed, initialised, shrunk

import backends
from backends import surface
from lab.night import block, edits
from tests.backends.support import opened

TRAIN = (harness.ROOT / "train.py").read_text(encoding="utf-8")
LIBRARY = {edit.name: edit for edit in edits.LIBRARY}
rows, trained = harness.rows, harness.trained  # fixtures
LATER = ("1 - sqrt", "momentum", "steady decay")  # these change how training goes on, not how it begins
BACKENDS = pytest.mark.parametrize("backend", backends.NAMES)
NAMES = pytest.mark.parametrize("name", LIBRARY)


def edited(name):
    return LIBRARY[name].apply(TRAIN) if name else TRAIN


@pytest.fixture(scope="module", autouse=True)
def ours():
    """The harness takes this library's edits by name."""
    with mock.patch.object(harness, "source_of", edited):
        yield


@NAMES
def test_applies_once(name):
    source = edited(name)
    assert source != TRAIN and surface.check(source) == [] and max(map(len, source.splitlines())) <= 120
    assert {one.name for one in block.read(TRAIN)} <= {one.name for one in block.read(source)}
    assert LIBRARY[name].apply(source) is None


@NAMES
def test_does_not_apply_where_the_place_has_changed(name):
    for old, _ in LIBRARY[name].swaps:
        assert LIBRARY[name].apply(TRAIN.replace(old, "")) is None


def test_several_go_together():
    source = TRAIN
    for name in ("QK gain", "parallel", "swiglu", "1 - sqrt", "momentum"):
        source = LIBRARY[name].apply(source)
    assert surface.check(source) == []


def test_says_what_it_is():
    assert len(LIBRARY) == len(edits.LIBRARY) >= 8
    for edit in edits.LIBRARY:
        assert edit.why and ": " not in edit.name


@BACKENDS
@NAMES
def test_learns_and_looks_only_back(trained, name, backend):
    run = trained(name, backend)
    assert np.isfinite(run.losses).all() and run.losses[-1] < 0.5 * run.losses[0]
    for length in harness.PREFIXES:
        np.testing.assert_allclose(run.logits[length], run.logits[harness.LENGTH][:, :length], atol=1e-4)
    if name not in LATER:
        assert apart(run.losses, trained(None, backend).losses) > OTHER_LOSS


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
@NAMES
def test_backends_agree(trained, name, one, other):
    harness.test_backends_agree(trained, name, one, other)
