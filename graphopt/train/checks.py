"""Invariants checked at the start and the end of every phase."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from graphopt.errors import RunError
from graphopt.train.hashing import fingerprint
from graphopt.train.optimizer import named_parameters

_SHOWN = 5


def gradients_finite(module: nn.Module) -> bool:
    """Whether no parameter has a gradient with NaN or infinity in it."""
    return all(bool(torch.isfinite(p.grad).all()) for p in module.parameters() if p.grad is not None)


def check_gradients(module: nn.Module, unused: Collection[str] = ()) -> None:
    """Raises RunError unless, after a phase's first backward pass, trainable parameters have finite gradients and frozen ones none.

    Args:
        unused: parameters that the forward never reads.
    """
    missing, broken, extra = [], [], []
    for name, parameter in named_parameters(module).items():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                extra.append(name)
        elif parameter.grad is None:
            if name not in unused:
                missing.append(name)
        elif not bool(torch.isfinite(parameter.grad).all()):
            broken.append(name)
    messages = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("trainable but without a gradient", missing),
            ("gradient not finite", broken),
            ("frozen but with a gradient", extra),
        )
        if names
    ]
    if messages:
        fix = "Lower train.optimizer.lr, or check the data" if broken and not missing and not extra else None
        raise RunError("; ".join(messages), where="first step of the phase", fix=fix)


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters, and the buffers of modules whose own parameters are all frozen (a frozen norm's statistics)."""
    found: dict[str, Tensor] = {name: p for name, p in named_parameters(module).items() if not p.requires_grad}
    for path, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            prefix = f"{path}." if path else ""
            found |= {prefix + name: buffer for name, buffer in part.named_buffers(recurse=False)}
    return found


def fingerprints(module: nn.Module) -> dict[str, str]:
    """A hash of the bits of each frozen tensor."""
    return {name: fingerprint(tensor) for name, tensor in frozen_tensors(module).items()}


def check_frozen(module: nn.Module, before: Mapping[str, str]) -> None:
    """Raises RunError unless, at a phase's end, every tensor that was frozen at its start is bit for bit the same."""
    now = fingerprints(module)
    changed = [name for name, old in before.items() if now.get(name) != old]
    if changed:
        raise RunError(f"frozen, but changed during the phase: {_listed(changed)}", where="end of the phase")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
