"""RMS norm, rotary position embedding, and attention's projections, which end in both."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backends.pytorch import runtime

EPSILON = 2.0**-23  # float32's machine epsilon, in every precision


def rms_norm(x):
    """x / sqrt(mean(x^2, last axis) + 2^-23), accumulated in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if torch.compiler.is_compiling():
        return _normed(x)
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)  # one kernel, where there is no compiler to make one


@runtime.one_node
def _normed(x):
    return _RMSNorm.apply(x)


class _RMSNorm(torch.autograd.Function):
    """Keeps its result instead of x: the result is kept anyway, by the product that it goes into."""

    @staticmethod
    def forward(ctx, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPSILON)
        y = x.float() * scale
        # A cast to its own type is y itself. Compiled by PyTorch 2.11, a result that is there twice has no gradient.
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, upstream):
        y, scale = ctx.saved_tensors
        upstream, y32 = upstream.float(), y.float()
        along = (upstream * y32).mean(-1, keepdim=True)
        return (scale * (upstream - along * y32)).to(y.dtype)


def rope(x, base):
    """Rotary position embedding of x (B, T, H, D); position on axis 1, halves split."""
    return _rotated(x, *_rotation(x.shape[1], x.shape[3] // 2, base, x.dtype))


@runtime.one_node
def _rotated(x, cosines, sines):
    return _Rotate.apply(x, cosines, sines)


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back. Derived from slices and `cat` it would be sums of padded halves instead, at
    three times the cost."""

    @staticmethod
    def forward(ctx, x, cosines, sines):
        ctx.save_for_backward(cosines, sines)
        return _rotate(x, cosines, sines)

    @staticmethod
    def backward(ctx, upstream):
        cosines, sines = ctx.saved_tensors
        return _rotate(upstream, cosines, -sines), None, None


def _rotate(x, cosines, sines):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([first * cosines + second * sines, second * cosines - first * sines], -1)


_tables = {}


def _rotation(length: int, half: int, base: float, dtype: torch.dtype):
    """cos and sin, each (length, 1, half)."""
    key = length, half, base, dtype, runtime.device
    if key in _tables:
        return _tables[key]
    # A graph with an array of the host's can't be recorded; and not every device has float64.
    device = runtime.device if torch.compiler.is_compiling() and runtime.device.type == "cuda" else "cpu"
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None, None] * frequencies
    return runtime.kept(_tables, key, tuple(t.to(dtype).to(runtime.device) for t in (angles.cos(), angles.sin())))


def rotary_qkv(x, w_q, w_k, w_v, head_dim, base):
    """Queries, keys and values of x (B, T, C); the first two are rotated as `rope` does, then RMS-normalised by head.

    Args:
        w_q, w_k, w_v: (heads * head_dim, C).

    Returns:
        q (B, T, H, D), k and v (B, T, H_kv, D).
    """
    batch, length, _ = x.shape
    if runtime.has_kernel("projection", x) and head_dim & (head_dim - 1) == 0 and x.shape[-1] % 8 == 0:
        widths = [w.shape[0] for w in (w_q, w_k, w_v)]
        parts = _projected(
            x.reshape(batch * length, -1),
            torch.cat([w_q, w_k, w_v]),
            *_rotation(length, head_dim // 2, base, x.dtype),
            widths,
        )
        return tuple(part.reshape(batch, length, -1, head_dim) for part in parts)
    # One product would be no faster here: its gradients would have to be copied together.
    q, k, v = (F.linear(x, w).reshape(batch, length, -1, head_dim) for w in (w_q, w_k, w_v))
    return rms_norm(rope(q, base)), rms_norm(rope(k, base)), v


@runtime.one_node
def _projected(x, weight, cosines, sines, widths):
    return _RotaryProjection.apply(x, weight, cosines, sines, widths)


class _RotaryProjection(torch.autograd.Function):
    """Its results are columns of one array; of what q and k were before the norm nothing is kept."""

    @staticmethod
    def forward(ctx, x, weight, cosines, sines, widths):
        heads = (widths[0] + widths[1]) // (2 * cosines.shape[-1])
        qkv, inverse = torch.ops.autoresearch.rotary_projection(x, weight, cosines, sines, heads, EPSILON)
        ctx.save_for_backward(x, weight, qkv, inverse, cosines, sines)
        ctx.widths = widths
        return qkv.split(widths, -1)

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        x, weight, qkv, inverse, cosines, sines = ctx.saved_tensors
        q, k, _ = qkv.split(ctx.widths, -1)
        grad = torch.ops.autoresearch.rotary_projection_gradient(grad_q, grad_k, grad_v, q, k, inverse, cosines, sines)
        return grad @ weight, grad.T @ x, None, None, None
