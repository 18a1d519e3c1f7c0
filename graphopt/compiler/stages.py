"""What each process of a chain costs, one that trains consecutive gradient-isolated modules and hands on what they compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from graphopt.compiler.emit import emit
from graphopt.compiler.parts import Part, isolated_modules, split
from graphopt.compiler.plan import Plan
from graphopt.cost import Cost, StepOptions, forecast
from graphopt.cost.loss import autocast
from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode
from graphopt.ir.inputs import Input, dtype_of, input_of, samples
from graphopt.ir.module import TrainingModule
from graphopt.ir.shapes import tensors_in, uncached


@dataclass(frozen=True)
class Stage:
    """A part of a plan's module, and what it takes and gives in training: plain values, and tensors on the meta device.

    Attributes:
        modules: the numbers of the modules in it, from 0. first: whether it takes the samples.
        outgoing: empty for the last stage, whose result is the network's.
    """

    part: Part
    modules: range
    first: bool
    incoming: tuple[Any, ...]
    outgoing: tuple[Any, ...]

    @property
    def sent_bytes(self) -> int:
        """Bytes of the tensors that it hands on."""
        return _bytes(self.outgoing)

    @property
    def received_bytes(self) -> int:
        """Bytes of the tensors that it takes."""
        return _bytes(self.incoming)

    @property
    def module(self) -> nn.Module:
        """The part as `forecast` and `measure` call it, with `options`."""
        return _Called(self.part)

    @property
    def options(self) -> StepOptions:
        """What `forecast` and `measure` need to know beside the options of the step itself."""
        options: StepOptions = {"inputs": self.incoming, "targets": True}
        return options if self.part.last else {**options, "loss": _Losses(self.part.losses)}

    def forecast(self, batch: int, **options: Unpack[StepOptions]) -> Cost:
        """The cost of its training step; `options` are those of the network's step."""
        own: StepOptions = {**options, **self.options}
        return forecast(self.module, (), batch, **own)


def trained(plan: Plan) -> tuple[TrainingModule, Input]:
    """What of a plan's module training runs, and the shape of a sample that it takes: behind cached features only what follows them."""
    cut = plan.needs.features
    if cut is None:
        return plan.module, plan.graph.input
    module = emit(plan.graph, start=cut.node)
    module.train()
    return module, input_of(module)


def stages(plan: Plan, runs: Sequence[range], batch: int, amp: str | None = None) -> tuple[Stage, ...]:
    """The stages that train `runs` of a plan's modules with batches of so many samples. Raises PassError as `split` does."""
    module, shape = trained(plan)
    mode = FakeMode()
    with mode:
        values: tuple[Any, ...] = samples(shape, batch, partial(torch.empty, dtype=dtype_of(module)))
        target = torch.zeros(batch, dtype=torch.long)
    found: list[Stage] = []
    for part, run in zip(split(module, runs), runs, strict=True):
        copied = fake_copy(part.module, mode).train()
        with uncached(part.module), mode, autocast(amp):
            result = copied(*values, target)
        given = () if part.last else tuple(result)
        found.append(Stage(part, run, not found, tuple(map(_described, values)), tuple(map(_described, given))))
        values = tuple(v.detach() if isinstance(v, Tensor) else v for v in given)
    return tuple(found)


def every_module(plan: Plan) -> list[range]:
    """The runs of one module each."""
    return [range(number, number + 1) for number in range(isolated_modules(plan.module))]


def _described(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _bytes(values: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(values))


class _Called(nn.Module):
    """A part in the protocol of a forecast: `module(*values, target) -> (result, local_loss)`."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part, self.last = part.module, part.last

    def forward(self, *values: Any) -> Any:
        result = self.part(*values)
        return result if self.last and isinstance(result, tuple) else (result, None)


@dataclass(frozen=True)
class _Losses:
    """The loss of a part that is not the last: the sum of its local losses."""

    positions: tuple[int, ...]

    def __call__(self, result: tuple[Any, ...], target: Tensor) -> Tensor:
        return torch.stack([result[i] for i in self.positions]).sum() if self.positions else torch.zeros(())
