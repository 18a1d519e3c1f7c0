"""What a part of a step does, recorded once: its forward, its backward, and the optimizer's step of some parameters.

A part runs alone, on fake tensors, as it does in the network: what enters it is held by nobody else, and the gradient of what leaves it
comes from outside. A recording counts storages in numbers of its own: first those that were there before it, then those that it made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.cost.attribution import Attribution, instrument
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.optimizer import Optimizer, make_optimizer, state_of, take_step
from graphopt.cost.parts import Part
from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode, new_fake

#: shape, strides and type of a tensor
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_SCALAR: Layout = ((), (), torch.float32)


def layout_of(tensor: Tensor) -> Layout:
    """Shape, strides and type."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def fresh(mode: FakeMode, layout: Layout) -> Tensor:
    """A new fake tensor."""
    with unset_fake_temporarily():
        return new_fake(mode, *layout)


@dataclass(frozen=True)
class Recording:
    """What one part of a step did.

    Attributes:
        before: how many storages were there before it. sizes, kinds: of all, in bytes. events: storage i allocated: i; freed: ~i.
        kernels, moved, products: as in `Ledger`. totals: FLOPs by place, see `Part.path`; of an update by path.
    """

    before: int
    sizes: Sequence[int]
    kinds: Sequence[int]
    events: Sequence[int]
    kernels: int
    moved: int
    products: int
    totals: Mapping[str, Sequence[int]]

    @classmethod
    def take(cls, ledger: Ledger, before: int) -> "Recording":
        """What a ledger has recorded since it held `before` storages; it goes on with empty counts."""
        totals = {path: tuple(figures) for path, figures in ledger.attribution.totals.items()}
        counts = ledger.kernels, ledger.moved, ledger.products
        found = cls(before, tuple(ledger.sizes), tuple(ledger.kinds), tuple(ledger.events), *counts, totals)
        ledger.kernels = ledger.moved = ledger.products = 0
        ledger.attribution.totals.clear()
        return found


@dataclass(frozen=True)
class Forward:
    """The forward of a part. What enters is storage 0, then come the part's tensors, then the labels, of the last part.

    Attributes:
        layout: of what leaves. recorded: whether that has a gradient. leaving: its storage.
        saved: (storage, place that saved it) of what autograd holds at the end, parameters and buffers left out.
    """

    did: Recording
    layout: Layout | None
    recorded: bool
    leaving: int | None
    saved: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Backward:
    """The backward of a part. Behind the storages of its forward comes that of the gradient which enters, except in the last part.

    Attributes:
        layout: of the gradient that leaves; None if none does. leaving: its storage.
        gradients: of the part's tensors, by their number: the storage of each that got one.
        kept: storages that are still held when it is done. ending: those of the last part that are held until all parts are done.
    """

    did: Recording
    layout: Layout | None
    leaving: int | None
    gradients: Mapping[int, int]
    kept: frozenset[int]
    ending: Sequence[int]


class _Entry(torch.autograd.Function):
    """What enters a part: its gradient is noted and dropped."""

    @staticmethod
    def forward(ctx: Any, _unit: Tensor, given: list[Tensor], note: Callable[[Tensor], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.note = note
        return given.pop()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        if gradients[0] is not None:
            ctx.note(gradients[0])
        return None, None, None


class _Exit(torch.autograd.Function):
    """What follows a part: it gives the part's result a gradient, which nothing else holds."""

    @staticmethod
    def forward(ctx: Any, _result: Tensor, given: list[Tensor]) -> Tensor:
        ctx.given = given
        return given.pop()

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.given.pop(), None


class PartRun:
    """A part of a step on fakes of `mode`, which is active; `arrange` gives a tensor the step's memory format."""

    def __init__(self, part: Part, mode: FakeMode, arrange: Callable[[Any], Any]) -> None:
        self.part, self.mode, self.ledger = part, mode, Ledger(Attribution())
        root = nn.Module()
        self.names = {target: f"leaf_{number}" for number, target in enumerate(part.leaves)}
        root._modules.update({self.names[target]: leaf for target, leaf in part.leaves.items()})
        root._buffers.update(part.read)
        numbers = {id(tensor): number for number, tensor in enumerate(part.tensors)}
        order = [numbers[id(t)] for t in (*root.parameters(), *root.buffers())]
        self.root: nn.Module = fake_copy(root, mode, arrange).train()
        copies = dict(zip(order, (*self.root.parameters(), *self.root.buffers()), strict=True))
        self.tensors = [copies[number] for number in range(len(part.tensors))]
        self._result: Any = None
        self._loss: Tensor | None = None
        self._batch: Tensor | None = None
        self._noted: tuple[Layout, int] | None = None
        self._ending: int | None = None

    def forward(self, entering: Layout, recorded: bool, loss: Callable[[Any, Tensor], Tensor], labels: Tensor) -> Forward:
        """Runs it on a tensor of that layout, which has a gradient if `recorded`; the last part's result goes into the loss."""
        part, ledger, given = self.part, self.ledger, [fresh(self.mode, entering)]
        ledger.set_kind(given, Kind.INPUT if part.first else Kind.ACTIVATION)
        for tensor in self.tensors:
            ledger.set_kind((tensor,), Kind.PARAMETER if isinstance(tensor, nn.Parameter) else Kind.BUFFER)
        if part.last:
            ledger.set_kind((labels,), Kind.INPUT)
        if part.first:
            self._batch = given[0]  # a training loop holds it until the next one
        if recorded:
            given = [_Entry.apply(fresh(self.mode, _SCALAR).requires_grad_(), given, self._note)]
        before = len(ledger.sizes)
        ledger.start_phase("forward")
        ledger.events.clear()
        with instrument(self.root, ledger.attribution), ledger, torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack):
            self._result = self._run(given)
            self._loss = loss(self._result, labels) if part.last else self._result
        saved = [(number, path) for ref, number, path in ledger.saved if ref() is not None]
        saved = [(number, path) for number, path in saved if ledger.kinds[number] in (Kind.ACTIVATION, Kind.INPUT)]
        leaves = None if part.last else self._result
        ending = (None, None) if leaves is None else (layout_of(leaves), ledger.index(leaves))
        return Forward(Recording.take(ledger, before), ending[0], self._loss.requires_grad, ending[1], saved)

    def _note(self, gradient: Tensor) -> None:
        self._noted, self._ending = (layout_of(gradient), self.ledger.index(gradient)), len(self.ledger.events)

    def _run(self, given: list[Any]) -> Any:
        """The value that leaves. Each value lives until its last use, as in the code that fx generates."""
        part = self.part
        env = {part.source(part.entry): given.pop()}

        def value_of(node: Node) -> Any:
            node = part.source(node)
            return self.root._buffers[str(node.target)] if node.op == "get_attr" else env[node]

        for number, node in enumerate(part.nodes):
            with torch.set_grad_enabled(node not in part.unrecorded):
                env[node] = self._call(node, str(number), value_of)
            for value in part.last_uses[node]:
                del env[value]
        return map_arg(part.exit.args[0], value_of) if part.last else value_of(part.exit)

    def _call(self, node: Node, number: str, value_of: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
        name = self.names.get(str(node.target), "") if node.op == "call_module" else ""
        # Work is attributed to the node's number: an equal part elsewhere has other names.
        self.ledger.attribution.push(number, name)
        try:
            if name:
                return self.root._modules[name](*args, **kwargs)  # type: ignore[misc]  # none of them is None
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]  # a function
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        finally:
            self.ledger.attribution.pop()

    def backward(self, entering: Layout | None) -> Backward:
        """Runs its backward from a gradient of that layout; in the last part from the loss. The forward must have been run."""
        ledger, root, gradient = self.ledger, self._loss, None
        if entering is not None:
            given = [fresh(self.mode, _SCALAR), fresh(self.mode, entering)]
            ledger.index(given[1])
            given.reverse()
            root, gradient = _Exit.apply(self._result, given), fresh(self.mode, _SCALAR)
            self._result = self._loss = None
        before = len(ledger.sizes)
        ledger.start_phase("backward")
        ledger.events.clear()
        with ledger:
            torch.autograd.backward(root, gradient)  # type: ignore[arg-type]  # None for the loss
        got = {number: tensor.grad for number, tensor in enumerate(self.tensors) if tensor.grad is not None}
        ledger.set_kind(got.values(), Kind.GRADIENT)
        gradients = {number: ledger.index(tensor) for number, tensor in got.items()}
        layout, leaving = self._noted or (None, None)
        # What is freed behind the part's last node, the caller of the whole backward has held: the gradient of the loss.
        ending = tuple(~event for event in ledger.events[self._ending :] if ~event != leaving) if self._ending is not None else ()
        del ledger.events[self._ending or len(ledger.events) :]
        return Backward(Recording.take(ledger, before), layout, leaving, gradients, ledger.alive(), ending)


@dataclass(frozen=True)
class Update:
    """The optimizer's step of some parameters.

    Attributes:
        did: before it come the parameters, the gradients of those that have one, and the optimizer's state. state: bytes of each of those.
        apart: whether it takes each parameter as if there were no other, one after the other.
    """

    did: Recording
    state: Sequence[int]
    apart: bool


def record_update(
    tensors: Sequence[tuple[Layout, bool]], optimizer: Optimizer, options: Mapping[str, Any] | None, mode: FakeMode
) -> Update | None:
    """The optimizer's step of parameters with these layouts; the flag says whether one has a gradient. None without an optimizer."""
    parameters = [nn.Parameter(fresh(mode, layout)) for layout, _ in tensors]
    made = make_optimizer(optimizer, options, parameters)
    if made is None:
        return None
    ledger = Ledger(Attribution())
    ledger.set_kind(parameters, Kind.PARAMETER)
    for parameter, (_, trained) in zip(parameters, tensors, strict=True):
        if trained:
            parameter.grad = torch.zeros_like(parameter)
            ledger.set_kind((parameter.grad,), Kind.GRADIENT)
    first = len(ledger.sizes)
    ledger.set_kind(state_of(made), Kind.OPTIMIZER)
    before = len(ledger.sizes)
    ledger.start_phase("optimizer")
    ledger.events.clear()
    ledger.default = Kind.SCRATCH
    with ledger:
        take_step(made)
    ledger.set_kind(state_of(made), Kind.OPTIMIZER)
    state = tuple(ledger.sizes[first:before])
    return Update(Recording.take(ledger, before), state, _apart(made))


def _apart(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is that of each parameter, one after the other: torch's own loop of SGD lets go of one before it takes the next."""
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) > 1:
        return False
    return not any(optimizer.param_groups[0].get(name) for name in ("foreach", "fused", "maximize", "differentiable"))
