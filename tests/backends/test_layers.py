"""Layers of one kind share what is compiled: the same gradients, fewer graphs, and none for another depth."""

import weakref

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.backends.debugging import aot_eager  # noqa: E402

from backends.pytorch import layers  # noqa: E402

WIDTH = 8


class Block(torch.nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.product = torch.nn.Linear(WIDTH, WIDTH)
        self.gate = torch.nn.Linear(WIDTH, 1) if gated else None

    def forward(self, x):
        y = self.product(x).relu()
        return x + (y if self.gate is None else self.gate(x).sigmoid() * y)


class Model(torch.nn.Module):
    """Every second block is gated, and each is told how much to take of its input and of the first one."""

    def __init__(self, depth):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, WIDTH), torch.nn.Linear(WIDTH, 1)
        self.blocks = torch.nn.ModuleList([Block(gated=i % 2 == 1) for i in range(depth)])
        self.shares, self.first_shares = (torch.nn.Parameter(torch.rand(depth)) for _ in range(2))

    def hidden(self, x):
        shares, first_shares = self.shares.to(torch.float64), self.first_shares.to(torch.float64)
        x = first = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(shares[i].float() * x + first_shares[i].float() * first)
        return x

    def forward(self, x):
        return self.last(self.hidden(x)).square().mean()


class Skipping(Model):
    """The later half reads what the earlier half made, and the last number is counted from the end."""

    def hidden(self, x):
        shares, made = self.shares.to(torch.float64), [self.first(x)]
        for i, block in enumerate(self.blocks):
            earlier = made[len(self.blocks) - i] if i > len(self.blocks) // 2 else made[0]
            made.append(block(made[-1]) + shares[i - len(self.blocks)].float() * earlier)
        return made[-1] * made[1]


class Adding(Model):
    """Adds in place to what an earlier layer made."""

    def hidden(self, x):
        x = self.first(x)
        for block in self.blocks:
            x += block(x * 2).tanh()
        return x


class Rows(Model):
    """Each layer reads a row of an array of two axes."""

    def __init__(self, depth):
        super().__init__(depth)
        self.register_buffer("rows", torch.rand(depth, WIDTH))

    def hidden(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x * self.rows[i])
        return x


@pytest.fixture
def compiled(monkeypatch):
    """compiled(model): the model as layers compile it, by tracing alone; the list gets each graph that is compiled."""
    graphs = []

    def compile_fx(graph, inputs, config_patches=None):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)

    def compiled(model):
        torch._dynamo.reset()
        graphs.clear()
        return torch.compile(model, backend=layers.compile_layers, dynamic=False, fullgraph=True), graphs

    yield compiled
    torch._dynamo.reset()


def gradients(function, model):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(function(x), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("kind", [Model, Skipping, Adding, Rows])
def test_the_same_gradients_as_uncompiled(compiled, kind):
    model = kind(6)
    for _ in range(2):  # the second time what was compiled is only called
        found, wanted = gradients(compiled(model)[0], model), gradients(model, model)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_a_kind_of_layer_is_compiled_once(compiled):
    model = Model(6)
    function, graphs = compiled(model)
    gradients(function, model)
    # The first layer has nothing to add from one before it; then one of each kind, and what comes after the last.
    assert len(graphs) == 4


def test_another_depth_compiles_the_same_graphs(compiled):
    texts = []
    for depth in (4, 8):
        model = Model(depth)
        function, graphs = compiled(model)
        gradients(function, model)
        texts.append([graph.code for graph in graphs])
    assert texts[0] == texts[1]


def test_what_differs_is_not_shared(compiled):
    model = Model(6)
    model.blocks[4].product = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    function, graphs = compiled(model)
    found = gradients(function, model)
    assert len(graphs) == 5
    torch.testing.assert_close(found, gradients(model, model))


def test_what_is_written_in_place_is_compiled_whole(compiled):
    model = Adding(6)
    function, graphs = compiled(model)
    gradients(function, model)
    assert len(graphs) == 1


def test_parameters_that_lie_in_one_array_are_shared_too(compiled):
    model = Model(6)
    weights = torch.stack([block.product.weight.detach() for block in model.blocks])
    for block, weight in zip(model.blocks, weights):
        block.product.weight.data = weight
    function, graphs = compiled(model)
    torch.testing.assert_close(gradients(function, model), gradients(model, model))
    assert len(graphs) == 4


def test_a_model_without_layers_is_compiled_whole(compiled):
    model = torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))
    function, graphs = compiled(lambda x: model(x).mean())
    torch.testing.assert_close(gradients(function, model), gradients(lambda x: model(x).mean(), model))
    assert len(graphs) == 1


def test_what_nothing_needs_any_more_is_given_back(monkeypatch):
    """Else a pass would hold what each layer made until its end."""
    made, alive = [], []

    def compile_fx(graph, inputs, config_patches=None):
        def run(*arguments):
            results = graph(*arguments)
            made.extend(map(weakref.ref, results))
            alive.append(sum(one() is not None for one in made))
            return results

        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Model(8), backend=layers.compile_layers, fullgraph=True)(torch.randn(5, 3))
    # A layer's input, what is still to be added to it, what the first layer read; and the same of the layer before.
    assert len(alive) == 9 and max(alive) == alive[4] == alive[7]
    torch._dynamo.reset()
