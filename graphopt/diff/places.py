"""Which row every node belongs to: blocks, and what lies before, between and behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph


@dataclass(frozen=True)
class Place:
    """A row's place in a backbone: its name, its module paths (none inside another), its class and its stage."""

    name: str
    paths: tuple[str, ...]
    kind: str
    stage: str


class Places:
    """The rows of a backbone in execution order, and for any node of it, rewritten or not, its row."""

    def __init__(self, base: Graph) -> None:
        self.base = base
        blocks = find_blocks(base)
        self._of: dict[str, int] = {}
        found: list[Place] = []
        owner = {node: number for number, block in enumerate(blocks) for node in block.nodes}
        stages = _Stages([p for b in blocks for p in b.paths])
        gaps: dict[int, list[fx.Node]] = {}
        at = 0
        for node in base.nodes:
            if node in owner:
                at = max(at, owner[node] + 1)
            elif node.op not in ("placeholder", "output"):
                gaps.setdefault(at, []).append(node)
        self._rows: dict[str, int] = {}
        names: set[str] = {b.name for b in blocks}
        for number in range(len(blocks) + 1):
            gap = gaps.get(number, [])
            holds = [n for n in gap if n.op in ("call_module", "get_attr")]
            if gap and (holds or number == 0 or not blocks):
                for name, kind, nodes in _gap_rows(gap, holds, number, len(blocks), base):
                    paths = _outermost(str(n.target) if n.op == "get_attr" else n.meta["origin"].path for n in nodes)
                    unique = name if name not in names else next(f"{name} {i}" for i in range(2, 999) if f"{name} {i}" not in names)
                    names.add(unique)
                    stage = unique if name in ("stem", "head") else stages.of(paths[0] if paths else "") or unique
                    self._take(nodes, len(found))
                    found.append(Place(unique, paths, kind, stage))
            elif gap:  # shape arithmetic between two blocks goes with the one before it
                self._take(gap, len(found) - 1)
            if number < len(blocks):
                block = blocks[number]
                self._take(block.nodes, len(found))
                found.append(Place(block.name, block.paths, block.kind, stages.of(block.paths[0]) or "blocks"))
        self.rows = tuple(found)
        self._paths = {path: index for index, place in enumerate(found) for path in place.paths if path}

    def _take(self, nodes: Iterable[fx.Node], index: int) -> None:
        self._rows.update((n.name, max(index, 0)) for n in nodes)

    def of(self, node: fx.Node) -> int | None:
        """The row of a node: a base node's own; an inserted one's by its origin, else that of its first input."""
        seen: set[fx.Node] = set()
        while node not in seen and node.op not in ("placeholder", "output"):
            seen.add(node)
            if "pass" not in node.meta and node.name in self._rows:
                return self._rows[node.name]
            index = self.of_path(node.meta["origin"].path)
            if index is not None:
                return index
            if not node.all_input_nodes:
                return None
            node = node.all_input_nodes[-1]
        return None

    def of_path(self, path: str) -> int | None:
        """The row that a module path or a parameter's name lies in."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (index := self._paths.get(".".join(parts[:end]))) is not None:
                return index
        return None

    def touched(self, name: str) -> tuple[int, ...]:
        """The rows a region's name is about: the row of that name, the one it lies in, or all that lie in it."""
        exact = [i for i, place in enumerate(self.rows) if place.name == name]
        if exact:
            return tuple(exact)
        if (inside := self.of_path(name)) is not None:
            return (inside,)
        under = [i for i, place in enumerate(self.rows) if any(p.startswith(f"{name}.") for p in place.paths)]
        if under:
            return tuple(under)
        if "-" in name:  # a run, "conv1-maxpool": its ends
            first, _, last = name.rpartition("-")
            parent = first.rpartition(".")[0]
            ends = [self.of_path(first), self.of_path(f"{parent}.{last}" if parent else last)]
            return tuple(dict.fromkeys(i for i in ends if i is not None))
        return ()


def _gap_rows(gap: list[fx.Node], holds: list[fx.Node], number: int, blocks: int, base: Graph) -> list[tuple[str, str, list[fx.Node]]]:
    """What lies between two blocks as rows: the stem, the head, or (in a backbone without blocks) one row per top-level module."""
    if blocks:
        if number in (0, blocks):
            kinds = [base.types.get(str(n.target), "") for n in holds if n.op == "call_module"]
            return [("stem" if number == 0 else "head", " ".join(dict.fromkeys(k for k in kinds if k))[:60], gap)]
        common = _common(n.meta["origin"].path for n in holds)
        return [(common or "between", base.types.get(common, ""), gap)]
    rows: dict[str, list[fx.Node]] = {}
    last = next((n.meta["origin"].path.split(".")[0] for n in gap if n.meta["origin"].path), "stem")
    for node in gap:
        last = node.meta["origin"].path.split(".")[0] or last
        rows.setdefault(last, []).append(node)
    return [(name, base.types.get(name, ""), nodes) for name, nodes in rows.items()]


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    unique = [p for p in dict.fromkeys(paths) if p]
    return tuple(p for p in unique if not any(p != q and p.startswith(f"{q}.") for q in unique))


def _common(paths: Iterable[str]) -> str:
    shared: list[str] | None = None
    for path in paths:
        parts = path.split(".")
        if shared is None:
            shared = parts
        else:
            shared = [a for a, b in zip(shared, parts, strict=False) if a == b][: _equal(shared, parts)]
    return ".".join(shared or [])


def _equal(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Stages:
    """A row's stage is its outermost module that does not hold every block."""

    def __init__(self, paths: list[str]) -> None:
        split = [p.split(".")[:-1] for p in paths]
        self._depth = 0
        while split and all(len(s) > self._depth for s in split) and len({s[self._depth] for s in split}) == 1:
            self._depth += 1
        self._whole = ".".join(split[0][: self._depth]) if split else ""

    def of(self, path: str) -> str:
        parts = path.split(".")
        if len(parts) > self._depth + 1:
            return ".".join(parts[: self._depth + 1])
        return self._whole if self._whole and path.startswith(f"{self._whole}.") else ""
