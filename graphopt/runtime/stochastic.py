"""A residual branch that training steps leave out at random (stochastic depth)."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.runtime.body import Body


class StochasticBranch(nn.Module):
    """Runs a residual branch with probability `1 - probability` in training, and always in eval mode (stochastic depth, arXiv 1603.09382).

    There is one draw per batch, so that a skipped branch costs nothing. In training, the output of a branch that runs is divided by
    `1 - probability`: its expectation is then what eval mode adds, and an exported network needs no correction.

    Args:
        shape: of one sample of the branch's input and output.
    """

    def __init__(self, body: fx.GraphModule, probability: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = Body(body)
        self.probability, self.shape = probability, shape

    def forward(self, *inputs: Tensor) -> Tensor:
        """The branch's output, or zeros."""
        # A forecast runs on fake tensors: it counts the step in which every branch runs, which is also the one that needs most memory.
        if not self.training or any(isinstance(t, FakeTensor) for t in inputs):
            return self.body(*inputs)
        if torch.rand(()).item() >= self.probability:
            return self.body(*inputs) / (1 - self.probability)
        # Besides the branch's input come parameters that the root reads for the body.
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        position = next(i for i, t in enumerate(tensors) if t.shape[1:] == self.shape)
        others = (t for i, t in enumerate(tensors) if i != position and t.requires_grad)
        return _Zeros.apply(tensors[position], *others, *self.body.parameters())

    def extra_repr(self) -> str:
        """The probability of being skipped."""
        return f"probability={self.probability:g}"


class _Zeros(torch.autograd.Function):
    """Zeros like the branch's input. Every parameter of the branch still gets a gradient, which is zero.

    So a step that skips a branch looks to the optimizer, and to DDP, like any other.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(shortcut)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(p) if wanted else None for p, wanted in needed)
