"""For authors of passes: one function that checks what every pass has to keep, and says what it found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from graphopt.compiler.pass_base import Pass
from graphopt.compiler.plan import Plan
from graphopt.driver import compile
from graphopt.errors import GraphoptError, PassError, RunError, SelectError, VerifyError
from graphopt.ir.inputs import Input
from graphopt.testing.checks import Checks, Untouched
from graphopt.testing.run import STEPS, CheckedRun, Decide
from graphopt.testing.steps import BATCH, Problem

__all__ = ["Backbone", "Checked", "Finding", "Untouched", "check_pass", "check_run", "small_backbones"]

_DECLARED = "keeps what it declares"
_FIX = "Give backbones that it is for: backbones={'mine': (model, (3, 32, 32))}"


class Backbone(NamedTuple):
    """A network to check a pass on, and the shape of one sample, as `graphopt.compile` takes it."""

    model: nn.Module
    input: Input


class Finding(NamedTuple):
    """What one check has found on one backbone, in the phase that begins with `epoch`; `problem` is None where all is well."""

    backbone: str
    epoch: float
    check: str
    problem: str | None
    note: str = ""


@dataclass
class Checked:
    """Everything that `check_pass` has found."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.problem is not None]

    def __str__(self) -> str:
        lines = []
        for backbone, epoch, check, problem, note in self.findings:
            phase = f", from epoch {epoch:g}" if epoch else ""
            said = f"FAILED: {problem}" if problem is not None else f"ok{note and f' ({note})'}"
            lines.append(f"{backbone}{phase}: {check}: {said}")
        return "\n".join(lines)


def small_backbones() -> dict[str, Backbone]:
    """A residual network of three blocks (`layer1.0`, `layer2.0`, `layer3.0`) and a vision transformer of two (`blocks.0`, `blocks.1`)."""
    from timm.models import VisionTransformer

    from graphopt.models import cifar_resnet

    transformer = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    return {"resnet": Backbone(cifar_resnet.build("resnet8"), (3, 8, 8)), "vit": Backbone(transformer, (3, 8, 8))}


def check_pass(
    value: Pass | Sequence[Pass], backbones: Mapping[str, Backbone | tuple[nn.Module, Input]] | None = None, *, epochs: int = 4
) -> Checked:
    """Checks a pass, or several together, on each backbone, in every phase of a short run.

    Each phase compiles, every property that is declared holds, and the weights are carried over from the phase before. Two steps of the
    runner's optimizer give finite gradients to what trains and to nothing else, and leave what is frozen as it is. Then a deep copy, and a
    run from a checkpoint, take the next step as the module does; the plan comes back from its file; the forecast of a step is what a real
    step takes, to the byte; the export loads strictly into the untouched backbone, computes the same, and is taken back. The model that
    was given stays as it was.

    Args:
        value: the pass with its options. backbones: name -> (model, shape of one sample); default: `small_backbones()`, of which the pass
            need not fit all.
        epochs: length of the run in which triggers fire.

    Raises:
        VerifyError: a check fails. The message has the whole report.
        PassError: no backbone fits the pass, or one that was given does not; it says why.
    """
    passes = [value] if isinstance(value, Pass) else list(value)
    report, refusals = Checked(), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, given in (backbones or small_backbones()).items():
            try:
                report.findings += _checked(name, passes, Backbone(*given), epochs)
            except (SelectError, PassError) as error:
                refusals[name] = error
    names = ", ".join(item.name for item in passes)
    if refusals and (backbones or not report.findings):
        reasons = "; ".join(f"{name}: {error}" for name, error in refusals.items())
        raise PassError(f"it does not fit: {reasons}", where=names, fix=_FIX)
    if report.problems:
        count = len(report.problems)
        raise VerifyError(f"{count} check{'s fail' if count > 1 else ' fails'}\n{report}", where=names)
    return report


def _checked(name: str, passes: Sequence[Pass], backbone: Backbone, epochs: int) -> list[Finding]:
    untouched = Untouched.of(backbone.model)
    try:
        plan = compile(backbone.model, passes, input=backbone.input, batch=BATCH, verify="full", costs=False)
    except VerifyError as error:
        return [Finding(name, 0, _DECLARED, str(error))]
    return list(check_run(name, plan, untouched, epochs=epochs))


def check_run(
    backbone: str, plan: Plan, untouched: Untouched, *, epochs: int = 4, decide: Decide | None = None, costs: bool = True
) -> Iterator[Finding]:
    """Takes a plan, fully verified, through the phases of a run, and yields what each check of `check_pass` finds in each phase.

    Args:
        backbone: its name in the findings. untouched: its model before it was compiled.
        decide: makes decisions for triggers that measure. costs: also check the forecast of a step.

    Raises:
        PassError: a pass refuses a later phase.
    """
    run = CheckedRun(plan, epochs)
    checks, epoch = Checks(run, untouched), 0.0
    try:
        for epoch in run.each_phase(decide):
            verified = [checked.property for report in run.plan.report.passes for checked in report.verified]
            yield Finding(backbone, epoch, _DECLARED, None, ", ".join(dict.fromkeys(verified)))
            for name, check in checks.before():
                yield _finding(backbone, epoch, name, check)
            trained = _finding(backbone, epoch, f"trains {STEPS} steps", checks.train)
            yield trained
            if trained.problem is not None:
                return  # what comes then begins with these steps
            for name, check in checks.after(costs):
                yield _finding(backbone, epoch, name, check)
    except VerifyError as error:
        yield Finding(backbone, epoch, _DECLARED, f"in the phase after this one: {error}")
    except RunError as error:
        yield Finding(backbone, epoch, "goes on in the next phase", str(error))


def _finding(backbone: str, epoch: float, name: str, check: Callable[[], str | None]) -> Finding:
    try:
        return Finding(backbone, epoch, name, None, check() or "")
    except (Problem, GraphoptError) as error:
        return Finding(backbone, epoch, name, str(error))
    except Exception as error:  # whatever a pass's modules raise is the finding
        return Finding(backbone, epoch, name, f"{type(error).__name__}: {error}")
