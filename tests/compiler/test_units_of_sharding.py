"""What is gathered together where ranks hold parts of parameters: no ranks are needed to tell."""

from __future__ import annotations

import pytest
from torch import nn

from graphopt import Pass, Plan
from graphopt.compiler.units import Units, units_of
from graphopt.ir.blocks import find_blocks
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from tests.distributed.runs import plan


def units(made: Plan, module: nn.Module | None = None) -> Units:
    return units_of(module or made.module, [block.paths for block in find_blocks(made.graph)])


def leaves(block: int) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.{leaf}" for leaf in ("conv1", "norm1", "conv2", "norm2"))


@pytest.mark.parametrize("passes", [[], [Checkpoint(segments=2)], [Drop(mode="bypass", probability=0.5)], [Freeze(select="blocks.1")]])
def test_a_unit_is_the_leaves_of_a_block(passes: list[Pass]) -> None:
    """Whatever sections they are in; the root has what lies around the blocks, and what its graph reads."""
    found = units(plan(passes))
    assert found.blocks == tuple(map(leaves, range(4)))
    assert found.root == ("fc.bias", "fc.weight", "shift", "stem.bias", "stem.weight")
    assert not (found.sections or found.replicated or found.unused)


def test_a_section_with_its_own_backward_is_a_unit_with_its_auxiliary_part() -> None:
    found = units(plan([Supervise(modules=2)]))
    (first,) = found.sections
    assert first.leaves == ("stem", *leaves(0), *leaves(1), "supervise.0")
    assert found.blocks == (leaves(2), leaves(3))
    assert found.root == ("fc.bias", "fc.weight", "shift")


def test_a_frozen_section_is_gathered_block_by_block() -> None:
    found = units(plan([Freeze(select=("stem", "blocks.0", "blocks.1")), Supervise(modules=2)]))
    assert found.sections == ()
    assert found.blocks == tuple(map(leaves, range(4)))


def test_scalars_stay_whole_and_sources_of_mixes_belong_to_the_root() -> None:
    found = units(plan([Share(select="blocks.1")]))
    assert found.replicated == ("blocks.1.share.a", "blocks.1.share.b")
    assert {"blocks.0.conv1.weight", "blocks.2.conv2.weight"} <= set(found.root)
    assert found.blocks[0] == ("blocks.0.norm1", "blocks.0.norm2")


def test_every_parameter_is_in_one_place_and_a_dropped_prefix_in_none() -> None:
    made = plan([Drop(upto="blocks.1", cache="none"), Share(select="blocks.2", when={"epoch": 0})])
    for module in (made.module, made.suffix):
        found = units(made, module)
        paths = [path for block in (*found.blocks, *(s.leaves for s in found.sections)) for path in block]
        inside = [f"{path}.{name}" for path in paths for name, _ in module.get_submodule(path).named_parameters()]
        names = [*inside, *found.root, *found.replicated, *found.unused]
        assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert {"stem.weight", "shift", "blocks.0.conv1.weight"} <= set(units(made, made.suffix).unused)
