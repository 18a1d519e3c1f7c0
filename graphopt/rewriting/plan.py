"""A plan: a backbone and its passes, compiled; and every later phase of it, which is a pure function of (spec, decisions)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphopt.errors import PassError
from graphopt.regions import Region, parts
from graphopt.rewriting.passes import Effects, Needs, Pass
from graphopt.rewriting.pipeline import Measure, Rewritten, Verify, check, rewrite
from graphopt.rewriting.report import Report
from graphopt.rewriting.sections import emit
from graphopt.rewriting.triggers import BaseTrigger, Decision, active_regions
from graphopt.trace import Graph, TrainingModule


class Phase(NamedTuple):
    """A stretch of epochs with one graph: its first epoch (from 0), the first that is no longer in it, what began it, its plan."""

    start: int
    end: int
    decisions: tuple[Decision, ...]
    plan: Plan


class Plan:
    """A compiled backbone in one of its phases.

    Attributes:
        module: what trains: `module(x)` returns what the backbone returns; with `needs.targets`, training calls
            `module(x, target)` and gets `(output, local_loss)`.
        passes: the passes, in order. decisions: what has fired so far. needs: what the runner must provide.
        report: what changed, in figures and per pass. digest: identifies spec and backbone; checkpoints carry it.
        base: the untouched graph. graph: the rewritten one, flat. spec: the spec it came from, if any.
    """

    def __init__(
        self,
        backbone: nn.Module,
        base: Graph,
        passes: Sequence[Pass],
        *,
        name: str,
        digest: str,
        batch: int,
        decisions: Sequence[Decision] = (),
        verify: Verify = "full",
        measure: Measure | None = None,
        spec: Any = None,
        where: Sequence[str | None] = (),
        lines: Sequence[int | None] = (),
    ) -> None:
        self.backbone, self.base, self.passes = backbone, base, tuple(passes)
        self.name, self.digest, self.batch, self.spec = name, digest, batch, spec
        self.decisions = tuple(decisions)
        self._measure, self._where, self._lines = measure, tuple(where), tuple(lines)
        done: Rewritten = rewrite(base, self.passes, self.decisions, verify=verify, measure=measure, where=where, lines=lines)
        self.graph, self.effects = done.graph, done.effects
        self.needs = Needs()
        for effect in done.effects:
            self.needs = self.needs | effect.needs if effect else self.needs
        self.module: TrainingModule = emit(self.graph)
        self.report = Report(
            name=name,
            digest=digest,
            batch=batch,
            before=done.before,
            after=done.after,
            passes=done.reports,
            opaque=tuple((o.path, o.reason) for o in base.opaque),
            unused=base.unused,
        )

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, passes={[p.use for p in self.passes]}, decisions={len(self.decisions)})"

    # -- phases -------------------------------------------------------------------------------------------------------------
    def due(self, epoch: int, history: Any = None, epochs: int | None = None) -> tuple[Decision, ...]:
        """What the triggers decide before `epoch` (from 0) starts, given what was decided already."""
        found = []
        for index, (value, names, active) in enumerate(self.progress()):
            trigger: BaseTrigger = value.when
            for action, regions in trigger.fire(names, active, epoch, epochs, history):
                found.append(Decision(index=index, epoch=epoch, action=action, regions=regions))
        return tuple(found)

    def phases(self, epochs: int, decisions: Sequence[Decision] | None = None) -> tuple[Phase, ...]:
        """What a run of `epochs` from this plan would go through, without gaps; unverified.

        Args:
            decisions: of a finished run, to be replayed; default: what the triggers decide that need no measurement.
        """
        begun: list[tuple[int, tuple[Decision, ...], Plan]] = []
        plan, taken = self, self.decisions
        for epoch in range(epochs):
            due = plan.due(epoch, None, epochs) if decisions is None else tuple(d for d in decisions if d.epoch == epoch)
            if due:
                taken = (*taken, *due)
                plan = plan.at(taken, verify="off")
            if due or not begun:
                begun.append((epoch, due, plan))
        ends = [*(epoch for epoch, _, _ in begun[1:]), epochs]
        return tuple(Phase(start, end, due, plan) for (start, due, plan), end in zip(begun, ends, strict=True))

    def progress(self) -> tuple[tuple[Pass, tuple[str, ...], tuple[str, ...]], ...]:
        """Of each pass: the value, the names of all its regions, and those it is applied to now."""
        return tuple(
            (value, names, active_regions(names, value.when, index, self.decisions))
            for index, (value, names) in enumerate(zip(self.passes, self._names, strict=True))
        )

    @cached_property
    def _regions(self) -> tuple[tuple[Region, ...], ...]:
        return tuple(c.match.regions for c in check(self.base, self.passes, (), self._where))

    @cached_property
    def _names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(r.name for r in regions) for regions in self._regions)

    @cached_property
    def scored(self) -> dict[str, tuple[str, ...]]:
        """Regions whose weights the runner must watch, with their parameters in the backbone: those of passes that decide by measurement,
        and those that a pass asks for."""
        measured = (regions for value, regions in zip(self.passes, self._regions, strict=True) if not value.when.foreseeable)
        found = {region.name: region.parameters for regions in measured for region in regions}
        return found | {name: self.base.region(name).parameters for name in self.needs.scores if name not in found}

    def at(self, decisions: Iterable[Decision], *, verify: Verify = "fast", costs: bool = False) -> Plan:
        """The same plan after `decisions`, with the current weights carried over by name."""
        later = Plan(
            self.backbone,
            self.base,
            self.passes,
            name=self.name,
            digest=self.digest,
            batch=self.batch,
            decisions=tuple(decisions),
            verify=verify,
            measure=self._measure if costs else None,
            spec=self.spec,
            where=self._where,
            lines=self._lines,
        )
        if self._measure is not None and later._measure is None:
            later._measure = self._measure
        later._take_over(self)
        return later

    def _take_over(self, earlier: Plan) -> None:
        """Weights by name; what the other phase does not store is derived through the backbone's own keys."""
        mine, theirs = self.module.state_dict(), earlier.module.state_dict()
        values = dict(theirs)
        if missing := mine.keys() - theirs.keys():
            original = earlier.to_backbone(theirs, partial=True)
            adopted = self.from_backbone(original)
            values |= {k: adopted[k] for k in missing if k in adopted}
        kept = {k: v for k, v in values.items() if k in mine}
        self.module.load_state_dict(kept, strict=False)
        device = next((p.device for p in earlier.module.parameters()), torch.device("cpu"))
        self.module.to(device)
        self.module.train(earlier.module.training)

    # -- weights ------------------------------------------------------------------------------------------------------------
    def to_backbone(self, state: dict[str, Tensor], *, partial: bool = False) -> dict[str, Tensor]:
        """The emitted module's state dict under the backbone's keys (auxiliary parts gone, mixed weights worked out).

        Args:
            partial: leave what the backbone's architecture cannot express as it is, instead of raising.

        Raises:
            PassError: a pass replaced something the backbone's architecture cannot express.
        """
        for effect in reversed(self.effects):
            if effect is None or effect.restore is None:
                continue
            try:
                state = effect.restore(dict(state))
            except PassError:
                if not partial:
                    raise
        return state

    def from_backbone(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back: a checkpoint of the backbone, under the emitted module's keys."""
        for effect in self.effects:
            if effect is not None and effect.adopt is not None:
                state = effect.adopt(dict(state))
        return state

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Loads a checkpoint of the backbone (its own keys) into the plan.

        Raises:
            PassError: keys are missing or unexpected; lists them.
        """
        adopted = self.from_backbone(state)
        own = self.module.state_dict()
        reference = self.backbone.state_dict().keys()
        missing, unexpected = sorted(reference - state.keys()), sorted(state.keys() - reference)
        if missing or unexpected:
            raise PassError(f"the checkpoint is not this backbone's: missing {missing[:5]}, unexpected {unexpected[:5]}")
        self.module.load_state_dict({k: v for k, v in adopted.items() if k in own}, strict=False)

    def export_state(self) -> dict[str, Tensor]:
        """The trained weights under the backbone's own keys, on the CPU."""
        state = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        restored = self.to_backbone(state)
        reference = self.backbone.state_dict().keys()
        missing, unexpected = sorted(reference - restored.keys()), sorted(restored.keys() - reference)
        if missing or unexpected:
            raise PassError(f"the plan cannot be written as the backbone: missing {missing[:5]}, unexpected {unexpected[:5]}")
        return {k: restored[k] for k in self.backbone.state_dict()}

    def export(self) -> nn.Module:
        """The backbone itself, of its original class, with the trained weights; in eval mode."""
        module = copy.deepcopy(self.backbone)
        module.load_state_dict(self.export_state(), strict=True)
        for parameter in module.parameters():
            parameter.grad = None
        return module.eval()

    # -- training on kept features ------------------------------------------------------------------------------------------
    @cached_property
    def suffix(self) -> TrainingModule:
        """What is left to train behind `needs.features`: takes the kept activation in the place of the images.

        It shares parameters with `module`. Make it after moving `module` to its device.

        Raises:
            PassError: no pass has cut a prefix off.
        """
        cut = self._cut()
        suffix = emit(self.graph, start=cut)
        suffix.train(self.module.training)
        return suffix

    @cached_property
    def prefix(self) -> TrainingModule:
        """The part before `needs.features`: images in, the activation to keep out. It computes the same in either mode.

        It is not put into eval mode here: its root holds the leaves of the rest too, which would go along.
        """
        return emit(self.graph, stop=self._cut())

    def _cut(self) -> Any:
        if self.needs.features is None:
            raise PassError("no pass has cut a prefix off in this phase", fix="Use the drop pass, or take plan.module")
        return self.needs.features.node

    @property
    def no_decay(self) -> frozenset[str]:
        """Names of parameters that passes ask not to be weight-decayed."""
        return frozenset(n for e in self.effects if e is not None for n in e.no_decay)


def digest_of(passes: Sequence[Pass], backbone: nn.Module, input: tuple[int, ...]) -> str:
    """Identifies a plan made in code: its passes, and the names and shapes of the backbone's parameters."""
    shapes = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    text = json.dumps({"passes": [p.table() for p in passes], "shapes": shapes, "input": list(input)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure_with(
    batch: int, *, optimizer: str = "sgd", optimizer_options: Mapping[str, Any] | None = None, amp: str | None = None
) -> Measure:
    """The cost model as the pipeline's seam calls it: one training step of an emitted module, whole and per part of the backbone."""
    from graphopt.cost import forecast

    options: dict[str, Any] = {"optimizer": optimizer, "optimizer_options": optimizer_options, "amp": amp}

    def measure(module: nn.Module, graph: Graph, effects: tuple[Effects, ...]) -> Any:
        needs = Needs()
        for effect in effects:
            needs = needs | effect.needs
        shape = graph.input
        if needs.features is not None:
            # Training runs on what lies behind the cut; parameters and buffers of the whole network stay in memory for evaluation.
            module = emit(graph, start=needs.features.node).train()
            shape = tuple(needs.features.node.meta["val"].shape[1:])
        return forecast(module, shape, batch, targets=needs.targets, per_block=parts(graph), **options)

    return measure


__all__ = ["Phase", "Plan", "digest_of", "measure_with"]
