"""What became of every block, told from the graph alone or from what a pass says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from graphopt.diff import Diff, diff
from graphopt.diff.join import fold_name
from tests.diff.passes import Blend, Ice, Part, Say, Skip, Store
from tests.diff.plans import plan
from tests.support.backbones import Small


def statuses(found: Diff) -> dict[str, tuple[str, ...]]:
    return {r.name: r.statuses for r in found.rows if r.statuses != ("kept",)}


ROWS = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]

#: (passes, what is not as it was)
CASES = [
    ([], {}),
    ([Ice(select="blocks.0")], {"blocks.0": ("frozen",)}),
    ([Blend(select="blocks.1")], {"blocks.1": ("shared",)}),
    ([Skip(select="blocks.2")], {"blocks.2": ("bypassed",)}),
    ([Part(select="blocks.1")], {"blocks.1": ("isolated",), "aux.0": ("inserted",)}),
    ([Store(select="blocks.0")], {"stem": ("dropped",), "blocks.0": ("dropped",)}),
    ([Ice(select=("stem", "blocks.0")), Store(select="blocks.0")], {"stem": ("dropped",), "blocks.0": ("dropped",)}),
    ([Say(select="blocks.3", status="checkpointed")], {"blocks.3": ("checkpointed",)}),
    ([Ice(select="blocks.1"), Say(select="blocks.1", status="checkpointed")], {"blocks.1": ("frozen", "checkpointed")}),
    ([Say(select="fc", status="quantised")], {"head": ("quantised",)}),
]


@pytest.mark.parametrize(("passes", "expected"), CASES, ids=lambda v: "+".join(p.use for p in v) if isinstance(v, list) else "")
def test_every_status_is_found(passes: list, expected: dict) -> None:
    found = diff(plan(*passes))
    assert statuses(found) == expected
    assert [r.name for r in found.rows if r.beside is None] == ROWS
    json.dumps(found.to_dict())


def test_part_of_a_block_is_frozen_and_says_how_much() -> None:
    row = diff(plan(Ice(select="blocks.2.conv1"))).after["blocks.2"]
    assert row.statuses == ("frozen",)
    assert row.detail["frozen"] == "1 of 6 tensors"
    assert [n.name for n in row.nodes if n.statuses == ("frozen",)] == ["blocks_2_conv1"]


def test_sharing_names_its_sources_and_coefficients() -> None:
    row = diff(plan(Blend(select="blocks.1"))).after["blocks.1"]
    assert row.sources == ("blocks.0", "blocks.2")
    assert row.detail == {"a": 0.25}
    assert sum(n.statuses == ("inserted",) for n in row.nodes) == 12
    assert {n.name for n in row.nodes if n.statuses == ("bypassed",)} == {"blocks_1_conv1", "blocks_1_conv2"}


def test_where_the_backward_stops() -> None:
    assert diff(plan()).after.frontier == ()
    assert diff(plan(Ice(select=("stem", "blocks.0")))).after.frontier == (("blocks.0", "blocks.1"),)
    behind = diff(plan(Ice(select="blocks.1"))).after
    assert behind.frontier == ()  # a frozen block behind a training one passes the gradient on
    assert behind["blocks.1"].backward
    assert diff(plan(Part(select="blocks.1"))).after.frontier == (("blocks.1", "blocks.2"),)
    assert diff(plan(Store(select="blocks.1"))).after.tap == "blocks.1"


def test_a_local_module_is_a_band_with_its_head_beside_it() -> None:
    found = diff(plan(Part(select="blocks.1")))
    first, rest = found.after.bands
    assert first.rows == ("stem", "blocks.0", "blocks.1")
    assert rest.rows == ("blocks.2", "blocks.3", "head")
    head = found.after["aux.0"]
    assert (head.beside, head.band, head.kind) == ("blocks.1", "first", "Linear")
    assert ("blocks.1", "aux.0", "after") in found.edges


def test_rows_say_which_pass_and_why() -> None:
    found = diff(plan(Say(select="blocks.3", status="checkpointed"), Ice(select="blocks.0")))
    row = found.after["blocks.0"]
    assert row.passes == (1,)
    assert row.reasons == ("ice: cold <b>here</b>",)
    assert found.after.passes[1].text == '[[pass]]\nuse = "ice"\nselect = "blocks.0"'


def test_equal_neighbours_fold() -> None:
    names = [f.name for f in diff(plan(Ice(select=("stem", "blocks.0")))).folded()]
    assert names == ["stem", "blocks.0", "blocks.1-3 ×3", "head"]
    assert [f.name for f in diff(plan()).folded()] == ["stem", "blocks.0-3 ×4", "head"]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["layer3.2", "layer3.3", "layer3.4", "layer3.5"], "layer3.2-5 ×4"),
        (["features.0-2", "features.3-5"], "features.0-5 ×2"),
        (["encoder.layer_a", "encoder.layer_b"], "encoder.layer_a-layer_b ×2"),
        (["a.0", "b.0"], "a.0 … b.0 ×2"),
        (["0", "1"], "0-1 ×2"),
        (["stem"], "stem"),
    ],
)
def test_names_of_folds(names: list[str], folded: str) -> None:
    assert fold_name(names) == folded


def test_the_same_twice_is_the_same_to_the_byte() -> None:
    passes = [Blend(select="blocks.1"), Ice(select="blocks.3")]
    one, other = (json.dumps(diff(plan(*passes)).to_dict()) for _ in range(2))
    assert one == other


def test_costs_of_rows_add_up_to_the_reports() -> None:
    made = plan(Ice(select=("stem", "blocks.0")), costs=True)
    found = diff(made)
    for key in ("parameters", "trainable_parameters", "forward_flops", "backward_flops"):
        assert sum(r.before[key] for r in found.rows if r.before) == getattr(made.report.before, key)
        assert sum(r.after[key] for r in found.rows if r.after) == getattr(made.report.after, key)
    assert found.after["blocks.0"].after["saved_activation_bytes"] == 0


def test_two_plans_of_one_backbone() -> None:
    found = diff(plan(Ice(select="blocks.0")), plan(Ice(select="blocks.1"), Say(select="blocks.3", status="checkpointed")))
    assert found.same_backbone
    assert {r.name: (r.was, r.statuses) for r in found.rows if r.changed} == {
        "blocks.0": (("frozen",), ("kept",)),
        "blocks.1": (("kept",), ("frozen",)),
        "blocks.3": (("kept",), ("checkpointed",)),
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
    found = diff(plan(), plan(Ice(select="blocks.0"), model=Other()))
    assert not found.same_backbone
    assert statuses(found) == {
        "blocks.0": ("frozen",),
        "blocks.2": ("removed",),
        "blocks.3": ("removed",),
        "head": ("differs",),
    }
    assert "3 rows are the same in both, 1 differ under one name, 2 are only in the first, 0 only in the second" in found.notes[0]
    assert [r.name for r in found.rows] == ROWS
    json.dumps(found.to_dict())


def test_a_backbone_without_blocks() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert [r.name for r in diff(plan(Ice(select="1"), model=model)).rows] == ["0", "1"]
