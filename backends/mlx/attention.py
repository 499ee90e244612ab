"""Causal attention, full or with a sliding window: three ways to compute it on MLX.

MLX's fused kernel has a gradient of its own on CUDA only. On Metal and on the CPU a T x T array of scores is made in
training, window or not. Blocks of queries, each against only the keys it sees, hold and compute less there. Which way
is fastest is found by trial on the device (backends/bench.py). All take q (B, H, T, D), k and v (B, H_kv, T, D) and a
window (None: full).
"""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

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
    return mx.concatenate(
        [
            _probabilities(q[..., rows, :], k[..., keys, :], rows, keys, window) @ v[..., keys, :]
            for rows, keys in _spans(shape[2], window)
        ],
        axis=-2,
    ).reshape(shape)


def recomputed(q, k, v, window):
    """Blocks of queries whose probabilities are computed again in the backward pass, so that only inputs and output
    are kept (as in FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.1)."""
    return _recomputed(window)(*_grouped(q, k, v)).reshape(q.shape)


def reference(q, k, v, window):
    """The definition: T x T scores, masked."""
    q, k, v, shape = *_grouped(q, k, v), q.shape
    everything = slice(0, shape[2])
    return (_probabilities(q, k, everything, everything, window) @ v).reshape(shape)


def modified(q, k, v, window, softcap, bias, documents):
    """With what changes a score, or hides it, beyond a window: blocks whose scores are made again in the backward pass.

    Args:
        softcap, bias (H, N), documents (B, T): as `backends/operations.py` has them, or None.
    """
    q, k, v, shape = *_grouped(q, k, v), q.shape
    if bias is not None:
        bias = bias.reshape(k.shape[1], -1, bias.shape[1])  # (H_kv, H / H_kv, N)
    parts = []
    for rows, keys in _spans(shape[2], window):
        q_part, k_part, v_part = after(q[..., rows, :], parts[-1:]), k[..., keys, :], v[..., keys, :]

        @mx.checkpoint
        def block(q, k, v, bias, rows=rows, keys=keys):
            scores = (q.astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2)) * q.shape[-1] ** -0.5
            if softcap is not None:
                scores = softcap * mx.tanh(scores / softcap)
            if bias is not None:
                scores = scores + _by_distance(bias, rows, keys)
            scores = scores + _bias(rows, keys, window, mx.float32)
            if documents is not None:
                same = documents[:, rows, None] == documents[:, None, keys]
                scores = mx.where(same[:, None, None], scores, -mx.inf)
            return mx.softmax(scores, axis=-1).astype(v.dtype) @ v

        parts.append(block(q_part, k_part, v_part, bias))
    return mx.concatenate(parts, axis=-2).reshape(shape)


def _by_distance(bias, rows: slice, keys: slice):
    """bias (H_kv, H / H_kv, N) as (H_kv, H / H_kv, n, m): for query i and key j its column i - j, or its last.

    Not by an index for each score, whose gradient would be added up one score after another: rows of one length less
    begin one element earlier each time.
    """
    queries, count = rows.stop - rows.start, keys.stop - keys.start
    c = np.concatenate([np.arange(count), np.arange(-queries, 0)])  # key - query, both counted from 0
    distances = np.clip(rows.start - keys.start - c, 0, bias.shape[-1] - 1)
    line = mx.take(bias.astype(mx.float32), mx.array(distances), axis=-1)
    tiled = mx.tile(line, (1, 1, queries))[..., : queries * (len(c) - 1)]
    return tiled.reshape(*bias.shape[:-1], queries, len(c) - 1)[..., :count]


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
