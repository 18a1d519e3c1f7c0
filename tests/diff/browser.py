"""A real browser: headless Chromium through Playwright. Tests that need one are skipped where there is none, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from graphopt.diff.render.picture import browser


def _missing() -> str | None:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None if browser() else "there is no Chromium (apt-get install chromium)"


@contextmanager
def opened() -> Iterator[Callable[..., Any]]:
    """`open(path, width=1280, height=800, dark=False) -> page`; any console error or warning fails the test at the end.

    Skips where there is no browser, unless GRAPHOPT_REQUIRE_BROWSER=1: then that is a failure.
    """
    why = _missing()
    if why and os.environ.get("GRAPHOPT_REQUIRE_BROWSER") == "1":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])

        def open_page(path: Path, *, width: int = 1280, height: int = 800, dark: bool = False, **options: Any) -> Any:
            viewport = {"width": width, "height": height}
            page = chromium.new_context(viewport=viewport, color_scheme="dark" if dark else "light", **options).new_page()
            page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: said.append(str(e)))
            page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "about:", "data:")) else None)
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            return page

        yield open_page
        chromium.close()
    assert said == []
    assert asked == []
