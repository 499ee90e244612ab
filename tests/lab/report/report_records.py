"""Sessions to report on, made up."""

import random

from lab.compare.record import Change, Record, Trial
from lab.verdict.gate import Noise

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg onload=window.pwned=1><a href=javascript:window.pwned=1>click</a>",
    "]]><!-- <script>window.pwned = 1</script> -->",
    "\x1b[2J\x1b]0;owned\x07 and \u202egnidaer\u2066 on\u2028window.pwned = 1\u2029",
    '" onmouseover="window.pwned=1" style="position:fixed" x=\'',
    "&lt;script&gt;window.pwned = 1&lt;/script&gt; &#60;b&#62;",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1} `",
    "\ud800 a lone surrogate, \x00 a zero, \u200b\ufeff no width",
]
DIFF = "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n LR = 1\n-DEPTH = {}\n+DEPTH = {}\n"


def trial(run, bpb, beside, **more):
    facts = {
        "seed": 42,
        "eval": "e" * 12,
        "budget": 300.0,
        "tokens": 1e8 + 1e5 * ((run or 0) % 7),
        "flops": 3e15,
        "mfu": 40.0,
        "memory": 12.5,
        "seconds": 340.0,
    }
    return Trial(run=run, bpb=bpb, beside=beside, **facts | more)


def session(count=12, device="cpu-amd-epyc-2c-24gb", tag="night", texts=None, sd=0.002, **more):
    """A session of so many experiments: every fifth is kept, every seventh crashes. `texts`: theirs, and their diffs',
    in turn."""
    rng, best, level, run = random.Random(0), 0, 1.2, 3
    changes = {
        0: Change(
            0,
            None,
            "keep",
            "baseline",
            "baseline",
            trials=tuple(trial(number, 1.2 + rng.gauss(0, sd), 0, seed=42 + number) for number in (1, 2, 3)),
        )
    }
    for number in range(1, count + 1):
        run += 1
        kept, crashed = number % 5 == 0, number % 7 == 0 and number % 5
        level -= 0.01 * kept / (1 + number / 50)
        bpb = level + (0 if kept else abs(rng.gauss(0, 0.01)))
        text = texts[number % len(texts)] if texts else f"change {number} of the depth"
        trials = () if crashed else (trial(run, bpb, number), *(trial(run + 1, bpb + sd, number, seed=43),) * kept)
        run += kept
        changes[number] = Change(
            number,
            best,
            "crash" if crashed else "keep" if kept else "discard",
            "change",
            text,
            patch=f"{number:016x}",
            kinds=(("architecture", "schedule")[number % 2],),
            text=texts[number % len(texts)] if texts else DIFF.format(number, number + 1),
            trials=trials,
            commit=f"{number:07x}",
            reason=text if texts else "RuntimeError: out of memory" if crashed else "0.7 standard errors",
            near_miss=number % 5 == 1,
            started="2026-11-21T23:37:42Z",
        )
        best = number if kept else best
    facts = {
        "backend": "sdpa",
        "noise": Noise(sd, 5),
        "budget": 300.0,
        "hours": 0.12 * (count + 3),
        "rows": run,
        "facts": {"dataset": "tiny", "eval": "e" * 12, "python": "3.12"},
    }
    return Record(device, tag, changes, **facts | more)


def source(effects, device="nvidia-h200-141gb", sd=0.001, level=1.0):
    """A session that kept a change of each effect, all of them made from the baseline, and ran each again since."""

    def runs(first, bpb, own):
        return tuple(trial(first + i, bpb + sd * (i % 3 - 1), own if i < 1 else 99, seed=50 + i) for i in range(5))

    changes = {0: Change(0, None, "keep", "baseline", "baseline", trials=runs(1, level, 0))}
    for number, effect in enumerate(effects, 1):
        changes[number] = Change(
            number,
            0,
            "keep",
            "change",
            f"change {number}",
            patch=f"{number:016x}",
            kinds=("optimizer",),
            trials=runs(10 * number, level + effect, number),
        )
    return Record(device, "night", changes, "cuda", Noise(sd, 20), 300.0, 5.0, 99)


def replayed(of, effects, device="apple-m4-16gb", sd=0.001, level=1.2):
    """Its changes, tried on another device, with these effects."""
    changes = {
        0: Change(
            0,
            None,
            "keep",
            "baseline",
            "baseline",
            trials=tuple(trial(run, level, 0, seed=run, eval="f" * 12) for run in (1, 2, 3)),
        )
    }
    for number, effect in enumerate(effects, 1):
        changes[number] = Change(
            number,
            0,
            "keep" if effect < 0 else "discard",
            "replay",
            f"change {number}",
            origin=f"{of.name}/{of.changes[number].patch}",
            kinds=("optimizer",),
            trials=tuple(
                trial(10 * number + run, level + effect, number, seed=run, eval="f" * 12) for run in (1, 2, 3)
            ),
        )
    return Record(device, "replay", changes, "mlx", Noise(sd, 20), 300.0, 2.0, 30)
