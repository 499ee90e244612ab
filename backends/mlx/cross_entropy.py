"""Cross-entropy of a linear head over chunks of tokens, so that the logits of a whole batch are never held at once.

The gradient is made in the forward pass, while a chunk's logits are there, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989): the head is multiplied once, not again in the backward pass.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from backends import fusion
from backends.mlx import nn
from backends.mlx.attention import after

# Logits of a chunk: 32 MiB in float32, 1024 tokens of vocabulary 8192. A device with more memory takes larger ones,
# which keep it busier (on an H200 2^25 took four fifths of the time of 2^23).
SMALLEST_CHUNK, SHARE_OF_MEMORY, BYTES_PER_LOGIT = 2**23, 256, 12


def by_memory(memory: int):
    """The contract's `mean_loss` for a device with so many bytes of memory."""
    logits_at_once = max(SMALLEST_CHUNK, memory // SHARE_OF_MEMORY // BYTES_PER_LOGIT)

    def mean_loss(head, loss, hidden, targets):
        """The mean of `loss(head(hidden), targets)` over tokens: see `backends/interface.py`."""
        rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        unedited = fusion.softcapped_head(head, loss, hidden)
        if unedited and nn.is_linear(unedited[1]):
            softcap, weight = unedited[0], unedited[1].weight
            return _summed(softcap, max(1, logits_at_once // len(weight)))(rows, weight, labels)[0] / len(labels)
        return _written(head, loss, rows, labels, logits_at_once) / len(labels)

    return mean_loss


def _written(head, loss, rows, labels, logits_at_once: int):
    """The sum of all tokens' losses as `train.py` writes them. A chunk's logits are made again in the backward pass, so
    that no two chunks' are there at once."""
    # A function with a gradient of its own is differentiated by what it is given, and by nothing that it captures: so
    # it is given the parameters that the head reads.
    with nn.read() as parameters:
        vocabulary = head(rows[:1]).shape[-1]
    if captured := nn.captured(head, loss):
        raise ValueError(
            f"{captured} is an array from outside the head and its loss, so its gradient would be lost: they may use "
            "only their arguments and the model's parameters"
        )
    size = max(1, logits_at_once // vocabulary)
    chunks = [slice(start, start + size) for start in range(0, len(labels), size)]

    def of_chunk(hidden, targets, values):
        with nn.substituted(parameters, dict(zip(parameters, values))):
            losses = loss(head(hidden), targets)
        if losses.shape != targets.shape:
            raise ValueError(
                f"the loss of a chunk of {len(targets)} tokens has shape {losses.shape}: give one number for each "
                "token, whose mean is taken over all chunks"
            )
        return mx.sum(losses.astype(mx.float32))

    @mx.custom_function
    def summed(rows, labels, *values):
        total = mx.zeros(())
        for chunk in chunks:
            total = total + of_chunk(after(rows[chunk], [total]), labels[chunk], values)
        return total

    @summed.vjp
    def gradients(inputs, upstream, _):
        rows, labels, *values = inputs
        to_rows, to_values = [], [mx.zeros(value.shape) for value in values]
        for chunk in chunks:
            targets = labels[chunk]
            hidden = after(rows[chunk], [*to_rows[-1:], *to_values])
            _, (to_hidden, *further) = mx.vjp(
                lambda hidden, *values: of_chunk(hidden, targets, values),
                [hidden, *values],
                [upstream],
            )
            to_rows.append(to_hidden)
            to_values = [total + more.astype(mx.float32) for total, more in zip(to_values, further)]
        to_values = [total.astype(value.dtype) for total, value in zip(to_values, values)]
        return mx.concatenate(to_rows), mx.zeros_like(labels), *to_values

    return summed(rows, labels, *(parameter.value for parameter in parameters.values()))


def _capped(logits, softcap: float | None):
    logits = logits.astype(mx.float32)
    return logits if softcap is None else softcap * mx.tanh(logits / softcap)


@cache
def _summed(softcap: float | None, size: int):
    """f(hidden (N, C), weight (V, C), targets (N,)) -> the sum of losses, and its gradients to hidden and weight.

    These stay unnormalised until the backward pass: a token's share of a mean is about 1/N, which float16 would lose.
    """

    @mx.custom_function
    def summed(hidden, weight, targets):
        total, to_hidden, to_weight = mx.zeros(()), [], mx.zeros(weight.shape)
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            h, t = after(hidden[chunk], [*to_hidden[-1:], to_weight, total]), targets[chunk]
            logits = h @ weight.T
            capped = _capped(logits, softcap)
            normaliser = mx.logsumexp(capped, axis=1, keepdims=True)
            total = total + mx.sum(normaliser) - mx.sum(mx.take_along_axis(capped, t[:, None], axis=1))
            # Compared, not scattered, so that all of it can be one kernel.
            errors = mx.exp(capped - normaliser) - (mx.arange(len(weight)) == t[:, None])
            if softcap is not None:
                errors = errors * (1 - mx.square(capped / softcap))
            errors = errors.astype(h.dtype)
            to_hidden.append(errors @ weight)
            to_weight = to_weight + (errors.T @ h).astype(mx.float32)
        return total, mx.concatenate(to_hidden), to_weight

    @summed.vjp
    def gradients(inputs, cotangents, outputs):
        _, to_hidden, to_weight = outputs
        _, weight, targets = inputs
        upstream = cotangents[0]
        return (
            (to_hidden * upstream).astype(to_hidden.dtype),
            (to_weight * upstream).astype(weight.dtype),
            mx.zeros_like(targets),
        )

    return summed
