"""An experiment from train.py to verdict, branch and ledger, with a runner that only computes a score."""

from types import SimpleNamespace

import disturbance
import msgspec
import pytest
import sessions
import storage
from sessions import TRAIN, attempt, edited, git

from lab.cli import render
from lab.errors import LabError
from lab.genome.syntax import TRAIN as FILE
from lab.reasons import because
from lab.run.outcome import Outcome
from lab.session.session import Session
from lab.verdict import executor, gate, opening
from lab.verdict.plan import MOST_LOST, TRIES, account_of, noise_of, orders


@pytest.fixture
def session(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    executor.supervise(session)
    return session


def status_of(session):
    return git(session.repository.path, "status", "--porcelain")


def train_of(session):
    return git(session.repository.path, "show", f"{session.branch}:{FILE}").encode() + b"\n"


def test_the_baseline_is_run_with_several_seeds_scored_again_and_recorded(session, runner):
    assert [seed for _, seed, _ in runner.runs] == [gate.seed(i) for i in range(3)]
    assert len(runner.scored) == 1
    rows = sessions.rows_of(session.ledger)
    assert [row["status"] for row in rows] == ["keep"] * 3
    assert {row["device"] for row in rows} == {"fake-1gb"} and {row["eval"] for row in rows} == {"e" * 12}
    assert session.state.open == [] and session.state.best is session.state.baseline


def test_the_timeout_is_measured(tmp_path, runner):
    session = sessions.make(tmp_path / "project")

    def timeout(budget):
        return executor.request(
            session, SimpleNamespace(number=1, experiment=0, seed=1, budget=budget, blob="")
        ).timeout

    assert timeout(300) > 1000  # nothing is known yet
    executor.supervise(session)
    most = disturbance.MOST
    assert session.state.overhead() == 20 and 20 < timeout(300) - most * 300 < 200
    assert timeout(1200) == pytest.approx(timeout(300) + most * 900)


def test_a_harness_that_fails_again_and_again_ends_the_experiment(session, monkeypatch):
    def broken(request):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(executor.runner, "run", broken)
    (session.repository.path / FILE).write_bytes(edited(LOSS=0.9))
    with opening.exclusive(session):
        opening.open_change(session, "m")
    for _ in range(TRIES - 1):
        with pytest.raises(OSError, match="output error"):
            executor.supervise(session)
    executor.supervise(session)
    assert session.state.last.status == "invalid" and {run.status for run in session.state.last.runs} == {"lost"}


def test_a_clear_gain_is_kept(session):
    found = attempt(session, edited(LOSS=0.9))
    assert found.status == "keep"
    assert train_of(session) == edited(LOSS=0.9) and status_of(session) == ""
    assert session.state.best is found
    row = next(row for row in sessions.rows_of(session.ledger) if row["description"] == "why")
    assert row["commit"] == git(session.repository.path, "rev-parse", session.branch)[:7]
    assert row["parent"] == session.started.commit[:7] and row["change"] == found.change
    assert (session.folder / "best.safetensors").exists()


def test_a_kept_change_was_scored_again(session, runner):
    before = len(runner.scored)
    attempt(session, edited(LOSS=0.9))
    assert len(runner.scored) == before + 1


def test_a_loss_is_decided_by_one_run_and_restored(session, runner):
    before = len(runner.runs)
    found = attempt(session, edited(LOSS=1.1))
    assert found.status == "discard" and len(runner.runs) == before + 1
    assert train_of(session) == TRAIN and status_of(session) == ""
    assert (session.repository.path / FILE).read_bytes() == TRAIN


def test_what_was_discarded_stays_reachable(session):
    found = attempt(session, edited(LOSS=1.1))
    assert git(
        session.repository.path, "show", f"refs/autoresearch/{session.name}/{found.number}:{FILE}"
    ).encode() + b"\n" == edited(LOSS=1.1)


@pytest.mark.parametrize("fails", ["crash", "invalid"])
def test_a_failed_run_is_recorded_and_restored(session, fails):
    found = attempt(session, edited(FAILS=fails))
    assert found.status == fails
    row = sessions.rows_of(session.ledger)[-1]
    assert (row["status"], row["val_bpb"]) == (fails, None)
    assert train_of(session) == TRAIN and status_of(session) == ""


def test_a_change_whose_weights_another_nights_worker_has_is_run_once_more(session, runner):
    """The night had several devices, and the one that continues it has only the session's own."""
    (session.repository.path / FILE).write_bytes(edited(LOSS=0.9))
    with opening.exclusive(session):
        opening.open_change(session, "m")
    while order := next((each for each in orders(session.state) if each.job), None):
        run = executor.begin(session, order, worker="cpu:1")
        made = runner.run(executor.request(session, run))
        (session.run_folder(run.number) / "result.safetensors").unlink()
        executor.ended(session, run, made)
    runs = len(session.state.runs)
    executor.supervise(session)
    assert session.state.last.status == "keep" and len(session.state.runs) == runs + 1


def test_a_score_that_the_weights_do_not_have_is_invalid(session):
    found = attempt(session, edited(LIES=0.2))
    assert found.status == "invalid" and "scored again" in str(found.verdict.reason)
    assert train_of(session) == TRAIN and session.state.best.number == 0


def test_a_gain_on_validation_rows_alone_is_invalid(session):
    found = attempt(session, edited(LOSS=0.9, LEAK=0.1))
    assert found.status == "invalid" and "held-out" in str(found.verdict.reason)


def test_an_invalid_keep_earns_nothing(session):
    attempt(session, edited(LIES=0.2))
    assert account_of(session.state).keeps == 0 and account_of(session.state).staked > 0


def test_within_the_noise_nothing_is_kept(session):
    kept = sum(attempt(session, edited(LOSS=1.0, EXTRA=i)).status == "keep" for i in range(12))
    assert kept == 0


def test_a_disturbed_run_is_judged_like_any_other(session, runner):
    before = len(runner.runs)
    assert attempt(session, edited(LOSS=1.2, DISTURBED=0.9)).status == "discard" and len(runner.runs) == before + 1
    assert sessions.rows_of(session.ledger)[-1]["disturbed"] == 0.9


def test_a_run_is_timed_by_those_of_its_train_before(session, runner):
    blob = session.state.baseline.blob
    told = executor.reference(session, blob)
    assert told == {"probe": 1e-4, "steps": {"1.1x2048+1.step": 0.1}}
    assert executor.reference(session, "0" * 40) == {"probe": 1e-4}
    for run, (step, probe) in zip(session.state.runs_of(blob), ((3.0, 1.0), (2.0, 5.0), (4.0, 2.0)), strict=True):
        run.result.update(probe_seconds=probe, step_seconds={"step": step}, num_steps=None)
    assert executor.reference(session, blob) == {"probe": 2.0, "steps": {"step": 3.0}}


def test_an_equal_train_is_answered_from_the_ledger(session, runner):
    first = attempt(session, edited(LOSS=1.1))
    before = len(runner.runs)
    assert attempt(session, edited(LOSS=1.1) + b"# with a remark\n") is first
    assert len(runner.runs) == before and status_of(session) == ""
    assert attempt(session, edited(LOSS=1.1), again=True) is not first


def test_the_best_itself_is_not_run(session):
    with pytest.raises(LabError, match="has no edit"):
        attempt(session, TRAIN + b"# only a remark\n")


def test_without_a_message_nothing_runs(session, runner):
    before = len(runner.runs)
    with pytest.raises(LabError, match="say what was changed"):
        attempt(session, edited(LOSS=0.9), message=" ")
    assert len(runner.runs) == before


def test_other_files_are_left_alone(session):
    (session.repository.path / "prepare.py").write_text("BUDGET = 9999\n")
    (session.repository.path / "new.txt").write_text("mine")
    found = attempt(session, edited(LOSS=0.9))
    assert found.status == "keep"
    assert (session.repository.path / "prepare.py").read_text() == "BUDGET = 9999\n"
    assert git(session.repository.path, "show", f"{session.branch}:prepare.py") == "BUDGET = 300"


def test_a_run_that_changes_the_judge_is_invalid_and_the_judge_mended(session):
    found = attempt(session, edited(LOSS=0.9, DAMAGES=True))
    assert found.status == "invalid" and "prepare.py" in str(found.verdict.reason)
    assert (session.judge / "prepare.py").read_text() == "BUDGET = 300\n"


def test_a_judge_changed_between_runs_is_mended_first(session):
    (session.judge / "prepare.py").write_text("BUDGET = 9\n")
    (session.judge / "torch.py").write_text("shadow = True\n")
    assert attempt(session, edited(LOSS=0.9)).status == "keep"
    assert (session.judge / "prepare.py").read_text() == "BUDGET = 300\n" and not (session.judge / "torch.py").exists()


def test_the_human_may_commit_to_the_branch_meanwhile(session, runner, monkeypatch):
    run = runner.run

    def and_commit(request, **more):
        path = session.repository.path
        if (path / "program.md").read_text() == "be good\n":
            (path / "program.md").write_text("be better\n")
            git(path, "commit", "-qm", "program", "--", "program.md")
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", and_commit)
    assert attempt(session, edited(LOSS=0.9)).status == "keep"
    assert train_of(session) == edited(LOSS=0.9) and status_of(session) == ""
    assert git(session.repository.path, "show", f"{session.branch}:program.md") == "be better"


def test_an_edit_made_while_it_ran_is_left_alone(session, runner, monkeypatch):
    run = runner.run

    def and_edit(request, **more):
        (session.repository.path / FILE).write_bytes(edited(LOSS=0.8))
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", and_edit)
    found = attempt(session, edited(LOSS=1.1))
    assert found.status == "discard" and found.applied.left_alone
    assert (session.repository.path / FILE).read_bytes() == edited(LOSS=0.8)


def test_a_train_on_the_branch_that_nobody_judged_is_refused(session):
    (session.repository.path / FILE).write_bytes(edited(LOSS=0.5))
    git(session.repository.path, "commit", "-qam", "sneaked in")
    with pytest.raises(LabError, match="git reset --soft HEAD"):
        attempt(session, edited(LOSS=0.4))
    (session.repository.path / FILE).write_bytes(edited(LOSS=0.6))
    git(session.repository.path, "commit", "-qam", "and again")
    with pytest.raises(LabError, match="not the best that this session kept"):
        attempt(session, edited(LOSS=0.4))


def test_a_session_opened_again_knows_everything(session):
    attempt(session, edited(LOSS=0.9))
    attempt(session, edited(LOSS=1.1))
    again = Session(session.folder)
    assert again.state.best.number == session.state.best.number == 1
    assert noise_of(again.state) == noise_of(session.state) and account_of(again.state) == account_of(session.state)
    assert [e.status for e in again.state.experiments.values()] == ["keep", "keep", "discard"]


def test_applying_twice_changes_nothing(session):
    found = attempt(session, edited(LOSS=0.9))
    ledger_before, head = session.ledger.read_bytes(), session.repository.commit_of(session.branch)
    executor.apply(session, found)
    assert session.ledger.read_bytes() == ledger_before and session.repository.commit_of(session.branch) == head


def test_a_failed_baseline_ends_the_session(tmp_path, runner):
    session = sessions.make(tmp_path / "other", edited(FAILS="crash"))
    executor.supervise(session)
    with pytest.raises(LabError, match="baseline failed"):
        attempt(session, edited(LOSS=0.9))


def test_a_parent_that_no_longer_runs_judges_nobody(session, monkeypatch, runner):
    attempt(session, edited(LOSS=0.9))  # kept after fewer seeds than a doubtful child needs
    best = session.state.best
    run = runner.run

    def failing(request, **more):
        if (request.folder / FILE).read_bytes() == session.repository.content(best.blob):
            return SimpleNamespace(
                status="crash", reason=because("exit_status", status=1), result=None, seconds=1.0, traceback=""
            )
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", failing)
    monkeypatch.setattr(gate, "next_step", lambda *_, **__: gate_step("run parent"))
    found = attempt(session, edited(LOSS=0.899))
    assert found.status == "invalid" and "parent" in str(found.verdict.reason)


def gate_step(action):
    return gate.Step(action, because("worth_another_run"), seed=77)


def confirm(session, pairs):
    """The best against the baseline, at four times the budget."""
    state = session.state
    with session.lock:
        session.open_experiment(
            kind="confirm",
            blob=state.best.blob,
            parent=state.baseline.blob,
            onto=0,
            pairs=pairs,
            commit=state.best.here,
            budget=1200.0,
            description="why",
        )
    executor.supervise(session)


def test_confirm_runs_best_and_baseline_in_turn_on_new_seeds(session, runner):
    attempt(session, edited(LOSS=0.9))
    before, seeds = len(runner.runs), {seed for _, seed, _ in runner.runs}
    state = session.state
    confirm(session, pairs=3)
    runs = runner.runs[before:]
    assert len(runs) == 6 and not seeds & {seed for _, seed, _ in runs} and {budget for *_, budget in runs} == {1200.0}
    assert [content == TRAIN for content, *_ in runs] == [False, True, True, False, False, True]
    verdict = list(state.experiments.values())[-1].verdict
    assert verdict.confirmed
    assert verdict.gains["held_out_bpb"][0] == pytest.approx(0.1, abs=0.01)
    assert session.state.best.number == 1 and status_of(session) == ""
    assert (
        sum(row["kind"] in ("confirm", "parent") and row["budget"] == 1200 for row in sessions.rows_of(session.ledger))
        == 6
    )


def test_confirmations_at_another_budget_are_no_results(session):
    attempt(session, edited(LOSS=0.9))
    state = session.state
    before = noise_of(session.state), state.results(state.best.blob)
    confirm(session, pairs=2)
    assert (noise_of(session.state), state.results(state.best.blob)) == before
    assert f"\nconfirmation: in runs of {session.state.last.budget:g} s, " in render.status(session)
    assert ": 1 experiment, 1 kept, 0 discarded" in render.status(session)  # a confirmation tries nothing new


def test_a_seed_of_its_own_is_no_way_to_be_kept(session):
    found = attempt(session, edited(LOSS=0.99, FIXED=7))
    assert found.status == "invalid" and "AUTORESEARCH_SEED" in str(found.verdict.reason)


def test_a_run_under_other_conditions_stops_the_session_and_judges_nothing(session):
    with pytest.raises(LabError, match="eval ffff instead of eeee"):
        attempt(session, edited(LOSS=0.9, EVAL="ffff"))
    for _ in range(TRIES - 1):
        try:
            executor.supervise(session)
        except LabError:
            pass
    executor.supervise(session)
    found = session.state.last
    assert found.status == "invalid" and not found.verdict.judged and status_of(session) == ""
    assert {row["eval"] for row in sessions.rows_of(session.ledger) if row["description"] == "why"} == {"ffff"}


def test_a_run_with_attention_from_elsewhere_is_marked_and_not_judged(session, runner):
    before = len(runner.runs)
    found = attempt(session, edited(LOSS=0.9, ATTENTION="library sha256:0123456789ab"))
    assert found.status == "invalid" and not found.verdict.judged and len(runner.runs) == before + 1
    assert found.verdict.said.startswith(
        "not judged: its attention came from library sha256:0123456789ab, and that of its parent from the framework"
    )
    assert sessions.rows_of(session.ledger)[-1]["status"] == "invalid"
    assert account_of(session.state).staked == 0 and attempt(session, edited(LOSS=0.9)).status == "keep"


def test_what_was_not_judged_is_run_when_asked_again(session, runner):
    elsewhere = edited(LOSS=0.9, ATTENTION="library sha256:0123456789ab")
    first = attempt(session, elsewhere)
    before = len(runner.runs)
    assert attempt(session, elsewhere) is not first and len(runner.runs) > before


def test_what_kills_the_harness_again_and_again_loses_one_experiment(session, runner, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lab.run.runner.run", killed)
        with pytest.raises(Killed):
            attempt(session, edited(LOSS=0.9))
        for _ in range(MOST_LOST - 1):
            with pytest.raises(Killed):
                executor.supervise(session)
        executor.supervise(session)
    assert session.state.last.status == "crash" and "interrupted" in str(session.state.last.verdict.reason)
    assert status_of(session) == "" and attempt(session, edited(LOSS=0.8)).status == "keep"


def test_a_mistake_of_the_labs_own_loses_one_experiment(session, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gate, "next_step", lambda *_, **__: 1 / 0)
        for _ in range(TRIES - 1):
            with pytest.raises(ZeroDivisionError):
                executor.supervise(session) if session.state.oldest_open else attempt(session, edited(LOSS=0.9))
        executor.supervise(session)
    assert session.state.last.status == "invalid" and "supervisor.log" in str(session.state.last.verdict.reason)
    assert status_of(session) == ""


@pytest.mark.parametrize("seen_by", ["the run", "the harness", "a writer of the harness's"])
def test_a_full_disk_is_nobodys_fault(session, monkeypatch, runner, seen_by):
    """The run is made again once there is space, however often it was not."""

    def full(request):
        if seen_by == "the run":
            (request.folder / "cache").mkdir()
            return Outcome("lost", because("disk_full"))
        if seen_by == "the harness":
            raise OSError(28, "No space left on device")
        raise storage.DataError("could not write told.npz ([Errno 28] No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr("lab.run.runner.run", full)
        for _ in range(MOST_LOST + 1):
            with pytest.raises(storage.Stop, match="[Nn]o space|free some space on it, then: python -m lab wait"):
                executor.supervise(session) if session.state.oldest_open else attempt(session, edited(LOSS=0.9))
    last = session.state.last
    assert {(run.status, run.reason.code) for run in last.runs} == {("lost", "disk_full")} and last.failures == 0
    assert not [*session.folder.glob("runs/*/cache")]
    executor.supervise(session)
    assert session.state.last.status == "keep" and status_of(session) == ""


def test_a_verdict_that_can_not_be_carried_out_is_tried_again_later(session, monkeypatch):
    """The supervisor ends each time, and does not go round and round."""

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "apply", broken)
        for _ in range(TRIES + 2):
            with pytest.raises(OSError, match="output error"):
                executor.supervise(session) if session.state.oldest_open else attempt(session, edited(LOSS=0.9))
    assert session.state.last.failures == TRIES + 2 and session.state.last.decided
    executor.supervise(session)
    assert status_of(session) == "" and session.state.last.status == "keep"


def test_one_long_pause_makes_no_longer_timeouts(session):
    before = session.state.overhead()
    run = session.state.runs[1]
    told = run.ended.result | {"paused_seconds": 1000.0}
    run.ended = msgspec.structs.replace(run.ended, seconds=run.ended.seconds + 1000, result=told)
    assert session.state.overhead() == before


def test_a_tag_with_the_branchs_name_is_no_branch(session):
    git(session.repository.path, "tag", session.branch, session.state.baseline.commit)
    assert attempt(session, edited(LOSS=0.9)).status == "keep"
    assert attempt(session, edited(LOSS=0.8)).status == "keep"


def test_a_deleted_branch_says_how_to_get_it_back(session):
    branch, commit = session.branch, session.repository.commit_of(session.branch)
    (session.repository.path / FILE).write_bytes(edited(LOSS=1.1))
    with opening.exclusive(session):
        opening.open_change(session, "why")
    git(session.repository.path, "checkout", "-q", "--detach")
    git(session.repository.path, "branch", "-D", branch)
    with pytest.raises(LabError, match=f"git branch {branch} {commit}"):
        executor.supervise(session)
    git(session.repository.path, "branch", branch, commit)
    executor.supervise(session)
    git(session.repository.path, "switch", "-q", branch)
    assert session.state.last.status == "discard" and status_of(session) == ""


@pytest.mark.parametrize("sandbox", [None, "bwrap"])
def test_a_ledger_that_was_changed_is_put_back(session, runner, monkeypatch, sandbox):
    """A run can have done that only without a sandbox; else somebody has it open."""
    run, before = runner.run, session.ledger.read_bytes()
    session.started.sandbox = sandbox

    def and_damage(request, **more):
        session.ledger.write_bytes(before.replace(b"keep", b"none"))
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", and_damage)
    found = attempt(session, edited(LOSS=0.9))
    assert found.status == ("keep" if sandbox else "invalid")
    assert sandbox or "ledger" in str(found.verdict.reason)
    assert session.ledger.read_bytes().startswith(before)
    assert (session.folder / "results.edited.tsv").read_bytes() == before.replace(b"keep", b"none")


def test_repeats_count_each_seed_once_and_nothing_invalid(session):
    before = noise_of(session.state)
    for _ in range(4):
        attempt(session, edited(LOSS=1.1), again=True)
    assert noise_of(session.state) == before
    attempt(session, edited(LOSS=0.9, LEAK=0.1))
    assert noise_of(session.state) == before


def test_a_branch_that_lost_its_last_move_gets_it_back(session):
    before = session.repository.commit_of(session.branch)
    found = attempt(session, edited(LOSS=0.9))
    session.repository.move(f"refs/heads/{session.branch}", before)
    with opening.exclusive(Session(session.folder)):
        pass
    assert session.repository.commit_of(session.branch) == found.here
