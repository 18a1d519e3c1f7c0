"""One phase: what is made anew at every decision, and the training step in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Batch, Feed, ImageFeed, preserved, reseed
from graphopt.errors import RunError
from graphopt.spec import TrainSpec
from graphopt.train.checks import check_frozen, check_gradients, fingerprints, gradients_finite
from graphopt.train.feature_cache.cache import Keeper
from graphopt.train.history import Regions
from graphopt.train.optimizer import (
    Schedule,
    build_optimizer,
    layer_rates,
    load_optimizer_state,
    named_parameters,
    optimizer_state,
    undecayed,
)
from graphopt.train.strategy import Strategy

#: Weight of an auxiliary classifier's loss where a backbone returns several outputs in training (GoogLeNet, Inception).
AUXILIARY = 0.3
#: float16: so many steps in a row may overflow before it is not the loss scale's fault.
OVERFLOWS = 50


@dataclass(frozen=True)
class Setting:
    """What all phases of a run share. `classes` is the data set's; `features` keeps what a prefix that has left the graph computed."""

    spec: TrainSpec
    strategy: Strategy
    images: ImageFeed
    classes: int
    features: Keeper | None = None


class Phase:
    """A plan between two decisions, on its device, with its optimizer, schedule and averaged weights.

    The runner reads of a plan only: `module` and its `requires_grad`, `needs`, `no_decay`, `due()`, and which parameters the forward
    never uses. It knows no pass by name.

    Attributes:
        feed: where its training batches come from.
        first: whether its first step is still to come (after which gradients are checked).
    """

    def __init__(self, plan: Plan, setting: Setting, *, earlier: Phase | None = None) -> None:
        self.plan, self.setting = plan, setting
        self.spec, self.strategy = spec, strategy = setting.spec, setting.strategy
        strategy.place(plan.module)
        self.feed: Feed = setting.images
        self.features: dict[str, Any] = dict(earlier.features) if earlier is not None else {}
        self._trained: nn.Module = plan.module
        self._call: Callable[..., Any] | None = None
        self.optimizer = build_optimizer(
            plan.module,
            spec.optimizer,
            no_decay=plan.no_decay | undecayed(plan.backbone),
            rates=layer_rates(plan.backbone, spec.optimizer.layer_decay),
        )
        if earlier is not None:
            load_optimizer_state(self.optimizer, plan.module, optimizer_state(earlier.optimizer, earlier.plan.module))
        self.steps = len(self.feed) // spec.accumulate
        self.schedule = Schedule(self.optimizer, spec.scheduler, lr=spec.optimizer.lr, epochs=spec.epochs, steps_per_epoch=self.steps)
        self.scaler: torch.amp.GradScaler = earlier.scaler if earlier is not None else strategy.scaler()
        self.ema: ModelEmaV3 | None = _averaged(plan.module, spec.ema, earlier.ema if earlier is not None else None)
        self.frozen = fingerprints(plan.module)
        self.first = True
        self._overflows = 0

    def next(self, decisions: Sequence[Decision], epoch: int) -> Phase:
        """The phase after `decisions`: weights, optimizer state and averages carried over by name. Checks R4 on the way out."""
        self.close()
        with preserved():
            # What a pass initialises is a function of (seed, epoch), so that a resumed run initialises the same.
            reseed(self.spec.seed, epoch, 2)
            plan = self.plan.advance_to((*self.plan.decisions, *decisions))
        return Phase(plan, self.setting, earlier=self)

    def close(self) -> None:
        """R4 at the phase's end: what was frozen has not moved by a bit."""
        check_frozen(self.plan.module, self.frozen)

    def begin(self) -> bool:
        """What waits until the phase's weights are in place: the features it trains on, compilation. False where that is done already."""
        if self._call is not None:
            return False
        if self.setting.features is not None:
            self.feed, self._trained, self.features = self.setting.features.ready(self.plan, self.features)
        self._call = self.strategy.callable(self._trained)
        return True

    def train_mode(self) -> None:
        """All of the network into training mode, and what is trained of it."""
        self.begin()
        self.plan.module.train()
        self._trained.train()

    def step(self, batches: Sequence[Batch], done: int) -> tuple[Tensor, Tensor, int]:
        """One optimizer step over `batches` (already on the device), the run having done `done` before.

        Returns:
            The loss (mean over samples, on the device), how many answers were right, and how many samples there were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = correct = torch.zeros((), device=self.strategy.device)
        samples = 0
        for batch in batches:
            with self.strategy.autocast():
                loss, output = self._loss(batch)
            self.scaler.scale(loss / len(batches)).backward()
            total = total + loss.detach() / len(batches)
            correct = correct + right_answers(output, batch.target)
            samples += len(batch.target)
        self.scaler.unscale_(self.optimizer)
        self._check_first()
        if self.spec.clip is not None:
            parameters = [p for p in named_parameters(self.plan.module).values() if p.grad is not None]
            dispatch_clip_grad(parameters, self.spec.clip, mode=self.spec.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.plan.module, step=done + 1)
        return total, correct, samples

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._call is not None, "a phase begins before its first step"
        if self.plan.needs.targets:
            answer, local = self._call(batch.input, batch.target)
        else:
            answer, local = self._call(batch.input), None
        output, *auxiliary = answer if isinstance(answer, tuple | list) else [answer]
        check_output(output, batch.target, self.setting.classes)
        loss = self._criterion(output, batch.target)
        for other in auxiliary:
            if isinstance(other, Tensor):
                loss = loss + AUXILIARY * self._criterion(other, batch.target)
        return (loss if local is None else loss + local), output

    def _criterion(self, output: Tensor, target: Tensor) -> Tensor:
        # Soft targets are smoothed by mixup already.
        return F.cross_entropy(output, target, label_smoothing=self.spec.label_smoothing if target.ndim == 1 else 0.0)

    def _check_first(self) -> None:
        if not self.first:
            return
        if self.scaler.is_enabled() and self._overflows < OVERFLOWS and not gradients_finite(self.plan.module):
            self._overflows += 1  # the scaler will skip this step and lower its scale
            return
        check_gradients(self.plan.module, self.plan.report.unused)
        self.first = False

    def scored(self) -> Regions:
        """Regions whose weights the history watches, with their parameters: those that a pass asks for, and those that a trigger
        which has to measure may still decide about."""
        return self.plan.scored

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of a phase; everything by name."""
        return {
            "model": self.plan.module.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.plan.module),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "frozen": self.frozen,
            "first": self.first,
            "features": self.features,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; strict. Raises RunError when the module that (spec, decisions) gives is not the one that was saved (R2)."""
        load_strictly(self.plan.module, state["model"])
        load_optimizer_state(self.optimizer, self.plan.module, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            load_strictly(self.ema.module, state["ema"] or state["model"])
        self.frozen, self.first = dict(state["frozen"]), bool(state["first"])
        self.features = dict(state.get("features", {}))
        check_frozen(self.plan.module, self.frozen)


def _averaged(module: nn.Module, decay: float | None, earlier: ModelEmaV3 | None) -> ModelEmaV3 | None:
    if decay is None:
        return None
    ema = ModelEmaV3(module, decay=decay, use_warmup=True)
    if earlier is not None:
        known = earlier.module.state_dict()
        own = ema.module.state_dict()
        carried = {name: known[name] for name in own if name in known and known[name].shape == own[name].shape}
        ema.module.load_state_dict(carried, strict=False)
    return ema


def load_strictly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load by name; raises RunError with the names that do not fit."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise RunError(
            f"the checkpoint does not fit the network its decisions give: {', '.join(wrong[:5])}",
            where="R2",
            fix="It was written with another version of a pass or of the backbone's library.",
        )
    module.load_state_dict(copy.copy(dict(state)), strict=True)


def check_output(output: Any, target: Tensor, classes: int) -> None:
    """Raises RunError unless `output` is (N, at least `classes`)."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(target):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RunError(f"the runner trains classifiers: it needs (N, classes), the backbone gives {found}", where="backbone")
    if output.shape[1] < classes:
        raise RunError(
            f"the backbone tells {output.shape[1]} classes apart, the data has {classes}",
            where="backbone.arguments",
            fix=f"Set num_classes = {classes}.",
        )


def right_answers(output: Tensor, target: Tensor) -> Tensor:
    """How many of (N, classes) scores have their maximum at the target (N,), or at the maximum of a soft target (N, classes)."""
    labels = target if target.ndim == 1 else target.argmax(dim=1)
    return (output.detach().argmax(dim=1) == labels).sum()
