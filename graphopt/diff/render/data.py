"""What the page and the SVG are drawn from: frames as plain values, operations kept once however many frames show them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from graphopt.diff.join import Diff, fold_name
from graphopt.diff.phases import Frame
from graphopt.diff.render.words import SHOWN, shape, title
from graphopt.diff.rows import FIGURES, plain
from graphopt.diff.status import STATUSES

#: the figures at the head of a picture, and the one the bars show first
TILES = ("trainable_parameters", "backward_flops", "forward_flops", "saved_activation_bytes", "peak_bytes")
METRICS = ("saved_activation_bytes", "backward_flops", "forward_flops", "trainable_parameters", "parameters")


def as_frames(shown: Diff | Sequence[Frame]) -> tuple[Frame, ...]:
    return (Frame(shown.after.epoch or 0, "", shown),) if isinstance(shown, Diff) else tuple(shown)


def page_data(shown: Diff | Sequence[Frame]) -> dict[str, Any]:
    """JSON-ready data of one diff or of a film; the same input gives the same bytes."""
    frames = as_frames(shown)
    show = most_changed(frames)
    last = frames[show].diff
    pool: list[Any] = []
    known: dict[str, int] = {}

    def pooled(nodes: Any) -> int:
        text = json.dumps(nodes, sort_keys=True)
        if text not in known:
            known[text] = len(pool)
            pool.append(nodes)
        return known[text]

    apart = _apart(frames)
    drawn = []
    for frame in frames:
        diff = frame.diff
        rows = []
        for row in diff.rows:
            value = plain(row)
            value["changed"] = row.changed
            value["nodes"] = pooled(value["nodes"])
            rows.append(value)
        folds: list[list[str]] = []
        for fold in diff.folded():
            for number, row in enumerate(fold.rows):
                if number and (fold.rows[number - 1].name, row.name) not in apart:
                    folds[-1].append(row.name)
                else:
                    folds.append([row.name])
        drawn.append(
            {
                "epoch": frame.epoch,
                "label": frame.label or "start",
                "totals": plain(diff.after.totals),
                "rows": rows,
                "folds": [{"name": fold_name(names), "rows": names} for names in folds],
                "edges": plain(diff.edges),
                "frontier": plain(diff.after.frontier),
                "bands": plain(diff.after.bands),
                "passes": plain(diff.after.passes),
                "counts": diff.counts(),
                "tap": diff.after.tap,
            }
        )
    costs = any("saved_activation_bytes" in (f or {}) for r in last.rows for f in (r.before, r.after))
    entering = next((r.entering for r in last.rows if r.entering), None)
    leaving = next((r.leaving for r in reversed(last.rows) if r.leaving and not r.beside), None)
    return {
        "title": title(last),
        "subtitle": subtitle(last),
        "notes": list(last.notes),
        "batch": last.after.batch,
        "spec": last.after.spec and str(last.after.spec).replace("\\", "/").rpartition("/")[2],
        "before": plain(last.before.totals),
        "input": shape(entering),
        "output": shape(leaving),
        "looks": {name: {"glyph": look.glyph, "meaning": look.meaning} for name, look in STATUSES.items()},
        "figures": {key: name for key, (name, _) in SHOWN.items() if key in FIGURES or key in TILES},
        "tiles": list(TILES),
        "metrics": list(METRICS) if costs else ["trainable_parameters", "parameters"],
        "metric": _telling(last) if costs else "trainable_parameters",
        "costs": True,
        "passes": plain(last.after.passes),
        "pool": pool,
        "frames": drawn,
        "show": show,
        # Room for the signs that any phase puts on an edge, so that none of them moves the blocks.
        "signs": sorted({e for f in frames for e in _signed(f.diff)}) if len(frames) > 1 else [],
    }


def most_changed(frames: Sequence[Frame]) -> int:
    """The phase in which most blocks are not as in the backbone; the latest of equals."""
    counts = [sum(row.changed for row in frame.diff.rows) for frame in frames]
    return max(range(len(frames)), key=lambda i: (counts[i], i))


def _signed(diff: Diff) -> list[tuple[str, str]]:
    return [*diff.after.frontier, *((a, b) for a, b, _ in diff.edges if a == diff.after.tap)]


def subtitle(diff: Diff) -> str:
    same = "" if diff.same_backbone else f" / {diff.before.backbone}"
    passes = ", ".join(p.use for p in diff.after.passes) or "no pass"
    return f"{diff.after.backbone}{same} · {passes} · batch {diff.after.batch}"


def _telling(diff: Diff) -> str:
    """The figure that falls most; saved activations where none does."""
    before, after = diff.before.totals or {}, diff.after.totals or {}
    saved = {k: 1 - after[k] / before[k] for k in METRICS if before.get(k) and k in after}
    return max(saved, key=lambda k: (round(saved[k], 3), -METRICS.index(k)), default=METRICS[0])


def _apart(frames: Sequence[Frame]) -> set[tuple[str, str]]:
    """Neighbours that some phase tells apart: they stay apart in all, so that only what changes moves."""
    apart = set()
    for frame in frames:
        folds = frame.diff.folded()
        apart |= {(a.rows[-1].name, b.rows[0].name) for a, b in pairwise(folds)}
    return apart


def as_script(value: Any) -> str:
    """JSON that can stand inside a `<script>`: no name can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return "".join(f"\\u{ord(c):04x}" if c in "<>&\u2028\u2029" else c for c in text)
