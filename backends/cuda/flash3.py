"""Flash Attention 3 (Shah et al. 2024, arXiv:2407.08608) as one operator, whichever build of it was found.

What a build offers is a pair of operators `fwd` and `bwd`. Their arguments differ in number and order between builds,
so they are passed by the names that the build's own schema gives. The operator `autoresearch::flash3` hides that: it
has a fake and a backward of its own, so a compiled graph is not broken by it. It is defined by `Library.define`, not by
`custom_op`, whose checks on each call take longer on the host than the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# What is asked of every build: causal attention, each row of a batch by itself. One split: with more, a row's sums
# would depend on how many rows are beside it.
FIXED = {"causal": True, "is_causal": True, "window_size_right": 0, "num_splits": 1}
NOTHING = {"int": 0, "float": 0.0, "bool": False}  # where a schema wants a value and has no default


@dataclass(frozen=True)
class Kernels:
    """One build.

    Attributes:
        forward: (q, k, v, scale, window to the left or -1) -> (out, lse).
        backward: (dout, q, k, v, out, lse, scale, window) -> (dq, dk, dv).
    """

    forward: Callable
    backward: Callable


_kernels: Kernels | None = None  # those in use


def use(kernels: Kernels | None) -> None:
    global _kernels
    _kernels = kernels


def flash3(q, k, v, window):
    """Attention as `backends/pytorch/attention.py` defines it, for what `takes` there says. q, k and v may be slices of
    one array, as long as their last axis is contiguous."""
    return torch.ops.autoresearch.flash3(q, k, v, -1 if window is None else window)[0]


class Unavailable(Exception):
    """A build that can't be used; says why in a few words."""


def from_module(module) -> Kernels:
    """Those behind a Python interface to Flash Attention 3, whatever that names them."""
    interface = getattr(module, "flash_attn_interface", module)
    ops = next(filter(is_flash3, [*vars(interface).values(), *vars(module).values()]), None)
    if ops is None:
        raise Unavailable("it has no operators fwd and bwd")
    return from_ops(ops)


def is_flash3(ops) -> bool:
    return all(hasattr(getattr(ops, name, None), "default") for name in ("fwd", "bwd"))


def from_ops(ops) -> Kernels:
    """The kernels of a namespace with `fwd` and `bwd`, such as `torch.ops.flash_attn_3`."""
    forward = _by_name(ops.fwd.default, "q k v softmax_scale window_size_left")
    inputs = "dout q k v out softmax_lse softmax_scale window_size_left"
    bwd = ops.bwd.default
    if not any(argument.name == "dq" for argument in bwd._schema.arguments):
        returned = _by_name(bwd, inputs)
        return Kernels(lambda *a: forward(*a)[:2], lambda *a: returned(*a)[:3])
    written = _by_name(bwd, f"{inputs} dq dk dv")

    def backward(dout, q, k, v, *others):
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        written(dout, q, k, v, *others, *gradients)
        return gradients

    return Kernels(lambda *a: forward(*a)[:2], backward)


def _by_name(op, inputs: str) -> Callable:
    """`op` as a function of the arguments so named; the others are as in FIXED, else what the schema has as default,
    else nothing."""
    arguments, inputs = op._schema.arguments, inputs.split()
    names = [argument.name for argument in arguments]
    missing = [name for name in inputs if name not in names]
    if missing:
        raise Unavailable(f"its {op} has no {', '.join(missing)}")
    places = [names.index(name) for name in inputs]
    rest = [
        FIXED[a.name] if a.name in FIXED else a.default_value if a.has_default_value() else NOTHING.get(str(a.type))
        for a in arguments
    ]

    def call(*values):
        given = rest.copy()
        for place, value in zip(places, values):
            given[place] = value
        return op(*given)

    return call


# --- The operator ---

_library = torch.library.Library("autoresearch", "FRAGMENT")
_library.define(
    "flash3(Tensor q, Tensor k, Tensor v, int window) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "flash3_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int window)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(q, k, v, window):
    out, lse = _kernels.forward(_rows(q), _rows(k), _rows(v), q.shape[-1] ** -0.5, window)
    return out.contiguous(), lse.contiguous()


def _backward(dout, q, k, v, out, lse, window):
    dq, dk, dv = _kernels.backward(_rows(dout), _rows(q), _rows(k), _rows(v), out, lse, q.shape[-1] ** -0.5, window)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _forward_fake(q, k, v, window):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


def _backward_fake(dout, q, k, v, out, lse, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, dout, _):
    return *torch.ops.autoresearch.flash3_backward(dout, *ctx.saved_tensors, ctx.window), None


_library.impl("flash3", _forward, "CompositeExplicitAutograd")
_library.impl("flash3_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("autoresearch::flash3", _forward_fake, lib=_library)
torch.library.register_fake("autoresearch::flash3_backward", _backward_fake, lib=_library)
torch.library.register_autograd("autoresearch::flash3", _gradients, setup_context=_save, lib=_library)
