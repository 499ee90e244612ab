"""Which device does what: a function of the journal and of who is there.

A repeat is a pair: the change and its parent with one seed on one device, so that what the device does to a score is in
both. The pairs are spread: a train.py that is run once more is run where it was run least. Were they all on one device,
devices that differ as much as seeds would pass for gains (benchmarks/pool.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from lab.session.state import State
from lab.verdict.plan import Job, Order, Urgency


def device_for(order: Order, state: State, free: Collection[str], present: Collection[str]) -> str | None:
    """The device that an order goes to; None if it waits for one that is busy, or is not wanted any more.

    Args:
        free: names of devices that could begin now, the preferred first. present: those, and those that are busy.
    """
    if order.score is not None:
        worker = state.runs[order.score].worker
        return worker if worker in free else None
    job, experiment = order.job, order.experiment
    if job is None or begun(job, state):
        return None
    other = experiment.parent if job.blob == experiment.blob else experiment.blob
    sound = [run for run in state.runs_of(job.blob) if run.status in (None, "ok")]
    used = Counter(run.worker for run in sound if run.budget == job.budget)
    lost = {run.worker for run in experiment.runs if run.reason and run.reason.code == "device_lost"}
    pair = [
        run.worker
        for run in state.runs_of(other or "")
        if (run.seed, run.budget) == (job.seed, job.budget) and run.status in (None, "ok") and run.worker in present
    ]
    alone = lost >= set(present)  # there is no other
    if job.urgency is not Urgency.FIRST and (pair := [worker for worker in pair if alone or worker not in lost]):
        return pair[0] if pair[0] in free else None
    ranked = sorted(
        (worker for worker in present if alone or worker not in lost),
        key=lambda worker: (worker not in pair, used[worker]),
    )
    if job.urgency is Urgency.FIRST and experiment.kind != "baseline":
        return next((worker for worker in ranked if worker in free), None)
    least = min((used[worker] for worker in ranked), default=0)
    return next((worker for worker in ranked if used[worker] == least and worker in free), None)


def begun(job: Job, state: State) -> bool:
    """Whether the run that a job wants is under way: of two experiments both may want their parent's."""
    runs = [run for run in state.runs_of(job.blob) if (run.seed, run.budget) == (job.seed, job.budget)]
    return any(run.ended is None for run in runs)
