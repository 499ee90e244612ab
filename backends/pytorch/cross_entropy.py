"""Cross-entropy of a linear head over chunks of tokens, so that the logits of a whole batch are never held at once.

The gradient is made in the forward pass, while a chunk's logits are there, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989): the head is multiplied once, not again in the backward pass.
"""

from __future__ import annotations

import torch

from backends.pytorch import runtime

LARGEST_ROW = 2**15  # logits of one token, which our kernel holds in registers


def softcapped_cross_entropy(hidden, weight, targets, softcap):
    """Mean nats of `targets` under softmax(softcap * tanh(hidden @ weight.T / softcap)), a float32 scalar.

    Args:
        hidden: (B, T, C) or (N, C). weight: (V, C). targets: (B, T) or (N,), integers in [0, V).
        softcap: the bound on logits, or None.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long().contiguous()
    size = max(1, runtime.logits_at_once // weight.shape[0])
    return _Summed.apply(rows, weight, labels, softcap, size) / labels.shape[0]


class _Summed(torch.autograd.Function):
    """The sum over tokens, and its gradient, which stays unnormalised until the backward pass: a token's share of a
    mean is about 1/N, which float16 would lose."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, size):
        ctx.weight_dtype = weight.dtype
        if runtime.has_kernel("cross_entropy", hidden) and weight.shape[0] <= LARGEST_ROW:
            total, *gradients = torch.ops.autoresearch.softcapped_cross_entropy(hidden, weight, targets, softcap, size)
            ctx.save_for_backward(*gradients)
            return total
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_hidden = []
        for h, t in zip(hidden.split(size), targets.split(size)):
            losses, grad = _losses_and_gradient((h @ weight.T).float(), t, softcap)
            grad = grad.to(h.dtype)
            total = total + losses
            grad_hidden.append(grad @ weight)
            grad_weight = grad_weight + (grad.T @ h).float()
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * upstream).to(grad_hidden.dtype),
            (grad_weight * upstream).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _losses_and_gradient(logits, targets, softcap):
    """Summed nats and d nats / d logits, for float32 logits (N, V) before the softcap, which are overwritten.

    In place where it can be, because without a compiler each pass over a chunk costs as much as the arithmetic in it.
    The softcap goes by tanh(u) = 2 sigmoid(2u) - 1, which costs half of tanh and gives its slope too; and the logits
    it bounds need no pass to find the largest before they are exponentiated.
    """
    targets = targets[:, None]
    if softcap is None:
        shifted = logits.sub_(logits.amax(-1, keepdim=True))
    else:
        squashed = torch.sigmoid(logits.mul_(2 / softcap))
        shifted = (squashed - 1).mul_(2 * softcap)  # the capped logits less their bound
        if softcap > 40:  # exp(-2 softcap) would underflow
            shifted = shifted - shifted.amax(-1, keepdim=True)
    wanted = shifted.gather(1, targets)
    grad = shifted.exp_()
    total = grad.sum(-1, keepdim=True)
    losses = total.log() - wanted
    grad = grad.div_(total)
    if torch.compiler.is_compiling():  # a comparison fuses with the rest; a scatter would need the chunk in memory
        grad = grad - (torch.arange(logits.shape[1], device=logits.device) == targets).float()
    else:
        grad = grad.scatter_add_(1, targets, torch.full_like(wanted, -1.0))
    if softcap is not None:
        grad = grad * (4 * squashed * (1 - squashed))
    return losses.sum(), grad
