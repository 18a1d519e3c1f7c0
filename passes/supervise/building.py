"""Builds the auxiliary part of a locally supervised module as the options of the pass want it: look-ahead, decoder, head."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, fx, nn
from torch.fx import Node

from graphopt import Graph, PassError
from graphopt.ir.regions import Region
from graphopt.passes.supervise import decoders
from graphopt.passes.supervise.ahead import AheadHead, Blocks, LookaheadBlocks, ahead_blocks, depth_of, following, fresh, lookahead_blocks
from graphopt.passes.supervise.auxiliary import Auxiliary, Weights, build_head
from graphopt.passes.supervise.layout import ActivationLayout, layout_of
from graphopt.passes.supervise.options import Parts

#: a row in eight: all of them take time, and gained nothing on one backbone and 0.9 points on the other, about the deviation between
#: seeds (tools/tables/supervise_accuracy.md)
FRACTION = 0.125
#: weight of each decoder's loss. Of 1, 0.3, 0.1 and 0.03 for features, 0.1 was best on Fashion-MNIST (tools/tables/supervise_fashion.md)
RECONSTRUCT = {"features": (0.1, 0.1), "image": (1.0, 1.0), "none": (0.0, 0.0)}

#: the blocks that a look-ahead is made of, and those that a head is
Copied = tuple[tuple[Region, ...], tuple[Region, ...]]


@dataclass(frozen=True)
class Builder:
    """Makes auxiliary parts of one pass for modules of one graph."""

    value: Parts
    graph: Graph

    @property
    def classes(self) -> int:
        """Width of the class scores. Raises PassError if neither the options nor the network's output show it."""
        if self.value.classes is not None:
            return self.value.classes
        found: Any = fx.node.map_arg(self.graph.output.args[0], lambda n: n.meta.get("val"))
        while isinstance(found, (tuple, list)) and found:
            found = found[0]
        if not isinstance(found, Tensor) or found.dim() != 2:
            kind = f"shape (N, {', '.join(map(str, found.shape[1:]))})" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise PassError(f"the network's output has {kind}, which does not show the number of classes", fix="Set classes = ...")
        return found.shape[1]

    def layouts(self, start: Node, end: Node) -> tuple[ActivationLayout, ActivationLayout]:
        """Of a module's output, and of what its decoder rebuilds."""
        image = self.value.decoder == "image"
        return layout_of(self.graph, end), layout_of(self.graph, self.graph.placeholder if image else start)

    def copied(self, end: str, index: int = 0, count: int = 1) -> Copied:
        """The blocks that follow the node `end` and that the look-ahead and the head of module `index` of `count` are made of.

        Raises PassError if too few follow.
        """
        value, graph = self.value, self.graph.untouched
        if value.lookahead is None and value.head != "ahead":
            return (), ()
        node = next(n for n in graph.nodes if n.name == end)
        first = lookahead_blocks(graph, node, value.lookahead.blocks) if value.lookahead is not None else ()
        after = first[-1].exits[0] if first else node
        depth = depth_of(value.depth, value.taper, index, count)
        if value.head != "ahead" or (first and not following(graph, after)):  # the look-ahead has the last ones
            return first, ()
        return first, ahead_blocks(graph, after, depth)

    def incompatibility(self, end: str, source: ActivationLayout, goal: ActivationLayout) -> str | None:
        """Why there can be no such auxiliary part after a module's output, or None."""
        value = self.value
        try:
            first, blocks = self.copied(end)
        except PassError as error:
            return error.what
        output = source
        for number, block in enumerate((*first, *blocks)):
            entry, leaves = (layout_of(self.graph.untouched, node) for node in (block.entries[0], block.exits[0]))
            if entry != output and (entry.grid is None or output.grid is None):
                return f"{output} cannot be adapted to what {block.name} takes, {entry}: the graph shows no grid for them"
            output = leaves
            source = output if number < len(first) else source  # the decoder's source
        if value.head == "conv" and source.grid is None:
            return f"a convolutional head needs a map, and the graph shows no grid for {source}"
        if value.decoder == "none":
            return None
        return decoders.incompatibility("image" if value.decoder == "image" else value.structure, source, goal)

    def initialized(self, index: int, count: int, end: str, source: ActivationLayout, goal: ActivationLayout) -> Auxiliary:
        """The part of module `index` of `count` with initial weights, on the device and in the dtype of the backbone."""
        # A single auxiliary module takes the first's weights, as InfoPro's code does.
        ends = (self.value.weights.reconstruct or RECONSTRUCT[self.value.decoder], self.value.weights.classify)
        reconstruct, classify = (first + (last - first) * index / max(1, count - 1) for first, last in ends)
        weights = Weights(0.0 if self.value.decoder == "none" else reconstruct, classify)  # its weights are of no use without a decoder
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Other weights for another seed, without drawing from the stream that the backbone's own randomness comes from.
            torch.default_generator.manual_seed(torch.initial_seed() + index + 1)
            auxiliary = self.part(self.copied(end, index, count), source, goal, weights)
        model = next((p for p in self.graph.module.parameters() if p.is_floating_point()), None)
        if model is not None:
            auxiliary.to(device=model.device, dtype=model.dtype)
        return auxiliary.train(self.graph.module.training)

    def part(self, copied: Copied, source: ActivationLayout, goal: ActivationLayout, weights: Weights) -> Auxiliary:
        """The look-ahead, decoder and head of a module whose output has the layout `source`; `copied` as the method of that name gives."""
        value, untouched, (first, blocks) = self.value, self.graph.untouched, copied
        lookahead: LookaheadBlocks | None = None
        if value.lookahead is not None:
            lookahead = LookaheadBlocks(untouched, source, first, value.lookahead)
            source = lookahead.layout
        # The decoder before the head: a seed's initial weights depend on the order.
        decoder = self._decoder(source, goal) if weights.reconstruct > 0 and value.decoder != "none" else None
        head: nn.Module | None = None
        if weights.classify > 0:
            ahead = Blocks(untouched, source, blocks, fresh) if value.head == "ahead" else None
            kind = "pool" if value.head == "ahead" else value.head
            head = build_head(kind, source if ahead is None else ahead.layout, self.classes, value.temperature or 1.0)
            head = head if ahead is None else AheadHead(ahead, head)
        if head is None and decoder is None:
            raise PassError("a module has neither a head nor a decoder: both its weights are 0", fix="Raise one of the weights")
        difference = value.loss or ("bce" if value.decoder == "image" else "l1")
        temperature = (value.temperature or 0.07) if value.head == "contrast" else None
        return Auxiliary(head, decoder, weights, self.classes, difference, temperature, lookahead)

    def _decoder(self, source: ActivationLayout, goal: ActivationLayout) -> nn.Module:
        value = self.value
        if value.decoder == "features":
            return decoders.build(value.structure, source, goal, value.fraction or FRACTION)
        unknown = (0.5,) * goal.channels
        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if goal.channels == 3 else (unknown, unknown)
        return decoders.ImageDecoder(source, goal, value.fraction or 1.0, value.mean or mean, value.std or std)
