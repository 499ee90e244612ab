"""Gradient accumulation and the optimizer's step on PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from backends import bench, interface
from backends.pytorch import device as devices
from backends.pytorch import random, runtime
from backends.pytorch.layers import compile_layers

ALIGNED = 4  # float32 in 16 bytes, on which compiled kernels want arrays to begin
RECORDED = 3  # a step is run, recorded, and then played back: that many until it runs as it will from then on


class Trainer(interface.Trainer):
    """
    Attributes:
        accumulated: by parameter, the gradient so far (of the scaled loss, in float16): zeros after a step.
    """

    def __init__(self, model, loss, optimizer, transform=None):
        super().__init__(model, loss, optimizer, transform)
        self.model = model
        runtime.begin_recording()
        self._named = dict(model.named_parameters())
        own = model.modules(), model.parameters(), (torch.nn.Module, torch.nn.Parameter)
        interface.check_registered(*own, inner=set(vars(torch.nn.Module())))
        interface.check_optimizer(optimizer, list(self._named))
        self._eager_loss, self._transform, self._optimizer = loss, transform, optimizer
        self._prepare()
        shapes = {name: parameter.shape for name, parameter in self._named.items()}
        with torch.no_grad():
            self._buckets = [
                _Bucket(i, group, {name: self._named[name] for name in names})
                for i, group in enumerate(optimizer)
                for names in interface.updated_together(group, shapes)
            ]
        # All stacks are updated in one graph, whose kernels are compiled at the same time. They are in the order of
        # their shapes, which another depth does not change. Of the others there may be more or fewer then: each has a
        # graph, which those of one rule and shape share.
        stacks = sorted((b for b in self._buckets if b.stack), key=lambda bucket: bucket.parameter.shape[1:])
        others = [[bucket] for bucket in self._buckets if not bucket.stack]
        self._together = [stacks, *others] if stacks else others
        self.accumulated = {name: grad for bucket in self._buckets for name, grad in bucket.gradients.items()}
        self._hypers = _Hypers(optimizer)
        self._scaler = _LossScaler() if runtime.dtype == torch.float16 else None
        self._passes, self._has_gradients = random.counter(), False
        for tensor in (*self._everything(), *(each for bucket in self._buckets for each in bucket.arrays())):
            runtime.stays(tensor)

    def _prepare(self):
        backend = compile_layers if runtime.by_layer else "inductor"
        self._loss = runtime.maybe_compile(self._eager_loss, step=True, backend=backend)
        self._update = runtime.maybe_compile(_update, step=True, dynamic=None)
        self._transformed = runtime.maybe_compile(_transform, step=True)

    is_out_of_memory = staticmethod(runtime.is_out_of_memory)

    def accumulate(self, x, y, scale):
        with random.drawing(self._passes):
            loss = self._run("_loss", self.model, to_device(x), to_device(y))
            scaled = loss * scale * self._scaler.scale if self._scaler else loss * scale
            fresh = torch.autograd.grad(scaled, list(self._named.values()), allow_unused=True)
        used = [(self.accumulated[name], grad) for name, grad in zip(self._named, fresh) if grad is not None]
        torch._foreach_add_(*map(list, zip(*used)))
        self._passes += 1
        self._has_gradients = True
        return loss.detach().clone()  # a captured pass writes the next loss to the same place

    @torch.no_grad()
    def step(self, schedule):
        interface.check_step(self._optimizer, schedule, self._has_gradients)
        hypers = self._hypers.set(schedule)
        unscale, finite = None, None
        if self._scaler:
            unscale, finite = self._scaler.inspect([bucket.gradient for bucket in self._buckets])
        if self._transform:
            gradients = [(tuple(b.gradients), b.stack, b.gradient) for b in self._buckets]
            self._run("_transformed", self._transform, gradients, unscale)
            unscale = None
        for buckets in self._together:
            for bucket in buckets:
                bucket.hold()
            updates = [(b.update, b.parameter, b.gradient, b.state, hypers[b.group]) for b in buckets]
            self._run("_update", updates, unscale, finite)
        if self._scaler:
            self._scaler.adjust(finite)
        self._has_gradients = False

    def _run(self, name, *arguments):
        """Calls what is compiled. What would be compiled again and again is not, from then on."""
        try:
            return getattr(self, name)(*arguments)
        except Exception as error:
            if not (runtime.compiled and type(error).__name__ == "FailOnRecompileLimitHit"):
                raise
        interface.turned_uncompiled()
        runtime.leave_uncompiled()
        self._prepare()
        return getattr(self, name)(*arguments)

    def rehearse(self, x, y):
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        # One row without a graph first: makes the tables and masks a trace can't make.
        with torch.no_grad(), random.drawing(self._passes):
            self._eager_loss(self.model, to_device(x[:1]), to_device(y[:1]))
        kept = [tensor.detach().clone() for tensor in self._everything()]
        held = [bucket.gradient.clone() for bucket in self._buckets] if self._has_gradients else []
        devices.forget_peak_memory(runtime.device)
        try:
            while not self._works(x, y):  # each time by the next simpler way
                self._clear()
            # What a graph's kernels use is not counted when they run, only while it is recorded.
            copies = sum(value.nbytes for value in kept)
            recorded = devices.peak_memory(runtime.device) - copies if runtime.captured else 0
            runtime.recorded_memory = max(runtime.recorded_memory, recorded)  # another shape may need more
        finally:
            self._clear()
            with torch.no_grad():
                for tensor, value in zip(self._everything(), kept):
                    tensor.copy_(value)
                for bucket, value in zip(self._buckets, held):
                    bucket.gradient.copy_(value)
            self._has_gradients = bool(held)
            devices.forget_peak_memory(runtime.device)  # what is reported is the training's

    @property
    def compiled(self) -> bool:
        return runtime.compiled

    @property
    def captured(self) -> bool | None:
        return None if runtime.device.type != "cuda" else runtime.captured and not runtime.not_captured()

    def _works(self, x, y) -> bool:
        """Tries a step. If it can't be captured, or compiled, turns to steps that are not, and returns False.

        train.py may use what can't be traced, or the compiler fail on this device: slow is better than not at all. What
        is wrong with train.py itself will be raised again.
        """
        try:
            for _ in range(RECORDED if runtime.captured else 1):
                self._once(x, y)
            if runtime.captured and (why := runtime.not_captured()):
                print(f"parts of this step are launched one kernel at a time, slower on a busy machine: {why}")
            return True
        except Exception as error:
            if not runtime.compiled:
                raise
            # PyTorch 2.11 takes a recording that failed for one that ended: it could not record another after it. What
            # was compiled is on disk; the memory of its graphs is free again.
            torch.compiler.reset()
            if runtime.is_out_of_memory(error):
                raise
            if runtime.by_layer and not isinstance(error, torch._dynamo.exc.Unsupported):
                runtime.by_layer, without = False, "is compiled with all its layers at once, which takes longer"
            elif runtime.captured:  # which may have been why it failed before, too
                runtime.captured, runtime.by_layer = False, True
                without = "is launched one kernel at a time, slower on a busy machine"
            else:
                runtime.leave_uncompiled()
                without = "does not compile and runs uncompiled, slower"
            print(f"this step {without}: {bench.first_line(error)}")
            self._prepare()
            return False

    def _once(self, x, y):
        for _ in range(2):
            self.accumulate(x, y, 0.5)
        self.step([group["hyper"] for group in self._optimizer])
        devices.synchronize(runtime.device)  # an error of the device belongs here

    def gradients(self):
        unscale = 1 / self._scaler.scale if self._scaler else 1.0
        return {name: (grad * unscale).cpu().numpy() for name, grad in self.accumulated.items()}

    @torch.no_grad()
    def adopt(self, key):
        carrying = [bucket for bucket in self._buckets if key in bucket.state]
        if not carrying:
            raise KeyError(f"no update rule carries {key!r} in its state")
        for bucket in carrying:
            bucket.hold()
            bucket.parameter.copy_(bucket.state[key])

    def _everything(self):
        """All that a step changes, in a fixed order."""
        yield from self._named.values()
        yield self._passes
        for bucket in self._buckets:
            yield from bucket.state.values()
        if self._scaler:
            yield from (self._scaler.scale, self._scaler.good_steps)

    def _clear(self):
        for bucket in self._buckets:
            bucket.gradient.zero_()
        self._has_gradients = False


class _Bucket:
    """Parameters updated by one call of their group's rule: one alone, or several of a shape, stacked.

    Attributes:
        parameter: what the rule updates. Where it is a stack, the parameters are views of it.
        gradient: what is accumulated, as the rule gets it. gradients: of it each parameter's part, by name.
    """

    def __init__(self, group_index, group, named):
        self.group, self.update, self.stack = group_index, group["update"], group["stack"]
        self.parameter = next(iter(named.values())).detach()
        if self.stack:
            one = self.parameter.contiguous()
            strides = -(-one.numel() // ALIGNED) * ALIGNED, *one.stride()
            self.parameter = one.new_empty_strided((len(named), *one.shape), strides)
        self._places = list(zip(named.values(), _parts(self.parameter, self.stack)))
        self.hold()
        self.gradient = torch.zeros_like(self.parameter, memory_format=torch.contiguous_format)
        self.gradients = dict(zip(named, _parts(self.gradient, self.stack)))
        state = group["init"](self.parameter)
        self.state = {name: value.clone() for name, value in state.items()}  # it may be the parameter itself
        if runtime.compiled and (self.stack or self.parameter.ndim == 1):
            for array in (*self.arrays(), *self.state.values()):
                if array.ndim and len(array) == len(self.parameter):  # one graph, whatever the number of layers is
                    torch._dynamo.maybe_mark_dynamic(array, 0)

    def arrays(self):
        return self.parameter, self.gradient

    def hold(self):
        """Makes the parameters views of what is updated, with their values, where they are not: another trainer of the
        same model may have taken them."""
        for parameter, place in self._places:
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter)
                parameter.data = place


class _Hypers:
    """The schedule's numbers where the kernels read them: a new value compiles and captures nothing anew."""

    def __init__(self, optimizer):
        keys = [(i, name) for i, group in enumerate(optimizer) for name in group["hyper"]]
        self._values = torch.zeros((len(keys), ALIGNED), device=runtime.device)
        self._numbers = [{} for _ in optimizer]
        for (i, name), row in zip(keys, self._values):
            self._numbers[i][name] = row[0]

    def set(self, schedule) -> list[dict]:
        """For each group, a scalar on the device for each name."""
        values = [float(schedule[i][name]) for i, numbers in enumerate(self._numbers) for name in numbers]
        self._values[:, 0].copy_(to_device(np.array(values, np.float32)))
        return self._numbers


def _parts(whole, stack):
    return whole.unbind() if stack else [whole]


def _transform(transform, gradients, unscale):
    """Writes what `transform` makes of all gradients in their place.

    Args:
        gradients: of each bucket its parameters' names, whether they are stacked, and their gradient.
    """
    parts = {n: part for names, stack, whole in gradients for n, part in zip(names, _parts(whole, stack))}
    given = parts if unscale is None else {name: part * unscale for name, part in parts.items()}
    transformed = transform(dict(given))
    interface.check_transformed(given, transformed)
    # What is given back may be another parameter's gradient: nothing is written before all of it is read.
    changed = {name: transformed[name].clone() for name, part in parts.items() if transformed[name] is not part}
    for name, value in changed.items():
        parts[name].copy_(value)


def _update(updates, unscale, finite):
    """Runs update rules and writes their results in place, so that a compiled step needs no second copy.

    Args:
        updates: for each bucket the rule, and its parameter, gradient, state and hyper.
    """
    for update, parameter, gradient, state, hyper in updates:
        grad = gradient if unscale is None else gradient * unscale
        # A rule may keep, exchange or change in place what it is given. Compiled, a copy that isn't needed is not made.
        given = {name: value.clone() for name, value in state.items()}
        new_parameter, new_state = update(parameter.clone(), grad, given, hyper)
        interface.check_updated(parameter, state, new_parameter, new_state)
        if finite is not None:  # an overflow in half precision: everything stays as it was
            new_parameter = torch.where(finite, new_parameter, parameter)
            new_state = {name: torch.where(finite, value, state[name]) for name, value in new_state.items()}
        parameter.copy_(new_parameter)
        for name, target in state.items():
            target.copy_(new_state[name])
        gradient.zero_()


class _LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740), without waiting for the device."""

    FIRST, LARGEST, GROWTH_INTERVAL = 2.0**16, 2.0**24, 200

    def __init__(self):
        self.scale = torch.tensor(self.FIRST, device=runtime.device)
        self.good_steps = torch.zeros((), device=runtime.device)

    def inspect(self, gradients):
        """What to multiply gradients by, and whether all of them are finite (a boolean on the device)."""
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        return 1 / self.scale, finite

    def adjust(self, finite):
        """Halves the scale after an overflow, doubles it after 200 good steps."""
        self.good_steps.copy_(torch.where(finite, self.good_steps + 1, 0))
        grow = self.good_steps >= self.GROWTH_INTERVAL
        grown = torch.where(grow, (self.scale * 2).clamp(max=self.LARGEST), self.scale)
        self.scale.copy_(torch.where(finite, grown, (self.scale / 2).clamp(min=1)))
        self.good_steps.copy_(torch.where(grow, 0, self.good_steps))


def to_device(array: np.ndarray) -> torch.Tensor:
    """An array of the host on the device; from pinned memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if runtime.device.type == "cuda":
        return tensor.pin_memory().to(runtime.device, non_blocking=True)
    return tensor.to(runtime.device)
