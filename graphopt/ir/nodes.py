"""Facts about single nodes: what they carry, which parameters they read, which memory they write and share."""

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import fx, nn
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from graphopt.ir.graph import Graph
from graphopt.ir.shapes import tensors_in
from graphopt.runtime.by_mode import ByMode

#: Python's assignments to a part of an object (`x += 1`, `x[0] = 1`), as methods and as functions: they write into their first operand
_ASSIGNMENTS = "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift iconcat setitem"
_WRITING_METHODS = frozenset(f"__{name}__" for name in _ASSIGNMENTS.split())
_WRITING_FUNCTIONS = frozenset(getattr(operator, name) for name in _WRITING_METHODS)


def activations(graph: Graph) -> set[Node]:
    """Nodes that carry activations: floating-point tensors computed from the input (not from parameters alone)."""
    return graph.cached(_activations)


def _activations(graph: Graph) -> set[Node]:
    found: set[Node] = set()
    for node in graph.nodes:
        computed = node.op != "output" and any(n in found for n in node.all_input_nodes)
        floating = (t.is_floating_point() or t.is_complex() for t in tensors_in(node.meta.get("val")))
        if node.op == "placeholder" or (computed and any(floating)):
            found.add(node)
    return found


def leaf(graph: Graph, node: Node) -> nn.Module | None:
    """The module that a node calls; None for any other node."""
    return graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def attribute(module: nn.Module, target: str) -> Any:
    """What a `get_attr` node with this target reads."""
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def parameters_read(module: fx.GraphModule, node: Node) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and values of the parameters that a node itself reads: those of the leaf it calls, or the one it gets."""
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if not leaf._modules:  # most leaves: their parameters are theirs alone
            yield from [(f"{node.target}.{name}", p) for name, p in leaf._parameters.items() if p is not None]
            return
        for name, parameter in leaf.named_parameters():
            yield f"{node.target}.{name}", parameter
    elif node.op == "get_attr":
        value = attribute(module, str(node.target))
        if isinstance(value, nn.Parameter):
            yield str(node.target), value


def parameters_of(graph: Graph, nodes: Iterable[Node]) -> tuple[str, ...]:
    """Names of the parameters that nodes read, in order of use, each once (a tied one under the name it is first read by)."""
    names: dict[int, str] = {}
    for node in nodes:
        for name, parameter in parameters_read(graph.module, node):
            names.setdefault(id(parameter), name)
    return tuple(names.values())


def parameter_readers(graph: Graph) -> dict[int, list[Node]]:
    """The nodes that read each parameter, by its identity (`id`), in execution order."""
    return graph.cached(_parameter_readers)


def _parameter_readers(graph: Graph) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for _, parameter in parameters_read(graph.module, node):
            found.setdefault(id(parameter), []).append(node)
    return found


def trainable(graph: Graph, node: Node) -> bool:
    """Whether a node reads a parameter that requires a gradient."""
    return any(p.requires_grad for _, p in parameters_read(graph.module, node))


def writes_in_place(module: nn.Module, node: Node) -> bool:
    """Whether a node writes into one of its inputs: by name (`relu_`), by argument (`inplace=True`, `out=`) or by module (`ReLU(inplace)`).

    A leaf counts by its own `inplace`: modules inside of it usually write into what the leaf itself has computed.
    """
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if not isinstance(leaf, ByMode):
            return bool(getattr(leaf, "inplace", False))
        return any(call_writes_in_place(leaf.function, *arguments) for arguments in (leaf.train_arguments, leaf.eval_arguments))
    return node.op in ("call_function", "call_method") and call_writes_in_place(node.target, node.args, node.kwargs)


def call_writes_in_place(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether the call of a function, or of a method by its name, writes into one of its inputs."""
    if isinstance(function, str):
        return _named_in_place(function)
    if function in _WRITING_FUNCTIONS or _named_in_place(getattr(function, "__name__", "")):
        return True
    if kwargs.get("inplace") is True or kwargs.get("out") is not None:
        return True
    position = _position_of_inplace(function)
    return position is not None and len(args) > position and args[position] is True


def _named_in_place(name: str) -> bool:
    """Whether the name of a function or method says so: by the convention of torch, with a trailing underscore."""
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING_METHODS


@cache
def _position_of_inplace(function: Any) -> int | None:
    """Which positional argument of a function is called `inplace`."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def storages(node: Node) -> set[StorageWeakRef]:
    """The memory behind a node's value; two nodes whose sets meet share memory."""
    return {StorageWeakRef(t.untyped_storage()) for t in tensors_in(node.meta.get("val"))}


def overwriter(graph: Graph, node: Node) -> Node | None:
    """The first node that writes into the memory of an activation after it is computed, also through a view of it; None if none does."""
    memory, aliases = storages(node), [node]
    known = set(aliases)
    for alias in aliases:  # it grows: a view is a neighbour of what it is a view of, reads of one buffer are none
        reads = graph.fx.find_nodes(op="get_attr", sort=False) if alias.op == "get_attr" else ()
        found = [n for n in (*alias.all_input_nodes, *alias.users, *reads) if n not in known and memory & storages(n)]
        known.update(found)
        aliases += dict.fromkeys(found)
    readers = {user for alias in aliases for user in alias.users if node < user}
    return min((user for user in readers if writes_in_place(graph.module, user)), default=None)


class Memory:
    """Which nodes have values in the same memory, as it is when this is made.

    Attributes:
        of: the memory behind the value of each node (`storages`).
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.of = {node: storages(node) for node in nodes}
        self._holders: dict[StorageWeakRef, list[Node]] = {}
        for node, held in self.of.items():
            for memory in held:
                self._holders.setdefault(memory, []).append(node)

    def sharing(self, node: Node) -> tuple[Node, ...]:
        """The nodes whose memory meets that of one of them, itself included."""
        return tuple(dict.fromkeys(holder for memory in self.of[node] for holder in self._holders[memory]))


def can_leave_its_input(node: Node, order: Mapping[Node, int], memory: Memory) -> bool:
    """Whether nobody would see that a node no longer writes into its first input, once later readers of that read the node instead.

    Args:
        order, memory: of all nodes, before any change.
    """
    source, here = node.all_input_nodes[0], order[node]
    if getattr(node.meta.get("val"), "shape", None) != source.meta["val"].shape:
        return False  # an assignment to a part of it: the node has no value to read instead
    for other in memory.sharing(source):
        if other is node or order[other] > here:
            continue
        if other.op in ("placeholder", "get_attr") or (other is not source and any(order[u] > here for u in other.users)):
            return False
    return True
