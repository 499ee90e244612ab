"""Two checkouts of this project, each with a patch or without: tokens per second of their train.py, measured in turn.

    python benchmarks/versions.py OTHER_CHECKOUT . [--rounds 7] [--steps 12]
    python benchmarks/versions.py OTHER_CHECKOUT=gelu.patch .=tests/edits/gelu.patch

Both sides are started, compiled and kept; then each makes some steps while the other waits, and so on in turn. The
tokens are random, with the frequencies of words, and made before: neither side's loader is measured. Sizes are those of
the options, in both. What a side is computed with it finds by its own trials, or takes from its calibration.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def source_of(folder: Path, patch: str, options) -> Path:
    """This checkout's train.py, patched and of the sizes asked for, in a folder of its own."""
    path = Path(tempfile.mkdtemp()) / "train.py"
    path.write_text((folder / "train.py").read_text())
    if patch:
        # Inside a repository, git would silently skip a file that is not where the patch says.
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.resolve().parents[1])}
        subprocess.run(["git", "apply", str(Path(patch).resolve())], cwd=path.parent, env=alone, check=True)
    sizes = dict(DEPTH=options.depth, DEVICE_BATCH_SIZE=options.device_batch, TOTAL_BATCH_SIZE=options.total_batch)
    text = path.read_text()
    for name, value in {**sizes, "WINDOW_PATTERN": options.windows}.items():
        text, count = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r} ", text)
        assert count == 1, f"{name} is set {count} times"
    path.write_text(text)
    return path


def child(source: Path, calibrated: str) -> None:
    """Trains in the current folder's checkout. Reads numbers of steps, and writes the seconds that these took."""
    import importlib.util

    import numpy as np

    sys.path.insert(0, os.getcwd())
    import backends
    from backends.interface import Calibrated

    if calibrated:
        load, found = backends.load, Calibrated(**json.loads(Path(calibrated).read_text()))
        backends.load = lambda **_: load(calibrated=found)
    spec = importlib.util.spec_from_file_location("train_here", source)
    sys.modules["train_here"] = train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    backend, length, vocabulary = train.backend, train.prepare.MAX_SEQ_LEN, 8192
    frequencies = 1 / np.arange(1, vocabulary + 1)
    drawn = np.random.default_rng(0).choice(
        vocabulary, (2, 2, train.DEVICE_BATCH_SIZE, length), p=frequencies / frequencies.sum()
    )
    batches = drawn.astype(np.int32)
    model = train.GPT(train.DEPTH, vocabulary)
    shapes = backend.shapes(model)
    backend.set_weights(model, train.initial_weights(shapes, 42))
    groups = train.optimizer_groups(shapes)
    trainer = backend.Trainer(model, train.training_loss, groups)
    trainer.warm_up(*batches[0])
    passes, step = train.TOTAL_BATCH_SIZE // batches[0, 0].size, 0
    notes = dict(device=backend.device.name, versions=backend.device.versions, notes=backend.device.notes)
    print("\nREADY", json.dumps(notes), flush=True)
    for line in sys.stdin:
        backend.synchronize()
        started, before = time.perf_counter(), None
        for _ in range(int(line)):
            loss = 0.0
            for i in range(passes):
                loss = loss + trainer.backward(*batches[i % 2], 1 / passes) / passes
            trainer.step(train.schedule(groups, 0.1, step))
            if before is not None:
                float(before)  # as the training loop does, one step behind
            before, step = backend.read_later(loss), step + 1
        backend.synchronize()
        print("\nTOOK", time.perf_counter() - started, float(loss), backend.peak_memory(), flush=True)


class Side:
    def __init__(self, name: str, options):
        folder, _, patch = name.partition("=")
        self.name, self.folder, self.rates = name, Path(folder).resolve(), []
        self.source = source_of(self.folder, patch, options)
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                "--child",
                str(self.source),
                str(options.calibrated.resolve() if options.calibrated else ""),
            ],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self, word: str) -> str:
        """What follows this word, once it comes; other lines are shown."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
            if line.strip():
                print(f"  [{self.name}] {line.rstrip()}", flush=True)
        sys.exit(f"{self.name} ended with status {self.process.wait()}")

    def steps(self, count: int) -> list[float]:
        """[seconds, last loss, peak bytes] of so many steps."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return [float(part) for part in self.answer("TOOK").split()]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", metavar="FOLDER[=PATCH]")
    for name, default in dict(rounds=7, steps=12, depth=8, device_batch=64, total_batch=2**19).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--windows", default="SSSL")
    parser.add_argument("--calibrated", type=Path, help="JSON of a Calibrated, instead of trials")
    parser.add_argument("--at-once", action="store_true", help="start all sides at once: their trials are remembered")
    options = parser.parse_args()
    sides, started = [], time.time()
    for name in options.sides:  # one after the other: the first makes the trials that the others remember
        sides.append(Side(name, options))
        if not options.at_once:
            print(f"{name}: {sides[-1].answer('READY').strip()} after {time.time() - started:.0f} s", flush=True)
    for side in sides if options.at_once else ():
        print(f"{side.name}: {side.answer('READY').strip()} after {time.time() - started:.0f} s", flush=True)
    for side in sides:
        side.steps(options.steps)
    for i in range(options.rounds):
        for side in sides if i % 2 else reversed(sides):
            took, loss, peak = side.steps(options.steps)
            side.rates.append(options.steps * options.total_batch / took)
            print(
                f"round {i} {side.name}: {side.rates[-1]:,.0f} tokens/s, loss {loss:.4f}, {peak / 1e9:.1f} GB",
                flush=True,
            )
    first = statistics.median(sides[0].rates)
    for side in sides:
        rate = statistics.median(side.rates)
        spread = (max(side.rates) - min(side.rates)) / rate
        print(f"{side.name}: median {rate:,.0f} tokens/s, spread {100 * spread:.1f} %, {rate / first:.4f} of the first")
        side.process.stdin.close()


if __name__ == "__main__":
    main()
