"""Which gradient-isolated modules each rank of a chain trains."""

from collections.abc import Sequence
from functools import cache

from graphopt.compiler.emit import emit
from graphopt.compiler.parts import singly
from graphopt.compiler.plan import Plan
from graphopt.cost import forecast
from graphopt.errors import CostError
from graphopt.ir.paths import lineage
from graphopt.spec import TrainSpec


def assign(seconds: Sequence[float], ranks: int) -> tuple[range, ...]:
    """Runs of consecutive modules, one per rank in order, such that the slowest rank is as fast as possible.

    With more ranks than modules, the first runs are empty.
    """
    count, empty = len(seconds), max(0, ranks - len(seconds))

    @cache
    def best(start: int, runs: int) -> tuple[float, tuple[int, ...]]:
        """The slowest of so many runs from a module on, and where each ends."""
        if runs == 1:
            return sum(seconds[start:]), (count,)
        choices = []
        for end in range(start + 1, count - runs + 2):
            slowest, ends = best(end, runs - 1)
            choices.append((max(sum(seconds[start:end]), slowest), (end, *ends)))
        return min(choices)

    ends = best(0, ranks - empty)[1]
    starts = (0, *ends[:-1])
    return (range(0),) * empty + tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


def seconds_of(plan: Plan, spec: TrainSpec) -> list[float]:
    """The share of a training step that each module of a phase takes, by FLOPs; without a forecast, all take as long.

    What lies before cached features takes no time.
    """
    cut, shape = plan.needs.features, plan.base.input
    module = emit(plan.graph, start=cut.node).train() if cut is not None else plan.module
    shape = tuple(cut.node.meta["val"].shape[1:]) if cut is not None else shape
    parts = singly(plan.module)
    try:
        cost = forecast(module, shape, spec.micro_batch(), targets=plan.needs.targets, **spec.forecast_options())
    except CostError:
        return [1.0] * len(parts)
    owner: dict[str, int] = {}
    for number, part in enumerate(parts):
        owner |= {path: number for path, _ in part.module.named_modules() if path}
    found = [0.0] * len(parts)
    for row in cost.rows:
        known = [owner[path] for path in lineage(row.path) if path in owner]
        found[known[-1] if known else -1] += row.forward_flops + row.backward_flops
    return found
