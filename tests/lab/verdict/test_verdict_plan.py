"""What experiments want is a function of the journal, whoever carries it out, one at a time or many at once."""

import random
import statistics

import pytest
import sessions
from sessions import attempt, edited

from lab.cli import render
from lab.reasons import because
from lab.session.events import ExperimentDecided, ExperimentOpened, RunEnded, RunStarted, StakeReserved, Verdict
from lab.session.journal import Journal
from lab.session.state import State
from lab.verdict import executor, gate
from lab.verdict.plan import Job, Urgency, account_of, noise_of, plan, said_of_noise


@pytest.fixture
def session(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


def opened(state: State, number: int, blob: str) -> None:
    best = state.best
    state.take(ExperimentOpened(number=number, kind="change", blob=blob, parent=best.blob, onto=best.number))


def ran(state: State, number: int, experiment: int, job, bpb: float, worker: str = "", **facts) -> None:
    state.take(
        RunStarted(number=number, experiment=experiment, blob=job.blob, seed=job.seed, budget=job.budget, worker=worker)
    )
    result = {"val_bpb": bpb, "training_seconds": 300.0, "initial_weights": sessions.drawn(job.seed)}
    result |= facts
    state.take(RunEnded(run=number, status="ok", result=result))


def test_the_baseline_wants_all_its_seeds_at_once_and_those_under_way_only_once(tmp_path):
    state = sessions.make(tmp_path / "project").state
    jobs = plan(state.baseline, state).jobs
    assert [job.seed for job in jobs] == [gate.seed(i) for i in range(3)]
    state.take(RunStarted(number=1, experiment=0, blob=jobs[0].blob, seed=jobs[0].seed, budget=300.0))
    assert [job.seed for job in plan(state.baseline, state).jobs] == [gate.seed(1), gate.seed(2)]
    state.take(RunEnded(run=1, status="lost", reason=because("killed")))
    assert len(plan(state.baseline, state).jobs) == 3


@pytest.mark.parametrize("apart, seeds", [(0.01, 0), (0.0001, 3)])
def test_a_baseline_that_repeats_better_than_the_prior_says_gets_more_runs(tmp_path, apart, seeds):
    state = sessions.make(tmp_path / "project").state
    for i, job in enumerate(plan(state.baseline, state).jobs):
        ran(state, 1 + i, 0, job, 1.0 + i * apart, total_tokens_M=2800.0)
    wanted = plan(state.baseline, state)
    assert [job.seed for job in wanted.jobs] == [gate.seed(3 + i) for i in range(seeds)]
    for i, job in enumerate(wanted.jobs):
        ran(state, 4 + i, 0, job, 1.0 + i * apart, total_tokens_M=2800.0)
    assert plan(state.baseline, state).jobs == ()


def test_planning_changes_nothing(session):
    opened(session.state, 1, "ab")
    before = [event for event in session.journal.events]
    first, second = (plan(session.state.experiments[1], session.state) for _ in range(2))
    assert first == second and session.journal.events == before and not session.state.experiments[1].runs


def test_a_run_that_is_under_way_is_not_asked_for_again(session):
    state = session.state
    opened(state, 1, "ab")
    (job,) = plan(state.experiments[1], state).jobs
    assert job.urgency == Urgency.FIRST
    state.take(RunStarted(number=50, experiment=1, blob=job.blob, seed=job.seed, budget=job.budget))
    assert plan(state.experiments[1], state).jobs == () and plan(state.experiments[1], state).verdict is None


def test_many_open_tests_reserve_their_stakes_and_never_overdraw(session):
    """Forty promising changes at once: each gets less than the one before, and all of them together have enough."""
    state, rng, number = session.state, random.Random(1), 100
    for experiment in range(1, 41):
        opened(state, experiment, f"{experiment:04x}")
    for experiment in range(1, 41):
        wanted = plan(state.experiments[experiment], state)
        ran(state, number := number + 1, experiment, wanted.jobs[0], 0.99 + 1e-4 * rng.random())
    stakes = []
    for experiment in range(1, 41):
        wanted = plan(state.experiments[experiment], state)
        if wanted.verdict or wanted.score:  # overwhelming already
            continue
        assert wanted.jobs[0].urgency in (Urgency.REPEAT, Urgency.PARENT) and wanted.stake is not None
        state.take(StakeReserved(experiment=experiment, stake=wanted.stake))
        stakes.append(wanted.stake)
        assert plan(state.experiments[experiment], state).stake is None
    assert stakes and sum(stakes) < gate.ALPHA and stakes == sorted(stakes, reverse=True)
    assert account_of(state).stake > 0


def test_a_test_that_crashes_after_it_was_looked_at_has_spent_its_stake(session):
    state = session.state
    opened(state, 1, "ab")
    (job,) = plan(state.experiments[1], state).jobs
    ran(state, 100, 1, job, 0.99)
    wanted = plan(state.experiments[1], state)
    assert wanted.stake
    state.take(StakeReserved(experiment=1, stake=wanted.stake))
    while_open = account_of(state)
    state.take(ExperimentDecided(experiment=1, verdict=Verdict("crash", because("interrupted", times=3))))
    assert account_of(state) == while_open and while_open.staked >= wanted.stake > 0


def test_a_verdict_frees_what_was_reserved_as_if_it_had_been_alone(session):
    attempt(session, edited(LOSS=0.9985))
    known = session.state.last
    alone = account_of(session.state)
    assert (known.stake is not None) == (len(known.own_runs) > 1)
    assert alone == account_of(State(Journal(session.journal.path).events))


def test_the_same_jobs_whoever_carries_them_out(session, runner):
    """Replayed event by event, each state wants what the executor then did."""
    for content in (edited(LOSS=0.9), edited(LOSS=1.1), edited(LOSS=0.89), edited(FAILS="crash")):
        attempt(session, content)
    state, checked = State(), 0
    for event in Journal(session.journal.path).events:
        if isinstance(event, RunStarted):
            jobs = plan(state.experiments[event.experiment], state).jobs
            assert (event.blob, event.seed, event.budget) in [(job.blob, job.seed, job.budget) for job in jobs]
            checked += 1
        state.take(event)
    assert checked == len(session.state.runs) > 6


def test_what_disturbance_did_to_the_noise_is_told(session):
    assert "busy" not in said_of_noise(session.state)
    runs = session.state.runs_of(session.state.baseline.blob)
    for run, disturbance in zip(runs, (0.0, 0.3, 0.6), strict=True):
        run.result.update(disturbance=disturbance, val_bpb=1 + 0.1 * disturbance)
    session.state.ended += 1  # as another run would: the noise is estimated again
    assert "so a run took 30% longer (median). This explains " in said_of_noise(session.state)
    assert noise_of(session.state).explained > 0.5


def test_the_disturbance_of_runs_widens_the_error_and_repeats_tell_its_slope(session):
    state, noise = session.state, noise_of(session.state)
    assert noise.slopes[0] == 0 and noise.covariance[0][0] > 0
    opened(state, 1, "ab")
    opened(state, 2, "cd")
    score = state.mean(state.best) + 0.02
    for number, disturbance in ((1, 0.0), (2, 0.5)):
        (job,) = plan(state.experiments[number], state).jobs
        ran(state, 100 + number, number, job, score, disturbance=disturbance)
    quiet, disturbed = (plan(state.experiments[number], state).verdict.evidence for number in (1, 2))
    assert quiet.error == pytest.approx(noise.sd * (4 / 3) ** 0.5)
    assert disturbed.error > quiet.error and disturbed.corrected == 0
    for i in range(1, 8):  # further runs of the baseline's file, slower by up to a half
        job = Job(state.baseline.blob, gate.seed(9 + i), 300.0, Urgency.FURTHER)
        ran(state, 200 + i, 1, job, state.results(job.blob)[gate.seed(0)] + 0.1 * i / 14, disturbance=i / 14)
    assert noise_of(state).slopes[0] == pytest.approx(0.1, rel=0.1)
    opened(state, 3, "ef")
    (job,) = plan(state.experiments[3], state).jobs
    ran(state, 300, 3, job, score + 0.5, disturbance=0.5)
    corrected = plan(state.experiments[3], state).verdict.evidence.corrected
    mean = statistics.fmean(run.disturbance for run in state.believed(state.baseline.blob).values())
    assert corrected == pytest.approx(noise_of(state).slopes[0] * (mean - 0.5))


def test_what_devices_differ_by_is_no_noise_and_no_gain(tmp_path):
    """Of two devices one adds 0.02; a change that is worth nothing is run on the better one, its parent mostly on the
    other."""
    state, rng = sessions.make(tmp_path / "project").state, random.Random(1)
    for i in range(16):
        worker = "fast" if i % 4 == 0 else "slow"
        job = Job(state.baseline.blob, gate.seed(i), 300.0, Urgency.FIRST)
        score = 1.0 + 0.02 * (worker == "slow") + rng.gauss(0, 0.004)
        ran(state, 1 + i, 0, job, score, worker, total_tokens_M=280.0)
    state.take(ExperimentDecided(experiment=0, verdict=Verdict("keep", because("baseline"), 1.0)))
    noise = noise_of(state)
    assert noise.devices == ("fast", "slow") and 0.003 < noise.sd < 0.006
    assert noise.slopes[2] - noise.slopes[1] == pytest.approx(0.02, abs=0.005)
    assert f"{noise.sd:.6f} between seeds on one device (" in said_of_noise(state) and noise.explained < 0.05
    opened(state, 1, "ab")
    (job,) = plan(state.experiments[1], state).jobs
    ran(state, 100, 1, job, 1.0, "fast")
    verdict = plan(state.experiments[1], state).verdict
    assert verdict.status == "discard" and verdict.evidence.corrected == pytest.approx(0.015, abs=0.004)
    assert abs(verdict.evidence.gain) < 0.006 and verdict.mean == 1.0


def test_the_run_that_made_a_change_look_promising_is_no_repeat(session):
    state = session.state
    opened(state, 1, "ab")
    for i, score in enumerate((0.5, 0.99, 0.98)):
        ran(state, 100 + i, 1, Job("ab", gate.seed(i), 300.0, Urgency.REPEAT), score)
    repeats = state.repeats(300.0)
    assert [run.bpb for run in repeats["ab"].values()] == [0.99, 0.98]
    assert len(repeats[state.baseline.blob]) == 3


def test_a_scale_runs_the_baseline_for_other_times_and_changes_no_score_and_no_noise(session, runner):
    state, baseline = session.state, session.state.baseline
    before, known = noise_of(state), state.results(baseline.blob)
    with session.lock:
        session.open_experiment(
            kind="scale", blob=baseline.blob, parent=baseline.blob, onto=0, pairs=2, commit=baseline.commit
        )
    executor.supervise(session)
    scale = state.last
    assert [run.budget for run in scale.runs] == [75.0, 150.0, 600.0] * 2
    assert len({run.seed for run in scale.runs} | known.keys()) == 2 + len(known)
    assert scale.status == "keep" and "after 75 s" in scale.verdict.said and scale.runs[0].scored is None
    assert noise_of(state) == before and state.results(baseline.blob) == known and state.best is baseline
    assert "does not get better with time" in render.status(session)
    assert "MEASURED" in render.block(session, scale)
