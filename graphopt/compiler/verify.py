"""Checks of the properties that passes declare to preserve, on the model at hand: before the pass against after it.

Outputs and gradients are compared on random input, first in float32, where most rewrites give equal bits; if not, in float64, where a
tolerance of 1e-9 separates rounding from errors. Gradients are compared in eval mode, where a frozen norm and a trainable one
compute the same function, so that only the backward pass is compared.

The evaluation output is compared on the backbone's own input. What takes longer, the training output and the gradients, is compared on a
smaller image where the module takes one: it goes through the same operators. If that shows a difference, the whole input decides.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graphopt.compiler.pass_base import Property
from graphopt.compiler.runs import BATCH, Runs, first_dtype, sample, scalar, seeded
from graphopt.errors import VerifyError
from graphopt.ir.copying import real_copy
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input
from graphopt.ir.shapes import tensors_in

#: the largest relative difference in float64 that counts as rounding
TOLERANCE = 1e-9
#: a gradient is compared with its own size, or with so much of the largest one where that is more
NEGLIGIBLE = 1e-6


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


def check_property(name: Property, before: Runs, after: Runs) -> Checked:
    """One declared property holds. Raises VerifyError if it does not; with the difference that was found and the one allowed."""
    if name == "state-dict keys":
        return _values(before.module, after.module)
    difference, parameter = _least(name, before, after)
    if difference > TOLERANCE:
        what = f"the gradient of {parameter}" if parameter else name
        figures = f"relative difference {difference:.2e}, expected at most {TOLERANCE:.0e}"
        raise VerifyError(f"{what} is not preserved: {figures}", where=parameter)
    return Checked(name, difference)


def check_gradients_arrive(runs: Runs, targets: bool, unused: tuple[str, ...]) -> Checked:
    """After a backward pass every trainable parameter has a finite gradient, and no frozen one has any.

    Raises VerifyError with the parameter.
    """
    if not any(p.requires_grad for p in runs.module.parameters()):
        raise VerifyError("no trainable parameter is left", fix="Freeze or drop less")
    if runs.smaller:
        # The module may need its whole input, which then decides. fx prints what a graph module raises.
        with suppress(Exception), redirect_stderr(io.StringIO()):
            return _arrive(runs.module, runs.smaller, targets, unused)
    return _arrive(runs.module, runs.input, targets, unused)


def _arrive(module: nn.Module, shape: Input, targets: bool, unused: tuple[str, ...]) -> Checked:
    dtype = first_dtype(module)
    module = real_copy(module, dtype)
    x = sample(shape, dtype)
    with seeded():
        if targets:
            with torch.no_grad():
                scores = first_tensor(module.eval()(*x))
            output, local = module.train()(*x, torch.arange(BATCH) % scores.shape[-1])
        else:
            output, local = module.train()(*x), torch.zeros((), dtype=dtype)
    torch.autograd.backward(scalar(tensors_in(output), local))
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            if parameter.requires_grad and name not in unused:
                raise VerifyError(f"the trainable parameter {name} gets no gradient", where=name)
        elif not parameter.requires_grad:
            raise VerifyError(f"the frozen parameter {name} gets a gradient", where=name)
        elif not parameter.grad.isfinite().all():
            raise VerifyError(f"the gradient of {name} is not finite on random input", where=name)
    return Checked("every trainable parameter gets a gradient, no frozen one does", 0.0)


def first_tensor(output: object) -> Tensor:
    """The class scores in what a backbone returns: a tensor, or the first of several (auxiliary heads)."""
    return tensors_in(output)[0]


#: the largest relative difference, and the parameter whose gradient has it
_Largest = tuple[float, str | None]


def _least(name: Property, before: Runs, after: Runs) -> _Largest:
    """The difference on the smallest input that shows none beyond rounding; that on the whole input where all show one."""
    if name != "eval output" and before.smaller is not None and before.smaller == after.smaller:
        try:
            found = _largest(name, before, after, before.smaller)
        except Exception:  # they do not take it, or gradients that are there on the whole input are missing on it
            after.smaller = None
        else:
            if found[0] <= TOLERANCE:
                return found
    return _largest(name, before, after, before.input)


def _largest(name: Property, before: Runs, after: Runs, shape: Input) -> _Largest:
    """The difference in float32 if it is none, else in float64."""
    measure = _MEASURES[name]
    found = measure(before, after, shape, first_dtype(before.module))
    return measure(before, after, shape, torch.float64) if found[0] else found


def _difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    if a is b or torch.equal(a, b):
        return 0.0
    difference = ((a - b).abs().max() / a.abs().max().clamp_min(max(floor, 1e-30))).item()
    return difference if difference == difference else float("inf")


def _outputs(before: Runs, after: Runs, shape: Input, dtype: torch.dtype, *, training: bool) -> _Largest:
    # What was there before may have run with gradients: its outputs without any were compared when it was new.
    expected = before.known(shape, dtype, training=training).outputs
    got = after.computed(shape, dtype, training=training).outputs
    if len(expected) != len(got):
        name = "training output" if training else "eval output"
        raise VerifyError(f"{name}: {len(expected)} tensors before, {len(got)} after")
    return max((_difference(a, b) for a, b in zip(expected, got, strict=True)), default=0.0), None


class _Gradients:
    """Compares gradients with expected ones as they arrive, so that two sets of all of them are never held where one does.

    Attributes:
        expected: by the name of the parameter. keep: whether a gradient that differs is kept after it was compared.
        differences: what was found, by the same names.
    """

    def __init__(self, expected: dict[str, Tensor | None], keep: bool) -> None:
        self.expected, self.keep = expected, keep
        self.differences: dict[str, float] = {}
        # A gradient that is zero by nature (that of a key's bias) is nothing but rounding: it is measured by the others.
        largest = max((g.abs().max().item() for g in expected.values() if g is not None and g.numel()), default=0.0)
        self._floor = NEGLIGIBLE * largest

    def arrived(self, name: str, parameter: Tensor) -> None:
        """Compares the gradient that a parameter has got; where both are equal, one serves for both."""
        known, gradient = self.expected.get(name), parameter.grad
        if known is not None and gradient is not None:
            difference = self.differences[name] = _difference(known, gradient, self._floor)
            if not self.keep:
                parameter.grad = None
            elif not difference:
                parameter.grad = known

    def difference(self, name: str, gradient: Tensor | None) -> float:
        """What was found for a parameter, or is by its gradient now. Raises VerifyError if there is one of two."""
        known = self.expected[name]
        if name not in self.differences:
            if (gradient is None) != (known is None):
                raise VerifyError(f"the gradient of {name} is {'gone' if gradient is None else 'new'} after the rewrite", where=name)
            self.differences[name] = 0.0 if gradient is None or known is None else _difference(known, gradient, self._floor)
        return self.differences[name]


def _gradients(before: Runs, after: Runs, shape: Input, dtype: torch.dtype) -> _Largest:
    keep = dtype == first_dtype(before.module)
    if not keep:  # those in float32 have told what they can
        before.forget_gradients()
        after.forget_gradients()
    reference = before.computed(shape, dtype, gradients=True)
    compared = _Gradients(reference.gradients or {}, keep)
    found = after.computed(shape, dtype, gradients=True, arrived=compared.arrived)
    if not keep:
        before.forget_gradients()
        after.forget_gradients()
    if shape != before.input and any(len(t) != BATCH for run in (reference, found) for t in run.outputs if t.dim()):
        raise VerifyError("on this input, samples are mixed")
    names = ((n, g) for n, g in (found.gradients or {}).items() if n in compared.expected)
    return max(((compared.difference(n, g), n) for n, g in names), key=lambda item: item[0], default=(0.0, None))


def _values(before: nn.Module, after: nn.Module) -> Checked:
    old, new = before.state_dict(), after.state_dict()
    changed = [k for k in old if not torch.equal(torch.nan_to_num(old[k]), torch.nan_to_num(new[k]))]
    if changed:
        raise VerifyError(f"the rewrite changed the values of {changed[:5]}", where=changed[0])
    return Checked("state-dict values", 0.0)


_MEASURES: dict[Property, Callable[[Runs, Runs, Input, torch.dtype], _Largest]] = {
    "eval output": partial(_outputs, training=False),
    "training output": partial(_outputs, training=True),
    "gradients of unselected parameters": _gradients,
}
