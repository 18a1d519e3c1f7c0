"""Compares a graph with its backbone: both run on the same random input, in both modes, under one seed."""

import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input, dtype_of, samples
from graphopt.ir.regions import region_of
from graphopt.ir.shapes import is_large, smaller_input, tensors_in

#: a batch of each input
Samples = tuple[torch.Tensor, ...]


def compare_modes(backbone: nn.Module, graph: Graph) -> tuple[str, str] | None:
    """The innermost module whose traced form computes something else, and in which mode; None if all outputs are bit-equal.

    Train mode is compared on two smaller images and eval mode on one whole image, where that is bit-equal already: the two modes differ in
    few modules, and this exercises all of them, at both sizes and both batches. Otherwise two whole images decide.
    """
    x = _sample(backbone, graph.input)
    smaller = smaller_input(graph.nodes, graph.input)
    less = {
        "train": _sample(backbone, smaller) if smaller else None,
        "eval": _sample(backbone, graph.input, batch=1) if is_large(graph.input) else None,
    }
    for mode, training in (("train", True), ("eval", False)):
        backbone.train(training)
        graph.module.train(training)
        if (given := less[mode]) is not None and _equal_on(backbone, graph, given):
            continue
        expected = _run(backbone, backbone, x)
        found = _run(graph.module, backbone, x)
        if not same(expected, found):
            return _first_difference(backbone, graph, x), mode
    return None


def _equal_on(backbone: nn.Module, graph: Graph, x: Samples) -> bool:
    """Whether backbone and graph take such samples, and compute the same."""
    try:
        with redirect_stderr(io.StringIO()):  # fx prints what a graph module raises
            found = _run(graph.module, backbone, x)
        return same(_run(backbone, backbone, x), found)
    except Exception:
        return False


def without_gradient(graph: Graph) -> tuple[str, ...]:
    """Trainable parameters that the graph reads, but that no training step gives a gradient.

    The forward of an opaque module may not use them, or detaches what it makes of them. Shapes tell, without memory for activations; of
    one that branches on values, two random inputs tell, one of either sign.
    """
    module = graph.module.train()
    names = [n for n, p in module.named_parameters() if p.requires_grad and n not in graph.unused]
    try:
        mode = FakeMode()
        with mode, torch.enable_grad():
            fake = fake_copy(module, mode)
            reached = _reached(fake, names, samples(graph.input, 2, partial(torch.empty, dtype=dtype_of(fake))))
    except Exception:  # it needs values
        reached = set()
        with untouched(module), torch.enable_grad():
            for sign in (1, -1):
                given = (sign * t if t.is_floating_point() else t for t in _sample(module, graph.input))
                reached |= _reached(module, names, given)
    return tuple(name for name in names if name not in reached)


def _reached(module: nn.Module, names: Sequence[str], given: Iterable[torch.Tensor]) -> set[str]:
    """Which parameters a step on such an input gives a gradient."""
    outputs = [t.sum() for t in tensors_in(module(*given)) if t.requires_grad]
    if not outputs or not names:
        return set()
    found = torch.autograd.grad(outputs, [module.get_parameter(n) for n in names], allow_unused=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}


def _sample(module: nn.Module, input: Input, batch: int = 2) -> Samples:
    given = samples(input, batch, partial(torch.rand, generator=torch.Generator().manual_seed(0)))
    reference = next((p for p in module.parameters() if p.is_floating_point()), None)
    if reference is None:
        return given
    return tuple(t.to(reference.device, reference.dtype if t.is_floating_point() else t.dtype) for t in given)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in structure, and in every bit of every tensor (NaN equals NaN)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    if is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


@contextmanager
def untouched(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Runs a block under a seed of its own and puts buffers (running statistics) and generators back afterwards."""
    holders = [(m._buffers, dict(m._buffers)) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    values = [(b, b.detach().clone()) for b in module.buffers()]
    state = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            for buffers, former in holders:
                buffers.update(former)  # a forward may have put other tensors there
            for buffer, value in values:
                buffer.copy_(value)


def _run(run: Callable[..., Any], holder: nn.Module, x: Samples) -> Any:
    """The output of `run`, and the buffers of `holder` after it."""
    with untouched(holder):
        out = run(*(t.clone() for t in x))
        return out, [b.clone() for b in holder.buffers()]


def _first_difference(backbone: nn.Module, graph: Graph, x: Samples) -> str:
    """Path of the first module to complete whose first call gives another output in the graph."""
    outputs: dict[str, Any] = {}
    handles = []
    for path, module in backbone.named_modules():

        def record(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
            outputs.setdefault(path, output.clone() if isinstance(output, torch.Tensor) else output)

        handles.append(module.register_forward_hook(record))
    with untouched(backbone):
        backbone(*(t.clone() for t in x))
    for handle in handles:
        handle.remove()
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            values[n] = value.clone() if isinstance(value, torch.Tensor) else value
            return value

    with untouched(backbone):
        Recorder(graph.module, garbage_collect_values=False).run(*(t.clone() for t in x))
    for path, output in outputs.items():
        region = region_of(graph, (path,))
        comparable = path and len(region.exits) == 1 and not any(n.meta["origin"].call for n in region.nodes)
        if comparable and not same(values[region.exits[0]], output):
            return path
    return ""
