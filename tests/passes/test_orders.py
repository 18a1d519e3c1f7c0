"""A pass that comes first in a spec and begins last: what the others have learnt by then stays, or the spec is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt import GraphoptError, Pass
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.adapt import Adapt
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from tests.support.plans import compiled

SHAPE = (3, 8, 8)
torch.manual_seed(0)
NETWORK = CifarResNet(20)
#: passes that keep what the network computes
LATE: dict[str, Pass] = {
    "drop": Drop(upto="layer1", when={"epoch": 1}),
    "freeze": Freeze(select=["conv1", "bn1", "layer1"], when={"epoch": 1}),
    "checkpoint": Checkpoint(segments=2, when={"epoch": 1}),
    "ghost_norm": GhostNorm(samples=2, when={"epoch": 1}),
    "supervise": Supervise(modules=2, when={"epoch": 1}),
}
FROM_THE_START: dict[str, Pass] = {
    "adapt": Adapt(select=["layer1", "layer2"], rank=2),
    "factorize": Factorize(select=["layer1", "layer2"]),
    "mix": Share(select="layer1.1"),
    "surrogate": Share(select="layer1.1", mode="surrogate"),
    "freeze": Freeze(select="layer1"),
    "supervise": Supervise(modules=3),
    "blurpool": BlurPool(),
    "checkpoint": Checkpoint(segments=2),
}


@pytest.mark.parametrize("early", FROM_THE_START)
@pytest.mark.parametrize("late", LATE)
def test_what_was_learnt_stays(late: str, early: str) -> None:
    try:
        plan = compiled(NETWORK, [LATE[late], FROM_THE_START[early]], SHAPE)
    except GraphoptError:
        return
    x, target = torch.randn(4, *SHAPE), torch.arange(4)
    optimizer = torch.optim.SGD([p for p in plan.module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        found = plan.module.train()(x, target) if plan.needs.targets else (plan.module.train()(x), torch.zeros(()))
        (F.cross_entropy(found[0], target) + found[1]).backward()
        optimizer.step()
    try:
        later = plan.advance_to((*plan.decisions, *plan.due(1)))
    except GraphoptError:
        return
    torch.testing.assert_close(later.module.eval()(x), plan.module.eval()(x), rtol=1e-4, atol=1e-4)
