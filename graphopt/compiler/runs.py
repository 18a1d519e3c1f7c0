"""What an emitted module computes on random input: run when a check asks for it, and remembered.

One module is checked twice, after the pass that made it and before the next one. Both use the same runs.
"""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graphopt.errors import VerifyError, first_line
from graphopt.ir.copying import copy_with, real_copy
from graphopt.ir.inputs import Input, dtype_of, samples
from graphopt.ir.shapes import tensors_in

#: samples in a numerical check
BATCH = 2


@dataclass(frozen=True)
class Computed:
    """Outputs of a run, and the gradients of all trainable parameters by name, where they were asked for (None: it has none)."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None] | None = None


#: gets the name of a parameter, and the parameter with its gradient, which it may replace
Arrived = Callable[[str, Tensor], None]


class Runs:
    """Runs of one emitted module on random input, each done once.

    Attributes:
        module: what runs; its values must not change, unless `hold` was called before.
        input: shape of one sample, of each input. smaller: of a smaller one that the module takes, too; None where there is none.
    """

    def __init__(self, module: nn.Module, input: Input, smaller: Input | None) -> None:
        self.module, self.input, self.smaller = module, input, smaller
        self._found: dict[tuple[Input, torch.dtype, bool, bool], Computed] = {}

    def hold(self) -> None:
        """Lets later runs use the values of now, whatever becomes of the module's. Gradients that a pass cannot reach stay with them."""
        self.module = copy_with(self.module)

    def computed(
        self, shape: Input, dtype: torch.dtype, *, training: bool = False, gradients: bool = False, arrived: Arrived | None = None
    ) -> Computed:
        """A run; gradients are those of `scalar` in eval mode, without them nothing is recorded. Raises what the module raises.

        `arrived` is called in the backward pass of a run that was not made before, with each parameter that has got its gradient.
        """
        key = (shape, dtype, training, gradients)
        if key not in self._found:
            try:
                with redirect_stderr(io.StringIO()) if shape != self.input else nullcontext():  # fx prints what a graph module raises
                    self._found[key] = _run(self.module, shape, dtype, training=training, gradients=gradients, arrived=arrived)
            except RuntimeError as error:
                if dtype == dtype_of(self.module) or shape != self.input:
                    raise
                what = f"it cannot be compared in {str(dtype).removeprefix('torch.')}, where its forward fails: {first_line(error)}"
                raise VerifyError(what, fix='Take types from its parameters in forward, or set verify = "off"') from error
        return self._found[key]

    def known(self, shape: Input, dtype: torch.dtype, *, training: bool) -> Computed:
        """The same, of any run: one with gradients gives the outputs, too."""
        return self._found.get((shape, dtype, training, True)) or self.computed(shape, dtype, training=training)

    def forget_gradients(self) -> None:
        """Frees the gradients of all runs; outputs stay known."""
        for shape, dtype, training, gradients in list(self._found):
            if gradients:
                self._found[shape, dtype, training, False] = Computed(self._found.pop((shape, dtype, training, True)).outputs)


def _run(
    module: nn.Module, shape: Input, dtype: torch.dtype, *, training: bool, gradients: bool, arrived: Arrived | None = None
) -> Computed:
    copied = real_copy(module, dtype).train(training)
    if arrived is not None:
        for name, parameter in copied.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(arrived, name))
    with seeded(), torch.set_grad_enabled(gradients):
        outputs = tensors_in(copied(*sample(shape, dtype)))
    found = None
    if gradients:
        loss = scalar(outputs, torch.zeros((), dtype=dtype))
        if loss.requires_grad:
            torch.autograd.backward(loss)
        found = {n: p.grad for n, p in copied.named_parameters() if p.requires_grad}
    return Computed([t.detach() for t in outputs], found)


def first_dtype(module: nn.Module) -> torch.dtype:
    """What runs are made in first: float32, or float64 for a module of that type, whose forward may ask for it."""
    own = dtype_of(module)
    return own if own == torch.float64 else torch.float32


def sample(shape: Input, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The samples that every run gets, (2, *shape), from 0 to 1; of each input."""
    draw = torch.Generator().manual_seed(1)
    return samples(shape, BATCH, lambda *sizes: torch.rand(sizes, generator=draw, dtype=torch.float64).to(dtype))


def scalar(outputs: list[Tensor], local: Tensor) -> Tensor:
    """A loss that depends on every output: a fixed random weighting of them, plus local losses."""
    for tensor in (t for t in outputs if t.requires_grad):
        weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype)
        local = local + (tensor * weights).sum()
    return local


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time, from Python's generator too; both go on as they were afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        random.seed(2)
        try:
            yield
        finally:
            random.setstate(state)
