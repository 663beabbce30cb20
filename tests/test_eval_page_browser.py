"""The page in a real browser: it sorts, fits a phone, follows light and dark, prints, and asks for nothing."""

import base64
import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_eval_leaderboard import table, write_run

from eval.composition import CompositionScores
from eval.report import report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)"
)


def czsl_table(seed: int, strength: float) -> CompositionScores:
    words = [(a, o) for a in ("red", "old", "wet") for o in ("hat", "cup")]
    target = np.arange(36) % len(words)
    scores = np.random.default_rng(seed).normal(size=(36, 6)) + strength * np.eye(6)[target]
    return CompositionScores(scores, target, np.array(words), np.arange(6) < 4, "test", "logit")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """A report on two tasks, 14 rows of one of them, with long names, commands and costs."""
    root = tmp_path_factory.mktemp("runs")
    backbones = ("clip:demo", "pe:demo", "siglip2:google/siglip2-so400m-patch16-naflex")
    for b, backbone in enumerate(backbones):
        for m, method in enumerate(("zero_shot", "csp", "tf_local", "late_maxsim", "sgi")):
            if (b, method) == (2, "sgi"):
                continue
            number = 5 * b + m
            facts: dict[str, Any] = {"parameters": 900 * m, "seconds": 1.5 * m + b}
            facts["command"] = (
                f"headstart train {method} --cache caches/a/long/path/{backbone}.zarr"
            )
            facts["costs"] = {
                "bytes_per_image": 2**b * (256 + 9000 * (m > 1)),
                "build_seconds": 9.5,
            }
            write_run(root, method, backbone, 0, table(number, 0.2 * m), **facts)
    for m, method in enumerate(("zero_shot", "csp")):
        write_run(root / "czsl", method, "clip:demo", 0, czsl_table(m, 1 + m), parameters=m)
    return report([root, root / "czsl"], tmp_path_factory.mktemp("made") / "report.html")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Seen:
    """What a page said and asked for while it was open."""

    def __init__(self, page: Any) -> None:
        self.errors: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))


def opened(browser: Any, file: Path, width: int = 1280, **options: Any) -> tuple[Any, Seen]:
    page = browser.new_page(viewport={"width": width, "height": 800}, **options)
    page.set_default_timeout(20_000)
    seen = Seen(page)
    page.goto(file.as_uri())
    return page, seen


def unfold(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")


BOARD = "section#matching-toy_world table.sorts >> nth=0"


def column(page: Any, head: int) -> list[str]:
    return [
        row.locator("th, td").nth(head).inner_text()
        for row in page.locator(BOARD).locator("tbody tr").all()
    ]


def numbers(page: Any, head: int) -> list[float]:
    cells = page.locator(BOARD).locator("tbody tr").all()
    return [float(row.locator("th, td").nth(head).get_attribute("data-value")) for row in cells]


def heads(page: Any) -> list[str]:
    return [
        text.split("\n")[0].strip()
        for text in page.locator(BOARD).locator("thead th").all_inner_texts()
    ]


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser, page_file):
    page, seen = opened(browser, page_file)
    unfold(page)
    page.evaluate("document.querySelectorAll('button.sort').forEach((button) => button.click())")
    assert page.locator("th[aria-sort]").count() > 5
    assert seen.errors == []
    assert {url for url in seen.asked if not url.startswith("data:")} == {page_file.as_uri()}
    page.close()


def test_a_broken_script_would_be_seen(browser, page_file, tmp_path):
    """The check above can fail."""
    broken = tmp_path / "broken.html"
    text = page_file.read_text(encoding="utf-8").replace("</main>", '<img src="x.png"></main>')
    broken.write_text(text.replace('"use strict";', '"use strict"; missing();'), encoding="utf-8")
    page, seen = opened(browser, broken)
    assert any("missing" in error for error in seen.errors)
    assert any(url.endswith("x.png") for url in seen.asked)
    page.close()


def test_a_header_sorts_up_down_and_back_to_the_original(browser, page_file):
    page, _ = opened(browser, page_file)
    names = heads(page)
    at = names.index("parameters")
    original, rows = numbers(page, at), column(page, 0)
    assert original != sorted(original)
    head = page.locator(BOARD).locator("thead th").nth(at)
    button = head.locator("button.sort")
    assert head.get_attribute("aria-sort") is None
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert numbers(page, at) == sorted(original)
    stable = sorted(zip(original, rows, strict=True), key=lambda pair: pair[0])
    assert column(page, 0) == [row for _, row in stable]
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert numbers(page, at) == sorted(original, reverse=True)
    stable.sort(key=lambda pair: -pair[0])
    assert column(page, 0) == [row for _, row in stable]
    button.click()
    assert head.get_attribute("aria-sort") is None
    assert column(page, 0) == rows
    page.close()


def test_another_header_takes_over_and_numbers_are_sorted_as_numbers(browser, page_file):
    page, _ = opened(browser, page_file)
    at = heads(page).index("parameters")
    table_heads = page.locator(BOARD).locator("thead th")
    table_heads.nth(0).locator("button").click()
    assert column(page, 0) == sorted(column(page, 0), key=str.lower)
    table_heads.nth(at).locator("button").click()
    assert table_heads.nth(0).get_attribute("aria-sort") is None
    shown = [int(text.replace(",", "")) for text in column(page, at)]
    assert shown == sorted(shown)
    assert shown != sorted(shown, key=str)  # as text they would stand in another order
    page.close()


def test_rows_without_a_number_stay_last_in_both_directions(browser, page_file):
    page, _ = opened(browser, page_file)
    at = heads(page).index("− zero_shot")
    button = page.locator(BOARD).locator("thead th").nth(at).locator("button")
    for _ in range(2):
        button.click()
        shown = column(page, at)
        assert shown.count("–") == 3
        assert shown[-3:] == ["–"] * 3
    page.close()


def test_the_keyboard_reaches_a_header_and_sorts(browser, page_file):
    page, _ = opened(browser, page_file)
    head = page.locator(BOARD).locator("thead th").nth(1)
    page.locator(BOARD).locator("thead th").nth(0).locator("button").focus()
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "sort by group_score"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    page.close()


def test_a_long_table_can_be_filtered_and_a_short_one_has_no_filter(browser, page_file):
    page, _ = opened(browser, page_file)
    shown = page.locator(BOARD).locator("tbody tr:visible")
    assert shown.count() == 14
    page.locator("section#matching-toy_world input.filter").first.fill("pe:demo SGI")
    assert shown.count() == 1
    page.locator("section#matching-toy_world input.filter").first.fill("")
    assert shown.count() == 14
    assert page.locator("section#czsl-toy_world input.filter").count() == 0
    page.close()


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_narrow_page_does_not_scroll_sideways_and_wide_tables_do_in_their_box(
    browser, page_file, width
):
    page, _ = opened(browser, page_file, width)
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator(BOARD).locator("xpath=..")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    assert box.evaluate("e => getComputedStyle(e).overflowX") == "auto"
    page.close()


def luminance(rgb: str) -> float:
    parts = [int(value) / 255 for value in re.findall(r"\d+", rgb)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_light_and_dark_are_both_readable_and_differ(browser, page_file):
    colours: dict[str, tuple[str, str]] = {}
    for scheme in ("light", "dark"):
        page, _ = opened(browser, page_file, color_scheme=scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for selector in ("body", ".soft", "th[scope=row] a", ".up, .down", "button.sort"):
            ink = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
            light, dark = sorted((luminance(paper), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector)  # WCAG AA
        ink = page.evaluate("getComputedStyle(document.body).color")
        colours[scheme] = (paper, ink)
        marks = page.locator("figure svg path[fill^='var(--s']").first
        assert marks.evaluate("e => getComputedStyle(e).fill") != "rgb(0, 0, 0)"
        page.close()
    assert luminance(colours["light"][0]) > 0.9
    assert luminance(colours["dark"][0]) < 0.1
    assert colours["light"][1] != colours["dark"][1]


def test_print_hides_what_only_a_screen_can_use(browser, page_file):
    page, _ = opened(browser, page_file)
    hidden = ("button.sort", "input.filter", "nav", "a.csv")
    assert all(page.locator(selector).first.is_visible() for selector in hidden)
    page.emulate_media(media="print")
    assert not any(page.locator(s).first.is_visible() for s in hidden)
    assert page.locator(BOARD).is_visible()
    assert (
        page.locator(BOARD).locator("xpath=..").evaluate("e => getComputedStyle(e).overflowX")
        == "visible"
    )
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_what_is_folded_is_printed_and_folded_again(browser, page_file):
    page, _ = opened(browser, page_file)
    shut = page.locator("details:not([open])").count()
    assert shut > 0
    page.evaluate(
        "addEventListener('beforeprint', () => window.shut = document.querySelectorAll('details:not([open])').length)"
    )
    page.pdf(format="A4")
    assert page.evaluate("window.shut") == 0
    assert page.locator("details:not([open])").count() == shut
    page.close()


def test_data_links_decode_to_tables(browser, page_file):
    page, _ = opened(browser, page_file)
    links = page.locator("a.csv").all()
    names = {link.get_attribute("download") for link in links}
    assert {"agreement.csv", "failures.csv", "group_score-parameters.csv"} <= names
    for link in links:
        address = link.get_attribute("href")
        head, _, code = address.partition(",")
        assert head == "data:text/csv;base64"
        rows = list(csv.reader(io.StringIO(base64.b64decode(code, validate=True).decode())))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    page.close()


def test_a_name_leads_to_its_run(browser, page_file):
    page, _ = opened(browser, page_file)
    link = page.locator(BOARD).locator("tbody th a").first
    method = link.inner_text()
    link.click()
    assert page.locator(".run:target").count() == 1
    assert f"headstart train {method} --cache" in page.locator(".run:target").inner_text()
    page.close()


def test_without_scripts_everything_still_reads(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("button").count() == 0
    assert page.locator(BOARD).locator("tbody tr").count() == 14
    context.close()
