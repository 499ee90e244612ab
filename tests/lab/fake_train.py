"""An experiment of half a second: counts which token follows which, and forgets some of it again.

Its score depends on the constants and the seed, and not on how long it took: tests edit it as an agent would.
"""

import os
import time

import fake_backend
import numpy as np

import prepare

LEARNING = 0.9  # best at 0.7: so far from it, so much is forgotten
NOISE = 0.005  # standard deviation over seeds, of what is forgotten
BATCH_SIZE = 4

SEED = int(os.environ.get("AUTORESEARCH_SEED", 42))

backend = fake_backend.Backend()


def learned(x, y, vocab_size):
    """Log-probabilities (V, V) from one batch, mixed with ignorance."""
    counts = np.full((vocab_size, vocab_size), 0.01)
    np.add.at(counts, (x.ravel(), y.ravel()), 1)
    known = counts / counts.sum(axis=1, keepdims=True)
    forgotten = min(max(0.2 + abs(LEARNING - 0.7) + NOISE * np.random.default_rng(SEED).standard_normal(), 0.01), 0.99)
    return np.log((1 - forgotten) * known + forgotten / vocab_size).astype(np.float32)


def main():
    data = prepare.open_data()
    model = fake_backend.Table(data.vocab_size)
    model.table += 1e-4 * np.random.default_rng(SEED).standard_normal(model.table.shape).astype(np.float32)
    loader = prepare.Loader(data, BATCH_SIZE)
    clock = prepare.Clock(backend, model, loader)
    first = None
    while not clock.finished:
        batch = next(loader)
        first = first or batch
        time.sleep(0.005)
        clock.tick(5.0)
        print(f"\rstep {clock.steps:05d}", end="", flush=True)
    print()
    model.table = learned(*first, data.vocab_size)
    bpb = prepare.evaluate_bpb(backend, model, data, batch_size=8, clock=clock)
    prepare.report(clock, num_params=data.vocab_size**2, flops_per_token=1, depth=1)
    return bpb


if __name__ == "__main__":
    main()
