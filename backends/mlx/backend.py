"""The MLX backend: the contract's parts put together, and what the evaluator and the loop ask of it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from backends import interface
from backends.mlx import nn, ops
from backends.mlx.device import open_device
from backends.mlx.trainer import Trainer, compiling_pays


class MlxBackend(interface.Backend):
    """See `backends/interface.py`."""

    name = "mlx"

    def __init__(self, precision: str | None = None, compiled: bool | None = None):
        self.device = open_device(precision)
        dtype = getattr(mx, self.device.precision)
        self.nn = nn.namespace(dtype)
        self.ops = ops.namespace(dtype)
        compiled = compiling_pays() if compiled is None else compiled
        self.Trainer = type("Trainer", (Trainer,), {"compiled": compiled})
        mx.clear_cache()  # of the trial's matrices
        mx.reset_peak_memory()

    def logits(self, model, tokens: np.ndarray) -> np.ndarray:
        return np.array(model(mx.array(tokens)).astype(mx.float32))

    def losses(self, model, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        logits = model(mx.array(tokens))
        return np.stack([_row_losses(row, mx.array(wanted)) for row, wanted in zip(logits, targets)])

    def weights(self, model) -> dict[str, np.ndarray]:
        return {name: np.array(parameter.value) for name, parameter in nn.named_parameters(model).items()}

    def set_weights(self, model, weights: dict[str, np.ndarray]) -> None:
        parameters = nn.named_parameters(model)
        interface.check_weights({name: p.value.shape for name, p in parameters.items()}, weights)
        for name, parameter in parameters.items():
            parameter.value = mx.array(np.asarray(weights[name], dtype=np.float32))

    def synchronize(self) -> None:
        mx.synchronize()

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """MLX has no error class of its own; these are what its allocators and the drivers say."""
        signs = ("unable to allocate", "attempting to allocate", "out of memory", "outofmemory", "insufficient memory",
                 "memoryallocation", "bad_alloc")
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs))


def _row_losses(logits: mx.array, targets: mx.array) -> np.ndarray:
    """Nats of targets (T,) under logits (T, V); a row at a time, because in float32 a batch's logits are large."""
    logits = logits.astype(mx.float32)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - right)
