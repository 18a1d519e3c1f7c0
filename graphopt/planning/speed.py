"""Planning for time: the schedules of passes with which a run takes as little time as asked, by the forecast of the whole run.

What leaves training as it is comes first: another memory format, and 16-bit arithmetic, as far as they are quicker. If that is not enough,
every installed pass offers schedules of its own (`Pass.schedules`), mildest first: a ladder. So do passes that go together, rung by rung.
Of each ladder the mildest rung that is fast enough is found by bisection; the rungs that were too slow, and the spec as it is, become fast
enough with fewer epochs. Of all these, the one that takes least away from training is chosen (see `Quicker.price`), verified, and written
as a spec. With `hold`, its triggers undo themselves in the run when held-out accuracy falls too far.
"""

import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations, zip_longest
from typing import Any

import torch

from graphopt.compiler.pass_base import Pass
from graphopt.compiler.plan import Phase, Plan, compile_phase
from graphopt.compiler.registry import passes as installed
from graphopt.compiler.triggers import Start, step_at
from graphopt.cost import Rates
from graphopt.cost.roofline import PeakRates
from graphopt.driver import prepare
from graphopt.errors import GraphoptError
from graphopt.ir.inputs import image_of
from graphopt.planning.budget import in_order, snippet
from graphopt.planning.loading import LoaderRate, phase_times
from graphopt.planning.quicker import Quicker, Rung, SpeedPlan, settings_text, together
from graphopt.planning.run_cost import PhaseCost, RunCost, counts, forecast_run
from graphopt.spec import Spec, TrainSpec, from_table
from graphopt.spec.writing import toml_value
from graphopt.train.optimizer import Schedule
from graphopt.train.preflight import problems

#: how many of the ways that become quick enough with fewer epochs are forecast: those that take least, by estimate
SHORTER = 6
#: moments of each epoch at which the learning rate is read
SLICES = 10
#: gives what makes seconds of the steps of such a run of a plan: the machine's rates in its memory format and precision, or a GPU's
RatesOf = Callable[[Plan, TrainSpec], Rates | PeakRates]


class SpeedSearch:
    """A spec's backbone, traced once, and the forecast of its run with passes added.

    Args:
        hold: points of held-out accuracy that added passes may cost (see `BaseTrigger`).
        keep_settings: leave memory format and precision as they are.
        loader: how fast images come; None leaves loading them out.
    """

    def __init__(
        self,
        spec: Spec,
        rates_of: RatesOf,
        *,
        hold: float | None = None,
        keep_settings: bool = False,
        loader: LoaderRate | None = None,
        trust: bool = False,
    ) -> None:
        self.loader = loader
        self.spec, self.rates_of, self.hold, self.keep_settings, self.trust = spec, rates_of, hold, keep_settings, trust
        self.plan = compile_phase(prepare(None, spec, compare=False, trust=trust), verify="off", costs=False)
        self._train, self.rates = spec.train, rates_of(self.plan, spec.train)
        self._rates = {"": self.rates}
        self.samples, self.evaluated = counts(spec.data)
        self._tried: dict[str, Quicker] = {}
        #: FLOPs of the backward of a step of the spec as it is, on average over its learning rates
        self._work = 0.0
        self._steps: dict[Hashable, Any] = {}
        self._whole = self._forecast(self.plan.passes, spec.train.epochs)[1]
        #: what ladders and fewer epochs start from, too: the spec as it is, later with the quickest settings
        self.base = self.own = self._costed(Quicker("the spec as it is", spec.train.epochs), self._whole)
        #: what a run of the spec as it is would be refused for, images that are elsewhere, say
        self._refused = {str(problem) for problem in problems(self.plan, spec.train, spec.data)}

    def suggest(self, limit: float) -> SpeedPlan:
        """What takes at most `limit` seconds and takes least away from training."""
        self._tried.clear()
        self._take(self.own)
        found = [self.own] if self._fits(self.own, limit) else self._settled(limit) or self._fitting(limit)
        for trial in sorted(found, key=lambda trial: trial.price):
            checked = self._checked(trial)
            self._tried[checked.name] = checked
            if checked.refused is None:
                changes = self._changes(checked)
                text = snippet(self.plan.passes, checked.added) if checked.added else ""
                text += "".join(["[train]\n", *(f"{key} = {toml_value(value)}\n" for key, value in changes.items())]) if changes else ""
                return SpeedPlan(limit, self.own, self.base, tuple(self._tried.values()), checked, self._with(checked), text)
        return SpeedPlan(limit, self.own, self.base, tuple(self._tried.values()), None, None)

    def _settled(self, limit: float) -> list[Quicker]:
        """The mildest settings that are quick enough by themselves. If there are none, the quickest ones become the base of all else."""
        for trial in self._settings():
            if self._fits(trial, limit):
                return [trial]
        self._take(min((self.own, *self._tried.values()), key=lambda trial: trial.seconds or math.inf))
        return []

    def _settings(self) -> Iterator[Quicker]:
        """Settings that the spec does not have, mildest first, with the seconds of the run."""
        if self.keep_settings:
            return
        quickest, given = self.own, self.spec.resolved(defaults=False).get("train", {})
        for key, value in self._possible().items():
            if key not in given:
                settings = {**quickest.settings, key: value}
                trial = Quicker(settings_text(settings), self.own.epochs, settings=settings)
                try:
                    self._take(trial)
                    self._check_starts([self.plan], self.spec.model_copy(update={"train": self._train}))
                except GraphoptError as error:
                    self._tried[trial.name] = replace(trial, refused=str(error))
                yield (found := self._trial(trial))
                quickest = found if found.seconds is not None and self._fits(found, quickest.seconds or math.inf) else quickest

    def _possible(self) -> dict[str, Any]:
        """The memory format for images and convolutions, where its speed can be measured; 16-bit arithmetic for a network in float32."""
        parameters = tuple(self.plan.module.parameters())
        images = image_of(self.plan.graph.input) is not None and any(p.dim() == 4 for p in parameters)
        found: dict[str, Any] = {"channels_last": True} if images and not isinstance(self.rates, PeakRates) else {}
        return {**found, "amp": "bfloat16"} if parameters and all(p.dtype == torch.float32 for p in parameters) else found

    def _take(self, base: Quicker) -> None:
        """From now on, runs have these settings, whose rates are measured once."""
        train = self.spec.train.model_copy(update=dict(base.settings))
        if train != self._train:
            name = settings_text(base.settings)
            if name not in self._rates:
                self._rates[name] = self.rates_of(self.plan, train)
            self._train, self.rates, self._steps = train, self._rates[name], {}
        self.base = base

    def _fitting(self, limit: float) -> list[Quicker]:
        """What is quick enough: a rung of each ladder, and the best of what becomes so with fewer epochs."""
        found = [trial for ladder in self.ladders() if (trial := self._climb(ladder, limit))]
        whole = (trial for trial in self._tried.values() if trial.epochs == self.own.epochs and trial.added)
        slow = [self.base, *(trial for trial in whole if trial.seconds is not None and trial.seconds > limit)]
        shorter = sorted((self._shorter(trial, limit) for trial in slow), key=lambda trial: trial.price)
        return [*found, *(quick for trial in shorter[:SHORTER] if (quick := self._shortened(trial, limit)))]

    def _shortened(self, trial: Quicker, limit: float) -> Quicker | None:
        """The trial in as many epochs as are quick enough, at most its own: what a run takes besides its epochs is not in proportion."""
        epochs = trial.epochs
        while epochs > 0:
            found = self._trial(self._at(trial, epochs))
            if found.seconds is None:
                return None
            if self._fits(found, limit):
                return found
            epochs = min(epochs - 1, int(epochs * limit / found.seconds))
        return None

    def _shorter(self, trial: Quicker, limit: float) -> Quicker:
        """A way that is too slow, in fewer epochs; its time and what it keeps are estimated, in proportion."""
        assert trial.seconds is not None
        epochs = int(self.own.epochs * limit / trial.seconds)
        share = epochs / self.own.epochs
        return replace(trial, epochs=epochs, seconds=None, updates=trial.updates * share, images=trial.images * share)

    def _at(self, trial: Quicker, epochs: int) -> Quicker:
        """The same rungs in a run of so many epochs; where its ladder is shorter then, the last one."""
        offers = [self._offer(rung.kind, epochs) for rung in trial.rungs]
        if not all(offers):
            return replace(trial, refused=f"{epochs} epochs are too few for its schedule")
        chosen = [offer[min(rung.number, len(offer) - 1)] for offer, rung in zip(offers, trial.rungs, strict=True)]
        shorter = together([Quicker(f"{epochs} epochs", epochs, settings=self.base.settings), *chosen])
        return replace(shorter, rungs=trial.rungs)

    def _offer(self, kind: type[Pass], epochs: int) -> tuple[Quicker, ...]:
        """The schedules of a pass for a run of so many epochs."""
        offer = enumerate(kind.schedules(self.plan.base, epochs))
        settings = self.base.settings
        return tuple(Quicker(c.label, epochs, (self._held(c.value),), (Rung(kind, number),), settings) for number, c in offer)

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
                    yield tuple(together([rung or ladder[-1] for rung, ladder in zip(row, several, strict=True)]) for row in rungs)

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
            self._check_starts([phase.plan for phase in phases], self.spec.model_copy(update={"train": self._train}))
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
        phases, train = self._phases(passes, epochs), self._train.model_copy(update={"epochs": epochs})
        first, samples, evaluated, known = phases[0].plan, self.samples, self.evaluated, self._steps
        return phases, forecast_run(first, train, samples=samples, evaluated=evaluated, phases=phases, rates=self.rates, known=known)

    def _costed(self, trial: Quicker, cost: RunCost, phases: Sequence[Phase] = ()) -> Quicker:
        weights = self._weights(cost)
        pixels = [min(1.0, _pixels(phase.plan) / _pixels(self.plan)) for phase in phases] or [1.0] * len(weights)
        work = [p.backward_flops / size for p, size in zip(cost.phases, pixels, strict=True)]
        share, length = sum(map(operator.mul, weights, work)), trial.epochs / self.spec.train.epochs
        if not self._work:
            self._work = share
        fresh = [p.epochs * self._fresh(p, phase.plan) for p, phase in zip(cost.phases, phases, strict=False)] or [cost.epochs]
        seconds = cost.run.seconds
        if self.loader is not None and seconds is not None:
            times = phase_times(cost, self.spec.train.batch, self.loader)
            seconds += sum(time.epochs * (time.length - time.step) for time in times)
        shares = {"updates": min(length, length * share / self._work), "images": length * sum(fresh) / cost.epochs}
        return replace(trial, seconds=seconds, **shares, pixels=sum(map(operator.mul, weights, pixels)))

    def _weights(self, cost: RunCost) -> list[float]:
        """The share of each phase in the sum of the run's learning rates."""
        train = self._train.model_copy(update={"epochs": cost.epochs})
        schedule = Schedule(torch.optim.SGD([torch.zeros(())], lr=1.0), train, SLICES)
        rates = [schedule.set_step(step) for step in range(cost.epochs * SLICES)]
        ends = [(step_at(p.epoch, SLICES), step_at(p.epoch + p.epochs, SLICES)) for p in cost.phases]
        return [sum(rates[start:end]) / sum(rates) for start, end in ends]

    def _fresh(self, phase: PhaseCost, plan: Plan) -> float:
        """The share of a phase's images that are drawn anew: all, but for features from a cache of random views."""
        if not phase.feature_bytes or plan.needs.features is None or not self.spec.data.augment.redraws:
            return 1.0
        options = plan.needs.features.options
        return 1 / options["refresh"] if options.get("refresh") else min(1.0, (options.get("views") or 1) / phase.epochs)

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
        table["train"] = {**table.get("train", {}), **self._changes(trial)}
        return from_table(table, trust=self.trust)

    def _changes(self, trial: Quicker) -> dict[str, Any]:
        """Of `[train]`."""
        return {**trial.settings, **({"epochs": trial.epochs} if trial.epochs < self.own.epochs else {})}


def _conflict(passes: Sequence[Pass]) -> bool:
    """Whether a claim of one on its regions rules another out."""
    return any(one.claim in other.conflicts_with for one, other in permutations(passes, 2))


def _pixels(plan: Plan) -> int:
    image = image_of(plan.graph.input)
    return 1 if image is None else image[1] * image[2]
