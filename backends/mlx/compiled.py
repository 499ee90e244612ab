"""Functions compiled by MLX, and compiled anew when a Python value that they read is another.

`mx.compile` traces a function once for each shape of its arrays. What else the function reads then, attributes of the
model, variables of `train.py`, what a closure holds, stays for good as it was: a window that a schedule widens would
never widen. So plain values (numbers, texts, tuples, lists and dicts of them) are looked at before each call, wherever
the functions and the model's classes can read them: also attributes of classes and objects of `train.py`'s own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx
import numpy as np

from backends import interface
from backends.mlx.nn import modules

MOST = 64  # times that a function is compiled for other values, after which it runs uncompiled
DEEPEST, LONGEST = 4, 1000  # of lists within lists; of a list, which is longer known by its length alone
PLAIN = (bool, int, float, str, bytes, type(None))


class Compiled:
    """A function, compiled unless that is switched off.

    Args:
        reads: tells which plain values the function reads at present.

    Attributes:
        on: whether it is compiled. made: how often anything was, in this process.
    """

    made = 0

    def __init__(self, function: Callable, reads: Callable[[], tuple], on: bool):
        self.function, self.reads, self.on = function, reads, on
        self._by_values: dict[tuple, Callable] = {}

    def __call__(self, *arguments):
        if not self.on:
            return self.function(*arguments)
        values = self.reads()
        if values not in self._by_values:
            if len(self._by_values) == MOST:
                interface.turned_uncompiled()
                self.on = False
                return self.function(*arguments)
            # By a function of its own: MLX keeps what it compiled by the function's identity.
            Compiled.made += 1
            self._by_values[values] = mx.compile(lambda *given: self.function(*given))
        return self._by_values[values](*arguments)


class Values:
    """The plain values that functions may read, of their closures and their modules' variables, those of functions and
    classes that they name, and attributes of a model."""

    def __init__(self, functions: Iterable[Callable], model=None):
        self._model, self._variables, self._cells = model, {}, {}
        self._own: set[str] = set()  # modules of these functions: `train.py`, mostly
        for function in functions:
            self._find(function)
        for module in self._modules():
            self._find_in(module)

    def __call__(self) -> tuple:
        variables = (self._frozen(of.get(name)) for of, name in self._variables.values())
        attributes = (self._frozen(_attributes(module)) for module in self._modules())
        return (*variables, *map(self._frozen, map(_content, self._cells.values())), *attributes)

    def _modules(self) -> Iterator:
        return modules(self._model) if self._model is not None else iter(())

    def _find(self, found) -> None:
        """Notes what a function reads, or the functions of a class do."""
        while isinstance(found, functools.partial):
            found = found.func
        found = getattr(inspect.unwrap(found) if callable(found) else found, "__func__", found)
        if isinstance(found, type):
            for each in vars(found).values():
                each = next(filter(None, (getattr(each, name, None) for name in ("fget", "func", "__func__"))), each)
                if isinstance(each, types.FunctionType):
                    self._find(each)
        if not isinstance(found, types.FunctionType):
            return
        self._own.add(found.__module__)
        for cell in found.__closure__ or ():
            if id(cell) not in self._cells:
                self._cells[id(cell)] = cell
                self._find_in(_content(cell))
        for name in _names(found.__code__):
            key = id(found.__globals__), name
            if name in found.__globals__ and key not in self._variables:
                self._variables[key] = found.__globals__, name
                self._find_in(found.__globals__[name])

    def _find_in(self, value, depth: int = DEEPEST) -> None:
        """Notes what functions read that a variable holds, or an object or list in it."""
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, type)):
            if getattr(value, "__module__", None) in self._own or isinstance(value, functools.partial):
                self._find(value)
        elif isinstance(value, (list, tuple, dict)) and depth and len(value) <= LONGEST:
            for each in value.values() if isinstance(value, dict) else value:
                self._find_in(each, depth - 1)
        elif type(value).__module__ in self._own:
            self._find(type(value))

    def _frozen(self, value, depth: int = DEEPEST):
        """A plain value as one that can be compared; of any other only what kind it is."""
        if isinstance(value, np.generic):
            value = value.item()
        kind = type(value).__name__
        if isinstance(value, PLAIN):
            return kind, value if value == value else "nan"
        if isinstance(value, type) and value.__module__ in self._own:
            return tuple((name, each) for name, each in vars(value).items() if isinstance(each, PLAIN))
        if type(value).__module__ in self._own and hasattr(value, "__dict__"):
            value = vars(value)
        if not isinstance(value, (list, tuple, dict)) or not depth or len(value) > LONGEST:
            return kind, len(value) if isinstance(value, (list, tuple, dict)) else 0
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return tuple((str(name), self._frozen(each, depth - 1)) for name, each in items)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _attributes(module) -> dict:
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None
