"""Losses, update rules and transforms as people write them: with Python values that change, arrays changed in place,
results of another shape."""

from contextlib import nullcontext

import numpy as np
import pytest

import backends
from tests.backends import support, tiny


def test_a_transform_may_exchange_gradients(backend):
    model = support.holder(backend, a=np.zeros(3), b=np.zeros(3), c=np.zeros(3))
    exchanged = lambda g: {"a": g["b"], "b": g["a"], "c": g["c"]}  # noqa: E731
    loss = lambda m, x, y: backend.ops.sum(m.a * 2) + backend.ops.sum(m.b * 5) + backend.ops.sum(m.c)  # noqa: E731
    trainer = backend.Trainer(model, loss, [tiny.descent(["a", "b", "c"])], transform=exchanged)
    trainer.backward(support.TOKENS, support.TOKENS)
    trainer.step([{"lr": 1.0}])
    assert {name: value[0] for name, value in backend.weights(model).items()} == {"a": -5.0, "b": -2.0, "c": -1.0}


def test_what_was_accumulated_stays_while_another_shape_is_warmed_up(backend):
    model = support.holder(backend, a=np.zeros(3))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a * 2), [tiny.descent(["a"])])
    trainer.backward(support.TOKENS, support.TOKENS)
    trainer.warm_up(support.TOKENS, support.TOKENS)
    trainer.backward(support.TOKENS, support.TOKENS)
    trainer.step([{"lr": 1.0}])
    assert list(backend.weights(model)["a"]) == [-4.0] * 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", backends.NAMES)
def test_python_values_that_change_between_steps_count(name, compiled):
    """As a schedule may have them: an attribute of the model, an item of a list, and a counter of the rule's own."""
    if compiled:
        support.needs_compiler()
    backend = support.opened(name, "float32", compiled)
    model, share, steps = support.holder(backend, a=np.zeros(2)), [1.0], {"n": 0}
    model.factor = 1.0

    def rule(param, grad, state, hyper):
        return param - hyper["lr"] * steps["n"] * grad, state

    group = tiny.descent(["a"]) | {"update": rule, "init": lambda param: {}}
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a * m.factor) * share[0], [group])
    trainer.warm_up(support.TOKENS, support.TOKENS)
    wanted = 0.0
    for model.factor, share[0], steps["n"] in [
        (1.0, 1.0, 1),
        (3.0, 1.0, 1),
        (3.0, 0.5, 1),
        (3.0, 0.5, 4),
        (1.0, 1.0, 1),
    ]:
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 1.0}])
        wanted -= model.factor * share[0] * steps["n"]
        assert list(backend.weights(model)["a"]) == [wanted] * 2


class Config:
    """As a train.py may have one, for its model or for all of it."""

    share = 1.0

    def __init__(self):
        self.factor, self.many = 1.0, [1.0] * 100

    @property
    def both(self):
        return self.factor * self.many[90]

    def __call__(self, x):
        return x * self.both * Config.share * HELD["number"] * sum(f(1.0) for f in HELD["functions"])


HELD = {"number": np.float32(1), "functions": [lambda x: x * SCALE]}
SCALE = 1.0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", backends.NAMES)
def test_values_of_objects_classes_and_what_they_call_count_too(name, compiled, monkeypatch):
    if compiled:
        support.needs_compiler()
    backend, config = support.opened(name, "float32", compiled), Config()
    model = support.holder(backend, a=np.zeros(2))
    trainer = backend.Trainer(model, lambda m, x, y: config(backend.ops.sum(m.a)), [tiny.descent(["a"])])
    monkeypatch.setattr(Config, "share", 1.0)
    monkeypatch.setitem(HELD, "number", np.float32(1))
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    changes = [
        (lambda: None, 1),
        (lambda: setattr(config, "factor", 2.0), 2),
        (lambda: config.many.__setitem__(90, 3.0), 3),
        (lambda: HELD.__setitem__("number", np.float32(7)), 7),
        (lambda: globals().__setitem__("SCALE", 11.0), 11),
    ]
    if not (compiled and name != "mlx" and support.torch_before(2, 12)):  # whose compiler takes it for a constant
        changes.append((lambda: setattr(Config, "share", 5.0), 5))
    wanted = 1.0
    for change, factor in changes:
        change()
        wanted *= factor
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 0.0}])
        trainer.backward(support.TOKENS, support.TOKENS)
        assert list(trainer.gradients()["a"]) == [wanted] * 2, factor
        trainer.step([{"lr": 0.0}])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", backends.NAMES)
def test_values_that_change_all_the_time_are_right_too(name, compiled, monkeypatch):
    if compiled:
        support.needs_compiler()
    backend, share = support.opened(name, "float32", compiled), [0.0]
    limit = nullcontext()
    if name != "mlx":
        import torch._dynamo

        from backends.pytorch import runtime

        limit = torch._dynamo.config.patch(cache_size_limit=8)
        for changed in ("compiled", "attention"):  # is put back
            monkeypatch.setattr(runtime, changed, getattr(runtime, changed))
    model = support.holder(backend, a=np.zeros(2))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a) * share[0], [tiny.descent(["a"])])
    with limit:
        for i in range(12):
            share[0] = float(i)
            assert float(trainer.backward(support.TOKENS, support.TOKENS)) == 0.0
        trainer.step([{"lr": 1.0}])
    assert list(backend.weights(model)["a"]) == [-66.0] * 2


@pytest.mark.parametrize("stack", [False, True])
def test_a_rule_may_change_what_it_is_given(backend, stack):
    """As `x -= y` does on both: nothing else holds these arrays."""

    def rule(param, grad, state, hyper):
        state["sum"] += grad
        param -= hyper["lr"] * state["sum"]
        return param, state

    group = tiny.descent(["a", "b"], stack=stack) | {
        "update": rule, "init": lambda param: {"sum": backend.ops.zeros_like(param)}
    }  # fmt: skip
    model = support.holder(backend, a=np.zeros(2), b=np.ones(2))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a) + backend.ops.sum(m.b), [group])
    trainer.warm_up(support.TOKENS, support.TOKENS)
    assert list(backend.weights(model)["a"]) == [0.0] * 2
    for _ in range(2):
        trainer.backward(support.TOKENS, support.TOKENS)
        trainer.step([{"lr": 1.0}])
    assert list(backend.weights(model)["a"]) == [-3.0] * 2 and list(backend.weights(model)["b"]) == [-2.0] * 2


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda o, p, s: (o.mean(p), s), r"gave back the parameter in the shape \(\), not \(3,\)"),
        (lambda o, p, s: (p, {"sum": o.mean(p)}), r"gave back sum in the shape \(\), not \(3,\)"),
        (lambda o, p, s: (p, {}), r"gave back the state \[\]; its init made \['sum'\]"),
        (lambda o, p, s: (p, s | {"new": p}), r"gave back the state \['new', 'sum'\]"),
    ],
)
def test_a_rule_that_gives_back_something_else_is_refused(backend, change, match):
    group = tiny.descent(["a"]) | {
        "update": lambda p, g, s, h: change(backend.ops, p, s), "init": lambda p: {"sum": backend.ops.zeros_like(p)}
    }  # fmt: skip
    model = support.holder(backend, a=np.ones(3))
    trainer = backend.Trainer(model, lambda m, x, y: backend.ops.sum(m.a), [group])
    trainer.backward(support.TOKENS, support.TOKENS)
    with pytest.raises(ValueError, match=match):
        trainer.step([{"lr": 1.0}])
