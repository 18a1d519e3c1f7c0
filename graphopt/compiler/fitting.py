"""How far the activations of a training step must come down for the step to fit into so many bytes."""

import math

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import Pass, PassInstance
from graphopt.compiler.pipeline import match_all, rewrite
from graphopt.compiler.triggers import Start
from graphopt.cost import StepOptions
from graphopt.cost.devices import Device, find_device
from graphopt.cost.rates import TimedStep
from graphopt.cost.recomputation import shares
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.units import show_size

#: each share that is tried is at most so much of the one before it
FALL = 0.95


def fraction_within(graph: Graph, value: Pass, limit: int, step: TimedStep, device: str | None = None) -> float:
    """The largest `fraction`, an option of `value`, of the peak of activations at which a step needs at most `limit` bytes.

    Tried are those of `graphopt.cost.recomputation.shares`, rounded up to four digits. What a step needs is assumed to fall with them.

    Args:
        device: name of a GPU, for what its allocator must be able to get; None: live bytes.

    Raises PassError if a step needs more at the lowest one; says how much. CostError for an unknown device.
    """
    gpu = find_device(device) if device is not None else None
    tried = [1.0]
    for reached, _ in shares(graph)[1:]:
        if reached <= FALL * tried[-1] or reached == shares(graph)[-1][0]:
            tried.append(math.ceil(1e4 * reached) / 1e4)

    def need(share: float) -> int:
        return _need(graph, value.model_copy(update={"fraction": share, "when": Start()}), step, gpu)

    low, high = 0, len(tried) - 1
    least = need(tried[high])
    if least > limit:
        where = f" on one {gpu.name}" if gpu is not None else ""
        what = f"a step of {step.batch} samples needs at least {show_size(least)}{where}, the budget is {show_size(limit)}"
        raise PassError(what, fix="Give a larger budget, or a smaller batch")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if need(tried[middle]) <= limit else (middle + 1, high)
    return tried[high]


def _need(graph: Graph, value: Pass, step: TimedStep, device: Device | None) -> int:
    """Bytes that a step with this pass alone needs: live ones, or the smallest capacity of the device's allocator, at its upper bound."""
    found = rewrite(graph, match_all(graph, [PassInstance(value, 0)]), (), verify="off", measure=None)
    effects = [each for each in found.effects if each is not None]
    options: StepOptions = {**step.options, "device": device}
    cost = measure_with(step.batch, **options)(found.module, found.graph, effects)
    return cost.peak_bytes if cost.cuda is None else cost.cuda.capacity.high
