"""Flash Attention 3 that is on this machine: a library file, its own package, PyTorch's wrapping of that."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.attention

from backends import trials
from backends.cuda import flash3
from backends.interface import BackendError

VARIABLE = "AUTORESEARCH_FA3_LIBRARY"


def of_library(path: Path) -> str:
    """What a profile calls the library. Raises BackendError where there is none."""
    path = path.expanduser().absolute()
    try:
        facts = path.stat()
        # It has hundreds of MB: read once.
        digest = trials.remember(f"{path} {facts.st_size} {facts.st_mtime_ns}: sha256", lambda: sha256(path))
    except OSError as error:
        raise BackendError(
            f"{VARIABLE}={path} can't be read ({error.strerror}): name a Flash Attention 3 library, or unset it"
        ) from error
    return f"library sha256:{digest[:12]}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def from_library(path: Path) -> flash3.Kernels:
    """Raises BackendError that says what is missing: somebody asked for it."""
    path = path.expanduser().absolute()
    if registered() and os.path.realpath(path) not in torch.ops.loaded_libraries:
        raise BackendError(
            f"{VARIABLE}={path} can't be loaded, as another Flash Attention 3 is loaded in the same process. Unset "
            "the variable to use that one"
        )
    try:
        for runtime in sorted(path.parent.glob("libcudart.so*")):  # of another CUDA than PyTorch's, put beside it
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BackendError(f"{VARIABLE}={path} can't be loaded: {unloadable(error)}, or unset it") from error
    if not registered():
        raise BackendError(
            f"{VARIABLE}={path} does not register torch.ops.flash_attn_3.fwd and .bwd: name a Flash "
            "Attention 3 library, or unset it"
        )
    return flash3.from_ops(torch.ops.flash_attn_3)


def registered() -> bool:
    return flash3.is_flash3(torch.ops.flash_attn_3)


def unloadable(error: OSError) -> str:
    """Why a library can't be loaded, and what to do."""
    said = str(error.__cause__ or error)
    missing = re.search(r"(lib[\w+-]+\.so)(?:\.(\d+))?[\d.]*: cannot open shared object file", said)
    if missing and missing[1].startswith(("libcuda", "libcublas", "libnvrtc")) and missing[2]:
        name = f"{missing[1]}.{missing[2]}"
        return (
            f"{name} is not here. It was built for CUDA {missing[2]}, and PyTorch {torch.__version__} has "
            f"{torch.version.cuda or 'none'}. Use a build for that version, put {name} beside it"
        )
    if missing:
        return f"{missing[1]} is not here. Install the package that has it, put its folder on LD_LIBRARY_PATH"
    if "undefined symbol" in said:
        return f"it was built for another PyTorch than {torch.__version__} ({said[-160:]}). Use a build for this one"
    return f"{said[:200]}. Use another build"


def of_interface() -> str:
    try:
        return f"flash_attn_interface {importlib.metadata.version('flash_attn_3')}"
    except importlib.metadata.PackageNotFoundError:
        return "flash_attn_interface"


def from_interface() -> flash3.Kernels:
    if registered() and "flash_attn_interface" not in sys.modules:  # to register it twice would end the process
        raise flash3.Unavailable("another Flash Attention 3 is loaded")
    return flash3.from_module(importlib.import_module("flash_attn_interface"))


def from_pytorch() -> flash3.Kernels:
    """PyTorch's wrapping of `flash_attn_interface`. As long as it is active, it stands behind PyTorch's own flash
    attention, too."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise flash3.Unavailable("too old to have it")
    if registered() and "flash_attn_interface" not in sys.modules:  # which it imports
        raise flash3.Unavailable("another Flash Attention 3 is loaded")
    torch.nn.attention.activate_flash_attention_impl("FA3")
    aten = torch.ops.aten

    def forward(q, k, v, scale, window):
        return aten._flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=window,
            window_size_right=0,
        )[:2]

    def backward(dout, q, k, v, out, lse, scale, window):
        unused = q.new_empty(0)  # the state of a dropout that there is none of
        return aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            True,
            unused,
            unused,
            scale=scale,
            window_size_left=window,
            window_size_right=0,
        )

    return flash3.Kernels(forward, backward)


def deactivate() -> None:
    """Undoes what `from_pytorch` did, where this PyTorch can (2.13 does)."""
    current, restore = (
        getattr(torch.nn.attention, f"{name}_flash_attention_impl", None) for name in ("current", "restore")
    )
    if current and restore and current() == "FA3":
        restore()
