"""Recognises what a function of `train.py` computes, so that a backend may run a kernel of its own in its place.

`train.py` marks a function with `@ops.fusable`. It is read as syntax: names of its own become numbers, comments,
docstrings and annotations are left out, and the functions it calls are read in the same way. A digest of that tells
whether it is one of the definitions in `backends/fusable.py`. So a function is recognised whatever it is called, under
every Python version, and not when anything in it, in a helper or in a default argument computes something else.

What is no part of the computation's form is a slot: constants of the file (`HEAD_DIM`), and what a method reads from
its object (`self.c_fc`). Their values are read at each call and given to the kernel, which looks whether it can take
them.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import linecache
import types
from collections.abc import Callable
from typing import NamedTuple

# The syntax that is read. Python has had these nodes, with these fields, since 3.9.
NODES = """
Add And AnnAssign Assign Attribute AugAssign BinOp BitAnd BitOr BitXor BoolOp Break Call Compare Constant Continue Dict
DictComp Div Eq Expr FloorDiv For GeneratorExp Gt GtE If IfExp In Invert Is IsNot LShift Lambda List
ListComp Lt LtE MatMult Mod Mult Name Not NotEq NotIn Or Pass Pow RShift Return Set SetComp Slice Starred Sub Subscript
Tuple UAdd USub UnaryOp While arg arguments comprehension keyword
""".split()
LEFT_OUT = "annotation ctx kind simple type_comment".split()  # fields that say nothing of what is computed


class Unreadable(Exception):
    """Says why a function can't be recognised."""


class Reading(NamedTuple):
    """
    Attributes:
        digest: equal for functions that compute the same from equal slots.
        slots: called as the function is, gives its arguments in order, without `self`, and then the slots' values.
        uses: (namespace, name, object) of all that was looked up and has to be the same still.
    """

    digest: str
    slots: Callable
    uses: tuple[tuple[dict, str, object], ...]

    @property
    def stands(self) -> bool:
        return all(namespace.get(name) is found for namespace, name, found in self.uses)


def read(function: types.FunctionType, ops) -> Reading:
    """What this function computes. Raises Unreadable.

    Args:
        ops: the object that is `ops` to it.
    """
    reader = _Reader(function, ops)
    text = reader.function(function)
    code = function.__code__
    if function.__kwdefaults__ or code.co_kwonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        raise Unreadable("it takes more than plain arguments")
    parameters = code.co_varnames[: code.co_argcount]
    values = ", ".join([*(name for name in parameters if name != reader.receiver), *reader.slots])
    # Made in the function's own namespace: a compiler that traces it sees its constants as it would in the function.
    slots = eval(f"lambda {', '.join(parameters)}: ({values}{',' if values else ''})", function.__globals__)
    slots.__defaults__ = function.__defaults__
    return Reading(hashlib.sha256(text.encode()).hexdigest()[:16], slots, tuple(reader.uses))


class _Reader:
    def __init__(self, function, ops):
        self.ops, self.namespace, self.receiver = ops, function.__globals__, None
        self.slots: list[str] = []
        self.uses: list[tuple[dict, str, object]] = []
        self.reading: list[types.CodeType] = []

    def function(self, function) -> str:
        if function.__code__ in self.reading:
            raise Unreadable(f"{function.__name__} calls itself")
        node, method = _definition(function.__code__, function.__globals__)
        receiver = node.args.args[0].arg if method and node.args.args and not self.reading else None
        if receiver:
            self.receiver = receiver
        self.reading.append(function.__code__)
        text = _Body(self, function, node, receiver).text()
        self.reading.pop()
        return text

    def slot(self, expression: str) -> str:
        if expression not in self.slots:
            self.slots.append(expression)
        return f"slot{self.slots.index(expression)}"


class _Body:
    """One function: its own names and its own namespace."""

    def __init__(self, reader: _Reader, function, node: ast.FunctionDef, receiver: str | None):
        self.reader, self.node, self.receiver, self.namespace = reader, node, receiver, function.__globals__
        self.defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
        self.captured = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        bindings = list(_bindings(node))
        self.own, self.numbers = {name for name, _ in bindings}, {}
        for name in self.own - {name for name, inner in bindings if not inner}:
            if name in self.captured or name in self.namespace or hasattr(builtins, name):
                raise Unreadable(f"{name!r} has two meanings in it")
        if receiver and [name for name, _ in bindings].count(receiver) > 1:
            raise Unreadable(f"it assigns to {receiver!r}")

    def text(self) -> str:
        body = self.node.body
        if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
            body = body[1:]  # a docstring
        arguments = self.node.args
        parts = [arguments.posonlyargs, arguments.args, arguments.vararg, arguments.kwonlyargs, arguments.kwarg]
        written = [self.write(part) for part in parts]
        defaults = [_constant(value, "a default argument") for value in self.defaults]
        return f"({','.join(written)};{','.join(defaults)};{self.write(body)})"

    def write(self, node) -> str:
        if isinstance(node, list):
            return f"[{','.join(map(self.write, node))}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        kind = type(node).__name__
        if kind not in NODES:
            raise Unreadable(f"it contains {kind}")
        if isinstance(node, ast.Name):
            return self.number(node.id) if node.id in self.own else self.outside(node.id)
        if isinstance(node, ast.arg):
            return self.number(node.arg)
        if self.receiver and (path := _path(node, self.receiver)):
            return self.reader.slot(path)
        fields = (f"{name}={self.write(value)}" for name, value in ast.iter_fields(node) if name not in LEFT_OUT)
        return f"{kind}({','.join(fields)})"

    def number(self, name: str) -> str:
        return f"local{self.numbers.setdefault(name, len(self.numbers))}"

    def outside(self, name: str) -> str:
        """What a name means that the function does not bind itself."""
        if name in self.captured:
            try:
                found = self.captured[name].cell_contents
            except ValueError:
                raise Unreadable(f"{name!r} is not there yet") from None
        elif name in self.namespace:
            found = self.namespace[name]
        elif hasattr(builtins, name):
            self.reader.uses.append((self.namespace, name, None))  # nothing of this name
            return f"builtin {name}"
        else:
            raise Unreadable(f"{name!r} is not there yet")
        if isinstance(found, (bool, int, float, str, tuple, type(None))):
            value = _constant(found, name)
            if name in self.captured:
                raise Unreadable(f"{name!r} is not a constant of the file")
            if self.namespace is self.reader.namespace:
                return self.reader.slot(name)
            self.reader.uses.append((self.namespace, name, found))
            return value
        if name not in self.captured:
            self.reader.uses.append((self.namespace, name, found))
        if found is self.reader.ops:
            return "ops"
        if isinstance(found, types.ModuleType):
            return f"module {found.__name__}"
        if isinstance(found, types.FunctionType):
            return f"function {self.reader.function(marked.function if (marked := of(found)) else found)}"
        if isinstance(found, types.BuiltinFunctionType):
            return f"module {found.__module__}.{found.__qualname__}"
        raise Unreadable(f"what {name!r} is can't be told")


def _constant(value, name: str) -> str:
    parts = value if isinstance(value, tuple) else [value]
    if not all(isinstance(part, (bool, int, float, str, type(None))) for part in parts):
        raise Unreadable(f"{name} is not a number")
    return repr(value)


def _bindings(node, inner: bool = False):
    """(name, whether only a lambda or a comprehension within this function has it) of all that it binds."""
    for part in ast.iter_child_nodes(node):
        scoped = inner or isinstance(part, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
        if isinstance(part, ast.arg):
            yield part.arg, inner
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id, inner
        yield from _bindings(part, scoped)


def _path(node, receiver: str) -> str | None:
    """ "self.a.b" of such an expression, else None."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == receiver:
            inner = receiver
        else:
            inner = _path(node.value, receiver)
        if inner and (node.attr.startswith("__") or not isinstance(node.ctx, ast.Load)):
            raise Unreadable(f"it uses {inner}.{node.attr}")
        return inner and f"{inner}.{node.attr}"
    return None


def _definition(code: types.CodeType, namespace: dict) -> tuple[ast.FunctionDef, bool]:
    """The syntax of a function that runs this code, and whether it is a method. Raises Unreadable.

    The file may have changed since: what stands there now has to compile to the same code.
    """
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, namespace))
    tree, codes = _parsed(source, code.co_filename)
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                if min(part.lineno for part in (node, *node.decorator_list)) == code.co_firstlineno and code in codes:
                    return node, isinstance(parent, ast.ClassDef)
    raise Unreadable(f"the source of {code.co_name} is not at hand")


@functools.lru_cache(maxsize=64)
def _parsed(source: str, filename: str) -> tuple[ast.Module, list[types.CodeType]]:
    try:
        module = compile(source, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise Unreadable(f"{filename} can't be read: {error}") from None
    codes = [module]
    for code in codes:
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return ast.parse(source), codes


# ---- What runs in a function's place ----


class Fusable:
    """A marked function. `run` is what is called: the function itself, or what a backend has for it.

    Attributes:
        name: of the definition in `backends/fusable.py` that it is, or None.
    """

    def __init__(self, function, ops, kernels: dict[str, Callable], missed: Callable[[str], None]):
        """
        Args:
            ops: what is `ops` to the function.
            kernels: by a definition's name, f(plain, *arguments, *slots); `plain()` runs the function itself.
            missed: called with what to say of a function that is no definition.
        """
        self.function, self.run, self.name = function, function, None
        self._ops, self._kernels, self._missed = ops, kernels, missed
        self._reading, self._read = None, None

    def recognise(self) -> None:
        """Reads the function, unless it was read, and nothing that it uses was replaced since."""
        state = self.function.__code__, self.function.__defaults__
        if self._read == state and (self._reading is None or self._reading.stands):
            return
        from backends import fusable

        self.run, self.name, self._reading, self._read, why = self.function, None, None, state, ""
        try:
            self._reading = read(self.function, self._ops)
            self.name = fusable.names().get(self._reading.digest)
        except Unreadable as error:
            why = f" ({error})"
        if self.name is None:
            self._missed(f"{self.function.__qualname__} runs as it is written: no kernel computes this{why}")
        elif kernel := self._kernels.get(self.name):
            self.run = _in_place_of(self.function, kernel, self._reading.slots)

    def values(self, *arguments) -> tuple:
        """Its arguments, without `self`, and its slots' values."""
        return self._reading.slots(*arguments)


def _in_place_of(function, kernel, slots):
    def run(*arguments, **named):
        return kernel(lambda: function(*arguments, **named), *slots(*arguments, **named))

    return run


def mark(function, ops, kernels, missed, tracing: Callable[[], bool] = lambda: False):
    """`function`, in whose place a kernel runs once it is recognised. While a compiler traces (`tracing`), nothing is
    read: what was recognised before, by a call outside, is traced."""
    marked = Fusable(function, ops, kernels, missed)

    @functools.wraps(function)
    def call(*arguments, **named):
        if not tracing():
            marked.recognise()
        return marked.run(*arguments, **named)

    call.fusable = marked
    return call


def of(function) -> Fusable | None:
    """The marked function behind a function or a method, if it is one."""
    return getattr(getattr(function, "__func__", function), "fusable", None)


def softcapped_head(head, loss, hidden, tracing: bool = False):
    """(softcap or None, the layer) where `head` and `loss` are the definitions of cross-entropy, else None."""
    marked, nats = of(head), of(loss)
    if not (marked and nats):
        return None
    if not tracing:
        marked.recognise()
        nats.recognise()
    if nats.name != "cross_entropy" or marked.name not in ("head", "unbounded_head"):
        return None
    _, *softcap, layer = marked.values(head.__self__, hidden)
    softcap = softcap[0] if softcap else None
    bounded = isinstance(softcap, (int, float)) and softcap > 0
    return (softcap, layer) if bounded or marked.name == "unbounded_head" else None
