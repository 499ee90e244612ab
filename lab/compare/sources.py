"""Reads a session as a Record, wherever it is kept: a folder, an archive, a branch, or nothing but its ledger.

Everything is only read, also while a night is at work on it. What comes from elsewhere is checked as for an import
(bundle.py), and nothing of it is executed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import prepare
from lab import untrusted
from lab.genome import kinds
from lab.session import ledger
from lab.share import exchange, publish
from lab.verdict import gate
from lab.share.bundle import Bundle
from lab.compare.record import Change, Record, Trial
from lab.errors import LabError
from lab.session.session import Session
from lab.session.state import CONFIRM, REPEAT, REPLAY, Run, State

BESIDE = re.compile(r"the parent again, beside experiment ([0-9]{1,9})")
FURTHER = re.compile(r"as experiment [0-9]{1,9}, of which these are further runs")
CONFIRMS = re.compile(r"confirmation ([0-9]{1,9})(?:, held out ([0-9]{1,3}\.[0-9]+))?")
SHORTENED = re.compile(r"trial of ([0-9]{1,9}(?:\.[0-9]{1,9})?(?:e[+-][0-9]{1,3})?) s; ")  # as {:g} writes it
FEWEST, MOST = 1e-9, 1e15  # of anything that a run is measured by
WORDS = 4000  # characters of a text in a ledger


def read(source: str | Path, device: str | None = None) -> Record:
    """A session.

    Args:
        source: a session's folder; an export, as a folder or an archive; a ledger; DEVICE/TAG of a session on this
            machine, its own or imported; a branch, autoresearch/DEVICE/TAG or exp/DEVICE/TAG.
        device: of the rows of a ledger that don't say it: its tag, such as nvidia-h100-80gb.

    Raises:
        LabError: there is no such session, or it was refused; the reason says why.
    """
    name = str(source)
    session = publish.own(name)
    return of_session(session) if session else of_bundle(publish.find(name, device))


def read_all(names: list[str], devices: list[str]) -> list[Record]:
    """As `read`, of several; `devices` are of the ledgers that don't say theirs, in order."""
    left = list(devices)
    records = [read(name, left.pop(0) if left and _is_untagged(name) else None) for name in names]
    if left:
        raise LabError(
            f"--device {left[0]} is of none of these sessions: it takes one for each ledger that does not "
            "say its device, in order"
        )
    return records


def _is_untagged(name: str) -> bool:
    path = Path(os.path.expanduser(name))
    return path.is_file() and exchange.is_ledger(path) and any(not row["device"] for row in ledger.read(path).rows)


# --- Of a session on this machine ---


def of_session(session: Session) -> Record:
    """A session of this machine's own, from its journal."""
    state, budget = session.state, session.budget
    texts = _texts(session)
    trials: dict[int, list[Trial]] = {}
    for run in state.runs.values():
        of = _owner(state, run)
        if run.status == "ok" and of is not None:
            trials.setdefault(of, []).append(_trial(run, state.experiments[run.experiment].kind == CONFIRM))
    changes = {}
    for e in state.decided:
        if e.kind in (CONFIRM, REPEAT):
            continue
        before, after = texts.get(e.parent), texts.get(e.blob)
        changes[e.number] = Change(
            number=e.number,
            parent=e.onto,
            status=e.status,
            kind=e.kind,
            description=e.description,
            patch=e.patch,
            origin=e.origin,
            kinds=_kinds(before, after, e.description) if e.parent else (),
            text=_diff(before, after),
            trials=tuple(trials.get(e.number, ())),
            commit=(e.applied or {}).get("commit", e.commit)[:7],
            reason=e.verdict.get("reason", ""),
            near_miss=bool(e.verdict.get("gate", {}).get("near_miss")),
            started=_time(e.begun),
        )
    ended = [run for run in state.runs.values() if run.status]
    confirmed = [e for e in state.decided if e.kind == CONFIRM]
    facts = {name: session.facts.get(name, "") for name in ("dataset", "eval", "data", "profile", "made", "python")}
    repeated = state.best is not None and bool(state.repeats(budget))
    return Record(
        session.facts["device"],
        session.facts["tag"],
        dict(sorted(changes.items())),
        session.facts["backend"],
        session.noise if repeated else None,
        budget,
        (max(r.begun + r.seconds for r in ended) - min(r.begun for r in ended)) / 3600 if ended else None,
        sum(run.status not in (None, "lost") for run in state.runs.values()),
        confirmation=confirmed[-1].verdict["reason"] if confirmed else "",
        facts=facts,
        profile=session.profile,
        notes=_of_other_budgets(changes, budget),
    )


def _texts(session: Session) -> dict[str, bytes]:
    """train.py by blob, of all experiments; what git does not have any more is left out."""
    blobs = {blob for e in session.state.experiments.values() for blob in (e.blob, e.parent) if blob}
    try:
        return session.tree.contents(sorted(blobs))
    except LabError:  # the repository is elsewhere now
        return {}


def _owner(state: State, run: Run) -> int | None:
    """The number of the experiment whose train.py a run is of."""
    experiment = state.experiments[run.experiment]
    if experiment.onto is not None and run.blob == state.experiments[experiment.onto].blob:
        return experiment.onto
    if experiment.kind not in (CONFIRM, REPEAT):
        return experiment.number
    before = state.kept if experiment.kind == CONFIRM else [e for e in state.decided if e.kind not in (CONFIRM, REPEAT)]
    return next((e.number for e in reversed(before) if e.blob == run.blob and e.number < experiment.number), None)


def _trial(run: Run, confirms: bool) -> Trial:
    result = run.result
    tokens = result["total_tokens_M"] * 1e6 if result.get("total_tokens_M") else None
    per_token, memory = result.get("flops_per_token"), result.get("peak_vram_mb")
    return Trial(
        run=run.number,
        seed=run.seed,
        bpb=run.bpb,
        eval=result.get("eval", ""),
        budget=run.budget,
        tokens=tokens,
        flops=tokens * per_token if tokens and per_token else None,
        mfu=result.get("mfu_percent"),
        memory=memory / 1024 if memory else None,
        seconds=run.seconds,
        confirms=confirms,
        beside=run.experiment,
    )


def _kinds(before: bytes | None, after: bytes | None, words: str) -> tuple[str, ...]:
    """By the syntax trees where both are known, else by the description."""
    found = kinds.of_change(before, after) if before is not None and after is not None else ()
    return found or kinds.of_words(words)


def _diff(before: bytes | None, after: bytes | None) -> str | None:
    if before is None or after is None:
        return None
    lines = [text.decode(errors="replace").splitlines(keepends=True) for text in (before, after)]
    return "".join(
        line if line.endswith("\n") else line + "\n"
        for line in difflib.unified_diff(*lines, "a/train.py", "b/train.py")
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _of_other_budgets(changes: dict[int, Change], budget: float | None) -> list[str]:
    other = Counter(t.budget for c in changes.values() for t in c.trials if t.budget and budget and t.budget != budget)
    return [f"{n} runs of {seconds:g} s instead of {budget:g} s are left out" for seconds, n in sorted(other.items())]


# --- Of an export, or a ledger alone ---


def of_bundle(bundle: Bundle) -> Record:
    """A session from elsewhere, from its ledger and the changes that came with it."""
    session, rows = _cleaned(bundle.session), [_believed(row) for row in bundle.rows]
    tagged = any(row["run"] is not None for row in rows)
    owners = _owners(bundle, rows)
    budget = session.get("budget") or (Counter(map(_budget, rows)).most_common(1)[0][0] if tagged and rows else None)
    own: dict[int, list[dict]] = {}
    trials: dict[int, list[Trial]] = {}
    numbers = {commit: number for number, commit in _commits(owners, rows).items()}
    told = {facts["number"]: facts for facts in bundle.changes if facts["kind"] not in (CONFIRM, REPEAT)}
    for row, (of, beside) in zip(rows, owners):
        if of == beside:
            own.setdefault(of, []).append(row)
        if row["val_bpb"] is not None and row["status"] in ("keep", "discard"):
            trials.setdefault(of, []).append(_trial_of(row, beside))
    texts = {kept.number: kept.patch_text for kept in bundle.kept}
    changes, best = {}, None
    for number, its in own.items():
        first, facts = its[0], told.get(number, {})
        status = facts.get("status") or next(
            (one for one in ("keep", "discard", "crash") if any(row["status"] == one for row in its)), "invalid"
        )
        parent = facts["parent"] if facts else numbers.get(first["parent"]) if tagged else best
        if number == 0:
            parent = None
        changes[number] = Change(
            number=number,
            parent=parent,
            status=status,
            kind=facts.get("kind") or ("baseline" if number == 0 else REPLAY if first["origin"] else "change"),
            description=first["description"],
            patch=facts.get("patch", first["patch"]),
            origin=facts.get("origin", first["origin"]),
            kinds=tuple(facts.get("kinds") or (kinds.of_words(first["description"]) if number else ())),
            text=facts.get("patch_text") or texts.get(number),
            trials=tuple(trials.get(number, ())),
            commit=first["commit"],
            reason=facts.get("reason", SHORTENED.sub("", its[-1]["reason"])),
            near_miss=bool(facts.get("near_miss")),
            started=first["started"],
        )
        if status == "keep":
            best = number
    for number, facts in told.items():
        if number not in changes:  # it has no row: nothing of it was run
            names = "parent", "status", "kind", "description", "patch", "origin", "reason", "near_miss", "commit"
            changes[number] = Change(
                number, **{name: facts[name] for name in names}, kinds=tuple(facts["kinds"]), text=facts["patch_text"]
            )
    record = Record(
        session["device"],
        session["tag"],
        dict(sorted(changes.items())),
        session["backend"],
        None,
        budget,
        _hours(rows),
        len(rows),
        tagged,
        _confirmation(rows),
        [*session.get("notes", []), *_of_other_budgets(changes, budget)],
        {name: text for name, text in session.items() if isinstance(text, str)},
        bundle.profile,
    )
    record.noise = noise_of(record)
    if not tagged:
        record.notes.append(
            "a ledger of five columns: each change was run once, and nothing says how far chance moves "
            "scores; its effects are unconfirmed"
        )
    if bundle.set_aside:
        record.notes.append(f"{len(bundle.set_aside.splitlines())} lines of its ledger could not be read")
    return record


def _cleaned(texts: dict) -> dict:
    """With no text in it that a terminal would obey."""
    return {
        name: text if not isinstance(text, str) or text.isprintable() else untrusted.one_line(text, WORDS)
        for name, text in texts.items()
    }


def _believed(row: dict) -> dict:
    """A row of somebody's ledger; a figure that nothing can have measured, and that would break sums, is unknown."""
    return {
        name: None
        if isinstance(value, (int, float)) and name not in ("run", "seed") and not FEWEST < value < MOST
        else value
        for name, value in _cleaned(row).items()
    }


def _owners(bundle: Bundle, rows: list[dict]) -> list[tuple[int, int]]:
    """(the experiment whose train.py it is of, the experiment that it was run for) of each row."""
    kept = {one.commit: one.number for one in bundle.kept}
    if not any(row["run"] is not None for row in rows):  # the original's: a row is an experiment
        return [(i, i) for i in range(len(rows))]
    of_commit = kept | {
        facts["commit"]: facts["number"] for facts in bundle.changes if facts["kind"] not in (CONFIRM, REPEAT)
    }
    found, last = [], -1
    for i, row in enumerate(rows):
        reason = SHORTENED.sub("", row["reason"])
        if beside := BESIDE.fullmatch(reason) or CONFIRMS.fullmatch(reason):
            last = int(beside[1])
            found.append((of_commit.get(row["commit"], 0), last))
            continue
        if FURTHER.search(reason) and row["commit"] in of_commit:
            found.append((of_commit[row["commit"]], max(last, of_commit[row["commit"]] + 1)))
            continue
        if row["commit"] not in of_commit:
            # Its number is said by the parent's runs beside it, if there are any; else it is the next one.
            told = next(
                (
                    BESIDE.fullmatch(SHORTENED.sub("", after["reason"]))
                    for after in rows[i + 1 :]
                    if after["commit"] != row["commit"]
                ),
                None,
            )
            of_commit[row["commit"]] = max(last + 1, int(told[1])) if told else last + 1
        last = max(last, of_commit[row["commit"]])
        found.append((of_commit[row["commit"]],) * 2)
    return found


def _commits(owners: list[tuple[int, int]], rows: list[dict]) -> dict[int, str]:
    return {of: row["commit"] for row, (of, beside) in zip(rows, owners) if of == beside}


def _budget(row: dict) -> float:
    shortened = SHORTENED.match(row["reason"])
    seconds = float(shortened[1]) if shortened else 0.0
    return seconds if FEWEST < seconds < MOST else float(prepare.TIME_BUDGET)


def _trial_of(row: dict, beside: int) -> Trial:
    tokens = row["tokens_M"] * 1e6 if row["tokens_M"] else None
    flops = row["tflops"] * 1e12 / row["tok_per_s"] * tokens if tokens and row["tflops"] and row["tok_per_s"] else None
    return Trial(
        run=row["run"],
        seed=row["seed"],
        bpb=row["val_bpb"],
        eval=row["eval"],
        budget=None if row["run"] is None else _budget(row),
        tokens=tokens,
        flops=flops,
        mfu=row["mfu"],
        memory=row["memory_gb"],
        seconds=row["total_seconds"],
        confirms=bool(CONFIRMS.fullmatch(SHORTENED.sub("", row["reason"]))),
        beside=beside,
    )


def _hours(rows: list[dict]) -> float | None:
    """From the first run to the end of the last."""
    times = []
    for row in rows:
        try:
            begun = datetime.strptime(row["started"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
        except ValueError:
            continue
        times += [begun, begun + (row["total_seconds"] or 0)]
    return (max(times) - min(times)) / 3600 if times else None


def _confirmation(rows: list[dict]) -> str:
    """What the last confirmation came to on held-out rows, recomputed from its runs."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for row in rows:
        if (said := CONFIRMS.fullmatch(SHORTENED.sub("", row["reason"]))) and said[2]:
            found.setdefault(int(said[1]), {}).setdefault(row["commit"], {})[row["seed"]] = float(said[2])
    if not found:
        return ""
    scores = found[max(found)]
    base = rows[0]["commit"]
    best = next((commit for commit in scores if commit != base), None)
    pairs = sorted(scores.get(base, {}).keys() & scores.get(best, {}).keys())
    if len(pairs) < 2:
        return ""
    gain, low, high = gate.interval([scores[base][seed] - scores[best][seed] for seed in pairs])
    return (
        f"on held-out rows and {len(pairs)} new seeds the best is {gain:+.6f} bits per byte better than the "
        f"baseline (90 % interval {low:+.6f} to {high:+.6f})"
    )


def noise_of(record: Record) -> gate.Noise | None:
    """As a session estimates it: pooled over all that was repeated, with the prior of calibration/noise.py."""
    from calibration.noise import expected

    groups = [
        [t.bpb for t in change.trials if t.budget == record.budget]
        for change in record.changes.values()
        if change.status != "invalid"
    ]
    first = next(iter(record.changes[0].trials), None) if 0 in record.changes else None
    if first is None or not first.tokens or not any(len(group) > 1 for group in groups):
        return None
    return gate.pooled(groups, first.bpb * expected(first.tokens))
