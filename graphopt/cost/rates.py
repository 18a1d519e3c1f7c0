"""Seconds from a step's figures, by four rates of a machine that are measured on it in a few seconds.

A step is modelled as `convolved / F + multiplied / P + moved_bytes / B + kernels * t`: FLOPs of convolutions and of matrix products,
memory traffic and calls, one after the other. Convolutions and matrix products come from different libraries, whose speeds may be a factor
of two apart on the same processor. F, P, B and t are fitted to real steps of six small networks (least squares of the relative error, none
negative). The result is for comparing plans, not for timing: tools/tables/cost_time.md shows its error by backbone. Loading data is not
included, nor what other processes take of the machine.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.cost.figures import Cost, Work
from graphopt.cost.loss import criterion
from graphopt.cost.optimizer import Optimizer, Update, update_of
from graphopt.cost.step import StepOptions, forecast
from graphopt.errors import RunError, first_line
from graphopt.ir.copying import copy_with
from graphopt.ir.inputs import Input, dtype_of, samples
from graphopt.runtime.dtypes import AUTOCAST_DTYPES

#: timed steps, of which the fastest counts, after one step of warm-up
STEPS = 3


@dataclass(frozen=True)
class Rates:
    """How fast one device runs training steps.

    Attributes:
        flop, byte, kernel: seconds of one FLOP, of one byte moved, of one kernel call.
        product: seconds of one FLOP of a matrix product or of attention; None where it is `flop`, too.
        error: the largest relative error on the networks that were timed.
        device: its name. The rates hold for the number of threads that torch used.
    """

    flop: float
    byte: float
    kernel: float
    error: float
    device: str
    product: float | None = None

    def seconds(self, cost: Cost | Work) -> float:
        """Of one step of that cost, or of a part of one."""
        product = self.flop if self.product is None else self.product
        arithmetic = self.flop * (cost.flops - cost.product_flops) + product * cost.product_flops
        return arithmetic + self.byte * cost.moved_bytes + self.kernel * cost.kernels


@dataclass(frozen=True)
class TimedStep:
    """A training step and the machine that takes it: what passes settle by besides the graph.

    Attributes:
        batch: samples in the step. measured: gives the rates of the machine, once they are asked for.
        optimizer, optimizer_options, amp, channels_last, accumulate: as in `StepOptions`.
    """

    batch: int
    measured: Callable[[], Rates]
    optimizer: Optimizer = "sgd"
    optimizer_options: Mapping[str, Any] | None = None
    amp: str | None = None
    channels_last: bool = False
    accumulate: int = 1

    @property
    def micro_batch(self) -> int:
        """Samples that go through the network at once."""
        return self.batch // self.accumulate

    @cached_property
    def rates(self) -> Rates:
        """Of the machine, measured once. Raises RunError if it cannot be timed."""
        return self.measured()

    @property
    def options(self) -> StepOptions:
        """Those of the forecast of such a step."""
        return {
            "optimizer": self.optimizer,
            "optimizer_options": self.optimizer_options,
            "amp": self.amp,
            "channels_last": self.channels_last,
            "accumulate": self.accumulate,
        }

    def seconds(self, work: Work, update: Update) -> float:
        """Of the step: forward and backward of one micro-batch, as often as there are, and the update."""
        return self.accumulate * self.rates.seconds(work) + self.rates.seconds(update.work)

    def update(self, parameters: Iterable[Tensor]) -> Update:
        """What the update of these parameters costs."""
        return update_of(parameters, self.optimizer, self.optimizer_options)


def rates_of(device: str, amp: str | None = None, channels_last: bool = False) -> Rates:
    """What `measure_rates` finds, measured once in a process: everything here that goes by time goes by the same rates.

    `device` may be "auto", as in a spec. Raises RunError if it is not there.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return _rates_of(name, amp, channels_last)


@cache
def _rates_of(device: str, amp: str | None, channels_last: bool) -> Rates:
    try:
        return measure_rates(device, amp=amp, channels_last=channels_last)
    except (RuntimeError, AssertionError) as error:
        what, fix = f"no steps can be timed on {device}: {first_line(error)}", "Use cpu, or cuda if there is a GPU"
        raise RunError(what, fix=fix) from error


def measure_rates(device: str = "cpu", *, amp: str | None = None, channels_last: bool = False) -> Rates:
    """Times a few steps of six small networks on `device`, a few seconds in all. Weights and data are random.

    `amp` and `channels_last` are as in `StepOptions`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        costs = [forecast(make(), input, batch, amp=amp, channels_last=channels_last) for make, input, batch in _networks()]
        found = np.array([_time(make(), input, batch, device, amp, channels_last) for make, input, batch in _networks()])
    return fitted(costs, found, device)


def calibrated(rates: Rates, module: nn.Module, input: Input, batch: int, *, amp: str | None = None, channels_last: bool = False) -> Rates:
    """The same rates, all times what a timed step of `module` takes over its forecast: to compare runs of that network, or of parts of it.

    The step has as many samples as take a second by forecast, two at least and `batch` at most. `module` stays as it is.

    Raises RunError if the step fails.
    """
    taken = rates.seconds(forecast(module, input, batch, amp=amp, channels_last=channels_last))
    size = min(batch, max(2, int(batch / taken))) if taken > 1 else batch
    cost = forecast(module, input, size, amp=amp, channels_last=channels_last)
    with torch.random.fork_rng(devices=[]):
        try:
            factor = _time(copy_with(module), input, size, rates.device, amp, channels_last) / rates.seconds(cost)
        except RuntimeError as error:
            raise RunError(f"a step of {size} samples cannot be timed on {rates.device}: {first_line(error)}") from error
    product = rates.product and factor * rates.product
    return replace(rates, flop=factor * rates.flop, byte=factor * rates.byte, kernel=factor * rates.kernel, product=product)


def fitted(costs: Sequence[Cost], seconds: np.ndarray[Any, Any], device: str) -> Rates:
    """The rates that fit steps of these costs, which took these seconds, best."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # scipy has no type information

    figures = np.array([[c.flops - c.product_flops, c.product_flops, c.moved_bytes, c.kernels] for c in costs], dtype=float)
    scale = figures.max(axis=0)
    rates = nnls(figures / scale / seconds[:, None], np.ones(len(costs)))[0] / scale
    error = float(np.abs(figures @ rates / seconds - 1).max())
    flop, product, byte, kernel = rates.tolist()
    return Rates(flop, byte, kernel, error, device, product)


def _networks() -> list[tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """Networks dominated by launch overhead, by arithmetic and by memory bandwidth; with convolutions and with attention."""
    import timm

    from graphopt.models import cifar_resnet as cifar

    def wide() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))

    return [
        (partial(cifar.build, "resnet20"), (3, 32, 32), 2),
        (partial(cifar.build, "resnet20"), (3, 32, 32), 64),
        (partial(cifar.build, "vgg11"), (3, 32, 32), 64),
        (partial(timm.create_model, "resnet18"), (3, 128, 128), 16),
        (partial(timm.create_model, "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4), (3, 64, 64), 32),
        (wide, (3, 32, 32), 8),
    ]


def _time(module: nn.Module, input: Input, batch: int, device: str, amp: str | None, last: bool) -> float:
    layout = torch.channels_last if last else torch.contiguous_format
    module.to(device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
    # Drawn on the CPU, whose random state the caller restores.
    images = samples(input, batch, partial(torch.randn, dtype=dtype_of(module)))
    x = [each.to(device, memory_format=layout) if each.dim() == 4 else each.to(device) for each in images]
    y, loss_of, taken = torch.zeros(batch, dtype=torch.long, device=device), criterion("cross_entropy"), []
    for _ in range(STEPS + 1):
        start = _now(device)
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, AUTOCAST_DTYPES[amp]) if amp else nullcontext():
            loss = loss_of(module(*x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        taken.append(_now(device) - start)
    return min(taken[1:])


def _now(device: str) -> float:
    """Seconds; on a CPU those that it has worked for this thread, so that other processes do not count."""
    if torch.device(device).type != "cuda":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
