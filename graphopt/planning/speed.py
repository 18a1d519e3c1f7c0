"""Planning for time: the schedules of passes with which a run takes as little time as asked, by the forecast of the whole run.

Every installed pass offers schedules of its own (`Pass.schedules`), mildest first: a ladder. So do passes that go together, rung by rung.
Of each ladder the mildest rung that is fast enough is found by bisection; of those, the one that takes least away from training is chosen
(see `Quicker.price`), verified, and written as a spec. With `hold`, its triggers undo themselves in the run when held-out accuracy falls
too far.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations, zip_longest
from typing import Any

from graphopt.compiler.pass_base import Pass
from graphopt.compiler.plan import Phase, Plan, compile_phase
from graphopt.compiler.registry import passes as installed
from graphopt.compiler.triggers import Start
from graphopt.cost import Rates
from graphopt.cost.roofline import PeakRates
from graphopt.driver import prepare
from graphopt.errors import GraphoptError
from graphopt.ir.inputs import image_of
from graphopt.planning.budget import in_order, snippet
from graphopt.planning.run_cost import RunCost, counts, forecast_run
from graphopt.spec import Spec, from_table
from graphopt.train.preflight import problems


@dataclass(frozen=True)
class Quicker:
    """One way to make a run quicker: passes added to the spec's own.

    Attributes:
        seconds: of the whole run, without loading; None before it is forecast.
        updates: share of the spec's own parameter updates that are still made. pixels: share of its pixels that are still seen in training.
        refused: why it is impossible, if it is.
    """

    name: str
    added: tuple[Pass, ...] = ()
    seconds: float | None = None
    updates: float = 1.0
    pixels: float = 1.0
    refused: str | None = None

    @property
    def price(self) -> float:
        """What training loses: the squares of the lost shares of updates and of pixels: a little of both costs less than much of one."""
        return (1 - self.updates) ** 2 + (1 - self.pixels) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {key: getattr(self, key) for key in ("name", "seconds", "updates", "pixels", "refused")}
        return {**plain, "added": [value.table() for value in self.added]}


@dataclass(frozen=True)
class SpeedPlan:
    """The result of a search. `chosen` and `spec`, the spec to write, are None if nothing is quick enough.

    Attributes:
        limit: seconds that the run may take. own: the spec as it is.
    """

    limit: float
    own: Quicker
    tried: tuple[Quicker, ...]
    chosen: Quicker | None
    spec: Spec | None = field(repr=False)
    snippet: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tried = [trial.to_dict() for trial in self.tried]
        return {
            "limit_seconds": self.limit,
            "own": self.own.to_dict(),
            "tried": tried,
            "chosen": self.chosen and self.chosen.name,
            "snippet": self.snippet,
        }


class SpeedSearch:
    """A spec's backbone, traced once, and the forecast of its run with passes added.

    Args:
        rates: the machine's, or the peak rates of a GPU. hold: points of held-out accuracy that added passes may cost (see `BaseTrigger`).
    """

    def __init__(self, spec: Spec, rates: Rates | PeakRates, *, hold: float | None = None, trust: bool = False) -> None:
        self.spec, self.rates, self.hold, self.trust = spec, rates, hold, trust
        self.plan = compile_phase(prepare(None, spec, compare=False, trust=trust), verify="off", costs=False)
        self.samples, self.evaluated = counts(spec.data)
        self._tried: dict[str, Quicker] = {}
        self._whole = self._forecast(self.plan.passes)[1]
        self.own = self._costed(Quicker("the spec as it is"), self._whole)
        #: what a run of the spec as it is would be refused for, images that are elsewhere, say
        self._refused = {str(problem) for problem in problems(self.plan, spec.train, spec.data)}

    def suggest(self, limit: float) -> SpeedPlan:
        """What takes at most `limit` seconds and takes least away from training."""
        found = [self.own] if self._fits(self.own, limit) else [trial for ladder in self.ladders() if (trial := self._climb(ladder, limit))]
        for trial in sorted(found, key=lambda trial: trial.price):
            checked = self._checked(trial)
            self._tried[checked.name] = checked
            if checked.refused is None:
                text = snippet(self.plan.passes, checked.added)
                return SpeedPlan(limit, self.own, tuple(self._tried.values()), checked, self._with(checked.added), text)
        return SpeedPlan(limit, self.own, tuple(self._tried.values()), None, None)

    def ladders(self) -> Iterator[tuple[Quicker, ...]]:
        """Schedules of each pass that the spec does not have yet; then those of passes that go together, rung by rung."""
        own = {value.name for value in self.plan.passes}
        kinds = [kind for name, kind in sorted(installed().items()) if name not in own]
        offers = [list(kind.schedules(self.plan.base, self.spec.train.epochs)) for kind in kinds]
        found = [tuple(Quicker(c.label, (self._held(c.value),)) for c in offer) for offer in offers if offer]
        yield from found
        for size in range(2, len(found) + 1):
            for several in combinations(found, size):
                if not _conflict([ladder[0].added[0] for ladder in several]):
                    # A shorter ladder stays on its strongest rung.
                    rungs = zip_longest(*several)
                    yield tuple(_together([rung or ladder[-1] for rung, ladder in zip(row, several, strict=True)]) for row in rungs)

    def _held(self, value: Pass) -> Pass:
        if self.hold is None or isinstance(value.when, Start):
            return value
        return value.model_copy(update={"when": value.when.model_copy(update={"hold": self.hold})})

    def _fits(self, trial: Quicker, limit: float) -> bool:
        return trial.seconds is not None and trial.seconds <= limit

    def _climb(self, ladder: Sequence[Quicker], limit: float) -> Quicker | None:
        """The mildest rung that is quick enough, if the strongest possible one is."""
        rungs = list(ladder)
        while rungs and self._trial(rungs[-1]).seconds is None:
            rungs.pop()
        if not rungs or not self._fits(self._trial(rungs[-1]), limit):
            return None
        low, high = 0, len(rungs) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(self._trial(rungs[middle]), limit) else (middle + 1, high)
        return self._trial(rungs[low])

    def _trial(self, trial: Quicker) -> Quicker:
        if trial.name not in self._tried:
            try:
                phases, cost = self._forecast(in_order(self.plan.passes, trial.added))
                found = self._costed(trial, cost, phases)
            except GraphoptError as error:
                found = replace(trial, refused=str(error))
            self._tried[trial.name] = found
        return self._tried[trial.name]

    def _phases(self, passes: Sequence[Pass], **options: Any) -> tuple[Phase, ...]:
        plan = compile_phase(self.plan.with_passes(passes), verify="off", costs=False, weights=False)
        return plan.phases(self.spec.train.epochs, **options)

    def _forecast(self, passes: Sequence[Pass]) -> tuple[tuple[Phase, ...], RunCost]:
        phases = self._phases(passes)
        of = forecast_run(phases[0].plan, self.spec.train, samples=self.samples, evaluated=self.evaluated, phases=phases, rates=self.rates)
        return phases, of

    def _costed(self, trial: Quicker, cost: RunCost, phases: Sequence[Phase] = ()) -> Quicker:
        updates, whole = (sum(p.epochs * p.step.trainable_parameters for p in c.phases) for c in (cost, self._whole))
        pixels = [(phase.end - phase.start) * _pixels(phase.plan) for phase in phases]
        seen = sum(pixels) / (cost.epochs * _pixels(self.plan)) if phases else 1.0
        return replace(trial, seconds=cost.run.seconds, updates=min(1.0, updates / whole), pixels=min(1.0, seen))

    def _checked(self, trial: Quicker) -> Quicker:
        """Verified in every phase, and asked whether its run would start."""
        try:
            phases = self._phases(in_order(self.plan.passes, trial.added), verify="fast")
            for phase in phases:
                for problem in problems(phase.plan, self.spec.train, self.spec.data):
                    if str(problem) not in self._refused:
                        raise problem
        except GraphoptError as error:
            return replace(trial, refused=str(error))
        return trial

    def _with(self, added: Sequence[Pass]) -> Spec:
        table = self.spec.resolved(defaults=False)
        table["pass"] = [value.table() for value in in_order(self.plan.passes, added)]
        return from_table(table, trust=self.trust)


def _together(trials: Sequence[Quicker]) -> Quicker:
    return Quicker("; ".join(trial.name for trial in trials), tuple(value for trial in trials for value in trial.added))


def _conflict(passes: Sequence[Pass]) -> bool:
    """Whether a claim of one on its regions rules another out."""
    return any(one.claim in other.conflicts_with for one, other in permutations(passes, 2))


def _pixels(plan: Plan) -> int:
    image = image_of(plan.graph.input)
    return 1 if image is None else image[1] * image[2]
