"""Devices of another machine: here another home, another address, and the same code."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import sessions
from nights import begin, processes, sound, until
from sessions import check, options

import dataset
import storage
from lab.cli import commands
from lab.cli.arguments import parsed
from lab.errors import LabError
from lab.fleet import here, invitation, settings
from lab.fleet.pool import Pool
from lab.fleet.worker import ARCHIVE, Worker
from lab.night import plan
from lab.run import sandbox
from lab.run.processes import end
from lab.session.session import Session
from lab.verdict import opening

ADDRESS = "127.0.0.2"  # of the head, as others see it
TRIAL = {"depth": 2, "rows": 4, "total_batch_size": 8192, "window_pattern": "L", "precision": "float32"}
OTHER_PYTHON = os.environ.get("AUTORESEARCH_OTHER_PYTHON", "")
IDENTITY = {
    "backend": "fake",
    "name": "Fake",
    "slug": "fake-1gb",
    "kind": "cpu",
    "memory": 2**30,
    "versions": {"framework": "1.0"},
}
JOIN = """import json, sys
sys.path.insert(0, sys.argv.pop(1))
from lab.fleet import here, join
here.IDENTIFY = "print('''" + sys.argv.pop(1) + "''')"
join.PATIENCE = 1.0
if sys.argv[1] == "unboxed":
    sys.argv.pop(1)
    from lab.run import sandbox
    sandbox.probe = lambda: None
from lab.__main__ import main
sys.exit(main())
"""


def profile(rate=1000.0, **facts) -> dict:
    spread = {"median": rate, "low": 0.99 * rate, "high": 1.01 * rate, "n": 9}
    return {
        **sessions.PROFILE,
        "versions": IDENTITY["versions"],
        "trials": [{**TRIAL, "tokens_per_second": spread}],
        **facts,
    }


@pytest.fixture
def project(tmp_path, tiny_home, isolated_home, monkeypatch):
    """A session whose runs are in a sandbox, on a device whose speed was measured."""
    if (box := sandbox.probe()) is None:
        pytest.skip("there is no sandbox here")
    isolated_home.mkdir()
    shutil.copytree(tiny_home / "data", isolated_home / "data")
    monkeypatch.setattr(sessions, "PROFILE", profile())
    manifest = dataset.read_manifest(tiny_home / "data" / "tiny")
    return sessions.make(
        tmp_path / "project",
        (sessions.HERE / "fake_train.py").read_bytes(),
        project=True,
        budget=0.1,
        settings={"AUTORESEARCH_HOME": str(isolated_home), "AUTORESEARCH_DATA": "tiny"},
        baseline_runs=2,
        sandbox=box,
        versions={**IDENTITY["versions"], "python": "3.12"},
        eval=manifest["eval_tag"],
        data=manifest["data_tag"],
        profile="abc",
    )


@pytest.fixture
def invited(project, tmp_path):
    """The invitation's path; the session listens."""
    with socket.create_server((ADDRESS, 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "worker.invitation"
    asked = {"target": path, "address": f"{ADDRESS}:{port}", "listen": f"{ADDRESS}:{port}", "days": 1.0, "none": False}
    assert commands.do_invite(project, options(**asked)) == 0
    return path


@pytest.fixture
def join(invited, project, tmp_path):
    """join(identity=..., own=profile, code=..., unboxed=False, python=...): a worker's process with a home of its
    own."""
    started = []

    def start(identity=IDENTITY, own=None, code=None, unboxed=False, python=sys.executable):
        home = tmp_path / "other"
        storage.write_json(home / "profiles" / "fake-1gb-fake.json", own or profile(980.0))
        command = [python, "-c", JOIN, str(code or project.judge), json.dumps(identity)]
        command += ["unboxed"] * unboxed + ["join", str(invited), "--devices", "cpu", "--name", "there"]
        process = subprocess.Popen(
            command, env={**os.environ, "AUTORESEARCH_HOME": str(home)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    end(lambda: processes(project, "child.py"))


def refused(project, process) -> str:
    """What a worker ends with, that a head does not want or that does not want the head."""
    with Pool(Session(project.folder)) as pool:
        until(lambda: pool.wait() and process.poll() is not None or process.poll() is not None, 30)
        assert not any(device.ready for device in pool.devices.values())
    said = process.communicate()[0]
    assert process.returncode == 1, said
    return said


def test_a_session_for_a_device_elsewhere_has_all_its_runs_made_there(project, isolated_home, invited, join, tmp_path):
    storage.write_json(project.folder / "fleet.json", {**project.fleet, "elsewhere": True})
    night = begin(project, isolated_home, 1, None)
    until(lambda: project.supervised)
    assert not Session(project.folder).state.runs  # it waits
    worker = join()
    said = night.communicate(timeout=120)[0]
    assert "1 experiment, as many as --max-experiments allows" in said, said
    session = Session(project.folder)
    sound(session)
    check(session)
    made = [(run.worker, run.status, str(run.reason)) for run in session.state.runs.values()]
    assert {row[:2] for row in made} == {("there/cpu", "ok")}, made
    fetched = tmp_path / "other" / "data" / "tiny"
    for name, known in dataset.known_files(dataset.read_manifest(fetched)).items():
        assert dataset.damage(fetched / name, known) is None
    assert worker.poll() is None  # until it is given back
    left = subprocess.run(
        [sys.executable, "-m", "lab", "leave"], cwd=project.judge, text=True, capture_output=True,
        env={**os.environ, "AUTORESEARCH_HOME": str(tmp_path / "other")},
    )  # fmt: skip
    assert "given back to this machine: there-cpu" in left.stdout, left
    assert "it was given back" in worker.communicate(timeout=20)[0] and worker.returncode == 0


@pytest.mark.skipif(not OTHER_PYTHON, reason="AUTORESEARCH_OTHER_PYTHON names no Python with what a worker needs")
def test_a_worker_may_have_another_python(project, isolated_home, join):
    worker = join(python=OTHER_PYTHON)
    night = begin(project, isolated_home, 3, "cpu")
    said = night.communicate(timeout=120)[0]
    assert "3 experiments, as many as --max-experiments allows" in said, said
    runs = [run for run in Session(project.folder).state.runs.values() if run.worker == "there/cpu"]
    assert runs and all(run.ok for run in runs) and worker.poll() is None
    check(Session(project.folder))


def test_one_forwarded_port_is_enough(project, tmp_path, join, invited):
    """As of `ssh -R`: the worker sees a port of its own machine, and the head listens at another address."""
    known = json.loads(invited.read_text())
    host, port = known["address"].removeprefix("tls://").split(":")

    def pump(source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def forward():
        with suppress(OSError):
            while True:
                near, far = forwarding.accept()[0], socket.create_connection((host, int(port)))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as forwarding:
        threading.Thread(target=forward, daemon=True).start()
        invited.write_text(json.dumps({**known, "address": f"tls://localhost:{forwarding.getsockname()[1]}"}))
        with Pool(Session(project.folder)) as pool:
            join()
            until(lambda: pool.wait() and pool.devices.get("there/cpu") and pool.devices["there/cpu"].ready, 30)


def test_a_worker_waits_for_the_night_to_begin(project, join):
    """Longer than one that a head has started would."""
    worker = join()
    lines = [worker.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("waiting for the head at tls://127.0.0.2:"), lines
    time.sleep(2.0)
    with Pool(Session(project.folder)) as pool:
        until(lambda: pool.wait() and pool.devices.get("there/cpu") and pool.devices["there/cpu"].ready, 30)


def test_a_device_is_described_for_a_head_elsewhere(tmp_path, isolated_home, monkeypatch):
    known = json.loads((sessions.ROOT / "calibration" / "profiles" / "cpu-amd-epyc-2c-24gb-sdpa.json").read_text())
    identity = {**IDENTITY, "slug": known["device"], "backend": "sdpa", "versions": known["versions"]}
    monkeypatch.setattr(here, "IDENTIFY", f"print({json.dumps(identity)!r})")
    storage.write_json(isolated_home / "profiles" / f"{known['device']}-sdpa.json", known)
    here.describe(tmp_path / "device.json")
    assert here.described(tmp_path / "device.json") == {"hardware": identity, "profile": known}
    with pytest.raises(LabError, match="device.json exists; remove it, or give another name"):
        here.describe(tmp_path / "device.json")
    storage.write_json(tmp_path / "other.json", {"hardware": {**identity, "slug": "x-1gb"}, "profile": known})
    with pytest.raises(LabError, match="its profile was measured on another device"):
        here.described(tmp_path / "other.json")


def test_another_python_or_system_is_no_reason_to_measure_a_device_again(isolated_home, monkeypatch):
    measured, own = [], profile(versions={"framework": "1.0", "python": "3.12.1", "system": "Linux 6.1"})
    monkeypatch.setattr(here, "_asked", lambda environment, seconds, *what: measured.append(what))
    storage.write_json(isolated_home / "profiles" / "fake-1gb-fake.json", own)
    versions = {"framework": "1.0", "python": "3.12.2", "system": "Linux 6.2"}
    assert here._calibrated({**IDENTITY, "versions": versions}, {}) == own and not measured
    here._calibrated({**IDENTITY, "versions": {**versions, "framework": "2.0"}}, {})
    assert measured == [("-m", "calibration")]


def test_a_device_that_is_given_back_loses_its_run_to_another(project, isolated_home, join):
    worker = join()
    night = begin(project, isolated_home, 3, "cpu")
    until(lambda: any(r.worker == "there/cpu" and r.ended is None for r in Session(project.folder).state.runs.values()))
    worker.send_signal(signal.SIGTERM)
    said = night.communicate(timeout=120)[0]
    assert "3 experiments, as many as --max-experiments allows" in said, said
    session = Session(project.folder)
    sound(session)
    check(session)
    assert sum(run.status == "lost" for run in session.state.runs.values()) <= 1


def test_a_worker_that_is_given_back_while_it_is_measured_ends_with_what_measures_it(project, join):
    def measuring():
        return [child for child in psutil.Process(worker.pid).children() if "sleep(600)" in str(child.cmdline())]

    with Pool(Session(project.folder)) as pool:
        worker = join(identity="'''); import time; time.sleep(600); print('''")
        until(lambda: pool.wait() and measuring(), 30)
        (process,) = measuring()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0 and not process.is_running()


@pytest.mark.parametrize(
    "facts, reason",
    [
        ({"identity": {**IDENTITY, "slug": "other-2gb"}}, "this device is other-2gb, and the session is for fake-1gb"),
        ({"identity": {**IDENTITY, "versions": {"framework": "2.0"}}}, "framework 2.0 instead of 1.0"),
        ({"own": profile(880.0)}, "makes 880 tokens/s, and the session's device makes 1,000"),
        ({"own": profile(attention_provider="library")}, "attention comes from library here"),
        ({"own": profile(trials=[])}, "the sizes at which this device's speed was measured"),
        ({"unboxed": True}, "offers no sandbox"),
    ],
    ids=["device", "versions", "speed", "attention", "unmeasured", "sandbox"],
)
def test_what_can_not_be_compared_is_refused(project, join, facts, reason):
    assert reason in refused(project, join(**facts))


def test_another_version_of_the_project_is_refused(project, join, tmp_path):
    code = tmp_path / "code"
    shutil.copytree(project.judge, code, ignore=shutil.ignore_patterns(".git"))
    with open(code / "lab" / "verdict" / "gate.py", "a") as file:
        file.write("\n")
    assert "it has another version of the project" in refused(project, join(code=code))


def test_a_judge_that_the_invitation_does_not_name_is_refused(project, join, invited):
    known = json.loads(invited.read_text())
    invited.write_text(json.dumps(known | {"judge": "0" * 64}))
    assert "the judge of this head is not the one that the invitation names" in refused(project, join())


def test_a_dataset_that_the_invitation_does_not_name_is_refused(project, join, invited):
    known = json.loads(invited.read_text())
    invited.write_text(json.dumps(known | {"data": "0" * 64}))
    assert "the dataset of this head is not the one" in refused(project, join())


def test_a_dataset_with_another_content_is_refused(project, join, isolated_home):
    path = isolated_home / "data" / "tiny" / "validation.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "validation.npy is not the session's" in refused(project, join())


def test_a_dataset_that_was_prepared_by_another_command_is_the_same(project, invited, tmp_path, monkeypatch):
    """It holds the same files. Preparing it again on the head changes the manifest's text, too."""
    folder, expected = storage.home() / "data" / "tiny", invitation.Invitation.read(invited)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "command": "python prepare.py --dataset text", "origin": "text"}))
    with Pool(Session(project.folder)) as pool:
        facts = pool.facts
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(here, "unlike", lambda *_: None)
    shutil.copytree(folder, tmp_path / "other" / "data" / "tiny")
    own = tmp_path / "other" / "data" / "tiny" / "manifest.json"
    worker = Worker("there/cpu", "cpu", {}, {"judge": expected.judge or "", "data": expected.data or ""}, local=False)
    for command in ("python prepare.py --dataset text", "python prepare.py --dataset ../text --name tiny"):
        own.write_text(json.dumps({**manifest, "command": command}))
        assert worker.do_prepare(**facts) == {"missing": [ARCHIVE]}
    for other in (json.dumps({**manifest, "eval_rows": 1}), "{"):
        own.write_text(other)
        with pytest.raises(LabError, match="is another dataset of that name"):
            worker.do_prepare(**facts)


def test_a_session_without_a_sandbox_invites_nobody(tmp_path, runner):
    session = sessions.make(tmp_path / "repo")
    with pytest.raises(LabError, match="--unsandboxed"):
        invitation.invite(session, tmp_path / "x", "host:1", None, 1.0)
    assert session.fleet is None


@pytest.mark.parametrize("address", ["host", "host:0", "host:x", "fd00::1:8786", "[fd00::1]"])
def test_an_address_has_a_port_and_brackets(project, tmp_path, address):
    for more in ((address, None), ("host:1", address)):
        with pytest.raises(LabError, match=r"write a port above 0, and an IPv6 address in brackets"):
            invitation.invite(project, tmp_path / "x", *more, 1.0)
    assert not (tmp_path / "x").exists()


def test_for_an_address_of_ipv6_the_head_listens_there(project, tmp_path, monkeypatch):
    monkeypatch.setattr(invitation, "try_to_listen", lambda address: None)  # there may be no IPv6 here
    listen = invitation.invite(project, tmp_path / "x", "[::1]:8786", None, 1.0)
    assert listen == "tls://[::]:8786" and invitation.Invitation.read(tmp_path / "x").address == "tls://[::1]:8786"


@pytest.mark.parametrize("begins", [False, True], ids=["invite", "night"])
def test_where_the_head_can_not_listen_is_told_at_once(project, tmp_path, monkeypatch, begins):
    """By who invites, and by a night before anything is proposed: its head begins later, in another process."""

    def told(listen: str) -> str:
        with pytest.raises(LabError) as told:
            if begins:
                settings.listen(project, f"tls://{listen}")
                plan.provide(SimpleNamespace(session=project), night, print)  # pyright: ignore[reportArgumentType]
            else:
                invitation.invite(project, tmp_path / "x", "host:1", listen, 1.0)
        assert not (tmp_path / "x").exists()
        return str(told.value)

    night = options(agent=None, page=None)
    with socket.create_server((ADDRESS, 0)) as taken:
        address = f"{ADDRESS}:{taken.getsockname()[1]}"
        assert "in use" in (text := told(address)) and text.endswith("is another head running here?")
        with project.lock:  # it is this session's own
            settings.listen(project, f"tls://{address}")
            plan.provide(SimpleNamespace(session=project), night, print)  # pyright: ignore[reportArgumentType]
            invitation.invite(project, tmp_path / "own", address, address, 1.0)

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for host in ("192.0.2.1", "head.local"):
        assert "it is no address of this machine" in (text := told(f"{host}:8786")) and "another head" not in text
        monkeypatch.setattr(socket, "getaddrinfo", unknown)  # of the second


def test_there_is_one_head(project, invited, isolated_home):
    with Pool(Session(project.folder)):
        with pytest.raises(LabError, match="is another head running here"):
            with Pool(Session(project.folder)):
                pass
    first = begin(project, isolated_home, 50, "cpu")
    until(lambda: Session(project.folder).owned_by_night)
    said = begin(project, isolated_home, 50, "cpu").communicate(timeout=60)[0]
    first.terminate()
    first.communicate(timeout=60)
    assert "a night of this session is running already" in said


def test_two_devices_of_one_name_are_not_both_taken(project, join):
    with Pool(Session(project.folder)) as pool:
        first = join()
        until(lambda: pool.wait() and pool.devices.get("there/cpu") and pool.devices["there/cpu"].ready, 30)
        second = join()
        until(lambda: pool.wait() and second.poll() is not None, 30)
        assert "give this one another name" in second.communicate()[0] and first.poll() is None


@pytest.mark.parametrize(
    "asked, count, found",
    [
        ("all", 0, ["cpu"]),
        ("all", 2, ["cuda:0", "cuda:1"]),
        ("1", 2, ["cuda:1"]),
        ("cpu,cpu", 0, ["cpu", "cpu:1"]),
        ("cpu, cpu,cpu", 0, ["cpu", "cpu:1", "cpu:2"]),
        ("cpu:1", 0, ["cpu:1"]),
        ("0, cuda:01", 2, ["cuda:0", "cuda:1"]),
    ],
    ids=["cpu", "gpus", "one", "twice", "three times", "of a list", "blanks"],
)
def test_devices_are_named(monkeypatch, asked, count, found):
    monkeypatch.setattr(here, "gpus", lambda: count)
    assert here.devices(asked) == found


@pytest.mark.parametrize("asked", ["2", "0,0", "cuda:1,cuda:01", "tpu", "²", ""])
def test_devices_that_are_not_there_are_refused(monkeypatch, asked):
    monkeypatch.setattr(here, "gpus", lambda: 2)
    with pytest.raises(LabError):
        here.devices(asked)


def test_what_a_night_chooses_is_kept_beside_who_is_invited(project):
    settings.choose(project, ["cpu"])
    assert project.fleet == {"devices": ["cpu"]}
    settings.choose(project, [])
    assert project.fleet is None
    settings.listen(project, "tls://0.0.0.0:1")
    settings.choose(project, ["cpu"])
    assert project.fleet == {"devices": ["cpu"], "listen": "tls://0.0.0.0:1"}


def test_who_is_only_invited_concerns_nights(project):
    settings.listen(project, "tls://0.0.0.0:1")
    assert not settings.is_pooled(project)
    with project.night_lock:
        assert settings.is_pooled(project)
    settings.choose(project, ["cpu"])
    assert settings.is_pooled(project)


def test_a_night_for_which_no_worker_has_come_says_where_it_listens(project, capsys):
    settings.listen(project, "tls://0.0.0.0:1")
    assert "no night with several devices is running" in sessions.said(capsys, commands.do_fleet, project)
    with project.night_lock:
        told = sessions.said(capsys, commands.do_fleet, project)
    assert told == "a night is running, and no device works for it now; workers can join at tls://0.0.0.0:1\n"


def test_inviting_can_be_ended(project, capsys):
    settings.listen(project, "tls://0.0.0.0:1")
    settings.choose(project, [])
    with project.night_lock, pytest.raises(LabError, match="end it with Ctrl-C"):
        commands.do_invite(project, options(none=True))
    assert project.fleet == {"devices": [], "listen": "tls://0.0.0.0:1"}
    assert "no other machine any more" in sessions.said(capsys, commands.do_invite, project, none=True)
    assert project.fleet is None
    storage.write_json(project.folder / "fleet.json", {"devices": [], "elsewhere": True, "listen": "tls://0.0.0.0:1"})
    sessions.said(capsys, commands.do_invite, project, none=True)
    assert project.fleet == {"devices": [], "elsewhere": True}


@pytest.mark.parametrize("given", ["", "x", "--address a:1", "x --none", "--none --address a:1", "--none --listen a:1"])
def test_who_invites_says_whom(given, capsys):
    with pytest.raises(SystemExit):
        parsed(["invite", *given.split()])
    assert "--none" in capsys.readouterr().err
    assert parsed(["invite", "--none"]).none and not parsed(["invite", "x", "--address", "a:1"]).none


def test_nobody_is_invited_beside_what_one_device_runs(project, tmp_path):
    with project.night_lock, pytest.raises(LabError, match="then invite"):
        commands.do_invite(project, options(target=tmp_path / "x", address="a:1", listen=None, days=30, none=False))
    assert project.fleet is None


def test_the_package_that_is_missing_is_named(project, tmp_path, monkeypatch):
    monkeypatch.setattr(invitation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="pip install .*fleet"):
        commands.do_invite(project, options(target=tmp_path / "x", address="a:1", listen=None, days=30, none=False))


def test_runs_of_workers_are_left_to_the_next_head(project):
    run = project.start_run(project.state.baseline, project.state.baseline.blob, 1, 300.0, worker="1a2b/cuda:0")
    with opening.exclusive(project):
        assert project.state.runs[run.number].ended is None
