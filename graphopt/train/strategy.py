"""Where a step runs: the one place that knows devices, precision, memory layout, compilation and ranks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.spec import TrainSpec

Answer = TypeVar("Answer")
_filling: Any = torch.utils.deterministic
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Strategy:
    """One process on one device; several ranks are a second strategy with the same questions.

    Attributes:
        device: CPU or one CUDA device.
        precision: autocast dtype, or None for float32. float16 scales its loss.
        channels_last: NHWC memory for images and convolution weights.
        compiled: run training steps through `torch.compile`, anew per phase.
        deterministic: the same kernels every time, where torch has such.
        rank, world: this process among all.
    """

    device: torch.device
    precision: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False
    deterministic: bool = True
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, spec: TrainSpec) -> Strategy:
        """The strategy a spec asks for. Raises RunError when the machine has no such device, or several ranks are asked for."""
        if spec.strategy in ("ddp", "fsdp") or torch.distributed.is_torchelastic_launched():
            fix = 'Start it without torchrun, with strategy = "single".'
            raise RunError("training runs on one device for now", where="train.strategy", fix=fix)
        name = spec.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RunError(f"{name!r} is not a device", where="train.device", fix="Use auto, cpu or cuda.") from error
        if device.type not in ("cpu", "cuda"):
            raise RunError(f"graphopt trains on cpu or cuda, not on {name!r}", where="train.device")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RunError(f"torch finds no device {name} here", where="train.device", fix="Use auto or cpu.")
        return cls(device, PRECISIONS[spec.amp] if spec.amp else None, spec.channels_last, spec.compile, spec.deterministic)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, torch picks the same kernels every time (`deterministic`) or the fastest; outside, as before."""
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            _filling.fill_uninitialized_memory,
        )
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not self.deterministic
        _filling.fill_uninitialized_memory = False  # costs time, and only hides bugs of ours
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = before[2]
            _filling.fill_uninitialized_memory = before[3]

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0

    def place(self, module: nn.Module) -> nn.Module:
        """The module on the device, in the memory layout asked for. Acts in place; parameters keep their identity."""
        module.to(self.device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def callable(self, module: nn.Module) -> Callable[..., Any]:
        """What a training step calls. Compilation starts from nothing at each phase: guards of the last one are stale."""
        if not self.compiled:
            return module
        torch.compiler.reset()
        return torch.compile(module)

    def move(self, batch: Batch) -> Batch:
        """The batch on the device, images in the memory layout asked for."""
        sample, input, target = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        if self.channels_last and input.ndim == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        return Batch(sample, input, target)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision around a forward pass, or nothing."""
        return torch.autocast(self.device.type, self.precision) if self.precision else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler; it passes everything through unless gradients are float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)

    def agree(self, decide: Callable[[], Answer]) -> Answer:
        """The one answer that every rank acts on (R5). With one rank, its own."""
        return decide()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Start a new measurement; on the CPU the process's own peak cannot be reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: allocated on the CUDA device at most, or resident in this process at most."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe(self) -> str:
        """For people and summary.json: 'cpu', 'cuda (NVIDIA H200), bfloat16'."""
        name = self.device.type
        if name == "cuda":
            name = f"cuda ({torch.cuda.get_device_name(self.device)})"
        return f"{name}, {str(self.precision).removeprefix('torch.')}" if self.precision else name
