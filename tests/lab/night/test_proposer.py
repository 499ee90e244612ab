"""The proposer: a function of the journal, that never repeats itself and gets somewhere."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import sessions

from backends import surface
from lab.errors import LabError
from lab.verdict.executor import supervise
from lab.compare import published
from lab.night import findings, proposer, sampler
from lab.session.session import Session
from lab.verdict import opening

ROOT = Path(__file__).resolve().parents[3]
# The score is best at LR = 0.01 and DEPTH = 6.
VALLEY = sessions.TRAIN.replace(b"NOISE = 0.001", b"NOISE = 1e-6") + (
    b"LR = 0.04  # of the matrices\nDEPTH = 4\nBETAS = (0.9, 0.95)\n\n\ndef loss():\n    import math\n"
    b"    return 1 + 0.05 * math.log(LR / 0.01) ** 2 + 0.02 * (DEPTH - 6) ** 2\n\n\nLOSS = loss()\n"
)
VALLEY = VALLEY.replace(b"LOSS = 1.0\nNOISE = 1e-6\nFAILS = None\nLEAK = 0.0\n", b"") + (
    b"NOISE, FAILS, LEAK = 1e-6, None, 0.0\n"
)


@pytest.fixture(autouse=True)
def same_commits(monkeypatch):
    """The proposer's seed is the first commit: the same in every run of these tests."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_DATE", "2026-01-01T00:00:00Z")


def begun(path, train):
    session = sessions.make(path, train)
    supervise(session)
    return session


def attempt(session, proposal=None):
    """The next experiment, to its verdict."""
    proposal = proposal or proposer.propose(session)
    experiment = sessions.attempt(session, proposal.content, proposal.description, more={"origin": proposal.origin})
    assert experiment is session.state.last
    return experiment


@pytest.fixture
def valley(tmp_path, runner):
    return begun(tmp_path / "project", VALLEY)


def test_finds_what_is_better(valley):
    for _ in range(30):
        attempt(valley)
    state = valley.state
    assert len({e.digest for e in state.experiments.values()}) == 31
    assert state.mean(state.best) < state.mean(state.baseline) - 0.05


def test_says_what_it_changes(valley):
    proposal = proposer.propose(valley)
    assert proposal.description.endswith(proposer.MARK)
    text = proposal.content.decode()
    for change in proposal.description[: -len(proposer.MARK)].split(", "):
        name, _, rest = change.partition(" ")
        before, after = rest.split(" -> ")
        assert before in VALLEY.decode() and after in text and name.split("[")[0] in text
    assert "# of the matrices" in text


def test_leaves_the_others_as_they_are(tmp_path, runner):
    session = begun(
        tmp_path / "project",
        VALLEY.replace(b"0.95)", b"0.951234)").replace(
            b"DEPTH = 4\n",
            b"DEPTH = 4\nA = 0.123456\nB = 12345\nC = 0.7  # [1 .. 2]\nHALF_RATIO = 0.33333\nD = 1.23456  # [1 .. 2]\n",
        ),
    )
    before = (session.repository.path / "train.py").read_text().splitlines()
    for _ in range(6):
        proposal = proposer.propose(session)
        changed = {
            one.split(" = ")[0] for one, other in zip(before, proposal.content.decode().splitlines()) if one != other
        }
        named = {part.split(" ")[0].split("[")[0] for part in proposal.description.split(", ")}
        assert changed == named and 1 <= len(proposal.description.split(", ")) <= 3
        attempt(session, proposal)
        before = session.repository.content(session.state.best.blob).decode().splitlines()


def test_is_a_function_of_the_journal(valley):
    for _ in range(3):
        attempt(valley)
    assert proposer.propose(valley) == proposer.propose(Session(valley.folder))
    before = proposer.propose(valley)
    attempt(valley, before)
    assert proposer.propose(valley) != before


def test_crashes_count_as_bad(tmp_path, runner):
    crashing = VALLEY.replace(b"None, 0.0\n", b"'crash' if LR > 0.04 or DEPTH > 4 else None, 0.0\n")
    session = begun(tmp_path / "project", crashing)
    tried = [attempt(session) for _ in range(24)]
    late = [e.status for e in tried[12:]]
    assert "crash" in {e.status for e in tried} and late.count("crash") < len(late) / 2


CONSTANT = b"LOSS, NOISE, FAILS, LEAK = 1.0, 0.001, None, 0.0\n"


def test_goes_beyond_its_first_bounds(tmp_path, runner):
    session = begun(tmp_path / "project", CONSTANT + b"DEPTH = 2\n")
    found = {attempt(session).description for _ in range(8)}
    assert len(found) == 8
    assert any(int(description.split(" ")[3]) > 4 for description in found)


def test_gives_up_when_all_was_tried(tmp_path, runner):
    session = begun(tmp_path / "project", CONSTANT + b"STEPS = 3  # [1 .. 4]\n")
    found = {attempt(session).description for _ in range(3)}
    assert found == {f"STEPS 3 -> {n}{proposer.MARK}" for n in (1, 2, 4)}
    with pytest.raises(LabError, match="nothing left to propose"):
        proposer.propose(session)


def test_says_so_where_nothing_can_be_read(tmp_path, runner):
    session = begun(tmp_path / "project", CONSTANT)
    with pytest.raises(LabError, match="--agent"):
        proposer.propose(session)


@pytest.fixture
def ours(tmp_path, runner, monkeypatch):
    """A session with our train.py, where whatever is edited makes no difference."""
    monkeypatch.setattr(
        sessions.Runner,
        "_facts",
        staticmethod(lambda folder: ((folder / "train.py").read_bytes(), {"LOSS": 1.0, "NOISE": 0.001, "LEAK": 0.0})),
    )
    return begun(tmp_path / "project", (ROOT / "train.py").read_bytes())


def test_findings_in_between(ours):
    """Where steps and findings do as well, both are proposed; what is tried as a finding has its origin."""
    proposals = []
    for _ in range(12):
        proposals.append(proposer.propose(ours))
        attempt(ours, proposals[-1])
    found = [one.origin for one in proposals if one.origin]
    assert 0 < len(found) < len(proposals) and len(set(found)) == len(found)
    assert set(found) <= {finding.origin for finding in published.library()}
    for proposal in proposals:
        assert surface.check(proposal.content.decode()) == []


def test_without_findings_none_is_proposed(ours, monkeypatch):
    monkeypatch.setattr(proposer, "_arms", lambda *_: ["finding", "step"])
    assert proposer.propose(ours).origin and not proposer.propose(ours, findings_too=False).origin


def test_a_model_is_not_trained_again_under_another_spelling(ours, monkeypatch):
    monkeypatch.setitem(ours.profile, "settings", {"depth": 2, "window_pattern": "SSSL", "total_batch_size": 2**13})
    train = ours.repository.train().decode()
    wide = [train.replace("ASPECT_RATIO = 64", f"ASPECT_RATIO = {ratio}") for ratio in (80, 96, 160)]  # 256, 256, 384
    assert proposer._new(ours, findings.models(ours), wide[0])
    attempt(ours, proposer.Proposal(wide[0].encode(), "wider"))
    assert [proposer._new(ours, findings.models(ours), text) for text in wide] == [False, False, True]
    ideas = {idea.name: idea for idea in findings.ideas(ours, -1.0)}
    assert {"full-windows", "llsl-windows"} <= ideas.keys()
    attempt(ours, proposer.Proposal(ideas["full-windows"].content, "full windows"))
    left = {idea.name for idea in findings.ideas(ours, -1.0)}
    assert ideas.keys() - left == {"full-windows", "llsl-windows"}


def test_first_steps_stay_near_home(ours, monkeypatch):
    """Each variable by no more than published steps that helped."""
    monkeypatch.setattr(proposer.findings, "ideas", lambda *_, **__: iter(()))
    for _ in range(3):
        proposal = proposer.propose(ours)
        before = {v.name: v for v in proposer.read(ours, ours.repository.content(ours.state.best.blob).decode())}
        after = {v.name: v for v in proposer.read(ours, proposal.content.decode())}
        changed = [v for v in before.values() if after[v.name].value != v.value]
        assert 1 <= len(changed) <= sampler.AT_ONCE
        for v in changed:
            most = sampler.FURTHEST * proposer.step_of(v).size
            assert v.kind == "choice" or abs(v.place(after[v.name].value) - v.place(v.value)) < 1.5 * most + 0.02
        attempt(ours, proposal)


def test_the_trust_region_narrows_and_widens(valley, monkeypatch):
    def decided(t, status="discard", origin="", by=proposer.MARK, kind="change"):
        verdict = SimpleNamespace(judged=status != "superseded")
        facts = {"description": f"x{by}", "status": status, "t": t, "origin": origin, "kind": kind}
        return SimpleNamespace(**facts, verdict=verdict)

    def reach(*experiments):
        return proposer._reach(SimpleNamespace(decided=experiments))

    assert reach() == 1.0 < reach(decided(0.5)) < reach(decided(3.0, "keep"))
    assert reach(decided(-9.0)) == reach(decided(None, "crash")) < 1.0
    assert reach(decided(-9.0, origin="published/x/00")) == reach(decided(2.0, "superseded")) == 1.0
    assert reach(*[decided(0.5, by="")] * 9) == 1.0  # an agent's edits
    assert reach(decided(3.0, "keep", kind="near misses")) == 1.0  # end with the last one's description
    seen = SimpleNamespace(beta=lambda better, worse: better + worse)  # of what was superseded nothing is known
    arms = [proposer._arms(SimpleNamespace(decided=tried), seen) for tried in ([], [decided(1.0, "superseded")] * 99)]
    assert arms[0] == arms[1]
    assert reach(*[decided(-9.0)] * 9) == proposer.REACH[0] and reach(*[decided(0.0)] * 99) == proposer.REACH[1]


def test_what_was_tried_before_a_new_variable_counts(valley):
    for old, new in ((b"LR = 0.04", b"LR = 0.03"), (b"DEPTH = 4", b"DEPTH = 5")):
        attempt(valley, proposer.Proposal(VALLEY.replace(old, new), "by hand"))
    best = valley.repository.content(valley.state.best.blob)
    added = best.replace(b"DEPTH =", b"NEW_LR = 0.1\nDEPTH =").replace(b"return 1 ", b"return 0.9 ")
    assert attempt(valley, proposer.Proposal(added, "another rate")).status == "keep"
    text = added.decode()
    trials = proposer.remembered(valley, text, proposer.read(valley, text))
    assert len(trials) == 4 and {trial.at["NEW_LR"] for trial in trials} == {0.1}


def test_steps_fit_what_the_ledgers_say():
    steps = sampler.prior()
    assert steps.keys() == sampler.KINDS.keys() and 0.18 < steps["rate"].size < 0.5
    assert [sampler.kind_of(name) for name in ("MATRIX_LR", "ADAM_BETAS[1]", "WARMDOWN_RATIO", "ASPECT_RATIO")] == [
        "rate",
        "moment",
        "part",
        "size",
    ]


def test_what_is_open_is_not_proposed_again(tmp_path, runner):
    session = begun(tmp_path / "project", CONSTANT + b"STEPS = 3  # [2 .. 4]\n")
    first = proposer.propose(session)
    with opening.exclusive(session):
        opening.open_change(session, first.description, content=first.content)  # and it is not run yet
    assert proposer.propose(session).content != first.content


def test_line_ends_stay(tmp_path, runner):
    session = begun(tmp_path / "project", VALLEY.replace(b"\n", b"\r\n"))
    content = proposer.propose(session).content
    assert content.count(b"\r\n") == content.count(b"\n") == VALLEY.count(b"\n")
