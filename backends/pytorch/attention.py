"""Causal attention, full or with a sliding window: the implementations that PyTorch offers.

Which one is right and fast differs by device, build and version, so each is tried against `reference` before it may be
chosen (backends/bench.py). All take q (B, T, H, D), k and v (B, T, H_kv, D) and a window (None: full).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backends import operations
from backends.pytorch import runtime


def attention(q, k, v, window, scale, softcap, bias, documents):
    """See `backends/operations.py`."""
    operations.check_attention(q.shape[2], k.shape[2], window, None if bias is None else bias.shape[0])
    if window is not None and window >= q.shape[1] - 1:
        window = None
    if scale is not None:  # the implementations have their own
        q = q * (scale * q.shape[3] ** 0.5)
    if softcap is not None or bias is not None or documents is not None:
        return modified(q, k, v, window, softcap, bias, documents)
    name = runtime.attention["full" if window is None else "window"]
    if not takes(name, q):
        name = "sdpa_causal" if window is None else "sdpa_blocks"
    return implementation(name)(q, k, v, window)


def implementation(name):
    """The implementation of that name: PyTorch's, or one that the open backend adds."""
    return runtime.added_attention.get(name) or IMPLEMENTATIONS[name]


LARGEST_HEAD = 256  # of FlashAttention-2 and -3, which want a multiple of 8


def takes(name: str, q) -> bool:
    """Whether this implementation, which the trial found right for other heads, has a kernel for these."""
    size = q.shape[-1]
    if name in ("fa3", "varlen"):
        return q.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_HEAD and size % 8 == 0
    if name == "flex":  # whose tiles are powers of two
        return 16 <= size <= LARGEST_HEAD and size & (size - 1) == 0
    return True


def modified(q, k, v, window, softcap, bias, documents):
    """With what changes a score, or hides it, beyond a window.

    By FlexAttention where that is compiled for a GPU; else by blocks of queries whose scores are made again in the
    backward pass, so that few of T x T are held at once. A bias that is trained goes that way everywhere: FlexAttention
    adds up its gradient one score after another (on an H200 16 rows of 2048 tokens took 266 ms, and 12 by blocks).
    """
    bias = None if bias is None else bias.float()  # its gradient is a sum over many scores
    if runtime.compiled and q.is_cuda and takes("flex", q) and not (bias is not None and bias.requires_grad):
        mask = _block_mask(q.shape[1], window, q.device)
        if mask is not None and torch.compiler.is_compiling():
            return _flex(q, k, v, mask, _modification(softcap, bias, documents))
    outputs = []
    for start in range(0, q.shape[1], BLOCK):
        stop = min(start + BLOCK, q.shape[1])
        first = 0 if window is None else max(0, start - window)
        same = None
        if documents is not None:
            same = documents[:, start:stop, None] == documents[:, None, first:stop]
        outputs.append(
            checkpoint(
                _modified_block,
                q[:, start:stop],
                k[:, first:stop],
                v[:, first:stop],
                _visible(start, stop, first, window, q.device),
                None if bias is None else bias[:, _distances(start, stop, first, bias.shape[1], q.device)],
                softcap,
                same,
                use_reentrant=False,
            )
        )
    return torch.cat(outputs, 1)


def _modified_block(q, k, v, visible, bias, softcap, same):
    """q (B, n, H, D) against k and v (B, m, H_kv, D), the scores in float32; bias (H, n + m) as `_distances` has it."""
    q, k, v = _heads_first(q, k, v)
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        # Rows of one length less begin one element earlier each time, which puts bias[j - i] into row i and column j.
        (heads, length), (queries, keys) = bias.shape, scores.shape[-2:]
        rows = bias.repeat(1, queries)[:, : queries * (length - 1)].reshape(heads, queries, length - 1)
        scores = scores + rows[..., :keys]
    if same is not None:
        visible = visible & same[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _modification(softcap, bias, documents):
    """The same for FlexAttention, score by score. Other documents are hidden here and not in the block mask, which is
    made once for all batches."""

    def modify(score, batch, head, i, j):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[head, (i - j).clamp(0, bias.shape[1] - 1)]
        if documents is not None:
            score = torch.where(documents[batch, i] == documents[batch, j], score, float("-inf"))
        return score

    return modify


def sdpa_causal(q, k, v, window):
    """PyTorch's own choice of kernel. It has no window."""
    if window is not None:
        raise NotImplementedError("is_causal supports no window")
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

    Outside one (evaluation, and the eager pass of `warm_up` that makes the block masks) its scores would be T x T in
    float32; a masked product gives the same. So do blocks, for a window that comes up while a graph is traced.
    """
    if not runtime.compiled:
        raise NotImplementedError("FlexAttention without a compiler computes T x T scores")
    mask = _block_mask(q.shape[1], window, q.device)
    if mask is None:
        return sdpa_blocks(q, k, v, window)
    return _flex(q, k, v, mask) if torch.compiler.is_compiling() else sdpa_mask(q, k, v, window)


def _flex(q, k, v, mask, modify=None):
    from torch.nn.attention.flex_attention import flex_attention

    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # A modification takes shared memory, of which a Hopper has too little for the usual three stages (PyTorch 2.11).
    options = None if modify is None else {"num_stages": 2}  # a function's truth can't be traced
    out = flex_attention(q, k, v, score_mod=modify, block_mask=mask, enable_gqa=gqa, kernel_options=options)
    return out.transpose(1, 2)


def reference(q, k, v, window):
    """The definition, in float32 on whatever device: T x T scores, masked."""
    q, k, v = _heads_first(q.float(), k.float(), v.float())
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~_visible(0, q.shape[2], 0, window, q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


IMPLEMENTATIONS = {f.__name__: f for f in (sdpa_causal, varlen, flex, sdpa_blocks, sdpa_mask)}

_block_masks = {}


def _block_mask(length, window, device):
    """None where there is none yet and a graph is traced, which can't make one."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, i, j):
        return (j <= i) if window is None else (j <= i) & (i - j <= window)

    key = length, window, device
    if key not in _block_masks and not torch.compiler.is_compiling():
        _block_masks[key] = create_block_mask(visible, None, None, length, length, device=device)
    return _block_masks.get(key)


_distances_made = {}


def _distances(start, stop, first, columns, device):
    """For each c = j - i of m keys in [first, stop) and n queries in [start, stop), both counted from 0, which of the
    `columns` of a bias by distance belongs to it: (n + m,), where c below zero counts from the end."""
    key = start, stop, first, columns, device
    if key in _distances_made:
        return _distances_made[key]
    queries, keys = stop - start, stop - first
    c = torch.cat([torch.arange(keys, device=device), torch.arange(-queries, 0, device=device)])
    return runtime.kept(_distances_made, key, (start - first - c).clamp(0, columns - 1))


_masks = {}


def _visible(start, stop, first, window, device):
    """Which keys of [first, stop) the queries of [start, stop) see: boolean (queries, keys)."""
    key = start, stop, first, window, device
    if key in _masks:
        return _masks[key]
    i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(first, stop, device=device)
    return runtime.kept(_masks, key, (j <= i) if window is None else (j <= i) & (i - j <= window))


def _heads_first(q, k, v):
    heads = q.shape[2]
    return (x.transpose(1, 2) for x in (q, _repeat_heads(k, heads), _repeat_heads(v, heads)))


def _repeat_heads(x, heads):
    """Grouped-query attention: each key and value head serves `heads / H_kv` query heads that follow one another."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
