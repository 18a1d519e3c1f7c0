"""The cost of one training step: on fake tensors (`forecast`), or on real ones (`measure`).

Both are steps on the CPU. With a `device`, a forecast takes the step with the kernels that torch would choose there
(`graphopt.cost.kernels`), and says what the device must have (`graphopt.cost.cuda`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from graphopt.cost.attribution import Attribution, instrument
from graphopt.cost.cuda import Inside, device_memory
from graphopt.cost.devices import Device
from graphopt.cost.figures import BlockCost, Cost, Named
from graphopt.cost.kernels import as_on_cuda
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.loss import Loss, autocast, criterion
from graphopt.cost.optimizer import Optimizer, make_optimizer, state_of, take_step
from graphopt.cost.ranks import Parallel, collectives, fake_ranks
from graphopt.errors import CostError, NeedsValuesError, first_line
from graphopt.ir.collector import uncollected
from graphopt.ir.copying import copy_with, fake_copy
from graphopt.ir.fakes import FakeMode, unlogged
from graphopt.ir.grad_mode import recording
from graphopt.ir.inputs import Input, dtype_of, samples
from graphopt.ir.shapes import tensors_in, uncached
from graphopt.runtime.memory_format import channels_last

#: bytes of the smallest block of CUDA's caching allocator (`kMinBlockSize`); all blocks are multiples of it
BLOCK = 512
#: micro-batches of a step that are run, at most
_RUN = 3
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException)


class StepOptions(TypedDict, total=False):
    """How a step trains; each may be left out.

    Attributes:
        targets: use the emitted protocol `module(*inputs, target) -> (output, local_loss)`. Default: `module(*inputs) -> output`.
        optimizer: a name timm knows (default "sgd"), or a function from parameters to an optimizer; None leaves the optimizer out.
        optimizer_options: further arguments for timm's factory: `{"momentum": 0.0}`.
        amp: `"bfloat16"` or `"float16"` autocast around forward and loss, with the CPU's cast rules. Default None.
        loss: `"cross_entropy"` (default), `"binary_cross_entropy"`, or a function of (output, labels (N,)). The losses of several outputs
            (auxiliary heads) are added.
        channels_last: images and the weights of convolutions in NHWC memory format.
        accumulate: micro-batches that the step takes one after the other (default 1), whose gradients add up; it divides the batch.
        parallel: how the step runs on several ranks; the figures are then those of one rank's step.
        inputs: what the module takes, in the place of a batch of samples: plain values, and tensors like these.
        device: of a forecast: take the step with the kernels of this GPU, and forecast its memory there (`Cost.cuda`).
    """

    targets: bool
    optimizer: Optimizer
    optimizer_options: Mapping[str, Any] | None
    amp: str | None
    loss: str | Loss
    channels_last: bool
    accumulate: int
    parallel: Parallel | None
    inputs: Sequence[Any] | None
    device: Device | None


@recording()
def forecast(module: nn.Module, input: Input, batch: int, *, per_block: Sequence[str | Named] = (), **options: Unpack[StepOptions]) -> Cost:
    """What one training step of `module` costs, without running it: no memory, no GPU, no data.

    A copy of the module over fake CPU tensors takes the whole step (forward, loss, backward, optimizer). Its live bytes equal
    those of the real CPU step (`measure`).

    Args:
        module: on any device, meta included; not touched. Its `requires_grad` flags say what trains.
        input: one sample's shape, `(C, H, W)`, or that of each input; for a suffix, that of the features it takes.
        batch: samples in the step, of all its micro-batches.
        per_block: module paths, or regions, to add the step up by (`Cost.blocks`); `Cost.by` does it later, too.
        options: see `StepOptions`.

    Raises:
        CostError: the module needs values to run (data-dependent Python), does not take this input, or the optimizer is unknown.
    """
    parallel, device = options.get("parallel"), options.get("device")
    # Remembered results would leave out what collectives do.
    mode = FakeTensorMode(allow_non_fake_inputs=True) if parallel else FakeMode()
    with _explained():
        copied = fake_copy(module, mode, arranged(options))
    attribution = Attribution()
    with fake_ranks(parallel.ranks) if parallel else nullcontext(), uncached(module), mode, ExitStack() as stack:
        stack.enter_context(instrument(copied, attribution))
        stack.enter_context(unlogged())
        ledger = Ledger(attribution)
        ledger.copies_scattered = parallel is not None and parallel.backend == "gloo"
        if device is None:
            return _train_once(copied, input, batch, per_block, ledger, options)
        stack.enter_context(as_on_cuda())
        ledger.inside = inside = Inside(ledger, device)
        cost = _train_once(copied, input, batch, per_block, ledger, options)
        return replace(cost, cuda=device_memory(ledger, inside), roofline_seconds=inside.seconds)


@recording()
def measure(
    module: nn.Module,
    input: Input,
    batch: int,
    *,
    per_block: Sequence[str | Named] = (),
    attribute: bool = False,
    **options: Unpack[StepOptions],
) -> Cost:
    """The cost of a real step on the CPU, on a copy of `module` and a random batch: what `forecast` must equal.

    Args:
        attribute: run the step node by node, as the forecast does, to attribute costs; otherwise the module's own code runs, and every
            figure is attributed to `""`. The others are as in `forecast`.

    Raises:
        CostError: as in `forecast`, or the module is on the meta device.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise CostError("a module on the meta device has no values to run", fix="Build it on the CPU to measure it")
    arrange = arranged(options)
    with _explained():
        copied = copy_with(module, lambda tensor: arrange(_own(tensor)))
    attribution = Attribution()
    with uncached(module), instrument(copied, attribution) if attribute else nullcontext():
        return _train_once(copied, input, batch, per_block, Ledger(attribution), options)


def arranged(options: StepOptions) -> Callable[[Any], Any]:
    """What puts an input or a parameter into the memory format of a step."""
    if not options.get("channels_last"):
        return lambda value: value
    return lambda value: channels_last(value) if isinstance(value, Tensor) else value


def _own(tensor: Tensor) -> Tensor:
    """A CPU tensor with the same values, without a gradient. One without values stands for what its holder is called with, and stays."""
    if tensor.is_meta:
        return tensor
    values = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _train_once(
    module: nn.Module, input: Input, batch: int, per_block: Sequence[str | Named], ledger: Ledger, options: StepOptions
) -> Cost:
    """One step of `module`, a private copy."""
    count = options.get("accumulate", 1)
    size = _micro_batch(batch, count)
    amp, loss = autocast(options.get("amp")), criterion(options.get("loss", "cross_entropy"))
    parallel = options.get("parallel") or Parallel.alone()
    module.train()
    with ExitStack() as stack:
        # The collector frees at moments of its own; what is live must depend on the step alone.
        stack.enter_context(uncollected())
        given = options.get("inputs")
        labels = partial(torch.zeros, size, dtype=torch.long, device="cpu")
        arrange = arranged(options)
        batches = [(tuple(map(arrange, _inputs(module, size, input, given))), labels()) for _ in range(min(count, _RUN))]
        wrapped = parallel.wrap(module)
        step = _Step(ledger, module, wrapped, loss, amp, parallel, options.get("targets", False), count)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(options.get("optimizer", "sgd"), options.get("optimizer_options"), trained)
        step.warm_up(batches, optimizer)
        ledger.set_kind(getattr(wrapped, "buckets", ()), Kind.GRADIENT)
        ledger.set_kind(module.parameters(), Kind.PARAMETER)
        ledger.set_kind(module.buffers(), Kind.BUFFER)
        ledger.set_kind(tensors_in(batches[0]), Kind.INPUT)
        if optimizer is not None:
            ledger.set_kind(state_of(optimizer), Kind.OPTIMIZER)
            ledger.host = {ledger.index(state["step"]) for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)}
        stack.enter_context(_known_gradients(ledger))
        stack.enter_context(ledger)
        saved, gradient_bytes = step.run(batches, optimizer)
        ledger.close()
    cost = cost_of(module, ledger, saved, gradient_bytes, batch)
    cost = replace(cost, collectives=collectives(ledger.messages))
    return replace(cost, blocks=cost.by(per_block)) if per_block else cost


def _micro_batch(batch: int, count: int) -> int:
    """Samples in each of `count` micro-batches. Raises CostError if the batch does not divide."""
    if batch < 1:
        raise CostError(f"a batch has at least one sample, found {batch}")
    if count < 1 or batch % count:
        raise CostError(f"a batch of {batch} does not divide into {count} micro-batches", fix="Give a multiple of accumulate")
    return batch // count


def _inputs(module: nn.Module, batch: int, input: Input, given: Sequence[Any] | None) -> tuple[Any, ...]:
    """Random samples of [0, 1); or zeros with the layouts of the tensors in `given`, plain values as they are."""
    if given is None:
        return samples(input, batch, partial(torch.rand, dtype=dtype_of(module), device="cpu"))
    made = (torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cpu").zero_() if isinstance(v, Tensor) else v for v in given)
    return tuple(made)


@dataclass
class _Step:
    """A step of `module`, which is called as `wrapped`, on one or more micro-batches.

    At most three are run: the first, one that stands for all in the middle, which are alike, and the last.
    """

    ledger: Ledger
    module: nn.Module
    wrapped: nn.Module
    criterion: Loss
    autocast: AbstractContextManager[Any]
    parallel: Parallel
    targets: bool
    accumulate: int

    def warm_up(self, batches: Sequence[tuple[tuple[Any, ...], Tensor]], optimizer: torch.optim.Optimizer | None) -> None:
        """Steps that do not count. Gradients that stay allocated between steps are gradients from the start."""
        for _ in range(self.parallel.warm_up):
            _, loss = self._forward(*batches[0])
            self._differentiate(batches[0][0], loss)
            self.parallel.after_backward()
            if optimizer is not None:
                take_step(optimizer)
        if self.parallel.warm_up:
            self.ledger.set_kind(self._gradients(), Kind.GRADIENT)
            self.module.zero_grad(set_to_none=True)

    def run(self, batches: list[tuple[tuple[Any, ...], Tensor]], optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, int], int]:
        """The step that counts: what each path had saved at the end of the last forward, and the bytes of all `.grad`.

        It uses up `batches` but for the last: a training loop takes one micro-batch at a time, so each counts from its forward to the next
        one's, and the last until the next step's.
        """
        count, gradient_bytes, last = self.accumulate, 0, len(batches) - 1
        for number in range(last + 1):
            x = target = None
            x, target = batches.pop(0)
            if number == last:
                batches.append((x, target))
            self.ledger.set_kind(tensors_in((x, target)), Kind.INPUT)
            times = count - 2 if 0 < number < last else 1
            with nullcontext() if number == last else self.parallel.without_reduction(self.wrapped):
                self.ledger.start_phase("forward", times)
                with torch.autograd.graph.saved_tensors_hooks(self.ledger.pack, self.ledger.unpack):
                    # The output lives until the next forward, or the step's end, as it does in a training loop.
                    output, loss = self._forward(x, target)
                saved = self.ledger.saved_now()
                if loss.requires_grad:
                    self.ledger.start_phase("backward", times)
                    self._differentiate(x, loss / count if count > 1 else loss)
                    if number == last:
                        self.parallel.after_backward()
                    gradients = self._gradients()
                    self.ledger.set_kind(gradients, Kind.GRADIENT)
                    gradient_bytes = sum(self.ledger.sizes[index] for index in {self.ledger.index(g) for g in gradients})
                    del gradients
        if optimizer is not None and loss.requires_grad:
            self.ledger.start_phase("optimizer")
            self.ledger.default = Kind.SCRATCH
            take_step(optimizer)
            self.ledger.set_kind(state_of(optimizer), Kind.OPTIMIZER)
            optimizer.zero_grad(set_to_none=True)
        del output
        return saved, gradient_bytes

    def _forward(self, x: tuple[Any, ...], target: Tensor) -> tuple[Any, Tensor]:
        with _explained(x), self.autocast:
            output, local = self.wrapped(*x, target) if self.targets else (self.wrapped(*x), None)
            total = self.criterion(output, target)
            return output, total if local is None else total + local

    @staticmethod
    def _differentiate(x: Any, loss: Tensor) -> None:
        with _explained(x):
            torch.autograd.backward(loss)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]


def cost_of(module: nn.Module, ledger: Ledger, saved: dict[str, int], gradient_bytes: int, batch: int) -> Cost:
    """The figures of a finished step; `saved` is what each path had saved at the end of the forward."""
    rows = _rows(module, ledger.attribution, saved)
    sums = sum(rows, BlockCost("")).to_dict()
    del sums["path"]
    peak, at = ledger.peak()
    return Cost(
        batch=batch,
        parameter_bytes=ledger.total(Kind.PARAMETER),
        buffer_bytes=ledger.total(Kind.BUFFER),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=ledger.total(Kind.OPTIMIZER),
        input_bytes=ledger.peak((Kind.INPUT,))[0],
        peak_bytes=peak,
        peak_activation_bytes=ledger.peak((Kind.ACTIVATION, Kind.INPUT))[0],
        peak_block_bytes=ledger.peak(block=BLOCK)[0],
        peak_phase=ledger.phase_of(at),
        peak_parts=ledger.live_at(at),
        all_reduced_bytes=sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        kernels=ledger.kernels,
        moved_bytes=ledger.moved,
        product_flops=ledger.products,
        rows=rows,
        **sums,
    )


def _rows(module: nn.Module, attribution: Attribution, saved: dict[str, int]) -> tuple[BlockCost, ...]:
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        count = counts.setdefault(name.rpartition(".")[0], [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    rows = []
    for path in dict.fromkeys([*attribution.totals, *saved, *counts]):
        figures = [*counts.get(path, (0, 0)), *attribution.totals.get(path, (0, 0, 0, 0)), saved.get(path, 0)]
        rows.append(BlockCost(path, *figures))
    return tuple(rows)


@contextmanager
def _known_gradients(ledger: Ledger) -> Iterator[None]:
    """Counts what `torch.autograd.grad` returns for parameters as gradients, although it never passes through `.grad`."""
    real = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(outputs, inputs, *args, **kwargs)
        asked = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        for one, gradient in zip(asked, found, strict=False):
            if gradient is not None and one.is_leaf and ledger.kinds[ledger.index(one)] == Kind.PARAMETER:
                ledger.set_kind((gradient,), Kind.GRADIENT)
        return found

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = real


@contextmanager
def _explained(x: Any = None) -> Iterator[None]:
    """What a step on the batch `x` raises, or copying the module for one."""
    try:
        yield
    except CostError:
        raise
    except _NEEDS_VALUES as error:
        raise NeedsValuesError(
            f"the module's Python looks at tensor values, which a forecast does not have: {type(error).__name__}: {first_line(error)}",
            fix="Compute shapes and branches from sizes, not from values",
        ) from error
    except Exception as error:
        what, fix = "the module cannot be copied", "copy.deepcopy(module) must work"
        if x is not None:
            shapes = " and ".join(str(tuple(t.shape)) for t in tensors_in(x))
            what = f"the module does not take a batch of shape {shapes}"
            fix = "Check the input's shape, and that the module trains on it"
        raise CostError(f"{what}: {type(error).__name__}: {error}", fix=fix) from error
