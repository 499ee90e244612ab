"""Remembers what was tried on this machine, so that a night of restarts tries it once."""

from __future__ import annotations

import json
import os
from pathlib import Path

from storage import home

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
    known = _read(path)
    if key not in known:
        result = trial()
        if not lasting(result):
            return result
        known = {**_read(path), key: result}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
        except OSError:  # a read-only home only means that the trial is repeated
            pass
    return known[key]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
