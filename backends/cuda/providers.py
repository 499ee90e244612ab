"""Where Flash Attention 3 may come from. Each provider is tried in turn; the first whose numbers are right is taken:

    kernels REPOSITORY@COMMIT     the `kernels` package; calibration fetches, runs load what is on disk
    flash_attn_interface VERSION  Flash Attention 3's own package
    pytorch VERSION               what PyTorch activates itself (2.10 and later)
    library sha256:DIGEST         a file that registers torch.ops.flash_attn_3, named by AUTORESEARCH_FA3_LIBRARY; it
                                  goes first, because somebody asked for it

A profile records the name; runs with that profile load this provider or none.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from backends import bench as benches
from backends.cuda import flash3, hub, local
from backends.interface import BackendError, Calibrated
from backends.pytorch import runtime

Provider = tuple[str, Callable[[], flash3.Kernels]]  # its name, and what loads it or raises


def attention(bench, precision: str, calibrated: Calibrated | None, fetch=False) -> tuple[str | None, list[str]]:
    """Puts "fa3" beside PyTorch's own implementations, if there is a provider.

    Args:
        calibrated: what was found then is loaded, and nothing else; without it all are tried and compared with the
            reference.
        fetch: get from the network what is not here.

    Returns:
        The provider's name, or None, and notes for the log.

    Raises:
        BackendError: the library that the user named can't be loaded.
    """
    drop()
    if precision == "float32":
        return None, []
    if calibrated:
        return as_calibrated(calibrated.attention_provider)
    refused = []
    for name, load in providers(fetch):
        problem = take(name, load) or wrong(bench, precision)
        if not problem:
            others = f" (not from {'; '.join(refused)})" if refused else ""
            return name, [f"Flash Attention 3 from {short(name)}{others}"]
        drop()
        refused.append(f"{short(name)}: {problem}")
    return None, [f"without Flash Attention 3 ({'; '.join(refused)})"]


def as_calibrated(wanted: str | None) -> tuple[str | None, list[str]]:
    """The provider that a profile names, or none; it was compared with the reference then."""
    notes = []
    if os.environ.get(local.VARIABLE) and not (wanted or "").startswith("library"):
        notes = [
            f"{local.VARIABLE} is ignored, as this device was calibrated without it. To use it, run: python -m "
            "calibration"
        ]
    if wanted is None:
        return None, notes
    problem = take(wanted, functools.partial(load_named, wanted))
    if not problem:
        return wanted, notes
    drop()
    return None, [
        *notes,
        f"continuing without Flash Attention 3: this device was calibrated with {short(wanted)}, which can't be used "
        f"now ({problem}). Bring that back, or run: python -m calibration",
    ]


def providers(fetch: bool = False) -> Iterator[Provider]:
    path = os.environ.get(local.VARIABLE)
    if path:
        yield of_library(Path(path))
    yield from hub.kernels(fetch)
    yield of_interface()
    yield of_pytorch()


def of_library(path: Path) -> Provider:
    return local.of_library(path), functools.partial(local.from_library, path)


def of_interface() -> Provider:
    return local.of_interface(), local.from_interface


def of_pytorch() -> Provider:
    return f"pytorch {torch.__version__}", local.from_pytorch


def load_named(wanted: str) -> flash3.Kernels:
    kind, _, rest = wanted.partition(" ")
    if kind == "kernels":
        repository, _, commit = rest.partition("@")
        return hub.load(repository, commit)
    path = os.environ.get(local.VARIABLE)
    if kind == "library":
        if not path:
            raise flash3.Unavailable(f"{local.VARIABLE} is not set")
        name, load = of_library(Path(path))
    elif kind in ("flash_attn_interface", "pytorch"):
        name, load = of_interface() if kind == "flash_attn_interface" else of_pytorch()
    else:
        raise flash3.Unavailable("it is not here")
    if name != wanted:
        raise flash3.Unavailable(f"here is {name}")
    return load()


def take(name: str, load: Callable[[], flash3.Kernels]) -> str | None:
    """Puts a provider to use; why that is not possible, or None."""
    try:
        flash3.use(load())
    except BackendError:  # of a library that somebody asked for
        raise
    except ModuleNotFoundError as error:
        if not error.name:
            return benches.first_line(error)
        return "not installed" if name.startswith(error.name) else f"needs {error.name}"
    except flash3.Unavailable as error:
        return str(error)
    except Exception as error:  # whatever somebody else's library raises
        return benches.first_line(error)
    runtime.added_attention = {"fa3": flash3.flash3}
    return None


def wrong(bench, precision: str) -> str | None:
    """How the provider in use differs from the reference, or None."""
    windows = (share and int(share * bench.attention_shape[0]) for share in benches.KINDS.values())
    try:
        return next(filter(None, (benches.wrong_attention(bench, "fa3", w, precision) for w in windows)), None)
    except Exception as error:  # whatever its kernels raise
        return benches.reason(bench, error)


def drop() -> None:
    flash3.use(None)
    runtime.added_attention = {}
    local.deactivate()


def short(name: str) -> str:
    """The name of a provider for a note, with only the first digits of a commit."""
    return re.sub(r"(@[0-9a-f]{8})[0-9a-f]{32}$", r"\1", name)
