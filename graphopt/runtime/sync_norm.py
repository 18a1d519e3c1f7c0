"""Batch norms whose statistics are those of all ranks' samples, as if one process had the whole batch.

On GPUs they are torch's and timm's own, which refuse the CPU; `SyncNorm` is there for it. Norms change their class in place, so that
whatever calls them (the network's root, a section's body, a mix of weights) calls the synchronized one, and state-dict keys, parameters
and buffers stay what they are. A norm that a pass has frozen has another class, and is left alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.errors import RunError
from graphopt.runtime.body import bodies
from graphopt.runtime.by_mode import ByMode
from graphopt.runtime.loaded import loaded


class _Sum(torch.autograd.Function):
    """The sum of a tensor over ranks; so is its gradient."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    distributed.all_reduce(total)
    return total


class SyncNorm(_BatchNorm):
    """A batch norm over all ranks' samples, on the CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """`input` is (N, C, ...), of any dtype; N may differ by rank. All ranks have to call it in training."""
        together = self.training and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        return self._over_ranks(input) if together and not isinstance(input, FakeTensor) else super().forward(input)

    def _over_ranks(self, input: Tensor) -> Tensor:
        x = input if input.dtype == torch.float64 else input.float()
        shape, others = (1, -1, *(1,) * (x.ndim - 2)), [0, *range(2, x.ndim)]
        sums = _Sum.apply(torch.cat([x.sum(others), x.new_full((1,), x.numel() / x.shape[1])]))
        count = float(sums[-1].detach())
        centred = x - (mean := sums[:-1] / count).view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / count
        if self.running_mean is not None:
            self._move(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        output = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncNormAct(SyncNorm):
    """The same with an activation, as timm's `BatchNormAct2d`."""

    act: Any
    drop: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def synchronize(module: nn.Module, device: torch.device) -> int:
    """Makes every batch norm that trains in an emitted module synchronized, in place. Returns how many.

    Raises RunError, before anything changes, for one that cannot: a function call, or a class with a forward of its own.
    """
    forms: dict[type[nn.Module], type[nn.Module]] = dict.fromkeys(_PLAIN, SyncNorm if device.type == "cpu" else nn.SyncBatchNorm)
    for norm in _with_activation():
        forms[norm] = SyncNormAct if device.type == "cpu" else _with_activation()[-1]
    named = {id(m): name for name, m in module.named_modules()}
    found = list({id(m): m for m in _everything(module)}.values())
    for part in found:
        if why := _unknown(part):
            name = named.get(id(part)) or type(part).__name__
            raise RunError(f"{name} {why}", where="train.sync_norm", fix="Leave sync_norm out, or use torch's or timm's batch norms")
    chosen = [part for part in found if type(part) in forms]
    for part in chosen:
        part.__class__ = forms[type(part)]
        part.__dict__["process_group"] = None  # all ranks
    return len(chosen)


def _with_activation() -> tuple[type[nn.Module], ...]:
    """Timm's norms with an activation, the synchronized one last; empty where nobody has imported timm."""
    return loaded("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct")


def _everything(module: nn.Module) -> Iterator[nn.Module]:
    """All modules that run: registered ones, those in sections' bodies, and leaves that another module holds without registering them."""
    for graph in (module, *(body for _, body in bodies(module))):
        for part in graph.modules():
            yield part
            yield from (held for held in vars(part).values() if isinstance(held, nn.Module))


def _unknown(part: nn.Module) -> str | None:
    if isinstance(part, ByMode) and part.function is F.batch_norm:
        return "calls batch_norm as a function, which cannot be synchronized"
    if isinstance(part, fx.GraphModule) and any(n.target is F.batch_norm and _by_batch(n) for n in part.graph.nodes):
        return "calls batch_norm as a function, which cannot be synchronized"
    known = type(part) in (*_PLAIN, *_with_activation(), SyncNorm, SyncNormAct)
    # Frozen forms of norms are batch norms, too; none of their parameters trains.
    if isinstance(part, _BatchNorm) and not known and any(p.requires_grad for p in part.parameters(recurse=False)):
        return f"is a {type(part).__name__}, which cannot be synchronized"
    return None


def _by_batch(node: fx.Node) -> bool:
    """Whether a call of `F.batch_norm(input, running_mean, running_var, weight, bias, training, ...)` normalises by its batch."""
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    return training is not False
