"""Queries, keys and values by one projection; queries and keys rotated and normalised where the product left them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from backends.pytorch.kernels import processors

# Tokens that one program takes, its warps, heads it goes through; and whether the forward pass rotates and normalises
# before the product leaves the chip, instead of reading it again.
VARIANTS = ((16, 4, 1, False), (16, 4, 4, False), (8, 2, 4, False), (16, 4, 4, True))
variant = 0
BLOCK_M, BLOCK_K, WARPS, STAGES = 128, 64, 8, 3  # of that product, two heads wide


@triton.jit
def _angles(cosines, sines, token, channel, inside, length, HALF: tl.constexpr):
    table = token % length * HALF + channel
    return (
        tl.load(cosines + table, mask=inside, other=0).to(tl.float32),
        tl.load(sines + table, mask=inside, other=0).to(tl.float32),
    )


@triton.jit
def _forward(
    qkv,
    inverse,
    cosines,
    sines,
    count,
    length,
    width,
    heads,
    epsilon,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = token < count
    cos, sin = _angles(cosines, sines, token, channel, inside, length, HALF)
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        first = qkv + token.to(tl.int64) * width + head * 2 * HALF + channel
        x = tl.load(first, mask=inside, other=0).to(tl.float32)
        y = tl.load(first + HALF, mask=inside, other=0).to(tl.float32)
        x, y = x * cos + y * sin, y * cos - x * sin
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1, keep_dims=True) / (2 * HALF) + epsilon)
        tl.store(inverse + token * heads + head, scale, mask=inside)
        tl.store(first, (x * scale).to(qkv.dtype.element_ty), mask=inside)
        tl.store(first + HALF, (y * scale).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    upstream,
    normed,
    inverse,
    cosines,
    sines,
    out,
    count,
    length,
    heads,
    of_normed,
    of_out,
    head_of_inverse,
    heads_of_inverse,
    NORMED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient before rotation and norm, written into its columns of `out`; without NORMED a copy."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = token < count
    if NORMED:
        cos, sin = _angles(cosines, sines, token, channel, inside, length, HALF)
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        place = head * 2 * HALF + channel
        given = upstream + token.to(tl.int64) * heads * 2 * HALF + place
        target = out + token.to(tl.int64) * of_out + place
        x = tl.load(given, mask=inside, other=0).to(tl.float32)
        y = tl.load(given + HALF, mask=inside, other=0).to(tl.float32)
        if NORMED:
            result = normed + token.to(tl.int64) * of_normed + place
            u = tl.load(result, mask=inside, other=0).to(tl.float32)
            v = tl.load(result + HALF, mask=inside, other=0).to(tl.float32)
            scale = tl.load(inverse + token * heads_of_inverse + head_of_inverse + head, mask=inside, other=0)
            along = tl.sum(x * u + y * v, 1, keep_dims=True) / (2 * HALF)
            x, y = scale * (x - along * u), scale * (y - along * v)
            x, y = x * cos - y * sin, y * cos + x * sin
        tl.store(target, x.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(head, cosines, sines, inverse, token, count, length, heads, which, epsilon, HALF: tl.constexpr):
    """Both halves of a head's columns (tokens, D): rotated and normalised, unless it is one of v."""
    x, y = tl.split(tl.permute(tl.reshape(head, (head.shape[0], 2, HALF)), (0, 2, 1)))
    if which < heads:
        inside = token < count
        cos, sin = _angles(cosines, sines, token, tl.arange(0, HALF)[None, :], inside, length, HALF)
        x, y = x * cos + y * sin, y * cos - x * sin
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1, keep_dims=True) / (2 * HALF) + epsilon)
        tl.store(inverse + token * heads + which, scale, mask=inside)
        x, y = x * scale, y * scale
    return x, y


@triton.jit
def _product(
    x_desc,
    weight_desc,
    out_desc,
    inverse,
    cosines,
    sines,
    count,
    width,
    inner,
    length,
    heads,
    epsilon,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    columns = tl.cdiv(width, 4 * HALF)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_M) * columns, PROGRAMS, flatten=True):
        m, pair = tile // columns * BLOCK_M, tile % columns * 2
        total = tl.zeros((BLOCK_M, 4 * HALF), tl.float32)
        for k in range(0, inner, BLOCK_K):
            total = tl.dot(x_desc.load([m, k]), weight_desc.load([pair * 2 * HALF, k]).T, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, 2 * HALF)), (0, 2, 1)))
        token = m + tl.arange(0, BLOCK_M)[:, None]
        x, y = _rotated(left, cosines, sines, inverse, token, count, length, heads, pair, epsilon, HALF)
        out_desc.store([m, pair * 2 * HALF], x.to(out_desc.dtype))
        out_desc.store([m, pair * 2 * HALF + HALF], y.to(out_desc.dtype))
        x, y = _rotated(right, cosines, sines, inverse, token, count, length, heads, pair + 1, epsilon, HALF)
        out_desc.store([m, pair * 2 * HALF + 2 * HALF], x.to(out_desc.dtype))
        out_desc.store([m, pair * 2 * HALF + 3 * HALF], y.to(out_desc.dtype))


def _launch_product(x, weight, inverse, cosines, sines, heads, epsilon):
    (count, inner), width, (length, _, half) = x.shape, weight.shape[0], cosines.shape
    out = x.new_empty((count, width))
    block_m, block_k = (BLOCK_M, BLOCK_K) if x.is_cuda else (16, 16)
    programs = processors(x)
    _product[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [4 * half, block_k]),
        TensorDescriptor.from_tensor(out, [block_m, half]),
        inverse,
        cosines,
        sines,
        count,
        width,
        inner,
        length,
        heads,
        epsilon,
        block_m,
        block_k,
        half,
        programs,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _launch(kernel, arrays, count, heads, numbers, half):
    """`kernel` over all tokens and these heads.

    Args:
        arrays, numbers: its arguments before and after `count`, up to the constants of its variant.
    """
    tokens, warps, each, _ = VARIANTS[variant]
    each = math.gcd(heads, each)
    kernel[(triton.cdiv(count, tokens), heads // each)](*arrays, count, *numbers, tokens, each, half, num_warps=warps)


@torch.library.custom_op("autoresearch::rotary_projection", mutates_args=())
def project(
    x: torch.Tensor, weight: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C) @ weight (W, C).T, of which the first `heads` heads are rotated and divided by their root mean square.

    Args:
        cosines, sines: (T, 1, D / 2), contiguous; N is a multiple of T, and D the size of a head.

    Returns:
        (N, W), and the inverse root mean squares, float32 (N, heads).
    """
    length, _, half = cosines.shape
    inverse = x.new_empty((x.shape[0], heads), dtype=torch.float32)
    if VARIANTS[variant][-1]:
        return _launch_product(x.contiguous(), weight, inverse, cosines, sines, heads, epsilon), inverse
    qkv = torch.mm(x, weight.T)
    _launch(_forward, (qkv, inverse, cosines, sines), x.shape[0], heads, (length, qkv.shape[1], heads, epsilon), half)
    return qkv, inverse


@project.register_fake
def _(x, weight, cosines, sines, heads, epsilon):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], heads), dtype=torch.float32)


@torch.library.custom_op("autoresearch::rotary_projection_gradient", mutates_args=())
def project_gradient(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    inverse: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the product (N, W) inside `project`, from those of its rotated and normalised q and k and of v,
    each (N, its heads * D), and from q and k themselves, which may be columns of a wider array."""
    count, (length, _, half) = q.shape[0], cosines.shape
    out = grad_q.new_empty((count, grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1]))
    start = 0
    for grad, normed in ((grad_q, q), (grad_k, k), (grad_v, None)):
        heads, source = grad.shape[1] // (2 * half), grad if normed is None else normed
        _launch(
            _backward,
            (grad.contiguous(), source, inverse, cosines, sines, out[:, start:]),
            count,
            heads,
            (length, heads, source.stride(0), out.stride(0), start // (2 * half), inverse.shape[1], normed is not None),
            half,
        )
        start += grad.shape[1]
    return out


@project_gradient.register_fake
def _(grad_q, grad_k, grad_v, q, k, inverse, cosines, sines):
    return grad_q.new_empty((grad_q.shape[0], grad_q.shape[1] + grad_k.shape[1] + grad_v.shape[1]))
