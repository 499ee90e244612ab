"""Causal attention, full or with a sliding window: three ways to compute it on MLX, and the trial between them.

MLX's fused kernel has a gradient of its own on CUDA only. On Metal and on the CPU a T x T array of scores is made in
training, window or not. Blocks of queries, each against only the keys it sees, hold and compute less there. Which way
is fastest is found by trial on the device. All take q (B, H, T, D), k and v (B, H_kv, T, D) and a window (None: full).
"""

from __future__ import annotations

import time
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from backends.interface import BackendError

BLOCK = 512  # queries in a block: with fewer, more of what a window hides is left out; with more, products are larger


def fused(q, k, v, window):
    """MLX's own kernel, also where MLX would rather not use it (training on Metal). A window saves it nothing."""
    # A mask in the arrays' own precision is used as it is; a boolean one would be made into B x H x T x T numbers.
    mask = "causal" if window is None else _bias(slice(0, q.shape[2]), slice(0, q.shape[2]), window, q.dtype)
    try:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[3] ** -0.5, mask=mask, force_fused=True)
    except ValueError:  # it has none for this size of head, say; this is known before anything is computed
        return recomputed(q, k, v, window)


def blocks(q, k, v, window):
    """Blocks of queries whose probabilities are kept for the backward pass."""
    q, k, v, shape = *_grouped(q, k, v), q.shape
    return mx.concatenate([_probabilities(q[..., rows, :], k[..., keys, :], rows, keys, window) @ v[..., keys, :]
                           for rows, keys in _spans(shape[2], window)], axis=-2).reshape(shape)


def recomputed(q, k, v, window):
    """Blocks of queries whose probabilities are computed again in the backward pass, so that only inputs and output
    are kept (as in FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.1)."""
    return _recomputed(window)(*_grouped(q, k, v)).reshape(q.shape)


IMPLEMENTATIONS = {function.__name__: function for function in (fused, recomputed, blocks)}


@cache
def _recomputed(window: int | None):
    """f(q (B, H_kv, n, T, D), k and v (B, H_kv, 1, T, D)) -> like q: n query heads share a key head."""

    @mx.custom_function
    def attend(q, k, v):
        parts = []
        for rows, keys in _spans(q.shape[-2], window):
            q_part = after(q[..., rows, :], parts[-1:])
            parts.append(_probabilities(q_part, k[..., keys, :], rows, keys, window) @ v[..., keys, :])
        return mx.concatenate(parts, axis=-2)

    @attend.vjp
    def gradients(inputs, cotangent, output):
        q, k, v = inputs
        # Of softmax's gradient, dS = P (dP - sum(P dP)), the sum is that of output times cotangent.
        sums = mx.sum((output * cotangent).astype(mx.float32), axis=-1, keepdims=True)
        to_q, to_k, to_v = [], mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
        for rows, keys in _spans(q.shape[-2], window):
            q_part, out_part = after(q[..., rows, :], [*to_q[-1:], to_k, to_v]), cotangent[..., rows, :]
            k_part, v_part = k[..., keys, :], v[..., keys, :]
            probabilities = _probabilities(q_part, k_part, rows, keys, window)
            to_scores = probabilities * (out_part @ v_part.swapaxes(-1, -2) - sums[..., rows, :])
            to_scores = (to_scores * q.shape[-1] ** -0.5).astype(q.dtype)
            to_q.append(to_scores @ k_part)
            for total, (a, b) in ((to_k, (to_scores, q_part)), (to_v, (probabilities, out_part))):
                total[..., keys, :] += mx.sum((a.swapaxes(-1, -2) @ b).astype(mx.float32), axis=2, keepdims=True)
        return mx.concatenate(to_q, axis=-2), to_k.astype(k.dtype), to_v.astype(v.dtype)

    return attend


def _grouped(q, k, v):
    """q as (B, H_kv, H / H_kv, T, D), k and v as (B, H_kv, 1, T, D): a product then serves each group of heads."""
    return mx.unflatten(q, 1, (k.shape[1], -1)), mx.expand_dims(k, 2), mx.expand_dims(v, 2)


def _spans(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that one of them may see at all: a whole number of blocks, so masks repeat."""
    spans = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if window is None else max(0, start - window) // BLOCK * BLOCK
        spans.append((slice(start, stop), slice(first, stop)))
    return spans


def _probabilities(q, k, rows: slice, keys: slice, window: int | None):
    """Softmax over keys, in the arrays' precision but normalised in float32: (..., queries, keys)."""
    bias = _bias(rows, keys, window, q.dtype)
    return mx.softmax(mx.addmm(bias, q, k.swapaxes(-1, -2), alpha=q.shape[-1] ** -0.5), axis=-1, precise=True)


def _bias(rows: slice, keys: slice, window: int | None, dtype: mx.Dtype) -> mx.array:
    """0 where a query (row) may see a key (column), else minus infinity: (queries, keys)."""
    return _band(rows.stop - rows.start, keys.stop - keys.start, rows.start - keys.start, window).astype(dtype)


@lru_cache(maxsize=32)
def _band(queries: int, keys: int, ahead: int, window: int | None) -> mx.array:
    """The bias of queries that start `ahead` of the first key. From numpy: a cache must not hold part of a trace."""
    back = np.arange(queries)[:, None] + ahead - np.arange(keys)
    visible = (back >= 0) & (back <= (keys if window is None else window))
    return mx.array(np.where(visible, 0, -np.inf).astype(np.float32))


def forget() -> None:
    """Lets go of the masks made so far."""
    _band.cache_clear()


def after(x: mx.array, earlier: list[mx.array]) -> mx.array:
    """x, once `earlier` is computed: a lazy graph without this order holds the temporaries of several blocks."""
    return mx.depends([x], earlier)[0] if earlier else x


# --- The trial -------------------------------------------------------------------------------------------------------

# Relative error, |out - reference| / |reference|, that rounding of inputs, scores and outputs explains.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 2e-2}
CLEARLY = 1.1  # by how much one that keeps more has to be faster
LAYERS, ROWS = 8, 8  # of the model for which memory is reckoned
SHORTEST_MS, MOST_ROWS = 4, 64  # a call shorter than this is mostly the host's work; more rows make it longer
LONG_ENOUGH_MS = 300  # in all, for timing: a call this slow is timed once


def trial(dtype: mx.Dtype, memory: int, compiled: bool, shape=(2048, 4, 128), repeats: int = 5) -> dict:
    """Runs every implementation, forward and backward, for a full and a half window, against a float32 reference.

    Args:
        memory: bytes of the device; scores may take an eighth of it.
        shape: T, H, D of one row.

    Returns:
        By kind of window ("full", "window"), by implementation: [milliseconds (median) for all rows, bytes that one row
        takes in LAYERS layers], or why it can't be used.
    """
    length, heads, _ = shape
    most = max(1, min(MOST_ROWS, memory // 8 // (heads * length**2 * 4)))
    one, rows, results = _inputs(1, shape, dtype), 1, {}
    while 2 * rows <= most and _milliseconds(recomputed, _inputs(rows, shape, dtype), None, False, 2) < SHORTEST_MS:
        rows *= 2
    many = _inputs(rows, shape, dtype)
    for kind, window in (("full", None), ("window", length // 2)):
        wanted = _with_gradients(reference, [x.astype(mx.float32) for x in one], window)
        results[kind] = {}
        for name, function in IMPLEMENTATIONS.items():
            try:
                error = max(map(_error, _with_gradients(function, one, window), wanted))
                results[kind][name] = f"wrong: relative error {error:.1e}" if not error < TOLERANCE[dtype] else [
                    _milliseconds(function, many, window, compiled, repeats), _needed(function, one, window)]
            except (RuntimeError, ValueError) as error:  # no such kernel for this precision, or no memory for it
                results[kind][name] = str(error).splitlines()[0][:200]
    return results


def choose(results: dict, memory: int) -> dict[str, str]:
    """By kind of window: `recomputed`, which keeps least, unless another is clearly faster and memory is not short.

    Args:
        memory: bytes of the device; attention over ROWS rows and LAYERS layers may take an eighth of it.
    """
    chosen = {}
    for kind, by_name in results.items():
        right = {name: found for name, found in by_name.items() if not isinstance(found, str)}
        if not right:
            raise BackendError(f"no attention implementation is right on this device: {by_name}")
        least = min(needed for _, needed in right.values())
        lean = {name: ms for name, (ms, needed) in right.items() if needed <= least or ROWS * needed <= memory / 8}
        chosen[kind] = min(lean, key=lambda name: lean[name] / (CLEARLY if name == "recomputed" else 1))
    return chosen


def reference(q, k, v, window):
    """The definition: T x T scores, masked."""
    q, k, v, shape = *_grouped(q, k, v), q.shape
    everything = slice(0, shape[2])
    return (_probabilities(q, k, everything, everything, window) @ v).reshape(shape)


def _inputs(rows: int, shape, dtype: mx.Dtype) -> list[mx.array]:
    """q, k, v and the gradient of the output, each (rows, H, T, D) and laid out as a model's are, positions first."""
    drawn = np.random.default_rng(0).standard_normal((4, 1, *shape), dtype=np.float32)
    inputs = [mx.array(np.repeat(x, rows, axis=0)).astype(dtype) for x in drawn]
    mx.eval(inputs)
    return [x.swapaxes(1, 2) for x in inputs]


def _with_gradients(function, inputs, window) -> list[mx.array]:
    (out,), gradients = mx.vjp(lambda q, k, v: function(q, k, v, window), inputs[:3], inputs[3:])
    return [out, *gradients]


def _error(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.sqrt(mx.sum(mx.square(a - b)) / mx.sum(mx.square(b))))


def _milliseconds(function, inputs, window, compiled: bool, repeats: int) -> float:
    """Forward and backward, the median of a few calls after one that may compile."""

    def call(*inputs):
        return _with_gradients(function, list(inputs), window)

    call = mx.compile(call) if compiled else call
    mx.eval(call(*inputs))
    times = []
    while len(times) < repeats and sum(times) < LONG_ENOUGH_MS:
        start = time.perf_counter()
        mx.eval(call(*inputs))
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def _needed(function, inputs, window) -> int:
    """Bytes at the peak of LAYERS calls after one another, from what the second adds to the first."""

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
    return first + (LAYERS - 1) * max(0, peak(2) - first)
