"""Every rank holds a part of each parameter, its gradient and its optimizer state (FSDP2, torch's `fully_shard`).

What is gathered together, `graphopt.compiler.units` says. A section whose backward runs inside its forward is a root of its own. Parameters
without a dimension to shard are held by every rank, and their gradients are averaged in the order of their names.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from timm.utils import dispatch_clip_grad  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from graphopt.compiler.plan import Plan
from graphopt.compiler.units import Units, units_of
from graphopt.errors import RunError
from graphopt.ir.blocks import find_blocks
from graphopt.runtime.shards import is_sharded, local, whole
from graphopt.spec import FsdpSpec, TrainSpec
from graphopt.train.optimizer import named_parameters
from graphopt.train.strategy import Strategy

#: optimizers that take the same steps on parts of parameters as on whole ones, and whose state has a parameter's shape
_KNOWN = (
    "adabelief adadelta adagrad adam adamax adamc adamw adamwlegacy adan adanw adopt adoptc adoptw lamb lambw laprop larc lars lion lionc",
    "madgrad madgradw momentum nadam nadamc nadamw nesterov nlarc nlars radam radamw rmsprop rmsproptf sgd sgdc sgdw",
)
OPTIMIZERS = frozenset(name for names in _KNOWN for name in names.split())


@dataclass
class Sharded(Strategy):
    """Parameters in parts, gathered for as long as they are computed with."""

    options: FsdpSpec = field(default_factory=FsdpSpec)
    _mesh: DeviceMesh | None = field(default=None, init=False, repr=False)
    _replicated: list[nn.Parameter] = field(default_factory=list, init=False, repr=False)  # sorted by name

    @classmethod
    def of(cls, spec: TrainSpec) -> Self:
        """Raises RunError for settings that this strategy cannot train with."""
        _refuse(spec)
        strategy = super().of(spec)
        strategy.options = spec.fsdp
        return strategy

    def check(self, plan: Plan) -> None:
        """Raises RunError for a plan that the settings do not fit."""
        if self.options.precision is not None and plan.needs.targets:
            what = "train.fsdp.precision computes local losses in half precision, where their heads need float32"
            raise RunError(what, where="train.fsdp.precision", fix='Leave it out, and use amp = "bfloat16"')

    def to_device(self, module: nn.Module) -> None:
        """Moves a module to the device; the memory format is the images' alone, because parts of parameters have none."""
        module.to(self.device)

    def wrap(self, module: nn.Module, plan: Plan, unused: Sequence[str] = ()) -> nn.Module:
        self.check(plan)
        emitted = getattr(module, "suffix", module)
        units = units_of(emitted, [block.paths for block in find_blocks(plan.graph)])
        names = named_parameters(emitted)
        self._replicated = [names[name] for name in units.replicated if name in names and names[name].requires_grad]
        self._shard(module, emitted, units)
        return module

    @property
    def shard(self) -> Callable[[Tensor, Sequence[int]], Tensor] | None:
        return self._from_rows if self.ranks.count > 1 else None

    def _from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._known_mesh(), [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)

    def _known_mesh(self) -> DeviceMesh:
        self._mesh = self._mesh or init_device_mesh(self.device.type, (self.ranks.count,))
        return self._mesh

    def evaluated(self, wrapped: nn.Module, plan: Plan) -> nn.Module:
        # Only the module that was wrapped has its parameters gathered: behind a cut, that is what follows the prefix.
        return nn.Sequential(plan.prefix, wrapped) if hasattr(wrapped, "suffix") else plan.module

    def wrap_average(self, module: nn.Module, plan: Plan) -> None:
        self._shard(module, module, units_of(module, [block.paths for block in find_blocks(plan.graph)]))

    def _shard(self, root: nn.Module, module: nn.Module, units: Units) -> None:
        """Shards the parameters of `module` in place; `root` is what a step calls, `module` itself or one around it."""
        mesh = self._known_mesh()
        by_name = dict(module.named_parameters(remove_duplicate=False))
        apart = {by_name[name] for name in (*units.replicated, *units.unused)}
        at_root = {by_name[name] for name in units.root}
        precision = getattr(torch, self.options.precision) if self.options.precision is not None else None
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(precision, torch.float32 if precision else None)}
        if self.options.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        # FSDP's hook on a view is lost when something writes into the view; it warns of every view.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for path in units.overwritten:
            module.get_submodule(path).register_forward_hook(_without_view)
        inside: set[nn.Parameter] = set()
        for section in units.sections:
            part: Any = module.get_submodule(section.path)
            stage = _Gathered(part.parts())
            inside |= set(stage.parameters()) - at_root - apart
            fully_shard(stage, ignored_params=at_root | apart, reshard_after_forward=True, **options)
            part.gather_by(stage)
            inside |= set(stage.parameters()) - at_root - apart
        groups: list[Any] = []
        for paths in units.blocks:
            leaves = [module.get_submodule(path) for path in paths]
            groups.append(
                fully_shard(leaves if len(leaves) > 1 else leaves[0], ignored_params=apart, reshard_after_forward=True, **options)
            )
        fully_shard(root, ignored_params=apart | inside, reshard_after_forward=True, **options)
        if self.options.prefetch:
            states = [group[0] if isinstance(group, list) else group for group in groups]
            for number, state in enumerate(states):
                state.set_modules_to_forward_prefetch(states[number + 1 : number + 1 + self.options.prefetch])

    @contextmanager
    def _apart(self, module: nn.Module) -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        return self._apart(module)

    def after_backward(self) -> None:
        """Averages the gradients of parameters that every rank holds, in one message per dtype, in the order of their names."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._replicated:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            together = torch.stack([g.reshape(()) for g in gradients])
            distributed.all_reduce(together)
            for gradient, value in zip(gradients, (together / self.ranks.count).unbind(), strict=True):
                gradient.copy_(value)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, mode: str) -> None:
        """Clips by the norm over all ranks' parts. The other modes look at elements, or (agc) at rows and at whole vectors."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if mode != "norm":
            pairs = [(p, _whole_units(p)) for p in parameters]
            dispatch_clip_grad([unit for _, unit in pairs], limit, mode=mode)
            for parameter, unit in pairs:
                if is_sharded(parameter) and parameter.ndim == 1:
                    _gradient(parameter).copy_(local(_like(unit.grad, parameter)))
            return
        parts = [local(g) for g in gradients if is_sharded(g)]
        total = _square(parts, self.device)
        distributed.all_reduce(total)
        norm = (total + _square([g for g in gradients if not is_sharded(g)], self.device)).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for gradient in (local(g) for g in gradients):
            gradient.mul_(factor.to(gradient.device, gradient.dtype))

    def to_shards(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Optimizer state by name, in which tensors of a parameter's shape become sharded like it."""
        found = {name: {key: _like(value, parameters.get(name)) for key, value in of.items()} for name, of in state["state"].items()}
        return {"state": found, "groups": state["groups"]}

    def describe(self) -> str:
        return f"{super().describe()}, {self.ranks.count} ranks (fsdp)"


def _without_view(_leaf: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: a view of another tensor becomes a tensor of its own."""
    return output.clone() if isinstance(output, Tensor) and output._base is not None else None


class _Gathered(nn.Module):
    """Owns the modules that a section runs, so that FSDP has one module to hook: calls any function with their parameters gathered."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _whole_units(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with its gradient as adaptive clipping needs them: this rank's rows, or the whole of one dimension."""
    if not is_sharded(parameter):
        return parameter
    part = local if parameter.ndim > 1 else whole
    unit = nn.Parameter(part(parameter.detach()))
    unit.grad = part(parameter.grad) if parameter.grad is not None else None
    return unit


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient."""
    assert parameter.grad is not None
    return local(parameter.grad)


def _square(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of all elements' squares, as a scalar in float64."""
    squares = [t.double().square().sum().to(device) for t in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _like(value: Any, parameter: nn.Parameter | None) -> Any:
    """A tensor, whole or sharded by rows, sharded like a parameter of its shape; each rank takes its part, without communication."""
    if parameter is None or not is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    sharded: Any = parameter
    device = local(parameter).device
    if is_sharded(value):
        mesh, placements = sharded.device_mesh, sharded.placements
        rows = local(value).to(device)
        return DTensor.from_local(rows, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return distribute_tensor(value.to(device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _refuse(spec: TrainSpec) -> None:
    """Raises RunError for settings that do not go with sharded parameters."""
    name, where = spec.optimizer.name.casefold(), "train.strategy"
    if spec.amp == "float16":
        what = "fsdp does not train in float16: a part of the gradients could overflow on one rank only, and ranks would step apart"
        raise RunError(what, where=where, fix='Use amp = "bfloat16", or strategy = "ddp"')
    if spec.compile:
        raise RunError("fsdp does not compile steps: its hooks are no part of a graph", where=where, fix='Use strategy = "ddp"')
    if name not in OPTIMIZERS:
        what = f"{name} is not known to take the same steps on parts of parameters as on whole ones"
        raise RunError(what, where="train.optimizer", fix=f'Use strategy = "ddp", or {", ".join(sorted(OPTIMIZERS)[:-1])} or sgdw')
