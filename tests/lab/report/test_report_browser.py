"""The page in Chromium: nothing hostile runs, nothing is loaded, and it fits a phone. Skipped without Chromium."""

import re
import shutil

import pytest
from report_records import HOSTILE, replayed, session, source

from lab.report import page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install '.[browser]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """show(content, size=DESK, **more) -> the page, with what it asked for and complained of."""

    def show(content, size=DESK, **more):
        path = tmp_path / "report.html"
        path.write_bytes(content)
        opened = chromium.new_page(viewport=size, **more)
        opened.asked, opened.errors = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto(path.as_uri())
        opened.uri = path.as_uri()
        return opened

    return show


def open_all(shown):
    for button in shown.query_selector_all(".experiments tbody th button"):
        button.click()


@pytest.mark.parametrize("size", (DESK, PHONE), ids=("desk", "phone"))
def test_nothing_hostile_runs_and_nothing_is_loaded(show, size):
    hostile = session(27, texts=HOSTILE, notes=HOSTILE, backend=HOSTILE[0])
    shown = show(page.written([hostile, session(9, tag="other", texts=HOSTILE)]), size)
    open_all(shown)
    shown.hover(".chart")
    shown.wait_for_timeout(200)
    assert shown.evaluate("window.pwned") is None
    assert shown.asked == [shown.uri] and not shown.errors
    assert shown.locator("pre").count() == 36 and shown.locator("pre script, pre img, pre svg").count() == 0
    assert shown.locator("pre").first.inner_text() == HOSTILE[1]


def test_the_policy_stops_what_would_get_in_all_the_same(show):
    """A second wall; and without it these are seen to run, so that the test above tells something."""
    content = page.written([session(3)])
    hostile = content.replace(b"</main>", b"<img src=x onerror=window.pwned=1><script>window.pwned=1</script></main>")
    shown = show(hostile)
    shown.wait_for_timeout(200)
    assert shown.evaluate("window.pwned") is None and shown.locator(".experiments tbody th button").count() == 4
    open_wall = re.sub(rb'<meta http-equiv="Content-Security-Policy"[^>]*>', b"", hostile)
    shown = show(open_wall)
    shown.wait_for_function("window.pwned === 1")


def pages():
    of = source([-0.02, -0.01, -0.015, -0.001])
    long = session(12, texts=["x" * 500, "many words " * 30], tag="t" * 60)
    yield "one", [session(40)]
    yield "long", [long]
    yield "several", [of, replayed(of, [-0.02, -0.002, 0.012, -0.001]), long]


@pytest.mark.parametrize("records", [pytest.param(records, id=name) for name, records in pages()])
@pytest.mark.parametrize("size", (DESK, PHONE), ids=("desk", "phone"))
def test_the_page_never_scrolls_sideways(show, records, size):
    shown = show(page.written(records), size)
    open_all(shown)
    assert shown.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert not shown.errors


def paper(shown):
    return shown.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark_by_the_system_and_by_the_switch(show):
    content = page.written([session(5)])
    light, dark = (paper(show(content, color_scheme=scheme)) for scheme in ("light", "dark"))
    assert light != dark
    shown = show(content, color_scheme="dark")
    shown.click("#theme")
    assert paper(shown) == light and shown.inner_text("#theme") == "Dark"
    shown.click("#theme")
    assert paper(shown) == dark


def shown_numbers(shown):
    return [
        int(text) for text in shown.locator(".experiments > table > tbody > tr:not([hidden]) > th").all_inner_texts()
    ]


def test_the_experiments_are_sorted_and_filtered(show):
    record = session(40)
    shown = show(page.written([record]))
    assert shown_numbers(shown) == list(record.experiments)
    head = shown.locator(".experiments thead th", has_text="val_bpb")
    for order, reverse in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        scores = record.scores
        numbers = shown_numbers(shown)
        assert numbers[: len(scores)] == sorted(scores, key=lambda number: round(scores[number], 6), reverse=reverse)
        assert set(numbers[len(scores) :]) == record.experiments.keys() - scores.keys()  # the unknown last, both ways
    shown.select_option("select", "crashed")
    assert {record.experiments[number].status for number in shown_numbers(shown)} == {"crash"}
    shown.fill("input", "no such words")
    assert shown_numbers(shown) == [] and shown.inner_text("output") == "0 of 41 shown"


def test_a_chart_is_read_by_keyboard_and_leads_to_the_table(show):
    shown = show(page.written([session(10)]))
    shown.focus("#s0-progress")
    for _ in range(3):
        shown.keyboard.press("ArrowRight")
    tip = shown.inner_text("#tip")
    assert tip.startswith("2 · discarded · ") and "change 2 of the depth" in tip
    shown.keyboard.press("Enter")
    assert shown.is_hidden("#tip") and "+DEPTH = 3" in shown.inner_text("pre")
    assert shown.evaluate("document.activeElement.closest('tr').id") == "s0-e2"
    shown.keyboard.press("Enter")
    assert shown.locator("pre").count() == 0


def test_a_label_leads_to_its_row(show):
    shown = show(page.written([session(10)]))
    shown.click("#s0-progress .label a >> nth=0")
    assert "+DEPTH" in shown.inner_text("pre") and shown.uri == shown.url


def test_a_tap_tells_what_it_hits(show):
    shown = show(page.written([session(10)]), PHONE, has_touch=True, is_mobile=True)
    x, y = shown.evaluate("""() => {
        const svg = document.getElementById("s0-progress");
        const [, x, y] = JSON.parse(document.getElementById("data").textContent).charts[svg.id];
        svg.scrollIntoView({block: "center"});
        const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
        return [box.left + x * scale, box.top + y * scale];
    }""")
    shown.touchscreen.tap(x, y)
    assert shown.inner_text("#tip").startswith("0 · baseline · 1.199")
    box = shown.locator("#tip").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 375


def test_two_thousand_experiments(show):
    shown = show(page.written([session(2000)]))
    assert shown.inner_text("output") == "2001 of 2001 shown" and not shown.errors
    shown.fill(".experiments input", "change 1999")
    assert shown_numbers(shown) == [1999]
    shown.click("#s0-e1999 th button")
    assert "+DEPTH = 2000" in shown.inner_text("pre")


def test_without_scripts_everything_but_the_diffs_is_there(show):
    shown = show(page.written([session(10)]), java_script_enabled=False)
    assert "better than the baseline" in shown.inner_text("main") and shown.locator("#s0-progress").is_visible()
    assert shown.locator(".experiments tbody tr").count() == 11 and shown.locator("form").is_hidden()
