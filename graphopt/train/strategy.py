"""How a step runs: ranks, device, precision, memory layout and compilation."""

import inspect
import resource
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.runtime.dtypes import AUTOCAST_DTYPES, dtype_name
from graphopt.spec import TrainSpec
from graphopt.train.ranks import ALONE, Ranks

_deterministic: Any = torch.utils.deterministic


def _resident(kind: Literal["RSS", "HWM"]) -> int:
    """Bytes of this process in memory: now, or the most since the last reset. Outside of Linux, the most ever."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"Vm{kind}:")).split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@dataclass
class Strategy:
    """One process on one device, alone. What several processes do otherwise, subclasses say."""

    device: torch.device
    precision: torch.dtype | None = None  # of autocast; None is float32, float16 scales its loss
    channels_last: bool = False  # NHWC memory format for images and convolution weights
    compiled: bool = False  # compile training steps with `torch.compile`, once per phase
    deterministic: bool = True  # use deterministic kernels where torch has them
    ranks: Ranks = ALONE
    before: int = field(default=0, init=False)  # bytes of this process that are not the run's

    @classmethod
    def of(cls, spec: TrainSpec) -> Self:
        """The strategy of one process. Raises RunError if the machine has no such device."""
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

    def with_ranks(self, ranks: Ranks) -> Self:
        """The same strategy among `ranks`; on CUDA, each takes the device of its local number."""
        device = torch.device("cuda", ranks.local) if self.device.type == "cuda" and ranks.count > 1 else self.device
        return replace(self, device=device, ranks=ranks)

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

    def wrap(self, module: nn.Module, unused: Collection[str] = ()) -> nn.Module:
        """The module that a training step calls in the place of `module`; `unused` are trainable parameters that it never reads."""
        return module

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients of a wrapped module stay on their rank: for all micro-batches of a step but the last."""
        return nullcontext()

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

    def begin_memory(self, module: nn.Module) -> None:
        """From now on memory counts as the run's, and so do the tensors of `module`; what libraries and the trace hold does not."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}
        self.before = _resident("RSS") - sum(own.values())
        self.reset_peak_memory()

    def reset_peak_memory(self) -> None:
        """Starts a new measurement."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # Linux: the peak of this process becomes what is resident now
                Path("/proc/self/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """The most bytes that were allocated on the CUDA device, or by which this process grew in the run."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _resident("HWM") - self.before)

    def describe(self) -> str:
        """Human-readable, for summary.json: 'cpu', 'cuda (NVIDIA H200), bfloat16'."""
        name = f"cuda ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else self.device.type
        return f"{name}, {dtype_name(self.precision)}" if self.precision else name


class Replicated(Strategy):
    """Every rank holds the whole network; gradients are averaged while they are computed (DistributedDataParallel)."""

    def wrap(self, module: nn.Module, unused: Collection[str] = ()) -> nn.Module:
        # A parameter that gets no gradient would make DDP wait for it. Its own name for a root's parameter begins with a dot.
        names = [name if "." in name else f".{name}" for name in unused]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        devices = [self.device] if self.device.type == "cuda" else None
        # Running statistics stay each rank's own; they are averaged where they are used.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch renamed it in 2.14
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, buffers: False}
        return DistributedDataParallel(module, **options)

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    def describe(self) -> str:
        return f"{super().describe()}, {self.ranks.count} ranks (ddp)"


def choose(spec: TrainSpec) -> Strategy:
    """The strategy of a spec, after all ranks have joined: alone `single`, with several ranks `ddp` where the spec says `auto`.

    Raises RunError for a device that is not there, a rank that is missing, or a strategy for another number of ranks.
    """
    alone = Strategy.of(spec)
    ranks = Ranks.join(alone.device.type)
    if ranks.count == 1:  # an elastic run may shrink to one process
        return alone
    name = spec.strategy if spec.strategy != "auto" else "ddp"
    if name == "single":
        fix = 'Start one process, or use strategy = "auto"'
        raise RunError(f'strategy = "single" is one process, {ranks.count} were started', where="train.strategy", fix=fix)
    kinds: dict[str, type[Strategy]] = {"ddp": Replicated}
    if name not in kinds:
        raise RunError(f"{name} is not available", where="train.strategy", fix="Use auto, single or ddp")
    return kinds[name].of(spec).with_ranks(ranks)
