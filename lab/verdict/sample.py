"""What the best and the baseline learned to write: both continue one prompt, in guarded processes of their own."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

import dataset
import prepare
import storage
from lab.errors import LabError
from lab.genome.syntax import TRAIN
from lab.reasons import Reason, sentence
from lab.run import outcome, runner
from lab.run.exam import Asked, Exam
from lab.session import events
from lab.session.session import Session
from lab.session.state import Experiment
from lab.verdict import executor
from lab.verdict.opening import exclusive

TEMPERATURE, SEED = 0.8, 0
OF_HELD_OUT = 32  # tokens of the prompt, where none is given


class Writing(Exam):
    """An exam whose only question is what comes next.

    Args:
        tokens: of the prompt. count: to be written.

    Attributes:
        written: tokens so far.
    """

    def __init__(self, request: runner.Request, weights, tokens: list[int], count: int):
        super().__init__(request, weights, {}, trains=False)
        self.prompt, self.count, self.written = tokens, count, []

    def _score(self, batch_size: int) -> None:
        asked, rng = Asked(self._run, self.data.vocab_size), np.random.default_rng(SEED)
        readable = np.flatnonzero(self.data.token_bytes)  # special tokens have no bytes
        row = np.zeros((1, prepare.MAX_SEQ_LEN), np.int32)
        row[0, : len(self.prompt)] = self.prompt
        for place in range(len(self.prompt), len(self.prompt) + self.count):
            logits = asked.logits(row, np.array([place - 1]))[0, 0, readable].astype(np.float64)
            if not np.isfinite(logits).all():
                raise prepare.Invalid("not_finite")
            chances = np.exp((logits - logits.max()) / TEMPERATURE)
            row[0, place] = rng.choice(readable, p=chances / chances.sum())
            self.written.append(int(row[0, place]))


def sample(session: Session, prompt: str | None, count: int) -> events.Sampled:
    """Lets both write, and journals it. With the lock held. LabError if one of them can't.

    Args:
        prompt: a text; None takes the beginning of the held-out rows. count: tokens to be written.
    """
    best, baseline = session.state.best, session.state.baseline
    if best is None:
        raise LabError("there is no model yet: python -m lab status shows how far the baseline is")
    data = dataset.open_data(session.local.settings.get("AUTORESEARCH_DATA"))
    begin = data.held_out_rows[0, :1].tolist()  # of a document
    tokens = begin + data.tokenizer.encode_ordinary(prompt) if prompt else data.held_out_rows[0, :OF_HELD_OUT].tolist()
    if count < 1 or len(tokens) + count > prepare.MAX_SEQ_LEN:
        raise LabError(f"prompt and answer have {len(tokens)} + {count} tokens; {prepare.MAX_SEQ_LEN} are allowed")
    texts = [data.tokenizer.decode(_written(session, "baseline", baseline, tokens, count))]
    if best is not baseline:
        texts.append(data.tokenizer.decode(_written(session, "best", best, tokens, count)))
    said, first, last = (text[:4000] for text in (data.tokenizer.decode(tokens[1:]), texts[0], texts[-1]))
    sampled = events.Sampled(experiment=best.number, prompt=said, baseline=first, best=last)
    session.log(sampled)
    return sampled


def _written(session: Session, name: str, experiment: Experiment, tokens: list[int], count: int) -> list[int]:
    """What one of them writes after the tokens."""
    run = next(run for run in session.state.runs_of(experiment.blob) if run.ok)
    asked = replace(executor.request(session, run), folder=session.folder / "sample" / name)
    runner.remove(asked.folder)
    asked.folder.mkdir(parents=True)
    (asked.folder / TRAIN).write_bytes(session.repository.content(experiment.blob))
    weights = session.folder / f"{name}.safetensors"
    if not weights.is_file():
        raise LabError(f"there are no weights of the {name} ({weights}) yet: an experiment has to be kept first")
    runner.clear(asked.folder, runner.OF_SCORE)
    exam = Writing(asked, weights, tokens, count)
    with exam:
        ended = runner.execute(asked, "score", asked.folder / "score.log", exam, weights)
    problem: Reason | None = outcome.unscored(asked, ended, exam)
    if problem or len(exam.written) < count:
        why = sentence(problem) if problem else "it ended before"
        raise LabError(f"the {name} could not write: {why}; {asked.folder / 'score.log'} has more")
    return exam.written


def after_night(session: Session) -> None:
    """Makes a sample for the report, once for each best, unless nothing is to be run."""
    session.refresh()
    if session.held:
        return
    best, sampled = session.state.best, session.state.sampled
    if best and best is not session.state.baseline and (sampled is None or sampled.experiment != best.number):
        try:
            with exclusive(session, device=True):
                sample(session, None, 96)
        except (storage.Stop, runner.Halted) as error:
            print(f"no sample of what the best writes: {error}", file=sys.stderr)
