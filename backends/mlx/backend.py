"""The MLX backend: the contract's parts put together, and what the evaluator and the loop ask of it."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from backends import interface, trials
from backends.mlx import attention, nn, ops
from backends.mlx.device import is_out_of_memory, open_device, working_set
from backends.mlx.trainer import Trainer, compiling_pays


class MlxBackend(interface.Backend):
    """See `backends/interface.py`."""

    name = "mlx"

    def __init__(self, precision: str | None = None, compiled: bool | None = None):
        device = open_device(precision)
        dtype = getattr(mx, device.precision)
        compiled = compiling_pays() if compiled is None else compiled
        by_kind, notes = _attention(device, dtype)
        self.device = dataclasses.replace(device, notes=(*device.notes, *notes))
        self.nn = nn.namespace(dtype)
        self.ops = ops.namespace(dtype, by_kind, device.memory)
        self.Trainer = type("Trainer", (Trainer,), {"compiled": compiled, "working_set": working_set(device.kind)})
        attention.forget()  # the trial's masks
        mx.clear_cache()
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
        return is_out_of_memory(error)


def _attention(device: interface.Device, dtype: mx.Dtype) -> tuple[dict[str, str], list[str]]:
    """The implementation to use for each kind of window, and a note on each, by a trial that is made once."""
    key = f"{device.slug} mlx {mx.__version__} {device.kind} {device.precision}: attention"
    # On its CPU MLX takes seconds for a row of 2048 tokens: there a shorter one has to do.
    shape = {"shape": (1024, 1, 64)} if device.kind == "cpu" else {}
    tried = trials.remember(
        key, lambda: attention.trial(dtype, device.memory, compiling_pays(), **shape),
        lasting=lambda tried: not any(is_out_of_memory(RuntimeError(found)) for by_name in tried.values()
                                      for found in by_name.values() if isinstance(found, str)))
    chosen = attention.choose(tried, device.memory)

    def tell(found) -> str:
        return found if isinstance(found, str) else f"{found[0]:.1f} ms, {found[1] / 2**20:.0f} MiB a row"

    return chosen, [f"attention ({kind} window): {chosen[kind]}, of " + ", ".join(
        f"{name} {tell(found)}" for name, found in by_name.items()) for kind, by_name in tried.items()]


def _row_losses(logits: mx.array, targets: mx.array) -> np.ndarray:
    """Nats of targets (T,) under logits (T, V); a row at a time, because in float32 a batch's logits are large."""
    logits = logits.astype(mx.float32)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - right)
