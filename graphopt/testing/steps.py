"""One training step on noise, and how two ways to compute one output are compared."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.ir.inputs import dtype_of, samples
from graphopt.ir.shapes import tensors_in

#: samples of a training step: an odd number, which nothing divides
BATCH = 5
#: the largest relative difference between two ways to compute one output in float32
TOLERANCE = 1e-4


class Problem(Exception):
    """Something that a check has found to be wrong."""


def require(holds: bool, what: str) -> None:
    """Raises Problem unless it holds."""
    if not holds:
        raise Problem(what)


def inputs(plan: Plan) -> tuple[Tensor, ...]:
    """A batch of noise for the plan's module, from torch's generator."""
    dtype = dtype_of(plan.backbone)
    return samples(plan.base.input, BATCH, lambda *sizes: torch.rand(sizes, dtype=dtype))


def step(plan: Plan, module: nn.Module, seed: int, given: Sequence[Tensor] | None = None) -> float:
    """One forward and backward in train mode, on noise or on what is `given`; gradients are replaced. Returns the loss.

    Raises Problem if the loss is not finite, or depends on nothing that trains.
    """
    module.train()
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    batch = inputs(plan)
    taken = batch if given is None else given
    loss = torch.zeros(())
    if plan.needs.targets:
        output, loss = module(*taken, torch.arange(BATCH) % 2)
    else:
        output = module(*taken)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            loss = loss + tensor.float().flatten(1).log_softmax(1).square().mean()
    require(bool(loss.isfinite()), f"the loss is {loss.item()}")
    require(loss.requires_grad, "the loss depends on nothing that trains")
    loss.backward()
    return loss.item()


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients by the names of their parameters."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def require_equal(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], what: str) -> None:
    """Raises Problem, with the names, unless both hold the same tensors bit for bit; NaN is equal to NaN."""
    wrong = sorted(found.keys() ^ expected.keys()) or [name for name, value in found.items() if not _same(value, expected[name])]
    require(not wrong, f"{what} of {', '.join(wrong[:3])}")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other.to(one.device)))


def outputs(plan: Plan, module: nn.Module) -> list[Tensor]:
    """What a module computes of one batch of noise in eval mode; its parts stay in the modes that they are in."""
    torch.manual_seed(3)
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            return tensors_in(module.eval()(*inputs(plan)))
    finally:
        for part, mode in modes:
            part.training = mode


def require_close(one: Sequence[Tensor], other: Sequence[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Raises Problem if outputs differ by more than `tolerance`, relative to the largest number of each tensor."""
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(one, other, strict=True)]
    wrong = [difference for difference in apart if not difference <= tolerance]  # NaN, too
    require(not wrong, f"{what} (relative difference {max(wrong, default=0.0):.1e})")
