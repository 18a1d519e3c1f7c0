"""Emission: the flat graph becomes the module that trains, with its sections outlined.

Passes rewrite one flat graph. What has to run as a unit (nodes under no_grad, checkpointed ones, locally supervised ones) is declared
as a `Section` and becomes a nested module only here, after all passes. The parameters stay where they are: a section's body shares
leaf modules with the root and is not registered, and tensors that the graph reads itself are read by the root and passed in.
"""

import operator
from collections.abc import Iterable, Sequence

from torch import fx, nn
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from graphopt.errors import PassError
from graphopt.ir.collector import uncollected
from graphopt.ir.copying import copy_node
from graphopt.ir.flow import reentry
from graphopt.ir.graph import Graph, Origin
from graphopt.ir.module import LateModule, TrainingModule
from graphopt.ir.nodes import storages, writes_in_place
from graphopt.ir.section import Section
from graphopt.runtime.body import WithLocalLoss

Members = tuple[Node, ...]


@uncollected()
def emit(graph: Graph, *, start: Node | None = None, stop: Node | None = None) -> TrainingModule:
    """The module that trains. Leaves, parameters and buffers are shared with `graph`, which stays flat.

    `start` is an activation that takes the input's place (what only led to it is gone), `stop` one that takes the output's. Raises
    PassError if sections overlap without nesting, one without a local loss holds one with, or one is not convex.
    """
    flat, copies = _copied(graph, start, stop)
    # A prefix, and what comes before a suffix, leave the buffers alone that their code writes.
    writing = () if stop is not None else graph.nodes if start is None else graph.nodes[graph.order[start] :]
    _drop_dead(flat, graph.module, {copies[n] for n in writing if n in copies}, keep_input=start is None)
    alive = set(flat.nodes)
    sections: list[tuple[Section, Members]] = []
    for section in graph.sections:
        members = tuple(copies[n] for n in section.nodes if n in copies and copies[n] in alive and n is not start)
        if any(m.op != "get_attr" for m in members):
            sections.append((section, members))
    _check_nesting(sections)
    with_loss = next((s for s in graph.sections if s.target), None) if stop is None else None
    outliner = _Outliner(flat, _root_of(graph.module, bool(sections or with_loss)), late=graph.module.late)
    # Inner before outer; of two that hold the same nodes, the one with a local loss is the outer.
    for section, members in sorted(sections, key=lambda s: (len(s[1]), s[0].target)):
        outliner.outline(section, members)
    if with_loss is not None:
        outliner.add_losses(with_loss)
    flat.lint()
    return TrainingModule(outliner.root, flat, type(graph.module).__name__, late=graph.module.late)


def _copied(graph: Graph, start: Node | None, stop: Node | None) -> tuple[fx.Graph, dict[Node, Node]]:
    """A copy of the nodes from `start` to `stop`, and which node became which."""
    flat = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes if stop is None else graph.nodes[: graph.order[stop] + 1]:
        if node is start:
            with flat.inserting_before(next(iter(flat.nodes))):
                features = flat.placeholder("features")
            features.meta = dict(node.meta)
            copies[node] = features
        else:
            copies[node] = copy_node(flat, node, copies)
    if stop is not None:
        flat.output(copies[stop])
    return flat, copies


def _root_of(module: fx.GraphModule, sections: bool) -> nn.Module:
    """A module that holds what `module` holds, for a graph of its own."""
    root = nn.Module()
    shared = ("_parameters", "_buffers", "_non_persistent_buffers_set", "training")
    root.__dict__.update({name: module.__dict__[name] for name in shared})
    root._modules = dict(module._modules)
    if sections:
        root.add_module("sections", nn.Module())
    return root


class _Outliner:
    """Replaces the nodes of sections in `graph` by calls of modules that run them, registered on `root`; inner sections first."""

    def __init__(self, graph: fx.Graph, root: nn.Module, *, late: bool) -> None:
        self.graph, self.root, self.late = graph, root, late
        self._losses: list[Node] = []
        self._target: Node | None = None
        #: the call that a node has become part of, and the nodes that such a call consists of (itself, and what takes its output apart)
        self._caller: dict[Node, Node] = {}
        self._parts: dict[Node, Members] = {}
        #: of each such call, the tensors among its inputs that it writes into
        self._written: dict[Node, set[Node]] = {}

    def outline(self, section: Section, members: Members) -> None:
        current = dict.fromkeys(n for m in members for n in self._standing_for(m))
        inside = {m for m in current if m.op not in ("get_attr", "placeholder", "output")}
        ordered = sorted(inside)
        # Only what lies between its first and its last node can be in the way: an outlining takes the time of its own nodes.
        around = _from_to(ordered[0], ordered[-1])
        if (outside := reentry(around, inside)) is not None:
            what = f"section {section.name!r} is not convex: node {outside} lies outside it, between two of its nodes"
            raise PassError(what, where=str(section.author), fix="End it at a cut point (graphopt inspect shows them)")
        leaving = [m for m in ordered if any(u not in inside for u in m.users)]
        # Activations first, then tensors that the root reads for the body.
        inputs = sorted({i for m in ordered for i in m.all_input_nodes if i not in inside}, key=lambda n: (n.op == "get_attr", n))
        written = self._written_by(ordered, inputs)
        self._register(section, ordered, inputs, leaving, written)
        call = self._call(section, inputs, ordered[-1], leaving)
        self._written[call] = written
        taken_apart = self._read_instead(section, call, leaving, inside)
        for node in reversed(ordered):
            self.graph.erase_node(node)
        _restore_order([*(n for n in around if n not in inside), call, *taken_apart])
        self._parts[call] = (call, *taken_apart)
        self._caller |= dict.fromkeys((*members, *(n for n in ordered if n in self._parts)), call)

    def _standing_for(self, member: Node) -> Members:
        """What a node of the flat graph is now: itself, or the call of an inner section with what takes its outputs apart."""
        while member in self._caller:
            member = self._caller[member]
        return self._parts.get(member, (member,))

    def _register(
        self, section: Section, ordered: Sequence[Node], inputs: Sequence[Node], leaving: Sequence[Node], written: set[Node]
    ) -> None:
        body = fx.Graph()
        copies: dict[Node, Node] = {}
        for node in inputs:
            copies[node] = body.placeholder(node.name)
            copies[node].meta = {**node.meta, "written": node in written}
        for node in ordered:
            copies[node] = copy_node(body, node, copies)
        out = tuple(copies[n] for n in leaving)
        body.output(out[0] if len(out) == 1 else out)
        body.lint()
        wrapper = section.wrap(LateModule(self.root, body, f"Section_{section.name}", late=self.late))
        wrapper.train(self.root.training)
        self.root.get_submodule("sections").add_module(section.name, wrapper)

    def _written_by(self, ordered: Sequence[Node], inputs: Sequence[Node]) -> set[Node]:
        """The tensors read for a section that it writes into: buffers that its code keeps."""
        written = {w for n in ordered for w in self._written.get(n, ())}
        for node in (n for n in ordered if writes_in_place(self.root, n)):
            written |= {i for i in inputs if i.op == "get_attr" and storages(i) & storages(node)}
        return written

    def _call(self, section: Section, inputs: Sequence[Node], last: Node, leaving: Sequence[Node]) -> Node:
        extra: list[Node] = [self._target_input(section)] if section.target else []
        if section.image:
            first = next(n for n in self.graph.nodes if n.op == "placeholder")
            if first.name == "features":
                raise PassError(f"section {section.name!r} needs the image, which is behind the cut", where=str(section.author))
            extra.append(first)
        with self.graph.inserting_after(last):
            call = self.graph.call_module(f"sections.{section.name}", (*extra, *inputs))
        call.meta = {"origin": leaving[-1].meta["origin"], "pass": section.author.index, "section": section.name}
        return call

    def _target_input(self, section: Section) -> Node:
        if self._target is None:
            with self.graph.inserting_after([n for n in self.graph.nodes if n.op == "placeholder"][-1]):
                self._target = self.graph.placeholder("target", default_value=None)
            self._target.meta = {"origin": Origin("", 0), "pass": section.author.index}
        return self._target

    def _read_instead(self, section: Section, call: Node, leaving: Sequence[Node], inside: set[Node]) -> Members:
        """Readers of what leaves a section read the outputs of its call. Gives the nodes that take its output apart, in order."""
        result = last = call
        if section.target:
            result = self._item(call, 0, call)
            last = self._item(call, 1, result)
            self._losses.append(last)
        for number, node in enumerate(leaving):
            value = result
            if len(leaving) > 1:
                value = last = self._item(result, number, last)
                value.meta = dict(node.meta)
            else:
                value.meta |= {k: v for k, v in node.meta.items() if k not in value.meta}
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
        return _from_to(call, last)[1:]

    def _item(self, value: Node, number: int, after: Node) -> Node:
        with self.graph.inserting_after(after):
            item = self.graph.call_function(operator.getitem, (value, number))
        item.meta = dict(value.meta)
        return item

    def add_losses(self, section: Section) -> None:
        """Where sections have local losses: the output becomes `(output, local_loss)` in training. They may all lie before `start`."""
        self._target_input(section)
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        self.root.get_submodule("sections").add_module("output", WithLocalLoss())
        losses = set(self._losses)
        with self.graph.inserting_before(output):
            final = self.graph.call_module("sections.output", (output.args[0], *(n for n in self.graph.nodes if n in losses)))
        final.meta = {"origin": Origin("", 0)}
        output.args = (final,)


def _from_to(first: Node, last: Node) -> Members:
    """The nodes from one to another, in the order of their graph."""
    found = [first]
    while found[-1] is not last:
        found.append(found[-1].next)
    return tuple(found)


def _restore_order(nodes: Sequence[Node]) -> None:
    """Restores a topological order of neighbouring nodes with as few moves as possible, so that random operations keep their order."""
    pending = dict.fromkeys(nodes)
    order: list[Node] = []
    for node in nodes:
        stack = [node] if node in pending else []
        while stack:
            missing = [i for i in stack[-1].all_input_nodes if i in pending]
            if missing:
                stack += reversed(missing)
                continue
            top = stack.pop()
            if top in pending:
                del pending[top]
                order.append(top)
    if order != list(nodes):
        before = nodes[0].prev
        for node in order:
            before.append(node)
            before = node


def _check_nesting(sections: Iterable[tuple[Section, Members]]) -> None:
    """Sections are disjoint or nested, and one with a local loss is in none without. Larger ones come first, so that owners are known."""
    computing = [(section, {n for n in members if n.op != "get_attr"}) for section, members in sections]
    computing.sort(key=lambda item: -len(item[1]))
    #: the smallest section so far that a node is in, and the one that a section is in
    owner: dict[Node, int] = {}
    outside: list[int | None] = []
    for number, (inner, mine) in enumerate(computing):
        owners = {owner.get(n) for n in mine}
        if len(owners) > 1:
            other = computing[max(o for o in owners if o is not None)][0]
            fix = "Let one hold the other whole: move a cut, or select other regions"
            raise PassError(f"the sections {other.name!r} and {inner.name!r} overlap", where=f"{other.author} and {inner.author}", fix=fix)
        outside.append(next(iter(owners)))
        at = outside[-1]
        while at is not None:
            outer, theirs = computing[at]
            if inner.target and not outer.target and len(mine) != len(theirs):
                what = f"section {outer.name!r} holds section {inner.name!r}, which has a local loss: that loss could not leave it"
                fix = "Declare sections with Editor.outline, which divides them, or select other regions"
                raise PassError(what, where=f"{outer.author} and {inner.author}", fix=fix)
            at = outside[at]
        owner |= dict.fromkeys(mine, number)


def _drop_dead(graph: fx.Graph, module: fx.GraphModule, writing: set[Node], *, keep_input: bool) -> None:
    """Erases what nothing uses. A node that writes in place is used where the memory that it changed is read after it.

    What is in `writing` is used, too, where it writes into a buffer, which keeps its value after the step.
    """
    registered = {memory for n in graph.nodes if n.op == "get_attr" for memory in storages(n)}
    #: memory that a later node reads
    read: set[StorageWeakRef] = set()
    for node in reversed(list(graph.nodes)):
        if _is_dead(module, node, registered if node in writing else set(), read, keep_input=keep_input):
            graph.erase_node(node)
        else:
            read.update(memory for i in node.all_input_nodes for memory in storages(i))


def _is_dead(module: fx.GraphModule, node: Node, kept: set[StorageWeakRef], read: set[StorageWeakRef], *, keep_input: bool) -> bool:
    """Whether nothing needs a node: neither its value nor what it writes into memory that is `kept`, or `read` later."""
    if node.op == "output" or node.users or (node.op == "placeholder" and (keep_input or node.name == "features")):
        return False
    # Without its input, a graph has no use for assertions on the input's size.
    if keep_input and node.op == "call_function" and "assert" in getattr(node.target, "__name__", ""):
        return False
    return not writes_in_place(module, node) or (kept.isdisjoint(storages(node)) and read.isdisjoint(storages(node)))
