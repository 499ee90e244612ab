"""The public trainers that throughput.py compares with: one function for each family runs such a file, changed in
memory, on our data, and returns what it measured. `trainer` picks the function by looking at the source.

Everywhere the data come from our loader. What a file prints and how it trains stay as they are, and so do its kernels,
but for what is said at each function. Rates leave out the first steps, in which things are compiled.
"""

import functools
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare  # noqa: E402
from backends import machine  # noqa: E402
from loader import our_batches  # noqa: E402


def add_options(parser) -> None:
    parser.add_argument("--attention", type=Path, help="nanochat's flash_attention.py, for theirs without FA3")
    parser.add_argument("--fa3", action="store_true", help="theirs with the Flash Attention 3 that ours finds")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--device-batch", type=int, default=128)
    parser.add_argument("--total-batch", type=int, default=2**19)
    parser.add_argument("--windows", default="SSSL", help="of attention by layer: S short, L full (default SSSL)")


def check_options(parser, options) -> None:
    if options.fa3 and (options.attention or options.float32):
        parser.error("--fa3 is an attention for theirs, in half precision: leave out --attention and --float32")


def trainer(options):
    """The function that runs the file `options.theirs`: function(options) -> results."""
    source = options.theirs.read_text()
    if "import mlx" not in source:
        return run_torch
    return run_parameter_golf if "class Hyperparameters" in source else run_autoresearch_mlx


def with_constants(source: str, options) -> str:
    values = {
        "DEPTH": options.depth,
        "DEVICE_BATCH_SIZE": options.device_batch,
        "TOTAL_BATCH_SIZE": options.total_batch,
        "WINDOW_PATTERN": options.windows,
    }
    return with_values(source, {name: repr(value) for name, value in values.items()})


def with_values(source: str, values: dict[str, str]) -> str:
    """The source with other values, given as Python, of its constants."""
    for name, value in values.items():
        source, found = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value} ", source)
        assert found == 1, f"{name} is set {found} times"
    return source


def sized(source: str, options) -> str:
    """The source with the sizes of the options, or, with --defaults, its own."""
    return source if options.defaults else with_constants(source, options)


def seeded(source: str, options) -> str:
    """The source of another trainer with the seed of the options where it has a number. (Ours and parameter-golf's read
    theirs from the environment.)"""
    return re.sub(r"(\b(?:manual_seed|random\.seed)\()\d+\)", rf"\g<1>{options.seed})", source)


def replaced(source: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        raise SystemExit(f"{old.strip()!r} is there {source.count(old)} times: not the version this benchmark knows")
    return source.replace(old, new)


def execute(name: str, source: str, **variables) -> Any:
    """The source as an imported module, which finds `variables` set.
    It has to be registered: torch.compile looks a function's globals up by their module's name, and a backend reads the
    source of what it may have a kernel for."""
    module, filename = types.ModuleType(name), f"<{name}.py>"
    sys.modules[name], linecache.cache[filename] = module, (len(source), None, source.splitlines(True), filename)
    vars(module).update(variables)
    exec(compile(source, filename, "exec"), vars(module))
    return module


def patched(thing, by):
    """A patch, to be started or entered: who looks a function, method or class up where it is defined finds `by`.

    It takes the thing itself, as a name in a string could be that of a thing that is no longer there: of an attribute
    the type check tells."""
    *owners, name = thing.__qualname__.split(".")
    return mock.patch.object(functools.reduce(getattr, owners, sys.modules[thing.__module__]), name, by)


def run_apart(script: str, what: str, *arguments: str, env: dict | None = None) -> dict:
    """What a script, run once more with its own arguments and these, prints after RESULT. Where that fails, so does the
    caller, with what it said."""
    done = subprocess.run(
        [sys.executable, script, *sys.argv[1:], *arguments], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


def stub(data, seconds: float, array, evaluate):
    """What a train.py imports from its own prepare.py, over our data.

    Args:
        array: makes a tensor of theirs from int32 numpy (B, T).
        evaluate: stands for its evaluate_bpb(model, tokenizer, batch_size).
    """

    class Tokenizer:
        from_directory = classmethod(lambda cls: cls())
        get_vocab_size = lambda self: data.vocab_size  # noqa: E731

    def make_dataloader(tokenizer, batch_size, length, split):
        loader = our_batches(data, batch_size)
        for x, y in loader:
            yield array(x), array(y), loader.epoch

    return types.SimpleNamespace(
        MAX_SEQ_LEN=prepare.MAX_SEQ_LEN,
        TIME_BUDGET=seconds,
        Tokenizer=Tokenizer,
        make_dataloader=make_dataloader,
        evaluate_bpb=evaluate,
    )


def scorer(data, backend: type):
    """A function that scores a model of theirs, called with tokens (B, T) for logits, as ours is scored: by the same
    evaluator, with the same log-softmax, on the same rows. To be made before theirs is given a stub for prepare.py."""
    # What the evaluator asks of the backend needs none of the trials that opening it makes.
    evaluating = type("Evaluating", (backend,), {"__init__": lambda self: None})()

    def scored(model) -> dict:
        in_parts = types.SimpleNamespace(hidden=model, logits=lambda rows: rows)
        bpb = prepare.evaluate_bpb(evaluating, in_parts, data)
        return dict(val_bpb=bpb, val_rows=data.eval_rows, eval=data.eval_tag, data=data.data_tag)

    return scored


# ---- PyTorch: karpathy/autoresearch and its ports ----


def run_torch(options) -> dict:
    """Its clock leaves its first 11 steps uncounted (one, without a GPU): those of compilation, and learned from."""
    import torch

    data, measured = prepare.open_data(), {}
    scored = torch_scorer(data)

    def evaluate(model, *_) -> float:
        measured.update(gigabytes=torch_peak() / 1e9)  # before the evaluation
        if options.score:
            measured.update(scored(getattr(model, "_orig_mod", model)))  # other batches would compile it anew
        return measured.get("val_bpb", float("nan"))

    uncounted = 10 if torch.cuda.is_available() else 1
    source = seeded(torch_source(options), options).replace("step > 10", f"step > {uncounted}")
    theirs = run_torch_source(source, options, data, options.seconds, evaluate)
    counted, seconds = theirs.step - uncounted - 1, theirs.total_training_time
    return dict(
        tokens_per_second=counted * theirs.TOTAL_BATCH_SIZE / seconds,
        steps=theirs.step,
        seconds=seconds,
        tokens_per_step=theirs.TOTAL_BATCH_SIZE,
        rows=theirs.DEVICE_BATCH_SIZE,
        depth=theirs.DEPTH,
        flops_per_token=theirs.num_flops_per_token,
        attention_provider=getattr(theirs, "attention_provider", None),
        **measured,
    )


def torch_source(options) -> str:
    """Its source with our sizes. Flash Attention 3, where it asks for it, becomes ours (--fa3) or the module given by
    --attention; the check for macOS goes, and what needs CUDA where there is none. With --float32 autocast is turned
    off and bfloat16 casts become float32."""
    import torch

    source = sized(options.theirs.read_text(), options)
    if options.attention:
        sys.path.insert(0, str(options.attention.resolve().parent))
    if options.attention or options.fa3:
        fa3 = f"from {options.attention.stem} import flash_attn as fa3" if options.attention else ""
        source = re.sub(r"(?ms)^from kernels import.*?^fa3 = [^\n]*$", fa3, source)
    source = source.replace("\nverify_macos_env()\n", "\n")
    if not torch.cuda.is_available():
        source = source.replace("torch.cuda.synchronize()", "None").replace('device_type="cuda"', 'device_type="cpu"')
        source = source.replace('torch.device("cuda")', 'torch.device("cpu")')
    if options.float32:
        source = re.sub(r"torch\.amp\.autocast\([^)]*\)", "__import__('contextlib').nullcontext()", source)
        source = source.replace("torch.bfloat16", "torch.float32").replace(".bfloat16()", ".float()")
    return source


def by_steps(source: str) -> str:
    """The original's source (no port's) with schedule and end by steps instead of time: TIME_BUDGET is how many."""
    source = replaced(source, "progress = min(total_training_time / TIME_BUDGET, 1.0)", "progress = step / TIME_BUDGET")
    return replaced(source, "if step > 10 and total_training_time >= TIME_BUDGET:", "if step >= TIME_BUDGET:")


def run_torch_source(source: str, options, data, budget: float, evaluate=lambda *_: float("nan"), **variables):
    """Runs it on our data: the module, as it is at the end.

    Args:
        budget: its TIME_BUDGET.
        evaluate: stands for its evaluate_bpb(model, tokenizer, batch_size).
        variables: that the source reads beside its own.
    """
    import torch

    def array(x):
        tensor = torch.from_numpy(x)
        return tensor.pin_memory().to("cuda", non_blocking=True).long() if torch.cuda.is_available() else tensor.long()

    if options.fa3:
        variables["fa3"], variables["attention_provider"] = flash_attention_3()
    sys.modules["prepare"] = stub(data, budget, array, evaluate)
    return execute("theirs", source, **variables)


def flash_attention_3():
    """What the original calls `fa3`, and the name of its provider: the one that the profile names, else the first that
    loads, as ours does it. (No backend is opened: theirs gets a process without our settings.)"""
    import calibration
    from backends.cuda import providers
    from backends.cuda.flash3 import flash3

    calibrated, refused = calibration.defaults().calibrated, []
    wanted = calibrated and calibrated.attention_provider
    for name, load in [(wanted, functools.partial(providers.load_named, wanted))] if wanted else providers.providers():
        problem = providers.take(name, load)
        if not problem:
            break
        refused.append(f"{name}: {problem}")
    else:
        raise SystemExit(f"no Flash Attention 3 for --fa3 ({'; '.join(refused)})")

    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        return flash3(q, k, v, window_size[0] if window_size[0] < q.shape[1] - 1 else None)

    module: Any = types.ModuleType("fa3")
    module.flash_attn_func = flash_attn_func
    return module, name


def our_name(name: str) -> str:
    """A parameter of the original under our name."""
    name = name.removeprefix("transformer.").replace("value_embeds.", "value_embeds.layer")
    return f"blocks.{name[2:]}" if name.startswith("h.") else name


def torch_scorer(data):
    from backends.pytorch import device, runtime
    from backends.pytorch.backend import PyTorchBackend

    runtime.device = device.pick()
    return scorer(data, PyTorchBackend)


def torch_peak() -> int:
    """The most bytes that were in use at once."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_resident()


# ---- MLX ----


def run_autoresearch_mlx(options) -> dict:
    """train.py of trevin-creator/autoresearch-mlx: ours in shape, but for windows that are one token narrower, and
    AdamW for every parameter."""
    import mlx.core as mx

    data, measured = prepare.open_data(), {}
    scored = mlx_scorer(data)

    def evaluate(model, *_) -> float:
        measured.update(gigabytes=mx.get_peak_memory() / 1e9)  # before the evaluation
        if options.score:
            measured.update(scored(model))
        return measured.get("val_bpb", float("nan"))

    sys.modules["prepare"] = stub(data, options.seconds, mx.array, evaluate)
    theirs = execute("theirs", sized(mlx_source(options), options))
    counted = theirs.step - theirs.STARTUP_EXCLUDE_STEPS
    return dict(
        tokens_per_second=counted * theirs.TOTAL_BATCH_SIZE / theirs.total_training_time,
        steps=theirs.step,
        tokens_per_step=theirs.TOTAL_BATCH_SIZE,
        seconds=theirs.total_training_time,
        **measured,
    )


class Trained(Exception):
    """Ends parameter-golf's main() where training has ended: its int8 export and evaluation are not of interest."""


def run_parameter_golf(options) -> dict:
    """train_gpt_mlx.py of openai/parameter-golf at our layers, width, heads, MLP, vocabulary and batches.

    What stays different: a tied head and no value embeddings, so fewer parameters to update; skips from the first
    half of the layers to the second; Muon without variance reduction, on one matrix after the other, in float32. Its
    own compilation steps come before its clock. Environment variables it knows and that are not set here reach it:
    MLX_EAGER_EVAL=0, say, which it advises where there is memory enough (by default it evaluates after every pass).
    """
    import mlx.core as mx
    import numpy as np

    data, models, times = prepare.open_data(), [], {}
    width, rows = -(-options.depth * 64 // 128) * 128, options.device_batch
    per_pass = rows * prepare.MAX_SEQ_LEN
    scored = mlx_scorer(data)

    class Batches:
        def __init__(self, *_, **__):
            self.batches = our_batches(data, rows)

        def next_batch(self, tokens, length):
            assert (tokens, length) == (per_pass, prepare.MAX_SEQ_LEN)
            return tuple(map(mx.array, next(self.batches)))

    def heard(message, **to):
        """Its print: the log has its times, at each step "step:1/9 ... train_time:20ms ...", or the words in the other
        order when it stops."""
        print(message, **to)
        step, time = (re.search(rf"\b{word}:(\d+)", str(message)) for word in ("step", "train_time"))
        if step and time:
            times[int(step[1])] = int(time[1]) / 1000
        if str(message).startswith("stopping_early"):
            raise Trained

    def made(**shape):
        models.append(build(**shape))
        return models[-1]

    def logits(tokens):
        model = models[-1]
        hidden = model(tokens)
        return model.softcap(hidden @ model.tok_emb.weight.astype(hidden.dtype).T)  # as its loss has it

    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            NUM_LAYERS=options.depth,
            MODEL_DIM=width,
            NUM_HEADS=width // 128,
            NUM_KV_HEADS=width // 128,
            MLP_MULT=4,
            VOCAB_SIZE=data.vocab_size,
            TRAIN_SEQ_LEN=prepare.MAX_SEQ_LEN,
            TRAIN_BATCH_TOKENS=options.total_batch,
            GRAD_ACCUM_STEPS=options.total_batch // per_pass,
            MLX_MAX_MICROBATCH_TOKENS=per_pass,
            WARMUP_STEPS=2,
            VAL_BATCH_SIZE=options.total_batch,
            VAL_LOSS_EVERY=0,
            TRAIN_LOG_EVERY=1,
            ITERATIONS=10**9,
            MAX_WALLCLOCK_SECONDS=options.seconds,
            OUT_DIR=folder,
            SEED=options.seed,
        )
        os.environ.update({name: str(value) for name, value in settings.items()})
        tokenizer = types.SimpleNamespace(vocab_size=lambda: data.vocab_size)
        sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=lambda model_file: tokenizer)
        theirs = execute("theirs", mlx_source(options), __file__=str(options.theirs), print=heard)
        build, theirs.GPT, theirs.TokenLoader = theirs.GPT, made, Batches
        theirs.validate_dataset_tokenizer_pair = lambda *_: (data.name, len(data.train), None)
        theirs.load_validation_tokens = lambda _, length: data.validation_rows[0].astype(np.int32)
        lengths, never = data.token_bytes.astype(np.int16), np.zeros(data.vocab_size, bool)
        theirs.build_sentencepiece_luts = lambda *_: (lengths, never, never)
        try:
            theirs.main()
        except Trained:
            pass
    gigabytes, steps = mx.get_peak_memory() / 1e9, max(times)
    if steps < 2:
        raise SystemExit("no step was counted: give it more --seconds")
    # Its optimizer, which the compilation steps leave out, runs first in step 1.
    rate = (steps - 1) * options.total_batch / (times[steps] - times[1])
    return dict(
        tokens_per_second=rate,
        steps=steps,
        tokens_per_step=options.total_batch,
        seconds=times[steps],
        gigabytes=gigabytes,
        **(scored(logits) if options.score else {}),
    )


def mlx_source(options) -> str:
    source = seeded(options.theirs.read_text(), options)
    return source.replace("mx.bfloat16", "mx.float32") if options.float32 else source


def mlx_scorer(data):
    from backends.mlx.backend import MlxBackend

    return scorer(data, MlxBackend)
