"""What a strategy that shards parameters gathers together: the units of an emitted module, as names.

The emitted module calls leaf modules, and never the containers around them. So a unit is a list of leaves: those of one block. A section
whose backward runs inside its forward is a unit of its own with everything in it. What the graph reads itself (class tokens, the sources of
mixed weights), what two units use, and what lies in no block, is gathered for the whole step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphopt.ir.paths import is_below
from graphopt.runtime.body import LocalBackward

Paths = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A section with a backward of its own: its path, and those of the leaves in it."""

    path: str
    leaves: Paths


@dataclass(frozen=True)
class Units:
    """Names of what is sharded together; every parameter of the module is in exactly one of them.

    Attributes:
        blocks: paths of leaf modules, one group per block, in execution order.
        sections: with a backward of their own; each is gathered whole.
        root: parameters that are gathered for the whole step.
        replicated: parameters without a dimension to shard: every rank holds them, and their gradients are averaged by name.
        unused: parameters that the forward never reads; they stay as they are.
    """

    blocks: tuple[Paths, ...]
    sections: tuple[Section, ...]
    root: Paths
    replicated: Paths
    unused: Paths

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sections = {section.path: list(section.leaves) for section in self.sections}
        names = {"root": list(self.root), "replicated": list(self.replicated), "unused": list(self.unused)}
        return {"blocks": [list(paths) for paths in self.blocks], "sections": sections, **names}


def units_of(module: nn.Module, blocks: Iterable[Paths]) -> Units:
    """The units of an emitted module, whose backbone has these blocks (the paths of each)."""
    by_name = dict(module.named_parameters(remove_duplicate=False))
    home = {path: block for block in blocks for path in block}
    groups: dict[Any, dict[str, None]] = defaultdict(dict)  # by block, or path of a section; "" is the root
    names = {id(part): path for path, part in module.named_modules(remove_duplicate=False)}
    # The root reads tensors for the bodies of sections, too.
    emitted: Any = module
    read = {str(n.target) for n in emitted.graph.nodes if n.op == "get_attr"}
    for leaf, section in _called(module, ""):
        if section:
            groups[section][leaf] = None
        else:
            groups[next((home[p] for p in home if is_below(leaf, (p,))), "")][leaf] = None
    for path, part in module.named_modules():
        if isinstance(part, LocalBackward) and part.trains:
            groups[path] |= {names[id(p)]: None for p in part.parts() if id(p) in names}
    users: dict[int, set[Any]] = defaultdict(set)
    for group, leaves in groups.items():
        for leaf in leaves:
            for parameter in module.get_submodule(leaf).parameters():
                users[id(parameter)].add(group)
    at_root = {id(by_name[name]) for name in read if name in by_name} | {p for p, found in users.items() if len(found) > 1 or "" in found}

    def inside(leaves: Iterable[str]) -> Paths:
        """The leaves of a group that are not left to the root."""
        found = [(leaf, [id(p) for p in module.get_submodule(leaf).parameters()]) for leaf in leaves]
        return tuple(leaf for leaf, parameters in found if parameters and at_root.isdisjoint(parameters))

    sections = tuple(Section(key, inside(leaves)) for key, leaves in groups.items() if isinstance(key, str) and key)
    lists = tuple(found for key, leaves in groups.items() if not isinstance(key, str) and (found := inside(leaves)))
    taken = {
        id(p) for leaves in (*lists, *(s.leaves for s in sections)) for leaf in leaves for p in module.get_submodule(leaf).parameters()
    }
    replicated = {name for name, p in by_name.items() if not p.ndim}
    unused = {name for name, p in by_name.items() if id(p) not in users and id(p) not in at_root}
    root = {name for name, p in by_name.items() if id(p) not in taken} - replicated - unused
    return Units(lists, sections, tuple(sorted(root)), tuple(sorted(replicated - unused)), tuple(sorted(unused)))


def _called(module: Any, section: str) -> Iterator[tuple[str, str]]:
    """Paths of the leaves that are called, in order, each with the path of the section around it that has a backward of its own."""
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        leaf = module.get_submodule(path)
        body = getattr(getattr(leaf, "body", None), "module", None)
        if body is None or not hasattr(body, "graph"):
            yield path, section
        else:
            yield from _called(body, path if isinstance(leaf, LocalBackward) and leaf.trains else section)
