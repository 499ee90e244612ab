"""Several devices of one machine work on one session."""

import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from nights import begin, impatient, processes, state_of, until
from sessions import check, make

from lab.fleet import here, settings, wire
from lab.fleet.pool import Device, Pool
from lab.fleet.wire import Alive, begun
from lab.fleet.worker import ARCHIVE, Worker, archive_of, files_of
from lab.errors import LabError
from lab.run import runner, sandbox
from lab.run.outcome import Outcome
from lab.run.processes import note
from lab.session.session import Session, fingerprints
from lab.verdict import executor
from lab.verdict.plan import orders


def test_a_late_result_of_a_run_that_was_given_up_is_dropped(project, isolated_home):
    """A worker sleeps for longer than it is waited for, and wakes with its run done."""
    impatient(project)
    night = begin(project, isolated_home, 4, "cpu,cpu")
    until(lambda: any(run.experiment and run.ended is None for run in state_of(project).runs.values()))
    run = next(run for run in state_of(project).runs.values() if run.experiment and run.ended is None)
    device = "--devices", run.worker
    asleep = next(p for p in processes(project, "join") if device in zip(p.cmdline(), p.cmdline()[1:]))
    asleep.send_signal(signal.SIGSTOP)
    until(lambda: state_of(project).runs[run.number].ended)
    asleep.send_signal(signal.SIGCONT)
    said = night.communicate(timeout=200)[0]
    assert "4 experiments, as many as --max-experiments allows" in said, said
    session = Session(project.folder)
    check(session)
    runs = list(session.state.runs.values())
    assert [(r.number, r.reason.code) for r in runs if r.status == "lost"] == [(run.number, "device_lost")]
    again = next(r for r in runs if r.number > run.number and (r.blob, r.seed) == (run.blob, run.seed))
    assert again.ok and again.worker != run.worker
    assert not list((isolated_home / "fleet").glob("*/runs/*/run.log"))


def test_two_devices_work_at_once_and_a_head_that_is_killed_fetches_what_they_made_meanwhile(project, isolated_home):
    night = begin(project, isolated_home, 4, "cpu,cpu")

    def all_have_begun() -> bool:
        """Whether both workers have received what the journal says that they run: neither is about to be sent a run,
        which would be lost with the head."""
        under_way = [run for run in state_of(project).runs.values() if run.ended is None]
        begun = [any(isolated_home.glob(f"fleet/*/runs/{run.number:04d}/train.py")) for run in under_way]
        return len(under_way) == 2 and any(run.experiment for run in under_way) and all(begun)

    until(all_have_begun)
    for head in processes(project, "supervise"):
        head.kill()
    said = night.communicate(timeout=200)[0]
    assert "4 experiments, as many as --max-experiments allows" in said, said
    session = Session(project.folder)
    check(session)
    runs = list(session.state.runs.values())
    assert {run.worker for run in runs} == {"cpu", "cpu:1"} and all(run.ok for run in runs)  # none was lost
    assert max(sum(other.time <= run.time < other.ended.time for other in runs) for run in runs) == 2
    until(lambda: not processes(project, "join"), 10)


def test_a_worker_restores_a_judge_that_was_fetched_for_an_earlier_head(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "prepare.py").write_text("BUDGET = 300\n")
    pinned = fingerprints(tmp_path / "judge")
    worker = Worker("cpu", "cpu", {}, None, local=True)
    worker.facts = {"judge": pinned, "archive": "another, with the same files"}
    worker.root.mkdir(parents=True)
    (worker.root / ARCHIVE).write_bytes(archive_of(tmp_path / "judge", pinned))
    assert worker._restore_judge() == ["prepare.py"] and worker._restore_judge() == []
    (worker.judge / "prepare.py").write_text("BUDGET = 3000\n")
    assert worker._restore_judge() == ["prepare.py"] and fingerprints(worker.judge) == pinned


def test_a_run_names_its_gpu_and_so_its_energy_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    worker, requests = Worker("cuda:1", "cuda:1", {"CUDA_VISIBLE_DEVICES": "GPU-abc"}, None, local=True), []
    worker.facts = {"settings": {}, "memory_ceiling": None, "unified": False, "protected": [], "sandbox": None}
    monkeypatch.setattr(worker, "_restore_judge", list)
    monkeypatch.setattr(runner, "run", lambda request: requests.append(request) or Outcome("lost"))
    facts = dict(seed=42, budget=1.0, timeout=9.0, run_id="1", reference={}, keeps_caches=False)
    assert worker.do_run(1, b"", **facts).result(10)["status"] == "lost"
    assert requests[0].gpu == "GPU-abc" and requests[0].settings["CUDA_VISIBLE_DEVICES"] == "GPU-abc"


def test_a_worker_tries_its_sandbox_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    worker, boxes = Worker("there/cpu", "cpu", {}, None, local=False), iter([None, "bwrap"])
    monkeypatch.setattr(sandbox, "probe", lambda: next(boxes))
    with pytest.raises(LabError, match="offers no sandbox"):
        worker._sandbox()
    assert [worker._sandbox() for _ in range(2)] == ["bwrap", "bwrap"]


def test_a_device_that_was_not_yet_asked_for_the_run_it_makes_gets_no_other(tmp_path):
    """The head before this one had begun it, and the worker has just come back."""
    session = make(tmp_path / "project")
    pool = Pool(session)
    pool.hub = SimpleNamespace(members={"cpu": SimpleNamespace(alive=Alive())})  # pyright: ignore[reportAttributeAccessIssue]
    first, second = orders(session.state)[:2]
    assert first.job and second.job
    run = executor.begin(session, first, "cpu")
    pool.devices["cpu"] = Device("cpu", ready=True)
    assert pool.makes(run) and not pool.begin([second])
    assert pool.devices["cpu"].run is run


def test_a_run_whose_head_was_killed_before_it_made_the_folder_is_given_up(tmp_path):
    session = make(tmp_path / "project")
    pool = Pool(session)
    order = orders(session.state)[0]
    assert order.job
    run = session.start_run(order.experiment, order.job.blob, order.job.seed, order.job.budget, worker="cpu")
    assert pool.makes(run) and not session.run_folder(run.number).exists()
    pool._give_up(pool.devices["cpu"])
    assert run.status == "lost" and pool.devices["cpu"].run is None


def test_a_head_ends_where_another_night_has_other_devices(project, monkeypatch):
    """Its own night was killed, and it went on for the next one, which could begin nothing."""
    session = project
    monkeypatch.setattr(Pool, "_look_after_started", lambda pool: None)
    settings.choose(session, ["cpu", "cpu:1"])
    with session.night_lock, Pool(session) as pool:
        assert pool.wait()
        run = executor.begin(session, orders(session.state)[0], "cpu")
        pool.makes(run)
        settings.choose(session, [])
        assert pool.wait() and not pool.begin(orders(session.state))
        pool._give_up(pool.devices["cpu"])
        assert not pool.wait()


def test_a_port_that_the_system_gave_is_taken_again_only_where_workers_look_for_it(project):
    settings.choose(project, ["cpu"])
    with Pool(project) as pool:
        before = pool.address
    with socket.create_server(wire.host_and_port(before)):  # another program's now
        with Pool(project) as pool:
            later = pool.address
    assert before != later
    note(project.folder / "fleet" / "cpu.json", os.getpid())  # a worker that was left
    with Pool(project) as pool:
        assert pool.address == later


def test_a_device_with_a_full_disk_gets_no_other_run(tmp_path):
    session, asked = make(tmp_path / "project"), []
    pool = Pool(session)
    pool.hub = SimpleNamespace(members={}, call=lambda *what, **facts: asked.append(what))  # pyright: ignore[reportAttributeAccessIssue]
    run = executor.begin(session, orders(session.state)[0], "cpu")
    device = pool.devices["cpu"] = Device("cpu", ready=True, run=run)
    lost = vars(Outcome("lost")) | {"reason": {"code": "disk_full"}, "log": b""}
    pool._take(device, run, lost)
    assert run.status == "lost" and "disk was full" in device.refused and asked == [("cpu", "leave")]
    assert not pool.begin(orders(session.state))


def test_a_device_is_measured_once_at_a_time(tmp_path, monkeypatch):
    """Its connection is lost while it is measured, and it is prepared again."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    measuring, most = [], []

    def unlike(*_):
        measuring.append(0)
        most.append(len(measuring))
        time.sleep(0.2)
        measuring.pop()

    monkeypatch.setattr(here, "unlike", unlike)
    worker = Worker("there/cpu", "cpu", {}, None, local=False)
    facts = {"session": "a", "device": "fake", "judge": {}, "manifest": '{"parts": {}}', "dataset": "tiny"}
    asked = [begun(lambda: worker.do_prepare(**facts)) for _ in range(2)]
    assert [each.result(10) for each in asked] == [{"missing": ["data/tiny/manifest.json"]}] * 2
    assert most == [1, 1]


def test_a_head_that_goes_on_after_a_refusal_has_nothing_run(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    worker = Worker("there/cpu", "cpu", {}, {"judge": "a", "data": "b"}, local=False)
    facts = {"session": "a", "device": "fake", "judge": {}, "manifest": '{"parts": {}}', "dataset": "tiny"}
    with pytest.raises(LabError, match="not the one that the invitation names"):
        worker.do_prepare(**facts)
    with pytest.raises(KeyError):
        worker.do_put(ARCHIVE, 0, b"", True)
    with pytest.raises(KeyError):
        worker.do_run(1, b"").result(10)


@pytest.mark.parametrize("path", ["sessions/secret", "data/../secret", "/etc/hostname"])
def test_a_worker_gets_no_other_files_than_the_session_s(tmp_path, path):
    pool = Pool(make(tmp_path / "project"))
    pool.archive, manifest = b"", json.dumps({"parts": {"a": {"files": {"train_0.npy": {}}}}})
    pool.facts = {"dataset": "tiny", "manifest": manifest}
    assert sorted(files_of(pool.facts)) == ["data/tiny/manifest.json", "data/tiny/train_0.npy"]
    with pytest.raises(LabError, match="no file of the session"):
        pool._send("cpu", path)
