"""Picks the backend for this machine. What a backend is: `interface.py`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from backends import trials
from backends.interface import Backend, BackendError, Calibrated, Hardware

# A CPU's threads that wait for one another sleep; by default they spin, and a program beside them takes nine tenths of
# the speed instead of its share. OpenMP looks at this once, when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What may be asked for; `best` says what is taken unasked.
NAMES = ("mlx", "cuda", "sdpa")


def load(
    name: str | None = None,
    precision: str | None = None,
    compiled: bool | None = None,
    calibrated: Calibrated | None = None,
    fetch: bool = False,
) -> Backend:
    """The backend `name`, else the one `AUTORESEARCH_BACKEND` names, else the best that works here.

    Args:
        precision: "float32", "bfloat16" or "float16" to compute in, instead of the one found by trial.
        compiled: whether to compile the step; by default wherever the framework's compiler works.
        calibrated: what calibration found; without it, precision and attention are found by trial, once.
        fetch: get kernels from the network that a backend knows of; without it, only what is here already is used.

    Raises:
        BackendError: it can't run here; the message says why and what to do.
    """
    keep_bytecode("torch")
    return _module(name).open_backend(precision, compiled, calibrated, fetch)


def identify(name: str | None = None) -> Hardware:
    """What `load` would run on: device, memory and versions. Measures nothing. Raises BackendError as `load` does."""
    return _module(name).identify()


def _module(name: str | None):
    name = name or os.environ.get("AUTORESEARCH_BACKEND") or best()
    if name not in NAMES:
        raise BackendError(
            f"unknown backend {name!r}: choose one of {', '.join(NAMES)} (AUTORESEARCH_BACKEND), "
            "or set none to take the best that works here"
        )
    return importlib.import_module(f"backends.{name}")


def best() -> str:
    """MLX on Apple Silicon, where it is the faster one; PyTorch elsewhere, on Hopper with what only that can do."""
    if platform.system() == "Darwin" and platform.machine() == "arm64" and importlib.util.find_spec("mlx"):
        return "mlx"
    return "cuda" if importlib.import_module("backends.cuda").is_here() else "sdpa"


def keep_bytecode(package: str) -> None:
    """Has Python keep the bytecode of what is imported from now on under AUTORESEARCH_HOME, if it keeps none beside the
    sources of this package, as in a container whose packages are read-only: PyTorch's 2,000 modules took 7 s of each
    start on such a machine. For each CUDA_VISIBLE_DEVICES apart, so that experiments on two GPUs share no file."""
    found = importlib.util.find_spec(package)
    if not found or not found.cached or Path(found.cached).exists():
        return
    if sys.dont_write_bytecode or not os.access(Path(found.cached).parents[1], os.W_OK):
        gpus = re.sub("[^A-Za-z0-9]+", "-", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        sys.pycache_prefix = str(trials.cache() / f"bytecode{gpus and f'-{gpus}'}")
        sys.dont_write_bytecode = False
