"""The contract of `backends/interface.py` on PyTorch, for any device that PyTorch has."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import psutil
import torch

from backends import interface, trials
from backends.pytorch import attention, nn, ops, runtime
from backends.pytorch import device as devices
from backends.pytorch.trainer import Trainer, to_device


class PyTorchBackend(interface.Backend):
    nn, ops, Trainer = nn, ops, Trainer

    def __init__(self, name: str, device: interface.Device):
        self.name, self.device = name, device

    @torch.no_grad()
    def logits(self, model, tokens):
        return model(to_device(tokens)).float().cpu().numpy()

    @torch.no_grad()
    def losses(self, model, tokens, targets):
        # Row by row in float32: the model's own logits are there once, in its precision, and no second time.
        rows = [torch.nn.functional.cross_entropy(logits.float(), row.long(), reduction="none")
                for logits, row in zip(model(to_device(tokens)), to_device(targets))]
        return torch.stack(rows).cpu().numpy()

    def weights(self, model):
        return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}

    @torch.no_grad()
    def set_weights(self, model, weights):
        parameters = dict(model.named_parameters())
        interface.check_weights({name: tuple(p.shape) for name, p in parameters.items()}, weights)
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name], np.float32, order="C")))

    def synchronize(self):
        devices.synchronize(runtime.device)

    def peak_memory(self):
        if runtime.device.type == "cuda":
            return torch.cuda.max_memory_allocated(runtime.device)
        if runtime.device.type == "mps":
            return torch.mps.driver_allocated_memory()  # Metal keeps no peak; the allocator gives little back
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def is_out_of_memory(self, error):
        return runtime.is_out_of_memory(error)


def open_backend(name: str, precision: str | None = None, compiled: bool | None = None) -> PyTorchBackend:
    """Finds the device, tries what it can do (or remembers it), and sets `runtime` for this process."""
    runtime.device = devices.pick()
    title, slug, memory = devices.identify(runtime.device)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if runtime.device.type == "cuda":
        versions["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    key = " ".join([slug, str(runtime.device), *(f"{k} {v}" for k, v in versions.items())])

    rates = trials.remember(f"{key}: precision", lambda: devices.measure_precisions(runtime.device),
                            _no_shortage)
    precision = precision or devices.choose_precision(rates)
    runtime.dtype = devices.PRECISIONS[precision]

    if compiled is None and os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        compiled = "is turned off by TORCH_COMPILE_DISABLE"
    elif compiled is None:
        compiled = trials.remember(f"{key}: compiler", lambda: devices.compiler_works(runtime.device),
                                   lambda result: result is True)
    runtime.compiled = compiled is True
    if runtime.compiled:  # the optimizer's one step function is compiled once per rule and shape
        torch._dynamo.config.cache_size_limit = 256

    tried = trials.remember(f"{key} {precision} {'compiled' if runtime.compiled else 'eager'}: attention",
                            lambda: attention.trial(lambda: devices.synchronize(runtime.device), memory), _no_shortage)
    runtime.attention, runtime.uncompiled_attention = attention.choose(tried), attention.choose(tried, compiled=False)

    # On a GPU large products fill the chip; with its gradient and a copy a chunk takes a 32nd of the memory at most. On
    # a CPU it should stay near the cache.
    runtime.logits_at_once = 2**21 if runtime.device.type == "cpu" else 2 ** int(math.log2(memory / 32 / 12))
    if runtime.device.type == "cuda":  # the trials' memory is not the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    rate = rates[precision] if not isinstance(rates[precision], str) else None
    notes = (f"precision {precision}: " + ", ".join(f"{k} {_rate(v)}" for k, v in rates.items()),
             "attention " + ", ".join(f"{kind} {name} ({tried[kind][name]:.1f} ms)"
                                      for kind, name in runtime.attention.items()),
             "compiled" if runtime.compiled else f"eager: torch.compile {compiled or 'was not asked for'}")
    return PyTorchBackend(name, interface.Device(title, slug, runtime.device.type, memory, precision, rate, versions,
                                                 notes))


def _no_shortage(results: dict) -> bool:
    """Whether a trial found what will hold: not that something else had filled the memory."""
    return "OutOfMemory" not in str(results)


def _rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value / 1e12:.3g} TFLOP/s"
