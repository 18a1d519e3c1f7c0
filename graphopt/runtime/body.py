"""Modules that run the sections of an emitted network."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


class Body:
    """Holds a section's graph module without registering it: its leaf modules are registered once, at the root."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] | None = None

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the leaf modules the body calls, nested sections' included, each once.

        Where they are kept is looked up once, which parameters those are every time: moving a module may replace them.
        """
        if self._slots is None:
            self._slots = [(m._parameters, name) for body in self._bodies() for m in body.modules() for name in m._parameters]
        return list({id(p): p for holder, name in self._slots if (p := holder[name]) is not None}.values())

    def _bodies(self) -> list[nn.Module]:
        found: list[nn.Module] = [self.module]
        for module in self.module.modules():
            for value in vars(module).values():
                if isinstance(value, Body):
                    found += value._bodies()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}


class NoGrad(nn.Module):
    """Runs a section without recording it: nothing in it trains, so nothing of it is saved."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.body(*inputs)


class WithLocalLoss(nn.Module):
    """The emitted module's output where sections have losses of their own: `(output, local_loss)` in training, `output` in eval."""

    def forward(self, output: Any, *losses: torch.Tensor | None) -> Any:
        if not self.training:
            return output
        present = [loss for loss in losses if loss is not None]
        return output, torch.stack(present).sum() if len(present) > 1 else present[0]
