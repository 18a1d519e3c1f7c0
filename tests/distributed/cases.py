"""Runs that several ranks repeat: a network with group norms in float64, so that what differs by more than rounding is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from graphopt import Pass, Plan
from graphopt.data.loader import Data, open_data
from graphopt.passes.adapt import Adapt
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.spec import DataSpec
from graphopt.train import train
from tests.support.backbones import Small
from tests.support.plans import compiled_anew
from tests.train import small

GROUPS = partial(nn.GroupNorm, 2)
ADAMW = {"name": "adamw", "lr": 0.003}


@dataclass(frozen=True)
class Case:
    """Passes, settings that differ from the usual ones (alone: only in the run of one process), and how far weights may be apart."""

    passes: tuple[Pass, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    within: float = 1e-12
    norm: Any = GROUPS


FRONT, BACK = Freeze(select=["stem", "blocks.0"]), Freeze(select="blocks.2")
MIX = Share(select="blocks.2")
CUTS = ("blocks.0", "blocks.1", "blocks.2")
#: a mix's two factors are float32
ROUGH = 1e-7

PASSES = {
    "freeze prefix, averages, clipped": Case((FRONT,), {"ema": 0.9, "clip": 0.5}),
    "freeze lean": Case((BACK,)),
    "share norms": Case((Share(select="blocks.2", norm="mix", scalars="parameter"),), within=ROUGH),
    "share surrogate": Case((Share(select="blocks.2", mode="surrogate"),), within=ROUGH),
    "drop prefix, micro-batches": Case((Drop(upto="blocks.0", when="start", cache="none"),), {"accumulate": 2}, {"accumulate": 1}),
    "bypass, clipped adaptively": Case((Drop(mode="bypass", probability=0.5),), {"clip": 0.01, "clip_mode": "agc"}),
    "supervise 4": Case((Supervise(cuts=CUTS, fraction=0.5, head="ahead", lookahead={"blocks": 1}),)),
    "checkpoint": Case((Checkpoint(segments=3),)),
    "supervise, freeze lean": Case((Supervise(modules=2), BACK)),
    "supervise, share, checkpoint": Case((Supervise(modules=2), MIX, Checkpoint(segments=3)), within=ROUGH),
    "freeze, share": Case((FRONT, MIX), within=ROUGH),
    "adapt": Case((Adapt(select=["blocks.0", "blocks.1"], rank=2),)),
    "factorize": Case((Factorize(select="blocks.1", rank=0.5),)),
}
SETTINGS = {"bfloat16": Case(settings={"amp": "bfloat16"}, within=1e-2)}
_CHANGES: tuple[Pass, ...] = (
    Freeze(select="blocks.2", when={"epoch": 1, "until": 3}),
    Freeze(select="blocks.1", when={"epoch": 2}),
    Drop(upto="blocks.0", when={"epoch": 3}, cache="none"),
)
_SCORED = Freeze(select=["stem", "blocks.0", "blocks.1"], when={"score": "change", "below": 10.0})
_COMPARED = Freeze(select=["stem", "blocks.0"], when={"score": "plasticity", "window": 2, "patience": 1, "below": 0.9})
PHASES = {
    "freeze, thaw, drop with adamw": Case(_CHANGES, {"epochs": 4, "optimizer": ADAMW, "ema": 0.9}),
    "supervise, then not": Case((Supervise(modules=2, when={"epoch": 0, "until": 1}),), {"epochs": 2}),
    "freezeout": Case((Freeze(select=["stem", "blocks.0", "blocks.1"], when={"schedule": "freezeout"}),), {"epochs": 2, "ema": 0.9}),
    "frozen by score": Case((_SCORED,), {"epochs": 3}),
    "frozen by outputs": Case((_COMPARED,), {"epochs": 5}),
}
#: cases of which a score decides something
DECIDED = ("frozen by score", "frozen by outputs")
#: a head's own norms, norms in sections, those that freeze and thaw, and timm's with an activation
SYNC = {
    name: Case(passes, {"sync_norm": True, **settings}, norm=nn.BatchNorm2d, within=within)
    for name, passes, settings, within in [
        ("synchronized norms, freeze and thaw", _CHANGES, {"epochs": 4}, 1e-12),
        ("synchronized norms, sections", (Supervise(modules=2, head="conv"), Checkpoint(segments=3)), {}, 1e-12),
        ("synchronized norms, mixed", (Share(select="blocks.2", norm="mix"),), {}, ROUGH),
    ]
} | {"synchronized norms with activations": Case((BACK,), {"sync_norm": True}, norm=partial(BatchNormAct2d, act_layer=nn.SiLU))}
CASES = PASSES | SETTINGS | PHASES | SYNC


def plan(passes: tuple[Pass, ...] = (), *, seed: int = 0, norm: Any = GROUPS, drop: float = 0.0) -> Plan:
    return compiled_anew(_network(norm, drop), passes, small.SHAPE, seed=seed)


@cache
def _network(norm: Any, drop: float) -> Callable[[], nn.Module]:
    return lambda: Small(drop=drop, norm=norm).double()


def data(training: int = 24, evaluation: int = 13) -> Data:
    """Digits in float64; the number of evaluation images leaves a rank without any in the last batch."""
    opened = open_data(DataSpec(name="digits", train_limit=training, eval_limit=evaluation), small.SHAPE, seed=0)
    for samples in (opened.train, opened.evaluation):
        samples.transform = Double(samples.transform)
    return opened


@dataclass
class Double:
    """A transform to float64."""

    transform: Any

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).double()


def plan_of(name: str) -> Plan:
    """The plan of one case."""
    return plan(CASES[name].passes, norm=CASES[name].norm)


def run(name: str, folder: Path, *, alone: bool = False, made: Plan | None = None) -> None:
    """Trains one case, of which the plan may be made already, into `folder / name`: 12 samples per step, 2 steps per epoch."""
    case = CASES[name]
    changes = {"epochs": 1, "batch": 12, "eval_every": 10, **case.settings, **(case.alone if alone else {})}
    train(made or plan_of(name), folder / name, settings=small.settings(**changes), data=data())


def content(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pt", weights_only=True)


def distance(one: Any, other: Any, path: str = "") -> tuple[float, str]:
    """The largest difference between the tensors of two nested states of one shape, and where it is."""
    if isinstance(one, Tensor):
        return (float((one.double() - other.double()).abs().max()) if one.numel() else 0.0), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (path, one.keys() ^ other.keys())
        return max((distance(one[k], other[k], f"{path}/{k}") for k in one), default=(0.0, path))
    return 0.0, path
