"""Functions compiled by MLX, and compiled anew when a Python value that they read is another.

`mx.compile` traces a function once for each shape of its arrays. What else the function reads then, attributes of the
model, variables of `train.py`, what a closure holds, stays for good as it was: a window that a schedule widens would
never widen. So plain values (numbers, texts, tuples, lists and dicts of them) are looked at before each call, wherever
the functions and the model's classes can read them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx

MOST = 8  # times that a function is compiled for other values, after which it runs uncompiled
LONGEST = 64  # items of a list that are looked at
PLAIN = (bool, int, float, str, bytes, type(None))


class Compiled:
    """A function, compiled unless that is switched off.

    Args:
        reads: tells which plain values the function reads at present.

    Attributes:
        on: whether it is compiled.
    """

    def __init__(self, function: Callable, reads: Callable[[], tuple], on: bool):
        self.function, self.reads, self.on = function, reads, on
        self._by_values: dict[tuple, Callable] = {}

    def __call__(self, *arguments):
        if not self.on:
            return self.function(*arguments)
        values = self.reads()
        if values not in self._by_values:
            if len(self._by_values) == MOST:
                print("a step reads Python values that change all the time: it runs uncompiled, slower", flush=True)
                self.on = False
                return self.function(*arguments)
            # By a function of its own: MLX keeps what it compiled by the function's identity.
            self._by_values[values] = mx.compile(lambda *given: self.function(*given))
        return self._by_values[values](*arguments)


class Values:
    """The plain values that functions may read, of their closures and their modules' variables, those of functions and
    classes that they name, and attributes of a model."""

    def __init__(self, functions: Iterable[Callable], model=None):
        self._model, self._variables, self._cells = model, {}, {}
        for function in functions:
            self._find(function)
        for module in _modules(model):
            self._find(type(module))

    def __call__(self) -> tuple:
        variables = (_frozen(of.get(name)) for of, name in self._variables.values())
        attributes = (_frozen(vars(module)) for module in _modules(self._model))
        return (*variables, *map(_frozen_cell, self._cells.values()), *attributes)

    def _find(self, found) -> None:
        """Notes what a function reads, or the functions of a class do."""
        found = getattr(inspect.unwrap(found) if callable(found) else found, "__func__", found)
        if isinstance(found, type):
            for each in vars(found).values():
                if isinstance(each, (types.FunctionType, staticmethod, classmethod)):
                    self._find(each.__func__ if not isinstance(each, types.FunctionType) else each)
            return
        if not isinstance(found, types.FunctionType):
            return
        for cell in found.__closure__ or ():
            if id(cell) not in self._cells:
                self._cells[id(cell)] = cell
                self._find_inner(cell, found)
        for name in _names(found.__code__):
            key = id(found.__globals__), name
            if name in found.__globals__ and key not in self._variables:
                self._variables[key] = found.__globals__, name
                self._find_named(found.__globals__[name], found)

    def _find_inner(self, cell, by) -> None:
        try:
            self._find_named(cell.cell_contents, by)
        except ValueError:  # an empty one
            pass

    def _find_named(self, value, by) -> None:
        if getattr(value, "__module__", None) == by.__module__ and isinstance(value, (types.FunctionType, type)):
            self._find(value)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _modules(model) -> Iterator:
    if model is not None:
        yield model
        for child in vars(model).get("_modules", {}).values():
            yield from _modules(child)


def _frozen(value):
    """A plain value as one that can be compared; of any other only what kind it is."""
    if isinstance(value, PLAIN):
        return (type(value).__name__, value if value == value else "nan")
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value[:LONGEST]))
    if isinstance(value, dict):
        return tuple((str(name), _frozen(each)) for name, each in list(value.items())[:LONGEST])
    return type(value).__name__


def _frozen_cell(cell):
    try:
        return _frozen(cell.cell_contents)
    except ValueError:
        return "empty"
