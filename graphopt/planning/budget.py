"""Start from a budget: the largest batch that fits it, or the cheapest passes that fit it at the spec's batch.

The search runs on the cost model and trains nothing. Memory is live bytes (see `graphopt.cost.Cost`); what an allocator and kernels take on
top is an allowance that the user gives. "Cheapest" means, in this order: the least of the backbone left untrained, then the fewest FLOPs a
step. So freezing is proposed only where nothing that trains all of it fits, and activation checkpointing, which changes no
gradient but runs the forward twice, is the rival by FLOPs that local supervision must beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import Effects, Pass, PassInstance
from graphopt.compiler.pipeline import match_all
from graphopt.compiler.plan import Plan, compile_phase
from graphopt.compiler.registry import passes as installed
from graphopt.cost import Cost, CostError
from graphopt.errors import GraphoptError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.units import show_size

if TYPE_CHECKING:
    from graphopt.spec import Spec

#: no batch above this is tried
LARGEST_BATCH = 65536


@dataclass(frozen=True)
class Budget:
    """What one training step may take.

    Attributes:
        memory: bytes, or None.
        flops: share of the untouched backbone's FLOPs at the same batch, or None.
        allowance: the memory a process takes over the live bytes that are forecast (fresh CPU processes grew 1.20 to 1.29 times them).
    """

    memory: int | None = None
    flops: float | None = None
    allowance: float = 1.0

    def __post_init__(self) -> None:
        if self.memory is None and self.flops is None:
            raise CostError("no budget is given", fix='Give memory ("8 GiB"), or flops (0.5: half of the backbone\'s)')
        if self.flops is not None and not self.flops > 0:
            raise CostError(f"flops is a share of the backbone's, above 0, found {self.flops}")
        if self.allowance < 1:
            raise CostError(f"an allowance is a factor of at least 1, found {self.allowance}")

    def holds(self, cost: Cost, backbone: Cost) -> bool:
        memory = self.memory is None or cost.peak_bytes * self.allowance <= self.memory
        return memory and (self.flops is None or cost.flops <= self.flops * backbone.flops)


@dataclass(frozen=True)
class Candidate:
    """One way to meet a budget: passes added to the spec's own.

    Attributes:
        name: for people. added: the tables of the passes that it adds.
        cost: one step's; of a plan with phases, the phase with the highest peak.
        untrained: share of the backbone's trainable parameters that no longer train.
        fits, verified, best: within the budget; every promise checked on this model; on the Pareto front of peak, FLOPs and `untrained`.
        refused: why it cannot be, if so.
    """

    name: str
    added: tuple[dict[str, Any], ...] = ()
    cost: Cost | None = None
    untrained: float = 0.0
    fits: bool = False
    best: bool = False
    verified: bool = False
    refused: str | None = None

    @property
    def price(self) -> tuple[float, int]:
        return (round(self.untrained, 3), self.cost.flops if self.cost else 0)

    def to_dict(self) -> dict[str, Any]:
        keys = ("name", "untrained", "fits", "best", "verified", "refused")
        return {**{k: getattr(self, k) for k in keys}, "added": list(self.added), "cost": self.cost.to_dict() if self.cost else None}


@dataclass(frozen=True)
class Fit:
    """The answer. `chosen` is None where nothing fits; `spec` is the spec to write, `batch` its batch."""

    budget: Budget
    batch: int
    backbone: Cost
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    spec: Spec | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "memory": self.budget.memory,
            "flops": self.budget.flops,
            "allowance": self.budget.allowance,
            "backbone": self.backbone.to_dict(),
            "candidates": [c.to_dict() for c in self.candidates],
            "chosen": self.chosen.name if self.chosen else None,
        }


def largest_batch(cost_at: Callable[[int], Cost], memory: float) -> tuple[int, Cost]:
    """The largest batch whose step's peak is at most `memory` bytes, by bisection; the peak is taken to grow with the batch.

    Raises:
        CostError: one sample does not fit.
    """
    low, low_cost = 1, cost_at(1)
    if low_cost.peak_bytes > memory:
        raise CostError(
            f"one sample takes {show_size(low_cost.peak_bytes)}, the budget is {show_size(memory)}",
            fix="Ask for passes that fit (--suggest), or give more memory",
        )
    high, step = LARGEST_BATCH + 1, 8
    before = low_cost.peak_bytes
    while high - low > 1:
        # The peak is nearly a straight line in the batch: go where the line meets the budget, and halve where that leads nowhere.
        tried = min(max(step, low + 1), high - 1)
        cost = cost_at(tried)
        slope = (cost.peak_bytes - before) / (tried - low) if tried > low else 0
        if cost.peak_bytes <= memory:
            low, low_cost, before = tried, cost, cost.peak_bytes
        else:
            high = tried
        step = low + int((memory - before) / slope) if slope > 0 else (low + high) // 2
        if high <= LARGEST_BATCH and not low < step < high:
            step = low + 1 if step <= low else high - 1
    return low, low_cost


class Search:
    """A spec's backbone, traced once, and the costs of passes on it."""

    def __init__(self, spec: Spec, *, trust: bool = False) -> None:
        import graphopt
        from graphopt.driver import build_backbone as build

        self.spec, self.trust = spec, trust
        backbone = build(spec.backbone, trust=trust)
        self.plan: Plan = graphopt.compile(backbone, spec, verify="off", costs=False)
        self.backbone = self._phase_cost(self._plan(()), spec.train.batch)

    def _plan(self, passes: Sequence[Any], verify: Any = "off") -> Plan:
        matched = match_all(self.plan.base, [PassInstance(value, index) for index, value in enumerate(passes)])
        return compile_phase(replace(self.plan.source, matched=matched), verify=verify, costs=False)

    def _phase_cost(self, plan: Plan, batch: int) -> Cost:
        measure = measure_with(batch, **self.spec.train.forecast_options())
        effects: tuple[Effects, ...] = tuple(e for e in plan.effects if e is not None)
        return measure(plan.module, plan.graph, effects)

    def phases(self, plan: Plan) -> tuple[Plan, ...]:
        """The plan's phases as far as the spec alone says when triggers fire."""
        return tuple(phase.plan for phase in plan.phases(self.spec.train.epochs))

    def cost(self, phases: Sequence[Plan], batch: int) -> Cost:
        """The step of the phase with the highest peak."""
        return max((self._phase_cost(p, batch) for p in phases), key=lambda c: c.peak_bytes)

    def largest_batch(self, budget: Budget) -> Fit:
        """The largest batch at which the spec, as it is, fits the memory in every phase that can be foreseen.

        Raises:
            CostError: one sample does not fit, or the budget is FLOPs (which no batch changes per sample).
        """
        if budget.memory is None or budget.flops is not None:
            raise CostError("a batch is found for memory; FLOPs per sample do not depend on it", fix="Give memory alone, or --suggest")
        phases = self.phases(self.plan)
        batch, cost = largest_batch(lambda size: self.cost(phases, size), budget.memory / budget.allowance)
        backbone = self._phase_cost(self._plan(()), batch)
        self._verify(self.plan.passes)
        own = Candidate("the spec as it is", (), cost, fits=True, best=True, verified=True, untrained=self._untrained(cost))
        return Fit(budget, batch, backbone, (own,), own, self._with((), batch))

    def suggest(self, budget: Budget) -> Fit:
        """The cheapest candidate that fits at the spec's batch, among the spec's own passes and what can be added to them."""
        shown = tuple(replace(c, fits=c.cost is not None and budget.holds(c.cost, self.backbone)) for c in self.front)
        fitting = sorted((c for c in shown if c.fits and c.verified), key=lambda c: c.price)
        chosen = fitting[0] if fitting else None
        batch = self.spec.train.batch
        return Fit(budget, batch, self.backbone, shown, chosen, self._with(chosen.added, batch) if chosen else None)

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """Every candidate with its cost; those on the Pareto front verified."""
        found = [self._try(c) for c in (Candidate("the spec as it is"), *candidates(self.plan))]
        while True:
            # A candidate that cannot be verified leaves the front, and may make room there.
            found = [replace(c, best=c.cost is not None and not any(_beats(o, c) for o in found)) for c in found]
            asked = [i for i, c in enumerate(found) if c.best and not c.verified]
            if not asked:
                return tuple(found)
            for i in asked:
                found[i] = self._tried_in_numbers(found[i])

    def _try(self, candidate: Candidate) -> Candidate:
        try:
            cost = self.cost(self.phases(self._plan(self._passes(candidate))), self.spec.train.batch)
        except GraphoptError as error:
            return replace(candidate, refused=str(error))
        except Exception as error:  # a pass's own fault: told, and no reason to give up on the others
            return replace(candidate, refused=f"a fault in one of its passes: {type(error).__name__}: {error}")
        return replace(candidate, cost=cost, untrained=self._untrained(cost))

    def _tried_in_numbers(self, candidate: Candidate) -> Candidate:
        try:
            self._verify(self._passes(candidate))
        except GraphoptError as error:
            return replace(candidate, cost=None, refused=f"not verified: {error}")
        return replace(candidate, verified=True)

    def _passes(self, candidate: Candidate) -> tuple[Any, ...]:
        known = installed()
        return tuple(
            item if isinstance(item, Pass) else known[item["use"]].model_validate({k: v for k, v in item.items() if k != "use"})
            for item in _in_order(self.plan.passes, candidate.added)
        )

    def _verify(self, passes: Sequence[Any]) -> None:
        self._plan(passes, verify=self.spec.verify or "full")

    def _untrained(self, cost: Cost) -> float:
        # What passes add (heads, decoders) trains besides; only what the backbone loses counts.
        own = {row.path for row in self.backbone.rows}
        return 1 - sum(r.trainable_parameters for r in cost.rows if r.path in own) / self.backbone.trainable_parameters

    def _with(self, added: Sequence[dict[str, Any]], batch: int) -> Spec:
        from graphopt.spec import from_table

        table = self.spec.resolved()
        table["pass"] = [item.table() if isinstance(item, Pass) else item for item in _in_order(self.plan.passes, added)]
        table["train"] = {**table["train"], "batch": batch}
        return from_table(table, trust=self.trust)


def _in_order(own: Sequence[Pass], added: Sequence[dict[str, Any]]) -> list[Pass | dict[str, Any]]:
    """The spec's passes with those added: what divides the backbone goes before, what takes its stretches from others' behind.

    There is one way at a time to divide it, and one to run it again: the spec's own gives way to the one that is tried.
    """
    first = [t for t in added if t["use"] == "supervise"]
    replaced = {t["use"] for t in added} & {"supervise", "checkpoint"}
    return [*first, *(p for p in own if p.name not in replaced), *(t for t in added if t not in first)]


def candidates(plan: Plan) -> Iterator[Candidate]:
    """What can be added to a plan: installed passes that the search knows how to ask for, and pairs that save differently.

    Share and drop are not proposed: they change what is trained, or when, which no budget can decide.
    """
    known, names = installed(), _parts(plan)
    blocks = len(find_blocks(plan.base))
    counts = [k for k in (2, 3, 4, 6, 8) if k <= len(cut_points(plan.base))] if "supervise" in known else []
    segments = sorted({k for k in (2, 4, round(blocks**0.5), blocks // 2, blocks) if 2 <= k <= blocks}) if "checkpoint" in known else []
    own = next((p.table() for p in plan.passes if p.name == "supervise"), {"use": "supervise"})
    kept = {key: value for key, value in own.items() if key not in ("modules", "balance", "cuts")}
    supervised = {k: Candidate(f"supervise, {k} modules", ({**kept, "modules": k, "balance": "memory"},)) for k in counts}
    recomputed = {k: Candidate(f"checkpoint, {k} segments", ({"use": "checkpoint", "segments": k},)) for k in segments}
    yield from supervised.values()
    yield from recomputed.values()
    # The pairs take of each the one in the middle: it is a search for a place to start from.
    middle = [recomputed[segments[len(segments) // 2]]] if segments else []
    pairs = [supervised[counts[len(counts) // 2]], *middle] if counts else middle
    yield from (_both(supervised[k], other) for k in counts[-1:] for other in middle)
    if "freeze" in known:
        for share in (0.25, 0.5, 0.75):
            prefix = names[: max(1, round(share * len(names)))]
            if len(prefix) < len(names):
                frozen = Candidate(f"freeze up to {prefix[-1]}", ({"use": "freeze", "select": prefix},))
                yield frozen
                yield from (_both(frozen, other) for other in pairs)


def _both(one: Candidate, other: Candidate) -> Candidate:
    return Candidate(f"{one.name}; {other.name}", (*one.added, *other.added))


def _parts(plan: Plan) -> list[str]:
    """Names of the backbone's parts with parameters, in execution order."""
    from graphopt.ir.blocks import disjoint_parts

    return [r.name for r in disjoint_parts(plan.base) if r.parameters]


def _beats(one: Candidate, other: Candidate) -> bool:
    if one.cost is None or other.cost is None:
        return False
    a = (one.cost.peak_bytes, one.cost.flops, one.untrained)
    b = (other.cost.peak_bytes, other.cost.flops, other.untrained)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


__all__ = ["Budget", "Candidate", "Fit", "Search", "candidates", "largest_batch"]
