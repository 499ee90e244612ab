"""Which device does what: a function of the journal and of who is there.

A repeat is a pair: the change and its parent with one seed on one device, so that what the device does to a score is in
both. The pairs are spread: a train.py that is run once more is run where it was run least. Were they all on one device,
devices that differ as much as seeds would pass for gains (benchmarks/pool.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from lab.session.state import State
from lab.verdict.plan import Job, Order, Urgency


def placed(order: Order, state: State, free: Collection[str], present: Collection[str]) -> tuple[str, Order] | None:
    """(the device that an order goes to, the order with the seed that is run there); None if it waits for a device that
    is busy, or is not wanted any more.

    Args:
        free: names of devices that could begin now. present: those, and those that are busy.
    """
    job, experiment = order.job, order.experiment
    if job is None:
        worker = state.runs[order.score or 0].worker
        return (worker, order) if worker in free else None
    if begun(job, state):
        return None
    used = Counter(run.worker for run in state.runs_of(job.blob) if run.budget == job.budget and _sound(run))
    lost = {run.worker for run in experiment.runs if run.reason and run.reason.code == "device_lost"}
    able = [worker for worker in present if worker not in lost] or list(present)  # or there is no other
    other = experiment.parent if job.blob == experiment.blob else experiment.blob
    pairs = {
        run.seed: run.worker
        for run in state.runs_of(other or "")
        if run.seed in (job.seed, *job.others) and run.budget == job.budget and _sound(run) and run.worker in able
    }
    if pairs and job.urgency is not Urgency.FIRST:
        left = [seed for seed in pairs if not begun(replace(job, seed=seed), state)]
        least = min((used[pairs[seed]] for seed in left), default=0)
        known = [seed for seed in left if used[pairs[seed]] == least and pairs[seed] in free]
        return (pairs[min(known)], replace(order, job=replace(job, seed=min(known)))) if known else None
    least = min((used[worker] for worker in able), default=0)
    if job.urgency is Urgency.FIRST and experiment.kind != "baseline":
        least = max(used.values(), default=0)  # any will do
    ranked = [worker for worker in able if worker in free and used[worker] <= least]
    ranked.sort(key=lambda worker: (worker not in pairs.values(), used[worker]))
    return (ranked[0], order) if ranked else None


def supplied(orders: list[Order], state: State, busy: Collection[str], present: Collection[str]) -> bool:
    """Whether no device would be without work: each that is free gets an order, and one more change waits."""
    free, waiting = [worker for worker in present if worker not in busy], 0
    for order in orders:
        if (found := placed(order, state, free, present)) is not None:
            free.remove(found[0])
        elif order.job and order.job.urgency is Urgency.FIRST:
            waiting += 1
    return not free and waiting > 0


def begun(job: Job, state: State) -> bool:
    """Whether the run that a job wants is under way: of two experiments both may want their parent's."""
    runs = [run for run in state.runs_of(job.blob) if (run.seed, run.budget) == (job.seed, job.budget)]
    return any(run.ended is None for run in runs)


def _sound(run) -> bool:
    return run.status in (None, "ok")
