"""Opens backends, and moves arrays between numpy and a backend, through the contract alone."""

from __future__ import annotations

import shutil
import sys
import tempfile

import numpy as np
import pytest

import backends
from backends import bench
from backends.interface import Backend, BackendError
from tests.backends import tiny

TOKENS = np.zeros((1, 1), np.int32)  # for a trainer whose loss looks at parameters only

HOME = tempfile.TemporaryDirectory(prefix="autoresearch-")  # for a session of tests: it tries each precision once
_opened: dict[str, tuple[tuple, Backend]] = {}  # the last of each name: opening another may change a whole process


def opened(name: str, precision: str, compiled: bool = False) -> Backend:
    """The backend as asked for, valid until it is opened otherwise. Skips the test, saying why, if it can't run."""
    asked = precision, compiled
    if name not in _opened or _opened[name][0] != asked:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTORESEARCH_HOME", HOME.name)
            patch.setattr(bench.Bench, "attention_shape", (256, 1, 64))  # which one wins is no matter here
            try:
                _opened[name] = asked, backends.load(name, precision, compiled)
            except BackendError as error:
                pytest.skip(str(error))
    return _opened[name][1]


def needs_compiler() -> None:
    """Skips a test that compiles, where there is nothing to compile with."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        pytest.skip("needs a C++ compiler")
    if " " in sys.prefix:
        pytest.skip("PyTorch's compiler passes its own path to the linker unquoted: no blank in it, please")


def torch_before(*version: int) -> bool:
    """Whether PyTorch is older."""
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < version


def holder(backend, **values):
    """A module with one parameter for each value."""

    class Holder(backend.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in values.items():
                setattr(self, name, backend.nn.Parameter(np.shape(value)))

    module = Holder()
    backend.set_weights(module, {name: np.asarray(value, np.float32) for name, value in values.items()})
    return module


def array(backend, value):
    """A numpy array on the backend: floats in the compute precision, integers in the backend's own, booleans."""
    value, ops = np.asarray(value), backend.ops
    x = ops.stop_gradient(holder(backend, value=value).value)
    if value.dtype == bool:
        return ops.greater(x, 0)
    return x if value.dtype.kind == "f" else ops.astype(ops.float32(x), ops.arange(1).dtype)


def numpy(backend, x) -> np.ndarray:
    """A backend's array on the host; half precision as float32, which holds it exactly."""
    x = backend.ops.stop_gradient(x)
    x = backend.ops.float32(x) if kind(x) in ("bfloat16", "float16") else x
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def kind(x) -> str:
    """An array's data type without its framework: "float32", "bool", "int64", ..."""
    return str(x.dtype).rpartition(".")[2]


def gradients(backend, function, **values) -> tuple[float, dict[str, np.ndarray]]:
    """function(**arrays), a scalar, and its gradients at these values, through a Trainer."""
    module = holder(backend, **values)
    trainer = backend.Trainer(
        module, lambda m, x, y: function(**{name: getattr(m, name) for name in values}), [tiny.descent(values)]
    )
    loss = trainer.backward(TOKENS, TOKENS)
    return float(loss), trainer.gradients()
