"""The report in a real browser: on a phone, on a desk, in the dark and on paper."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize

from tessera.cli.exp_report import page_of, write_whole
from tessera.runs import Run
from tessera.tracking.annotations import annotate
from tests.services.browser import chromium, requests_of

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
bench = importlib.import_module("fabricate").bench

PHONE: ViewportSize = {"width": 390, "height": 844}
DESK: ViewportSize = {"width": 1200, "height": 900}
SMALL: ViewportSize = {"width": 320, "height": 700}
LONG_WORD = "Donaudampfschifffahrtsgesellschaft" * 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def long_runs() -> Any:
    return importlib.import_module("long_run")


def written(bench: Bench, run: Run) -> Path:
    path = bench.folder / f"{run.id}.html"
    write_whole(path, page_of(bench.root, run))
    return path


def pages(bench: Bench, long_runs: Any) -> dict[str, Path]:
    """The pages that are looked at: a long run, a fine-tuning, an empty run, one of long words."""
    base = long_runs.long_run(bench)
    voice = long_runs.voice(bench, base)
    odd = bench.create("odd")
    annotate(bench.root, odd.id, "note", f"<script>alert(1)</script> {LONG_WORD}")
    annotate(bench.root, odd.id, "tag", LONG_WORD, key="word")
    writer = bench.launch(odd, device=LONG_WORD, instance=LONG_WORD, price_note=LONG_WORD)
    writer.steps(1, 5)
    writer.journal.event("run/diverged", 5, reason=LONG_WORD)
    writer.end("FAILED", 5, exit_code=1)
    runs = {"long": base, "voice": voice, "empty": bench.create("empty"), "odd": odd}
    return {name: written(bench, run) for name, run in runs.items()}


def test_no_request_leaves_and_nothing_overflows(
    bench: Bench, browser: Browser, long_runs: Any
) -> None:
    for name, path in pages(bench, long_runs).items():
        for size in (PHONE, DESK, SMALL):
            page = browser.new_page(viewport=size)
            asked, said = requests_of(page), messages_of(page)
            page.goto(path.as_uri())
            assert asked == [path.as_uri()], name
            open_all(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], name
            assert sticking_out(page) == [], name
            assert said == [], name
            page.close()


def messages_of(page: Page) -> list[str]:
    """What the browser complains of: a script that ran, a style that the policy forbade."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("pageerror", lambda error: said.append(str(error)))
    return said


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")


def sticking_out(page: Page) -> list[str]:
    """Elements wider than the window that do not lie in something that scrolls."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('.scroll') && !e.closest('svg'))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    return found


def test_a_style_that_the_policy_forbids_would_be_noticed(browser: Browser) -> None:
    page = browser.new_page()
    said = messages_of(page)
    page.set_content(
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
        "<style>p { color: red }</style><p>text"
    )
    page.wait_for_timeout(100)
    assert said


def test_what_is_told_to_those_who_do_not_see(
    bench: Bench, browser: Browser, long_runs: Any
) -> None:
    for path in pages(bench, long_runs).values():
        page = browser.new_page(viewport=DESK)
        page.goto(path.as_uri())
        drawings = page.get_by_role("img").all()
        assert len(drawings) == page.locator("svg").count()
        for drawing in drawings:
            told = drawing.aria_snapshot()
            assert re.search(r'img "[^"]{20,}', told), told
            name = page.evaluate(
                "e => e.getAttribute('aria-labelledby').split(' ')"
                ".map(id => document.getElementById(id).textContent)",
                drawing.element_handle(),
            )
            assert len(name) == 2
            assert re.search(r"\d", name[1]), name
        levels = [int(h.evaluate("e => e.tagName")[1]) for h in page.get_by_role("heading").all()]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        for region in page.get_by_role("region").all():
            assert region.get_attribute("aria-label") or region.get_attribute("aria-labelledby")
        for table in page.locator("table").all():
            assert table.locator("caption").count() == 1
            assert table.locator("th:not([scope])").count() == 0
        assert page.locator("main").count() == 1
        assert page.title()
        page.close()


CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.map(v => { v /= 255;
        return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const behind = e => { for (; e; e = e.parentElement) {
        const c = parse(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c.slice(0, 3) }
        return [255, 255, 255] };
    const found = [];
    for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility() || e.closest('desc, title')) continue;
        const style = getComputedStyle(e);
        const ink = parse(e.closest('svg') ? style.fill : style.color).slice(0, 3);
        const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), e.tagName + ' ' + e.textContent.slice(0, 40)]);
    }
    return found }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(
    bench: Bench, browser: Browser, long_runs: Any, scheme: Any
) -> None:
    for path in pages(bench, long_runs).values():
        page = browser.new_page(viewport=DESK, color_scheme=scheme)
        page.goto(path.as_uri())
        open_all(page)
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 40
        assert [found for found in contrasts if found[0] < 4.5] == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
        page.close()


def test_on_paper_everything_is_there_and_no_chart_is_cut(
    bench: Bench, browser: Browser, long_runs: Any
) -> None:
    found = pages(bench, long_runs)
    page = browser.new_page(viewport=DESK, color_scheme="dark")
    page.goto(found["voice"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.locator("details.data:visible").count()
    assert hidden == 0
    shown = page.locator("section[aria-labelledby=again] details pre")
    assert shown.evaluate("e => e.getBoundingClientRect().height") > 100
    assert page.locator("figure").count() > 3
    for figure in page.locator("figure").all():
        assert figure.evaluate("e => getComputedStyle(e).breakInside") == "avoid"
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    sheets = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert 2 <= sheets <= 12


@pytest.mark.parametrize("name", ["long", "voice"])
def test_it_looks_like_something(bench: Bench, browser: Browser, long_runs: Any, name: str) -> None:
    path = pages(bench, long_runs)[name]
    for size in (PHONE, DESK):
        page = browser.new_page(viewport=size)
        page.goto(path.as_uri())
        for drawing in page.locator("svg").all():
            box = drawing.bounding_box()
            assert box is not None
            assert box["width"] > 250
            assert box["height"] > 40
        assert smallest_letters(page) >= 8.5
        shot = page.screenshot(full_page=True)
        assert len(shot) > 50_000
        page.close()


def smallest_letters(page: Page) -> float:
    """The height in pixels of the smallest letters of all drawings, as they are shown."""
    found: float = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('svg text')].map(t =>
            parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"""
    )
    return found
