"""Where home is: the default, and what is refused with words that help."""

import os
from pathlib import Path

import pytest

import storage


def test_a_home_is_the_named_folder_or_one_in_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    assert storage.home() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    monkeypatch.setenv("AUTORESEARCH_HOME", "~/research")
    assert storage.home() == tmp_path / "user" / "research"
    monkeypatch.delenv("AUTORESEARCH_HOME")
    assert storage.home() == tmp_path / "user" / ".cache" / "autoresearch"


def test_a_relative_home_is_refused_with_the_whole_path(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", "here")
    with pytest.raises(storage.DataError) as refusal:
        storage.home()
    assert f"set it to {Path.cwd() / 'here'}" in str(refusal.value)


@pytest.mark.parametrize("named", [None, "~/research"])
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, named):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where the system knows no such user
    if named:
        monkeypatch.setenv("AUTORESEARCH_HOME", named)
    else:
        monkeypatch.delenv("AUTORESEARCH_HOME")
    with pytest.raises(
        storage.DataError, match="no home folder .*; set AUTORESEARCH_HOME to a folder that you can write"
    ):
        storage.home()


def test_a_read_only_home_is_told_what_to_set(isolated_home, monkeypatch):
    def read_only(path, *arguments, **named):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(
        storage.DataError, match="Read-only .*; set AUTORESEARCH_HOME to a folder that you can write to"
    ):
        storage.write_json(isolated_home / "profiles" / "x.json", {})
