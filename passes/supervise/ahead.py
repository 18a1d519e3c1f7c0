"""Auxiliary networks made of the blocks that follow: a module learns features that the rest of the backbone can go on from.

`ahead` is AugLocal's (ICLR 2024, openreview Qbf1hy8b7m): fresh blocks shaped like some of those that follow, drawn evenly up to the last
one, fewer of them toward the network's end, then mean over positions, norm and linear. The look-ahead is that of MAN (ECCV 2024) and MAN++
(arXiv 2507.16279): the first blocks of the next module with a running mean of their weights, beside a copy that trains.

The graph knows the blocks that follow, so no class of a network is named. Where a block is not the one that its input leads to, an adapter
averages positions to the grid that the block expects, and maps the channels: the papers' code builds such blocks with other strides and
widths. Dropout and random depth are off in the copies, so that the backbone's own draws stay what they were.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from graphopt import Graph, PassError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.extract import extracted, stands_alone
from graphopt.ir.regions import Region
from graphopt.passes.supervise.layout import ActivationLayout, layout_of
from graphopt.passes.supervise.options import Lookahead
from graphopt.runtime.by_mode import always_eval
from graphopt.runtime.shards import full

Replace = Callable[[Tensor], Tensor]


def following(graph: Graph, end: Node) -> tuple[Region, ...]:
    """The blocks of the untouched graph after an activation that can stand alone, in execution order."""
    position = graph.order[end]
    return tuple(b for b in find_blocks(graph) if graph.order[b.nodes[0]] > position and stands_alone(b))


def depth_of(depth: int, taper: float, index: int, count: int) -> int:
    """How many blocks the head of auxiliary module `index` of `count` has: from `depth` down to `depth * (1 - taper) + taper`, rounded."""
    share = taper * index / max(1, count - 1)
    return max(1, round(depth * (1 - share) + share))


def evenly(blocks: Sequence[Region], depth: int) -> tuple[Region, ...]:
    """So many of the blocks at even distances, the last one included; all of them where there are no more."""
    if depth >= len(blocks):
        return tuple(blocks)
    return tuple(blocks[round(len(blocks) / depth * i) - 1] for i in range(1, depth + 1))


class Adapter(nn.Module):
    """(N, ...) in layout `source` -> (N, ...) in layout `goal`: positions averaged to the goal's grid, channels by a linear map.

    Leading tokens that the goal has (a class token) are the mean over positions.
    """

    def __init__(self, source: ActivationLayout, goal: ActivationLayout) -> None:
        super().__init__()
        self.source, self.goal = source, goal
        self.conv = nn.Conv2d(source.channels, goal.channels, 1, bias=False) if source.channels != goal.channels else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        assert self.goal.grid is not None
        h = self.source.map(h)
        if tuple(h.shape[2:]) != self.goal.grid:
            h = F.adaptive_avg_pool2d(h, self.goal.grid)
        h = self.conv(h)
        if self.goal.rank == 4:
            return h.movedim(1, self.goal.channel)
        if self.goal.rank == 2:
            return h.flatten(1)
        h = h.flatten(2)
        if self.goal.prefix:
            h = torch.cat([h.mean(2, keepdim=True).expand(-1, -1, self.goal.prefix), h], dim=2)
        return h.movedim(1, self.goal.channel)


class Blocks(nn.Module):
    """Copies of blocks of the untouched graph one after the other, for an activation of that layout; `replace` makes a copy of a tensor.

    Attributes:
        layout: of the output.
    """

    def __init__(self, graph: Graph, source: ActivationLayout, blocks: Sequence[Region], replace: Replace) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for block in blocks:
            entry = layout_of(graph, block.entries[0])
            if entry != source:
                parts.append(Adapter(source, entry))
            parts.append(_without_draws(extracted(graph, block, replace)))
            source = layout_of(graph, block.exits[0])
        self.parts, self.layout = nn.ModuleList(parts), source

    def forward(self, h: Tensor) -> Tensor:
        for part in self.parts:
            h = part(h)
        return h

    def bodies(self) -> list[fx.GraphModule]:
        """The copies, without the adapters between them."""
        return [part for part in self.parts if isinstance(part, fx.GraphModule)]


def _without_draws(body: fx.GraphModule) -> fx.GraphModule:
    """Leaves without tensors of their own stay in eval mode: dropout and random depth do nothing."""
    for path in {str(n.target) for n in body.graph.find_nodes(op="call_module")}:
        part = body.get_submodule(path)
        if next(part.parameters(), None) is None and next(part.buffers(), None) is None:
            body.set_submodule(path, always_eval(part))
    return body


def fresh(tensor: Tensor) -> Tensor:
    """New initial values for a parameter: its elements in random order, whatever distribution the backbone's author drew them from."""
    device = torch.empty(0).device  # the default one: "meta" where only shapes are asked for
    values = tensor.detach().to(device)
    if not isinstance(tensor, nn.Parameter):
        return values.clone()
    shuffled = values.flatten()[torch.randperm(values.numel(), device=device)].view(values.shape)
    return nn.Parameter(shuffled, tensor.is_floating_point())


def alike(tensor: Tensor) -> Tensor:
    """A copy on the default device."""
    values = tensor.detach().to(torch.empty(0).device, copy=True)
    return nn.Parameter(values, tensor.is_floating_point()) if isinstance(tensor, nn.Parameter) else values


class AheadHead(nn.Sequential):
    """Blocks shaped like some that follow, then a pooled head: (N, ...) -> (N, classes)."""

    def __init__(self, blocks: Blocks, head: nn.Module) -> None:
        super().__init__()
        self.add_module("blocks", blocks)
        self.add_module("pool", head)


class LookaheadBlocks(nn.Module):
    """The next module's first blocks twice: with a running mean of their weights, `mean`, and as a copy that trains, `copied`.

    The output is `mean(h) + copied(h)` (MAN); with the bias "scale" `(2 - s) * mean(h) + s * copied(h)`, where the factor s trains (MAN++);
    with "none" `mean(h)`. The running means are buffers: saved with the state, and seen by no optimizer. Norms use the batch's statistics.

    Attributes:
        later: after a step the means wait for `catch_up`: weights that they follow are on their way from another process.
    """

    scale: Tensor | None

    def __init__(self, graph: Graph, source: ActivationLayout, blocks: Sequence[Region], options: Lookahead) -> None:
        super().__init__()
        self.decay = options.ema
        self.mean = Blocks(graph, source, blocks, alike)
        self.copied = None if options.bias == "none" else Blocks(graph, source, blocks, alike)
        self.scale = nn.Parameter(torch.ones(())) if options.bias == "scale" else None
        for part in (p for body in self.mean.bodies() for p in body.modules()):
            for name, value in list(part._parameters.items()):
                del part._parameters[name]
                part.register_buffer(name, None if value is None else value.detach())
        self.layout = self.mean.layout
        #: what holds a mean, what holds the weight that it is the mean of, and the name of both
        self._followed: list[tuple[nn.Module, nn.Module, str]] = []
        self.later, self._behind = False, False

    def forward(self, h: Tensor) -> Tensor:
        mean = self.mean(h)
        if self.copied is None:
            return mean
        copied = self.copied(h)
        return mean + copied if self.scale is None else (2 - self.scale) * mean + self.scale * copied

    def follow(self, backbone: nn.Module) -> None:
        """Means are taken of the weights that `backbone` has under the blocks' own names.

        Those that it has no more, or in another shape (another pass has factorized it), stay as they are.
        """
        modules = dict(backbone.named_modules())
        self._followed = []
        for path, part in (found for body in self.mean.bodies() for found in body.named_modules()):
            weights = modules[path]._parameters if path in modules else {}
            same = (name for name, mean in part._buffers.items() if mean is not None and _shape(weights.get(name)) == mean.shape)
            self._followed += [(part, modules[path], name) for name in same]

    def followed(self) -> list[nn.Parameter]:
        """The weights that the means are of."""
        return [weight for _, source, name in self._followed if (weight := source._parameters.get(name)) is not None]

    def end(self) -> None:
        """After a step."""
        if self.later:
            self._behind = True
        else:
            self.update(first=False)

    def catch_up(self) -> None:
        """What the last step has put off."""
        if self._behind:
            self._behind = False
            self.update(first=False)

    @torch.no_grad()
    def update(self, *, first: bool) -> None:
        """Moves the means toward the weights, or, the first time, onto them. With sharded weights all ranks have to call it."""
        for part, source, name in self._followed:
            mean, weight = part._buffers[name], source._parameters.get(name)
            if mean is not None and weight is not None and not weight.is_meta:
                mean.lerp_(full(weight).to(mean), 1.0 if first else 1 - self.decay)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def ahead_blocks(graph: Graph, end: Node, depth: int) -> tuple[Region, ...]:
    """The blocks that an `ahead` head of that depth is shaped like. Raises PassError if none follow."""
    found = evenly(following(graph, end), depth)
    if not found:
        raise PassError(f"no block that can stand alone follows {end}", fix='Cut earlier, or use head = "pool"')
    return found


def lookahead_blocks(graph: Graph, end: Node, count: int) -> tuple[Region, ...]:
    """The first blocks after an activation. Raises PassError if fewer follow."""
    found = following(graph, end)[:count]
    if len(found) < count:
        raise PassError(
            f"{len(found)} blocks that can stand alone follow {end}, and lookahead asks for {count}", fix="Cut earlier, or ask for fewer"
        )
    return found
