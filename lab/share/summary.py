"""What a session found, in words: for whoever wants to build on it, an agent or a person. Made of the export alone."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter

from lab.genome import kinds
from lab.share.bundle import Bundle
from lab.session.state import CONFIRM, REPLAY

LISTED = 40  # changes of a kind that were not kept; the rest is counted


def summary(bundle: Bundle) -> str:
    """As Markdown. `bundle.changes` have to be known."""
    session, changes = bundle.session, bundle.changes
    tried = [one for one in changes if one["kind"] not in ("baseline", CONFIRM)]
    kept = [one for one in tried if one["number"] in {kept.number for kept in bundle.kept}]
    near = [one for one in tried if one["near_miss"] and one["status"] == "discard"]
    counts = Counter(one["status"] for one in tried)
    lines = [
        f"# What session {cell(session['tag'])} found on {cell(session['device'])}",
        "",
        f"One file, train.py, was changed again and again; each time it was trained{_budget(session)} on "
        f"{cell(session['device'])} ({cell(session['backend'])}), dataset {cell(session['dataset'])}, and kept if "
        "validation bits per byte (val_bpb) fell by more than chance explains. Scores compare only where the "
        f"eval tag is {cell(session['eval'])}, too.",
        "",
        f"- changes tried: {len(tried)}; better: {counts['keep']}; not better: {counts['discard']}; crashed: "
        f"{counts['crash']}; could not be judged: {counts['invalid']}",
        *_scores(bundle, kept),
        "- confirmation: "
        + next(
            (cell(one["reason"]) for one in reversed(changes) if one["kind"] == CONFIRM),
            "none was made; what was kept for its scores is flattered by them",
        ),
    ]
    if kept:
        lines += [
            "",
            "## What was kept",
            "",
            "In order, each on top of the one before: patches/ has them. Change of "
            "val_bpb: below 0 is better; from the runs that it was kept for, which flatter it.",
            "",
            *_table(kept),
        ]
    if near:
        lines += [
            "",
            "## Near misses",
            "",
            "Better, but not told from chance: worth another try where runs are less "
            "noisy, or several of them together.",
            "",
            *_table(near),
        ]
    if replayed := [one for one in tried if one["kind"] == REPLAY]:
        lines += [
            "",
            "## What others had found, tried here",
            "",
            "On top of the baseline, beside the branch.",
            "",
            *_table(replayed),
        ]
    rest = [one for one in tried if not any(one in group for group in (kept, near, replayed))]
    if rest:
        lines += [
            "",
            "## What did not help, by kind of change",
            "",
            "The best first. Change of val_bpb, mostly from one run: enough to see that it does not help much.",
        ]
    for kind in kinds.KINDS:
        its = [one for one in rest if (one["kinds"] or ["other"])[0] == kind]
        its.sort(key=lambda one: -math.inf if one["gain"] is None else one["gain"], reverse=True)
        if its:
            of = sum((one["kinds"] or ["other"])[0] == kind for one in tried)
            lines += ["", f"### {kind}: {len(its)} of {of}", "", *map(_line, its[:LISTED])]
            if len(its) > LISTED:
                lines.append(f"- and {len(its) - LISTED} more, in changes.json")
    return "\n".join([*lines, "", _building_on(session)])


def _budget(session: dict) -> str:
    return f" for {session['budget']:g} s" if session.get("budget") else ""


def _scores(bundle: Bundle, kept: list[dict]) -> list[str]:
    scores = {}
    for row in bundle.rows:
        if comparable(row, bundle.session.get("budget")):
            scores.setdefault(row["commit"], []).append(row["val_bpb"])
    told = []
    for name, change in (("baseline", bundle.changes[0]), ("best", kept[-1] if kept else None)):
        if change and (of := scores.get(change["commit"])):
            told.append(f"{name} {math.fsum(of) / len(of):.6f} (mean of {len(of)})")
    return [f"- val_bpb: {', '.join(told)}"] if told else []


def _table(changes: list[dict]) -> list[str]:
    return [
        "| experiment | what | kind | change of val_bpb | 90 % interval |",
        "|---|---|---|---|---|",
        *(
            f"| {one['number']} | {cell(one['description'])} | {', '.join(one['kinds'])} | {_effect(one)} | "
            f"{_interval(one)} |"
            for one in changes
        ),
    ]


def _effect(change: dict) -> str:
    return change["status"] if change["gain"] is None else f"{-change['gain']:+.6f}"


def _interval(change: dict) -> str:
    return "" if change["gain"] is None else f"{-change['high']:+.6f} to {-change['low']:+.6f}"


def _line(change: dict) -> str:
    what = f"- {change['number']}: {cell(change['description'][:300])}: {_effect(change)}"
    return what + f" ({cell(change['reason'][:200])})" * (change["status"] in ("crash", "invalid"))


def _building_on(session: dict) -> str:
    branch = f"exp/{session['device']}/{session['tag']}"
    return f"""## Building on it

train.py beside this is what the session began with; patches/ leads from there to its best. Where this is the folder
session/ of a branch {branch}, the branch's own train.py is that best. In a session of your own (`python -m lab start
TAG`), with the name of that branch, or the path of this folder or archive, for SESSION:

```sh
python -m lab replay SESSION --dry-run      # what would be tried here, and what does not apply
python -m lab replay SESSION                # each kept change on your baseline: what of it helps on your device?
python -m lab replay SESSION --all          # the near misses, too
python -m lab replay SESSION --stack        # one after the other on your best, keeping what helps
python -m lab compare SESSION DEVICE/TAG    # side by side with a session of yours
```

A patch is somebody else's code: read it before it is run. It runs sandboxed, as every experiment does.
"""


# --- README.md ---


def readme(bundle: Bundle, patches: list[str]) -> str:
    """A session for people, as Markdown."""
    session, rows = bundle.session, bundle.rows
    compared = [row for row in rows if comparable(row, session.get("budget"))]
    runs: dict[str, list[float]] = {}
    for row in compared:
        runs.setdefault(row["commit"], []).append(row["val_bpb"])
    scores = [statistics.fmean(of) for of in runs.values()]
    statuses = ", ".join(f"{count} {cell(status)}" for status, count in Counter(row["status"] for row in rows).items())
    facts = [
        ("device", session["device"]),
        ("backend", session["backend"]),
        ("begun", session["made"]),
        ("training time", f"{session['budget']:g} s a run" if session.get("budget") else ""),
        ("dataset", session["dataset"]),
        ("eval tag, data tag", f"{session['eval']} {session['data']}".strip()),
        ("profile", session["profile"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items())),
        ("runs", f"{len(rows)}: {statuses}"),
        ("val_bpb of what was kept, means", f"first {scores[0]:.6f}, lowest {min(scores):.6f}" if scores else ""),
    ]
    lines = [
        f"# Session {bundle.session['tag']} on {bundle.session['device']}",
        "",
        "Experiments on train.py with a fixed training time. val_bpb: validation bits per byte, lower is better.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {cell(text)} |" for name, text in facts if text]
    if bundle.kept:
        lines += [
            "",
            "## Kept changes, each on top of the one before",
            "",
            "| | experiment | commit | val_bpb | what | patch |",
            "|---|---|---|---|---|---|",
        ]
    for place, (kept, patch) in enumerate(zip(bundle.kept, patches), 1):
        score = f"{statistics.fmean(runs[kept.commit]):.6f}" if kept.commit in runs else ""
        cells = place, kept.number, kept.commit, score, kept.description
        lines.append("".join(f"| {cell(one)} " for one in cells) + f"| {patch} |")
    return "\n".join([*lines, "", READING])


def comparable(row: dict, budget: float | None) -> bool:
    """Whether a run's score is one that its session kept changes by: of this budget, and no confirmation or replay."""
    trial = re.match(r"trial of (\S+) s; ", row["reason"])
    own_budget = trial is None or budget is None or trial[1] == f"{budget:g}"
    beside = re.match(r"(trial of \S+ s; )?(confirmation [0-9]|replayed on the baseline: )", row["reason"])
    return row["val_bpb"] is not None and row["status"] == "keep" and own_budget and not beside


READING = """## Reading it

`python -m lab import`, with the path of this folder or archive, checks it and puts it beside your own sessions; nothing
in it is executed. results.tsv is the ledger, a row for each run; train.py is what the session began with; changes.json
has every change that was tried, with its verdict; rows/ has the losses of each validation and held-out row for runs
whose weights were scored again; profile.json is the device's calibration; MANIFEST.json has the sha256 of each file.
`python -m lab replay` tries the kept changes on another machine.
"""


def cell(text: str) -> str:
    """Text in a table of Markdown, as it is: no markup, no links."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", text)
