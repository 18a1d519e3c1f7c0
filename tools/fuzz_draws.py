"""What the fuzzer of passes draws from: small backbones, and passes with selectors, triggers and options."""

import math
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphopt
from graphopt.compiler import registry
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.models import cifar_resnet as cifar

Table = dict[str, Any]
#: epochs of the run whose phases are compiled
EPOCHS = 4


class InPlace(nn.Module):
    """Residual blocks as torchvision writes them: one in-place ReLU for both of its calls, projections between stages."""

    class Block(nn.Module):
        average: Tensor

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
        average: Tensor

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
    options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 10}
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
        uses = self.random.choices(registry.names(), k=self.random.choice((1, 2, 2, 3, 3, 4)))
        passes = [{"use": use, **self.options(use)} for use in uses]
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

    def options(self, use: str) -> Table:
        """Of a pass: drawn from its schema, but where options depend on each other."""
        own: Callable[[], Table] | None = getattr(self, f"_{use}", None)
        if own is not None:
            return own()
        schema = registry.load(use).model_json_schema()
        required = schema.get("required", ())
        drawn = ((name, option) for name, option in schema["properties"].items() if name in required or self.chance(0.5))
        return {name: self.value(option) for name, option in drawn if name != "when"}

    def value(self, schema: Table) -> Any:
        """A value that the schema of one option allows."""
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        if any("$ref" in kind for kind in kinds):
            return self.selector()
        kind = self.random.choice(kinds)
        if "enum" in kind or "const" in kind:
            return self.random.choice(kind.get("enum") or [kind["const"]])
        low, high = kind.get("minimum", kind.get("exclusiveMinimum", 0)), kind.get("maximum", kind.get("exclusiveMaximum", math.inf))
        match kind["type"]:
            case "boolean":
                return self.chance(0.5)
            case "integer":
                return min(low + self.random.choice((0, 1, 2, 6)), high)
            case "number":
                return self.random.uniform(low, min(high, low + 1.0)) or kind["maximum"]
            case "string":
                return self.path()
        raise NotImplementedError(f"the fuzzer draws nothing of {kind}")

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
        options = self.some(
            cache=("disk", "none"),
            dtype=("float16", "bfloat16"),
            limit=("1 KiB", "1 GiB"),
            views=(1, 2),
            refresh=(2,),
            crops=(True,),
            force=(True,),
        )
        return {"upto": self.random.choice((self.path(), self.random.choice(self.labels))), **options}

    def _resize(self) -> Table:
        return {"size": self.random.choice((8, 12, 16, 24, [8, 12])), **self.some(how=("low-frequency",))}

    def _supervise(self) -> Table:
        options = self.some(
            decoder=("image", "none"), structure=("pointwise", "conv", "transformer"), fraction=(0.25, 1.0), loss=("l1", "l2", "bce"),
            head=("norm-pool", "conv", "contrast", "ahead", "dictionary"), temperature=(0.1,), classes=(10, 5), mean=([0.5, 0.5, 0.5],),
            depth=(1, 3), lookahead=({"blocks": 1}, {"blocks": 2, "bias": "block"}),
            weights=({"classify": [0.1, 1.0]}, {"reconstruct": [1.0, 0.0]}, {"classify": [0.0, 0.0]}),
        )  # fmt: skip
        kind = self.random.choice(("modules", "modules", "cuts", "memory", "stage", "time"))
        if kind == "cuts":
            return {**options, "cuts": self.random.sample(self.labels, min(len(self.labels), self.random.randint(1, 2)))}
        modules = {"modules": self.random.randint(2, 4)} if kind == "modules" or self.chance(0.5) else {}
        return {**options, **modules, **({"balance": kind} if kind != "modules" else {})}

    def _checkpoint(self) -> Table:
        kind = self.random.choice(("select", "segments", "blocks", "share", "size"))
        if kind == "select":
            return {"select": self.selector()}
        if kind == "share":
            return {"budget": self.random.choice((0.1, 0.35, 0.5, 0.8, 1.0))}
        if kind == "size":
            size = self.random.choice(("10 KiB", "200 KiB", "500 KiB", "1 MiB", "4 MiB", "8 GiB"))
            return {"budget": size, **self.some(device=("L4", "H100"), fraction=(0.2, 0.7))}
        return (
            {"segments": "every block"}
            if kind == "blocks"
            else {"segments": self.random.randint(1, 4), **self.some(balance=("memory", "blocks"))}
        )

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
            return {"when": {"schedule": "freezeout", **self.some(t0=(0.0, 0.25), how=("linear",), anneal=(False,), scale=(False,))}}
        return {}
