"""What models wrote: asked token by token, in a guarded process; told and reported as plain text."""

from types import SimpleNamespace

import numpy as np
import pytest
import sessions
from sessions import attempt, edited

import dataset
from lab.compare.analysis import Analysis
from lab.errors import LabError
from lab.cli import commands, render
from lab.cli.arguments import parsed
from lab.report import page
from lab.run import outcome, runner
from lab.session.journal import Journal
from lab.session.record import Record
from lab.session.state import State
from lab.verdict import executor, sample


def written(request, count=12):
    runner.clear(request.folder, runner.OF_SCORE)
    exam = sample.Writing(request, request.folder / "result.safetensors", [1, 2, 3], count)
    with exam:
        ended = runner.execute(request, "score", request.folder / "score.log", exam, exam.weights)
    return exam, ended


def test_a_run_writes_what_its_model_expects(honest):
    request, _ = honest
    exam, ended = written(request)
    readable = set(np.flatnonzero(exam.data.token_bytes).tolist())
    assert ended.problem is None and len(exam.written) == 12 and set(exam.written) <= readable
    assert exam.scores == {} and exam.reason is None
    assert written(request)[0].written == exam.written  # the same draws


def test_a_model_that_is_no_model_writes_nothing(request_for, honest):
    nans = "def nans(self, model, tokens):\n    return np.full((*tokens.shape, 999), np.nan)\n\n\n"
    request = request_for({"def learned": f"{nans}fake_backend.Backend.logits = nans\n\n\ndef learned"})
    exam, ended = written(request)
    assert exam.written == [] and outcome.unscored(request, ended, exam)


# --- A session ---


@pytest.fixture
def night(tmp_path, runner, monkeypatch):
    night = sessions.make(tmp_path / "project")
    executor.supervise(night)
    data = SimpleNamespace(
        held_out_rows=np.arange(64).reshape(1, 64),
        tokenizer=SimpleNamespace(
            encode_ordinary=lambda text: [ord(c) for c in text],
            decode=lambda tokens: "".join(chr(token) for token in tokens),
        ),
    )
    monkeypatch.setattr(dataset, "open_data", lambda name: data)
    texts = {"baseline": "once\x1b[2J <b>upon</b>", "best": "a time"}
    monkeypatch.setattr(sample, "_written", lambda s, name, *_: [ord(c) for c in texts[name]])
    return night


def test_both_continue_a_prompt(night, capsys):
    assert attempt(night, edited(LOSS=0.5)).status == "keep"
    said = sessions.said(capsys, commands.do_sample, night, prompt="Hello", tokens=5)
    assert said == ("prompt:\n    Hello\nbaseline:\n    once <b>upon</b>\nbest: (experiment 1)\n    a time\n")
    state = State(Journal(night.journal.path).events)
    assert (state.sampled.experiment, state.sampled.best, state.sampled.prompt) == (1, "a time", "Hello")
    shown = page.written([Analysis(Record(state))]).decode()
    assert "What the models write" in shown and "once &lt;b&gt;upon" in shown and "\x1b" not in shown
    sessions.check(night)


def test_before_a_keep_there_is_one_model(night, monkeypatch):
    sampled = sample.sample(night, None, 5)
    assert sampled.experiment == 0 and sampled.best == sampled.baseline
    assert "best" not in render.sampled(sampled)
    sample.after_night(night)
    assert night.state.sampled is sampled


def test_after_a_night_once_for_each_best(night, capsys, monkeypatch):
    attempt(night, edited(LOSS=0.5))
    night.hold("paused", now=False)
    sample.after_night(night)
    with pytest.raises(LabError, match="this session is paused"):
        commands.do_sample(night, parsed(["sample"]))
    assert night.state.sampled is None
    night.release()
    sample.after_night(night)
    first = night.state.sampled
    sample.after_night(night)
    assert night.state.sampled is first
    attempt(night, edited(LOSS=0.1))

    def lost(*_):
        raise LabError("the weights are gone")

    monkeypatch.setattr(sample, "_written", lost)
    sample.after_night(night)
    assert night.state.sampled is first and "the weights are gone" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 5000])
def test_as_much_as_a_row_holds(night, count):
    with pytest.raises(LabError, match=r"have 32 \+"):
        sample.sample(night, None, count)
