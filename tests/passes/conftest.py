"""What the tests of every pass share."""

from functools import cache

import pytest

from graphopt.tracing import trace


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that is compiled several times in one test is traced once: a plan leaves the graph as it was."""
    monkeypatch.setattr("graphopt.driver.trace", cache(trace))
