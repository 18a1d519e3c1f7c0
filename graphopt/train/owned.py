"""What of a plan's module a rank trains: the whole of it, or a part with parameters of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from graphopt.plan_file import load_strictly
from graphopt.train.optimizer import named_parameters


@dataclass(frozen=True)
class Owned:
    """A module that shares parameters and buffers with a plan's module; names are always those of the plan's module.

    Attributes:
        whole: the plan's module. module: what this rank trains of it, perhaps all.
        keys: keys of the whole state dict that are the part's, with the part's own key for each.
    """

    whole: nn.Module
    module: nn.Module
    keys: Mapping[str, str]

    @classmethod
    def of(cls, whole: nn.Module, module: nn.Module) -> Self:
        if module is whole:
            return cls(whole, whole, {key: key for key in whole.state_dict()})
        mine = module.state_dict(keep_vars=True)
        names = {id(value): key for key, value in mine.items() if isinstance(value, Tensor)}
        found = {key: key if key in mine else names.get(id(value)) for key, value in whole.state_dict(keep_vars=True).items()}
        return cls(whole, module, {key: own for key, own in found.items() if own is not None})

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, each once, sorted by name."""
        everything = self.whole_parameters()
        if self.module is self.whole:
            return everything
        mine = {id(p) for p in self.module.parameters()}
        return {name: p for name, p in everything.items() if id(p) in mine}

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the plan's module, each once, sorted by name."""
        return named_parameters(self.whole)

    def state_dict(self, module: nn.Module | None = None) -> dict[str, Any]:
        """The part's state; or that of a copy of it, `module`."""
        state = (module or self.module).state_dict()
        return {key: state[own] for key, own in self.keys.items()}

    def load(self, state: Mapping[str, Any], module: nn.Module | None = None) -> None:
        """Loads a whole state dict into the plan's module and this part; into a copy of the part, with `module`."""
        if module is None:
            load_strictly(self.whole, state)
        target = module or self.module
        if target is not self.whole:
            load_strictly(target, {own: state[key] for key, own in self.keys.items() if key in state})
