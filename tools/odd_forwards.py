"""Backbones with one thing in what their forward takes, does or returns that a tracer or a rewrite can trip over."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oddity import Layers, Net, oddity
from torch import Tensor


@oddity()
class AssertsOnShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        assert x.shape[-1] % 4 == 0
        return super().forward(x)


@oddity(3, 15, 18)
class PadsToMultiple(Net):
    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        if h % 4 or w % 4:
            x = F.pad(x, (0, -w % 4, 0, -h % 4))
        return super().forward(x)


@oddity()
class LoopsOverSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[-1] // 8):
            x = x + i
        return super().forward(x)


@oddity()
class BranchesOnBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[0] > 3 else x)


@oddity()
class TakesKeywords(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(x if mask is None else x * mask)


@oddity((3, 16, 16), (3, 16, 16))
class TakesTwoInputs(Layers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.features(x + y))


@oddity((3, 16, 16), (8,), ((4,), torch.int64))
class TakesThreeInputs(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.tokens = torch.nn.Linear(8, 8), torch.nn.Embedding(10, 8)

    def forward(self, x: Tensor, side: Tensor, tokens: Tensor) -> Tensor:
        x = self.blocks(self.stem(x) + self.side(side)[:, :, None, None])
        return self.fc(x.mean((2, 3)) + self.tokens(tokens).mean(1))


@oddity()
class TakesDict(Net):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x["image"])


@oddity()
class BranchesOnValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0.5 else -x)


@oddity()
class DropsLayersByPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if not self.training or random.random() < 0.5:
                x = block(x)
        return self.head(x)


@oddity()
class StemWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.blocks(x))


@oddity()
class DetachedStem(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).detach()))


# -- what forward returns ---------------------------------------------------------------------------------------------------
@oddity()
class ReturnsDict(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"logits": logits, "probabilities": logits.softmax(-1)}


@oddity()
class ReturnsTuple(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.head(x), x


@oddity()
class ReturnsFeatures(Net):
    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]


@dataclass
class Output:
    """What a library's model returns."""

    logits: Tensor
    features: Tensor


@oddity()
class ReturnsDataclass(Net):
    def forward(self, x: Tensor) -> Output:
        x = self.features(x)
        return Output(self.head(x), x)
