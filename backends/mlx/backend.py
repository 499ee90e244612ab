"""The MLX backend: the contract's parts put together, and what the evaluator and the loop ask of it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from backends import bench as benches
from backends import interface, trials
from backends.interface import BackendError
from backends.mlx import device as devices
from backends.mlx import nn, ops
from backends.mlx.bench import Bench
from backends.mlx.compiled import Compiled
from backends.mlx.trainer import Trainer, compiling_pays


class MlxBackend(interface.Backend):
    """See `backends/interface.py`."""

    name = "mlx"

    def __init__(self, precision: str | None, compiled: bool | None, calibrated: interface.Calibrated | None):
        if precision not in (None, *benches.PRECISIONS):
            raise BackendError(f"unknown precision {precision!r}: choose one of {', '.join(benches.PRECISIONS)}")
        hardware = devices.identify()
        compiled = compiling_pays() if compiled is None else compiled
        key, notes = f"{hardware.slug} mlx {mx.__version__} {hardware.kind}", devices.warnings(hardware.kind)
        if calibrated and precision not in (None, calibrated.precision):
            calibrated = None  # of use only as a whole
        if calibrated:
            precision, peak, by_kind = calibrated.precision, calibrated.product_rate, calibrated.attention
        else:
            tried = trials.remember(
                f"{key}: products", lambda: benches.try_precisions(Bench(hardware.memory)), benches.lasts
            )
            rates, asked = benches.products(tried), precision is not None
            precision = precision or benches.choose_precision(tried)
            if isinstance(peak := rates[precision], str):
                raise BackendError(f"MLX can't compute in {precision} on this device: {peak}")
            notes += [
                ", ".join(f"{name} {benches.rate(found)}" for name, found in rates.items()),
                f"precision {precision}, {'asked for' if asked else 'by trial'}",
            ]
        self.bench = Bench(hardware.memory, getattr(mx, precision), compiled)
        if not calibrated:
            tried = trials.remember(
                f"{key} {precision}: attention seconds",
                lambda: benches.try_attention(self.bench, precision),
                lambda tried: benches.lasts(*tried.values()),
            )
            by_kind = benches.choose_attention(tried, hardware.memory)
        notes.append("attention: " + ", ".join(f"{kind} {found}" for kind, found in by_kind.items()))
        speed = calibrated and benches.speed(self.bench, calibrated)
        self.device = interface.Device(
            **vars(hardware),
            precision=precision,
            peak_flops=peak,
            compiled=compiled,
            speed=speed,
            profile=calibrated and calibrated.profile,
            notes=tuple(notes),
        )
        self.nn = nn.namespace(self.bench.dtype)
        self.ops = ops.namespace(self.bench.dtype, by_kind, hardware.memory)
        self.Trainer = type(
            "Trainer", (Trainer,), {"compiled": compiled, "working_set": devices.working_set(hardware.kind)}
        )
        self.bench.forget()

    def logits(self, model, tokens: np.ndarray) -> np.ndarray:
        interface.check_head(model, nn.Module)
        rows = [np.array(model.logits(hidden).astype(mx.float32)) for hidden in model.hidden(mx.array(tokens))]
        return np.stack(rows)

    def losses(self, model, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        interface.check_head(model, nn.Module)
        hidden = model.hidden(mx.array(tokens))
        return np.stack([_row_losses(model.logits(row), mx.array(wanted)) for row, wanted in zip(hidden, targets)])

    def weights(self, model) -> dict[str, np.ndarray]:
        return {name: np.array(parameter.value) for name, parameter in nn.named_parameters(model).items()}

    def shapes(self, model) -> dict[str, tuple[int, ...]]:
        return {name: parameter.value.shape for name, parameter in nn.named_parameters(model).items()}

    def set_weights(self, model, weights: dict[str, np.ndarray]) -> None:
        interface.check_weights(self.shapes(model), weights)
        for name, parameter in nn.named_parameters(model).items():
            parameter.value = mx.array(np.asarray(weights[name], dtype=np.float32))

    def compilations(self) -> int:
        return Compiled.made

    def synchronize(self) -> None:
        mx.synchronize()

    def read_later(self, scalar):
        mx.async_eval(scalar)  # behind this step; else it would begin, when it is read, behind the next one
        return scalar

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def free_memory(self) -> int:
        return devices.free_memory(self.device.kind)


def _row_losses(logits: mx.array, targets: mx.array) -> np.ndarray:
    """Nats of targets (T,) under logits (T, V); a row at a time, because in float32 a batch's logits are large."""
    logits = logits.astype(mx.float32)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - right)
