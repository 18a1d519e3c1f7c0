"""One training step under the ledger: on fake tensors (`forecast`), or really (`measure`)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn import functional as F

from graphopt.cost.attribution import Attribution, follow
from graphopt.cost.cuda import BLOCK
from graphopt.cost.errors import CostError
from graphopt.cost.figures import BlockCost, Cost, Named
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.stand_in import fake_copy, real_copy

Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None
Loss = str | Callable[[Any, Tensor], Tensor]
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def forecast(
    module: nn.Module,
    input: tuple[int, ...],
    batch: int,
    *,
    targets: bool = False,
    optimizer: Optimizer = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    amp: str | None = None,
    per_block: Sequence[str | Named] = (),
    loss: Loss = "cross_entropy",
) -> Cost:
    """What one training step of `module` costs, without running it: no memory, no GPU, no data.

    A copy of the module over fake CPU tensors takes the whole step (forward, loss, backward, optimizer). Its live bytes equal
    those of the real CPU step (`measure`); GPU kernels save and allocate differently (see `graphopt.cost.cuda`).

    Args:
        module: on any device, meta included; not touched. Its `requires_grad` flags say what trains.
        input: one sample's shape, `(C, H, W)`; for a suffix, that of the features it takes.
        batch: samples in the step.
        targets: the emitted protocol `module(x, target) -> (output, local_loss)`.
        optimizer: a name timm knows, or a function from parameters to an optimizer; None leaves the optimizer out.
        optimizer_options: what timm's factory takes besides: `{"momentum": 0.0}`.
        amp: `"bfloat16"` or `"float16"` autocast around forward and loss, with the CPU's cast rules.
        per_block: module paths, or regions, to add the step up by (`Cost.blocks`); `Cost.by` does it later, too.
        loss: `"cross_entropy"`, `"binary_cross_entropy"`, or a function of (output, labels (N,)). Several outputs (auxiliary heads) add up.

    Raises:
        CostError: the module needs values to run (data-dependent Python), does not take this input, or the optimizer is unknown.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = fake_copy(module, mode)
    return _account(module, copied, mode, input, batch, targets, optimizer, optimizer_options, amp, per_block, loss, attribute=True)


def measure(
    module: nn.Module,
    input: tuple[int, ...],
    batch: int,
    *,
    targets: bool = False,
    optimizer: Optimizer = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    amp: str | None = None,
    per_block: Sequence[str | Named] = (),
    loss: Loss = "cross_entropy",
    attribute: bool = False,
) -> Cost:
    """The same account of a real step on the CPU, on a copy of `module` and a random batch: what `forecast` must equal.

    With `attribute` the step runs node by node as the forecast's does; without, the module's own code runs and every
    figure goes to `""`. Raises CostError for a module on the meta device.
    """
    copied = real_copy(module)
    return _account(module, copied, None, input, batch, targets, optimizer, optimizer_options, amp, per_block, loss, attribute=attribute)


def _account(
    module: nn.Module,
    copied: nn.Module,
    mode: FakeTensorMode | None,
    input: tuple[int, ...],
    batch: int,
    targets: bool,
    optimizer: Optimizer,
    options: Mapping[str, Any] | None,
    amp: str | None,
    per_block: Sequence[str | Named],
    loss: Loss,
    attribute: bool,
) -> Cost:
    if amp is not None and amp not in AMP_DTYPES:
        raise CostError(f"amp is one of {', '.join(map(repr, AMP_DTYPES))} or None, found {amp!r}")
    if batch < 1:
        raise CostError(f"a batch has at least one sample, found {batch}")
    attribution = Attribution()
    if attribute:
        follow(copied, attribution)
    ledger = Ledger(attribution)
    trained = [p for p in copied.parameters() if p.requires_grad]
    autocast = torch.autocast("cpu", dtype=AMP_DTYPES[amp]) if amp else nullcontext()
    criterion = LOSSES.get(loss) if isinstance(loss, str) else loss
    if criterion is None:
        raise CostError(f"loss is one of {', '.join(map(repr, LOSSES))} or a function, found {loss!r}")
    copied.train()
    with ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(_quiet_fakes())
        stack.enter_context(_quiet_collector())
        x = torch.randn(batch, *input, device="cpu")
        target = torch.zeros(batch, dtype=torch.long, device="cpu")
        stepper = _stepper(optimizer, options, trained)
        ledger.set_kind(copied.parameters(), Kind.PARAMETER)
        ledger.set_kind(copied.buffers(), Kind.BUFFER)
        ledger.set_kind((x, target), Kind.INPUT)
        if stepper is not None:
            ledger.set_kind(_state(stepper), Kind.OPTIMIZER)
        stack.enter_context(_known_gradients(ledger))
        stack.enter_context(ledger)
        saved, gradient_bytes = _step(ledger, copied, x, target, targets, criterion, autocast, stepper)
        ledger.close()
    return _cost(module, ledger, saved, gradient_bytes, batch, per_block)


def _step(
    ledger: Ledger,
    module: nn.Module,
    x: Tensor,
    target: Tensor,
    targets: bool,
    criterion: Callable[[Any, Tensor], Tensor],
    autocast: Any,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[dict[str, int], int]:
    """Saved bytes by path at the end of the forward, and the bytes of all `.grad`."""
    ledger.mark("forward")
    with _explained(x), torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack), autocast:
        if targets:
            output, local = module(x, target)
            total = criterion(output, target)
            if local is not None:
                total = total + local
            del local
        else:
            output = module(x)
            total = criterion(output, target)
    saved, gradient_bytes = ledger.saved_now(), 0
    if total.requires_grad:
        ledger.mark("backward")
        with _explained(x):
            total.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        ledger.set_kind(gradients, Kind.GRADIENT)
        gradient_bytes = sum(ledger.sizes[number] for number in {ledger.index(g) for g in gradients})
        del gradients
        if optimizer is not None:
            ledger.mark("optimizer")
            ledger.default = Kind.SCRATCH
            optimizer.step()
            ledger.set_kind(_state(optimizer), Kind.OPTIMIZER)
            optimizer.zero_grad(set_to_none=True)
    return saved, gradient_bytes


def _stepper(optimizer: Optimizer, options: Mapping[str, Any] | None, trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer as it stands between two steps: its state is there. Steps once on gradients of zero for that."""
    if optimizer is None or not trained:
        return None
    if isinstance(optimizer, str):
        from timm.optim import create_optimizer_v2

        try:
            made = create_optimizer_v2(trained, opt=optimizer, lr=1e-3, **{"momentum": 0.9, **(options or {})})
        except (ValueError, TypeError, AssertionError) as error:
            raise CostError(f"optimizer {optimizer!r} cannot be made: {error}", fix="timm.optim.list_optimizers() lists them") from error
    else:
        made = optimizer(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        made.step()
    except Exception as error:
        raise CostError(
            f"optimizer {optimizer!r} cannot step without values: {error}", fix="Forecast with another, or with None"
        ) from error
    made.zero_grad(set_to_none=True)
    return made


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from _tensors(state)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _cost(
    module: nn.Module, ledger: Ledger, saved: dict[str, int], gradient_bytes: int, batch: int, per_block: Sequence[str | Named]
) -> Cost:
    rows = _rows(module, ledger.attribution, saved)
    whole = sum(rows, BlockCost(""))
    sizes = {kind: sum(s for s, k in zip(ledger.sizes, ledger.kinds, strict=True) if k == kind) for kind in Kind}
    peak, at = ledger.peak()
    cost = Cost(
        batch=batch,
        parameters=whole.parameters,
        trainable_parameters=whole.trainable_parameters,
        parameter_bytes=sizes[Kind.PARAMETER],
        buffer_bytes=sizes[Kind.BUFFER],
        gradient_bytes=gradient_bytes,
        optimizer_bytes=sizes[Kind.OPTIMIZER],
        input_bytes=sizes[Kind.INPUT],
        forward_flops=whole.forward_flops,
        backward_flops=whole.backward_flops,
        weight_gradient_flops=whole.weight_gradient_flops,
        input_gradient_flops=whole.input_gradient_flops,
        recomputed_flops=whole.recomputed_flops,
        saved_activation_bytes=whole.saved_activation_bytes,
        peak_bytes=peak,
        peak_activation_bytes=ledger.peak((Kind.ACTIVATION, Kind.INPUT))[0],
        peak_block_bytes=ledger.peak(block=BLOCK)[0],
        peak_phase=ledger.phase_of(at),
        peak_parts=ledger.live_at(at),
        all_reduced_bytes=sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        kernels=ledger.kernels,
        moved_bytes=ledger.moved,
        rows=rows,
    )
    if per_block:
        return replace(cost, blocks=cost.by(per_block))
    return cost


def _rows(module: nn.Module, attribution: Attribution, saved: dict[str, int]) -> tuple[BlockCost, ...]:
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        count = counts.setdefault(name.rpartition(".")[0], [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    order = dict.fromkeys([*attribution.totals, *saved, *counts])
    rows = []
    for path in order:
        flops = attribution.totals.get(path, [0, 0, 0, 0])
        rows.append(BlockCost(path, *counts.get(path, [0, 0]), *flops, saved_activation_bytes=saved.get(path, 0)))  # type: ignore[misc]
    return tuple(rows)


# -- losses


def _each(output: Any) -> Iterable[Tensor]:
    values = [t for t in _tensors(output) if t.is_floating_point()]
    if not values:
        what = f"the module returns {type(output).__name__}, which holds no tensor to take a loss of"
        raise CostError(what, fix="Pass `loss=`, a function")
    return values


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    def one(logits: Tensor) -> Tensor:
        # Dense outputs (N, C, ...) take a label per position.
        labels = target if logits.ndim == 2 else target.view(-1, *[1] * (logits.ndim - 2)).expand(-1, *logits.shape[2:])
        return F.cross_entropy(logits, labels)

    return _sum(one(t) for t in _each(output))


def _binary_cross_entropy(output: Any, target: Tensor) -> Tensor:
    return _sum(F.binary_cross_entropy_with_logits(t, torch.zeros_like(t)) for t in _each(output))


def _sum(losses: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for loss in losses:
        total = loss if total is None else total + loss
    assert total is not None
    return total


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
}


# -- around the step


@contextmanager
def _quiet_collector() -> Iterator[None]:
    # The cycle collector frees at moments of its own; what is live must depend on the step alone.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    # torch logs the traceback of a shape that does not fit; the error that we raise says it.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _known_gradients(ledger: Ledger) -> Iterator[None]:
    """Gradients that `torch.autograd.grad` hands out for parameters are gradients, though they never pass through `.grad`."""
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
def _explained(x: Tensor) -> Iterator[None]:
    try:
        yield
    except CostError:
        raise
    except _NEEDS_VALUES as error:
        raise CostError(
            f"the module's Python looks at tensor values, which a forecast does not have: {type(error).__name__}: {error}",
            fix="Compute shapes and branches from sizes, not from values",
        ) from error
    except Exception as error:
        raise CostError(
            f"the module does not take a batch of shape {tuple(x.shape)}: {type(error).__name__}: {error}",
            fix="Check the input's shape, and that the module trains on it",
        ) from error
