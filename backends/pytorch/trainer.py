"""Gradient accumulation and the optimizer's step on PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from backends import bench, interface
from backends.pytorch import device as devices
from backends.pytorch import random, runtime


class Trainer(interface.Trainer):
    def __init__(self, model, loss, optimizer, transform=None):
        super().__init__(model, loss, optimizer, transform)
        self.model = model
        self._named = dict(model.named_parameters())
        interface.check_optimizer(optimizer, list(self._named))
        self._eager_loss, self._loss = loss, runtime.maybe_compile(loss)
        self._apply = runtime.maybe_compile(_apply)
        self._transform, self._transformed = transform, runtime.maybe_compile(_transform)
        self._optimizer = optimizer
        shapes = {name: parameter.shape for name, parameter in self._named.items()}
        with torch.no_grad():
            self._buckets = [
                _Bucket(i, group, [self._named[name] for name in names])
                for i, group in enumerate(optimizer)
                for names in interface.updated_together(group, shapes)
            ]
        self._scaler = _LossScaler() if runtime.dtype == torch.float16 else None
        self._passes = random.counter()
        self._clear()  # gradients live in the parameters: an earlier trainer's are none of this one's

    is_out_of_memory = staticmethod(runtime.is_out_of_memory)

    def accumulate(self, x, y, scale):
        with random.drawing(self._passes):
            loss = self._loss(self.model, to_device(x), to_device(y))
            (loss * scale * self._scaler.scale if self._scaler else loss * scale).backward()
        self._passes += 1
        return loss.detach()

    @torch.no_grad()
    def step(self, schedule):
        interface.check_step(self._optimizer, schedule, any(p.grad is not None for p in self._named.values()))
        for parameter in self._named.values():
            if parameter.grad is None:  # not used by this loss: a gradient of zero, as on every other backend
                parameter.grad = torch.zeros_like(parameter)
        # Scalars on the host are arguments of the compiled kernels, not constants: a new value compiles nothing.
        scalars = [{name: torch.tensor(float(value)) for name, value in hyper.items()} for hyper in schedule]
        unscale, finite = self._scaler.inspect(self._named.values()) if self._scaler else (None, None)
        if self._transform:
            self._transformed(self._transform, {name: p.grad for name, p in self._named.items()}, unscale)
            unscale = None
        for bucket in self._buckets:
            grads = [parameter.grad for parameter in bucket.parameters]
            self._apply(
                bucket.update,
                bucket.stack,
                bucket.parameters,
                grads,
                bucket.state,
                scalars[bucket.group],
                unscale,
                finite,
            )
        if self._scaler:
            self._scaler.adjust(finite)
        self._clear()

    def rehearse(self, x, y):
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        # One row without a graph first: makes the tables and masks a trace can't make.
        with torch.no_grad(), random.drawing(self._passes):
            self._eager_loss(self.model, to_device(x[:1]), to_device(y[:1]))
        kept = [tensor.detach().clone() for tensor in self._everything()]
        try:
            if not self._compiles(x, y):
                self._clear()
                self._once(x, y)
        finally:
            self._clear()
            with torch.no_grad():
                for tensor, value in zip(self._everything(), kept):
                    tensor.copy_(value)
            if runtime.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # what is reported is the training's

    @property
    def compiled(self) -> bool:
        return runtime.compiled

    def _compiles(self, x, y) -> bool:
        """Tries a step; if it does not compile, turns to uncompiled ones."""
        try:
            self._once(x, y)
            return True
        except Exception as error:
            if not runtime.compiled or runtime.is_out_of_memory(error):
                raise
            # train.py uses what can't be traced, or the compiler fails on this device: slow is better than not at all.
            # What is wrong with train.py itself will be raised again.
            print(f"this step does not compile and runs uncompiled, slower: {bench.first_line(error)}")
            runtime.compiled, runtime.attention = False, runtime.uncompiled_attention
            self._loss, self._apply, self._transformed = self._eager_loss, _apply, _transform
            return False

    def _once(self, x, y):
        for _ in range(2):  # from the second on, gradients are held beside a pass
            self.accumulate(x, y, 0.5)
        self.step([group["hyper"] for group in self._optimizer])
        devices.synchronize(runtime.device)  # an error of the device belongs here

    def gradients(self):
        unscale = 1 / self._scaler.scale if self._scaler else 1.0
        return {
            name: np.zeros(p.shape, np.float32) if p.grad is None else (p.grad * unscale).cpu().numpy()
            for name, p in self._named.items()
        }

    @torch.no_grad()
    def adopt(self, key):
        carrying = [bucket for bucket in self._buckets if key in bucket.state]
        if not carrying:
            raise KeyError(f"no update rule carries {key!r} in its state")
        for bucket in carrying:
            values = bucket.state[key].unbind() if bucket.stack else [bucket.state[key]]
            for parameter, value in zip(bucket.parameters, values, strict=True):
                parameter.copy_(value)

    def _everything(self):
        """All that a step changes, in a fixed order."""
        yield from self._named.values()
        yield self._passes
        for bucket in self._buckets:
            yield from bucket.state.values()
        if self._scaler:
            yield from (self._scaler.scale, self._scaler.good_steps)

    def _clear(self):
        for parameter in self._named.values():
            parameter.grad = None


class _Bucket:
    """Parameters updated by one call of their group's rule: one alone, or several of a shape, stacked."""

    def __init__(self, group_index, group, parameters):
        self.group, self.parameters = group_index, parameters
        self.update, self.stack = group["update"], group["stack"]
        state = group["init"](torch.stack(parameters) if self.stack else parameters[0])
        self.state = {name: value.clone() for name, value in state.items()}  # it may be the parameter itself


def _transform(transform, grads, unscale):
    """Writes what `transform` makes of all gradients in their place."""
    given = grads if unscale is None else {name: grad * unscale for name, grad in grads.items()}
    transformed = transform(dict(given))
    interface.check_transformed(given, transformed)
    for name, grad in grads.items():
        grad.copy_(transformed[name])


def _apply(update, stack, parameters, grads, state, hyper, unscale, finite):
    """Runs one update rule and writes its results in place, so that a compiled step needs no second copy."""
    parameter = torch.stack(parameters) if stack else parameters[0]
    grad = torch.stack(grads) if stack else grads[0]
    if unscale is not None:
        grad = grad * unscale
    new_parameter, new_state = update(parameter, grad, state, hyper)
    if finite is not None:  # an overflow in half precision: everything stays as it was
        new_parameter = torch.where(finite, new_parameter, parameter)
        new_state = {name: torch.where(finite, value, state[name]) for name, value in new_state.items()}
    for target, value in zip(parameters, new_parameter.unbind() if stack else [new_parameter]):
        target.copy_(value)
    for name, target in state.items():
        target.copy_(new_state[name])


class _LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740), without waiting for the device."""

    FIRST, LARGEST, GROWTH_INTERVAL = 2.0**16, 2.0**24, 200

    def __init__(self):
        self.scale = torch.tensor(self.FIRST, device=runtime.device)
        self.good_steps = torch.zeros((), device=runtime.device)

    def inspect(self, parameters):
        """What to multiply gradients by, and whether all of them are finite (a boolean on the device)."""
        finite = torch.stack([parameter.grad.isfinite().all() for parameter in parameters]).all()
        return 1 / self.scale, finite

    def adjust(self, finite):
        """Halves the scale after an overflow, doubles it after 200 good steps."""
        self.good_steps.copy_(torch.where(finite, self.good_steps + 1, 0))
        grow = self.good_steps >= self.GROWTH_INTERVAL
        grown = torch.where(grow, (self.scale * 2).clamp(max=self.LARGEST), self.scale)
        self.scale.copy_(torch.where(finite, grown, (self.scale / 2).clamp(min=1)))
        self.good_steps.copy_(torch.where(grow, 0, self.good_steps))


def to_device(tokens: np.ndarray) -> torch.Tensor:
    """Host tokens on the device; from pinned memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(np.ascontiguousarray(tokens))
    if runtime.device.type == "cuda":
        return tensor.pin_memory().to(runtime.device, non_blocking=True)
    return tensor.to(runtime.device)
