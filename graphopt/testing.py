"""For authors of passes: one function that checks what every pass has to keep, and says what it found."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphopt.compiler.pass_base import Pass
from graphopt.compiler.plan import Plan
from graphopt.cost import forecast, measure
from graphopt.driver import compile
from graphopt.errors import GraphoptError, PassError, SelectError, VerifyError
from graphopt.ir.inputs import Input, dtype_of, input_of, samples
from graphopt.ir.shapes import tensors_in
from graphopt.plan_file import read_plan_file, save

#: samples of a training step
BATCH = 4
#: the largest relative difference between two ways to compute one output in float32
TOLERANCE = 1e-4
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


_FIX = "Give backbones that it is for: backbones={'mine': (model, (3, 32, 32))}"


class Backbone(NamedTuple):
    """A network to check a pass on, and the shape of one sample, as `graphopt.compile` takes it."""

    model: nn.Module
    input: Input


class Finding(NamedTuple):
    """What one check has found on one backbone, in the phase that begins with `epoch`; `problem` is None where all is well."""

    backbone: str
    epoch: int
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
            phase = f", from epoch {epoch}" if epoch else ""
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
    """Checks a pass, or several together, on each backbone, in the first phase of a run and in the last that can be foreseen.

    The checks: it compiles, and every property that it declares holds; the model that was given stays as it was; a deep copy of the
    compiled module trains as the module does; two training steps give finite gradients to what trains and to nothing else, and leave frozen
    tensors as they are; the forecast of a step is what a real step takes, to the byte; the export loads strictly into the untouched
    backbone and computes the same; and the plan goes on from a file as it would have gone on itself.

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
                plans = _plans(passes, Backbone(*given), epochs)
            except VerifyError as error:
                report.findings.append(Finding(name, 0, "keeps what it declares", str(error)))
                continue
            except (SelectError, PassError) as error:
                refusals[name] = error
                continue
            for epoch, plan in plans.items():
                report.findings += _findings(name, epoch, plan)
    names = ", ".join(item.name for item in passes)
    if refusals and (backbones or not report.findings):
        reasons = "; ".join(f"{name}: {error}" for name, error in refusals.items())
        raise PassError(f"it does not fit: {reasons}", where=names, fix=_FIX)
    if report.problems:
        count = len(report.problems)
        raise VerifyError(f"{count} check{'s fail' if count > 1 else ' fails'}\n{report}", where=names)
    return report


def _plans(passes: list[Pass], backbone: Backbone, epochs: int) -> dict[int, Plan]:
    """The plan in its first phase and, where triggers fire later, in the last; by the epoch that each begins with."""
    first = compile(backbone.model, passes, input=backbone.input, batch=BATCH, verify="full", costs=False)
    later = first.foreseen(epochs)
    if not later:
        return {0: first}
    return {0: first, int(later[-1].epoch): first.advance_to((*first.decisions, *later), verify="full")}


def _findings(backbone: str, epoch: int, plan: Plan) -> Iterator[Finding]:
    verified = [checked.property for report in plan.report.passes for checked in report.verified]
    yield Finding(backbone, epoch, "keeps what it declares", None, ", ".join(dict.fromkeys(verified)))
    for name, check in _CHECKS.items():
        try:
            yield Finding(backbone, epoch, name, None, check(plan) or "")
        except _Problem as problem:
            yield Finding(backbone, epoch, name, str(problem))
        except GraphoptError as error:
            yield Finding(backbone, epoch, name, str(error))
        except Exception as error:  # whatever a pass's modules raise is the finding
            yield Finding(backbone, epoch, name, f"{type(error).__name__}: {error}")


class _Problem(Exception):
    """Something that a check has found to be wrong."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _Problem(what)


def _inputs(plan: Plan) -> tuple[Tensor, ...]:
    dtype = dtype_of(plan.backbone)
    return samples(plan.base.input, BATCH, lambda *sizes: torch.rand(sizes, dtype=dtype))


def _step(plan: Plan, module: nn.Module, seed: int) -> float:
    """One forward and backward in train mode on noise; gradients are replaced. The loss."""
    module.train()
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    inputs = _inputs(plan)
    loss = torch.zeros(())
    if plan.needs.targets:
        output, loss = module(*inputs, torch.arange(BATCH) % 2)
    else:
        output = module(*inputs)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            loss = loss + tensor.float().flatten(1).log_softmax(1).square().mean()
    _require(bool(loss.isfinite()), f"the loss is {loss.item()}")
    _require(loss.requires_grad, "the loss depends on nothing that trains")
    loss.backward()
    return loss.item()


def _outputs(module: nn.Module, plan: Plan) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return tensors_in(copy.deepcopy(module).eval()(*_inputs(plan)))


def _require_close(one: list[Tensor], other: list[Tensor], what: str) -> None:
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(one, other, strict=True)]
    _require(max(apart, default=0.0) <= TOLERANCE, f"{what} (relative difference {max(apart, default=0.0):.1e})")


def _leaves_the_model(plan: Plan) -> None:
    mine, shared = dict(plan.module.named_parameters()), {id(p) for p in plan.backbone.parameters()}
    _require(not [name for name, p in mine.items() if id(p) in shared], "the compiled module shares parameters with the model")
    before = {name: value.clone() for name, value in plan.backbone.state_dict().items()}
    _step(plan, copy.deepcopy(plan.module), 1)
    moved = [name for name, value in plan.backbone.state_dict().items() if not torch.equal(value, before[name])]
    _require(not moved, f"a training step changed {', '.join(moved[:3])} of the model that was given")


def _survives_a_copy(plan: Plan) -> None:
    other = copy.deepcopy(plan.module)
    losses = [_step(plan, module, 1) for module in (plan.module, other)]
    _require(losses[0] == losses[1], f"the loss of a deep copy is {losses[1]}, not {losses[0]}")
    copied = dict(other.named_parameters())
    for name, parameter in plan.module.named_parameters():
        theirs = copied[name].grad
        same = theirs is None if parameter.grad is None else theirs is not None and torch.equal(parameter.grad, theirs)
        _require(same, f"the gradient of {name} differs in a deep copy")


def _trains(plan: Plan) -> str:
    module = copy.deepcopy(plan.module)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    held = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    # A small rate: with frozen norms that have seen no image, a fresh network's gradients are large.
    optimizer = torch.optim.SGD(list(trained.values()), lr=1e-4, momentum=0.9)
    losses = []
    for seed in (1, 2):
        losses.append(_step(plan, module, seed))
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                _require(parameter.grad is None, f"{name} is frozen, and has a gradient")
            elif name not in plan.graph.unused:
                _require(parameter.grad is not None, f"{name} trains, and has no gradient")
                _require(bool(parameter.grad is not None and parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")
        optimizer.step()
    moved = [name for name, value in held.items() if not torch.equal(value, module.get_parameter(name))]
    _require(not moved, f"frozen parameters moved: {', '.join(moved[:3])}")
    return f"losses {losses[0]:.4g}, {losses[1]:.4g}"


def _costs_as_forecast(plan: Plan) -> str:
    module = plan.module if plan.needs.features is None else plan.suffix
    shape = plan.base.input if plan.needs.features is None else input_of(module)
    targets = plan.needs.targets
    expected, real = (of(module.train(), shape, BATCH, targets=targets) for of in (forecast, measure))
    wrong = [f"{name}: {getattr(expected, name)} forecast, {getattr(real, name)} measured" for name in FIGURES]
    wrong = [text for name, text in zip(FIGURES, wrong, strict=True) if getattr(expected, name) != getattr(real, name)]
    _require(not wrong, "; ".join(wrong))
    return f"{expected.peak_bytes:,} bytes at the peak"


def _exports(plan: Plan) -> str:
    try:
        state = plan.export_state()
    except PassError as error:
        return f"the backbone cannot express it: {error.what}"
    backbone = copy.deepcopy(plan.backbone)
    backbone.load_state_dict(state, strict=True)
    _require_close(_outputs(backbone, plan), _outputs(plan.module, plan), "the exported backbone computes something else")
    return ""


def _goes_through_a_file(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = read_plan_file(save(plan, Path(folder) / "plan.safetensors"), plan=plan)
    taken = copy.deepcopy(plan.module)
    expected, found = (_step(plan, module, 1) for module in (taken, again.module))
    _require(found == expected, f"the loss of the plan from a file is {found}, not {expected}")


_CHECKS: dict[str, Callable[[Plan], Any]] = {
    "leaves the model as it was": _leaves_the_model,
    "survives a deep copy": _survives_a_copy,
    "trains two steps": _trains,
    "costs what is forecast": _costs_as_forecast,
    "exports to the backbone": _exports,
    "goes through a file": _goes_through_a_file,
}
