"""Sessions to report on, made up."""

import random

from records import EVAL, Builder, analysed

from lab.reasons import because

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg onload=window.pwned=1><a href=javascript:window.pwned=1>click</a>",
    "]]><!-- <script>window.pwned = 1</script> -->",
    "\x1b[2J\x1b]0;owned\x07 and \u202egnidaer\u2066 on\u2028window.pwned = 1\u2029",
    '" onmouseover="window.pwned=1" style="position:fixed" x=\'',
    "&lt;script&gt;window.pwned = 1&lt;/script&gt; &#60;b&#62; $\\frac{1}{2}$ $\\undefined{$",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1} `",
    "\ud800 a lone surrogate, \x00 a zero, \u200b\ufeff no width",
]
DIFF = "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n LR = 1\n-DEPTH = {}\n+DEPTH = {}\n"
MEASURED = {"total_tokens_M": 100.0, "flops_per_token": 3e7, "mfu_percent": 40.0, "peak_vram_mb": 12800.0}


def begun(device="cpu-amd-epyc-2c-24gb", tag="night", facts=None, **started):
    return Builder(device, tag, MEASURED | (facts or {}), time=1.76e9, **started)


def session(count=12, device="cpu-amd-epyc-2c-24gb", tag="night", texts=None, sd=0.002, then=None, family="", **more):
    """A session of so many experiments: every fifth is kept, every seventh crashes.

    Args:
        texts: their descriptions, reasons and diffs, in turn. sd: of runs; None where nothing was repeated.
        then: called with its Builder at the end.
    """
    rng, best, level, noise = random.Random(0), 0, 1.2, sd or 0.002
    builder = begun(device, tag, **more).baseline([1.2 + rng.gauss(0, noise) for _ in range(3)][: 3 if sd else 1])
    for number in range(1, count + 1):
        kept, crashed = number % 5 == 0, number % 7 == 0 and number % 5
        level -= 0.01 * kept / (1 + number / 50)
        bpb = level + (0 if kept else abs(rng.gauss(0, 0.01)))
        text = texts[number % len(texts)] if texts else f"change {number} of the depth"
        reason = because("not_run") if not crashed else because("not_scored_again", problem=text)
        builder.change(
            number,
            [] if crashed else [bpb, bpb + noise][: 1 + kept],
            "crash" if crashed else "keep" if kept else "discard",
            onto=best,
            description=text,
            change=f"{family}{number:0{16 - len(family)}x}",
            kinds=[("architecture", "schedule")[number % 2]],
            diff=texts[number % len(texts)] if texts else DIFF.format(number, number + 1),
            commit=f"{number:07x}",
            near_miss=number % 5 == 1,
            reason=reason,
            runs={"total_tokens_M": 100 + 0.1 * (number % 7)},
        )
        best = number if kept else best
    if then:
        then(builder)
    return analysed(builder, sd, 5)


def source(effects, device="nvidia-h200-141gb", sd=0.001, level=1.0):
    """A session that kept a change of each effect, all of them made from the baseline, and ran each again since."""

    def runs(bpb):
        return [bpb + sd * (i % 3 - 1) for i in range(4)]

    builder = begun(device, backend="cuda").baseline([level - sd])
    for number, effect in enumerate(effects, 1):
        builder.change(number, [level + effect - sd], "keep", kinds=["optimizer"])
    for number, effect in enumerate([0.0, *effects]):
        builder.again(99, number, runs(level + effect))
    return analysed(builder, sd, 20)


def replayed(of, effects, device="apple-m4-16gb", sd=0.001, level=1.2):
    """Its changes, tried on another device, with these effects."""
    builder = begun(device, "replay", {"eval": "f" * len(EVAL)}, backend="mlx").baseline([level] * 3)
    for number, effect in enumerate(effects, 1):
        status, origin = "keep" if effect < 0 else "discard", f"{of.name}/{of.experiments[number].change}"
        builder.replay(number, [level + effect] * 3, origin, status, kinds=["optimizer"])
    return analysed(builder, sd, 20)
