"""A plan: a backbone and its passes, compiled; and every later phase of it, which is a pure function of (spec, decisions)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.fx import Node

from graphopt.compiler.emit import emit
from graphopt.compiler.learning_rates import LearningRates
from graphopt.compiler.measure import Measure
from graphopt.compiler.pass_base import Effects, Pass, PassInstance, RuntimeNeeds
from graphopt.compiler.pipeline import Matched, Verify, match_all, rewrite
from graphopt.compiler.report import Report
from graphopt.compiler.sizes import Sizes
from graphopt.compiler.triggers import Decision
from graphopt.errors import GraphoptError, PassError
from graphopt.ir.editor import Edits
from graphopt.ir.grad_mode import recording
from graphopt.ir.graph import Graph
from graphopt.ir.module import TrainingModule
from graphopt.ir.regions import region_at
from graphopt.runtime.state_dicts import load_versioned

if TYPE_CHECKING:
    from graphopt import Diff


class Phase(NamedTuple):
    """A part of a run with one graph: when it starts and ends, in epochs, what began it, its plan."""

    start: float
    end: float
    decisions: tuple[Decision, ...]
    plan: Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What all phases of a plan have in common.

    Attributes:
        backbone: the user's model, as it was. base: its graph before any rewrite; of a plan, at the size of the phase's input.
        spec: the spec it came from, if any.
        matched: the passes in order, with what each decided on that graph.
        sizes: the backbone at other sizes of its input, for phases that ask for one.
        name, digest: of the spec; the digest identifies spec and backbone, and checkpoints carry it.
        batch: samples in the training step that costs are of. measure: the cost model; None where costs were not asked for.
    """

    backbone: nn.Module
    base: Graph
    matched: tuple[Matched, ...]
    sizes: Sizes
    name: str
    digest: str
    batch: int
    measure: Measure | None = None
    spec: Any = None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, in order."""
        return tuple(item.instance.value for item in self.matched)

    def with_passes(self, passes: Sequence[Pass]) -> Self:
        """The same backbone with other passes, matched anew. Raises as `Pass.match`."""
        matched = match_all(self.sizes.whole, [PassInstance(value, index) for index, value in enumerate(passes)])
        return replace(self, matched=matched, sizes=self.sizes.with_passes(matched))


class Progress(NamedTuple):
    """How far a pass has come: the pass, the names of all its regions, and of those that it is applied to now."""

    instance: PassInstance
    names: tuple[str, ...]
    active: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Source):
    """A compiled backbone in one of its phases.

    Attributes:
        decisions: what has fired so far.
        graph: the rewritten graph, flat. module: what trains: `module(x)` returns what the backbone returns; with `needs.targets`,
            training calls `module(x, target)` and gets `(output, local_loss)`.
        effects: what each pass did; None for one that has not fired. edits: the same, as the editor recorded it.
        report: what changed, in figures and per pass.
    """

    decisions: tuple[Decision, ...]
    graph: Graph
    effects: tuple[Effects | None, ...]
    edits: tuple[Edits | None, ...]
    module: TrainingModule
    report: Report

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, passes={[p.name for p in self.passes]}, decisions={len(self.decisions)})"

    def diff(self, other: Plan | None = None) -> Diff:
        """What the plan does to its backbone, block by block; with `other`, how that plan differs from this one."""
        from graphopt import Diff

        return Diff.of(self, other)

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture of what the plan does in its phase."""
        from graphopt import picture

        return picture(self)

    @cached_property
    def needs(self) -> RuntimeNeeds:
        """What the runner must provide."""
        return RuntimeNeeds.of(e for e in self.effects if e is not None)

    def progress(self) -> tuple[Progress, ...]:
        """How far each pass has come."""
        return tuple(Progress(m.instance, m.match.names, m.active(self.decisions)) for m in self.matched)

    def due(
        self, epoch: float, history: Any = None, epochs: int | None = None, decisions: tuple[Decision, ...] = ()
    ) -> tuple[Decision, ...]:
        """What the triggers decide before `epoch` (from 0) starts, given what was decided already: the plan's, and `decisions`."""
        return _due(self.matched, self.decisions + decisions, epoch, history, epochs)

    def moments(self, epochs: int) -> tuple[float, ...]:
        """When triggers that need no measurement may fire in a run of `epochs`, in rising order: before epochs, and within some."""
        foreseeable = (m for m in self.matched if m.instance.value.when.foreseeable)
        moments = (m.instance.value.when.moments(m.match.names, epochs) for m in foreseeable)
        return tuple(sorted({moment for each in moments for moment in each if moment < epochs}))

    def foreseen(self, epochs: int) -> tuple[Decision, ...]:
        """What the triggers that need no measurement will decide in a run of `epochs`. Compiles nothing."""
        foreseeable = [m for m in self.matched if m.instance.value.when.foreseeable]
        decisions = self.decisions
        for moment in self.moments(epochs):
            decisions += _due(foreseeable, decisions, moment, None, epochs)
        return decisions[len(self.decisions) :]

    @cached_property
    def learning_rates(self) -> LearningRates:
        """The learning rates that passes set for their regions, over time."""
        return LearningRates.of(self.matched)

    def phases(self, epochs: int, decisions: Sequence[Decision] | None = None, *, verify: Verify = "off") -> tuple[Phase, ...]:
        """The phases of a run of `epochs` that starts with this plan; `decisions` of a finished run are replayed.

        The plans of later phases are to look at: they share the memory of the backbone's weights, and must not be trained.

        Raises PassError or VerifyError, with the epoch, the pass and its place in the spec, for a phase that cannot be compiled.
        """
        return tuple(self.each_phase(epochs, decisions, verify=verify))

    def each_phase(self, epochs: int, decisions: Sequence[Decision] | None = None, *, verify: Verify = "off") -> Iterator[Phase]:
        """The same, each phase compiled when it is asked for."""
        later = [d for d in (self.foreseen(epochs) if decisions is None else decisions) if d.epoch < epochs]
        plan = self
        for start, end in itertools.pairwise(sorted({0, epochs, *(d.epoch for d in later)})):
            due = tuple(d for d in later if d.epoch == start)
            with _from_epoch(start):
                plan = compile_phase(self, (*plan.decisions, *due), verify=verify, costs=False, weights=False) if due else plan
                if verify != "off":
                    plan._check_suffix()
            yield Phase(start, end, due, plan)

    def check_phases(self, epochs: int) -> None:
        """Compiles every later phase of a run of `epochs` that can be foreseen, and keeps none.

        Raises PassError or VerifyError, with the pass and its place in the spec, instead of the run that would get there.
        """
        later = self.foreseen(epochs)
        for epoch in sorted({d.epoch for d in later}):
            decisions = (*self.decisions, *(d for d in later if d.epoch <= epoch))
            with _from_epoch(epoch):
                phase = compile_phase(self, decisions, verify="fast", costs=False, weights=False)
                phase._check_suffix()

    def phase_at(self, epoch: int, epochs: int, *, verify: Verify = "fast", costs: bool = False) -> Plan:
        """The plan that `epoch` of a run of `epochs` trains with, as far as that can be foreseen. Compiles that phase only."""
        due = (d for d in self.foreseen(epochs) if d.epoch <= epoch)
        return self.advance_to((*self.decisions, *due), verify=verify, costs=costs)

    def advance_to(
        self,
        decisions: Iterable[Decision],
        *,
        verify: Verify = "fast",
        costs: bool = False,
        state: Mapping[str, Tensor] | None = None,
    ) -> Plan:
        """The same plan after `decisions`, with the current weights carried over by name.

        `state` is the module's state dict with whole tensors, for a module of which this process holds a part.
        """
        later = compile_phase(self, tuple(decisions), verify=verify, costs=costs)
        later._take_weights_from(self, dict(self.module.state_dict() if state is None else state))
        return later

    def _take_weights_from(self, earlier: Plan, theirs: dict[str, Tensor]) -> None:
        """Weights by name; what does not go by name is derived through the backbone's own keys.

        That is what the other phase does not store, or in another shape, and what has to take in tensors that this phase no longer has
        (an addition to a weight, say).
        """
        mine = self.module.state_dict()
        values = dict(theirs)
        derived = {k for k, v in mine.items() if k not in theirs or theirs[k].shape != v.shape}
        if gone := theirs.keys() - mine.keys():
            derived |= earlier._depending_on(gone, theirs)
        if derived:
            adopted = self.from_backbone(earlier.to_backbone(theirs, partial=True))
            values |= {k: adopted[k] for k in derived if k in adopted}
        # What has another shape even so (another pass's parts under the same names) starts anew.
        self.module.load_state_dict({k: v for k, v in values.items() if k in mine and v.shape == mine[k].shape}, strict=False)
        device = next((p.device for p in earlier.module.parameters()), torch.device("cpu"))
        self.module.to(device)
        self.module.train(earlier.module.training)

    def _depending_on(self, names: Collection[str], state: dict[str, Tensor]) -> set[str]:
        """Keys of the backbone whose tensors would be others, were these of the module's zero."""
        without = state | {name: torch.zeros_like(state[name]) for name in names}
        own, other = (self.to_backbone(given, partial=True) for given in (state, without))
        return {name for name, value in own.items() if name not in names and not torch.equal(value, other[name])}

    @cached_property
    def scored(self) -> dict[str, tuple[str, ...]]:
        """Regions whose weights the runner must watch, because a pass decides by them or asks for it, with their parameters."""
        measured = (m for m in self.matched if not m.instance.value.when.foreseeable)
        found = {region.name: region.parameters for m in measured for region in m.match.regions}
        return found | {name: region_at(self.base, name).parameters for name in self.needs.scores if name not in found}

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """Regions whose outputs the runner must compare from epoch to epoch, because a trigger decides by them."""
        return tuple(dict.fromkeys(n for m in self.matched if m.instance.value.when.compares_outputs for n in m.match.names))

    def to_backbone(self, state: dict[str, Tensor], *, partial: bool = False) -> dict[str, Tensor]:
        """The emitted module's state dict under the backbone's keys (auxiliary parts gone, mixed weights worked out).

        Raises PassError if a pass replaced something that the backbone's architecture cannot express; with `partial` that stays as it is.
        """
        for effect in reversed(self.effects):
            if effect is None or effect.to_original_state is None:
                continue
            try:
                state = effect.to_original_state(dict(state))
            except PassError:
                if not partial:
                    raise
        return state

    def from_backbone(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back: a checkpoint of the backbone, under the emitted module's keys."""
        for effect in self.effects:
            if effect is not None and effect.from_original_state is not None:
                state = effect.from_original_state(dict(state))
        return state

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Loads a checkpoint of the backbone (its own keys) into the plan.

        Raises PassError if keys are missing or unexpected; lists them.
        """
        self._check_keys(state, "the checkpoint does not fit the backbone")
        adopted = self.from_backbone(state)
        own = self.module.state_dict()
        self.module.load_state_dict({k: v for k, v in adopted.items() if k in own}, strict=False)

    def export_state(self) -> dict[str, Tensor]:
        """The trained weights under the backbone's own keys, on the CPU."""
        restored = self.to_backbone({k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()})
        self._check_keys(restored, "the plan cannot be written as the backbone")
        return {k: restored[k] for k in self.backbone.state_dict()}

    def _check_keys(self, state: dict[str, Tensor], what: str) -> None:
        reference = self.backbone.state_dict().keys()
        missing, unexpected = sorted(reference - state.keys()), sorted(state.keys() - reference)
        if missing or unexpected:
            raise PassError(f"{what}: missing {missing[:5]}, unexpected {unexpected[:5]}")

    def export(self) -> nn.Module:
        """The backbone itself, of its original class, with the trained weights; in eval mode."""
        module = copy.deepcopy(self.backbone)
        load_versioned(module, self.export_state())
        for parameter in module.parameters():
            parameter.grad = None
        return module.eval()

    @property
    def no_decay(self) -> frozenset[str]:
        """Names of parameters that passes ask not to be weight-decayed."""
        return frozenset(n for e in self.effects if e is not None for n in e.no_decay)

    @cached_property
    def suffix(self) -> TrainingModule:
        """What is left to train behind `needs.features`: takes the cached activation in the place of the images.

        It shares parameters with `module`. Make it after moving `module` to its device. Raises PassError if no pass has cut a prefix off.
        """
        suffix = emit(self.graph, start=self._feature_cut())
        suffix.train(self.module.training)
        return suffix

    @cached_property
    def prefix(self) -> TrainingModule:
        """The part before `needs.features`: images in, the activation to cache out. It computes the same in either mode.

        It is not put into eval mode here: its root holds the other leaves too, which would change along with it.
        """
        return emit(self.graph, stop=self._feature_cut())

    def _check_suffix(self) -> None:
        """Raises PassError if the part that trains on cached features cannot be made."""
        if self.needs.features is not None:
            _ = self.suffix

    def _feature_cut(self) -> Node:
        if self.needs.features is None:
            raise PassError("no pass has cut a prefix off in this phase", fix="Use the drop pass, or take plan.module")
        return self.needs.features.node


@contextmanager
def _from_epoch(epoch: float) -> Iterator[None]:
    """An error that is raised inside says from which epoch on."""
    try:
        yield
    except GraphoptError as error:
        raise type(error)(f"from epoch {epoch:g} on, {error.what}", where=error.where, fix=error.fix) from error


def _due(
    matched: Iterable[Matched], decisions: tuple[Decision, ...], epoch: float, history: Any, epochs: int | None
) -> tuple[Decision, ...]:
    found = []
    for item in matched:
        index, trigger = item.instance.index, item.instance.value.when
        since = next((d.epoch for d in decisions if d.index == index and d.action == "apply"), None)
        fired = trigger.decide(item.match.names, item.active(decisions), epoch, epochs, history, since)
        found += [Decision(index=index, epoch=epoch, action=action, regions=regions) for action, regions in fired]
    return tuple(found)


@recording()
def compile_phase(
    source: Source, decisions: tuple[Decision, ...] = (), *, verify: Verify = "full", costs: bool = True, weights: bool = True
) -> Plan:
    """The plan of one phase: the source's passes applied as `decisions` say.

    Without `weights` the plan is one to look at: its tensors share the memory of the backbone's, so that it must not be trained.

    Raises PassError or VerifyError with the pass and its place in the spec.
    """
    base, matched = source.sizes.after(decisions)
    measure, whole = source.measure if costs else None, source.sizes.whole
    made = rewrite(base, matched, decisions, verify=verify, measure=measure, weights=weights)
    before = made.before
    if measure is not None and before is not None and base is not whole:
        before = measure(emit(whole), whole, ())
    costs_around = (before, made.after)
    if (asked := source.sizes.asked(decisions)) is not None:
        number = asked.instance.index
        reports = (*made.reports[:number], replace(made.reports[number], before=before, after=made.before), *made.reports[number + 1 :])
        made = replace(made, reports=reports)
    report = Report(source.name, source.digest, source.batch, *costs_around, made.reports, base.opaque, base.unused, made.no_costs)
    shared: dict[str, Any] = {f.name: getattr(source, f.name) for f in fields(Source)}
    shared |= {"base": base, "matched": matched}
    own: dict[str, Any] = {"graph": made.graph, "effects": made.effects, "edits": made.edits, "module": made.module}
    return Plan(**shared, decisions=decisions, **own, report=report)
