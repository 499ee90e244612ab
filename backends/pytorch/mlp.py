"""The squared-ReLU MLP, whose inner activation is the widest array of a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backends.pytorch import runtime


def squared_relu_mlp(x, w_in, w_out):
    """relu(x @ w_in.T)^2 @ w_out.T (So et al. 2021, arXiv:2109.08668) for x (..., C), w_in (F, C) and w_out (C', F)."""
    if not runtime.has_kernel("mlp", x) or any(size % 8 for size in (*w_in.shape, *w_out.shape)):
        return F.linear(F.relu(F.linear(x, w_in)).square(), w_out)
    return _product(x.reshape(-1, x.shape[-1]), w_in, w_out).reshape(*x.shape[:-1], w_out.shape[0])


@runtime.one_node
def _product(x, w_in, w_out):
    return _SquaredReluMLP.apply(x, w_in, w_out)


class _SquaredReluMLP(torch.autograd.Function):
    """Keeps the activation alone: what it was the square of is its root."""

    @staticmethod
    def forward(ctx, x, w_in, w_out):
        activation = torch.ops.autoresearch.squared_relu_product(x, w_in)
        ctx.save_for_backward(x, w_in, w_out, activation)
        return activation @ w_out.T

    @staticmethod
    def backward(ctx, upstream):
        x, w_in, w_out, activation = ctx.saved_tensors
        inner = torch.ops.autoresearch.squared_relu_gradient(upstream, w_out, activation)
        return inner @ w_in, inner.T @ x, upstream.T @ activation
