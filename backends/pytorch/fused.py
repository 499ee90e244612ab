"""What runs in the place of functions that `train.py` marks with `ops.fusable`: see `backends/fusion.py`.

Each of these gets what to call instead (`plain`), the function's arguments, and its slots in the order in which
`backends/fusable.py` names them. A slot may hold anything: it is looked at before it is relied on. Whether there is a
kernel for such arrays is looked at behind that; without one the same is computed by PyTorch's own operations.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from backends import fusion
from backends.pytorch import nn, runtime
from backends.pytorch.cross_entropy import softcapped_cross_entropy
from backends.pytorch.mlp import squared_relu_mlp
from backends.pytorch.rotary import rotary_qkv


def mark(function, ops):
    return fusion.mark(function, ops, KERNELS, missed, torch.compiler.is_compiling)


def missed(what: str) -> None:
    if runtime.kernels:  # else nothing is lost
        print(what, flush=True)


def mlp(plain, x, c_proj, c_fc):
    if not (_linear(c_proj) and _linear(c_fc)):
        return plain()
    return squared_relu_mlp(x, c_fc.weight, c_proj.weight)


def projection(plain, x, c_q, n_head, head_dim, c_k, n_kv_head, c_v, base):
    layers, heads = (c_q, c_k, c_v), (n_head, n_kv_head, n_kv_head)
    if not all(map(_linear, layers)) or not all(map(_number, (*heads, head_dim, base))):
        return plain()
    if any(layer.weight.shape[0] != number * head_dim for layer, number in zip(layers, heads)):
        return plain()
    return rotary_qkv(x, c_q.weight, c_k.weight, c_v.weight, head_dim, base)


KERNELS = {"mlp": mlp, "projection": projection}


def mean_loss(head, loss, hidden, targets):
    """The mean of `loss(head(hidden), targets)` over tokens: see `backends/interface.py`."""
    unedited = fusion.softcapped_head(head, loss, hidden, torch.compiler.is_compiling())
    if unedited and _linear(unedited[1]):
        return softcapped_cross_entropy(hidden, unedited[1].weight, targets, unedited[0])
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    with torch.no_grad():
        size = max(1, runtime.logits_at_once // head(rows[:1]).shape[-1])

    def summed(hidden, targets):
        losses = loss(head(hidden), targets)
        if losses.shape != targets.shape:
            raise ValueError(
                f"the loss of a chunk of {targets.shape[0]} tokens has shape {tuple(losses.shape)}: give one number "
                "for each token, whose mean is taken over all chunks"
            )
        return losses.float().sum()

    # A chunk's logits are made again in the backward pass, so that no two chunks' are there at once.
    chunks = zip(rows.split(size), labels.split(size))
    return sum(checkpoint(summed, h, t, use_reentrant=False) for h, t in chunks) / labels.shape[0]


def _number(value) -> bool:
    return isinstance(value, (int, float))


def _linear(layer) -> bool:
    """Whether this is the layer that `train.py` gets from `nn`, and not one of its own."""
    return type(layer) is nn.Linear
