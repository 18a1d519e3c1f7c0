"""A training loop as a user would write one, with the phases of a small plan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt import Phases, Plan
from graphopt.passes.freeze import Freeze
from tests.support.backbones import Small
from tests.support.plans import compiled_anew

torch.manual_seed(0)
IMAGES, TARGETS = torch.randn(8, 3, 8, 8), torch.arange(8)
BATCHES = [(IMAGES[:4], TARGETS[:4]), (IMAGES[4:], TARGETS[4:])]


def plan(*passes: graphopt.Pass) -> Plan:
    return compiled_anew(_network, passes, (3, 8, 8))


def _network() -> nn.Module:
    return Small(blocks=2, drop=0.0)


def freeze(when: Any, **options: Any) -> Freeze:
    return Freeze.model_validate({"select": ["stem", "blocks.0"], "when": when, **options})


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def cosine(time: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * time))


def train(phases: Phases, epochs: range, steps: bool = False) -> list[bool]:
    """Trains; for each call of `begin`, whether a phase began."""
    began = []
    for epoch in epochs:
        for step, (x, target) in enumerate(BATCHES):
            if steps or not step:
                began.append(phases.begin(epoch, step, steps=len(BATCHES) if steps else None))
            assert phases.optimizer is not None
            phases.module.train()
            phases.optimizer.zero_grad()
            nn.functional.cross_entropy(phases.module(x), target).backward()
            phases.optimizer.step()
    return began


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
