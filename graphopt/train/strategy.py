"""How a step runs: ranks, device, precision, memory layout and compilation."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from timm.utils import dispatch_clip_grad  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.runtime.dtypes import AUTOCAST_DTYPES, dtype_name
from graphopt.runtime.memory_format import channels_last
from graphopt.runtime.shards import whole_state
from graphopt.spec import TrainSpec
from graphopt.train.heap import release_free_memory
from graphopt.train.owned import Owned
from graphopt.train.ranks import ALONE, Ranks

_deterministic: Any = torch.utils.deterministic


def _resident(kind: Literal["RSS", "HWM"]) -> int:
    """Bytes of this process in memory: now, or the most since the last reset. Outside of Linux, the most ever; on Windows 0."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"Vm{kind}:")).split()[1])
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _no_signal() -> int:
    return 0


@dataclass
class Strategy:
    """One process on one device, alone. What several processes do otherwise, subclasses say.

    Attributes:
        shares_devices: whether several of its processes may have one CUDA device.
    """

    shares_devices: ClassVar[bool] = False
    device: torch.device
    precision: torch.dtype | None = None  # of autocast; None is float32, float16 scales its loss
    channels_last: bool = False  # NHWC memory format for images and convolution weights
    compiled: bool = False  # compile training steps with `torch.compile`, once per phase
    deterministic: bool = True  # use deterministic kernels where torch has them
    ranks: Ranks = ALONE
    signal: Callable[[], int] = field(default_factory=lambda: _no_signal, init=False, repr=False)  # a stop signal that has come, or 0
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

    def device_of(self, ranks: Ranks) -> torch.device:
        """The device of this rank among `ranks`: on CUDA, that of its local number. Raises RunError where there are not as many."""
        if self.device.type != "cuda" or ranks.count == 1:
            return self.device
        count, here = torch.cuda.device_count(), max(ranks.local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if here > count and not self.shares_devices:
            what = f"{here} processes on this machine, which has {count} CUDA devices"
            raise RunError(what, where="train.device", fix=f"Start {count}, one per device")
        return torch.device("cuda", ranks.local % count)

    def with_ranks(self, ranks: Ranks) -> Self:
        """The same strategy among `ranks`, on this one's device."""
        return replace(self, device=self.device_of(ranks), ranks=ranks)

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

    def check(self, plan: Plan) -> None:
        """Raises RunError for a plan that this strategy cannot train."""

    @property
    def peers(self) -> Ranks:
        """The ranks that train the same parameters, on other samples: they take each step together, and may communicate in it."""
        return self.ranks

    @property
    def feeds(self) -> bool:
        """Whether this rank reads training data, or features that it has cached."""
        return True

    def expect(self, *, slow: bool) -> None:
        """Sets how long this rank waits for others."""
        self.ranks.expect(slow=slow)

    def own(self, plan: Plan) -> Owned:
        """What this rank trains of a phase. All ranks have to call it."""
        return Owned.of(plan.module, plan.module)

    def wrap(self, module: nn.Module, plan: Plan, unused: Sequence[str] = ()) -> nn.Module:
        """The module that a training step calls in the place of `module`; `unused` are trainable parameters that it never reads.

        It may replace the parameters of `module`, by parts of them.
        """
        return module

    @property
    def shard(self) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
        """Makes a tensor of a shape, sharded as parameters are, from this rank's rows of it; None where tensors are whole."""
        return None

    def evaluated(self, wrapped: nn.Module, plan: Plan) -> nn.Module:
        """What an evaluation calls with images; `wrapped` is from `wrap`, and may take features in their place."""
        return plan.module

    def wrap_average(self, module: nn.Module, plan: Plan) -> None:
        """Does with a copy of the plan's module, which is averaged and evaluated, what `wrap` does with parameters."""

    def to_shards(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Any]:
        """Optimizer state by name, from whole tensors, for these parameters."""
        return state

    def batches(self, source: Iterator[Batch], count: int, *, training: bool) -> Iterator[Batch]:
        """The next `count` batches of an epoch, or of an evaluation; `source` is for a rank that `feeds`."""
        return source

    def forward(self, call: Callable[..., Any], batch: Batch, *, targets: bool) -> tuple[Any, Tensor | None]:
        """The network's output in training and the local losses; None for an output that another rank computes.

        With `targets`, `call` takes them too, and returns both.
        """
        if not targets:
            return call(batch.input), None
        output, local = call(batch.input, batch.target)
        return output, local

    def infer(self, module: nn.Module, batch: Batch) -> Any:
        """The network's output in eval mode; None where another rank computes it."""
        return module(batch.input)

    def requested(self, signum: int) -> int:
        """The signal by which the run ends after this step, or 0; `signum` is one that this rank has got."""
        return signum

    def times(self) -> list[dict[str, Any]]:
        """Per rank of a chain, what it has done in the training of this epoch; for the log. All ranks have to call it."""
        return []

    def stopping(self) -> int:
        """The largest stop signal that any rank has got, or 0; between steps, for ranks that cache features."""
        return int(self.peers.largest(self.signal()))

    def announce(self, value: Any) -> None:
        """Tells the ranks that read no data what the one that does has decided; they call `announced`."""

    def announced(self) -> Any:
        """What the rank that reads the data announces."""
        raise NotImplementedError

    def gathered(self, state: Mapping[str, Any], module: nn.Module, *, keep: bool, everywhere: bool) -> dict[str, Any] | None:
        """A phase's state, whole: where `keep` says so, on rank 0 at least, and `everywhere` on all ranks. All have to call it."""
        return whole_state(state, keep=keep)

    def differing(self, buffers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Per rank that has samples of its own, the buffers in which these ranks differ. All ranks have to call it."""
        return self.peers.differing(buffers)

    def share(self, owned: Owned, names: Sequence[str]) -> None:
        """Gives every rank the values of these parameters of the plan's module."""

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients of a wrapped module stay on their rank: for all micro-batches of a step but the last."""
        return nullcontext()

    def after_backward(self) -> None:
        """Reduces the gradients over ranks that no backward pass has reduced."""

    def after_step(self) -> None:
        """The optimizer has updated this rank's parameters."""

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """Clips gradients, by timm's modes."""
        dispatch_clip_grad(parameters, limit, mode=mode)

    def callable(self, module: nn.Module) -> Callable[..., Any]:
        """What a training step calls: the module, or its compiled form without the guards of the phase before."""
        if not self.compiled:
            return module
        torch.compiler.reset()
        return torch.compile(module)

    def move(self, batch: Batch) -> Batch:
        sample, input, target = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        return Batch(sample, channels_last(input) if self.channels_last else input, target)

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
        release_free_memory()
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}
        self.before = _resident("RSS") - sum(own.values())
        self.reset_peak_memory()

    def reset_peak_memory(self) -> None:
        """Starts a new measurement, from what is in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            release_free_memory()
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

    def wrap(self, module: nn.Module, plan: Plan, unused: Sequence[str] = ()) -> nn.Module:
        return replicated(module, self.device, unused)

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    def describe(self) -> str:
        return f"{super().describe()}, {self.ranks.count} ranks (ddp)"


def replicated(module: nn.Module, device: torch.device, unused: Sequence[str] = (), group: Any = None) -> DistributedDataParallel:
    """A module whose gradients are averaged over a group of ranks, all of them by default; `unused` parameters never get one."""
    # A parameter that gets no gradient would make DDP wait for it. Its own name for a root's parameter begins with a dot.
    names = [name if "." in name else f".{name}" for name in unused]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    devices = [device] if device.type == "cuda" else None
    # Running statistics stay each rank's own; they are averaged where they are used.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.14
    # Nor does the wrapper give all ranks rank 0's: a resumed rank has its own. Equal weights are checked, not made.
    options: dict[str, Any] = {
        "device_ids": devices,
        "gradient_as_bucket_view": True,
        "init_sync": False,
        buffers: False,
        "process_group": group,
    }
    return DistributedDataParallel(module, **options)
