"""drop with supervise in one plan."""

from __future__ import annotations

import pytest

import graphopt
from graphopt.errors import PassError
from graphopt.passes.drop import Drop
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small


def test_a_prefix_that_is_supervised_locally_is_refused():
    passes = [Supervise(modules=2, decoder="none"), Drop(upto="blocks.0")]
    with pytest.raises(PassError) as caught:
        graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), costs=False)
    assert "\n" not in str(caught.value)
    assert "supervise" in str(caught.value)
