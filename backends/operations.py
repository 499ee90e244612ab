"""What `train.py` computes with: one table of signatures, from which both implementations, the checker and the tests
are made. `python -m backends.surface` prints it.

Names, keyword-only arguments and defaults are those of the Python Array API standard (2024.12) where it has them.
Where the standard leaves a choice, or not every framework follows it, the table decides: an operation of two arrays
takes a number on either side; `take`, `take_along_axis` and `nn.Embedding` count negative indices from the end, and
give NaN for an index out of range (for integers, the nearest element): an error would have to wait for the device. At
a tie the gradient of `maximum`, `minimum` and `clip` is that of x beside a number, and half of each of two arrays; that
of `std` is 0 where nothing varies.

Random numbers are drawn in training only, by the counter-based generator Squares (Widynski 2020, arXiv:2004.06278): a
few operations on integers, where Threefry takes a compiler half a minute. `key=(seed, place)` are two integers. Element
i of a draw is

    squares32(counter=2^32 pass + i, key=mix(mix(seed) + place) | 1),

where `pass` is the number of forward and backward passes that the Trainer made before this one, and `mix` a step of
SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195). So every backend draws the same bits, a new draw elsewhere
changes none of them, and two draws with the same key in one pass are the same numbers.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Columns: the call; the dtype of the result; the gradient; the meaning.
# dtype: "x", as the arguments (mixed ones are promoted); "float", the same, but float32 for integers; else its name,
# where "int" is the backend's integer for positions and "compute" the compute precision.
# gradient: "yes"; "zero", where it is zero by definition; "-", where there is none by definition.
TABLE = """
# Element by element
abs(x, /)                                              x         yes   |x|
cos(x, /)                                              float     yes   cosine
exp(x, /)                                              float     yes   e to the power of x
gelu(x, /)                                             x         yes   x (1 + erf(x / sqrt(2))) / 2
log(x, /)                                              float     yes   natural logarithm
negative(x, /)                                         x         yes   -x
relu(x, /)                                             x         yes   max(x, 0)
rsqrt(x, /)                                            float     yes   1 / sqrt(x)
sigmoid(x, /)                                          float     yes   1 / (1 + exp(-x))
sign(x, /)                                             x         zero  -1, 0 or 1
silu(x, /)                                             x         yes   x sigmoid(x)
sin(x, /)                                              float     yes   sine
sqrt(x, /)                                             float     yes   square root
square(x, /)                                           x         yes   x * x
tan(x, /)                                              float     yes   tangent
tanh(x, /)                                             float     yes   hyperbolic tangent
add(x1, x2, /)                                         x         yes   x1 + x2
divide(x1, x2, /)                                      float     yes   x1 / x2
maximum(x1, x2, /)                                     x         yes   the larger of two
minimum(x1, x2, /)                                     x         yes   the smaller of two
multiply(x1, x2, /)                                    x         yes   x1 * x2
pow(x1, x2, /)                                         x         yes   x1 to the power of x2
subtract(x1, x2, /)                                    x         yes   x1 - x2
clip(x, /, min=None, max=None)                         x         yes   x held between two numbers
where(condition, x1, x2, /)                            x         yes   x1 where the condition holds, else x2

# Comparisons
equal(x1, x2, /)                                       bool      -     x1 == x2
greater(x1, x2, /)                                     bool      -     x1 > x2
greater_equal(x1, x2, /)                               bool      -     x1 >= x2
less(x1, x2, /)                                        bool      -     x1 < x2
less_equal(x1, x2, /)                                  bool      -     x1 <= x2
logical_and(x1, x2, /)                                 bool      -     of two boolean arrays
logical_not(x, /)                                      bool      -     of a boolean array
logical_or(x1, x2, /)                                  bool      -     of two boolean arrays

# Over axes; axis: an integer, a tuple of them (not for argmax), or None for all
argmax(x, /, *, axis=None, keepdims=False)             int       -     where the largest is, the first of equals
logsumexp(x, /, *, axis=None, keepdims=False)          float     yes   log(sum(exp(x)))
max(x, /, *, axis=None, keepdims=False)                x         yes   the largest
mean(x, /, *, axis=None, keepdims=False)               float     yes   the mean
min(x, /, *, axis=None, keepdims=False)                x         yes   the smallest
std(x, /, *, axis=None, correction=0, keepdims=False)  float     yes   standard deviation, over n - correction
sum(x, /, *, axis=None, keepdims=False)                x         yes   the sum
var(x, /, *, axis=None, correction=0, keepdims=False)  float     yes   variance, over n - correction

# Along an axis; None: flip turns all, roll takes the flat array, a cumulative operation wants a vector
cumulative_prod(x, /, *, axis=None)                    x         yes   products of all up to here
cumulative_sum(x, /, *, axis=None)                     x         yes   sums of all up to here
flip(x, /, *, axis=None)                               x         yes   in reverse order; None for every axis
roll(x, /, shift, *, axis=None)                        x         yes   shifted; what leaves one end enters at the other
softmax(x, /, *, axis=-1)                              x         yes   exp(x) / sum(exp(x)), normalised in float32
sort(x, /, *, axis=-1, descending=False)               x         yes   in order
take(x, indices, /, *, axis)                           x         yes   these positions of an axis; indices of any shape
take_along_axis(x, indices, /, *, axis=-1)             x         yes   the same, with indices for each place
topk(x, k, /, *, axis=-1)                              x         yes   (values, indices) of the k largest, largest first

# Shapes
broadcast_to(x, /, shape)                              x         yes   repeated to this shape
concat(arrays, /, *, axis=0)                           x         yes   one after another on an axis that they have
expand_dims(x, /, *, axis=0)                           x         yes   with new axes of length 1; axis may be a tuple
matrix_transpose(x, /)                                 x         yes   the last two axes exchanged
permute_dims(x, /, axes)                               x         yes   its axes in this order
reshape(x, /, shape)                                   x         yes   in this shape, where one length may be -1
squeeze(x, /, axis)                                    x         yes   without these axes of length 1
stack(arrays, /, *, axis=0)                            x         yes   one after another on a new axis
tril(x, /, *, k=0)                                     x         yes   zero above the k-th diagonal of the last two axes
triu(x, /, *, k=0)                                     x         yes   zero below it

# Products
einsum(subscripts, /, *arrays)                         x         yes   such as einsum("bth,hk->btk", x, w)
matmul(x1, x2, /)                                      x         yes   x1 @ x2

# Arrays, precision, gradients
arange(start, /, stop=None, step=1)                    int       -     integers from start (0 if alone) to before stop
asarray(obj, /)                                        obj       -     a number, list or numpy array; float in float32
full(shape, fill_value)                                float32   -     this number everywhere
ones(shape)                                            float32   -     1 everywhere
ones_like(x, /)                                        x         -     1 everywhere, in x's shape
zeros(shape)                                           float32   -     0 everywhere
zeros_like(x, /)                                       x         -     0 everywhere, in x's shape
astype(x, dtype, /)                                    dtype     yes   to another .dtype, or "float32", "int32", "bool"
compute(x, /)                                          compute   yes   x in the compute precision
float32(x, /)                                          float32   yes   x in float32
stop_gradient(x, /)                                    x         zero  x, as a constant

# Transformers
attention(q, k, v, /, window=None, *, scale=None, softcap=None, bias=None, documents=None)  x  yes  see below
fusable(function, /)                                   -         -     as a decorator: see below
mean_loss(head, loss, hidden, targets, /)              float32   yes   see below
rms_norm(x, /)                                         x         yes   x / sqrt(mean(x^2, last axis) + 2^-23)
rope(x, /, base)                                       x         yes   rotary embedding: see below

# Random numbers, in training only
dropout(x, rate, /, *, key)                            x         yes   0 with probability rate, else x / (1 - rate)
training()                                             -         -     whether this is a pass of the Trainer
uniform(shape, /, *, key)                              float32   -     in [0, 1), multiples of 2^-24
"""

NOTES = """
attention   q (B, T, H, D), k and v (B, T, H_kv, D) with H a multiple of H_kv, to (B, T, H, D). Query i sees the keys j
            with i - window <= j <= i, or all j <= i for None. Its scores are q k scale (D^-1/2 for None), then with
            softcap: softcap tanh(score / softcap); then with bias (H, N): + bias[h, min(i - j, N - 1)]. With documents
            (B, T), integers, it sees only keys of its own document: documents = ops.cumulative_sum(ops.astype(
            tokens == BOS, "int32"), axis=1). softcap, bias and documents may be slower than a plain window.
rope        x (B, T, H, D): halves split, position on axis 1, frequencies base^(-2i/D); y1 = x1 cos + x2 sin,
            y2 = x2 cos - x1 sin (Su et al. 2021, arXiv:2104.09864, with the sign that the original project has).
mean_loss   the mean over tokens of loss(head(hidden), targets), for hidden (B, T, C) and targets (B, T). `head` is a
            method of the model, which makes float32 logits (N, V) of a chunk of hidden (N, C), from it and the model's
            parameters alone; `loss` makes each token's loss (N,) of them and of targets (N,). No logits of the whole
            batch are held.
fusable     where a backend has a kernel for exactly what the function computes, that runs in its place
            (backends/fusion.py); else the function runs as it is written.
key         of a random draw: (seed, place), two integers. The same key in the same pass draws the same numbers, so each
            place in the model needs its own. A residual branch is left out, row by row (stochastic depth), by
            x + ops.dropout(ops.ones((B, 1, 1)), 0.1, key=(SEED, layer)) * block(x).
"""

# `nn`, in the same form.
MODULES = """
Module                   subclasses call super().__init__() and define forward; calling the module calls it
Linear(n_in, n_out)      y = x @ weight.T, no bias; weight (n_out, n_in)
Embedding(n, dim)        rows of weight (n, dim) for integer tokens, cast to the compute precision
ModuleList(modules)      indexed and iterated; names "blocks.0. ..."
ModuleDict({name: ...})  indexed by name; `in`, .items(); a purely numeric key is an error
Parameter(shape)         a float32 array of zeros to be trained; read in forward it is in the compute precision
"""
NN = tuple(re.findall(r"^\w+", MODULES, re.MULTILINE))

# What frameworks call an operation or an argument, and its name here.
OTHER_NAMES = {
    "amax": "max",
    "amin": "min",
    "array": "asarray",
    "cat": "concat",
    "clamp": "clip",
    "concatenate": "concat",
    "constant": "asarray",
    "cumprod": "cumulative_prod",
    "cumsum": "cumulative_sum",
    "detach": "stop_gradient",
    "expand_as": "broadcast_to",
    "gather": "take_along_axis",
    "index_select": "take",
    "moveaxis": "permute_dims",
    "movedim": "permute_dims",
    "permute": "permute_dims",
    "rand": "uniform",
    "scaled_dot_product_attention": "attention",
    "swapaxes": "permute_dims",
    "tensor": "asarray",
    "transpose": "permute_dims",
    "type_as": "astype",
    "unsqueeze": "expand_dims",
}
OTHER_ARGUMENTS = {
    "ddof": "correction",
    "diagonal": "k",
    "dim": "axis",
    "dims": "axes",
    "keepdim": "keepdims",
    "shifts": "shift",
    "window_size": "window",
}


@dataclass(frozen=True)
class Operation:
    """A line of the table.

    Attributes:
        dtype, gradient: as the head of the table explains them.
    """

    name: str
    signature: inspect.Signature
    dtype: str
    gradient: str
    meaning: str

    def __str__(self):
        return f"{self.name}{self.signature}"

    @property
    def keywords(self) -> list[str]:
        """The arguments that may be given by name."""
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return [p.name for p in self.signature.parameters.values() if p.kind in kinds]


def _parsed(table: str) -> dict[str, Operation]:
    operations = {}
    for line in table.splitlines():
        if line and not line.startswith("# "):
            call, dtype, gradient, meaning = re.split(r" {2,}", line)
            name = call[: call.index("(")]
            scope = {}
            exec(f"def {call}: ...", scope)
            operations[name] = Operation(name, inspect.signature(scope[name]), dtype, gradient, meaning)
    return operations


OPERATIONS = _parsed(TABLE)
OPS = sorted(OPERATIONS)
OPERATORS = {  # operations that each framework's arrays carry out by Python's operator
    "add": operator.add,
    "divide": operator.truediv,
    "equal": operator.eq,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
    "matmul": operator.matmul,
    "multiply": operator.mul,
    "pow": operator.pow,
    "subtract": operator.sub,
}


class Operations:
    """A backend's `ops`: every operation of the table, its arguments checked against it.

    Args:
        implementations: a function for each name. It is called with the arguments that the table allows by position
            for positional-only ones, by name for all others, defaults filled in.

    Raises:
        LookupError: an implementation is missing.
    """

    def __init__(self, implementations: Mapping[str, Callable]):
        if missing := [name for name in OPS if name not in implementations]:
            raise LookupError(", ".join(missing))
        for name in OPS:
            setattr(self, name, _checked(OPERATIONS[name], implementations[name]))

    def __getattr__(self, name):
        raise AttributeError(unknown_operation(name))


def _checked(operation: Operation, implementation: Callable) -> Callable:
    """`implementation` behind the operation's signature: a function made of source text, so that Python binds the
    arguments and a compiler that traces it finds nothing but a call."""
    parameters = operation.signature.parameters.values()
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    heads, passed = [], []
    for p in parameters:
        default = "" if p.default is p.empty else f"={p.default!r}"
        if p.kind is p.KEYWORD_ONLY and not variadic:
            heads.append("*surplus")
            variadic = True
        heads.append(f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name + default)
        passed.append({p.POSITIONAL_ONLY: p.name, p.VAR_POSITIONAL: f"*{p.name}"}.get(p.kind, f"{p.name}={p.name}"))
    places = [i for i, p in enumerate(parameters) if p.kind is p.POSITIONAL_ONLY]
    if places:
        heads.insert(places[-1] + 1, "/")
    if not variadic:
        heads.append("*surplus")
    surplus = "surplus" if "*surplus" in heads else "()"
    source = (
        f"def {operation.name}({', '.join(heads)}, **unknown):\n"
        f"    if {surplus} or unknown:\n"
        f"        raise TypeError(misused({operation.name!r}, {surplus}, unknown))\n"
        f"    return implementation({', '.join(passed)})\n"
    )
    scope = {"implementation": implementation, "misused": misused}
    exec(compile(source, f"<ops.{operation.name}>", "exec"), scope)
    function = scope[operation.name]
    function.__signature__, function.__doc__ = operation.signature, operation.meaning
    return function


def misused(name: str, surplus=(), unknown=()) -> str:
    """What to say of a call of an operation with these positional arguments too many, and these unknown keywords."""
    operation = OPERATIONS[name]
    parameters = operation.signature.parameters.values()
    problems = []
    if surplus:
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        problems.append(
            f"takes {len(positional)} argument{'s' * (len(positional) != 1)} by position and got "
            f"{len(positional) + len(surplus)}"
        )
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY][: len(surplus)]
        if by_name:
            problems[-1] += f": write {', '.join(f'{key}=...' for key in by_name)}"
    for key in unknown:
        near = nearest(key, operation.keywords, OTHER_ARGUMENTS)
        problems.append(f"has no argument {key}=" + (f": write {near}=" if near else ""))
    return f"ops.{name} {'; it '.join(problems)}. Its signature: ops.{operation}"


def unknown_operation(name: str) -> str:
    near = nearest(name, OPS)
    advice = f": did you mean ops.{near}?" if near else "."
    return f"there is no ops.{name}{advice} `python -m backends.surface` lists what there is"


def nearest(name: str, known, other_names: Mapping[str, str] = OTHER_NAMES) -> str | None:
    """The name here of what a framework calls `name`, or the most similar one; None if none is."""
    if other_names.get(name) in known:
        return other_names[name]
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


# --- What both implementations ask ------------------------------------------------------------------------------------


def check_attention(query_heads: int, key_heads: int, window, bias_heads: int | None = None) -> None:
    """Raises ValueError unless each key and value head serves the same number of query heads, the window is None or a
    whole number not below zero, and the bias has a row for each head."""
    if not key_heads or query_heads % key_heads:
        raise ValueError(
            f"attention with {query_heads} query heads and {key_heads} key and value heads: the first has "
            "to be a multiple of the second"
        )
    if window is not None and (not isinstance(window, int) or window < 0):
        raise ValueError(f"attention with window={window!r}: how many tokens it reaches back, 0 or more; None for all")
    if bias_heads not in (None, query_heads):
        raise ValueError(
            f"attention with a bias for {bias_heads} heads and {query_heads} query heads: bias has the shape (H, N), "
            "a row for each query head, a column for each distance"
        )


DTYPES = ("bool", "int32", "float32")


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(
            f"ops.astype(x, {name!r}): another array's .dtype, or one of {', '.join(map(repr, DTYPES))}; "
            "ops.compute(x) gives the compute precision"
        )


def check_rate(rate) -> None:
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"ops.dropout with rate {rate!r}: a number from 0 to below 1, the share that becomes zero")


def vector_axis(axis: int | None, ndim: int) -> int:
    """The axis of a cumulative operation. Raises ValueError where it has to be named."""
    if axis is None and ndim != 1:
        raise ValueError(f"a cumulative operation over an array of {ndim} axes: name one, such as axis=1")
    return 0 if axis is None else axis


# --- Random numbers ---------------------------------------------------------------------------------------------------


def mix(state: int) -> int:
    """What SplitMix64 gives next from this state: 64 bits."""
    state = state + 0x9E3779B97F4A7C15 & 2**64 - 1
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    state = (state ^ state >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return state ^ state >> 31


def generator_key(key) -> int:
    """The generator's key, 64 bits, of draws with key=(seed, place). Raises TypeError for another key."""
    if not isinstance(key, (tuple, list)) or [isinstance(part, int) for part in key] != [True, True]:
        raise TypeError(f"key={key!r}: a random draw wants key=(seed, place), two integers, such as key=(SEED, 3)")
    return mix(mix(key[0]) + key[1]) | 1


def squares(counter, key, upper=lambda x: x >> 32):
    """Squares with four rounds, of which the result is 32 bits, in arithmetic of 64 bits that wraps.

    Args:
        upper: the upper 32 bits of 64; where the arithmetic has a sign, they must not take it along.
    """
    x = y = counter * key
    z = y + key
    for addend in (y, z, y):
        x = x * x + addend
        x = upper(x) | x << 32
    return upper(x * x + z)


OUTSIDE = (
    "ops.uniform draws only in training, and this is not a pass of a Trainer: evaluation must not be random. Check "
    "ops.training() first, or use ops.dropout, which is off in evaluation"
)
