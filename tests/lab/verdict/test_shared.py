"""Shared runs: what each holds, what they say of each patch, and the test at the end, in a session without training."""

import numpy as np
import pytest
import sessions
from exports import begun
from test_loop import Seen, options
from test_rebase import Many

from lab.compare import comparison, published
from lab.compare.analysis import Analysis
from lab.errors import LabError
from lab.genome import edits
from lab.night import findings, loop
from lab.reasons import because
from lab.session.events import HarnessFailed, Patch, RunEnded, RunStarted
from lab.session.session import Session
from lab.share import export, sources
from lab.verdict import blocks, gate, opening, shared
from lab.verdict.executor import supervise
from lab.verdict.plan import TRIES, account_of, noise_of, plan

NAMES = [f"V{i}" for i in range(12)]
GAINS = {"V0": 0.03, "V1": 0.02, "V2": 0.02}  # what the patch of each variable gains; the others lose a little
TRAIN = "".join(f"{name} = 1.0\n" for name in NAMES) + (
    "NOISE, FAILS, LEAK = 0.01, None, 0.0\n"
    f"LOSS = 1.0 - sum({{**dict.fromkeys({NAMES}, -0.002), **{GAINS}}}[n] * (globals()[n] != 1.0) for n in {NAMES})\n"
)


def patches(names=NAMES, **more):
    lines = {name: f"{name}: 1.0 -> 0.5" for name in names} | more
    return [
        Patch(f"published/{name.lower()}/{number:016x}", f"{name.lower()}: why", line)
        for number, (name, line) in enumerate(lines.items())
    ]


@pytest.fixture
def noisy(tmp_path, runner):
    return begun(tmp_path / "project", TRAIN.encode())


def block(session, *args, runs=70, **more):
    with opening.exclusive(session):
        return blocks.open_block(session, patches(*args, **more), runs)


# --- What a run holds ---


def runs_of(effects, count, noise, screening, seed=0):
    """So many runs as the screening asks for them."""
    rng, runs = np.random.default_rng(seed), []
    for number in range(count):
        members = shared.Screening(**screening | {"runs": runs}).next(number)
        runs.append((members, 1 + sum(effects[i] for i in members) + noise * rng.standard_normal()))
    return runs


def screened(effects, count=80, noise=0.005, **more):
    facts = {"count": len(effects), "sd": noise, "parent": 1.0, **more}
    return shared.Screening(runs=runs_of(effects, count, noise, facts), **facts)


def test_a_run_holds_a_few_patches_that_go_together():
    found = screened([-0.003, 0.001] * 15, clash=lambda one, other: one // 2 == other // 2)
    held = [members for members, _ in found.runs]
    assert all(held[i] == () for i in range(0, len(held), shared.BARE))
    assert max(map(len, held)) <= shared.AT_ONCE and any(len(members) > 2 for members in held)
    assert all(len({one // 2 for one in members}) == len(members) for members in held)
    assert len({one // 2 for one in found.chosen(found.estimates())}) == len(found.chosen(found.estimates()))


def test_gains_are_found_and_their_intervals_hold_them():
    effects = [-0.012, -0.008, 0.0, 0.004] + [0.001] * 16
    found = screened(effects, 100)
    estimates = found.estimates()
    assert {0, 1} <= set(found.chosen(estimates)) and 3 not in found.chosen(estimates)
    assert all(low < value < high for value, low, high in estimates)
    assert sum(low <= effect <= high for effect, (_, low, high) in zip(effects, estimates)) >= 16
    assert found.plainly_good() == []


def test_noise_that_is_larger_than_was_known_widens_the_intervals():
    """As other programs came and went: then what does nothing is not taken for a gain."""
    rng, runs = np.random.default_rng(1), []
    facts = {"count": 20, "sd": 0.005, "parent": 1.0}
    for number in range(100):
        members = shared.Screening(**facts, runs=runs).next(number)
        runs.append((members, 1 + 0.02 * rng.standard_normal()))
    estimates = shared.Screening(**facts, runs=runs).estimates()
    assert sum(not low < 0 < high for _, low, high in estimates) <= 2


def test_the_same_runs_give_the_same_estimates():
    assert screened([-0.01, 0.01]).estimates() == screened([-0.01, 0.01]).estimates()


@pytest.mark.parametrize("crash", [False, True])
def test_what_makes_runs_far_worse_is_found_by_halves_and_dropped(crash):
    facts = {"count": 12, "sd": 0.005, "parent": 1.0}
    runs = []
    for number in range(40):
        members = shared.Screening(runs=runs, **facts).next(number)
        bad = 7 in members
        runs.append((members, None if bad and crash else 1.0 + 0.3 * bad))
    failed = [members for members, score in runs if score is None or score > 1.1]
    assert 1 < len(failed) <= 5 and 7 not in {i for members, _ in runs[30:] for i in members}
    last = shared.Screening(runs=runs, **facts)
    assert 7 not in last.chosen(last.estimates()) and not last.searching


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("together", [{3, 7}, {3, 4}, {0, 11}])
def test_two_that_make_runs_far_worse_only_together_are_held_apart(together, crash):
    """Each gains, and so does what is beside them: nothing is dropped."""
    facts, runs = {"count": 12, "sd": 0.005, "parent": 1.0}, []
    for number in range(80):
        members = shared.Screening(runs=runs, **facts).next(number)
        bad = together <= {*members}
        runs.append((members, None if bad and crash else 1.0 - 0.01 * len(members) + 0.3 * bad))
    found = shared.Screening(runs=runs, **facts)
    assert 1 < sum(together <= {*members} for members, _ in runs) <= 8 and not found.searching
    assert not any(together <= {*members} for members, _ in runs[40:])
    assert found.dropped == set() and all(any(one in members for members, _ in runs[40:]) for one in together)
    chosen = found.chosen(found.estimates())
    assert len(chosen) == 11 and len(together & {*chosen}) == 1


def test_a_run_that_crashed_by_chance_drops_nothing():
    facts, runs = {"count": 12, "sd": 0.005, "parent": 1.0}, [((1, 2, 3, 4, 5, 6, 7, 8), None)]
    while shared.Screening(runs=runs, **facts).searching:
        runs.append((shared.Screening(runs=runs, **facts).next(len(runs)), 1.0))
    found = shared.Screening(runs=runs, **facts)
    assert len(runs) < 12 and found.dropped == set()
    assert all(len(found.next(number)) > 1 for number in (20, 21))


def test_what_a_known_culprit_explains_is_not_searched():
    """Another device had begun a run with it."""
    facts = {"count": 12, "sd": 0.005, "parent": 1.0}
    runs = [((7,), None), ((1, 2, 7), None)]
    found = shared.Screening(runs=runs, **facts)
    assert found.dropped == {7} and not found.searching


def test_a_list_that_is_mostly_far_worse_is_given_up(tmp_path, runner):
    assert not screened([-0.01, 0.001, 0.002] * 6).hopeless
    assert screened([0.3, 0.3, -0.01] * 6, count=30).hopeless
    train = TRAIN.replace("-0.002", "-0.3")
    session = begun(tmp_path / "project", train.encode())
    first = block(session)
    supervise(session)
    assert first.verdict.reason.code == "mostly_bad" and len(first.runs) < 30
    assert blocks.given_up(session.state) and blocks.screened(session.state) == set()


def test_a_shared_run_on_another_device_is_screened_without_what_the_device_adds(tmp_path, runner, monkeypatch):
    """A device adds 0.02, and the parent was mostly run on the session's own. A device that the parent was never run on
    says less, so the noise of the block is larger; so does a disturbed run where the slope is not known."""
    session = begun(tmp_path / "project", TRAIN.encode())
    state, seen = session.state, []
    score = state.mean(state.baseline)

    def ran(experiment, seed, bpb, worker, disturbance=0.0, **facts):
        number, facts = state.next_run(), {"blob": state.baseline.blob, "budget": 300.0} | facts
        state.take(RunStarted(number=number, experiment=experiment, seed=seed, worker=worker, **facts))
        state.take(RunEnded(run=number, status="ok", result={"val_bpb": bpb, "disturbance": disturbance}))

    for i in range(8):
        ran(0, 900 + i, score + (0.02 + 0.001 * i if i < 4 else 0.001 * (i - 4)), "slow" if i < 4 else "")
    first = block(session)

    make = shared.Screening
    monkeypatch.setattr(shared, "Screening", lambda *args, **facts: seen.append(make(*args, **facts)) or seen[-1])
    noise = noise_of(state)
    plan(first, state)
    ran(first.number, 1, score + 0.02, "slow", blob="a1", patches=[0])
    plan(first, state)
    ran(first.number, 1, score, "new", blob="a2", patches=[1])
    plan(first, state)
    (_, slow), _ = seen[2].runs
    offset = noise.slopes[2 + noise.devices.index("slow")] - noise.slopes[2 + noise.devices.index("")]
    share = sum(run.worker == "slow" for run in state.believed(state.baseline.blob).values()) / 11
    assert offset == pytest.approx(0.02, abs=0.008)
    assert slow == pytest.approx(score + 0.02 - offset * (1 - share), abs=1e-6)
    assert seen[0].sd == noise.sd < seen[1].sd < seen[2].sd
    ran(first.number, 2, score, "", disturbance=1.0, blob="a3", patches=[2])
    plan(first, state)
    unsure = [(one.sd / noise.sd) ** 2 - 1 for one in seen[2:]]  # means over two and three runs
    assert 3 * unsure[1] - 2 * unsure[0] > 0.9 * noise.covariance[0][0] > 0
    ran(first.number, 50_001, score + 1.0, "", patches=[])
    plan(first, state)
    assert seen[-1].runs[-1] == ((), pytest.approx(score + 1.0, abs=0.05))
    assert seen[-1].parent == seen[0].parent, "a run of the parent in the block counts as one of its runs alone"


def test_what_is_plainly_good_needs_no_company():
    assert screened([-0.2, 0.0, 0.001], noise=0.003).plainly_good() == [0]


def test_the_test_has_more_runs_where_noise_is_larger():
    assert [shared.tested(noise) for noise in (0.001, *shared.NOISES, 0.1)] == [6, 6, 8, 14, 22, 22]


def test_one_look_at_the_end():
    account, noise = gate.Account(), gate.Noise(0.01, 20)
    own, others = dict.fromkeys(range(8), 0.95), dict.fromkeys(range(8), 1.0)
    step = gate.joint_step(own, others, noise, account)
    assert step.action == "keep" and step.evidence.better and step.evidence.stake == account.joint_stake
    assert account.after(step.evidence).joint_stake > 0
    lost = gate.joint_step(others, own, noise, account)
    assert lost.action == "discard" and account.after(lost.evidence).joint_stake == pytest.approx(
        account.joint_stake * (1 - gate.JOINT)
    )


# --- In a session ---


def test_a_block_and_its_test(noisy, tmp_path):
    first = block(noisy)
    supervise(noisy)
    assert first.status == "discard" and first.verdict.reason.code == "screened"
    assert set(first.verdict.effects) == {patch.origin for patch in first.patches}
    value, low, high = first.verdict.effects[first.patches[0].origin]
    assert low < value < high and value == pytest.approx(-0.03, abs=0.01)
    held = [run for run in first.runs if run.patches]
    assert 40 <= len(first.runs) <= 46 and {run.seed for run in first.runs} == {50_001}
    assert len(held) > 30 and noisy.state.best.number == 0
    assert not [*noisy.folder.glob("runs/*/result.safetensors")]  # of the block, nobody needs the weights
    assert blocks.untested(noisy.state) is first
    with opening.exclusive(noisy):
        joint = blocks.open_joint(noisy, first)
    supervise(noisy)
    assert joint.status == "keep" and noisy.state.best is joint and joint.description.startswith("these ")
    assert {"published/v0", "published/v1"} <= {patch.origin.rpartition("/")[0] for patch in joint.patches}
    assert b"V0 = 0.5" in noisy.repository.train() and blocks.untested(noisy.state) is None
    seeds = [run.seed for run in joint.own_runs]
    assert len(seeds) == joint.pairs == len(set(seeds)) and min(seeds) >= 50_000
    assert account_of(noisy.state).staked == pytest.approx(joint.stake) == gate.Account().joint_stake
    sessions.check(noisy)
    assert any("shared run: v" in row["description"] for row in sessions.rows_of(noisy.ledger))
    record = sources.read(export.export_session(noisy, tmp_path / "sent"))  # it is checked there
    assert record.state.experiments[1].verdict.effects == first.verdict.effects
    assert record.train(joint.number) == noisy.repository.content(joint.blob)


def test_what_a_block_chose_is_tested_on_what_is_the_best_by_then(noisy):
    """Before its test another change is kept, and during the test, on many devices, one more."""
    first = block(noisy)
    supervise(noisy)
    sessions.attempt(noisy, noisy.repository.train() + b"LOSS = LOSS - 0.2\n")
    assert noisy.state.last.status == "keep" and blocks.untested(noisy.state) is first
    with opening.exclusive(noisy):
        opening.open_change(noisy, "better", content=noisy.repository.train() + b"LOSS = LOSS - 0.3\n")
        joint = blocks.open_joint(noisy, first)
    supervise(noisy, Many(noisy, [f"device {n}" for n in range(60)]))
    best = noisy.state.best
    assert best.description == "better" and joint.status == "superseded" and not joint.verdict.judged
    night = loop.Night(noisy, options(), Seen())
    assert night._rebase() and not night._rebase()
    supervise(noisy)
    again = noisy.state.last
    assert (again.kind, again.rebased, again.pairs) == ("joint", joint.number, joint.pairs)
    assert again.patches == joint.patches and again.onto == best.number and again.status == "keep"
    assert b"V0 = 0.5" in noisy.repository.train() and b"- 0.3" in noisy.repository.train()
    assert blocks.untested(noisy.state) is None
    sessions.check(noisy)


def test_nothing_is_kept_where_nothing_helps(tmp_path, runner):
    session = sessions.make(tmp_path / "project", TRAIN.replace("0.03", "-0.002").replace("0.02", "-0.002").encode())
    supervise(session)
    first = block(session)
    supervise(session)
    if first.verdict.reason.code == "screened":
        with opening.exclusive(session):
            blocks.open_joint(session, first)
        supervise(session)
    assert session.state.best.number == 0


def test_a_parent_that_crashes_once_ends_no_test_of_a_block(noisy, runner, monkeypatch):
    first = block(noisy)
    supervise(noisy)
    with opening.exclusive(noisy):
        joint = blocks.open_joint(noisy, first)
    parent, run, crashed = noisy.repository.content(noisy.state.baseline.blob), runner.run, []

    def once(request, **more):
        if (request.folder / "train.py").read_bytes() == parent and not crashed:
            crashed.append(1)
            reason = because("killed_for_memory", signal="SIGKILL")
            return sessions.SimpleNamespace(status="crash", reason=reason, result=None, seconds=1.0, traceback="")
        return run(request, **more)

    monkeypatch.setattr("lab.run.runner.run", once)
    supervise(noisy)
    assert crashed and joint.status == "keep" and noisy.state.best is joint


def test_a_test_that_was_not_judged_is_made_once_more(noisy):
    first = block(noisy)
    supervise(noisy)
    for left in (first, None):
        with opening.exclusive(noisy):
            joint = blocks.open_joint(noisy, first)
        assert blocks.untested(noisy.state) is None  # while it runs
        for _ in range(TRIES):
            noisy.log(HarnessFailed(experiment=joint.number))
        supervise(noisy)
        assert not joint.verdict.judged and blocks.untested(noisy.state) is left


def test_a_run_that_was_lost_is_made_again(noisy):
    first = block(noisy)
    wanted = plan(first, noisy.state).jobs
    noisy.start_run(first, noisy.state.baseline.blob, wanted[0].seed, 300.0)  # and then everything was killed
    supervise(Session(noisy.folder))
    again = Session(noisy.folder).state.experiments[first.number]
    assert [run.status for run in again.runs].count("lost") == 1
    assert 41 <= len(again.runs) <= 47


def test_two_patches_in_conflict_are_in_no_run_together(noisy):
    both = block(noisy, ["V0", "V1"], Other="V0: 1.0 -> 0.25", Gone="NEVER: 1.0 -> 2.0")
    supervise(noisy)
    assert any(run.patches for run in both.runs)
    assert not any({0, 2} <= set(run.patches) for run in both.runs)
    assert not any(3 in run.patches for run in both.runs)  # it does not apply, and no run holds it
    content, held = blocks.made(noisy.repository.train(), both.patches, [0, 2, 3])
    assert held == [0] and b"V0 = 0.5" in content


def test_a_crashing_patch_is_dropped_and_the_others_judged(tmp_path, runner):
    train = (
        TRAIN.replace("FAILS, LEAK = 0.01, None, 0.0", "LEAK = 0.01, 0.0") + "FAILS = 'crash' if V5 != 1.0 else None\n"
    )
    session = sessions.make(tmp_path / "project", train.encode())
    supervise(session)
    first = block(session)
    supervise(session)
    assert first.status == "discard" and "crash" in {run.status for run in first.runs}
    assert patches()[5].origin not in blocks.chosen_of(first)
    effects = first.verdict.effects
    assert [origin for origin, effect in effects.items() if effect is None] == [patches()[5].origin]


def test_a_patch_that_is_plainly_good_goes_on_alone(tmp_path, runner):
    session = sessions.make(tmp_path / "project", TRAIN.replace("0.03", "0.3").replace("0.01,", "0.003,").encode())
    supervise(session)
    first = block(session, runs=150)
    supervise(session)
    assert first.verdict.reason.code == "plainly_good" and "v0 is plainly better" in first.verdict.said
    assert blocks.plainly_good(session.state) == first.patches[0].origin and len(first.runs) < 100
    assert not blocks.screened(session.state)  # the others are in the next block


def test_the_list_and_the_comparison_have_its_estimates(noisy, monkeypatch, tmp_path):
    first = block(noisy)
    supervise(noisy)
    text = "What v0 does.\ntime: holds\nevidence: fake | 300 | -0.03 bpb | said | somewhere\n\nV0: 1.0 -> 0.5\n"
    finding = published.read("v0", text)
    monkeypatch.setattr(published.Finding, "origin", first.patches[0].origin)
    monkeypatch.setattr(published, "library", lambda: (finding,))
    (row,) = findings.rows(noisy)
    assert row.here == "in shared runs, experiment 1" and row.effect == first.verdict.effects[finding.origin]
    (one,) = comparison.compare([Analysis(sources.of_session(noisy))]).published
    (cell,) = one.change.cells.values()
    assert cell.verdict == "holds" and cell.effect.value == row.effect[0]
    # What the prior of shared runs pulls to 0 is no sign that less of the effect is left.
    monkeypatch.setattr(published.Finding, "effect", lambda self, device="": 10 * row.effect[0])
    (one,) = comparison.compare([Analysis(sources.of_session(noisy))]).published
    (cell,) = one.change.cells.values()
    assert cell.verdict == "can't be told" and "shared runs" in cell.why


@pytest.mark.parametrize("several", [False, True])
def test_what_became_of_the_chosen_is_told(noisy, monkeypatch, several):
    first = block(noisy)
    supervise(noisy)
    origin, chosen = first.patches[0].origin, blocks.chosen_of(first)
    monkeypatch.setattr(blocks, "chosen_of", lambda _: chosen if several else [origin])
    with opening.exclusive(noisy):
        joint = blocks.open_joint(noisy, first)
    supervise(noisy)
    text = "What v0 does.\ntime: holds\nevidence: fake | 300 | -0.03 bpb | said | somewhere\n\nV0: 1.0 -> 0.5\n"
    finding = published.read("v0", text)
    monkeypatch.setattr(published.Finding, "origin", origin)
    monkeypatch.setattr(published.Finding, "key", origin.rpartition("/")[2])
    monkeypatch.setattr(published, "library", lambda: (finding,))
    (row,) = findings.rows(noisy)
    assert joint.status == "keep" and joint.origin == ("" if several else origin)
    assert row.here.startswith(
        "in shared runs, experiment 1; with others in" if several else "experiment 2, keep: holds"
    )


def test_an_edit_that_is_none_is_refused():
    with pytest.raises(LabError, match="neither"):
        edits.read("V0 = 2")
