"""A transformer small enough for any machine's tests, written against the surface alone, and plain update rules.

It has what the surface has to carry: grouped-query attention, a window, ModuleList, ModuleDict, bare parameters, an
untied head.
"""

from __future__ import annotations

import numpy as np

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, WINDOW, SOFTCAP = 97, 64, 2, 4, 2, 5, 15.0

NAMES = [
    "scale",
    "wte.weight",
    *(
        f"blocks.{i}.{name}.weight"
        for i in range(LAYERS)
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "c_fc", "c_proj")
    ),
    "value_embeds.layer_1.weight",
    "lm_head.weight",
]


def build(backend, seed: int = 1, deviation: float = 0.1):
    """The model on `backend`, its weights normal from `seed`: the same on every backend."""
    nn, ops = backend.nn, backend.ops

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_q = nn.Linear(WIDTH, WIDTH)
            self.c_k = nn.Linear(WIDTH, WIDTH * KV_HEADS // HEADS)
            self.c_v = nn.Linear(WIDTH, WIDTH * KV_HEADS // HEADS)
            self.c_proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, value_embedding, window):
            rows, length, _ = x.shape
            q = self.c_q(x).reshape(rows, length, HEADS, -1)
            k = self.c_k(x).reshape(rows, length, KV_HEADS, -1)
            v = self.c_v(x)
            if value_embedding is not None:
                v = v + value_embedding
            v = v.reshape(rows, length, KV_HEADS, -1)
            q, k = (ops.rms_norm(ops.rope(x, 10000.0)) for x in (q, k))
            return self.c_proj(ops.attention(q, k, v, window).reshape(rows, length, WIDTH))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.c_fc = nn.Linear(WIDTH, 2 * WIDTH)
            self.c_proj = nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x, value_embedding, window):
            x = x + self.attn(ops.rms_norm(x), value_embedding, window)
            return x + self.c_proj(ops.square(ops.relu(self.c_fc(ops.rms_norm(x)))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
            self.value_embeds = nn.ModuleDict({"layer_1": nn.Embedding(VOCABULARY, WIDTH * KV_HEADS // HEADS)})
            self.lm_head = nn.Linear(WIDTH, VOCABULARY)
            self.scale = nn.Parameter((LAYERS,))

        def hidden(self, tokens):
            x = ops.rms_norm(self.wte(tokens))
            for i, block in enumerate(self.blocks):
                name = f"layer_{i}"
                value_embedding = self.value_embeds[name](tokens) if name in self.value_embeds else None
                x = block((1 + self.scale[i]) * x, value_embedding, WINDOW if i == 0 else None)
            return ops.rms_norm(x)

        @ops.fusable
        def logits(self, hidden):
            return SOFTCAP * ops.tanh(ops.float32(self.lm_head(hidden)) / SOFTCAP)

    model = Model()
    rng = np.random.default_rng(seed)
    shapes = backend.shapes(model)
    backend.set_weights(
        model, {name: deviation * rng.standard_normal(shapes[name], dtype=np.float32) for name in sorted(shapes)}
    )
    return model


def nats(ops):
    """The loss of each token, as `train.py` has it."""

    @ops.fusable
    def token_losses(logits, targets):
        right = ops.take_along_axis(logits, ops.expand_dims(targets, axis=-1), axis=-1)
        return ops.logsumexp(logits, axis=-1) - ops.squeeze(right, axis=-1)

    return token_losses


def loss(backend):
    """The model's training loss, for a Trainer."""
    token_losses = nats(backend.ops)
    return lambda model, x, y: backend.ops.mean_loss(model.logits, token_losses, model.hidden(x), y)


def batch(rows: int = 4, length: int = 12, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int32 (rows, length)."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1), dtype=np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def descent(names, stack: bool = False, **hyper) -> dict:
    """An optimizer group of plain gradient descent."""
    return dict(
        names=list(names),
        init=lambda param: {},
        stack=stack,
        hyper={"lr": 0.1, **hyper},
        update=lambda param, grad, state, hyper: (param - hyper["lr"] * grad, state),
    )


def adam(backend, names, stack: bool = False) -> dict:
    """An optimizer group of Adam without bias correction, its state two moments and a count of steps."""
    ops = backend.ops

    def init(param):
        return {"mean": ops.zeros_like(param), "square": ops.zeros_like(param), "steps": ops.zeros((1,))}

    def update(param, grad, state, hyper):
        mean = state["mean"] + (1 - hyper["beta1"]) * (grad - state["mean"])
        square = state["square"] + (1 - hyper["beta2"]) * (ops.square(grad) - state["square"])
        param = param - hyper["lr"] * mean / (ops.sqrt(square) + 1e-4)
        return param, {"mean": mean, "square": square, "steps": state["steps"] + 1}

    return dict(names=list(names), init=init, update=update, stack=stack, hyper=dict(lr=0.01, beta1=0.9, beta2=0.99))


def trainer(backend, model, optimizer: list[dict] | None = None):
    """A Trainer of `model`: with Adam on matrices, stacked, and descent on `scale`, unless told otherwise."""
    matrices = [name for name in NAMES if name != "scale"]
    optimizer = optimizer or [adam(backend, matrices, stack=True), descent(["scale"])]
    return backend.Trainer(model, loss(backend), optimizer)


def schedule(optimizer: list[dict], factor: float = 1.0) -> list[dict]:
    """The groups' own hyper values, learning rates multiplied by `factor`."""
    return [
        {name: value * factor if name == "lr" else value for name, value in group["hyper"].items()}
        for group in optimizer
    ]
