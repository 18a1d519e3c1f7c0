"""Learning rates that passes set for their regions, in an optimizer that somebody else has made."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from graphopt.compiler.learning_rates import LearningRates
from graphopt.compiler.triggers import RunSchedule
from graphopt.train.optimizer import named_parameters


class RegionRates:
    """Divides the groups of an optimizer by region, and sets the learning rate of each over time."""

    def __init__(self, optimizer: Optimizer, module: nn.Module, rates: LearningRates, schedule: RunSchedule) -> None:
        """`module` is the one that the optimizer trains; the rates that its groups have now are the base rates.

        `schedule` is the run's own: the learning rate after a share of the run (0 to 1), as a factor of the base rate.
        """
        self._optimizer, self._rates, self._schedule = optimizer, rates, schedule
        names = {id(parameter): name for name, parameter in named_parameters(module).items()}
        #: of each group, in order: the regions that it lies in, and its base rate
        self._groups: list[tuple[tuple[str, ...], float]] = []
        divided = []
        for group in optimizer.param_groups:
            parts: dict[tuple[str, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                name = names.get(id(parameter))
                parts.setdefault(rates.names(name) if name is not None else (), []).append(parameter)
            for regions, parameters in parts.items():
                divided.append({**group, "params": parameters})
                if regions and "name" in group:
                    divided[-1]["name"] = f"{group['name']}, lr of {' and '.join(regions)}"
                self._groups.append((regions, float(group["lr"])))
        optimizer.param_groups[:] = divided

    def set(self, time: float) -> None:
        """Sets every group's rate for the step after the share `time` of the run."""
        for group, (regions, base) in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = base * self._rates.factor(regions, time, self._schedule)
