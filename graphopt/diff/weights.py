"""Two sets of weights of one architecture, or of two that share parts, compared block by block."""

from collections import defaultdict
from dataclasses import replace

from torch import Tensor

from graphopt.compiler.plan import Plan
from graphopt.diff.align import Diff
from graphopt.diff.locate import RowMap
from graphopt.diff.model import DIFFERS, Row, ranked


def with_weights(found: Diff, before: Plan, after: Plan) -> Diff:
    """The same diff, in which a row whose parameters have other values in the two plans differs and says by how much.

    The figure is the norm of the difference over the norm of the first's parameters. Rows in which the shapes differ are left as they are.
    """
    old, new = _parameters(before), _parameters(after)
    return replace(found, rows=tuple(_compared(row, old.get(row.former or row.name, []), new.get(row.name, [])) for row in found.rows))


def _parameters(plan: Plan) -> dict[str, list[Tensor]]:
    """The backbone's parameters by row, in the order of its state dict."""
    state, rows = plan.export_state(), plan.base.cached(RowMap)
    by_row: dict[str, list[Tensor]] = defaultdict(list)
    for name, _ in plan.backbone.named_parameters():
        if (index := rows.of_path(name)) is not None:
            by_row[rows.rows[index].name].append(state[name].double())
    return by_row


def _compared(row: Row, old: list[Tensor], new: list[Tensor]) -> Row:
    if not old or [t.shape for t in old] != [t.shape for t in new] or row.before is None or row.after is None:
        return row
    apart = sum(float((a - b).square().sum()) for a, b in zip(old, new, strict=True))
    if not apart:
        return row
    whole = sum(float(a.square().sum()) for a in old)
    words = f"{100 * (apart / whole) ** 0.5:.3g} % apart" if whole else "apart"
    return replace(row, statuses=ranked({*row.statuses, DIFFERS}), detail={"weights": words, **row.detail})
