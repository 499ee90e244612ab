"""Causal attention, full or with a sliding window: the implementations that PyTorch offers.

Which one is right and fast differs by device, build and version, so each is tried against `reference` before it may be
chosen (backends/bench.py). All take q (B, T, H, D), k and v (B, T, H_kv, D) and a window (None: full).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backends import interface
from backends.pytorch import runtime


def attention(q, k, v, window=None):
    """Query i sees keys j with i - window <= j <= i; scaled by D^-1/2; (B, T, H, D)."""
    interface.check_heads(q.shape[2], k.shape[2])
    if window is not None and window >= q.shape[1] - 1:
        window = None
    kind = "full" if window is None else "window"
    name = runtime.attention[kind]
    return implementation(name if takes(name, q.shape[-1]) else ANY_HEAD[kind])(q, k, v, window)


LARGEST_HEAD = 256  # of Flash Attention, 2 and 3; and a multiple of 8
ANY_HEAD = {"full": "sdpa_causal", "window": "sdpa_blocks"}


def takes(name: str, head_dim: int) -> bool:
    """Whether this implementation computes heads of so many dimensions."""
    return name not in ("fa3", "varlen") or head_dim <= LARGEST_HEAD and head_dim % 8 == 0


def implementation(name):
    """Of PyTorch, or what the backend that is open adds."""
    return runtime.added_attention.get(name) or IMPLEMENTATIONS[name]


def sdpa_causal(q, k, v, window):
    """PyTorch's own choice of kernel. It has no window."""
    if window is not None:
        raise NotImplementedError("is_causal knows no window")
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def sdpa_mask(q, k, v, window):
    """The last resort: every one of T x T scores is computed, most of them to be masked."""
    q, k, v = _heads_first(q, k, v)
    mask = _visible(0, q.shape[2], 0, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


BLOCK = 256  # queries in one block of `sdpa_blocks`


def sdpa_blocks(q, k, v, window):
    """Blocks of queries against only the keys they see, so that a short window costs less than a full one."""
    q, k, v = _heads_first(q, k, v)
    outputs = []
    for start in range(0, q.shape[2], BLOCK):
        stop = min(start + BLOCK, q.shape[2])
        first = 0 if window is None else max(0, start - window)
        mask = _visible(start, stop, first, window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=mask
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def varlen(q, k, v, window):
    """FlashAttention-2 as it is built into PyTorch (2.10 and later) with a window; half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    batch, length, heads, dim = q.shape
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    flat = [x.reshape(batch * length, heads, dim) for x in (q, k, v)]
    out = varlen_attn(*flat, ends, ends, length, length, window_size=(-1 if window is None else window, 0))
    return out.reshape(q.shape)


def flex(q, k, v, window):
    """FlexAttention (arXiv:2412.05496) with a block mask: fast only inside a compiled graph.

    Outside one (evaluation, and the eager pass of `warm_up` that makes the block masks, which can't be made while a
    graph is traced) its scores would be T x T in float32; a masked product gives the same.
    """
    if not runtime.compiled:
        raise NotImplementedError("FlexAttention without a compiler computes T x T scores")
    mask = _block_mask(q.shape[1], window, q.device)
    if not torch.compiler.is_compiling():
        return sdpa_mask(q, k, v, window)
    from torch.nn.attention.flex_attention import flex_attention

    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)


def reference(q, k, v, window):
    """The definition, in float32 on whatever device: T x T scores, masked."""
    q, k, v = _heads_first(q.float(), k.float(), v.float())
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~_visible(0, q.shape[2], 0, window, q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


IMPLEMENTATIONS = {f.__name__: f for f in (varlen, flex, sdpa_causal, sdpa_blocks, sdpa_mask)}

_block_masks = {}


def _block_mask(length, window, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, i, j):
        return (j <= i) if window is None else (j <= i) & (i - j <= window)

    key = length, window, device
    if key not in _block_masks:
        _block_masks[key] = create_block_mask(visible, None, None, length, length, device=device)
    return _block_masks[key]


_masks = {}


def _visible(start, stop, first, window, device):
    """Which keys of [first, stop) the queries of [start, stop) see: boolean (queries, keys)."""
    key = start, stop, first, window, device
    if key not in _masks:
        i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(first, stop, device=device)
        _masks[key] = (j <= i) if window is None else (j <= i) & (i - j <= window)
    return _masks[key]


def _heads_first(q, k, v):
    heads = q.shape[2]
    return (x.transpose(1, 2) for x in (q, _repeat_heads(k, heads), _repeat_heads(v, heads)))


def _repeat_heads(x, heads):
    """Grouped-query attention: each key and value head serves `heads / H_kv` query heads that follow one another."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
