"""Modules that do one thing in train mode and another in eval mode."""

from collections.abc import Callable
from typing import Any

from torch import nn


class ByMode(nn.Module):
    """Calls `function` with the arguments of the module's mode.

    Args:
        function: what the traced node called: a function, or a method's name.
        train, eval: `(args, kwargs)` of each mode; a `Slot` stands where a run-time value goes.
    """

    def __init__(self, function: Callable[..., Any] | str, train: tuple[Any, Any], eval: tuple[Any, Any]) -> None:
        super().__init__()
        self.function, self.train_arguments, self.eval_arguments = function, train, eval

    def forward(self, *values: Any) -> Any:
        args, kwargs = _fill(self.train_arguments if self.training else self.eval_arguments, values)
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", str(self.function))
        return str(name)


class OutputByMode(nn.Module):
    """The backbone's output in each mode, where they differ (auxiliary heads)."""

    def forward(self, train: Any, eval: Any) -> Any:
        return train if self.training else eval


class Slot(int):
    """Position of a run-time value among a `ByMode`'s inputs."""


def _fill(template: Any, values: tuple[Any, ...]) -> Any:
    if isinstance(template, Slot):
        return values[template]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(_fill(t, values) for t in template))
    if isinstance(template, (list, tuple)):
        return type(template)(_fill(t, values) for t in template)
    if isinstance(template, dict):
        return {k: _fill(t, values) for k, t in template.items()}
    if isinstance(template, slice):
        return slice(_fill(template.start, values), _fill(template.stop, values), _fill(template.step, values))
    return template
