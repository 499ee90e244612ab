"""The view of a night: never wider or higher than its terminal, and unharmed by what it shows."""

import io
import os
import re
import time

import pytest
import sessions
from rich.cells import cell_len
from rich.console import Console

from lab.night import view
from lab.night.limits import Trouble
from lab.night.view import Now, View, progress_of
from lab.reasons import because
from lab.session.events import ExperimentApplied, ExperimentDecided, RunEnded, Verdict
from lab.verdict.executor import supervise
from lab.verdict.opening import facts_of_change

LINE = "step {:05d} ({:.1f}%) | loss {:.4f} | 15,952 tokens/s | epoch 1    \n"


@pytest.fixture
def session(tmp_path, runner):
    session = sessions.make(tmp_path / "project")
    supervise(session)
    return session


def begin(session, description="a change", status=None, mean=None):
    """An experiment, with a run that is under way or, given a status, with its verdict."""
    repository, best, number = session.repository, session.state.best, session.state.last.number + 1
    facts = facts_of_change(session, best, sessions.edited(N=number))
    commit = repository.commit(repository.commit_of(session.branch), facts["blob"], "a change")
    e = session.open_experiment(kind="change", description=description, commit=commit, **facts)
    run = session.start_run(e, e.blob, 43, 300.0)
    if status:
        session.log(RunEnded(run=run.number, status="crash", seconds=1.0))
        verdict = Verdict(status, because("baseline"), mean=mean, parent_mean=mean)
        session.log(ExperimentDecided(experiment=number, verdict=verdict))
        session.log(ExperimentApplied(experiment=number, commit=commit))
    return e


def train(session, percent=50, before=""):
    """The log of the run under way, up to so much of its training."""
    folder = session.run_folder(max(session.state.runs))
    folder.mkdir(parents=True)
    steps = (LINE.format(i, i / 2, 9 - i / 40) for i in range(1, 2 * percent + 1))
    (folder / "run.log").write_text(before + "".join(steps))


def now(phase="training", troubles=(), **changes):
    facts = {"since": time.time() - 5, "by": "agent", "begun": time.time() - 3600, "first": 1}
    return Now(phase=phase, troubles=[Trouble("busy", text, "wait") for text in troubles], **facts | changes)


def console(width=80, height=24, encoding="utf-8", terminal=True):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(
        file=file, width=width, height=height, force_terminal=terminal, highlight=False, _environ={"TERM": "xterm"}
    )


def written(console):
    return console.file.buffer.getvalue().decode(console.encoding)


def picture(session, at=None, width=79, height=20, encoding="utf-8"):
    lines = View(session, console(encoding=encoding)).lines(at or now(), width, height)
    return ["".join(segment.text for segment in line) for line in lines]


# --- Logs ---


def log(tmp_path, text):
    path = tmp_path / "run.log"
    path.write_text(text)
    return path


def test_a_run_under_way_is_read_from_its_log(tmp_path):
    path = log(tmp_path, "device x | data y\n" + LINE.format(1, 10.0, 9.5) + LINE.format(2, 25.0, 7.25))
    assert progress_of(path) == {
        "step": 2,
        "percent": 25.0,
        "loss": 7.25,
        "tok_per_s": 15952.0,
        "losses": [9.5, 7.25],
    }


def test_before_the_first_step_nothing_is_known(tmp_path):
    assert progress_of(log(tmp_path, "compiling\nloss of 3 friends\n")) == {} == progress_of(tmp_path / "none.log")


def test_an_edited_line_of_progress_is_read_as_far_as_it_goes(tmp_path):
    found = progress_of(log(tmp_path, "step: 12, loss = 3.5, grad norm 0.3\n"))
    assert (found["step"], found["loss"], found["losses"]) == (12, 3.5, [3.5]) and "percent" not in found


@pytest.mark.parametrize(
    "line",
    [
        "step 1 (50.0%) | loss nan | 1 tokens/s",
        "step 1 (999%) | loss 1.0",
        "\x1b]0;step\x07 loss 1.0",
        "step 99999999999999999999 | loss 1.0",
        "step 1 |" + " " * 10_000 + "loss 1.0",
    ],
)
def test_what_only_looks_like_progress_is_none(tmp_path, line):
    assert progress_of(log(tmp_path, line + "\n")) == {}


def test_of_a_long_log_the_end_is_read(tmp_path):
    found = progress_of(log(tmp_path, LINE.format(1, 1.0, 9.0) + "x" * 300 * 1024 + "\n" + LINE.format(7, 60.0, 4.0)))
    assert found["losses"] == [4.0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.log")
    assert progress_of(tmp_path / "run.log") == {}


# --- The curve ---


def test_the_curve_falls():
    text = view.sparkline([5 - i / 25 for i in range(100)], 60).plain
    assert re.fullmatch(r"4\.600 (\S+) 1\.040", text) and len(text) == 60
    heights = [view.BLOCKS.index(block) for block in text[6:-6]]
    assert heights == sorted(heights, reverse=True) and heights[0] == 7 and heights[-1] == 0


def test_the_first_steep_part_does_not_flatten_the_rest():
    text = view.sparkline([300.0, 9.0, *(4 - i / 100 for i in range(98))], 60).plain
    assert text.startswith("3.920 █") and len(set(text[6:-6])) == 8


@pytest.mark.parametrize("losses", [[3.0], [3.0, 4.0], [3.0] * 50, [0.0, 1e9], list(map(float, range(1000)))])
@pytest.mark.parametrize("width", [3, 8, 20, 200])
def test_a_curve_of_anything_keeps_to_its_size(losses, width):
    output = console(width, terminal=False)
    output.print(view.sparkline(losses, width))
    assert all(cell_len(line) <= width for line in written(output).splitlines())


# --- The picture ---


def test_it_shows_the_run_with_its_curve_and_the_best(session):
    begin(session, "a faster start", "discard", 0.9)
    begin(session, "a longer end")
    train(session)
    text = " ".join(line.strip() for line in picture(session, now(most=9, deadline=time.time() + 7300)))
    for part in (
        "experiment 2, proposed by the agent",
        "a longer end",
        "of the change, seed 43",
        "50 %",
        "15,952 tokens/s",
        "1.0 GB",
        "loss 6.5",
        "8.725 █",
        "best ",
        "it is the baseline",
        "noise ",
        "1 experiment, 0 kept",
        "1.0 an hour",
        "in 2 h 01 min",
        "experiments left: about 2",
        "a faster start",
        "0.900000",
    ):
        assert part in text, part
    assert re.search(r"run \d+ .*, (4|5) min left", text)


def test_without_limits_it_says_how_to_stop(session):
    assert "until it is stopped (Ctrl-C)" in " ".join(line.strip() for line in picture(session))


def test_before_there_is_a_baseline(tmp_path, runner):
    text = "\n".join(picture(sessions.make(tmp_path / "project"), now(first=0)))
    assert "experiment 0" in text and "baseline" in text and "best" not in text


def test_between_experiments_it_says_what_is_waited_for(session):
    troubles = ["the device is throttled", "41 % of the battery left"]
    text = "\n".join(picture(session, now("waiting: the device is throttled", troubles=troubles)))
    assert "waiting: the device is throttled, for 5 s" in text and text.count("throttled") == 1 and "41 %" in text


@pytest.mark.parametrize("width", [1, 9, 40, 79, 159])
@pytest.mark.parametrize("height", [1, 3, 8, 20, 42])
def test_it_is_never_larger_than_asked_for(session, width, height):
    for i in range(3):
        begin(session, "学习率 0.04 → 0.06, " * 20, ("discard", "crash", "invalid")[i], 0.9)
    begin(session, "an edit\nof\x1b[2J\x1b]0;title\x07 two lines " * 9)
    train(session)
    lines = picture(session, now(most=7, troubles=["it is \x1b[2Jhot " * 30]), width, height)
    assert len(lines) <= height and all(cell_len(line) <= width and line.isprintable() for line in lines)
    if width >= 40 and height >= 20:
        assert lines[-1].startswith("   4  running")


def test_what_a_person_sees_is_text_not_markup(session):
    begin(session, "[red]try[/red] \x1b[31mthis")
    assert any("[red]try[/red] this" in line for line in picture(session))


def test_without_unicode_it_is_drawn_in_ascii(session):
    begin(session, "deeper…, 学")
    train(session)
    lines = picture(session, encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert all(any(line.startswith(part) for line in lines) for part in ("8.725 #", "experiment 1", "deeper., ?"))


# --- On a terminal, and not ---


def test_on_a_terminal_said_lines_stay_and_the_picture_goes(session):
    output = console()
    with View(session, output) as seen:
        seen.update(now())
        seen.say("a new best")
    shown, said = written(output).split("a new best")
    assert "training" in shown and "training" in said  # drawn again below the line
    erased = re.search(r"(?:\x1b\[1A\x1b\[2K)+$", said)[0].count("\x1b[1A")
    assert erased == len(picture(session))


def test_after_a_resize_the_screen_is_cleared_and_what_was_said_is_there_again(session):
    output = console()
    with View(session, output) as seen:
        seen.say("a new best")
        seen.update(now())
        output.size = (50, 12)
        before = len(written(output))
        seen.update(now("another phase"))
        after = written(output)[before:]
        assert "\x1b[2J" in after and "a new best" in after and "another phase" in after
        shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in after.split("\n")]
        assert max(cell_len(line.strip("\r")) for line in shown) <= 50, shown


def test_elsewhere_a_line_tells_what_is_new(session, monkeypatch):
    output = console(terminal=False)
    with View(session, output) as seen:
        seen.update(now("the agent thinks"))
        seen.update(now("the agent thinks"))
        begin(session, "a longer end " * 30)
        train(session)
        for _ in range(3):
            seen.update(now("training"))
        monkeypatch.setattr(view, "TELL_EVERY", 0.0)
        seen.update(now("training"))
    lines = written(output).splitlines()
    assert len(lines) == 3 and all(re.match(r"\d\d:\d\d:\d\d  \S", line) for line in lines)
    assert lines[0].endswith("the agent thinks")
    assert "experiment 1: a longer end" in lines[1] and "starts" in lines[1]
    assert "50 %" in lines[2] and "\x1b" not in written(output)


def test_elsewhere_another_number_is_nothing_new(session):
    output = console(terminal=False)
    with View(session, output) as seen:
        seen.say("waiting: 91 degrees")
        for degrees in (91, 90, 92):
            text = f"{degrees} degrees"
            seen.update(now(f"waiting: {text}", troubles=[text]))
    assert len(written(output).splitlines()) == 1


def test_a_terminal_that_is_gone_does_not_end_the_night(session, monkeypatch):
    output = console()

    def gone(*_):
        raise OSError("input/output error")

    with View(session, output) as seen:
        monkeypatch.setattr(output.file, "write", gone)
        seen.update(now())
        seen.say("on it goes")


def test_the_facts_are_put_together_once_for_each_event(session, monkeypatch):
    asked = []
    real = view.noise_of
    monkeypatch.setattr(view, "noise_of", lambda state: asked.append(1) or real(state))
    seen = View(session, console())
    for _ in range(3):
        seen.lines(now(), 79, 20)
    begin(session)
    seen.lines(now(), 79, 20)
    assert len(asked) == 2


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (119.4, "119 s"), (130, "2 min"), (11100, "3 h 05 min")])
def test_durations(seconds, text):
    assert view.lasting(seconds) == text
