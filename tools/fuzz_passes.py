"""Drawn compositions of passes on small backbones: each is refused with a reason, or compiles and does all it promises.

    python tools/fuzz_passes.py --count 200 --seed 1 --jobs 2 --out tools/tables/fuzz.md

A draw takes a backbone and one to four passes with selectors, triggers and options. It must be refused by a GraphoptError that names the
cause, or else, in every phase of a short run: compile and verify fully, train two steps with finite gradients on everything trainable and
on nothing else, leave what is frozen as it was, survive a deep copy, give its state to a fresh plan (by state dict and by file), export
weights that compute the same in the untouched backbone, and take them back. Anything else is a violation. It is reduced (passes and
options are left out while it still fails) and written to tests/fuzz_cases/, which the test suite replays.
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from machine import heading
from torch import Tensor, nn

import graphopt
from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import PassInstance, Severity, Status
from graphopt.compiler.pipeline import match_all
from graphopt.compiler.plan import Plan, Source, compile_phase
from graphopt.compiler.triggers import Decision
from graphopt.compiler.verify import ALL_PROPERTIES
from graphopt.errors import CostError, GraphoptError, VerifyError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.ir.paths import is_below
from graphopt.ir.shapes import tensors_in
from graphopt.models import cifar_resnet as cifar
from graphopt.plan_file import packed, read_plan_file
from graphopt.spec import from_table

Table = dict[str, Any]

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "fuzz_cases"
#: epochs of the run whose phases are compiled
EPOCHS = 4
#: samples of a training step
BATCH = 3
#: what a table's own data follow
COMMENT = "<!-- runs: "
#: what can become of a case
STATUSES = ("accepted", "refused", "refused later", "violation")


# -- backbones ----------------------------------------------------------------------------------------------------------------
class InPlace(nn.Module):
    """Residual blocks as torchvision writes them: one in-place ReLU for both of its calls, projections between stages."""

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.down = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x if self.down is None else self.down(x)
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 8, 1), self.Block(8, 8, 1))
        self.layer2 = nn.Sequential(self.Block(8, 16, 2), self.Block(16, 16, 1), self.Block(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Unit(nn.Sequential):
    """Convolution, norm, activation."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two levels with skip connections; its output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Unit(3, 8), Unit(8, 16, 2), Unit(16, 16, 2)
        self.mid = nn.Sequential(Unit(16, 16), Unit(16, 16), Unit(16, 16))
        self.up2, self.up1, self.head = Unit(32, 8), Unit(16, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        x = F.interpolate(self.mid(self.bottom(two)), scale_factor=2.0)
        x = F.interpolate(self.up2(torch.cat([x, two], 1)), scale_factor=2.0)
        return self.head(self.up1(torch.cat([x, one], 1)))


class Buffers(nn.Module):
    """Blocks with a running average of their own, dropout, and norms whose momentum is None, without statistics, or over groups."""

    class Block(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, 1, 1), norm, nn.Dropout(0.1)
            self.register_buffer("average", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            if self.training:
                self.average.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
            return F.relu(x + self.drop(y - self.average[:, None, None]))

    def __init__(self) -> None:
        super().__init__()
        norms = (nn.BatchNorm2d(8, momentum=None), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8))
        self.stem, self.scale = nn.Conv2d(3, 8, 3, 2, 1), nn.Parameter(torch.ones(8, 1, 1))
        self.blocks = nn.Sequential(*(self.Block(norm) for norm in norms))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.blocks(self.stem(x)) * self.scale).mean((2, 3)))


class Odd(nn.Module):
    """A block that is called twice, a weight that two layers share, a parameter nobody reads; it returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.again, self.last = Unit(3, 8, 2), Unit(8, 8), Unit(8, 8), Unit(8, 8)
        self.last[0].weight = self.first[0].weight
        self.never = nn.Parameter(torch.zeros(3))
        self.fc, self.side = nn.Linear(8, 10), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.again(self.first(self.stem(x)))
        x = self.last(self.again(x)).mean((2, 3))
        return {"logits": self.fc(x), "side": self.side(x)}


class Vgg(nn.Module):
    """A plain chain of units with pools between."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers([8, 8, 8, "M", 16, 16, 16, "M"], batch_norm=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def _vit() -> nn.Module:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **options)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=10)


BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet8": (lambda: cifar.build("resnet8"), (3, 8, 8)),
    "resnet20": (lambda: cifar.build("resnet20"), (3, 8, 8)),
    "in_place": (InPlace, (3, 16, 16)),
    "vgg": (Vgg, (3, 8, 8)),
    "unet": (UNet, (3, 8, 8)),
    "buffers": (Buffers, (3, 8, 8)),
    "odd": (Odd, (3, 8, 8)),
    "vit": (_vit, (3, 16, 16)),
    "swin": (_swin, (3, 32, 32)),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 2, 2, 1), dims=(8, 8, 16, 16), num_classes=10), (3, 32, 32)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(width_mult=0.2, num_classes=10), (3, 32, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=10), (3, 32, 32)),
}


@cache
def traced(name: str) -> tuple[nn.Module, Graph]:
    """A backbone and its graph. All cases of a process share them: a plan leaves both as they were."""
    build, input = BACKBONES[name]
    torch.manual_seed(0)
    model = build()
    return model, graphopt.trace(model, input)


# -- drawing ------------------------------------------------------------------------------------------------------------------
class Draw:
    """Draws the parts of a case, from names that the backbone's graph has."""

    def __init__(self, seed: str, backbone: str | None = None) -> None:
        self.random = random.Random(seed)
        self.backbone = backbone or self.random.choice(list(BACKBONES))
        graph = traced(self.backbone)[1]
        self.paths, self.types = list(graph.paths), sorted(set(graph.types.values()))
        self.blocks = [b.name for b in find_blocks(graph)] or self.paths
        self.labels = [c.label for c in cut_candidates(graph)] or self.paths

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def case(self) -> Table:
        uses = self.random.choices(
            ("freeze", "share", "drop", "supervise", "checkpoint"), (3, 3, 3, 2, 2), k=self.random.choice((1, 2, 2, 3, 3, 4))
        )
        passes = [{"use": use, **getattr(self, f"_{use}")()} for use in uses]
        for table in passes:
            table.update(self._when(table))
        return {"backbone": self.backbone, "seed": self.random.randrange(1000), "pass": passes}

    def path(self) -> str:
        if self.chance(0.02):
            return "no.such.part"
        return self.random.choice(self.paths if self.chance(0.5) else self.blocks)

    def selector(self) -> Any:
        kind = self.random.choice(("path", "path", "list", "glob", "regex", "blocks", "blocks", "type", "between"))
        if kind == "path":
            return self.path()
        if kind == "list":
            return [self.path() for _ in range(self.random.randint(1, 3))]
        if kind == "glob":
            head, _, tail = self.path().rpartition(".")
            return f"{head}.*" if head else self.random.choice(("*", f"{tail[:1]}*", "**"))
        if kind == "regex":
            return f"re:{re.escape(self.path())}.*"
        if kind == "type":
            table: Table = {"type": self.random.choice((*self.types, "*Norm*", "Conv*"))}
            return {**table, **({"path": f"{self.path()}.**"} if self.chance(0.3) else {})}
        table = {"blocks": True}
        if kind == "between":
            table |= {self.random.choice(("after", "before", "exclude", "path")): self.path()}
        number = self.random.choice((1, 2, 3, 0.25, 0.5))
        return {**table, **self.random.choice(({}, {"first": number}, {"last": number}, {"every": 2}, {"every": 2, "offset": 0}))}

    def some(self, **options: tuple[Any, ...]) -> Table:
        """Each option with a value from its tuple, a third of the time."""
        return {name: self.random.choice(values) for name, values in options.items() if self.chance(0.33)}

    def _freeze(self) -> Table:
        return {"select": self.selector(), **self.some(lean=(True, False))}

    def _share(self) -> Table:
        options = self.some(
            every=(1, 2, 3), mode=("surrogate",), parts=("attention", "mlp", "all"), norm=("mix",), scalars=("parameter",),
            init=([0.5, 0.5], [0.9, 0.2]), detach=(True,), boundary=("nearest", "one-sided"),
        )  # fmt: skip
        return {**options, **({"select": self.selector()} if self.chance(0.6) else {"every": self.random.choice((1, 2, 2, 3))})}

    def _drop(self) -> Table:
        if self.chance(0.5):
            selected = {"select": self.selector()} if self.chance(0.6) else {}
            return {"mode": "bypass", **selected, **({"probability": self.random.choice((0.2, 0.9))} if self.chance(0.5) else {})}
        options = self.some(cache=("disk", "none"), dtype=("float16", "bfloat16"), limit=("1 KiB", "1 GiB"), views=(1, 2), force=(True,))
        return {"upto": self.random.choice((self.path(), self.random.choice(self.labels))), **options}

    def _supervise(self) -> Table:
        options = self.some(
            decoder=("image", "none"), structure=("pointwise", "conv", "transformer"), fraction=(0.25, 1.0), loss=("l1", "l2", "bce"),
            head=("norm-pool", "conv", "contrast"), temperature=(0.1,), classes=(10, 5), mean=([0.5, 0.5, 0.5],),
            weights=({"classify": [0.1, 1.0]}, {"reconstruct": [1.0, 0.0]}, {"classify": [0.0, 0.0]}),
        )  # fmt: skip
        kind = self.random.choice(("modules", "modules", "cuts", "memory", "stage"))
        if kind == "cuts":
            return {**options, "cuts": self.random.sample(self.labels, min(len(self.labels), self.random.randint(1, 2)))}
        modules = {"modules": self.random.randint(2, 4)} if kind == "modules" or self.chance(0.5) else {}
        return {**options, **modules, **({"balance": kind} if kind != "modules" else {})}

    def _checkpoint(self) -> Table:
        if self.chance(0.4):
            return {"select": self.selector()}
        return {"segments": self.random.randint(1, 4), **self.some(balance=("memory",))}

    def _when(self, table: Table) -> Table:
        kind = self.random.choice(("start", "start", "start", "epoch", "until", "score", "own"))
        epoch = self.random.randrange(EPOCHS)
        if kind == "epoch":
            return {"when": {"epoch": epoch}}
        if kind == "until":
            return {"when": {"epoch": epoch, "until": epoch + self.random.randint(1, 2)}}
        if kind == "score":
            return {"when": {"score": self.random.choice(("change", "slope")), **self.some(patience=(1,), most=(1, 0.5))}}
        if kind == "own" and table["use"] == "drop" and "probability" in table:
            return {"when": {"schedule": "progressive"}}
        if kind == "own" and table["use"] == "drop" and table.get("upto"):
            steps = [{"epoch": i + 1, "upto": name} for i, name in enumerate(self.random.sample(self.blocks, min(2, len(self.blocks))))]
            table.pop("upto")
            return {"when": steps}
        if kind == "own":
            return {"when": {"schedule": "freezeout", **self.some(t0=(0.0, 0.25), how=("linear",))}}
        return {}


# -- checking -----------------------------------------------------------------------------------------------------------------
class Violation(Exception):
    """A promise that was not kept: of what kind, and how."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Outcome:
    """What became of a case, one of `STATUSES`; why; and what kind of violation it is."""

    status: str
    reason: str = ""
    kind: str = ""


def require(holds: bool, kind: str, text: str) -> None:
    if not holds:
        raise Violation(kind, text)


def run(case: Table) -> Outcome:
    """Compiles a case and checks every phase of it."""
    build, input = BACKBONES[case["backbone"]]
    model, graph = traced(case["backbone"])
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, str(graph.fx)
    stage = "refused"
    try:
        about = {"source": "python", "name": f"fuzz:{case['backbone']}", "input": list(input)}
        spec = from_table({"backbone": about, "pass": copy.deepcopy(case["pass"]), "train": {"epochs": EPOCHS}})
        matched = match_all(graph, [PassInstance(value, i) for i, value in enumerate(spec.passes)])
        source = Source(
            backbone=model, base=graph, matched=matched, name="", digest=spec.digest, spec=spec, batch=2, measure=measure_with(2)
        )
        torch.manual_seed(case["seed"])
        plan = compile_phase(source, verify="full", costs=case["seed"] % 8 == 0)
        stage = "refused later"
        for phase in phases(plan):
            check_phase(plan, phase, build, input, case["seed"])
        state = model.state_dict()
        require(state.keys() == before.keys(), "model changed", "its keys")
        moved = [k for k, v in before.items() if not torch.equal(torch.nan_to_num(v), torch.nan_to_num(state[k]))]
        require(not moved, "model changed", ", ".join(moved[:3]))
        require(str(graph.fx) == text, "model changed", "its graph")
    except Violation as violation:
        return Outcome("violation", str(violation), violation.kind)
    except VerifyError as error:
        return Outcome("violation", f"verify: {error}", "verify")
    except GraphoptError as error:
        uses = {table["use"] for table in case["pass"]}
        if not error.what or not (any(use in str(error) for use in uses) or isinstance(error, CostError)):
            return Outcome("violation", f"the refusal names no pass: {error}", "refusal")
        return Outcome(stage, error.what)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("violation", f"{type(error).__name__}: {error} ({Path(where.filename).name}, {where.name})", type(error).__name__)
    return Outcome("accepted")


def phases(plan: Plan) -> Iterator[Plan]:
    """The plan in each phase of a run, trained in between by whoever takes it; measured triggers take a region more in each epoch."""
    yield plan
    for epoch in range(EPOCHS):
        due = list(plan.due(epoch, None, EPOCHS))
        for progress in plan.progress():
            if not progress.instance.value.when.foreseeable and epoch and len(progress.active) < len(progress.names):
                taken = progress.names[len(progress.active) : len(progress.active) + 1 + epoch % 2]
                due.append(Decision(index=progress.instance.index, epoch=epoch, regions=taken))
        if due:
            earlier, plan = plan, plan.advance_to((*plan.decisions, *due), verify="full")
            changed = {plan.passes[d.index] for d in due}
            if all("eval output" in value.preserved_properties() for value in changed) and _exports(earlier) and _exports(plan):
                require(
                    _close(_evaluate(earlier, plan), 0), "weights carried over", f"at epoch {epoch} the network computes something else"
                )
            yield plan


def _evaluate(*plans: Plan) -> list[list[Tensor]]:
    x = torch.rand(2, *plans[0].base.input, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return [[t.clone() for t in tensors_in(copy.deepcopy(plan.module).eval()(x))] for plan in plans]


def _close(pair: list[list[Tensor]], tolerance: float) -> bool:
    one, other = pair
    distances = [((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in zip(one, other, strict=True)]
    return all(d <= max(tolerance, 1e-4) and not math.isnan(d) for d in distances)


def _exports(plan: Plan) -> bool:
    """Whether the backbone's architecture can express the plan: not with surrogates in it."""
    effects = (effect for value, effect in zip(plan.passes, plan.effects, strict=True) if getattr(value, "mode", "") == "surrogate")
    return not any(effect is not None and effect.regions for effect in effects)


def step(plan: Plan, module: nn.Module, x: Tensor, *, seed: int) -> float:
    """One forward and backward in train mode; gradients are replaced."""
    module.train()
    for parameter in module.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    loss = torch.zeros(())
    if plan.needs.targets:
        classes = next(m.classes for m in module.modules() if type(m).__name__ == "Auxiliary")
        output, loss = module(x, torch.arange(len(x)) % classes)
    else:
        output = module(x)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            loss = loss + F.log_softmax(tensor.float().flatten(1), 1).square().mean()
    require(bool(loss.isfinite()), "loss", f"the loss is {loss.item()}")
    require(loss.requires_grad, "gradients", "the loss depends on nothing that trains")
    loss.backward()
    return loss.item()


def check_phase(start: Plan, plan: Plan, build: Callable[[], nn.Module], input: tuple[int, ...], seed: int) -> None:
    """One phase keeps every promise. Trains it by two steps."""
    json.dumps(plan.report.to_dict())
    x = torch.rand(BATCH, *input, generator=torch.Generator().manual_seed(seed))
    _check_as_backbone(plan, x, seed)
    module, other = plan.module, copy.deepcopy(plan.module)
    losses = [step(plan, m, x, seed=seed) for m in (module, other)]
    require(losses[0] == losses[1], "deep copy", f"the loss is {losses[1]}, not {losses[0]}")
    twins = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        gradient, twin = parameter.grad, twins[name].grad
        if not parameter.requires_grad:
            require(gradient is None, "gradients", f"{name} does not train and has one")
        elif name not in plan.graph.unused:
            require(gradient is not None, "gradients", f"{name} trains and has none")
        if gradient is not None:
            require(bool(gradient.isfinite().all()), "gradients", f"that of {name} is not finite")
            require(twin is not None and torch.equal(gradient, twin), "deep copy", f"the gradient of {name} differs")
    held = _held(plan)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    optimizer.step()
    step(plan, module, x, seed=seed + 1)
    optimizer.step()
    after = module.state_dict() if not _exports(plan) else plan.export_state()
    for name, value in held.items():
        require(torch.equal(value, after[name].cpu()), "frozen", f"{name} moved")
    fresh = _check_file(start, plan, x, seed)
    _check_export(plan, fresh, build)
    if plan.needs.features is not None:
        _check_features(plan, x)


def _check_as_backbone(plan: Plan, x: Tensor, seed: int) -> None:
    """Where all passes preserve everything, a training step is the backbone's own, buffers included."""
    if any(e is not None and value.preserved_properties() != ALL_PROPERTIES for value, e in zip(plan.passes, plan.effects, strict=True)):
        return
    one, other = copy.deepcopy(plan.module), plan.export()
    losses = [step(plan, module, x, seed=seed) for module in (one, other)]
    require(losses[0] == losses[1], "as the backbone", f"the loss is {losses[0]}, not {losses[1]}")
    for name, value in (*other.named_buffers(), *((n, p.grad) for n, p in other.named_parameters() if p.grad is not None)):
        mine = one.get_parameter(name).grad if name not in dict(one.named_buffers()) else one.get_buffer(name)
        require(mine is not None and torch.equal(value, mine), "as the backbone", f"{name} or its gradient differs after a step")


def _held(plan: Plan) -> dict[str, Tensor]:
    """What must stay as it is: all that does not train, and everything in regions that were frozen or dropped."""
    state = plan.export_state() if _exports(plan) else plan.module.state_dict()
    names = {n for n, p in plan.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    reports = (d for report in plan.report.passes for d in report.diagnostics if d.severity is Severity.WARNING)
    moving = {d.location for d in reports if "is not frozen" in d.message}
    excused = [p for m in plan.matched for region in m.match.regions if region.name in moving for p in region.paths]
    for matched, effect in zip(plan.matched, plan.effects, strict=True):
        for region in matched.match.regions:
            status = effect.statuses.get(region.name) if effect is not None else None
            if status is not None and status.status in (Status.FROZEN, Status.DROPPED):
                names |= {n for n in plan.base.module.state_dict() if any(n.startswith(f"{p}.") for p in region.paths)}
    return {n: state[n].cpu().clone() for n in names if n in state and not is_below(n, excused)}


def _check_file(start: Plan, plan: Plan, x: Tensor, seed: int) -> Plan:
    """The plan that a file gives goes on as this one does; also from another phase of it, and through its state dict."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.safetensors"
        file.write_bytes(packed(plan))
        reread = read_plan_file(file, plan=start)
    taken = copy.deepcopy(plan.module)
    expected, found = (step(plan, module, x, seed=seed) for module in (taken, reread.module))
    require(found == expected, "plan file", f"the loss is {found}, not {expected}")
    reread.module.load_state_dict(taken.state_dict(), strict=True)
    return reread


def _check_export(plan: Plan, fresh: Plan, build: Callable[[], nn.Module]) -> None:
    if not _exports(plan):
        try:
            plan.export()
        except GraphoptError:
            return
        raise Violation("export", "surrogates were exported as the backbone")
    state = plan.export_state()
    backbone = build()
    backbone.load_state_dict(state, strict=True)
    x = torch.rand(2, *plan.base.input, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        exported = tensors_in(backbone.eval()(x))
    require(_close([exported, *_evaluate(plan)], 1e-4), "export", "the backbone computes something else")
    fresh.load_backbone(state)
    require(_close(_evaluate(plan, fresh), 1e-2), "reload", "the plan computes something else with its own export")


def _check_features(plan: Plan, x: Tensor) -> None:
    """Prefix and suffix, one after the other, are the whole."""
    whole = copy.deepcopy(plan.module)
    expected = step(plan, whole, x, seed=7)
    gradients = {n: p.grad for n, p in whole.named_parameters()}
    other = plan.advance_to(plan.decisions, verify="off")
    found = step(plan, other.suffix, other.prefix(x), seed=7)
    require(found == expected, "features", f"the loss is {found}, not {expected}")
    for name, parameter in other.suffix.named_parameters():
        gradient = gradients[name]
        same = parameter.grad is None if gradient is None else parameter.grad is not None and torch.equal(gradient, parameter.grad)
        require(same, "features", f"the gradient of {name} differs")


# -- reducing -----------------------------------------------------------------------------------------------------------------
def reduced(case: Table, kind: str) -> Table:
    """The smallest case that still fails in this way, found by leaving out passes and options."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if run(candidate).kind == kind:
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Table) -> Iterator[Table]:
    for i in range(len(case["pass"])):
        if len(case["pass"]) > 1:
            yield {**case, "pass": case["pass"][:i] + case["pass"][i + 1 :]}
    for i, table in enumerate(case["pass"]):
        for key in table:
            if key != "use":
                rest = {k: v for k, v in table.items() if k != key}
                yield {**case, "pass": [*case["pass"][:i], rest, *case["pass"][i + 1 :]]}
        if isinstance(table.get("select"), list) and len(table["select"]) > 1:
            for one in table["select"]:
                yield {**case, "pass": [*case["pass"][:i], {**table, "select": one}, *case["pass"][i + 1 :]]}
    if case["seed"] != 1:
        yield {**case, "seed": 1}


# -- the command --------------------------------------------------------------------------------------------------------------
def draw_and_run(task: tuple[int, int, str | None]) -> tuple[int, Table, Outcome]:
    seed, number, backbone = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "Using a target size")
    case = Draw(f"{seed}:{number}", backbone).case()
    return number, case, run(case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of draws")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--backbone", choices=BACKBONES)
    parser.add_argument("--replay", type=Path, nargs="*", help="cases to run instead")
    parser.add_argument("--out", type=Path, help="add the result to this table")
    options = parser.parse_args()
    if options.replay:
        outcomes = [run(json.loads(path.read_text())) for path in options.replay]
        for path, outcome in zip(options.replay, outcomes, strict=True):
            print(f"{path}: {outcome.status} {outcome.reason}")
        return int(any(o.status == "violation" for o in outcomes))
    print(f"seed {options.seed}, draws {options.first} to {options.first + options.count - 1}", flush=True)
    tasks = [(options.seed, number, options.backbone) for number in range(options.first, options.first + options.count)]
    found: list[tuple[Table, Outcome]] = []
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            found = [_report(*result) for result in pool.imap_unordered(draw_and_run, tasks)]
    else:
        found = [_report(*draw_and_run(task)) for task in tasks]
    violations = [(case, outcome) for case, outcome in found if outcome.status == "violation"]
    for case, outcome in violations:
        write_case(reduced(case, outcome.kind), outcome)
    counts = Counter(outcome.status for _, outcome in found)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if options.out:
        write_table(options, found)
    return int(bool(violations))


def _report(number: int, case: Table, outcome: Outcome) -> tuple[Table, Outcome]:
    if outcome.status == "violation":
        print(f"draw {number}: {outcome.reason}\n  {json.dumps(case)}", flush=True)
    elif number % 50 == 49:
        print(f"... {number + 1}", flush=True)
    return case, outcome


def write_case(case: Table, outcome: Outcome) -> None:
    CASES.mkdir(exist_ok=True)
    name = "-".join([case["backbone"], *(table["use"] for table in case["pass"])])
    taken = [path.stem for path in CASES.glob(f"{name}*.json")]
    path = CASES / f"{name}-{len(taken) + 1}.json" if taken else CASES / f"{name}.json"
    path.write_text(json.dumps({"found": outcome.reason, **case}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", flush=True)


def plain(reason: str) -> str:
    """A reason without the names and numbers of one case, so that equal ones can be counted."""
    named = re.sub(r"'[^']*'|\b[a-z_]+(\.[\w-]+)+\b", "...", reason.replace("|", "/"))
    return " ".join(re.sub(r"\d+", "N", named).partition(":")[0].split())[:110]


def write_table(options: argparse.Namespace, found: list[tuple[Table, Outcome]]) -> None:
    """Adds one run to the table, or takes the place of an earlier one of the same draws. A comment in it holds what it is made from."""
    old = options.out.read_text() if options.out.exists() else ""
    runs: dict[str, Table] = json.loads(old.rpartition(COMMENT)[2].partition(" -->")[0]) if COMMENT in old else {}
    counts = Counter(outcome.status for _, outcome in found)
    reasons = Counter(plain(outcome.reason) for _, outcome in found if outcome.status.startswith("refused"))
    key = f"{options.seed} | {options.first} to {options.first + options.count - 1}"
    runs[key] = {"counts": [counts[status] for status in STATUSES], "reasons": reasons}
    total = [sum(column) for column in zip(*(run["counts"] for run in runs.values()), strict=True)]
    lines = [heading("Drawn compositions of passes", __doc__), "| seed | draws | " + " | ".join(STATUSES) + " |", "|---" * 6 + "|"]
    lines += [f"| {name} | {' | '.join(map(str, run['counts']))} |" for name, run in sorted(runs.items())]
    lines += [f"| all | {sum(total)} | {' | '.join(map(str, total))} |", "", "| refused because | draws |", "|---|---|"]
    merged = sum((Counter(run["reasons"]) for run in runs.values()), Counter())
    lines += [f"| {reason} | {count} |" for reason, count in merged.most_common()]
    options.out.write_text("\n".join([*lines, "", f"{COMMENT}{json.dumps(runs)} -->"]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
