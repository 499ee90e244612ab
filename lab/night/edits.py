"""Changes of train.py that are more than a number: a few that are known elsewhere to help some models.

Each is a replacement of text, and applies only where all of that text stands, once: not where a train.py was changed in
that place. They keep to what every backend offers (backends/surface.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from backends import surface

# A paragraph for each: "# name: why", and its places as a diff has them, with "@" between one and the next.
# Only what is written here has to stand there: "-ROPE_BASE =" fits any number behind it.
TEXT = '''
# gelu: GELU in the MLP: smooth, and linear for large inputs
-        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))  # the squared ReLU (arXiv:2109.08668)
+        return self.c_proj(ops.gelu(self.c_fc(x)))

# swiglu: a gated MLP (SwiGLU, arXiv:2002.05202) with as many weights
-        self.c_fc = nn.Linear(width, 4 * width)
-        self.c_proj = nn.Linear(4 * width, width)
+        hidden = 64 * round(8 / 3 * width / 64)  # three matrices are then as large as two at 4
+        self.c_gate = nn.Linear(width, hidden)
+        self.c_fc = nn.Linear(width, hidden)
+        self.c_proj = nn.Linear(hidden, width)
@
-        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))  # the squared ReLU (arXiv:2109.08668)
+        return self.c_proj(ops.silu(self.c_gate(x)) * self.c_fc(x))

# MLP width: its width as a hyperparameter, half as much again
+MLP_RATIO = 6  # hidden channels of the MLP per channel [2 .. 12]
 ROPE_BASE =
@
-nn.Linear(width, 4 * width)
+nn.Linear(width, MLP_RATIO * width)
@
-nn.Linear(4 * width, width)
+nn.Linear(MLP_RATIO * width, width)

# parallel: attention and MLP side by side, from one norm (GPT-J): less to wait for
-        x = x + self.attn(ops.rms_norm(x), value_embedding)
-        return x + self.mlp(ops.rms_norm(x))
+        y = ops.rms_norm(x)
+        return x + self.attn(y, value_embedding) + self.mlp(y)

# value embeddings: in every layer, not in every other
-    """Every other layer, the last included."""
-    return layer % 2 == (depth - 1) % 2
+    """Every layer."""
+    return True

# QK gain: a learnt gain per head: QK-norm alone bounds how sharply a head can attend
+        self.qk_gain = nn.Parameter((self.n_head,))
         if gated:
             self.ve_gate
@
-ops.attention(q, k, v, self.window)
+ops.attention(ops.expand_dims(self.qk_gain, axis=-1) * q, k, v, self.window)
@
-        if name == "resid_lambdas":
+        if name == "resid_lambdas" or name.endswith("qk_gain"):
             return np.ones(shape, np.float32)
@
         adamw(["resid_lambdas"], SCALAR_LR * 0.01, eps=1e-4),
+        adamw([name for name in shapes if name.endswith("qk_gain")], SCALAR_LR * 0.01, eps=1e-4),

# smear: each position gets a learnt share of the token before it
         self.wte = nn.Embedding(vocab_size, width)
+        self.smear_gate = nn.Parameter((width,))
@
-        x = x0 = ops.rms_norm(self.wte(tokens))
+        x0 = ops.rms_norm(self.wte(tokens))
+        previous = ops.concat([ops.zeros_like(x0[:, :1]), x0[:, :-1]], axis=1)  # the first has none
+        x = x0 + ops.sigmoid(self.smear_gate) * previous
@
         if name == "resid_lambdas":
             return np.ones(shape, np.float32)
+        if name == "smear_gate":
+            return np.full(shape, -2.0, np.float32)  # a share of an eighth, at first
@
         adamw(["resid_lambdas"], SCALAR_LR * 0.01, eps=1e-4),
+        adamw(["smear_gate"], SCALAR_LR * 0.01, eps=1e-4),

# 1 - sqrt: the rates fall fast at first and slowly at the end (arXiv:2405.18392)
-        cooldown = (1 - progress) / WARMDOWN_RATIO
+        cooldown = 1 - ((progress - 1 + WARMDOWN_RATIO) / WARMDOWN_RATIO) ** 0.5

# momentum: Muon's momentum falls again while the rates do: the end averages less
-            hyper["momentum"] = (1 - warm) * MOMENTUM[0] + warm * MOMENTUM[1]
+            high = min(warm, (1 - progress) / max(WARMDOWN_RATIO, 1e-3))
+            hyper["momentum"] = (1 - high) * MOMENTUM[0] + high * MOMENTUM[1]

# steady decay: weight decay stays, as the rate it is multiplied with falls anyway
-            hyper["weight_decay"] = WEIGHT_DECAY * (1 - progress)
+            hyper["weight_decay"] = WEIGHT_DECAY
'''


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


def _edit(paragraph: str) -> Edit:
    head, *lines = paragraph.split("\n")
    name, _, why = head.removeprefix("# ").partition(": ")
    places = [place.strip("\n").split("\n") for place in "\n".join(lines).split("@\n")]
    return Edit(name, why, tuple((_side(place, "-"), _side(place, "+")) for place in places))


def _side(place: list[str], sign: str) -> str:
    return "\n".join(line[1:] for line in place if line[0] in (sign, " "))


LIBRARY = tuple(map(_edit, TEXT.strip("\n").split("\n\n")))
