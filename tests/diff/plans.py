"""Plans and a backbone that the tests of the diff share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.compiler.plan import Plan
from tests.support.backbones import Residual, Small


def plan(*passes: graphopt.Pass, model: nn.Module | None = None, input: tuple[int, ...] = (3, 8, 8), **options: Any) -> Plan:
    """A small plan: stem, four residual blocks, head; without verification, and without costs unless asked."""
    torch.manual_seed(0)
    options = {"verify": "off", "costs": False, "batch": 4, **options}
    return graphopt.compile(model or Small(), list(passes), input=input, **options)


class Copy(nn.Module):
    """A user's copy of `Small`: other names, `kind` in the place of the third block's norms, and one block more in front."""

    def __init__(self, norm: Any = nn.BatchNorm2d, more: int = 0) -> None:
        super().__init__()
        small = Small()
        self.begin = small.stem
        blocks = [Residual(8, 0.3) for _ in range(4 + more)]
        blocks[2] = Residual(8, 0.3, norm)
        self.body = nn.ModuleList(blocks)
        self.classify = small.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for block in self.body:
            x = block(x)
        return self.classify(x.mean((2, 3)))
