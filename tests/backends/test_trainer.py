"""The Trainer: what every backend has to do alike."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

import backends
from tests.backends import support, tiny

# --- the Trainer


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12)


def test_gradient_of_the_whole_model(backend):
    """Along a random direction in all parameters, by differences of the evaluator's losses; float32, so not far."""
    model, (x, y) = tiny.build(backend), tiny.batch()
    trainer, weights = tiny.trainer(backend, model), backend.weights(model)
    trainer.backward(x, y)
    gradients, draw, step = trainer.gradients(), np.random.default_rng(0).standard_normal, 3e-3
    direction = {
        name: gradients[name] / np.linalg.norm(gradients[name]) + 0.1 * draw(weights[name].shape) for name in tiny.NAMES
    }
    values = []
    for sign in (1, -1):
        backend.set_weights(
            model, {name: weight + np.float32(sign * step * direction[name]) for name, weight in weights.items()}
        )
        values.append(backend.losses(model, x, y).mean(dtype=np.float64))
    slope = sum(float((gradients[name] * direction[name]).sum()) for name in weights)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_gradients_are_complete_and_cleared(backend):
    model = tiny.build(backend)
    trainer = tiny.trainer(backend, model)
    assert not any(gradient.any() for gradient in trainer.gradients().values())
    trainer.backward(*tiny.batch())
    gradients = trainer.gradients()
    assert {name: (g.shape, g.dtype) for name, g in gradients.items()} == {
        name: (w.shape, np.dtype(np.float32)) for name, w in backend.weights(model).items()
    }
    assert all(gradient.any() for gradient in gradients.values())
    trainer.step(tiny.schedule([tiny.adam(backend, []), tiny.descent([])]))
    assert not any(gradient.any() for gradient in trainer.gradients().values())


def test_unused_parameter_has_a_zero_gradient(backend):
    model = support.holder(backend, used=np.ones(3), unused=np.ones(2))
    trainer = backend.Trainer(
        model, lambda m, x, y: backend.ops.sum(m.used * m.used), [tiny.descent(["used", "unused"])]
    )
    trainer.backward(support.TOKENS, support.TOKENS)
    assert {name: list(values) for name, values in trainer.gradients().items()} == {"used": [2] * 3, "unused": [0] * 2}
    trainer.step([{"lr": 0.5}])
    assert {name: list(values) for name, values in backend.weights(model).items()} == {
        "used": [0] * 3,
        "unused": [1] * 2,
    }


def test_accumulation_equals_one_large_batch(backend):
    x, y = tiny.batch(rows=6)
    whole, parts = tiny.build(backend), tiny.build(backend)
    optimizer = [tiny.descent(tiny.NAMES)]
    one, many = tiny.trainer(backend, whole, optimizer), tiny.trainer(backend, parts, optimizer)
    loss = float(one.backward(x, y))
    losses = [float(many.backward(x[i : i + 2], y[i : i + 2], scale=1 / 3)) for i in (0, 2, 4)]
    assert np.mean(losses) == pytest.approx(loss, rel=1e-5)
    for name, gradient in one.gradients().items():
        assert relative(many.gradients()[name], gradient) < 1e-5, name
    one.step([{"lr": 0.1}])
    many.step([{"lr": 0.1}])
    for name, weight in backend.weights(whole).items():
        assert relative(backend.weights(parts)[name], weight) < 1e-6, name


def test_step_applies_the_rule_with_the_schedules_values(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    blocks, rest = [n for n in tiny.NAMES if n.startswith("blocks")], [n for n in tiny.NAMES if n[:6] != "blocks"]
    trainer = tiny.trainer(backend, model, [tiny.descent(blocks, stack=True), tiny.descent(rest)])
    for rates in ((0.1, 0.0), (0.02, 0.3)):
        before = backend.weights(model)
        trainer.backward(x, y)
        gradients = trainer.gradients()
        trainer.step([{"lr": rate} for rate in rates])
        for name, weight in backend.weights(model).items():
            wanted = before[name] - rates[name in rest] * gradients[name]
            np.testing.assert_allclose(weight, wanted, rtol=1e-5, atol=1e-7)


def test_training_lowers_the_loss(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    optimizer = [tiny.adam(backend, [n for n in tiny.NAMES if n != "scale"], stack=True), tiny.descent(["scale"])]
    trainer, losses = tiny.trainer(backend, model, optimizer), []
    for _ in range(20):
        losses.append(float(trainer.backward(x, y)))
        trainer.step(tiny.schedule(optimizer))
    assert losses[-1] < losses[0] / 2


def trained(backend, optimizer, steps=3, warm=False):
    """Weights after a few steps with changing rates, of a fresh model."""
    model = tiny.build(backend)
    trainer = tiny.trainer(backend, model, optimizer)
    if warm:
        trainer.warm_up(*tiny.batch(seed=99))
    for step in range(steps):
        trainer.backward(*tiny.batch(seed=step))
        trainer.step(tiny.schedule(optimizer, 1 / (1 + step)))
    return backend.weights(model)


def test_stacked_equals_one_by_one(backend):
    stacked = trained(backend, [tiny.adam(backend, tiny.NAMES, stack=True)])
    single = trained(backend, [tiny.adam(backend, tiny.NAMES, stack=False)])
    for name in tiny.NAMES:
        np.testing.assert_allclose(stacked[name], single[name], rtol=1e-5, atol=1e-6)


def test_stack_adds_a_leading_axis_even_over_one(backend):
    seen = []

    def init(param):
        seen.append(tuple(param.shape))
        return {}

    group = {**tiny.descent(["b", "a", "c"], stack=True), "init": init}
    model = support.holder(backend, a=np.ones((2, 3)), b=np.ones((2, 3)), c=np.ones(4))
    backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a), [group])
    assert sorted(seen) == [(1, 4), (2, 2, 3)]


def test_a_trainer_starts_without_another_ones_gradients(backend):
    model, (x, y) = tiny.build(backend), tiny.batch()
    tiny.trainer(backend, model).backward(x, y)
    second, alone = tiny.trainer(backend, model), tiny.trainer(backend, tiny.build(backend))
    second.backward(x, y)
    alone.backward(x, y)
    for name, gradient in alone.gradients().items():
        np.testing.assert_allclose(second.gradients()[name], gradient, rtol=1e-5, atol=1e-7)


def test_warm_up_leaves_no_trace(backend):
    optimizer = [tiny.adam(backend, tiny.NAMES, stack=True)]
    cold, warm = trained(backend, optimizer), trained(backend, optimizer, warm=True)
    for name in tiny.NAMES:  # an embedding's gradient is summed in any order on some GPUs; a trace would be 1e-2
        np.testing.assert_allclose(cold[name], warm[name], rtol=1e-5, atol=1e-6)


def test_warm_up_leaves_no_gradient(backend):
    trainer = tiny.trainer(backend, tiny.build(backend))
    trainer.warm_up(*tiny.batch())
    assert not any(gradient.any() for gradient in trainer.gradients().values())


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_a_batch_too_large_is_halved_said_and_carried_on(backend, monkeypatch, capsys, fits):
    """8 rows go through as 2 x 4, 4 x 2 or 8 x 1, and the gradients are those of the whole batch."""
    x, y = tiny.batch(rows=8)
    whole, model = tiny.trainer(backend, tiny.build(backend)), tiny.build(backend)
    parts, before = tiny.trainer(backend, model), backend.weights(model)
    wanted = float(whole.backward(x, y, scale=0.5))
    sizes, accumulate = [], parts.accumulate

    def too_large(x, y, scale):
        if len(x) > fits:
            raise MemoryError
        sizes.append(len(x))
        return accumulate(x, y, scale)

    monkeypatch.setattr(parts, "accumulate", too_large)
    parts.warm_up(x, y)
    assert f"continuing with {fits} at a time" in capsys.readouterr().out
    for name, weight in backend.weights(model).items():
        np.testing.assert_array_equal(weight, before[name])
    assert float(parts.backward(x, y, scale=0.5)) == pytest.approx(wanted, rel=1e-6)
    assert sizes == [fits] * (2 + 8 // fits)  # two to warm up
    for name, gradient in whole.gradients().items():
        np.testing.assert_allclose(parts.gradients()[name], gradient, rtol=1e-4, atol=1e-7)


def test_batches_of_several_shapes_are_warmed_up(backend, monkeypatch):
    """What does not fit in one shape leaves the others as they are."""
    trainer, sizes = tiny.trainer(backend, tiny.build(backend)), []
    accumulate = trainer.accumulate

    def too_large(x, y, scale):
        if x.size > 50:
            raise MemoryError
        sizes.append(x.shape)
        return accumulate(x, y, scale)

    monkeypatch.setattr(trainer, "accumulate", too_large)
    for rows, length in ((2, 12), (8, 12), (8, 5)):
        trainer.warm_up(*tiny.batch(rows, length))
    assert trainer.rows_at_once == {(2, 12): 2, (8, 12): 4, (8, 5): 8}
    sizes.clear()
    for rows, length in ((8, 12), (2, 12), (8, 5)):
        trainer.backward(*tiny.batch(rows, length))
    assert sizes == [(4, 12), (4, 12), (2, 12), (8, 5)]


def test_a_step_that_does_not_fit_leaves_no_trace(backend, monkeypatch):
    """It fails after work was done and queued: weights and optimizer state must be those of the start."""
    optimizer = [tiny.adam(backend, tiny.NAMES, stack=True)]
    model, failures = tiny.build(backend), [MemoryError, MemoryError]
    trainer = tiny.trainer(backend, model, optimizer)
    step = trainer.step

    def too_large(schedule):
        step(schedule)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(trainer, "step", too_large)
    trainer.warm_up(*tiny.batch(rows=4))
    for i in range(3):
        trainer.backward(*tiny.batch(seed=i))
        trainer.step(tiny.schedule(optimizer, 1 / (1 + i)))
    wanted = trained(backend, optimizer)
    for name, weight in backend.weights(model).items():
        np.testing.assert_allclose(weight, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_row_that_does_not_fit_is_an_error_that_says_what_to_do(backend, monkeypatch):
    trainer = tiny.trainer(backend, tiny.build(backend))

    def too_large(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(trainer, "accumulate", too_large)
    with pytest.raises(MemoryError, match="even for one row of 12 tokens.*python -m calibration.* lower DEPTH"):
        trainer.warm_up(*tiny.batch(rows=4))


def test_an_error_in_warm_up_is_not_taken_for_memory(backend):
    model = tiny.build(backend)
    trainer = backend.Trainer(model, lambda m, x, y: m.no_such_parameter, [tiny.descent(tiny.NAMES)])
    before = backend.weights(model)
    with pytest.raises(AttributeError, match="no_such_parameter"):
        trainer.warm_up(*tiny.batch())
    for name, weight in backend.weights(model).items():
        np.testing.assert_array_equal(weight, before[name])


def compilations(name: str, calls: deque) -> int:
    """How often a function that appends to `calls` was compiled. MLX runs its Python only when tracing it; PyTorch
    replays such effects at every call, and counts its graphs. (A list would be a value that changes.)"""
    if name == "mlx":
        return len(calls)
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", backends.NAMES)
def test_rates_change_without_recompiling(name):
    support.needs_compiler()
    backend, calls = support.opened(name, "float32", compiled=True), deque()
    before = compilations(name, calls)

    def update(param, grad, state, hyper):
        if name == "mlx":
            calls.append(1)
        return param - hyper["lr"] * grad, {"last": grad}

    group = {
        **tiny.descent(["a", "b", "c"], stack=True),
        "update": update,
        "init": lambda param: {"last": backend.ops.zeros_like(param)},
    }
    model = support.holder(backend, a=np.ones((2, 3)), b=np.ones((2, 3)), c=np.ones(4))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a * m.b) + backend.ops.sum(m.c), [group])
    compiled = []
    for rate in (0.1, 0.2, 0.05, 0.0, 1):
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": rate}])
        compiled.append(compilations(name, calls))
    assert compiled[0] > before and compiled[1:] == compiled[:1] * 4
    assert backend.weights(model)["c"][0] == pytest.approx(1 - 1.35)  # and each rate had its effect


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda groups: groups[0]["names"].remove("wte.weight"),
            r"wte\.weight is in no group: in optimizer_groups of train.py, .* adamw\(\[\"wte.weight\"\], SCALAR_LR\)",
        ),
        (lambda groups: groups[0]["names"].append("wpe.weight"), r"wpe\.weight is not a parameter"),
        (lambda groups: groups[1]["names"].append("wte.weight"), r"wte\.weight is in two groups: take it out"),
        (lambda groups: groups[1].pop("init"), r"group 1 lacks \['init'\]"),
        (lambda groups: groups[1].update(names=iter(["scale"])), "the names of optimizer group 1 are no list"),
    ],
)
def test_optimizer_errors(backend, change, message):
    optimizer = [tiny.descent([n for n in tiny.NAMES if n != "scale"]), tiny.descent(["scale"])]
    change(optimizer)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(backend, tiny.build(backend), optimizer)


@pytest.mark.parametrize("hide", [list, tuple, lambda layers: {"first": [layers[0]], "then": layers[1:]}])
def test_layers_that_would_not_be_trained_are_refused(backend, hide):
    nn = backend.nn

    class Model(nn.Module):
        def __init__(self, hide):
            super().__init__()
            layers = [nn.Linear(2, 2) for _ in range(3)]
            self.layers = nn.ModuleList(layers)
            self.order = layers[::-1]  # registered above
            self.more = hide([nn.Linear(2, 2) for _ in range(2)]) if hide else None

    def made(hide):
        model = Model(hide)
        names = [f"layers.{i}.weight" for i in range(3)]
        return backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.layers[0].weight), [tiny.descent(names)])

    made(None)
    with pytest.raises(ValueError, match="Model.more holds a Linear in a plain .*: use nn.ModuleList"):
        made(hide)


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_step_that_is_compiled_anew_is_of_another_kind(name):
    support.needs_compiler()
    backend, share = support.opened(name, "float32", compiled=True), [1.0]
    model = support.holder(backend, a=np.ones(2))
    trainer = backend.Trainer(model, lambda m, x, y: share[0] * backend.ops.sum(m.a), [tiny.descent(["a"])])
    trainer.warm_up(support.TOKENS, support.TOKENS)
    backend._at_start = None
    backend.step_kind()  # as the clock does when it starts
    kinds = []
    for share[0] in (1.0, 1.0, 2.0, 2.0):
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 0.0}])
        kinds.append(backend.step_kind())
    assert kinds[0] == kinds[1] == "1.1x1+1.step" and kinds[2] == kinds[3] != kinds[0]


def clipped(backend, most):
    """`transform` that bounds the norm of all gradients together."""
    ops = backend.ops

    def clip(gradients):
        norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients.values()))
        scale = ops.minimum(most / (norm + 1e-6), 1.0)
        return {name: gradient * scale for name, gradient in gradients.items()}

    return clip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", backends.NAMES)
def test_gradients_are_transformed_together(name, compiled):
    if compiled:
        support.needs_compiler()
    backend = support.opened(name, "float32", compiled)
    ops = backend.ops
    for most in (1.0, 100.0):
        model = support.holder(backend, a=np.ones(3), b=np.zeros((2, 2)))
        group = tiny.descent(["a", "b"])
        trainer = backend.Trainer(
            model, lambda m, x, y: ops.sum(m.a * 3) + ops.sum(m.b * 4), [group], transform=clipped(backend, most)
        )
        trainer.warm_up(support.TOKENS, support.TOKENS)
        trainer.backward(support.TOKENS, support.TOKENS)
        assert list(trainer.gradients()["a"]) == [3.0] * 3  # those that were accumulated
        trainer.step([{"lr": 1.0}])
        scale = min(1.0, most / np.sqrt(3 * 9 + 4 * 16))
        np.testing.assert_allclose(backend.weights(model)["a"], 1 - 3 * scale, rtol=1e-5)
        np.testing.assert_allclose(backend.weights(model)["b"], -4 * scale, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_transform_gets_gradients_without_the_loss_scale(low, precision):
    backend = low(precision)
    ops, model = backend.ops, support.holder(backend, value=np.ones(2))
    bounded = lambda gradients: {name: ops.minimum(gradient, 1.5) for name, gradient in gradients.items()}  # noqa: E731
    trainer = backend.Trainer(
        model, lambda m, x, y: ops.sum(ops.float32(m.value)) * 0.25, [tiny.descent(["value"])], transform=bounded
    )
    for _ in range(8):
        trainer.backward(support.TOKENS, support.TOKENS)
    trainer.step([{"lr": 1.0}])
    np.testing.assert_array_equal(backend.weights(model)["value"], -0.5)


def test_gradients_that_a_transform_loses_are_named(backend):
    model = support.holder(backend, a=np.ones(3), b=np.ones(2))
    lost = lambda gradients: {"a": gradients["a"]}  # noqa: E731
    trainer = backend.Trainer(
        model, lambda m, x, y: backend.ops.sum(m.a) + backend.ops.sum(m.b), [tiny.descent(["a", "b"])], transform=lost
    )
    trainer.backward(support.TOKENS, support.TOKENS)
    with pytest.raises(ValueError, match=r"give back every gradient.*b has none, not \(2,\)"):
        trainer.step([{"lr": 0.1}])


@pytest.mark.parametrize("stack", [False, True])
def test_an_average_of_the_weights_is_carried_and_adopted(backend, stack, tmp_path):
    def update(param, grad, state, hyper):
        param = param - hyper["lr"] * grad
        return param, {"average": 0.5 * state["average"] + 0.5 * param}

    group = {**tiny.descent(["a", "b"], stack), "update": update, "init": lambda param: {"average": param}}
    model = support.holder(backend, a=np.ones(3), b=2 * np.ones(3), c=np.zeros(1))
    ops = backend.ops
    trainer = backend.Trainer(
        model, lambda m, x, y: ops.sum(m.a) + ops.sum(m.b) + ops.sum(m.c), [group, tiny.descent(["c"])]
    )
    trainer.warm_up(support.TOKENS, support.TOKENS)
    for _ in range(2):
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 1.0}, {"lr": 1.0}])
    assert [float(backend.weights(model)[name][0]) for name in "abc"] == [-1.0, 0.0, -2.0]
    trainer.adopt("average")
    assert [float(backend.weights(model)[name][0]) for name in "abc"] == [-0.25, 0.75, -2.0]
    backend.save(model, tmp_path / "weights.safetensors")
    fresh = support.holder(backend, a=np.ones(3), b=np.ones(3), c=np.ones(1))
    backend.load(fresh, tmp_path / "weights.safetensors")
    assert [float(backend.weights(fresh)[name][0]) for name in "abc"] == [-0.25, 0.75, -2.0]
    with pytest.raises(KeyError, match="no update rule carries 'averages'"):
        trainer.adopt("averages")


@pytest.mark.parametrize("schedule", [[{"rate": 0.1}], [{}], [{"lr": 0.1, "rate": 0.1}], [], [{"lr": 0.1}] * 2])
def test_schedule_must_fit_the_groups(backend, schedule):
    trainer = tiny.trainer(backend, tiny.build(backend), [tiny.descent(tiny.NAMES)])
    trainer.backward(*tiny.batch())
    with pytest.raises(ValueError, match=r"\['lr'\]"):
        trainer.step(schedule)


def test_a_step_needs_gradients(backend):
    model = support.holder(backend, value=np.ones(2))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.value), [tiny.descent(["value"])])
    trainer.warm_up(support.TOKENS, support.TOKENS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"backward\(\)"):
            trainer.step([{"lr": 0.1}])
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 0.1}])
    np.testing.assert_allclose(backend.weights(model)["value"], 0.8, rtol=1e-6)


# --- half precision


@pytest.mark.parametrize("precision, tolerance", [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_half_precision_gradients_are_near_float32s(request, low, precision, tolerance):
    name = request.node.callspec.params["low"]
    x, y = tiny.batch(rows=2)

    def run(backend):
        trainer = tiny.trainer(backend, tiny.build(backend))
        return float(trainer.backward(x, y)), trainer.gradients()

    exact_loss, exact = run(support.opened(name, "float32"))
    loss, found = run(low(precision))
    assert loss == pytest.approx(exact_loss, rel=tolerance)
    for parameter, gradient in exact.items():
        assert relative(found[parameter], gradient) < tolerance, parameter


def test_float16_skips_an_overflowing_step_and_recovers(low):
    """From 2^16 the loss scale must fall until 40 times it is finite in float16 again: several steps change nothing."""
    backend, seen = low("float16"), []
    model = support.holder(backend, value=np.ones(2))

    def update(param, grad, state, hyper):  # the state is seen through the weights: a skipped step must not count
        return param - hyper["lr"] * (grad + 1000 * state["steps"]), {"steps": state["steps"] + 1}

    group = {
        **tiny.descent(["value"]),
        "update": update,
        "init": lambda param: {"steps": backend.ops.zeros_like(param)},
    }
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.value * 40), [group])
    for _ in range(12):
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 2.0**-10}])
        seen.append(backend.weights(model)["value"][0])
    skipped = seen.count(1.0)
    assert 0 < skipped < 10 and np.isfinite(seen).all()
    taken = np.cumsum([2.0**-10 * (40 + 1000 * step) for step in range(12 - skipped)])
    np.testing.assert_allclose(seen[skipped:], 1 - taken, rtol=1e-3)


def test_float16_warm_up_restores_the_loss_scale(low):
    """An overflow in warm-up halves the scale; afterwards as many steps must be skipped as without it."""
    backend = low("float16")

    def skipped(warm):
        model = support.holder(backend, value=np.ones(2))
        trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.value * 40), [tiny.descent(["value"])])
        if warm:
            trainer.warm_up(support.TOKENS, support.TOKENS)
        for step in range(12):
            trainer.backward(support.TOKENS, support.TOKENS)
            trainer.step([{"lr": 2.0**-10}])
            if backend.weights(model)["value"][0] != 1:
                return step

    assert skipped(warm=True) == skipped(warm=False) > 0
