"""Charts: what is drawn where, as SVG and as PNG."""

import io
import itertools

import numpy as np
import pytest
import records
from PIL import Image
from records import analysed
from report_records import begun, replayed, session, source

from lab.report import charts, page
from lab.report.charts import overlapping
from lab.session.events import Patch, RunEnded, RunStarted

DESK, PHONE = (1120, 430), (360, 330)


def drawn(analysis, size=DESK):
    return charts.progress(analysis, "s0", *size)


def artists(chart, name):
    return [artist for artist in chart.figure.findobj() if artist.get_gid() == name]


def by_number(chart):
    return {number: (x, y) for x, y, number in chart.spots}


def marks(chart, name):
    """How many marks of a kind there are."""
    (artist,) = artists(chart, name) or [None]
    if artist is None:
        return 0
    if hasattr(artist, "get_offsets"):
        return len(artist.get_offsets())
    return np.isfinite(artist.get_xdata()).sum() // (2 if artist.get_marker() == "None" else 1)


def test_each_experiment_is_drawn_once_where_it_belongs():
    analysis = session(40)
    chart = drawn(analysis)
    counts = {name: marks(chart, name) for name in charts.SIGNS}
    assert counts["kept"] == 9 and counts["crash"] == analysis.counts["crash"] > 3
    assert counts["near"] + counts["discard"] + counts["far"] == analysis.counts["discard"]
    spots = by_number(chart)
    assert list(spots) == list(analysis.experiments)
    scored = sorted((number for number in analysis.scores if spots[number][1] > 40), key=analysis.scores.get)
    heights = [spots[number][1] for number in scored]
    assert heights == sorted(heights, reverse=True)  # lower scores are lower


def test_a_superseded_change_is_not_drawn_as_a_crash():
    chart = drawn(session(6, then=lambda builder: builder.change(7, [1.1], "superseded", onto=5)))
    assert marks(chart, "moved") == 1 and marks(chart, "crash") == 0
    assert any(meaning.startswith("superseded") for _, _, meaning in chart.legend)


def test_the_line_is_the_best_so_far():
    analysis = session(20)
    (line,) = artists(drawn(analysis), "best")
    xs, ys = line.get_data()
    assert line.get_drawstyle() == "steps-post" and list(xs) == [0, 5, 10, 15, 20, 20]
    assert list(ys[:-1]) == [analysis.scores[number] for number in xs[:-1]] and list(ys) == sorted(ys, reverse=True)


def test_the_band_is_one_standard_deviation_to_each_side():
    analysis = session(22, sd=0.01)
    chart = drawn(analysis)
    (band,) = artists(chart, "band")
    at_end = [y for x, y in band.get_paths()[0].vertices if x == 22]
    assert max(at_end) - min(at_end) == pytest.approx(2 * 0.01)
    assert any("one standard deviation" in meaning for _, _, meaning in chart.legend)


def test_without_repeats_there_is_no_band():
    chart = drawn(session(20, sd=None))
    assert not artists(chart, "band") and not any("deviation" in meaning for _, _, meaning in chart.legend)


def test_one_that_failed_badly_does_not_flatten_the_rest():
    chart = drawn(session(20, then=lambda builder: builder.change(21, [9.0])))
    assert marks(chart, "far") == 1 and marks(drawn(session(20)), "far") == 0
    assert by_number(chart)[20][1] - by_number(chart)[0][1] > 100


@pytest.mark.parametrize("size", (DESK, PHONE))
def test_labels_lie_in_the_chart_and_not_on_each_other(size):
    chart = drawn(session(100), size)
    labels = artists(chart, "label")
    assert len(labels) > 3 and all(label.get_url().startswith("#s0-e") for label in labels)
    charts.png(chart)  # which knows how wide letters are
    boxes = [label.get_window_extent() for label in labels]
    assert all(0 <= box.x0 and box.x1 <= size[0] + 1 and 0 <= box.y0 and box.y1 <= size[1] for box in boxes)
    boxes = [(box.x0 + 2, box.y0 + 2, box.x1 - 2, box.y1 - 2) for box in boxes]
    assert not any(overlapping(one, np.array([other])) for one, other in itertools.combinations(boxes, 2))


def test_time_adds_up():
    analysis = session(20)
    shares = analysis.shares
    assert sum(shares.values()) == pytest.approx(analysis.hours)
    runs = sum(map(len, analysis.runs.values()))
    assert shares["training the changes"] == pytest.approx(runs * 300 / 3600)
    assert shares["starting, compiling and evaluating runs"] == pytest.approx(runs * 40 / 3600)
    within = sum(hours for what, hours in shares.items() if not what.startswith("between runs"))
    assert within == pytest.approx(runs * 340 / 3600)


def test_the_time_of_each_of_several_devices_counts():
    builder = records.session(time=1000.0)
    for number in range(1, 9):
        builder.open(number)
        builder.run(number, 1.0, worker=f"cuda:{number % 2}")
        builder.time -= 340.0 * (number % 2)  # the other device's begins with it
        builder.decide(number, "discard")
    analysis = records.analysed(builder)
    idle = analysis.shares["time between runs, crashed runs, proposing changes"]
    assert idle == pytest.approx(2 * analysis.hours - sum(run.seconds for run in builder.state.runs.values()) / 3600)


def test_runs_beside_others_and_confirmations_are_told_apart():
    def more(builder):
        builder.again(3, 0, [1.2]).confirm(9, 0, [1.2], [])

    analysis = session(4, then=more)
    shares = analysis.shares
    assert shares["training again: parents and further runs"] == pytest.approx(300 / 3600)
    confirmed = session(5, then=lambda builder: builder.confirm(9, 5, [1.1], [1.2], (0.1, 0.1, 0.1)))
    assert confirmed.shares["confirmations"] == pytest.approx(2 * 340 / 3600)


def test_the_time_of_runs_that_are_no_changes_own_is_not_taken_for_time_between_runs():
    builder = begun().baseline((1.2,) * 2)
    patches = [Patch(f"published/{name}/{'a' * 12}", name, "A: 1 -> 2") for name in "ab"]
    builder.open(1, "shared", blob=builder.state.experiments[0].blob, patches=patches, pairs=3)
    for number, held in enumerate(([0], [1], []), 3):  # the last one is the parent alone
        builder.take(
            RunStarted(number=number, experiment=1, blob="f" * 40, budget=300.0, patches=held, time=builder.time)
        )
        builder.take(RunEnded(run=number, status="ok", result={"val_bpb": 1.19}, seconds=340.0))
        builder.time += 340.0
    builder.decide(1, "discard")
    builder.open(2, "transfer", blob="e" * 40)
    builder.run(2, 1.1)
    builder.decide(2)
    shares = analysed(builder).shares
    assert shares["training the changes"] == pytest.approx((2 + 2) * 300 / 3600)
    assert shares["training again: parents and further runs"] == pytest.approx(300 / 3600)
    assert shares["transfers to another size"] == pytest.approx(340 / 3600)
    assert not any(what.startswith("time between runs") for what in shares)


def test_further_runs_of_an_experiment_are_in_the_time_too():
    analysis = session(4, then=lambda builder: builder.again(9, 4, [1.2]))
    shares = analysis.shares
    assert shares["training again: parents and further runs"] == pytest.approx(300 / 3600)
    assert sum(shares.values()) == pytest.approx(analysis.hours)


def test_several_sessions_are_drawn_by_their_gain_and_replays_are_not():
    of = source([-0.01])
    chart = charts.gains([session(10), session(20, tag="other"), replayed(of, [-0.01])], 1120, 330)
    lines = artists(chart, "best")
    assert [line.get_color() for line in lines] == [charts.COLOURS[hue] for hue in ("best", "replay")]
    assert [hue for hue, _, _ in chart.legend] == ["best", "replay"]
    assert charts.gains([analysed(begun(), None)], 1120, 330) is None


def test_an_svg_has_the_pages_colours_and_no_styles():
    elements = list(charts.svg(drawn(session(12)), "a label", "x").iter())
    names = {name for element in elements for name in element.attrib}
    assert "style" not in names and not any(":" in name or "}" in name for name in names)
    paint = {element.get(name) for element in elements for name in ("fill", "stroke")} - {None, "none"}
    assert paint and all(colour.startswith("var(--") for colour in paint)
    assert {"var(--best)", "var(--near)", "var(--discard)", "var(--crash)"} <= paint
    ids = [element.get("id") for element in elements if element.get("id")]
    assert len(ids) == len(set(ids)) and all(name.startswith("x") for name in ids)
    same = [charts.svg(drawn(session(12)), "a label", "x") for _ in range(2)]
    assert same[0].attrib == same[1].attrib and [e.attrib for e in same[0].iter()] == [e.attrib for e in same[1].iter()]


def like(content, colour):
    """How many pixels have about this colour."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    return (abs(pixels - colour) <= 40).all(axis=2).sum()


GREEN, BLUE, GREY = (0x0B, 0x7A, 0x5B), (0x3B, 0x5B, 0xDB), (0x9A, 0xA0, 0xA8)


def test_the_picture_is_a_png_with_the_line_in_it():
    content = charts.card([session(40)], page.subtitle([session(40)]))
    image = Image.open(io.BytesIO(content))
    assert image.size == (1200, 630) and image.format == "PNG" and len(content) < 300_000
    assert like(content, GREEN) > 1000 and like(content, GREY) > 300 and like(content, BLUE) == 0
    assert charts.card([analysed(begun(), None)], "") is None


def test_the_picture_of_several_has_a_line_for_each():
    content = charts.card([session(40), session(30, tag="b", sd=0.01)], "")
    assert like(content, GREEN) > 500 and like(content, BLUE) > 500


def test_losses_of_a_change_are_drawn_beside_its_parents():
    curve = {"0.25": 5.0, "0.5": 4.0, "1": 3.5}
    builder = records.session(facts={"losses": curve}).change(1, [0.9], "keep", runs={"losses": curve | {"1": 3.2}})
    chart = charts.losses(records.analysed(builder), 1120, 330)
    assert [meaning for _, _, meaning in chart.legend] == ["0: baseline", "1: change 1"]
    assert [list(line.get_ydata()) for line in chart.axes.lines] == [[5.0, 4.0, 3.5], [5.0, 4.0, 3.2]]
    assert charts.losses(records.analysed(records.session(facts={"losses": curve})), 1120, 330) is None
    wrong = records.session(facts={"losses": {"nan": 1.0, "2": 3.0}}).change(1, [0.9], "keep")
    assert charts.losses(records.analysed(wrong), 1120, 330) is None
