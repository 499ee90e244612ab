"""The pieces of train.py against the same mathematics written again in numpy and float64, on every backend.

Whether it is also the original's science, step by step, is for benchmarks/parity.py.
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

import backends
import calibration
from tests.backends.reference import Reference, token_losses
from tests.backends.support import array, kind, numpy, opened

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
TALL, WIDE, SQUARE = (24, 8), (8, 24), (16, 16)
reference = Reference()


@pytest.fixture(params=backends.NAMES)
def train(request, monkeypatch):
    """train.py on each backend present, in float32 and not compiled; at the CPU's size on every machine."""
    return loaded(opened(request.param, "float32"), monkeypatch)


def loaded(backend, monkeypatch):
    monkeypatch.setattr(backends, "load", lambda **_: backend)
    monkeypatch.setattr(calibration, "defaults", lambda: calibration.Defaults(4, 2, 2**13, "SSSL"))
    spec = importlib.util.spec_from_file_location("train_here", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(train, rule, param, grads, hyper, state):
    """`param` and its state (numpy) after one call of an update rule for each gradient."""
    here = lambda x: array(train.backend, x) if np.ndim(x) else train.ops.full((), float(x))  # noqa: E731
    param, state = here(param), {name: here(value) for name, value in state.items()}
    for grad in grads:
        param, state = rule(param, here(grad), state, {name: here(value) for name, value in hyper.items()})
    return numpy(train.backend, param), {name: numpy(train.backend, value) for name, value in state.items()}


def muon(train, param, grads, **hyper):
    """`param` and its state after Muon steps from a state of zeros."""
    shape = list(param.shape)
    shape[-1 if shape[-2] >= shape[-1] else -2] = 1
    state = dict(momentum=np.zeros(param.shape), square=np.zeros(shape))
    return apply(
        train, train.muon_update, param, grads, dict(lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.0) | hyper, state
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(actual, expected, rtol=2e-5):
    """Within rtol of the norm."""
    assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected)


# ---- optimizer ----


def test_adamw(train):
    param, grads = normal(5, 3), normal(4, 5, 3, seed=1)
    grads[0, 0] = 0  # a token that the first batch does not have
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.95, 1e-6, 0.3
    expected, mean, square = param.astype(np.float64), 0.0, 0.0
    for step, grad in enumerate(grads.astype(np.float64), 1):
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
        unbiased = mean / (1 - beta1**step), square / (1 - beta2**step)
        expected = expected - lr * decay * expected - lr * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
    state = dict(mean=np.zeros_like(param), square=np.zeros_like(param), step=np.zeros(()))
    found, state = apply(
        train,
        train.adamw_update,
        param,
        grads,
        dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay),
        state,
    )
    close(found, expected)
    close(state["mean"], mean)
    close(state["square"], square)
    assert state["step"] == len(grads)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_orthogonalize_keeps_singular_vectors_and_makes_singular_values_one(train, shape):
    x = normal(3, *shape) * np.array([1e-6, 1.0, 1e4], np.float32)[:, None, None]
    found = numpy(train.backend, train.orthogonalize(array(train.backend, x))).astype(np.float64)
    left, values, right = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    core = left.swapaxes(1, 2) @ found @ right.swapaxes(1, 2)
    gains = np.diagonal(core, axis1=1, axis2=2)
    usable = (values > 0.02 * values[:, :1]) & (np.arange(3) > 0)[:, None]  # 1e-6 in the divisor damps tiny gradients
    assert usable.sum() > 1.9 * min(shape) - 2
    assert np.abs(gains[usable] - 1).max() < 0.2
    close(found, left @ (gains[..., None] * right), 1e-4)


def polar_express(train, x):
    """By singular values: each goes through the five polynomials, the vectors stay."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / (np.linalg.norm(x, axis=(1, 2))[:, None] * 1.02 + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return left @ (values[..., None] * right)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_muon(train, shape):
    params, grads = 0.1 * normal(2, *shape), normal(3, 2, *shape, seed=3)
    lr, beta, beta2, decay = 0.02, 0.9, 0.95, 0.2
    expected, momentum, square = params.astype(np.float64), 0.0, 0.0
    neurons = 2 if shape[0] >= shape[1] else 1  # the axis averaged over
    for grad in grads.astype(np.float64):
        momentum = beta * momentum + (1 - beta) * grad
        update = polar_express(train, (1 - beta) * grad + beta * momentum)
        square = beta2 * square + (1 - beta2) * (update**2).mean(axis=neurons, keepdims=True)
        evened = update / np.sqrt(square)
        evened *= np.sqrt((update**2).sum(axis=(1, 2), keepdims=True) / (evened**2).sum(axis=(1, 2), keepdims=True))
        assert np.abs(evened).min() > 1e-4 * evened.std()  # the decay hangs on its sign: none is zero but for rounding
        rate = lr * math.sqrt(max(1, shape[0] / shape[1]))
        expected = expected - rate * evened - rate * decay * expected * (np.sign(evened) == np.sign(expected))
    found, state = muon(train, params, grads, lr=lr, momentum=beta, beta2=beta2, weight_decay=decay)
    close(found, expected, 1e-4)
    close(state["momentum"], momentum)
    close(state["square"], square, 1e-4)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_muon_keeps_the_norm_and_evens_out_the_neurons(train, shape):
    param, grad = np.zeros((2, *shape), np.float32), normal(2, *shape, seed=1)
    grad[:, 0] *= 5
    grad[:, :, 0] *= 5
    update = muon(train, param, [grad], lr=1.0)[0] / max(1, shape[0] / shape[1]) ** 0.5
    plain = polar_express(train, 0.19 * grad.astype(np.float64))
    np.testing.assert_allclose(np.linalg.norm(update, axis=(1, 2)), np.linalg.norm(plain, axis=(1, 2)), rtol=1e-5)
    sizes = np.linalg.norm(update, axis=2 if shape[0] > shape[1] else 1)  # of the longer axis's neurons
    np.testing.assert_allclose(sizes / sizes.mean(axis=1, keepdims=True), 1, rtol=1e-4)


def test_muon_decays_only_what_the_update_shrinks(train):
    param, grad, lr, decay = normal(1, *SQUARE), normal(1, *SQUARE, seed=1), 0.02, 0.5
    plain = muon(train, param, [grad], lr=lr)[0].astype(np.float64)
    taken = plain - muon(train, param, [grad], lr=lr, weight_decay=decay)[0]
    shrinks = (param - plain) * param > 0
    assert 0.2 < shrinks.mean() < 0.8
    np.testing.assert_allclose(taken, np.where(shrinks, lr * decay * param, 0), atol=1e-6)


def test_muon_gets_matrices_and_nothing_else(train):
    shapes = {**SHAPES, "blocks.0.attn.gain": (32,), "blocks.0.attn.kernel": (4, 8, 8), "mixer.weight": (32, 32)}
    muon = train.optimizer_groups(shapes)[0]["names"]
    assert sorted(muon) == sorted(["mixer.weight", *(name for name in SHAPES if name.startswith("blocks."))])


def test_optimizer_groups(train):
    shapes = {
        "wte.weight": (512, 256),
        "blocks.0.attn.c_q.weight": (256, 256),
        "blocks.3.mlp.c_fc.weight": (1024, 256),
        "value_embeds.layer1.weight": (512, 256),
        "resid_lambdas": (4,),
        "x0_lambdas": (4,),
        "lm_head.weight": (512, 256),
    }
    groups = train.optimizer_groups(shapes)
    found = {name: (group["stack"], group["hyper"]) for group in groups for name in group["names"]}
    assert sum(len(group["names"]) for group in groups) == len(found) == len(shapes)
    width_scale = (256 / 768) ** -0.5
    for name, lr, betas in [
        ("wte.weight", 0.6 * width_scale, (0.8, 0.95)),
        ("resid_lambdas", 0.005, (0.8, 0.95)),
        ("value_embeds.layer1.weight", 0.6 * width_scale, (0.8, 0.95)),
        ("lm_head.weight", 0.004 * width_scale, (0.8, 0.95)),
        ("x0_lambdas", 0.5, (0.96, 0.95)),
    ]:
        stack, hyper = found[name]
        assert not stack and hyper["lr"] == pytest.approx(lr) and (hyper["beta1"], hyper["beta2"]) == betas
        assert hyper["weight_decay"] == 0
    for name in ("blocks.0.attn.c_q.weight", "blocks.3.mlp.c_fc.weight"):
        assert found[name] == (True, dict(lr=0.04, momentum=0.85, beta2=0.95, weight_decay=0.2))


# ---- schedule ----


def scheduled(train, progress, step=0):
    groups = [
        dict(hyper=dict(lr=2.0, momentum=0.85, beta2=0.95, weight_decay=0.2)),
        dict(hyper=dict(lr=3.0, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.0)),
    ]
    return train.schedule(groups, progress, step)


@pytest.mark.parametrize(
    "progress, multiplier", [(0, 0), (0.05, 0.5), (0.1, 1), (0.3, 1), (0.59, 1), (0.6, 1), (0.8, 0.55), (1, 0.1)]
)
def test_rates_warm_up_stay_and_fall(train, monkeypatch, progress, multiplier):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.1)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.4)
    monkeypatch.setattr(train, "FINAL_LR_FRACTION", 0.1)
    muon_hyper, adamw_hyper = scheduled(train, progress)
    assert (muon_hyper["lr"], adamw_hyper["lr"]) == pytest.approx((2 * multiplier, 3 * multiplier))


@pytest.mark.parametrize("progress, multiplier", [(0, 1), (0.5, 1), (0.75, 0.5), (1, 0)])
def test_rates_as_they_are_set(train, progress, multiplier):
    assert scheduled(train, progress)[0]["lr"] == pytest.approx(2 * multiplier)


def test_momentum_rises_with_steps_and_decay_falls_with_progress(train):
    assert [scheduled(train, 0, step)[0]["momentum"] for step in (0, 150, 300, 9000)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert [scheduled(train, progress)[0]["weight_decay"] for progress in (0, 0.25, 1)] == pytest.approx([0.2, 0.15, 0])
    assert scheduled(train, 0.25, 150)[1] == dict(lr=3.0, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.0)


# ---- model ----


def test_model_width(train):
    assert [train.model_width(depth) for depth in (1, 2, 3, 4, 8, 12)] == [128, 128, 256, 256, 512, 768]


def test_window_sizes(train, monkeypatch):
    assert train.window_sizes(4) == [1024, 1024, 1024, None]
    assert train.window_sizes(6) == [1024, 1024, 1024, None, 1024, None]
    monkeypatch.setattr(train, "WINDOW_PATTERN", "LS")
    assert train.window_sizes(4) == [None, 1024, None, None]


def test_value_embeddings_on_alternate_layers_the_last_included(train):
    layers = {depth: [i for i in range(depth) if train.has_value_embedding(i, depth)] for depth in (1, 4, 5, 8)}
    assert layers == {1: [0], 4: [1, 3], 5: [0, 2, 4], 8: [1, 3, 5, 7]}


@pytest.fixture
def tiny(train, monkeypatch):
    """A GPT of 3 layers, 24 channels, 6 query and 3 key heads, whose weights are all random; its weights in float64."""
    for name, value in dict(ASPECT_RATIO=8, HEAD_DIM=4, KV_RATIO=2, VALUE_GATE_CHANNELS=5, SHORT_WINDOW=3).items():
        monkeypatch.setattr(train, name, value)
    model = train.GPT(3, 17)
    weights = {
        name: 0.5 * normal(*weight.shape, seed=i)
        for i, (name, weight) in enumerate(train.backend.weights(model).items())
    }
    train.backend.set_weights(model, weights)
    return model, {name: weight.astype(np.float64) for name, weight in weights.items()}


def gpt(weights, tokens):
    """The logits of `tiny` by the book: (B, T, V)."""
    B, T = tokens.shape
    x = x0 = reference.rms_norm(weights["wte.weight"][tokens])
    for i, window in enumerate([3, 3, None]):
        block = lambda name, x: x @ weights[f"blocks.{i}.{name}.weight"].T  # noqa: B023, E731
        x = weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        y = reference.rms_norm(x)
        q, k, v = (block(f"attn.c_{name}", y).reshape(B, T, -1, 4) for name in "qkv")
        if i in (0, 2):
            extra = weights[f"value_embeds.layer{i}.weight"][tokens].reshape(B, T, 3, 4)
            v = v + 2 * reference.sigmoid(block("attn.ve_gate", y[..., :5]))[..., None] * extra
        q, k = reference.rms_norm(reference.rope(q, 10000)), reference.rms_norm(reference.rope(k, 10000))
        x = x + block("attn.c_proj", reference.attention(q, k, v, window).reshape(B, T, -1))
        x = x + block("mlp.c_proj", np.maximum(block("mlp.c_fc", reference.rms_norm(x)), 0) ** 2)
    return 15 * np.tanh(reference.rms_norm(x) @ weights["lm_head.weight"].T / 15)


def test_model_and_loss(train, tiny):
    model, weights = tiny
    rows = np.random.default_rng(0).integers(0, 17, (2, 11), np.int32)
    expected = gpt(weights, rows[:, :-1])
    close(train.backend.logits(model, rows[:, :-1]), expected)
    trainer = train.backend.Trainer(
        model, train.training_loss, train.optimizer_groups({name: weight.shape for name, weight in weights.items()})
    )
    loss = float(trainer.backward(rows[:, :-1].copy(), rows[:, 1:].copy()))
    assert loss == pytest.approx(token_losses(expected, rows[:, 1:]).mean(), rel=1e-5)


def test_model_at_the_start_predicts_nothing(train, tiny):
    """Zero projections: each block gives back what it got, and the head is small."""
    model, weights = tiny
    shapes = {name: weight.shape for name, weight in weights.items()}
    train.backend.set_weights(model, train.initial_weights(shapes, 0))
    logits = train.backend.logits(model, np.arange(17, dtype=np.int32)[None])
    assert 0 < np.abs(logits).max() < 0.05


SHAPES = {
    "wte.weight": (40, 32),
    "lm_head.weight": (40, 32),
    "resid_lambdas": (4,),
    "x0_lambdas": (4,),
    "value_embeds.layer1.weight": (40, 32),
    "blocks.1.attn.ve_gate.weight": (2, 32),
    "blocks.0.attn.c_q.weight": (32, 32),
    "blocks.0.attn.c_proj.weight": (32, 32),
    "blocks.0.mlp.c_fc.weight": (128, 32),
    "blocks.0.mlp.c_proj.weight": (32, 128),
}


def test_initial_weights_are_the_same_bytes_everywhere(train):
    weights = train.initial_weights(SHAPES, 42)
    digest = hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()[:12]
    assert digest == "1f406ca44ae8"
    others = train.initial_weights({"gain": (8,), **dict(reversed(SHAPES.items())), "extra.weight": (8, 8)}, 42)
    assert all(np.array_equal(weights[name], others[name]) for name in SHAPES)  # a new parameter changes no other
    assert not np.array_equal(weights["wte.weight"], 1000 * weights["lm_head.weight"])
    assert not np.array_equal(weights["wte.weight"], train.initial_weights(SHAPES, 43)["wte.weight"])


def test_initial_weights_have_their_spread(train):
    weights = train.initial_weights(SHAPES, 42)
    assert {name for name, weight in weights.items() if not weight.any()} == {
        "blocks.1.attn.ve_gate.weight",
        "blocks.0.attn.c_proj.weight",
        "blocks.0.mlp.c_proj.weight",
    }
    assert (weights["resid_lambdas"] == 1).all() and (weights["x0_lambdas"] == np.float32(0.1)).all()
    assert all(weight.dtype == np.float32 for weight in weights.values())
    for name, deviation in [
        ("wte.weight", 1),
        ("lm_head.weight", 0.001),
        ("value_embeds.layer1.weight", 256**-0.5),
        ("blocks.0.attn.c_q.weight", 256**-0.5),
        ("blocks.0.mlp.c_fc.weight", 256**-0.5),
    ]:
        assert weights[name].std() == pytest.approx(deviation, rel=0.1)
    assert np.abs(weights["blocks.0.attn.c_q.weight"]).max() <= 3**0.5 / 16  # uniform


def test_flops_per_token(train):
    """The original counts as many for this shape."""
    model = train.GPT(4, 8192)
    shapes = train.backend.shapes(model)
    matrices = 4 * 12 * 256**2 + 2 * 2 * 32 + 8192 * 256  # blocks, gates, head
    assert train.flops_per_token(model, shapes) == 6 * matrices + 12 * 256 * (3 * 1024 + 2048) == 47_186_688


@pytest.mark.parametrize("name", backends.NAMES)
def test_the_residual_stream_stays_in_the_compute_precision(name, monkeypatch):
    """A float32 scalar times a bfloat16 array is float32 on MLX: one such factor would slow down all after it."""
    train, seen = loaded(opened(name, "bfloat16"), monkeypatch), []
    forward = train.Block.forward

    def watched(self, x, value_embedding):
        out = forward(self, x, value_embedding)
        seen.extend([kind(x), kind(out), *([] if value_embedding is None else [kind(value_embedding)])])
        return out

    monkeypatch.setattr(train.Block, "forward", watched)
    model = train.GPT(train.DEPTH, 50)
    hidden = model.hidden(train.ops.astype(train.ops.zeros((1, 8)), train.ops.arange(1).dtype))
    assert seen == ["bfloat16"] * (2 * train.DEPTH + train.DEPTH // 2) and kind(hidden) == "bfloat16"


@pytest.mark.parametrize("depth, ratio, heads", [(4, 2, 1), (6, 2, 1), (2, 4, 1)])
def test_grouped_heads_at_every_depth(train, depth, ratio, heads):
    """Three heads share one key and value head at depth 6, and one head can't be shared any further."""
    train.DEPTH, train.KV_RATIO, train.ASPECT_RATIO, train.HEAD_DIM, train.VALUE_GATE_CHANNELS = depth, ratio, 8, 16, 8
    model = train.GPT(depth, 50)
    assert train.kv_heads(train.model_width(depth)) == heads
    assert train.backend.logits(model, np.zeros((1, 5), np.int32)).shape == (1, 5, 50)
