"""The garbage collector rests while graphs are made, and goes on afterwards as before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from graphopt.ir.collector import uncollected


@pytest.fixture(params=[True, False])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether collections run outside."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


@uncollected()
def failing() -> None:
    with uncollected():
        pass
    assert not gc.isenabled()
    raise KeyError


def test_it_rests_inside_and_is_as_before_after_an_error(enabled: bool) -> None:
    with pytest.raises(KeyError):
        failing()
    assert gc.isenabled() is enabled
