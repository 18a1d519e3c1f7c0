"""The flat training graph that passes rewrite."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.errors import SelectError, TraceError, did_you_mean

if TYPE_CHECKING:
    from graphopt.regions import Region
    from graphopt.rewriting.sections import Section

#: shapes are propagated at this batch, so that a batch dimension is never mistaken for one of size 1
SHAPE_BATCH = 2


class Origin(NamedTuple):
    """Where in the backbone a node comes from: module path (`""` is the backbone itself) and which call of that module."""

    path: str
    call: int


class Opaque(NamedTuple):
    """A module kept as one leaf, with the reason."""

    path: str
    reason: str


class TrainingModule(fx.GraphModule):
    """A `GraphModule` that keeps everything its root holds: parameters that no node uses, buffers' persistence, registration order.

    Stock `GraphModule` keeps only what the graph mentions and makes every buffer persistent, so that a state dict neither loads
    into nor from the backbone.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "TrainingModule") -> None:
        super().__init__(root, graph, class_name)
        # The very dicts, not copies: modules emitted from one graph must agree when `.to()` puts new buffers in place.
        self._parameters = root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self._modules = dict(root._modules)
        self.training = root.training

    def _deepcopy_init(self) -> Any:
        return TrainingModule.__init__

    def __reduce__(self) -> Any:
        raise TypeError("a training graph is not pickled: save its state dict with the spec and the decisions")


def skeleton(backbone: nn.Module, called: frozenset[str]) -> nn.Module:
    """Registers what `backbone` registers, in its order; leaves and tensors are shared, containers become plain modules.

    A container is a module that no node calls whole (`called` are those that one does); since calling it would run code that the
    graph has replaced, only its place in the hierarchy is kept.
    """

    def hold(old: nn.Module, prefix: str) -> nn.Module:
        new = nn.Module()
        new.training = old.training
        new._parameters = dict(old._parameters)
        new._buffers = dict(old._buffers)
        new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
        for name, child in old._modules.items():
            path = f"{prefix}{name}"
            keep = child is None or path in called or next(child.children(), None) is None
            new._modules[name] = child if keep else hold(child, f"{path}.")  # type: ignore[arg-type]
        return new

    return hold(backbone, "")


class Graph:
    """One backbone as a flat graph: a placeholder `x` of shape (N, *input), leaf modules at the backbone's own paths, one output.

    Every node carries `meta["origin"]` (`Origin`), `meta["val"]` (a fake tensor, or the Python value, at batch 2 in float32) and, where
    a pass put it there, `meta["by"]` (the pass's name).

    Attributes:
        module: the `fx.GraphModule`; its state-dict keys are the backbone's until a pass says otherwise.
        input: shape of one sample; the batch stays free.
        types: class name of every module of the backbone, by path.
        groups: the author's own blocks as lists of parameter names, where the model publishes them (timm's `group_matcher`).
        opaque: modules kept whole, with reasons.
        unused: parameters that no node uses; they are kept, and reported.
        sections: stretches that run as one unit in the emitted module; passes append, emission outlines.
        facts: what passes found out about the untouched backbone and must not find out differently after other passes have rewritten
            it, or in another phase (where to cut); shared by all clones.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        input: tuple[int, ...],
        types: dict[str, str],
        groups: tuple[tuple[str, ...], ...] = (),
        opaque: tuple[Opaque, ...] = (),
        unused: tuple[str, ...] = (),
    ) -> None:
        self.module, self.input, self.types, self.groups = module, input, types, groups
        self.opaque, self.unused = opaque, unused
        self.sections: list[Section] = []
        self.facts: dict[Any, Any] = {}
        self._block_paths: tuple[tuple[str, ...], ...] | None = None

    # -- editing ------------------------------------------------------------------------------------------------------------
    @property
    def fx(self) -> FxGraph:
        return self.module.graph

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self.module.graph.nodes)

    @property
    def placeholder(self) -> Node:
        return next(n for n in self.module.graph.nodes if n.op == "placeholder")

    @property
    def output(self) -> Node:
        return next(n for n in reversed(self.module.graph.nodes) if n.op == "output")

    def clone(self) -> Graph:
        """A deep copy, weights included; sections are not carried over (they are born of rewriting)."""
        if self.sections:
            raise ValueError("clone a graph before passes add sections to it")
        other = Graph(copy.deepcopy(self.module), self.input, self.types, self.groups, self.opaque, self.unused)
        other._block_paths, other.facts = self._block_paths, self.facts
        return other

    def add_section(self, section: Section) -> None:
        """Declares that a stretch of nodes runs as one unit in the emitted module; a name that is taken gets a number."""
        taken = {s.name for s in self.sections}
        name, number = section.name, 1
        while name in taken:
            number += 1
            name = f"{section.name}_{number}"
        self.sections.append(replace(section, name=name))

    def replace_module(self, path: str, module: nn.Module) -> None:
        """Puts `module` in a leaf's place; parameter and buffer names should stay, so that state-dict keys do."""
        parent, _, name = path.rpartition(".")
        module.training = self.module.get_submodule(path).training
        self.module.get_submodule(parent)._modules[name] = module

    def refresh(self) -> None:
        """After edits: lint, recompile, shapes, and an origin for every new node (that of its first input, if none was given)."""
        graph = self.module.graph
        graph.lint()
        self.module.recompile()
        for node in graph.nodes:
            if "origin" not in node.meta:
                given = [n.meta["origin"] for n in node.all_input_nodes if "origin" in n.meta]
                node.meta["origin"] = given[-1] if given else Origin("", 0)
        propagate_shapes(self.module, self.input)

    # -- looking ------------------------------------------------------------------------------------------------------------
    def paths(self) -> tuple[str, ...]:
        """What a selector can name, in execution order, outer before inner: module paths, and parameters that the graph reads itself."""
        seen: dict[str, None] = {}
        for node in self.nodes:
            if node.op in ("placeholder", "output"):
                continue
            parts = node.meta["origin"].path.split(".")
            for depth in range(1, len(parts) + 1):
                seen.setdefault(".".join(parts[:depth]))
            if node.op == "get_attr":
                seen.setdefault(str(node.target))
        seen.pop("", None)
        return tuple(seen)

    def region(self, path: str) -> Region:
        """The region of one module path, or of a parameter the graph reads itself (`cls_token`).

        Raises:
            SelectError: nothing in the graph comes from there; names the nearest paths.
        """
        from graphopt.regions import region_of

        found = region_of(self, (path,))
        if not found.nodes:
            raise SelectError(f"no part of the graph has the path {path!r}", fix=did_you_mean(path, self.paths()))
        return found

    def regions(self, paths: Iterable[str]) -> tuple[Region, ...]:
        return tuple(self.region(p) for p in paths)

    def blocks(self) -> tuple[Region, ...]:
        """The family's natural repeated blocks, in execution order, as they stand in this graph.

        Which paths are blocks is a fact of the backbone: it is found once, before any rewrite, and stays.
        """
        from graphopt.regions import Index, find_blocks

        if self._block_paths is None:
            self._block_paths = find_blocks(self)
        index = Index(self)
        found = (index.region(paths) for paths in self._block_paths)
        return tuple(region for region in found if region.nodes)

    def cut_points(self) -> tuple[Node, ...]:
        """Activations that every path from input to output crosses, in execution order; the input and the output node aside."""
        from graphopt.regions import cut_points

        return cut_points(self)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.module.graph.nodes)


def propagate_shapes(module: fx.GraphModule, input: tuple[int, ...], batch: int = SHAPE_BATCH) -> None:
    """Stamps `meta["val"]` on every node of `module` by running it on fake tensors, without gradients and without weights.

    Raises:
        TraceError: the graph cannot take this input; names the node and its module path.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = fake_copy(module, mode)
        fake.eval()
        floating = next((p for p in fake.parameters() if p.is_floating_point()), None)
        x = torch.empty(batch, *input, dtype=None if floating is None else floating.dtype)
        at: list[fx.Node] = []

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                at[:] = [n]
                try:
                    value = super().run_node(n)
                except (DataDependentOutputException, DynamicOutputShapeException):
                    value = _shape_by_running(module, n, *self.fetch_args_kwargs_from_env(n), mode)
                original[n.name].meta["val"] = value
                return value

        original = {n.name: n for n in module.graph.nodes}
        try:
            with torch.no_grad():
                Shapes(fake, garbage_collect_values=True).run(x)
        except Exception as error:
            node = at[0] if at else None
            origin = node.meta.get("origin") if node is not None else None
            where = f"node {node} of {(origin.path if origin else '') or 'the backbone'}" if node is not None else None
            cause = error.__cause__ or error
            raise TraceError(
                f"the graph cannot take an input of shape (N, {', '.join(map(str, input))}): {_first_line(cause)}",
                where=where,
                fix="Give the input shape that the backbone was built for ([backbone] input, and its image size argument)",
            ) from error


def _shape_by_running(module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Shapes of a leaf that branches on values: they cannot be known without values, so it runs once on random ones."""
    if node.op != "call_module":
        raise TypeError(f"{node} branches on values outside any module")
    leaf = copy.deepcopy(module.get_submodule(str(node.target))).eval()
    if any(t.is_meta for t in (*leaf.parameters(), *leaf.buffers())):
        raise TypeError(f"{node.target} branches on values: its shapes are not known without its weights")

    def real(value: Any) -> Any:
        return torch.rand(value.shape).to(value.dtype) if isinstance(value, torch.Tensor) else value

    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        args, kwargs = pytree.tree_map(real, (args, kwargs))
        out = leaf(*args, **kwargs)
    return pytree.tree_map(lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, out)


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> Any:
    """A deep copy of `module` whose tensors are fakes of `mode`: structure without memory."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if id(tensor) not in memo:
            memo[id(tensor)] = as_fake(tensor, mode)
    for gm in module.modules():
        # Shapes stamped earlier would be copied, and belong to another mode.
        if isinstance(gm, fx.GraphModule):
            memo[id(gm.meta)] = {}
    return copy.deepcopy(module, memo)


def as_fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake CPU tensor of the same shape, strides, dtype and kind; parameters on the meta device count as on the CPU."""
    with mode, torch.no_grad():
        fake = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
