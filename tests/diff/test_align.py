"""What became of every block, as passes declare it and the editor records it; and how two views are aligned."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from graphopt.compiler.triggers import AtEpoch
from graphopt.diff import Diff
from graphopt.diff.align import group_name
from graphopt.models.build import build
from graphopt.passes.freeze import Freeze
from tests.diff.passes import Adapter, Before, Blend, Ice, Part, Say, Skip, Store
from tests.diff.plans import plan
from tests.support.backbones import Hollow, Small, Twice


def statuses(found: Diff) -> dict[str, tuple[str, ...]]:
    return {r.name: r.statuses for r in found.rows if r.statuses != ("unchanged",)}


ROWS = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]

#: (passes, what is not as it was)
CASES = [
    ([], {}),
    ([Ice(select="blocks.0")], {"blocks.0": ("frozen",)}),
    ([Blend(select="blocks.1")], {"blocks.1": ("shared",)}),
    ([Skip(select="blocks.2")], {"blocks.2": ("bypassed",)}),
    ([Part(select="blocks.1")], {**dict.fromkeys(("stem", "blocks.0", "blocks.1"), ("isolated",)), "aux.0": ("inserted",)}),
    ([Store(select="blocks.0")], {"stem": ("dropped",), "blocks.0": ("dropped",)}),
    ([Ice(select=("stem", "blocks.0")), Store(select="blocks.0")], {"stem": ("dropped",), "blocks.0": ("dropped",)}),
    ([Say(select="blocks.3", status="checkpointed")], {"blocks.3": ("checkpointed",)}),
    ([Ice(select="blocks.1"), Say(select="blocks.1", status="checkpointed")], {"blocks.1": ("frozen", "checkpointed")}),
    ([Skip(select="blocks.2", declare=False)], {"blocks.2": ("rewired",)}),
    ([Adapter(select="blocks.1")], {"adapter": ("inserted",)}),
    ([Before(select="blocks.1")], {"blocks.1": ("rewired",)}),
]


@pytest.mark.parametrize(("passes", "expected"), CASES, ids=lambda v: "+".join(p.name for p in v) if isinstance(v, list) else "")
def test_every_status_is_found(passes: list, expected: dict) -> None:
    found = Diff.of(plan(*passes))
    assert statuses(found) == expected
    assert [r.name for r in found.rows if r.name not in ("aux.0", "adapter")] == ROWS
    json.dumps(found.to_dict())


def test_part_of_a_block_is_frozen_and_says_how_much() -> None:
    row = Diff.of(plan(Ice(select="blocks.2.conv1"))).after["blocks.2"]
    assert row.statuses == ("frozen",)
    assert row.detail["frozen"] == "1 of 6 tensors"
    assert [n.name for n in row.nodes if n.statuses == ("frozen",)] == ["blocks_2_conv1"]


def test_sharing_names_its_sources_and_coefficients() -> None:
    row = Diff.of(plan(Blend(select="blocks.1"))).after["blocks.1"]
    assert row.sources == ("blocks.0", "blocks.2")
    assert row.detail == {"a": 0.25}
    assert sum(n.statuses == ("inserted",) for n in row.nodes) == 12
    assert {n.name for n in row.nodes if n.statuses == ("bypassed",)} == {"blocks_1_conv1", "blocks_1_conv2"}


def test_where_the_backward_stops() -> None:
    assert Diff.of(plan()).after.gradient_stops == ()
    assert Diff.of(plan(Ice(select=("stem", "blocks.0")))).after.gradient_stops == (("blocks.0", "blocks.1"),)
    behind = Diff.of(plan(Ice(select="blocks.1"))).after
    assert behind.gradient_stops == ()  # a frozen block behind a training one passes the gradient on
    assert behind["blocks.1"].backward
    assert Diff.of(plan(Part(select="blocks.1"))).after.gradient_stops == (("blocks.1", "blocks.2"),)
    assert Diff.of(plan(Store(select="blocks.1"))).after.feature_input == "blocks.1"


def test_a_local_module_is_a_section_with_its_head_attached() -> None:
    found = Diff.of(plan(Part(select="blocks.1")))
    first, rest = found.after.sections
    assert first.rows == ("stem", "blocks.0", "blocks.1")
    assert rest.rows == ("blocks.2", "blocks.3", "head")
    head = found.after["aux.0"]
    assert (head.attached_to, head.section, head.kind) == ("blocks.1", "first", "Linear")
    assert ("blocks.1", "aux.0", "after") in found.edges


def test_an_undeclared_module_is_attached_to_what_it_reads() -> None:
    found = Diff.of(plan(Adapter(select="blocks.1")))
    assert [r.name for r in found.rows][2:5] == ["blocks.1", "adapter", "blocks.2"]
    assert (found.after["adapter"].attached_to, found.after["adapter"].passes) == ("blocks.1", (0,))


def test_two_passes_of_one_kind_are_told_apart() -> None:
    passes = [Freeze(select=("layer3.2",), when=AtEpoch(epoch=4)), Freeze(select=("conv1", "bn1", "layer1.0"))]
    found = Diff.of(plan(*passes, model=build("cifar", "resnet20"), input=(3, 32, 32))).after
    assert [p.active for p in found.passes] == [False, True]
    assert {r.name: r.passes for r in found.rows if r.passes} == {"stem": (1,), "layer1.0": (1,)}
    assert {n.changed_by for n in found["stem"].nodes} <= {None, 1}


def test_an_edit_of_two_passes_names_both() -> None:
    row = Diff.of(plan(Ice(select="blocks.1"), Blend(select="blocks.1"))).after["blocks.1"]
    assert row.statuses == ("shared", "frozen")
    assert row.passes == (0, 1)


@pytest.mark.parametrize("model", [Small(), Twice(), Hollow()])
def test_a_clone_has_the_names_of_its_original(model: nn.Module) -> None:
    """Rows and phases are matched by the names of nodes."""
    base = plan(model=model).base
    assert [n.name for n in base.clone().nodes] == [n.name for n in base.nodes]


def test_rows_say_which_pass_and_why() -> None:
    found = Diff.of(plan(Say(select="blocks.3", status="checkpointed"), Ice(select="blocks.0")))
    row = found.after["blocks.0"]
    assert row.passes == (1,)
    assert row.messages == ("ice: cold <b>here</b>",)
    assert found.after.passes[1].text == '[[pass]]\nuse = "ice"\nselect = "blocks.0"'


def test_equal_neighbours_are_grouped() -> None:
    names = [g.name for g in Diff.of(plan(Ice(select=("stem", "blocks.0")))).groups()]
    assert names == ["stem", "blocks.0", "blocks.1-3 ×3", "head"]
    assert [g.name for g in Diff.of(plan()).groups()] == ["stem", "blocks.0-3 ×4", "head"]


@pytest.mark.parametrize(
    ("names", "grouped"),
    [
        (["layer3.2", "layer3.3", "layer3.4", "layer3.5"], "layer3.2-5 ×4"),
        (["features.0-2", "features.3-5"], "features.0-5 ×2"),
        (["encoder.layer_a", "encoder.layer_b"], "encoder.layer_a-layer_b ×2"),
        (["a.0", "b.0"], "a.0 … b.0 ×2"),
        (["0", "1"], "0-1 ×2"),
        (["stem"], "stem"),
    ],
)
def test_names_of_groups(names: list[str], grouped: str) -> None:
    assert group_name(names) == grouped


def test_the_same_twice_is_the_same_to_the_byte() -> None:
    passes = [Blend(select="blocks.1"), Ice(select="blocks.3")]
    one, other = (json.dumps(Diff.of(plan(*passes)).to_dict()) for _ in range(2))
    assert one == other


def test_costs_of_rows_add_up_to_the_reports() -> None:
    made = plan(Ice(select=("stem", "blocks.0")), costs=True)
    found = Diff.of(made)
    for key in ("parameters", "trainable_parameters", "forward_flops", "backward_flops"):
        assert sum(r.before[key] for r in found.rows if r.before) == getattr(made.report.before, key)
        assert sum(r.after[key] for r in found.rows if r.after) == getattr(made.report.after, key)
    assert found.after["blocks.0"].after["saved_activation_bytes"] == 0


def test_two_plans_of_one_backbone() -> None:
    found = Diff.of(plan(Ice(select="blocks.0")), plan(Ice(select="blocks.1"), Say(select="blocks.3", status="checkpointed")))
    assert found.same_backbone
    assert {r.name: (r.was, r.statuses) for r in found.rows if r.changed} == {
        "blocks.0": (("frozen",), ("unchanged",)),
        "blocks.1": (("unchanged",), ("frozen",)),
        "blocks.3": (("unchanged",), ("checkpointed",)),
    }


class Other(nn.Module):
    """Shares stem and first blocks by name with `Small`, but is wider behind."""

    def __init__(self) -> None:
        super().__init__()
        small = Small(blocks=2)
        self.stem, self.blocks = small.stem, small.blocks
        self.neck = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.neck(self.blocks(self.stem(x)))).mean((2, 3)))


def test_two_backbones_share_what_they_share() -> None:
    found = Diff.of(plan(), plan(Ice(select="blocks.0"), model=Other()))
    assert not found.same_backbone
    assert statuses(found) == {
        "blocks.0": ("frozen",),
        "blocks.2": ("removed",),
        "blocks.3": ("removed",),
        "head": ("differs",),
    }
    assert "rows: 3 the same in both, 1 different, 2 only in the first, 0 only in the second" in found.notes[0]
    assert [r.name for r in found.rows] == ROWS
    json.dumps(found.to_dict())


def test_a_backbone_without_blocks() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert [r.name for r in Diff.of(plan(Ice(select="1"), model=model)).rows] == ["0", "1"]
