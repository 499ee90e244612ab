"""What a night takes and what it lacks: told without doing anything, then made."""

import json
import shutil
import socket
import time
from argparse import Namespace
from functools import partial

import pytest
import sessions
from sessions import ROOT, git

import backends
import storage
from backends.interface import BackendError, Hardware
from calibration import identity, profile
from lab.compare import published
from lab.errors import LabError
from lab.fleet import settings
from lab.night import plan as plans
from lab.reasons import because
from lab.run import sandbox
from lab.session.events import ExperimentApplied, ExperimentDecided, ExperimentOpened, RunEnded, RunStarted, Verdict
from lab.session.session import PREFIX, Session
from lab.verdict.executor import supervise

PROFILE = json.loads((ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json").read_text())
HARDWARE = Hardware(
    name="CPU",
    slug=PROFILE["device"],
    kind="cpu",
    backend=PROFILE["backend"],
    memory=24 * 2**30,
    versions=PROFILE["versions"],
)


def options(**changes):
    named = dict.fromkeys(("tag", "agent", "hours", "until", "max_experiments", "dataset"))
    return Namespace(
        **named
        | {"baseline_runs": 3, "unsandboxed": False, "findings": False, "scale": False, "devices": None, "page": None}
        | changes
    )


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository on a machine where nothing was prepared yet."""
    monkeypatch.setattr(backends, "identify", lambda name=None: HARDWARE)
    monkeypatch.setattr(sandbox, "probe", lambda: "bwrap")
    monkeypatch.setattr(identity, "power_source", lambda: "mains")
    return sessions.repository(tmp_path / "project")


@pytest.fixture
def data(tree, isolated_home, tiny_home):
    (isolated_home / "data").mkdir(parents=True)
    (isolated_home / "data" / "tiny").symlink_to(tiny_home / "data" / "tiny")
    (isolated_home / "data" / "current").write_text("tiny")


@pytest.fixture
def calibrated(tree):
    storage.write_json(profile.path_of(HARDWARE), PROFILE)


@pytest.fixture
def commands(monkeypatch):
    """The project's commands that were asked for; they do nothing."""
    asked = []
    monkeypatch.setattr(plans, "carry_out", lambda path, *arguments: asked.append(arguments))
    return asked


def planned(tree, **changes):
    return plans.plan(tree.path, options(**changes))


def told(tree, **changes):
    return "\n".join(plans.tell(planned(tree, **changes)))


def files(tree):
    return sorted(
        str(path) for path in [*tree.path.rglob("*"), *storage.home().rglob("*")] if "/objects/" not in str(path)
    )


# --- What is missing ---


def test_where_there_is_nothing_everything_is_missing_and_nothing_is_done(tree):
    before = files(tree)
    made = planned(tree, hours=8)
    assert made.missing == ["data", "calibration", "session", "baseline"]
    assert made.prepares == ["prepare.py", "--dataset", "climbmix"] and made.download > 1 and made.disk > 2
    assert made.tag == time.strftime("%b%d").lower() and made.session is None
    assert made.first > plans.CALIBRATION + 3 * 300  # three runs of the baseline
    text = "\n".join(plans.tell(made))
    assert "1.1 GB to download" in text and "a guess" in text and "bwrap" in text and "mains" in text
    assert files(tree) == before


def test_the_baseline_for_other_times_takes_its_part_of_the_night(tree, data, calibrated):
    without, made = planned(tree, hours=8), planned(tree, hours=8, scale=True)
    assert made.last == 3 * ((0.25 + 0.5 + 2) * 300 + 3 * plans.OVERHEAD)
    assert without.experiments - made.experiments == pytest.approx(made.last / made.each, abs=1)
    assert "at the end (--scale): the baseline with shorter and longer training, about" in "\n".join(plans.tell(made))
    assert "--scale" not in "\n".join(plans.tell(without))


def test_what_is_there_is_not_missing(tree, data, calibrated):
    made = planned(tree, dataset=None)
    assert made.missing == ["session", "baseline"] and made.dataset == "tiny" and made.download == 0


def test_the_dataset_that_is_asked_for_counts(tree, data, calibrated, tiny_home, monkeypatch):
    made = planned(tree, dataset="stdlib")
    assert made.missing[0] == "data" and made.prepares == ["prepare.py", "--dataset", "stdlib"] and made.download == 0
    assert planned(tree, dataset="tiny").missing == ["session", "baseline"]
    by_path = planned(tree, dataset=str(tiny_home.parent / "text"))
    assert by_path.missing == ["session", "baseline"] and by_path.dataset == "tiny"
    monkeypatch.setenv("AUTORESEARCH_DATA", "tinystories")
    assert planned(tree).prepares == ["prepare.py", "--dataset", "tinystories"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut short")])
def test_a_dataset_that_lost_a_file_is_made_again_as_it_was(tree, calibrated, isolated_home, tiny_home, damage):
    shutil.copytree(tiny_home / "data", isolated_home / "data")
    damage(isolated_home / "data" / "tiny" / "held_out.npy")
    made = planned(tree)
    assert made.missing[0] == "data" and made.dataset == "tiny"
    assert made.prepares == ["prepare.py", "--dataset", str(tiny_home.parent / "text"), "--name", "tiny"]


def test_a_stale_profile_is_none(tree, data):
    storage.write_json(profile.path_of(HARDWARE), PROFILE | {"versions": {"torch": "0.1"}})
    assert planned(tree).missing == ["calibration", "session", "baseline"]


def test_a_profile_that_the_user_named_is_not_measured_over(tree, data, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_PROFILE", str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(profile.ProfileError):
        planned(tree)


def test_a_session_that_is_checked_out_is_gone_on_with(tmp_path, runner, monkeypatch):
    session = sessions.make(tmp_path / "project")
    monkeypatch.setattr(backends, "identify", None)  # what loads a framework is not needed
    made = planned(session.repository)
    assert made.missing == ["baseline"] and made.session.folder == session.folder and made.tag == sessions.TAG
    supervise(session)
    made = planned(session.repository)
    assert made.missing == [] and made.first == 0 and made.basis == "measured on the runs of its baseline"
    assert "continues, after" in told(session.repository)


def test_it_does_not_begin_another_beside_a_session_unasked(tmp_path, runner, tree, data, calibrated, commands):
    made = planned(tree, tag="mine")
    plans.provide(made, options(), lambda text: None)
    with pytest.raises(LabError, match="leave --tag out to continue the session"):
        planned(tree, tag="other")
    branch = tree.branch()
    git(tree.path, "switch", "-q", "main")
    with pytest.raises(LabError, match=f"git switch {branch}, then the same command"):
        planned(tree, tag="mine")
    assert planned(tree, tag="other").session is None
    elsewhere = sessions.repository(tmp_path / "elsewhere")
    with pytest.raises(LabError, match=f"belongs to {tree.path}"):
        planned(elsewhere, tag="mine")


def test_a_tag_that_can_not_be_is_refused_before_anything_is_made(tree, data, calibrated):
    with pytest.raises(LabError, match="'a tag' can't be a tag: use letters"):
        planned(tree, tag="a tag")
    assert planned(tree, tag="mine").session is None
    git(tree.path, "switch", "-qc", f"{PREFIX}{backends.identify().slug}/mine")
    git(tree.path, "commit", "-q", "--allow-empty", "-m", "of a session whose folder is gone")
    git(tree.path, "switch", "-q", "main")
    with pytest.raises(LabError, match="without its session; delete or rename it"):
        planned(tree, tag="mine")


def test_a_start_that_was_interrupted_is_begun_again(tree, data, calibrated, commands):
    plans.provide(planned(tree, tag="mine"), options(), lambda text: None)
    folder = next(storage.home().glob("sessions/*/mine"))
    (folder / "session.json").unlink()
    made = planned(tree)
    assert made.tag == "mine" and made.session is None
    plans.provide(made, options(), lambda text: None)
    assert Session(folder).state.oldest_open.kind == "baseline"


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path: (path / "train.py").write_text("LOSS = 2.0\n"), "not committed"),
        (lambda path: git(path, "switch", "-q", "--detach"), "git switch -c"),
    ],
)
def test_what_no_session_can_start_from_is_said_before_anything_is_fetched(tree, spoil, reason):
    spoil(tree.path)
    with pytest.raises(LabError, match=reason):
        planned(tree)


def test_a_finding_that_can_not_be_read_is_said_before_anything_is_fetched(tree, tmp_path, monkeypatch):
    (tmp_path / "broken.txt").write_text("x")
    damaged = partial(published.library, tmp_path)
    monkeypatch.setattr(published, "library", damaged)
    with pytest.raises(LabError, match="broken.txt: 'time:' has to be"):
        planned(tree, findings=True)
    assert planned(tree, findings=False).missing


def test_a_backend_that_cannot_run_says_so(tree, monkeypatch):
    def none(name=None):
        raise BackendError("PyTorch is missing: pip install torch")

    monkeypatch.setattr(backends, "identify", none)
    with pytest.raises(LabError, match="pip install torch"):
        planned(tree)


# --- What it takes ---


def test_experiments_are_counted_by_the_time_and_by_their_number(tree, data, calibrated):
    made = planned(tree, hours=8)
    assert 300 < made.each < 600 and made.first > 3 * 300
    assert made.experiments == pytest.approx((8 * 3600 - made.first) / made.each, abs=1)
    assert planned(tree, hours=8, max_experiments=5).experiments == 5
    assert planned(tree, hours=0.1).experiments == 0
    assert planned(tree).experiments is None and "until it is stopped" in told(tree)
    assert planned(tree, agent="claude -p").each > made.each and "by the agent" in told(tree, agent="claude -p")


def test_a_night_with_an_agent_that_is_not_installed_does_not_begin(tree, data, calibrated):
    with pytest.raises(LabError, match="does not find the agent, no-such-agent: check how it is spelt"):
        plans.provide(planned(tree), options(agent="no-such-agent -p"), None)


def test_a_night_whose_page_has_no_port_does_not_begin(tree, commands):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LabError, match=f"--page: port {port} can't be used .*give another"):
            plans.provide(planned(tree), options(page=port), print)
    assert commands == []  # nothing was downloaded or measured


def test_a_budget_for_trials_counts(tree, data, calibrated, monkeypatch):
    whole = planned(tree).each
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "10")
    assert whole - planned(tree).each == pytest.approx(290 * plans.RUNS_EACH)


def test_a_session_is_asked_how_long_its_experiments_take(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    supervise(session)
    repository, at = session.repository, time.time()
    for number in range(1, 5):  # two runs of 320 s each, and 40 s between experiments
        blob = repository.store(sessions.TRAIN + f"N = {number}\n".encode())
        session.log(ExperimentOpened(number=number, kind="change", blob=blob, parent=blob, onto=0, commit="c" * 40))
        for i in range(2):
            run, begun = session.state.next_run(), at + 320 * i
            session.log(RunStarted(number=run, experiment=number, blob=blob, seed=42 + i, budget=300.0, time=begun))
            result = {"training_seconds": 300.0, "val_bpb": 1.0}
            session.log(RunEnded(run=run, status="ok", seconds=320.0, result=result))
        at += 640 + 40 + 86_400 * (number == 2)  # a day's rest is no pause between two experiments
    for number in (2, 1, 4, 3):  # as several devices may
        session.log(ExperimentDecided(experiment=number, verdict=Verdict("discard", because("not_run"))))
        session.log(ExperimentApplied(experiment=number, commit="c" * 40))
    made = planned(session.repository)
    assert made.each == pytest.approx(680, abs=1) and made.basis == "measured on 4 of this session"


def test_too_little_room_is_said(tree, data, calibrated, monkeypatch):
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda path: Namespace(free=10**6))
    assert "NOT ENOUGH" in told(tree)
    with pytest.raises(LabError, match="free some space"):
        plans.provide(planned(tree), options(), print)


def test_a_night_that_waits_for_workers_says_so(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    assert "workers" not in told(session.repository)
    settings.listen(session, "tls://0.0.0.0:8786")
    assert (
        "\nworkers: those of other machines, at tls://0.0.0.0:8786; no device of this machine takes part unless "
        "--devices all is given (to invite nobody any more: python -m lab invite --none)\n"
    ) in told(session.repository)
    own = "\nworkers: cpu of this machine, and those of other machines, at tls://0.0.0.0:8786\n"
    assert own in told(session.repository, devices="cpu")
    storage.write_json(session.folder / "fleet.json", {**(session.fleet or {}), "elsewhere": True})
    assert "\nworkers: those of other machines, at tls://0.0.0.0:8786\n" in told(session.repository)
    settings.listen(session, None)
    assert "\nworkers: none was invited yet" in told(session.repository)


def test_power_and_sleep_are_told(tree, monkeypatch):
    monkeypatch.setattr(identity, "power_source", lambda: "battery")
    said = plans.tell(planned(tree), awake="kept awake by systemd")
    assert "BATTERY" in "\n".join(said) and "kept awake by systemd" in said


# --- Making it ---


def test_it_makes_what_is_missing_in_order_and_then_the_session(tree, data, commands, monkeypatch):
    def make(path, *arguments):
        commands.append(arguments)
        if "calibration" in arguments:
            storage.write_json(profile.path_of(HARDWARE), PROFILE)

    made, said = planned(tree, dataset="stdlib"), []
    monkeypatch.setattr(plans, "carry_out", make)
    monkeypatch.setenv("AUTORESEARCH_DATA", "")  # put back after the test
    asked = options(baseline_runs=2, dataset="stdlib")
    monkeypatch.setattr(plans, "dataset", lambda name: ("tiny", []))
    plans.provide(made, asked, said.append)
    assert commands == [("prepare.py", "--dataset", "stdlib"), ("-m", "calibration")]
    session = plans.at(tree.path)
    assert session.started.baseline_runs == 2 and session.started.dataset == "tiny"
    assert session.state.oldest_open.kind == "baseline" and any(session.branch in text for text in said)


def test_nothing_is_made_for_a_session_that_is_there(tmp_path, runner, commands):
    session = sessions.make(tmp_path / "project")
    plans.provide(planned(session.repository), options(), None)
    assert commands == []


def test_without_a_sandbox_it_stops_before_anything_is_fetched(tree, commands, monkeypatch):
    monkeypatch.setattr(sandbox, "probe", lambda: None)
    assert "no sandbox" in told(tree)
    with pytest.raises(LabError, match="--unsandboxed"):
        plans.provide(planned(tree), options(), None)
    assert commands == []


def test_the_commands_run_in_the_repository_and_their_output_is_seen(tmp_path, capfd):
    (tmp_path / "prepare.py").write_text("import os, sys; print(sys.argv[1:], os.getcwd()); sys.exit('no' in sys.argv)")
    plans.carry_out(tmp_path, "prepare.py", "--dataset", "a b")
    assert f"['--dataset', 'a b'] {tmp_path}" in capfd.readouterr().out
    with pytest.raises(LabError, match=r"python prepare.py no failed.*run the same command again.*exit status 1"):
        plans.carry_out(tmp_path, "prepare.py", "no")
