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
from tests.train.loops import IMAGES, TARGETS, freeze, plan, same, sgd, train

lightning = pytest.importorskip("lightning")
PhaseCallback = pytest.importorskip("graphopt.train.lightning").PhaseCallback


def net(made: Plan) -> Any:
    class Net(lightning.LightningModule):  # type: ignore[name-defined, misc]  # the package may be missing
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rates = made.module, []

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, target = batch
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            if made.needs.targets:
                output, local = self.net(x, target)
                return nn.functional.cross_entropy(output, target) + local
            return nn.functional.cross_entropy(self.net(x), target)

        def configure_optimizers(self) -> Any:
            made = sgd(self.net)
            return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.5)}

    return Net()


def fit(module: Any, callback: Any, epochs: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, TARGETS), batch_size=4)
    trainer.fit(module, loader)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_the_same_phases() -> None:
    made = plan(freeze({"epoch": 1}))
    module, callback = net(made), PhaseCallback(made)
    start = made.module.get_parameter("stem.weight").detach().clone()
    fit(module, callback, 3)
    assert module.rates == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125], "the schedule goes on through the phase"
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
def test_lightning_with_local_losses_and_what_cannot_work() -> None:
    made = plan(Supervise(modules=2))
    callback = PhaseCallback(made)
    fit(net(made), callback, 1)
    assert type(callback.phases.plan.export()) is Small
    with pytest.raises(RunError, match="'net' is not the plan's module"):
        fit(net(plan()), PhaseCallback(made), 1)
