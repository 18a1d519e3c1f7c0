"""drop with supervise in one plan."""

from __future__ import annotations

import pytest
import torch

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


def test_what_is_left_behind_the_cut_takes_targets_also_where_no_local_module_is_left():
    passes = [Drop(upto="blocks.2"), Supervise(cuts=["blocks.0"])]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), costs=False)
    x, target = torch.rand(2, 3, 8, 8), torch.arange(2)
    whole, suffix = plan.module.train()(x, target), plan.suffix.train()(plan.prefix(x), target)
    assert plan.needs.targets
    assert all(torch.equal(a, b) for a, b in zip(whole, suffix, strict=True))
    assert isinstance(plan.suffix.eval()(plan.prefix(x)), torch.Tensor)
