"""Cross-entropy and its gradient: logits are read once, a row by one program, and their gradient takes their place."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

VARIANTS = (8, 4, 16)  # warps of a program
variant = 0
LOG2_E = math.log2(math.e)


@triton.jit
def _row(
    logits,
    targets,
    losses,
    inner,
    outer,
    ln_2,
    CAPPED: tl.constexpr,
    SHIFTED: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits in powers of two, which is what the hardware has: `outer` and `inner` turn them into such."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = logits + row * VOCABULARY
    if BLOCK == VOCABULARY:
        x = tl.load(start + columns).to(tl.float32)
    else:
        x = tl.load(start + columns, mask=columns < VOCABULARY, other=float("-inf")).to(tl.float32)
    chosen = columns == tl.load(targets + row)
    if CAPPED:  # softcap * tanh(x / softcap), by tanh(u) = 2 sigmoid(2u) - 1, less its bound
        squashed = 1 / (1 + tl.exp2(inner * x))
        x = outer * squashed - outer
        if BLOCK != VOCABULARY:
            x = tl.where(columns < VOCABULARY, x, float("-inf"))
    else:
        x *= outer
    if SHIFTED:
        x -= tl.max(x, 0)
    exponents = tl.exp2(x)
    total = tl.sum(exponents, 0)
    tl.store(losses + row, ln_2 * (tl.log2(total) - tl.sum(tl.where(chosen, x, 0.0), 0)))
    gradient = exponents * (1 / total) - tl.where(chosen, 1.0, 0.0)
    if CAPPED:
        gradient *= 4 * squashed * (1 - squashed)
    tl.store(start + columns, gradient.to(logits.dtype.element_ty), mask=columns < VOCABULARY)


def _launch(logits, targets, losses, softcap):
    rows, vocabulary = logits.shape
    inner, outer = (0.0, LOG2_E) if softcap is None else (-2 / softcap * LOG2_E, 2 * softcap * LOG2_E)
    shifted = softcap is None or softcap > 40  # else the smallest exponential, exp(-2 softcap), is a float32
    _row[(rows,)](
        logits,
        targets,
        losses,
        inner,
        outer,
        math.log(2),
        softcap is not None,
        shifted,
        vocabulary,
        triton.next_power_of_2(vocabulary),
        num_warps=VARIANTS[variant],
    )


@torch.library.custom_op("autoresearch::softcapped_cross_entropy", mutates_args=())
def summed(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nats of targets (N,) under logits hidden (N, C) @ weight (V, C).T, `size` rows at a time.

    Returns:
        Their sum (float32), and its gradients: of hidden (N, C), in its precision, and of weight (V, C), float32.
    """
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    vocabulary = weight.shape[0]
    buffer = hidden.new_empty(min(size, hidden.shape[0]), vocabulary)
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        rows = hidden[part]
        logits = torch.mm(rows, weight.T, out=buffer[: rows.shape[0]])
        _launch(logits, targets[part], losses[part], softcap)
        torch.mm(logits, weight, out=grad_hidden[part])
        grad_weight += logits.T @ rows
    return losses.sum(), grad_hidden, grad_weight


@summed.register_fake
def _(hidden, weight, targets, softcap, size):
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        torch.empty(weight.shape, dtype=torch.float32, device=weight.device),
    )
