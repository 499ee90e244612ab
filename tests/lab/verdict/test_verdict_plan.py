"""What experiments want is a function of the journal, whoever carries it out, one at a time or many at once."""

import itertools
import math
import random
import statistics

import pytest
import sessions
from msgspec.structs import replace
from sessions import attempt, edited

from lab.cli import render
from lab.reasons import because
from lab.session.events import (
    Evidence,
    ExperimentDecided,
    ExperimentOpened,
    Patch,
    RunEnded,
    RunScored,
    RunStarted,
    StakeReserved,
    Verdict,
)
from lab.session.journal import Journal
from lab.session.state import Experiment, Run, State, conditions
from lab.verdict import executor, gate, near_misses
from lab.verdict.plan import Job, Urgency, account_of, noise_of, plan, said_of_noise

PATCH = Patch(origin="published/x/0123456789abcdef", description="x: y", edit="A: 1 -> 2")


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


def lost(state: State, experiment: Experiment, runs: int, time: float, reason: str = "device_lost") -> None:
    """Loses runs on as many devices, all under way at once."""
    first = state.next_run()
    for number in range(first, first + runs):
        state.take(
            RunStarted(
                number=number,
                experiment=experiment.number,
                blob=experiment.blob,
                seed=number,
                budget=300.0,
                worker=f"cuda:{number - first}",
                time=time,
            )
        )
    for number in range(first, first + runs):
        state.take(RunEnded(run=number, status="lost", reason=because(reason), time=time + 100))


def test_a_power_failure_is_no_fault_of_what_several_devices_were_running(tmp_path):
    state = sessions.make(tmp_path / "project").state
    for number, reason in enumerate(("device_lost", "killed", "killed")):
        lost(state, state.baseline, 6, 1000.0 * number, reason)
        assert len(plan(state.baseline, state).jobs) == 3
    lost(state, state.baseline, 2, 9000.0)
    assert plan(state.baseline, state).verdict.reason.code == "suspect"


def test_the_test_of_a_block_that_was_never_looked_at_costs_nothing(session):
    state = session.state
    before = account_of(state)
    best = state.best
    state.take(
        ExperimentOpened(number=1, kind="joint", blob="b" * 40, parent=best.blob, onto=0, pairs=6, patches=[PATCH])
    )
    stake = plan(state.experiments[1], state).stake
    state.take(StakeReserved(experiment=1, stake=stake))
    assert account_of(state).left == pytest.approx(before.left - stake)
    opened(state, 2, "c" * 40)
    state.take(ExperimentDecided(experiment=2, verdict=Verdict("keep", because("baseline"))))
    verdict = plan(state.experiments[1], state).verdict
    assert verdict.status == "superseded"
    state.take(ExperimentDecided(experiment=1, verdict=verdict))
    assert account_of(state).left == before.left


def test_near_misses_whose_test_was_not_judged_twice_are_not_tried_a_third_time(session):
    state = session.state
    evidence = Evidence(gain=0.001, error=0.0008, near_miss=True)
    for number in range(1, 6):
        opened(state, number, f"{number:040x}")
        verdict = Verdict("discard", because("baseline"), 0.999, 1.0, evidence)
        state.take(ExperimentDecided(experiment=number, verdict=verdict))
    members = near_misses.remembered(state)
    for number in (6, 7):
        assert near_misses.remembered(state) == members != []
        state.take(
            ExperimentOpened(
                number=number,
                kind="near misses",
                blob="e" * 40,
                parent=state.best.blob,
                onto=0,
                members=members,
                change="f" * 16,
            )
        )
        assert not near_misses.remembered(state)
        unjudged = Verdict("crash", because("suspect", workers="a, b"), judged=False)
        state.take(ExperimentDecided(experiment=number, verdict=unjudged))
    assert not near_misses.remembered(state)


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


def test_a_run_that_got_less_than_its_train_py_usually_gets_is_no_noise(tmp_path):
    """Of eight runs of the baseline one lost a third of its training to something that its clock did not see."""

    def with_tokens(folder, odd: float) -> State:
        state, rng = sessions.make(folder).state, random.Random(3)
        for i in range(8):
            lost = 0.1 * (i == 3)
            job = Job(state.baseline.blob, gate.seed(i), 300.0, Urgency.FIRST)
            tokens = odd if i == 3 else rng.uniform(275.0, 285.0)
            ran(state, 1 + i, 0, job, 1.0 + lost + rng.gauss(0, 0.004), total_tokens_M=tokens)
        state.take(ExperimentDecided(experiment=0, verdict=Verdict("keep", because("baseline"), 1.0)))
        opened(state, 1, "ab")
        (job,) = plan(state.experiments[1], state).jobs
        ran(state, 9, 1, job, 1.0, total_tokens_M=140.0)  # a change's own speed is its own
        return state

    seen, unseen = with_tokens(tmp_path / "a", 190.0), with_tokens(tmp_path / "b", 280.0)
    assert noise_of(unseen).sd > 0.02 and unseen.repeats(300.0) and "tokens than others" not in said_of_noise(unseen)
    noise = noise_of(seen)
    assert noise.sd < 0.008 and noise.explained > 0.9
    assert noise.slopes[1] * math.log(280 / 190) == pytest.approx(0.1, abs=0.02)
    assert "; one run got over 10% fewer or more tokens than others of the same train.py. This" in said_of_noise(seen)
    evidence = plan(seen.experiments[1], seen).verdict.evidence
    assert abs(evidence.gain) < 0.004 and evidence.corrected == pytest.approx(0.1 / 8, abs=0.003)


def test_what_a_train_py_usually_gets_is_told_by_three_runs_on_one_device(session):
    def made(*runs) -> list[Run]:
        ended = RunEnded(run=0, status="ok")
        return [
            Run(number=i, experiment=0, blob="a", seed=i, budget=budget, worker=worker,
                ended=replace(ended, result={"total_tokens_M": tokens}))
            for i, (tokens, worker, budget) in enumerate(runs)
        ]  # fmt: skip

    def shorts(*runs) -> list[float]:
        return [one.short for one in conditions(made(*runs))]

    half = math.log(2)
    assert shorts((100.0, "", 8.0), (50.0, "", 8.0)) == [0, 0]  # which of them is usual is not known
    assert shorts((100.0, "", 8.0), (50.0, "", 8.0), (99.0, "", 8.0)) == [0, pytest.approx(half, abs=0.02), 0]
    assert shorts((100.0, "", 8.0), (93.0, "", 8.0), (108.0, "", 8.0)) == [0, 0, 0]  # by chance
    assert shorts((100.0, "", 8.0), (200.0, "", 8.0), (100.0, "", 8.0)) == [0, -half, 0]
    fast = [(100.0, "fast", 8.0)] * 3
    assert shorts(*fast, (50.0, "slow", 8.0)) == [0] * 4 == shorts(*fast, (50.0, "fast", 2.0))
    assert shorts(*fast, (50.0, "fast", 8.0)) == [0, 0, 0, half]
    assert [one.device for one in conditions(made(*fast))] == ["fast"] * 3
    assert [one.short for one in conditions([*made(*fast), *made((0.0, "fast", 8.0))])] == [0] * 4  # not measured


@pytest.mark.parametrize("tokens, kept_after", [(100.0, 1), (109.0, 1), (120.0, 3)])
def test_a_change_that_got_more_tokens_than_its_parent_is_kept_after_three_runs(session, tokens, kept_after):
    """It may be faster, or its first run was a lucky one."""
    state = session.state
    for run in state.runs_of(state.baseline.blob):
        run.result["total_tokens_M"] = 100.0
    opened(state, 1, "ab")
    for number in itertools.count(100):
        made = plan(state.experiments[1], state)
        if not made.jobs:
            break
        (job,) = made.jobs
        ran(
            state,
            number,
            1,
            job,
            0.9 if job.blob == "ab" else 1.0,
            total_tokens_M=tokens if job.blob == "ab" else 100.0,
        )
    assert made.score and len(state.experiments[1].own_runs) == kept_after


@pytest.mark.parametrize("record", [-0.1, 1e-320, 0, None, "many", math.nan, math.inf])
def test_tokens_that_can_not_have_been_measured_tell_nothing(record):
    ended = RunEnded(run=0, status="ok", result={"total_tokens_M": 1.0})
    runs = [Run(number=i, experiment=0, blob="a", seed=i, ended=ended) for i in range(3)]
    odd = Run(number=3, experiment=0, blob="a", seed=3, ended=replace(ended, result={"total_tokens_M": record}))
    assert [one.short for one in conditions([*runs, odd])] == [0] * 4


@pytest.mark.parametrize("odd, runs", [({0}, 8), ({0, 2}, 10), ({0, 1, 2, 3}, 12)], ids=["one", "two", "too many"])
def test_a_confirmation_makes_another_pair_in_place_of_one_with_an_unusual_run(session, odd, runs):
    state, number = session.state, 100
    for i in range(6):  # what is usual
        ran(
            state,
            50 + i,
            0,
            Job(state.baseline.blob, gate.seed(9 + i), 300.0, Urgency.FURTHER),
            1.0,
            total_tokens_M=100.0,
        )
    state.take(ExperimentOpened(number=1, kind="confirm", blob="b", parent=state.baseline.blob, onto=0, pairs=3))
    confirmation = state.experiments[1]
    while (made := plan(confirmation, state)).verdict is None:
        assert made.jobs or made.score
        for job in made.jobs:
            number, lacks = number + 1, job.blob == state.baseline.blob and job.seed % 100 in odd
            tokens = {"total_tokens_M": 60.0 if lacks else 100.0}
            ran(state, number, 1, job, (0.9 if job.blob == "b" else 1.0) + 0.2 * lacks, **tokens)
        for run in made.score:
            bpb = state.runs[run].bpb
            state.take(RunScored(run=run, val_bpb=bpb, held_out_bpb=bpb, rows=""))
    assert len(confirmation.runs) == runs
    replaced = runs // 2 - 3
    assert made.verdict.said.endswith(f"far more or less training than others: {replaced}")
    assert len(odd) == 4 or made.verdict.mean == pytest.approx(0.9)
    assert (made.verdict.gains["held_out_bpb"][0] == pytest.approx(0.1)) == (len(odd) < 4)


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
    assert noise.slopes[3] - noise.slopes[2] == pytest.approx(0.02, abs=0.005)
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
