"""Divides an emitted module where no gradient flows: into parts that can run in processes of their own, one after the other.

A section whose backward runs inside its forward (`LocalBackward`) lets no gradient through. So an emitted module with K-1 of them is K
gradient-isolated modules, numbered from 0: each section with what leads to it from the one before, and behind the last section the rest of
the network. What one module computes and a later one reads crosses the cut between them: activations, numbers (shapes), local losses, and
the input where a later module needs it.

A part runs one or more consecutive modules. Its root has the leaves and tensors that these read, under their own names, and nothing else.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx import Node

from graphopt.errors import PassError
from graphopt.ir.copying import copy_node
from graphopt.ir.module import TrainingModule
from graphopt.ir.nodes import attribute, writes_in_place
from graphopt.runtime.body import Body, LocalBackward, bodies

_CUT = "Cut elsewhere, so that one module has all of it"


@dataclass(frozen=True)
class Part:
    """Consecutive gradient-isolated modules of an emitted module, as one module.

    Attributes:
        module: `module(*values, target)` with the values named by `incoming`. It returns a tuple, the values named by `outgoing`; the
            last part returns what the emitted module returns. Parameters and buffers are the emitted module's own.
        incoming, outgoing: names of the values that cross the cuts before and after it, in order. Those that enter the first part are the
            emitted module's inputs but for the target, which every part takes.
        losses: positions in `outgoing` of the local losses that this part computes; they are None in eval mode.
        stream: the number of the random stream that the part begins with.
    """

    module: TrainingModule
    incoming: tuple[str, ...]
    outgoing: tuple[str, ...]
    losses: tuple[int, ...]
    stream: int

    @property
    def last(self) -> bool:
        """Whether it gives the network's output."""
        return not self.outgoing


def isolated_modules(module: TrainingModule) -> int:
    """How many gradient-isolated modules an emitted module consists of; 1 if no section has a local loss."""
    return len(_sections(module)) + 1


def split(module: TrainingModule, runs: Sequence[range]) -> tuple[Part, ...]:
    """The parts of an emitted module: `runs` are the numbers of the modules in each, from 0 to the last, in order.

    A run may be empty: its part hands on what it gets. Where an emitted module begins behind a cut (`emit(start=)`), modules before the
    cut are not in it: its own are the last ones of those that `runs` number. Run one after the other, the parts compute what `module`
    computes, bit for bit.

    Raises PassError, with the names, if two parts read a tensor that changes in training, or a gradient would cross a cut.
    """
    return _Splitter(module, runs).parts()


def singly(module: TrainingModule) -> tuple[Part, ...]:
    """The parts of one module each; raises PassError if it cannot be divided so."""
    return split(module, [range(number, number + 1) for number in range(isolated_modules(module))])


def parameters_by_module(module: TrainingModule) -> tuple[frozenset[str], ...]:
    """Names of each gradient-isolated module's parameters; a tied one has the alphabetically first of its names."""
    first: dict[int, str] = {}
    for name, parameter in sorted(module.named_parameters(remove_duplicate=False)):
        first.setdefault(id(parameter), name)
    return tuple(frozenset(first[id(p)] for p in part.module.parameters()) for part in singly(module))


def _sections(module: TrainingModule) -> list[Node]:
    """The calls of sections with a backward of their own, in execution order."""
    calls = module.graph.find_nodes(op="call_module", sort=True)
    return [n for n in calls if isinstance(module.get_submodule(str(n.target)), LocalBackward)]


class _Splitter:
    """Finds which part every node of an emitted module's graph belongs to, and builds the parts."""

    def __init__(self, module: TrainingModule, runs: Sequence[range]) -> None:
        self.module, self.runs, self.nodes = module, runs, list(module.graph.nodes)
        self.sections = _sections(module)
        self.target = next((n for n in self.nodes if n.op == "placeholder" and n.name == "target"), None)
        self.losses: set[Node] = set()
        #: calls of sections, and what takes their outputs apart
        self.results: set[Node] = set(self.sections)
        self._place()

    def _place(self) -> None:
        """Gives each node that depends on the input the number of its module, and that module's part."""
        count = self.runs[-1].stop
        first = count - len(self.sections) - 1  # behind a cut, earlier modules are not there
        number = {node: first + position for position, node in enumerate(self.sections)}
        for node in self.nodes:
            if node in number or node.op == "placeholder":
                continue
            if node.op == "output" or node.target == "sections.output":
                number[node] = count - 1
            elif node.target is operator.getitem and node.args[0] in self.results:
                number[node] = self._take_apart(node, number)
            elif known := [self._after(i, number, first) for i in node.all_input_nodes if i in number or i.op == "placeholder"]:
                number[node] = max(known)
        # What depends on no input and leads nowhere is there for its effect on a buffer.
        number |= {n: count - 1 for n in self.nodes if n.op not in ("placeholder", "get_attr") and n not in number and not n.users}
        self.part = {n: next(i for i, run in enumerate(self.runs) if at in run) for n, at in number.items()}

    def _after(self, node: Node, number: Mapping[Node, int], first: int) -> int:
        """The first module that can read a node without waiting for a gradient-isolated one that it belongs to."""
        return first if node.op == "placeholder" else number[node] + (node in self.results)

    def _take_apart(self, item: Node, number: Mapping[Node, int]) -> int:
        """Notes which output of a section this is; returns the section's number."""
        source = item.args[0]
        assert isinstance(source, Node)
        (self.losses if source in self.sections and item.args[1] == 1 else self.results).add(item)
        return number[source]

    def parts(self) -> tuple[Part, ...]:
        found = tuple(self._part(index) for index in range(len(self.runs)))
        self._check_tensors()
        return found

    def _part(self, index: int) -> Part:
        graph, copies, inside = fx.Graph(), dict[Node, Node](), self._inside(index)
        incoming, outgoing = self._crossing(index), self._crossing(index + 1)
        for node in incoming:
            copies[node] = graph.placeholder(node.name)
        target = graph.placeholder("target", default_value=None)
        if self.target is not None:
            copies[self.target] = target
        for node in inside:
            copies[node] = copy_node(graph, node, copies)
        if index + 1 < len(self.runs):
            self._check_crossing(outgoing, index)
            graph.output(tuple(copies[n] for n in outgoing))
        graph.lint()
        root = _root(self.module, graph)
        own = tuple(i for i, n in enumerate(outgoing) if n in self.losses and self.part[n] == index)
        enters, leaves = (tuple(n.name for n in values) for values in (incoming, outgoing))
        return Part(TrainingModule(root, graph, type(self.module).__name__), enters, leaves, own, self._stream(index))

    def _inside(self, index: int) -> list[Node]:
        """The nodes of a part in order, with what they read that depends on no input: two parts may each compute that."""
        inside = {n for n in self.nodes if self.part.get(n) == index}
        for node in reversed(self.nodes):
            if node.op != "placeholder" and node not in self.part and any(u in inside for u in node.users):
                inside.add(node)
        return [n for n in self.nodes if n in inside]

    def _crossing(self, index: int) -> list[Node]:
        """What is computed before a part, and read in it or after it; before the first, the inputs."""

        def read_from_here_on(node: Node) -> bool:
            return any(self.part.get(u, -1) >= index for u in node.users)

        if index == len(self.runs):
            return []
        inputs = [n for n in self.nodes if n.op == "placeholder" and n is not self.target and (not index or read_from_here_on(n))]
        return inputs + [n for n in self.nodes if self.part.get(n, index) < index and read_from_here_on(n)]

    def _check_crossing(self, crossing: Iterable[Node], index: int) -> None:
        """Raises PassError if anything before a cut trains by a gradient that would have to come back over it."""
        for node in crossing:
            seen, queue = set[Node](), [node]
            while queue:
                current = queue.pop()
                if current not in seen and current not in self.results and current not in self.losses:
                    seen.add(current)
                    queue += current.all_input_nodes
            training = next((read.name for read in _reads(self.module, seen) if read.tensor.requires_grad), None)
            if training is not None:
                what = f"a gradient of {training} would come back over the cut after module {self.runs[index].stop}"
                raise PassError(what, where="train.strategy", fix=_CUT)

    def _check_tensors(self) -> None:
        """Raises PassError if two parts read a tensor that changes in training: each would have its own."""
        first: dict[int, tuple[int, str]] = {}
        found = [(index, read) for index in range(len(self.runs)) for read in _reads(self.module, self._inside(index))]
        changing = {id(read.tensor) for _, read in found if read.changes}
        for index, read in found:
            other, name = first.setdefault(id(read.tensor), (index, read.name))
            if other != index and id(read.tensor) in changing:
                names = name if name == read.name else f"{name} and {read.name} are one tensor, which"
                what = f"{names} changes in training, and is in {_numbers(self.runs[other])} and {_numbers(self.runs[index])}"
                raise PassError(what, where="train.strategy", fix=_CUT)

    def _stream(self, index: int) -> int:
        before = [n for n in self.sections if self.part[n] < index]
        section = self.module.get_submodule(str(before[-1].target)) if before else None
        return section.number + 1 if isinstance(section, LocalBackward) else 0


def _numbers(run: range) -> str:
    """`module 2`, or `modules 2 to 4`, counted from 1."""
    return f"module {run.stop}" if len(run) == 1 else f"modules {run.start + 1} to {run.stop}"


class _Read(NamedTuple):
    """A parameter or buffer that nodes read, and whether it changes in training."""

    name: str
    tensor: Tensor
    changes: bool


def _reads(module: TrainingModule, nodes: Iterable[Node]) -> Iterator[_Read]:
    """What nodes read themselves, through the leaves that they call, and in the sections that they call."""
    nodes = list(nodes)
    written = {source for node in nodes for source in _written(module, node)}
    for node in _with_bodies(module, nodes):
        path = str(node.target)
        if node.op == "get_attr" and isinstance(value := attribute(module, path), Tensor):
            yield _Read(path, value, value.requires_grad or node in written)
        elif node.op == "call_module":
            leaf = module.get_submodule(path)
            parameters = list(leaf.named_parameters(path))
            yield from (_Read(name, p, p.requires_grad) for name, p in parameters)
            # Statistics of a norm, say; one that is frozen keeps them.
            moving = not parameters or any(p.requires_grad for _, p in parameters)
            yield from (_Read(name, buffer, moving) for name, buffer in leaf.named_buffers(path))


def _written(module: TrainingModule, node: Node) -> Iterator[Node]:
    """The inputs that a node, or the section that it calls, writes into."""
    inputs = [n for n in node.all_input_nodes if n.op == "get_attr"]
    if inputs and writes_in_place(module, node):
        yield from inputs
    body = getattr(module.get_submodule(str(node.target)), "body", None) if node.op == "call_module" else None
    if isinstance(body, Body):
        # A body's inputs have the names of the nodes that they come from.
        graph: Any = body.module.graph
        names = {n.name for n in graph.find_nodes(op="placeholder") if n.meta.get("written")}
        yield from (n for n in inputs if n.name in names)


def _with_bodies(module: TrainingModule, nodes: Iterable[Node]) -> Iterator[Node]:
    """Nodes, and those of the bodies of the sections that they call."""
    for node in nodes:
        yield node
        if node.op == "call_module":
            for _, body in bodies(module.get_submodule(str(node.target))):
                if isinstance(body, fx.GraphModule):  # a head and decoder are none
                    yield from body.graph.nodes


def _root(module: TrainingModule, graph: fx.Graph) -> nn.Module:
    """A root for a part's graph: the leaves, sections and tensors of `module` that it uses, under their names."""
    root = nn.Module()
    root.training = module.training
    names = {id(part): path for path, part in module.named_modules()}
    nodes = list(_with_bodies(module, graph.nodes))
    called = {str(n.target) for n in nodes if n.op == "call_module"}
    for path in called.copy():
        section = module.get_submodule(path)
        if isinstance(section, LocalBackward):  # its head and decoder are called by no node
            called |= {names[id(part)] for part in section.parts() if id(part) in names}
    for path in sorted(called, key=lambda path: (path.count("."), path)):
        _hold(root, module, path).add_module(path.rpartition(".")[2], module.get_submodule(path))
    for path in dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr"):
        _read_from(_hold(root, module, path), module, path)
    return root


def _hold(root: nn.Module, module: nn.Module, path: str) -> nn.Module:
    """The module of a part that holds what has this path; made where there is none."""
    holder = root
    for end, name in enumerate(names := path.split(".")[:-1], 1):
        if name not in holder._modules:
            container = nn.Module()
            container.training = module.get_submodule(".".join(names[:end])).training
            holder.add_module(name, container)
        holder = holder.get_submodule(name)
    return holder


def _read_from(holder: nn.Module, module: nn.Module, path: str) -> None:
    """Registers on `holder` the tensor at `path` of `module`, as it is registered there."""
    owner, _, name = path.rpartition(".")
    source = module.get_submodule(owner)
    if name in source._parameters:
        holder._parameters[name] = source._parameters[name]
    elif name in source._buffers:
        holder.register_buffer(name, source._buffers[name], persistent=name not in source._non_persistent_buffers_set)
    else:
        setattr(holder, name, getattr(source, name))
