"""Whether our kernels are right and faster here than what the compiler makes of plain operations."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from backends import bench
from backends.pytorch import cross_entropy, mlp, rotary, runtime
from backends.pytorch.bench import worst_error

WIDTH, HEAD_DIM, VOCABULARY = 512, 128, 8192
LENGTH, ROWS = 2048, 64  # of the timing: so many that it is not the host that is timed; fewer of the check
BYTES_PER_TOKEN = 2**16  # that the widest case may take, with gradients
BASE, SOFTCAP = 10000, 15.0
LONGEST, ENDED = 600, "their trial ended"  # seconds


def _mlp(x):
    return mlp.squared_relu_mlp, (x, _weight(4 * WIDTH), _weight(WIDTH, 4 * WIDTH))


def _projection(x):
    def projected(x, *weights):
        return rotary.rotary_qkv(x, *weights, HEAD_DIM, BASE)

    return projected, (x, *(_weight(WIDTH, seed=seed) for seed in range(3)))


def _cross_entropy(x):
    targets = torch.randint(VOCABULARY, x.shape[:2], device=x.device)

    def loss(x, weight):
        return cross_entropy.softcapped_cross_entropy(x, weight, targets, SOFTCAP)

    return loss, (x, _weight(VOCABULARY))


# By name: what makes a function and the arrays it is called with, from x (B, T, WIDTH). Its module has the same name.
CASES = {"mlp": _mlp, "projection": _projection, "cross_entropy": _cross_entropy}


def why_none(device: torch.device) -> str | None:
    """Why no kernel can serve this device, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "none (for NVIDIA GPUs)"
    if runtime.dtype == torch.float32:
        return "none (for half precision)"
    try:
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError as error:
        return f"none ({bench.first_line(error)})"
    return None


def digest() -> str:
    """The digest of the kernels' sources: changed kernels are tried again."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]


def known(variants: dict[str, int]) -> bool:
    """Whether there are such kernels: a profile may be older than they."""
    return all(name in CASES and variant < len(_module(name).VARIANTS) for name, variant in variants.items())


def load(variants: dict[str, int]) -> None:
    """Registers these kernels' operations, in these variants, and has the surface use them."""
    for name, variant in variants.items():
        _module(name).variant = variant
    runtime.kernels = frozenset(variants)


def _module(name):
    return importlib.import_module(f"backends.pytorch.kernels.{name}")


def try_apart() -> dict:
    """`try_all` in a process of its own: a kernel that faults on this chip takes only that down."""
    runs_on = [
        str(runtime.device),
        str(runtime.dtype).removeprefix("torch."),
        str(int(runtime.compiled)),
        str(runtime.logits_at_once),
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *runs_on],
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return dict.fromkeys(CASES, f"their trial took more than {LONGEST} s")
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [""]
        return dict.fromkeys(CASES, f"{ENDED} with status {done.returncode}: {lines[-1][:120]}")


def lasts(tried: dict) -> bool:
    """Whether this will hold: not that memory was full, nor that the trial was ended, by whatever."""
    return not any(isinstance(found, str) and found.startswith((ENDED, "out of memory")) for found in tried.values())


def try_all(names) -> dict:
    """By name: the "variant" that is right and fastest, and seconds with it ("kernel") and of plain operations, both
    forward and backward in a compiled graph where runs are compiled; or why there is none."""
    results = {}
    for name in names:
        tried = {}
        try:
            for variant in range(len(_module(name).VARIANTS)):
                tried[variant] = _try(name, variant)
            load({})
            right = {variant: took for variant, took in tried.items() if not isinstance(took, str)}
            if right:
                best = min(right, key=right.get)
                plain = _seconds(name, runtime.maybe_compile)
                load({name: best})
                results[name] = {"kernel": _seconds(name, runtime.maybe_compile), "variant": best, "plain": plain}
            else:
                results[name] = tried[0]
        except Exception as error:  # such as a Triton that lacks what a kernel needs
            results[name] = bench.reason(runtime, error)
        finally:
            load({})
    return results


def _try(name: str, variant: int) -> float | str:
    """Seconds of one variant, or why it can't be used: too little shared memory, say."""
    try:
        load({name: variant})
        tolerance = bench.ATTENTION_TOLERANCE[str(runtime.dtype).removeprefix("torch.")]
        return bench.beyond(_error(name), tolerance) or _seconds(name)
    except Exception as error:
        return bench.reason(runtime, error)


def choose(tried: dict) -> dict[str, int]:
    """The variant of each kernel that the compiler is not faster than: where both are close, the kernel keeps less in
    memory."""
    return {
        name: found["variant"]
        for name, found in tried.items()
        if not isinstance(found, str) and found["kernel"] <= bench.CLOSE * found["plain"]
    }


def described(tried: dict) -> str:
    """The result of each kernel, for a note."""
    chosen = choose(tried)
    return ", ".join(
        f"{name} {found}"
        if isinstance(found, str)
        else f"{name} {found['plain'] / found['kernel']:.2f} times as fast{'' if name in chosen else ' (not used)'}"
        for name, found in tried.items()
    )


def _error(name: str) -> float:
    """The error of outputs and gradients, relative to plain operations in float32."""
    function, inputs = CASES[name](_drawn(2, 257, WIDTH))  # no multiple of any tile
    inputs = [t.to(runtime.dtype) for t in inputs]
    wanted = _with_gradients(function, [t.float() for t in inputs])  # which no kernel computes
    return worst_error(_with_gradients(function, inputs), wanted)


def _seconds(name: str, prepared=lambda function: function) -> float:
    memory = torch.cuda.mem_get_info(runtime.device)[0]
    rows = max(1, min(ROWS, memory // 2 // BYTES_PER_TOKEN // LENGTH))
    function, inputs = CASES[name](_drawn(rows, LENGTH, WIDTH))
    inputs = [t.to(runtime.dtype) for t in inputs]
    if name == "projection":
        function(inputs[0][:1], *inputs[1:])  # makes tables that a trace can't make
    function = prepared(function)

    def work(calls):
        for _ in range(calls):
            _with_gradients(function, inputs)
        torch.cuda.synchronize(runtime.device)

    return min(bench.seconds(work))  # what else the machine does only makes them longer


def _with_gradients(function, inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    upstream = [torch.full_like(t, 0.5) for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def _weight(rows: int, columns: int | None = None, seed: int = 0):
    columns = columns or WIDTH
    return _drawn(rows, columns, seed=seed + 1) * columns**-0.5


def _drawn(*shape, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(runtime.device)


def main(device: str, dtype: str, compiled: str, logits_at_once: str) -> None:
    runtime.device, runtime.dtype = torch.device(device), getattr(torch, dtype)
    runtime.compiled, runtime.logits_at_once = compiled == "1", int(logits_at_once)
    if runtime.device.index is not None:
        torch.cuda.set_device(runtime.device)
    print(json.dumps(try_all(CASES)))


if __name__ == "__main__":
    main(*sys.argv[1:])
