"""The work that MLX's devices are measured with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from backends import bench
from backends.mlx import attention
from backends.mlx.device import is_out_of_memory


class Bench(bench.Bench):
    """See `backends/bench.py`. Attention is in `dtype`, and compiled where `compiled` says so."""

    attentions = tuple(attention.IMPLEMENTATIONS)
    is_out_of_memory = staticmethod(is_out_of_memory)

    def __init__(self, memory: int, dtype: mx.Dtype = mx.float32, compiled: bool = True):
        self.memory, self.dtype, self.compiled = memory, dtype, compiled
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        self.size = 256 if on_cpu else 4096
        if on_cpu:  # where MLX takes seconds for a row of 2048 tokens
            self.attention_shape = min(self.attention_shape, (1024, 1, 64))

    def product_error(self, precision, n=96):
        a, b = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
        dtype = getattr(mx, precision)
        product = np.array((mx.array(a).astype(dtype) @ mx.array(b).astype(dtype)).astype(mx.float32))
        exact = a.astype(np.float64) @ b.astype(np.float64)
        return float(np.linalg.norm(product - exact) / np.linalg.norm(exact))

    def product(self, precision, m, k, n):
        a, b = _random(precision, m, k), _random(precision, k, n)
        return _repeated(lambda: a @ b)

    def mlp(self, precision, n):
        x, w = _random(precision, n, n), _random(precision, n, n)
        return _repeated(lambda: mx.fast.rms_norm(mx.square(mx.maximum(x @ w, 0)), None, 1e-6) @ w)

    def copy(self, size):
        x = mx.zeros(size // 4)
        mx.eval(x)
        return _repeated(lambda: x + 1)

    def attention_error(self, name, window):
        inputs = self._inputs(1, self.dtype)
        wanted = _with_gradients(attention.reference, [x.astype(mx.float32) for x in inputs], window)
        found = _with_gradients(attention.IMPLEMENTATIONS[name], inputs, window)
        return float(np.max([_error(*pair) for pair in zip(found, wanted)]))  # NaN if one is

    def attention(self, name, window, rows, backward):
        function, inputs = attention.IMPLEMENTATIONS[name], self._inputs(rows, self.dtype)

        def call(*inputs):
            if backward:
                return _with_gradients(function, list(inputs), window)
            return function(*inputs[:3], window)

        call = mx.compile(call) if self.compiled else call
        return _repeated(lambda: call(*inputs))

    def attention_bytes(self, name, window):
        """Times a call by what the second of two successive calls adds to the first."""
        function, inputs = attention.IMPLEMENTATIONS[name], self._inputs(1, self.dtype)

        def peak(calls):
            def repeated(q, k, v, _):
                for _ in range(calls):
                    q = function(q, k, v, window)
                return q

            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(_with_gradients(repeated, inputs, window))
            return mx.get_peak_memory() - before

        first = peak(1)
        return first + (bench.LAYERS - 1) * max(0, peak(2) - first)

    def forget(self):
        attention.forget()  # the trial's masks
        mx.clear_cache()
        mx.reset_peak_memory()

    def _inputs(self, rows: int, dtype: mx.Dtype) -> list[mx.array]:
        """q, k, v and the gradient of the output, each (rows, H, T, D) and laid out as a model's: positions first."""
        drawn = np.random.default_rng(0).standard_normal((4, 1, *self.attention_shape), dtype=np.float32)
        inputs = [mx.array(np.repeat(x, rows, axis=0)).astype(dtype) for x in drawn]
        mx.eval(inputs)
        return [x.swapaxes(1, 2) for x in inputs]


def _repeated(call) -> bench.Work:
    """The device works while the host queues the next call; calls end in the order they began."""

    def work(calls):
        for _ in range(calls):
            last = call()
            mx.async_eval(last)
        mx.eval(last)

    return work


def _random(precision: str, m: int, n: int) -> mx.array:
    x = (mx.random.normal((m, n)) * n**-0.5).astype(getattr(mx, precision))
    mx.eval(x)
    return x


def _with_gradients(function, inputs, window) -> list[mx.array]:
    (out,), gradients = mx.vjp(lambda q, k, v: function(q, k, v, window), inputs[:3], inputs[3:])
    return [out, *gradients]


def _error(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.sqrt(mx.sum(mx.square(a - b)) / mx.sum(mx.square(b))))
