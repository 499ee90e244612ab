"""Matrix products with a squared ReLU, or its gradient, applied before the result leaves the chip.

A persistent kernel over tiles; operands are read by tensor descriptors (by the bulk copy engine on Hopper). It saves
passes over the widest activation of a transformer: the product is written once, not read and written again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from backends.pytorch.kernels import processors

# (block m, n, k, warps, stages). The first is the fastest of 30 on an H200; the others are for chips with less shared
# memory. To fetch the activation before the product takes more registers than there are, and 20 times as long.
VARIANTS = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 32, 4, 3))
variant = 0
GROUP = 8  # rows of tiles that share what they read of the weight


@triton.jit
def _product(
    a_desc,
    b_desc,
    out_desc,
    activation_desc,
    M,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        first = tile // (GROUP * columns) * GROUP
        height = min(rows - first, GROUP)
        inside = tile % (GROUP * columns)
        m, n = (first + inside % height) * BLOCK_M, inside // height * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m, k])
            b = b_desc.load([n, k]).T if TRANSPOSED else b_desc.load([k, n])
            total = tl.dot(a, b, total)
        # Two halves, so that half the shared memory serves the result.
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        if BACKWARD:
            left *= 2 * tl.sqrt(activation_desc.load([m, n]).to(tl.float32))
        else:
            left = tl.maximum(left, 0.0)
            left *= left
        out_desc.store([m, n], left.to(out_desc.dtype))
        if BACKWARD:
            right *= 2 * tl.sqrt(activation_desc.load([m, n + BLOCK_N // 2]).to(tl.float32))
        else:
            right = tl.maximum(right, 0.0)
            right *= right
        out_desc.store([m, n + BLOCK_N // 2], right.to(out_desc.dtype))


def _launch(a, b, transposed, activation=None):
    rows, inner = a.shape
    columns = b.shape[0] if transposed else b.shape[1]
    out = a.new_empty((rows, columns))
    m, n, k, warps, stages = VARIANTS[variant] if a.is_cuda else (16, 32, 16, 4, 1)  # smaller in the interpreter
    programs = processors(a)
    half = [m, n // 2]
    _product[(programs,)](
        TensorDescriptor.from_tensor(a, [m, k]),
        TensorDescriptor.from_tensor(b, [n, k] if transposed else [k, n]),
        TensorDescriptor.from_tensor(out, half),
        TensorDescriptor.from_tensor(out if activation is None else activation, half),
        rows,
        columns,
        inner,
        transposed,
        activation is not None,
        m,
        n,
        k,
        GROUP,
        programs,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@torch.library.custom_op("autoresearch::squared_relu_product", mutates_args=())
def squared_relu_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """relu(x @ weight.T)^2 for x (N, C) and weight (F, C), in their precision: (N, F)."""
    return _launch(x.contiguous(), weight.contiguous(), True)


@squared_relu_product.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("autoresearch::squared_relu_gradient", mutates_args=())
def squared_relu_gradient(upstream: torch.Tensor, weight: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """The gradient of h, where activation = relu(h)^2 (N, F) and y = activation @ weight.T (N, C), from y's.

    2 relu(h) is found as 2 sqrt(activation): h need not be kept, and the root halves the error of its rounding.
    """
    return _launch(upstream.contiguous(), weight.contiguous(), False, activation)


@squared_relu_gradient.register_fake
def _(upstream, weight, activation):
    return torch.empty_like(activation)
