"""Our train.py against the original's, step by step from shared states, in float32 on the CPU: the same science.

    python benchmarks/parity.py FOLDER_WITH_THE_ORIGINAL_TRAIN_PY_AND_PREPARE_PY

The data are those that `AUTORESEARCH_HOME` has prepared. One trajectory of ours is walked through the whole schedule;
its first state is perturbed, because zero-initialised projections make gradients exactly zero. At each state the
original gets our weights and optimizer state; both compute loss and gradients on the same rows and take one step, the
original with the rates, momentum and decay of its own schedule. Then both evaluate the same weights on the same rows.

Of the original's train.py the classes, functions and hyperparameters run; its setup and loop don't. Changed in it:
- bfloat16 becomes float32, torch.compile does nothing, Flash Attention 3 is a masked product in float32;
- its rotary angles, position times frequency rounded to float32, are off by up to 1e-4 (which bfloat16 hid): it gets
  tables made in float64, unless --own-rotary is given;
- AdamW's eps for the scalars is ours: its 1e-10 turns rounding noise into a step of full size.

Cautious decay is all or nothing by the sign of an update. About one in a million is zero but for rounding; there one
side may take the decay and the other not, which alone puts a matrix's update 1e-3 apart. These elements are counted,
and left out of the comparison; the column "all elem." shows the updates with them.

AdamW's first steps on an embedding row have the size of the rate however small the gradient. Elements whose gradient is
mere rounding, so that both sides' differ by more than a tenth, are treated in the same way. "Same gradient", where both
optimizers get ours, needs no such exception.
"""

import argparse
import ast
import importlib.util
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ["AUTORESEARCH_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dataset
import prepare  # noqa: E402
from apart import (  # noqa: E402
    STEP_LIMITS,
    Step,
    add_options,
    norm,
    open_train,
    optimizer_state,
    perturbed,
    schedule_by_name,
    steps_apart,
    verdict,
    walk,
)
from peers import our_name  # noqa: E402

LIMITS = {"initial weights": 2e-2, "hyperparameters": 1e-6, **STEP_LIMITS, "evaluate_bpb": 1e-5}


# ---- The original ----


def load_train(path: Path, vocab_size: int) -> ModuleType:
    """The original's classes, functions and constants, without its setup and loop, computing in float32."""
    source = path.read_text()
    for old, new in ((".bfloat16()", ".float()"), ("torch.bfloat16", "torch.float32")):
        if old not in source:
            raise SystemExit(f"{path} does not contain {old}: not the version this benchmark knows")
        source = source.replace(old, new)

    def wanted(node):
        if isinstance(node, ast.Import):
            return all(name.name.partition(".")[0] in ("torch", "math") for name in node.names)
        if isinstance(node, ast.ImportFrom):
            return node.module == "dataclasses"
        if isinstance(node, ast.Assign):  # constants
            return not any(isinstance(part, (ast.Call, ast.Attribute)) for part in ast.walk(node)) and all(
                isinstance(part.ctx, ast.Store) for part in ast.walk(node) if isinstance(part, ast.Name)
            )
        return isinstance(node, (ast.ClassDef, ast.FunctionDef))

    tree = ast.parse(source, str(path))
    tree.body = [node for node in tree.body if wanted(node)]
    module: Any = ModuleType("original_train")
    sys.modules["original_train"] = module  # where its dataclass looks for itself
    # What its imports and setup would have made:
    module.fa3 = SimpleNamespace(flash_attn_func=windowed_attention)
    module.MAX_SEQ_LEN, module.vocab_size = prepare.MAX_SEQ_LEN, vocab_size
    with mock.patch.object(torch, "compile", lambda *_, **__: lambda function: function):
        exec(compile(tree, str(path), "exec"), vars(module))
    return module


def windowed_attention(q, k, v, causal, window_size):
    """Flash Attention's definition: query i sees keys j with i - window <= j <= i; (B, T, H, D)."""
    assert causal and window_size[1] == 0 and q.dtype == torch.float32
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill((distance < 0) | (distance > window_size[0]), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def exact_rotary(model, base=10000):
    """The original's tables from angles in float64."""
    half = model.cos.shape[-1]
    positions = torch.arange(model.cos.shape[1], dtype=torch.float64)
    angles = torch.outer(positions, base ** (-torch.arange(half, dtype=torch.float64) / half))[None, :, None]
    return angles.cos().float(), angles.sin().float()


class Original:
    """The original's model and optimizer under our parameter names."""

    def __init__(self, module, depth: int, eps: dict[str, float], own_rotary: bool):
        self.module, self.model = module, module.GPT(module.build_model_config(depth))
        self.model.init_weights()
        if not own_rotary:
            self.model.cos, self.model.sin = exact_rotary(self.model)
        self.optimizer = self.model.setup_optimizer(
            unembedding_lr=module.UNEMBEDDING_LR,
            embedding_lr=module.EMBEDDING_LR,
            scalar_lr=module.SCALAR_LR,
            adam_betas=module.ADAM_BETAS,
            matrix_lr=module.MATRIX_LR,
            weight_decay=module.WEIGHT_DECAY,
        )
        self.named = {our_name(name): p for name, p in self.model.named_parameters()}
        self.initial = {name: p.detach().numpy().copy() for name, p in self.named.items()}
        self.groups = {}
        for group in self.optimizer.param_groups:
            for name, parameter in self.named.items():
                if any(parameter is p for p in group["params"]):
                    self.groups[name] = group
        for name in eps:
            self.groups[name]["eps"] = eps[name]

    def copy_state(self, weights, state) -> None:
        """Takes over our weights and optimizer state: name -> {"mean": ..., "momentum": ..., ...}."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(torch.from_numpy(weights[name]))
        names = {id(parameter): name for name, parameter in self.named.items()}
        for group in self.optimizer.param_groups:
            ours = [state[names[id(p)]] for p in group["params"]]
            if group["kind"] == "muon":
                pairs = (("momentum_buffer", "momentum"), ("second_momentum_buffer", "square"))
                self.optimizer.state[group["params"][0]] = {
                    theirs: torch.stack([one[key] for one in ours]) for theirs, key in pairs
                }
            else:
                for parameter, one in zip(group["params"], ours, strict=True):
                    self.optimizer.state[parameter] = dict(
                        step=int(one["step"]), exp_avg=one["mean"].clone(), exp_avg_sq=one["square"].clone()
                    )

    def gradients(self, x, y):
        """(loss, gradients by name); they stay in the parameters."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(torch.from_numpy(x).long(), torch.from_numpy(y).long())
        loss.backward()
        return loss.item(), {name: p.grad.numpy().copy() for name, p in self.named.items()}

    def step(self, progress: float, step: int, gradients=None) -> dict[str, np.ndarray]:
        """Sets what its loop sets, steps, and gives the weights after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.module.get_lr_multiplier(progress)
            if group["kind"] == "muon":
                group["momentum"] = self.module.get_muon_momentum(step)
                group["weight_decay"] = self.module.get_weight_decay(progress)
        for name, gradient in (gradients or {}).items():
            self.named[name].grad = torch.from_numpy(gradient.copy())
        self.optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in self.named.items()}

    def hyper(self, name: str) -> dict[str, float]:
        """The parameter's hyperparameters under our names."""
        group = self.groups[name]
        if group["kind"] == "muon":
            return {key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay")}
        beta1, beta2 = group["betas"]
        return dict(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])


def load_prepare(path: Path):
    spec = importlib.util.spec_from_file_location("original_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original_token_bytes(module, data) -> np.ndarray:
    """The original's byte counts: what its `train_tokenizer` writes when it is given our merges instead of its own."""
    encoding = data.tokenizer
    merges = [(encoding.decode_single_token_bytes(i), i) for i in range(data.bos)]
    trained = SimpleNamespace(
        train_from_iterator=lambda *_, **__: None,
        get_pattern=lambda: dataset.SPLIT_PATTERN,
        get_mergeable_ranks=lambda: merges,
    )
    module.rustbpe, module.list_parquet_files = SimpleNamespace(Tokenizer=lambda: trained), lambda: ["one", "two"]
    with tempfile.TemporaryDirectory() as folder, mock.patch("builtins.print"):
        module.TOKENIZER_DIR = folder
        module.train_tokenizer()
        return module.get_token_bytes().numpy()


def original_bpb(module, losses, rows: np.ndarray, token_bytes: np.ndarray) -> float:
    """The original's evaluate_bpb on the CPU, over these rows instead of its loader's."""
    x, y = (torch.from_numpy(half).long() for half in prepare.inputs_and_targets(rows))
    module.get_token_bytes = lambda device: torch.from_numpy(token_bytes)
    module.make_dataloader = lambda tokenizer, B, T, split: zip(x.split(B), y.split(B), [1] * len(x))
    module.EVAL_TOKENS = len(rows) * prepare.MAX_SEQ_LEN
    return module.evaluate_bpb(losses, None, 1)


# ---- Comparison ----


def at_one_state(train, trainer, model, original, groups, batch, progress: float, step: int) -> tuple:
    """One step of both from our state: (quantity -> parameter -> how far apart, our loss)."""
    backend = train.backend
    before, state = backend.weights(model), optimizer_state(trainer)
    hypers = schedule_by_name(train, groups, progress, step)

    loss = float(trainer.backward(*batch))
    gradients = trainer.gradients()
    trainer.step(train.schedule(groups, progress, step))
    after = backend.weights(model)

    original.copy_state(before, state)
    their_loss, their_gradients = original.gradients(*batch)
    their_after = original.step(progress, step)
    original.copy_state(before, state)
    after_same_gradient = original.step(progress, step, gradients)

    here = steps_apart(
        before,
        hypers,
        Step(loss, gradients, after),
        Step(their_loss, their_gradients, their_after),
        (after, after_same_gradient),
    )
    here["hyperparameters"] = {
        f"{name} {key}": abs(value - original.hyper(name)[key]) / max(abs(value), 1e-12)
        for name, hyper in hypers.items()
        for key, value in hyper.items()
    }
    return here, loss


def what_is_drawn_or_counted(train, model, shapes, original) -> dict[str, float]:
    """Root mean square of initial weights by name, how far apart; prints sizes, which must be equal."""
    flops = train.flops_per_token(model, shapes), original.model.estimate_flops()
    count = sum(map(math.prod, shapes.values())), original.model.num_scaling_params()["total"]
    print(f"FLOP per token {flops[0]:,} (original {flops[1]:,}); parameters {count[0]:,} (original {count[1]:,})")
    if flops[0] != flops[1] or count[0] != count[1]:
        raise SystemExit("FAIL: not the same model")
    apart = {}
    for name, weight in train.initial_weights(shapes, seed=42).items():
        ours, theirs = norm(weight), norm(original.initial[name])
        apart[name] = abs(ours - theirs) / max(theirs, 1e-12)
    return apart


def bpb_apart(options, train, model, trainer, original, data) -> float:
    """Both evaluate the same weights on the same rows."""
    rows, known = data.validation_rows[: options.eval_rows], {}
    ours = prepare.evaluate_bpb(train.backend, model, data, count=len(rows), batch_size=4)
    original.copy_state(train.backend.weights(model), optimizer_state(trainer))
    original.model.eval()

    def losses(x, y, reduction):  # of each row once
        key = x.numpy().tobytes()
        if key not in known:
            known[key] = original.model(x, y, reduction=reduction)
        return known[key]

    module = load_prepare(options.original / "prepare.py")
    own_bytes = original_token_bytes(module, data)
    theirs, by_our_bytes = (original_bpb(module, losses, rows, counts) for counts in (own_bytes, data.token_bytes))
    targets = rows[:, 1:]
    print(
        f"evaluate_bpb on {len(rows)} validation rows: ours {ours:.8f}; the original's {by_our_bytes:.8f} "
        f"({by_our_bytes / ours - 1:+.1e}), and {theirs:.8f} ({theirs / ours - 1:+.1e}) by its own byte counts, "
        f"which differ for {(own_bytes != data.token_bytes).sum()} of {data.vocab_size} tokens and make these rows "
        f"{own_bytes[targets].sum() / data.token_bytes[targets].sum() - 1:+.1e} longer"
    )
    return abs(by_our_bytes / ours - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    option = parser.add_argument
    option("original", type=Path, help="folder with the original's train.py and prepare.py")
    option("--own-rotary", action="store_true", help="leave the original its rotary angles in float32")
    options = parser.parse_args()

    started, train, data = time.time(), open_train("sdpa"), prepare.open_data()
    backend, model = train.backend, train.GPT(train.DEPTH, data.vocab_size)
    shapes = backend.shapes(model)
    groups = train.optimizer_groups(shapes)
    eps = {name: group["hyper"]["eps"] for group in groups for name in group["names"] if name.endswith("_lambdas")}
    torch.manual_seed(0)  # of the original's initial weights
    module = load_train(options.original / "train.py", data.vocab_size)
    original = Original(module, train.DEPTH, eps, options.own_rotary)
    print(
        f"depth {train.DEPTH}, width {train.model_width(train.DEPTH)}, {options.rows} x {prepare.MAX_SEQ_LEN} "
        f"tokens, data {data.name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    findings = [
        ("initial weights", value, name)
        for name, value in what_is_drawn_or_counted(train, model, shapes, original).items()
    ]
    backend.set_weights(model, perturbed(train.initial_weights(shapes, seed=42), options.noise))
    trainer = backend.Trainer(model, train.training_loss, groups)
    findings += walk(
        options, train, data, shapes, lambda *where: at_one_state(train, trainer, model, original, groups, *where)
    )
    bpb = bpb_apart(options, train, model, trainer, original, data)
    findings.append(("evaluate_bpb", bpb, "same weights, rows, bytes"))

    passed = verdict(findings, LIMITS)
    print(f"{'PASS' if passed else 'FAIL'} in {time.time() - started:.0f} s")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
