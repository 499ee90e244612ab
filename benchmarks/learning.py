"""The same learning? Our train.py and the original's, from the same weights on the same rows, each as it computes.

    python benchmarks/learning.py --theirs ORIGINAL_TRAIN_PY --fa3 --seeds 1 2 3 4                 (on a Hopper)
    python benchmarks/learning.py --theirs ORIGINAL_TRAIN_PY --fa3 --only theirs --out THEIRS_JSON (on a GPU of its own)
    python benchmarks/learning.py --only ours --out OURS_JSON                                      (on another)
    python benchmarks/learning.py --only plain --out PLAIN_JSON          (ours without kernels of its own)
    python benchmarks/learning.py --compare OURS_JSON... --against THEIRS_JSON...
    python benchmarks/learning.py --theirs ORIGINAL_TRAIN_PY --attention NANOCHAT_FLASH_ATTENTION_PY --float32 \\
        --depth 2 --device-batch 1 --total-batch 4096 --steps 4 --last 2 --seeds 1 2               (a try on a CPU)

Each seed draws our initial weights, which both start from (the original's embeddings round them to bfloat16: so it
keeps them); the data are those prepared last, by our loader. The schedule of both goes by steps instead of time. For
the rest the original runs as it is written, compiled and under its autocast, with Flash Attention 3 from the library
that ours finds, and ours as `python train.py` would. What is compared is the mean training loss of the last steps, over
all tokens of each. Every run is a process of its own. What is done is in --out after each run: SIGTERM or Ctrl-C ends
the others, and files of several seeds are compared as one.

AdamW's eps for the scalars is ours in both. With its own 1e-10 the original makes of rounding noise a first step of
full size in x0_lambdas, whose gradient is zero there: by chance that cost it, on an H200 with seed 2, a loss of 9.48
instead of 8.57 at the second step, and 0.07 nats after 300 (--own-eps).

One seed's difference is chaotic by then: two trajectories from the same weights part after a few dozen steps. So the
seeds are judged together: the 90 % interval of their mean difference (Student's t) has to lie within the limit on both
sides of zero.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import psutil
from peers import (  # beside this file
    add_options,
    by_steps,
    check_options,
    execute,
    our_name,
    patched,
    replaced,
    run_apart,
    run_torch_source,
    torch_source,
    with_constants,
)
from seed_noise import TRAIN, StepClock

import backends
import prepare
from lab.verdict import gate
from storage import write_json

OUR_EPS = 1e-4  # of AdamW for the scalars, in our train.py
SAME = ("depth", "total_batch", "windows", "steps", "last", "float32")  # options that both sides have to share


def run_plain(options) -> dict:
    """Ours with plain operations instead of its kernels."""
    from backends.pytorch.kernels import trial

    patched(trial.choose, lambda tried: {}).start()
    patched(trial.known, lambda variants: False).start()
    return run_ours(options)


def run_ours(options) -> dict:
    if options.float32:
        backend = backends.load(precision="float32")
        patched(backends.load, lambda **_: backend).start()
    losses, seconds, found = [], [], {}

    class Clock(StepClock):
        total = options.steps

        def tick(self, loss):
            losses.append(loss)
            seconds.append(super().tick(loss))
            return seconds[-1]

    def finish(backend, model, data, clock, **_):
        found.update(
            initial=clock.initial_weights,
            data=data.data_tag,
            notes=backend.device.notes,
            kernels=backend.device.kernels,
            attention_provider=backend.device.attention_provider,
        )
        clock.stop()

    patched(prepare.Clock, Clock).start()
    patched(prepare.evaluate_bpb, finish).start()
    patched(prepare.report, lambda *_, **__: None).start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(AUTORESEARCH_SEED=str(options.seed), AUTORESEARCH_RESULT=f"{folder}/result.json")
        execute("ours", with_constants(TRAIN.read_text(), options)).main()
    return dict(
        found,
        losses=[float(loss) for loss in losses],
        tokens_per_second=options.total_batch / statistics.median(seconds),
    )


def run_theirs(options) -> dict:
    import torch

    data, train, heard, found = prepare.open_data(), our_text(options), [], {}

    def start_from_ours(model):
        named = {our_name(name): parameter for name, parameter in model.named_parameters()}
        weights = train.initial_weights({name: tuple(p.shape) for name, p in named.items()}, options.seed)
        found.update(initial=prepare.sketch(weights), data=data.data_tag)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(weights[name]))

    source = by_steps(torch_source(options))
    if not options.own_eps:
        for group in ("lr=scalar_lr * 0.01, betas=adam_betas", "lr=scalar_lr, betas=(0.96, 0.95)"):
            source = replaced(source, f"{group}, eps=1e-10", f"{group}, eps={OUR_EPS}")
    made, passed = "\nmodel.init_weights()\n", "        train_loss = loss.detach()\n"
    source = replaced(source, made, f"{made}start_from_ours(model)\n")
    source = replaced(source, passed, f"{passed}        heard(train_loss)\n")
    theirs = run_torch_source(source, options, data, options.steps, start_from_ours=start_from_ours, heard=heard.append)
    return dict(
        found,
        losses=torch.stack(heard).reshape(options.steps, -1).mean(1).tolist(),
        tokens_per_second=(options.steps - 11) * options.total_batch / theirs.total_training_time
        if options.steps > 11
        else None,  # it does not time the first
        attention_provider=getattr(theirs, "attention_provider", None),
    )


def our_text(options):
    """Our train.py without a backend, for what it draws: theirs gets the device to itself."""
    nothing = SimpleNamespace(nn=SimpleNamespace(Module=object), ops=SimpleNamespace(fusable=lambda function: function))
    with patched(backends.load, lambda **_: nothing):
        return execute("ours", with_constants(TRAIN.read_text(), options))


def run_child(side: str, seed: int) -> dict:
    started = time.time()
    result = run_apart(__file__, f"{side}, seed {seed},", "--child", side, "--seed", str(seed))
    print(
        f"{side:6} seed {seed}: last loss {result['losses'][-1]:.4f}, {time.time() - started:.0f} s; "
        f"Flash Attention 3: {result['attention_provider']}",
        flush=True,
    )
    return result


def run_side(side: str, options) -> dict:
    """All its runs; what is done is written to --out after each. A run that fails, or a signal, ends the others."""
    shown = {name: getattr(options, name) for name in SAME}
    found = {"side": side, "options": shown, "runs": {}}
    with ThreadPoolExecutor(options.together) as pool:
        asked = {pool.submit(run_child, side, seed): str(seed) for seed in options.seeds}
        try:
            for run in as_completed(asked):
                found["runs"][asked[run]] = run.result()
                if options.out:
                    write_json(options.out, found)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(run.done() for run in asked):  # one may just be started
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                time.sleep(0.1)
            raise
    return found


SIDES = {"ours": run_ours, "plain": run_plain, "theirs": run_theirs}


# ---- Comparison ----


def merged(paths: list[Path]) -> dict:
    """One side of a comparison, from files with other seeds each."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        if (other["side"], other["options"]) != (first["side"], first["options"]):
            raise SystemExit(f"{path} is not of the same runs as {paths[0]}")
        if twice := first["runs"].keys() & other["runs"].keys():
            raise SystemExit(f"{path} has seeds again: {', '.join(sorted(twice, key=int))}")
        first["runs"] |= other["runs"]
    return first


def compare(ours: dict, theirs: dict, limit: float) -> bool:
    """Prints the differences; whether their mean's interval is within the limit.

    Args:
        ours, theirs: {"options": {...}, "runs": {seed: {"losses": of each step, "initial": ..., "data": ...}}}.
    """
    if ours["options"] != theirs["options"]:
        raise SystemExit(f"not the same runs: {ours['options']}, {theirs['options']}")
    last, seeds = ours["options"]["last"], sorted(ours["runs"].keys() & theirs["runs"].keys(), key=int)
    if len(seeds) < 2:
        raise SystemExit("an interval needs two seeds at least that both sides have")
    pairs = {seed: (ours["runs"][seed], theirs["runs"][seed]) for seed in seeds}
    sides = [ours["side"], theirs["side"]]
    differences = []
    print(
        f"\nmean training loss of the last {last} of {ours['options']['steps']} steps, nats\n\n"
        f"| seed | {' | '.join(sides)} | {' - '.join(sides)} |\n|---|---|---|---|"
    )
    for seed, pair in pairs.items():
        for what in ("initial", "data"):
            if pair[0][what] != pair[1][what]:
                raise SystemExit(f"seed {seed}: {what} of {sides[0]} {pair[0][what]}, of {sides[1]} {pair[1][what]}")
        means = [statistics.fmean(run["losses"][-last:]) for run in pair]
        differences.append(means[0] - means[1])
        print(f"| {seed} | {means[0]:.5f} | {means[1]:.5f} | {differences[-1]:+.5f} |")
    print()
    for side, runs in zip(sides, zip(*pairs.values(), strict=True), strict=True):
        if all(run["tokens_per_second"] for run in runs):
            print(f"tokens/s of {side}: {statistics.median(run['tokens_per_second'] for run in runs):,.0f} (median)")
        for what in ("attention_provider", "kernels"):
            print(f"{what.replace('_', ' ')} of {side}: {', '.join({str(run.get(what)) for run in runs})}")
    print(
        "mean difference over all seeds by steps: "
        + ", ".join(
            f"{first + 1} to {first + last} {by_steps_from(pairs, first, last):+.4f}"
            for first in range(0, ours["options"]["steps"], last)
        )
    )
    mean, low, high = gate.interval(differences)
    within = -limit <= low and high <= limit
    print(
        f"mean difference {mean:+.5f}, 90 % interval {low:+.5f} to {high:+.5f}: "
        f"{'within' if within else 'NOT within'} ±{limit:g}"
    )
    return within


def by_steps_from(pairs: dict, first: int, count: int) -> float:
    """The mean difference of these steps over all seeds."""
    one, other = (
        [loss for pair in pairs.values() for loss in pair[side]["losses"][first : first + count]] for side in (0, 1)
    )
    return statistics.fmean(one) - statistics.fmean(other)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", type=Path, help="the original's train.py")
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last", type=int, default=50, help="steps whose loss is compared")
    parser.add_argument("--limit", type=float, default=0.005, help="nats")
    parser.add_argument("--own-eps", action="store_true", help="the original's eps for its scalars")
    parser.add_argument("--only", choices=[*SIDES], help="run this side alone, and write it to --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--together", type=int, default=1, help="runs at a time, which slows them")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="OURS", help="files written so")
    parser.add_argument("--against", type=Path, nargs="+", metavar="THEIRS", help="those of the other side")
    parser.add_argument("--child", choices=[*SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(defaults=False)
    options = parser.parse_args()
    check_options(parser, options)
    if not options.theirs and not options.compare and options.only not in ("ours", "plain"):
        parser.error("--theirs is missing: the original's train.py")
    if bool(options.only) != bool(options.out):
        parser.error("--only and --out go together")
    if bool(options.compare) != bool(options.against):
        parser.error("--compare and --against go together")
    return options


def main() -> int:
    options = parse_options()
    if options.child:
        print("\nRESULT", json.dumps(SIDES[options.child](options)))
        return 0
    if options.compare:
        sides = [merged(options.compare), merged(options.against)]
    else:
        for number in (signal.SIGTERM, signal.SIGINT):  # a shell has programs in its background ignore SIGINT
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        sides = [run_side(side, options) for side in ([options.only] if options.only else ["ours", "theirs"])]
    if options.only:
        return 0
    ours, theirs = sides
    return int(not compare(ours, theirs, options.limit))


if __name__ == "__main__":
    sys.exit(main())
