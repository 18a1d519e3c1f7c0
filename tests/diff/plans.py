"""Plans that the tests of the diff share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.compiler.plan import Plan
from tests.support.backbones import Small


def plan(*passes: graphopt.Pass, model: nn.Module | None = None, input: tuple[int, ...] = (3, 8, 8), **options: Any) -> Plan:
    """A small plan: stem, four residual blocks, head; without verification, and without costs unless asked."""
    torch.manual_seed(0)
    options = {"verify": "off", "costs": False, "batch": 4, **options}
    return graphopt.compile(model or Small(), list(passes), input=input, **options)
