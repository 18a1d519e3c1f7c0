"""A gradient-isolated module whose backward runs right after its forward, delivered later by one outer `backward()`.

How it works. In training the whole module, with its auxiliary head and decoder, runs inside one `autograd.Function`: its *forward*
records the body on detached inputs, takes the gradient of the local loss for the module's parameters with `torch.autograd.grad`, keeps
those gradients, and lets go of everything else, so that no activation outlives the module. It returns the output, through which no
gradient flows, and the loss. Its *backward* returns the kept gradients times the loss's incoming gradient. So
`(criterion + local_loss).backward()` delivers all gradients at once: DDP's hooks fire, a `GradScaler`'s factor passes through, and
accumulation adds up as ever.

Parameters of the body are inputs of the Function; tensors that the graph reads itself (class tokens, mixed weights) arrive as inputs of the
body. Where one parameter serves two modules, autograd adds up what each sends.

float16: a gradient taken inside the forward has not been scaled by the caller's `GradScaler` yet and would underflow. So under float16
autocast the local loss is scaled here by a power of two of its own, which follows `GradScaler`'s rule (halved after an overflow,
doubled after 2000 clean steps), and the kept gradients, float32, are scaled back. An overflow still reaches the caller's scaler, which
then skips the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.errors import PassError, RunError
from graphopt.passes.supervise.auxiliary import Auxiliary
from graphopt.runtime.body import Body

#: key of a node's meta: the boundary it is
BOUNDARY = "boundary"
#: the largest block whose release lets glibc keep more (its DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB), less what lies around a block
LARGEST_BLOCK = 2**25 - 2**16
#: clean steps after which the float16 scale is doubled; `GradScaler`'s
GROWTH_INTERVAL = 2000


class LocalModule(nn.Module):
    """Runs a section as a locally supervised module: `(target, *inputs) -> (output, local_loss)`; the loss is None in eval mode.

    Args:
        body: the section's graph; takes activations, then tensors that the root reads for it.
        auxiliary: head and decoder; registered at the root, not here.
        entry, leave: names of the boundaries that the module starts and ends at, as `meta[BOUNDARY]` of nodes has them.
        trains: whether anything of the body trains. If not (it was frozen), the body runs without recording and has no loss.

    With an auxiliary part that rebuilds the image, the call is `(target, image, *inputs)`.

    Attributes:
        entry: which of the body's inputs is the module's; leave: which of its outputs is the module's, None where it has but one.
    """

    entry: int | None
    leave: int | None

    def __init__(self, body: fx.GraphModule, auxiliary: Auxiliary, entry: str, leave: str, *, trains: bool = True) -> None:
        super().__init__()
        self.body, self.auxiliary, self.trains = Body(body), Body(auxiliary), trains
        output = next(n for n in body.graph.nodes if n.op == "output").args[0]
        self.entry = self.leave = None
        for number, node in enumerate(n for n in body.graph.nodes if n.op == "placeholder"):
            if node.meta.get(BOUNDARY) == entry:
                self.entry = number
        if isinstance(output, tuple):
            self.leave = next(i for i, n in enumerate(output) if n.meta.get(BOUNDARY) == leave)
        if trains and self.entry is None and auxiliary.decoder is not None and not auxiliary.rebuilds_image:
            raise PassError(
                "another pass took away the input of a locally supervised module, which its decoder rebuilds",
                where="pass supervise",
                fix='Let it end where a module does, or use decoder = "none"',
            )
        self._options: dict[str, Any] | None = None
        self._compiled: Callable[..., Any] | None = None

    def forward(self, target: Tensor | None, *inputs: Any) -> tuple[Any, Tensor | None]:
        image: Tensor | None = None
        if self.auxiliary.module.rebuilds_image:
            image, *rest = inputs
            inputs = tuple(rest)
        if not self.training:
            return self.body(*inputs), None
        if not self.trains or not torch.is_grad_enabled():
            with torch.no_grad():
                output = self.body(*inputs)
            # float32 as a loss is, and on the output's device.
            return output, torch.zeros((), device=self._main(output).device)
        return self._train(target, image, inputs)

    @torch.compiler.disable
    def _train(self, target: Tensor | None, image: Tensor | None, inputs: tuple[Any, ...]) -> tuple[Any, Tensor]:
        _keep_freed_memory()
        parameters = [p for p in (*self.body.parameters(), *self.auxiliary.parameters()) if p.requires_grad]
        result = _Stage.apply(self, target, image, len(inputs), *inputs, *parameters)
        loss, *outputs = result
        return (tuple(outputs) if self.leave is not None else outputs[0]), loss

    def stage(self, turn: int, target: Tensor | None, image: Tensor | None, *inputs: Any) -> tuple[Any, Tensor]:
        """The module's output and its local loss, recorded; what `_Stage` differentiates and `compile` compiles."""
        auxiliary: Auxiliary = self.auxiliary.module
        output = self.body(*inputs)
        h = self._main(output)
        x = image if auxiliary.rebuilds_image else inputs[self.entry] if self.entry is not None else None
        return output, auxiliary(h, x, auxiliary.demand(target, len(h)), turn)

    def _main(self, output: Any) -> Tensor:
        return output[self.leave] if self.leave is not None else output

    # -- torch.compile ------------------------------------------------------------------------------------------------------
    def compile_stage(self, **options: Any) -> None:
        """Compiles the module's own forward, head and decoder with `torch.compile(..., **options)`; a deep copy compiles anew."""
        self._options, self._compiled = options, None

    def run_stage(self, *arguments: Any) -> tuple[Any, Tensor]:
        if self._options is None:
            return self.stage(*arguments)
        if self._compiled is None:
            self._compiled = torch.compile(self.stage, **self._options)
        return self._compiled(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc keep 64 MiB of what a module frees for the next one, on a CPU, instead of giving it back and asking again.

    The pages of each module's activations would be mapped and cleared anew in every module, a tenth of a step. When glibc frees a block
    that it had mapped by itself, it raises what it keeps to twice that block; this is the largest it heeds (mallopt(3), M_MMAP_THRESHOLD).
    Who set those limits himself has his way. The block is never touched, and once per process is enough.
    """
    bytes(LARGEST_BLOCK)


def compile_modules(module: nn.Module, **options: Any) -> int:
    """Compiles every locally supervised module of an emitted module on its own; returns how many.

    `torch.compile` of the whole emitted module works too; it runs the local modules, whose backward is inside their forward, uncompiled
    unless this was called.
    """
    found = [m for m in module.modules() if isinstance(m, LocalModule)]
    for local in found:
        local.compile_stage(**options)
    return len(found)


class _Stage(torch.autograd.Function):
    """Forward and backward of one module in one go; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, module: LocalModule, target: Tensor | None, image: Tensor | None, count: int, *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            # Each input stands for itself: a weight that is a parameter of the body too gets two gradients, which autograd adds up.
            inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in tensors[:count]]
            auxiliary: Auxiliary = module.auxiliary.module
            output, loss = module.run_stage(auxiliary.turn, target, image, *inputs)
            auxiliary.turn += 1
            wanted = [(i, t) for i, t in enumerate((*inputs, *tensors[count:])) if isinstance(t, Tensor) and t.requires_grad]
            half = _float16(loss.device.type)
            scale = auxiliary.scale
            found = torch.autograd.grad(loss * scale if half else loss, [t for _, t in wanted], allow_unused=True)
        kept = [(i, g) for (i, _), g in zip(wanted, found, strict=True) if g is not None]
        if half:
            _unscale([g for _, g in kept], auxiliary)
        # Not by save_for_backward: what autograd holds on to it cannot hand over, and every gradient would be copied.
        ctx.kept, ctx.total = kept, len(tensors)
        outputs = tuple(o.detach() if isinstance(o, Tensor) else o for o in (output if module.leave is not None else (output,)))
        ctx.mark_non_differentiable(*(o for o in outputs if isinstance(o, Tensor)))
        return (loss.detach(), *outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor | None, *_: Any) -> Any:
        gradients: list[Tensor | None] = [None] * ctx.total
        kept = ctx.kept
        if kept is None:
            raise RunError(
                "a second backward through a local loss whose gradients were delivered already",
                where="supervise",
                fix="Call backward(retain_graph=True) the first time",
            )
        if incoming is not None and kept:
            found = [g for _, g in kept]
            if _graph_is_kept():
                found = list(torch._foreach_mul(found, incoming))
            else:
                ctx.kept = None
                if not _is_one(incoming):
                    torch._foreach_mul_(found, incoming)
            for (place, _), gradient in zip(kept, found, strict=True):
                gradients[place] = gradient
        return (None, None, None, None, *gradients)


def _is_one(factor: Tensor) -> bool:
    """What a plain loop sends. Not asked of a device, which would have to be waited for, nor of a fake tensor, which has no value."""
    return factor.device.type == "cpu" and type(factor) is Tensor and factor.item() == 1.0


def _graph_is_kept() -> bool:
    """Whether the backward that runs now was called with `retain_graph`."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())  # type: ignore[attr-defined]


def _float16(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


@torch.no_grad()
def _unscale(gradients: list[Tensor], auxiliary: Auxiliary) -> None:
    """Divides by the scale in place, and moves the scale, without asking the device for a value."""
    if not gradients:
        return
    torch._foreach_mul_(gradients, 1.0 / auxiliary.scale)
    largest = torch.stack(torch._foreach_norm(gradients, float("inf"))).max()
    overflow = ~largest.isfinite()
    auxiliary.clean.copy_(torch.where(overflow, 0, auxiliary.clean + 1))
    grow = auxiliary.clean >= GROWTH_INTERVAL
    auxiliary.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
    auxiliary.clean.mul_(~grow)
