"""Rows and operations of two backbones matched by structure: a global alignment of sequences (Needleman and Wunsch, 1970)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from graphopt.diff.model import ADDED, DIFFERS, REMOVED, UNCHANGED, ModelView, NodeRow, Row, ranked

Item = TypeVar("Item")
#: of two rows or two operations: alike in everything; in what they compute, not in sizes; in class; what an equal name adds
SAME, RESIZED, KIND, NAME = 8, 5, 3, 1


def matched(old: Sequence[Item], new: Sequence[Item], score: Callable[[Item, Item], int]) -> list[tuple[int, int]]:
    """Pairs of places (in `old`, in `new`), in the order of both, whose scores add up to the most; a score of 0 makes no pair.

    It takes as many comparisons as the product of the two lengths, without what both begin and end with.
    """
    start, most = 0, min(len(old), len(new))
    while start < most and score(old[start], new[start]) == SAME + NAME:
        start += 1
    end = 0
    while end < most - start and score(old[-1 - end], new[-1 - end]) == SAME + NAME:
        end += 1
    left, right = old[start : len(old) - end], new[start : len(new) - end]
    middle = [(start + a, start + b) for a, b in _aligned(left, right, score)]
    tail = [(len(old) - end + k, len(new) - end + k) for k in range(end)]
    return [*((k, k) for k in range(start)), *middle, *tail]


def _aligned(old: Sequence[Item], new: Sequence[Item], score: Callable[[Item, Item], int]) -> list[tuple[int, int]]:
    scores = [[score(a, b) for b in new] for a in old]
    #: the most that the rest of both, from a place in each, can add up to
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for a in reversed(range(len(old))):
        for b in reversed(range(len(new))):
            paired = scores[a][b] + best[a + 1][b + 1] if scores[a][b] else 0
            best[a][b] = max(paired, best[a + 1][b], best[a][b + 1])
    found, a, b = [], 0, 0
    while a < len(old) and b < len(new):
        if scores[a][b] and best[a][b] == scores[a][b] + best[a + 1][b + 1]:
            found.append((a, b))
            a, b = a + 1, b + 1
        elif best[a][b] == best[a + 1][b]:
            a += 1
        else:
            b += 1
    return found


def same_backbone(before: ModelView, after: ModelView) -> bool:
    """Whether two views are of one architecture: rows of the same names that compute the same in the same sizes."""
    one, other = ([(r.name, r.structure) for r in view.rows if r.structure] for view in (before, after))
    return one == other


def renamed(before: ModelView, after: ModelView) -> ModelView:
    """The first view with its rows under the names of the rows of the second that they match; `former` keeps their own.

    A row without a match keeps its name, with "(first)" behind where the second has a row of that name.
    """
    pairs = matched(before.rows, after.rows, _likeness)
    names = {before.rows[a].name: after.rows[b].name for a, b in pairs}
    taken = {row.name for row in after.rows}
    for row in before.rows:
        names.setdefault(row.name, f"{row.name} (first)" if row.name in taken else row.name)
    rows = tuple(
        replace(
            row,
            name=names[row.name],
            former=row.name if names[row.name] != row.name else None,
            attached_to=names.get(row.attached_to or ""),
            sources=tuple(names.get(source, source) for source in row.sources),
        )
        for row in before.rows
    )
    sections = tuple(replace(box, rows=tuple(names[name] for name in box.rows)) for box in before.sections)
    edges, stops = (tuple((names[a], names[b]) for a, b in pairs) for pairs in (before.edges, before.gradient_stops))
    return replace(
        before, rows=rows, sections=sections, edges=edges, gradient_stops=stops, feature_input=names.get(before.feature_input or "")
    )


def _likeness(one: Row, other: Row) -> int:
    name = NAME if one.name == other.name else 0
    if bool(one.attached_to) != bool(other.attached_to):  # an auxiliary head is no block of the backbone
        return 0
    if one.structure == other.structure and (one.structure or one.kind == other.kind):
        return SAME + name
    if one.operators == other.operators and one.operators:
        return RESIZED + name
    return (KIND if one.kind and one.kind == other.kind else 0) + name


def what_differs(old: Row, new: Row) -> dict[str, str]:
    """In which respects two matched rows differ, as `before → after`."""
    sizes = (("input", old.input_shape, new.input_shape), ("output", old.output_shape, new.output_shape))
    found = {"class": f"{old.kind} → {new.kind}"} if old.kind != new.kind else {}
    shapes = {what: ("×".join(map(str, a)), "×".join(map(str, b))) for what, a, b in sizes if a and b}
    found |= {what: f"{a} → {b}" for what, (a, b) in shapes.items() if a != b}
    if not found and old.operators != new.operators:
        found["operations"] = f"{sum(map(_computes, old.nodes))} → {sum(map(_computes, new.nodes))}"
    return found or {"settings": "of its operations"}


def matched_operations(old: Sequence[NodeRow], new: Sequence[NodeRow]) -> list[tuple[NodeRow, NodeRow]]:
    """Which operations of two matching rows are each other's."""
    return [(old[a], new[b]) for a, b in matched(old, new, _node_likeness)]


def operations(old: Row, new: Row) -> tuple[NodeRow, ...]:
    """The operations of a row that differs, each with what it is against the first; those that are only in the first come last."""
    before, after = ([node for node in row.nodes if _computes(node)] for row in (old, new))
    pairs = matched_operations(before, after)
    match = {other.name: one for one, other in pairs}
    found = []
    for node in new.nodes:
        theirs = match.get(node.name)
        if not _computes(node):
            status = UNCHANGED
        elif theirs is None:
            status = ADDED
        else:
            status = UNCHANGED if _sizes(theirs) == _sizes(node) else DIFFERS
        found.append(replace(node, statuses=ranked({*node.statuses, status})))
    here = {one.name: other.name for one, other in pairs}
    names = {node.name for node in new.nodes}
    gone = [node for node in before if node.name not in here]
    here |= {node.name: f"{node.name} (first)" if node.name in names else node.name for node in gone}
    for node in gone:
        inputs = tuple(here.get(name, name) for name in node.inputs)
        found.append(replace(node, name=here[node.name], inputs=inputs, statuses=(REMOVED,), changed_by=None))
    return tuple(found)


def _computes(node: NodeRow) -> bool:
    """Whether a node is an operation on activations: no parameter that is read, no arithmetic of shapes."""
    return node.op != "get_attr" and node.shape is not None


def _sizes(node: NodeRow) -> tuple[object, ...]:
    return node.shape, node.parameters, node.settings


def _node_likeness(one: NodeRow, other: NodeRow) -> int:
    if (one.op, one.what) != (other.op, other.what):
        return 0
    alike = SAME if _sizes(one) == _sizes(other) else RESIZED
    return alike + (NAME if one.path.rpartition(".")[2] == other.path.rpartition(".")[2] else 0)
