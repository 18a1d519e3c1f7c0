"""The editor: the only way to change a graph.

It stamps the nodes that it inserts with their origin, and those that it inserts or whose operation it changes with the pass instance. It
keeps sections nested and shapes up to date, clears cached analyses, and records all that it did, so that nobody has to infer it later.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import fx, nn
from torch.fx import Node

from graphopt.ir.fakes import as_fake
from graphopt.ir.graph import Graph, Origin
from graphopt.ir.nodes import attribute, storages, writes_in_place
from graphopt.ir.paths import owner
from graphopt.ir.section import Author, Section
from graphopt.ir.shapes import value_of

Nodes = tuple[Node, ...]
Wrap = Callable[[fx.GraphModule], nn.Module]


class Place(TypedDict, total=False):
    """Where a new node goes: before or after another; `like` is the node whose origin and sections it gets (default: that other)."""

    before: Node | None
    after: Node | None
    like: Node | None


@dataclass
class Edits:
    """What one pass instance did to a graph, by name, in the order it was done.

    Attributes:
        inserted: names of new nodes. changed: of nodes whose call or leaf changed. redirected: of nodes that only read another node now.
        erased: of nodes that are gone. added: paths of new modules and names of new parameters. replaced: paths of leaves that have
            another form now. removed: names of modules, parameters and buffers that are gone.
        frozen: names of parameters that no longer require a gradient. sections: names of the sections that were declared.
    """

    inserted: dict[str, None] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    redirected: dict[str, None] = field(default_factory=dict)
    erased: dict[str, None] = field(default_factory=dict)
    added: dict[str, None] = field(default_factory=dict)
    replaced: dict[str, None] = field(default_factory=dict)
    removed: dict[str, None] = field(default_factory=dict)
    frozen: dict[str, None] = field(default_factory=dict)
    sections: dict[str, None] = field(default_factory=dict)


class Editor:
    """Changes `graph` on behalf of one pass instance, its `author`; `edits` is what was done so far."""

    def __init__(self, graph: Graph, author: Author) -> None:
        self.graph, self.author, self.edits = graph, author, Edits()
        self._held: dict[Node, list[tuple[int, Section]]] | None = None
        #: by operation and target, the nodes that have called a leaf or read a tensor
        self._uses: dict[tuple[str, str], list[Node]] = {}
        for op in ("call_module", "get_attr"):
            for node in graph.fx.find_nodes(op=op):
                self._used(node)

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **place: Unpack[Place]) -> Node:
        """A new call of a function, or of a tensor method by name."""
        return self._insert("call_method" if isinstance(target, str) else "call_function", target, args, kwargs or {}, **place)

    def call_module(self, path: str, module: nn.Module, args: tuple[Any, ...], **place: Unpack[Place]) -> Node:
        """Registers a new module at `path` and calls it."""
        self.add_module(path, module)
        return self._insert("call_module", path, args, {}, **place)

    def read(self, name: str, **place: Unpack[Place]) -> Node:
        """A new node that reads a parameter or a buffer."""
        return self._insert("get_attr", name, (), {}, **place)

    def _insert(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **place: Unpack[Place]) -> Node:
        before, after = place.get("before"), place.get("after")
        neighbour = before or after
        if neighbour is None or (before is not None and after is not None):
            raise ValueError("give one of before and after")
        with self.graph.fx.inserting_before(neighbour) if before is not None else self.graph.fx.inserting_after(neighbour):
            node = self.graph.fx.create_node(op, target, args, kwargs)
        model = place.get("like") or neighbour
        node.meta["origin"] = model.meta.get("origin", Origin("", 0))
        node.meta["pass"] = self.author.index
        if self._sections_with((model,)):
            self._set_sections(replace(s, nodes=(*s.nodes, node)) if model in s.nodes else s for s in self.graph.sections)
        self._infer(node)
        self._used(node)
        self.edits.inserted[node.name] = None
        self.graph.changed([node] if op == "get_attr" else ())
        return node

    def _infer(self, node: Node) -> None:
        """The node's value on fake tensors, where those of its inputs are known; `Graph.refresh` finds the rest."""
        mode = getattr(self.graph.placeholder.meta.get("val"), "fake_mode", None)
        if mode is None or any("val" not in i.meta for i in node.all_input_nodes):
            return
        if node.op == "get_attr":
            value = attribute(self.graph.module, str(node.target))
            node.meta["val"] = as_fake(value, mode).detach() if isinstance(value, torch.Tensor) else value
            return
        node.meta["val"] = value_of(self.graph.module, node, mode)

    def set_call(self, node: Node, target: Any = None, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> None:
        """Another operation, or other inputs, for a node; what is not given stays.

        A `target` in text is a leaf's path where the node calls a module, else a tensor method.
        """
        if callable(target):
            node.op, node.target = "call_function", target
        elif target is not None:
            node.op, node.target = "call_module" if node.op == "call_module" else "call_method", target
        self._used(node)
        node.args = node.args if args is None else args
        node.kwargs = node.kwargs if kwargs is None else kwargs
        self.touch(node)

    def redirect(self, old: Node, new: Any, users: Iterable[Node] | None = None) -> None:
        """Lets readers of `old` read `new` (a node, or a constant): all of them, `new` itself aside, or those among `users`."""
        for user in tuple(old.users) if users is None else tuple(u for u in users if old in u.all_input_nodes):
            if user is not new:
                user.args, user.kwargs = fx.node.map_aggregate((user.args, user.kwargs), lambda a: new if a is old else a)
                self.edits.redirected[user.name] = None
                self.graph.changed([user])

    def touch(self, node: Node) -> None:
        """Marks a node as changed by this pass instance."""
        node.meta["pass"] = self.author.index
        self.edits.changed[node.name] = None
        self.graph.changed([node])

    def erase(self, nodes: Iterable[Node]) -> None:
        """Removes nodes. Nothing outside them may read them any more."""
        gone = set(nodes)
        for node in sorted(gone, reverse=True):
            self.edits.erased[node.name] = None
            self.graph.fx.erase_node(node)
        if self._sections_with(gone):
            kept = (replace(s, nodes=tuple(n for n in s.nodes if n not in gone)) for s in self.graph.sections)
            self._set_sections(s for s in kept if s.nodes)
        self.graph.changed()

    def replace_leaf(self, node: Node, module: nn.Module) -> None:
        """Puts `module` in the place of the leaf that a node calls, for all its calls. Names of its tensors are state-dict keys."""
        path = str(node.target)
        module.training = self.graph.module.get_submodule(path).training
        self.graph.module.get_submodule(owner(path))._modules[path.rpartition(".")[2]] = module
        self.edits.replaced[path] = None
        for call in self.calls(path):
            self.touch(call)

    def calls(self, path: str) -> Nodes:
        """The nodes that call the leaf at `path`."""
        return self._users_of("call_module", path)

    def reads(self, name: str) -> Nodes:
        """The nodes that read a parameter or a buffer themselves."""
        return self._users_of("get_attr", name)

    def _users_of(self, op: str, target: str) -> Nodes:
        known = self._uses.get((op, target), ())
        return tuple(sorted({n for n in known if n.op == op and n.target == target and not n._erased}))

    def _used(self, node: Node) -> None:
        if node.op in ("call_module", "get_attr"):
            self._uses.setdefault((node.op, str(node.target)), []).append(node)

    def add_module(self, path: str, module: nn.Module) -> None:
        """Registers a new module."""
        self.graph.module.add_submodule(path, module)
        self.edits.added[path] = None

    def add_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Registers a new parameter, making the modules on the way where there are none."""
        path, _, last = name.rpartition(".")
        holder: nn.Module = self.graph.module
        for part in filter(None, path.split(".")):
            holder = holder._modules.setdefault(part, nn.Module())  # type: ignore[assignment]  # None only where a child was removed
        holder.register_parameter(last, parameter)
        self.edits.added[name] = None

    def remove(self, names: Iterable[str]) -> None:
        """Unregisters modules, parameters and buffers; names that are gone already are ignored."""
        for name in names:
            try:
                holder = self.graph.module.get_submodule(owner(name))
            except AttributeError:
                continue
            last = name.rpartition(".")[2]
            for registry in (holder._parameters, holder._buffers, holder._modules):
                if last in registry:
                    del registry[last]
                    self.edits.removed[name] = None
            holder._non_persistent_buffers_set.discard(last)
        self.graph.changed()

    def freeze(self, names: Iterable[str]) -> None:
        """Parameters that no longer require a gradient."""
        for name in names:
            self.graph.module.get_parameter(name).requires_grad_(False)
            self.edits.frozen[name] = None
        self.graph.changed()

    def keep_buffers(self, nodes: Iterable[Node]) -> None:
        """Lets what `nodes` write into their buffers go into copies: a step computes the same, and the buffers stay as they are."""
        inside, graph = set(nodes), self.graph
        writers = [n for n in graph.nodes if writes_in_place(graph.module, n)]
        for target in dict.fromkeys(str(n.target) for n in sorted(inside) if n.op == "get_attr"):
            reads = graph.fx.find_nodes(op="get_attr", target=target)
            if inside.issuperset(reads) and any(storages(reads[0]) & storages(w) for w in writers):
                copied = self.call("clone", (reads[0],), after=reads[0])
                for read in reads:
                    self.redirect(read, copied)

    def outline(
        self,
        nodes: Iterable[Node],
        wrap: Wrap,
        name: str,
        *,
        target: bool = False,
        image: bool = False,
        outside: Wrap | None = None,
        only: Callable[[Nodes], bool] = lambda _: True,
    ) -> tuple[Section, ...]:
        """Declares that nodes run as one unit in the emitted module, keeping all sections nested or disjoint.

        The rule: a section with a local loss stays whole, and is never inside one without. A section without a loss is divided along those
        with one, and along those that it overlaps in part; a section that lies wholly inside another nests. Each piece becomes a section.

        Args:
            nodes: a convex set, in any order. wrap, target, image: as in `Section`.
            name: of the section; pieces and names that are taken get a number.
            outside: without `target`: leave out what runs in a section of this kind already.
            only: which pieces are worth a section; default: all that compute something.
        """
        if target:
            section = Section(name, tuple(sorted(set(nodes))), wrap, self.author, target, image)
            self._divide_others(section)
            return (self._declare(section),)
        pieces = filter(only, _divide(nodes := set(nodes), self._sections_with(nodes), outside))
        return tuple(self._declare(Section(name, piece, wrap, self.author, target, image)) for piece in pieces)

    def _divide_others(self, border: Section) -> None:
        """Divides the sections without a local loss that a new one with a loss would not nest with."""
        settled = [border, *(s for s in self.graph.sections if s.target)]
        for section in [s for s in self.graph.sections if not s.target]:
            pieces = _divide(set(section.nodes), settled)
            if len(pieces) < 2:
                settled.append(section)
            else:
                self._set_sections(s for s in self.graph.sections if s is not section)
                settled += [self._declare(replace(section, nodes=piece)) for piece in pieces]

    def remove_sections(self, chosen: Callable[[Section], bool]) -> None:
        """Withdraws sections: their nodes run as part of what holds them."""
        self._set_sections(s for s in self.graph.sections if not chosen(s))

    def _set_sections(self, sections: Iterable[Section]) -> None:
        self.graph.sections[:] = sections
        self._held = None

    def _sections_with(self, nodes: Iterable[Node]) -> list[Section]:
        """The sections that hold some of these nodes, in the order in which they were declared."""
        if self._held is None:
            self._held = {}
            for number, section in enumerate(self.graph.sections):
                self._hold(number, section)
        held = self._held
        return list(dict(sorted((item for n in nodes for item in held.get(n, ())), key=lambda item: item[0])).values())

    def _hold(self, number: int, section: Section) -> None:
        if self._held is not None:
            for node in section.nodes:
                self._held.setdefault(node, []).append((number, section))

    def _declare(self, section: Section) -> Section:
        taken = {s.name for s in self.graph.sections}
        names = itertools.chain([section.name], (f"{section.name}_{number}" for number in itertools.count(2)))
        section = replace(section, name=next(name for name in names if name not in taken))
        self._hold(len(self.graph.sections), section)
        self.graph.sections.append(section)
        self.edits.sections[section.name] = None
        return section


def _divide(nodes: set[Node], sections: Sequence[Section], outside: Wrap | None = None) -> list[Nodes]:
    """A convex set in convex pieces, each of which nests with all sections; without what computes nothing or runs `outside`.

    `sections` may leave out those that hold none of the nodes.
    """
    sections = [s for s in sections if not nodes.isdisjoint(s.nodes)]
    pending, pieces = [nodes], list[Nodes]()
    while pending:
        piece = pending.pop()
        section = next((s for s in sections if _divides(s, piece, outside)), None)
        if section is not None:
            before, inside, after = _cells(piece, piece & set(section.nodes))
            pending += [before, after] if section.wrap is outside else [before, inside, after]
        elif any(n.op != "get_attr" for n in piece):
            pieces.append(tuple(sorted(piece)))
    return sorted(pieces)


def _divides(section: Section, nodes: set[Node], outside: Wrap | None) -> bool:
    """Whether `nodes` cannot stay whole: the section overlaps them in part, has a loss and is inside them, or is one to be left out."""
    held = set(section.nodes)
    if not any(n.op != "get_attr" for n in held & nodes):
        return False
    return section.wrap is outside or (not nodes <= held and (section.target or not held <= nodes))


def _cells(nodes: set[Node], border: set[Node]) -> tuple[set[Node], set[Node], set[Node]]:
    """A convex set in three: what runs before a convex part of it, that part, and what runs after it or depends on it. All are convex."""
    last = max(border)
    before, after = set[Node](), set[Node]()
    for node in sorted(nodes - border):
        depends = any(i in border or i in after for i in node.all_input_nodes)
        (after if depends or last < node else before).add(node)
    return before, border, after
