"""supervise: train a backbone as gradient-isolated modules, each with a loss of its own, so that memory falls with the largest module.

The graph is cut at K-1 points. Each module but the last gets an auxiliary classifier and a decoder that rebuilds what went into the
module; its backward runs right after its forward, so that its activations are gone before the next module starts. The last module
trains on the network's own output and criterion. No gradient crosses a cut.

From: *Local Learning on Transformers via Feature Reconstruction* (arXiv 2212.14215), which rebuilds the module's own input features. With
`decoder = "image"` it is InfoPro (ICLR 2021, openreview fAbkE6ant2), which rebuilds the image; with `decoder = "none"` the plain greedy
method.

    [[pass]]
    use = "supervise"
    modules = 4
    balance = "memory"

Options
    modules     how many modules (K), the last one included.
    balance     how the K are chosen: "blocks" (as many blocks each), "memory" (the lowest predicted peak of a step, heads and decoders
                included; without `modules`, as many as bring it within 10 % of the lowest), "stage" (where the resolution changes;
                without `modules`, every stage).
    cuts        instead: regions to cut after, `["layers.0", "layers.1"]`.
    decoder     "features" (the module's own input), "image" (the network's input, InfoPro), "none" (greedy).
    structure   of the features decoder: "linear" (default; each position foretells the patch of input over it; of wide features by a
                map of rank 64), "pointwise" (by a small MLP), "conv" (upsampling and two convolutions), "transformer" (a block over
                the sampled positions first).
    fraction    share of the rows of positions rebuilt in one step; all take their turn. Default 0.125, for images 1.
    loss        of the decoder: "l1" (default), "l2", "bce" (default for images; the goal must lie in [0, 1]).
    head        "pool" (default: mean over positions, norm, linear), "norm-pool" (norm first, as published for transformers), "conv"
                (InfoPro's), "contrast" (supervised contrast of 128 features instead of class scores).
    temperature of the contrast.
    weights     of the two losses, from the first to the last auxiliary module, linear between.
    mean, std   the data's normalisation per channel, which the image decoder takes back. Default: ImageNet's for 3 channels, else 0.5.
    classes     of the targets. Default: the width of the network's output.

Preserves the eval output. Needs the targets in training: `output, local_loss = module(x, target)`, class indices (N,) or probabilities
(N, classes); the caller adds `local_loss` to its own criterion. Adds parameters under `supervise.<i>`, which export drops. Refuses cuts
that are none, more modules than there are cuts for, and decoders that do not fit what they would rebuild. On a CPU with glibc, training
lets the process keep up to 64 MiB of freed memory, so that a module finds what the one before it gave back.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, fx, nn

from graphopt.compiler.pass_base import Effects, Mark, Match, Needs, Note, Pass, Property
from graphopt.errors import PassError
from graphopt.ir.graph import Graph, Origin
from graphopt.ir.nodes import parameters_of
from graphopt.ir.regions import Region
from graphopt.ir.section import Section
from graphopt.passes.supervise import balance as memory
from graphopt.passes.supervise import cuts as cutting
from graphopt.passes.supervise import decoders, heads
from graphopt.passes.supervise.auxiliary import Auxiliary, Weights
from graphopt.passes.supervise.cuts import Place
from graphopt.passes.supervise.layout import Layout, layout_of
from graphopt.passes.supervise.local import BOUNDARY, LocalModule, compile_modules
from graphopt.passes.supervise.stretch import divide_sections, mark, members_between, parameters_in

__all__ = ["LocalModule", "Supervise", "Weighting", "compile_modules"]

#: a row in eight: all of them cost time, and gained nothing on one backbone and 0.9 points on the other, about the deviation between
#: seeds (tools/tables/supervise_accuracy.md)
FRACTION = 0.125
#: the boundary that the first module starts at
INPUT = "input"

Ends = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Statistics = tuple[float, ...]


class Weighting(pydantic.BaseModel):
    """`weights = { reconstruct = [1.0, 0.1], classify = [0.1, 1.0] }`: first and last auxiliary module, linear between."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reconstruct: Ends = (1.0, 1.0)
    classify: Ends = (1.0, 1.0)


class Supervise(Pass):
    """Gradient-isolated modules with local losses. The manual is this file's head."""

    use: ClassVar[str] = "supervise"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output"})
    claim: ClassVar[str | None] = "locally supervised"

    modules: Annotated[int, Field(ge=2, strict=True)] | None = None
    balance: Literal["blocks", "memory", "stage"] = "blocks"
    cuts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    decoder: Literal["features", "image", "none"] = "features"
    structure: decoders.Structure = "linear"
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    loss: Literal["l1", "l2", "bce"] | None = None
    head: heads.Kind = "pool"
    temperature: Annotated[float, Field(gt=0)] = 0.07
    weights: Weighting = Weighting()
    mean: Statistics | None = None
    std: Statistics | None = None
    classes: Annotated[int, Field(ge=1, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _said_once(self) -> Supervise:
        if self.cuts is not None and (self.modules is not None or self.balance != "blocks"):
            raise ValueError("cuts says where to cut; leave out modules and balance")
        if self.cuts is None and self.modules is None and self.balance == "blocks":
            raise ValueError('say modules = K, or cuts = [...], or balance = "memory" or "stage"')
        if self.cuts is not None and len(set(self.cuts)) < len(self.cuts):
            raise ValueError("cuts names a region twice")
        if self.decoder == "none" and max(self.weights.classify) == 0:
            raise ValueError("without a decoder, the classify weights must not be 0")
        return self

    # -- select -------------------------------------------------------------------------------------------------------------
    def match(self, graph: Graph) -> Match:
        """The auxiliary modules (all but the last), as regions from one cut to the next."""
        places = self.places(graph)
        regions, before = [], None
        for number, place in enumerate(places):
            nodes = members_between(graph, before, place.node)
            entry = before or graph.placeholder
            name = f"module {number + 1} (to {place.label})"
            parameters = parameters_of(graph, nodes)
            regions.append(Region(name, (), "local module", nodes, (entry,), (place.node,), True, parameters))
            before = place.node
        return Match(tuple(regions), places)

    def places(self, graph: Graph) -> tuple[Place, ...]:
        """Where it cuts. Chosen once, on the untouched graph; found again by name in every phase.

        Raises:
            PassError: there are not so many cuts, or one that was named is none; with the nearest.
        """
        options = self.model_dump(mode="json", exclude={"when", "weights", "temperature", "mean", "std"})
        key = ("supervise", json.dumps(options, sort_keys=True))
        if key in graph.facts:
            return tuple(_again(graph, name, label) for name, label in graph.facts[key])
        found = cutting.places(graph)
        if self.cuts is not None:
            chosen = cutting.explicit(graph, found, self.cuts)
        elif self.balance == "stage":
            chosen = cutting.by_stage(graph, found, self.modules)
        elif self.balance == "memory":
            # Of the heads and decoders, whatever the number of modules: a search over it asks again and again.
            alike = ("supervise peaks", *(options[name] for name in sorted(options) if name not in ("modules", "balance", "cuts")))
            chosen = memory.by_memory(graph, found, self.modules, self.builder(graph), alike)
        else:
            assert self.modules is not None
            chosen = cutting.evenly(graph, found, self.modules)
        graph.facts[key] = tuple((p.node.name, p.label) for p in chosen)
        return chosen

    def builder(self, graph: Graph) -> memory.Build:
        """What makes an auxiliary part without weights (on the meta device), for the cost model."""
        image = layout_of(graph, graph.placeholder)

        def build(source: Layout, entry: Layout) -> Auxiliary | None:
            goal = image if self.decoder == "image" else entry
            if self._misfit(source, goal) is not None:
                return None
            with torch.device("meta"):
                return self._auxiliary(graph, source, goal, Weights(1.0, 1.0))

        return build

    # -- check --------------------------------------------------------------------------------------------------------------
    def check(self, graph: Graph, match: Match) -> list[Note]:
        """Says where it cuts; refuses a decoder or head that does not fit."""
        notes = []
        self._classes(graph)
        for region in match.regions:
            source, goal = self._layouts(graph, region)
            why = self._misfit(source, goal)
            if why is not None:
                others = 'structure = "linear"' if self.structure == "conv" else 'other cuts, or decoder = "none"'
                notes.append(Note("refuse", region.name, f"{why}. Use {others}"))
            notes.append(Note("info", region.name, f"{len(region.parameters)} parameter tensors; puts out {source}"))
        channels = graph.input[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if self.decoder == "image" and values is not None and len(values) != channels:
                notes.append(Note("refuse", name, f"the image has {channels} channels, {name} has {len(values)} values"))
        return notes

    def _misfit(self, source: Layout, goal: Layout) -> str | None:
        if self.head == "conv" and source.grid is None:
            return f"a convolutional head needs a map, and the graph shows no grid behind {source}"
        if self.decoder == "none":
            return None
        return decoders.misfit("image" if self.decoder == "image" else self.structure, source, goal)

    def _layouts(self, graph: Graph, region: Region) -> tuple[Layout, Layout]:
        """Of what the module puts out, and of what its decoder rebuilds."""
        goal = graph.placeholder if self.decoder == "image" else region.entries[0]
        return layout_of(graph, region.exits[0]), layout_of(graph, goal)

    def _classes(self, graph: Graph) -> int:
        if self.classes is not None:
            return self.classes
        output = graph.output.args[0]
        value: Any = output.meta.get("val") if isinstance(output, fx.Node) else next(iter(output)).meta.get("val")  # type: ignore[arg-type]
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor) or value.dim() != 2:
            shape = f"shape (N, {', '.join(map(str, value.shape[1:]))})" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise PassError(f"the network's output has {shape}, which does not tell the number of classes", fix="Set classes = ...")
        return value.shape[1]

    # -- rewrite ------------------------------------------------------------------------------------------------------------
    def rewrite(self, graph: Graph, match: Match) -> Effects:
        layouts = [self._layouts(graph, region) for region in match.regions]
        count = len(match.regions)
        graph.placeholder.meta[BOUNDARY] = INPUT
        marks: dict[str, Mark] = {}
        for i, region in enumerate(match.regions):
            weights = Weights(
                0.0 if self.decoder == "none" else Weights.between(*self.weights.reconstruct, i, count),
                Weights.between(*self.weights.classify, i, count),
            )
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                # Other weights for another seed, without drawing from the stream that the backbone's own randomness comes from.
                torch.default_generator.manual_seed(torch.initial_seed() + i + 1)
                auxiliary = self._auxiliary(graph, *layouts[i], weights)
            _place_like(auxiliary, graph.module)
            graph.module.add_submodule(f"supervise.{i}", auxiliary)
            _mark(graph, f"supervise.{i}.leave", region.exits[0])
            marks[f"supervise.{i}"] = Mark("inserted", (region.exits[0].meta["origin"].path,), self._parts(auxiliary))
        stretches = [self._section(graph, i) for i in range(count)]
        divide_sections(graph, stretches)
        graph.sections += stretches
        names = [n for n, _ in graph.module.named_parameters() if n.startswith("supervise.")]
        figures = {"cuts": [p.label for p in match.data], "modules": count + 1, "auxiliary_parameters": _size(graph.module)}
        return Effects(
            regions=tuple(r.name for r in match.regions),
            notes=(Note("info", "supervise", f"{len(names)} auxiliary parameter tensors, dropped at export"),),
            needs=Needs(targets=True),
            restore=_without_auxiliary,
            figures=figures,
            marks=marks,
        )

    def _section(self, graph: Graph, index: int) -> Section:
        start = mark(graph, f"supervise.{index - 1}.leave") if index else None
        nodes = members_between(graph, start, mark(graph, f"supervise.{index}.leave"))
        image = graph.module.get_submodule(f"supervise.{index}").rebuilds_image
        return Section(f"supervise_{index}", nodes, _Wrap(graph, index), self.use, target=True, image=bool(image))

    def _parts(self, auxiliary: Auxiliary) -> dict[str, str]:
        """What a module's auxiliary part is made of, for people."""
        decoder = (
            "none" if auxiliary.decoder is None else f"{self.decoder}, {self.structure}" if self.decoder == "features" else self.decoder
        )
        head = "none" if auxiliary.head is None else self.head
        weights = auxiliary.weights
        return {"head": head, "decoder": decoder, "weights": f"classify {weights.classify:g}, reconstruct {weights.reconstruct:g}"}

    def _auxiliary(self, graph: Graph, source: Layout, goal: Layout, weights: Weights) -> Auxiliary:
        classes = self._classes(graph)
        decoder: nn.Module | None = None
        if self.decoder == "image" and weights.reconstruct > 0:
            channels = goal.channels
            from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

            mean = self.mean or (IMAGENET_DEFAULT_MEAN if channels == 3 else (0.5,) * channels)
            std = self.std or (IMAGENET_DEFAULT_STD if channels == 3 else (0.5,) * channels)
            decoder = decoders.ImageDecoder(source, goal, self.fraction or 1.0, mean, std)
        elif self.decoder == "features" and weights.reconstruct > 0:
            decoder = decoders.build(self.structure, source, goal, self.fraction or FRACTION)
        head = heads.build(self.head, source, classes) if weights.classify > 0 else None
        if head is None and decoder is None:
            raise PassError("a module has neither a head nor a decoder: both its weights are 0", fix="Raise one of the weights")
        return Auxiliary(
            head,
            decoder,
            weights,
            classes,
            difference=self.loss or ("bce" if self.decoder == "image" else "l1"),
            temperature=self.temperature if self.head == "contrast" else None,
            rebuilds_image=self.decoder == "image" and decoder is not None,
        )


class _Wrap:
    """Makes the local module of a section, when all passes are through."""

    def __init__(self, graph: Graph, index: int) -> None:
        self.graph, self.index = graph, index

    def __call__(self, body: fx.GraphModule) -> nn.Module:
        auxiliary: Any = self.graph.module.get_submodule(f"supervise.{self.index}")
        start = f"supervise.{self.index - 1}.leave" if self.index else None
        trains = any(p.requires_grad for p in parameters_in(self.graph, start, f"supervise.{self.index}.leave"))
        # What supervises a frozen module would train for nothing: it rests with it.
        auxiliary.requires_grad_(trains)
        return LocalModule(body, auxiliary, start or INPUT, f"supervise.{self.index}.leave", trains=trains)


def _mark(graph: Graph, path: str, node: fx.Node) -> None:
    """A boundary after `node`, which everything that used `node` uses from now on."""
    with graph.fx.inserting_after(node):
        mark = graph.fx.call_module(path, (node,))
    mark.meta = {"origin": Origin("", 0), "by": Supervise.use, "val": node.meta["val"], BOUNDARY: path}
    node.replace_all_uses_with(mark, delete_user_cb=lambda user: user is not mark)


def _again(graph: Graph, name: str, label: str) -> Place:
    """A cut that was chosen on the untouched graph, in this one."""
    for node in graph.nodes:
        if node.name == name and isinstance(node.meta.get("val"), Tensor):
            return Place(node, label, True)
    region = cutting.named_region(graph, label)
    if region is not None and len(region.exits) == 1:
        return Place(region.exits[0], label, True)
    raise PassError(f"another pass took away the cut after {label!r}", fix="Cut elsewhere (cuts = [...]), or put supervise first")


def _place_like(auxiliary: nn.Module, module: nn.Module) -> None:
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is not None:
        auxiliary.to(device=like.device, dtype=like.dtype)
    auxiliary.train(module.training)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if n.startswith("supervise."))


def _without_auxiliary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("supervise.")}
