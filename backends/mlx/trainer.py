"""Gradient accumulation and optimizer steps on MLX.

On a GPU two kinds of function are compiled: loss and gradients of a micro-batch, and one update rule over one array
(or one stack of arrays). A whole optimizer step in one graph takes MLX far too long to compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from backends import bench, interface
from backends.mlx import random
from backends.mlx.compiled import Compiled, Values
from backends.mlx.device import is_out_of_memory
from backends.mlx.nn import Module, Parameter, modules, named_parameters, substituted


class Trainer(interface.Trainer):
    """See `backends/interface.py`."""

    is_out_of_memory = staticmethod(is_out_of_memory)
    compiled = True  # whether to compile; the backend sets it
    working_set: int | None = None  # bytes that it should use at most; None for no limit

    def __init__(self, model, loss, optimizer: list[dict], transform=None):
        super().__init__(model, loss, optimizer, transform)
        self._parameters = named_parameters(model)
        own = modules(model), self._parameters.values(), (Module, Parameter)
        interface.check_registered(*own, inner={"_modules", "_parameters"})
        interface.check_optimizer(optimizer, list(self._parameters))
        self._optimizer = optimizer
        self._compiled: list[Compiled] = []
        self._units = [unit for i, group in enumerate(optimizer) for unit in self._split(i, group)]
        self._transform = transform and self._maybe_compile(_transformer(transform), Values([transform]))
        values = Values([loss], model)
        self._differentiate = self._maybe_compile(_differentiator(model, loss, self._parameters), values)
        self._loss_scale = LossScale() if model.precision == mx.float16 else None
        self._gradients: dict[str, mx.array] = {}  # of the scaled loss
        self._passes = 0  # made so far: what random numbers are drawn by
        self._in_flight = None
        # Zeros are not left to be computed with the first step: if it fails, they would pass for computed.
        mx.eval(self._everything())

    def accumulate(self, x: np.ndarray, y: np.ndarray, scale: float):
        factor = mx.array(scale, dtype=mx.float32)
        if self._loss_scale:
            factor = factor * self._loss_scale.value
        passes = mx.array(self._passes, dtype=mx.uint64)
        loss, gradients = self._differentiate(self._masters(), mx.array(x), mx.array(y), factor, passes)
        self._passes += 1
        if self._gradients:
            gradients = {name: self._gradients[name] + gradient for name, gradient in gradients.items()}
        self._gradients = gradients
        # The device works on this batch while the caller fetches the next one, and is never more than that behind:
        # each batch in flight holds its activations.
        if self._in_flight is not None:
            mx.eval(self._in_flight)
        mx.async_eval(loss, gradients)
        self._in_flight = loss
        return loss

    def step(self, schedule: list[dict[str, float]]) -> None:
        interface.check_step(self._optimizer, schedule, bool(self._gradients))
        gradients, self._gradients = self._gradients, {}
        guard = (self._loss_scale.value, _all_finite(gradients)) if self._loss_scale else ()
        if self._transform:
            gradients = self._transform(gradients, *guard[:1])
        hypers = [{name: mx.array(value, dtype=mx.float32) for name, value in hyper.items()} for hyper in schedule]
        for unit in self._units:
            masters = [self._parameters[name].value for name in unit.names]
            updated, unit.state = unit.update(
                masters, [gradients.pop(name) for name in unit.names], unit.state, hypers[unit.group], *guard
            )
            for name, master in zip(unit.names, updated):
                self._parameters[name].value = master
        if self._loss_scale:
            self._loss_scale.adjust(guard[1])
        mx.async_eval(self._everything())

    def rehearse(self, x: np.ndarray, y: np.ndarray) -> None:
        # Arrays that are computed never change, so keeping the old ones is a snapshot.
        masters, states = self._masters(), [unit.state for unit in self._units]
        gradients, loss_scale = self._gradients, self._loss_scale and self._loss_scale.state
        passes, self._gradients = self._passes, {}
        mx.clear_cache()
        mx.reset_peak_memory()
        try:
            self._once_if_need_be_uncompiled(x, y)
        except Exception:
            mx.synchronize()  # work that was queued before it failed must not run later, over other arrays' memory
            raise
        finally:
            for name, parameter in self._parameters.items():
                parameter.value = masters[name]
            for unit, state in zip(self._units, states):
                unit.state = state
            self._gradients, self._in_flight, self._passes = gradients, None, passes
            if self._loss_scale:
                self._loss_scale.state = loss_scale
        self._check_working_set(len(x))
        mx.reset_peak_memory()  # what is reported is the training's

    def _once_if_need_be_uncompiled(self, x, y) -> None:
        try:
            self._once(x, y)
        except ValueError as error:
            if not self.compiled or "function transformations" not in str(error):
                raise
            print(f"this step does not compile and runs uncompiled, slower: {bench.first_line(error)}", flush=True)
            self.compiled = False
            for each in self._compiled:
                each.on = False
            self._gradients, self._in_flight = {}, None
            self._once(x, y)

    def _once(self, x, y) -> None:
        for _ in range(2):  # from the second on, gradients are held beside a pass
            self.accumulate(x, y, 0.5)
        self.step([group["hyper"] for group in self._optimizer])
        mx.eval(self._everything())

    def _check_working_set(self, rows: int) -> None:
        """A Mac's GPU shares its memory with everything else: what is too large for it doesn't fail, but swaps."""
        if self.working_set is None or (peak := mx.get_peak_memory()) <= self.working_set:
            return
        found = f"{rows} rows take {peak / 1e9:.1f} GB of the {self.working_set / 1e9:.1f} GB this GPU should use"
        if rows > 1:
            raise MemoryError(found)
        print(f"{found}; it will swap. A smaller DEPTH in train.py fits.", flush=True)

    def gradients(self) -> dict[str, np.ndarray]:
        unscale = 1 / self._loss_scale.value if self._loss_scale else 1.0
        return {
            name: np.array(self._gradients[name] * unscale)
            if self._gradients
            else np.zeros(parameter.value.shape, np.float32)
            for name, parameter in self._parameters.items()
        }

    def adopt(self, key: str) -> None:
        carrying = [unit for unit in self._units if key in unit.state]
        if not carrying:
            raise KeyError(f"no update rule carries {key!r} in its state")
        for unit in carrying:
            values = list(unit.state[key]) if self._optimizer[unit.group]["stack"] else [unit.state[key]]
            for name, value in zip(unit.names, values, strict=True):
                self._parameters[name].value = value

    def _maybe_compile(self, function, reads: Values) -> Compiled:
        self._compiled.append(Compiled(function, reads, self.compiled))
        return self._compiled[-1]

    def _masters(self) -> dict[str, mx.array]:
        return {name: parameter.value for name, parameter in self._parameters.items()}

    def _everything(self) -> list:
        return [self._masters(), [unit.state for unit in self._units], self._loss_scale and self._loss_scale.state]

    def _split(self, index: int, group: dict) -> list[Unit]:
        """A group as units: one for each shape when stacked, else one for each parameter."""
        shapes = {name: parameter.value.shape for name, parameter in self._parameters.items()}
        update = self._maybe_compile(_updater(group["update"], group["stack"]), Values([group["update"]]))
        units = []
        for names in interface.updated_together(group, shapes):
            masters = [self._parameters[name].value for name in names]
            units.append(Unit(index, names, update, group["init"](mx.stack(masters) if group["stack"] else masters[0])))
        return units


@dataclass
class Unit:
    """What one call of an update rule changes: one parameter, or all of one shape in a stacked group."""

    group: int  # its index in the optimizer, and so in the schedule
    names: list[str]
    update: callable
    state: dict


def compiling_pays() -> bool:
    """On its CPU MLX builds each fused kernel with the system's C++ compiler: 12 s for a model of two layers, whose
    steps (0.59 s) then take as long as before."""
    return mx.default_device() != mx.Device(mx.cpu)


def _differentiator(model, loss, parameters):
    """f(masters, x, y, factor, passes) -> loss, and the gradients of factor * loss by name."""

    def scaled_loss(masters, x, y, factor):
        with substituted(parameters, masters):
            value = loss(model, x, y).astype(mx.float32)
        return factor * value, value

    def differentiate(masters, x, y, factor, passes):
        with random.drawing(passes):
            (_, value), gradients = mx.value_and_grad(scaled_loss)(masters, x, y, factor)
        return value, gradients

    return differentiate


def _transformer(transform):
    """f(gradients, loss scale or nothing) -> the gradients that `transform` makes of them, scaled as they were."""

    def transformed(gradients, scale=None):
        given = gradients if scale is None else {name: grad / scale for name, grad in gradients.items()}
        found = transform(dict(given))
        interface.check_transformed(given, found)
        return found if scale is None else {name: grad * scale for name, grad in found.items()}

    return transformed


def _updater(rule, stack: bool):
    """f(params, grads, state, hyper) -> params, state. With a loss scale and `finite`, not finite changes nothing."""

    def update(params, grads, state, hyper):
        # A rule may change in place what it is given: what others hold is another object.
        param, grad = (mx.stack(each) if stack else mx.array(each[0]) for each in (params, grads))
        new, new_state = rule(param, grad, tree_map(mx.array, state), hyper)
        interface.check_updated(grad, state, new, new_state)
        return (list(new) if stack else [new]), new_state

    def guarded(params, grads, state, hyper, loss_scale=None, finite=None):
        if finite is None:
            return update(params, grads, state, hyper)
        new = update(params, [grad / loss_scale for grad in grads], state, hyper)
        return tree_map(lambda after, before: mx.where(finite, after, before), list(new), [params, state])

    return guarded


class LossScale:
    """Keeps float16 gradients representable: halved on overflow, doubled after 200 good steps, without a host sync.

    `state` is the scale and the count of good steps since it last changed, both on the device.
    """

    GROW_AFTER = 200
    LARGEST = 2.0**24

    def __init__(self):
        self.state = (mx.array(2.0**16), mx.array(0))

    @property
    def value(self) -> mx.array:
        return self.state[0]

    def adjust(self, finite: mx.array) -> None:
        """Takes account of a step whose gradients were all finite, or not."""
        scale, good = self.state
        good = mx.where(finite, good + 1, 0)
        grow = good >= self.GROW_AFTER
        scale = mx.where(finite, mx.where(grow, mx.minimum(2 * scale, self.LARGEST), scale), mx.maximum(scale / 2, 1))
        self.state = (scale, mx.where(grow, 0, good))


def _all_finite(arrays: dict[str, mx.array]) -> mx.array:
    return mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays.values()]))
