"""What every pass has to keep, in each phase of a run: one check for each promise."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphopt.compiler.pass_base import ALL_PROPERTIES, Severity, Status
from graphopt.compiler.plan import Plan
from graphopt.cost import forecast, measure
from graphopt.errors import PassError
from graphopt.ir.inputs import input_of
from graphopt.ir.paths import is_below
from graphopt.plan_file import read_plan_file, save
from graphopt.testing.run import STEPS, CheckedRun
from graphopt.testing.steps import BATCH, TOLERANCE, gradients, inputs, outputs, require, require_close, require_equal, step

#: figures of a training step that a forecast and a real step must have in common, to the byte and the FLOP
FIGURES = (
    "parameters",
    "trainable_parameters",
    "forward_flops",
    "backward_flops",
    "saved_activation_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "peak_bytes",
)
#: the same where a plan fits values of its own, in float32, to the backbone's weights
FITTED = 1e-2
INEXPRESSIBLE = "the backbone cannot express it"


@dataclass(frozen=True)
class Untouched:
    """What a model holds, and its graph as text, before anything was compiled."""

    state: dict[str, Tensor]
    graph: str | None = None

    @classmethod
    def of(cls, model: nn.Module, graph: str | None = None) -> Self:
        return cls({name: value.clone() for name, value in model.state_dict().items()}, graph)


class Checks:
    """The checks of one run; `held` are tensors that must stay as they were when the phase began."""

    def __init__(self, run: CheckedRun, untouched: Untouched) -> None:
        self.run, self.untouched = run, untouched
        self.held: dict[str, Tensor] = {}
        self._reread = run.start  # the plan as its file gives it

    @property
    def plan(self) -> Plan:
        """The plan in its current phase."""
        return self.run.plan

    def before(self) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """Checks of a phase that has not been trained: names, and what to call, which raises Problem or returns a note."""
        if self.run.earlier is not None:
            yield "carries the weights over", self.carries_over
        yield "computes as the backbone", self.computes_as_the_backbone

    def after(self, costs: bool = True) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """Checks of a phase that has been trained, in this order."""
        yield "leaves the model as it was", self.leaves_the_model
        yield "leaves what is frozen as it was", self.holds
        yield "survives a deep copy", self.survives_a_copy
        yield "goes through a file", self.goes_through_a_file
        yield "goes on from a checkpoint", self.goes_on_from_a_checkpoint
        if costs:
            yield "costs what is forecast", self.costs_as_forecast
        yield "exports to the backbone", self.exports
        if self.plan.needs.features is not None:
            yield "trains on cached features", self.trains_on_features

    def train(self) -> str:
        """Trains the phase."""
        json.dumps(self.plan.report.to_dict())
        self.held = _held(self.plan)
        return self.run.train()

    def carries_over(self) -> str:
        """Where what has begun keeps the output, the network computes the same as at the end of the phase before."""
        earlier, plan = self.run.earlier, self.plan
        assert earlier is not None
        begun = {d.index for d in plan.decisions[len(earlier.decisions) :]}
        kept = all("eval output" in plan.passes[index].preserved_properties() for index in begun)
        if not kept or earlier.base.input != plan.base.input or not (_expressible(earlier) and _expressible(plan)):
            return "the output may change"
        require_close(outputs(plan, earlier.module), outputs(plan, plan.module), "it computes something else than before")
        return ""

    def computes_as_the_backbone(self) -> str:
        """Where all passes preserve everything, a training step is the backbone's own, buffers included."""
        plan = self.plan
        acting = [value for value, effect in zip(plan.passes, plan.effects, strict=True) if effect is not None]
        if any(value.preserved_properties() != ALL_PROPERTIES for value in acting):
            return "a pass changes what is computed"
        mine, backbone = copy.deepcopy(plan.module), plan.export()
        losses = [step(plan, module, 1) for module in (mine, backbone)]
        require(losses[0] == losses[1], f"the loss is {losses[0]}, not {losses[1]}")
        taken, expected = gradients(mine), {n: g for n, g in gradients(backbone).items() if g is not None}
        require_equal({name: taken.get(name) for name in expected}, expected, "another gradient")
        buffers = dict(backbone.named_buffers())
        own = dict(mine.named_buffers())
        require_equal({name: own.get(name) for name in buffers}, dict(buffers), "another buffer")
        return ""

    def leaves_the_model(self) -> None:
        """The model that was given, and its graph, are as they were before anything was compiled."""
        model, mine = self.plan.backbone, dict(self.plan.module.named_parameters())
        shared = {id(p) for p in model.parameters()}
        require(not [name for name, p in mine.items() if id(p) in shared], "the compiled module shares parameters with the model")
        require_equal(dict(model.state_dict()), dict(self.untouched.state), "the model has another value")
        if self.untouched.graph is not None:
            require(str(self.run.start.sizes.whole.fx) == self.untouched.graph, "the backbone's graph was changed")

    def holds(self) -> str:
        """Frozen parameters, and all that regions hold which are frozen or dropped, have not moved."""
        after = _state(self.plan)
        moved = [name for name, value in self.held.items() if not torch.equal(value, after[name].cpu())]
        require(not moved, f"{', '.join(moved[:3])} moved")
        return f"{len(self.held)} tensors"

    def survives_a_copy(self) -> None:
        """A copy of the trained module goes on as the module does."""
        self._goes_on(self.run.copied, "a deep copy")

    def _goes_on(self, module: nn.Module, what: str) -> None:
        loss = step(self.plan, module, STEPS)
        require(loss == self.run.loss, f"the loss of {what} is {loss}, not {self.run.loss}")
        require_equal(gradients(module), self.run.gradients, f"{what} has another gradient")

    def goes_through_a_file(self) -> None:
        """The plan's file gives the plan back, from the first phase of it."""
        with tempfile.TemporaryDirectory() as folder:
            again = self._reread = read_plan_file(save(self.plan, Path(folder) / "plan.safetensors"), plan=self.run.start)
        require(again.decisions == self.plan.decisions, "the plan from a file has other decisions")
        require_equal(dict(again.module.state_dict()), dict(self.plan.module.state_dict()), "the plan from a file has another value")

    def goes_on_from_a_checkpoint(self) -> None:
        """A run that begins anew from the checkpoint takes the next step as the one that was not interrupted: bit for bit."""
        resumed = self.run.resumed
        resumed.load_state_dict(self.run.saved)
        self._goes_on(resumed.module, "a run from the checkpoint")
        for phases in (self.run.phases, resumed):
            self.run.update(phases)
        expected, found = (phases.state_dict() for phases in (self.run.phases, resumed))
        require_equal(found["module"], expected["module"], "a run from the checkpoint has another value")
        require_equal(_flat(found), _flat(expected), "a run from the checkpoint has another optimizer state")

    def costs_as_forecast(self) -> str:
        """The forecast of a training step, in which everything runs, is what a real one takes."""
        plan = self.plan
        if any(status.skip_probability for effect in plan.effects if effect is not None for status in effect.statuses.values()):
            return "a step draws what it leaves out"
        module = plan.module if plan.needs.features is None else plan.suffix
        shape = plan.base.input if plan.needs.features is None else input_of(module)
        expected, real = (of(module.train(), shape, BATCH, targets=plan.needs.targets) for of in (forecast, measure))
        pairs = {name: (getattr(expected, name), getattr(real, name)) for name in FIGURES}
        wrong = [f"{name}: {cost} forecast, {found} measured" for name, (cost, found) in pairs.items() if cost != found]
        require(not wrong, "; ".join(wrong))
        return f"{expected.peak_bytes:,} bytes at the peak"

    def exports(self) -> str:
        """The export loads strictly into the untouched backbone, computes the same there, and the plan takes it back."""
        plan = self.plan
        try:
            state = plan.export_state()
        except PassError as error:
            return f"{INEXPRESSIBLE}: {error.what}"
        backbone = copy.deepcopy(plan.backbone)
        backbone.load_state_dict(state, strict=True)
        mine = outputs(plan, plan.module)
        if plan.base.input == plan.sizes.whole.input:  # at another size, the plan's network is not the one that is exported
            require_close(outputs(plan, backbone), mine, "the exported backbone computes something else")
        again = self._reread
        again.load_backbone(state)
        fitted = any(e is not None and e.from_original_state is not None and e.to_original_state is not None for e in plan.effects)
        require_close(
            mine, outputs(plan, again.module), "the plan computes something else with its own export", FITTED if fitted else TOLERANCE
        )
        return ""

    def trains_on_features(self) -> str:
        """Prefix and suffix, one after the other, are the whole; a run of a plan without such a suffix is refused before its first step."""
        other = self.plan.advance_to(self.plan.decisions, verify="off")
        try:
            suffix = other.suffix
        except PassError as error:
            return f"a run is refused: {error.what}"
        whole = copy.deepcopy(self.plan.module)
        loss = step(self.plan, whole, STEPS)
        expected = gradients(whole)
        torch.manual_seed(STEPS)
        with torch.no_grad():
            features = other.prefix(*inputs(self.plan))
        found = step(self.plan, suffix, STEPS, features if isinstance(features, tuple) else (features,))
        require(found == loss, f"the loss behind cached features is {found}, not {loss}")
        own = gradients(suffix)
        require_equal(own, {name: expected[name] for name in own}, "behind cached features, another gradient")
        return ""


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The optimizer's tensors in a checkpoint of phases, by the names of parameters."""
    named = ((f"{name}.{key}", value) for name, of in state["optimizer"]["state"].items() for key, value in of.items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


def _expressible(plan: Plan) -> bool:
    """Whether the backbone's architecture can express the plan."""
    try:
        plan.export_state()
    except PassError:
        return False
    return True


def _state(plan: Plan) -> dict[str, Tensor]:
    """What the plan's module holds, and what it no longer has of the backbone."""
    return {**(plan.export_state() if _expressible(plan) else {}), **plan.module.state_dict()}


def _held(plan: Plan) -> dict[str, Tensor]:
    """Copies of what must stay as it is: all parameters that do not train, and everything in regions that are frozen or dropped."""
    state = _state(plan)
    names = {n for n, p in plan.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    warnings = (d for report in plan.report.passes for d in report.diagnostics if d.severity is Severity.WARNING)
    moving = {d.location for d in warnings if "is not frozen" in d.message}
    excused = [p for m in plan.matched for region in m.match.regions if region.name in moving for p in region.paths]
    for matched, effect in zip(plan.matched, plan.effects, strict=True):
        for region in matched.match.regions:
            status = effect.statuses.get(region.name) if effect is not None else None
            if status is not None and status.status in (Status.FROZEN, Status.DROPPED):
                names |= {n for n in plan.base.module.state_dict() if any(n.startswith(f"{p}.") for p in region.paths)}
    return {n: state[n].cpu().clone() for n in names if n in state and not is_below(n, excused)}
