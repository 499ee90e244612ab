"""One experiment: train a small GPT for the time budget, then score it in bits per byte.

This is the only file an experiment edits: model, optimizer, schedule, hyperparameters and loop are all here, written
once for every backend. Arrays are reached through `nn` and `ops` (python -m backends.surface lists them); on arrays
themselves only operators, .shape, .ndim, .dtype, .reshape and basic slicing. Usage: python train.py
"""

import math

import numpy as np

import backends
import calibration
import prepare

defaults = calibration.defaults()  # sizes that suit this device, as `python -m calibration` measured it
backend = backends.load(calibrated=defaults.calibrated)
nn, ops = backend.nn, backend.ops

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters: edit these directly
# ---------------------------------------------------------------------------------------------------------------------

# Model
DEPTH = defaults.depth  # transformer layers; width follows
ASPECT_RATIO = 64  # width per layer, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128
KV_RATIO = 1  # query heads that share one key and value head
WINDOW_PATTERN = defaults.window_pattern  # "SSSL", by layer: S = SHORT_WINDOW, L = full; the last is always full
SHORT_WINDOW = prepare.MAX_SEQ_LEN // 2
ROPE_BASE = 10000
SOFTCAP = 15  # logits stay within ± this
VALUE_GATE_CHANNELS = 32  # channels of the residual stream that gate the value embeddings

# Batches
TOTAL_BATCH_SIZE = defaults.total_batch_size  # tokens per optimizer step
# Rows of MAX_SEQ_LEN tokens per forward and backward pass.
DEVICE_BATCH_SIZE = max(1, min(defaults.device_batch_size, TOTAL_BATCH_SIZE // prepare.MAX_SEQ_LEN))

# Optimizer
MATRIX_LR = 0.04  # Muon, every matrix but embeddings and head
EMBEDDING_LR = 0.6  # AdamW, token and value embeddings
UNEMBEDDING_LR = 0.004  # AdamW, the head
SCALAR_LR = 0.5  # AdamW, the per-layer scalars
WEIGHT_DECAY = 0.2  # Muon, cautious, falls to zero over the run
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
MUON_BETA2 = 0.95
MUON_STEPS = 5  # Polar Express iterations, at most 5
MOMENTUM = (0.85, 0.95)  # Muon, at the start and after MOMENTUM_STEPS
MOMENTUM_STEPS = 300

# Schedule, in fractions of the time budget
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = 0.5
FINAL_LR_FRACTION = 0.0

SEED = prepare.seed()  # of the initial weights

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def model_width(depth):
    return -(-depth * ASPECT_RATIO // HEAD_DIM) * HEAD_DIM


def kv_heads(width):
    return max(1, width // HEAD_DIM // KV_RATIO)


def has_value_embedding(layer, depth):
    """Every other layer, the last included."""
    return layer % 2 == (depth - 1) % 2


def window_sizes(depth):
    """Each layer's attention window in tokens; None is full."""
    sizes = [{"S": SHORT_WINDOW, "L": None}[WINDOW_PATTERN[i % len(WINDOW_PATTERN)]] for i in range(depth)]
    return sizes[:-1] + [None]


class Attention(nn.Module):
    """Rotary, QK-normed, windowed attention; value embeddings are mixed in through a gate per head."""

    def __init__(self, width, window, gated):
        super().__init__()
        self.window = window
        self.n_head = width // HEAD_DIM
        self.n_kv_head = kv_heads(width)
        self.c_q = nn.Linear(width, self.n_head * HEAD_DIM)
        self.c_k = nn.Linear(width, self.n_kv_head * HEAD_DIM)
        self.c_v = nn.Linear(width, self.n_kv_head * HEAD_DIM)
        self.c_proj = nn.Linear(self.n_head * HEAD_DIM, width)
        if gated:
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, self.n_kv_head)

    @ops.fusable
    def qkv(self, x):
        """Queries, keys and values by head; the first two are rotated, then normalised (arXiv:2010.04245)."""
        B, T, _ = x.shape
        q = self.c_q(x).reshape(B, T, self.n_head, HEAD_DIM)
        k = self.c_k(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        v = self.c_v(x).reshape(B, T, self.n_kv_head, HEAD_DIM)
        return ops.rms_norm(ops.rope(q, ROPE_BASE)), ops.rms_norm(ops.rope(k, ROPE_BASE)), v

    def forward(self, x, value_embedding):
        B, T, _ = x.shape
        q, k, v = self.qkv(x)
        if value_embedding is not None:  # ResFormer (arXiv:2410.17897); the gate starts at 1
            gate = 2 * ops.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, n_kv_head)
            v = v + ops.expand_dims(gate, axis=-1) * value_embedding.reshape(B, T, self.n_kv_head, HEAD_DIM)
        y = ops.attention(q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, self.n_head * HEAD_DIM))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    @ops.fusable
    def forward(self, x):
        return self.c_proj(ops.square(ops.relu(self.c_fc(x))))  # the squared ReLU (arXiv:2109.08668)


class Block(nn.Module):
    def __init__(self, width, window, gated):
        super().__init__()
        self.attn = Attention(width, window, gated)
        self.mlp = MLP(width)

    def forward(self, x, value_embedding):
        x = x + self.attn(ops.rms_norm(x), value_embedding)
        return x + self.mlp(ops.rms_norm(x))


class GPT(nn.Module):
    def __init__(self, depth, vocab_size):
        super().__init__()
        width, windows = model_width(depth), window_sizes(depth)
        gated = [has_value_embedding(i, depth) for i in range(depth)]
        self.wte = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList([Block(width, windows[i], gated[i]) for i in range(depth)])
        self.value_embeds = nn.ModuleDict(
            {f"layer{i}": nn.Embedding(vocab_size, kv_heads(width) * HEAD_DIM) for i in range(depth) if gated[i]}
        )
        self.resid_lambdas = nn.Parameter((depth,))  # how much of the residual stream each layer receives,
        self.x0_lambdas = nn.Parameter((depth,))  # and how much of the normalised token embedding
        self.lm_head = nn.Linear(width, vocab_size)

    def hidden(self, tokens):
        """What the head reads: (B, T, width) for tokens (B, T)."""
        x = x0 = ops.rms_norm(self.wte(tokens))
        resid_lambdas, x0_lambdas = self.resid_lambdas, self.x0_lambdas
        for i, block in enumerate(self.blocks):
            x = resid_lambdas[i] * x + x0_lambdas[i] * x0
            layer = f"layer{i}"
            x = block(x, self.value_embeds[layer](tokens) if layer in self.value_embeds else None)
        return ops.rms_norm(x)

    @ops.fusable
    def logits(self, hidden):
        """The head, in training and in evaluation: float32 (N, vocabulary) for N tokens, within ± SOFTCAP."""
        return SOFTCAP * ops.tanh(ops.float32(self.lm_head(hidden)) / SOFTCAP)


@ops.fusable
def token_losses(logits, targets):
    """Nats of each target (N,) under logits (N, vocabulary)."""
    right = ops.take_along_axis(logits, ops.expand_dims(targets, axis=-1), axis=-1)
    return ops.logsumexp(logits, axis=-1) - ops.squeeze(right, axis=-1)


def training_loss(model, x, y):
    """The mean over tokens, for x and y (B, T); head and losses see some of the tokens at a time."""
    return ops.mean_loss(model.logits, token_losses, model.hidden(x), y)


def initial_weights(shapes, seed):
    """Every parameter by name, float32: the same bytes on every machine, whatever other parameters there are."""
    bound = 3**0.5 * model_width(DEPTH) ** -0.5  # uniform within ± bound has standard deviation width^-0.5

    def draw(name, shape):
        rng = np.random.default_rng([seed, *name.encode()])
        if name == "wte.weight":
            return rng.standard_normal(shape, np.float32)
        if name == "lm_head.weight":
            return 0.001 * rng.standard_normal(shape, np.float32)
        if name == "resid_lambdas":
            return np.ones(shape, np.float32)
        if name == "x0_lambdas":
            return np.full(shape, 0.1, np.float32)
        if name.endswith(("c_proj.weight", "ve_gate.weight")):
            return np.zeros(shape, np.float32)
        return bound * (2 * rng.random(shape, np.float32) - 1)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def flops_per_token(model, shapes):
    """Floating-point operations per trained token, forward and backward: 6 per matrix weight, and attention's."""
    matrices = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and name != "wte.weight" and not name.startswith("value_embeds")
    )
    T = prepare.MAX_SEQ_LEN
    attention = sum(12 * model_width(DEPTH) * min(block.attn.window or T, T) for block in model.blocks)
    return 6 * matrices + attention


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: pure update rules on float32 arrays, (param, grad, state, hyper) -> (param, state)
# ---------------------------------------------------------------------------------------------------------------------


def adamw_init(param):
    return dict(mean=ops.zeros_like(param), square=ops.zeros_like(param), step=ops.zeros(()))


def adamw_update(param, grad, state, hyper):
    """AdamW (arXiv:1711.05101), bias-corrected."""
    step = state["step"] + 1
    mean = hyper["beta1"] * state["mean"] + (1 - hyper["beta1"]) * grad
    square = hyper["beta2"] * state["square"] + (1 - hyper["beta2"]) * ops.square(grad)
    rate = hyper["lr"] / (1 - ops.pow(hyper["beta1"], step))
    deviation = ops.sqrt(square / (1 - ops.pow(hyper["beta2"], step))) + hyper["eps"]
    param = param * (1 - hyper["lr"] * hyper["weight_decay"]) - rate * mean / deviation
    return param, dict(mean=mean, square=square, step=step)


# Polar Express (arXiv:2505.16932): quintic iterations towards the orthogonal factor, optimal for 5 steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x):
    """The nearest semi-orthogonal matrices to x (..., m, n), in the compute precision."""
    norm = ops.sqrt(ops.sum(ops.square(x), axis=(-2, -1), keepdims=True))
    x = ops.compute(x / (norm * 1.02 + 1e-6))
    tall = x.shape[-2] > x.shape[-1]
    x = ops.matrix_transpose(x) if tall else x  # the smaller Gram matrix
    for a, b, c in POLAR_EXPRESS[:MUON_STEPS]:
        gram = x @ ops.matrix_transpose(x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return ops.matrix_transpose(x) if tall else x


def muon_axis(shape):
    """The axis the second moment is averaged over, the shorter one: each place of the longer one keeps its own."""
    return -1 if shape[-2] >= shape[-1] else -2


def muon_init(param):
    return dict(
        momentum=ops.zeros_like(param),
        square=ops.zeros_like(ops.mean(param, axis=muon_axis(param.shape), keepdims=True)),
    )


def muon_update(param, grad, state, hyper):
    """Muon (Jordan et al. 2024) with Nesterov momentum, NorMuon's variance reduction (arXiv:2510.05491) and cautious
    weight decay (arXiv:2510.12402), for a stack of matrices (k, m, n)."""
    momentum = hyper["momentum"] * state["momentum"] + (1 - hyper["momentum"]) * grad
    update = orthogonalize((1 - hyper["momentum"]) * grad + hyper["momentum"] * momentum)

    # NorMuon: even out the neurons' step sizes, then restore the update's norm.
    update = ops.float32(update)
    axis = muon_axis(param.shape)
    mean_square = ops.mean(ops.square(update), axis=axis, keepdims=True)
    square = hyper["beta2"] * state["square"] + (1 - hyper["beta2"]) * mean_square
    scale = ops.rsqrt(ops.maximum(square, 1e-10))
    norm = ops.sqrt(ops.sum(mean_square, axis=(-2, -1), keepdims=True))
    scaled_norm = ops.sqrt(ops.sum(mean_square * ops.square(scale), axis=(-2, -1), keepdims=True))
    update = update * (scale * norm / ops.maximum(scaled_norm, 1e-10))

    # Tall matrices get larger steps; decay only weights that the update shrinks anyway.
    lr = hyper["lr"] * max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
    agree = ops.where(update * param >= 0, param, 0.0)
    return param - lr * (update + hyper["weight_decay"] * agree), dict(momentum=momentum, square=square)


def optimizer_groups(shapes):
    """Who is updated by what, and how fast: Muon the matrices, AdamW the rest. A parameter in no group is an error.
    AdamW's rates scale with width^-0.5; they were tuned at 768."""
    width_scale = (model_width(DEPTH) / 768) ** -0.5
    embeddings = [name for name in shapes if name == "wte.weight" or name.startswith("value_embeds.")]
    apart = (*embeddings, "lm_head.weight")
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name not in apart]

    def adamw(names, lr, betas=ADAM_BETAS, eps=1e-10):
        hyper = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=0.0)
        return dict(names=names, init=adamw_init, update=adamw_update, stack=False, hyper=hyper)

    muon = dict(lr=MATRIX_LR, momentum=MOMENTUM[0], beta2=MUON_BETA2, weight_decay=WEIGHT_DECAY)
    return [
        dict(names=matrices, init=muon_init, update=muon_update, stack=True, hyper=muon),
        adamw(["lm_head.weight"], UNEMBEDDING_LR * width_scale),
        adamw(embeddings, EMBEDDING_LR * width_scale),
        # Their gradients start at zero, of which bfloat16 makes some 1e-6, and grow to 1e-3 and more: a smaller eps
        # would turn that noise into a first step of full size, up or down by chance.
        adamw(["resid_lambdas"], SCALAR_LR * 0.01, eps=1e-4),
        adamw(["x0_lambdas"], SCALAR_LR, X0_BETAS, eps=1e-4),
    ]


def schedule(groups, progress, step):
    """Each group's hyperparameters at this step, for `progress` from 0 to 1 through the time budget."""
    multiplier = 1.0
    if progress < WARMUP_RATIO:
        multiplier = progress / WARMUP_RATIO
    elif progress > 1 - WARMDOWN_RATIO:
        cooldown = (1 - progress) / WARMDOWN_RATIO
        multiplier = cooldown + (1 - cooldown) * FINAL_LR_FRACTION
    warm = min(step / MOMENTUM_STEPS, 1)
    hypers = []
    for group in groups:
        hyper = dict(group["hyper"], lr=group["hyper"]["lr"] * multiplier)
        if "momentum" in hyper:
            hyper["momentum"] = (1 - warm) * MOMENTUM[0] + warm * MOMENTUM[1]
            hyper["weight_decay"] = WEIGHT_DECAY * (1 - progress)
        hypers.append(hyper)
    return hypers


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def main():
    data = prepare.open_data()
    tokens_per_pass = DEVICE_BATCH_SIZE * prepare.MAX_SEQ_LEN
    accumulation, rest = divmod(TOTAL_BATCH_SIZE, tokens_per_pass)
    if rest or not accumulation:
        raise SystemExit(
            f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE "
            f"{DEVICE_BATCH_SIZE} x {prepare.MAX_SEQ_LEN} tokens: change one of them in train.py"
        )
    print(f"device {backend.device.name} | backend {backend.name} | data {data.name}")
    for note in (*defaults.notes, *backend.device.notes):
        print(note)

    loader = prepare.Loader(data, DEVICE_BATCH_SIZE)  # packs rows in the background from here on
    model = GPT(DEPTH, data.vocab_size)
    shapes = backend.shapes(model)
    backend.set_weights(model, initial_weights(shapes, SEED))
    groups = optimizer_groups(shapes)
    trainer = backend.Trainer(model, training_loss, groups)
    flops = flops_per_token(model, shapes)
    num_params = sum(math.prod(shape) for shape in shapes.values())
    print(
        f"depth {DEPTH} | width {model_width(DEPTH)} | {num_params / 1e6:.1f} M parameters | "
        f"{flops:.3g} FLOP per token | {accumulation} x {DEVICE_BATCH_SIZE} rows per step"
    )

    throwaway = np.zeros((DEVICE_BATCH_SIZE, prepare.MAX_SEQ_LEN), np.int32)
    trainer.warm_up(throwaway, throwaway)  # compiles, before the clock starts

    clock = prepare.Clock(backend, model, loader)
    smooth_loss = None
    while not clock.finished:
        progress, loss = clock.progress, 0.0
        for _ in range(accumulation):
            x, y = next(loader)
            loss = loss + trainer.backward(x, y, 1 / accumulation) / accumulation
        trainer.step(schedule(groups, progress, clock.steps))
        seconds = clock.tick(loss)  # waits for the step before: the device has one to do while the next is prepared
        smooth_loss = clock.loss if smooth_loss is None else 0.9 * smooth_loss + 0.1 * clock.loss
        print(
            f"\rstep {clock.steps:05d} ({100 * clock.progress:.1f}%) | loss {smooth_loss:.4f} | "
            f"{TOTAL_BATCH_SIZE / seconds:,.0f} tokens/s | epoch {loader.epoch}    ",
            end="",
            flush=True,
        )
    print()

    prepare.evaluate_bpb(backend, model, data, batch_size=min(DEVICE_BATCH_SIZE, 8), clock=clock)
    prepare.report(clock, num_params=num_params, flops_per_token=flops, depth=DEPTH)


if __name__ == "__main__":
    main()
