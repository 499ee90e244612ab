"""Charts: what is drawn where, as SVG and as PNG."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from report_records import replayed, session, source, trial

from lab.compare.record import Change, Record
from lab.report import curve, png
from lab.report.figure import Area, Line, Marks, Taken, Text, fixed, nice, width_of
from lab.report.view import View


def drawn(record, *size):
    return curve.progress(View(record), *(size or (1120, 430)))


def marks(figure, name):
    return [
        point for shape in figure.shapes if isinstance(shape, Marks) and shape.name == name for point in shape.points
    ]


def test_each_experiment_is_drawn_once_where_it_belongs():
    record = session(40)
    figure, view = drawn(record), View(record)
    counts = {name: len(marks(figure, name)) for name, _, _ in curve.SIGNS}
    assert counts["kept"] == 9 and counts["crash"] == sum(c.status == "crash" for c in view.changes)
    assert counts["near"] + counts["discard"] + counts["far"] == view.counts["discard"]
    assert sorted(number for _, _, number in figure.spots) == list(record.changes)
    by_number = {number: (x, y) for x, y, number in figure.spots}
    scored = sorted((number for number in view.scores if by_number[number][1] > 40), key=view.scores.get)
    heights = [by_number[number][1] for number in scored]
    assert heights == sorted(heights, reverse=True)  # lower scores are lower


def test_the_line_is_the_best_so_far():
    record = session(20)
    line = next(shape for shape in drawn(record).shapes if isinstance(shape, Line) and shape.name == "best")
    xs, ys = zip(*line.points)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)
    assert set(marks(drawn(record), "kept")) <= set(line.points)


def test_the_band_is_one_standard_deviation_to_each_side():
    record = session(22, sd=0.01)
    figure, view = drawn(record), View(record)
    band = next(shape for shape in figure.shapes if isinstance(shape, Area))
    by_number = {number: y for _, y, number in figure.spots}
    per_bit = (by_number[20] - by_number[0]) / (view.scores[0] - view.scores[20])
    at_end = sorted(y for x, y in band.points if x == max(x for x, _ in band.points))
    assert at_end[1] - at_end[0] == pytest.approx(2 * 0.01 * per_bit, rel=1e-6)
    assert ("band", "band") in [one[:2] for one in curve.legend(view, figure)]


def test_without_repeats_there_is_no_band():
    record = session(20, noise=None)
    figure = drawn(record)
    assert not any(isinstance(shape, Area) for shape in figure.shapes)
    assert "band" not in [name for name, *_ in curve.legend(View(record), figure)]


def test_one_that_failed_badly_does_not_flatten_the_rest():
    record = session(20)
    record.changes[3] = Change(**{**vars(record.changes[3]), "trials": (trial(9, 9.0, 3),)})
    figure = drawn(record)
    assert len(marks(figure, "far")) == 1 and len(marks(drawn(session(20)), "far")) == 0
    line = next(shape for shape in figure.shapes if isinstance(shape, Line) and shape.name == "best")
    assert line.points[-1][1] - line.points[0][1] > 100


@pytest.mark.parametrize("size", ((1120, 430), (360, 330)))
def test_labels_lie_in_the_chart_and_not_on_each_other(size):
    figure = drawn(session(100), *size)
    labels = [shape for shape in figure.shapes if isinstance(shape, Text) and shape.name == "label"]
    assert len(labels) > 3
    boxes = []
    for text in labels:
        wide = width_of(text.text, text.size)
        left = text.x - wide * (text.anchor == "end")
        boxes.append((left, text.y - text.size, left + wide, text.y))
        assert 0 <= left and left + wide <= size[0] and 0 <= text.y <= size[1]
    assert all(Taken([one]).free(other) for one, other in itertools.combinations(boxes, 2))


def test_scores_against_tokens_and_flops():
    record = session(20)
    assert curve.against(View(record), "flops", 540, 300) is None  # all alike
    figure = curve.against(View(record), "tokens", 540, 300)
    assert len(figure.spots) == len(View(record).scores)
    assert "million tokens in a run" in [shape.text for shape in figure.shapes if isinstance(shape, Text)]


def test_time_adds_up():
    record = session(20)
    view = View(record)
    shares = dict(view.shares)
    assert sum(shares.values()) == pytest.approx(record.hours)
    runs = sum(len(c.trials) for c in view.changes)
    assert shares["training the changes"] == pytest.approx(runs * 300 / 3600)
    assert shares["start, compilation and evaluation of runs"] == pytest.approx(runs * 40 / 3600)
    assert sum(one.total for one in view.spent.values()) == pytest.approx(runs * 340)


def test_runs_beside_others_and_confirmations_are_told_apart():
    record = session(4)
    record.changes[0] = Change(
        **{**vars(record.changes[0]), "trials": (trial(1, 1.2, 0), trial(2, 1.2, 3), trial(3, 1.2, 9, confirms=True))}
    )
    view = View(record)
    shares = dict(view.shares)
    assert shares["training again: parents beside them, further runs"] == pytest.approx(300 / 3600)
    assert shares["confirmations"] == pytest.approx(340 / 3600)
    assert view.spent[3].beside == 300 and view.scores[0] == pytest.approx(1.2)


def test_further_runs_of_an_experiment_are_in_the_time_too():
    record = session(4)
    last = record.changes[4]
    record.changes[4] = Change(**{**vars(last), "trials": (*last.trials, trial(90, 1.2, 9))})  # of a repeat, 9
    view = View(record)
    assert dict(view.shares)["training again: parents beside them, further runs"] == pytest.approx(300 / 3600)
    assert sum(dict(view.shares).values()) == pytest.approx(record.hours)


def test_several_sessions_are_drawn_by_their_gain_and_replays_are_not():
    views = [View(session(10)), View(session(20, tag="other")), View(replayed(source([-0.01]), [-0.01]))]
    figure = curve.together(views, 1120, 330)
    assert [shape.name for shape in figure.shapes if isinstance(shape, Line) and "hue" in shape.name] == [
        "best hue0",
        "best hue1",
    ]
    assert curve.together([View(Record("cpu-x", "t", {}))], 1120, 330) is None


@pytest.mark.parametrize(
    "low, high, most, ticks",
    (
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (0.9697, 0.9979, 6, [0.97, 0.975, 0.98, 0.985, 0.99, 0.995]),
        (-3.2, 3.1, 4, [-2, 0, 2]),
    ),
)
def test_ticks_are_round(low, high, most, ticks):
    found, _ = nice(low, high, most)
    assert found == pytest.approx(ticks)


def test_ticks_are_told_apart():
    found, step = nice(0.9697, 0.9979, 6)
    texts = [fixed(tick, step) for tick in found]
    assert len(set(texts)) == len(texts) and texts[1] == "0.975"
    assert nice(0, 3, 9, whole=True) == ([0, 1, 2, 3], 1.0)


def like(content, colour):
    """How many pixels have about this colour."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    return (abs(pixels - colour) <= 40).all(axis=2).sum()


GREEN, BLUE = (0x0B, 0x7A, 0x5B), (0x3B, 0x5B, 0xDB)


def test_the_picture_is_a_png_with_the_line_in_it():
    content = png.png(curve.card([View(session(40))]))
    image = Image.open(io.BytesIO(content))
    assert image.size == (1200, 630) and image.format == "PNG" and len(content) < 300_000
    assert like(content, GREEN) > 1000 and like(content, BLUE) == 0
    assert curve.card([View(Record("cpu-x", "t", {}))]) is None


def test_the_picture_of_several_has_a_line_for_each():
    content = png.png(curve.card([View(session(40)), View(session(30, tag="b", sd=0.01))]))
    assert like(content, GREEN) > 500 and like(content, BLUE) > 500
