"""PyTorch against MLX, both in float32 on the CPU with the same unedited train.py: the same computation.

    python benchmarks/backend_parity.py

The data are those that `AUTORESEARCH_HOME` has prepared. Initial weights are compared byte for byte. Then PyTorch walks
one trajectory through the whole schedule; its first state is perturbed, because zero-initialised projections make
gradients exactly zero. At each state MLX gets the weights and the optimizer state, and both compute loss and gradients
on the same rows and take one step. Last, each trains a model from the initial weights, and both evaluate both models.

What is left out of "update" and why, and what an update beyond its limit can mean, is told in parity.py. For "same
gradient" PyTorch takes the step once more with MLX's gradients; the optimizer states after it are compared too.
"""

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["AUTORESEARCH_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import prepare  # noqa: E402
from apart import (  # noqa: E402
    STEP_LIMITS,
    Step,
    add_options,
    batch_at,
    norm,
    open_train,
    optimizer_state,
    perturbed,
    pytorch_state,
    schedule_by_name,
    steps_apart,
    verdict,
    walk,
)

# Relative differences, but for the initial weights: elements whose bytes differ.
LIMITS = {"initial weights": 0, **STEP_LIMITS, "state, same gradient": 1e-4, "val_bpb": 1e-4}


# ---- A backend's side: train.py on it, a model, a trainer. States are name -> key -> numpy array. ----


class Side:
    backend_name: str

    def __init__(self, vocab_size: int):
        self.train = open_train(self.backend_name)
        self.backend, self.model = self.train.backend, self.train.GPT(self.train.DEPTH, vocab_size)
        self.shapes = {name: weight.shape for name, weight in self.weights().items()}

    def start(self, weights) -> None:
        """Takes these weights, and a trainer that has not yet made a step."""
        self.backend.set_weights(self.model, weights)
        self.groups = self.train.optimizer_groups(self.shapes)
        self.trainer = self.backend.Trainer(self.model, self.train.training_loss, self.groups)

    def weights(self) -> dict[str, np.ndarray]:
        return self.backend.weights(self.model)

    def initial_weights(self) -> dict[str, np.ndarray]:
        return self.train.initial_weights(self.shapes, seed=42)

    def step(self, batch, progress: float, step: int) -> Step:
        loss, gradients = float(self.trainer.backward(*batch)), self.trainer.gradients()
        self.apply(progress, step)
        return Step(loss, gradients, self.weights())

    def apply(self, progress: float, step: int) -> None:
        self.trainer.step(self.train.schedule(self.groups, progress, step))

    def evaluate(self, weights, data, count: int) -> float:
        """Bits per byte of `count` validation rows under these weights."""
        self.backend.set_weights(self.model, weights)
        return prepare.evaluate_bpb(self.backend, self.model, data, count=count, batch_size=4)


class PyTorchSide(Side):
    backend_name = "sdpa"

    def state(self):
        copied = optimizer_state(self.trainer)
        return {name: {key: value.numpy() for key, value in share.items()} for name, share in copied.items()}

    def put(self, weights, state) -> None:
        self.backend.set_weights(self.model, weights)
        for name, share in pytorch_state(self.trainer).items():
            for key, value in share.items():
                value.copy_(torch.from_numpy(state[name][key]))

    def put_gradients(self, batch, gradients) -> None:
        """Puts these in the place of what a pass over the batch accumulates."""
        self.trainer.backward(*batch)
        for name, accumulated in self.trainer.accumulated.items():
            accumulated.copy_(torch.from_numpy(gradients[name]))


class MlxSide(Side):
    backend_name = "mlx"

    def state(self):
        return {
            name: {key: np.array(value[i] if self.stacked(unit) else value) for key, value in unit.state.items()}
            for unit in self.trainer._units
            for i, name in enumerate(unit.names)
        }

    def put(self, weights, state) -> None:
        self.backend.set_weights(self.model, weights)
        for unit in self.trainer._units:
            shares = [state[name] for name in unit.names]
            unit.state = {
                key: mx.array(np.stack([share[key] for share in shares]) if self.stacked(unit) else shares[0][key])
                for key in unit.state
            }

    def stacked(self, unit) -> bool:
        return self.groups[unit.group]["stack"]


# ---- Comparison ----


def initial_weights_apart(ours: Side, theirs: Side) -> dict[str, int]:
    """Elements, by parameter, whose bytes differ once each backend was given the weights that its train.py draws."""
    if ours.shapes != theirs.shapes:
        raise SystemExit(f"FAIL: not the same parameters: {ours.shapes} and {theirs.shapes}")
    for side in (ours, theirs):
        side.backend.set_weights(side.model, side.initial_weights())
    one, other = ours.weights(), theirs.weights()
    return {name: int((one[name].view(np.uint32) != other[name].view(np.uint32)).sum()) for name in one}


def at_one_state(ours: PyTorchSide, theirs: MlxSide, batch, progress: float, step: int) -> tuple:
    """One step of both from our state: (quantity -> parameter -> how far apart, our loss)."""
    before, state = ours.weights(), ours.state()
    theirs.put(before, state)
    their_step, their_state = theirs.step(batch, progress, step), theirs.state()

    ours.put_gradients(batch, their_step.gradients)
    ours.apply(progress, step)
    same_gradient, state_same = ours.weights(), ours.state()
    ours.put(before, state)
    our_step = ours.step(batch, progress, step)

    hypers = schedule_by_name(ours.train, ours.groups, progress, step)
    here = steps_apart(before, hypers, our_step, their_step, (same_gradient, their_step.after))
    here["state, same gradient"] = {
        f"{name} {key}": norm(value.astype(np.float64) - their_state[name][key]) / norm(value)
        for name, share in state_same.items()
        for key, value in share.items()
    }
    return here, our_step.loss


def trained_and_evaluated(options, sides: list[Side], data) -> list[tuple[str, float, str]]:
    """Each side trains a model, both evaluate it: how far apart their bits per byte are."""
    findings = []
    for side in sides:
        side.start(side.initial_weights())
        for i in range(options.train_steps):
            side.step(batch_at(data, i, options.rows), i / options.train_steps, i)
        weights = side.weights()
        scores = {judge.backend_name: judge.evaluate(weights, data, options.eval_rows) for judge in sides}
        one, other = scores.values()
        findings.append(("val_bpb", abs(one - other) / one, f"trained on {side.backend_name}"))
        print(
            f"{options.train_steps} steps on {side.backend_name}, val_bpb of {options.eval_rows} rows: "
            + ", ".join(f"{score:.8f} on {name}" for name, score in scores.items())
            + f" ({other / one - 1:+.1e})",
            flush=True,
        )
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--train-steps", type=int, default=20, help="of each backend, before both evaluate; 0 for none")
    options = parser.parse_args()

    started, data = time.time(), prepare.open_data()
    ours, theirs = PyTorchSide(data.vocab_size), MlxSide(data.vocab_size)
    train = ours.train
    print(
        f"depth {train.DEPTH}, width {train.model_width(train.DEPTH)}, {options.rows} x {prepare.MAX_SEQ_LEN} "
        f"tokens, data {data.name}, torch {torch.__version__} on {torch.get_num_threads()} threads, "
        f"mlx {version('mlx')}"
    )

    findings = [("initial weights", count, name) for name, count in initial_weights_apart(ours, theirs).items()]
    for side in (ours, theirs):
        side.start(perturbed(ours.initial_weights(), options.noise))
    findings += walk(options, train, data, ours.shapes, lambda *where: at_one_state(ours, theirs, *where))
    if options.train_steps:
        findings += trained_and_evaluated(options, [ours, theirs], data)

    done = {quantity for quantity, _, _ in findings}
    passed = verdict(findings, {quantity: limit for quantity, limit in LIMITS.items() if quantity in done})
    print(f"{'PASS' if passed else 'FAIL'} in {time.time() - started:.0f} s")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
