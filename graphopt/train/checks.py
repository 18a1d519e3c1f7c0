"""Invariants checked at the start and the end of every phase."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import RunError, listed
from graphopt.hashing import raw_bytes
from graphopt.runtime.shards import local, whole
from graphopt.train.optimizer import named_parameters


def check_gradients(parameters: Mapping[str, nn.Parameter], unused: Collection[str] = ()) -> None:
    """Raises RunError unless, after a backward pass, frozen parameters have no gradient and others (but for unused ones) a finite one."""
    trained = {name: p.grad for name, p in parameters.items() if p.requires_grad}
    missing = [name for name, gradient in trained.items() if gradient is None and name not in unused]
    broken = [name for name, gradient in trained.items() if gradient is not None and not torch.isfinite(local(gradient)).all()]
    extra = [name for name, p in parameters.items() if not p.requires_grad and p.grad is not None]
    found = {"trainable but without a gradient": missing, "gradient not finite": broken, "frozen but with a gradient": extra}
    messages = [f"{what}: {listed(names)}" for what, names in found.items() if names]
    if messages:
        fix = "Lower train.optimizer.lr, or check the data" if broken and not missing and not extra else None
        raise RunError("; ".join(messages), where="first step of the phase", fix=fix)


def fingerprints(module: nn.Module) -> dict[str, str]:
    """A hash of the bits of each frozen parameter, and of each buffer of modules whose own parameters are all frozen (statistics)."""
    frozen: dict[str, Tensor] = {name: p for name, p in named_parameters(module).items() if not p.requires_grad}
    for path, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            frozen |= part.named_buffers(prefix=path, recurse=False)
    return {name: hashlib.blake2b(raw_bytes(whole(tensor).cpu()), digest_size=16).hexdigest() for name, tensor in frozen.items()}


def check_frozen(module: nn.Module, before: Mapping[str, str]) -> None:
    """Raises RunError unless, at a phase's end, every tensor that was frozen at its start is bit for bit the same."""
    now = fingerprints(module)
    changed = [name for name, old in before.items() if now.get(name) != old]
    if changed:
        raise RunError(f"frozen, but changed during the phase: {listed(changed)}", where="end of the phase")


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the tensors with NaN or infinity in them."""
    return [name for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point() and not bool(local(t).isfinite().all())]
