"""The contract between `train.py` and a framework: what a backend offers, whatever it is built on.

`train.py` holds the whole search space and imports no framework. It reaches arrays only through what is stated here,
so that the same file trains on every backend. A new platform is a new folder that provides a `Backend` and passes
`tests/backends/`.

On arrays themselves `train.py` uses operators, `.shape`, `.ndim`, `.dtype`, `.reshape` and basic slicing. Everything
else differs silently between frameworks (`split`, `repeat`, `std`, `max(axis=)`, `transpose`, boolean indexing), so it
goes through `ops`; `python -m backends.surface train.py` names the lines that don't.

## nn

    Module                   subclasses define `forward`; calling the module calls it
    Linear(n_in, n_out)      y = x @ weight.T, no bias; `weight` has shape (n_out, n_in)
    Embedding(n, dim)        float32 `weight` of shape (n, dim); the rows looked up are cast to the compute precision
    ModuleList(modules)      indexed and iterated; names "blocks.0.…"
    ModuleDict({name: ...})  indexed by name; `in`, `.items()`; a purely numeric key is an error
    Parameter(shape)         a float32 array of zeros to be trained

Parameter names are dotted paths, the same on every backend. Masters are float32; a parameter read in `forward` arrives
in the compute precision, because a bfloat16 array times a float32 scalar stays bfloat16 in PyTorch and becomes float32
in MLX.

## ops

Functions under their Python Array API names, with `axis=` and `keepdims=` keywords; `OPS` below lists them. Those that
the Array API does not have:

    attention(q, k, v, window)   q (B, T, H, D), k and v (B, T, H_kv, D) with H a multiple of H_kv; query i sees keys j
                                 with i - window <= j <= i, `None` for all j <= i; scaled by D^-1/2; (B, T, H, D)
    rope(x, base)                rotary embedding of x (B, T, H, D): halves split, position on axis 1, frequencies
                                 base^(-2i/D); y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin (Su et al. 2021,
                                 arXiv:2104.09864, with the rotation's sign turned as the original project has it)
    rotary_qkv(x, w_q, w_k, w_v, head_dim, base)
                                 q (B, T, H, D), k and v (B, T, H_kv, D) of x (B, T, C): x @ w.T by head, and for q and
                                 k rms_norm(rope(..., base)) of that. As one op because it is faster so on some devices
    squared_relu_mlp(x, w_in, w_out)
                                 square(relu(x @ w_in.T)) @ w_out.T, for the same reason
    rms_norm(x)                  x / sqrt(mean(x^2, last axis) + 2^-23), accumulated in float32, no weight
    softcapped_cross_entropy(hidden, weight, targets, softcap, reduction)
                                 nats of targets (B, T) under softmax(softcap * tanh(hidden @ weight.T / softcap)), from
                                 hidden (B, T, C) and weight (V, C); `softcap=None` for none; float32: "mean" and "sum"
                                 give a scalar, "none" (B, T). Works over chunks of tokens: no float32 logits of the
                                 whole batch are held
    relu, gelu (exact, erf), silu, sigmoid, softmax(x, axis)
    compute(x), float32(x)       x in the compute precision, in float32

Where the Array API leaves a choice, or not every framework follows it: `std` and `var` have correction=0; `full` gives
float32; `tril` and `triu` take `k=`, `clip` takes `min=` and `max=`; `maximum`, `minimum`, `where` and the comparisons
accept a number as their last operand.

## Trainer(model, loss, optimizer)

`loss(model, x, y)` returns a float32 scalar, a mean over rows. `optimizer` is a list of groups:

    dict(names=["blocks.0.mlp.c_fc.weight", ...],   which parameters, each in exactly one group
         init=lambda param: {...},                  param's state: a dict of arrays
         update=lambda param, grad, state, hyper: (param, state),   a pure function; all arrays float32
         stack=False,                               True: equal shapes are stacked on a new leading axis, one alone too
         hyper=dict(lr=..., ...))                   float32 scalars, which may change at each step

A parameter that the loss doesn't use has a gradient of zero, and is updated with it.
"""

from __future__ import annotations

import abc
import gc
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from backends.bench import Bench

# What `ops` offers, so that one list serves the checker, the tests and the reader.
ARRAY_API = """
abs add arange astype broadcast_to clip concat cos cumulative_sum divide equal exp expand_dims full greater
greater_equal less less_equal log logical_and logical_not logical_or matmul matrix_transpose max maximum mean min
minimum multiply negative ones ones_like permute_dims pow reshape sigmoid sign sin sqrt square squeeze stack std
subtract sum take tan tanh tril triu var where zeros zeros_like
""".split()
TRANSFORMER = """
attention compute float32 gelu relu rms_norm rope rotary_qkv rsqrt silu softcapped_cross_entropy softmax
squared_relu_mlp stop_gradient
""".split()
OPS = sorted(ARRAY_API + TRANSFORMER)
NN = ("Embedding", "Linear", "Module", "ModuleDict", "ModuleList", "Parameter")  # and what `nn` offers


class BackendError(RuntimeError):
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


class Trainer(abc.ABC):
    """Accumulates gradients and applies the optimizer's update rules; compiled where the framework compiles.

    In half precision (float16) it scales the loss dynamically and leaves out a step whose gradients overflow. A batch
    too large for the memory goes through in parts, which `warm_up` finds. A backend fills in `accumulate`, `rehearse`,
    `step`, `gradients` and `is_out_of_memory`.
    """

    rows_at_once: int | None = None  # None: the whole batch
    compiled = False  # whether the whole step runs compiled

    @abc.abstractmethod
    def __init__(self, model, loss, optimizer: list[dict]): ...

    def backward(self, x: np.ndarray, y: np.ndarray, scale: float = 1.0):
        """Adds the gradient of `scale * loss(model, x, y)` to what is accumulated.

        Args:
            x, y: int32 tokens and targets, shape (B, T).
            scale: 1 / number of batches accumulated, for the mean over them.

        Returns:
            The loss before scaling: a scalar on the device; `float(loss)` waits for it.
        """
        rows, loss = self.rows_at_once or len(x), 0.0
        if len(x) <= rows:
            return self.accumulate(x, y, scale)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            share = len(x[part]) / len(x)
            loss = loss + share * self.accumulate(x[part], y[part], scale * share)
        return loss

    def warm_up(self, x: np.ndarray, y: np.ndarray) -> None:
        """Compiles everything on a throwaway batch (B, T); afterwards weights and state are as they were.

        When the memory is too small for it, it is halved, said, and tried again; `backward` then takes batches in parts
        of what fitted. The loss has to be a mean over rows.

        Raises:
            MemoryError: not even one row fits.
        """
        rows = len(x)
        while True:
            try:
                with _uncollected():
                    self.rehearse(x[:rows], y[:rows])
                break
            except Exception as error:
                if not self.is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise MemoryError(
                        f"out of memory: not even one row of {x.shape[1]} tokens goes through this model. Close what "
                        "else uses the device; python -m calibration finds the sizes that fit, or lower DEPTH in "
                        "train.py"
                    ) from error
            # Out here the traceback, and with it what did not fit, is gone. Parts should be equal: each size compiles.
            fewer = next(n for n in range(rows // 2, 0, -1) if len(x) % n == 0)
            print(f"{rows} rows at once do not fit into the memory: going on with {fewer} at a time", flush=True)
            rows = fewer
        self.rows_at_once = rows
        WARMED_UP.update(compiled=self.compiled, rows_at_once=rows if rows < len(x) else None)

    @abc.abstractmethod
    def accumulate(self, x: np.ndarray, y: np.ndarray, scale: float):
        """`backward` for rows that go through at once."""

    @abc.abstractmethod
    def rehearse(self, x: np.ndarray, y: np.ndarray) -> None:
        """Two of `accumulate` and one `step`, finished, and undone, also when they fail."""

    @abc.abstractmethod
    def step(self, schedule: list[dict[str, float]]) -> None:
        """Applies each group's update with `schedule[i]` as its `hyper` values, and clears the gradients.

        Raises:
            ValueError: the schedule's keys are not those of the groups' `hyper`.
            RuntimeError: there was no `backward` since the last step.
        """

    @abc.abstractmethod
    def gradients(self) -> dict[str, np.ndarray]:
        """The accumulated gradients by parameter name, float32."""

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

    @property
    def warmed_up(self) -> dict:
        """What makes a run slow, for its result: `compiled`, whether the whole step is, and `rows_at_once`, how many
        fit into the memory if those are fewer than a batch. Both are None before `Trainer.warm_up`."""
        return {"compiled": None, "rows_at_once": None} | WARMED_UP

    @abc.abstractmethod
    def logits(self, model, tokens: np.ndarray) -> np.ndarray:
        """The model's logits, float32 (B, T, V), for int32 tokens (B, T). The evaluator probes a few rows with it."""

    @abc.abstractmethod
    def losses(self, model, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Nats of each target, float32 (B, T): the model sees only `tokens`, log-softmax and gather are done here.

        The fixed half of the evaluator: `model(tokens)` gives logits (B, T, V) in any precision; they are taken to
        float32 a few rows at a time.
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

    def read_later(self, scalar):
        """What `float` makes this scalar of, waiting for it and for nothing that the device is given after it."""
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
        """Writes the masters as safetensors under the shared names; any backend's `load` reads them."""
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        save_file(self.weights(model), temporary)
        temporary.replace(path)  # a killed run leaves the old file or the new one, never half of one

    def load(self, model, path: str | Path) -> None:
        """Reads what `save` wrote, on this backend or another. It is announced: a guarded run starts from nothing."""
        sys.audit("autoresearch.load", str(path))
        from safetensors.numpy import load_file

        self.set_weights(model, load_file(path))


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


def check_optimizer(optimizer: list[dict], names: list[str]) -> None:
    """Raises ValueError when a group lacks a key or a parameter is in no group, in two, or unknown."""
    for i, group in enumerate(optimizer):
        if missing := {"names", "init", "update", "stack", "hyper"} - group.keys():
            raise ValueError(f"optimizer group {i} lacks {sorted(missing)}")
    grouped = [name for group in optimizer for name in group["names"]]
    problems = [f"{name} is in no group" for name in names if name not in grouped]
    problems += [f"{name} is not a parameter of the model" for name in grouped if name not in names]
    problems += [f"{name} is in two groups" for name in sorted({n for n in grouped if grouped.count(n) > 1})]
    if problems:
        raise ValueError("optimizer groups do not match the model: " + "; ".join(problems))


def check_heads(query_heads: int, key_heads: int) -> None:
    """Raises ValueError unless each key and value head serves the same number of query heads."""
    if not key_heads or query_heads % key_heads:
        raise ValueError(
            f"attention with {query_heads} query heads and {key_heads} key and value heads: the first has "
            "to be a multiple of the second"
        )


def check_step(optimizer: list[dict], schedule: list[dict[str, float]], has_gradients: bool) -> None:
    """Raises what `Trainer.step` says it raises."""
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
