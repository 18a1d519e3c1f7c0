"""The families' backbones are made and traced once: compiling leaves both as they were."""

from functools import cache

import pytest

from graphopt.tracing import trace

TRACE = cache(trace)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.driver.trace", TRACE)
