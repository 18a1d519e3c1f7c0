"""timm's optimizers and schedulers, with optimizer state by parameter name.

Tracing and phase changes reorder parameters, so positions identify nothing. The state of a parameter that a phase freezes or removes is
dropped; if the parameter trains again later, it starts with new state.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]  # re-exported without saying so
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor, nn

from graphopt.compiler.learning_rates import LearningRates
from graphopt.compiler.plan import Plan
from graphopt.errors import RunError, did_you_mean
from graphopt.ir.paths import containers, is_below
from graphopt.models.build import classifiers
from graphopt.spec import OptimizerSpec, TrainSpec


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, sorted by name. A tied one has the alphabetically first of its names, in any order of the graph."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in sorted(module.named_parameters(remove_duplicate=False)):
        first.setdefault(parameter, name)
    return {name: parameter for parameter, name in first.items()}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a phase trains, sorted by name."""
    return {name: parameter for name, parameter in named_parameters(module).items() if parameter.requires_grad}


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Elements of all parameters, and of those that train."""
    counts = {"parameters": named_parameters(module), "trainable_parameters": trainable(module)}
    return {kind: sum(p.numel() for p in parameters.values()) for kind, parameters in counts.items()}


def build_optimizer(
    module: nn.Module,
    spec: OptimizerSpec,
    *,
    no_decay: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
    regions: LearningRates | None = None,
    owned: Collection[str] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of timm over the trainable parameters, in named groups; what has one dimension and `no_decay` are not decayed.

    `rates` are from `layer_rates`; `regions` have learning rates of their own, which a `Schedule` sets. Of several processes, one that
    trains the parameters `owned` alone may have none.

    Raises RunError for an unknown optimizer, options that it does not take, or nothing to train.
    """
    groups: dict[str, dict[str, Any]] = {}
    parameters = {path: p for path, p in trainable(module).items() if owned is None or path in owned}
    for path, parameter in parameters.items():
        decays = parameter.ndim > 1 and not path.endswith(".bias") and path not in no_decay
        label = "decay" if decays else "no_decay"
        own: dict[str, Any] = {}
        if rates is not None:
            own["lr_scale"] = _rate_of(path, rates)
            label = f"{label}, lr x {own['lr_scale']:.4g}"
        if regions is not None and (names := regions.names(path)):
            own["regions"] = names
            label = f"{label}, lr of {' and '.join(names)}"
        group = {"params": [], "name": label, "weight_decay": spec.weight_decay if decays else 0.0, **own}
        groups.setdefault(label, group)["params"].append(parameter)
    if owned is not None and not groups:
        groups["decay"] = {"params": [], "name": "decay"}
    if not groups:
        raise RunError("nothing is left to train: every parameter is frozen", fix="Select fewer regions to freeze")
    ordered = [groups[label] for label in sorted(groups)]
    try:
        optimizer = create_optimizer_v2(ordered, opt=spec.name, lr=spec.lr, momentum=spec.momentum, **spec.arguments)
    except Exception as error:  # constructors fail in any way on arguments that nobody has checked
        known = [str(name) for name in list_optimizers()]
        if spec.name.casefold() not in known:
            raise RunError(f"timm has no optimizer {spec.name!r}", where="train.optimizer", fix=did_you_mean(spec.name, known)) from error
        raise RunError(f"{spec.name} could not be built: {error}", where="train.optimizer") from error
    check_groups(optimizer, module, owned)
    return optimizer


def optimizer_of(plan: Plan, spec: OptimizerSpec, owned: Collection[str] | None = None) -> torch.optim.Optimizer:
    """A plan's optimizer in its phase, with the weight decay and the learning rates that its backbone and passes ask for.

    `owned` and errors are as in `build_optimizer`.
    """
    # timm's backbones may exclude parameters from weight decay, too.
    no_decay = plan.no_decay | set(getattr(plan.backbone, "no_weight_decay", set)())
    rates = layer_rates(plan.backbone, spec)
    return build_optimizer(plan.module, spec, no_decay=no_decay, rates=rates, regions=plan.learning_rates, owned=owned)


def layer_rates(backbone: nn.Module, spec: OptimizerSpec) -> dict[str, float] | None:
    """Learning-rate factor per parameter: 1 at the head, times the spec's decay for each layer before it, down to its least factor.

    None without layer decay. Raises RunError for unknown layers.
    """
    if spec.layer_decay is None:
        return None
    if not hasattr(backbone, "group_matcher"):
        what = f"{type(backbone).__name__} does not define its layers (timm's models do)"
        raise RunError(what, where="train.optimizer.layer_decay", fix="Leave layer_decay out")
    layers = group_parameters(backbone, cast(Any, backbone).group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: max(spec.layer_decay_min, spec.layer_decay ** (last - layer)) for name, layer in layers.items()}


def head_parameters(backbone: nn.Module) -> frozenset[str]:
    """Names of the parameters of the classifier: the one that a backbone of timm names, otherwise the last linear layer."""
    heads = classifiers(backbone) or [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1:]
    inside = {id(p) for head in heads for p in head.parameters()}
    return frozenset(name for name, p in named_parameters(backbone).items() if id(p) in inside)


def _rate_of(path: str, rates: Mapping[str, float]) -> float:
    """The rate of a parameter; of one that a pass has added, the highest rate in the innermost module around it that has any."""
    if path in rates:
        return rates[path]
    for container in reversed(list(containers(path))):
        inside = [rate for name, rate in rates.items() if is_below(name, (container,))]
        if inside:
            return max(inside)
    return 1.0


def check_groups(optimizer: torch.optim.Optimizer, module: nn.Module, owned: Collection[str] | None = None) -> None:
    """Raises RunError unless the optimizer holds exactly the trainable parameters, or those of them that are `owned`, each once."""
    counts = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    wrong = []
    for name, parameter in named_parameters(module).items():
        count = counts.pop(id(parameter), 0)
        if count != int(parameter.requires_grad and (owned is None or name in owned)):
            kind = "trainable" if parameter.requires_grad else "frozen"
            wrong.append(f"{name} ({kind}) is in {count} optimizer groups")
    if counts:
        wrong.append(f"{len(counts)} parameters in the optimizer are not the module's")
    if wrong:
        raise RunError("; ".join(wrong[:5]), where="the optimizer's parameter groups")


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """`{"state": {parameter name: its state}, "groups": {group name: its settings}}`, plain values and tensors (no copies).

    A group without a name is known by its place among all of them. Parameters that are not the module's are left out.
    """
    packed, names = optimizer.state_dict(), _names(optimizer, module)
    groups = {n: {k: v for k, v in g.items() if k not in ("params", "name")} for n, g in _groups(packed).items() if g["params"]}
    return {"state": {names[index]: state for index, state in packed["state"].items() if index in names}, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, Any], earlier: Mapping[str, Tensor] | None = None
) -> None:
    """Loads the settings of groups, and the state of parameters that have some, by name; the rest of `saved` is dropped.

    `earlier` are the tensors that `saved` was the state of: a parameter that has another shape by now starts without.
    """
    packed, parameters = optimizer.state_dict(), named_parameters(module)
    for name, group in _groups(packed).items():
        group.update(saved["groups"].get(name, {}))
    other = {name for name, tensor in (earlier or {}).items() if name in parameters and tensor.shape != parameters[name].shape}
    kept = saved["state"].keys() - other
    packed["state"] = {i: saved["state"][name] for i, name in _names(optimizer, module).items() if name in kept}
    optimizer.load_state_dict(packed)


def _groups(packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of an optimizer's state dict by name; without one, by their place and number, so that other groupings do not match."""
    groups = packed["param_groups"]
    return {group.get("name", f"{i} of {len(groups)}"): group for i, group in enumerate(groups)}


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, str]:
    """The name of each parameter by its position in the optimizer's state dict."""
    names = {parameter: name for name, parameter in named_parameters(module).items()}
    held = enumerate(p for group in optimizer.param_groups for p in group["params"])
    return {index: names[p] for index, p in held if p in names}


class Schedule:
    """The learning rates as a function of the optimizer steps done so far, and of nothing else; so there is no state to save.

    A group with `regions` has the rate that passes set for them, every other one that of timm's schedule: in each step, or
    (`on_updates = false`) in each epoch. (timm's plateau is not available: it depends on earlier metrics, and saves none of them.)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, train: TrainSpec, steps: int, regions: LearningRates | None = None) -> None:
        """`steps` are of an epoch; `regions` those that `optimizer` was built with."""
        spec, self._base = train.scheduler, train.optimizer.lr
        settings = {**spec.model_dump(exclude={"name", "arguments", "epochs", "on_updates"}), **spec.arguments}
        settings |= {"num_epochs": spec.epochs or train.epochs, "step_on_epochs": not spec.on_updates, "updates_per_epoch": steps}
        settings["decay_milestones"] = list(spec.decay_milestones)
        self._per_epoch = 0 if spec.on_updates else steps
        self._optimizer, self._steps, self._regions = optimizer, train.epochs * steps, regions or LearningRates()
        # timm's scheduler sets the rate of an optimizer; this one has nothing else to do.
        self._run = torch.optim.SGD([torch.zeros(())], lr=self._base)
        try:
            self._scheduler, _ = create_scheduler_v2(self._run, spec.name, **settings)
        except Exception as error:
            raise RunError(f"timm refused the settings of {spec.name}: {error}", where="train.scheduler") from error
        for group in optimizer.param_groups:
            # A group loaded from the phase before has the rate reached there; the schedule starts from the spec's.
            group["lr"] = group["initial_lr"] = self._base

    def set_step(self, steps: int) -> float:
        """Sets the rates for the step after `steps` finished ones; returns the run's own, without factors of layers and regions."""
        rate = self._at(steps)
        for group in self._optimizer.param_groups:
            own = rate
            if names := group.get("regions"):
                own = self._base * self._regions.factor(names, steps / self._steps, self._share)
                _check_rate(own, f"the learning rate of {' and '.join(names)} at step {steps}", "pass")
            group["lr"] = own * group.get("lr_scale", 1.0)
        return rate

    def _share(self, time: float) -> float:
        """The run's own rate after a share of the run, as a factor of the base rate."""
        return self._at(time * self._steps) / self._base

    def _at(self, steps: float) -> float:
        """The run's own rate after `steps`."""
        try:
            if self._per_epoch:
                self._scheduler.step(int(steps // self._per_epoch))
            else:
                self._scheduler.step_update(cast(int, steps))  # between two steps, too
        except Exception as error:
            what = f"timm's scheduler fails at step {steps:g} with these settings: {error}"
            raise RunError(what, where="train.scheduler", fix="Check train.scheduler.arguments") from error
        return _check_rate(float(self._run.param_groups[0]["lr"]), f"the learning rate of step {steps:g}", "train.scheduler")


def _check_rate(rate: float, what: str, where: str) -> float:
    if not math.isfinite(rate):
        raise RunError(f"{what} is {rate}", where=where, fix="Check its settings")
    return rate
