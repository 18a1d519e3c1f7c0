"""A real browser: headless Chromium through Playwright. Tests that need one are skipped where there is none, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _executable() -> str | None:
    from graphopt.diff.render.picture import browser  # not at the top: conftest.py imports this file, in every process of the tests

    return browser()


def _missing() -> str | None:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None if _executable() else "there is no Chromium (apt-get install chromium)"


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    """The one tab in which the pages of a module open; a tab of its own for each of them would take most of a test's time.

    Skips where there is no browser, unless GRAPHOPT_REQUIRE_BROWSER=1: then that is a failure.
    """
    why = _missing()
    if why and os.environ.get("GRAPHOPT_REQUIRE_BROWSER") == "1":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=_executable(), args=["--no-sandbox", "--disable-gpu"])
        yield chromium.new_page()
        chromium.close()


@pytest.fixture
def browse(tab: Any) -> Iterator[Callable[..., Any]]:
    """`browse(path, width=1280, height=800, dark=False) -> page`; any console error or warning, and any request, fails the test."""
    said: list[str] = []
    listeners = {
        "console": lambda m: said.append(m.text) if m.type in ("error", "warning") else None,
        "pageerror": lambda e: said.append(str(e)),
        "request": lambda r: said.append(r.url) if not r.url.startswith(("file:", "about:", "data:")) else None,
    }

    def open_page(path: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> Any:
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme="dark" if dark else "light")
        tab.mouse.move(0, 0)
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    for event, listener in listeners.items():
        tab.on(event, listener)
    yield open_page
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert said == []
