"""timm's optimizers and schedulers, with parameters and their state known by name.

Tracing re-orders parameters and phases come and go, so nothing here is keyed by position: an optimizer's state is saved, and
carried into the next phase, under the parameter's state-dict name. A parameter that leaves loses its state; one that comes back
starts afresh.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from graphopt.errors import RunError, did_you_mean
from graphopt.spec import OptimizerSpec, SchedulerSpec


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, sorted by name. A tied one goes by the first of its names, whatever order the graph has it in."""
    names: dict[int, str] = {}
    by_id: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        key = id(parameter)
        by_id[key] = parameter
        names[key] = min(names.get(key, name), name)
    return {names[key]: by_id[key] for key in sorted(by_id, key=names.__getitem__)}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a phase trains, sorted by name."""
    return {name: parameter for name, parameter in named_parameters(module).items() if parameter.requires_grad}


def build_optimizer(
    module: nn.Module,
    spec: OptimizerSpec,
    *,
    no_decay: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters of `module`, in named groups.

    Biases, norm parameters (everything of one dimension or none) and the names in `no_decay` are not decayed. `rates` scales the
    learning rate of parameters by name (see `layer_rates`).
    Raises RunError for an unknown optimizer, options it does not take, nothing to train, or a broken R1.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in trainable(module).items():
        decays = parameter.ndim > 1 and not path.endswith(".bias") and path not in no_decay
        label, rate = "decay" if decays else "no_decay", 1.0
        if rates is not None:
            rate = _rate_of(path, rates)
            label = f"{label}, lr x {rate:.4g}"
        group = groups.setdefault(label, {"params": [], "name": label, "weight_decay": spec.weight_decay if decays else 0.0})
        group["params"].append(parameter)
        if rates is not None:
            group["lr_scale"] = rate
    if not groups:
        raise RunError("nothing is left to train: every parameter is frozen", fix="Narrow the selection that freezes.")
    listed = [groups[label] for label in sorted(groups)]
    try:
        optimizer = create_optimizer_v2(listed, opt=spec.name, lr=spec.lr, momentum=spec.momentum, **spec.arguments)
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        known = list_optimizers()
        if spec.name.casefold() not in known:
            raise RunError(f"timm has no optimizer {spec.name!r}", where="train.optimizer", fix=did_you_mean(spec.name, known)) from error
        raise RunError(f"{spec.name} could not be built: {error}", where="train.optimizer") from error
    check_groups(optimizer, module)
    return optimizer


def layer_rates(backbone: nn.Module, decay: float | None) -> dict[str, float] | None:
    """Learning-rate factor per parameter name: 1 at the head, times `decay` for each layer (timm's own count) before it.

    Raises RunError for a backbone that does not say what its layers are.
    """
    if decay is None:
        return None
    if not hasattr(backbone, "group_matcher"):
        raise RunError(
            f"{type(backbone).__name__} does not say what its layers are (timm's models do)",
            where="train.optimizer.layer_decay",
            fix="Leave layer_decay out.",
        )
    layers = group_parameters(backbone, cast(Any, backbone).group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _rate_of(path: str, rates: Mapping[str, float]) -> float:
    """The rate of `path`, or of what stands nearest above it: a pass's parameters live under the region they belong to."""
    if path in rates:
        return rates[path]
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end]) + "."
        near = [rate for name, rate in rates.items() if name.startswith(prefix)]
        if near:
            return max(near)
    return 1.0


def undecayed(backbone: nn.Module) -> frozenset[str]:
    """Parameters the backbone's author keeps from weight decay (timm's `no_weight_decay`)."""
    return frozenset(cast(Any, backbone).no_weight_decay()) if hasattr(backbone, "no_weight_decay") else frozenset()


def check_groups(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """R1: every trainable parameter is in exactly one group, no frozen one in any. Raises RunError naming those that are not."""
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    wrong = []
    for name, parameter in named_parameters(module).items():
        count = counts.pop(id(parameter), 0)
        if count != int(parameter.requires_grad):
            kind = "trainable" if parameter.requires_grad else "frozen"
            wrong.append(f"{name} ({kind}) is in {count} optimizer groups")
    if counts:
        wrong.append(f"{len(counts)} parameters in the optimizer are not the module's")
    if wrong:
        raise RunError("; ".join(wrong[:5]), where="R1")


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """`{"state": {parameter name: its state}, "groups": {group name: its settings}}`, plain values and tensors (not copied)."""
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    packed = optimizer.state_dict()
    state: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for group, saved in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        groups[saved["name"]] = {key: value for key, value in saved.items() if key not in ("params", "name")}
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            if index in packed["state"]:
                state[names[id(parameter)]] = packed["state"][index]
    return {"state": state, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give each parameter the state saved under its name, and each group the settings saved under its own.

    A parameter without saved state starts afresh; saved state without a parameter is dropped.
    """
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    packed = optimizer.state_dict()
    packed["state"] = {}
    for group, entry in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        entry.update(saved["groups"].get(entry["name"], {}))
        for parameter, index in zip(group["params"], entry["params"], strict=True):
            state = saved["state"].get(names[id(parameter)])
            if state is not None:
                packed["state"][index] = state
    optimizer.load_state_dict(packed)


class Schedule:
    """The learning rate as a function of the optimizer steps done so far.

    The schedulers a spec can name are pure functions of that count, so a phase change or a resume needs no saved state: make one over
    the new optimizer and tell it where the run is. (timm's plateau is not: it depends on what came before, and saves none of it.)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, spec: SchedulerSpec, *, lr: float, epochs: int, steps_per_epoch: int) -> None:
        for group in optimizer.param_groups:
            # A group that was carried over brings the rate it had come down to; the schedule starts from the spec's.
            group["lr"] = group["initial_lr"] = lr
        settings = {
            "warmup_epochs": spec.warmup_epochs,
            "warmup_lr": spec.warmup_lr,
            "min_lr": spec.min_lr,
            "decay_epochs": spec.decay_epochs,
            "decay_milestones": list(spec.decay_milestones),
            "decay_rate": spec.decay_rate,
            **spec.arguments,
        }
        self._optimizer = optimizer
        try:
            self._scheduler, _ = create_scheduler_v2(
                optimizer,
                spec.name,
                num_epochs=epochs,
                step_on_epochs=False,
                updates_per_epoch=steps_per_epoch,
                **settings,
            )
        except (TypeError, AssertionError, ValueError) as error:
            raise RunError(f"{spec.name} refused its settings: {error}", where="train.scheduler") from error

    def set_step(self, steps: int) -> float:
        """Set the rate for the step after `steps` finished ones, and return it (without the layers' factors)."""
        self._scheduler.step_update(steps)
        group = self._optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))
