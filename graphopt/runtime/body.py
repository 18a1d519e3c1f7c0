"""Modules that run the sections of an emitted network."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


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
            graphs = [self.module, *(body for _, body in bodies(self.module))]
            self._slots = [(m._parameters, name) for graph in graphs for m in graph.modules() for name in m._parameters]
        return list({id(p): p for holder, name in self._slots if (p := holder[name]) is not None}.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}


def bodies(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Bodies of the sections in `module`, nested ones too, each once: the module that holds it, and the body's graph module."""
    seen: set[int] = set()
    queue = [module]
    while queue:
        for holder in queue.pop().modules():
            for value in vars(holder).values():
                if isinstance(value, Body) and id(value.module) not in seen:
                    seen.add(id(value.module))
                    queue.append(value.module)
                    yield holder, value.module


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
        if not present:
            device = next((t.device for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)), None)
            return output, torch.zeros((), device=device)
        return output, torch.stack(present).sum() if len(present) > 1 else present[0]
