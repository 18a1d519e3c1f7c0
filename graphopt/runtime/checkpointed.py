"""A section that runs again in the backward pass instead of keeping its activations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from graphopt.runtime.body import Body


class Checkpointed(nn.Module):
    """Runs a section under `torch.utils.checkpoint` when it trains, plainly otherwise."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.body(*inputs)
        # A compiled forward is run again by the compiler, which does not repeat its effects on buffers.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": self._contexts}
        return checkpoint(self.body.module, *inputs, use_reentrant=False, **contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the forward, and around its repetition."""
        return nullcontext(), self._statistics_put()

    @contextmanager
    def _statistics_put(self) -> Iterator[None]:
        """Norms with running statistics move copies of them meanwhile."""
        norms = [m for m in self.body.module.modules() if m.training and isinstance(m._buffers.get("running_mean"), torch.Tensor)]
        originals = [dict(m._buffers) for m in norms]
        try:
            for module in norms:
                module._buffers.update({k: b if b is None else b.clone() for k, b in module._buffers.items()})
            yield
        finally:
            for module, buffers in zip(norms, originals, strict=True):
                module._buffers.update(buffers)
