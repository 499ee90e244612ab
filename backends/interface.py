"""The contract between `train.py` and a framework: what a backend offers, whatever it is built on.

`train.py` holds the whole search space and imports no framework. It reaches arrays only through what is stated here,
so that the same file trains on every backend. A new platform is a new folder that provides a `Backend` and passes
`tests/backends/`.

On arrays themselves `train.py` uses operators, `.shape`, `.ndim`, `.dtype`, `.reshape` and basic slicing. Everything
else differs silently between frameworks (`split`, `repeat`, `std`, `max(axis=)`, `transpose`, boolean indexing), so it
goes through `ops`; `python -m backends.surface train.py` names the lines that don't.

## nn and ops

`backends/operations.py` holds both as tables, which `python -m backends.surface` prints. Parameter names are dotted
paths, the same on every backend. Masters are float32; a parameter read in `forward` arrives in the compute precision,
because a bfloat16 array times a float32 scalar stays bfloat16 in PyTorch and becomes float32 in MLX.

## The model

`hidden(tokens)` makes what the head reads (B, T, C) of int32 tokens (B, T). `logits(hidden)` is the head, for training
and evaluation alike: it makes logits (N, V) of some tokens' (N, C), which need not be those of a row. Parameters are
all the state that a model has: what else it keeps is lost between training and scoring.

## Trainer(model, loss, optimizer, transform=None)

`loss(model, x, y)` returns a float32 scalar, a mean over rows. `optimizer` is a list of groups:

    dict(names=["blocks.0.mlp.c_fc.weight", ...],   which parameters, each in exactly one group
         init=lambda param: {...},                  param's state: a dict of arrays
         update=lambda param, grad, state, hyper: (param, state),   a pure function; all arrays float32
         stack=False,                               True: equal shapes are stacked on a new leading axis, one alone too
         hyper=dict(lr=..., ...))                   float32 scalars, which may change at each step

A parameter that the loss doesn't use has a gradient of zero, and is updated with it. `transform(gradients)` gets all
accumulated gradients at once, float32 by name, before they are applied, and gives back as many of the same shapes: to
clip them by their common norm, say.

These functions may read Python values that change between steps, as a window that a schedule widens. Where steps are
compiled, that is once more for each value; what changes at every step belongs in `hyper`.
"""

from __future__ import annotations

import abc
import gc
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

import storage

if TYPE_CHECKING:
    from backends.bench import Bench


# What frameworks, allocators and drivers say where memory is short, in lower case.
NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "memoryerror",
    "insufficient memory",
    "memoryallocation",
    "bad_alloc",
    "can't allocate",
    "unable to allocate",
    "attempting to allocate",
    "alloc_failed",  # cuBLAS and cuDNN
    "nvml_success == r",  # PyTorch's allocator on a Jetson or a slice of a GPU (MIG), as it asks NVML how much is left
    "invalid buffer size",  # MPS
)


def says_no_memory(message: str) -> bool:
    """Whether this is said of too little memory."""
    return any(sign in message.lower() for sign in NO_MEMORY)


class BackendError(storage.Stop, RuntimeError):
    """A backend that cannot run here; the message says why and what to install or set."""


@dataclass(frozen=True)
class Hardware:
    """What a run executes on, before anything is measured: `backends.identify()`.

    Attributes:
        backend: the name of the backend that would run on it.
        name: as the vendor writes it, e.g. "NVIDIA H200".
        slug: `name` in lower case with dashes, and memory, e.g. "nvidia-h200-141gb": a tag, never a switch.
        kind: "cpu", "cuda", "mps" (PyTorch) or "metal", "cpu", "cuda" (MLX).
        memory: bytes the device has.
        versions: of the framework and what it runs on.
    """

    backend: str
    name: str
    slug: str
    kind: str
    memory: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """What calibration found out about a device, so that a run need not try it again.

    Attributes:
        profile: the calibration's own tag.
        precision, attention: what to compute in and with; `attention` by kind of window.
        product_rate, square: FLOP/s of (square, square) products in that precision: the peak that `mfu` is relative to,
            and what tells a later run whether the device is as fast as it was.
        attention_provider: where an attention comes from that is no part of the framework; None if none is used.
        kernels: which of the backend's own kernels are used, by name in which variant; None if that was not tried.
    """

    profile: str
    precision: str
    attention: dict[str, str]
    product_rate: float
    square: int
    attention_provider: str | None = None
    kernels: dict[str, int] | None = None


@dataclass(frozen=True)
class Device(Hardware):
    """The same, as measured when the backend was loaded or by calibration.

    Attributes:
        precision: "bfloat16", "float16" or "float32", the fastest that gave right products in a trial.
        peak_flops: matrix-product rate measured in that precision, FLOP/s.
        compiled: whether the step is compiled.
        profile: tag of the calibration that this was taken from, or None.
        speed: of products at the start of this run, relative to the calibration's; None without one.
        notes: what was tried and chosen, one line each, for the run's log.
        attention_provider: where the attention in use comes from that is no part of the framework; None if none is.
        kernels: which of the backend's own are used, by name in which variant.
    """

    precision: str = "float32"
    peak_flops: float | None = None
    compiled: bool = False
    profile: str | None = None
    speed: float | None = None
    notes: tuple[str, ...] = ()
    attention_provider: str | None = None
    kernels: dict[str, int] = field(default_factory=dict)


WARMED_UP: dict[str, int | None] = {}  # what the last `Trainer.warm_up` found
CALLS: Counter[str] = Counter()  # of trainers, by what was called with which shape, since somebody asked


class Trainer(abc.ABC):
    """Accumulates gradients and applies the optimizer's update rules; compiled where the framework compiles.

    In half precision (float16) it scales the loss dynamically and leaves out a step whose gradients overflow. A batch
    too large for the memory goes through in parts, which `warm_up` finds. A backend fills in `accumulate`, `rehearse`,
    `step`, `gradients`, `adopt` and `is_out_of_memory`.

    Attributes:
        rows_at_once: by the shape (B, T) of a batch that was warmed up, how many of its rows go through at once.
    """

    compiled = False  # whether the whole step runs compiled
    captured: bool | None = None  # whether as CUDA graphs; None where there are none

    @abc.abstractmethod
    def __init__(self, model, loss, optimizer: list[dict], transform=None):
        self.rows_at_once: dict[tuple[int, int], int] = {}

    def backward(self, x: np.ndarray, y: np.ndarray, scale: float = 1.0):
        """Adds the gradient of `scale * loss(model, x, y)` to what is accumulated.

        Args:
            x, y: int32 tokens and targets, shape (B, T).
            scale: 1 / number of batches accumulated, for the mean over them.

        Returns:
            The loss before scaling: a scalar on the device; `float(loss)` waits for it.
        """
        sys.audit("autoresearch.backward")
        CALLS["x".join(map(str, x.shape))] += 1
        rows, loss = self.rows_at_once.get(x.shape, len(x)), 0.0
        if len(x) <= rows:
            return self.accumulate(x, y, scale)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            share = len(x[part]) / len(x)
            loss = loss + share * self.accumulate(x[part], y[part], scale * share)
        return loss

    def warm_up(self, x: np.ndarray, y: np.ndarray) -> None:
        """Compiles everything on a throwaway batch (B, T); afterwards weights and state are as they were. To be called
        once for each shape of batch that will be trained on.

        A batch that does not fit into the memory is halved and tried again, and the run prints that; `backward` then
        takes batches in parts of the size that fitted. The loss has to be a mean over rows.

        Raises:
            MemoryError: not even one row fits.
        """
        rows = len(x)
        while True:
            try:
                with _uncollected(), rehearsing():
                    self.rehearse(x[:rows], y[:rows])
                break
            except Exception as error:
                if not self.is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise MemoryError(
                        f"out of memory: this model needs too much memory even for one row of {x.shape[1]} tokens. "
                        "Close other programs that use the device, run python -m calibration to find the sizes that "
                        "fit, or lower DEPTH in train.py"
                    ) from error
            # Out here the traceback, and with it what did not fit, is gone. Parts should be equal: each size compiles.
            fewer = next(n for n in range(rows // 2, 0, -1) if len(x) % n == 0)
            print(f"{rows} rows at once do not fit into the memory: continuing with {fewer} at a time", flush=True)
            rows = fewer
        self.rows_at_once[x.shape] = rows
        fewer = min((rows for shape, rows in self.rows_at_once.items() if rows < shape[0]), default=None)
        WARMED_UP.update(compiled=self.compiled, captured=self.captured, rows_at_once=fewer)

    @abc.abstractmethod
    def accumulate(self, x: np.ndarray, y: np.ndarray, scale: float):
        """`backward` for rows that go through at once."""

    @abc.abstractmethod
    def rehearse(self, x: np.ndarray, y: np.ndarray) -> None:
        """Two of `accumulate` and one `step`, or that several times, finished, and undone, also when they fail."""

    @abc.abstractmethod
    def step(self, schedule: list[dict[str, float]]) -> None:
        """Applies each group's update with `schedule[i]` as its `hyper` values, and clears the gradients.

        Raises:
            ValueError: the schedule's keys are not those of the groups' `hyper`.
            RuntimeError: there was no `backward` since the last step.
        """

    @abc.abstractmethod
    def gradients(self) -> dict[str, np.ndarray]:
        """The accumulated gradients by parameter name, float32, before `transform`."""

    @abc.abstractmethod
    def adopt(self, key: str) -> None:
        """Puts `state[key]` in the place of each parameter whose update rule carries such an array; the others stay.

        So an average of the weights that a rule carries along becomes what is evaluated and saved.

        Raises:
            KeyError: no rule's state has this key.
        """

    @staticmethod
    @abc.abstractmethod
    def is_out_of_memory(error: BaseException) -> bool:
        """Whether this error means that a batch did not fit."""


class Backend(abc.ABC):
    """One framework on one device. `backends.load()` gives the one for this machine.

    Attributes:
        name: "mlx", "cuda" or "sdpa".
        nn, ops: the namespaces described at the head of this file.
        Trainer: the class described above.
        device: what was found and measured.
        bench: work to measure it with.
    """

    name: str
    nn: SimpleNamespace
    ops: Any
    Trainer: type[Trainer]
    device: Device
    bench: Bench
    _at_start: int | None = None  # compilations until the first `step_kind`

    @property
    def warmed_up(self) -> dict:
        """What makes a run slow, for its result: `compiled`, whether the whole step is, `captured`, whether it runs as
        CUDA graphs (None where there are none), and `rows_at_once`, how many fit into the memory if those are fewer
        than a batch. All are None before `Trainer.warm_up`."""
        return {"compiled": None, "captured": None, "rows_at_once": None} | WARMED_UP

    def step_kind(self) -> str:
        """What trainers were asked for since the last time this was: steps of one kind cost the same. For example
        "4.16x2048+1.step" for four batches and an update. What was compiled since the first time, which ends the
        warm-up, makes another kind: a window that a schedule widens costs more."""
        compiled = self.compilations()
        if self._at_start is None:
            self._at_start = compiled
        kinds = [f"{count}.{call}" for call, count in sorted(CALLS.items())]
        kinds += [f"{compiled - self._at_start}.compiled"] * (compiled > self._at_start)
        CALLS.clear()
        return "+".join(kinds)

    def compilations(self) -> int:
        """How often something was compiled in this process; 0 where nothing is."""
        return 0

    @abc.abstractmethod
    def logits(self, model, tokens: np.ndarray) -> np.ndarray:
        """`model.logits` of each row of `model.hidden(tokens)`, float32 (B, T, V), for int32 tokens (B, T). The
        evaluator probes a few rows with it."""

    @abc.abstractmethod
    def losses(self, model, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Nats of each target, float32 (B, T): the model sees only `tokens`, log-softmax and gather are done here.

        The fixed half of the evaluator: `model.hidden(tokens)` gives what the head reads (B, T, C), and
        `model.logits` makes logits of it, here of a row at a time.
        """

    @abc.abstractmethod
    def weights(self, model) -> dict[str, np.ndarray]:
        """The float32 masters by name, copied to host memory."""

    @abc.abstractmethod
    def shapes(self, model) -> dict[str, tuple[int, ...]]:
        """The masters' shapes by name."""

    @abc.abstractmethod
    def set_weights(self, model, weights: dict[str, np.ndarray]) -> None:
        """Replaces every master. Raises ValueError naming any parameter missing, unknown or of another shape."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Returns once the device has done everything asked of it."""

    def clock_rate(self) -> float | None:
        """Hz of a GPU's processors now; None where nothing tells."""
        return None

    def read_later(self, scalar):
        """What `float` makes this scalar of, without waiting, except on MPS, for what the device is given after it."""
        return scalar

    @abc.abstractmethod
    def peak_memory(self) -> int:
        """The most bytes in use at once since the last `warm_up`, or the start where a peak can't be forgotten."""

    @abc.abstractmethod
    def free_memory(self) -> int:
        """Bytes that a run could have on this device now."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this error means that a batch did not fit."""
        return self.Trainer.is_out_of_memory(error)

    def save(self, model, path: str | Path) -> None:
        """Writes the masters as safetensors under the shared names; any backend's `load` reads them. A killed run
        leaves the old file or the new one. DataError if it can't be written."""
        from safetensors.numpy import save_file

        with storage.replacing(Path(path)) as temporary:
            save_file(self.weights(model), temporary)

    def load(self, model, path: str | Path) -> None:
        """Reads what `save` wrote, on this backend or another. It is announced: a guarded run starts from nothing."""
        sys.audit("autoresearch.load", str(path))
        from safetensors.numpy import load_file

        self.set_weights(model, load_file(path))


@contextmanager
def rehearsing():
    """Tells a guarded run that the steps within are undone."""
    sys.audit("autoresearch.rehearsal", True)
    try:
        yield
    finally:
        sys.audit("autoresearch.rehearsal", False)


@contextmanager
def _uncollected():
    """Without Python's collector of cycles: tracing makes millions of objects that stay, and takes a tenth longer with
    it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def check_weights(expected: dict[str, tuple[int, ...]], weights: dict[str, np.ndarray]) -> None:
    """Raises ValueError that names every parameter missing from `weights`, unknown to the model, or misshapen."""
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {weights[name].shape}, the model wants {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != tuple(shape)
    ]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))


def check_head(model, module: type) -> None:
    """Raises TypeError unless the model's logits come from one place, for training and evaluation.

    Args:
        module: the backend's `nn.Module`.
    """
    name = type(model).__name__
    if missing := [part for part in ("hidden", "logits") if not callable(getattr(model, part, None))]:
        raise TypeError(
            f"{name} has no {' and no '.join(missing)}: hidden(tokens) gives what the head reads, and logits(hidden) "
            "is the head, for training and evaluation"
        )
    if getattr(type(model), "forward", None) not in (None, getattr(module, "forward", None)):
        raise TypeError(
            f"{name} has two heads, logits(hidden) and forward(tokens): the evaluator calls the first. Write the "
            "head only there, and remove forward"
        )


def check_optimizer(optimizer: list[dict], names: list[str]) -> None:
    """Raises ValueError when a group lacks a key or a parameter is in no group, in two, or unknown."""
    for i, group in enumerate(optimizer):
        if missing := {"names", "init", "update", "stack", "hyper"} - group.keys():
            raise ValueError(f"optimizer group {i} lacks {sorted(missing)}")
        if not isinstance(group["names"], (list, tuple)):
            raise ValueError(f"the names of optimizer group {i} are no list: write [...] around them")
    grouped = [name for group in optimizer for name in group["names"]]
    problems = [
        f"{name} is in no group: in optimizer_groups of train.py, write it into the names of the one whose rule is to "
        f'update it, or add a group, such as adamw(["{name}"], SCALAR_LR)'
        for name in names
        if name not in grouped
    ]
    problems += [f"{name} is not a parameter of the model" for name in grouped if name not in names]
    problems += [
        f"{name} is in two groups: take it out of one of them"
        for name in sorted({name for name in grouped if grouped.count(name) > 1})
    ]
    if problems:
        raise ValueError("optimizer groups do not match the model: " + "; ".join(problems))


def check_registered(modules: Iterable, parameters: Iterable, kinds: tuple[type, ...], inner: set[str]) -> None:
    """Raises ValueError where a module holds another, or a parameter, only in a plain list, tuple or dict: it would
    not be trained.

    Args:
        modules: all of a model that are registered. parameters: the same. kinds: classes of both.
        inner: names of a module's attributes that are the framework's own.
    """
    modules = list(modules)
    known = {id(each) for each in (*modules, *parameters)}

    def first_unknown(value):
        if isinstance(value, kinds):
            return None if id(value) in known else value
        if isinstance(value, (list, tuple, dict)):
            each = value.values() if isinstance(value, dict) else value
            return next((found for one in each if (found := first_unknown(one)) is not None), None)
        return None

    for module in modules:
        for name, value in vars(module).items():
            if name not in inner and (found := first_unknown(value)) is not None:
                raise ValueError(
                    f"{type(module).__name__}.{name} holds a {type(found).__name__} in a plain {type(value).__name__}, "
                    "where it would not be trained: use nn.ModuleList or nn.ModuleDict for modules, and an attribute "
                    "for each nn.Parameter"
                )


def check_transformed(given: dict, transformed: dict) -> None:
    """Raises ValueError unless `transform` gave back gradients of the names and shapes that it was given."""
    wanted, found = ({name: tuple(array.shape) for name, array in arrays.items()} for arrays in (given, transformed))
    if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        raise ValueError(
            f"transform(gradients) has to give back every gradient in its shape; {wrong[0]} has "
            f"{found.get(wrong[0], 'none')}, not {wanted.get(wrong[0], 'expected at all')}"
        )


def turned_uncompiled() -> None:
    """Says that a step, which was compiled, is not from here on, in what the run prints and in its result."""
    print("a step reads Python values that change all the time: it runs uncompiled, slower", flush=True)
    WARMED_UP.update(compiled=False, captured=WARMED_UP.get("captured") and False)


def check_updated(parameter, state: dict, updated, new_state: dict) -> None:
    """Raises ValueError unless an update rule gave back arrays of the shapes that it got, and all of its state."""
    if sorted(new_state) != sorted(state):
        raise ValueError(f"an update rule gave back the state {sorted(new_state)}; its init made {sorted(state)}")
    pairs = {"the parameter": (parameter, updated), **{name: (state[name], new_state[name]) for name in state}}
    for name, (before, after) in pairs.items():
        if tuple(after.shape) != tuple(before.shape):
            raise ValueError(
                f"an update rule gave back {name} in the shape {tuple(after.shape)}, not {tuple(before.shape)}"
            )


def check_step(optimizer: list[dict], schedule: list[dict[str, float]], has_gradients: bool) -> None:
    """Raises what `Trainer.step` says it raises. A step is announced here: a guarded run counts them."""
    sys.audit("autoresearch.step")
    CALLS["step"] += 1
    wanted, given = [sorted(group["hyper"]) for group in optimizer], [sorted(hyper) for hyper in schedule]
    if given != wanted:
        raise ValueError(f"the schedule gives {given}; the optimizer's groups have {wanted}")
    if not has_gradients:
        raise RuntimeError("step() needs the gradients of at least one backward()")


def updated_together(group: dict, shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The group's names as its update rule gets them: those of a shape together where they are stacked, else singly."""
    together: dict[tuple, list[str]] = {}
    for name in group["names"]:
        together.setdefault(tuple(shapes[name]) if group["stack"] else (name,), []).append(name)
    return list(together.values())
