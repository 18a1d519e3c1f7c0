"""Planning for a budget: the largest batch that fits it, or the cheapest passes that fit it at the spec's batch.

The search uses the cost model and trains nothing. Memory is live bytes (see `graphopt.cost.Cost`), and what an allocator and kernels need
on top an allowance that the user gives; or it is what the allocator of a named GPU needs (see `graphopt.cost.cuda`). "Cheapest" means: the
most of training stays exact (see `Exact`), then the smallest part of the backbone is left untrained, then the fewest FLOPs per step. Every
installed pass offers values of its own to try (`Pass.candidates`), mildest first: a ladder. The search goes through the ladders from the
most exact on, each by bisection, until something fits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import combinations, groupby
from typing import Any

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import ALL_PROPERTIES, Pass
from graphopt.compiler.pipeline import Verify
from graphopt.compiler.plan import Phase, Plan, compile_phase
from graphopt.compiler.registry import passes as installed
from graphopt.cost import Cost, CostError
from graphopt.cost.devices import Device
from graphopt.driver import prepare
from graphopt.errors import GraphoptError
from graphopt.spec import Spec, dumps_pass, from_table
from graphopt.units import show_size

_POSITIONS = ("first", "anywhere", "last")
#: no batch above this is tried
LARGEST_BATCH = 65536


class Exact(IntEnum):
    """What the passes of a trial leave exact of training with the spec's own, most first."""

    UNCHANGED = 0  # nothing is added
    EVERYTHING = 1  # every output and gradient: what changes is how they are computed
    GRADIENTS = 2  # the gradients of what still trains
    LOSS = 3  # the loss that is minimised, of a network that computes something else in training
    OUTPUT = 4  # the evaluation output alone: parts train by losses of their own

    def __str__(self) -> str:
        return ("everything", "everything", "gradients of what trains", "the loss", "outputs, not gradients")[self]


@dataclass(frozen=True)
class Budget:
    """What one training step may use.

    Attributes:
        memory: bytes, or None.
        flops: share of the untouched backbone's FLOPs at the same batch, or None.
        allowance: factor from the live bytes that are forecast to the memory of a process (1.09 to 1.35 in fresh CPU processes).
        device: a GPU that the step must run on; `memory` is then what its allocator can get, by default all but what the driver takes.
    """

    memory: int | None = None
    flops: float | None = None
    allowance: float = 1.0
    device: Device | None = None

    def __post_init__(self) -> None:
        if self.memory is None and self.device is not None:
            object.__setattr__(self, "memory", self.device.usable)
        if self.memory is None and self.flops is None:
            raise CostError("no budget is given", fix='Give memory ("8 GiB"), or flops (0.5: half of the backbone\'s)')
        if self.flops is not None and not self.flops > 0:
            raise CostError(f"flops is a share of the backbone's FLOPs, above 0, found {self.flops}")
        if not 1 <= self.allowance < math.inf:
            raise CostError(f"an allowance is a finite factor of at least 1, found {self.allowance}")

    def check_for_batch(self) -> None:
        """Raises CostError unless a batch can be found for it: FLOPs per sample are the same at any batch."""
        if self.memory is None or self.flops is not None:
            raise CostError("a batch is found for memory; FLOPs per sample do not depend on it", fix="Give memory alone, or --suggest")

    def holds(self, cost: Cost, backbone: Cost) -> bool:
        """Whether a step of this cost fits; `backbone` is the cost of a step without passes."""
        return self.has_room(cost) and (self.flops is None or cost.flops <= self.flops * backbone.flops)

    def has_room(self, cost: Cost) -> bool:
        """Whether the memory suffices."""
        if self.memory is None:
            return True
        memory = int(self.memory / self.allowance)
        return cost.peak_bytes <= memory if self.device is None or cost.cuda is None else cost.cuda.fits(memory)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"memory": self.memory, "flops": self.flops, "allowance": self.allowance, "device": self.device and self.device.name}


def peak(cost: Cost) -> int:
    """Bytes at the peak: reserved on the GPU that the forecast was for, at its upper bound, else live."""
    return cost.peak_bytes if cost.cuda is None else cost.cuda.reserved.high


@dataclass(frozen=True)
class Trial:
    """One way to meet a budget: passes added to the spec's own.

    Attributes:
        cost: of one step; in a plan with phases, of the phase with the highest peak.
        exact: what of training stays exact. untrained: share of the backbone's trainable parameters that no longer train.
        best: whether it is on the Pareto front of peak, FLOPs, `exact` and `untrained`, of all that were tried.
        refused: why it is impossible, if it is.
    """

    name: str
    added: tuple[Pass, ...] = ()
    cost: Cost | None = None
    exact: Exact = Exact.UNCHANGED
    untrained: float = 0.0
    fits: bool = False
    best: bool = False
    verified: bool = False
    refused: str | None = None

    @property
    def price(self) -> tuple[Exact, float, int]:
        """What the cheapest has least of."""
        return (self.exact, round(self.untrained, 3), self.cost.flops if self.cost else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {key: getattr(self, key) for key in ("name", "untrained", "fits", "best", "verified", "refused")}
        return {
            **plain,
            "exact": str(self.exact),
            "added": [value.table() for value in self.added],
            "cost": self.cost.to_dict() if self.cost else None,
        }

    def beats(self, other: "Trial") -> bool:
        """Whether it is better than `other` in something and worse in nothing."""
        if self.cost is None or other.cost is None:
            return False
        mine, theirs = ((peak(t.cost), t.cost.flops, t.exact, t.untrained) for t in (self, other) if t.cost)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Fit:
    """The result of a search. `chosen` and `spec`, the spec to write, are None if nothing fits; `batch` is the spec's.

    Attributes:
        snippet: what was added, as TOML to paste into the spec.
    """

    budget: Budget
    batch: int
    backbone: Cost
    candidates: tuple[Trial, ...]
    chosen: Trial | None
    spec: Spec | None = field(repr=False)
    snippet: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {"batch": self.batch, **self.budget.to_dict(), "backbone": self.backbone.to_dict()}
        return {
            **plain,
            "candidates": [c.to_dict() for c in self.candidates],
            "chosen": self.chosen.name if self.chosen else None,
            "snippet": self.snippet,
        }


def largest_batch(cost_at: Callable[[int], Cost], budget: Budget) -> tuple[int, Cost]:
    """The largest batch whose step the budget has room for; the need is assumed to grow with the batch.

    Raises:
        CostError: one sample does not fit.
    """
    assert budget.memory is not None
    memory = budget.memory / budget.allowance
    low, low_cost = 1, cost_at(1)
    if not budget.has_room(low_cost):
        what = f"one sample takes {show_size(peak(low_cost))}, the budget is {show_size(memory)}"
        raise CostError(what, fix="Ask for passes that fit (--suggest), or give more memory")
    high, step = LARGEST_BATCH + 1, 8
    before = peak(low_cost)
    while high - low > 1:
        # The peak is nearly linear in the batch: try where the line meets the budget, and bisect if that does not help.
        tried = min(max(step, low + 1), high - 1)
        cost = cost_at(tried)
        slope = (peak(cost) - before) / (tried - low) if tried > low else 0
        if budget.has_room(cost):
            low, low_cost, before = tried, cost, peak(cost)
        else:
            high = tried
        step = low + int((memory - before) / slope) if slope > 0 else (low + high) // 2
        if high <= LARGEST_BATCH and not low < step < high:
            step = low + 1 if step <= low else high - 1
    return low, low_cost


class Search:
    """A spec's backbone, traced once, and the costs of passes on it; on a GPU, if one is given."""

    def __init__(self, spec: Spec, *, device: Device | None = None, trust: bool = False) -> None:
        self.spec, self.device, self.trust = spec, device, trust
        self.plan = compile_phase(prepare(None, spec, compare=False, trust=trust), verify="off", costs=False)
        self.backbone = self._phase_cost(self._plan(()), spec.train.batch)

    def _plan(self, passes: Sequence[Pass], verify: Verify = "off") -> Plan:
        return compile_phase(self.plan.with_passes(passes), verify=verify, costs=False)

    def _phase_cost(self, plan: Plan, batch: int) -> Cost:
        measure = measure_with(batch, device=self.device, **self.spec.train.forecast_options())
        return measure(plan.module, plan.graph, [effects for effects in plan.effects if effects is not None])

    def cost(self, phases: Sequence[Phase], batch: int) -> Cost:
        """The step of the phase with the highest peak."""
        return max((self._phase_cost(phase.plan, batch) for phase in phases), key=peak)

    def largest_batch(self, budget: Budget) -> Fit:
        """The largest batch at which the spec, as it is, fits the memory in every phase that can be foreseen.

        Raises:
            CostError: one sample does not fit, or the budget limits FLOPs, which are the same per sample at any batch.
        """
        budget.check_for_batch()
        phases, count = self.plan.phases(self.spec.train.epochs), self.spec.train.accumulate
        size, cost = largest_batch(lambda size: self.cost(phases, size * count), budget)
        batch = size * count
        backbone = self._phase_cost(self._plan(()), batch)
        self._plan(self.plan.passes, verify=self.spec.verify or "full")
        own = Trial("the spec as it is", (), cost, fits=True, best=True, verified=True, untrained=self._untrained(cost))
        return Fit(budget, batch, backbone, (own,), own, self._with((), batch))

    def suggest(self, budget: Budget, *, everything: bool = False) -> Fit:
        """The cheapest candidate that fits at the spec's batch: the spec as it is, or with passes added to its own.

        `everything` forecasts and verifies all candidates; otherwise only as many as the choice takes.
        """
        shown = self.front if everything else self._searched(budget)
        shown = tuple(replace(c, fits=self._fits(c, budget)) for c in shown)
        fitting = sorted((c for c in shown if c.fits and c.verified), key=lambda c: c.price)
        chosen = fitting[0] if fitting else None
        batch = self.spec.train.batch
        if chosen is None:
            return Fit(budget, batch, self.backbone, shown, None, None)
        return Fit(budget, batch, self.backbone, shown, chosen, self._with(chosen.added, batch), snippet(self.plan.passes, chosen.added))

    def _fits(self, trial: Trial, budget: Budget) -> bool:
        return trial.cost is not None and budget.holds(trial.cost, self.backbone)

    def _searched(self, budget: Budget) -> tuple[Trial, ...]:
        """The trials that the choice took; the cheapest that fits is verified."""
        tried: dict[str, Trial] = {}
        for _, steps in groupby(sorted(self.ladders, key=_foreseen), key=_foreseen):
            for ladder in steps:
                self._climb(ladder, budget, tried)
            while fitting := [trial for trial in tried.values() if self._fits(trial, budget)]:
                cheapest = min(fitting, key=lambda trial: trial.price)
                tried[cheapest.name] = self._verified(cheapest)
                if tried[cheapest.name].verified:
                    return _with_front(tried.values())
        return _with_front(tried.values())

    def _climb(self, ladder: Sequence[Trial], budget: Budget, tried: dict[str, Trial]) -> None:
        """Finds the mildest trial of a ladder that fits, if its strongest does. One that is impossible counts as too mild."""

        def fits(trial: Trial) -> bool:
            if trial.name not in tried:
                tried[trial.name] = self._costed(trial)
            return self._fits(tried[trial.name], budget)

        high = len(ladder) - 1
        while not fits(ladder[high]):
            if high == 0 or tried[ladder[high].name].refused is None:
                return
            high -= 1
        low = 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)

    @cached_property
    def ladders(self) -> tuple[tuple[Trial, ...], ...]:
        """All trials; each ladder needs less from rung to rung."""
        return ((Trial("the spec as it is"),), *ladders(self.plan))

    @cached_property
    def front(self) -> tuple[Trial, ...]:
        """Every trial with its cost; those on the Pareto front verified."""
        found = tuple(self._costed(trial) for ladder in self.ladders for trial in ladder)
        while True:
            # A trial that cannot be verified leaves the front, and others may enter it.
            found = _with_front(found)
            if all(t.verified or not t.best for t in found):
                return found
            found = tuple(self._verified(t) if t.best and not t.verified else t for t in found)

    def _costed(self, trial: Trial) -> Trial:
        try:
            phases = self._plan(in_order(self.plan.passes, trial.added)).phases(self.spec.train.epochs)
            cost = self.cost(phases, self.spec.train.batch)
        except GraphoptError as error:
            return replace(trial, refused=str(error))
        except Exception as error:  # of one pass: reported, and no reason to give up on the others
            return replace(trial, refused=f"an internal error in one of its passes, {type(error).__name__}: {error}")
        return replace(trial, cost=cost, exact=_exact(trial.added, phases[-1].plan), untrained=self._untrained(cost))

    def _verified(self, trial: Trial) -> Trial:
        try:
            self._plan(in_order(self.plan.passes, trial.added), verify=self.spec.verify or "full")
        except GraphoptError as error:
            return replace(trial, cost=None, refused=f"not verified: {error}")
        return replace(trial, verified=True)

    def _untrained(self, cost: Cost) -> float:
        # Passes can add parameters (heads, decoders): only the backbone's own count.
        own = {row.path for row in self.backbone.rows}
        return 1 - sum(r.trainable_parameters for r in cost.rows if r.path in own) / self.backbone.trainable_parameters

    def _with(self, added: Sequence[Pass], batch: int) -> Spec:
        table = self.spec.resolved(defaults=False)
        table["pass"] = [value.table() for value in in_order(self.plan.passes, added)]
        table["train"] = {**table.get("train", {}), "batch": batch}
        return from_table(table, trust=self.trust)


def _exact(added: Sequence[Pass], plan: Plan) -> Exact:
    """What `plan` leaves exact, as far as the passes in `added` are concerned."""
    if not added:
        return Exact.UNCHANGED
    done = [effects for value, effects in zip(plan.passes, plan.effects, strict=True) if effects is not None and value in added]
    if any(effects.needs.targets for effects in done):
        return Exact.OUTPUT
    preserved = frozenset.intersection(*(value.preserved_properties() for value in added))
    if preserved >= ALL_PROPERTIES:
        return Exact.EVERYTHING
    return Exact.GRADIENTS if "gradients of unselected parameters" in preserved else Exact.LOSS


def in_order(own: Sequence[Pass], added: Sequence[Pass]) -> list[Pass]:
    """The spec's passes with those added; an added one replaces the spec's own where a plan can have only one of its kind.

    Passes that split the backbone come first; passes that reuse the splits of others come last.
    """
    replaced = {value.name for value in added if value.once}
    first, anywhere, last = ([value for value in added if value.position == position] for position in _POSITIONS)
    return [*first, *(value for value in own if value.name not in replaced), *anywhere, *last]


def snippet(own: Sequence[Pass], added: Sequence[Pass]) -> str:
    """The added passes as TOML, each with a comment on where it belongs."""
    parts = []
    for value in added:
        where = "before the spec's other passes" if value.position == "first" else "after the spec's other passes"
        if value.once and value.name in (other.name for other in own):
            where = f"in the place of the spec's own {value.name}"
        parts.append(f"# {where}\n{dumps_pass(value.table())}" if own else dumps_pass(value.table()))
    return "\n".join(parts)


def _with_front(found: Iterable[Trial]) -> tuple[Trial, ...]:
    """Trials, marked where no other one is better."""
    trials = tuple(found)
    return tuple(replace(t, best=t.cost is not None and not any(o.beats(t) for o in trials)) for t in trials)


def _foreseen(ladder: Sequence[Trial]) -> Exact:
    """The most that the trials of a ladder can leave exact, by what their passes promise."""
    added = ladder[0].added
    preserved = [value.preserved_properties() for value in added]
    if all(properties >= ALL_PROPERTIES for properties in preserved):
        return Exact.EVERYTHING if added else Exact.UNCHANGED
    return Exact.GRADIENTS if all("gradients of unselected parameters" in properties for properties in preserved) else Exact.LOSS


def ladders(plan: Plan) -> Iterator[tuple[Trial, ...]]:
    """What can be added to a plan: the candidates of every installed pass, pairs of two passes, and all three of some."""
    found: list[tuple[type[Pass], list[Trial]]] = []
    for kind in sorted(installed().values(), key=lambda kind: (kind.once, _POSITIONS.index(kind.position))):
        current = next((value for value in plan.passes if value.name == kind.name), None)
        if candidates := [Trial(c.label, (c.value,)) for c in kind.candidates(plan.sizes.whole, current)]:
            found.append((kind, candidates))
            yield tuple(candidates)
    # Of two passes: the second's middle candidate beside each of the first, or beside its strongest if a plan has one at most.
    for (kind, candidates), (_, others) in combinations(found, 2):
        yield tuple(_both(candidate, others[len(others) // 2]) for candidate in (candidates[-1:] if kind.once else candidates))
    # As a last resort the strongest of three, but for the first, whose price is what no longer trains.
    for (_, candidates), (_, others), (_, more) in combinations(found, 3):
        yield tuple(_both(_both(candidate, others[-1]), more[-1]) for candidate in candidates)


def _both(one: Trial, other: Trial) -> Trial:
    return Trial(f"{one.name}; {other.name}", (*one.added, *other.added))
