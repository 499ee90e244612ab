"""Remembers what was tried on this machine, so that a night of restarts tries it once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage import DataError, home, read_json, write_json

owner = ""  # whose trials these are, where a machine has several devices; set by the backend


def cache() -> Path:
    """Where compilers keep what they made: `AUTORESEARCH_CACHE`, as a guarded run has it, else under home."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or home() / "cache")


def remember(key: str, trial, lasting=lambda result: True):
    """The result of `trial()`, JSON values only: run once per key, then read from disk.

    A second run that picked another attention kernel because the machine was busy would compute other numbers than the
    first, so the choice is kept until the key (device, framework version, precision) changes. A result that is
    not `lasting` is not kept: a full GPU or a missing compiler may be gone in the next run.
    """
    path = home() / f"trials{owner}.json"
    known = read_json(path) or {}
    if key not in known:
        result = trial()
        if not lasting(result):
            return result
        known = {**(read_json(path) or {}), key: result}
        with suppress(DataError):  # a read-only home only means that the trial is repeated
            write_json(path, known)
    return known[key]
