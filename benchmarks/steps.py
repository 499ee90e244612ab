"""How large are the steps of hyperparameters that helped in published ledgers? The prior of the built-in search.

    python benchmarks/steps.py LEDGER... > findings/steps.tsv

A ledger is a results.tsv as `lab import` reads it, the original's or another program's. Of each change whose words
give a variable with its values before and after ("embedding LR 0.6 to 0.8", "Decrease MATRIX_LR from 0.04 to 0.03"),
the step is measured on the variable's scale: the logarithm of the ratio, that of 1 - x for an average's decay, the
difference for a part of the run. A change helped if it was kept, which these programs do after one run; its effect is
its score minus the best before it. By kind of variable:

    tried, helped    how many, and the share that helped
    step, spread     median size of the steps that helped, and the standard deviation of its logarithm, each step
                     weighted with its gain
"""

import argparse
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.night.sampler import KINDS, kind_of
from lab.share import sources

VALUE = r"\(?(?P<{0}>\d+(?:\.\d+)?(?:\*\*\d+|[Kk]|[Ee][-+]?\d+)?)(?:, [\d.]+\))?"
HALVED = re.compile(r"(halv|half|doubl)\w* (the )?(total[_ ])?batch", re.I)
FROM_TO = re.compile(r"(?P<words>.*?)[ =]" + VALUE.format("old") + " to " + VALUE.format("new"))
# The variable of train.py that words speak of: the first that fits.
NAMES = (
    (r"unembedding|lm_head lr", "UNEMBEDDING_LR"),
    (r"embedding_?lr|embedding lr", "EMBEDDING_LR"),
    (r"matrix", "MATRIX_LR"),
    (r"scalar", "SCALAR_LR"),
    (r"weight.?decay|wd\b", "WEIGHT_DECAY"),
    (r"final_lr|final lr", "FINAL_LR_FRACTION"),
    (r"warmdown", "WARMDOWN_RATIO"),
    (r"momentum warmup|momentum_?steps", "MOMENTUM_STEPS"),
    (r"momentum", "MOMENTUM[1]"),
    (r"warmup", "WARMUP_RATIO"),
    (r"beta", "ADAM_BETAS[0]"),
    (r"total_batch|batch", "TOTAL_BATCH_SIZE"),
    (r"depth", "DEPTH"),
    (r"aspect", "ASPECT_RATIO"),
    (r"head_dim", "HEAD_DIM"),
    (r"softcap", "SOFTCAP"),
    (r"rope base|rope", "ROPE_BASE"),
    (r"mlp_|mlp hidden", "MLP_RATIO"),
)
NEVER = re.compile(r"device_batch|z.loss|seed|init|precompute|ns_steps|gate|reference", re.I)


def number(text: str) -> float:
    if "**" in text:
        base, power = text.split("**")
        return float(base) ** int(power)
    return float(text[:-1]) * 1000 if text[-1] in "Kk" else float(text)


def step(text: str) -> tuple[str, float] | None:
    """(variable, size of the step on its scale) of a change's words; None where they don't say."""
    if HALVED.match(text):
        return "TOTAL_BATCH_SIZE", math.log(2)
    found = FROM_TO.match(text)
    if not found or NEVER.search(found["words"]):
        return None
    name = next((name for words, name in NAMES if re.search(words, found["words"], re.I)), None)
    old, new = number(found["old"]), number(found["new"])
    if name is None or old == new:
        return None
    scale = KINDS[kind_of(name)]
    if scale == "decay" and max(old, new) < 1:
        return name, abs(math.log((1 - new) / (1 - old)))
    if scale == "linear":
        return name, abs(new - old)
    return (name, abs(math.log(new / old))) if min(old, new) > 0 else None


def weighted_median(steps: list[tuple[float, float, bool]]) -> float:
    """The size below which half of the effects were had."""
    left = sum(abs(effect) for _, effect, _ in steps) / 2
    for size, effect, _ in sorted(steps):
        left -= abs(effect)
        if left <= 0:
            return size
    raise ValueError("there are no steps")


def spread(steps: list[tuple[float, float, bool]]) -> float:
    """Standard deviation of the logarithms of their sizes."""
    weights, logs = [abs(effect) for _, effect, _ in steps], [math.log(size) for size, _, _ in steps]
    mean = sum(w * x for w, x in zip(weights, logs)) / sum(weights)
    return math.sqrt(sum(w * (x - mean) ** 2 for w, x in zip(weights, logs)) / sum(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledgers", nargs="+", type=Path)
    by_kind: dict[str, list[tuple[float, float, bool]]] = {kind: [] for kind in KINDS}
    for ledger in parser.parse_args().ledgers:
        state = sources.read(ledger, "some-device").state
        for change in state.decided[1:]:
            parent, score = state.parent_of(change), state.mean(change)
            if (found := step(change.description)) and parent and score:
                before = state.mean(parent)
                by_kind[kind_of(found[0])].append((found[1], score / before - 1, change.status == "keep"))
    print("kind", "tried", "helped", "step", "spread", sep="\t")
    for kind, steps in by_kind.items():
        if not steps:
            raise SystemExit(f"these ledgers have no step of kind {kind}: give more of them")
        helped = [one for one in steps if one[2]]
        figures = [len(steps), (len(helped) + 1) / (len(steps) + 5)]
        figures += [weighted_median(helped or steps), spread(helped or steps)]
        print(kind, *(f"{figure:.3g}" for figure in figures), sep="\t")


if __name__ == "__main__":
    main()
