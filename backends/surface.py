"""Finds what `train.py` uses beyond the surface that every backend offers, by its syntax tree.

    python -m backends.surface [train.py]

Nothing is run and no type is known, so the rule is deliberate: an array method is reported wherever its receiver is
not known to be something else. Known to be something else are modules, literals and what is made from them by
builtins, values made by numpy, and attributes that the file defines itself. What Python's own values have too
(`split`, `x[mask]`, `x[i] = ...`) is reported only where the receiver is seen to come from `ops`, or the form leaves no
doubt. The check is a help to whoever edits `train.py`, not a proof.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import enum
import sys
from dataclasses import dataclass
from pathlib import Path

from backends.interface import OPS

NN = ("Embedding", "Linear", "Module", "ModuleDict", "ModuleList", "Parameter")
FRAMEWORKS = frozenset("""
cupy flax functorch jax jaxlib keras mlx optax tensorflow tinygrad torch torchao torchvision triton
""".split())
NUMPY = frozenset({"numpy", "scipy"})

# Array methods and attributes outside the surface, with what to write instead for receiver x.
INSTEAD = {
    "T": "ops.matrix_transpose(x)", "mT": "ops.matrix_transpose(x)", "H": "ops.matrix_transpose(x)",
    "t": "ops.matrix_transpose(x)", "view": "x.reshape(...)", "flatten": "x.reshape(...)",
    "transpose": "ops.permute_dims(x, axes)", "permute": "ops.permute_dims(x, axes)",
    "swapaxes": "ops.permute_dims(x, axes)", "movedim": "ops.permute_dims(x, axes)",
    "moveaxis": "ops.permute_dims(x, axes)", "unsqueeze": "ops.expand_dims(x, axis=...)",
    "squeeze": "ops.squeeze(x, axis=...)", "expand": "ops.broadcast_to(x, shape)",
    "expand_as": "ops.broadcast_to(x, shape)", "repeat": "ops.concat([x] * n, axis=...)",
    "tile": "ops.concat([x] * n, axis=...)", "repeat_interleave": "ops.broadcast_to(x, shape), then .reshape(...)",
    "split": "slices, such as x[..., :n]", "chunk": "slices, such as x[..., :n]",
    "unbind": "indices, such as x[0]", "narrow": "slices, such as x[:, a:b]", "size": "x.shape", "dim": "x.ndim",
    "numel": "math.prod(x.shape)", "float": "ops.float32(x)", "half": "ops.compute(x)", "bfloat16": "ops.compute(x)",
    "double": "ops.float32(x)", "long": "ops.astype(x, other.dtype)", "int": "ops.astype(x, other.dtype)",
    "bool": "a comparison", "to": "ops.compute(x), ops.float32(x) or ops.astype(x, other.dtype)",
    "type": "ops.astype(x, other.dtype)", "type_as": "ops.astype(x, other.dtype)",
    "astype": "ops.astype(x, other.dtype)", "item": "float(x), outside compiled functions",
    "tolist": "float(x), outside compiled functions", "detach": "ops.stop_gradient(x)",
    "numpy": "backend.weights(model), for parameters", "cpu": "nothing: the backend places arrays",
    "cuda": "nothing: the backend places arrays", "device": "nothing: the backend places arrays",
    "contiguous": "nothing: the backend lays arrays out", "clone": "x itself: arrays are never changed in place",
    "pow": "x ** y", "matmul": "x @ y", "mm": "x @ y", "bmm": "x @ y", "masked_fill": "ops.where(mask, value, x)",
    "gather": "ops.take(x, indices, axis=...)", "index_select": "ops.take(x, indices, axis=...)",
    "cumsum": "ops.cumulative_sum(x, axis=...)", "norm": "ops.sqrt(ops.sum(ops.square(x)))",
    "clamp": "ops.clip(x, low, high)", "neg": "-x", "mul": "x * y", "sub": "x - y", "div": "x / y",
    "argmax": "nothing: the surface has no argmax", "argmin": "nothing: the surface has no argmin",
    "backward": "trainer.backward(x, y)", "grad": "the update rule's `grad`", "data": "the update rule's `param`",
    "requires_grad": "ops.stop_gradient(x)", "requires_grad_": "ops.stop_gradient(x)",
    "parameters": "backend.weights(model)", "named_parameters": "backend.weights(model)",
    "state_dict": "backend.weights(model)", "load_state_dict": "backend.set_weights(model, weights)",
    "register_buffer": "ops in forward, or nn.Parameter(shape)",
    **{name: f"ops.{name}(x, ...)" for name in """
        abs clip cos exp log log2 max maximum mean min minimum prod rsqrt sigmoid sign sin softmax sqrt square std sum
        tan tanh tril triu var all any add multiply subtract divide relu round sort argsort""".split()},
}
for _name in ("log2", "prod", "all", "any", "round", "sort", "argsort"):
    INSTEAD[_name] = f"nothing: the surface has no {_name}"
# Ordinary objects have methods of these names too: reported only for arrays seen to come from `ops`, or where the
# arguments are such as only an array's method takes.
AMBIGUOUS = frozenset("""
add all any backward bool clone dim float int norm prod round size sort split sub t type
""".split())
# What counts without being called: for any receiver, and only for arrays seen to come from `ops`.
ATTRIBUTES = frozenset({"T", "mT"})
ATTRIBUTES_OF_ARRAYS = frozenset({"H", "device", "grad", "data", "requires_grad", "size"})
# What other frameworks call an op.
OTHER_NAMES = {
    "cat": "concat", "concatenate": "concat", "unsqueeze": "expand_dims", "transpose": "permute_dims",
    "permute": "permute_dims", "swapaxes": "permute_dims", "cumsum": "cumulative_sum", "clamp": "clip",
    "power": "pow", "eq": "equal", "gt": "greater", "ge": "greater_equal", "lt": "less", "le": "less_equal",
    "detach": "stop_gradient", "embedding": "take", "gather": "take", "index_select": "take", "layer_norm": "rms_norm",
    "scaled_dot_product_attention": "attention", "cross_entropy": "softcapped_cross_entropy", "neg": "negative",
    "mul": "multiply", "sub": "subtract", "div": "divide", "mT": "matrix_transpose", "swish": "silu",
    "view": "reshape", "expand": "broadcast_to", "cast": "astype", "float": "float32", "amax": "max", "amin": "min",
}
RANDOM = frozenset({"standard_normal", "normal", "uniform", "integers", "permutation", "default_rng"})
HOST = frozenset({"weights", "gradients", "logits", "losses"})  # of a backend or trainer: these give numpy


@dataclass(frozen=True)
class Problem:
    """A use beyond the surface: the line, what stands there, and what to write instead."""

    line: int
    found: str
    use: str


def check(source: str, filename: str = "train.py") -> list[Problem]:
    """The problems in this source, in the order of its lines.

    Raises:
        SyntaxError: the source is no Python; it names `filename` and the line.
    """
    checker = _Checker(ast.parse(source, filename))
    return sorted(set(checker.problems), key=lambda problem: (problem.line, problem.found))


class _Kind(enum.Enum):
    """What an expression gives, as far as the syntax tells."""

    ARRAY = "made by ops"
    NUMPY = "made by numpy"
    PYTHON = "a literal, or made by a builtin"
    MODULE = "an imported module"
    UNKNOWN = "anything"


class _Checker(ast.NodeVisitor):
    """Visits every node once, with the scopes (functions' and the module's) that its names are looked up in."""

    def __init__(self, tree: ast.Module):
        self.problems: list[Problem] = []
        self.imports = _imports(tree)
        self.own_attributes = _own_attributes(tree)
        self.namespaces = _namespaces(tree)
        self.scopes = [_assignments(tree)]
        self._resolving: set[tuple[int, str]] = set()
        self.visit(tree)

    def report(self, node: ast.AST, found: str, use: str) -> None:
        self.problems.append(Problem(node.lineno, found, use))

    # What is visited

    def visit_Import(self, node):
        for alias in node.names:
            self._check_import(node, alias.name, f"import {alias.name}")

    def visit_ImportFrom(self, node):
        if not node.level:
            self._check_import(node, node.module, f"from {node.module} import {node.names[0].name}")

    def _check_import(self, node, module: str, found: str):
        if module.split(".")[0] in FRAMEWORKS:
            self.report(node, found, "nn and ops of backends.load(): this file runs on every framework")

    def visit_FunctionDef(self, node):
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(part)
        self._within(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self._within(node, [node.body])

    def _visit_comprehension(self, node):
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._within(node, [*node.generators, *parts])

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension

    def _within(self, scope, nodes):
        self.scopes.append(_assignments(scope))
        for node in nodes:
            self.visit(node)
        self.scopes.pop()

    def visit_Call(self, node):
        function = node.func
        if _dotted(function) in ("importlib.import_module", "__import__") and node.args:
            module = getattr(node.args[0], "value", None)
            if isinstance(module, str):
                self._check_import(node, module, _short(node))
        if isinstance(function, ast.Attribute):
            self._check_method(node, function)
            self.visit(function.value)
        else:
            self.visit(function)
        for argument in (*node.args, *node.keywords):
            self.visit(argument)

    def _check_method(self, call, function):
        name, namespace = function.attr, self._namespace(function.value)
        if namespace:
            self._check_namespace(function, namespace)
            renamed = {"dim": "axis=", "keepdim": "keepdims="} if namespace == "ops" else {}
            for keyword in call.keywords:
                if keyword.arg in renamed:
                    self.report(call, f"ops.{name}(..., {keyword.arg}=...)", renamed[keyword.arg])
        elif self._is_array_method(call, function):
            self.report(function, f"{_short(function)}(...)", INSTEAD.get(name) or INSTEAD[name[:-1]])

    def _is_array_method(self, call, function) -> bool:
        name, kind = function.attr, self._kind(function.value)
        if name not in INSTEAD and not (name.endswith("_") and name[:-1] in INSTEAD):  # add_, mul_, ...
            return False
        if kind is not _Kind.UNKNOWN or name in self.own_attributes:
            return kind is _Kind.ARRAY
        return name not in AMBIGUOUS or _only_arrays_take(name, call)

    def visit_Attribute(self, node):
        namespace = self._namespace(node.value)
        if namespace:
            self._check_namespace(node, namespace)
        elif self._is_array_attribute(node):
            self.report(node, _short(node), INSTEAD[node.attr])
        self.visit(node.value)

    def _check_namespace(self, node, namespace):
        known = OPS if namespace == "ops" else NN
        if node.attr not in known:
            self.report(node, f"{namespace}.{node.attr}", _nearest(namespace, node.attr, known))

    def _is_array_attribute(self, node) -> bool:
        kind = self._kind(node.value)
        if kind is _Kind.ARRAY:
            return node.attr in ATTRIBUTES | ATTRIBUTES_OF_ARRAYS
        return kind is _Kind.UNKNOWN and node.attr in ATTRIBUTES and node.attr not in self.own_attributes

    def visit_Subscript(self, node):
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            if self._assigns_into_array(node):
                self.report(node, f"{_short(node)} = ...", "ops.where(mask, value, x) or ops.concat: arrays are never "
                                                           "changed in place")
        elif self._selects_by_mask(node):
            self.report(node, _short(node), "ops.where(mask, x, 0): the result's shape may not depend on values")
        elif self._kind(node.value) is _Kind.ARRAY:
            if self._kind(node.slice) is _Kind.ARRAY:
                self.report(node, _short(node), "ops.take(x, indices, axis=...)")
            elif any(_is_negative(part.step) for part in _index_parts(node) if isinstance(part, ast.Slice)):
                self.report(node, _short(node), "ops.take(x, indices, axis=...): PyTorch has no negative steps")
        self.generic_visit(node)

    def _assigns_into_array(self, node) -> bool:
        kind, parts = self._kind(node.value), _index_parts(node)
        of_arrays_only = len(parts) > 1 and any(_is_slice(part) for part in parts)  # no list or dict takes x[:, 0]
        return kind is _Kind.ARRAY or kind is _Kind.UNKNOWN and (of_arrays_only or self._selects_by_mask(node))

    def _selects_by_mask(self, node) -> bool:
        """x[x > 0], or a comparison of arrays as an index of anything that may be one."""
        kind, index = self._kind(node.value), node.slice
        if kind not in (_Kind.ARRAY, _Kind.UNKNOWN):
            return False
        comparisons = [part for part in ast.walk(index) if isinstance(part, ast.Compare)]
        if not comparisons or not isinstance(index, (ast.Compare, ast.UnaryOp, ast.BinOp)):
            return False
        own = ast.dump(node.value).replace("Store()", "Load()")
        return kind is _Kind.ARRAY or self._kind(index) is _Kind.ARRAY or any(
            ast.dump(side) == own for part in comparisons for side in (part.left, *part.comparators))

    # What expressions are

    def _namespace(self, node) -> str | None:
        """ "ops" or "nn" where the expression is one of a backend's namespaces: by name, alias or attribute."""
        if isinstance(node, ast.Name):
            return self.namespaces.get(node.id)
        return node.attr if isinstance(node, ast.Attribute) and node.attr in ("ops", "nn") else None

    def _kind(self, node) -> _Kind:
        if isinstance(node, ast.Name):
            return self._kind_of_name(node.id)
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp,
                             ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.BoolOp)):
            return _Kind.PYTHON
        if isinstance(node, ast.Call):
            return self._kind_of_call(node)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._kind_of_part(node)
        if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.IfExp)):
            operands = {ast.BinOp: ("left", "right"), ast.Compare: ("left",), ast.UnaryOp: ("operand",),
                        ast.IfExp: ("body", "orelse")}[type(node)]
            kinds = {self._kind(getattr(node, operand)) for operand in operands}
            kinds |= {self._kind(side) for side in getattr(node, "comparators", ())}
            return next((kind for kind in (_Kind.ARRAY, _Kind.UNKNOWN, _Kind.NUMPY) if kind in kinds), _Kind.PYTHON)
        if isinstance(node, (ast.Starred, ast.NamedExpr, ast.Await)):
            return self._kind(node.value)
        return _Kind.UNKNOWN

    def _kind_of_name(self, name: str) -> _Kind:
        for depth, scope in reversed(list(enumerate(self.scopes))):
            if name in scope:
                return self._kind_of_assigned(depth, name, scope[name])
        if name in self.imports:
            return _Kind.NUMPY if self.imports[name] in NUMPY else _Kind.MODULE
        return _Kind.PYTHON if hasattr(builtins, name) else _Kind.UNKNOWN

    def _kind_of_assigned(self, depth: int, name: str, values: list) -> _Kind:
        """The one kind of everything assigned to a name; an array too when the rest is unknown."""
        if (depth, name) in self._resolving:  # x = x + 1 says nothing about x
            return _Kind.UNKNOWN
        self._resolving.add((depth, name))
        kinds = {value if isinstance(value, _Kind) else self._kind(value) for value in values}
        self._resolving.discard((depth, name))
        if _Kind.ARRAY in kinds and kinds <= {_Kind.ARRAY, _Kind.UNKNOWN}:
            return _Kind.ARRAY
        return kinds.pop() if len(kinds) == 1 else _Kind.UNKNOWN

    def _kind_of_call(self, node) -> _Kind:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id == "next" and node.args or function.id in ("enumerate", "zip", "reversed", "iter"):
                kinds = {self._kind(argument) for argument in node.args}
                return kinds.pop() if len(kinds) == 1 and _Kind.NUMPY in kinds else _Kind.UNKNOWN
            builtin = hasattr(builtins, function.id) and self._kind_of_name(function.id) is _Kind.PYTHON
            # abs, max, min, pow, sum and getattr give what they are given.
            gives_own = builtin and function.id not in ("abs", "max", "min", "pow", "sum", "getattr", "map", "filter")
            return _Kind.PYTHON if gives_own else _Kind.UNKNOWN
        if not isinstance(function, ast.Attribute):
            return _Kind.UNKNOWN
        if self._namespace(function.value) == "ops":
            return _Kind.ARRAY
        if function.attr in RANDOM | HOST:
            return _Kind.NUMPY
        receiver = self._kind(function.value)
        if receiver is _Kind.PYTHON and isinstance(function.value, (ast.Constant, ast.JoinedStr)):
            return _Kind.PYTHON  # "a b".split()
        if receiver is _Kind.MODULE:
            return _Kind.PYTHON  # math.sqrt(n), re.compile(...), prepare.open_data()
        return receiver if receiver in (_Kind.ARRAY, _Kind.NUMPY) else _Kind.UNKNOWN

    def _kind_of_part(self, node) -> _Kind:
        if isinstance(node, ast.Attribute) and node.attr in ("shape", "ndim", "dtype"):
            return _Kind.PYTHON
        whole = self._kind(node.value)
        if isinstance(node, ast.Attribute) and whole is _Kind.ARRAY and node.attr not in INSTEAD:
            return _Kind.UNKNOWN
        return whole if whole in (_Kind.ARRAY, _Kind.NUMPY) else _Kind.UNKNOWN


# What a file says of its names


def _imports(tree) -> dict[str, str]:
    """Imported name -> the top module it comes from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: (node.module or "").split(".")[0] for alias in node.names}
    return found


def _own_attributes(tree) -> set[str]:
    """Names of attributes that the file itself assigns, annotates or defines in a class."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found.add(item.name)
                elif isinstance(item, (ast.Assign, ast.AnnAssign)):
                    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _namespaces(tree) -> dict[str, str]:
    """Names that stand for a backend's `ops` and `nn`: those two, and what either is assigned to."""
    found = {"ops": "ops", "nn": "nn"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets, node.value):
                if isinstance(target, ast.Name) and isinstance(value, ast.Attribute) and value.attr in ("ops", "nn"):
                    found[target.id] = value.attr
    return found


def _assignments(scope) -> dict[str, list]:
    """Name -> the expressions assigned to it in this scope, not in those within; a kind where none tells."""
    found: dict[str, list] = {}

    def bind(target, value):
        for name, given in _pairs([target], value):
            if isinstance(name, ast.Name):
                found.setdefault(name.id, []).append(given)

    for argument in _arguments(scope):
        bind(ast.Name(argument.arg), _annotated(argument.annotation))
    for node in _own_nodes(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
            bind(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            bind(node.target, _iterated(node.iter))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            bind(node.optional_vars, _Kind.UNKNOWN)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not scope:
            bind(ast.Name(node.name), _Kind.UNKNOWN)
    return found


def _own_nodes(scope):
    """The nodes of a scope, classes' bodies included, without those of functions, lambdas and comprehensions in it."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
             ast.GeneratorExp)
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, inner):
            waiting.extend(ast.iter_child_nodes(node))


def _arguments(scope) -> list[ast.arg]:
    arguments = getattr(scope, "args", None)
    if not isinstance(arguments, ast.arguments):
        return []
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return named + [extra for extra in (arguments.vararg, arguments.kwarg) if extra]


def _annotated(annotation) -> _Kind:
    text = ast.unparse(annotation) if annotation is not None else ""
    if text.startswith(("np.", "numpy.")):
        return _Kind.NUMPY
    return _Kind.PYTHON if text.split("[")[0] in ("str", "int", "float", "bool", "list", "dict", "tuple", "set") else \
        _Kind.UNKNOWN


def _iterated(iterable):
    """What iterating gives, as an expression: the parts of a value are of its kind when that is an array's."""
    return ast.copy_location(ast.Subscript(iterable, ast.Constant(0), ast.Load()), iterable)


def _pairs(targets, value):
    """(target, value) of an assignment, tuples taken apart; of a value in one piece, its parts are taken as x[0]."""
    for target in targets:
        if not isinstance(target, (ast.Tuple, ast.List)):
            yield target.value if isinstance(target, ast.Starred) else target, value
        elif isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
            for part, given in zip(target.elts, value.elts):
                yield from _pairs([part], given)
        else:
            for part in target.elts:
                if isinstance(value, (ast.GeneratorExp, ast.ListComp)):
                    yield from _pairs([part], value.elt)  # q, k = (f(x) for x in (q, k))
                else:
                    yield from _pairs([part], value if isinstance(value, _Kind) else _iterated(value))


# Forms


def _only_arrays_take(name: str, call: ast.Call) -> bool:
    """Whether the arguments of a method that other objects have too are an array's: x.split(64, 2), x.int(), x.t()."""
    if {keyword.arg for keyword in call.keywords} & {"dim", "axis", "dtype", "device", "keepdim", "keepdims"}:
        return True
    first = call.args[0] if call.args else None
    if name == "split":  # text.split(), text.split(","), text.split(separator)
        return isinstance(first, (ast.List, ast.Tuple, ast.BinOp)) or _is_number(first)
    if name == "size":
        return first is None or _is_number(first)
    return not call.args and name in ("backward", "bool", "clone", "dim", "float", "int", "norm", "t")


def _is_number(node) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_negative(node) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _index_parts(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_slice(node) -> bool:
    return isinstance(node, ast.Slice) or isinstance(node, ast.Constant) and node.value is Ellipsis


def _dotted(node) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _short(node) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else "..." + text[-57:]


def _nearest(namespace: str, name: str, known) -> str:
    if namespace == "ops" and name in OTHER_NAMES:
        return f"ops.{OTHER_NAMES[name]}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{namespace}.{close[0]}" if close else f"what {namespace} has: {', '.join(known)}"


def main(arguments: list[str]) -> int:
    """Prints a line for each problem; 1 if there are any."""
    path = Path(arguments[0] if arguments else "train.py")
    try:
        problems = check(path.read_text(encoding="utf-8"), str(path))
    except (OSError, SyntaxError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"{path}:{problem.line}: {problem.found}  use {problem.use}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
