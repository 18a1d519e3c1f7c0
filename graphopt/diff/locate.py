"""Which row every node belongs to: blocks, and what lies before, between and after them."""

from collections.abc import Iterable, Iterator, Sequence

from torch.fx import Node

from graphopt.diff.model import RowLocation
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.paths import common_path, is_below, lineage, owner
from graphopt.ir.regions import Region


class RowMap:
    """The rows of a backbone in execution order, and the row of every node, path and region."""

    def __init__(self, base: Graph) -> None:
        self.base = base
        self.rows: list[RowLocation] = []
        self._by_node: dict[str, int] = {}
        blocks = find_blocks(base)
        self._names = {block.name for block in blocks}
        #: the innermost module that holds every block; a row's stage is the module right below it
        self._trunk = common_path(owner(path) for block in blocks for path in block.paths)
        for number, gap in enumerate(_gaps(base, blocks)):
            for name, kind, nodes in self._gap_rows(gap, number, len(blocks)):
                self._add_gap(name, kind, nodes)
            if number < len(blocks):
                block = blocks[number]
                self._add(RowLocation(block.name, block.paths, block.kind, self._stage(block.paths[0]) or "blocks"), block.nodes)
        self._by_path = {path: index for index, row in enumerate(self.rows) for path in row.paths if path}

    def of(self, node: Node) -> int | None:
        """The row of a node, rewritten or not; of an inserted one, that of its origin, else that of its last input."""
        while node.op not in ("placeholder", "output"):
            index = self._by_node.get(node.name, self.of_path(node.meta["origin"].path))
            if index is not None:
                return index
            if not node.all_input_nodes:
                return None
            node = node.all_input_nodes[-1]
        return None

    def of_path(self, path: str) -> int | None:
        """The row that a module path or a parameter's name lies in."""
        return next((self._by_path[p] for p in reversed(list(lineage(path))) if p in self._by_path), None)

    def named(self, name: str) -> tuple[int, ...]:
        """The row of that name; else the one that holds the path, or all that lie below it."""
        exact = next((i for i, row in enumerate(self.rows) if row.name == name), self.of_path(name))
        if exact is not None:
            return (exact,)
        return tuple(i for i, row in enumerate(self.rows) if any(is_below(p, (name,)) for p in row.paths))

    def _add(self, row: RowLocation, nodes: Iterable[Node]) -> None:
        self.rows.append(row)
        self._by_node.update((n.name, len(self.rows) - 1) for n in nodes)

    def _add_gap(self, name: str, kind: str, nodes: Sequence[Node]) -> None:
        paths = _outermost(str(n.target) if n.op == "get_attr" else n.meta["origin"].path for n in nodes)
        unique = name if name not in self._names else next(f"{name} {i}" for i in range(2, 999) if f"{name} {i}" not in self._names)
        self._names.add(unique)
        stage = unique if name in ("stem", "head") else self._stage(paths[0] if paths else "") or unique
        self._add(RowLocation(unique, paths, kind, stage), nodes)

    def _gap_rows(self, gap: list[Node], number: int, blocks: int) -> Iterator[tuple[str, str, list[Node]]]:
        """Name, class and nodes of the rows in the gap before block `number`.

        They are the stem, the head, or what lies between two blocks; in a backbone without blocks, one row for each top-level module.
        """
        holding = [n for n in gap if n.op in ("call_module", "get_attr")]
        types = self.base.types
        if not blocks:
            yield from ((name, types.get(name, ""), nodes) for name, nodes in _by_top_module(gap).items())
        elif gap and number in (0, blocks) and (holding or number == 0):
            kinds = dict.fromkeys(types.get(str(n.target), "") for n in holding if n.op == "call_module")
            yield "stem" if number == 0 else "head", " ".join(k for k in kinds if k)[:60], gap
        elif holding:
            common = common_path(n.meta["origin"].path for n in holding)
            yield common or "between", types.get(common, ""), gap
        else:  # shape arithmetic belongs to the block before it
            self._by_node.update((n.name, len(self.rows) - 1) for n in gap)

    def _stage(self, path: str) -> str:
        depth, parts = self._trunk.count(".") + 1 if self._trunk else 0, path.split(".")
        if len(parts) > depth + 1:
            return ".".join(parts[: depth + 1])
        return self._trunk if self._trunk and path.startswith(f"{self._trunk}.") else ""


def _gaps(base: Graph, blocks: Sequence[Region]) -> list[list[Node]]:
    """The nodes before the first block, between each two, and after the last."""
    block_of = {node: number for number, block in enumerate(blocks) for node in block.nodes}
    gaps: list[list[Node]] = [[] for _ in range(len(blocks) + 1)]
    number = 0
    for node in base.nodes:
        if node in block_of:
            number = max(number, block_of[node] + 1)
        elif node.op not in ("placeholder", "output"):
            gaps[number].append(node)
    return gaps


def _by_top_module(nodes: list[Node]) -> dict[str, list[Node]]:
    """Nodes by the outermost module they come from; those from none go with the one before them."""
    rows: dict[str, list[Node]] = {}
    tops = [n.meta["origin"].path.split(".")[0] for n in nodes]
    last = next((top for top in tops if top), "stem")
    for node, top in zip(nodes, tops, strict=True):
        last = top or last
        rows.setdefault(last, []).append(node)
    return rows


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    unique = [p for p in dict.fromkeys(paths) if p]
    return tuple(p for p in unique if not is_below(p, (q for q in unique if q != p)))
