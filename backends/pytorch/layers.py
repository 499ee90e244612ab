"""Compiles a step so that layers of one kind share what is compiled of the first of them.

The graph that PyTorch traces holds every layer, and its compiler's work grows with their number. Here it is cut where a
layer ends, as PyTorch's `DDPOptimizer` cuts it for another purpose. Each part gets names that don't tell which layer it
is, so equal ones are recognised: in this process, and by the compiler's cache in the next. Another depth compiles only
what is new in it.
"""

from __future__ import annotations

import itertools
import operator
import re

import torch
from torch import fx

OPERATORS = "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"
WRITING = {getattr(operator, f"i{name}") for name in OPERATORS} | {operator.setitem}  # x += y and its like, x[i] = y
NUMBERED = re.compile(r"(?<!\w)\d+\W*$")  # how the path of an item of a ModuleList ends


def compile_layers(module: fx.GraphModule, inputs: list, options: dict | None = None):
    """A backend of `torch.compile`, for static shapes. options: as `torch.compile` takes them for its own."""
    from torch._inductor.compile_fx import compile_fx

    _read_numbers_first(module.graph)
    parts = _cut(module)
    arrays = all(isinstance(_value(node), torch.Tensor) for part in parts for node in part.outputs)
    # What one part writes into an array of another's would have no gradient.
    if len(parts) < 3 or not arrays or any(map(_writes, module.graph.nodes)):
        return compile_fx(module, inputs, config_patches=options)
    compiled = {}
    for part in parts:
        if part.kind not in compiled:
            # A context of its own: what is kept there is looked up again when its backward pass is compiled.
            context = torch._guards.TracingContext(torch._guards.detect_fake_mode(inputs))
            with torch._guards.tracing(context):
                compiled[part.kind] = compile_fx(part.module, part.examples, config_patches=options)
    return _Calls(module.graph, [(compiled[part.kind], part) for part in parts])


def _value(node: fx.Node):
    """What it is while the graph is traced: a fake tensor, mostly."""
    return node.meta.get("example_value")


def _writes(node: fx.Node) -> bool:
    """Whether it changes an array in its place."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        return node.target in WRITING or bool(schema and schema.is_mutable)
    name = str(node.target)
    return node.op == "call_method" and (name == "__setitem__" or name.endswith("_") and not name.endswith("__"))


def _read_numbers_first(graph: fx.Graph) -> None:
    """Makes `array[i]` with a cast of `array.to(dtype)[i]`, where `array` is an argument of one axis: which number a
    layer reads differs between layers, and is to stay out of them."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        cast, index = node.args
        if not (
            isinstance(index, int) and cast.op == "call_method" and cast.target == "to" and _is_vector(cast.args[0])
        ):
            continue
        array = cast.args[0]
        with graph.inserting_before(node):
            number = graph.call_function(operator.getitem, (array, index))
            again = graph.call_method("to", (number, *cast.args[1:]), cast.kwargs)
        number.meta, again.meta = {"example_value": _value(array)[index]}, dict(node.meta)
        node.replace_all_uses_with(again)
        graph.erase_node(node)
        if not cast.users:
            graph.erase_node(cast)


def _is_number(node: fx.Node) -> bool:
    """Whether it is one element of an argument of one axis, which is read outside of the parts."""
    return node.target is operator.getitem and isinstance(node.args[1], int) and _is_vector(node.args[0])


def _is_vector(node: fx.Node) -> bool:
    """Whether it is an argument of one axis."""
    return node.op == "placeholder" and _value(node).ndim == 1


def _cut(module: fx.GraphModule) -> list[_Part]:
    """What is computed up to the end of each layer, and after the last one. What a layer does after its last inner
    module is left to the next part: the compiler fuses a sum with what reads it, and a product is in memory anyway.
    With blocks of `x = x + mlp(x)` the parts are: up to mlp(x); the sum, and the next block up to its mlp(x); ..."""
    apart = ("placeholder", "output", "get_attr")
    nodes = [node for node in module.graph.nodes if node.op not in apart and not _is_number(node)]
    groups, group = [], []
    for layer, members in itertools.groupby(nodes, _layer):
        members = list(members)
        inner = [i for i, node in enumerate(members) if layer and _modules(node)[-1] != layer]
        end = inner[-1] + 1 if inner else 0
        if inner:
            groups.append(group + members[:end])
            group = []
        group += members[end:]
    groups.append(group)
    place = {node: i for i, group in enumerate(groups) for node in group}
    return [
        _Part(module, group, [node for node in group if any(place.get(user) != i for user in node.users)])
        for i, group in enumerate(groups)
        if group
    ]


def _modules(node: fx.Node) -> list[str]:
    """The paths of the modules that it was traced in, the innermost last."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _layer(node: fx.Node) -> str | None:
    return next(filter(NUMBERED.search, _modules(node)), None)


class _Part:
    """
    Attributes:
        inputs, outputs: the nodes of the whole graph that it takes and gives.
        module: its graph. examples: arguments for it, without their numbers.
        kind: equal for parts that compute the same of arguments of the same shapes.
    """

    def __init__(self, whole: fx.GraphModule, nodes: list[fx.Node], outputs: list[fx.Node]):
        within, copy = set(nodes), _Copy(whole)
        sources = [source for node in nodes for source in node.all_input_nodes]
        inputs = (source for source in sources if source not in within and source.op != "get_attr")
        self.inputs, self.outputs = list(dict.fromkeys(inputs)), outputs
        for node in self.inputs:
            copy.placeholder(node)
        for node in nodes:
            copy.node(node)
        self.module = copy.module(tuple(outputs))
        self.examples = [_example(node) for node in self.inputs]
        self.kind = (*copy.texts(), *map(_signature, self.inputs, self.examples))
        # By these the compiler takes it for a graph of Dynamo's, and knows which arguments are never moved. PyTorch
        # 2.13 looks for the first, 2.11 for the second.
        self.module.meta = {"dynamo_compile_id": "part", "dynamo_flat_name_to_original_fqn": {}}
        self.module._param_name_to_source = {}


class _Copy:
    """A graph made anew, node by node, without the names of the old one."""

    def __init__(self, whole: torch.nn.Module):
        self._whole, self._graph, self._copies, self._attributes, self._inner = whole, fx.Graph(), {}, {}, []

    def placeholder(self, node: fx.Node) -> None:
        copy = self._copies[node] = self._graph.placeholder(f"argument{len(self._copies)}")
        copy.meta = {key: node.meta[key] for key in ("example_value", "tensor_dict") if key in node.meta}
        copy._dynamo_source = None  # type: ignore[attr-defined]

    def node(self, node: fx.Node) -> fx.Node:
        arguments, target = fx.map_arg((node.args, node.kwargs), self._copied), node.target
        if node.op == "get_attr":
            value = operator.attrgetter(target)(self._whole)
            target = f"attribute{len(self._attributes)}"
            if isinstance(value, fx.GraphModule):
                value, texts = _renamed(value)
                self._inner += texts
            else:
                self._inner.append(id(value))
            self._attributes[target] = value
        copy = self._copies[node] = self._graph.create_node(node.op, target, *arguments)
        copy.meta = dict(node.meta)
        return copy

    def _copied(self, node: fx.Node) -> fx.Node:
        return self.node(node) if node.op == "get_attr" and node not in self._copies else self._copies[node]

    def module(self, outputs) -> fx.GraphModule:
        self._graph.output(fx.map_arg(outputs, self._copied))
        return fx.GraphModule(self._attributes, self._graph)

    def texts(self) -> list:
        """What is computed, here and in inner graphs, and which constants it is computed with."""
        return [self._graph.python_code("self").src, *self._inner]


def _renamed(module: fx.GraphModule) -> tuple[fx.GraphModule, list]:
    """A graph without its names, and its texts."""
    copy = _Copy(module)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copy.placeholder(node)
        elif node.op != "output":
            copy.node(node)
    (result,) = module.graph.find_nodes(op="output")
    renamed = copy.module(result.args[0])
    renamed.meta = dict(module.meta)
    return renamed, copy.texts()


def _example(node: fx.Node):
    """An argument like this one, but at no place of its own in memory: parameters lie in one array for all layers."""
    value = _value(node)
    if not isinstance(value, torch.Tensor):
        return value
    if _is_number(node):
        example = value.new_empty(2)[1]  # which tells the compiler that it may be anywhere
    else:
        example = value.new_empty_strided(value.shape, value.stride())
    return example.requires_grad_(value.requires_grad)


def _signature(node: fx.Node, value) -> tuple:
    if not isinstance(value, torch.Tensor):
        return type(value), value
    stays = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, stays


class _Calls:
    """The parts one after the other, in place of the whole graph."""

    def __init__(self, graph: fx.Graph, parts: list):
        self._inputs = [node.name for node in graph.find_nodes(op="placeholder")]
        self._numbers = {}  # by array, the names of those of its numbers that are read
        for node in filter(_is_number, graph.find_nodes(op="call_function", target=operator.getitem)):
            self._numbers.setdefault(node.args[0].name, {})[node.name] = node.args[1]
        (result,) = graph.find_nodes(op="output")
        self._result = [node.name for node in result.args[0]]
        self._calls, needed = [], set(self._result)
        for compiled, part in reversed(parts):
            inputs, outputs = ([node.name for node in nodes] for nodes in (part.inputs, part.outputs))
            self._calls.insert(0, (compiled, inputs, outputs, set(inputs) - needed))
            needed |= set(inputs)

    def __call__(self, *inputs):
        values = dict(zip(self._inputs, inputs))
        for array, numbers in self._numbers.items():
            apart = values[array]
            if 4 * len(numbers) > len(apart):  # all at once: their gradients are put together by one kernel
                apart = apart.unbind()
            values.update((name, apart[index]) for name, index in numbers.items())
        for compiled, names, outputs, last in self._calls:
            results = compiled(*(values[name] for name in names))
            values.update(zip(outputs, results))
            for name in last:  # what nothing needs any more gives its memory back
                del values[name]
        return tuple(values[name] for name in self._result)
