"""A real browser, Debian's Chromium without a window, driven by Playwright.

with chromium() as browser:
    page = browser.new_page(viewport={"width": 390, "height": 844})
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

from tests.services import debian

PACKAGES = {"chromium": "chromium"}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser process; it is installed where it is missing (root on Debian)."""
    debian.install(PACKAGES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=debian.find("chromium"), args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


def requests_of(page: Page) -> list[str]:
    """Every URL that the page asks for from now on; the list fills while it is used."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    return asked
