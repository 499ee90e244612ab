"""The guard's own time, which a pause does not count in either."""

import time
from types import SimpleNamespace

import disturbance
import prepare
from lab.run import guard


def test_a_pause_before_the_next_beat_of_the_pulse_is_no_training_time(tmp_path, monkeypatch):
    monkeypatch.setattr(disturbance.Witness, "_pulse", lambda self: None)
    real, stood_still = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + stood_still[0])
    backend = SimpleNamespace(device=SimpleNamespace(kind="cpu"), synchronize=lambda: None, clock_rate=lambda: None)
    watching = guard.Guard(tmp_path, tmp_path / "repository", tmp_path / "home", [], 3.0, "x")
    clock = prepare.Clock.__new__(prepare.Clock)
    clock.witness = disturbance.Witness(backend)
    watching.clock = clock
    watching._batch(clock)
    clock.witness.start()
    watching._done()
    stood_still[0] = 1000.0
    watching._backward()  # whoever asks first finds the pause
    assert watching._elapsed() < 3 and watching.took[-1] < 3
    assert watching._awake() - watching.started < 3
