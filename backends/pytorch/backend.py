"""The contract of `backends/interface.py` on PyTorch, for any device that PyTorch has."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch

from backends import bench as benches
from backends import interface, machine, trials
from backends.interface import BackendError
from backends.pytorch import device as devices
from backends.pytorch import nn, runtime
from backends.pytorch.bench import Bench
from backends.pytorch.kernels import trial as kernels
from backends.pytorch.ops import ops
from backends.pytorch.trainer import Trainer, to_device


class PyTorchBackend(interface.Backend):
    nn, ops, Trainer = nn, ops, Trainer

    def __init__(self, device: interface.Device, bench: Bench):
        self.name, self.device, self.bench = device.backend, device, bench

    @torch.no_grad()
    def logits(self, model, tokens):
        interface.check_head(model, nn.Module)
        rows = [model.logits(hidden).float().cpu().numpy() for hidden in model.hidden(to_device(tokens))]
        return np.stack(rows)

    @torch.no_grad()
    def losses(self, model, tokens, targets):
        interface.check_head(model, nn.Module)
        hidden, labels = model.hidden(to_device(tokens)), to_device(targets).long()
        # Of one row at most: in float32 a batch's logits are large. On a CPU of as many tokens as stay near the cache.
        size = max(1, runtime.logits_at_once // model.logits(hidden[0, :1]).shape[-1])
        chunks = [
            torch.nn.functional.cross_entropy(model.logits(some).float(), wanted, reduction="none")
            for row, of_row in zip(hidden, labels)
            for some, wanted in zip(row.split(size), of_row.split(size))
        ]
        return torch.cat(chunks).reshape(labels.shape).cpu().numpy()

    def weights(self, model):
        return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}

    def shapes(self, model):
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    @torch.no_grad()
    def set_weights(self, model, weights):
        interface.check_weights(self.shapes(model), weights)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name], np.float32, order="C")))

    def compilations(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if runtime.compiled else 0

    def synchronize(self):
        devices.synchronize(runtime.device)

    def clock_rate(self):
        return devices.clock_rate(runtime.device)

    def read_later(self, scalar):
        return devices.Copy(scalar) if runtime.device.type == "cuda" else scalar

    def peak_memory(self):
        return max(runtime.recorded_memory, devices.peak_memory(runtime.device))

    def free_memory(self):
        return devices.free_memory(runtime.device)


def identify(name: str) -> interface.Hardware:
    device = devices.pick()
    return interface.Hardware(name, *_named(device), devices.versions(device))


def open_backend(
    name: str,
    precision: str | None,
    compiled: bool | None,
    calibrated: interface.Calibrated | None,
    further: Callable | None = None,
) -> PyTorchBackend:
    """Finds the device, takes what calibration found out about it, tries the rest (or remembers it), and sets `runtime`
    for this process.

    Args:
        further: called with bench, precision and calibrated, puts attention that PyTorch has not into
            `runtime.added_attention`, and returns its provider's name or None, and notes.
    """
    runtime.device = devices.pick()
    if runtime.device.index is not None and runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)  # where kernels are launched, and memory is counted, unasked
    devices.keep_to_itself(runtime.device)
    if runtime.device.type == "cpu":
        devices.keep_freed_memory()
        if (quota := machine.quota()) < torch.get_num_threads():  # more threads would wait for one another
            torch.set_num_threads(max(1, int(quota)))
    title, slug, kind, memory = _named(runtime.device)
    versions, bench = devices.versions(runtime.device), Bench(runtime.device, memory)
    key = " ".join([slug, str(runtime.device), *(f"{k} {v}" for k, v in versions.items())])
    if calibrated and precision not in (None, calibrated.precision):
        calibrated = None  # of use only as a whole
    precision, peak, notes = _choose_precision(bench, key, precision, calibrated)
    compiler = _choose_compiler(key, compiled)
    key += f" {precision} {'compiled' if runtime.compiled else 'eager'}"
    notes += _choose_attention(bench, key, precision, calibrated, further)
    # On a GPU large products fill the chip; with its gradient and a copy a chunk takes a 32nd of the memory at most. On
    # a CPU it should stay near the cache.
    runtime.logits_at_once = 2**21 if kind == "cpu" else 2 ** int(math.log2(memory / 32 / 12))
    bench.forget()  # another process may need the memory
    chosen, note = _choose_kernels(key, calibrated)
    notes += [note, compiler, *devices.notes(runtime.device)]
    runtime.compiler = devices.load_compiler(runtime.device) if runtime.compiled else None
    speed = calibrated and benches.speed(bench, calibrated)
    bench.forget()
    device = interface.Device(
        name,
        title,
        slug,
        kind,
        memory,
        versions,
        precision,
        peak,
        runtime.compiled,
        calibrated and calibrated.profile,
        speed,
        tuple(notes),
        bench.attention_provider if "fa3" in runtime.attention.values() else None,
        chosen,
    )
    return PyTorchBackend(device, bench)


def _choose_precision(bench, key, precision, calibrated) -> tuple[str, float | None, list[str]]:
    """What to compute in, the rate of products in it, and notes."""
    if calibrated:
        runtime.dtype = devices.PRECISIONS[calibrated.precision]
        return calibrated.precision, calibrated.product_rate, []
    tried = trials.remember(f"{key}: products", lambda: benches.try_precisions(bench), benches.lasts)
    try:
        precision, rates = precision or benches.choose_precision(tried), benches.products(tried)
    except BackendError as error:
        raise BackendError(f"{error}. {devices.OTHER_BUILD}") from None
    runtime.dtype = devices.PRECISIONS[precision]
    peak = None if isinstance(rates[precision], str) else rates[precision]
    return precision, peak, [f"precision {precision}: " + ", ".join(f"{k} {benches.rate(v)}" for k, v in rates.items())]


def _choose_compiler(key, compiled) -> str:
    """Whether to compile; returns a note."""
    if compiled is None and os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        compiled = "is turned off by TORCH_COMPILE_DISABLE"
    elif compiled is None:
        compiled = trials.remember(
            f"{key}: compiler", lambda: devices.compiler_works(runtime.device), lambda result: result is True
        )
    runtime.compiled = compiled is True
    runtime.captured = runtime.compiled and runtime.device.type == "cuda"
    if runtime.compiled:
        devices.configure_compiler()
        return "compiled"
    return f"eager: torch.compile {compiled or 'was not asked for'}"


def _choose_attention(bench, key, precision, calibrated, further) -> list[str]:
    """Which implementation for which window; returns notes."""
    runtime.added_attention = {}
    bench.attention_provider, notes = further(bench, precision, calibrated) if further else (None, [])
    bench.attentions = (*runtime.added_attention, *bench.attentions)
    if calibrated and set(calibrated.attention.values()) <= set(bench.attentions):
        runtime.attention = calibrated.attention
        runtime.uncompiled_attention = {
            kind: "sdpa_mask" if found == "flex" else found for kind, found in calibrated.attention.items()
        }
        if not runtime.compiled:
            runtime.attention = runtime.uncompiled_attention
    else:
        key += f" {bench.attention_provider}" if bench.attention_provider else ""
        tried = trials.remember(
            f"{key}: attention seconds",
            lambda: benches.try_attention(bench, precision),
            lambda tried: benches.lasts(*tried.values()),
        )
        runtime.attention = benches.choose_attention(tried, bench.memory)
        runtime.uncompiled_attention = benches.choose_attention(tried, bench.memory, compiled=False)
    return [*notes, "attention: " + ", ".join(f"{kind} {found}" for kind, found in runtime.attention.items())]


def _choose_kernels(key, calibrated) -> tuple[dict[str, int], str]:
    """Which of our own, and a note."""
    if why_none := kernels.why_none(runtime.device):
        chosen, how = {}, why_none
    elif calibrated and calibrated.kernels is not None and kernels.known(calibrated.kernels):
        chosen, how = calibrated.kernels, ", ".join(calibrated.kernels) or "none, as calibrated"
    else:
        tried = trials.remember(f"{key}: kernels {kernels.digest()}", kernels.try_apart, kernels.lasts)
        chosen, how = kernels.choose(tried), kernels.described(tried)
    kernels.load(chosen)
    return chosen, f"kernels of this project: {how}"


def _named(device: torch.device) -> tuple[str, str, str, int]:
    """(name, slug, kind, bytes of memory)"""
    title, slug, memory = devices.identify(device)
    return title, slug, device.type, memory
