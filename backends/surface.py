"""What `train.py` may use on every backend, and what it uses beyond that.

    python -m backends.surface              prints the surface: a page
    python -m backends.surface train.py     checks a file

Reported are
1. imports of a framework, of Python's `random`, and by name (`importlib`);
2. names that `ops` and `nn` don't have, and arguments that an operation doesn't take, or lacks;
3. methods and attributes that arrays have in some frameworks but not in all: the tables below;
4. `x[x > 0]`, `x[..., ::-1]`, and assignment into `x[:, i]` or `x[x > 0]`;
5. in the methods of an `nn.Module`, arithmetic between an array and one that numpy makes.

No types are known here, so 3 and 4 go by the receiver. Left alone are imported modules and names, literals, what is
made from these (`np.ones(3).mean()`; `rng = np.random.default_rng()`, then `rng.random()`), and each name that the file
gives to a method or attribute of its own. It is a help to whoever edits `train.py`, not a proof: in doubt it is silent.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import terminal
from backends.operations import MODULES, NN, NOTES, OPERATIONS, OPS, OTHER_ARGUMENTS, OTHER_NAMES, TABLE, nearest

FRAMEWORKS = set("cupy flax jax jaxlib keras mlx optax tensorflow tinygrad torch torchao torchvision triton".split())

# Operations that are methods elsewhere.
SAME_NAMES = "argmax astype clip flip logsumexp max mean min roll softmax squeeze std sum topk tril triu var".split()
OTHER_IMPORTS = {
    "importlib": "a plain import: what this file depends on has to be readable in it",
    "random": "ops.dropout or ops.uniform in training, np.random.default_rng(SEED) for weights: other draws don't come "
    "from the run's seed",
}
MAKERS = "arange array asarray eye full linspace ones tri zeros".split()  # numpy's, which give an array


def _table(text: str) -> dict[str, str]:
    """{name: advice} from lines of "name name ...: advice"."""
    lines = (line.split(":", 1) for line in text.strip().splitlines())
    return {name: advice.strip() for names, advice in lines for name in names.split()}


# Array methods outside the surface, and what to write instead for the array x. These are reported however called:
METHODS = {
    name: f"ops.{OTHER_NAMES.get(name, name)}(x, ...)"
    for name in (*OTHER_NAMES, *SAME_NAMES)
    if name not in ("array", "rand", "tensor")
} | _table("""
    view flatten: x.reshape(...)
    repeat tile: ops.concat([x] * n, axis=...)
    repeat_interleave: ops.broadcast_to(x, shape), then .reshape(...)
    masked_fill: ops.where(mask, value, x)
    chunk unbind narrow: slices, such as x[..., :n]
    to: ops.compute(x), ops.float32(x) or ops.astype(x, other.dtype)
    cpu cuda contiguous clone: x itself: backends place arrays and never change them
    mul div pow neg matmul mm bmm: an operator, such as x * y or x @ y
    argmin: ops.argmax(-x, ...)
    argsort: ops.topk(x, n, axis=...)[1], from the largest down
    prod: ops.cumulative_prod(x, axis=...), of which the last
    parameters named_parameters state_dict: backend.weights(model)
    load_state_dict: backend.set_weights(model, weights)
""")
# Only without arguments, because other objects have methods of these names that take some:
BARE = {name: f"ops.{name}(x)" for name in "abs cos exp log relu rsqrt sigmoid sign sin sqrt square tan tanh".split()}
BARE |= _table("""
    t: ops.matrix_transpose(x)
    item tolist numpy: float(x), in the training loop only
    dim: x.ndim
    numel: math.prod(x.shape)
    float double: ops.float32(x)
    half bfloat16: ops.compute(x)
    int long: ops.astype(x, "int32")
    bool: ops.astype(x, "bool")
    backward: trainer.backward(x, y)
""")
# Only with a number or a list first or an axis by name, because strings, lists and others have methods of these names:
NUMBERED = _table("""
    split: slices, such as x[..., :n]
    size: x.shape
    expand: ops.broadcast_to(x, shape)
    norm: ops.sqrt(ops.sum(ops.square(x), axis=...))
    all: ops.min(x, axis=...)
    any: ops.max(x, axis=...)
    round: ops.astype(x, "int32")
    sort: ops.sort(x, axis=...)
""")
ATTRIBUTES = dict.fromkeys(("T", "mT"), "ops.matrix_transpose(x)")
NEVER_IN_PLACE = "ops.where(mask, value, x), or x = x + y: arrays are never changed in place"
IN_PLACE = {
    f"{name}_": NEVER_IN_PLACE
    for name in (
        *METHODS,
        *BARE,
        *NUMBERED,
        *"add addcdiv addcmul copy fill lerp normal requires_grad uniform zero".split(),
    )
}
INSTEAD = METHODS | BARE | NUMBERED | ATTRIBUTES | IN_PLACE

LITERALS = (ast.Constant, ast.JoinedStr, ast.List, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp)


@dataclass(frozen=True, order=True)
class Problem:
    """A use beyond the surface: the line, what stands there, and what to write instead."""

    line: int
    found: str
    use: str


def check(source: str, filename: str = "train.py") -> list[Problem]:
    """The problems in this source, ordered by line. SyntaxError, with `filename`, if it is not valid Python."""
    return list(_checked(source, filename))


@lru_cache(maxsize=128)  # a search makes the same edits of the best again and again
def _checked(source: str, filename: str) -> tuple[Problem, ...]:
    return tuple(sorted(_Checker(ast.parse(source, filename)).problems))


class _Checker(ast.NodeVisitor):
    def __init__(self, tree: ast.Module):
        self.problems: set[Problem] = set()
        self.own = _own_names(tree)
        self.in_module = False
        self.numpy_arrays: set[str] = set()
        self.numpy_arrays = {
            name for name, value in _bindings(tree) if value is not None and self._is_numpy_array(value)
        }
        # Names, in the scope being visited, of what is no backend's array.
        self.ordinary = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        } - {"backends"}
        self._visit_scope(tree)

    def _report(self, node, found: str, use: str) -> None:
        self.problems.add(Problem(node.lineno, found if len(found) <= 60 else f"...{found[-57:]}", use))

    def visit_Import(self, node):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for module in (module.split(".")[0] for module in modules):
            if module in FRAMEWORKS:
                self._report(
                    node, ast.unparse(node), "nn and ops of backends.load(): this file runs on every framework"
                )
            elif module in OTHER_IMPORTS:
                self._report(node, ast.unparse(node), OTHER_IMPORTS[module])

    visit_ImportFrom = visit_Import

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute):
            name, found = node.func.attr, ast.unparse(node.func)
            if self._namespace(node.func.value) == "ops":
                if name in OPERATIONS:
                    self._check_arguments(node, found, OPERATIONS[name])
            elif _is_array_method(name, node) and name not in self.own and not self._is_ordinary(node):
                self._report(node.func, f"{found}(...)", INSTEAD[name])
        elif ast.unparse(node.func) == "__import__":
            self._report(node, "__import__(...)", OTHER_IMPORTS["importlib"])
        self.generic_visit(node)

    def _check_arguments(self, call, found, operation):
        """What the operation's signature doesn't allow, or wants besides. Nothing is known behind a * or **."""
        parameters = operation.signature.parameters.values()
        signature = f"ops.{operation}"
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = [keyword.arg for keyword in call.keywords]
        starred = None in given or any(isinstance(argument, ast.Starred) for argument in call.args)
        for key in filter(None, given):
            if key not in operation.keywords:
                near = nearest(key, operation.keywords, OTHER_ARGUMENTS)
                self._report(call, f"{found}(..., {key}=...)", f"{near}=" if near else signature)
        if starred:
            return
        if len(call.args) > len(positional) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            further = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY][: len(call.args) - len(positional)]
            by_name = f"{'=..., '.join(further)}=...: " if further else ""
            self._report(call, f"{found} with {len(call.args)} arguments by position", by_name + signature)
        lacking = [p.name for p in positional[len(call.args) :] if p.default is p.empty and p.name not in given]
        lacking += [
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in given
        ]
        if lacking:
            self._report(call, f"{found} without {', '.join(lacking)}", signature)

    def visit_ClassDef(self, node):
        outer = self.in_module
        self.in_module = any(ast.unparse(base).split(".")[-1] == "Module" for base in node.bases)
        self.generic_visit(node)
        self.in_module = outer

    def visit_BinOp(self, node):
        for numpys, other in ((node.left, node.right), (node.right, node.left)):
            if self.in_module and self._is_numpy_array(numpys) and not self._is_ordinary(other):
                self._report(node, ast.unparse(node), f"ops.asarray({ast.unparse(numpys)}), made in __init__")
        self.generic_visit(node)

    def _is_numpy_array(self, node) -> bool:
        """Whether numpy's functions for making arrays make this, here or where its name was bound."""
        if isinstance(node, ast.Name):
            return node.id in self.numpy_arrays
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        return function.startswith(("np.", "numpy.")) and function.split(".")[-1] in MAKERS

    def visit_Attribute(self, node):
        name, namespace = node.attr, self._namespace(node.value)
        known = {"ops": OPS, "nn": NN}.get(namespace, ())
        if namespace and name not in known:
            near = nearest(name, known)
            use = f"{namespace}.{near}" if near else f"what {namespace} has: {', '.join(known)}"
            self._report(node, ast.unparse(node), use)
        elif name in ATTRIBUTES and name not in self.own and not self._is_ordinary(node.value):
            self._report(node, ast.unparse(node), ATTRIBUTES[name])
        self.generic_visit(node)

    def _namespace(self, node) -> str | None:
        """ "ops" or "nn" for these names and for `backend.ops`, unless the file has given them another meaning."""
        name = getattr(node, "id", getattr(node, "attr", None))
        return name if name in ("ops", "nn") and name not in self.own | self.ordinary else None

    def visit_Subscript(self, node):
        text, array = ast.unparse(node), ast.unparse(node.value)
        masks = [mask for mask in _comparisons(node.slice) if array in map(ast.unparse, (mask.left, *mask.comparators))]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        slices = [part for part in parts if isinstance(part, ast.Slice) or ast.unparse(part) == "..."]
        if isinstance(node.ctx, ast.Store) and (masks or slices) and not self._is_ordinary(node.value):
            self._report(node, f"{text} = ...", NEVER_IN_PLACE)
        elif any(_is_backwards(part) for part in slices) and not self._is_ordinary(node.value):
            self._report(node, text, "ops.flip(x, axis=...)")
        elif masks and not self._is_ordinary(node.value):
            self._report(node, text, "ops.where(mask, x, 0): no result's shape may depend on values")
        self.generic_visit(node)

    def _visit_scope(self, scope):
        """A module, function or lambda: what it binds to something ordinary is ordinary within it."""
        outer, bindings = self.ordinary, list(_bindings(scope))
        self.ordinary = outer - {name for name, _ in bindings}
        while more := {name for name, value in bindings if self._is_ordinary(value)} - self.ordinary:
            self.ordinary = self.ordinary | more
        self.generic_visit(scope)
        self.ordinary = outer

    visit_FunctionDef = visit_Lambda = _visit_scope

    def _is_ordinary(self, node) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.ordinary
        if isinstance(node, ast.Call):  # x.astype(np.float32) and backend.weights(model) are numpy's
            arguments = (*node.args, *(keyword.value for keyword in node.keywords))
            return (
                self._is_ordinary(node.func)
                or ast.unparse(node.func).endswith((".weights", ".gradients"))
                or any(ast.unparse(argument).startswith("np.") for argument in arguments)
            )
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._is_ordinary(node.value)
        if isinstance(node, (ast.BinOp, ast.Tuple)):
            return all(self._is_ordinary(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))
        return isinstance(node, LITERALS)


def _own_names(tree) -> set[str]:
    """Names that the file gives to methods, fields and attributes of its own objects."""
    members = [member for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for member in node.body]
    fields = {part.id for member in members for part in ast.iter_child_nodes(member) if isinstance(part, ast.Name)}
    return (
        fields
        | {member.name for member in members if isinstance(member, ast.FunctionDef)}
        | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    )


def _bindings(scope):
    """(name, value) of all that a scope binds: the value assigned or iterated, and None where nothing is known."""
    for node in ast.walk(scope):
        if isinstance(node, ast.arg):
            yield node.arg, None
        value = getattr(node, "value", getattr(node, "iter", None))
        if isinstance(value, LITERALS):  # after `loss = 0.0` may come `loss = loss + trainer.backward(x, y)`
            value = None
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for part in ast.walk(target) if target else ():
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id, value


def _is_array_method(name: str, call: ast.Call) -> bool:
    if name in BARE:
        return not call.args
    if name in NUMBERED:
        numbers = [
            part
            for part in call.args[:1]
            if isinstance(part, (ast.List, ast.Tuple, ast.UnaryOp)) or isinstance(getattr(part, "value", None), int)
        ]
        return bool(numbers) or any(keyword.arg in ("axis", "dim") for keyword in call.keywords)
    return name in METHODS or name in IN_PLACE


def _is_backwards(part) -> bool:
    return isinstance(step := getattr(part, "step", None), ast.UnaryOp) and isinstance(step.op, ast.USub)


def _comparisons(index) -> list[ast.Compare]:
    """The comparisons that an index is made of: x > 0, ~(x > 0), (x > 0) & (y > 0)."""
    parts = ast.iter_child_nodes(index) if isinstance(index, (ast.BinOp, ast.UnaryOp)) else ()
    return [index] if isinstance(index, ast.Compare) else [found for part in parts for found in _comparisons(part)]


def page() -> str:
    """The surface, for reading."""
    return f"""\
What train.py may use, on every backend. On arrays themselves: operators, .shape, .ndim, .dtype, .reshape, slices.

nn
{MODULES}
ops: the call; the dtype of the result (x: as the arguments; float: the same, float32 for integers; int: the backend's
integer for positions); its gradient (-: none by definition). `/` ends the arguments by position alone, `*` begins those
by name. A number may stand for one of two arrays.
{TABLE}{NOTES}
In other places only plain Python and numpy. A file is checked by: python -m backends.surface train.py"""


def main(arguments: list[str]) -> int:
    """Prints the page, or a line for each problem in the file named; 1 if there are any."""
    if not arguments:
        print(page())
        return 0
    path = Path(arguments[0])
    try:
        problems = check(path.read_text(encoding="utf-8"), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"{path}:{problem.line}: {problem.found}  use {problem.use}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(terminal.printed(lambda: main(sys.argv[1:])))
