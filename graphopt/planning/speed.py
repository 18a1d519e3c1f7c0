"""Planning for time: the schedules of passes with which a run takes as little time as asked, by the forecast of the whole run.

Every installed pass offers schedules of its own (`Pass.schedules`), mildest first: a ladder. So do passes that go together, rung by rung.
Of each ladder the mildest rung that is fast enough is found by bisection; the rungs that were too slow, and the spec as it is, become fast
enough with fewer epochs. Of all these, the one that takes least away from training is chosen (see `Quicker.price`), verified, and written
as a spec. With `hold`, its triggers undo themselves in the run when held-out accuracy falls too far.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations, zip_longest
from typing import Any, NamedTuple

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

#: how many of the ways that become quick enough with fewer epochs are forecast: those that take least, by estimate
SHORTER = 6


class Rung(NamedTuple):
    """A schedule that a pass offers: the pass, and its place on the ladder, which the length of the run does not change."""

    kind: type[Pass]
    number: int


@dataclass(frozen=True)
class Quicker:
    """One way to make a run quicker: passes added to the spec's own, and fewer epochs.

    Attributes:
        rungs: the schedules that its passes are.
        epochs: length of the run.
        seconds: of the whole run, without loading; None before it is forecast.
        updates, images: shares of the spec's own parameter updates that are still made, and of its images that are still seen.
        pixels: share of the pixels of an image that is seen, on average.
        refused: why it is impossible, if it is.
    """

    name: str
    epochs: int
    added: tuple[Pass, ...] = ()
    rungs: tuple[Rung, ...] = ()
    seconds: float | None = None
    updates: float = 1.0
    images: float = 1.0
    pixels: float = 1.0
    refused: str | None = None

    @property
    def price(self) -> float:
        """What training loses: the squares of the lost shares, as a little of each costs less than much of one; pixels count twice.

        That orders what was measured on ResNet-20 and Fashion-MNIST (tools/tables/speedup_fashion.md): at half of the time, smaller images
        cost more accuracy there than fewer epochs.
        """
        return (1 - self.updates) ** 2 + (1 - self.images) ** 2 + (2 * (1 - self.pixels)) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {key: getattr(self, key) for key in ("name", "epochs", "seconds", "updates", "images", "pixels", "refused")}
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
        self._steps: dict[Hashable, Any] = {}
        self._whole = self._forecast(self.plan.passes, spec.train.epochs)[1]
        self.own = self._costed(Quicker("the spec as it is", spec.train.epochs), self._whole)
        #: what a run of the spec as it is would be refused for, images that are elsewhere, say
        self._refused = {str(problem) for problem in problems(self.plan, spec.train, spec.data)}

    def suggest(self, limit: float) -> SpeedPlan:
        """What takes at most `limit` seconds and takes least away from training."""
        found = [self.own] if self._fits(self.own, limit) else self._fitting(limit)
        for trial in sorted(found, key=lambda trial: trial.price):
            checked = self._checked(trial)
            self._tried[checked.name] = checked
            if checked.refused is None:
                text = snippet(self.plan.passes, checked.added)
                text += f"[train]\nepochs = {checked.epochs}\n" if checked.epochs < self.own.epochs else ""
                return SpeedPlan(limit, self.own, tuple(self._tried.values()), checked, self._with(checked), text)
        return SpeedPlan(limit, self.own, tuple(self._tried.values()), None, None)

    def _fitting(self, limit: float) -> list[Quicker]:
        """What is quick enough: a rung of each ladder, and the best of what becomes so with fewer epochs."""
        found = [trial for ladder in self.ladders() if (trial := self._climb(ladder, limit))]
        whole = (trial for trial in self._tried.values() if trial.epochs == self.own.epochs)
        slow = [self.own, *(trial for trial in whole if trial.seconds is not None and trial.seconds > limit)]
        shorter = sorted((self._shorter(trial, limit) for trial in slow), key=lambda trial: trial.price)
        tried = [self._trial(self._at(trial, trial.epochs)) for trial in shorter[:SHORTER] if trial.epochs]
        return [*found, *(trial for trial in tried if self._fits(trial, limit))]

    def _shorter(self, trial: Quicker, limit: float) -> Quicker:
        """A way that is too slow, in fewer epochs; its time and what it keeps are estimated, in proportion."""
        assert trial.seconds is not None
        epochs = int(self.own.epochs * limit / trial.seconds)
        share = epochs / self.own.epochs
        return replace(trial, epochs=epochs, seconds=None, updates=trial.updates * share, images=share)

    def _at(self, trial: Quicker, epochs: int) -> Quicker:
        """The same rungs in a run of so many epochs; where its ladder is shorter then, the last one."""
        offers = [self._offer(rung.kind, epochs) for rung in trial.rungs]
        if not all(offers):
            return replace(trial, refused=f"{epochs} epochs are too few for its schedule")
        chosen = [offer[min(rung.number, len(offer) - 1)] for offer, rung in zip(offers, trial.rungs, strict=True)]
        shorter = _together([Quicker(f"{epochs} epochs", epochs), *chosen])
        return replace(shorter, rungs=trial.rungs)

    def _offer(self, kind: type[Pass], epochs: int) -> tuple[Quicker, ...]:
        """The schedules of a pass for a run of so many epochs."""
        offer = enumerate(kind.schedules(self.plan.base, epochs))
        return tuple(Quicker(c.label, epochs, (self._held(c.value),), (Rung(kind, number),)) for number, c in offer)

    def ladders(self) -> Iterator[tuple[Quicker, ...]]:
        """Schedules of each pass that the spec does not have yet; then those of passes that go together, rung by rung."""
        own = {value.name for value in self.plan.passes}
        kinds = [kind for name, kind in sorted(installed().items()) if name not in own]
        found = [offer for kind in kinds if (offer := self._offer(kind, self.own.epochs)) and self._starts(offer[0])]
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

    def _starts(self, trial: Quicker) -> bool:
        """Whether a run with these passes would start, as far as its data and settings go; what is refused is not tried again."""
        try:
            phases = self._phases(in_order(self.plan.passes, trial.added), trial.epochs)
            self._check_starts([phase.plan for phase in phases], self.spec)
        except GraphoptError as error:
            self._tried[trial.name] = replace(trial, refused=str(error))
            return False
        return True

    def _check_starts(self, plans: Sequence[Plan], spec: Spec) -> None:
        """Raises what a run would be refused for that the spec as it is would not be."""
        for plan in plans:
            for problem in problems(plan, spec.train, spec.data):
                if str(problem) not in self._refused:
                    raise problem

    def _climb(self, ladder: Sequence[Quicker], limit: float) -> Quicker | None:
        """The mildest rung that is quick enough, if the strongest possible one is."""
        rungs = list(ladder)
        while rungs and self._trial(rungs[-1]).seconds is None:
            rungs.pop()
        if not rungs or not self._fits(self._trial(rungs[-1]), limit):
            for milder in rungs[len(rungs) // 2 : -1][:1]:  # it may do with fewer epochs
                self._trial(milder)
            return None
        low, high = 0, len(rungs) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(self._trial(rungs[middle]), limit) else (middle + 1, high)
        return self._trial(rungs[low])

    def _trial(self, trial: Quicker) -> Quicker:
        if trial.name not in self._tried and trial.refused is None:
            try:
                phases, cost = self._forecast(in_order(self.plan.passes, trial.added), trial.epochs)
                found = self._costed(trial, cost, phases)
            except GraphoptError as error:
                found = replace(trial, refused=str(error))
            self._tried[trial.name] = found
        return self._tried.get(trial.name, trial)

    def _phases(self, passes: Sequence[Pass], epochs: int, **options: Any) -> tuple[Phase, ...]:
        plan = compile_phase(self.plan.with_passes(passes), verify="off", costs=False, weights=False)
        return plan.phases(epochs, **options)

    def _forecast(self, passes: Sequence[Pass], epochs: int) -> tuple[tuple[Phase, ...], RunCost]:
        phases, train = self._phases(passes, epochs), self.spec.train.model_copy(update={"epochs": epochs})
        first, samples, evaluated, known = phases[0].plan, self.samples, self.evaluated, self._steps
        return phases, forecast_run(first, train, samples=samples, evaluated=evaluated, phases=phases, rates=self.rates, known=known)

    def _costed(self, trial: Quicker, cost: RunCost, phases: Sequence[Phase] = ()) -> Quicker:
        updates, whole = (sum(p.epochs * p.step.trainable_parameters for p in c.phases) for c in (cost, self._whole))
        pixels = [(phase.end - phase.start) * _pixels(phase.plan) for phase in phases]
        seen = sum(pixels) / (cost.epochs * _pixels(self.plan)) if phases else 1.0
        images = trial.epochs / self.spec.train.epochs
        return replace(trial, seconds=cost.run.seconds, updates=min(1.0, updates / whole), images=images, pixels=min(1.0, seen))

    def _checked(self, trial: Quicker) -> Quicker:
        """Verified in every phase, and asked whether its run would start."""
        try:
            phases = self._phases(in_order(self.plan.passes, trial.added), trial.epochs, verify="fast")
            self._check_starts([phase.plan for phase in phases], self._with(trial))
        except GraphoptError as error:
            return replace(trial, refused=str(error))
        return trial

    def _with(self, trial: Quicker) -> Spec:
        table = self.spec.resolved(defaults=False)
        table["pass"] = [value.table() for value in in_order(self.plan.passes, trial.added)]
        if trial.epochs < self.own.epochs:
            table["train"] = {**table.get("train", {}), "epochs": trial.epochs}
        return from_table(table, trust=self.trust)


def _together(trials: Sequence[Quicker]) -> Quicker:
    added, rungs = (tuple(value for trial in trials for value in getattr(trial, name)) for name in ("added", "rungs"))
    return Quicker("; ".join(trial.name for trial in trials), trials[0].epochs, added, rungs)


def _conflict(passes: Sequence[Pass]) -> bool:
    """Whether a claim of one on its regions rules another out."""
    return any(one.claim in other.conflicts_with for one, other in permutations(passes, 2))


def _pixels(plan: Plan) -> int:
    image = image_of(plan.graph.input)
    return 1 if image is None else image[1] * image[2]
