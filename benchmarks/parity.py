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

AdamW's first steps on an embedding row have the size of the rate however small the gradient: an element whose gradient
is mere rounding can put an update beyond its limit (seen once in 640, at one thread). That counts as a failure here;
"same gradient", where both optimizers get ours, tells it from a difference between them.
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
from unittest import mock

os.environ["AUTORESEARCH_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import backends  # noqa: E402
import prepare  # noqa: E402

# Relative differences. "update" leaves out the elements for which cautious decay was decided otherwise, at an update of
# zero (see `updates_apart`); their share has a limit of its own, the size of rounding in an update.
LIMITS = {"initial weights": 2e-2, "hyperparameters": 1e-6, "loss": 1e-5, "gradient": 1e-5, "update": 1e-4,
          "update, same gradient": 1e-4, "decay decided otherwise": 1e-5, "evaluate_bpb": 1e-5}
SHOWN = ("loss", "gradient", "update", "update, same gradient", "update of all elements")


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
                isinstance(part.ctx, ast.Store) for part in ast.walk(node) if isinstance(part, ast.Name))
        return isinstance(node, (ast.ClassDef, ast.FunctionDef))

    tree = ast.parse(source, str(path))
    tree.body = [node for node in tree.body if wanted(node)]
    sys.modules["original_train"] = module = ModuleType("original_train")  # where its dataclass looks for itself
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
            unembedding_lr=module.UNEMBEDDING_LR, embedding_lr=module.EMBEDDING_LR, scalar_lr=module.SCALAR_LR,
            adam_betas=module.ADAM_BETAS, matrix_lr=module.MATRIX_LR, weight_decay=module.WEIGHT_DECAY)
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
                    theirs: torch.stack([one[key] for one in ours]) for theirs, key in pairs}
            else:
                for parameter, one in zip(group["params"], ours, strict=True):
                    self.optimizer.state[parameter] = dict(
                        step=int(one["step"]), exp_avg=one["mean"].clone(), exp_avg_sq=one["square"].clone())

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


def our_name(name: str) -> str:
    name = name.removeprefix("transformer.").replace("value_embeds.", "value_embeds.layer")
    return f"blocks.{name[2:]}" if name.startswith("h.") else name


def load_prepare(path: Path):
    spec = importlib.util.spec_from_file_location("original_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original_token_bytes(module, data) -> np.ndarray:
    """The original's byte counts: what its `train_tokenizer` writes when it is given our merges instead of its own."""
    encoding = data.tokenizer
    merges = [(encoding.decode_single_token_bytes(i), i) for i in range(data.bos)]
    trained = SimpleNamespace(train_from_iterator=lambda *_, **__: None, get_pattern=lambda: prepare.SPLIT_PATTERN,
                              get_mergeable_ranks=lambda: merges)
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


# ---- Ours ----

def open_train():
    """train.py on the sdpa backend in float32, not compiled."""
    load = backends.load
    with mock.patch.object(backends, "load", lambda: load("sdpa", "float32", compiled=False)):
        import train
    return train


def optimizer_state(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Each parameter's share of the trainer's state, copied."""
    names, state = {id(parameter): name for name, parameter in trainer._named.items()}, {}
    for bucket in trainer._buckets:
        for i, parameter in enumerate(bucket.parameters):
            state[names[id(parameter)]] = {key: (value[i] if bucket.stack else value).clone()
                                           for key, value in bucket.state.items()}
    return state


# ---- Comparison ----

def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def updates_apart(before, ours, theirs, decays) -> tuple[dict, dict, dict]:
    """Per parameter, the difference of both updates relative to the norm of ours: of all elements; without those for
    which cautious decay was decided otherwise; and how many these are.

    Such an element is left where it was by one side (to 1e-4 of the updates' root mean square), and decayed by exactly
    its share by the other.
    """
    whole, rest, decided = {}, {}, {}
    for name in before:
        one, other = (after[name].astype(np.float64) - before[name] for after in (ours, theirs))
        apart, rounding = np.abs(one - other), 1e-4 * norm(one) / math.sqrt(one.size)
        low, high = np.minimum(np.abs(one), np.abs(other)), np.maximum(np.abs(one), np.abs(other))
        decay = decays[name] * np.abs(before[name])
        edge = (decay > 0) & (apart > rounding) & (low <= rounding) & (np.abs(high - decay) <= rounding)
        whole[name], rest[name] = norm(apart) / norm(one), norm(apart[~edge]) / norm(one)
        decided[name] = int(edge.sum())
    return whole, rest, decided


def gradients_apart(ours, theirs) -> dict[str, float]:
    """Per parameter, relative to its norm or 1e-4 of the whole gradient's, whichever is larger."""
    whole = norm([norm(gradient) for gradient in ours.values()])
    return {name: norm(ours[name].astype(np.float64) - theirs[name]) / max(norm(ours[name]), 1e-4 * whole)
            for name in ours}


def at_one_state(train, trainer, model, original, groups, batch, progress: float, step: int) -> tuple:
    """One step of both from our state: (quantity -> parameter -> how far apart, our loss)."""
    backend = train.backend
    before, state, schedule = backend.weights(model), optimizer_state(trainer), train.schedule(groups, progress, step)
    hypers = {name: hyper for group, hyper in zip(groups, schedule, strict=True) for name in group["names"]}

    loss = float(trainer.backward(*batch))
    gradients = trainer.gradients()
    trainer.step(schedule)
    after = backend.weights(model)

    original.copy_state(before, state)
    their_loss, their_gradients = original.gradients(*batch)
    their_after = original.step(progress, step)
    original.copy_state(before, state)
    after_same_gradient = original.step(progress, step, gradients)

    decays = {name: decay_rate(hypers[name], before[name].shape) for name in before}
    whole, rest, decided = updates_apart(before, after, their_after, decays)
    _, rest_same, _ = updates_apart(before, after, after_same_gradient, decays)
    for name in (name for name in rest if rest[name] > LIMITS["update"]):
        apart, size = np.abs(after[name].astype(np.float64) - their_after[name]), np.abs(gradients[name])
        at = np.unravel_index(apart.argmax(), apart.shape)
        share, gradient = (apart[at] / norm(apart)) ** 2, size[at] / np.sqrt(np.mean(size[size > 0] ** 2))
        print(f"      update of {name} {rest[name]:.1e} apart: {100 * share:.0f} % of the square is one element, whose "
              f"gradient is {gradient:.1e} of their root mean square")
    return {"loss": {"": abs(loss - their_loss) / loss},
            "gradient": gradients_apart(gradients, their_gradients),
            "update": rest, "update, same gradient": rest_same, "update of all elements": whole,
            "elements decided": decided,
            "hyperparameters": {f"{name} {key}": abs(value - original.hyper(name)[key]) / max(abs(value), 1e-12)
                                for name, hyper in hypers.items() for key, value in hyper.items()}}, loss


def decay_rate(hyper: dict[str, float], shape) -> float:
    """How much of a weight one step's decay takes: tall matrices have larger steps."""
    return hyper["lr"] * hyper["weight_decay"] * (max(1.0, shape[0] / shape[1]) ** 0.5 if len(shape) == 2 else 1.0)


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
    print(f"evaluate_bpb on {len(rows)} validation rows: ours {ours:.8f}; the original's {by_our_bytes:.8f} "
          f"({by_our_bytes / ours - 1:+.1e}), and {theirs:.8f} ({theirs / ours - 1:+.1e}) by its own byte counts, "
          f"which differ for {(own_bytes != data.token_bytes).sum()} of {data.vocab_size} tokens and make these rows "
          f"{own_bytes[targets].sum() / data.token_bytes[targets].sum() - 1:+.1e} longer")
    return abs(by_our_bytes / ours - 1)


def verdict(findings: list[tuple[str, float, str]]) -> bool:
    """Prints the worst of each quantity; whether all are within their limits."""
    print(f"\n{'quantity':<24} {'worst':>8} {'limit':>8}  where")
    passed = True
    for quantity, limit in LIMITS.items():
        found = [(value, where) for name, value, where in findings if name == quantity]
        value, where = max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
        beyond = sum(not v <= limit for v, _ in found)
        passed &= not beyond
        print(f"{quantity:<24} {value:8.1e} {limit:8.0e}  {where}" + f"  FAIL: {beyond} of {len(found)}" * bool(beyond))
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("original", type=Path, help="folder with the original's train.py and prepare.py")
    option("--states", type=int, default=20)
    option("--rows", type=int, default=1, help="rows of 2048 tokens in each state's batch")
    option("--eval-rows", type=int, default=16, help="validation rows that both evaluate")
    option("--noise", type=float, default=0.02, help="standard deviation of the perturbation of the first state")
    option("--own-rotary", action="store_true", help="leave the original its rotary angles in float32")
    options = parser.parse_args()

    started, train, data = time.time(), open_train(), prepare.open_data()
    backend, model = train.backend, train.GPT(train.DEPTH, data.vocab_size)
    weights, rng = backend.weights(model), np.random.default_rng(0)
    shapes = {name: weight.shape for name, weight in weights.items()}
    groups = train.optimizer_groups(shapes)
    eps = {name: group["hyper"]["eps"] for group in groups for name in group["names"] if name.endswith("_lambdas")}
    torch.manual_seed(0)  # of the original's initial weights
    module = load_train(options.original / "train.py", data.vocab_size)
    original = Original(module, train.DEPTH, eps, options.own_rotary)
    print(f"depth {train.DEPTH}, width {train.model_width(train.DEPTH)}, {options.rows} x {prepare.MAX_SEQ_LEN} "
          f"tokens, data {data.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    findings = [("initial weights", value, name)
                for name, value in what_is_drawn_or_counted(train, model, shapes, original).items()]
    backend.set_weights(model, {name: weight + options.noise * rng.standard_normal(weight.shape, np.float32)
                                for name, weight in train.initial_weights(shapes, seed=42).items()})
    trainer = backend.Trainer(model, train.training_loss, groups)
    matrix_elements = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks."))
    decided, beyond = 0, 0
    print("                        | apart by                       same              decided\n"
          "state progress     loss |      loss  gradient    update  gradient all elem.  otherwise")
    for i in range(options.states):
        rows = data.held_out_rows[np.arange(i * options.rows, (i + 1) * options.rows) % len(data.held_out_rows)]
        progress, step = i / options.states, i * train.MOMENTUM_STEPS // options.states
        batch = prepare.inputs_and_targets(rows)
        here, loss = at_one_state(train, trainer, model, original, groups, batch, progress, step)
        findings += [(quantity, value, f"state {i} {name}") for quantity, values in here.items()
                     for name, value in values.items()]
        decided += sum(here["elements decided"].values())
        beyond += sum(value > LIMITS["update"] for value in here["update of all elements"].values())
        worst = {quantity: max(values.values()) for quantity, values in here.items()}
        print(f"{i:5d} {100 * progress:6.0f} % {loss:8.4f} |" + "".join(f" {worst[key]:9.1e}" for key in SHOWN)
              + f" {sum(here['elements decided'].values()):4d}", flush=True)
    share = decided / (options.states * matrix_elements)
    findings.append(("decay decided otherwise", share, f"{decided} of {options.states} x {matrix_elements:,} elements"))
    print(f"with the {decided} elements decided otherwise, {beyond} of {options.states * len(shapes)} updates are "
          "beyond their limit")
    bpb = bpb_apart(options, train, model, trainer, original, data)
    findings.append(("evaluate_bpb", bpb, "same weights, rows, bytes"))

    passed = verdict(findings)
    print(f"{'PASS' if passed else 'FAIL'} in {time.time() - started:.0f} s")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
