"""How far freezing reaches in a graph: which parameters, which nodes form a prefix, which lie behind something that trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, parameters_read
from graphopt.ir.paths import is_below
from graphopt.ir.regions import Region


@dataclass(frozen=True)
class Scope:
    """What freezing regions comes to.

    Attributes:
        parameters: state-dict names of the parameters to freeze, every alias of a tied one.
        tied: (name inside, alias outside) of parameters that are selected under one name and not under another.
        borrowed: (region, name) of parameters that a region reads and that another part of the backbone owns and trains.
        prefix: nodes without anything trainable at or before them, in execution order: the backward never comes here.
        behind: frozen nodes with something trainable before them, and parameter-free ones that only follow such.
        blockers: of each frozen region that is not part of the prefix, the trainable paths before it.
    """

    parameters: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]
    borrowed: tuple[tuple[str, str], ...]
    prefix: tuple[fx.Node, ...]
    behind: tuple[fx.Node, ...]
    blockers: dict[str, tuple[str, ...]]

    def covers(self, region: Region) -> bool:
        """Whether anything of a region is frozen: what its nodes read, or what is registered there and never read."""
        return not set(region.parameters).isdisjoint(self.parameters) or any(is_below(n, region.paths) for n in self.parameters)

    def warnings(self, lean: bool) -> Iterator[tuple[str, str]]:
        """What the user should know, as (region, message): parameters that still train, and a backward pass that goes on."""
        for region, name in self.borrowed:
            yield region, f"it reads {name}, which another part owns and trains: {name} is not frozen"
        if self.blockers:
            first, *more = self.blockers
            paths = self.blockers[first]
            named, verb = _listed(paths), "train" if len(paths) > 1 else "trains"
            also = f"; so for {len(more)} more of its regions" if more else ""
            cost = "what its input gradient takes is still saved" if lean else "its activations are still saved"
            passes = f"the backward passes through and {cost}{also}"
            yield first, f"frozen, but {named} before it {verb}: {passes}. Freeze {named} too to cut it off"


def freeze_scope(graph: Graph, regions: Sequence[Region]) -> Scope:
    """What freezing `regions` would come to. Changes nothing."""
    selected = {n for r in regions for n in r.nodes}
    names, tied, borrowed = _parameters(graph, regions, selected)
    frozen = {id(graph.module.get_parameter(n)) for n in names}
    active = activations(graph)
    trainable = {n: _trains(graph, n, frozen) for n in graph.nodes}
    open_: set[fx.Node] = set()
    for node in graph.nodes:
        if trainable[node] or any(i in open_ for i in node.all_input_nodes):
            open_.add(node)
    behind: dict[fx.Node, None] = {}
    for node in graph.nodes:
        follows = [i for i in node.all_input_nodes if i in active]
        free = not any(True for _ in parameters_read(graph.module, node)) and follows and all(i in behind for i in follows)
        if node in open_ and node in active and not trainable[node] and (node in selected or free):
            behind[node] = None
    return Scope(
        parameters=names,
        tied=tied,
        borrowed=borrowed,
        prefix=_prefix(graph, open_, active),
        behind=tuple(behind),
        blockers=_blockers(graph, regions, trainable, open_ & active, frozen),
    )


def _trains(graph: Graph, node: fx.Node, frozen: set[int]) -> bool:
    return any(p.requires_grad and id(p) not in frozen for _, p in parameters_read(graph.module, node))


def _parameters(
    graph: Graph, regions: Sequence[Region], selected: set[fx.Node]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Names to freeze, ties that leave the selection, and what is borrowed from parts that train."""
    paths = [p for r in regions for p in r.paths]
    aliases: dict[int, list[str]] = {}
    for name, parameter in graph.module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    readers: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        for _, parameter in parameters_read(graph.module, node):
            readers.setdefault(id(parameter), set()).add(node)
    names: dict[str, None] = {}
    tied, borrowed = [], []
    for key, known in aliases.items():
        inside, users = [n for n in known if is_below(n, paths)], readers.get(key, set())
        # A module that is registered under two names is whole under either.
        outside = [n for n in known if n not in inside and not users <= selected]
        if inside:
            names.update(dict.fromkeys(known))
            tied += [(inside[0], n) for n in outside]
        elif users & selected:
            # Owned elsewhere (a class token, a table at the root): it goes along when nothing else reads it.
            if users <= selected:
                names.update(dict.fromkeys(known))
            else:
                borrowed += [(r.name, known[0]) for r in regions if users & set(r.nodes)]
    return tuple(names), tuple(tied), tuple(borrowed)


def _prefix(graph: Graph, open_: set[fx.Node], active: set[fx.Node]) -> tuple[fx.Node, ...]:
    inside = {n for n in graph.nodes if n in active and n not in open_ and n.op != "placeholder"}
    if not any(True for n in inside for source in (n, *n.all_input_nodes) for _ in parameters_read(graph.module, source)):
        return ()
    # Shape arithmetic and tensors made of parameters alone belong to it where it uses them.
    for node in reversed(graph.nodes):
        if node not in inside and node not in open_ and node.op not in ("placeholder", "output") and any(u in inside for u in node.users):
            inside.add(node)
    return tuple(n for n in graph.nodes if n in inside)


def _blockers(
    graph: Graph, regions: Sequence[Region], trainable: dict[fx.Node, bool], open_: set[fx.Node], frozen: set[int]
) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for region in regions:
        if not any(n in open_ for n in region.nodes):
            continue
        before = ancestors(region.nodes) - set(region.nodes)
        paths = dict.fromkeys(_owner(graph, node, frozen) for node in graph.nodes if node in before and trainable[node])
        found[region.name] = tuple(paths)
    return found


def _owner(graph: Graph, node: fx.Node, frozen: set[int]) -> str:
    """The outermost path around a trainable node of which nothing is frozen: what a user would name to freeze it."""
    path = str(node.target)
    parts = path.split(".")
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        if not any(id(p) in frozen or not p.requires_grad for p in graph.module.get_submodule(outer).parameters()):
            return outer
    return path


def _listed(paths: tuple[str, ...]) -> str:
    shown = [*paths[:3], f"{len(paths) - 3} more"] if len(paths) > 3 else list(paths)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
