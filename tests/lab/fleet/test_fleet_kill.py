"""Workers, the head and the night are killed and stopped at random moments."""

import random
import signal
import time

import psutil
import pytest
from nights import begin, impatient, processes, sound, until
from sessions import check

from lab.session.session import Session

WHO = ("join", "supervise", "night", "join stopped", "supervise stopped", "supervise and join")


def hit(session, rng, who) -> int:
    """Kills processes, or stops one for a while; how many were hit."""
    found = 0
    for what in who.split()[0::2]:
        victims = processes(session, what)
        for process in rng.sample(victims, min(1, len(victims))):
            try:
                if "stopped" in who:
                    process.send_signal(signal.SIGSTOP)
                    time.sleep(rng.choice([0.3, 4.0]))
                    process.send_signal(signal.SIGCONT)
                else:
                    process.send_signal(signal.SIGKILL)
                found += 1
            except psutil.NoSuchProcess:
                pass
    return found


def hit_often(session, home, times, seed, experiments):
    """A night on three devices that is begun again whenever it ends before its time; (the session, what was hit)."""
    impatient(session, plan_MOST_LOST=1000, plan_SUSPECT=1000, plan_TRIES=1000, pool_MOST_STARTS=1000)
    rng, landed = random.Random(seed), dict.fromkeys(WHO, 0)
    night, hits = begin(session, home, experiments, "cpu,cpu,cpu"), 0
    deadline = time.monotonic() + 60 + 10 * times
    while True:
        assert time.monotonic() < deadline
        time.sleep(rng.uniform(0.2, 2.0))
        if night.poll() is not None:
            said = night.communicate()[0]
            if hits >= times and "as many as --max-experiments allows" in said:
                break
            if "as many as --max-experiments allows" in said:
                experiments += 4
            night = begin(session, home, experiments, "cpu,cpu,cpu")
        elif hits < times:
            hits += bool(found := hit(session, rng, who := rng.choice(WHO)))
            landed[who] += found
    return Session(session.folder), landed


def sound_after(session, landed):
    sound(session)
    check(session)
    runs = session.state.runs.values()
    lost = [run for run in runs if run.status == "lost"]
    print(f"{len(session.state.experiments)} experiments, {len(runs)} runs, {len(lost)} lost; hit: {landed}")
    assert not [run for run in runs if run.ended is None]
    assert len(lost) <= sum(landed.values()) + 3 * landed["night"]  # a night that is begun again ends what ran
    assert all(run.reason.code in ("device_lost", "stopped", "killed", "device_differs") for run in lost)
    until(lambda: not processes(session, "child.py"), 20)


def test_hit_now_and_then(project, isolated_home):
    sound_after(*hit_often(project, isolated_home, 3, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 24))
def test_hit_at_fifty_random_moments(project, isolated_home, seed):
    sound_after(*hit_often(project, isolated_home, 50, seed, 60))
