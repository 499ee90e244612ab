"""A backend of a few numpy lines, and models for it: honest ones and ones that the evaluator must refuse."""

from types import SimpleNamespace

import numpy as np

import storage


class OutOfMemory(Exception):
    pass


class Backend:
    """Losses are log-softmax and gather of the model's logits, unless the model has its own `losses`."""

    name = "fake"
    warmed_up = {"compiled": True, "captured": None, "rows_at_once": None}

    def __init__(self, fits=10**9, peak_flops=1e9):
        self.device = SimpleNamespace(
            slug="fake-1gb",
            kind="cpu",
            name="Fake",
            peak_flops=peak_flops,
            profile="abc",
            speed=0.9,
            attention_provider="library sha256:0123456789ab",
        )
        self.fits, self.calls, self.synchronized = fits, [], 0

    def synchronize(self):
        self.synchronized += 1

    def clock_rate(self):
        return None

    def read_later(self, scalar):
        return scalar

    def step_kind(self):
        return "step"

    def peak_memory(self):
        return 3 * 2**20

    def is_out_of_memory(self, error):
        return isinstance(error, OutOfMemory)

    def save(self, model, path):
        self.calls.append("save")
        with storage.replacing(path) as temporary:
            temporary.write_bytes(b"weights")

    def weights(self, model):
        return {"table": model.table} if hasattr(model, "table") else {}

    def logits(self, model, tokens):
        assert tokens.dtype == np.int32
        return model(tokens).astype(np.float32)

    def losses(self, model, tokens, targets):
        assert tokens.dtype == targets.dtype == np.int32
        self.calls.append(len(tokens))
        if len(tokens) > self.fits:
            raise OutOfMemory
        if hasattr(model, "losses"):
            return model.losses(tokens, targets)
        return nats(model(tokens), targets)


def nats(logits, targets):
    top = logits.max(-1, keepdims=True)
    logsumexp = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    return (logsumexp - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).astype(np.float32)


class Bigram:
    """Logits (V, V), zero before training: what follows a token depends on that token alone."""

    def __init__(self, data):
        self.table = np.zeros((data.vocab_size, data.vocab_size), np.float32)

    def train(self, rows):
        np.add.at(self.table, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
        self.table = np.log(self.table + 0.01)
        return self

    def __call__(self, tokens):
        return self.table[tokens]
