"""How far apart two sides are, step by step from shared states of one trajectory: what the parity benchmarks share.

One side, "ours", walks the trajectory through the whole schedule. Its first state is perturbed, because
zero-initialised projections make gradients exactly zero. At each state the other side, "theirs", gets weights and
optimizer state, and both take one step on the same rows.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from peers import patched  # beside this file

import backends
import calibration
import prepare

# Relative differences of one step. "update" leaves out the elements for which cautious decay was decided otherwise, at
# an update of zero, and those whose gradient is mere rounding (see `updates_apart`); their shares have limits of their
# own, the size of rounding in an update.
STEP_LIMITS = {
    "loss": 1e-5,
    "gradient": 1e-5,
    "update": 1e-4,
    "update, same gradient": 1e-4,
    "decay decided otherwise": 1e-5,
    "gradient mere rounding": 1e-5,
}
SHOWN = ("loss", "gradient", "update", "update, same gradient", "update of all elements")


class Step(NamedTuple):
    """One side's step: the loss before it, gradients by parameter name, and the weights after it."""

    loss: float
    gradients: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


# ---- One side ----


def open_train(name: str) -> ModuleType:
    """train.py on the backend `name` in float32, not compiled; a module of its own for each call."""
    path, load = Path(__file__).resolve().parents[1] / "train.py", backends.load
    spec = importlib.util.spec_from_file_location(f"train_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sizes = calibration.Defaults(4, 2, 2**13, "SSSL")
    with (
        patched(backends.load, lambda **_: load(name, "float32", compiled=False)),
        patched(calibration.defaults, lambda: sizes),
    ):
        spec.loader.exec_module(module)
    return module


def pytorch_state(trainer) -> dict[str, dict]:
    """Each parameter's share of a PyTorch trainer's state: tensors that share its memory."""
    return {
        name: {key: value[i] if bucket.stack else value for key, value in bucket.state.items()}
        for bucket in trainer._buckets
        for i, name in enumerate(bucket.gradients)
    }


def optimizer_state(trainer) -> dict[str, dict]:
    """The same, copied."""
    shares = pytorch_state(trainer)
    return {name: {key: value.clone() for key, value in share.items()} for name, share in shares.items()}


def schedule_by_name(train, groups, progress: float, step: int) -> dict[str, dict[str, float]]:
    """Each parameter's hyperparameters."""
    schedule = train.schedule(groups, progress, step)
    return {name: hyper for group, hyper in zip(groups, schedule, strict=True) for name in group["names"]}


# ---- One step ----


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def decay_rate(hyper: dict[str, float], shape) -> float:
    """How much of a weight one step's decay takes: tall matrices have larger steps."""
    return hyper["lr"] * hyper["weight_decay"] * (max(1.0, shape[0] / shape[1]) ** 0.5 if len(shape) == 2 else 1.0)


def updates_apart(before, ours, theirs, decays, gradients=None) -> tuple[dict, dict, dict, dict]:
    """Per parameter, the difference of both updates relative to the norm of ours: of all elements; without the two
    kinds below; and how many there are of each.

    Where cautious decay was decided otherwise, an element is left where it was by one side and decayed by exactly its
    share by the other, both to 1e-3 of the updates' root mean square, which is how far single elements are apart.

    Where a gradient is mere rounding, both sides' differ by over a tenth of themselves, and by less than 1e-5 of the
    gradients' root mean square: AdamW, whose first steps have the size of the rate, then goes either way.

    Args:
        gradients: both sides', if they were not the same.
    """
    whole, rest, decided, rounded = {}, {}, {}, {}
    for name in before:
        one, other = (after[name].astype(np.float64) - before[name] for after in (ours, theirs))
        apart, scale = np.abs(one - other), norm(one) / math.sqrt(one.size)
        low, high = np.minimum(np.abs(one), np.abs(other)), np.maximum(np.abs(one), np.abs(other))
        decay = decays[name] * np.abs(before[name])
        edge = (decay > 0) & (apart > 1e-4 * scale) & (low <= 1e-3 * scale) & (np.abs(high - decay) <= 1e-3 * scale)
        noise = np.zeros_like(edge)
        if gradients and decays[name] == 0:
            a, b = (side[name].astype(np.float64) for side in gradients)
            typical = math.sqrt(np.mean(a[a != 0] ** 2))
            noise = (np.abs(a - b) > 0.1 * np.maximum(np.abs(a), np.abs(b))) & (np.abs(a - b) < 1e-5 * typical)
        whole[name], rest[name] = norm(apart) / norm(one), norm(apart[~edge & ~noise]) / norm(one)
        decided[name], rounded[name] = int(edge.sum()), int(noise.sum())
    return whole, rest, decided, rounded


def gradients_apart(ours, theirs) -> dict[str, float]:
    """Per parameter, relative to its norm or 1e-4 of the whole gradient's, whichever is larger."""
    whole = norm([norm(gradient) for gradient in ours.values()])
    return {
        name: norm(ours[name].astype(np.float64) - theirs[name]) / max(norm(ours[name]), 1e-4 * whole) for name in ours
    }


def steps_apart(before, hypers, ours: Step, theirs: Step, same_gradient: tuple[dict, dict]) -> dict[str, dict]:
    """Quantity -> parameter -> how far apart.

    Args:
        hypers: by parameter name, as `schedule_by_name` gives them.
        same_gradient: both sides' weights after a step that both took with the same gradients.
    """
    decays = {name: decay_rate(hypers[name], before[name].shape) for name in before}
    whole, rest, decided, rounded = updates_apart(
        before, ours.after, theirs.after, decays, (ours.gradients, theirs.gradients)
    )
    _, rest_same, _, _ = updates_apart(before, *same_gradient, decays)
    for name in (name for name in rest if rest[name] > STEP_LIMITS["update"]):
        apart = np.abs(ours.after[name].astype(np.float64) - theirs.after[name])
        at, size = np.unravel_index(apart.argmax(), apart.shape), np.abs(ours.gradients[name])
        share, gradient = (apart[at] / norm(apart)) ** 2, size[at] / np.sqrt(np.mean(size[size > 0] ** 2))
        print(
            f"      update of {name} {rest[name]:.1e} apart: {100 * share:.0f} % of the square is one element, whose "
            f"gradient is {gradient:.1e} of their root mean square"
        )
    return {
        "loss": {"": abs(ours.loss - theirs.loss) / ours.loss},
        "gradient": gradients_apart(ours.gradients, theirs.gradients),
        "update": rest,
        "update, same gradient": rest_same,
        "update of all elements": whole,
        "elements decided": decided,
        "elements rounded": rounded,
    }


# ---- The walk ----


def add_options(parser) -> None:
    option = parser.add_argument
    option("--states", type=int, default=20)
    option("--rows", type=int, default=1, help="rows of 2048 tokens in each state's batch")
    option("--eval-rows", type=int, default=16, help="validation rows that both evaluate")
    option("--noise", type=float, default=0.02, help="standard deviation of the perturbation of the first state")


def perturbed(weights, noise: float) -> dict[str, np.ndarray]:
    """Weights by name with Gaussian noise of this standard deviation, drawn in the order of `weights`."""
    rng = np.random.default_rng(0)
    return {name: weight + noise * rng.standard_normal(weight.shape, np.float32) for name, weight in weights.items()}


def batch_at(data, i: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The i-th x and y, (rows, 2048) each, of the stored held-out rows."""
    return prepare.inputs_and_targets(data.held_out_rows[np.arange(i * rows, (i + 1) * rows) % len(data.held_out_rows)])


def walk(options, train, data, shapes, compare) -> list[tuple[str, float, str]]:
    """Compares at each state, and prints a line of each: the findings (quantity, how far apart, where).

    Args:
        shapes: of the parameters, by name.
        compare: f(batch, progress, step) -> quantity -> parameter -> how far apart, and our loss. It takes our step.
    """
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks."))
    others = sum(map(math.prod, shapes.values())) - matrices
    findings, beyond, left_out = [], 0, {"elements decided": 0, "elements rounded": 0}
    print(
        "                        | apart by                       same              decided     mere\n"
        "state progress     loss |      loss  gradient    update  gradient all elem.  otherwise rounding"
    )
    for i in range(options.states):
        progress, step = i / options.states, i * train.MOMENTUM_STEPS // options.states
        here, loss = compare(batch_at(data, i, options.rows), progress, step)
        findings += [
            (quantity, value, f"state {i} {name}")
            for quantity, values in here.items()
            for name, value in values.items()
        ]
        counts = {kind: sum(here[kind].values()) for kind in left_out}
        left_out = {kind: left_out[kind] + count for kind, count in counts.items()}
        beyond += sum(value > STEP_LIMITS["update"] for value in here["update of all elements"].values())
        worst = {quantity: max(values.values()) for quantity, values in here.items()}
        print(
            f"{i:5d} {100 * progress:6.0f} % {loss:8.4f} |"
            + "".join(f" {worst[key]:9.1e}" for key in SHOWN)
            + "".join(f" {count:8d}" for count in counts.values()),
            flush=True,
        )
    for (kind, count), quantity, size in zip(
        left_out.items(), ("decay decided otherwise", "gradient mere rounding"), (matrices, others)
    ):
        findings.append((quantity, count / (options.states * size), f"{count} of {options.states} x {size:,} elements"))
    print(
        f"with these {sum(left_out.values())} elements {beyond} of {options.states * len(shapes)} updates are beyond "
        "their limit"
    )
    return findings


def verdict(findings: list[tuple[str, float, str]], limits: dict[str, float]) -> bool:
    """Prints the worst of each quantity that has a limit; whether all are within theirs."""
    print(f"\n{'quantity':<24} {'worst':>8} {'limit':>8}  where")
    passed = True
    for quantity, limit in limits.items():
        found = [(value, where) for name, value, where in findings if name == quantity]
        value, where = max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
        beyond = sum(not v <= limit for v, _ in found)
        passed &= not beyond
        print(f"{quantity:<24} {value:8.1e} {limit:8.0e}  {where}" + f"  FAIL: {beyond} of {len(found)}" * bool(beyond))
    return passed
