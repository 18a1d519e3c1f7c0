"""A region as a module of its own: it computes what the region does, over copies."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import PassError
from graphopt.ir.extract import extracted, stands_alone
from graphopt.ir.regions import region_at
from tests.support.backbones import Small


class InPlace(nn.Module):
    """Its block writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


CASES: dict[str, tuple[Any, tuple[int, ...], str, tuple[int, ...]]] = {
    "residual": (Small, (3, 8, 8), "blocks.1", (8, 8, 8)),
    "in place": (InPlace, (3, 8, 8), "block", (4, 8, 8)),
    "shifted windows": (swin, (3, 16, 16), "layers.0.blocks.1", (8, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_region_does_and_shares_nothing(name: str) -> None:
    make, input, path, shape = CASES[name]
    model = make().eval()
    graph = graphopt.trace(model, input, compare=False)
    part = extracted(graph, region_at(graph, path))
    x = torch.randn(3, *shape)  # another batch than the trace's
    kept = x.clone()
    assert torch.equal(part(x), model.get_submodule(path)(x.clone()))
    assert torch.equal(x, kept)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert {n for n, _ in part.named_parameters()} == {f"{path}.{n}" for n, _ in model.get_submodule(path).named_parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in part.parameters())


def test_tensors_are_what_replace_makes_of_them() -> None:
    graph = graphopt.trace(Small(), (3, 8, 8), compare=False)
    part = extracted(graph, region_at(graph, "blocks.1"), torch.zeros_like)
    assert all(not t.any() for t in part.state_dict().values())
    assert any(t.any() for t in graph.module.state_dict().values())


class ByBatch(nn.Module):
    """Its block reads the size of the batch."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, batch: int) -> Tensor:
            return self.fc(x).reshape(batch, -1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Linear(8, 4), ByBatch.Block(), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x), x.shape[0]))


@pytest.mark.parametrize(("make", "input", "path"), [(ByBatch, (8,), "block"), (Small, (3, 8, 8), "blocks.0.bn2")])
def test_what_cannot_stand_alone_is_refused(make: Any, input: tuple[int, ...], path: str) -> None:
    graph = graphopt.trace(make(), input, compare=False)
    region = region_at(graph, path)
    assert stands_alone(region) == (path != "block")
    if path == "block":
        with pytest.raises(PassError, match="or reads a number that depends on the network's input"):
            extracted(graph, region)
