"""Modules that run the sections of an emitted network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from graphopt.runtime.compiled import outside, outside_but_inner
from graphopt.runtime.randomness import shared_draw

Key = TypeVar("Key")


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


class LocalBackward(nn.Module):
    """A section whose backward runs inside its forward.

    Attributes:
        trains: whether it has a backward. gathered: calls a function with parameters gathered, where ranks hold parts of them.
        number: of its random stream, among the network's sections of this kind, from 0; what follows it has the next one.
    """

    trains: bool
    number: int
    gathered: Callable[..., Any] | None = None

    def followed(self) -> Sequence[nn.Parameter]:
        """Weights that others train, and whose values it takes after each forward in training; no node in the graph says so."""
        return ()

    def follow_later(self, later: bool) -> None:
        """Whether it takes those values only when `catch_up` is called after its forward."""

    def catch_up(self) -> None:
        """Takes the values, if a forward has left that to do."""

    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that its forward and backward run."""
        raise NotImplementedError

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `function`, with every parameter that it needs."""
        return function(*arguments) if self.gathered is None else self.gathered(function, *arguments)

    def gather_by(self, call: Callable[..., Any]) -> None:
        """Makes `call(function, *arguments)` the way to run anything with this section's parameters; it is not registered."""
        self.__dict__["gathered"] = call


class NoGrad(nn.Module):
    """Runs a section without recording it: nothing in it trains, so nothing of it is saved."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.body(*inputs)


class Checkpointed(nn.Module):
    """Runs a section under `torch.utils.checkpoint` when it trains, plainly otherwise."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)
        #: positions of the inputs that are buffers, and that the body's own code writes into
        self.written = tuple(i for i, node in enumerate(body.graph.find_nodes(op="placeholder")) if node.meta.get("written"))

    def forward(self, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.body(*inputs)
        if torch.compiler.is_compiling():  # a compiled forward is run again by the compiler, which does not repeat its effects on buffers
            return checkpoint(self.body.module, *inputs, use_reentrant=False)
        repeating = False
        buffers = {i: inputs[i] for i in self.written}
        written = _copies(buffers)
        # What a norm computes in training does not depend on its statistics: they need not be what they were before the forward.
        called = {m: None for graph in (self.body.module, *(b for _, b in bodies(self.body.module))) for m in graph.modules()}
        moving = [m for m in called if m.training and not isinstance(m, torch.jit.ScriptModule) and m._buffers]
        before = [m._buffers if "running_mean" in m._buffers else _copies(m._buffers) for m in moving]

        @contextmanager
        def repetition() -> Iterator[None]:
            nonlocal repeating
            repeating, originals = True, [dict(m._buffers) for m in moving]
            try:
                for module, values in zip(moving, before, strict=True):
                    module._buffers.update(_copies(values))
                yield
            finally:
                repeating = False
                for module, values in zip(moving, originals, strict=True):
                    module._buffers.update(values)

        def run(*values: Any) -> Any:
            given, read = list(values), _copies(written) if repeating else buffers
            for position, buffer in read.items():
                given.insert(position, buffer)
            return self.body(*given)

        others = [value for i, value in enumerate(inputs) if i not in buffers]
        return checkpoint(run, *others, use_reentrant=False, context_fn=lambda: (nullcontext(), repetition()))


def _copies(buffers: Mapping[Key, Tensor | None]) -> dict[Key, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


class StochasticBranch(nn.Module):
    """Runs a residual branch with probability `1 - probability` in training, and always in eval mode (stochastic depth, arXiv 1603.09382).

    There is one draw per batch, so that a skipped branch costs nothing. In training, the output of a branch that runs is divided by
    `1 - probability`: its expectation is then what eval mode adds, and an exported network needs no correction.

    Args:
        shape: of one sample of the branch's input and output.
        key: names the branch among those of the network; each has draws of its own.
    """

    def __init__(self, body: fx.GraphModule, probability: float, shape: tuple[int, ...], key: str) -> None:
        super().__init__()
        self.body = Body(body)
        self.probability, self.shape, self.key = probability, shape, key

    def forward(self, *inputs: Tensor) -> Tensor:
        """The branch's output, or zeros."""
        # A forecast runs on fake tensors: it counts the step in which every branch runs, which is also the one that needs most memory.
        if not self.training or any(isinstance(t, FakeTensor) for t in inputs):
            return self.body(*inputs)
        # The host draws: a compiled network stops here and goes on behind it. The body is a compiled graph of its own.
        return _run_apart(self, _draw_apart, *inputs) if torch.compiler.is_compiling() else self._run(shared_draw, *inputs)

    def _run(self, draw: Callable[[str], float], *inputs: Tensor) -> Tensor:
        if draw(self.key) >= self.probability:
            return self.body.module(*inputs) / (1 - self.probability)
        # Besides the branch's input come parameters that the root reads for the body.
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        position = next(i for i, t in enumerate(tensors) if t.shape[1:] == self.shape)
        others = (t for i, t in enumerate(tensors) if i != position and t.requires_grad)
        return _Zeros.apply(tensors[position], *others, *self.body.parameters())

    def extra_repr(self) -> str:
        """The probability of being skipped."""
        return f"probability={self.probability:g}"


_run_apart, _draw_apart = outside_but_inner(StochasticBranch._run), outside(shared_draw)


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


class WithLocalLoss(nn.Module):
    """The emitted module's output where sections have losses of their own: `(output, local_loss)` in training, `output` in eval."""

    def forward(self, output: Any, *losses: Tensor | None) -> Any:
        if not self.training:
            return output
        present = [loss for loss in losses if loss is not None]
        if not present:
            device = next((t.device for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)), None)
            return output, torch.zeros((), device=device)
        return output, torch.stack(present).sum() if len(present) > 1 else present[0]
