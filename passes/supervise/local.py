"""A gradient-isolated module whose backward runs right after its forward; one outer `backward()` delivers its gradients later.

In training the whole module, with its auxiliary head and decoder, runs inside one `autograd.Function`. Its *forward* records the body on
detached inputs, takes the gradient of the local loss for the module's parameters with `torch.autograd.grad`, stores those gradients, and
releases everything else, so that no activation outlives the module. It returns the output, through which no gradient flows, and the loss.
Its *backward* returns the stored gradients times the loss's incoming gradient. So `(criterion + local_loss).backward()` delivers all
gradients at once: DDP's hooks fire, a `GradScaler`'s factor is applied, and gradients accumulate as usual.

Parameters of the body are inputs of the Function; tensors that the graph reads itself (class tokens, mixed weights) are inputs of the body.
If one parameter is used by two modules, autograd adds their gradients.

float16: a gradient taken inside the forward is not scaled by the caller's `GradScaler` yet and would underflow. So under float16 autocast
the local loss is scaled here by a power of two of its own, which follows `GradScaler`'s rule (halved after an overflow, doubled after 2000
steps without one), and the stored gradients, float32, are scaled back. An overflow still reaches the caller's scaler, which then skips the
step.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt import Graph, PassError, RunError
from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.nodes import activations, trainable
from graphopt.passes.supervise.ahead import LookaheadBlocks
from graphopt.passes.supervise.auxiliary import Auxiliary
from graphopt.runtime.body import Body, LocalBackward
from graphopt.runtime.compiled import outside
from graphopt.runtime.randomness import begin_stream
from graphopt.runtime.shards import local

#: key of a node's meta: the name of the boundary that it is
BOUNDARY = "boundary"
#: the boundary that the first module starts at
INPUT = "input"
#: the largest block whose release raises glibc's limits (its DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB), less the overhead of a block
LARGEST_BLOCK = 2**25 - 2**16
#: steps without overflow after which the float16 scale is doubled; `GradScaler`'s
GROWTH_INTERVAL = 2000


class LocalModule(LocalBackward):
    """Runs a section as a locally supervised module: `(target, *inputs) -> (output, local_loss)`; the loss is None in eval mode.

    Args:
        body: the section's graph; takes activations, then tensors that the root reads for it.
        auxiliary: head and decoder; registered at the root, not here.
        start, end: names of the boundaries that the module starts and ends at, as `meta[BOUNDARY]` of nodes has them.
        number: among the network's modules, from 0; in a training loop that seeds forwards, each draws from its own random stream.
        trains: whether anything in the body trains. If not (it was frozen), the body runs without recording and has no loss.

    If the auxiliary part rebuilds the image, the call is `(target, image, *inputs)`.

    Attributes:
        input: which of the body's inputs is the module's. output: which of its outputs is the module's; None where it has only one.
    """

    def __init__(self, body: fx.GraphModule, auxiliary: Auxiliary, start: str, end: str, number: int, *, trains: bool = True) -> None:
        super().__init__()
        self.body, self.auxiliary, self.number, self.trains = Body(body), Body(auxiliary), number, trains
        inputs = body.graph.find_nodes(op="placeholder")
        self.input = next((i for i, n in enumerate(inputs) if n.meta.get(BOUNDARY) == start), None)
        (result,) = body.graph.output_node().args
        self.output = next(i for i, n in enumerate(result) if n.meta.get(BOUNDARY) == end) if isinstance(result, tuple) else None
        if trains and self.input is None and auxiliary.decoder is not None and not auxiliary.rebuilds_image:
            what = "another pass removed the input of a locally supervised module, which its decoder rebuilds"
            raise PassError(what, where="supervise", fix='Let that pass end where a module does, or use decoder = "none"')
        self._options: dict[str, Any] | None = None
        self._compiled: dict[str, Callable[..., Any]] = {}

    @property
    def _lookahead(self) -> LookaheadBlocks | None:
        """What follows weights of the next module, if this one has a loss that needs it."""
        return cast(Auxiliary, self.auxiliary.module).lookahead if self.trains else None

    def followed(self) -> Sequence[nn.Parameter]:
        """The weights of the next module whose running means the look-ahead has."""
        return self._lookahead.followed() if self._lookahead is not None else ()

    def follow_later(self, later: bool) -> None:
        """Whether the means wait for `catch_up`."""
        if self._lookahead is not None:
            self._lookahead.later = later

    def catch_up(self) -> None:
        """Moves the running means, if a forward has left that to do."""
        if self._lookahead is not None:
            self._lookahead.catch_up()

    def parts(self) -> tuple[nn.Module, ...]:
        """The body, and the head and decoder."""
        return self.body.module, self.auxiliary.module

    def forward(self, target: Tensor | None, *inputs: Any) -> tuple[Any, Tensor | None]:
        """The output and the local loss: None in eval mode, 0 where nothing is recorded."""
        image: Tensor | None = None
        if self.auxiliary.module.rebuilds_image:
            image, *rest = inputs
            inputs = tuple(rest)
        if not self.training:
            return self.run(self.body, *inputs), None
        if torch.compiler.is_compiling():
            return _isolated_apart(self, target, image, inputs)
        return self._isolated(target, image, inputs)

    def _isolated(
        self, target: Tensor | None, image: Tensor | None, inputs: tuple[Any, ...], *, compiling: bool = False
    ) -> tuple[Any, Tensor]:
        begin_stream(self.number)
        try:
            if self.trains and torch.is_grad_enabled():
                return self._train(self._callable(self.stage, compiling), target, image, inputs)
            with torch.no_grad():
                output = self.run(self._callable(self.body.module.forward, compiling), *inputs)
            # float32, as a loss is, and on the output's device.
            return output, torch.zeros((), device=self._main(output).device)
        finally:
            begin_stream(self.number + 1)  # of the next module, or of the last, which is no local one

    def _train(self, stage: Callable[..., Any], target: Tensor | None, image: Tensor | None, inputs: tuple[Any, ...]) -> tuple[Any, Tensor]:
        _raise_allocator_limits()
        parameters = [p for p in (*self.body.parameters(), *self.auxiliary.parameters()) if p.requires_grad]
        loss, *outputs = _Stage.apply(self, stage, target, image, len(inputs), *inputs, *parameters)
        return (tuple(outputs) if self.output is not None else outputs[0]), loss

    def stage(self, step: Tensor, target: Tensor | None, image: Tensor | None, *inputs: Any) -> tuple[Any, Tensor]:
        """The module's output and its local loss, recorded; what `_Stage` differentiates and `torch.compile` compiles.

        `step` has no elements; its length is the step's number plus 2. torch.compile takes a number, and a length of 0 or 1, as a constant.
        """
        auxiliary: Any = self.auxiliary.module
        output = self.body(*inputs)
        h = self._main(output)
        x = image if auxiliary.rebuilds_image else inputs[self.input] if self.input is not None else None
        return output, auxiliary(h, x, auxiliary.validated_target(target, len(h)), len(step) - 2)

    def _main(self, output: Any) -> Tensor:
        return output[self.output] if self.output is not None else output

    def compile_stage(self, **options: Any) -> None:
        """Compiles the module's own forward, head and decoder with `torch.compile(..., **options)`; a deep copy compiles again."""
        self._options, self._compiled = options, {}

    def _callable(self, function: Callable[..., Any], compiling: bool) -> Callable[..., Any]:
        """A method, compiled if the network is or `compile_stage` was called."""
        if self._options is None and not compiling:
            return function
        name = function.__name__
        if name not in self._compiled:
            compiled: Any = torch.compile(_apart(function), **{"fullgraph": True, **(self._options or {})})

            def call(first: Any, *more: Any) -> Any:
                if name == "stage":  # its step
                    cast(Any, torch._dynamo).maybe_mark_dynamic(first, 0)
                return compiled(first, *more)

            self._compiled[name] = call
        return self._compiled[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}


@outside
def _isolated_apart(module: LocalModule, *arguments: Any) -> tuple[Any, Tensor]:
    """What a compiled network calls: it ends one graph before and begins another behind it. What is compiled in between is the stage."""
    return module._isolated(*arguments, compiling=True)


def _apart(method: Any) -> Any:
    """The same method with a code object of its own: torch.compile counts how often it has compiled a code object, and gives up at 8."""
    function = method.__func__
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return types.MethodType(copy, method.__self__)


@functools.cache
def _raise_allocator_limits() -> None:
    """Lets glibc hold up to 64 MiB of what a module frees for the next one, on a CPU, instead of returning it to the system.

    Otherwise the pages of activations would be mapped and cleared again in every module, a tenth of a step. When glibc frees a block that
    it had mapped separately, it raises the memory that it holds to twice that block, up to this size (mallopt(3), M_MMAP_THRESHOLD).
    User-set limits (mallopt or environment) are respected. The block is never touched, and once per process is enough.
    """
    bytes(LARGEST_BLOCK)


def compile_modules(module: nn.Module, **options: Any) -> int:
    """Compiles every locally supervised module of an emitted module by itself, with these options of `torch.compile`; returns how many.

    `torch.compile` of the whole emitted module does that too, with the default backend unless this was called before. Each local module,
    whose backward is inside its forward, is then a graph of its own.
    """
    found = [m for m in module.modules() if isinstance(m, LocalModule)]
    for part in found:
        part.compile_stage(**options)
    return len(found)


class _Stage(torch.autograd.Function):
    """Forward and backward of one module together; see the module docstring."""

    @staticmethod
    def forward(ctx: Any, module: LocalModule, stage: Any, target: Tensor | None, image: Tensor | None, count: int, *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            # Detached one by one: a weight that is a parameter of the body too gets two gradients, which autograd adds.
            inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in tensors[:count]]
            auxiliary: Any = module.auxiliary.module
            step = torch.empty(auxiliary.step_index + 2, 0)
            auxiliary.begin(image)
            output, loss = module.run(stage, step, target, image, *inputs)
            wanted = [(i, t) for i, t in enumerate((*inputs, *tensors[count:])) if isinstance(t, Tensor) and t.requires_grad]
            device = loss.device.type
            half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
            scale = auxiliary.scale
            found = _gradients(loss * scale if half else loss, [t for _, t in wanted], sharded=module.gathered is not None)
            auxiliary.end()
        stored = [(i, g) for (i, _), g in zip(wanted, found, strict=True) if g is not None]
        if half:
            _unscale([g for _, g in stored], auxiliary)
        # Not by save_for_backward: autograd cannot hand over what it holds itself, so every gradient would be copied.
        ctx.stored, ctx.total = stored, len(tensors)
        outputs = tuple(o.detach() if isinstance(o, Tensor) else o for o in (output if module.output is not None else (output,)))
        ctx.mark_non_differentiable(*(o for o in outputs if isinstance(o, Tensor)))
        return (loss.detach(), *outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor | None, *_: Any) -> Any:
        gradients: list[Tensor | None] = [None] * ctx.total
        stored = ctx.stored
        if stored is None:
            what, fix = "a second backward through a local loss whose gradients were delivered already", "Call backward(retain_graph=True)"
            raise RunError(what, where="supervise", fix=f"{fix} the first time")
        if incoming is not None and stored:
            found = [g for _, g in stored]
            if torch._C._autograd._get_current_graph_task_keep_graph():  # backward(retain_graph=True)
                found = [g.clone() for g in found]
            else:
                ctx.stored = None
            # A plain loop's factor of one is looked at on the CPU only: reading a device's value would wait for it.
            if not (incoming.device.type == "cpu" and type(incoming) is Tensor and incoming.item() == 1.0):
                torch._foreach_mul_([local(g) for g in found], incoming)
            for (position, _), gradient in zip(stored, found, strict=True):
                gradients[position] = gradient
        return (None, None, None, None, None, *gradients)


def _gradients(loss: Tensor, tensors: list[Tensor], *, sharded: bool) -> Sequence[Tensor | None]:
    """The gradients of a loss for leaf tensors; None where there is none.

    Of parameters that ranks hold in parts, the parts' gradients: these come into being by a backward pass that reduces over ranks. What
    the tensors have accumulated before stays theirs.
    """
    if not sharded:
        return torch.autograd.grad(loss, tensors, allow_unused=True)
    before = [t.grad for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    torch.autograd.backward(loss)
    found = [t.grad for t in tensors]
    for tensor, gradient in zip(tensors, before, strict=True):
        tensor.grad = gradient
    return found


@torch.no_grad()
def _unscale(gradients: list[Tensor], auxiliary: Auxiliary) -> None:
    """Divides by the scale in place, and updates the scale, without waiting for the device."""
    if not gradients:
        return
    torch._foreach_mul_(gradients, 1.0 / auxiliary.scale)
    largest = torch.stack(torch._foreach_norm(gradients, float("inf"))).max()
    overflow = ~largest.isfinite()
    auxiliary.clean.copy_(torch.where(overflow, 0, auxiliary.clean + 1))
    grow = auxiliary.clean >= GROWTH_INTERVAL
    auxiliary.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
    auxiliary.clean.mul_(~grow)


@dataclass(frozen=True)
class Span:
    """The nodes of a local module in a rewritten graph; makes the module that runs them, once all passes are done."""

    graph: Graph
    index: int

    @property
    def auxiliary(self) -> Any:
        return self.graph.module.get_submodule(f"supervise.{self.index}")

    def nodes(self) -> tuple[Node, ...]:
        return nodes_between(self.graph, *self._ends())

    def __call__(self, body: fx.GraphModule) -> nn.Module:
        start, end = self._ends()
        active = activations(self.graph)
        # What it reads itself, or through what the root computes of parameters alone.
        trains = any(trainable(self.graph, n) for n in ancestors(self.nodes(), lambda n: n not in active))
        # The auxiliary part of a frozen module is frozen too: it would train for nothing.
        self.auxiliary.requires_grad_(trains)
        if self.auxiliary.lookahead is not None:
            self.auxiliary.lookahead.follow(self.graph.module)
        return LocalModule(body, self.auxiliary, str(start.target) if start else INPUT, str(end.target), self.index, trains=trains)

    def _ends(self) -> tuple[Node | None, Node]:
        return self._boundary(self.index - 1) if self.index else None, self._boundary(self.index)

    def _boundary(self, index: int) -> Node:
        path = f"supervise.{index}.boundary"
        found = next((n for n in self.graph.nodes if n.op == "call_module" and n.target == path), None)
        if found is None:
            raise PassError(f"another pass removed the boundary {path}", where="supervise", fix="Put supervise after it, or cut elsewhere")
        return found


def nodes_between(graph: Graph, start: Node | None, end: Node) -> tuple[Node, ...]:
    """What leads to `end` and not to `start` (None: the input), in execution order.

    That includes what is done there for its effect alone (in place, assertions) and the shapes that are read there. Tensors made of
    parameters alone belong to it only if nothing else uses them: the root computes those that two modules share.
    """
    inside = _done_by(graph, end) - (_done_by(graph, start) if start is not None else set())
    from_input = descendants([graph.placeholder])
    members: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in from_input or all(u in members for u in node.users)):
            members.add(node)
    return tuple(n for n in graph.nodes if n in members)


def _done_by(graph: Graph, end: Node) -> set[Node]:
    """What has run when an activation is there: all that leads to it, and what depends on that alone and leads nowhere else."""
    used = ancestors([graph.output])
    done = {n for n in ancestors([end]) if n.op != "placeholder"}
    for node in graph.nodes:
        sources = [n in done for n in node.all_input_nodes]
        # A shape that is read here for later: the numbers leave the module, not the activation that they were read from.
        number = node.op != "output" and is_number(node) and sources and all(sources)
        if number or (node not in used and any(sources)):
            done.add(node)
    return done


def is_number(node: Node) -> bool:
    """Whether it is a number of shape arithmetic, or several."""
    return "val" in node.meta and not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta["val"]))
