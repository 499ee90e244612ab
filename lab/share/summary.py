"""What a session found, in words, for people and agents who read it or build on it."""

from __future__ import annotations

import math
import re
import time
from collections import Counter

from lab.compare.analysis import kind_of
from lab.genome.kinds import KINDS
from lab.session.record import Record
from lab.session.state import Experiment

UNCONFIRMED = "none was made. The scores that a change was kept for are biased in its favour"
LISTED = 40  # changes of a kind that were not kept; the rest is counted


def summary(record: Record) -> str:
    """The summary as Markdown."""
    state, started = record.state, record.started
    decided = [e for e in state.experiments.values() if e.decided]
    tried = state.tried
    kept = [e for e in state.kept if e.number]
    near = [e for e in tried if e.near_miss and e.status == "discard"]
    replayed = [e for e in tried if e.kind == "replay"]
    listed = {e.number for group in (kept, near, replayed) for e in group}
    rest = [e for e in tried if e.number not in listed]
    counts = Counter(e.status for e in tried)
    runs = Counter(run.status for run in state.runs.values() if run.status)
    facts = {
        "device": started.device,
        "backend": started.backend,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started.time)) if started.time else "",
        "training time": f"{started.budget:g} s a run" if started.budget else "",
        "dataset": started.dataset,
        "eval tag": started.eval and f"{started.eval}: only scores with the same evaluator can be compared",
        "data tag": started.data,
        "profile": started.profile,
        "versions": ", ".join(f"{name} {version}" for name, version in started.versions.items()),
        "runs": f"{sum(runs.values())}: " + ", ".join(f"{count} {status}" for status, count in runs.items()),
        "val_bpb": ", ".join(_scores(record)),
        "changes tried": f"{len(tried)}; better: {counts['keep']}; not better: {counts['discard']}; crashed: "
        f"{counts['crash']}; could not be judged: {counts['invalid']}",
        "confirmation": state.said_of(state.confirmation) if state.confirmation else UNCONFIRMED,
    }
    for transfer in (e for e in decided if e.kind == "transfer" and e.pairs):
        facts[f"transfer {transfer.number}"] = transfer.verdict.said
    lines = [
        f"# What session {cell(started.tag)} found on {cell(started.device)}\n",
        "One file, train.py, was changed again and again; each time it was trained for a fixed time, and kept if "
        "validation bits per byte (val_bpb) fell by more than chance explains.\n",
        *(f"- {name}: {cell(text)}" for name, text in facts.items() if text),
        *(f"- note: {cell(note)}" for note in started.notes),
    ]
    for heading, group in ((KEPT, kept), (NEAR, near), (REPLAYED, replayed)):
        if group:
            lines += [f"\n## {heading}\n\n{TABLE}", *map(_row, group)]
    lines += [f"\n## {REST}"] * bool(rest)
    for kind in KINDS:
        of_kind = [e for e in rest if kind_of(e) == kind]
        of_kind.sort(key=lambda e: -math.inf if e.gain is None else e.gain, reverse=True)
        if of_kind:
            lines += [f"\n### {kind}: {len(of_kind)} of {sum(kind_of(e) == kind for e in tried)}\n"]
            lines += map(_line, of_kind[:LISTED])
        if len(of_kind) > LISTED:
            lines.append(f"- and {len(of_kind) - LISTED} more, in journal.jsonl")
    return "\n".join([*lines, "", BUILDING_ON if record.base else READING])


def _scores(record: Record) -> list[str]:
    experiments = {"baseline": record.state.experiments.get(0), "best": record.state.best}
    return [
        f"{name} {record.state.mean(e):.6f} (mean of {len(record.state.results(e.blob))})"
        for name, e in experiments.items()
        if e and record.state.results(e.blob) and (name == "baseline" or e.number)
    ]


def _change(experiment: Experiment) -> str:
    return experiment.status if experiment.gain is None else f"{-experiment.gain:+.6f}"


def _row(experiment: Experiment) -> str:
    evidence = experiment.verdict.evidence
    interval = f"{-evidence.high:+.6f} to {-evidence.low:+.6f}" if evidence and evidence.error else ""
    what, about = cell(experiment.description), ", ".join(experiment.kinds)
    return f"| {experiment.number} | {what} | {about} | {_change(experiment)} | {interval} |"


def _line(experiment: Experiment) -> str:
    what = f"- {experiment.number}: {cell(experiment.description[:300])}: {_change(experiment)}"
    failed = experiment.status in ("crash", "invalid")
    return what + f" ({cell(experiment.verdict.said[:200])})" * failed


def cell(text: str) -> str:
    """Text in Markdown as it is: no markup, no links."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", text)


KEPT = """What was kept

In order, each on top of the one before. Change of val_bpb: below 0 is better; from the runs that it was kept for, which
are biased in its favour.
"""
NEAR = """Near misses

Better, but not told from chance: worth another try where runs are less noisy, or several of them together.
"""
REPLAYED = """What others had found, tried here

On top of the baseline, beside the branch.
"""
TABLE = """| experiment | what | kind | change of val_bpb | 90 % interval |
|---|---|---|---|---|"""
REST = """What did not help, by kind of change

The best first. Change of val_bpb, mostly from one run: enough to see that it does not help much."""

READING = """## Reading it

`python -m lab import`, with the path of this folder or archive, checks it and puts it beside your own sessions; nothing
in it is executed. journal.jsonl has every event, with the diff of every change; results.tsv is a view of it with a row
for each run. What else there is: profile.json is the device's calibration, rows/ has the losses of each validation and
held-out row of runs whose weights were scored again, MANIFEST.json the sha256 of each file.
"""

BUILDING_ON = f"""{READING}
## Building on it

train.py is what the session began with. Where this is the folder session/ of a branch exp/DEVICE/TAG, the branch's own
train.py is the best that was found. In a session of your own (`python -m lab start TAG`), with the name of that branch,
or the path of this folder or archive, for SESSION:

```sh
python -m lab replay SESSION --dry-run      # what would be tried here, and what does not apply
python -m lab replay SESSION                # each kept change on your baseline: what of it helps on your device?
python -m lab replay SESSION --all          # the near misses, too
python -m lab replay SESSION --stack        # one after the other on your best, keeping what helps
python -m lab compare SESSION DEVICE/TAG    # side by side with a session of yours
```

A change is somebody else's code: read it before it is run. It runs sandboxed, as every experiment does.
"""
