"""Modules on MLX: parameters are held as float32 masters and read in the compute precision.

MLX's own `nn.Module` is a dict of arrays and lists. Here a parameter is an object with a name's worth of identity, so
that a trainer can put traced arrays in its place, and names come out as PyTorch's do.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import mlx.core as mx

from backends import fusion
from backends.mlx.indexing import take


class Parameter:
    """A float32 array of zeros, of the given shape, to be trained. `value` is the master."""

    def __init__(self, shape):
        self.value = mx.zeros(tuple(shape), dtype=mx.float32)


class Module:
    """Subclasses call `super().__init__()`, assign parameters and modules as attributes, and define `forward`."""

    precision = mx.float32  # what parameters are read in; `namespace` sets it

    def __init__(self):
        self._parameters: dict[str, Parameter] = {}
        self._modules: dict[str, Module] = {}

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def __setattr__(self, name, value):
        if isinstance(value, (Parameter, Module)):
            if "_modules" not in self.__dict__:
                raise AttributeError(f"call super().__init__() before assigning {type(self).__name__}.{name}")
            self._register(name, value)
        elif name in self.__dict__.get("_parameters", ()):
            raise TypeError(f"{type(self).__name__}.{name} is a parameter; only its values can change, by set_weights")
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name):  # called only when `name` is no ordinary attribute
        if name in self.__dict__.get("_parameters", ()):
            return _noted(self._parameters[name]).value.astype(self.precision)
        if name in self.__dict__.get("_modules", ()):
            return self._modules[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _register(self, name: str, value: Parameter | Module):
        for registry in (self._parameters, self._modules, self.__dict__):
            registry.pop(name, None)
        (self._parameters if isinstance(value, Parameter) else self._modules)[name] = value


class Linear(Module):
    """y = x @ weight.T, without bias; `weight` has shape (n_out, n_in)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = Parameter((n_out, n_in))

    def forward(self, x):
        return x @ self.weight.T


class Embedding(Module):
    """The rows of `weight` (n, dim) that integer tokens (...) name, in the compute precision: (..., dim)."""

    def __init__(self, n: int, dim: int):
        super().__init__()
        self.weight = Parameter((n, dim))

    def forward(self, tokens):
        # The rows are taken from the master, so that their gradients are summed in float32.
        return take(_noted(self._parameters["weight"]).value, tokens, axis=0).astype(self.precision)


class ModuleList(Module):
    """Modules by position; their names are "0", "1", ..."""

    def __init__(self, modules=()):
        super().__init__()
        for i, module in enumerate(modules):
            self._register(str(i), module)

    def __len__(self):
        return len(self._modules)

    def __getitem__(self, index: int):
        return list(self._modules.values())[index]

    def __iter__(self):
        return iter(self._modules.values())


class ModuleDict(Module):
    """Modules by name.

    Raises:
        ValueError: a key is purely numeric (it would read as a list's index), holds a dot, or is no string.
    """

    def __init__(self, modules=()):
        super().__init__()
        for name, module in dict(modules).items():
            if not isinstance(name, str) or not name or name.isdigit() or "." in name:
                raise ValueError(
                    f"ModuleDict key {name!r}: use a name that is not purely numeric and has no dot, "
                    f'for example "layer_{name}"'
                )
            self._register(name, module)

    def __len__(self):
        return len(self._modules)

    def __getitem__(self, name: str):
        return self._modules[name]

    def __iter__(self):
        return iter(self._modules)

    def __contains__(self, name):
        return name in self._modules

    def keys(self):
        return self._modules.keys()

    def values(self):
        return self._modules.values()

    def items(self):
        return self._modules.items()


def namespace(precision: mx.Dtype) -> SimpleNamespace:
    """The contract's `nn`, whose modules read their parameters in `precision`."""
    classes = (Module, Linear, Embedding, ModuleList, ModuleDict)
    bound = {cls.__name__: type(cls.__name__, (cls,), {"precision": precision}) for cls in classes}
    return SimpleNamespace(Parameter=Parameter, **bound)


def named_parameters(module: Module, prefix: str = "") -> dict[str, Parameter]:
    """Parameters by dotted path, a module's own before its children's, each in the order assigned.

    A parameter that is reached by two paths has the name of the first.
    """
    found = {prefix + name: parameter for name, parameter in module._parameters.items()}
    for name, child in module._modules.items():
        for path, parameter in named_parameters(child, f"{prefix}{name}.").items():
            if not any(parameter is known for known in found.values()):
                found[path] = parameter
    return found


_reads: list[list[Parameter]] = []


def _noted(parameter: Parameter) -> Parameter:
    for reads in _reads:
        if not any(parameter is known for known in reads):
            reads.append(parameter)
    return parameter


@contextmanager
def read():
    """Gives a dict that holds, from the end of this context on, the parameters read within it."""
    parameters: dict[str, Parameter] = {}
    _reads.append([])
    try:
        yield parameters
    finally:
        parameters.update((str(i), parameter) for i, parameter in enumerate(_reads.pop()))


def captured(*functions) -> str | None:
    """The name of an array that these functions take from a closure, or from a module that they are methods of."""
    for function in functions:
        inner = getattr(fusion.of(function), "function", None) or getattr(function, "__func__", function)
        cells = zip(inner.__code__.co_freevars, inner.__closure__ or ()) if hasattr(inner, "__code__") else ()
        for name, cell in cells:
            if isinstance(cell.cell_contents, mx.array):
                return name
        owner = getattr(function, "__self__", None)
        for module in modules(owner) if isinstance(owner, Module) else ():
            for name, value in vars(module).items():
                if isinstance(value, mx.array):
                    return name
    return None


def modules(module: Module):
    """A module and all that are below it."""
    yield module
    for child in module._modules.values():
        yield from modules(child)


def is_linear(layer) -> bool:
    """Whether this is the `Linear` of a `namespace`, and not a subclass with a forward of its own."""
    return isinstance(layer, Linear) and type(layer).forward is Linear.forward


@contextmanager
def substituted(parameters: dict[str, Parameter], values: dict[str, mx.array]):
    """Within this context the parameters have these values: how a pure function of them is made from a model."""
    masters = {name: parameter.value for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.value = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.value = masters[name]
