"""What the page and the SVG are drawn from: phases as plain values, operations stored once however many phases show them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from graphopt.cost.figures import FIGURES
from graphopt.diff.align import Diff, group_name
from graphopt.diff.model import STYLES, as_json
from graphopt.diff.phases import PhaseDiff
from graphopt.diff.render.words import shape, title
from graphopt.errors import printable

#: the figures at the head of a picture, and those that the bars can show
TILES = ("trainable_parameters", "backward_flops", "forward_flops", "saved_activation_bytes", "peak_bytes")
METRICS = ("saved_activation_bytes", "backward_flops", "forward_flops", "trainable_parameters", "parameters")

#: one diff, or the phases of a plan
Shown = Diff | Sequence[PhaseDiff]


def as_phases(shown: Shown) -> tuple[PhaseDiff, ...]:
    """The phases; one diff is the only phase."""
    return (PhaseDiff(shown.after.epoch or 0, "start", shown),) if isinstance(shown, Diff) else tuple(shown)


def most_changed(phases: Sequence[PhaseDiff]) -> int:
    """The phase in which most blocks are not as in the backbone; the latest of equals."""
    counts = [sum(row.changed for row in phase.diff.rows) for phase in phases]
    return max(range(len(phases)), key=lambda i: (counts[i], i))


def main_diff(shown: Shown) -> Diff:
    """The one diff; of several phases, the one that changes most."""
    phases = as_phases(shown)
    return phases[most_changed(phases)].diff


def page_data(shown: Shown) -> dict[str, Any]:
    """JSON-ready data of one diff or of several phases; the same input gives the same bytes."""
    phases = as_phases(shown)
    main = main_diff(shown)
    pool = _Pool()
    apart = _apart(phases)
    has_costs = any("saved_activation_bytes" in (f or {}) for r in main.rows for f in (r.before, r.after))
    return _visible(
        {
            "title": title(main),
            "subtitle": subtitle(main),
            "notes": list(main.notes),
            "batch": main.after.batch,
            "spec": main.after.spec,
            "before": as_json(main.before.totals),
            "input": shape(next((r.input_shape for r in main.rows if r.input_shape), None)),
            "output": shape(next((r.output_shape for r in reversed(main.rows) if r.output_shape and not r.attached_to), None)),
            "styles": {name: {"glyph": style.glyph, "meaning": style.meaning} for name, style in STYLES.items()},
            "figures": {f.name: f.title for f in FIGURES},
            "tiles": list(TILES),
            "metrics": list(METRICS) if has_costs else ["trainable_parameters", "parameters"],
            "metric": _main_metric(main) if has_costs else "trainable_parameters",
            "phases": [_phase(phase, pool, apart) for phase in phases],
            "pool": list(map(json.loads, pool)),
            "show": most_changed(phases),
            # Room for the labels that any phase puts on an edge, so that none of them moves the blocks.
            "labelled": sorted({edge for p in phases for edge in _labelled(p.diff)}) if len(phases) > 1 else [],
        }
    )


def _visible(value: Any) -> Any:
    """The same data with every text, keys included, fit to be shown."""
    if isinstance(value, dict):
        return {_visible(k): _visible(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible(v) for v in value]
    return printable(value) if isinstance(value, str) else value


class _Pool(dict[str, int]):
    """Values that many rows have in common, each stored once: JSON -> number."""

    def add(self, value: Any) -> int:
        """The number of a value."""
        return self.setdefault(json.dumps(value), len(self))


def _phase(phase: PhaseDiff, pool: _Pool, apart: set[tuple[str, str]]) -> dict[str, Any]:
    diff = phase.diff
    rows = [as_json(row) | {"changed": row.changed} for row in diff.rows]
    groups: list[list[str]] = []
    for row in diff.rows:
        if not groups or (groups[-1][-1], row.name) in apart:
            groups.append([])
        groups[-1].append(row.name)
    head = {"epoch": phase.epoch, "label": phase.label, "totals": as_json(diff.after.totals)}
    shown = [{"name": group_name(names), "rows": names} for names in groups]
    return {**head, "rows": [row | {"nodes": pool.add(row["nodes"])} for row in rows], "groups": shown, **diff.flow()}


def _apart(phases: Sequence[PhaseDiff]) -> set[tuple[str, str]]:
    """Neighbours that some phase shows apart: they stay apart in all, so that only what changes moves."""
    return {(a.rows[-1].name, b.rows[0].name) for phase in phases for a, b in pairwise(phase.diff.groups())}


def _labelled(diff: Diff) -> list[tuple[str, str]]:
    return [*diff.after.gradient_stops, *((a, b) for a, b, _ in diff.edges if a == diff.after.feature_input)]


def subtitle(diff: Diff) -> str:
    """The backbones, the passes and the batch."""
    other = "" if diff.same_backbone else f"{diff.before.backbone} / "
    passes = ", ".join(p.name for p in diff.after.passes) or ("no pass" if diff.same_backbone else "")
    return f"{other}{diff.after.backbone}{passes and f' · {passes}'} · batch {diff.after.batch}"


def _main_metric(diff: Diff) -> str:
    """The figure that falls most; saved activations where none does."""
    before, after = diff.before.totals or {}, diff.after.totals or {}
    saved = {k: 1 - after[k] / before[k] for k in METRICS if before.get(k) and k in after}
    return max(saved, key=lambda k: (round(saved[k], 3), -METRICS.index(k)), default=METRICS[0])


def as_script(value: Any) -> str:
    """JSON that can stand inside a `<script>`: no name can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return "".join(f"\\u{ord(c):04x}" if c in "<>&\u2028\u2029" else c for c in text)
