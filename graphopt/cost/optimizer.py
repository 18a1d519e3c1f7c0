"""The optimizer of a forecast: how it is made, and what a step of it costs for some of a network's parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphopt.cost.attribution import Attribution
from graphopt.cost.figures import Work
from graphopt.cost.ledger import Ledger
from graphopt.errors import CostError
from graphopt.ir.fakes import FakeMode, as_fake
from graphopt.ir.shapes import tensors_in

Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None


class Update(NamedTuple):
    """What training some parameters costs besides forward and backward: the work of the optimizer's step, and bytes held.

    The bytes are those of the parameters, their gradients, and the optimizer's state.
    """

    work: Work
    bytes: int


def update_of(parameters: Iterable[Tensor], optimizer: Optimizer = "sgd", options: Mapping[str, Any] | None = None) -> Update:
    """What the update of these parameters costs; they may be on any device, meta included. Raises CostError as `make_optimizer`."""
    mode = FakeMode()
    ledger = Ledger(Attribution())
    fakes = [nn.Parameter(as_fake(p.detach(), mode)) for p in parameters if p.is_floating_point()]
    own = sum(2 * p.numel() * p.element_size() for p in fakes)
    with mode:
        made = make_optimizer(optimizer, options, fakes)
        if made is None:
            return Update(Work(), own)
        for parameter in fakes:
            parameter.grad = torch.zeros_like(parameter)
        with ledger:
            take_step(made)
        ledger.close()
        return Update(ledger.work, own + sum(t.numel() * t.element_size() for t in state_of(made)))


def make_optimizer(optimizer: Optimizer, options: Mapping[str, Any] | None, trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer as it is between two steps, with its state; it takes one step with gradients of zero to get that."""
    if optimizer is None or not trained:
        return None
    if isinstance(optimizer, str):
        from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # re-exported without saying so

        try:
            made = create_optimizer_v2(trained, opt=optimizer, lr=1e-3, **{"momentum": 0.9, **(options or {})})
        except Exception as error:
            raise CostError(f"optimizer {optimizer!r} cannot be made: {error}", fix="timm.optim.list_optimizers() lists them") from error
    else:
        made = optimizer(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    take_step(made)
    made.zero_grad(set_to_none=True)
    return made


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """One step, whatever the gradients. Raises CostError if it needs their values."""
    try:
        optimizer.step()
    except Exception as error:
        what = f"the optimizer {type(optimizer).__name__} cannot step without values: {error}"
        raise CostError(what, fix="Forecast with another, or with None") from error


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that it keeps between steps."""
    return tensors_in(list(optimizer.state.values()))
