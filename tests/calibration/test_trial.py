"""What a trial of train.py times: the steps themselves, each once."""

import time

from fakes import Backend, Bigram

import prepare
from calibration import trial

FIRST, STEP = 1.5, 0.05  # seconds


class Loss:
    """That of a step which a device works off while the host goes on: to read it is to wait for the step."""

    free = 0.0  # when the device will be done with all that it was given

    def __init__(self, seconds):
        self.done = Loss.free = max(Loss.free, time.perf_counter()) + seconds

    def __float__(self):
        time.sleep(max(0.0, self.done - time.perf_counter()))
        return 1.0


def test_the_rate_is_that_of_steps_after_the_first_each_once(tiny_data):
    with prepare.Loader(tiny_data, 2) as loader:
        clock = trial.Clock(Backend(), Bigram(tiny_data), loader, 0.1)
        while not clock.finished:
            next(loader)
            clock.tick(Loss(STEP if clock.steps else FIRST))
    timed = clock.took[trial.UNTIMED :]
    assert len(clock.took) == clock.steps and len(timed) >= trial.FEWEST
    assert min(trial.rates(1.0, timed)) > 2 / FIRST  # none of it is the first step
