"""The computations that a backend may have a kernel for, as `train.py` writes them.

They are never called: `backends/fusion.py` reads them, and a marked function that reads the same is that computation.
What stands here in capitals, and what is read from `self`, are slots: their values are those of train.py.
"""

from __future__ import annotations

from functools import cache

from backends import fusion

ops = object()  # stands for a backend's
HEAD_DIM, ROPE_BASE, SOFTCAP = 128, 10000, 15


class Attention:
    def projection(self, x):
        """QK-norm (Henry et al. 2020, arXiv:2010.04245) after rotation.

        Slots: c_q, n_head, HEAD_DIM, c_k, n_kv_head, c_v, ROPE_BASE.
        """
        B, T, _ = x.shape
        q = self.c_q(x).reshape(B, T, self.n_head, HEAD_DIM)
        k = self.c_k(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        v = self.c_v(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        return ops.rms_norm(ops.rope(q, ROPE_BASE)), ops.rms_norm(ops.rope(k, ROPE_BASE)), v


class MLP:
    def mlp(self, x):
        """The squared ReLU (So et al. 2021, arXiv:2109.08668). Slots: c_proj, c_fc."""
        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))


class Head:
    def head(self, hidden):
        """Bounded logits (Gemma 2, arXiv:2408.00118). Slots: SOFTCAP, lm_head."""
        return SOFTCAP * ops.tanh(ops.float32(self.lm_head(hidden)) / SOFTCAP)

    def unbounded_head(self, hidden):
        """Slots: lm_head."""
        return ops.float32(self.lm_head(hidden))


def cross_entropy(logits, targets):
    """Nats of each target."""
    right = ops.take_along_axis(logits, ops.expand_dims(targets, axis=-1), axis=-1)
    return ops.logsumexp(logits, axis=-1) - ops.squeeze(right, axis=-1)


DEFINITIONS = (Attention.projection, MLP.mlp, Head.head, Head.unbounded_head, cross_entropy)


@cache
def names() -> dict[str, str]:
    """The definitions' names by their digests."""
    return {fusion.read(definition, ops).digest: definition.__name__ for definition in DEFINITIONS}
