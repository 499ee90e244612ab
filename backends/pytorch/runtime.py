"""What this process computes on. Set once, by `open_backend`; read by `nn`, `ops` and the trainer."""

import torch

device = torch.device("cpu")
dtype = torch.float32  # the compute precision; master weights are always float32
compiled = False  # whether torch.compile works here and pays
compiler = None  # the thread that loads it
attention = {"full": "sdpa_mask", "window": "sdpa_mask"}  # which implementation, by kind of window
added_attention = {}  # further implementations by name, which a backend brings
uncompiled_attention = attention  # the same, for when a step turns out not to compile
kernels = frozenset()  # which of our Triton kernels: "mlp", "projection", "cross_entropy"
logits_at_once = 2**21  # of the cross-entropy's chunks, in float32


def has_kernel(name: str, x: torch.Tensor) -> bool:
    """Whether one of our kernels is to compute this: they are for half precision on a GPU."""
    return name in kernels and x.dtype in (torch.bfloat16, torch.float16)


def maybe_compile(function):
    """`function` compiled for fixed shapes where that works here, else as it is."""
    if compiled and compiler:
        compiler.join()
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate" in str(error))
    )
