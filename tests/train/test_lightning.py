"""Phases in Lightning's trainer: the same weights as in a loop of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt import Phases, Plan
from graphopt.errors import RunError
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small
from tests.train.loops import BATCHES, IMAGES, TARGETS, cosine, freeze, plan, same, sgd, train


def lightning() -> Any:
    """The package, which takes seconds to import: not while tests are collected."""
    return pytest.importorskip("lightning")


def callback_of(made: Plan, **options: Any) -> Any:
    return pytest.importorskip("graphopt.train.lightning").PhaseCallback(made, **options)


def net(made: Plan, *, scheduled: bool = True) -> Any:
    class Net(lightning().LightningModule):  # type: ignore[name-defined, misc]  # the package may be missing
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rates = made.module, []

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, target = batch
            groups = self.trainer.optimizers[0].param_groups
            self.rates.append({id(p): group["lr"] for group in groups for p in group["params"]})
            if made.needs.targets:
                output, local = self.net(x, target)
                return nn.functional.cross_entropy(output, target) + local
            return nn.functional.cross_entropy(self.net(x), target)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.net)
            if not scheduled:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    return Net()


def fit(module: Any, callback: Any, epochs: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning().Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, TARGETS), batch_size=4)
    trainer.fit(module, loader)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_the_same_phases() -> None:
    made = plan(freeze({"epoch": 1}))
    module, callback = net(made), callback_of(made)
    start = made.module.get_parameter("stem.weight").detach().clone()
    fit(module, callback, 3)
    assert [set(rates.values()) for rates in module.rates] == [{0.05}, {0.05}, {0.025}, {0.025}, {0.0125}, {0.0125}]
    assert module.net is callback.phases.module

    own = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    for epoch, rate in enumerate((0.05, 0.025, 0.0125)):
        own.begin(epoch)
        assert own.optimizer is not None
        own.optimizer.param_groups[0]["lr"] = rate
        train(own, range(epoch, epoch + 1))
    assert same(own.plan.export_state(), callback.phases.plan.export_state())
    assert not torch.equal(start, own.plan.export_state()["stem.weight"])


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_that_passes_go_by_sets_the_rates_of_every_step_through_phases() -> None:
    freezeout = freeze({"schedule": "freezeout", "t0": 0.5})
    made = plan(freezeout)
    module, callback = net(made, scheduled=False), callback_of(made, schedule=cosine)
    fit(module, callback, 4)

    own = Phases(plan(freezeout), sgd, epochs=4, schedule=cosine)
    expected = []
    for epoch in range(4):
        for step, (x, target) in enumerate(BATCHES):
            own.begin(epoch, step, steps=len(BATCHES))
            assert own.optimizer is not None
            expected.append(sorted(group["lr"] for group in own.optimizer.param_groups for _ in group["params"]))
            own.optimizer.zero_grad()
            nn.functional.cross_entropy(own.module.train()(x), target).backward()
            own.optimizer.step()
    assert [sorted(rates.values()) for rates in module.rates] == expected
    assert len(own.plan.decisions) == 2, "a region froze after the other"
    assert same(own.plan.export_state(), callback.phases.plan.export_state())
    with pytest.raises(RunError, match="the LightningModule has a schedule of its own"):
        fit(net(other := plan(freezeout)), callback_of(other, schedule=cosine), 1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_local_losses_and_what_cannot_work() -> None:
    made = plan(Supervise(modules=2))
    callback = callback_of(made)
    fit(net(made), callback, 1)
    assert type(callback.phases.plan.export()) is Small
    with pytest.raises(RunError, match="'net' is not the plan's module"):
        fit(net(plan()), callback_of(made), 1)
