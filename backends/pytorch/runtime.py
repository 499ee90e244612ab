"""What this process computes on. Set once, by `open_backend`; read by `nn`, `ops` and the trainer."""

import hashlib
import inspect
from typing import Any

import torch

from backends import interface

device = torch.device("cpu")
dtype = torch.float32  # the compute precision; master weights are always float32
compiled = False  # whether torch.compile works here and pays
by_layer = True  # whether each kind of layer is compiled once, not all layers together
captured = False  # whether what is compiled runs as CUDA graphs, whose kernels the host launches all at once
recorded_memory = 0  # bytes at the peak of a step while its graphs were recorded, of the shape that needs most
_skipped = 0  # graphs that PyTorch had left uncaptured before this trainer was made
compiler = None  # the thread that loads it
attention = {"full": "sdpa_mask", "window": "sdpa_mask"}  # which implementation, by kind of window
added_attention = {}  # further implementations by name, which a backend brings
uncompiled_attention = attention  # the same, for when a step turns out not to compile
kernels = frozenset()  # which of our Triton kernels: "mlp", "projection", "cross_entropy"
logits_at_once = 2**21  # of the cross-entropy's chunks, in float32
_one_node = {}  # by name, functions that the tracer does not look into, with a digest of their modules' text
CACHED = "unsafe_marked_cacheable_functions"  # the compiler's option for such functions


def has_kernel(name: str, x: torch.Tensor) -> bool:
    """Whether one of our kernels is to compute this: they are for half precision on a GPU."""
    return name in kernels and x.dtype in (torch.bfloat16, torch.float16)


def maybe_compile(function, step=False, backend: Any = "inductor", dynamic: bool | None = False):
    """`function` compiled where that works here, else as it is.

    Args:
        step: it is part of a training step, which is repeated with arrays at the same places: see `stays`.
        backend: PyTorch's compiler, or what stands between it and the graph of the function.
        dynamic: False for fixed shapes, None for those marked as dynamic to be so.
    """
    if not compiled:
        return function
    if compiler:
        compiler.join()
    options: dict[str, Any] = {"triton.cudagraphs": step and captured}
    if hasattr(torch._inductor.config, CACHED):  # an older PyTorch caches nothing that has such a node
        for opaque, _ in _one_node.values():
            torch._dynamo.allow_in_graph(opaque)
        options[CACHED] = {name: digest for name, (_, digest) in _one_node.items()}
    return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend, options=options)


def leave_uncompiled() -> None:
    """From now on nothing is compiled in this process."""
    global compiled, attention
    compiled, attention = False, uncompiled_attention


def one_node(function):
    """Has the tracer put this function into its graph as one node: to look into an `autograd.Function` takes 50 ms for
    each layer, at each start. The compiler looks into it, when it compiles.

    Args:
        function: what it computes depends on its arguments and on the text of its module alone. By these the compiler's
            cache knows it.
    """
    digest = hashlib.sha256(inspect.getsource(inspect.getmodule(function)).encode()).hexdigest()
    _one_node[f"{function.__module__}.{function.__name__}"] = function, digest
    return function


def kept(tables: dict, key, value):
    """`value`, kept as tables[key]. What is made while a graph is traced is the graph's, which makes it again in each
    step, and is not: where graphs are recorded, the next step overwrites it."""
    if not torch.compiler.is_compiling():
        tables[key] = value
    return value


def stays(tensor: torch.Tensor) -> None:
    """Says that this array is never replaced by another: a captured step reads and writes it where it is."""
    if captured:
        torch._dynamo.mark_static_address(tensor)


def begin_recording() -> None:
    """Forgets what was recorded, and what was not, for an earlier trainer."""
    global recorded_memory, _skipped
    recorded_memory, _skipped = 0, _skips() if captured else 0  # elsewhere nothing imports the compiler for it


def not_captured() -> str:
    """Why some of what was compiled for this trainer runs without CUDA graphs; empty if all is captured."""
    skipped = _skips() - _skipped
    return f"PyTorch left {skipped} of their graphs uncaptured" if skipped > 0 else ""


def _skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and interface.says_no_memory(str(error))
    )
