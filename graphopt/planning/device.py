"""What a plan needs of a GPU, without one: a step before and after, and a step of each phase of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Phase, Plan
from graphopt.cost import StepOptions, forecast
from graphopt.cost.devices import Device
from graphopt.cost.memory import DeviceMemory
from graphopt.ir.inputs import Input, input_of

#: what is within this share of a figure comes near it: allocators add less than the rest to a phase's live bytes
NEAR = 0.9


@dataclass(frozen=True)
class PhaseMemory:
    """One phase: its start and its length in epochs, and what a step of it needs."""

    epoch: float
    epochs: float
    memory: DeviceMemory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"epoch": self.epoch, "epochs": self.epochs, **self.memory.to_dict()}


def with_memory(plan: Plan, device: Device) -> Plan:
    """The same plan, in whose report the costs before and after say what a step needs of a GPU (`Cost.cuda`).

    Raises CostError if a step cannot be forecast. A report without costs stays as it is.
    """
    report = plan.report
    if report.before is None or report.after is None:
        return plan
    before = _forecast(plan, emit(plan.sizes.whole), plan.sizes.full, device)
    after = _memory(plan, device) if any(plan.effects) else before
    report = replace(report, before=replace(report.before, cuda=before), after=replace(report.after, cuda=after))
    return replace(plan, report=report)


def forecast_neediest(phases: Sequence[Phase], peaks: Sequence[int], device: Device) -> PhaseMemory:
    """What the phase with the highest of `peaks`, the live bytes of a step on the CPU, needs of a GPU; of equal ones the first.

    A simulation takes longer than the rest of a phase's forecast. Where that phase comes near what the device can give, and there alone,
    the other phases that come near its peak are simulated, too, and the one that needs most is given. Raises CostError if a step cannot
    be forecast.
    """
    highest = max(peaks)
    ((_, first), *rest) = sorted(zip(peaks, phases, strict=True), key=lambda item: -item[0])
    (found,) = forecast_phases([first], device)
    if found.memory.reserved.high < NEAR * device.usable:
        return found
    return neediest([found, *forecast_phases([phase for peak, phase in rest if peak >= NEAR * highest], device)])


def forecast_phases(phases: Iterable[Phase], device: Device) -> tuple[PhaseMemory, ...]:
    """What a step of each phase of a run needs of a GPU. Raises CostError if one cannot be forecast."""
    return tuple(PhaseMemory(start, end - start, _memory(plan, device)) for start, end, _, plan in phases)


def neediest(phases: Iterable[PhaseMemory]) -> PhaseMemory:
    """The phase whose step needs most; of equal ones the first."""
    return max(phases, key=lambda phase: phase.memory.reserved.high)


def _memory(plan: Plan, device: Device) -> DeviceMemory:
    """What a step of the plan needs; where it trains on features, a step of what follows them, with the whole network in memory."""
    features = plan.needs.features is not None
    module = plan.suffix if features else plan.module
    return _forecast(plan, module, input_of(module) if features else plan.graph.input, device, targets=plan.needs.targets)


def _forecast(plan: Plan, module: nn.Module, input: Input, device: Device, *, targets: bool = False) -> DeviceMemory:
    options: StepOptions = {**(plan.spec.train.forecast_options() if plan.spec is not None else {}), "targets": targets, "device": device}
    memory = forecast(module, input, plan.batch, **options).cuda
    assert memory is not None
    return memory
