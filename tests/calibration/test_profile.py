"""Profiles on disk, good and bad, and what train.py gets from them."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import pytest

import backends
import calibration
import calibration.__main__ as calibration_command
from backends.interface import Hardware
from calibration import profile, rule
from tests.calibration.devices import RTX_3090, spread

HARDWARE = Hardware(
    "sdpa",
    "NVIDIA GeForce RTX 3090",
    "nvidia-rtx-3090-24gb",
    "cuda",
    24 * 2**30,
    {"torch": "2.13.0", "cuda": "13.0", "python": "3.11.7"},
)
SETTINGS = {
    "depth": 5,
    "device_batch_size": 8,
    "total_batch_size": 65536,
    "window_pattern": "SSSL",
    "precision": "bfloat16",
    "attention": {"full": "sdpa_causal", "window": "flex"},
}


@pytest.fixture
def good():
    """A profile's content, as a calibration writes it."""
    return {
        "format": profile.FORMAT,
        "device": HARDWARE.slug,
        "backend": "sdpa",
        "versions": HARDWARE.versions,
        "train": profile.baseline(),
        "effort": "full",
        "made": "2026-11-21T12:00:00Z",
        "seconds": 300.0,
        "machine": {"os": "Linux", "unknown": []},
        "settings": copy.deepcopy(SETTINGS),
        "reasons": ["measured"],
        "products": {"square": 8192, "rates": {"bfloat16": spread(6e13), "float16": "wrong: relative error 1"}},
        "bandwidth": spread(9e11),
        "model_products": [],
        "attention": {
            "full": {"sdpa_causal": {"both": spread(2e-3)}},
            "window": {"flex": {"both": spread(1e-3)}, "varlen": "wrong"},
        },
        "trials": [asdict(RTX_3090.run(5, 8))],
    }


@pytest.fixture
def here(monkeypatch, good):
    """This machine is the profile's; gives the path where its profile belongs."""
    monkeypatch.setattr(backends, "identify", lambda: HARDWARE)
    path = profile.path_of(HARDWARE)
    path.parent.mkdir(parents=True)
    return path


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_train_py_gets_the_profile_of_this_device(here, good):
    write(here, good)
    found = calibration.defaults()
    assert all(getattr(found, name) == SETTINGS[name] for name in vars(rule.SAFE))
    assert found.calibrated.precision == "bfloat16" and found.calibrated.attention == SETTINGS["attention"]
    assert (found.calibrated.product_rate, found.calibrated.square) == (6e13, 8192)
    assert found.calibrated.profile == profile.tag(good) and profile.tag(good) in found.notes[0]


def test_without_a_profile_defaults_are_safe_and_say_so(here):
    found = calibration.defaults()
    assert {name: getattr(found, name) for name in vars(rule.SAFE)} == vars(rule.SAFE) and found.calibrated is None
    assert "calibration has not run" in found.notes[0] and "python -m calibration" in found.notes[0]


def test_another_profile_may_be_named(here, good, tmp_path, monkeypatch):
    write(here, good)
    good["settings"]["depth"] = 7
    monkeypatch.setenv("AUTORESEARCH_PROFILE", str(write(tmp_path / "trial.json", good)))
    assert calibration.defaults().depth == 7


def test_a_named_profile_that_is_not_there(here, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "/nowhere.json")
    with pytest.raises(profile.ProfileError, match="no profile /nowhere.json; unset .*PROFILE and run"):
        calibration.defaults()


def test_a_file_that_is_shown_and_is_no_profile(tmp_path, capsys):
    """It may be anything of the user's: nobody is told to delete it."""
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    for path in tmp_path / "notes.md", tmp_path / "deep.json", tmp_path:
        with pytest.raises(profile.ProfileError) as caught:
            calibration_command.main(["show", str(path)])
        assert "delete" not in str(caught.value) and "calibration wrote" in str(caught.value)


def test_a_profile_that_is_not_complete_is_not_shown(here, good, tmp_path):
    del good["bandwidth"]
    (tmp_path / "one.json").write_text(json.dumps(good))
    with pytest.raises(profile.ProfileError, match="is not complete .*bandwidth"):
        calibration_command.main(["show", str(tmp_path / "one.json")])


def test_a_profile_cut_short(here, good):
    write(here, json.dumps(good)[:200])
    with pytest.raises(profile.ProfileError, match="can't be read .*delete it and run: python -m calibration"):
        calibration.defaults()
    assert here.exists()  # nothing is deleted for the user


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 99}', "null"])
def test_a_file_that_is_no_profile(here, content):
    write(here, content)
    with pytest.raises(profile.ProfileError, match="is not a profile of format 1; delete it and run"):
        calibration.defaults()


def test_a_profile_of_another_device(here, good):
    good["device"] = "nvidia-h200-141gb"
    write(here, good)
    with pytest.raises(
        profile.ProfileError, match="was measured on nvidia-h200-141gb with sdpa, and this is nvidia-rtx-3090"
    ):
        calibration.defaults()


def change(where, value):
    def changed(content):
        *path, last = where.split(".")
        for name in path:
            content = content[int(name) if name.isdigit() else name]
        if value is KeyError:
            del content[last]
        else:
            content[last] = value

    return changed


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (change("settings.depth", 0), "positive whole numbers"),
        (change("settings.depth", 2.5), "positive whole numbers"),
        (change("settings.depth", True), "positive whole numbers"),
        (change("products.rates.bfloat16", {}), "no rate of matrix products"),
        (change("settings.attention.window", 3), "attention .*3"),
        (change("trials.0.depth", "5"), "trials|TypeError"),
        (change("trials.0.flops_per_token", float("nan")), "a trial at depth 5"),
        (change("settings.device_batch_size", 7), "not a multiple of 7 rows"),
        (change("settings.total_batch_size", 1000), "not a multiple"),
        (change("settings.window_pattern", "SSX"), "window_pattern is 'SSX'"),
        (change("settings.precision", "float8"), "precision is 'float8'"),
        (change("settings.precision", "float16"), "no rate of matrix products in float16"),
        (change("settings.attention", {"full": "flex"}), "attention"),
        (change("settings.attention", None), "attention|NoneType"),
        (change("settings.colour", "red"), "colour"),
        (change("settings", KeyError), "settings"),
        (change("products.rates.bfloat16", spread(-1.0)), "products.rates.bfloat16 is"),
        (change("products.rates.bfloat16.median", float("nan")), "products.rates.bfloat16 is"),
        (change("bandwidth.median", 1e99), "bandwidth is"),
        (change("trials.0.tokens_per_second.low", 0), "trials.0.tokens_per_second is"),
        (change("trials.0.spare", 1), "spare"),
        (change("products.square", 0), "no rate of matrix products"),
        (change("device", ""), "device is ''"),
        (change("probe", {"probe": 0.003, "clock_rate": 0}), "its probe is"),
        (change("probe", {"probe": 0.003}), "clock_rate"),
        (change("versions", KeyError), "versions"),
        (change("train", None), "train is None"),
        (change("settings.attention.window", "varlen"), "attention varlen is chosen, and was wrong"),
        (change("settings.attention.window", "unheard"), "unheard"),
        (change("trials.0.flops_per_token", 0), "a trial at depth 5"),
        (change("trials", KeyError), "trials"),
    ],
)
def test_impossible_values(here, good, damage, complaint):
    damage(good)
    write(here, good)
    with pytest.raises(profile.ProfileError, match=f"can't be right: .*({complaint})"):
        calibration.defaults()


def test_another_version_of_the_framework_makes_it_stale_by_name(here, good):
    good["versions"] = {**good["versions"], "torch": "2.11.0"}
    write(here, good)
    found = calibration.defaults()
    assert found.depth == 5 and found.calibrated is None  # its sizes still help; what it tried is tried anew
    assert f"{here} is stale: made with torch 2.11.0, here is 2.13.0" in found.notes[0]


def test_another_python_does_not_make_it_stale(good):
    good["versions"] = {**good["versions"], "python": "3.12.1"}
    assert profile.stale(good, HARDWARE) == []


def test_another_baseline_makes_it_stale_and_an_experiments_edits_do_not(here, good, tmp_path):
    assert profile.stale(good, HARDWARE, profile.baseline()) == []
    edited = tmp_path / "train.py"
    edited.write_text(profile.TRAIN.read_text() + "\n# an edit\n")
    reasons = profile.stale(good, HARDWARE, profile.baseline(edited))
    assert len(reasons) == 1 and "made for another train.py" in reasons[0]
    write(here, good)  # a run takes no notice of what train.py has become
    assert calibration.defaults().calibrated is not None


def test_the_tag_is_of_the_content(good):
    assert profile.tag(good) == profile.tag(json.loads(json.dumps(good)))
    assert profile.tag(good) != profile.tag({**good, "seconds": 301.0})


@pytest.mark.parametrize(
    "path", sorted((profile.TRAIN.parent / "calibration" / "profiles").glob("*.json")), ids=lambda path: path.stem
)
def test_reference_profiles_are_sound(path):
    found = profile.read(path)
    assert path.stem == f"{found['device']}-{found['backend']}"
    settings, _ = rule.scale(profile.trials(found), found["attention"], found["settings"]["attention"])
    assert settings == profile.settings(found)  # what today's rule makes of those measurements
