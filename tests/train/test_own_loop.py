"""Phases in a loop of one's own, and in Lightning's: the same weights as by hand, state by name, and a stop in between changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Phases, Plan
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small

torch.manual_seed(0)
IMAGES, TARGETS = torch.randn(8, 3, 8, 8), torch.arange(8)
BATCHES = [(IMAGES[:4], TARGETS[:4]), (IMAGES[4:], TARGETS[4:])]


def plan(*passes: graphopt.Pass) -> Plan:
    torch.manual_seed(0)
    return graphopt.compile(Small(blocks=2, drop=0.0), list(passes), input=(3, 8, 8), batch=4, verify="off", costs=False)


def freeze(when: Any, **options: Any) -> Freeze:
    return Freeze.model_validate({"select": ["stem", "blocks.0"], "when": when, **options})


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


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


def test_phases_begin_as_the_triggers_say_and_momentum_goes_on() -> None:
    phases = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    assert train(phases, range(1)) == [False]
    weights = {name: value.clone() for name, value in phases.module.state_dict().items()}
    assert phases.optimizer is not None
    momentum = {n: phases.optimizer.state[p]["momentum_buffer"].clone() for n, p in phases.module.named_parameters()}
    phases.optimizer.param_groups[0]["lr"] = 0.01  # as a schedule would
    assert phases.begin(1)
    assert same(weights, phases.module.state_dict())
    assert phases.optimizer.param_groups[0]["lr"] == 0.01
    named = dict(phases.module.named_parameters())
    assert not named["stem.weight"].requires_grad
    assert torch.equal(phases.optimizer.state[named["fc.weight"]]["momentum_buffer"], momentum["fc.weight"])
    assert train(phases, range(1, 3)) == [False, False], "begun already"
    trained = phases.plan.export_state()
    assert torch.equal(trained["stem.weight"], weights["stem.weight"])
    assert not torch.equal(trained["fc.weight"], weights["fc.weight"])


def test_triggers_by_score_are_measured() -> None:
    phases = Phases(plan(freeze({"score": "change", "below": 1e9, "patience": 1})), sgd, epochs=4)
    began = train(phases, range(4))
    assert not began[0], "nothing is measured before the first epoch"
    assert any(began)


def test_a_phase_within_an_epoch_begins_before_its_step() -> None:
    made = plan(freeze({"schedule": "freezeout", "t0": 0.25, "how": "linear", "anneal": False}))
    assert made.moments(2) == (0.5, 1.25)
    assert train(Phases(made, sgd, epochs=2), range(2), steps=True) == [False, True, False, True]
    with pytest.raises(RunError, match="within an epoch"):
        Phases(made, sgd, epochs=2).begin(0)


def test_learning_rates_that_passes_set_are_for_the_built_in_runner() -> None:
    with pytest.raises(RunError, match=r"sets the learning rate of 1 freeze stem.*graphopt train"):
        Phases(plan(freeze({"schedule": "freezeout", "t0": 0.5})), sgd, epochs=2)


def test_a_stop_changes_nothing() -> None:
    whole = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    train(whole, range(3))
    first = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    train(first, range(2))
    state = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, first.state_dict())
    again = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    again.load_state_dict(state)
    train(again, range(2, 3))
    assert same(whole.module.state_dict(), again.module.state_dict())


def test_what_was_frozen_must_not_have_moved() -> None:
    passes = [freeze("start"), Freeze.model_validate({"select": "blocks.1", "when": {"epoch": 1}})]
    phases = Phases(plan(*passes), sgd, epochs=2)
    with torch.no_grad():
        phases.module.get_parameter("stem.weight").add_(1)
    with pytest.raises(RunError, match=r"frozen, but changed during the phase: .*stem\.weight"):
        phases.begin(1)


lightning = pytest.importorskip("lightning")


def net(made: Plan, **optimizer: Any) -> Any:
    class Net(lightning.LightningModule):  # type: ignore[name-defined, misc]
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


def fit(module: Any, callback: Any, epochs: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, TARGETS), batch_size=4)
    trainer.fit(module, loader, **options)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_the_same_phases() -> None:
    from graphopt.train.lightning import PhaseCallback

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
    from graphopt.train.lightning import PhaseCallback

    made = plan(Supervise(modules=2))
    callback = PhaseCallback(made)
    fit(net(made), callback, 1)
    assert type(callback.phases.plan.export()) is Small
    with pytest.raises(RunError, match="'net' is not the plan's module"):
        fit(net(plan()), PhaseCallback(made), 1)
