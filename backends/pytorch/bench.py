"""The work that PyTorch's devices are measured with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backends import bench
from backends.pytorch import attention, runtime
from backends.pytorch import device as devices


class Bench(bench.Bench):
    """See `backends/bench.py`. Attention is in the precision of `runtime`, and compiled as that says."""

    is_out_of_memory = staticmethod(runtime.is_out_of_memory)

    def __init__(self, device: torch.device, memory: int):
        self.device, self.memory = device, memory
        self.size = 512 if device.type == "cpu" else 4096
        self.attentions = tuple(attention.IMPLEMENTATIONS)
        self._known = {}  # inputs and references by what they are of: made once

    def product_error(self, precision):
        a, b = self._normal(self.size, self.size), self._normal(self.size, self.size, seed=1)
        wanted = a[:64] @ b
        a, b = (x.to(self.device, devices.PRECISIONS[precision]) for x in (a, b))
        return float(((a @ b)[:64].float().cpu() - wanted).norm() / wanted.norm())

    def product(self, precision, m, k, n):
        a, b = (self._on_device(precision, *shape) for shape in ((m, k), (k, n)))
        return self._repeated(lambda: a @ b)

    def mlp(self, precision, n):
        x, w = self._on_device(precision, n, n), self._on_device(precision, n, n)
        w *= n**-0.5
        return self._repeated(lambda: F.rms_norm(F.relu(x @ w).square(), (n,)) @ w)

    def copy(self, size):
        x, y = (torch.zeros(size // 4, device=self.device) for _ in range(2))
        return self._repeated(lambda: y.copy_(x))

    def attention_error(self, name, window):
        inputs = self._inputs(1)
        wanted = self._once(("reference", window), lambda: _with_gradients(attention.reference, inputs, window))
        return worst_error(_with_gradients(self._ready(name, window), inputs, window), wanted)

    def attention(self, name, window, rows, backward):
        function, inputs = self._ready(name, window), self._inputs(rows)
        if backward:
            return self._repeated(lambda: _with_gradients(function, inputs, window))
        return self._repeated(torch.no_grad()(lambda: function(*inputs[:3], window)))

    def forget(self):
        self._known = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            devices.forget_peak_memory(self.device)
        elif self.device.type == "mps":
            torch.mps.empty_cache()
        else:
            devices.give_back_freed_memory()

    def _repeated(self, call) -> bench.Work:
        def work(calls):
            for _ in range(calls):
                call()
            devices.synchronize(self.device)

        return work

    def _ready(self, name, window):
        function = attention.implementation(name)
        function(*self._inputs(1)[:3], window)  # makes masks outside the graph
        return self._once((name, window), lambda: runtime.maybe_compile(function)) if name == "flex" else function

    def _inputs(self, rows):
        """q, k, v and the gradient of the output, each (rows, T, H, D)."""

        def draw():
            row = [
                self._normal(1, *self.attention_shape, seed=seed).to(self.device, runtime.dtype) for seed in range(4)
            ]
            return [x.repeat(rows, 1, 1, 1) for x in row]

        return self._once((rows, runtime.dtype), draw)

    def _once(self, key, make):
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _on_device(self, precision, *shape):
        return torch.randn(shape, device=self.device).to(devices.PRECISIONS[precision])

    def _normal(self, *shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def worst_error(found, wanted) -> float:
    """The largest relative error of these tensors, in the Euclidean norm; NaN if there is one."""
    return float(torch.stack([(one.float() - right).norm() / right.norm() for one, right in zip(found, wanted)]).max())


def _with_gradients(function, inputs, window):
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = function(q, k, v, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].to(out.dtype))]
