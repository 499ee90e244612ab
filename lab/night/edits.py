"""Changes of train.py that are more than a number: a few that are known elsewhere to help some models.

Each is a replacement of text, and applies only where all of that text stands, once: not where a train.py was changed in
that place. They keep to what every backend offers (backends/surface.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from backends import surface


@dataclass(frozen=True)
class Edit:
    """
    Attributes:
        name: one word or two. why: a line.
        swaps: (what stands there, what is to), in any order.
    """

    name: str
    why: str
    swaps: tuple[tuple[str, str], ...]

    def apply(self, source: str) -> str | None:
        """The source, edited; None if it does not apply there."""
        for old, new in self.swaps:
            if source.count(old) != 1:
                return None
            source = source.replace(old, new)
        try:
            return None if surface.check(source) else source
        except (SyntaxError, ValueError):
            return None


MLP_FORWARD = "        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))  # the squared ReLU (arXiv:2109.08668)\n"
FIRST_WEIGHTS = '        if name == "resid_lambdas":\n            return np.ones(shape, np.float32)\n'
SLOW_SCALARS = '        adamw(["resid_lambdas"], SCALAR_LR * 0.01, eps=1e-4),\n'

LIBRARY = (
    Edit(
        "gelu",
        "GELU in the MLP: smooth, and linear for large inputs",
        ((MLP_FORWARD, "        return self.c_proj(ops.gelu(self.c_fc(x)))\n"),),
    ),
    Edit(
        "swiglu",
        "a gated MLP (SwiGLU, arXiv:2002.05202) with as many weights",
        (
            (
                "        self.c_fc = nn.Linear(width, 4 * width)\n        self.c_proj = nn.Linear(4 * width, width)\n",
                "        hidden = 64 * round(8 / 3 * width / 64)  # three matrices are then as large as two at 4\n"
                "        self.c_gate = nn.Linear(width, hidden)\n        self.c_fc = nn.Linear(width, hidden)\n"
                "        self.c_proj = nn.Linear(hidden, width)\n",
            ),
            (MLP_FORWARD, "        return self.c_proj(ops.silu(self.c_gate(x)) * self.c_fc(x))\n"),
        ),
    ),
    Edit(
        "MLP width",
        "its width as a hyperparameter, half as much again",
        (
            (
                "ROPE_BASE = ",
                "MLP_RATIO = 6  # hidden channels of the MLP per channel [2 .. 12]\nROPE_BASE = ",
            ),
            ("nn.Linear(width, 4 * width)", "nn.Linear(width, MLP_RATIO * width)"),
            ("nn.Linear(4 * width, width)", "nn.Linear(MLP_RATIO * width, width)"),
        ),
    ),
    Edit(
        "parallel",
        "attention and MLP side by side, from one norm (GPT-J): less to wait for",
        (
            (
                "        x = x + self.attn(ops.rms_norm(x), value_embedding)\n"
                "        return x + self.mlp(ops.rms_norm(x))\n",
                "        y = ops.rms_norm(x)\n        return x + self.attn(y, value_embedding) + self.mlp(y)\n",
            ),
        ),
    ),
    Edit(
        "value embeddings",
        "in every layer, not in every other",
        (
            (
                '    """Every other layer, the last included."""\n    return layer % 2 == (depth - 1) % 2\n',
                '    """Every layer."""\n    return True\n',
            ),
        ),
    ),
    Edit(
        "QK gain",
        "a learnt gain per head: QK-norm alone bounds how sharply a head can attend",
        (
            (
                "        if gated:\n            self.ve_gate",
                "        self.qk_gain = nn.Parameter((self.n_head,))\n        if gated:\n            self.ve_gate",
            ),
            (
                "ops.attention(q, k, v, self.window)",
                "ops.attention(ops.expand_dims(self.qk_gain, axis=-1) * q, k, v, self.window)",
            ),
            (FIRST_WEIGHTS, FIRST_WEIGHTS.replace('"resid_lambdas"', '"resid_lambdas" or name.endswith("qk_gain")')),
            (
                SLOW_SCALARS,
                SLOW_SCALARS
                + '        adamw([name for name in shapes if name.endswith("qk_gain")], SCALAR_LR * 0.01, eps=1e-4),\n',
            ),
        ),
    ),
    Edit(
        "smear",
        "each position gets a learnt share of the token before it",
        (
            (
                "        self.wte = nn.Embedding(vocab_size, width)\n",
                "        self.wte = nn.Embedding(vocab_size, width)\n"
                "        self.smear_gate = nn.Parameter((width,))\n",
            ),
            (
                "        x = x0 = ops.rms_norm(self.wte(tokens))\n",
                "        x0 = ops.rms_norm(self.wte(tokens))\n"
                "        previous = ops.concat([ops.zeros_like(x0[:, :1]), x0[:, :-1]], axis=1)  # the first has none\n"
                "        x = x0 + ops.sigmoid(self.smear_gate) * previous\n",
            ),
            (
                FIRST_WEIGHTS,
                FIRST_WEIGHTS + '        if name == "smear_gate":\n'
                "            return np.full(shape, -2.0, np.float32)  # a share of an eighth, at first\n",
            ),
            (SLOW_SCALARS, SLOW_SCALARS + '        adamw(["smear_gate"], SCALAR_LR * 0.01, eps=1e-4),\n'),
        ),
    ),
    Edit(
        "1 - sqrt",
        "the rates fall fast at first and slowly at the end (arXiv:2405.18392)",
        (
            (
                "        cooldown = (1 - progress) / WARMDOWN_RATIO\n",
                "        cooldown = 1 - ((progress - 1 + WARMDOWN_RATIO) / WARMDOWN_RATIO) ** 0.5\n",
            ),
        ),
    ),
    Edit(
        "momentum",
        "Muon's momentum falls again while the rates do: the end averages less",
        (
            (
                '            hyper["momentum"] = (1 - warm) * MOMENTUM[0] + warm * MOMENTUM[1]\n',
                "            high = min(warm, (1 - progress) / max(WARMDOWN_RATIO, 1e-3))\n"
                '            hyper["momentum"] = (1 - high) * MOMENTUM[0] + high * MOMENTUM[1]\n',
            ),
        ),
    ),
    Edit(
        "steady decay",
        "weight decay stays, as the rate it is multiplied with falls anyway",
        (
            (
                '            hyper["weight_decay"] = WEIGHT_DECAY * (1 - progress)\n',
                '            hyper["weight_decay"] = WEIGHT_DECAY\n',
            ),
        ),
    ),
)
