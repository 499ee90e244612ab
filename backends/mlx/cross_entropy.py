"""Cross-entropy of a linear head over chunks of tokens, so that the logits of a whole batch are never held at once.

The gradient is made in the forward pass, while a chunk's logits are there, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989): the head is multiplied once, not again in the backward pass.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from backends.mlx.attention import after

# Logits of a chunk: 32 MiB in float32, 1024 tokens of vocabulary 8192. A device with more memory takes larger ones,
# which keep it busier (on an H200 2^25 took four fifths of the time of 2^23).
SMALLEST_CHUNK, SHARE_OF_MEMORY, BYTES_PER_LOGIT = 2**23, 256, 12


def by_memory(memory: int):
    """`softcapped_cross_entropy` for a device of so many bytes."""
    logits_at_once = max(SMALLEST_CHUNK, memory // SHARE_OF_MEMORY // BYTES_PER_LOGIT)

    def softcapped_cross_entropy(hidden, weight, targets, softcap=None, reduction="mean"):
        """Nats of targets (B, T), from hidden (B, T, C) and weight (V, C). See `backends/interface.py`."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction {reduction!r}: choose "mean", "sum" or "none"')
        rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        size = max(1, logits_at_once // len(weight))
        chunks = [slice(start, start + size) for start in range(0, len(labels), size)]
        if reduction == "none":  # each token's weight is known only in the backward pass: the head is multiplied again
            losses = mx.checkpoint(lambda h, w, t: _token_losses(_capped(h @ w.T, softcap), t))
            return mx.concatenate([losses(rows[c], weight, labels[c]) for c in chunks]).reshape(targets.shape)
        total = _summed(softcap, size)(rows, weight, labels)[0]
        return total / len(labels) if reduction == "mean" else total

    return softcapped_cross_entropy


def _capped(logits, softcap: float | None):
    logits = logits.astype(mx.float32)
    return logits if softcap is None else softcap * mx.tanh(logits / softcap)


def _token_losses(logits, targets):
    wanted = mx.stop_gradient(targets)[:, None]  # a checkpoint differentiates by all that it is given
    return mx.logsumexp(logits, axis=1) - mx.take_along_axis(logits, wanted, axis=1)[:, 0]


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
