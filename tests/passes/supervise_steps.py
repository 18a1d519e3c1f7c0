"""How the tests of supervise compile a backbone, and take a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import graphopt


def compiled(model: nn.Module, passes: Any, input: tuple[int, ...] = (3, 8, 8), **options: Any) -> graphopt.Plan:
    return graphopt.compile(model, passes, input=input, **{"costs": False, "verify": "fast", **options})


def step(plan: graphopt.Plan, input: tuple[int, ...] = (3, 8, 8), n: int = 4) -> dict[str, torch.Tensor | None]:
    module = copy.deepcopy(plan.module).train()
    output, local = module(torch.rand(n, *input), torch.arange(n))
    (F.cross_entropy(output, torch.arange(n)) + local).backward()
    return {name: p.grad for name, p in module.named_parameters()}
