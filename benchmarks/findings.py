"""The same changes of train.py tried in a session of any machine, so that sessions of several can be compared.

    python -m lab start findings --wait 3600 && python benchmarks/findings.py && python -m lab export findings.tar.gz

Each is made on the best so far: rates and sizes are relative to what it has, structural edits are published ones
(`findings/`). One that does not apply any more is said and left out. Called again, it goes on where it was:
what the session has tried, by its description, is not tried twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from session import lab  # noqa: E402

from lab.genome import block  # noqa: E402
from lab.compare import published  # noqa: E402

# (what is said, a variable of the block and its value from the one it has; or a structural edit's name)
CHANGES = [
    ("a quarter of the total batch", "TOTAL_BATCH_SIZE", lambda power: power - 2),
    ("Muon's rate doubled", "MATRIX_LR", lambda rate: 2 * rate),
    ("the embeddings' rate doubled", "EMBEDDING_LR", lambda rate: 2 * rate),
    ("a shorter cooldown", "WARMDOWN_RATIO", lambda _: 0.3),
    ("a layer less", "DEPTH", lambda more: more - 1),
    ("the head's rate halved", "UNEMBEDDING_LR", lambda rate: rate / 2),
    ("attention and MLP side by side", published.library, "parallel"),
    ("half the total batch", "TOTAL_BATCH_SIZE", lambda power: power - 1),
    ("Muon's momentum at its height after 50 steps", "MOMENTUM_STEPS", lambda _: 50),
    ("logits within 30", "SOFTCAP", lambda _: 30),
    ("a gated MLP", published.library, "swiglu"),
    ("no weight decay", "WEIGHT_DECAY", lambda _: 0.0),
    ("a longer cooldown", "WARMDOWN_RATIO", lambda _: 0.8),
    ("the scalars' rate tripled", "SCALAR_LR", lambda rate: 3 * rate),
]  # fmt: skip


def edited(text: str, where, what) -> str | None:
    """A train.py with a change made; None if it does not apply."""
    if where is published.library:
        return next(one for one in published.library() if one.name == what).edit.apply(text)
    values = {variable.name: variable.value for variable in block.read(text)}
    return block.write(text, {where: what(values[where])}) if where in values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", default="3600", help="seconds for each, at most")
    options = parser.parse_args()
    here = Path.cwd()
    train = here / "train.py"
    tried = {row["description"] for row in json.loads(lab(here, "log", "--json"))}
    for said, where, what in CHANGES:
        if said in tried:
            continue
        before = train.read_text()
        text = edited(before, where, what)
        if text is None or text == before:
            print(f"{said}: not applicable")
            continue
        train.write_text(text)
        try:
            found = json.loads(lab(here, "run", "-m", said, "--wait", options.wait, "--json"))
        except SystemExit:  # it was not run
            train.write_text(before)
            raise
        if found["status"] == "running":
            raise SystemExit("it still runs: python -m lab wait, then call this again")
        score = f"{found['val_bpb']:.6f}" if found["val_bpb"] else "-"
        print(f"{said:45} {found['status']:8} {score}  {len(found['runs'])} runs  {found['reason'] or ''}", flush=True)


if __name__ == "__main__":
    main()
