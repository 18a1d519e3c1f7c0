"""How a step runs: devices, precision, memory layout and compilation."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.runtime.dtypes import AUTOCAST_DTYPES, dtype_name
from graphopt.spec import TrainSpec

_deterministic: Any = torch.utils.deterministic


@dataclass(frozen=True)
class Strategy:
    """One process on one device."""

    device: torch.device
    precision: torch.dtype | None = None  # of autocast; None is float32, float16 scales its loss
    channels_last: bool = False  # NHWC memory format for images and convolution weights
    compiled: bool = False  # compile training steps with `torch.compile`, once per phase
    deterministic: bool = True  # use deterministic kernels where torch has them

    @classmethod
    def of(cls, spec: TrainSpec) -> Self:
        """The strategy of a spec. Raises RunError if the machine has no such device, or the spec asks for several ranks."""
        if spec.strategy in ("ddp", "fsdp") or torch.distributed.is_torchelastic_launched():
            fix = 'Start it without torchrun, with strategy = "single"'
            raise RunError("training runs on one device for now", where="train.strategy", fix=fix)
        name = spec.device if spec.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RunError(f"{name!r} is not a device", where="train.device", fix="Use auto, cpu or cuda") from error
        if device.type not in ("cpu", "cuda"):
            raise RunError(f"graphopt trains on cpu or cuda, not on {name!r}", where="train.device")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RunError(f"torch finds no device {name}", where="train.device", fix="Use auto or cpu")
        return cls(device, AUTOCAST_DTYPES[spec.amp] if spec.amp else None, spec.channels_last, spec.compile, spec.deterministic)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, torch uses deterministic kernels (`deterministic`) or the fastest; the settings are restored on exit."""
        algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        benchmark, fill = torch.backends.cudnn.benchmark, _deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not self.deterministic
        _deterministic.fill_uninitialized_memory = False  # it costs time, and would hide reads of uninitialised memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            torch.backends.cudnn.benchmark, _deterministic.fill_uninitialized_memory = benchmark, fill

    def to_device(self, module: nn.Module) -> None:
        """Moves a module to the device, in the memory format of the strategy; in place, so that parameters keep their identity."""
        module.to(self.device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)

    def callable(self, module: nn.Module) -> Callable[..., Any]:
        """What a training step calls: the module, or its compiled form without the guards of the phase before."""
        if not self.compiled:
            return module
        torch.compiler.reset()
        return torch.compile(module)

    def move(self, batch: Batch) -> Batch:
        sample, input, target = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        if self.channels_last and input.ndim == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        return Batch(sample, input, target)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.precision) if self.precision else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler; it does nothing unless gradients are float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)

    def synchronize(self) -> None:
        """Waits for the device, so that the next reading of a clock includes its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Starts a new measurement; on the CPU the process's own peak cannot be reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """The most bytes that were allocated on the CUDA device, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe(self) -> str:
        """Human-readable, for summary.json: 'cpu', 'cuda (NVIDIA H200), bfloat16'."""
        name = f"cuda ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else self.device.type
        return f"{name}, {dtype_name(self.precision)}" if self.precision else name
