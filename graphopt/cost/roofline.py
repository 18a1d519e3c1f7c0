"""Seconds of a training step on a named GPU at its peak rates: the least that it can take there, without having one.

The roofline model (Williams, Waterman, Patterson, CACM 2009): an operator takes the longer of its arithmetic at the peak FLOP rate of its
type and its reads and writes at the peak bandwidth. The rates are the makers' (`graphopt.cost.devices`); nothing is measured. Real kernels
are slower, and launching them takes time that depends on the host: `graphopt check --device cuda` measures a GPU where there is one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.cost.devices import Device
from graphopt.cost.figures import Cost
from graphopt.cost.flops import CONVOLUTIONS, operator_flops


def peak_rate(device: Device, packet: Any, dtype: torch.dtype) -> float:
    """Peak FLOP/s of an operator on tensors of `dtype`.

    Convolutions in float32 use TF32, as is torch's default (`torch.backends.cudnn.allow_tf32`); matrix products do not.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return device.bfloat16
    return device.tf32 if packet in CONVOLUTIONS else device.float32


def operator_seconds(device: Device, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any) -> float:
    """The least seconds of one operator; `tensors` are all that it reads and writes."""
    moved = sum(t.numel() * t.element_size() for t in tensors)
    flops = operator_flops(packet, args, kwargs, out)
    if flops is None or not tensors:
        return moved / device.bandwidth
    return max(moved / device.bandwidth, sum(flops) / peak_rate(device, packet, tensors[0].dtype))


@dataclass(frozen=True)
class PeakRates:
    """The rates of a GPU that is not here. Gives seconds for costs that were forecast for it."""

    gpu: Device

    @property
    def device(self) -> str:
        """Its name."""
        return self.gpu.name

    def seconds(self, cost: Cost) -> float:
        """The least that a step of this cost takes. Raises ValueError for the forecast of a step on another device."""
        if cost.roofline_seconds is None or cost.cuda is None or cost.cuda.device != self.gpu:
            raise ValueError(f"this is no forecast for {self.gpu.name}")
        return cost.roofline_seconds
