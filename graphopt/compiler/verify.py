"""Checks of the properties that passes declare to preserve, on the model at hand: before the pass against after it.

Outputs and gradients are compared on random input, first in float32, where most rewrites give equal bits; if not, in float64, where a
tolerance of 1e-9 separates rounding from errors. Gradients are compared in eval mode, where a frozen norm and a trainable one
compute the same function, so that only the backward pass is compared.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.compiler.pass_base import Property
from graphopt.errors import VerifyError
from graphopt.ir.graph import Graph
from graphopt.ir.shapes import tensors_in

#: the largest relative difference in float64 that counts as rounding
TOLERANCE = 1e-9
#: a gradient is compared with its own size, or with so much of the largest one where that is more
NEGLIGIBLE = 1e-6
#: samples in a numerical check
BATCH = 2


@dataclass(frozen=True)
class Checked:
    """A property that holds: its name, and the largest relative difference found (0.0 means equal bits)."""

    property: str
    difference: float


def check_structure(graph: Graph, emitted: nn.Module) -> list[Checked]:
    """What every pass must leave intact: a well-formed graph, shapes, origins, and all parameters in the emitted module.

    Raises VerifyError with the node.
    """
    try:
        graph.fx.lint()
    except Exception as error:
        raise VerifyError(f"the rewritten graph is not well formed: {error}") from error
    for node in graph.nodes:
        if "origin" not in node.meta:
            raise VerifyError(f"node {node} has no origin", fix="The pass must make nodes with the editor")
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(f"node {node} has no shape", fix="The pass must make nodes with the editor")
    names = [n for n, _ in emitted.named_parameters(remove_duplicate=False)]
    missing = {n for n, _ in graph.module.named_parameters(remove_duplicate=False)} - set(names)
    if missing:
        raise VerifyError(f"emission lost the parameters {sorted(missing)[:5]}")
    return [Checked("graph is well formed, shapes and origins complete", 0.0)]


def check_keys(before: tuple[str, ...], after: nn.Module) -> Checked:
    """The emitted module has the same state-dict keys as before the pass. Raises VerifyError with the keys that were not."""
    now = after.state_dict().keys()
    lost, gained = sorted(set(before) - now), sorted(now - set(before))
    if lost or gained:
        raise VerifyError(f"state-dict keys are not preserved: lost {lost[:5]}, gained {gained[:5]}")
    return Checked("state-dict keys", 0.0)


def check_property(name: Property, before: nn.Module, after: nn.Module, input: tuple[int, ...]) -> Checked:
    """One declared property holds. Raises VerifyError if it does not; with the difference that was found and the one allowed."""
    if name == "state-dict keys":
        return _values(before, after)
    difference, parameter = _MEASURES[name](before, after, input, torch.float32)
    if difference:
        difference, parameter = _MEASURES[name](before, after, input, torch.float64)
    if difference > TOLERANCE:
        what = f"the gradient of {parameter}" if parameter else name
        figures = f"relative difference {difference:.2e}, expected at most {TOLERANCE:.0e}"
        raise VerifyError(f"{what} is not preserved: {figures}", where=parameter)
    return Checked(name, difference)


def check_gradients_arrive(module: nn.Module, input: tuple[int, ...], targets: bool, unused: tuple[str, ...]) -> Checked:
    """After a backward pass every trainable parameter has a finite gradient, and no frozen one has any.

    Raises VerifyError with the parameter.
    """
    module = _copy(module, torch.float32).train()
    if not any(p.requires_grad for p in module.parameters()):
        raise VerifyError("no trainable parameter is left", fix="Freeze or drop less")
    torch.autograd.backward(_scalar(module, input, torch.float32, targets))
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            if parameter.requires_grad and name not in unused:
                raise VerifyError(f"the trainable parameter {name} gets no gradient", where=name)
        elif not parameter.requires_grad:
            raise VerifyError(f"the frozen parameter {name} gets a gradient", where=name)
        elif not parameter.grad.isfinite().all():
            raise VerifyError(f"the gradient of {name} is not finite on random input", where=name)
    return Checked("every trainable parameter gets a gradient, no frozen one does", 0.0)


def first_tensor(output: Any) -> Tensor:
    """The class scores in what a backbone returns: a tensor, or the first of several (auxiliary heads)."""
    return tensors_in(output)[0]


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    copied = copy.deepcopy(module).to("cpu", dtype)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _sample(input: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand(BATCH, *input, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _scalar(module: nn.Module, input: tuple[int, ...], dtype: torch.dtype, targets: bool = False) -> Tensor:
    """A loss that depends on every output: a fixed random weighting of them, plus local losses."""
    x = _sample(input, dtype)
    with _seeded():
        if targets:
            shape = first_tensor(module.eval()(x)).shape
            module.train()
            output, local = module(x, torch.arange(shape[0]) % shape[-1])
        else:
            output, local = module(x), torch.zeros((), dtype=dtype)
    loss: Tensor = local
    for tensor in (t for t in tensors_in(output) if t.requires_grad):
        weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype)
        loss = loss + (tensor * weights).sum()
    return loss


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, from Python's generator too; both go on as they were afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        random.seed(2)
        try:
            yield
        finally:
            random.setstate(state)


def _difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    difference = ((a - b).abs().max() / a.abs().max().clamp_min(max(floor, 1e-30))).item()
    return difference if difference == difference else float("inf")


#: the largest relative difference, and the parameter whose gradient has it
_Largest = tuple[float, str | None]


def _outputs(before: nn.Module, after: nn.Module, input: tuple[int, ...], dtype: torch.dtype, *, training: bool) -> _Largest:
    results = []
    for module in (before, after):
        module = _copy(module, dtype).train(training)
        with _seeded(), torch.no_grad():
            results.append(tensors_in(module(_sample(input, dtype))))
    if len(results[0]) != len(results[1]):
        name = "training output" if training else "eval output"
        raise VerifyError(f"{name}: {len(results[0])} tensors before, {len(results[1])} after")
    return max((_difference(a, b) for a, b in zip(*results, strict=True)), default=0.0), None


def _gradients(before: nn.Module, after: nn.Module, input: tuple[int, ...], dtype: torch.dtype) -> _Largest:
    found = []
    for module in (before, after):
        module = _copy(module, dtype).eval()
        loss = _scalar(module, input, dtype)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    expected, got = found
    worst: _Largest = (0.0, None)
    # A gradient that is zero by nature (that of a key's bias) is nothing but rounding: it is measured by the others.
    floor = NEGLIGIBLE * max((g.abs().max().item() for g in expected.values() if g is not None and g.numel()), default=0.0)
    for name in (n for n in got if n in expected):
        reference, gradient = expected[name], got[name]
        if (gradient is None) != (reference is None):
            raise VerifyError(f"the gradient of {name} is {'gone' if gradient is None else 'new'} after the rewrite", where=name)
        if gradient is not None and reference is not None and (difference := _difference(reference, gradient, floor)) > worst[0]:
            worst = (difference, name)
    return worst


def _values(before: nn.Module, after: nn.Module) -> Checked:
    old, new = before.state_dict(), after.state_dict()
    changed = [k for k in old if not torch.equal(torch.nan_to_num(old[k]), torch.nan_to_num(new[k]))]
    if changed:
        raise VerifyError(f"the rewrite changed the values of {changed[:5]}", where=changed[0])
    return Checked("state-dict values", 0.0)


_MEASURES: dict[Property, Callable[[nn.Module, nn.Module, tuple[int, ...], torch.dtype], _Largest]] = {
    "eval output": partial(_outputs, training=False),
    "training output": partial(_outputs, training=True),
    "gradients of unselected parameters": _gradients,
}
